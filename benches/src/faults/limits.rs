//! What a process may run out of, and what may be done to it from outside: memory, descriptors, time, and its threads' turns.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How long a crowd waits for its answers.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long threads that were stopped stay so at the most.
const WEDGED: Duration = Duration::from_secs(60);

/// The words before a program that may then read only what its user may.
pub(super) fn without_override() -> &'static str {
    "exec setpriv --bounding-set -dac_override,-dac_read_search"
}

/// The library that gives a process another wall clock.
///
/// # Errors
/// What to install.
pub(super) fn faketime() -> Result<PathBuf, String> {
    let folders = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let found = folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1")).find(|file| file.is_file());
    found.ok_or_else(|| "the wall clock of one process cannot be set (Debian package libfaketime)".to_owned())
}

/// The words before a program whose wall clock is as far ahead as `file` says, in the library's form. Its monotonic clock is left alone.
pub(super) fn with_clock(library: &Path, file: &Path) -> String {
    let (library, file) = (library.display(), file.display());
    format!(
        "exec env LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={file} FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1"
    )
}

/// Connections that are held until dropped.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    held: Vec<TcpStream>,
    /// Those that were answered with 200 and with 503, those that were closed, and those that had to wait.
    pub(super) answers: [usize; 4],
    /// How long all of it took.
    pub(super) took: Duration,
}

impl Crowd {
    /// `count` clients connect, and each asks one thing. Some are let go again.
    ///
    /// # Errors
    /// This process may not have so many open files.
    pub(super) fn come(address: SocketAddr, count: usize) -> Result<Self> {
        let before = getrlimit(Resource::Nofile);
        ensure!(before.maximum.is_none_or(|most| most > count as u64 + 200), "{count} clients need more open files");
        setrlimit(Resource::Nofile, Rlimit { current: before.maximum, ..before })?;
        let (mut crowd, start) = (Self::default(), Instant::now());
        for _ in 0..count {
            let left = PATIENCE.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            let Ok(mut client) = TcpStream::connect_timeout(&address, left) else {
                crowd.answers[3] += 1;
                continue;
            };
            // One that is refused may be gone already.
            client.write_all(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n").ok();
            crowd.held.push(client);
        }
        for client in &mut crowd.held {
            let left = PATIENCE.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            client.set_read_timeout(Some(left))?;
            let mut line = [0; 12];
            let kind = match client.read_exact(&mut line) {
                Ok(()) if &line[9..] == b"200" => 0,
                Ok(()) if &line[9..] == b"503" => 1,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 3,
                _ => 2,
            };
            crowd.answers[kind] += 1;
        }
        crowd.took = start.elapsed();
        Ok(crowd)
    }
}

/// Threads of a process that stand still until this is dropped: traced and stopped, one by one, as if each hung in the kernel.
#[derive(Debug)]
pub(super) struct Wedge {
    let_go: Option<Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl Wedge {
    /// Stops the threads of `pid` whose names begin so.
    ///
    /// # Errors
    /// There are none, or they may not be traced.
    pub(super) fn threads(pid: u32, name: &str) -> Result<Self> {
        let mut threads = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let entry = entry?;
            if fs::read_to_string(entry.path().join("comm"))?.starts_with(name) {
                threads.push(Pid::from_raw(entry.file_name().to_string_lossy().parse()?));
            }
        }
        ensure!(!threads.is_empty(), "process {pid} has no thread {name}");
        let (let_go, told) = channel::<()>();
        let (tell, stopped) = channel();
        // Who traces is a thread: when it ends, what it traced goes on.
        let tracer = thread::spawn(move || {
            let stop = |thread: &Pid| {
                ptrace::seize(*thread, ptrace::Options::empty())?;
                ptrace::interrupt(*thread)
            };
            let done = threads.iter().try_for_each(stop);
            tell.send(done).ok();
            told.recv_timeout(WEDGED).ok();
            for thread in threads {
                // One that was killed is waited for here; one that runs on is let go by our end.
                waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).ok();
            }
        });
        stopped.recv().context("the tracer ended")?.context("trace")?;
        Ok(Self { let_go: Some(let_go), tracer: Some(tracer) })
    }
}

impl Drop for Wedge {
    fn drop(&mut self) {
        self.let_go = None;
        if let Some(tracer) = self.tracer.take() {
            tracer.join().ok();
        }
    }
}
