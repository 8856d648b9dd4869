//! Manifests whose heads were given to a client, kept for a short while: it asks for the rest by digest next, and must then
//! get it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::oci::Digest;

/// Small content whose bytes were found to be those of its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Its digest.
    pub digest: Digest,
    /// All of its bytes.
    pub bytes: Bytes,
    /// The media type that the peer told, if it told one.
    pub media_type: Option<String>,
}

/// A cache bounded in bytes and time.
#[derive(Debug)]
pub(super) struct Shelf {
    held: Mutex<Held>,
    capacity: usize,
    lifetime: Duration,
}

/// Content, since when, and for how many clients: each that was given a head may take it once.
#[derive(Debug)]
struct Promised {
    verified: Verified,
    since: Instant,
    owed: usize,
}

#[derive(Debug, Default)]
struct Held {
    by_digest: HashMap<Digest, Promised>,
    bytes: usize,
}

impl Shelf {
    pub(super) fn new(capacity: usize, lifetime: Duration) -> Self {
        Self { held: Mutex::default(), capacity, lifetime }
    }

    /// Takes it: each promise is kept once, so that what was withdrawn meanwhile is not served for long.
    pub(super) fn take(&self, digest: &Digest, now: Instant) -> Option<Verified> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let promised = held.by_digest.get_mut(digest)?;
        promised.owed -= 1;
        let (verified, since, owed) = (promised.verified.clone(), promised.since, promised.owed);
        let lapsed = now.duration_since(since) >= self.lifetime;
        if owed == 0 || lapsed {
            held.remove(digest);
        }
        (!lapsed).then_some(verified)
    }

    pub(super) fn put(&self, verified: &Verified, now: Instant) {
        let length = verified.bytes.len();
        if length > self.capacity {
            return;
        }
        // What is kept here has a bound of its own, and does not count against those under way.
        let verified = Verified { bytes: Bytes::copy_from_slice(&verified.bytes), ..verified.clone() };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let owed = held.remove(&verified.digest).map_or(0, |before| before.owed) + 1;
        let lapsed = |promised: &Promised| now.duration_since(promised.since) >= self.lifetime;
        let old: Vec<_> = held.by_digest.iter().filter(|(_, p)| lapsed(p)).map(|(d, _)| d.clone()).collect();
        for digest in old {
            held.remove(&digest);
        }
        while held.bytes + length > self.capacity {
            let oldest =
                held.by_digest.iter().min_by_key(|(_, promised)| promised.since).map(|(digest, _)| digest.clone());
            let Some(oldest) = oldest else { break };
            held.remove(&oldest);
        }
        held.bytes += length;
        held.by_digest.insert(verified.digest.clone(), Promised { verified, since: now, owed });
    }
}

impl Held {
    fn remove(&mut self, digest: &Digest) -> Option<Promised> {
        let removed = self.by_digest.remove(digest)?;
        self.bytes -= removed.verified.bytes.len();
        Some(removed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn verified(n: u8, length: usize) -> Verified {
        let digest = format!("sha256:{}", hex::encode([n; 32])).parse().unwrap();
        Verified { digest, bytes: vec![n; length].into(), media_type: None }
    }

    #[test]
    fn content_is_kept_for_its_lifetime_and_not_longer() {
        let shelf = Shelf::new(100, Duration::from_secs(60));
        let start = Instant::now();
        shelf.put(&verified(1, 10), start);
        let digest = verified(1, 10).digest;
        assert_eq!(shelf.take(&digest, start + Duration::from_secs(59)), Some(verified(1, 10)));
        assert_eq!(shelf.take(&digest, start + Duration::from_secs(59)), None, "a promise is kept once");
        shelf.put(&verified(1, 10), start);
        shelf.put(&verified(1, 10), start);
        assert!(shelf.take(&digest, start).is_some() && shelf.take(&digest, start).is_some(), "two were promised it");
        assert_eq!(shelf.take(&digest, start), None);
        shelf.put(&verified(1, 10), start);
        assert_eq!(shelf.take(&digest, start + Duration::from_secs(60)), None);
        assert_eq!(shelf.held.lock().unwrap().bytes, 0);
    }

    #[test]
    fn the_oldest_makes_room_and_the_bound_holds() {
        let shelf = Shelf::new(100, Duration::from_secs(60));
        let start = Instant::now();
        for n in 0..5 {
            shelf.put(&verified(n, 40), start + Duration::from_secs(u64::from(n)));
        }
        let now = start + Duration::from_secs(5);
        assert_eq!(shelf.held.lock().unwrap().bytes, 80);
        let held: Vec<u8> = (0..5).filter(|n| shelf.take(&verified(*n, 40).digest, now).is_some()).collect();
        assert_eq!(held, [3, 4]);
        assert_eq!(shelf.held.lock().unwrap().bytes, 0);
        shelf.put(&verified(9, 101), now);
        assert_eq!(shelf.take(&verified(9, 101).digest, now), None);
    }
}
