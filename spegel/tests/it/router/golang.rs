//! Our router in one network with peers on go-libp2p, in both directions. The peer's source is `tests/interop`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use spegel::bootstrap::StaticBootstrap;
use spegel::router::{Identity, Readiness};
use spegel::store::Change;
use spegel_benches::gopeer::{self, GoPeer, Options, Security};
use tokio::time::{Instant, sleep};

use super::conformance::{Network, Node, PATIENCE, all, key, reaches, until};
use super::p2p::{Loopback, ROUTER_PORT};

/// The peer's commands block the thread, which the other of the test's two threads makes up for.
macro_rules! beside_go {
    ($(#[$meta:meta])* async fn $name:ident($network:ident) $body:block) => {
        $(#[$meta])*
        #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
        async fn $name() {
            if let Err(reason) = gopeer::find() {
                println!("skipped: {reason}");
                return;
            }
            #[allow(unused_mut)]
            let mut $network = Loopback::new();
            $body
        }
    };
}

fn options(network: &Loopback, node: u8, security: Security) -> Options {
    Options {
        listen: SocketAddr::from((network.address(node), ROUTER_PORT)),
        security,
        seed: format!("{node}"),
        max_age: Duration::from_secs(19 * 60),
        network_key: None,
    }
}

fn router_of(node: &Node) -> SocketAddr {
    SocketAddr::new(node.registry.ip(), ROUTER_PORT)
}

fn multiaddress(address: SocketAddr) -> String {
    format!("/ip4/{}/tcp/{}", address.ip(), address.port())
}

/// Starts a peer and connects it to ours.
async fn join(options: &Options, ours: &Node) -> GoPeer {
    let mut peer = tokio::task::block_in_place(|| GoPeer::start(options)).unwrap();
    tokio::task::block_in_place(|| peer.connect(router_of(ours), &ours.id)).unwrap();
    reaches(ours, Readiness::Connected).await;
    // It knows whom it is connected to a little before it knows what that peer speaks.
    until_go("Go has us in its routing table", || peer.peers().unwrap() > 0).await;
    peer
}

async fn until_go(what: &str, mut good: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !tokio::task::block_in_place(&mut good) {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn both_directions(network: &mut Loopback, security: Security) {
    let ours = network.join().await;
    let mut peer = join(&options(network, 200, security), &ours).await;

    tokio::task::block_in_place(|| peer.provide(&[key(1).to_string(), "registry.test/app:v1".into()])).unwrap();
    for wanted in [key(1), "registry.test/app:v1".parse().map(spegel::oci::Key::Tag).unwrap()] {
        let found = until(&ours, &wanted, "what Go provides is found", |peers| !peers.is_empty()).await;
        assert_eq!((&*found[0].id, found[0].addresses[0].ip()), (peer.id(), peer.listen().ip()));
    }

    ours.router.announce(Change::Added(vec![key(2)]));
    let address = multiaddress(router_of(&ours));
    until_go("what we provide is found by Go with our address", || {
        let found = peer.find(&key(2).to_string()).unwrap();
        found.iter().any(|found| *found.id == *ours.id && found.addresses.contains(&address))
    })
    .await;
}

beside_go! {
    async fn each_finds_what_the_other_provides_over_noise(network) {
        both_directions(&mut network, Security::Noise).await;
    }
}

beside_go! {
    async fn each_finds_what_the_other_provides_over_tls(network) {
        both_directions(&mut network, Security::Tls).await;
    }
}

beside_go! {
    /// Each has 5,000 keys: Go tells them by region, we in our order, and both keep the other's.
    async fn five_thousand_keys_go_both_ways(network) {
        let (ours, second) = (network.join().await, network.join().await);
        let mut peer = join(&options(&network, 200, Security::Noise), &ours).await;
        reaches(&second, Readiness::Connected).await;
        ours.router.announce(Change::Added((0..5_000).map(key).collect()));
        tokio::task::block_in_place(|| peer.sweep(100_000, 5_000)).unwrap();
        let address = multiaddress(router_of(&ours));
        for n in (0..5_000).step_by(250).chain([4_999]) {
            until_go("Go was told of our key", || {
                let stored = peer.stored(&key(n).to_string()).unwrap();
                stored.iter().any(|one| *one.id == *ours.id && one.addresses.contains(&address))
            })
            .await;
        }
        for n in (100_000..105_000).step_by(250).chain([104_999]) {
            let found = until(&second, &key(n), "Go's key is found", |peers| !peers.is_empty()).await;
            assert_eq!(&*found[0].id, peer.id());
        }
    }
}

beside_go! {
    /// Go has never heard of the second of our nodes, and is found by it through the first, and the other way round.
    async fn they_are_found_through_a_third(network) {
        let ours = network.join().await;
        let mut peer = join(&options(&network, 200, Security::Tls), &ours).await;
        tokio::task::block_in_place(|| peer.provide(&[key(1).to_string()])).unwrap();
        let second = network.join().await;
        second.router.announce(Change::Added(vec![key(2)]));
        let found = until(&second, &key(1), "Go is found", |peers| !peers.is_empty()).await;
        assert_eq!(&*found[0].id, peer.id());
        until_go("the newcomer is found by Go", || {
            peer.find(&key(2).to_string()).unwrap().iter().any(|found| *found.id == *second.id)
        })
        .await;
        until_go("Go has both in its routing table", || peer.peers().unwrap() == 2).await;
    }
}

beside_go! {
    /// A restarted peer has forgotten everything, has its identity, and is told again without waiting for the next round.
    async fn a_restarted_peer_is_told_again(network) {
        let ours = network.join().await;
        let options = options(&network, 200, Security::Noise);
        let mut peer = join(&options, &ours).await;
        ours.router.announce(Change::Added((0..100).map(key).collect()));
        until_go("Go is told", || !peer.stored(&key(99).to_string()).unwrap().is_empty()).await;
        let id = peer.id().to_owned();
        tokio::task::block_in_place(|| drop(peer));
        let mut peer = join(&options, &ours).await;
        assert_eq!(peer.id(), id);
        for n in [0, 50, 99] {
            until_go("Go is told again", || !peer.stored(&key(n).to_string()).unwrap().is_empty()).await;
        }
        tokio::task::block_in_place(|| peer.provide(&[key(500).to_string()])).unwrap();
        until(&ours, &key(500), "what it provides now is found", |peers| !peers.is_empty()).await;
    }
}

beside_go! {
    /// Go drops our records when they are old; our next round tells them before that.
    async fn records_are_told_again_before_they_expire(network) {
        let ours = network.start_with(1, |settings| settings.advertise_ttl = Duration::from_secs(12));
        let mut options = options(&network, 200, Security::Noise);
        options.max_age = Duration::from_secs(15);
        let mut peer = join(&options, &ours).await;
        ours.router.announce(Change::Added((0..20).map(key).collect()));
        until_go("Go is told", || !peer.stored(&key(7).to_string()).unwrap().is_empty()).await;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            assert!(!tokio::task::block_in_place(|| peer.stored(&key(7).to_string())).unwrap().is_empty(), "it expired");
            sleep(Duration::from_millis(500)).await;
        }
        ours.router.announce(Change::Removed(vec![key(7)]));
        assert_eq!(all(&ours, &key(7)).await, []);
        until_go("what was withdrawn expires", || peer.stored(&key(7).to_string()).unwrap().is_empty()).await;
        assert!(!peer.stored(&key(8).to_string()).unwrap().is_empty(), "and nothing else");
    }
}

beside_go! {
    /// Ours restarts with its identity elsewhere: Go finds its new address once it has been told again.
    async fn our_new_address_replaces_the_old(network) {
        let identity = Identity::fresh();
        let ours = network.start_with(1, |settings| settings.identity = identity.clone());
        let mut peer = join(&options(&network, 200, Security::Noise), &ours).await;
        ours.router.announce(Change::Added(vec![key(3)]));
        until_go("Go is told", || !peer.stored(&key(3).to_string()).unwrap().is_empty()).await;
        drop(ours);
        let go = format!("{}/p2p/{}", multiaddress(peer.listen()), peer.id());
        let moved = network.start_with(2, |settings| {
            settings.identity = identity.clone();
            settings.bootstrap = vec![Arc::new(StaticBootstrap::new([go]).unwrap())];
        });
        reaches(&moved, Readiness::Connected).await;
        moved.router.announce(Change::Added(vec![key(3)]));
        let address = multiaddress(router_of(&moved));
        until_go("Go knows where we are now", || {
            let found = peer.find(&key(3).to_string()).unwrap();
            found.iter().any(|found| *found.id == *moved.id && found.addresses.contains(&address))
        })
        .await;
    }
}
