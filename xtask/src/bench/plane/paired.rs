//! Variants of the program that are compared in pairs: measured one right after the other, in changing order, by processes that are started anew now
//! and then, with one of them twice, which says what such a comparison makes of nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Plane, Rival, Running, median};

/// In which order they are measured: each as often at each place, and after each other.
pub(super) const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]];
/// Turns of a round, whose processes are the same; before them is one that is not counted.
pub(super) const TURNS: usize = 12;
/// By how many per cent one differs from another measured right beside it.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) median: f64,
    /// The interval of the median.
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Change {
    /// By one figure of each turn.
    pub(super) fn of<const N: usize>(these: &[[f64; N]], those: &[[f64; N]], at: usize) -> Self {
        let pairs = these.iter().zip(those).map(|(this, that)| (this[at] / that[at] - 1.0) * 100.0);
        let mut pairs: Vec<f64> = pairs.collect();
        pairs.sort_by(f64::total_cmp);
        // From the binomial distribution by way of the normal one: how many of the pairs may lie on one side of the true median.
        let reach = (0.98 * (pairs.len() as f64).sqrt()).ceil() as usize;
        let middle = pairs.len() / 2;
        let get = |at: usize| pairs.get(at.min(pairs.len().saturating_sub(1))).copied().unwrap_or_default();
        Self { median: get(middle), from: get(middle.saturating_sub(reach)), to: get(middle + reach) }
    }

    pub(super) fn json(&self) -> Value {
        json!({"median_percent": self.median, "from": self.from, "to": self.to})
    }

    pub(super) fn text(&self) -> String {
        format!("{:+.2} % ({:+.2} to {:+.2})", self.median, self.from, self.to)
    }
}

/// So many digits as mean something.
pub(super) fn significant(value: f64) -> String {
    match value {
        value if value < 1.0 => format!("{value:.4}"),
        value if value < 1000.0 => format!("{value:.2}"),
        value => format!("{value:.0}"),
    }
}

/// The median of one figure.
pub(super) fn middle<const N: usize>(turns: &[[f64; N]], at: usize) -> f64 {
    median(turns.iter().map(|turn| turn[at]).collect())
}

/// A server, and its control group, which goes with it.
pub(super) struct Grouped {
    pub(super) running: Running,
    _group: Group,
}

struct Group(String);

impl Drop for Group {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points =
            mounts.lines().filter(|line| line.contains(" - cgroup2 ")).filter_map(|line| line.split(' ').nth(4));
        for point in points {
            let _ = fs::remove_dir(PathBuf::from(point).join(&self.0));
        }
    }
}

/// Starts a variant of spegel in a control group of its own, with these arguments, and another level of the log than all benches have if one is
/// given. A namespace that `ip` made shows no groups, so the hierarchy is mounted there first. `place` is that of its ports.
///
/// # Errors
/// A program that does not start.
pub(super) fn start(
    plane: &Plane,
    place: usize,
    round: usize,
    name: &str,
    arguments: &str,
    level: Option<&str>,
) -> Result<Grouped> {
    let script = plane.folder.path().join(format!("spegel-{name}-{round}"));
    let group = format!("spegel-bench-{name}-{}-{round}", std::process::id());
    let folder = format!("/sys/fs/cgroup/{group}");
    let level = level.unwrap_or("WARN");
    let text = format!(
        "#!/bin/sh\nset -e\nmount -t cgroup2 cgroup2 /sys/fs/cgroup\nmkdir -p {folder}\necho $$ > {folder}/cgroup.procs\n\
         for given; do [ \"$given\" = WARN ] && given={level}; shift; set -- \"$@\" \"$given\"; done\n\
         exec {} \"$@\" {arguments}\n",
        plane.settings.program.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(Grouped { running: Rival::TOKIO.serve_by(plane, u16::try_from(place)?, &script)?, _group: Group(group) })
}
