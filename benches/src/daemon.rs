//! Processes that end with what started them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::netns::Node;

/// How long a process may take to end after SIGTERM before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// A running process whose output goes to a file.
///
/// It is killed when this value is dropped, and by the kernel when the *thread* that started it ends
/// (`PR_SET_PDEATHSIG`, set by util-linux's `setpriv`), so that nothing survives a killed test. Keep it on the thread that made it.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

// === impl Daemon ===

impl Daemon {
    /// Starts a process, in a node's network namespace if one is given, with its output appended to `log`.
    ///
    /// # Errors
    /// A program that cannot be started; one that ends at once is noticed by [`Daemon::wait_until`].
    pub fn start(name: &str, node: Option<&Node>, command: &[&str], log: &Path) -> Result<Self> {
        let output =
            File::options().create(true).append(true).open(log).with_context(|| format!("open {}", log.display()))?;
        let mut full = vec!["setpriv", "--pdeathsig", "KILL"];
        full.extend(command);
        let mut process = match node {
            Some(node) => node.command(full[0]),
            None => Command::new(full[0]),
        };
        let child = process
            .args(&full[1..])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// The process's number. It does not change through `ip netns exec` and `setpriv`, which replace themselves.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it was started as.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Everything that it has written so far.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Whether the process still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until `condition` holds.
    ///
    /// # Errors
    /// The process ends first, or the time is over; the error carries the end of the log.
    pub fn wait_until(&mut self, limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !condition() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended ({status}) before {what}; its log ends with:\n{}", self.name, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{}: no {what} within {limit:?}; its log ends with:\n{}", self.name, self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    /// The time is over.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {limit:?}; its log ends with:\n{}", self.name, self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("the process has no number")?;
        kill_process(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Ends the process: SIGTERM, and SIGKILL if that does not do it in ten seconds.
    ///
    /// # Errors
    /// A process that even SIGKILL does not end.
    pub fn stop(mut self) -> Result<ExitStatus> {
        if self.is_alive() {
            self.signal(Signal::TERM)?;
        }
        match self.wait_exit(GRACE) {
            Ok(status) => Ok(status),
            Err(_) => {
                self.child.kill()?;
                Ok(self.child.wait()?)
            }
        }
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Failing means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `condition` holds; for what has no process of its own to look at.
///
/// # Errors
/// The time is over.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() > deadline {
            bail!("no {what} within {limit:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// A command that cannot be started or fails; the error carries what it wrote to standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let text = format!("{command:?}");
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("run {text}"))?;
    if !done.status.success() {
        bail!("{text} failed ({}): {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Where a program lies, looked up in `PATH` and in the directories of system daemons.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/go/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_process_that_ends_early_is_reported_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut daemon = Daemon::start("early", None, &["sh", "-c", "echo because; exit 3"], &log).unwrap();
        let error = daemon.wait_until(Duration::from_secs(10), "readiness", || false).unwrap_err().to_string();
        assert!(error.contains("because") && error.contains("exit status: 3"), "{error}");
    }

    #[test]
    fn stop_terminates_and_drop_kills() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done";
        let mut daemon = Daemon::start("polite", None, &["sh", "-c", script], &log).unwrap();
        daemon
            .wait_until(Duration::from_secs(10), "start", || fs::read_to_string(&log).unwrap().contains("up"))
            .unwrap();
        assert!(daemon.stop().unwrap().success());
        assert!(fs::read_to_string(&log).unwrap().contains("bye"));

        let daemon = Daemon::start("sleeper", None, &["sleep", "1000"], &log).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", daemon.pid()));
        assert!(proc.exists());
        drop(daemon);
        assert!(!proc.exists());
    }

    #[test]
    fn the_kernel_ends_it_with_its_thread() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut daemon = thread::spawn(move || {
            let mut daemon = Daemon::start("orphan", None, &["sh", "-c", "echo up; sleep 1000"], &log).unwrap();
            daemon
                .wait_until(Duration::from_secs(10), "start", || fs::read_to_string(&log).unwrap().contains("up"))
                .unwrap();
            daemon
        })
        .join()
        .unwrap();
        assert!(!daemon.wait_exit(Duration::from_secs(10)).unwrap().success());
    }
}
