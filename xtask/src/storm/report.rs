//! What came of a storm, in figures.

use std::time::{Duration, Instant};

use super::scenario::Scenario;
use super::world::World;

/// Longer than anything takes that comes to an end.
const BOUND: Duration = Duration::from_secs(3600);

/// How the figures come about.
pub(super) const METHOD: &str = "Simulated: the daemon's own state machines, each node with a containerd that gets the manifest, then config and \
    layers three at a time, and shows others only whole MiB of what it has. Links are a fluid that is shared nearly max-min fair in steps \
    of 10 ms; a message takes 0.4 to 0.75 ms, a coordinator 20 µs for one. Upstream, unless a row says otherwise, sends 200 Mbit/s in all and its \
    first byte after 240 to 360 ms, nodes have 1 Gbit/s each way. Solo is one node by itself, without the protocol; with a seed one copy between \
    two nodes. Off is what the daemon does without the protocol: ask whoever has it or receives it, else upstream. Last is when the last of \
    the first nodes has everything, from the first one's start; worst is the longest that one took from its own start. Held is how long \
    requests of one pull waited for a first byte in all. A node that dies is, one time in two, silent";

/// The figures of several runs.
pub(super) fn table(outcomes: &[Outcome]) -> String {
    let head = "| scenario | nodes | seed | upstream bytes / image | upstream requests / blob | last / solo | worst / solo | depth | messages a \
                node, mean, most | held p50, p99, max (ms) | given up |\n|---|---|---|---|---|---|---|---|---|---|---|\n";
    outcomes.iter().fold(head.to_owned(), |table, outcome| {
        let ratio = |time: Duration| time.as_secs_f64() / outcome.solo.as_secs_f64();
        table
            + &format!(
                "| {} | {} | {} | {:.2} | {:.2} | {:.2} | {:.2} | {} | {:.0}, {} | {}, {}, {} | {} |\n",
                outcome.scenario.name,
                outcome.scenario.nodes,
                outcome.scenario.seed,
                outcome.upstream,
                outcome.requests,
                ratio(outcome.last),
                ratio(outcome.slowest),
                outcome.depth,
                outcome.messages,
                outcome.most_messages,
                outcome.held[0].as_millis(),
                outcome.held[1].as_millis(),
                outcome.held[2].as_millis(),
                outcome.given_up,
            )
    })
}

/// The figures of one run.
#[derive(Debug)]
pub(super) struct Outcome {
    scenario: Scenario,
    pub(super) finished: bool,
    pub(super) solo: Duration,
    /// When the last of those that were there from the beginning had everything, after the first started.
    pub(super) last: Duration,
    /// What nodes took, each from its own start.
    p50: Duration,
    pub(super) slowest: Duration,
    pub(super) upstream: f64,
    requests: f64,
    depth: u32,
    messages: f64,
    most_messages: u64,
    held: [Duration; 3],
    reparented: u64,
    given_up: u64,
    leases: u64,
    took: Duration,
}

impl Outcome {
    /// Runs the scenario, and one node by itself.
    pub(super) fn of(scenario: Scenario) -> Self {
        let began = Instant::now();
        let lonely = Scenario {
            nodes: 1,
            storm: None,
            churn: 0.0,
            kill: None,
            slow: 0,
            refuse: 0,
            mute: 0,
            seeds: 0,
            stagger: Duration::ZERO,
            // With a seed, what one copy between two nodes takes.
            upstream: if scenario.seeds > 0 { scenario.node } else { scenario.upstream },
            first_byte: if scenario.seeds > 0 { 4 * scenario.latency } else { scenario.first_byte },
            ..scenario.clone()
        };
        let mut alone = World::new(lonely);
        alone.run(BOUND);
        let solo = last(&alone, 1);
        let mut world = World::new(scenario.clone());
        let all = scenario.nodes as f64 * scenario.size as f64 / scenario.upstream;
        let finished = world.run(BOUND.max(Duration::from_secs_f64(2.0 * all)));
        let mut own: Vec<Duration> = world
            .members
            .iter()
            .take(scenario.nodes)
            .filter_map(|member| Some(member.finished? - member.started?))
            .collect();
        own.sort_unstable();
        let mut held: Vec<Duration> = world.members.iter().map(|member| member.held).collect();
        held.sort_unstable();
        let blobs: u64 = scenario.blobs().iter().sum();
        let living = world.members.len().max(1) as f64;
        Self {
            finished,
            solo,
            last: last(&world, scenario.nodes),
            p50: at(&own, 0.5),
            slowest: at(&own, 1.0),
            upstream: world.totals.upstream_bytes / blobs as f64,
            requests: world.totals.upstream_requests as f64 / scenario.blobs().len() as f64,
            depth: world
                .members
                .iter()
                .flat_map(|member| member.blobs.iter().map(|blob| blob.depth))
                .max()
                .unwrap_or(0),
            messages: world.members.iter().map(|member| member.messages).sum::<u64>() as f64 / living,
            most_messages: world.members.iter().map(|member| member.messages).max().unwrap_or(0),
            held: [at(&held, 0.5), at(&held, 0.99), at(&held, 1.0)],
            reparented: world.totals.reparented,
            given_up: world.totals.given_up,
            leases: world.totals.leases,
            took: began.elapsed(),
            scenario,
        }
    }

    /// When the last node had everything, and what the slowest took, as multiples of one pull alone.
    pub(super) fn last_of_solo(&self) -> f64 {
        self.last.as_secs_f64() / self.solo.as_secs_f64()
    }

    /// As [`Outcome::last_of_solo`].
    pub(super) fn worst_of_solo(&self) -> f64 {
        self.slowest.as_secs_f64() / self.solo.as_secs_f64()
    }

    pub(super) fn print(&self) {
        let ratio = |time: Duration| time.as_secs_f64() / self.solo.as_secs_f64();
        println!(
            "{:<32} {:>6} {:>4} {:>8.2} {:>8.2} {:>6.2} {:>6.2} {:>6.2} {:>5} {:>6.1} {:>7} {:>5} {:>5} {:>5} {:>6} {:>6} {:>6} {:>6.1}{}",
            self.scenario.name,
            self.scenario.nodes,
            self.scenario.seed,
            self.upstream,
            self.requests,
            ratio(self.last),
            ratio(self.p50),
            ratio(self.slowest),
            self.depth,
            self.messages,
            self.most_messages,
            self.held[0].as_millis(),
            self.held[1].as_millis(),
            self.held[2].as_millis(),
            self.reparented,
            self.given_up,
            self.leases,
            self.took.as_secs_f64(),
            if self.finished { "" } else { "  DID NOT END" },
        );
    }

    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "scenario": self.scenario.name,
            "nodes": self.scenario.nodes,
            "seed": self.scenario.seed,
            "storm": self.scenario.storm.is_some(),
            "finished": self.finished,
            "solo_seconds": self.solo.as_secs_f64(),
            "last_seconds": self.last.as_secs_f64(),
            "p50_seconds": self.p50.as_secs_f64(),
            "slowest_seconds": self.slowest.as_secs_f64(),
            "upstream_of_size": self.upstream,
            "upstream_requests_a_blob": self.requests,
            "depth": self.depth,
            "messages_a_node": self.messages,
            "messages_most": self.most_messages,
            "held_ms": self.held.map(|held| held.as_millis() as u64),
            "reparented": self.reparented,
            "given_up": self.given_up,
            "leases": self.leases,
        })
    }
}

/// The heads of the columns.
pub(super) fn header() {
    println!(
        "upstream: bytes / image, requests / blob; last: last node's end / solo; p50, worst: from each node's own start / solo; held: ms, p50 p99 max"
    );
    println!(
        "{:<32} {:>6} {:>4} {:>8} {:>8} {:>6} {:>6} {:>6} {:>5} {:>6} {:>7} {:>5} {:>5} {:>5} {:>6} {:>6} {:>6} {:>6}",
        "scenario",
        "nodes",
        "seed",
        "upstream",
        "requests",
        "last",
        "p50",
        "worst",
        "depth",
        "msgs",
        "most",
        "held",
        "",
        "",
        "moved",
        "gaveup",
        "leases",
        "run s"
    );
}

fn last(world: &World, nodes: usize) -> Duration {
    let ends = world.members.iter().take(nodes).filter_map(|member| member.finished);
    ends.max().map_or(Duration::ZERO, |end| end - world.start)
}

fn at(sorted: &[Duration], part: f64) -> Duration {
    let place = (sorted.len().saturating_sub(1) as f64 * part).round() as usize;
    sorted.get(place).copied().unwrap_or_default()
}
