//! Which peers are not asked for which content, because of what they sent.
//!
//! What is relayed is not hashed here: containerd does that, and asks again for what was wrong. So a digest that is asked for again after all
//! of it was relayed speaks against who sent it.
//!
//! Who was still receiving what it sent could not know that it was wrong: its own containerd finds out at the same time. That is no lie, and
//! what it has verified since is as good as any. But it is not asked for that file again, nor for the digest as long as it receives it if
//! another file of it was wrong as well; and who passes on three wrong ones has an upstream that is not worth following for a while.

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
    complaints: HashMap<SocketAddr, Complaints>,
}

#[derive(Debug, Default)]
struct Record {
    barred: Vec<Entry>,
    senders: Vec<Entry>,
    /// What they sent was seen not to be stored.
    is_discarded: bool,
}

/// A peer, and what of its is meant, for a while.
#[derive(Clone, Copy, Debug)]
struct Entry {
    peer: SocketAddr,
    what: Sent,
    until: Instant,
}

/// When complaints came.
#[derive(Debug, Default)]
struct Complaints {
    /// Of what the peer said it had.
    lies: Vec<Instant>,
    /// Of what it was still receiving.
    passed_on: Vec<Instant>,
}

/// How a peer stood to what it sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It had all of it.
    Complete,
    /// It was receiving it, into this file if it said which.
    Receiving(Option<u64>),
}

/// What a complaint came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Peers that are not asked for this content any more.
    pub(super) barred: Vec<SocketAddr>,
    /// Those of them that are not asked for anything for a while.
    pub(super) outcast: Vec<SocketAddr>,
    /// Peers from which it is not taken any more as long as they are receiving that file.
    pub(super) spoiled: Vec<SocketAddr>,
    /// Peers that may have sent what was right, and are not asked for this content for a minute.
    pub(super) doubted: Vec<SocketAddr>,
}

// === impl Blame ===

impl Blame {
    /// The peer's body broke off.
    pub(super) fn broke(&self, key: &Key, peer: SocketAddr, now: Instant) {
        let mut state = self.lock();
        state.record(key).bar(peer, Sent::Complete, now, now + BROKEN);
    }

    /// The peer sent a body to its end.
    pub(super) fn sent(&self, key: &Key, peer: SocketAddr, what: Sent, now: Instant) {
        let mut state = self.lock();
        let record = state.record(key);
        // That was of what was sent before.
        record.is_discarded = false;
        let senders = &mut record.senders;
        // Of two bodies of the same peer it is unknown which was wrong, so the one counts that is no lie.
        match senders.iter_mut().find(|known| known.peer == peer) {
            Some(known) => {
                known.until = now + SENDERS;
                known.what = if known.what == Sent::Complete { what } else { known.what };
            }
            None => add(senders, Entry { peer, what, until: now + SENDERS }),
        }
    }

    /// The content was stored: whoever sent it sent what was right.
    pub(super) fn confirmed(&self, key: &Key) {
        if let Some(record) = self.lock().records.get_mut(key) {
            record.senders.clear();
            record.is_discarded = false;
        }
    }

    /// Its receiver had all of it and did not store it.
    pub(super) fn discarded(&self, key: &Key) {
        if let Some(record) = self.lock().records.get_mut(key) {
            record.is_discarded = true;
        }
    }

    /// It is asked for again. If it was discarded, the bytes that were sent for it are not those of its digest.
    pub(super) fn again(&self, key: &Key, now: Instant) -> Verdict {
        let mut state = self.lock();
        let Some(record) = state.records.get_mut(key) else { return Verdict::default() };
        record.senders.retain(|sender| now < sender.until);
        let senders = std::mem::take(&mut record.senders);
        if !std::mem::take(&mut record.is_discarded) {
            senders.iter().for_each(|sender| record.bar(sender.peer, sender.what, now, now + BROKEN));
            return Verdict { doubted: senders.into_iter().map(|sender| sender.peer).collect(), ..Verdict::default() };
        }
        senders.iter().for_each(|sender| record.bar(sender.peer, sender.what, now, now + WRONG));
        // Of several it is unknown whose bytes were wrong.
        let alone = senders.first().filter(|_| senders.len() == 1);
        let outcast = alone.filter(|sender| state.complain(sender.peer, sender.what, now)).map(|sender| sender.peer);
        let (barred, spoiled): (Vec<_>, Vec<_>) = senders.into_iter().partition(|sender| sender.what == Sent::Complete);
        let peers = |entries: Vec<Entry>| entries.into_iter().map(|entry| entry.peer).collect();
        let (barred, spoiled) = (peers(barred), peers(spoiled));
        Verdict { barred, outcast: outcast.into_iter().collect(), spoiled, doubted: Vec::new() }
    }

    /// The peer itself was seen to send wrong bytes for it.
    pub(super) fn convicted(&self, key: &Key, peer: SocketAddr, what: Sent, now: Instant) -> Verdict {
        let mut state = self.lock();
        state.record(key).bar(peer, what, now, now + WRONG);
        let outcast = if state.complain(peer, what, now) { vec![peer] } else { Vec::new() };
        match what {
            Sent::Complete => Verdict { barred: vec![peer], outcast, ..Verdict::default() },
            Sent::Receiving(_) => Verdict { spoiled: vec![peer], ..Verdict::default() },
        }
    }

    /// Whether the peer is not to be asked for it.
    pub(super) fn is_barred(&self, key: &Key, peer: SocketAddr, now: Instant) -> bool {
        let state = self.lock();
        state.bars(key, peer, now).any(|what| what == Sent::Complete)
            || state.complaints.get(&peer).is_some_and(|complaints| is_one_too_many(&complaints.lies, now))
    }

    /// Whether it is not to be taken from the peer as long as that is receiving it, into the file that it names.
    pub(super) fn is_spoiled(&self, key: &Key, peer: SocketAddr, file: Option<u64>, now: Instant) -> bool {
        let state = self.lock();
        let is_that = |what| match what {
            Sent::Complete => false,
            // One that says it of one file and not of the next may have only one.
            Sent::Receiving(known) => known.is_none() || file.is_none() || known == file,
        };
        state.bars(key, peer, now).any(is_that)
            || state.complaints.get(&peer).is_some_and(|complaints| is_one_too_many(&complaints.passed_on, now))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn add(list: &mut Vec<Entry>, entry: Entry) {
    if list.len() < PEERS {
        list.push(entry);
    }
}

fn is_one_too_many(times: &[Instant], now: Instant) -> bool {
    times.iter().filter(|at| now.duration_since(**at) < OUTCAST).count() >= STRIKES
}

// === impl Record ===

impl Record {
    fn bar(&mut self, peer: SocketAddr, what: Sent, now: Instant, until: Instant) {
        self.barred.retain(|known| now < known.until);
        if self.barred.len() >= PEERS {
            // The next one counts more than the one that would be let off first.
            let first = (0..self.barred.len()).min_by_key(|n| self.barred[*n].until);
            first.map(|n| self.barred.swap_remove(n));
        }
        let is_same_sort =
            |known: &&mut Entry| known.peer == peer && (known.what == Sent::Complete) == (what == Sent::Complete);
        match self.barred.iter_mut().find(is_same_sort) {
            Some(known) => {
                known.until = until.max(known.until);
                // A second file that was wrong as well: there is no end to files.
                known.what = if known.what == what { what } else { Sent::Receiving(None) };
            }
            None => add(&mut self.barred, Entry { peer, what, until }),
        }
    }
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

    /// What of the peer's is not to be used for this.
    fn bars(&self, key: &Key, peer: SocketAddr, now: Instant) -> impl Iterator<Item = Sent> {
        let barred = self.records.get(key).map(|record| &*record.barred).unwrap_or_default();
        barred.iter().filter(move |entry| entry.peer == peer && now < entry.until).map(|entry| entry.what)
    }

    /// Counts a complaint; true if it is the one too many of those for which a peer is not asked any more.
    fn complain(&mut self, peer: SocketAddr, what: Sent, now: Instant) -> bool {
        let is_recent = |at: &Instant| now.duration_since(*at) < OUTCAST;
        if self.complaints.len() >= CAPACITY {
            self.complaints.retain(|_, known| known.lies.iter().chain(&known.passed_on).any(is_recent));
            if self.complaints.len() >= CAPACITY {
                return false;
            }
        }
        let complaints = self.complaints.entry(peer).or_default();
        let times = match what {
            Sent::Complete => &mut complaints.lies,
            Sent::Receiving(_) => &mut complaints.passed_on,
        };
        times.retain(is_recent);
        if times.len() >= STRIKES {
            return false;
        }
        times.push(now);
        what == Sent::Complete && times.len() >= STRIKES
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

    /// It was discarded and is asked for again.
    fn wrong(blame: &Blame, key: &Key, now: Instant) -> Verdict {
        blame.discarded(key);
        blame.again(key, now)
    }

    #[test]
    fn what_nobody_saw_discarded_is_no_lie() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 0..2 * STRIKES as u32 {
            blame.sent(&key(n), peer(1), Sent::Complete, now);
            let verdict = blame.again(&key(n), now);
            assert_eq!(verdict, Verdict { doubted: vec![peer(1)], ..Verdict::default() });
            assert!(blame.is_barred(&key(n), peer(1), now) && !blame.is_barred(&key(n), peer(1), now + BROKEN));
        }
        assert!(!blame.is_barred(&key(99), peer(1), now));
        blame.sent(&key(99), peer(1), Sent::Complete, now);
        blame.discarded(&key(99));
        blame.confirmed(&key(99));
        assert_eq!(blame.again(&key(99), now), Verdict::default(), "stored in the end");
    }

    #[test]
    fn room_is_made_for_the_next_that_breaks_off() {
        let (blame, now) = (Blame::default(), Instant::now());
        let later = now + BROKEN;
        for n in 1..=PEERS as u32 {
            blame.broke(&key(1), peer(n), now);
        }
        blame.broke(&key(1), peer(100), later);
        assert!(blame.is_barred(&key(1), peer(100), later) && !blame.is_barred(&key(1), peer(1), later));
        for n in 101..=200 {
            blame.broke(&key(1), peer(n), later);
            assert!(blame.is_barred(&key(1), peer(n), later));
        }
        assert_eq!(blame.lock().records[&key(1)].barred.len(), PEERS);
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
        assert_eq!(wrong(&blame, &key(1), now), Verdict::default(), "nobody sent it");
        blame.sent(&key(1), peer(1), Sent::Complete, now);
        blame.sent(&key(1), peer(1), Sent::Complete, now);
        assert_eq!(wrong(&blame, &key(1), now), Verdict { barred: vec![peer(1)], ..Verdict::default() });
        assert!(blame.is_barred(&key(1), peer(1), now) && !blame.is_barred(&key(2), peer(1), now));
        assert_eq!(wrong(&blame, &key(1), now), Verdict::default(), "one relay is one complaint");
        assert!(!blame.is_barred(&key(1), peer(1), now + WRONG));
    }

    #[test]
    fn what_was_stored_or_is_long_ago_speaks_against_nobody() {
        let (blame, now) = (Blame::default(), Instant::now());
        blame.sent(&key(1), peer(1), Sent::Complete, now);
        blame.confirmed(&key(1));
        assert_eq!(wrong(&blame, &key(1), now), Verdict::default());
        blame.sent(&key(1), peer(1), Sent::Complete, now);
        assert_eq!(wrong(&blame, &key(1), now + SENDERS), Verdict::default());
    }

    #[test]
    fn three_complaints_set_a_peer_aside_altogether() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 1..=3 {
            assert!(!blame.is_barred(&key(9), peer(1), now));
            blame.sent(&key(n), peer(1), Sent::Complete, now);
            let outcast = if n == 3 { vec![peer(1)] } else { vec![] };
            assert_eq!(wrong(&blame, &key(n), now), Verdict { barred: vec![peer(1)], outcast, ..Verdict::default() });
        }
        assert!(blame.is_barred(&key(9), peer(1), now));
        assert!(!blame.is_barred(&key(9), peer(1), now + OUTCAST));
    }

    #[test]
    fn of_several_senders_none_is_called_a_liar() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 1..=4 {
            blame.sent(&key(n), peer(1), Sent::Complete, now);
            blame.sent(&key(n), peer(2), Sent::Complete, now);
            let verdict = wrong(&blame, &key(n), now);
            assert_eq!((verdict.barred.len(), verdict.outcast.len()), (2, 0));
        }
        assert!(!blame.is_barred(&key(9), peer(1), now));
        assert_eq!(blame.convicted(&key(5), peer(1), Sent::Complete, now).outcast, []);
    }

    #[test]
    fn what_was_passed_on_unverified_is_no_lie() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 1..=STRIKES as u32 {
            assert!(!blame.is_spoiled(&key(9), peer(1), None, now), "{n}");
            blame.sent(&key(n), peer(1), Sent::Receiving(Some(n.into())), now);
            let spoiled = Verdict { spoiled: vec![peer(1)], ..Verdict::default() };
            assert_eq!(wrong(&blame, &key(n), now), spoiled);
            assert!(!blame.is_barred(&key(n), peer(1), now), "what it has verified since is as good as any");
            assert!(blame.is_spoiled(&key(n), peer(1), Some(n.into()), now), "not that file");
        }
        assert!(!blame.is_barred(&key(9), peer(1), now));
        assert!(blame.is_spoiled(&key(9), peer(1), None, now), "its upstream is not worth following");
        assert!(!blame.is_spoiled(&key(9), peer(1), None, now + OUTCAST));
        assert!(blame.is_spoiled(&key(1), peer(1), Some(1), now + OUTCAST));
        assert!(!blame.is_spoiled(&key(1), peer(1), Some(1), now + WRONG));
    }

    #[test]
    fn another_file_is_another_chance_once() {
        let (blame, now) = (Blame::default(), Instant::now());
        blame.convicted(&key(1), peer(1), Sent::Receiving(Some(1)), now);
        assert!(!blame.is_spoiled(&key(1), peer(1), Some(2), now) && !blame.is_spoiled(&key(1), peer(2), Some(1), now));
        assert!(blame.is_spoiled(&key(1), peer(1), None, now), "it does not say which");
        blame.convicted(&key(1), peer(1), Sent::Receiving(Some(2)), now);
        assert!(blame.is_spoiled(&key(1), peer(1), Some(3), now) && !blame.is_barred(&key(1), peer(1), now));
        blame.convicted(&key(2), peer(2), Sent::Receiving(None), now);
        assert!(blame.is_spoiled(&key(2), peer(2), None, now) && blame.is_spoiled(&key(2), peer(2), Some(1), now));
    }

    #[test]
    fn a_sender_of_both_sorts_is_not_called_a_liar() {
        for kinds in [[Sent::Complete, Sent::Receiving(Some(1))], [Sent::Receiving(Some(1)), Sent::Complete]] {
            let (blame, now) = (Blame::default(), Instant::now());
            kinds.into_iter().for_each(|what| blame.sent(&key(1), peer(1), what, now));
            assert_eq!(wrong(&blame, &key(1), now), Verdict { spoiled: vec![peer(1)], ..Verdict::default() });
        }
    }

    #[test]
    fn memory_is_bounded() {
        let (blame, now) = (Blame::default(), Instant::now());
        for n in 0..2 * CAPACITY as u32 {
            blame.sent(&key(n), peer(n), Sent::Complete, now);
            wrong(&blame, &key(n), now);
        }
        for n in 0..100 {
            blame.sent(&key(0), peer(n), Sent::Complete, now);
        }
        let state = blame.lock();
        assert_eq!((state.records.len(), state.order.len(), state.complaints.len()), (CAPACITY, CAPACITY, CAPACITY));
        assert_eq!(state.records[&key(0)].senders.len(), PEERS);
    }
}
