//! How nodes find each other at first, whatever of what they know is dead.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use spegel::bootstrap::{
    Bootstrap, BootstrapAddress, BootstrapPeer, HttpBootstrap, HttpEndpoint, RememberedPeers, StaticBootstrap,
};
use spegel::router::{Identity, NetworkKey, P2pRouter, P2pSettings, Readiness};
use spegel::store::Change;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::conformance::{Network, Node, PATIENCE, key, reaches, until};
use super::p2p::{Loopback, ROUTER_PORT};

fn named(ip: Ipv4Addr, id: &str) -> BootstrapPeer {
    let at = BootstrapAddress { ip: ip.into(), port: Some(ROUTER_PORT) };
    BootstrapPeer { id: Some(id.to_owned()), addresses: vec![at] }
}

/// Every node has a key that every other finds.
async fn all_find_each_other(nodes: &[Node]) {
    for (node, n) in nodes.iter().zip(0..) {
        reaches(node, Readiness::Connected).await;
        node.router.announce(Change::Added(vec![key(n)]));
    }
    for node in nodes {
        for (other, n) in nodes.iter().zip(0..) {
            if other.id != node.id {
                until(node, &key(n), "another's key", |peers| peers.iter().any(|peer| peer.id == other.id)).await;
            }
        }
    }
}

/// Twelve hosts, and the three that the static list names are dead. What each remembers is dead too, but for one host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_remembered_peer_that_lives_is_enough() {
    let network = Loopback::new();
    let list: Vec<String> = (1..=3).map(|host| format!("{}:{ROUTER_PORT}", network.address(host))).collect();
    let identities: Vec<Identity> = (0..=12).map(|_| Identity::fresh()).collect();
    let dirs: Vec<_> = (4..=12).map(|_| tempfile::tempdir().unwrap()).collect();
    let id = |host: u8| identities[usize::from(host)].peer_id();
    let mut nodes = Vec::new();
    for (host, dir) in (4..=12).zip(&dirs) {
        let remembered = RememberedPeers::new(dir.path());
        let dead = (1..=3).chain(40..60).map(|dead| named(network.address(dead), &id(dead % 4)));
        remembered.remember(&dead.chain([named(network.address(4), &id(4))]).collect::<Vec<_>>()).unwrap();
        nodes.push(network.start_with(host, |settings| {
            settings.identity = identities[usize::from(host)].clone();
            settings.bootstrap = vec![Arc::new(StaticBootstrap::new(&list).unwrap())];
            settings.remembered = Some(remembered);
        }));
    }
    all_find_each_other(&nodes).await;
}

/// The same hosts without memory do not find each other: what the test above shows is the memory's doing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_memory_a_dead_list_leaves_hosts_apart() {
    let network = Loopback::new();
    let list = [format!("{}:{ROUTER_PORT}", network.address(1))];
    let start = |host| {
        network.start_with(host, |settings| {
            settings.bootstrap = vec![Arc::new(StaticBootstrap::new(&list).unwrap())];
        })
    };
    let nodes = [start(4), start(5)];
    sleep(Duration::from_millis(700)).await;
    assert!(nodes.iter().all(|node| *node.router.readiness().borrow() == Readiness::Joining));
}

/// Nobody writes a memory by hand: hosts that were together remember each other, and meet again with everything else gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_were_there_are_remembered() {
    let mut network = Loopback::new();
    let dir = tempfile::tempdir().unwrap();
    let other = network.join().await;
    let identity = Identity::fresh();
    let start = |named: bool| {
        network.start_with(9, |settings| {
            settings.identity = identity.clone();
            settings.remembered = Some(RememberedPeers::new(dir.path()));
            if !named {
                settings.bootstrap = vec![Arc::new(StaticBootstrap::new([network.address(99).to_string()]).unwrap())];
            }
        })
    };
    let node = start(true);
    reaches(&node, Readiness::Connected).await;
    let deadline = Instant::now() + PATIENCE;
    while RememberedPeers::new(dir.path()).peers().await.unwrap().is_empty() {
        assert!(Instant::now() < deadline, "nothing was written down");
        sleep(Duration::from_millis(50)).await;
    }
    drop(node);
    let at = SocketAddr::from((network.address(9), ROUTER_PORT));
    while std::net::TcpStream::connect(at).is_ok() {
        sleep(Duration::from_millis(5)).await;
    }
    let again = start(false);
    reaches(&again, Readiness::Connected).await;
    drop(other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_names_the_first_peers() {
    let mut network = Loopback::new();
    let first = P2pRouter::start(network.settings(network.address(100)), &CancellationToken::new()).unwrap();
    let second = network.join().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/id", listener.local_addr().unwrap());
    let served = first.clone();
    let endpoint = HttpEndpoint::new(listener, None, Arc::new(move || served.bootstrap_peers())).unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(endpoint.serve(stop.clone()));
    let source = Arc::new(HttpBootstrap::new(&url, None).unwrap());
    let named = source.peers().await.unwrap();
    assert_eq!(named[0].id.as_deref(), Some(&**first.peer_id()), "the node itself comes first");
    let third = network.start_with(101, |settings| settings.bootstrap = vec![source]);
    reaches(&third, Readiness::Connected).await;
    stop.cancel();
    drop(second);
}

/// All nodes of a network come back elsewhere at once, as after a restart of the whole cluster with new addresses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_moves_as_a_whole_heals() {
    let mut network = Loopback::new();
    let identities: Vec<Identity> = (0..4).map(|_| Identity::fresh()).collect();
    let start = |network: &Loopback, first: u8| -> Vec<Node> {
        let start =
            |(identity, host)| network.start_named(host, |settings| settings.identity = Identity::clone(identity));
        identities.iter().zip(first..).map(start).collect()
    };
    let nodes = start(&network, 10);
    all_find_each_other(&nodes).await;
    drop(nodes);
    network.forget_all();
    let moved = start(&network, 20);
    all_find_each_other(&moved).await;
    for peer in until(&moved[0], &key(1), "its new place", |peers| !peers.is_empty()).await {
        assert_eq!(peer.addresses[0].ip(), network.address(21), "not where it was");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_key_keeps_others_out() {
    let network = Loopback::new();
    let dir = tempfile::tempdir().unwrap();
    let load = |name: &str, digit: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("/key/swarm/psk/1.0.0/\n/base16/\n{}\n", digit.repeat(64))).unwrap();
        NetworkKey::load(&path).unwrap()
    };
    let (ours, other) = (load("ours", "a"), load("other", "b"));
    let start = |host, key: Option<&NetworkKey>| {
        network.start_named(host, |settings: &mut P2pSettings| settings.network_key = key.cloned())
    };
    let inside = [start(1, Some(&ours)), start(2, Some(&ours))];
    all_find_each_other(&inside).await;
    for outside in [start(3, Some(&other)), start(4, None)] {
        let mut readiness = outside.router.readiness();
        let joined = timeout(Duration::from_millis(700), readiness.wait_for(|now| *now == Readiness::Connected)).await;
        assert!(joined.is_err(), "a node without the key took part");
    }
}

/// Only the address that was told is announced, and peers outside of the given networks are not believed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_follow_the_settings() {
    let mut network = Loopback::new();
    let a = network.join().await;
    let told = SocketAddr::from((network.address(77), ROUTER_PORT));
    let b = network.start_with(2, |settings| settings.advertise = vec![told]);
    reaches(&b, Readiness::Connected).await;
    b.router.announce(Change::Added(vec![key(1)]));
    let found = until(&a, &key(1), "b's key", |peers| !peers.is_empty()).await;
    assert_eq!(found[0].addresses[0].ip(), network.address(77));

    let c = network.start_with(3, |settings| {
        settings.peer_networks = vec!["10.0.0.0/8".parse().unwrap()];
    });
    sleep(Duration::from_millis(500)).await;
    assert_ne!(*c.router.readiness().borrow(), Readiness::Connected);
}

/// One node is reached by IPv6 alone, one by IPv4 alone, and one by both: each finds what it can reach, and the latter is told of with
/// both of its addresses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_families_make_one_network() {
    let network = Loopback::new();
    if TcpListener::bind("[::1]:0").is_err() {
        println!("skipped: no IPv6 on this machine's loopback");
        return;
    }
    let v4 = network.address(1);
    let start = |listen: &[SocketAddr], named: &[SocketAddr]| {
        let mut settings = network.settings(v4);
        settings.listen = listen.to_vec();
        let named: Vec<String> = named.iter().map(SocketAddr::to_string).collect();
        settings.bootstrap = vec![Arc::new(StaticBootstrap::new(&named).unwrap())];
        let router = P2pRouter::start(settings, &CancellationToken::new()).unwrap();
        let registry = SocketAddr::new(listen[0].ip(), 5000);
        let listens = router.listen_addresses().to_vec();
        (Node { id: router.peer_id().clone(), router, registry, _membership: Box::new(()) }, listens)
    };
    let (both, listens) = start(&[SocketAddr::from((v4, 0)), "[::1]:0".parse().unwrap()], &[]);
    let (six, _) = start(&["[::1]:0".parse().unwrap()], &listens[1..]);
    let (four, _) = start(&[SocketAddr::from((network.address(2), 0))], &listens[..1]);
    for (node, n) in [(&both, 1), (&six, 2), (&four, 3)] {
        reaches(node, Readiness::Connected).await;
        node.router.announce(Change::Added(vec![key(n)]));
    }
    for node in [&six, &four] {
        let found = until(node, &key(1), "the key of the one with both", |peers| !peers.is_empty()).await;
        let ips: BTreeSet<_> = found[0].addresses.iter().map(SocketAddr::ip).collect();
        assert_eq!(ips, BTreeSet::from([std::net::IpAddr::from(v4), "::1".parse().unwrap()]));
    }
    let found = until(&both, &key(2), "the key of the one with IPv6", |peers| !peers.is_empty()).await;
    assert_eq!(found[0].addresses[0].ip().to_string(), "::1");
}
