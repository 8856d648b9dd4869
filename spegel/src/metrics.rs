//! The metrics registry that every room adds its own figures to, the process's own figures, and the text form.

mod classic;
mod figures;

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;

pub use figures::{Bound, Described, Figures, Label};

static CPU: Described = Described::counter("process_cpu_seconds", "User and system time spent").as_in_go();
static RESIDENT: Described =
    Described::gauge("process_resident_memory_bytes", "Resident memory, pages of files that are mapped included")
        .as_in_go();
static VIRTUAL: Described = Described::gauge("process_virtual_memory_bytes", "Virtual memory").as_in_go();
static THREADS: Described = Described::gauge("process_threads", "Operating system threads");
static START: Described =
    Described::gauge("process_start_time_seconds", "Start of the process, seconds since the Unix epoch").as_in_go();
static OPEN_FILES: Described = Described::gauge("process_open_fds", "Open file descriptors").as_in_go();
static MAX_FILES: Described = Described::gauge("process_max_fds", "Bound of open file descriptors").as_in_go();
static OWN_MEMORY: Described = Described::gauge(
    "spegel_cgroup_own_memory_bytes",
    "What this process and its like hold themselves, of the memory that its control group is charged for",
);
static PAGE_CACHE: Described = Described::gauge(
    "spegel_cgroup_page_cache_bytes",
    "Pages of files, which the kernel takes back at need, of the memory that the control group is charged for",
);
static NODE: Described = Described::info("spegel_node", "This node's name and zone").labels(&[
    Label::at_most("node", 1, "this node's name, `--node-name`"),
    Label::at_most("zone", 1, "its zone, empty if it has none"),
]);

/// How the figures are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The [OpenMetrics specification](https://prometheus.io/docs/specs/om/open_metrics_spec/), for those that ask for it.
    OpenMetrics,
    /// What Prometheus and all others read that do not.
    Classic,
}

// === impl Format ===

impl Format {
    /// What a scraper understands that sends this `Accept`.
    pub fn of_accept(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Classic }
    }

    /// Its content type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Classic => classic::CONTENT_TYPE,
        }
    }
}

/// Figures that already hold those of this process.
pub fn figures() -> Figures {
    let mut figures = Figures::default();
    let described = [&CPU, &RESIDENT, &VIRTUAL, &THREADS, &START, &OPEN_FILES, &MAX_FILES, &OWN_MEMORY, &PAGE_CACHE];
    figures.collect(described, Process);
    figures
}

/// Adds the metric that says which node and which zone the other figures are of, for sums by zone.
pub fn register_node(figures: &mut Figures, node: &str, zone: Option<&str>) {
    let labels = vec![("node", node.to_owned()), ("zone", zone.unwrap_or_default().to_owned())];
    figures.register(&NODE, Info::new(labels));
}

/// The text that a scraper reads.
///
/// # Errors
/// Only when a metric's own encoding fails.
pub fn encode(figures: &Figures, format: Format) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, figures.registry())?;
    Ok(match format {
        Format::OpenMetrics => text,
        Format::Classic => classic::from_openmetrics(&text),
    })
}

/// The figures that Prometheus client libraries export of a process, read from `/proc/self` at each scrape.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use procfs::WithCurrentSystemInfo as _;
        let Ok(process) = procfs::process::Process::myself() else { return Ok(()) };
        let encoder = &mut encoder;
        let whole = |number: u64| ConstGauge::new(i64::try_from(number).unwrap_or(i64::MAX));
        if let Ok(stat) = process.stat() {
            let ticks = procfs::ticks_per_second().max(1);
            CPU.encode(encoder, &ConstCounter::new((stat.utime + stat.stime) as f64 / ticks as f64))?;
            RESIDENT.encode(encoder, &whole(stat.rss_bytes().get()))?;
            VIRTUAL.encode(encoder, &whole(stat.vsize))?;
            THREADS.encode(encoder, &ConstGauge::new(stat.num_threads))?;
            if let Ok(boot) = procfs::boot_time_secs() {
                START.encode(encoder, &ConstGauge::new(boot as f64 + stat.starttime as f64 / ticks as f64))?;
            }
        }
        if let Ok(count) = process.fd_count() {
            OPEN_FILES.encode(encoder, &whole(count as u64))?;
        }
        if let Ok(limits) = process.limits()
            && let procfs::process::LimitValue::Value(max) = limits.max_open_files.soft_limit
        {
            MAX_FILES.encode(encoder, &whole(max))?;
        }
        if let Some(memory) = GroupMemory::read() {
            OWN_MEMORY.encode(encoder, &whole(memory.own))?;
            PAGE_CACHE.encode(encoder, &whole(memory.cache))?;
        }
        Ok(())
    }
}

/// What the process's control group is charged for, in bytes. An operator's tools show the sum.
#[derive(Debug, PartialEq, Eq)]
struct GroupMemory {
    own: u64,
    cache: u64,
}

impl GroupMemory {
    /// From the group's `memory.stat`: in a container its own group is the root of what can be seen.
    fn read() -> Option<Self> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let root = std::path::Path::new("/sys/fs/cgroup");
        let paths = groups.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (controllers, path) = (parts.nth(1)?, parts.next()?.trim_start_matches('/'));
            match controllers {
                "" => Some([root.join(path), root.to_path_buf()]),
                "memory" => Some([root.join("memory").join(path), root.join("memory")]),
                _ => None,
            }
        });
        paths.flatten().find_map(|path| Self::parse(&std::fs::read_to_string(path.join("memory.stat")).ok()?))
    }

    /// Version 2 says `anon` and `file`, version 1 `total_rss` and `total_cache`.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|value| value.trim().parse().ok())
        };
        let own = field("anon").or_else(|| field("total_rss"))?;
        Some(Self { own, cache: field("file").or_else(|| field("total_cache"))? })
    }
}

/// The longest value of a label that clients choose, in bytes.
const LONGEST_LABEL: usize = 255;

/// Bounds the values of a label that clients choose: the first few distinct ones keep their name, the rest are `other`.
#[derive(Debug)]
pub struct BoundedLabel {
    seen: Mutex<HashSet<String>>,
    limit: usize,
}

impl BoundedLabel {
    /// Keeps at most `limit` distinct values.
    pub fn new(limit: usize) -> Self {
        Self { seen: Mutex::default(), limit }
    }

    /// The label value to use for `value`. What nobody vouches for finds a quarter of the places only, so that made-up names do not push
    /// out real ones. Whether somebody does is asked only where it matters.
    pub fn of(&self, value: &str, is_vouched_for: impl FnOnce() -> bool) -> String {
        let has_place = self.finds_place(value, self.limit / 4)
            || (self.has_room(value) && is_vouched_for() && self.finds_place(value, self.limit));
        if has_place { value } else { "other" }.to_owned()
    }

    /// Whether a new value could find a place: nobody need be asked otherwise. Whoever is may take a while, in which no other is to wait for a label.
    fn has_room(&self, value: &str) -> bool {
        value.len() <= LONGEST_LABEL && self.seen().len() < self.limit
    }

    /// Whether the value has a place, or gets one of the first so many.
    fn finds_place(&self, value: &str, places: usize) -> bool {
        let mut seen = self.seen();
        seen.contains(value) || (value.len() <= LONGEST_LABEL && seen.len() < places && seen.insert(value.to_owned()))
    }

    fn seen(&self) -> MutexGuard<'_, HashSet<String>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn process_figures_have_the_names_that_dashboards_use() {
        let text = encode(&figures(), Format::OpenMetrics).unwrap();
        for name in [
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "process_virtual_memory_bytes ",
            "process_start_time_seconds ",
            "process_open_fds ",
            "process_max_fds ",
        ] {
            assert!(text.contains(&format!("\n{name}")), "{name} is missing in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn both_versions_of_control_groups_are_understood() {
        let of = |own, cache| Some(GroupMemory { own, cache });
        assert_eq!(GroupMemory::parse("anon 1\nfile 2\nkernel 3\nfile_mapped 4\n"), of(1, 2));
        let v1 = "cache 1\nrss 2\ntotal_cache 3\ntotal_rss 4\ntotal_rss_huge 5\n";
        assert_eq!(GroupMemory::parse(v1), of(4, 3));
        assert_eq!(GroupMemory::parse("pgfault 1\n"), None);
    }

    #[test]
    fn a_label_that_clients_choose_stays_bounded() {
        let label = BoundedLabel::new(4);
        let (vouched, made_up) = (|| true, || false);
        assert_eq!(label.of("made-up", made_up), "made-up");
        assert_eq!(label.of("made-up-too", made_up), "other");
        assert_eq!(label.of("real", vouched), "real");
        assert_eq!(label.of("made-up-too", made_up), "other");
        assert_eq!(label.of("made-up-too", vouched), "made-up-too", "it was real");
        assert_eq!(label.of("another", vouched), "another");
        assert_eq!(label.of("one-too-many", vouched), "other");
        assert_eq!(label.of("real", made_up), "real");
    }
}
