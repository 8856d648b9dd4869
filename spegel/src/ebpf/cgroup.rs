//! Where control groups of the second version are mounted, which is ours, and which is containerd's.

use std::collections::VecDeque;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Refusal;

/// Groups by which a containerd is known where nobody names it, the most certain first.
const NAMES: [&str; 6] = [
    "containerd.service",
    "k3s.service",
    "k3s-agent.service",
    "rke2-server.service",
    "rke2-agent.service",
    "k0sworker.service",
];
/// How deep, and at how many groups, it is looked.
const DEPTH: usize = 4;
const MOST: usize = 4096;
/// How long a socket's connection may take: there is no other machine on the way.
const ASKED: Duration = Duration::from_secs(1);

/// A mount of the hierarchy, or of a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// What of the hierarchy it shows.
    root: PathBuf,
    point: PathBuf,
}

/// The folder of this process's own group.
pub(super) fn own() -> Result<PathBuf, Refusal> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = mounts();
    let path = own_path(&groups).ok_or_else(|| Refusal::NoCgroup2("/proc/self/cgroup names none".into()))?;
    if mounts.is_empty() {
        return Err(Refusal::NoCgroup2("only the first version is mounted".into()));
    }
    let found =
        mounts.iter().filter_map(|mount| mount.folder(path)).find(|folder| folder.join("cgroup.procs").exists());
    found.ok_or_else(|| Refusal::NoCgroup2(format!("{} is below no mount of it", path.display())))
}

/// Who listens at containerd's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Listener {
    /// A process of this group.
    In(PathBuf),
    /// One that cannot be seen from here, as in a pod, or whose group says nothing of it.
    Unseen,
    /// Nobody, at the moment.
    Nobody,
}

/// A group that is taken for containerd's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) group: PathBuf,
    /// It was taken by its name while nobody listened at the socket, who may be in another one.
    pub(super) is_guess: bool,
}

/// The folder of containerd's group, or why it is not known: the one that was told; else that of who listens at the socket; else one that
/// is known by its name.
pub(super) fn containerd(told: Option<&Path>, socket: Option<&Path>) -> Result<Found, String> {
    let mounts = mounts();
    if let Some(told) = told {
        let below = mounts.iter().map(|mount| mount.point.join(told.strip_prefix("/").unwrap_or(told)));
        let is_group = |folder: &PathBuf| folder.join("cgroup.procs").exists();
        let found = std::iter::once(told.to_path_buf()).chain(below).find(is_group);
        return found
            .map(|group| Found { group, is_guess: false })
            .ok_or_else(|| format!("--containerd-cgroup {} is no control group of version 2", told.display()));
    }
    let listener = socket.map_or(Listener::Unseen, listener);
    if let Listener::In(group) = listener {
        return Ok(Found { group, is_guess: false });
    }
    let is_guess = listener == Listener::Nobody;
    let seen: Vec<PathBuf> = mounts.iter().flat_map(|mount| below(&mount.point)).collect();
    let named = |name: &str| seen.iter().find(|folder| folder.file_name().is_some_and(|own| own == name)).cloned();
    if let Some(group) = names(socket).into_iter().find_map(named) {
        return Ok(Found { group, is_guess });
    }
    // Without the host's processes this finds nothing, or another node's in a test.
    let running = running_containerd().and_then(|path| mounts.iter().find_map(|mount| mount.folder(&path)));
    match running {
        Some(group) if mounts.iter().any(|mount| mount.point == group) => {
            Err("containerd runs in the root of the control groups, with everything else: name a group by --containerd-cgroup".into())
        }
        Some(group) => Ok(Found { group, is_guess }),
        None => Err("no control group of containerd was found: mount the host's, or name it by --containerd-cgroup".into()),
    }
}

/// The names in the order in which they are looked for: where the socket is a distribution's, its own come first.
fn names(socket: Option<&Path>) -> Vec<&'static str> {
    let socket = socket.map(|socket| socket.to_string_lossy().into_owned()).unwrap_or_default();
    // RKE2's containerd is k3s's.
    let is_own = |name: &str| match name.get(..3) {
        Some("k3s" | "rke") => socket.contains("/k3s/"),
        Some("k0s") => socket.contains("/k0s/"),
        _ => false,
    };
    let mut names = NAMES.to_vec();
    names.sort_by_key(|name| !is_own(name));
    names
}

/// In which group the process is that listens at a socket.
pub(super) fn listener(socket: &Path) -> Listener {
    let Some(pid) = listening(socket) else { return Listener::Nobody };
    // systemd listens for a service that it has not started yet.
    let groups = (pid > 1).then(|| fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()).flatten();
    let mounts = mounts();
    let group = groups.as_deref().and_then(own_path).and_then(|path| {
        let folder = mounts.iter().find_map(|mount| mount.folder(path))?;
        // The root has everything else in it, too.
        (folder.join("cgroup.procs").exists() && mounts.iter().all(|mount| mount.point != folder)).then_some(folder)
    });
    group.map_or(Listener::Unseen, Listener::In)
}

/// The process that listens at a socket, 0 if it is not to be seen from this one's namespace; nothing where nobody does.
fn listening(socket: &Path) -> Option<i32> {
    // rustix would have a 0 in what cannot be 0.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let stream = runtime.block_on(async { timeout(ASKED, UnixStream::connect(socket)).await.ok()?.ok() })?;
    stream.peer_cred().ok()?.pid()
}

/// What `/proc/<pid>/cgroup` says of the second version.
fn own_path(groups: &str) -> Option<&Path> {
    groups.lines().find_map(|line| line.strip_prefix("0::")).map(Path::new)
}

fn mounts() -> Vec<Mount> {
    parse_mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// See [proc_pid_mountinfo(5)](https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html).
fn parse_mounts(text: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next()? == "cgroup2").then_some(())?;
        let mut fields = before.split(' ').skip(3);
        Some(Mount { root: fields.next()?.into(), point: fields.next()?.into() })
    };
    text.lines().filter_map(parse).collect()
}

impl Mount {
    /// Where a group is below this mount. What leads out of what a namespace shows, with `..`, cannot be told to lie anywhere.
    fn folder(&self, path: &Path) -> Option<PathBuf> {
        if [path, &self.root].iter().any(|path| path.components().any(|part| part == Component::ParentDir)) {
            return None;
        }
        Some(self.point.join(path.strip_prefix(&self.root).ok()?))
    }
}

/// The groups below one, nearer ones first, so that a node with many pods has none in front of its services.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut seen: Vec<PathBuf> = Vec::new();
    let mut next = VecDeque::from([(folder.to_path_buf(), DEPTH)]);
    while let Some((folder, depth)) = next.pop_front() {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        for found in folders.map(|entry| entry.path()) {
            if seen.len() >= MOST {
                return seen;
            }
            if depth > 1 {
                next.push_back((found.clone(), depth - 1));
            }
            seen.push(found);
        }
    }
    seen
}

/// The group of the first process that is a containerd.
fn running_containerd() -> Option<PathBuf> {
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let mut groups = processes.filter_map(|process| {
        (fs::read_to_string(process.join("comm")).ok()?.trim_end() == "containerd").then_some(())?;
        let groups = fs::read_to_string(process.join("cgroup")).ok()?;
        own_path(&groups).map(Path::to_path_buf)
    });
    groups.next()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use super::*;

    fn folder(root: &str, path: &str) -> Option<String> {
        let mount = Mount { root: root.into(), point: "/sys/fs/cgroup".into() };
        mount.folder(Path::new(path)).map(|folder| folder.display().to_string().trim_end_matches('/').to_owned())
    }

    #[test]
    fn a_group_is_found_below_whatever_is_mounted() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(folder("/", "/system.slice/spegel.service"), some("/sys/fs/cgroup/system.slice/spegel.service"));
        assert_eq!(folder("/", "/"), some("/sys/fs/cgroup"));
        // A part of the hierarchy is mounted, as in a container without a namespace of its own for it.
        assert_eq!(folder("/kubepods/pod1", "/kubepods/pod1/c"), some("/sys/fs/cgroup/c"));
        assert_eq!(folder("/kubepods/pod1", "/system.slice"), None);
        // The host's hierarchy, mounted into a container with a namespace of its own: the container's group is not its root.
        assert_eq!(folder("/../../..", "/"), None);
        assert_eq!(folder("/", "/../other"), None);
    }

    #[test]
    fn mounts_are_told_by_their_kind() {
        let text = "\
            25 30 0:23 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n\
            26 30 0:24 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            40 30 0:23 /../.. /host/cgroup ro shared:9 master:1 - cgroup2 cgroup rw,nsdelegate\n";
        let expected = [("/", "/sys/fs/cgroup/unified"), ("/../..", "/host/cgroup")];
        let expected = expected.map(|(root, point)| Mount { root: root.into(), point: point.into() });
        assert_eq!(parse_mounts(text), expected);
        assert_eq!(own_path("12:memory:/a\n0::/b/c\n"), Some(Path::new("/b/c")));
        assert_eq!(own_path("12:memory:/a\n"), None);
    }

    #[test]
    fn services_are_found_beside_more_pods_than_are_looked_at() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| fs::create_dir_all(root.path().join(path)).unwrap();
        for pod in 0..700 {
            for container in 0..10 {
                make(&format!("kubepods.slice/pod{pod}/c{container}"));
            }
        }
        make("system.slice/containerd.service");
        let seen = below(root.path());
        assert_eq!(seen.len(), MOST);
        assert!(seen.contains(&root.path().join("system.slice/containerd.service")));
    }

    #[test]
    fn a_distributions_socket_has_its_names_first() {
        assert_eq!(names(None), NAMES);
        assert_eq!(names(Some(Path::new("/run/containerd/containerd.sock"))), NAMES);
        let k3s = names(Some(Path::new("/run/k3s/containerd/containerd.sock")));
        assert_eq!((&k3s[..4], k3s[4]), (&NAMES[1..5], "containerd.service"));
        assert_eq!(names(Some(Path::new("/run/k0s/containerd.sock")))[0], "k0sworker.service");
    }

    #[test]
    fn who_listens_at_a_socket_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("containerd.sock");
        assert_eq!((listening(&path), listener(&path)), (None, Listener::Nobody));
        let _listener = UnixListener::bind(&path).unwrap();
        assert_eq!(listening(&path), Some(i32::try_from(std::process::id()).unwrap()));
        assert_ne!(listener(&path), Listener::Nobody);
    }
}
