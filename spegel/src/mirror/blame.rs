//! Which peers are not asked for which content, because of what they sent.
//!
//! What is relayed is not hashed here: containerd does that, and asks again for what was wrong. So a digest that is asked for again after all
//! of it was relayed speaks against who sent it.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::oci::Key;

/// How long a peer whose body broke off is not asked for that content.
const BROKEN: Duration = Duration::from_secs(60);
/// How long a peer that sent wrong bytes is not asked for that content.
const WRONG: Duration = Duration::from_secs(3600);
/// How long it is remembered who sent what.
const SENDERS: Duration = Duration::from_secs(600);
/// So many complaints set a peer aside altogether, for this long.
const STRIKES: usize = 3;
const OUTCAST: Duration = Duration::from_secs(600);
/// How many pieces of content are remembered.
const CAPACITY: usize = 8192;
/// How many peers are remembered of each.
const PEERS: usize = 16;

/// The memory of who sent what. The clock is the caller's.
#[derive(Debug, Default)]
pub(super) struct Blame {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<Key, Record>,
    /// In the order in which they came, to make room by.
    order: VecDeque<Key>,
    /// When each peer was complained of.
    complaints: HashMap<SocketAddr, Vec<Instant>>,
}

#[derive(Debug, Default)]
struct Record {
    barred: Vec<(SocketAddr, Instant)>,
    senders: Vec<(SocketAddr, Instant)>,
}

/// What a complaint came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Peers that are not asked for this content any more.
    pub(super) barred: Vec<SocketAddr>,
    /// Those of them that are not asked for anything for a while.
    pub(super) outcast: Vec<SocketAddr>,
}

// === impl Blame ===

impl Blame {
    /// The peer's body broke off.
    pub(super) fn broke(&self, key: &Key, peer: SocketAddr, now: Instant) {
        let mut state = self.lock();
        bar(&mut state.record(key).barred, peer, now + BROKEN);
    }

    /// The peer sent a body to its end.
    pub(super) fn sent(&self, key: &Key, peer: SocketAddr, now: Instant) {
        let mut state = self.lock();
        bar(&mut state.record(key).senders, peer, now + SENDERS);
    }

    /// The content was stored: whoever sent it sent what was right.
    pub(super) fn confirmed(&self, key: &Key) {
        if let Some(record) = self.lock().records.get_mut(key) {
            record.senders.clear();
        }
    }

    /// The bytes that were sent for it are not those of its digest.
    pub(super) fn wrong(&self, key: &Key, now: Instant) -> Verdict {
        let mut state = self.lock();
        let Some(record) = state.records.get_mut(key) else { return Verdict::default() };
        record.senders.retain(|(_, until)| now < *until);
        let senders = std::mem::take(&mut record.senders);
        let barred: Vec<_> = senders.into_iter().map(|(peer, _)| peer).collect();
        for &peer in &barred {
            bar(&mut record.barred, peer, now + WRONG);
        }
        // Of several it is unknown whose bytes were wrong.
        let alone = barred.first().filter(|_| barred.len() == 1);
        let outcast = alone.filter(|peer| state.complain(**peer, now)).copied().into_iter().collect();
        Verdict { barred, outcast }
    }

    /// The peer itself was seen to send wrong bytes for it.
    pub(super) fn convicted(&self, key: &Key, peer: SocketAddr, now: Instant) -> Verdict {
        let mut state = self.lock();
        bar(&mut state.record(key).barred, peer, now + WRONG);
        let outcast = if state.complain(peer, now) { vec![peer] } else { Vec::new() };
        Verdict { barred: vec![peer], outcast }
    }

    /// Whether the peer is not to be asked for it.
    pub(super) fn is_barred(&self, key: &Key, peer: SocketAddr, now: Instant) -> bool {
        let state = self.lock();
        let for_this = state
            .records
            .get(key)
            .is_some_and(|record| record.barred.iter().any(|(barred, until)| *barred == peer && now < *until));
        for_this || state.complaints.get(&peer).is_some_and(|times| is_outcast(times, now))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bar(list: &mut Vec<(SocketAddr, Instant)>, peer: SocketAddr, until: Instant) {
    if let Some((_, known)) = list.iter_mut().find(|(known, _)| *known == peer) {
        *known = until.max(*known);
    } else if list.len() < PEERS {
        list.push((peer, until));
    }
}

fn is_outcast(times: &[Instant], now: Instant) -> bool {
    times.iter().filter(|at| now.duration_since(**at) < OUTCAST).count() >= STRIKES
}

// === impl State ===

impl State {
    fn record(&mut self, key: &Key) -> &mut Record {
        if !self.records.contains_key(key) {
            while self.records.len() >= CAPACITY {
                let Some(oldest) = self.order.pop_front() else { break };
                self.records.remove(&oldest);
            }
            self.order.push_back(key.clone());
        }
        self.records.entry(key.clone()).or_default()
    }

    /// Counts a complaint; true if it is the one too many.
    fn complain(&mut self, peer: SocketAddr, now: Instant) -> bool {
        self.complaints.retain(|_, times| times.iter().any(|at| now.duration_since(*at) < OUTCAST));
        if self.complaints.len() >= CAPACITY {
            return false;
        }
        let times = self.complaints.entry(peer).or_default();
        times.retain(|at| now.duration_since(*at) < OUTCAST);
        if times.len() >= STRIKES {
            return false;
        }
        times.push(now);
        times.len() >= STRIKES
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(n: u32) -> Key {
        Key::Digest(format!("sha256:{n:064x}").parse().unwrap())
    }

    fn peer(n: u32) -> SocketAddr {
        SocketAddr::from((n.to_be_bytes(), 5000))
    }

    #[test]
    fn a_body_that_broke_off_is_held_against_its_peer_for_a_while() {
        let (blame, now) = (Blame::default(), Instant::now());
        blame.broke(&key(1), peer(1), now);
        assert!(blame.is_barred(&key(1), peer(1), now));
        assert!(!blame.is_barred(&key(2), peer(1), now) && !blame.is_barred(&key(1), peer(2), now));
        assert!(!blame.is_barred(&key(1), peer(1), now + BROKEN));
    }

    #[test]
    fn what_is_asked_for_again_speaks_against_its_sender() {
        let (blame, now) = (Blame::default(), Instant::now());
        assert_eq!(blame.wrong(&key(1), now), Verdict::default(), "nobody sent it");
        blame.sent(&key(1), peer(1), now);
        blame.sent(&key(1), peer(1), now);
        assert_eq!(blame.wrong(&key(1), now), Verdict { barred: vec![peer(1)], outcast: vec![] });
        assert!(blame.is_barred(&key(1), peer(1), now) && !blame.is_barred(&key(2), peer(1), now));
        assert_eq!(blame.wrong(&key(1), now), Verdict::default(), "one relay is one complaint");
        assert!(!blame.is_barred(&key(1), peer(1), now + WRONG));
    }

    #[test]
    fn what_was_stored_or_is_long_ago_speaks_against_nobody() {
        let (blame, now) = (Blame::default(), Instant::now());
        blame.sent(&key(1), peer(1), now);
        blame.confirmed(&key(1));
        assert_eq!(blame.wrong(&key(1), now), Verdict::default());
        blame.sent(&key(1), peer(1), now);
        assert_eq!(blame.wrong(&key(1), now + SENDERS), Verdict::default());
    }

    #[test]
    fn three_complaints_set_a_peer_aside_altogether() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 1..=3 {
            assert!(!blame.is_barred(&key(9), peer(1), now));
            blame.sent(&key(n), peer(1), now);
            let outcast = if n == 3 { vec![peer(1)] } else { vec![] };
            assert_eq!(blame.wrong(&key(n), now), Verdict { barred: vec![peer(1)], outcast });
        }
        assert!(blame.is_barred(&key(9), peer(1), now));
        assert!(!blame.is_barred(&key(9), peer(1), now + OUTCAST));
    }

    #[test]
    fn of_several_senders_none_is_called_a_liar() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 1..=4 {
            blame.sent(&key(n), peer(1), now);
            blame.sent(&key(n), peer(2), now);
            let verdict = blame.wrong(&key(n), now);
            assert_eq!((verdict.barred.len(), verdict.outcast.len()), (2, 0));
        }
        assert!(!blame.is_barred(&key(9), peer(1), now));
        assert_eq!(blame.convicted(&key(5), peer(1), now).outcast, []);
    }

    #[test]
    fn memory_is_bounded() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 0..2 * CAPACITY as u32 {
            blame.sent(&key(n), peer(n), now);
            blame.wrong(&key(n), now);
        }
        for n in 0..100 {
            blame.sent(&key(0), peer(n), now);
        }
        let state = blame.lock();
        assert_eq!((state.records.len(), state.order.len(), state.complaints.len()), (CAPACITY, CAPACITY, CAPACITY));
        assert_eq!(state.records[&key(0)].senders.len(), PEERS);
    }
}
