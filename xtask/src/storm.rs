//! `cargo xtask storm`: many nodes that want the same image at once, and none has it.

/// The daemon's state machines, from its own source: the crate itself cannot be a dependency here, since building it needs what this
/// program hands over.
#[allow(dead_code, unused_imports, unreachable_pub, reason = "the daemon uses the rest")]
#[path = "../../spegel/src/storm/mod.rs"]
mod machines;

mod all;
mod chart;
mod fluid;
mod lab;
mod model;
mod report;
mod scenario;
mod world;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use report::Outcome;
use scenario::{Kill, Scenario};

/// Over which nodes start one after the other in the scenario of that.
const TEN_SECONDS: Duration = Duration::from_secs(10);

/// A storm of many nodes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Storm {
    /// Simulate so many nodes, in a model of their links: the daemon's own state machines, no process, no socket
    #[arg(long, value_name = "N", value_delimiter = ',')]
    simulate: Vec<usize>,
    /// How many nodes with a real containerd each, where nothing is simulated; needs root
    #[arg(long, default_value_t = 8, value_name = "N", conflicts_with = "simulate")]
    nodes: usize,
    /// Run this program on each node instead of building spegel
    #[arg(long, value_name = "PATH", conflicts_with = "simulate")]
    binary: Option<PathBuf>,
    /// Run no mirror at all
    #[arg(long, conflicts_with = "simulate")]
    no_mirror: bool,
    /// Arguments for every mirror
    #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "ARGUMENT", conflicts_with = "simulate")]
    with: Vec<String>,
    /// Draw what each node had over time, and who gave it, into this SVG file
    #[arg(long, value_name = "FILE", conflicts_with = "simulate")]
    svg: Option<PathBuf>,
    /// What upstream sends in all
    #[arg(long, default_value = "200mbit", value_parser = rate)]
    upstream: f64,
    /// What each node's link carries, each way
    #[arg(long, default_value = "1gbit", value_parser = rate)]
    node: f64,
    /// What one connection to upstream carries [default: what upstream's link does]
    #[arg(long, value_parser = rate, requires = "simulate")]
    throttle: Option<f64>,
    /// How many layers the image has
    #[arg(long, default_value_t = 1)]
    layers: usize,
    /// How large all layers are together
    #[arg(long, default_value = "256MiB", value_parser = size)]
    size: u64,
    /// Nodes start within so many seconds
    #[arg(long, default_value_t = 0.0)]
    stagger: f64,
    /// How many percent of the nodes die in a minute, half of them without a word, each replaced by a new one
    #[arg(long, default_value_t = 0.0, requires = "simulate")]
    churn: f64,
    /// Kill a node when the first layer is half way
    #[arg(long)]
    kill: Option<Kill>,
    /// Kill it without a word to those connected, as when a machine is lost
    #[arg(long, requires = "simulate")]
    silent: bool,
    /// How many nodes send a tenth as fast as the others [if not told: 1]
    #[arg(long = "slow-node", default_value_t = 0, num_args = 0..=1, default_missing_value = "1", value_name = "N")]
    slow: usize,
    /// How many nodes upstream refuses [if not told: 1]; of simulated ones those that ask it first
    #[arg(long, default_value_t = 0, num_args = 0..=1, default_missing_value = "1", value_name = "N")]
    refuse: usize,
    /// Half of the nodes do not speak the protocol
    #[arg(long)]
    mixed: bool,
    /// How many other nodes have the image already [if not told: 1]
    #[arg(long, default_value_t = 0, num_args = 0..=1, default_missing_value = "1", value_name = "N")]
    seeds: usize,
    /// How many zones the nodes are in
    #[arg(long, default_value_t = 1, requires = "simulate")]
    zones: u32,
    /// How long upstream's first byte takes, in milliseconds
    #[arg(long, default_value_t = 300, requires = "simulate")]
    first_byte: u64,
    /// For how many seconds one pull may be held in all
    #[arg(long, default_value_t = 2.0)]
    max_wait: f64,
    /// Chance: the same seed, the same run
    #[arg(long, value_delimiter = ',', default_value = "1", requires = "simulate")]
    seed: Vec<u64>,
    /// All scenarios of the table of aims, beside the same with the protocol off
    #[arg(long, requires = "simulate")]
    table: bool,
    /// All scenarios of the table of aims with real nodes, each with the protocol, without it, and without a mirror
    #[arg(long, conflicts_with_all = ["simulate", "svg"])]
    all: bool,
    /// Of these only the ones of these numbers, from 1 on
    #[arg(long, value_delimiter = ',', value_name = "N", requires = "all")]
    rows: Vec<usize>,
    /// Put what --json wrote before into the table as well
    #[arg(long, value_delimiter = ',', value_name = "FILE", requires = "all")]
    from: Vec<PathBuf>,
    /// Without the protocol
    #[arg(long)]
    off: bool,
    /// Write the table into benches/results, with date, kernel and method
    #[arg(long)]
    record: bool,
    /// Write the figures to this file as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Storm {
    /// Simulates, prints and checks; false if an aim is missed.
    ///
    /// # Errors
    /// Numbers that make no sense.
    pub(crate) fn run(self) -> Result<bool> {
        ensure!(
            self.layers > 0 && self.size / self.layers as u64 > 0,
            "an image has at least a layer, and that a byte"
        );
        ensure!(self.zones > 0 && self.simulate.iter().all(|nodes| *nodes > 0), "there is at least one node and zone");
        if self.all {
            return all::run(&self);
        }
        if self.simulate.is_empty() {
            return lab::run(&self);
        }
        let mut outcomes = Vec::new();
        report::header();
        for seed in &self.seed {
            for nodes in &self.simulate {
                let scenarios = if self.table { self.table(*nodes, *seed) } else { vec![self.scenario(*nodes, *seed)] };
                for scenario in scenarios {
                    let outcome = Outcome::of(scenario);
                    outcome.print();
                    outcomes.push(outcome);
                }
            }
        }
        let json: Vec<_> = outcomes.iter().map(Outcome::json).collect();
        crate::write_json(self.json.as_ref(), &json.into())?;
        if self.record {
            let words: Vec<String> = std::env::args().skip(1).collect();
            let command = format!("cargo xtask {}", words.join(" "));
            let name = if self.table { "storm-simulated" } else { "storm-simulated-large" };
            crate::bench::record(name, report::METHOD, &report::table(&outcomes), &command)?;
        }
        Ok(outcomes.iter().all(|outcome| outcome.finished))
    }

    /// For how long a pull may be held; nothing without the protocol.
    fn held(&self) -> Option<Duration> {
        (!self.off).then(|| Duration::from_secs_f64(self.max_wait.max(0.0)))
    }

    fn scenario(&self, nodes: usize, seed: u64) -> Scenario {
        Scenario {
            name: format!("layers: {}, deaths: {} %/min", self.layers, self.churn),
            nodes,
            upstream: self.upstream,
            node: self.node,
            throttle: self.throttle.unwrap_or(f64::INFINITY),
            layers: self.layers,
            size: self.size,
            stagger: Duration::from_secs_f64(self.stagger.max(0.0)),
            churn: self.churn / 100.0,
            kill: self.kill,
            silent: self.silent,
            slow: self.slow,
            refuse: self.refuse,
            mute: if self.mixed { nodes / 2 } else { 0 },
            seeds: self.seeds,
            zones: self.zones,
            first_byte: Duration::from_millis(self.first_byte),
            storm: self.held(),
            seed,
            ..Scenario::default()
        }
    }

    /// The rows of the table of aims.
    fn table(&self, nodes: usize, seed: u64) -> Vec<Scenario> {
        let plain = self.scenario(nodes, seed);
        let row = |name: &str, change: &dyn Fn(&mut Scenario)| {
            let mut scenario = Scenario { name: name.into(), ..plain.clone() };
            change(&mut scenario);
            scenario
        };
        let mut rows = vec![
            row("1 layer", &|_| {}),
            row("4 layers", &|s| s.layers = 4),
            row("one uploads a tenth", &|s| s.slow = 1),
            row("root killed", &|s| s.kill = Some(Kill::Root)),
            row("root lost", &|s| (s.kill, s.silent) = (Some(Kill::Root), true)),
            row("inner killed", &|s| s.kill = Some(Kill::Inner)),
            row("inner lost", &|s| (s.kill, s.silent) = (Some(Kill::Inner), true)),
            row("first refused", &|s| s.refuse = 1),
            row("half do not speak it", &|s| s.mute = s.nodes / 2),
            row("start over 10 s", &|s| s.stagger = Duration::from_secs(10)),
            row("three zones", &|s| s.zones = 3),
            row("upstream as fast as links", &|s| {
                (s.upstream, s.throttle) = (s.node * s.nodes as f64, s.node);
            }),
            row("one seed, as fast as links", &|s| s.seeds = 1),
            row("churn 1 %/min", &|s| s.churn = 0.01),
        ];
        for n in (0..rows.len()).rev() {
            let off = Scenario { name: format!("{}, off", rows[n].name), storm: None, ..rows[n].clone() };
            // Where everybody goes upstream nothing else happens.
            if off.seeds > 0
                || off.throttle.is_finite()
                || off.stagger > Duration::ZERO
                || off.name.starts_with("1 layer")
            {
                rows.insert(n + 1, off);
            }
        }
        rows
    }
}

/// Bytes a second, of bits with a unit.
fn rate(text: &str) -> Result<f64, String> {
    let units = [("kbit", 125.0), ("mbit", 125e3), ("gbit", 125e6)];
    let found =
        units.iter().find_map(|(unit, bytes)| Some((text.to_lowercase().strip_suffix(unit)?.parse::<f64>(), bytes)));
    match found {
        Some((Ok(number), bytes)) if number > 0.0 => Ok(number * bytes),
        _ => Err("such as 200mbit".into()),
    }
}

/// Bytes, of a number with a unit.
fn size(text: &str) -> Result<u64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let found = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?.parse::<u64>(), shift)));
    match found {
        Some((Ok(number), shift)) if number > 0 && number < 1 << 20 => Ok(number << shift),
        _ => Err("such as 256MiB".into()),
    }
}
