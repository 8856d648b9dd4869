//! Who else has it: finding peers that offer a key, and telling them what this node offers.

mod memory;
mod p2p;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::oci::Key;
use crate::store::Change;

pub use memory::{MemoryNetwork, MemoryRouter};
pub use p2p::{Identity, IdentityError, P2pRouter, P2pSettings, RouterError};

/// A node that offers content, and where its registry listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its identity in the network.
    pub id: Arc<str>,
    /// The addresses of its registry, best first. Never empty.
    pub addresses: Vec<SocketAddr>,
}

/// How this node stands in the network of peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Bootstrap has not settled who is there.
    Joining,
    /// Every bootstrap source answered, and named nobody but us.
    Alone,
    /// At least one peer is connected.
    Connected,
}

impl Readiness {
    /// Whether requests may be sent here.
    pub fn is_ready(self) -> bool {
        self != Self::Joining
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
}
