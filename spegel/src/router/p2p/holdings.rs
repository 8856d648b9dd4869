//! Who told what when, in 64 bytes a record: a slab with a ring for each key and a chain through all by age, and a table of the rings'
//! last slots.
//!
//! A ring is in the order in which its records were told. Whoever tells again has mostly not done so for the longest, and so is first in
//! its ring: of many providers few are looked at.

use std::hash::{BuildHasher, RandomState};

use hashbrown::HashTable;

use super::keys::ContentId;

/// No slot.
const NONE: u32 = u32::MAX;

/// One record.
#[derive(Clone, Copy)]
struct Slot {
    id: ContentId,
    provider: u32,
    /// In seconds since the epoch of the store.
    told: u32,
    /// The next of the same key, the first after the last; or the next free one.
    next: u32,
    older: u32,
    newer: u32,
}

/// A record as it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holding {
    pub(super) provider: u32,
    pub(super) told: u32,
}

/// The records of others by key and by age.
pub(super) struct Holdings {
    slots: Vec<Slot>,
    free: u32,
    count: usize,
    lasts: HashTable<u32>,
    hasher: RandomState,
    oldest: u32,
    newest: u32,
}

// === impl Holdings ===

impl Holdings {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: NONE,
            count: 0,
            lasts: HashTable::new(),
            hasher: RandomState::new(),
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// What is held for a key.
    pub(super) fn of(&self, id: &ContentId) -> impl Iterator<Item = Holding> + '_ {
        let last = self.last(id);
        let mut at = last.map(|last| self.slots[last as usize].next);
        std::iter::from_fn(move || {
            let slot = self.slots[at? as usize];
            at = if at == last { None } else { Some(slot.next) };
            Some(Holding { provider: slot.provider, told: slot.told })
        })
    }

    /// The one told the longest ago.
    pub(super) fn oldest(&self) -> Option<(ContentId, Holding)> {
        let slot = self.slots.get(self.oldest as usize)?;
        Some((slot.id, Holding { provider: slot.provider, told: slot.told }))
    }

    /// Makes a record of this provider the newest. False if there is none.
    pub(super) fn renew(&mut self, id: &ContentId, provider: u32, told: u32) -> bool {
        let Some((before, at, last)) = self.find(id, provider) else { return false };
        if at != last {
            // The first becomes the last by being called so.
            if before != last {
                self.slots[before as usize].next = self.slots[at as usize].next;
                let first = std::mem::replace(&mut self.slots[last as usize].next, at);
                self.slots[at as usize].next = first;
            }
            self.set_last(id, at);
        }
        self.unlink_age(at);
        self.slots[at as usize].told = told;
        self.link_newest(at);
        true
    }

    /// Adds a record that is not there yet.
    pub(super) fn add(&mut self, id: ContentId, provider: u32, told: u32) {
        let last = self.last(&id);
        let at = self.place(Slot { id, provider, told, next: NONE, older: NONE, newer: NONE });
        if let Some(last) = last {
            let first = std::mem::replace(&mut self.slots[last as usize].next, at);
            self.slots[at as usize].next = first;
            self.set_last(&id, at);
        } else {
            self.slots[at as usize].next = at;
            let (slots, hasher) = (&self.slots, &self.hasher);
            let hash = |at: &u32| hasher.hash_one(slots[*at as usize].id);
            self.lasts.insert_unique(hasher.hash_one(id), at, hash);
        }
        self.link_newest(at);
        self.count += 1;
    }

    /// Takes out the record of this provider. False if there is none.
    pub(super) fn remove(&mut self, id: &ContentId, provider: u32) -> bool {
        let Some((before, at, last)) = self.find(id, provider) else { return false };
        if before == at {
            let (slots, hash) = (&self.slots, self.hasher.hash_one(id));
            if let Ok(entry) = self.lasts.find_entry(hash, |last| slots[*last as usize].id == *id) {
                entry.remove();
            }
        } else {
            self.slots[before as usize].next = self.slots[at as usize].next;
            if at == last {
                self.set_last(id, before);
            }
        }
        self.unlink_age(at);
        self.slots[at as usize].next = self.free;
        self.free = at;
        self.count -= 1;
        if self.count == 0 {
            *self = Self { hasher: self.hasher.clone(), ..Self::new() };
        }
        true
    }

    /// Reads what adding these will read: all rings a step at a time. A thousand simulated nodes do not fit into a processor's cache, and
    /// reads that do not wait for each other are waited for together.
    #[cfg(test)]
    pub(super) fn touch(&self, ids: &[ContentId]) -> u32 {
        let mut rings: Vec<(u32, u32)> = ids.iter().filter_map(|id| self.last(id)).map(|last| (last, last)).collect();
        let mut sum = 0;
        while !rings.is_empty() {
            rings.retain_mut(|(at, last)| {
                let slot = &self.slots[*at as usize];
                sum ^= slot.provider;
                *at = slot.next;
                at != last
            });
        }
        sum
    }

    /// What it takes now, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>() + self.lasts.allocation_size()
    }

    /// The last slot of a key's ring.
    fn last(&self, id: &ContentId) -> Option<u32> {
        self.lasts.find(self.hasher.hash_one(id), |last| self.slots[*last as usize].id == *id).copied()
    }

    fn set_last(&mut self, id: &ContentId, at: u32) {
        let (slots, hash) = (&self.slots, self.hasher.hash_one(id));
        if let Some(last) = self.lasts.find_mut(hash, |last| slots[*last as usize].id == *id) {
            *last = at;
        }
    }

    /// The slot, the one before it in its ring, and the ring's last.
    fn find(&self, id: &ContentId, provider: u32) -> Option<(u32, u32, u32)> {
        let last = self.last(id)?;
        let mut before = last;
        loop {
            let at = self.slots[before as usize].next;
            if self.slots[at as usize].provider == provider {
                return Some((before, at, last));
            }
            if at == last {
                return None;
            }
            before = at;
        }
    }

    fn place(&mut self, slot: Slot) -> u32 {
        if let Some(free) = self.slots.get_mut(self.free as usize) {
            let at = std::mem::replace(&mut self.free, free.next);
            *free = slot;
            return at;
        }
        // Doubling would leave half of the memory unused.
        if self.slots.len() == self.slots.capacity() {
            self.slots.reserve_exact((self.slots.len() / 16).max(256));
        }
        self.slots.push(slot);
        // The number of records is bounded by a setting that is read as far less.
        u32::try_from(self.slots.len() - 1).unwrap_or(NONE)
    }

    fn link_newest(&mut self, at: u32) {
        let before = std::mem::replace(&mut self.newest, at);
        match self.slots.get_mut(before as usize) {
            Some(slot) => slot.newer = at,
            None => self.oldest = at,
        }
        let slot = &mut self.slots[at as usize];
        (slot.older, slot.newer) = (before, NONE);
    }

    fn unlink_age(&mut self, at: u32) {
        let Slot { older, newer, .. } = self.slots[at as usize];
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn id(n: u32) -> ContentId {
        ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
    }

    /// The promise of the setting's documentation, where it is dearest: one provider for each key.
    #[test]
    fn a_record_takes_64_bytes_at_most() {
        let mut holdings = Holdings::new();
        for n in 0..300_000_u32 {
            let mut hash = [0; 32];
            hash[..4].copy_from_slice(&n.to_le_bytes());
            holdings.add(ContentId::from_hash(hash), n % 3_000, n / 1_000);
        }
        let each = holdings.memory() as f64 / 300_000.0;
        println!("{each:.1} bytes a record");
        assert!(each <= 64.0, "{each} bytes");
    }

    proptest! {
        #[test]
        fn it_is_a_map_with_an_order(steps in proptest::collection::vec((0..3_u8, 0..6_u32, 0..5_u32), 0..200)) {
            let mut holdings = Holdings::new();
            let mut model: BTreeMap<(u32, u32), u32> = BTreeMap::new();
            for (now, (what, key, provider)) in (0_u32..).zip(steps) {
                let known = model.contains_key(&(key, provider));
                match what {
                    0 if known => prop_assert!(holdings.renew(&id(key), provider, now)),
                    0 => {
                        prop_assert!(!holdings.renew(&id(key), provider, now));
                        holdings.add(id(key), provider, now);
                    }
                    1 => prop_assert_eq!(holdings.remove(&id(key), provider), known),
                    _ => {
                        let oldest = model.iter().min_by_key(|(_, told)| **told).map(|(at, told)| (*at, *told));
                        let found = holdings.oldest().map(|(id, held)| (id, held.provider, held.told));
                        prop_assert_eq!(found, oldest.map(|((key, provider), told)| (id(key), provider, told)));
                    }
                }
                match what {
                    0 => { model.insert((key, provider), now); }
                    1 => { model.remove(&(key, provider)); }
                    _ => {}
                }
                prop_assert_eq!(holdings.len(), model.len());
                let mut held: Vec<_> = holdings.of(&id(key)).map(|held| (held.provider, held.told)).collect();
                prop_assert!(held.is_sorted_by_key(|(_, told)| *told), "the longest ago first");
                held.sort_unstable();
                let expected: Vec<_> = model.range((key, 0)..(key + 1, 0)).map(|((_, p), told)| (*p, *told)).collect();
                prop_assert_eq!(held, expected);
            }
        }
    }
}
