//! Who else has it: finding peers that offer a key, and telling them what this node offers.

mod memory;
mod p2p;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};

use crate::oci::Key;
use crate::store::Change;
use crate::storm;

pub(crate) use p2p::checks;

pub use memory::{MemoryNetwork, MemoryRouter};
pub use p2p::{
    Identity, IdentityError, KadErrors, NetworkKey, NetworkKeyError, P2pRouter, P2pSettings, RouterError, RouterMetrics,
};

/// A node that offers content, and where its registry listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its identity in the network.
    pub id: Arc<str>,
    /// The addresses of its registry, best first. Never empty.
    pub addresses: Vec<SocketAddr>,
    /// The zone that it says it is in; unknown of nodes that do not speak our member protocol.
    pub zone: Option<Arc<str>>,
    /// How busy it said its registry is, in percent of what it can carry; unknown of nodes that do not speak our member
    /// protocol, and as old as half a minute, or as many seconds as there are members.
    pub load: Option<u8>,
}

/// A node that speaks our member protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Who it is, where its registry listens, its zone and load.
    pub peer: Peer,
    /// The version of the member protocol that it speaks: each includes those before it.
    pub version: u32,
}

/// All members but this node, in no order.
pub type Members = Arc<[Member]>;

/// How this node stands in the network of peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Bootstrap has not settled who is there.
    Joining,
    /// Every bootstrap source answered, and named nobody but us.
    Alone,
    /// There may be others, and none could be reached within half a minute. The search goes on; what is here is served meanwhile,
    /// and what is not gets its 404. Without this bound a rolling update to other ports would wait for its first pod for ever.
    Isolated,
    /// At least one peer is connected.
    Connected,
}

impl Readiness {
    /// Whether requests may be sent here.
    pub fn is_ready(self) -> bool {
        self != Self::Joining
    }
}

// === impl Peer ===

impl Peer {
    /// A peer of which no more is known.
    pub fn new(id: Arc<str>, addresses: Vec<SocketAddr>) -> Self {
        Self { id, addresses, zone: None, load: None }
    }
}

/// Finds peers by key. Cheap to share; every method returns at once.
pub trait Router: Send + Sync + fmt::Debug + 'static {
    /// Peers that offer `key`, as they are found, this node never among them. The channel closes when there are no more to
    /// be found; dropping it ends the search. How long to wait is the caller's to bound.
    fn lookup(&self, key: &Key) -> mpsc::Receiver<Peer>;

    /// Offers or withdraws keys, and goes on offering what was added until it is removed.
    fn announce(&self, change: Change);

    /// How this node stands, followed.
    fn readiness(&self) -> watch::Receiver<Readiness>;

    /// The nodes that speak our member protocol, followed. Each knows nearly all the others; one that has just joined is
    /// known to nearly all within half a minute, and one that died is forgotten as soon.
    fn members(&self) -> watch::Receiver<Members>;

    /// Whether a peer may be at an address, as far as this node is told to believe that. Routers without such bounds need not implement it.
    fn accepts(&self, _address: SocketAddr) -> bool {
        true
    }

    /// Whom to ask about cold storms; nothing if this node takes no part in them.
    fn storms(&self) -> Option<Arc<dyn Storms>> {
        None
    }

    /// Says how busy this node's registry is, in percent. Members hear of it when it has changed by much.
    fn set_load(&self, percent: u8);
}

/// Asks the nodes that say who gets from whom what none has yet. Every method returns at once.
pub trait Storms: Send + Sync + fmt::Debug + 'static {
    /// What `key` is called there, and the nodes nearest to it that take part, the nearest first, [`storm::COORDINATORS`] at the most. This node
    /// may be one of them.
    fn coordinators(&self, key: &Key) -> (storm::Key, Vec<storm::Node>);

    /// Sends a message to a coordinator. The channel closes without an answer if there is none within two seconds.
    fn ask(&self, to: storm::Node, request: storm::Request) -> oneshot::Receiver<storm::Response>;

    /// This node, as coordinators call it.
    fn own(&self) -> storm::Node;

    /// What this node's own coordinator knows, for people: the trees that it heard of last, `trees` at the most with `places` nodes each.
    fn trees(&self, trees: usize, places: usize) -> Vec<storm::TreeView>;

    /// The node that a coordinator named; nothing if it is not known here, or is this one.
    fn peer(&self, node: storm::Node) -> Option<Peer>;
}
