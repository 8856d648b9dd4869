//! Where control groups of the second version are mounted, which is ours, and which is containerd's.

use std::fs;
use std::path::{Component, Path, PathBuf};

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

/// The folder of containerd's group, or why it is not known.
pub(super) fn containerd(told: Option<&Path>) -> Result<PathBuf, String> {
    let mounts = mounts();
    if let Some(told) = told {
        let below = mounts.iter().map(|mount| mount.point.join(told.strip_prefix("/").unwrap_or(told)));
        let is_group = |folder: &PathBuf| folder.join("cgroup.procs").exists();
        return std::iter::once(told.to_path_buf())
            .chain(below)
            .find(is_group)
            .ok_or_else(|| format!("--containerd-cgroup {} is no control group of version 2", told.display()));
    }
    let mut seen = Vec::new();
    for mount in &mounts {
        collect(&mount.point, DEPTH, &mut seen);
    }
    let named = |name: &&str| seen.iter().find(|folder| folder.file_name().is_some_and(|own| own == *name)).cloned();
    if let Some(found) = NAMES.iter().find_map(named) {
        return Ok(found);
    }
    // Without the host's processes this finds nothing, or another node's in a test.
    let running = running_containerd().and_then(|path| mounts.iter().find_map(|mount| mount.folder(&path)));
    match running {
        Some(group) if mounts.iter().any(|mount| mount.point == group) => {
            Err("containerd runs in the root of the control groups, with everything else: name a group by --containerd-cgroup".into())
        }
        Some(group) => Ok(group),
        None => Err("no control group of containerd was found: mount the host's, or name it by --containerd-cgroup".into()),
    }
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

fn collect(folder: &Path, depth: usize, seen: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let folders = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    for entry in folders {
        if seen.len() >= MOST {
            return;
        }
        seen.push(entry.path());
        if depth > 1 {
            collect(&entry.path(), depth - 1, seen);
        }
    }
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
}
