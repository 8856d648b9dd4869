//! What the choice of a peer may take from the kernel's view.

use std::fmt;
use std::net::IpAddr;
use std::time::Instant;

use super::Watch;

/// How well peers are reached, of late.
#[derive(Clone)]
pub struct Quality(Watch);

// === impl Quality ===

impl Quality {
    pub(super) fn new(watch: Watch) -> Self {
        Self(watch)
    }

    /// The share of what this node sent to an address, for whatever purpose, that it had to send again, from 0 to 1.
    pub fn loss(&self, address: IpAddr, now: Instant) -> f64 {
        self.0.table().loss(address.to_canonical(), now)
    }
}

impl fmt::Debug for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Quality")
    }
}
