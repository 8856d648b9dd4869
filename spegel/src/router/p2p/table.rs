//! The peers that can be asked: those that are connected, and the members beyond them.

use std::collections::HashMap;
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

/// The driver's view of who is there, which searches and the advertiser read: the peers that are connected and in kad's table, and
/// the members that are known beyond these. The former are bounded by the buckets of kad's table, the latter by the member list.
#[derive(Debug, Default)]
pub(super) struct Table {
    connected: HashMap<PeerId, Entry>,
    members: HashMap<PeerId, Entry>,
    traits: HashMap<PeerId, Traits>,
}

/// What a member says of itself beyond where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Traits {
    pub(super) zone: Option<Arc<str>>,
    pub(super) load: Option<u8>,
}

// === impl Table ===

impl Table {
    /// Adds a connected peer, or changes its addresses. True if it is new.
    pub(super) fn insert(&mut self, contact: Contact) -> bool {
        let position = Position::of_peer(&contact.peer);
        self.connected.insert(contact.peer, Entry { position, contact }).is_none()
    }

    pub(super) fn remove(&mut self, peer: &PeerId) -> Option<Contact> {
        self.connected.remove(peer).map(|entry| entry.contact)
    }

    /// Replaces the members.
    pub(super) fn set_members(&mut self, members: impl IntoIterator<Item = (Contact, Traits)>) {
        let mut before = std::mem::take(&mut self.members);
        self.traits.clear();
        for (contact, traits) in members {
            self.traits.insert(contact.peer, traits);
            let position = before.remove(&contact.peer).map(|entry| entry.position);
            let position = position.unwrap_or_else(|| Position::of_peer(&contact.peer));
            self.members.insert(contact.peer, Entry { position, contact });
        }
    }

    /// Whether the peer speaks the member protocol.
    pub(super) fn is_member(&self, peer: &PeerId) -> bool {
        self.members.contains_key(peer)
    }

    /// What is known of a peer beyond its addresses.
    pub(super) fn traits(&self, peer: &PeerId) -> Traits {
        self.traits.get(peer).cloned().unwrap_or_default()
    }

    /// A peer that is connected or a member.
    pub(super) fn find(&self, peer: &PeerId) -> Option<&Contact> {
        self.get(peer).or_else(|| self.members.get(peer).map(|entry| &entry.contact))
    }

    /// Whether nobody is connected.
    pub(super) fn is_empty(&self) -> bool {
        self.connected.is_empty()
    }

    /// Whether the peer is connected.
    pub(super) fn contains(&self, peer: &PeerId) -> bool {
        self.connected.contains_key(peer)
    }

    /// Whether a connected peer has this address.
    pub(super) fn has_address(&self, address: &SocketAddr) -> bool {
        self.connected.values().any(|entry| entry.contact.addresses.contains(address))
    }

    /// The connected peer of this identity.
    pub(super) fn get(&self, peer: &PeerId) -> Option<&Contact> {
        self.connected.get(peer).map(|entry| &entry.contact)
    }

    /// The connected peers.
    pub(super) fn contacts(&self) -> impl Iterator<Item = &Contact> {
        self.connected.values().map(|entry| &entry.contact)
    }

    /// The known peers nearest to a position, in no order.
    pub(super) fn closest(&self, target: &Position) -> Vec<Contact> {
        let mut ranked: Vec<_> = self.all().map(|entry| (entry.position.distance(target), entry)).collect();
        if ranked.len() > REPLICAS {
            ranked.select_nth_unstable_by_key(REPLICAS, |(distance, _)| *distance);
            ranked.truncate(REPLICAS);
        }
        ranked.into_iter().map(|(_, entry)| entry.contact.clone()).collect()
    }

    /// Whether a connected peer is one of the nearest to a position.
    pub(super) fn is_among_closest(&self, peer: &PeerId, target: &Position) -> bool {
        let Some(own) = self.connected.get(peer).map(|entry| entry.position.distance(target)) else { return false };
        self.all().filter(|entry| entry.position.distance(target) < own).take(REPLICAS).count() < REPLICAS
    }

    fn all(&self) -> impl Iterator<Item = &Entry> {
        let apart = self.members.iter().filter(|(peer, _)| !self.connected.contains_key(*peer));
        self.connected.values().chain(apart.map(|(_, entry)| entry))
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

    #[test]
    fn members_count_once_whether_connected_or_not() {
        let mut table = Table::default();
        let contacts: Vec<Contact> = (0..60).map(|_| contact()).collect();
        for contact in &contacts[..30] {
            table.insert(contact.clone());
        }
        table.set_members(contacts[20..].iter().map(|contact| (contact.clone(), Traits::default())));
        let target = Position::of_peer(&PeerId::random());
        let mut sorted = contacts.clone();
        sorted.sort_by_key(|contact| Position::of_peer(&contact.peer).distance(&target));
        let mut closest = table.closest(&target);
        closest.sort_by_key(|contact| Position::of_peer(&contact.peer).distance(&target));
        assert_eq!(closest, sorted[..REPLICAS]);
        for (rank, contact) in sorted.iter().enumerate() {
            let near = rank < REPLICAS && table.contains(&contact.peer);
            assert_eq!(table.is_among_closest(&contact.peer, &target), near);
        }
        table.set_members([]);
        assert!(!table.is_member(&contacts[25].peer) && table.contains(&contacts[25].peer));
    }
}
