//! Looks whether this process is about to run out of open files or of the memory that its control group may have, and then has the registry
//! refuse new work until that has passed.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::registry::{Registry, Strain};

/// How often it is looked.
const PERIOD: Duration = Duration::from_millis(250);
/// The shares of the memory's limit above which new work is refused, and below which it is not any more.
const HIGH: f64 = 0.90;
const LOW: f64 = 0.80;
/// A limit of this many bytes or more is none: the first control groups write a number where the second write `max`.
const NO_LIMIT: u64 = 1 << 60;
/// Where control groups are mounted.
const GROUPS: &str = "/sys/fs/cgroup";

/// What this process's control group may be charged for, in bytes; none where nobody limits it.
pub(super) fn memory_limit() -> Option<u64> {
    own_memory().as_ref().and_then(Memory::limit)
}

/// How many bytes more it may be charged for until something of it is killed; none where nobody limits it.
pub(super) fn memory_left() -> Option<u64> {
    own_memory().as_ref().and_then(Memory::left)
}

fn own_memory() -> Option<Memory> {
    Memory::find(Path::new(GROUPS), &fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
}

/// Looks for as long as the process runs. `open_files` is how many it may have open.
pub(super) async fn watch(registry: Arc<Registry>, open_files: u64) {
    let memory = own_memory();
    let limit = memory.as_ref().and_then(Memory::limit);
    info!(open_files, memory_limit = limit, "limits of this process");
    let (mut files_low, mut memory_low) = (false, false);
    let mut timer = tokio::time::interval(PERIOD);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        files_low = are_files_low(lowest_free(), open_files, files_low);
        memory_low = is_memory_low(memory.as_ref().and_then(Memory::share), memory_low);
        let strain = match (files_low, memory_low) {
            (true, _) => Some(Strain::Descriptors),
            (false, true) => Some(Strain::Memory),
            (false, false) => None,
        };
        let before = registry.set_strain(strain);
        match strain {
            _ if strain == before => {}
            Some(strain) => warn!(?strain, "about to run out: new requests are refused until that has passed"),
            None => info!("no longer about to run out: requests are answered again"),
        }
    }
}

/// The lowest number of a descriptor that is free: all below are in use. None if there is no free one.
fn lowest_free() -> Option<u64> {
    let file = File::open("/dev/null").ok()?;
    u64::try_from(file.as_raw_fd()).ok()
}

/// Whether few descriptors are left; `now` is whether there were few before.
fn are_files_low(lowest_free: Option<u64>, limit: u64, now: bool) -> bool {
    let spare = (limit / 16).clamp(8, 256);
    let margin = if now { 2 * spare } else { spare };
    lowest_free.is_none_or(|lowest| lowest + margin >= limit)
}

/// Whether little memory is left; `now` is whether there was little before.
fn is_memory_low(share: Option<f64>, now: bool) -> bool {
    share.is_some_and(|share| share > if now { LOW } else { HIGH })
}

/// The memory of a control group, [the second](https://docs.kernel.org/admin-guide/cgroup-v2.html#memory) or
/// [first](https://docs.kernel.org/admin-guide/cgroup-v1/memory.html) version of them.
struct Memory {
    limit: File,
    usage: File,
    stat: File,
    /// The figures of `stat` that the kernel takes back at need.
    reclaimable: &'static [&'static str],
}

// === impl Memory ===

impl Memory {
    /// The nearest group above this process, or its own, that has a limit; else its own. `own` is what `/proc/self/cgroup` says.
    fn find(groups: &Path, own: &str) -> Option<Self> {
        let paths: Vec<_> = own.lines().filter_map(|line| line.split_once(':')?.1.split_once(':')).collect();
        let path_of =
            |is_it: &dyn Fn(&str) -> bool| paths.iter().find(|(names, _)| is_it(names)).map(|(_, path)| *path);
        let second = path_of(&str::is_empty);
        let first = path_of(&|names| names.split(',').any(|name| name == "memory"));
        let tries = [(second, ""), (second, "unified"), (first, "memory")];
        let of = |(path, root): (Option<&str>, &str)| -> Option<Self> {
            let (path, root) = (path?, groups.join(root));
            let own = root.join(path.trim_start_matches('/'));
            let above: Vec<PathBuf> =
                own.ancestors().take_while(|folder| folder.starts_with(&root)).map(Into::into).collect();
            // From within a container, its own group may be the root of what is seen.
            let mut seen = above.iter().filter_map(|folder| Self::open(folder)).collect::<Vec<_>>();
            let limited = seen.iter().position(|memory| memory.limit().is_some()).unwrap_or(0);
            (!seen.is_empty()).then(|| seen.swap_remove(limited))
        };
        tries.into_iter().find_map(of)
    }

    fn open(folder: &Path) -> Option<Self> {
        let open = |limit: &str, usage: &str, reclaimable| {
            let file = |name: &str| File::open(folder.join(name)).ok();
            Some(Self { limit: file(limit)?, usage: file(usage)?, stat: file("memory.stat")?, reclaimable })
        };
        open("memory.max", "memory.current", &["inactive_file", "active_file", "slab_reclaimable"]).or_else(|| {
            open("memory.limit_in_bytes", "memory.usage_in_bytes", &["total_inactive_file", "total_active_file"])
        })
    }

    /// Bytes that the group may have; none if there is no limit.
    fn limit(&self) -> Option<u64> {
        read(&self.limit)?.trim().parse().ok().filter(|limit| *limit < NO_LIMIT)
    }

    /// How much of the limit is in use.
    fn share(&self) -> Option<f64> {
        Some(self.used()? as f64 / self.limit()?.max(1) as f64)
    }

    /// Bytes of the limit that are not in use.
    fn left(&self) -> Option<u64> {
        Some(self.limit()?.saturating_sub(self.used()?))
    }

    /// Bytes in use, but for what the kernel takes back at need.
    fn used(&self) -> Option<u64> {
        let usage: u64 = read(&self.usage)?.trim().parse().ok()?;
        let stat = read(&self.stat)?;
        let figures = stat.lines().filter_map(|line| line.split_once(' '));
        let back = figures.filter(|(name, _)| self.reclaimable.contains(name));
        let back: u64 = back.filter_map(|(_, bytes)| bytes.parse::<u64>().ok()).sum();
        Some(usage.saturating_sub(back))
    }
}

/// Such a file says what is so at the moment, each time that it is read from its beginning.
fn read(file: &File) -> Option<String> {
    let mut bytes = vec![0; 8 << 10];
    let length = file.read_at(&mut bytes, 0).ok()?;
    bytes.truncate(length);
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Files of a group: limit, usage, statistics.
    fn group(root: &Path, path: &str, names: [&str; 2], [limit, usage, stat]: [&str; 3]) {
        let folder = root.join(path);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in [(names[0], limit), (names[1], usage), ("memory.stat", stat)] {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    const SECOND: [&str; 2] = ["memory.max", "memory.current"];
    const FIRST: [&str; 2] = ["memory.limit_in_bytes", "memory.usage_in_bytes"];

    #[test]
    fn what_the_kernel_takes_back_is_not_in_use() {
        let root = tempfile::tempdir().unwrap();
        let stat = "anon 100\ninactive_file 300\nactive_file 100\nslab_reclaimable 50\n";
        group(root.path(), "pods/a", SECOND, ["1000\n", "900\n", stat]);
        let memory = Memory::find(root.path(), "0::/pods/a\n").unwrap();
        assert!((memory.share().unwrap() - 0.45).abs() < 1e-9);
        assert_eq!(memory.left(), Some(550));
        fs::write(root.path().join("pods/a/memory.current"), "1350\n").unwrap();
        assert!((memory.share().unwrap() - 0.9).abs() < 1e-9, "it is read anew");
    }

    #[test]
    fn the_nearest_limit_above_counts() {
        let root = tempfile::tempdir().unwrap();
        group(root.path(), "pods/a", SECOND, ["max\n", "900\n", ""]);
        group(root.path(), "pods", SECOND, ["4000\n", "1000\n", ""]);
        group(root.path(), "", SECOND, ["max\n", "5000\n", ""]);
        assert_eq!(Memory::find(root.path(), "0::/pods/a\n").unwrap().limit(), Some(4000));
        assert_eq!(Memory::find(root.path(), "0::/\n").unwrap().limit(), None);
        // In a container the group's own root is all that is seen.
        assert!(Memory::find(root.path(), "0::/../elsewhere\n").is_some());
    }

    #[test]
    fn the_first_version_is_known_too() {
        let root = tempfile::tempdir().unwrap();
        let stat = "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 200\n";
        group(root.path(), "memory/pods/a", FIRST, ["1000\n", "1000\n", stat]);
        group(root.path(), "memory", FIRST, ["9223372036854771712\n", "1000\n", stat]);
        let own = "5:cpu,memory:/pods/a\n1:name=systemd:/\n0::/\n";
        assert!((Memory::find(root.path(), own).unwrap().share().unwrap() - 0.5).abs() < 1e-9);
        let unlimited = Memory::find(root.path(), "5:memory:/\n").unwrap();
        assert_eq!((unlimited.share(), unlimited.left()), (None, None));
        assert!(Memory::find(root.path(), "").is_none());
    }

    #[test]
    fn little_is_left_until_more_is_left() {
        let low = [0.5, 0.89, 0.91, 0.85, 0.81, 0.79, 0.85].iter().scan(false, |low, share| {
            *low = is_memory_low(Some(*share), *low);
            Some(*low)
        });
        assert_eq!(low.collect::<Vec<_>>(), [false, false, true, true, true, false, false]);
        assert!(!is_memory_low(None, true), "no limit, or none that can be read");
    }

    #[test]
    fn few_descriptors_are_few() {
        assert!(!are_files_low(Some(100), 1024, false) && !are_files_low(Some(900), 1024, false));
        assert!(are_files_low(Some(960), 1024, false) && are_files_low(None, 1024, false));
        assert!(are_files_low(Some(900), 1024, true), "until some more are free");
        assert!(!are_files_low(Some(890), 1024, true));
        assert!(!are_files_low(Some(20), 64, false), "the smallest bound that can be set");
    }
}
