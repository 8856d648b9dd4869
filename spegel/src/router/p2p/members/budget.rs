//! How many bytes may be sent.

use std::time::Instant;

/// Bytes that may be sent: so many a second, and so many at once.
pub(super) struct Budget {
    left: usize,
    rate: usize,
    burst: usize,
    at: Instant,
}

// === impl Budget ===

impl Budget {
    pub(super) fn new(rate: usize, burst: usize, now: Instant) -> Self {
        Self { left: burst, rate, burst, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.at).as_millis().saturating_mul(self.rate as u128) / 1000;
        let earned = usize::try_from(earned).unwrap_or(usize::MAX);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(self.burst);
            self.at = now;
        }
    }

    /// Whether so many bytes may be sent now.
    pub(super) fn has(&mut self, now: Instant, bytes: usize) -> bool {
        self.refill(now);
        self.left >= bytes
    }

    /// Whether so many bytes may be sent now; they then count as sent.
    pub(super) fn spend(&mut self, now: Instant, bytes: usize) -> bool {
        self.refill(now);
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}
