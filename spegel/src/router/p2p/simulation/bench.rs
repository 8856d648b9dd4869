//! The router's bench under simulated time: what `cargo xtask bench router` shows, and whether its aims are met.

use std::collections::BTreeMap;
use std::time::Duration;

use libp2p::PeerId;
use prost::Message as _;
use rand::Rng as _;
use rand::seq::IteratorRandom as _;

use super::super::keys::ContentId;
use super::super::pulse::SILENCE;
use super::super::table::REPLICAS;
use super::super::wire::{Kind as WireKind, Message as WireMessage};
use super::lookups::{Connections, Outcomes};
use super::report::{Aim, Report};
use super::{CONNECTION, FRAMING, Kind, Network, STREAM, id};

const SEED: u64 = 20_260_801;
/// How many nodes have each key.
const PROVIDERS: u32 = 10;

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Effort {
    /// How many keys each node has.
    keys: u32,
    lookups: usize,
    newcomers: usize,
    churn: Duration,
}

/// What the bench does.
const FULL: Effort = Effort { keys: 2_000, lookups: 600, newcomers: 20, churn: Duration::from_secs(600) };

/// What a test does in each build.
const SMALL: Effort = Effort { keys: 100, lookups: 60, newcomers: 3, churn: Duration::from_secs(60) };

/// A network with content, and what each node has of it.
struct Cluster {
    network: Network,
    size: usize,
    effort: Effort,
    report: Report,
    ids: Vec<ContentId>,
    contents: BTreeMap<PeerId, Vec<ContentId>>,
    /// Keys that nobody had at first.
    next: u32,
}

impl Cluster {
    fn new(size: usize, kind: impl Fn(usize) -> Kind, effort: Effort) -> Self {
        let mut network = Network::new(SEED ^ size as u64, true);
        for n in 0..size {
            network.join(kind(n));
            network.run(Duration::from_millis(20));
        }
        network.run(Duration::from_secs(90));
        let providers = PROVIDERS.min(size as u32);
        let ids: Vec<ContentId> = (0..size as u32 * effort.keys / providers).map(id).collect();
        let mut contents: BTreeMap<PeerId, Vec<ContentId>> = BTreeMap::new();
        for id in &ids {
            for peer in network.nodes.keys().copied().choose_multiple(&mut network.rng, providers as usize) {
                contents.entry(peer).or_default().push(*id);
            }
        }
        for (peer, ids) in &contents {
            network.offer(*peer, ids.iter().copied());
            network.run(Duration::from_millis(20));
        }
        network.run(Duration::from_secs(30));
        Self { network, size, effort, report: Report::new(size), ids, contents, next: 1 << 30 }
    }

    fn figure(&self, what: &str, value: f64) {
        self.report.figure(what, value);
    }

    fn check(&mut self, what: &str, value: f64, aim: Aim) {
        self.report.check(what, value, aim);
    }

    fn look_up(&mut self, connections: Connections) -> Outcomes {
        self.network.look_up_many(self.effort.lookups, &self.ids, connections)
    }

    fn fresh(&mut self) -> ContentId {
        self.next += 1;
        id(self.next)
    }

    fn lookups(&mut self) {
        let mut warm = self.look_up(Connections::All);
        self.figure("lookup p50, warm connections (ms)", warm.at(0.5));
        self.check("lookup p99, warm connections (ms)", warm.at(0.99), Aim::AtMost(5.0));
        let mut cold = self.look_up(Connections::None);
        self.figure("lookup p99, cold connections (ms)", cold.at(0.99));
        let mut real = self.look_up(Connections::AsTheyAre);
        self.figure("lookup p99, connections as they are (ms)", real.at(0.99));
        warm.add_all(cold);
        warm.add_all(real);
        self.check("lookups that find (share)", warm.found(), Aim::AtLeast(0.999));
        self.check("lookups that name one who has it not", warm.wrong(), Aim::AtMost(0.0));
    }

    /// From when content is offered until somebody else finds it.
    fn advertising(&mut self) {
        let mut times = Outcomes::default();
        for _ in 0..self.effort.lookups / 3 {
            let (provider, id) = (self.network.any(), self.fresh());
            let mut from = self.network.any();
            while from == provider {
                from = self.network.any();
            }
            let start = self.network.now;
            self.network.offer(provider, [id]);
            let first = loop {
                let passed = self.network.now - start;
                let outcome = self.network.look_up(&from, id, Connections::AsTheyAre);
                if let Some(first) = outcome.first {
                    break Some(passed + first);
                }
                if passed > Duration::from_secs(20) {
                    break None;
                }
                self.network.run(Duration::from_millis(1));
            };
            times.add(first, false);
        }
        let slowest = if times.found() < 1.0 { f64::INFINITY } else { times.at(0.99) };
        self.check("new content found by another, p99 (ms)", slowest, Aim::AtMost(1_000.0));
    }

    /// What advertising costs beside walking to each key for itself, and the member list at rest.
    fn traffic(&mut self) {
        let time = Duration::from_secs(120);
        self.network.reset_traffic();
        self.network.run(time);
        let seconds = time.as_secs_f64();
        let (messages, bytes) = self.network.offer_traffic();
        let (messages, bytes) = (messages / seconds, bytes / seconds);
        let (each_messages, each_bytes) = self.key_by_key();
        self.figure("advertising, messages/s a node", messages);
        self.figure("advertising, bytes/s a node", bytes);
        self.figure("the same key by key, messages/s a node", each_messages);
        self.figure("the same key by key, bytes/s a node", each_bytes);
        self.check("advertising beside key by key, messages (share)", messages / each_messages, Aim::AtMost(0.1));
        self.check("advertising beside key by key, bytes (share)", bytes / each_bytes, Aim::AtMost(0.1));
        let members = self.network.member_bytes() / seconds;
        self.check("member list at rest, bytes/s a node, sent and received", members, Aim::AtMost(1_000.0));
    }

    /// A walk and twenty messages for each key within four fifths of its time to live; a fourth of them over new connections.
    fn key_by_key(&self) -> (f64, f64) {
        let told = REPLICAS.min(self.size - 1) as f64;
        let keys = f64::from(self.effort.keys) / 720.0;
        let request = WireMessage::request(WireKind::GetProviders, &self.ids[0].multihash()).encoded_len() + FRAMING;
        // An answer names twenty peers of some sixty bytes.
        let answer = told * 60.0 + FRAMING as f64;
        let add = request + 60 + STREAM + CONNECTION / 4;
        (keys * told * 3.0, keys * told * (request as f64 + answer + add as f64))
    }

    fn memory(&self) {
        let nodes = self.network.nodes.values();
        let (bytes, records): (usize, usize) = nodes
            .fold((0, 0), |(bytes, records), node| (bytes + node.memory(), records + node.records.foreign_count()));
        self.figure("records a node", (records / self.size) as f64);
        self.figure("records, members and tables, memory a node (MB)", bytes as f64 / self.size as f64 / 1e6);
    }

    /// Nodes that come with content of their own: when they find what was there, and when all of theirs that is looked for is found.
    fn newcomers(&mut self) {
        let (mut find, mut found) = (Outcomes::default(), Outcomes::default());
        for _ in 0..self.effort.newcomers {
            let own: Vec<ContentId> = (0..self.effort.keys).map(|_| self.fresh()).collect();
            let start = self.network.now;
            let peer = self.network.join(Kind::Member);
            self.network.offer(peer, own.iter().copied());
            let (mut finds, mut is_found) = (None, None);
            while (finds.is_none() || is_found.is_none()) && self.network.now - start < Duration::from_secs(60) {
                self.network.run(Duration::from_millis(20));
                let passed = self.network.now - start;
                if finds.is_none() {
                    let wanted = *self.ids.iter().choose(&mut self.network.rng).unwrap();
                    let outcome = self.network.look_up(&peer, wanted, Connections::AsTheyAre);
                    finds = outcome.first.map(|first| passed + first);
                }
                if is_found.is_none() {
                    is_found = self.all_found(&peer, &own).then_some(passed);
                }
            }
            find.add(finds, false);
            found.add(is_found, false);
            self.contents.insert(peer, own);
        }
        for (what, times) in [("a new node finds", &mut find), ("all content of a new node is found", &mut found)] {
            let slowest = if times.found() < 1.0 { f64::INFINITY } else { times.at(1.0) / 1e3 };
            self.report.check(&format!("{what}, the slowest (s)"), slowest, Aim::AtMost(3.0));
        }
    }

    fn all_found(&mut self, provider: &PeerId, own: &[ContentId]) -> bool {
        (0..20).all(|_| {
            let id = *own.iter().choose(&mut self.network.rng).unwrap();
            let from = self.network.any();
            from == *provider || self.network.look_up(&from, id, Connections::AsTheyAre).first.is_some()
        })
    }

    /// A twentieth of the nodes a minute vanishes without a word, and others with their content take their places.
    fn churn(&mut self) {
        let pause = Duration::from_secs_f64(60.0 / (0.05 * self.size as f64));
        let (start, mut replaced) = (self.network.now, 0);
        let mut outcomes = Outcomes::default();
        self.network.reset_traffic();
        while self.network.now - start < self.effort.churn {
            while self.network.now - start >= pause * replaced {
                replaced += 1;
                let victim = self.network.any();
                self.network.kill(victim, SILENCE);
                let content = self.contents.remove(&victim).unwrap_or_default();
                let peer = self.network.join(Kind::Member);
                self.network.offer(peer, content.iter().copied());
                self.contents.insert(peer, content);
            }
            let step = Duration::from_millis(self.network.rng.random_range(200..800));
            self.network.run(step);
            outcomes.add_all(self.network.look_up_many(2, &self.ids, Connections::AsTheyAre));
        }
        self.check("5 % churn a minute for 10 minutes: found (share)", outcomes.found(), Aim::AtLeast(0.999));
        self.check("5 % churn a minute for 10 minutes: named and has it not", outcomes.wrong(), Aim::AtMost(0.0));
        self.figure("5 % churn a minute for 10 minutes: lookup p99 (ms)", outcomes.at(0.99));
        let members = self.network.member_bytes() / self.effort.churn.as_secs_f64();
        self.figure("5 % churn a minute for 10 minutes: member list, bytes/s a node", members);
    }

    /// A fifth of the nodes vanishes without a word.
    fn deaths(&mut self) {
        let count = self.network.nodes.len() / 5;
        for victim in self.network.nodes.keys().copied().choose_multiple(&mut self.network.rng, count) {
            self.network.kill(victim, SILENCE);
        }
        let start = self.network.now;
        let mut at_once = Outcomes::default();
        while self.network.now - start < Duration::from_secs(10) {
            at_once.add_all(self.network.look_up_many(12, &self.ids, Connections::AsTheyAre));
            self.network.run(Duration::from_millis(200));
        }
        self.figure("20 % dead, first 10 s: found (share)", at_once.found());
        self.check("20 % dead, first 10 s: named and has it not", at_once.wrong(), Aim::AtMost(0.0));
        self.figure("20 % dead, first 10 s: lookup p99 (ms)", at_once.at(0.99));
        let mut after = self.look_up(Connections::AsTheyAre);
        self.check("20 % dead, after 10 s: found (share)", after.found(), Aim::AtLeast(0.999));
        self.figure("20 % dead, after 10 s: lookup p99 (ms)", after.at(0.99));
        self.network.run(Duration::from_secs(30));
        let mut noticed = self.look_up(Connections::AsTheyAre);
        self.figure("20 % dead, after 40 s: lookup p99 (ms)", noticed.at(0.99));
    }

    /// Which provider of one key is named first.
    fn hot_key(&mut self) {
        let hot = self.fresh();
        let count = 100.min(self.size / 2);
        let providers = self.network.nodes.keys().copied().choose_multiple(&mut self.network.rng, count);
        providers.iter().for_each(|peer| self.network.offer(*peer, [hot]));
        self.network.run(Duration::from_secs(10));
        let mut named: BTreeMap<PeerId, u32> = BTreeMap::new();
        let lookups = 60 * count;
        for _ in 0..lookups {
            let from = self.network.nodes.keys().copied().filter(|peer| !providers.contains(peer));
            let from = from.choose(&mut self.network.rng).unwrap();
            let outcome = self.network.look_up(&from, hot, Connections::AsTheyAre);
            outcome.provider.into_iter().for_each(|provider| *named.entry(provider).or_default() += 1);
        }
        let share = f64::from(*named.values().max().unwrap()) * count as f64 / lookups as f64;
        self.check("one hot key: largest share of its providers (x mean)", share, Aim::AtMost(2.0));
        let named = named.len() as f64 / count as f64;
        self.check("one hot key: providers that are named (share)", named, Aim::AtLeast(1.0));
    }
}

/// Half of the nodes do not speak the member protocol. Fewer keys: it is the ways to them that count.
fn mixed(size: usize, effort: Effort) -> Vec<String> {
    let kind = |n: usize| if n.is_multiple_of(2) { Kind::Member } else { Kind::Plain };
    let mut cluster = Cluster::new(size, kind, Effort { keys: effort.keys / 10, ..effort });
    cluster.report = Report::new(size).with_prefix("half not members: ");
    cluster.lookups();
    cluster.advertising();
    cluster.deaths();
    cluster.report.missed()
}

/// What this process has had of the processor, so far as the system counts it: hundredths of a second.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name, in parentheses, may have spaces; the user's and the system's time are the twelfth and thirteenth after it.
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Prints the figures of a network of this size, and says which aims it misses.
fn measure(size: usize, effort: Effort) -> Vec<String> {
    let step = |what: &str| println!("{size} nodes: {what} by {:.1} s of this process's time", cpu_seconds());
    let mut cluster = Cluster::new(size, |_| Kind::Member, effort);
    step("together");
    cluster.lookups();
    cluster.advertising();
    cluster.traffic();
    cluster.memory();
    step("traffic");
    cluster.hot_key();
    cluster.newcomers();
    step("newcomers");
    cluster.churn();
    step("churn");
    cluster.deaths();
    step("deaths");
    let mut missed = cluster.report.missed();
    drop(cluster.network);
    missed.extend(mixed(size, effort));
    step("done");
    missed
}

#[test]
fn ten_nodes_meet_the_aims() {
    assert_eq!(measure(10, SMALL), [""; 0]);
}

/// What is printed twice is the same: whoever doubts a figure can look into it.
#[test]
fn a_seed_makes_a_run() {
    let run = || {
        let mut cluster = Cluster::new(30, |_| Kind::Member, Effort { keys: 50, ..SMALL });
        let victim = cluster.network.any();
        cluster.network.kill(victim, SILENCE);
        cluster.network.run(Duration::from_secs(20));
        let mut outcomes = cluster.network.look_up_many(100, &cluster.ids, Connections::AsTheyAre);
        (outcomes.at(0.5), outcomes.at(0.99), cluster.network.member_bytes(), cluster.network.offer_traffic())
    };
    assert_eq!(run(), run());
}

fn bench(size: usize) {
    println!("seed {SEED}");
    measure(size, FULL);
}

#[test]
#[ignore = "cargo xtask bench router runs it"]
fn bench_10_nodes() {
    bench(10);
}

/// Beside as many real ones.
#[test]
#[ignore = "cargo xtask bench router runs it"]
fn bench_30_nodes() {
    bench(30);
}

#[test]
#[ignore = "cargo xtask bench router runs it"]
fn bench_100_nodes() {
    bench(100);
}

#[test]
#[ignore = "takes minutes; cargo xtask bench router runs it"]
fn bench_1000_nodes() {
    bench(1_000);
}
