//! The network of peers over libp2p: a Kademlia table of who offers what, spread over all nodes.
//!
//! kad's behaviour keeps the routing table and answers other nodes. Searching and advertising are ours, on the same wire
//! messages: kad drops the addresses that answers carry, and walks the network once for every key.

mod addresses;
mod advertise;
mod behaviour;
pub(crate) mod checks;
mod client;
mod driver;
mod guarded;
mod holdings;
#[cfg(test)]
mod hostile_tests;
mod identity;
mod joining;
mod kad_errors;
mod keys;
mod links;
mod lookup;
mod members;
mod memory;
mod metrics;
mod network_key;
mod opener;
mod per_ip;
mod pulse;
mod quest;
mod records;
mod results;
mod search;
#[cfg(test)]
mod simulation;
mod storms;
mod table;
mod wire;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use libp2p::Swarm;
use libp2p::core::transport::TransportError;
use rand::seq::IteratorRandom as _;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Members, Peer, Readiness, Router};
use crate::bootstrap::{Bootstrap, BootstrapAddress, BootstrapPeer, RememberedPeers};
use crate::oci::Key;
use crate::store::Change;

use addresses::{Scope, is_ipv6_wildcard, multiaddr};
use advertise::Advertiser;
use behaviour::Setup;
use client::Client;
use driver::Driver;
pub use identity::{Identity, IdentityError};
use joining::Joining;
pub use kad_errors::KadErrors;
use keys::ContentId;
use links::Links;
use members::{Membership, Own};
use memory::Memory;
pub use metrics::RouterMetrics;
pub use network_key::{NetworkKey, NetworkKeyError};
use opener::Opener;
use pulse::Pulse;
use records::{RecordLimits, Records, SharedRecords};
use search::{Context, Searches};
use storms::Storms;
use table::SharedTable;

/// How long records of others outlive the time within which they are told again.
const GRACE: Duration = Duration::from_secs(4 * 60);

/// How many streams may wait to be opened, and how many answers of bootstrap sources to be read.
const QUEUE: usize = 256;

/// How many peers a newcomer is told by way of HTTP.
const MAX_NAMED_TO_NEWCOMERS: usize = 15;

/// What a [`P2pRouter`] needs to know.
#[derive(Debug)]
pub struct P2pSettings {
    /// Where to listen for peers. `0.0.0.0` and `[::]` stand for every interface of their family; on a machine without IPv6
    /// the latter is skipped if there is another. If all are loopback addresses, only loopback peers are accepted.
    pub listen: Vec<SocketAddr>,
    /// The port of every node's registry, this one's included.
    pub registry_port: u16,
    /// Who this node is.
    pub identity: Identity,
    /// Where the first peers come from. Without any, this node is alone until somebody calls it.
    pub bootstrap: Vec<Arc<dyn Bootstrap>>,
    /// Peers that were there before, called like those of the sources; it is kept up to date with those that are there now.
    pub remembered: Option<RememberedPeers>,
    /// Whether peers on the same link are found by multicast DNS.
    pub mdns: bool,
    /// Where others reach this node, if not at the addresses of its interfaces.
    pub advertise: Vec<SocketAddr>,
    /// The networks in which peers are; an address outside of them is not believed. None: everywhere.
    pub peer_networks: Vec<IpNet>,
    /// The key of a private network; without it anybody who can connect may take part.
    pub network_key: Option<NetworkKey>,
    /// The zone that this node says it is in.
    pub zone: Option<String>,
    /// Whether this node takes part in cold storms: asks who pulls what nobody has, and answers such questions.
    pub storms: bool,
    /// Within what time each key is told again. Other nodes keep it four minutes longer.
    pub advertise_ttl: Duration,
    /// How long this node is not ready while none of the peers that are named can be reached.
    pub join_timeout: Duration,
    /// Where what it does is counted.
    pub metrics: RouterMetrics,
    /// How many records of other nodes are kept, at 64 bytes each. When there are more the oldest go first.
    pub max_records: usize,
}

/// Why the router did not start.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// Nobody can be listened to there.
    #[error("the router cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// No address to listen on.
    #[error("the router has no address to listen on")]
    NoAddress,
    /// The identity cannot be used for encrypted connections, or there is no multicast DNS here.
    #[error("the router cannot be set up: {0}")]
    Setup(String),
}

/// The router of a node in a libp2p network. It leaves the network when it is dropped.
pub struct P2pRouter {
    id: Arc<str>,
    listen: Vec<SocketAddr>,
    scope: Scope,
    records: SharedRecords,
    table: SharedTable,
    searches: Searches,
    advertiser: Advertiser,
    readiness: watch::Receiver<Readiness>,
    members: watch::Receiver<Members>,
    storms: Option<Storms>,
    load: watch::Sender<Option<u8>>,
    _stop: DropGuard,
}

// === impl P2pSettings ===

impl P2pSettings {
    /// How many addresses a node announces at most: peers take no more of each other.
    pub const MAX_ADVERTISED: usize = addresses::MAX_ADDRESSES;
    /// Longer than it takes for the pods of a new release to start, and short enough for a rolling update.
    pub const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

    /// The time to live that all existing nodes use.
    pub const ADVERTISE_TTL: Duration = Duration::from_secs(15 * 60);

    /// Enough for 20,000 records a node, as 1,000 keys a node make, and ten times that.
    pub const MAX_RECORDS: usize = 300_000;
}

// === impl P2pRouter ===

impl P2pRouter {
    /// Listens, and joins the network in the background, on the current runtime, until cancelled or dropped.
    ///
    /// # Errors
    ///
    /// An address that cannot be listened on, at once and by name.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn start(settings: P2pSettings, cancelled: &CancellationToken) -> Result<Arc<Self>, RouterError> {
        let cancelled = cancelled.child_token();
        let local = settings.identity.0.public().to_peer_id();
        let limits = RecordLimits { foreign: settings.max_records, validity: settings.advertise_ttl + GRACE };
        let records = SharedRecords::new(Records::new(local, limits, Instant::now()));
        let table = SharedTable::default();
        let (open, opens) = mpsc::channel(QUEUE);
        let client = Client::new(local, open, settings.metrics.clone());

        let opener = Opener::new(local, settings.storms, opens);
        let setup = Setup {
            identity: &settings.identity.0,
            mdns: settings.mdns,
            network_key: settings.network_key.as_ref().map(NetworkKey::shared),
            records: records.clone(),
            opener,
            metrics: settings.metrics.clone(),
        };
        let mut swarm = behaviour::swarm(setup).map_err(|error| RouterError::Setup(error.to_string()))?;
        let listen = listen(&mut swarm, &settings.listen)?;
        let scope = Scope::of_listeners(&listen).within(&settings.peer_networks);
        if let Some(address) = settings.advertise.iter().find(|address| !scope.accepts(**address)) {
            let why = format!(
                "no peer can reach this node at {address}, which --advertise-addr names: look at --router-addr and --peer-cidrs"
            );
            return Err(RouterError::Setup(why));
        }
        let accepted = scope.clone();

        let context = Context {
            local,
            scope: scope.clone(),
            registry_port: settings.registry_port,
            records: records.clone(),
            table: table.clone(),
            metrics: settings.metrics.clone(),
        };
        let searches = Searches::new(context, client.clone(), Handle::current());
        let advertiser = Advertiser::new(records.clone(), table.clone(), client.clone(), settings.metrics.clone());
        let (arrivals, arrived) = mpsc::channel(QUEUE);
        let links = Links::new(client.clone(), arrivals);
        let (load, loads) = watch::channel(None);
        let members: watch::Sender<Members> = watch::Sender::default();
        let storms = settings.storms.then(|| {
            Storms::new(storms::Context {
                local,
                zone: settings.zone.clone(),
                registry_port: settings.registry_port,
                table: table.clone(),
                records: records.clone(),
                client: client.clone(),
                runtime: Handle::current(),
            })
        });
        let own = Own { addresses: Vec::new(), zone: settings.zone, load: None, storms: settings.storms };
        let membership = Membership::new(
            local,
            own,
            scope.clone(),
            Box::new(settings.identity.0.clone()),
            rand::random(),
            (Instant::now(), SystemTime::now()),
        );
        let (readiness, readiness_seen) = watch::channel(Readiness::Joining);
        let mut sources = settings.bootstrap;
        let count = sources.len();
        // Numbered after the sources that count: the memory, then multicast.
        sources.extend(settings.remembered.clone().map(|remembered| Arc::new(remembered) as Arc<dyn Bootstrap>));
        let mdns = settings.mdns.then_some(sources.len());
        let mut joining =
            Joining::new(local, scope.clone(), listen[0].port(), sources.len() + usize::from(settings.mdns));
        if settings.remembered.is_some() {
            joining.is_memory(count);
        }
        let (answer, answers) = mpsc::channel(sources.len().max(1));
        // The remembered are called first: they are known without asking anybody.
        for (index, source) in sources.into_iter().enumerate().rev() {
            let seen = readiness_seen.clone();
            tokio::spawn(joining::follow(index, source, seen, answer.clone(), cancelled.clone()));
        }
        let mut driver = Driver {
            swarm,
            listen: listen.clone(),
            advertise: settings.advertise,
            scope,
            records: records.clone(),
            table: table.clone(),
            advertiser: advertiser.clone(),
            joining,
            answers,
            readiness,
            remembered: settings.remembered.map(Memory::new),
            mdns,
            membership,
            storms: storms.clone(),
            links,
            arrived,
            loads,
            members: members.clone(),
            shown: BTreeMap::new(),
            speakers: HashSet::new(),
            registry_port: settings.registry_port,
            metrics: settings.metrics,
            called: HashMap::new(),
            redialled: HashMap::new(),
            pulse: Pulse::default(),
            join_timeout: settings.join_timeout,
            joining_since: tokio::time::Instant::now(),
        };
        driver.refresh_addresses();
        tokio::spawn(driver.run(cancelled.clone()));
        tokio::spawn(advertiser.clone().run(settings.advertise_ttl, cancelled.clone()));
        Ok(Arc::new(Self {
            scope: accepted,
            id: local.to_base58().into(),
            listen,
            records,
            table,
            searches,
            advertiser,
            readiness: readiness_seen,
            members: members.subscribe(),
            storms,
            load,
            _stop: cancelled.drop_guard(),
        }))
    }

    /// This node's identity in the network.
    pub fn peer_id(&self) -> &Arc<str> {
        &self.id
    }

    /// Where it listens, with the ports that were chosen for port 0.
    pub fn listen_addresses(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Where peers reach its router.
    pub fn reachable_addresses(&self) -> Vec<SocketAddr> {
        self.records.lock().own_addresses().to_vec()
    }

    /// The peers that are connected now, with the addresses of their routers.
    pub fn peers(&self) -> Vec<Peer> {
        let table = self.table.read();
        let peer =
            |contact: &table::Contact| Peer::new(contact.peer().to_base58().into(), contact.addresses().to_vec());
        table.contacts().map(peer).collect()
    }

    /// This node first, then some of its peers: who knows these can join the network.
    pub fn bootstrap_peers(&self) -> Vec<BootstrapPeer> {
        let at = |address: &SocketAddr| BootstrapAddress { ip: address.ip(), port: Some(address.port()) };
        let own = self.reachable_addresses().iter().map(at).collect();
        let us = BootstrapPeer { id: Some(self.id.to_string()), addresses: own };
        let table = self.table.read();
        let others = table.contacts().choose_multiple(&mut rand::rng(), MAX_NAMED_TO_NEWCOMERS);
        std::iter::once(us).chain(others.into_iter().map(memory::remember)).collect()
    }

    /// How many records of other nodes are held.
    pub fn foreign_records(&self) -> usize {
        self.records.lock().foreign_count()
    }
}

impl Router for P2pRouter {
    fn lookup(&self, key: &Key) -> mpsc::Receiver<Peer> {
        self.searches.start(ContentId::of(key))
    }

    fn announce(&self, change: Change) {
        self.advertiser.change(&change);
    }

    fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    fn members(&self) -> watch::Receiver<Members> {
        self.members.clone()
    }

    fn accepts(&self, address: SocketAddr) -> bool {
        self.scope.accepts(address)
    }

    fn storms(&self) -> Option<Arc<dyn super::Storms>> {
        self.storms.clone().map(|storms| Arc::new(storms) as Arc<dyn super::Storms>)
    }

    fn set_load(&self, percent: u8) {
        self.load.send_if_modified(|load| load.replace(percent.min(100)) != Some(percent.min(100)));
    }
}

impl fmt::Debug for P2pRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("P2pRouter").field("id", &self.id).field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Listens on each address, and says which with their ports.
fn listen(swarm: &mut Swarm<behaviour::Behaviour>, addresses: &[SocketAddr]) -> Result<Vec<SocketAddr>, RouterError> {
    let mut listening = Vec::with_capacity(addresses.len());
    for address in addresses {
        match listen_on(swarm, *address) {
            Ok(address) => listening.push(address),
            Err(error) if is_ipv6_wildcard(address) && addresses.len() > 1 && lacks_ipv6(&error) => {
                tracing::info!("no IPv6 here: the router listens on IPv4 only");
            }
            Err(source) => return Err(RouterError::Listen { address: *address, source }),
        }
    }
    if listening.is_empty() { Err(RouterError::NoAddress) } else { Ok(listening) }
}

fn lacks_ipv6(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let code = error.raw_os_error();
    [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL].iter().any(|errno| code == Some(errno.raw_os_error()))
}

fn listen_on(swarm: &mut Swarm<behaviour::Behaviour>, address: SocketAddr) -> io::Result<SocketAddr> {
    let address = claim(address)?.local_addr()?;
    swarm.listen_on(multiaddr(address)).map_err(|error| match error {
        TransportError::Other(error) => error,
        TransportError::MultiaddrNotSupported(address) => io::Error::other(format!("{address} is not supported")),
    })?;
    Ok(address)
}

/// libp2p's listener shares its port with any other process that does the same, and two routers on one port would each get
/// some of the connections. A socket that does not share finds out whether the port is taken, and which one 0 stands for.
fn claim(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1)?;
    Ok(socket.into())
}
