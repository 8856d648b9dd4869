//! What clients were given, and how a refusal must be said to them because of it.
//!
//! containerd's parallel fetch stays with the host that answered the first chunk of a blob: an error status for a later chunk
//! fails the pull, upstream alive or not. An orderly close instead makes it ask all hosts again from that offset, and then an
//! error status sends it to the next. A second empty body at one offset is never given: three of them fail a pull as well.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::oci::Digest;

/// How long it is remembered that a client was given a blob.
const LIFETIME: Duration = Duration::from_secs(600);
/// How long it is remembered that a client was refused, or cut off, at an offset.
const CLOSED_LIFETIME: Duration = Duration::from_secs(60);
/// How many clients' blobs are remembered.
const CAPACITY: usize = 32 * 1024;
/// How many offsets are remembered of each.
const MAX_CLOSED: usize = 64;

/// Who asks: the node that its header names, else its address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// The node's name.
    Node(Arc<str>),
    /// The address that the request came from.
    Address(IpAddr),
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Node(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// How to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// With an error status.
    Status,
    /// With a success status for content of this many bytes in all, and an orderly close before the first of them.
    Cut {
        /// The blob's length in bytes.
        total: u64,
    },
}

/// The memory of what clients were given. The clock is the caller's.
#[derive(Debug, Default)]
pub(super) struct Promises {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    given: HashMap<(Client, Digest), Given>,
    /// In the order in which they were first given, to make room by.
    order: VecDeque<(Client, Digest)>,
}

#[derive(Debug)]
struct Given {
    total: u64,
    at: Instant,
    closed: VecDeque<(u64, Instant)>,
    /// What was relayed of it: parts that do not touch, in order.
    relayed: Vec<(u64, u64)>,
}

impl Promises {
    /// A success status was sent to `client` for a blob of `total` bytes.
    pub(super) fn given(&self, client: &Client, digest: &Digest, total: u64, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (client.clone(), digest.clone());
        if let Some(given) = state.given.get_mut(&key) {
            given.total = total;
            given.at = now;
            return;
        }
        while state.given.len() >= CAPACITY {
            let Some(oldest) = state.order.pop_front() else { break };
            state.given.remove(&oldest);
        }
        state.order.push_back(key.clone());
        state.given.insert(key, Given { total, at: now, closed: VecDeque::new(), relayed: Vec::new() });
    }

    /// A body for `client` ended before its time, and the next byte would have been the one at `offset`.
    pub(super) fn cut_at(&self, client: &Client, digest: &Digest, offset: u64, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(given) = state.given.get_mut(&(client.clone(), digest.clone())) {
            given.close(offset, now);
        }
    }

    /// `client` was sent the bytes from `start` to `end` of what peers have.
    pub(super) fn relayed(&self, client: &Client, digest: &Digest, start: u64, end: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(given) = state.given.get_mut(&(client.clone(), digest.clone())) {
            given.add(start, end);
        }
    }

    /// `client` asks for the blob from its first byte: whether it had all of it from peers before, of which it is then not accused again.
    pub(super) fn is_complaint(&self, client: &Client, digest: &Digest, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(given) = state.given.get_mut(&(client.clone(), digest.clone())) else { return false };
        let had_all = given.total > 0 && given.relayed == [(0, given.total)];
        given.relayed.clear();
        had_all && now.duration_since(given.at) < LIFETIME
    }

    /// The length in bytes that `client` was told of the blob, lately.
    pub(super) fn total(&self, client: &Client, digest: &Digest, now: Instant) -> Option<u64> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let given = state.given.get(&(client.clone(), digest.clone()))?;
        (now.duration_since(given.at) < LIFETIME).then_some(given.total)
    }

    /// How to tell `client` that it cannot have the blob from `offset` on.
    pub(super) fn refuse(&self, client: &Client, digest: &Digest, offset: u64, now: Instant) -> Refusal {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(given) = state.given.get_mut(&(client.clone(), digest.clone())) else { return Refusal::Status };
        let lapsed = now.duration_since(given.at) >= LIFETIME;
        if lapsed || offset >= given.total || given.is_closed(offset, now) {
            return Refusal::Status;
        }
        given.close(offset, now);
        Refusal::Cut { total: given.total }
    }
}

impl Given {
    fn add(&mut self, start: u64, end: u64) {
        if start >= end || self.relayed.len() >= MAX_CLOSED {
            return;
        }
        self.relayed.push((start, end));
        self.relayed.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(self.relayed.len());
        for &(start, end) in &self.relayed {
            match merged.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => merged.push((start, end)),
            }
        }
        self.relayed = merged;
    }

    fn is_closed(&self, offset: u64, now: Instant) -> bool {
        self.closed.iter().any(|(at, since)| *at == offset && now.duration_since(*since) < CLOSED_LIFETIME)
    }

    fn close(&mut self, offset: u64, now: Instant) {
        if self.closed.len() >= MAX_CLOSED {
            self.closed.pop_front();
        }
        self.closed.push_back((offset, now));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(name: &str) -> Client {
        Client::Node(name.into())
    }

    fn digest(n: u8) -> Digest {
        format!("sha256:{}", hex::encode([n; 32])).parse().unwrap()
    }

    #[test]
    fn who_was_given_nothing_gets_a_status() {
        let promises = Promises::default();
        let now = Instant::now();
        promises.given(&node("a"), &digest(1), 100, now);
        assert_eq!(promises.refuse(&node("b"), &digest(1), 0, now), Refusal::Status);
        assert_eq!(promises.refuse(&node("a"), &digest(2), 0, now), Refusal::Status);
    }

    #[test]
    fn a_chunk_is_cut_once_and_then_refused() {
        let promises = Promises::default();
        let now = Instant::now();
        promises.given(&node("a"), &digest(1), 100, now);
        assert_eq!(promises.refuse(&node("a"), &digest(1), 50, now), Refusal::Cut { total: 100 });
        assert_eq!(promises.refuse(&node("a"), &digest(1), 75, now), Refusal::Cut { total: 100 });
        assert_eq!(promises.refuse(&node("a"), &digest(1), 50, now), Refusal::Status);
        assert_eq!(promises.refuse(&node("a"), &digest(1), 75, now), Refusal::Status);
    }

    #[test]
    fn a_body_that_broke_off_is_the_orderly_close() {
        let promises = Promises::default();
        let now = Instant::now();
        promises.given(&node("a"), &digest(1), 100, now);
        promises.cut_at(&node("a"), &digest(1), 30, now);
        assert_eq!(promises.refuse(&node("a"), &digest(1), 30, now), Refusal::Status);
    }

    #[test]
    fn who_had_all_of_it_and_asks_again_complains() {
        let promises = Promises::default();
        let (now, client) = (Instant::now(), node("a"));
        assert!(!promises.is_complaint(&client, &digest(1), now));
        promises.given(&client, &digest(1), 100, now);
        // The chunks of a parallel fetch, in any order, and each longer than its part.
        for (start, end) in [(50, 90), (0, 40), (80, 100)] {
            promises.relayed(&client, &digest(1), start, end);
            assert!(start != 80 || !promises.is_complaint(&node("b"), &digest(1), now));
        }
        assert!(!promises.is_complaint(&client, &digest(1), now), "ten bytes are from elsewhere");
        promises.relayed(&client, &digest(1), 0, 60);
        promises.relayed(&client, &digest(1), 60, 100);
        assert!(promises.is_complaint(&client, &digest(1), now));
        assert!(!promises.is_complaint(&client, &digest(1), now), "one relay is one complaint");
    }

    #[test]
    fn memory_fades() {
        let promises = Promises::default();
        let start = Instant::now();
        promises.given(&node("a"), &digest(1), 100, start);
        assert_eq!(promises.refuse(&node("a"), &digest(1), 0, start), Refusal::Cut { total: 100 });
        let later = start + CLOSED_LIFETIME;
        assert_eq!(promises.refuse(&node("a"), &digest(1), 0, later), Refusal::Cut { total: 100 });
        assert_eq!(promises.refuse(&node("a"), &digest(1), 1, start + LIFETIME), Refusal::Status);
    }

    #[test]
    fn memory_is_bounded() {
        let promises = Promises::default();
        let now = Instant::now();
        for n in 0..CAPACITY + 10 {
            promises.given(&node(&n.to_string()), &digest(1), 100, now);
            promises.given(&node(&n.to_string()), &digest(1), 100, now);
        }
        for offset in 0..1000 {
            promises.cut_at(&node(&CAPACITY.to_string()), &digest(1), offset, now);
        }
        let state = promises.state.lock().unwrap();
        assert_eq!((state.given.len(), state.order.len()), (CAPACITY, CAPACITY));
        assert_eq!(state.given[&(node(&CAPACITY.to_string()), digest(1))].closed.len(), MAX_CLOSED);
    }
}
