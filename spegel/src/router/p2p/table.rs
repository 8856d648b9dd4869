//! The peers that can be asked now: connected, speaking our protocol, and in kad's routing table.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use libp2p::PeerId;

use super::keys::Position;

/// How many peers keep the records of a key, and so how many are told and asked: Kademlia's k, as everywhere in libp2p.
pub(super) const REPLICAS: usize = 20;

/// A peer and where its router listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contact {
    pub(super) peer: PeerId,
    pub(super) addresses: Arc<[SocketAddr]>,
}

#[derive(Debug)]
struct Entry {
    position: Position,
    contact: Contact,
}

/// The driver's view of who is there, which searches and the advertiser read. Bounded by the buckets of kad's table.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<Entry>,
}

// === impl Table ===

impl Table {
    /// Adds a peer, or changes its addresses. True if it is new.
    pub(super) fn insert(&mut self, contact: Contact) -> bool {
        match self.entries.iter_mut().find(|entry| entry.contact.peer == contact.peer) {
            Some(entry) => {
                entry.contact = contact;
                false
            }
            None => {
                self.entries.push(Entry { position: Position::of_peer(&contact.peer), contact });
                true
            }
        }
    }

    pub(super) fn remove(&mut self, peer: &PeerId) -> Option<Contact> {
        let index = self.entries.iter().position(|entry| entry.contact.peer == *peer)?;
        Some(self.entries.swap_remove(index).contact)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn contains(&self, peer: &PeerId) -> bool {
        self.entries.iter().any(|entry| entry.contact.peer == *peer)
    }

    pub(super) fn has_address(&self, address: &SocketAddr) -> bool {
        self.entries.iter().any(|entry| entry.contact.addresses.contains(address))
    }

    pub(super) fn contacts(&self) -> impl Iterator<Item = &Contact> {
        self.entries.iter().map(|entry| &entry.contact)
    }

    /// The peers nearest to a position, in no order.
    pub(super) fn closest(&self, target: &Position) -> Vec<Contact> {
        let mut ranked: Vec<_> = self.entries.iter().map(|entry| (entry.position.distance(target), entry)).collect();
        if ranked.len() > REPLICAS {
            ranked.select_nth_unstable_by_key(REPLICAS, |(distance, _)| *distance);
            ranked.truncate(REPLICAS);
        }
        ranked.into_iter().map(|(_, entry)| entry.contact.clone()).collect()
    }

    /// Whether a peer is one of the nearest to a position.
    pub(super) fn is_among_closest(&self, peer: &PeerId, target: &Position) -> bool {
        if self.entries.len() <= REPLICAS {
            return self.contains(peer);
        }
        let own = Position::of_peer(peer).distance(target);
        self.contains(peer)
            && self.entries.iter().filter(|entry| entry.position.distance(target) < own).count() < REPLICAS
    }
}

/// A [`Table`] between the driver and those who read it.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedTable(Arc<RwLock<Table>>);

// === impl SharedTable ===

impl SharedTable {
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::router::p2p::keys::ContentId;

    fn contact() -> Contact {
        Contact { peer: PeerId::random(), addresses: Arc::from(["10.0.0.1:5001".parse().unwrap()]) }
    }

    #[test]
    fn closest_are_those_that_sorting_gives() {
        let mut table = Table::default();
        let contacts: Vec<Contact> = (0..100).map(|_| contact()).collect();
        for contact in &contacts {
            assert!(table.insert(contact.clone()));
            assert!(!table.insert(contact.clone()), "once only");
        }
        let target = ContentId::of(&format!("sha256:{:064x}", 1).parse().unwrap()).position();
        let mut sorted = contacts;
        sorted.sort_by_key(|contact| Position::of_peer(&contact.peer).distance(&target));
        let mut closest = table.closest(&target);
        closest.sort_by_key(|contact| Position::of_peer(&contact.peer).distance(&target));
        assert_eq!(closest, sorted[..REPLICAS]);
        for (rank, contact) in sorted.iter().enumerate() {
            assert_eq!(table.is_among_closest(&contact.peer, &target), rank < REPLICAS);
        }
        assert!(!table.is_among_closest(&PeerId::random(), &target));
    }
}
