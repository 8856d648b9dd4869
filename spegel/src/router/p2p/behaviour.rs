//! The behaviours that make up a node, and the swarm that runs them.

use std::time::Duration;

use libp2p::connection_limits::ConnectionLimits;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, Transport as _};
use libp2p::core::upgrade::Version;
use libp2p::kad::{self, BucketInserts, StoreInserts};
use libp2p::pnet::{PnetConfig, PreSharedKey};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    PeerId, StreamProtocol, Swarm, SwarmBuilder, connection_limits, identify, identity, mdns, noise, ping, tcp, tls,
    yamux,
};

use super::guarded::Guarded;
use super::metrics::RouterMetrics;
use super::opener::Opener;
use super::per_ip::PerIp;
use super::records::SharedRecords;

/// The Kademlia protocol under the prefix of this network.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/spegel/kad/1.0.0");

/// The protocol of those who keep the list of each other.
pub(super) const MEMBERS: StreamProtocol = StreamProtocol::new("/spegel/members/1");

/// The protocol by which nodes ask who gets from whom what none has yet.
pub(super) const STORMS: StreamProtocol = StreamProtocol::new("/spegel/storm/1");

/// TCP connect, security handshake and multiplexer together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection to a peer outside the routing table stays open unused.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How often each side of a connection is asked whether it is there, and how long that may take.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(10);
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// The largest message that kad reads: requests have one peer at most, and answers to its own queries twenty. Answers to ours, which may have
/// hundreds, it does not see. A peer may have 32 of them begun and not ended on each connection.
const MAX_KAD_MESSAGE: usize = 32 * 1024;

/// How often the routing table is refreshed with queries of kad's.
const REFRESH_INTERVAL: Duration = Duration::from_secs(60);

/// How long one such query may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// How often is asked by multicast who else is there, once that has been asked often at the start.
const MDNS_INTERVAL: Duration = Duration::from_secs(60);

/// How many streams of one connection may be negotiating their protocol at once.
const MAX_NEGOTIATING: usize = 128;

const MAX_PENDING: u32 = 256;
const MAX_ESTABLISHED_PER_DIRECTION: u32 = 2048;
const MAX_ESTABLISHED_PER_PEER: u32 = 4;

/// All that a node does on its connections.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    limits: connection_limits::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
    mdns_ipv6: Toggle<mdns::tokio::Behaviour>,
    per_ip: PerIp,
    pub(super) kad: Guarded,
    pub(super) opener: Opener,
}

/// What of the settings the swarm is built with.
pub(super) struct Setup<'a> {
    pub(super) identity: &'a identity::Keypair,
    pub(super) mdns: bool,
    /// Of a private network: who does not have it cannot even begin to speak.
    pub(super) network_key: Option<PreSharedKey>,
    pub(super) records: SharedRecords,
    pub(super) opener: Opener,
    pub(super) metrics: RouterMetrics,
}

/// A swarm that listens nowhere yet.
///
/// # Errors
///
/// The identity cannot be used for TLS or noise, or multicast DNS cannot be used.
pub(super) fn swarm(setup: Setup<'_>) -> Result<Swarm<Behaviour>, Box<dyn std::error::Error + Send + Sync>> {
    let Setup { identity, mdns, network_key, records, opener, metrics } = setup;
    let local = identity.public().to_peer_id();
    let multicast = |ipv6| mdns.then(|| mdns::tokio::Behaviour::new(mdns_config(ipv6), local)).transpose();
    let (mdns, mdns_ipv6) = (multicast(false)?, multicast(true)?);
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
        mdns: mdns.into(),
        mdns_ipv6: mdns_ipv6.into(),
        per_ip: PerIp::default(),
        kad: Guarded::new(kademlia(local, records), metrics),
        opener,
    };
    let builder = SwarmBuilder::with_existing_identity(identity.clone()).with_tokio();
    let tcp = tcp::Config::new().nodelay(true);
    Ok(match network_key {
        None => builder
            .with_tcp(tcp, (tls::Config::new, noise::Config::new), yamux::Config::default)?
            .with_behaviour(|_| Ok(behaviour))?
            .with_swarm_config(swarm_config)
            .with_connection_timeout(CONNECT_TIMEOUT)
            .build(),
        Some(key) => builder
            .with_other_transport(|identity| private(tcp, key, identity))?
            .with_behaviour(|_| Ok(behaviour))?
            .with_swarm_config(swarm_config)
            .with_connection_timeout(CONNECT_TIMEOUT)
            .build(),
    })
}

/// The key's cipher lies beneath noise, as go-libp2p's private networks have it.
fn private(
    tcp: tcp::Config,
    key: PreSharedKey,
    identity: &identity::Keypair,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, Box<dyn std::error::Error + Send + Sync>> {
    let noise = noise::Config::new(identity)?;
    let private = tcp::tokio::Transport::new(tcp).and_then(move |socket, _| PnetConfig::new(key).handshake(socket));
    Ok(private.upgrade(Version::V1Lazy).authenticate(noise).multiplex(yamux::Config::default()).boxed())
}

fn swarm_config(config: libp2p::swarm::Config) -> libp2p::swarm::Config {
    config.with_idle_connection_timeout(IDLE_TIMEOUT).with_max_negotiating_inbound_streams(MAX_NEGOTIATING)
}

/// Of one family: the behaviour speaks no more.
fn mdns_config(enable_ipv6: bool) -> mdns::Config {
    mdns::Config { query_interval: MDNS_INTERVAL, enable_ipv6, ..mdns::Config::default() }
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
        .set_max_packet_size(MAX_KAD_MESSAGE)
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
