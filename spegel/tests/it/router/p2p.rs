//! The suite over libp2p on loopback, and what only a network of sockets can show.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use spegel::bootstrap::{Bootstrap, BootstrapAddress, BootstrapError, BootstrapPeer, StaticBootstrap};
use spegel::router::{Identity, P2pRouter, P2pSettings, Readiness, Router, RouterError, RouterMetrics};
use spegel::store::Change;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::conformance::{Network, Node, PATIENCE, all, key, reaches, suite, until};

pub(super) const ROUTER_PORT: u16 = 5001;
const REGISTRY_PORT: u16 = 5000;

/// Those who were started, as a headless service names them: the dead among them until somebody takes their place.
#[derive(Clone, Debug, Default)]
struct Directory(Arc<Mutex<Vec<BootstrapPeer>>>);

#[async_trait]
impl Bootstrap for Directory {
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        Ok(self.0.lock().unwrap().clone())
    }
}

/// Nodes on addresses of one loopback network that no other test of this process uses.
pub(super) struct Loopback {
    directory: Directory,
    network: u8,
    joined: u8,
}

impl Loopback {
    pub(super) fn new() -> Self {
        static NETWORKS: AtomicU8 = AtomicU8::new(0);
        Self { directory: Directory::default(), network: NETWORKS.fetch_add(1, Ordering::Relaxed), joined: 0 }
    }

    /// The process's number keeps concurrent runs apart.
    pub(super) fn address(&self, node: u8) -> Ipv4Addr {
        let process = u8::try_from(std::process::id() % 200).unwrap() + 20;
        Ipv4Addr::new(127, process, self.network, node)
    }

    pub(super) fn settings(&self, ip: Ipv4Addr) -> P2pSettings {
        P2pSettings {
            storms: true,
            listen: vec![SocketAddr::from((ip, ROUTER_PORT))],
            registry_port: REGISTRY_PORT,
            identity: Identity::fresh(),
            bootstrap: vec![Arc::new(self.directory.clone())],
            remembered: None,
            mdns: false,
            advertise: Vec::new(),
            peer_networks: Vec::new(),
            network_key: None,
            zone: None,
            metrics: RouterMetrics::default(),
            advertise_ttl: P2pSettings::ADVERTISE_TTL,
            join_timeout: P2pSettings::JOIN_TIMEOUT,
            max_records: P2pSettings::MAX_RECORDS,
        }
    }

    /// A node that others do not find by the directory, with settings of its own.
    pub(super) fn start_with(&self, node: u8, change: impl FnOnce(&mut P2pSettings)) -> Node {
        let ip = self.address(node);
        let mut settings = self.settings(ip);
        change(&mut settings);
        let router = P2pRouter::start(settings, &CancellationToken::new()).unwrap();
        let registry = SocketAddr::from((ip, REGISTRY_PORT));
        Node { id: router.peer_id().clone(), router, registry, _membership: Box::new(()) }
    }

    /// The same, and others find it by the directory.
    pub(super) fn start_named(&self, node: u8, change: impl FnOnce(&mut P2pSettings)) -> Node {
        let at = BootstrapAddress { ip: self.address(node).into(), port: None };
        self.directory.0.lock().unwrap().push(BootstrapPeer { id: None, addresses: vec![at] });
        self.start_with(node, change)
    }

    /// Empties the directory.
    pub(super) fn forget_all(&mut self) {
        self.directory.0.lock().unwrap().clear();
    }

    fn start(&self, ip: Ipv4Addr) -> Node {
        let peer = BootstrapPeer { id: None, addresses: vec![BootstrapAddress { ip: ip.into(), port: None }] };
        let mut directory = self.directory.0.lock().unwrap();
        if !directory.contains(&peer) {
            directory.push(peer);
        }
        drop(directory);
        let router = P2pRouter::start(self.settings(ip), &CancellationToken::new()).unwrap();
        let registry = SocketAddr::from((ip, REGISTRY_PORT));
        Node { id: router.peer_id().clone(), router, registry, _membership: Box::new(()) }
    }
}

impl Network for Loopback {
    async fn join(&mut self) -> Node {
        self.joined += 1;
        self.start(self.address(self.joined))
    }

    async fn replace(&mut self, node: Node) -> Node {
        let std::net::IpAddr::V4(ip) = node.registry.ip() else { unreachable!("all are IPv4") };
        drop(node);
        // The old one's listener closes when its task has seen the drop.
        let deadline = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect((ip, ROUTER_PORT)).is_ok() {
            assert!(Instant::now() < deadline, "the dropped router still listens");
            sleep(Duration::from_millis(5)).await;
        }
        self.start(ip)
    }
}

suite!(Loopback::new());

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn port_that_is_taken_is_an_error_that_names_it() {
    let network = Loopback::new();
    let ip = network.address(1);
    let _first = network.start(ip);
    let error = P2pRouter::start(network.settings(ip), &CancellationToken::new()).unwrap_err();
    assert!(matches!(error, RouterError::Listen { .. }));
    assert!(error.to_string().contains(&format!("{ip}:{ROUTER_PORT}")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn static_peers_are_called_with_and_without_identity() {
    let network = Loopback::new();
    let first = network.start(network.address(1));
    network.directory.0.lock().unwrap().clear();
    let ip = network.address(1);
    for (node, peer) in [(2, format!("/ip4/{ip}/tcp/{ROUTER_PORT}/p2p/{}", first.id)), (3, ip.to_string())] {
        let mut settings = network.settings(network.address(node));
        settings.bootstrap = vec![Arc::new(StaticBootstrap::new([peer]).unwrap())];
        let router = P2pRouter::start(settings, &CancellationToken::new()).unwrap();
        let mut readiness = router.readiness();
        timeout(PATIENCE, readiness.wait_for(|now| *now == Readiness::Connected)).await.unwrap().unwrap();
        let peers = router.peers();
        assert!(peers.iter().any(|peer| peer.id == first.id), "{peers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peer_that_is_named_and_not_there_leaves_the_node_joining() {
    let network = Loopback::new();
    let mut settings = network.settings(network.address(1));
    settings.bootstrap = vec![Arc::new(StaticBootstrap::new([network.address(2).to_string()]).unwrap())];
    let router = P2pRouter::start(settings, &CancellationToken::new()).unwrap();
    let mut readiness = router.readiness();
    let settled = timeout(Duration::from_millis(500), readiness.wait_for(|now| now.is_ready())).await.is_ok();
    assert!(!settled, "somebody was named, so nothing is settled");
    let _late = network.start(network.address(2));
    timeout(PATIENCE, readiness.wait_for(|now| *now == Readiness::Connected)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn withdrawn_key_is_answered_by_its_node_no_more() {
    let mut network = Loopback::new();
    let (a, b) = (network.join().await, network.join().await);
    reaches(&b, Readiness::Connected).await;
    a.router.announce(Change::Added(vec![key(1)]));
    until(&b, &key(1), "the offer arrives", |peers| peers.len() == 1).await;
    a.router.announce(Change::Removed(vec![key(1)]));
    // Only the withdrawing node is asked by one that has never heard the offer.
    let c = network.join().await;
    reaches(&c, Readiness::Connected).await;
    drop(b);
    until(&c, &key(1), "the remaining node does not offer it", <[_]>::is_empty).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lookup_works_from_another_runtime() {
    let mut network = Loopback::new();
    let (a, b) = (network.join().await, network.join().await);
    reaches(&b, Readiness::Connected).await;
    a.router.announce(Change::Added(vec![key(1)]));
    until(&b, &key(1), "the offer arrives", |peers| peers.len() == 1).await;
    let router = b.router.clone();
    let elsewhere = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { router.lookup(&key(1)).recv().await })
    });
    let found = tokio::task::spawn_blocking(|| elsewhere.join().unwrap()).await.unwrap();
    assert_eq!(found.unwrap().addresses, [a.registry]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_keys_arrive_and_a_miss_is_quick() {
    let mut network = Loopback::new();
    let (a, b, c) = (network.join().await, network.join().await, network.join().await);
    for node in [&a, &b, &c] {
        reaches(node, Readiness::Connected).await;
    }
    let keys = 0..5_000;
    a.router.announce(Change::Added(keys.clone().map(key).collect()));
    for n in keys.step_by(499) {
        until(&c, &key(n), "the offer arrives", |peers| peers.len() == 1).await;
    }
    let mut times = Vec::new();
    for n in 10_000..10_200 {
        let start = Instant::now();
        assert_eq!(all(&b, &key(n)).await, []);
        times.push(start.elapsed());
    }
    times.sort();
    println!("miss with three nodes: p50 {:?}, p99 {:?}", times[100], times[198]);
    assert!(times[100] < Duration::from_millis(50), "p50 {:?}", times[100]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_whose_last_peer_left_settles_that_it_is_alone() {
    let mut network = Loopback::new();
    let (a, b) = (network.join().await, network.join().await);
    reaches(&a, Readiness::Connected).await;
    network.directory.0.lock().unwrap().retain(|peer| peer.addresses[0].ip == a.registry.ip());
    drop(b);
    reaches(&a, Readiness::Alone).await;
}

/// A rolling update to other ports waits for its first pod, which nobody of the old ones can answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_that_reaches_none_of_those_named_is_ready_after_a_while_and_joins_later() {
    let mut network = Loopback::new();
    let ip = network.address(9);
    let named = BootstrapPeer { id: None, addresses: vec![BootstrapAddress { ip: ip.into(), port: None }] };
    network.directory.0.lock().unwrap().push(named);
    let a = network.start_named(1, |settings| settings.join_timeout = Duration::from_secs(1));
    assert_eq!(*a.router.readiness().borrow(), Readiness::Joining);
    reaches(&a, Readiness::Isolated).await;
    let _b = network.start(ip);
    reaches(&a, Readiness::Connected).await;
    network.forget_all();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_that_restarts_with_its_identity_is_told_the_records_again() {
    let mut network = Loopback::new();
    let a = network.join().await;
    let identity = Identity::fresh();
    let settings = || P2pSettings { identity: identity.clone(), ..network.settings(network.address(9)) };
    a.router.announce(Change::Added((0..500).map(key).collect()));
    for _ in 0..3 {
        let b = start_when_free(settings).await;
        let deadline = Instant::now() + PATIENCE;
        while b.foreign_records() < 500 {
            assert!(Instant::now() < deadline, "only {} records came", b.foreign_records());
            sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A router that was dropped holds its port until its task has seen that.
async fn start_when_free(settings: impl Fn() -> P2pSettings) -> Arc<P2pRouter> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match P2pRouter::start(settings(), &CancellationToken::new()) {
            Ok(router) => return router,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        sleep(Duration::from_millis(1)).await;
    }
}
