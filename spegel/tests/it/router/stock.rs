//! Our router beside an unchanged Kademlia node of rust-libp2p: the wire is the published protocol's.

use std::net::SocketAddr;

use futures::StreamExt;
use libp2p::kad::store::MemoryStore;
use libp2p::kad::{self, GetProvidersOk, QueryResult, Quorum, Record, RecordKey};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder, identify, noise, tcp, yamux};
use sha2::{Digest, Sha256};
use spegel::oci::Key;
use spegel::router::Readiness;
use spegel::store::Change;
use tokio::time::timeout;

use super::conformance::{Network, Node, PATIENCE, all, key, reaches, until};
use super::p2p::{Loopback, ROUTER_PORT};

#[derive(NetworkBehaviour)]
struct Stock {
    kad: kad::Behaviour<MemoryStore>,
    identify: identify::Behaviour,
}

/// The record key by its definition, not by our code.
fn record_key(key: &Key) -> RecordKey {
    RecordKey::new(&[&[0x12, 0x20], &Sha256::digest(key.to_string())[..]].concat())
}

/// A node that speaks noise only, connected to one of ours.
async fn stock(own: SocketAddr, ours: PeerId, at: SocketAddr) -> Swarm<Stock> {
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::new(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|identity| {
            let local = identity.public().to_peer_id();
            let config = kad::Config::new(StreamProtocol::new("/spegel/kad/1.0.0"));
            let mut kad = kad::Behaviour::with_config(local, MemoryStore::new(local), config);
            kad.set_mode(Some(kad::Mode::Server));
            let identify = identify::Behaviour::new(identify::Config::new("stock/1".into(), identity.public()));
            Stock { kad, identify }
        })
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
        .build();
    let multiaddr = |address: SocketAddr| format!("/ip4/{}/tcp/{}", address.ip(), address.port()).parse().unwrap();
    swarm.listen_on(multiaddr(own)).unwrap();
    swarm.add_external_address(multiaddr(own));
    swarm.behaviour_mut().kad.add_address(&ours, multiaddr(at));
    swarm.dial(ours).unwrap();
    drive(&mut swarm, |event| match event {
        SwarmEvent::Behaviour(StockEvent::Identify(identify::Event::Sent { .. })) => Some(()),
        _ => None,
    })
    .await;
    swarm
}

/// Runs the node until an event gives something.
async fn drive<T>(swarm: &mut Swarm<Stock>, mut found: impl FnMut(SwarmEvent<StockEvent>) -> Option<T>) -> T {
    let search = async {
        loop {
            if let Some(found) = found(swarm.select_next_some().await) {
                return found;
            }
        }
    };
    timeout(PATIENCE, search).await.expect("the stock node's event in time")
}

fn query_result(event: SwarmEvent<StockEvent>) -> Option<QueryResult> {
    match event {
        SwarmEvent::Behaviour(StockEvent::Kad(kad::Event::OutboundQueryProgressed { result, .. })) => Some(result),
        _ => None,
    }
}

async fn beside_ours() -> (Loopback, Node, Swarm<Stock>, SocketAddr) {
    let mut network = Loopback::new();
    let node = network.join().await;
    let at = SocketAddr::new(node.registry.ip(), ROUTER_PORT);
    let own = SocketAddr::from((network.address(200), ROUTER_PORT));
    let swarm = stock(own, node.id.parse().unwrap(), at).await;
    (network, node, swarm, own)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_stock_node_provides_is_found() {
    let (_network, node, mut swarm, own) = beside_ours().await;
    let id = swarm.local_peer_id().to_base58();
    swarm.behaviour_mut().kad.start_providing(record_key(&key(1))).unwrap();
    let task = tokio::spawn(async move { drive(&mut swarm, |_| None::<()>).await });
    reaches(&node, Readiness::Connected).await;
    let peers = until(&node, &key(1), "the stock node's record arrives", |peers| !peers.is_empty()).await;
    assert_eq!((&*peers[0].id, peers[0].addresses[0].ip()), (&*id, own.ip()));
    task.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_we_provide_is_found_by_a_stock_node_with_our_address() {
    let (_network, node, mut swarm, _) = beside_ours().await;
    node.router.announce(Change::Added(vec![key(2)]));
    swarm.behaviour_mut().kad.get_providers(record_key(&key(2)));
    let ours: PeerId = node.id.parse().unwrap();
    let found = drive(&mut swarm, |event| match query_result(event)? {
        QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { providers, .. })) => Some(providers),
        _ => None,
    })
    .await;
    assert!(found.contains(&ours), "{found:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn value_records_are_not_kept() {
    let (_network, _node, mut swarm, _) = beside_ours().await;
    let record = Record::new(record_key(&key(3)), vec![1; 100]);
    swarm.behaviour_mut().kad.put_record(record, Quorum::One).unwrap();
    drive(&mut swarm, |event| matches!(query_result(event)?, QueryResult::PutRecord(_)).then_some(())).await;
    swarm.behaviour_mut().kad.remove_record(&record_key(&key(3)));
    swarm.behaviour_mut().kad.get_record(record_key(&key(3)));
    let result = drive(&mut swarm, |event| match query_result(event)? {
        QueryResult::GetRecord(result) => Some(result),
        _ => None,
    })
    .await;
    assert!(!matches!(result, Ok(kad::GetRecordOk::FoundRecord(_))), "{result:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn record_without_believable_address_is_not_kept() {
    let (_network, node, mut swarm, own) = beside_ours().await;
    let multiaddr = |ip: &str| format!("/ip4/{ip}/tcp/{ROUTER_PORT}").parse::<Multiaddr>().unwrap();
    let good = multiaddr(&own.ip().to_string());
    let id = swarm.local_peer_id().to_base58();
    for (n, address) in [(4, multiaddr("10.1.2.3")), (5, good.clone())] {
        for old in [&good, &multiaddr("10.1.2.3")] {
            swarm.remove_external_address(old);
        }
        swarm.add_external_address(address);
        swarm.behaviour_mut().kad.start_providing(record_key(&key(n))).unwrap();
        drive(&mut swarm, |event| matches!(query_result(event)?, QueryResult::StartProviding(_)).then_some(())).await;
        // It is to be known by what it told others only.
        swarm.behaviour_mut().kad.stop_providing(&record_key(&key(n)));
    }
    let task = tokio::spawn(async move { drive(&mut swarm, |_| None::<()>).await });
    until(&node, &key(5), "the later record arrives", |peers| peers.iter().any(|peer| *peer.id == *id)).await;
    assert_eq!(all(&node, &key(4)).await, []);
    task.abort();
}
