//! containerd's process, as far as it can be seen: what it was told and what it sees.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::UnixStream;

/// Where containerd looks for its configuration if it is not told.
const CONFIG: &str = "/etc/containerd/config.toml";

/// The process behind a socket.
#[derive(Clone, Debug)]
pub(super) struct Process {
    /// Where its file system begins, as seen from here.
    pub(super) root: PathBuf,
    /// What it was started with.
    pub(super) arguments: Vec<String>,
    /// Its environment, when it was started, or why that cannot be seen.
    pub(super) environment: Result<BTreeMap<String, String>, String>,
    /// When it was started, to the second.
    pub(super) started: Option<SystemTime>,
    /// The folder that it was started in.
    folder: PathBuf,
}

/// When a process was started.
fn started(pid: i32) -> Option<SystemTime> {
    let stat = procfs::process::Process::new(pid).ok()?.stat().ok()?;
    let up = Duration::from_secs(stat.starttime / procfs::ticks_per_second().max(1));
    Some(UNIX_EPOCH + Duration::from_secs(procfs::boot_time_secs().ok()?) + up)
}

impl Process {
    /// No process; its files are those that are seen from here.
    pub(super) fn unseen() -> Self {
        Self {
            root: "/".into(),
            arguments: Vec::new(),
            environment: Err("no process".into()),
            started: None,
            folder: "/".into(),
        }
    }

    /// Who listens on this socket.
    ///
    /// # Errors
    /// Why that cannot be seen from here.
    pub(super) async fn behind(socket: &Path) -> Result<Self, String> {
        let say = |error: std::io::Error| format!("{}: {error}", socket.display());
        let stream = UnixStream::connect(socket).await.map_err(say)?;
        let pid = stream.peer_cred().map_err(say)?.pid().filter(|pid| *pid > 0);
        let Some(pid) = pid else { return Err("its process is not of this process namespace".to_owned()) };
        let own = Path::new("/proc").join(pid.to_string());
        let read = |name: &str| {
            let text = fs::read(own.join(name)).map_err(|error| format!("/proc/{pid}/{name}: {error}"))?;
            let parts = text.split(|byte| *byte == 0).filter(|part| !part.is_empty());
            Ok::<Vec<String>, String>(parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect())
        };
        // systemd may hold the socket for it.
        let arguments = read("cmdline")?;
        if pid == 1 || arguments.is_empty() {
            return Err(format!("process {pid} holds the socket, and is not containerd"));
        }
        let pair = |pair: String| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()));
        let environment = read("environ").map(|pairs| pairs.into_iter().filter_map(pair).collect());
        let folder = fs::read_link(own.join("cwd")).unwrap_or_default();
        let mut process = Self { root: own.join("root"), arguments, environment, started: started(pid), folder };
        if fs::read_dir(&process.root).is_err() {
            // Without the right to trace it its root stays closed. Where its configuration is here as well, the root is the same.
            process.root = "/".into();
            let config = process.config();
            if !config.is_file() {
                return Err(format!(
                    "/proc/{pid}/root is closed to this process, and {} is not here",
                    config.display()
                ));
            }
        }
        Ok(process)
    }

    /// Its configuration file, as it sees it.
    pub(super) fn config(&self) -> PathBuf {
        let mut words = self.arguments.iter();
        while let Some(word) = words.next() {
            let named = |flag: &str| word.strip_prefix(flag).and_then(|rest| rest.strip_prefix('=')).map(str::to_owned);
            let value = match word.as_str() {
                "-c" | "--config" | "-config" => words.next().cloned(),
                _ => named("--config").or_else(|| named("-c")).or_else(|| named("-config")),
            };
            if let Some(value) = value {
                return self.folder.join(value);
            }
        }
        CONFIG.into()
    }

    /// The folder that it was started in, as it sees it.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path of its, as seen from here.
    pub(super) fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_configuration_is_the_one_that_it_was_told() {
        let of = |arguments: &[&str]| {
            let arguments = arguments.iter().map(|&word| word.to_owned()).collect();
            Process { arguments, folder: "/run".into(), ..Process::unseen() }.config().display().to_string()
        };
        assert_eq!(of(&["containerd"]), CONFIG);
        assert_eq!(of(&["containerd", "-c", "/a"]), "/a");
        assert_eq!(of(&["containerd", "--log-level", "info", "--config=/b"]), "/b");
        assert_eq!(of(&["containerd", "--config", "c.toml"]), "/run/c.toml");
    }

    #[test]
    fn when_a_process_was_started_is_known() {
        let before = SystemTime::now() - Duration::from_secs(2);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let started = started(i32::try_from(child.id()).unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(started > before && started <= SystemTime::now(), "{started:?}");
    }
}
