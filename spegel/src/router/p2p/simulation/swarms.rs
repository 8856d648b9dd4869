//! The same figures with real swarms on loopback, as many as two cores carry: what the simulation is checked against.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, IteratorRandom as _};
use rand::{Rng as _, SeedableRng as _};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::lookups::Outcomes;
use super::report::{Aim, Report};
use crate::bootstrap::StaticBootstrap;
use crate::oci::Key;
use crate::router::{Identity, P2pRouter, P2pSettings, Router as _, RouterMetrics};
use crate::store::Change;

const SEED: u64 = 20_260_802;
const SIZE: usize = 30;
const KEYS_PER_NODE: usize = 2_000;
const PROVIDERS: usize = 10;
const PORT: u16 = 5_001;

struct Swarm {
    router: Arc<P2pRouter>,
    metrics: RouterMetrics,
}

struct Swarms {
    nodes: Vec<Swarm>,
    rng: StdRng,
    keys: u32,
    started: u8,
    /// Which part of loopback they are on.
    network: u8,
    report: Report,
}

fn key(n: u32) -> Key {
    format!("sha256:{n:064x}").parse().unwrap()
}

/// What this process has in memory, in bytes.
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<f64>().unwrap() * 4096.0
}

/// What has gone over loopback, in bytes.
fn loopback() -> f64 {
    let text = std::fs::read_to_string("/proc/self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

impl Swarms {
    fn address(&self, number: u8) -> Ipv4Addr {
        let process = u8::try_from(std::process::id() % 200).unwrap() + 20;
        Ipv4Addr::new(127, process, self.network, number)
    }

    /// Calls the first, or nobody if it is the first.
    fn start(&mut self) -> usize {
        self.started += 1;
        let metrics = RouterMetrics::default();
        let first = format!("{}:{PORT}", self.address(1));
        let settings = P2pSettings {
            storms: false,
            listen: vec![SocketAddr::from((self.address(self.started), PORT))],
            registry_port: 5_000,
            identity: Identity::fresh(),
            bootstrap: if self.started == 1 { vec![] } else { vec![Arc::new(StaticBootstrap::new([first]).unwrap())] },
            remembered: None,
            mdns: false,
            advertise: Vec::new(),
            peer_networks: Vec::new(),
            network_key: None,
            zone: None,
            metrics: metrics.clone(),
            advertise_ttl: P2pSettings::ADVERTISE_TTL,
            join_timeout: P2pSettings::JOIN_TIMEOUT,
            max_records: P2pSettings::MAX_RECORDS,
        };
        let router = P2pRouter::start(settings, &CancellationToken::new()).unwrap();
        self.nodes.push(Swarm { router, metrics });
        self.nodes.len() - 1
    }

    fn fresh(&mut self, count: usize) -> Vec<Key> {
        let first = self.keys;
        self.keys += u32::try_from(count).unwrap();
        (first..self.keys).map(key).collect()
    }

    async fn first(&self, from: usize, key: &Key) -> Option<(Duration, Arc<str>)> {
        let start = Instant::now();
        let found = self.nodes[from].router.lookup(key).recv().await?;
        Some((start.elapsed(), found.id))
    }

    async fn look_up_many(&mut self, keys: &[Key], count: usize, pause: Duration) -> Outcomes {
        let mut outcomes = Outcomes::default();
        for _ in 0..count {
            let from = self.rng.random_range(0..self.nodes.len());
            let key = keys.choose(&mut self.rng).unwrap();
            outcomes.add(self.first(from, key).await.map(|(time, _)| time), false);
            sleep(pause).await;
        }
        outcomes
    }

    /// Until everyone lists everyone.
    async fn settle(&self) {
        let start = Instant::now();
        let lists = |node: &Swarm| node.router.members().borrow().len() == self.nodes.len() - 1;
        while !self.nodes.iter().all(lists) {
            assert!(start.elapsed() < Duration::from_secs(60), "the nodes do not find together");
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn records(&self) -> usize {
        self.nodes.iter().map(|node| node.router.foreign_records()).sum()
    }

    fn sent(&self, kind: &'static str) -> u64 {
        self.nodes.iter().map(|node| node.metrics.0.sent(kind)).sum()
    }

    /// Keys on ten nodes each, told to all who are to hold them.
    async fn fill(&mut self) -> Vec<Key> {
        let keys = self.fresh(SIZE * KEYS_PER_NODE / PROVIDERS);
        let mut contents: BTreeMap<usize, Vec<Key>> = BTreeMap::new();
        for key in &keys {
            for node in (0..SIZE).choose_multiple(&mut self.rng, PROVIDERS) {
                contents.entry(node).or_default().push(key.clone());
            }
        }
        for (node, keys) in contents {
            self.nodes[node].router.announce(Change::Added(keys));
        }
        let (start, mut before) = (Instant::now(), 0);
        while before == 0 || self.records() > before {
            before = self.records();
            assert!(start.elapsed() < Duration::from_secs(120), "the records never come to rest");
            sleep(Duration::from_secs(3)).await;
        }
        keys
    }

    async fn new_content(&mut self) {
        let mut times = Outcomes::default();
        for _ in 0..100 {
            let pair = (0..SIZE).choose_multiple(&mut self.rng, 2);
            let new = self.fresh(1).remove(0);
            let start = Instant::now();
            self.nodes[pair[0]].router.announce(Change::Added(vec![new.clone()]));
            while start.elapsed() < Duration::from_secs(10) && self.first(pair[1], &new).await.is_none() {
                sleep(Duration::from_millis(1)).await;
            }
            times.add(Some(start.elapsed()), false);
        }
        self.report.check("new content found by another, p99 (ms)", times.at(0.99), Aim::AtMost(1_000.0));
    }

    async fn rest(&self) {
        let (time, offers, bytes) = (Duration::from_secs(60), self.sent("offer"), loopback());
        sleep(time).await;
        let each = time.as_secs_f64() * SIZE as f64;
        self.report.figure("advertising, messages/s a node", (self.sent("offer") - offers) as f64 / each);
        self.report
            .figure("everything on the wire at rest, pings included, bytes/s a node", (loopback() - bytes) / each);
    }

    async fn newcomers(&mut self, keys: &[Key]) {
        let (mut finds, mut found) = (Outcomes::default(), Outcomes::default());
        for _ in 0..5 {
            let own = self.fresh(KEYS_PER_NODE);
            let start = Instant::now();
            let node = self.start();
            self.nodes[node].router.announce(Change::Added(own.clone()));
            let wanted = keys.choose(&mut self.rng).unwrap();
            while self.first(node, wanted).await.is_none() {
                sleep(Duration::from_millis(5)).await;
            }
            finds.add(Some(start.elapsed()), false);
            let mut looked = 0;
            while looked < 20 {
                let from = self.rng.random_range(0..node);
                let wanted = own.choose(&mut self.rng).unwrap();
                match self.first(from, wanted).await {
                    Some(_) => looked += 1,
                    None => sleep(Duration::from_millis(5)).await,
                }
                assert!(start.elapsed() < Duration::from_secs(60), "a new node's content is not found");
            }
            found.add(Some(start.elapsed()), false);
        }
        self.report.check("a new node finds, the slowest (s)", finds.at(1.0) / 1e3, Aim::AtMost(3.0));
        self.report.check("all content of a new node is found, the slowest (s)", found.at(1.0) / 1e3, Aim::AtMost(3.0));
    }

    async fn hot_key(&mut self) {
        let (hot, count) = (self.fresh(1).remove(0), SIZE / 2);
        self.nodes[..count].iter().for_each(|node| node.router.announce(Change::Added(vec![hot.clone()])));
        sleep(Duration::from_secs(3)).await;
        let mut named: BTreeMap<Arc<str>, u32> = BTreeMap::new();
        let rounds = 20;
        for _ in 0..rounds {
            for from in count..SIZE {
                let (_, provider) = self.first(from, &hot).await.unwrap();
                *named.entry(provider).or_default() += 1;
            }
            // What was found is handed out again for so long.
            sleep(Duration::from_millis(2_100)).await;
        }
        let mean = f64::from(rounds) * (SIZE - count) as f64 / count as f64;
        let share = f64::from(*named.values().max().unwrap()) / mean;
        self.report.check("one hot key: largest share of its providers (x mean)", share, Aim::AtMost(2.0));
        let named = named.len() as f64 / count as f64;
        self.report.check("one hot key: providers that are named (share)", named, Aim::AtLeast(1.0));
    }

    async fn deaths(&mut self, keys: &[Key]) {
        let left = self.nodes.len() * 4 / 5;
        self.nodes.truncate(left);
        let mut at_once = self.look_up_many(keys, 200, Duration::from_millis(45)).await;
        self.report.figure("20 % dead, first 10 s: found (share)", at_once.found());
        self.report.figure("20 % dead, first 10 s: lookup p99 (ms)", at_once.at(0.99));
        let mut after = self.look_up_many(keys, 600, Duration::ZERO).await;
        self.report.check("20 % dead, after 10 s: found (share)", after.found(), Aim::AtLeast(0.999));
        self.report.figure("20 % dead, after 10 s: lookup p99 (ms)", after.at(0.99));
    }
}

/// Three nodes with so many keys each, all told to both others.
async fn many_keys(count: usize) {
    let mut swarms = Swarms {
        nodes: Vec::new(),
        rng: StdRng::seed_from_u64(SEED),
        keys: 0,
        started: 0,
        network: 201,
        report: Report::new("3 real"),
    };
    for _ in 0..3 {
        swarms.start();
    }
    swarms.settle().await;
    let before = resident();
    let start = Instant::now();
    for node in 0..3 {
        let keys = swarms.fresh(count);
        swarms.nodes[node].router.announce(Change::Added(keys));
    }
    while swarms.records() < 6 * count {
        sleep(Duration::from_millis(10)).await;
        assert!(start.elapsed() < Duration::from_secs(120), "only {} records came", swarms.records());
    }
    swarms.report.figure(&format!("{count} keys a node told to two others (s)"), start.elapsed().as_secs_f64());
    swarms.report.figure(&format!("{count} keys a node, memory a node (MB)"), (resident() - before) / 3.0 / 1e6);
    let mut found = Outcomes::default();
    for n in 0..500 {
        let (owner, wanted) = (n % 3, key(u32::try_from((n % 3) * count + n * (count / 500)).unwrap()));
        found.add(swarms.first((owner + 1) % 3, &wanted).await.map(|(time, _)| time), false);
    }
    swarms.report.figure(&format!("{count} keys a node, lookup p99 (ms)"), found.at(0.99));
    assert!(found.found() == 1.0, "{} found", found.found());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_keys_a_node_are_told_and_found() {
    many_keys(100_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; cargo xtask bench router runs it"]
async fn bench_swarms() {
    println!("seed {SEED}");
    let mut swarms = Swarms {
        nodes: Vec::new(),
        rng: StdRng::seed_from_u64(SEED),
        keys: 0,
        started: 0,
        network: 200,
        report: Report::new(format!("{SIZE} real")),
    };
    let before = resident();
    for _ in 0..SIZE {
        swarms.start();
        sleep(Duration::from_millis(100)).await;
    }
    swarms.settle().await;
    let keys = swarms.fill().await;
    swarms.report.figure("records a node", swarms.records() as f64 / SIZE as f64);
    swarms.report.figure("whole process, memory a node (MB)", (resident() - before) / SIZE as f64 / 1e6);
    let mut warm = swarms.look_up_many(&keys, 600, Duration::ZERO).await;
    swarms.report.figure("lookup p50, warm connections (ms)", warm.at(0.5));
    swarms.report.check("lookup p99, warm connections (ms)", warm.at(0.99), Aim::AtMost(5.0));
    swarms.report.check("lookups that find (share)", warm.found(), Aim::AtLeast(0.999));
    swarms.new_content().await;
    swarms.rest().await;
    swarms.hot_key().await;
    swarms.newcomers(&keys).await;
    swarms.deaths(&keys).await;
    drop(swarms);
    many_keys(100_000).await;
}
