//! The behaviours that make up a node, and the swarm that runs them.

use std::time::Duration;

use libp2p::connection_limits::ConnectionLimits;
use libp2p::kad::{self, BucketInserts, StoreInserts};
use libp2p::swarm::NetworkBehaviour;
use libp2p::{
    PeerId, StreamProtocol, Swarm, SwarmBuilder, connection_limits, identify, identity, noise, ping, tcp, tls, yamux,
};

use super::opener::Opener;
use super::records::SharedRecords;
use super::wire::MAX_MESSAGE;

/// The Kademlia protocol under the prefix of this network.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/spegel/kad/1.0.0");

/// TCP connect, security handshake and multiplexer together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection to a peer outside the routing table stays open unused.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A peer that vanished without a word is noticed after about the sum of both.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the routing table is refreshed with queries of kad's.
const REFRESH_INTERVAL: Duration = Duration::from_secs(60);

/// How long one such query may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

const MAX_PENDING: u32 = 256;
const MAX_ESTABLISHED_PER_DIRECTION: u32 = 2048;
const MAX_ESTABLISHED_PER_PEER: u32 = 4;

/// All that a node does on its connections.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    limits: connection_limits::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
    pub(super) kad: kad::Behaviour<SharedRecords>,
    pub(super) opener: Opener,
}

/// A swarm that listens nowhere yet.
///
/// # Errors
///
/// The identity cannot be used for TLS or noise.
pub(super) fn swarm(
    identity: &identity::Keypair,
    records: SharedRecords,
    opener: Opener,
) -> Result<Swarm<Behaviour>, Box<dyn std::error::Error + Send + Sync>> {
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(
            ConnectionLimits::default()
                .with_max_pending_incoming(Some(MAX_PENDING))
                .with_max_pending_outgoing(Some(MAX_PENDING))
                .with_max_established_incoming(Some(MAX_ESTABLISHED_PER_DIRECTION))
                .with_max_established_outgoing(Some(MAX_ESTABLISHED_PER_DIRECTION))
                .with_max_established_per_peer(Some(MAX_ESTABLISHED_PER_PEER)),
        ),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT)),
        identify: identify::Behaviour::new(identify_config(identity)),
        kad: kademlia(identity.public().to_peer_id(), records),
        opener,
    };
    let swarm = SwarmBuilder::with_existing_identity(identity.clone())
        .with_tokio()
        .with_tcp(tcp::Config::new().nodelay(true), (tls::Config::new, noise::Config::new), yamux::Config::default)?
        .with_behaviour(|_| Ok(behaviour))?
        .with_swarm_config(|config| config.with_idle_connection_timeout(IDLE_TIMEOUT))
        .with_connection_timeout(CONNECT_TIMEOUT)
        .build();
    Ok(swarm)
}

/// Peers learn the addresses under which they can reach us, not every listener's.
fn identify_config(identity: &identity::Keypair) -> identify::Config {
    identify::Config::new("spegel/1.0.0".into(), identity.public())
        .with_agent_version(concat!("spegel/", env!("CARGO_PKG_VERSION")).into())
        .with_hide_listen_addrs(true)
        .with_push_listen_addr_updates(true)
        .with_cache_size(0)
}

/// kad keeps the routing table and answers. Who enters the table, which records are kept and how we advertise and search is
/// ours.
fn kademlia(local: PeerId, records: SharedRecords) -> kad::Behaviour<SharedRecords> {
    let mut config = kad::Config::new(PROTOCOL);
    config
        .set_max_packet_size(MAX_MESSAGE)
        .set_record_filtering(StoreInserts::FilterBoth)
        .set_kbucket_inserts(BucketInserts::Manual)
        .set_periodic_bootstrap_interval(Some(REFRESH_INTERVAL))
        .set_query_timeout(QUERY_TIMEOUT)
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_provider_publication_interval(None);
    let mut kad = kad::Behaviour::with_config(local, records, config);
    kad.set_mode(Some(kad::Mode::Server));
    kad
}
