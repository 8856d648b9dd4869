//! One host: its namespaces, its writable layer, and its service as the unit describes it, by systemd itself where that was booted.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use spegel_benches::daemon::{Daemon, output};
use spegel_benches::http::Client;
use spegel_benches::netns::Node;

use super::systemd::Systemd;

/// Where a host sees the folder that the test shares with it.
const SHARED: &str = "mnt";
/// The root of a host: a layer above this machine's root, with what a process needs to live.
const ENTER: &str = "set -e; cd \"$0\"; mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root; \
                     mount -t proc proc root/proc; mount --rbind /dev root/dev; mount -t tmpfs tmpfs root/run; mount -t tmpfs tmpfs root/tmp; \
                     mount --bind shared root/mnt; touch shared/ready; exec sleep infinity";
/// In seconds; the unit's own bound would make the test wait for long.
const WATCHDOG: u64 = 3;

pub(crate) struct Host {
    pub(super) node: Node,
    folder: PathBuf,
    /// Keeps the namespaces.
    holder: Daemon,
    service: Option<Daemon>,
    socket: UnixDatagram,
    systemd: Option<Systemd>,
}

/// Whether a layer can be laid above this machine's root.
pub(super) fn overlay_works() -> Result<(), String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let script = "cd \"$0\" && mkdir u w m && mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w m";
    let tried = output(Command::new("unshare").args(["--mount", "sh", "-c", script]).arg(dir.path()));
    tried.map(|_| ()).map_err(|error| format!("no overlayfs above this machine's root: {error:#}"))
}

// === impl Host ===

impl Host {
    pub(crate) fn start(node: Node, parent: &Path) -> Result<Self> {
        let (folder, socket) = prepare(&node, parent)?;
        let text = folder.display().to_string();
        let command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, &text];
        let mut holder = Daemon::start(node.namespace(), Some(&node), &command, &folder.join("log"))?;
        let ready = folder.join("shared/ready");
        holder.wait_until(Duration::from_secs(20), "mounts", || ready.exists())?;
        Ok(Self { node, folder, holder, service: None, socket, systemd: None })
    }

    /// A host whose first process is systemd.
    ///
    /// # Errors
    /// It does not come up.
    pub(super) fn boot(node: Node, parent: &Path) -> Result<Self> {
        let (folder, socket) = prepare(&node, parent)?;
        let (systemd, holder) = Systemd::boot(&node, &folder)?;
        Ok(Self { node, folder, holder, service: None, socket, systemd: Some(systemd) })
    }

    /// Its systemd; none where the test stands in for it.
    pub(super) fn systemd(&self) -> Option<&Systemd> {
        self.systemd.as_ref()
    }

    /// A command in this host.
    pub(crate) fn command(&self, program: &str) -> Command {
        let words = self.enter();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(program);
        command
    }

    fn enter(&self) -> Vec<String> {
        if let Some(systemd) = &self.systemd {
            return systemd.enter();
        }
        let root = self.folder.join("root").display().to_string();
        let pid = self.holder.pid().to_string();
        ["nsenter", "--target", &pid, "--mount", "--net", "chroot", &root].map(str::to_owned).to_vec()
    }

    /// Where a file of the host is seen from here, once it was changed there.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        if let Some(systemd) = &self.systemd {
            return systemd.root().join(path);
        }
        // Through the holder, since the root is mounted in its namespace.
        let root = Path::new("/proc").join(self.holder.pid().to_string()).join("root");
        root.join(self.folder.join("root").strip_prefix("/").unwrap_or(Path::new(""))).join(path)
    }

    pub(super) fn read(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.path(path)).with_context(|| format!("read {path} on {}", self.node.address()))
    }

    pub(super) fn write(&self, path: &str, text: &str) -> Result<()> {
        let place = self.path(path);
        fs::create_dir_all(place.parent().unwrap_or(&place))?;
        fs::write(&place, text).with_context(|| format!("write {path}"))
    }

    /// Runs dpkg there, with a package of the test's if one is given.
    pub(crate) fn dpkg(&self, arguments: &[&str], package: Option<&Path>) -> Result<()> {
        let mut command = self.command("dpkg");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["--force-confold", "--force-unsafe-io"]).args(arguments);
        if let Some(package) = package {
            command.arg(self.share(package)?);
        }
        output(&mut command).map(|_| ())
    }

    /// Gives a file to the host; returns its path there.
    pub(super) fn share(&self, file: &Path) -> Result<String> {
        let name = file.file_name().context("a file has a name")?;
        fs::copy(file, self.folder.join("shared").join(name))?;
        Ok(Path::new("/").join(SHARED).join(name).display().to_string())
    }

    /// Starts what the installed unit says, as systemd would.
    pub(super) fn start_service(&mut self) -> Result<()> {
        if self.systemd.is_some() {
            // It returns once the unit is ready.
            return self.systemctl(&["start", "spegel.service"]).map(|_| ()).with_context(|| self.log());
        }
        let unit = self.read("usr/lib/systemd/system/spegel.service")?;
        let value = |key: &str| {
            let line = unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            line.with_context(|| format!("the unit has no {key}"))
        };
        let file = value("EnvironmentFile")?.trim_start_matches(['-', '/']).to_owned();
        let mut environment = vec!["env".to_owned(), "-i".to_owned(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
        let settings = self.read(&file)?;
        environment
            .extend(settings.lines().filter(|line| !line.starts_with('#') && line.contains('=')).map(str::to_owned));
        let before = value("ExecStartPre")?.trim_start_matches('+').to_owned();
        fs::create_dir_all(self.path(&format!("var/lib/{}", value("StateDirectory")?)))?;
        output(self.command("env").args(&environment[1..]).args(before.split(' ')))?;
        environment.push(format!("NOTIFY_SOCKET=/{SHARED}/notify"));
        environment.push(format!("WATCHDOG_USEC={}", WATCHDOG * 1_000_000));
        // The number stays the same through nsenter, chroot, env and sh, which replace themselves.
        let start = format!("WATCHDOG_PID=$$ exec {}", value("ExecStart")?);
        environment.extend(["sh".to_owned(), "-c".to_owned(), start]);
        let command = [self.enter(), environment].concat();
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        self.service = Some(Daemon::start("spegel", None, &command, &self.folder.join("log"))?);
        ensure!(self.said("READY=1", Duration::from_secs(20)), "the service does not become ready: {}", self.log());
        Ok(())
    }

    pub(super) fn stop_service(&mut self) -> Result<()> {
        if self.systemd.is_some() {
            self.systemctl(&["stop", "spegel.service"])?;
            let ended = self.systemctl(&["show", "--property=Result", "spegel.service"])?;
            ensure!(ended.trim() == "Result=success", "the unit ended with {ended}: {}", self.log());
            return Ok(());
        }
        self.forget();
        if let Some(service) = self.service.take() {
            let status = service.stop()?;
            ensure!(status.success(), "the service ended with {status}: {}", self.log());
            ensure!(self.said("STOPPING=1", Duration::from_secs(1)), "the service does not say that it stops");
        }
        Ok(())
    }

    /// What systemd says.
    ///
    /// # Errors
    /// It refuses, or the host has none.
    pub(super) fn systemctl(&self, arguments: &[&str]) -> Result<String> {
        ensure!(self.systemd.is_some(), "this host has no systemd");
        output(self.command("systemctl").args(arguments))
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        self.service.as_ref().context("the service does not run")?.signal(signal)
    }

    /// Whether the service says this within the time; without words: whether it says anything.
    pub(super) fn said(&self, what: &str, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut message = [0; 1024];
        loop {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let read = self.socket.set_read_timeout(Some(left)).and_then(|()| self.socket.recv(&mut message));
            let text = String::from_utf8_lossy(&message[..read.unwrap_or(0)]).into_owned();
            if text.lines().any(|line| line == what || what.is_empty()) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
        }
    }

    /// Reads and drops what was said so far.
    pub(super) fn forget(&self) {
        while self.said("", Duration::from_millis(100)) {}
    }

    pub(super) fn log(&self) -> String {
        let log = if self.systemd.is_some() { self.path("run/spegel.log") } else { self.folder.join("log") };
        fs::read_to_string(log).unwrap_or_default()
    }

    /// How many others this host knows.
    pub(super) fn members(&self) -> Option<u32> {
        let url = format!("http://{}:9090/metrics", self.node.address());
        let text = Client::new(Duration::from_secs(1)).get(&url, &[]).ok()?.text();
        text.lines().find_map(|line| line.strip_prefix("spegel_router_members "))?.parse().ok()
    }

    /// What differs from the machine that the host was made from, but for dpkg's own records and what the test put there.
    pub(super) fn left(&self) -> Result<Vec<String>> {
        let upper = self.folder.join("upper");
        let (mut left, mut folders) = (Vec::new(), vec![upper.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                let name = path.strip_prefix(&upper)?.display().to_string();
                let is_known = [
                    "srv/layout",
                    "etc/containerd/certs.d/quay.io/",
                    "etc/containerd/certs.d/_default/hosts.toml",
                    "etc/containerd/config.toml",
                    "etc/machine-id",
                    "var/cache/apt",
                    "var/cache/debconf",
                    "var/lib/apt",
                    "var/lib/dpkg",
                    "var/log",
                ]
                .iter()
                .any(|known| name.starts_with(known));
                if path.symlink_metadata()?.is_dir() {
                    folders.push(path);
                } else if !is_known {
                    left.push(name);
                }
            }
        }
        let gone = ["var/lib/spegel", "etc/containerd/certs.d/_backup.spegel", "usr/share/doc/spegel"];
        left.extend(gone.iter().filter(|name| self.path(name).exists()).map(|&name| name.to_owned()));
        Ok(left)
    }
}

/// The folders of a host, and the socket over which its service speaks.
fn prepare(node: &Node, parent: &Path) -> Result<(PathBuf, UnixDatagram)> {
    let folder = parent.join(node.namespace());
    for name in ["upper", "work", "root", "shared"] {
        fs::create_dir_all(folder.join(name))?;
    }
    let socket = UnixDatagram::bind(folder.join("shared/notify"))?;
    Ok((folder, socket))
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(service) = self.service.take()
            && let Err(error) =
                service.stop().and_then(|status| if status.success() { Ok(()) } else { bail!("{status}") })
        {
            println!("{}: {error:#}", self.node.address());
        }
    }
}
