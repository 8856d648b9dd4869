//! Writing down who is there, for the next start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::seq::IteratorRandom as _;

use super::table::{Contact, Table};
use crate::bootstrap::{BootstrapAddress, BootstrapPeer, RememberedPeers};

/// How many peers are written down.
const KEPT: usize = 64;

/// How long after the first one came the list is written for the first time, and then how often at most, and at most if a quarter more
/// are there than were written down: who is ended a minute after its start is to have met more than the first.
const FIRST: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_secs(300);
const GROWN: Duration = Duration::from_secs(10);

/// For how long those who were remembered at the start, and are not there, are written down beside those who are. Hosts that were all
/// started anew meet a few of each other first: if these few replaced what each remembers, halves that never met would forget each other.
const BEFORE: Duration = Duration::from_secs(3_600);

/// When the peers are to be written down again.
pub(super) struct Memory {
    file: Arc<RememberedPeers>,
    before: Vec<BootstrapPeer>,
    since: Option<Instant>,
    /// When, and how many were there.
    written: Option<(Instant, usize)>,
    failing: bool,
}

// === impl Memory ===

impl Memory {
    pub(super) fn new(file: RememberedPeers) -> Self {
        let before = file.known();
        Self { file: Arc::new(file), before, since: None, written: None, failing: false }
    }

    /// Whether the list is to be written now, given that so many are there. While nobody is, the old list is the better one.
    fn is_due(&mut self, now: Instant, count: usize) -> bool {
        let since = *self.since.get_or_insert(now);
        let due = match self.written {
            Some((at, before)) => {
                let passed = now.duration_since(at);
                passed >= INTERVAL || (passed >= GROWN && 4 * count > 5 * before)
            }
            None => now.duration_since(since) >= FIRST,
        };
        if due {
            self.written = Some((now, count));
        }
        due
    }

    /// Writes the list if it is time.
    pub(super) fn keep(&mut self, now: Instant, table: &Table) {
        if table.is_empty() || !self.is_due(now, table.connected()) {
            return;
        }
        if self.since.is_some_and(|since| now.duration_since(since) >= BEFORE) {
            self.before = Vec::new();
        }
        let mut peers = table.contacts().map(remember).choose_multiple(&mut rand::rng(), KEPT);
        let room = KEPT - peers.len();
        let absent = self.before.iter().filter(|old| peers.iter().all(|peer| peer.id != old.id)).take(room);
        let absent: Vec<BootstrapPeer> = absent.cloned().collect();
        peers.extend(absent);
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
    #![allow(clippy::unwrap_used)]

    use libp2p::PeerId;

    use super::*;

    fn contact(n: usize) -> Contact {
        let address = std::net::SocketAddr::from(([10, 0, 0, u8::try_from(n).unwrap()], 5001));
        Contact::new(PeerId::random(), &[address])
    }

    #[test]
    fn it_is_written_soon_and_then_seldom() {
        let mut memory = Memory::new(RememberedPeers::new(std::path::Path::new("/nowhere")));
        let start = Instant::now();
        assert!(!memory.is_due(start, 1));
        assert!(memory.is_due(start + FIRST, 4));
        assert!(!memory.is_due(start + FIRST + INTERVAL / 2, 5));
        assert!(memory.is_due(start + FIRST + INTERVAL, 4));
    }

    #[test]
    fn it_is_written_when_more_are_there() {
        let mut memory = Memory::new(RememberedPeers::new(std::path::Path::new("/nowhere")));
        let start = Instant::now();
        memory.is_due(start, 1);
        let first = start + FIRST;
        assert!(memory.is_due(first, 1));
        assert!(!memory.is_due(first + GROWN / 2, 11), "not at once");
        assert!(memory.is_due(first + GROWN, 11));
        assert!(!memory.is_due(first + 2 * GROWN, 11));
        assert!(!memory.is_due(first + 2 * GROWN, 3), "who left may come back");
    }

    /// Hosts that start anew and meet one peer at first still remember the others, until an hour later.
    #[test]
    fn who_is_not_there_yet_is_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let file = || RememberedPeers::new(dir.path());
        let all: Vec<Contact> = (1..=11).map(contact).collect();
        file().remember(&all.iter().map(remember).collect::<Vec<_>>()).unwrap();
        let mut memory = Memory::new(file());
        let mut table = Table::default();
        let moved = Contact::new(all[0].peer(), contact(99).addresses());
        table.insert(moved.clone());
        let start = Instant::now();
        memory.keep(start, &table);
        memory.keep(start + FIRST, &table);
        let known = file().known();
        assert_eq!((known.len(), &known[0]), (11, &remember(&moved)), "the one that is there where it is now");
        for n in 100..164 {
            table.insert(contact(n));
        }
        memory.keep(start + FIRST + GROWN, &table);
        let known = file().known();
        let old = all[1..].iter().filter(|one| known.contains(&remember(one))).count();
        assert_eq!((known.len(), old), (KEPT, 0), "those who are there come first");
        table = Table::default();
        table.insert(moved.clone());
        memory.keep(start + BEFORE, &table);
        assert_eq!(file().known(), [remember(&moved)]);
    }
}
