//! The walk towards a key: whom to ask next, and when it is over. Messages and a clock go in, questions come out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::keys::{Distance, Position};
use super::table::{Contact, REPLICAS};

/// How many are asked at once. In a network of no more than this all are.
const PARALLEL: usize = 6;

/// A peer that has not answered after this long no longer holds up the others, though its answer is still welcome.
const SLOW: Duration = Duration::from_millis(150);

/// How many peers a walk remembers: more only come from a peer that makes them up.
const MAX_CANDIDATES: usize = 128;

/// One walk. It has arrived when the nearest [`REPLICAS`] peers that it knows have answered or failed.
#[derive(Debug)]
pub(super) struct Walk {
    local: Position,
    target: Position,
    candidates: BTreeMap<Distance, Candidate>,
    /// Those that were asked or told us nothing: they are not asked again when others name them.
    failed: BTreeSet<Distance>,
}

#[derive(Clone, Debug)]
struct Candidate {
    contact: Contact,
    state: State,
    /// How many have to be asked one after the other to have its answer: one if it was known at the start.
    hops: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Asked(Instant),
    Answered,
}

// === impl Walk ===

impl Walk {
    /// A walk of the node at `local`, which is never asked itself.
    pub(super) fn new(local: Position, target: Position, known: Vec<Contact>) -> Self {
        let mut walk = Self { local, target, candidates: BTreeMap::new(), failed: BTreeSet::new() };
        walk.learn(known, 1);
        walk
    }

    /// Whom to ask now. Asked until it gives nobody.
    pub(super) fn next(&mut self, now: Instant) -> Option<Contact> {
        let slow = |asked: &Instant| now.duration_since(*asked) >= SLOW;
        let mut asking = 0;
        for Candidate { contact, state, .. } in self.candidates.values_mut().take(REPLICAS) {
            match state {
                State::New if asking < PARALLEL => {
                    *state = State::Asked(now);
                    return Some(contact.clone());
                }
                State::Asked(asked) if !slow(asked) => asking += 1,
                State::New | State::Asked(_) | State::Answered => {}
            }
        }
        None
    }

    /// A peer answered, and named others nearer to the key.
    pub(super) fn answered(&mut self, peer: &Contact, closer: Vec<Contact>) {
        let hops = self.hops(peer).saturating_add(1);
        if let Some(candidate) = self.candidates.get_mut(&self.distance(peer)) {
            candidate.state = State::Answered;
        }
        self.learn(closer, hops);
    }

    /// How many peers in a row were asked to have this one's answer.
    pub(super) fn hops(&self, peer: &Contact) -> u8 {
        self.candidates.get(&self.distance(peer)).map_or(1, |candidate| candidate.hops)
    }

    /// A peer could not be asked, or did not answer: the next nearest takes its place.
    pub(super) fn failed(&mut self, peer: &Contact) {
        let distance = self.distance(peer);
        self.candidates.remove(&distance);
        if self.failed.len() < MAX_CANDIDATES {
            self.failed.insert(distance);
        }
    }

    /// Whether the nearest have all answered.
    pub(super) fn is_over(&self) -> bool {
        self.candidates.values().take(REPLICAS).all(|candidate| candidate.state == State::Answered)
    }

    /// How long until a peer that was asked counts as slow, if one is waited for.
    pub(super) fn patience(&self, now: Instant) -> Option<Duration> {
        let asked = self.candidates.values().filter_map(|candidate| match candidate.state {
            State::Asked(asked) => (asked + SLOW).checked_duration_since(now),
            State::New | State::Answered => None,
        });
        asked.filter(|left| !left.is_zero()).min()
    }

    fn distance(&self, peer: &Contact) -> Distance {
        peer.position().distance(&self.target)
    }

    fn learn(&mut self, contacts: Vec<Contact>, hops: u8) {
        for contact in contacts {
            let distance = self.distance(&contact);
            let usable = *contact.position() != self.local && !contact.addresses().is_empty();
            if usable && !self.failed.contains(&distance) {
                self.candidates.entry(distance).or_insert(Candidate { contact, state: State::New, hops });
            }
        }
        while self.candidates.len() > MAX_CANDIDATES {
            self.candidates.pop_last();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::{HashMap, HashSet};

    use libp2p::PeerId;
    use proptest::prelude::*;

    use super::*;
    use crate::router::p2p::keys::ContentId;

    fn contacts(count: usize) -> Vec<Contact> {
        let address = ["10.0.0.1:1".parse().unwrap()];
        (0..count).map(|_| Contact::new(PeerId::random(), &address)).collect()
    }

    fn target() -> Position {
        ContentId::of(&format!("sha256:{:064x}", 7).parse().unwrap()).position()
    }

    fn walk(known: Vec<Contact>) -> Walk {
        Walk::new(Position::of_peer(&PeerId::random()), target(), known)
    }

    fn ask_all(walk: &mut Walk, now: Instant) -> Vec<Contact> {
        std::iter::from_fn(|| walk.next(now)).collect()
    }

    #[test]
    fn few_are_asked_at_once_and_their_answers_end_it() {
        let known = contacts(2);
        let mut walk = walk(known.clone());
        let now = Instant::now();
        let asked = ask_all(&mut walk, now);
        assert_eq!(asked.len(), 2);
        walk.answered(&asked[0], known.clone());
        assert!(!walk.is_over());
        walk.answered(&asked[1], known);
        assert!(walk.is_over());
        assert_eq!(walk.patience(now), None);
        assert_eq!(walk.hops(&asked[1]), 1);
    }

    #[test]
    fn nobody_known_is_over_at_once() {
        assert!(walk(Vec::new()).is_over());
    }

    #[test]
    fn a_slow_peer_does_not_hold_up_the_others() {
        let mut walk = walk(contacts(20));
        let now = Instant::now();
        assert_eq!(ask_all(&mut walk, now).len(), PARALLEL);
        assert_eq!(walk.patience(now), Some(SLOW));
        assert_eq!(ask_all(&mut walk, now + SLOW / 2).len(), 0);
        assert_eq!(ask_all(&mut walk, now + SLOW).len(), PARALLEL, "as many again");
    }

    #[test]
    fn the_dead_are_replaced_and_not_asked_again() {
        let known = contacts(40);
        let mut walk = walk(known.clone());
        let now = Instant::now();
        let mut asked = HashSet::new();
        while let Some(contact) = walk.next(now) {
            assert!(asked.insert(contact.peer()), "asked twice");
            walk.failed(&contact);
            walk.learn(known.clone(), 2);
        }
        assert_eq!(asked.len(), 40);
        assert!(walk.is_over());
    }

    #[test]
    fn made_up_peers_are_bounded_and_ourselves_never_asked() {
        let known = contacts(1);
        let mut walk = walk(known.clone());
        let mut named = contacts(1000);
        walk.local = *named[0].position();
        named[1] = Contact::new(PeerId::random(), &[]);
        walk.answered(&known[0], named.clone());
        assert!(walk.candidates.len() <= MAX_CANDIDATES);
        assert!(walk.candidates.values().all(|candidate| !named[..2].contains(&candidate.contact)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// In a network where everyone knows the thirty before it and few are dead, the walk arrives at the nearest.
        #[test]
        fn it_arrives_at_the_nearest(count in 30..120usize, dead in proptest::collection::hash_set(0..119usize, 0..8)) {
            let mut all = contacts(count);
            all.sort_by_key(|contact| contact.position().distance(&target()));
            let rank: HashMap<PeerId, usize> = all.iter().enumerate().map(|(rank, c)| (c.peer(), rank)).collect();
            let living: Vec<usize> = (0..count).filter(|rank| !dead.contains(rank)).collect();
            let start = *living.last().unwrap();
            let mut walk = walk(vec![all[start].clone()]);
            let now = Instant::now();
            let mut answered = HashSet::new();
            while let Some(contact) = walk.next(now) {
                let rank = rank[&contact.peer()];
                if dead.contains(&rank) {
                    walk.failed(&contact);
                } else {
                    answered.insert(rank);
                    walk.answered(&contact, all[rank.saturating_sub(30)..rank.max(30)].to_vec());
                }
            }
            prop_assert!(walk.is_over());
            prop_assert!(living.iter().take(REPLICAS).all(|rank| answered.contains(rank)));
        }
    }
}
