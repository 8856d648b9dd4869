//! How many messages come a second.

use std::time::Instant;

/// A bucket of tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    tokens: f64,
    since: Instant,
}

impl Rate {
    /// Full, with so many tokens.
    pub(super) fn new(burst: u32, now: Instant) -> Self {
        Self { tokens: f64::from(burst), since: now }
    }

    /// Takes a token, of those that come `per_second` up to `burst`; false if there is none.
    pub(super) fn take(&mut self, per_second: u32, burst: u32, now: Instant) -> bool {
        self.tokens = self.tokens(per_second, burst, now);
        self.since = self.since.max(now);
        let is_there = self.tokens >= 1.0;
        if is_there {
            self.tokens -= 1.0;
        }
        is_there
    }

    /// Whether nothing was taken that has not come back.
    pub(super) fn is_full(&self, per_second: u32, burst: u32, now: Instant) -> bool {
        self.tokens(per_second, burst, now) >= f64::from(burst)
    }

    /// Whether [`Rate::take`] would find one.
    pub(super) fn has_some(&self, per_second: u32, burst: u32, now: Instant) -> bool {
        self.tokens(per_second, burst, now) >= 1.0
    }

    fn tokens(&self, per_second: u32, burst: u32, now: Instant) -> f64 {
        let passed = now.saturating_duration_since(self.since).as_secs_f64();
        (self.tokens + passed * f64::from(per_second)).min(f64::from(burst))
    }
}
