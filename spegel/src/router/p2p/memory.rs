//! Writing down who is there, for the next start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::seq::IteratorRandom as _;

use super::table::{Contact, Table};
use crate::bootstrap::{BootstrapAddress, BootstrapPeer, RememberedPeers};

/// How many peers are written down.
const KEPT: usize = 64;

/// How long after somebody new came the list is written for the first time, and then at most how often.
const FIRST: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_secs(300);

/// When the peers are to be written down again.
pub(super) struct Memory {
    file: Arc<RememberedPeers>,
    written: Option<Instant>,
    since: Option<Instant>,
    failing: bool,
}

// === impl Memory ===

impl Memory {
    pub(super) fn new(file: RememberedPeers) -> Self {
        Self { file: Arc::new(file), written: None, since: None, failing: false }
    }

    /// Whether the list is to be written now, given that somebody is there. While nobody is, the old list is the better one.
    fn is_due(&mut self, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        let due = match self.written {
            Some(written) => now.duration_since(written) >= INTERVAL,
            None => now.duration_since(since) >= FIRST,
        };
        if due {
            self.written = Some(now);
        }
        due
    }

    /// Writes the list if it is time.
    pub(super) fn keep(&mut self, now: Instant, table: &Table) {
        if table.is_empty() || !self.is_due(now) {
            return;
        }
        let peers = table.contacts().map(remember).choose_multiple(&mut rand::rng(), KEPT);
        match self.file.remember(&peers) {
            Ok(()) => self.failing = false,
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(%error, "cannot write the peers down; after a restart none are remembered");
            }
            Err(_) => {}
        }
    }
}

/// A peer as bootstrap sources name it.
pub(super) fn remember(contact: &Contact) -> BootstrapPeer {
    let address = |at: &std::net::SocketAddr| BootstrapAddress { ip: at.ip(), port: Some(at.port()) };
    let addresses = contact.addresses().iter().map(address).collect();
    BootstrapPeer { id: Some(contact.peer().to_base58()), addresses }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_soon_and_then_seldom() {
        let mut memory = Memory::new(RememberedPeers::new(std::path::Path::new("/nowhere")));
        let start = Instant::now();
        assert!(!memory.is_due(start));
        assert!(memory.is_due(start + FIRST));
        assert!(!memory.is_due(start + FIRST + INTERVAL / 2));
        assert!(memory.is_due(start + FIRST + INTERVAL));
    }
}
