//! What is remembered of peers: who failed lately is asked last, for a time that grows with each failure.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng as _;

/// How long a peer is set aside after its first failure. Each further one doubles it.
const FIRST: Duration = Duration::from_millis(250);
/// The longest that it is set aside: a node that comes back is used again within this time.
const LONGEST: Duration = Duration::from_secs(30);
/// How many peers' failures are remembered.
const CAPACITY: usize = 4096;

/// The memory of peers that failed. One that is set aside is still asked where there is no other, which is its probe.
#[derive(Debug, Default)]
pub(super) struct Health {
    failed: Mutex<HashMap<SocketAddr, Failures>>,
}

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    until: Instant,
}

impl Health {
    /// A request to the peer failed by its fault. `jitter` is from 0 to 1, so that not all nodes come back at once.
    pub(super) fn failed(&self, peer: SocketAddr, now: Instant, jitter: f64) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.len() >= CAPACITY && !failed.contains_key(&peer) {
            failed.retain(|_, failures| failures.until > now);
            if failed.len() >= CAPACITY {
                return;
            }
        }
        let failures = failed.entry(peer).or_insert(Failures { count: 0, until: now });
        let pause = FIRST.saturating_mul(1 << failures.count.min(16)).min(LONGEST);
        failures.count = failures.count.saturating_add(1);
        failures.until = now + pause.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
    }

    /// It answered: whatever was held against it is forgotten.
    pub(super) fn answered(&self, peer: SocketAddr) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
    }

    /// Whether others should be asked first.
    pub(super) fn is_set_aside(&self, peer: SocketAddr, now: Instant) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get(&peer).is_some_and(|failures| failures.until > now)
    }
}

/// Randomness for [`Health::failed`].
pub(super) fn jitter() -> f64 {
    rand::rng().random()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn peer(n: u32) -> SocketAddr {
        SocketAddr::from((n.to_be_bytes(), 5000))
    }

    #[test]
    fn a_peer_that_fails_is_set_aside_for_longer_each_time_but_never_for_good() {
        let health = Health::default();
        let mut now = Instant::now();
        let mut before = Duration::ZERO;
        for _ in 0..40 {
            health.failed(peer(1), now, 1.0);
            let until = health.failed.lock().unwrap()[&peer(1)].until;
            let pause = until - now;
            assert!(pause >= before && pause <= LONGEST);
            assert!(health.is_set_aside(peer(1), until - Duration::from_nanos(1)));
            assert!(!health.is_set_aside(peer(1), until));
            (before, now) = (pause, until);
        }
        assert_eq!(before, LONGEST);
        health.failed(peer(1), now, 0.5);
        health.answered(peer(1));
        assert!(!health.is_set_aside(peer(1), now));
    }

    #[test]
    fn memory_is_bounded() {
        let health = Health::default();
        let now = Instant::now();
        for n in 0..2 * CAPACITY as u32 {
            health.failed(peer(n), now, 0.0);
        }
        assert_eq!(health.failed.lock().unwrap().len(), CAPACITY);
        health.failed(peer(1 << 20), now + LONGEST, 0.0);
        assert_eq!(health.failed.lock().unwrap().len(), 1, "what has lapsed makes room");
    }
}
