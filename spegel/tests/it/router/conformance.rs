//! What every router does, whatever network is beneath it.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use spegel::oci::Key;
use spegel::router::{Peer, Readiness, Router};
use spegel::store::Change;
use spegel::storm::{Have, Holding, Request, Response, Want, Why};
use tokio::time::{Instant, sleep, timeout};

/// Longer than anything here takes on a busy machine; only failures wait so long.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// One node of a network under test. It leaves when it is dropped.
pub(super) struct Node {
    pub(super) router: Arc<dyn Router>,
    pub(super) id: Arc<str>,
    /// Where lookups must say that its registry is.
    pub(super) registry: SocketAddr,
    /// Whatever keeps it in the network.
    pub(super) _membership: Box<dyn fmt::Debug>,
}

/// A network that nodes can join.
pub(super) trait Network {
    /// Adds a node at a place of its own. It need not be ready yet.
    fn join(&mut self) -> impl Future<Output = Node>;

    /// Ends a node and starts another, with a new identity, at its place.
    fn replace(&mut self, node: Node) -> impl Future<Output = Node>;
}

pub(super) fn key(n: u64) -> Key {
    format!("sha256:{n:064x}").parse().unwrap()
}

fn added(keys: impl IntoIterator<Item = Key>) -> Change {
    Change::Added(keys.into_iter().collect())
}

fn removed(keys: impl IntoIterator<Item = Key>) -> Change {
    Change::Removed(keys.into_iter().collect())
}

pub(super) async fn reaches(node: &Node, wanted: Readiness) {
    let mut readiness = node.router.readiness();
    timeout(PATIENCE, readiness.wait_for(|now| *now == wanted)).await.expect("readiness in time").unwrap();
}

pub(super) async fn all(node: &Node, key: &Key) -> Vec<Peer> {
    let mut receiver = node.router.lookup(key);
    let mut peers = Vec::new();
    while let Some(peer) = timeout(PATIENCE, receiver.recv()).await.expect("a lookup that ends") {
        peers.push(peer);
    }
    peers
}

/// Repeats a lookup until its whole answer satisfies `good`.
pub(super) async fn until(node: &Node, key: &Key, what: &str, good: impl Fn(&[Peer]) -> bool) -> Vec<Peer> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let peers = all(node, key).await;
        if good(&peers) {
            return peers;
        }
        assert!(Instant::now() < deadline, "{what}: still {peers:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn offers(peers: &[Peer], node: &Node) -> bool {
    peers.iter().any(|peer| peer.id == node.id && peer.addresses.contains(&node.registry))
}

async fn connected<N: Network, const COUNT: usize>(network: &mut N) -> [Node; COUNT] {
    let mut nodes = Vec::new();
    for _ in 0..COUNT {
        nodes.push(network.join().await);
    }
    for node in &nodes {
        reaches(node, Readiness::Connected).await;
    }
    nodes.try_into().unwrap_or_else(|_| unreachable!("as many as asked for"))
}

pub(super) async fn offered_key_is_found_at_the_registry(network: &mut impl Network) {
    let [a, b, c] = connected(network).await;
    a.router.announce(added([key(1), key(2)]));
    for node in [&b, &c] {
        let peers = until(node, &key(1), "the offer arrives", |peers| offers(peers, &a)).await;
        let found: Vec<_> = peers.iter().map(|peer| (peer.id.clone(), peer.addresses.clone())).collect();
        assert_eq!(found, [(a.id.clone(), vec![a.registry])], "and nobody else offers it");
    }
}

pub(super) async fn tag_is_found_by_its_full_name(network: &mut impl Network) {
    let [a, b] = connected(network).await;
    let tag = |name: &str| Key::Tag(name.parse().unwrap());
    a.router.announce(added([tag("registry.test:5000/team/app:v1")]));
    until(&b, &tag("registry.test:5000/team/app:v1"), "the tag arrives", |peers| offers(peers, &a)).await;
    assert_eq!(all(&b, &tag("registry.test:5000/team/app:v2")).await, []);
}

pub(super) async fn own_offer_is_never_in_the_answer(network: &mut impl Network) {
    let [a, b] = connected(network).await;
    a.router.announce(added([key(3)]));
    b.router.announce(added([key(3)]));
    let peers = until(&a, &key(3), "the other's offer arrives", |peers| offers(peers, &b)).await;
    assert!(peers.iter().all(|peer| peer.id != a.id), "{peers:?}");
}

pub(super) async fn unknown_key_ends_quickly(network: &mut impl Network) {
    let [a, b, c] = connected(network).await;
    b.router.announce(added([key(4)]));
    until(&a, &key(4), "streams are open", |peers| offers(peers, &b)).await;
    drop(c.router.lookup(&key(4)));
    let start = Instant::now();
    assert_eq!(all(&a, &key(5)).await, []);
    assert!(start.elapsed() < Duration::from_secs(1), "took {:?}", start.elapsed());
}

pub(super) async fn withdrawn_key_is_not_offered_to_newcomers(network: &mut impl Network) {
    let [a, b] = connected(network).await;
    a.router.announce(added([key(6), key(7)]));
    until(&b, &key(7), "the offer arrives", |peers| offers(peers, &a)).await;
    a.router.announce(removed([key(6)]));
    drop(b);
    let late = network.join().await;
    reaches(&late, Readiness::Connected).await;
    until(&late, &key(7), "what is still offered arrives", |peers| offers(peers, &a)).await;
    assert!(!offers(&all(&late, &key(6)).await, &a), "what was withdrawn does not");
}

pub(super) async fn several_providers_are_all_found(network: &mut impl Network) {
    let [a, b, c] = connected(network).await;
    a.router.announce(added([key(8)]));
    b.router.announce(added([key(8)]));
    let peers = until(&c, &key(8), "both arrive", |peers| offers(peers, &a) && offers(peers, &b)).await;
    assert_eq!(peers.len(), 2, "each once: {peers:?}");
}

pub(super) async fn late_joiner_finds_what_was_offered_before(network: &mut impl Network) {
    let [a, _b] = connected(network).await;
    a.router.announce(added((100..400).map(key)));
    let late = network.join().await;
    reaches(&late, Readiness::Connected).await;
    for n in [100, 250, 399] {
        until(&late, &key(n), "an old offer is found", |peers| offers(peers, &a)).await;
    }
}

pub(super) async fn offer_made_alone_is_found_later(network: &mut impl Network) {
    let a = network.join().await;
    reaches(&a, Readiness::Alone).await;
    assert!(Readiness::Alone.is_ready());
    a.router.announce(added([key(9)]));
    assert_eq!(all(&a, &key(9)).await, [], "alone there is nobody to find");
    let b = network.join().await;
    reaches(&a, Readiness::Connected).await;
    reaches(&b, Readiness::Connected).await;
    until(&b, &key(9), "the old offer is found", |peers| offers(peers, &a)).await;
}

pub(super) async fn dropping_the_receiver_ends_the_search(network: &mut impl Network) {
    let [a, b] = connected(network).await;
    a.router.announce(added([key(10)]));
    for n in 0..2_000 {
        drop(b.router.lookup(&key(1_000 + n)));
    }
    until(&b, &key(10), "searches still work", |peers| offers(peers, &a)).await;
}

pub(super) async fn lookups_of_one_key_all_get_the_answer(network: &mut impl Network) {
    let [a, b] = connected(network).await;
    a.router.announce(added([key(11)]));
    until(&b, &key(11), "the offer arrives", |peers| offers(peers, &a)).await;
    let receivers: Vec<_> = (0..50).map(|_| b.router.lookup(&key(11))).collect();
    for mut receiver in receivers {
        let first = timeout(PATIENCE, receiver.recv()).await.expect("an answer in time").expect("an answer");
        assert_eq!(first.id, a.id);
    }
}

pub(super) async fn restarted_provider_is_found_by_its_new_identity(network: &mut impl Network) {
    let [a, b, c] = connected(network).await;
    a.router.announce(added([key(12)]));
    until(&b, &key(12), "the offer arrives", |peers| offers(peers, &a)).await;
    let old = a.id.clone();
    let a = network.replace(a).await;
    assert_ne!(old, a.id);
    a.router.announce(added([key(12)]));
    for node in [&b, &c] {
        until(node, &key(12), "the new identity and not the old", |peers| {
            offers(peers, &a) && peers.iter().all(|peer| peer.id != old)
        })
        .await;
    }
}

pub(super) async fn dead_provider_disappears(network: &mut impl Network) {
    let [a, b, c] = connected(network).await;
    a.router.announce(added([key(13)]));
    c.router.announce(added([key(13)]));
    until(&b, &key(13), "both arrive", |peers| offers(peers, &a) && offers(peers, &c)).await;
    let gone = a.id.clone();
    drop(a);
    let peers = until(&b, &key(13), "the dead one goes", |peers| peers.iter().all(|peer| peer.id != gone)).await;
    assert!(offers(&peers, &c), "the living one stays: {peers:?}");
}

pub(super) async fn members_know_each_other(network: &mut impl Network) {
    let [a, b, c] = connected(network).await;
    let lists = |node: &Node, other: &Node| {
        let members = node.router.members().borrow().clone();
        members.iter().any(|member| member.peer.id == other.id && member.peer.addresses == [other.registry])
    };
    eventually("everyone lists everyone", || {
        [(&a, &b), (&a, &c), (&b, &a), (&b, &c), (&c, &a), (&c, &b)].iter().all(|(one, other)| lists(one, other))
    })
    .await;
    assert!(!lists(&a, &a), "a node is not in its own list");
    b.router.set_load(73);
    eventually("the load is told", || {
        a.router.members().borrow().iter().any(|member| member.peer.id == b.id && member.peer.load == Some(73))
    })
    .await;
    let gone = c.id.clone();
    drop(c);
    eventually("who left is in no list", || {
        [&a, &b].iter().all(|node| node.router.members().borrow().iter().all(|member| member.peer.id != gone))
    })
    .await;
}

pub(super) async fn all_ask_the_same_coordinator_about_a_storm(network: &mut impl Network) {
    let nodes = connected::<_, 3>(network).await;
    let know_all = || nodes.iter().all(|node| node.router.members().borrow().len() == 2);
    eventually("all know each other", know_all).await;
    let storms = nodes.each_ref().map(|node| node.router.storms().expect("they take part"));
    let (name, coordinators) = storms[0].coordinators(&key(11));
    assert_eq!(coordinators.len(), 3, "all of three nodes");
    assert!(storms.iter().all(|storms| storms.coordinators(&key(11)) == (name, coordinators.clone())));
    for coordinator in &coordinators {
        assert_eq!(storms.iter().filter(|storms| storms.peer(*coordinator).is_none()).count(), 1, "itself");
    }
    let mut answers = Vec::new();
    for storms in &storms {
        let want = Want {
            key: name,
            number: 1,
            position: 0,
            total: Some(1 << 30),
            slots: 1,
            usual: None,
            why: Why::New,
            avoid: Vec::new(),
            skipped: 0,
            busy: false,
            fed: false,
        };
        answers.push(storms.ask(coordinators[0], Request::Want(want)).await.expect("an answer"));
    }
    assert!(matches!(answers[0], Response::Pull { .. }), "{answers:?}");
    for n in [1, 2] {
        let Response::Fetch { parent, .. } = answers[n] else { panic!("{answers:?}") };
        let parent = storms[n].peer(parent).expect("a member");
        assert_eq!((parent.id, parent.addresses), (nodes[n - 1].id.clone(), vec![nodes[n - 1].registry]));
    }
    let nobody = storms[0].ask(spegel::storm::Node(1), Request::Have(have(name))).await;
    assert!(nobody.is_err(), "there is no such node");
}

fn have(key: spegel::storm::Key) -> Have {
    Have { key, number: 2, position: 0, total: None, slots: 0, holding: Holding::Nothing }
}

pub(super) async fn eventually(what: &str, mut good: impl FnMut() -> bool) {
    let deadline = Instant::now() + 3 * PATIENCE;
    while !good() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Makes one test a property of the suite for a kind of network.
macro_rules! suite {
    ($network:expr, [$($test:ident),* $(,)?]) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                $crate::router::conformance::$test(&mut $network).await;
            }
        )*
    };
    ($network:expr) => {
        $crate::router::conformance::suite!($network, [
            offered_key_is_found_at_the_registry,
            tag_is_found_by_its_full_name,
            own_offer_is_never_in_the_answer,
            unknown_key_ends_quickly,
            withdrawn_key_is_not_offered_to_newcomers,
            several_providers_are_all_found,
            late_joiner_finds_what_was_offered_before,
            offer_made_alone_is_found_later,
            dropping_the_receiver_ends_the_search,
            lookups_of_one_key_all_get_the_answer,
            restarted_provider_is_found_by_its_new_identity,
            dead_provider_disappears,
            members_know_each_other,
            all_ask_the_same_coordinator_about_a_storm,
        ]);
    };
}
pub(super) use suite;
