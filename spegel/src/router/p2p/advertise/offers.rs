//! What this node offers, and who has yet to hear what of it. A view of the peers goes in, a plan of who is told what comes out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::ops::{Bound, RangeInclusive};
use std::time::Instant;

use libp2p::PeerId;

use super::super::keys::{ContentId, Position};
use super::super::members::{MAX_KEYS, Message};
use super::super::table::{Contact, REPLICAS, Table};

/// How many fresh keys, or keys for newcomers, are taken at once: what is planned and not sent yet has twenty times as many ids.
const BATCH: usize = 5_000;

/// How many keys are placed before other tasks get their turn.
const CHUNK: usize = 1_024;

/// How many withdrawn keys wait to be told. More are left to expire.
const MAX_WITHDRAWN: usize = 100_000;

/// What we offer, and what of it the peers have yet to hear. In the order of the key space, so that neighbours, which are
/// told to the same peers, go together.
#[derive(Debug, Default)]
pub(in super::super) struct Offers {
    keys: BTreeMap<Position, ContentId>,
    fresh: BTreeSet<Position>,
    /// The last key that was told again in its turn.
    cursor: Option<Position>,
    /// Those who are told all that they are near to, after the one who is being told that.
    newcomers: BTreeSet<PeerId>,
    pass: Option<Pass>,
    /// What members are to be told that we offer no more.
    withdrawn: Vec<ContentId>,
    /// Since when something is fresh.
    fresh_since: Option<Instant>,
    /// How many members there were when everything was told to the nearest of them.
    placed: usize,
}

/// What is left to be looked through for one newcomer.
#[derive(Debug)]
struct Pass {
    newcomer: PeerId,
    ranges: VecDeque<RangeInclusive<Position>>,
}

/// What is to be told next, and to whom is to be found out.
#[derive(Debug, Default)]
pub(in super::super) struct Batch {
    /// To those nearest to each.
    offered: Vec<ContentId>,
    withdrawn: Vec<ContentId>,
    /// To these newcomers, as far as they are among the nearest.
    near: Vec<(PeerId, ContentId)>,
}

/// For each peer what it is to be told.
pub(in super::super) type Plan = BTreeMap<PeerId, Told>;

/// What one peer is to be told.
#[derive(Debug)]
pub(in super::super) struct Told {
    pub(in super::super) contact: Contact,
    pub(in super::super) offered: Vec<ContentId>,
    pub(in super::super) withdrawn: Vec<ContentId>,
}

// === impl Offers ===

impl Offers {
    pub(in super::super) fn add(&mut self, now: Instant, id: ContentId) {
        let position = id.position();
        if self.keys.insert(position, id).is_none() {
            self.fresh.insert(position);
            self.fresh_since.get_or_insert(now);
        }
    }

    pub(in super::super) fn remove(&mut self, id: &ContentId) {
        let position = id.position();
        let told = !self.fresh.remove(&position);
        if self.keys.remove(&position).is_some() && told && self.withdrawn.len() < MAX_WITHDRAWN {
            self.withdrawn.push(*id);
        }
    }

    /// A peer came that is to hear all that it is near to.
    pub(in super::super) fn newcomer(&mut self, peer: PeerId) {
        self.newcomers.insert(peer);
    }

    /// Everything is to be told to everyone again.
    pub(in super::super) fn tell_all(&mut self) {
        self.fresh = self.keys.keys().copied().collect();
    }

    /// So many members are known now. A list that has doubled came to a node that knew few of those nearest to its keys: they are to
    /// hear of them now, and not in the course of the next round. True if so.
    pub(in super::super) fn grown(&mut self, members: usize) -> bool {
        let grown = members > REPLICAS && members >= 2 * self.placed;
        self.placed = if grown { members } else { self.placed.min(members) };
        if grown {
            self.tell_all();
        }
        grown && !self.keys.is_empty()
    }

    /// What the keys take, in bytes.
    #[cfg(test)]
    pub(in super::super) fn memory(&self) -> usize {
        self.keys.len() * size_of::<(Position, ContentId)>() * 3 / 2
    }

    /// How many keys nobody has been told of, and since when there are such.
    pub(in super::super) fn waiting(&self) -> (usize, Option<Instant>) {
        (self.fresh.len(), self.fresh_since)
    }

    /// Whether nothing is to be told but in its turn.
    pub(in super::super) fn is_idle(&self) -> bool {
        self.fresh.is_empty() && self.withdrawn.is_empty() && self.newcomers.is_empty() && self.pass.is_none()
    }

    /// The next of what is to be told; with `rounds`, the keys whose turn it is if all are to have theirs within so many.
    pub(in super::super) fn take(&mut self, rounds: Option<usize>, table: &Table) -> Batch {
        let mut offered = rounds.map_or_else(Vec::new, |rounds| self.take_due(rounds));
        offered.extend(self.take_fresh());
        let withdrawn = self.take_withdrawn();
        Batch { offered, withdrawn, near: self.take_near(table) }
    }

    fn take_fresh(&mut self) -> Vec<ContentId> {
        let taken = match self.fresh.iter().nth(BATCH).copied() {
            Some(next) => {
                let rest = self.fresh.split_off(&next);
                std::mem::replace(&mut self.fresh, rest)
            }
            None => {
                self.fresh_since = None;
                std::mem::take(&mut self.fresh)
            }
        };
        taken.iter().filter_map(|position| self.keys.get(position)).copied().collect()
    }

    /// The next keys in turn, so many that all had theirs after `rounds`.
    fn take_due(&mut self, rounds: usize) -> Vec<ContentId> {
        let count = self.keys.len().div_ceil(rounds.max(1));
        let start = self.cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.keys.range((start, Bound::Unbounded));
        let due: Vec<_> = behind.chain(self.keys.iter()).take(count).map(|(at, id)| (*at, *id)).collect();
        self.cursor = due.last().map(|(position, _)| *position);
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// What has come back since is not taken back.
    fn take_withdrawn(&mut self) -> Vec<ContentId> {
        let rest = self.withdrawn.split_off(self.withdrawn.len().min(BATCH));
        let mut taken = std::mem::replace(&mut self.withdrawn, rest);
        taken.retain(|id| !self.keys.contains_key(&id.position()));
        taken
    }

    fn take_near(&mut self, table: &Table) -> Vec<(PeerId, ContentId)> {
        let mut near = Vec::new();
        while near.len() < BATCH {
            let Some(mut pass) = self.pass.take().or_else(|| self.next_pass(table)) else { break };
            while let Some(range) = pass.ranges.pop_front() {
                let room = BATCH - near.len();
                let mut last = None;
                for (at, id) in self.keys.range(range.clone()).take(room) {
                    near.push((pass.newcomer, *id));
                    last = Some(at);
                }
                if let Some(last) = last.filter(|_| near.len() == BATCH) {
                    // The last one is told twice, which needs no successor of a position.
                    pass.ranges.push_front(*last..=*range.end());
                    self.pass = (last < range.end() || !pass.ranges.is_empty()).then_some(pass);
                    return near;
                }
            }
        }
        near
    }

    fn next_pass(&mut self, table: &Table) -> Option<Pass> {
        let newcomer = self.newcomers.pop_first()?;
        // One that has left meanwhile is told nothing.
        let region = if table.find(&newcomer).is_some() { table.region(&newcomer) } else { Vec::new() };
        Some(Pass { newcomer, ranges: region.into() })
    }
}

// === impl Batch ===

impl Batch {
    pub(in super::super) fn is_empty(&self) -> bool {
        self.offered.is_empty() && self.withdrawn.is_empty() && self.near.is_empty()
    }

    /// Adds who is to be told of some of the keys to the plan. Called until the batch is empty, with pauses for others.
    pub(in super::super) fn place(&mut self, table: &Table, plan: &mut Plan) {
        for id in next(&mut self.offered) {
            for contact in table.closest(&id.position()) {
                told(plan, contact).offered.push(id);
            }
        }
        // Only members know how to take something back. Others forget it when it expires.
        for id in next(&mut self.withdrawn) {
            for contact in table.closest(&id.position()).into_iter().filter(|one| table.is_member(&one.peer())) {
                told(plan, contact).withdrawn.push(id);
            }
        }
        for (newcomer, id) in next(&mut self.near) {
            let near = if table.is_small() {
                table.find(&newcomer).cloned()
            } else {
                table.closest(&id.position()).into_iter().find(|contact| contact.peer() == newcomer)
            };
            near.into_iter().for_each(|contact| told(plan, contact).offered.push(id));
        }
    }
}

fn next<T>(ids: &mut Vec<T>) -> Vec<T> {
    ids.split_off(ids.len().saturating_sub(CHUNK))
}

fn told(plan: &mut Plan, contact: Contact) -> &mut Told {
    plan.entry(contact.peer()).or_insert_with(|| Told { contact, offered: Vec::new(), withdrawn: Vec::new() })
}

// === impl Told ===

impl Told {
    /// In as few messages as a member understands.
    pub(in super::super) fn messages(&self, own: &[SocketAddr]) -> Vec<Message> {
        let withdrawn = self.withdrawn.chunks(MAX_KEYS).map(Message::withdraw);
        withdrawn.chain(self.offered.chunks(MAX_KEYS).map(|ids| Message::offer(own, ids))).collect()
    }

    /// Adds what came later: the newest word on a key counts.
    pub(super) fn add(&mut self, later: Self) {
        let (offered, withdrawn): (BTreeSet<_>, BTreeSet<_>) =
            (later.offered.into_iter().collect(), later.withdrawn.into_iter().collect());
        self.offered.retain(|id| !withdrawn.contains(id) && !offered.contains(id));
        self.withdrawn.retain(|id| !withdrawn.contains(id) && !offered.contains(id));
        self.offered.extend(offered);
        self.withdrawn.extend(withdrawn);
        self.contact = later.contact;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn id(n: usize) -> ContentId {
        ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
    }

    fn offers(count: usize) -> Offers {
        let mut offers = Offers::default();
        (0..count).for_each(|n| offers.add(Instant::now(), id(n)));
        offers
    }

    fn contact() -> Contact {
        Contact::new(PeerId::random(), &["10.0.0.1:5001".parse().unwrap()])
    }

    fn plan(batch: &mut Batch, table: &Table) -> Plan {
        let mut plan = Plan::new();
        while !batch.is_empty() {
            batch.place(table, &mut plan);
        }
        plan
    }

    #[test]
    fn what_is_added_is_told_once_and_what_is_removed_is_not() {
        let mut offers = offers(3);
        offers.remove(&id(1));
        assert_eq!(offers.take_fresh().into_iter().collect::<HashSet<_>>(), HashSet::from([id(0), id(2)]));
        offers.add(Instant::now(), id(0));
        assert_eq!(offers.take_fresh(), []);
        offers.remove(&id(0));
        offers.add(Instant::now(), id(0));
        assert_eq!(offers.take_fresh(), [id(0)]);
        assert_eq!(offers.take_withdrawn(), [], "it came back");
    }

    #[test]
    fn nothing_is_due_where_nothing_is_offered() {
        assert!(Offers::default().take(Some(10), &Table::default()).is_empty());
    }

    #[test]
    fn a_hundred_thousand_keys_are_told_in_parts() {
        let mut offers = offers(100_000);
        let mut table = Table::default();
        let newcomer = contact();
        table.insert(newcomer.clone());
        let (mut told, mut largest) = (HashSet::new(), 0);
        while !offers.is_idle() {
            let batch = offers.take(None, &table);
            largest = largest.max(batch.offered.len());
            told.extend(batch.offered);
        }
        assert_eq!((told.len(), largest), (100_000, BATCH));
        offers.newcomer(newcomer.peer());
        let (mut told, mut largest) = (HashSet::new(), 0);
        while !offers.is_idle() {
            let batch = offers.take(None, &table);
            largest = largest.max(batch.near.len());
            told.extend(batch.near);
        }
        assert_eq!((told.len(), largest), (100_000, BATCH));
    }

    #[test]
    fn a_newcomer_hears_what_it_is_near_to() {
        let mut table = Table::default();
        let contacts: Vec<Contact> = (0..200).map(|_| contact()).collect();
        for contact in &contacts {
            table.insert(contact.clone());
        }
        let mut offers = offers(1_000);
        while !offers.is_idle() {
            offers.take(None, &table);
        }
        let newcomer = &contacts[7];
        offers.newcomer(newcomer.peer());
        offers.newcomer(PeerId::random());
        let mut batch = offers.take(None, &table);
        assert!(batch.near.len() < 500, "most keys are not even looked at: {}", batch.near.len());
        let mut plan = plan(&mut batch, &table);
        let told: HashSet<ContentId> = plan.remove(&newcomer.peer()).unwrap().offered.into_iter().collect();
        let near = |n: &usize| table.closest(&id(*n).position()).contains(newcomer);
        assert_eq!(told, (0..1_000).filter(near).map(id).collect());
        assert!(plan.is_empty() && offers.is_idle(), "and nobody else hears anything");
    }

    #[test]
    fn a_list_that_doubles_has_everything_told_again() {
        let mut offers = offers(10);
        offers.take(None, &Table::default());
        assert!(!offers.grown(REPLICAS), "so few are all connected");
        for (members, wanted) in [(21, true), (41, false), (42, true), (20, false), (42, true), (42, false)] {
            assert_eq!(offers.grown(members), wanted, "{members}");
            assert_eq!(offers.take(None, &Table::default()).offered.len(), if wanted { 10 } else { 0 });
        }
    }

    #[test]
    fn the_newest_word_on_a_key_counts() {
        let told = |offered: &[usize], withdrawn: &[usize]| Told {
            contact: contact(),
            offered: offered.iter().copied().map(id).collect(),
            withdrawn: withdrawn.iter().copied().map(id).collect(),
        };
        let mut one = told(&[1, 2], &[3, 4]);
        one.add(told(&[3], &[1, 4]));
        assert_eq!(
            (one.offered, one.withdrawn.into_iter().collect::<HashSet<_>>()),
            (vec![id(2), id(3)], [1, 4].map(id).into())
        );
    }

    proptest! {
        #[test]
        fn every_key_has_its_turn(keys in 1..300usize, rounds in 1..100usize, more in 0..50usize) {
            let mut offers = offers(keys);
            let mut told = HashSet::new();
            for round in 0..rounds {
                let due = offers.take_due(rounds);
                prop_assert!(due.len() <= (keys + more).div_ceil(rounds));
                told.extend(due);
                if round == rounds / 2 {
                    (0..more).for_each(|n| offers.add(Instant::now(), id(10_000 + n)));
                }
            }
            // What came meanwhile was told as fresh, and may have taken some turns: they come next.
            while told.len() < keys + more {
                let before = told.len();
                let due = offers.take_due(1);
                told.extend(due);
                prop_assert!(told.len() > before);
            }
        }
    }
}
