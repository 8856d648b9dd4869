//! The peers that can be asked: those that are connected, and the members beyond them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use libp2p::PeerId;

use super::keys::Position;

/// How many peers keep the records of a key, and so how many are told and asked: Kademlia's k, as everywhere in libp2p.
pub(super) const REPLICAS: usize = 20;

/// A peer, where it lies in the key space, and where its router listens. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contact(Arc<Inner>);

#[derive(Debug, PartialEq, Eq)]
struct Inner {
    peer: PeerId,
    position: Position,
    addresses: Box<[SocketAddr]>,
}

/// What a member says of itself beyond where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Traits {
    pub(super) zone: Option<Arc<str>>,
    pub(super) load: Option<u8>,
    /// It answers questions about storms.
    pub(super) storms: bool,
}

/// The driver's view of who is there, which searches and the advertiser read: the peers that are connected and in kad's table, and
/// the members that are known beyond these. The former are bounded by the buckets of kad's table, the latter by the member list.
/// In the order of the key space, in which the nearest to a position are found without looking at the others.
#[derive(Debug, Default)]
pub(super) struct Table {
    known: BTreeMap<Position, Entry>,
    connected: usize,
    members: usize,
    /// Where the members are that answer questions about storms.
    storms: BTreeSet<Position>,
}

/// One peer. At least one of both is there.
#[derive(Debug, Default)]
struct Entry {
    connected: Option<Contact>,
    member: Option<(Contact, Arc<Traits>)>,
}

// === impl Contact ===

impl Contact {
    pub(super) fn new(peer: PeerId, addresses: &[SocketAddr]) -> Self {
        Self(Arc::new(Inner { peer, position: Position::of_peer(&peer), addresses: addresses.into() }))
    }

    pub(super) fn peer(&self) -> PeerId {
        self.0.peer
    }

    pub(super) fn position(&self) -> &Position {
        &self.0.position
    }

    pub(super) fn addresses(&self) -> &[SocketAddr] {
        &self.0.addresses
    }
}

// === impl Entry ===

impl Entry {
    /// What a connection says of its peer is newer than what its card says.
    fn contact(&self) -> Option<&Contact> {
        self.connected.as_ref().or(self.member.as_ref().map(|(contact, _)| contact))
    }
}

// === impl Table ===

impl Table {
    /// Adds a connected peer, or changes its addresses. True if it is new.
    pub(super) fn insert(&mut self, contact: Contact) -> bool {
        let entry = self.known.entry(*contact.position()).or_default();
        let new = entry.connected.replace(contact).is_none();
        self.connected += usize::from(new);
        new
    }

    /// A peer is no longer connected.
    pub(super) fn remove(&mut self, peer: &PeerId) -> Option<Contact> {
        let position = Position::of_peer(peer);
        let entry = self.known.get_mut(&position)?;
        let left = entry.connected.take()?;
        self.connected -= 1;
        if entry.member.is_none() {
            self.known.remove(&position);
        }
        Some(left)
    }

    /// Adds a member, or replaces what is known of it.
    pub(super) fn set_member(&mut self, contact: Contact, traits: Arc<Traits>) {
        if traits.storms {
            self.storms.insert(*contact.position());
        } else {
            self.storms.remove(contact.position());
        }
        let entry = self.known.entry(*contact.position()).or_default();
        self.members += usize::from(entry.member.replace((contact, traits)).is_none());
    }

    /// A member is gone.
    pub(super) fn remove_member(&mut self, peer: &PeerId) {
        let position = Position::of_peer(peer);
        let Some(entry) = self.known.get_mut(&position) else { return };
        self.members -= usize::from(entry.member.take().is_some());
        self.storms.remove(&position);
        if entry.connected.is_none() {
            self.known.remove(&position);
        }
    }

    /// How many members there are.
    #[cfg(test)]
    pub(super) fn members(&self) -> usize {
        self.members
    }

    /// Whether the peer speaks the member protocol.
    pub(super) fn is_member(&self, peer: &PeerId) -> bool {
        self.entry(peer).is_some_and(|entry| entry.member.is_some())
    }

    /// What is known of a peer beyond its addresses.
    pub(super) fn traits(&self, peer: &PeerId) -> Traits {
        let member = self.entry(peer).and_then(|entry| entry.member.as_ref());
        member.map(|(_, traits)| Traits::clone(traits)).unwrap_or_default()
    }

    /// A peer that is connected or a member.
    pub(super) fn find(&self, peer: &PeerId) -> Option<&Contact> {
        self.entry(peer).and_then(Entry::contact)
    }

    /// The peer whose position begins with these eight bytes.
    pub(super) fn with_prefix(&self, prefix: u64) -> Option<&Contact> {
        let (position, entry) = self.known.range(Position::with_prefix(prefix)..).next()?;
        entry.contact().filter(|_| position.prefix() == prefix)
    }

    /// Whether nobody is connected.
    pub(super) fn is_empty(&self) -> bool {
        self.connected == 0
    }

    /// Whether the peer is connected.
    pub(super) fn contains(&self, peer: &PeerId) -> bool {
        self.entry(peer).is_some_and(|entry| entry.connected.is_some())
    }

    /// Whether a connected peer has this address.
    pub(super) fn has_address(&self, address: &SocketAddr) -> bool {
        self.contacts().any(|contact| contact.addresses().contains(address))
    }

    /// The connected peers.
    pub(super) fn contacts(&self) -> impl Iterator<Item = &Contact> {
        self.known.values().filter_map(|entry| entry.connected.as_ref())
    }

    /// How many peers are connected.
    pub(super) fn connected(&self) -> usize {
        self.connected
    }

    /// The known peers nearest to a position, in no order.
    pub(super) fn closest(&self, target: &Position) -> Vec<Contact> {
        let below = self.known.range(..target).rev().map(|(at, _)| at);
        let above = self.known.range(target..).map(|(at, _)| at);
        let bits = common_to_closest(target, REPLICAS, below, above);
        let mut found: Vec<Contact> = Vec::with_capacity(REPLICAS);
        let mut farthest: Vec<&Contact> = Vec::with_capacity(REPLICAS);
        for contact in self.known.range(target.around(bits)).filter_map(|(_, entry)| entry.contact()) {
            if contact.position().common_bits(target) > bits && found.len() < REPLICAS {
                found.push(contact.clone());
            } else {
                farthest.push(contact);
            }
        }
        let room = REPLICAS - found.len();
        if farthest.len() > room {
            farthest.select_nth_unstable_by_key(room, |contact| contact.position().distance(target));
            farthest.truncate(room);
        }
        found.extend(farthest.into_iter().cloned());
        found
    }

    /// Of the members that answer questions about storms, so many nearest to a position, the nearest first. They may be few among all.
    pub(super) fn nearest_for_storms(&self, target: &Position, count: usize) -> Vec<Position> {
        let (below, above) = (self.storms.range(..target).rev(), self.storms.range(target..));
        let bits = common_to_closest(target, count, below, above);
        let mut found: Vec<Position> = self.storms.range(target.around(bits)).copied().collect();
        found.sort_unstable_by_key(|position| position.distance(target));
        found.truncate(count);
        found
    }

    /// Whether everyone that is known is near to every key.
    pub(super) fn is_small(&self) -> bool {
        self.known.len() <= REPLICAS
    }

    /// Where the keys lie that a peer may be among the nearest to. For all others there are as many as are told that share more of
    /// their positions.
    pub(super) fn region(&self, peer: &PeerId) -> Vec<RangeInclusive<Position>> {
        let own = Position::of_peer(peer);
        let mut region = Vec::new();
        for bits in 0..256 {
            if self.known.range(own.around(bits)).all(|(at, _)| *at == own) {
                // Nobody else is there.
                region.push(own.around(bits));
                break;
            }
            let branch = own.branch(bits);
            if self.known.range(branch.clone()).take(REPLICAS).count() < REPLICAS {
                region.push(branch);
            }
        }
        region
    }

    fn entry(&self, peer: &PeerId) -> Option<&Entry> {
        self.known.get(&Position::of_peer(peer))
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

/// How many bits the `count` nearest to a position have in common with it at least: the most that so many share, or none if there are not so
/// many. Those who share the most stand beside it on either side, the more the nearer: `below` and `above` go away from it.
fn common_to_closest<'a>(
    target: &Position,
    count: usize,
    below: impl Iterator<Item = &'a Position>,
    above: impl Iterator<Item = &'a Position>,
) -> usize {
    let bits = |at: &Position| target.common_bits(at);
    let (mut below, mut above) = (below.map(bits).peekable(), above.map(bits).peekable());
    let mut last = 0;
    for _ in 0..count {
        let next = if below.peek() > above.peek() { below.next() } else { above.next() };
        let Some(bits) = next else { return 0 };
        last = bits;
    }
    last
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn contact() -> Contact {
        Contact::new(PeerId::random(), &["10.0.0.1:5001".parse().unwrap()])
    }

    fn sorted(mut contacts: Vec<Contact>, target: &Position) -> Vec<Contact> {
        contacts.sort_by_key(|contact| contact.position().distance(target));
        contacts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn closest_are_those_that_sorting_gives(connected in 0..60usize, both in 0..30usize, apart in 0..200usize) {
            let mut table = Table::default();
            let contacts: Vec<Contact> = (0..connected + both + apart).map(|_| contact()).collect();
            for contact in &contacts[..connected + both] {
                prop_assert!(table.insert(contact.clone()));
                prop_assert!(!table.insert(contact.clone()), "once only");
            }
            for contact in &contacts[connected..] {
                table.set_member(contact.clone(), Arc::default());
            }
            let target = Position::of_peer(&PeerId::random());
            let wanted = sorted(contacts.clone(), &target);
            prop_assert_eq!(sorted(table.closest(&target), &target), &wanted[..REPLICAS.min(wanted.len())]);
            if let Some(first) = contacts.first() {
                let region = table.region(&first.peer());
                let inside = region.iter().any(|range| range.contains(&target));
                prop_assert!(inside || !table.closest(&target).contains(first), "near, and outside of the region");
                let found = table.closest(first.position());
                prop_assert!(found.contains(first), "the target itself");
            }
            prop_assert_eq!((table.connected(), table.members()), (connected + both, both + apart));
        }
    }

    /// One of ten answers questions about storms: they are found all the same, the nearest first, and not once they are gone or do not any more.
    #[test]
    fn few_among_many_are_found_for_storms() {
        let mut table = Table::default();
        let contacts: Vec<Contact> = (0..400).map(|_| contact()).collect();
        let speaks = |storms| Arc::new(Traits { storms, ..Traits::default() });
        for (n, contact) in contacts.iter().enumerate() {
            table.set_member(contact.clone(), speaks(n % 10 == 0));
        }
        table.set_member(contacts[0].clone(), speaks(false));
        table.remove_member(&contacts[10].peer());
        let speakers: Vec<Contact> = contacts.iter().step_by(10).skip(2).cloned().collect();
        for _ in 0..50 {
            let target = Position::of_peer(&PeerId::random());
            let wanted: Vec<Position> = sorted(speakers.clone(), &target).iter().map(|one| *one.position()).collect();
            assert_eq!(table.nearest_for_storms(&target, 3), wanted[..3]);
            assert_eq!(table.nearest_for_storms(&target, 100), wanted);
        }
    }

    #[test]
    fn who_leaves_one_way_stays_the_other() {
        let mut table = Table::default();
        let (one, two) = (contact(), contact());
        table.insert(one.clone());
        table.set_member(one.clone(), Arc::default());
        table.set_member(two.clone(), Arc::new(Traits { load: Some(3), ..Traits::default() }));
        assert_eq!(table.traits(&two.peer()).load, Some(3));
        assert_eq!(table.remove(&one.peer()), Some(one.clone()));
        assert_eq!(table.remove(&one.peer()), None);
        assert!(table.is_empty() && table.is_member(&one.peer()) && !table.contains(&one.peer()));
        table.remove_member(&one.peer());
        assert_eq!((table.find(&one.peer()), table.find(&two.peer())), (None, Some(&two)));
        table.insert(two.clone());
        table.remove_member(&two.peer());
        assert!(table.contains(&two.peer()) && !table.is_member(&two.peer()));
        assert_eq!((table.connected(), table.members()), (1, 0));
    }
}
