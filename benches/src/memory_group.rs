//! A limit on one process's memory, by a control group of either version.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The file that holds the limit where control groups are of version 2.
const V2_LIMIT: &str = "memory.max";

/// Writes a program that does `before` and then becomes the real one, whose number it keeps.
///
/// # Errors
/// The disk's.
pub fn wrapper(at: &Path, before: &str, program: &Path) -> Result<PathBuf> {
    fs::write(at, format!("#!/bin/sh\n{before} {} \"$@\"\n", program.display()))?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o755))?;
    Ok(at.to_path_buf())
}

/// A control group for one process's memory. Removed when dropped.
#[derive(Debug)]
pub struct MemoryGroup {
    folder: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

// === impl MemoryGroup ===

impl MemoryGroup {
    /// Whether there can be one.
    ///
    /// # Errors
    /// What is missing.
    pub fn available() -> Result<(), String> {
        Self::new("probe").map(|_| ()).map_err(|error| format!("no control group for memory: {error:#}"))
    }

    /// # Errors
    /// No such control groups are mounted, or they may not be changed.
    pub fn new(name: &str) -> Result<Self> {
        let name = format!("spegel-faults-{}-{name}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/memory");
        let (folder, limit, usage) = if first.join("memory.limit_in_bytes").exists() || first.is_dir() {
            (first.join(name), "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup").join(name), V2_LIMIT, "memory.current")
        };
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let group = Self { folder, limit, usage };
        ensure!(group.folder.join(group.usage).exists(), "there is no {} in {}", group.usage, group.folder.display());
        Ok(group)
    }

    /// The words before a program that is to be in it. In a network namespace /sys is another one, without control groups.
    #[must_use]
    pub fn words(&self) -> String {
        let mount = match self.limit {
            V2_LIMIT => "mount -t cgroup2 none /sys/fs/cgroup",
            _ => {
                "mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/memory && \
                 mount -t cgroup -o memory none /sys/fs/cgroup/memory"
            }
        };
        format!("{mount} || exit 1\necho $$ > {}/cgroup.procs || exit 1\nexec", self.folder.display())
    }

    /// Sets the limit, in bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_limit(&self, bytes: u64) -> Result<()> {
        fs::write(self.folder.join(self.limit), bytes.to_string()).context("set the limit")
    }

    /// The bytes of the processes themselves, and of the page cache, that the group is charged for.
    ///
    /// # Errors
    /// The kernel's.
    pub fn charged(&self) -> Result<(u64, u64)> {
        let names = if self.limit == V2_LIMIT { ["anon", "file"] } else { ["total_rss", "total_cache"] };
        let stat = self.read("memory.stat")?;
        let field = |name: &str| {
            let found = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            found.and_then(|text| text.parse().ok()).with_context(|| format!("memory.stat has no {name}"))
        };
        Ok((field(names[0])?, field(names[1])?))
    }

    /// How many of its processes the kernel has killed for want of memory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kills(&self) -> Result<u64> {
        let text = self.read(if self.limit == V2_LIMIT { "memory.events" } else { "memory.oom_control" })?;
        let found = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        found.and_then(|text| text.trim().parse().ok()).context("the group does not count kills")
    }

    fn read(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.folder.join(name)).with_context(|| name.to_owned())
    }

    /// Sets the limit just above what is in use now, and says what that is, in bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tighten(&self) -> Result<u64> {
        let usage: u64 = self.read(self.usage)?.trim().parse()?;
        let stat = self.read("memory.stat")?;
        let back = stat.lines().filter_map(|line| line.split_once(' '));
        let names = if self.limit == V2_LIMIT {
            ["inactive_file", "active_file"]
        } else {
            ["total_inactive_file", "total_active_file"]
        };
        let back: u64 = back.filter(|(name, _)| names.contains(name)).filter_map(|(_, n)| n.parse::<u64>().ok()).sum();
        let limit = usage.saturating_sub(back) * 100 / 95;
        self.set_limit(limit)?;
        Ok(limit)
    }

    /// Takes the limit far away.
    ///
    /// # Errors
    /// The kernel's.
    pub fn widen(&self) -> Result<()> {
        self.set_limit(4 << 30)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its process may take a moment to be gone.
        let deadline = Instant::now() + Duration::from_secs(2);
        while fs::remove_dir(&self.folder).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}
