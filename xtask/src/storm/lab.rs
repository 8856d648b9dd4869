//! The same with real containerds, a real registry and links that carry only so much.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use spegel_benches::storm::{Pulled, Sample, Storm as Lab, Stormed, Victim};

use super::Storm;
use super::chart;
use super::model;
use super::report::Outcome;
use super::scenario::Kill;

/// Makes a storm, shows it, and tells what came of it; false if a pull failed or the cores were the limit.
pub(super) fn run(storm: &Storm) -> Result<bool> {
    let lab = lab(storm)?;
    let stormed = show(&lab)?;
    // It knows no other program, and none at all.
    if storm.binary.is_none() && !storm.no_mirror {
        print!("{}", model::beside(&Outcome::of(model::scenario("", storm, &lab)), &stormed));
    }
    if let Some(file) = &storm.svg {
        std::fs::write(file, chart::draw(&stormed))?;
    }
    crate::write_json(storm.json.as_ref(), &serde_json::to_value(&stormed)?)?;
    Ok(!stormed.is_void() && stormed.failures().next().is_none())
}

/// Makes a storm, shows it, and prints what came of it.
pub(super) fn show(lab: &Lab) -> Result<Stormed> {
    let bars = Bars::new(lab);
    let stormed = lab.run(&mut |sample| bars.show(sample))?;
    bars.clear();
    println!("{}", table(&stormed));
    Ok(stormed)
}

/// What the flags ask for.
pub(super) fn lab(storm: &Storm) -> Result<Lab> {
    ensure!(storm.nodes >= 2, "a storm takes two nodes at least");
    ensure!(storm.slow <= 1 && storm.seeds <= 1, "of real nodes one can be slow, and one have the image already");
    let program = match (&storm.binary, storm.no_mirror) {
        (_, true) => None,
        (Some(program), false) => Some(std::path::absolute(program)?),
        (None, false) => Some(crate::build::spegel("fast")?),
    };
    let wait = format!("{}ms", (storm.max_wait.max(0.0) * 1e3).round());
    let on = ["--storm", "on", "--storm-max-wait", &wait].map(str::to_owned);
    // Another program may be what runs, which does not know it.
    let off = if program.as_deref().is_some_and(knows_storms) { &["--storm", "off"][..] } else { &[] };
    let off: Vec<String> = off.iter().map(|word| (*word).to_owned()).collect();
    let arguments = |is_on: bool| [if is_on { &on[..] } else { &off }, &*storm.with].concat();
    Ok(Lab {
        program,
        arguments: arguments(!storm.off),
        second_arguments: storm.mixed.then(|| arguments(false)),
        nodes: storm.nodes,
        layers: storm.layers,
        size: storm.size,
        upstream: mbit(storm.upstream),
        node: mbit(storm.node),
        stagger: Duration::from_secs_f64(storm.stagger.max(0.0)),
        slow_node: storm.slow > 0,
        kill: storm.kill.map(|kill| match kill {
            Kill::Root => Victim::Root,
            Kill::Inner => Victim::Inner,
        }),
        refuse: storm.refuse,
        seeded: storm.seeds > 0,
    })
}

/// Whether the program has storms to turn off.
fn knows_storms(program: &Path) -> bool {
    let help = Command::new(program).args(["registry", "--help"]).output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--storm "))
}

fn mbit(bytes: f64) -> u32 {
    (bytes * 8.0 / 1e6).round().clamp(1.0, 1e6) as u32
}

/// One bar a node, where there is a terminal.
struct Bars {
    all: MultiProgress,
    nodes: Vec<ProgressBar>,
}

// === impl Bars ===

impl Bars {
    fn new(lab: &Lab) -> Self {
        let all = MultiProgress::new();
        let style = ProgressStyle::with_template("{prefix:>8} {bar:40} {bytes:>11} of {total_bytes}, {bytes_per_sec}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = |number: usize| {
            let bar = all.add(ProgressBar::new(lab.size)).with_prefix(format!("node {number}"));
            bar.set_style(style.clone());
            bar
        };
        Self { nodes: (0..lab.nodes).map(bar).collect(), all }
    }

    fn show(&self, sample: &Sample) {
        for (bar, node) in self.nodes.iter().zip(&sample.nodes) {
            bar.set_position(node.bytes);
        }
    }

    fn clear(&self) {
        // A terminal that is gone is no failure.
        let _ = self.all.clear();
    }
}

/// A line a node, and the storm's figures.
fn table(stormed: &Stormed) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut text =
        String::from("node   began s  took s  upstream MiB  depth  moves  waited most      from peers (node: MiB)\n");
    for pull in &stormed.pulls {
        let peers = pull.from_peers.iter().filter(|(_, bytes)| *bytes >= 1 << 20);
        let peers: Vec<String> = peers.map(|(number, bytes)| format!("{number}: {:.0}", mib(*bytes))).collect();
        let end = match (&pull.failed, pull.killed) {
            (_, true) => "  (killed)".to_owned(),
            (Some(why), _) => format!("  FAILED: {why}"),
            (None, _) => String::new(),
        };
        text += &format!(
            "{:<6} {:>7.1} {:>7.1} {:>13.1} {:>6} {:>6}  {:<16} {}{end}\n",
            pull.node,
            pull.began,
            pull.seconds,
            mib(pull.from_upstream),
            pull.told.depth,
            pull.told.moves,
            pull.told.why_slow().map_or("-".into(), |(what, seconds)| format!("{seconds:.1} {what}")),
            peers.join(", ")
        );
    }
    let [manifests, blobs] = stormed.upstream_requests;
    text += &format!(
        "one pull alone {:.1} s; the last node {:.1} s ({:.2} times that), the slowest pull {:.1} s ({:.2} times)\n\
         upstream sent {:.2} times the image, and answered {manifests} GETs of manifests and {blobs} of blobs; depth {}\n",
        stormed.solo,
        stormed.last(),
        stormed.last() / stormed.solo,
        stormed.slowest(),
        stormed.slowest() / stormed.solo,
        stormed.upstream_share(),
        stormed.depth(),
    );
    let told = |bytes: fn(&Pulled) -> f64| stormed.pulls.iter().map(bytes).sum::<f64>() / f64::from(1 << 20);
    if stormed.pulls.iter().any(|pull| pull.told.is_there()) {
        let roots = stormed.pulls.iter().filter(|pull| pull.told.from_upstream > 0.0);
        let roots: Vec<String> = roots.map(|pull| pull.node.to_string()).collect();
        text += &format!(
            "the nodes' own metrics: {:.1} MiB from upstream by nodes {}, {:.1} MiB from each other\n",
            told(|pull| pull.told.bytes[0]),
            roots.join(", "),
            told(|pull| pull.told.bytes[1]),
        );
    }
    text += &format!("the cores were busy for {:.0} % of the time", 100.0 * stormed.busy);
    if stormed.is_void() {
        text += ": THIS RUN IS VOID, they were the limit";
    }
    text
}
