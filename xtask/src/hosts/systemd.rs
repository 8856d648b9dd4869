//! A real systemd as the first process of a host: in namespaces of its own for processes, mounts, control groups, and the network.
//!
//! Of the machine's own units none is started: what would be wanted at a start is hidden, and the capabilities to set the clock, to load
//! modules and to reboot are taken away.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use spegel_benches::daemon::{Daemon, find_program, output};
use spegel_benches::netns::Node;

const PROGRAM: &str = "/lib/systemd/systemd";
/// The root of such a host. containerd's own folder is no layer, so that it can lay layers itself.
const ENTER: &str = r#"set -e
cd "$0"
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
mkdir -p shared/containerd root/var/lib/containerd
mount --bind shared/containerd root/var/lib/containerd
mount --bind shared root/mnt
cd root
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
for wanted in lib/systemd/system/*.wants; do mount -t tmpfs tmpfs "$wanted"; done
mount -t tmpfs tmpfs etc/systemd/system
mkdir run/before
pivot_root . run/before
umount -l /run/before
rmdir /run/before
exec env -i container=spegel PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    setpriv --bounding-set -sys_time,-sys_module,-sys_boot,-sys_rawio \
    /lib/systemd/systemd --system --unit=basic.target --log-target=console --show-status=0"#;

/// A running systemd.
pub(super) struct Systemd {
    pid: u32,
    group: Group,
}

/// A control group of the second version, removed with all below it.
struct Group(PathBuf);

/// Whether this machine can have such hosts, with a containerd as a service.
///
/// # Errors
/// What is missing, as a sentence.
pub(super) fn available() -> Result<(), String> {
    for path in [PROGRAM, "/lib/systemd/system/containerd.service"] {
        if !Path::new(path).exists() {
            return Err(format!("there is no {path} here"));
        }
    }
    for program in ["systemctl", "unshare", "nsenter", "setpriv", "pivot_root", "apt-get", "ctr"] {
        find_program(program).ok_or(format!("there is no {program} here"))?;
    }
    Group::make("spegel-probe").map(drop).map_err(|error| format!("no control group can be made: {error:#}"))
}

// === impl Systemd ===

impl Systemd {
    /// Starts it, and waits until it is up.
    ///
    /// # Errors
    /// It does not come up; its log is in the error.
    pub(super) fn boot(node: &Node, folder: &Path) -> Result<(Self, Daemon)> {
        let group = Group::make(&format!("spegel-{}", node.namespace()))?;
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec unshare --pid --fork --kill-child --mount --ipc --uts --cgroup sh -c \"$1\" \"$0\"",
            group.0.display()
        );
        let text = folder.display().to_string();
        // In a node's namespace /sys is another one, without control groups: they are seen from before.
        let enter = format!("--net=/run/netns/{}", node.namespace());
        let command = ["nsenter", &enter, "sh", "-c", &script, &text, ENTER];
        let mut holder = Daemon::start(node.namespace(), None, &command, &folder.join("log"))?;
        let children = format!("/proc/{0}/task/{0}/children", holder.pid());
        let first = || -> Option<u32> { fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok() };
        let mut found = None;
        holder.wait_until(Duration::from_secs(20), "a first process", || {
            found = first().filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "systemd")
            });
            found.is_some()
        })?;
        let this = Self { pid: found.context("systemd has no number")?, group };
        let words = this.enter();
        holder.wait_until(Duration::from_secs(30), "a system that is up", || {
            output(Command::new(&words[0]).args(&words[1..]).args(["systemctl", "is-system-running"]))
                .is_ok_and(|state| state.trim() == "running")
        })?;
        Ok((this, holder))
    }

    /// The words before a command that is to run in this host.
    pub(super) fn enter(&self) -> Vec<String> {
        let pid = self.pid.to_string();
        ["nsenter", "--target", &pid, "--mount", "--pid", "--net", "--uts", "--ipc"].map(str::to_owned).to_vec()
    }

    /// Where its root is seen from here.
    pub(super) fn root(&self) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join("root")
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // All that it started ends with it.
        if let Err(error) = fs::write(self.group.0.join("cgroup.kill"), "1") {
            println!("{}: {error}", self.group.0.display());
        }
    }
}

// === impl Group ===

impl Group {
    fn make(name: &str) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mut points = mounts.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (point, kind) = (words.next()?, words.next()?);
            (kind == "cgroup2").then_some(PathBuf::from(point))
        });
        let path = points.next().context("no cgroup2 is mounted")?.join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        ensure!(path.join("cgroup.kill").exists(), "the kernel is older than 5.14");
        remove_stale(&path);
        Ok(Self(path))
    }
}

/// Removes the groups beside this one whose test was killed: nodes' names carry its number, as in `spegel-sp123a-n4`.
fn remove_stale(group: &Path) {
    let beside = group.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    for entry in beside {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((lab, _)) = name.strip_prefix("spegel-sp").and_then(|rest| rest.split_once("-n")) else { continue };
        let owner = lab.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let is_number = !owner.is_empty() && owner.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && !Path::new("/proc").join(owner).exists() {
            // Another test may be removing it, too.
            let _ = remove(&entry.path());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes may take a moment to be gone.
        let deadline = Instant::now() + Duration::from_secs(5);
        while remove(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn remove(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove(&entry.path())?;
    }
    fs::remove_dir(group)
}
