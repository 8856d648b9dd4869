//! What this node gives its peers, bounded: its own containerd must not wait for them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How far ahead of the rate uploads may be accepted.
const AHEAD: Duration = Duration::from_secs(2);
/// So many uploads at once count as all that a node can do, where no bound is set: each has a share of its link.
const MANY: usize = 32;

/// How much is given to peers; 0 is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UploadLimits {
    /// Blobs under way at once.
    pub count: usize,
    /// Bytes a second, on average: what is accepted is sent as fast as it goes, and what would be too much is refused.
    pub rate: u64,
}

/// The uploads under way. The clock is the caller's.
#[derive(Debug)]
pub(super) struct Uploads {
    limits: UploadLimits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    count: usize,
    /// When all that was accepted is sent, at the rate.
    booked_until: Option<Instant>,
}

/// A place among the uploads, until dropped.
#[derive(Debug)]
pub(super) struct Upload(Arc<Uploads>);

// === impl Uploads ===

impl Uploads {
    pub(super) fn new(limits: UploadLimits) -> Self {
        Self { limits, state: Mutex::default() }
    }

    /// Takes a place for an upload of `bytes`, if there is one.
    pub(super) fn begin(self: &Arc<Self>, bytes: u64, now: Instant) -> Option<Upload> {
        let UploadLimits { count, rate } = self.limits;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if count > 0 && state.count >= count {
            return None;
        }
        if rate > 0 {
            let from = state.booked_until.unwrap_or(now).max(now);
            if from.duration_since(now) > AHEAD {
                return None;
            }
            state.booked_until = Some(from + Duration::from_secs_f64(bytes as f64 / rate as f64));
        }
        state.count += 1;
        Some(Upload(Arc::clone(self)))
    }
}

impl Uploads {
    /// How much of what may be given is being given, in percent.
    pub(super) fn load(&self, now: Instant) -> u8 {
        let UploadLimits { count, rate } = self.limits;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let by_count = 100 * state.count / if count > 0 { count } else { MANY };
        let ahead = state.booked_until.filter(|_| rate > 0).map_or(Duration::ZERO, |until| until.duration_since(now));
        let by_rate = 100 * ahead.as_millis() / AHEAD.as_millis();
        let percent = by_count.max(usize::try_from(by_rate).unwrap_or(usize::MAX));
        u8::try_from(percent.min(100)).unwrap_or(100)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).count -= 1;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn uploads(count: usize, rate: u64) -> Arc<Uploads> {
        Arc::new(Uploads::new(UploadLimits { count, rate }))
    }

    #[test]
    fn without_limits_everything_is_given() {
        let (uploads, now) = (uploads(0, 0), Instant::now());
        let held: Vec<_> = (0..1000).map(|_| uploads.begin(u64::MAX, now)).collect();
        assert!(held.iter().all(Option::is_some));
    }

    #[test]
    fn places_are_given_back() {
        let (uploads, now) = (uploads(2, 0), Instant::now());
        let (one, other) = (uploads.begin(1, now).unwrap(), uploads.begin(1, now).unwrap());
        assert!(uploads.begin(1, now).is_none());
        drop(one);
        assert!(uploads.begin(1, now).is_some());
        drop(other);
    }

    #[test]
    fn the_load_is_the_larger_share_of_the_bounds() {
        let now = Instant::now();
        let free = uploads(0, 0);
        let held: Vec<_> = (0..MANY / 2).map(|_| free.begin(1, now)).collect();
        assert_eq!(free.load(now), 50);
        drop(held);
        assert_eq!(free.load(now), 0);

        let bound = uploads(4, 1000);
        let _one = bound.begin(1000, now);
        assert_eq!((bound.load(now), bound.load(now + Duration::from_secs(1))), (50, 25));
        let _large = bound.begin(100_000, now);
        assert_eq!(bound.load(now), 100);
    }

    #[test]
    fn the_average_rate_holds() {
        let (uploads, start) = (uploads(0, 1000), Instant::now());
        let mut given = 0;
        for tenth in 0..1000 {
            if uploads.begin(500, start + Duration::from_millis(100 * tenth)).is_some() {
                given += 500;
            }
        }
        assert!((95_000..=103_000).contains(&given), "{given} bytes in 100 s at 1000 a second");
    }
}
