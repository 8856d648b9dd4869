//! Who gives us the other blobs of an image that is being pulled.
//!
//! A node that follows another through an image comes to the next blob at the very moment at which the other one does: nobody offers that
//! blob yet, and both would get it upstream. So before that, whoever gave the blobs before it is asked to answer once its own containerd
//! gets the first bytes. Where two ask each other, the one whose [`NodeId`] is smaller is made to wait, and the other one goes upstream.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt as _};
use tracing::debug;

use super::attempt::{Contact, attempt};
use super::client::{PeerError, Timeouts};
use super::fetch::{Taken, Use};
use super::{NodeId, Shared, Wanted};
use crate::oci::{Digest, Key};
use crate::router::Peer;
use crate::story::Origin;

/// How long after the last blob of an image its next one counts as the same pull.
const SAME_PULL: Duration = Duration::from_secs(10);
/// How many pulls are remembered.
const PULLS: usize = 1024;
/// How many peers are remembered of each, the latest.
const PEERS: usize = 3;
/// What an answer may take beyond the time for which it was asked to wait.
const ON_THE_WAY: Duration = Duration::from_secs(1);

/// Peers and when the last of them gave something, by pull.
type Pulls = HashMap<Arc<str>, (Vec<Peer>, Instant)>;

/// The peers that gave blobs, by pull; and the blobs that are waited for now.
#[derive(Debug, Default)]
pub(super) struct Siblings {
    pulls: Mutex<Pulls>,
    waiting: Mutex<HashMap<Digest, usize>>,
}

/// A blob is being waited for, until dropped.
#[derive(Debug)]
struct Waiting<'a> {
    siblings: &'a Siblings,
    digest: &'a Digest,
}

// === impl Siblings ===

impl Siblings {
    /// The peer gave a blob of this pull.
    pub(super) fn gave(&self, pull: &Arc<str>, peer: &Peer, now: Instant) {
        let mut pulls = self.pulls();
        if pulls.len() >= PULLS && !pulls.contains_key(pull) {
            pulls.retain(|_, (_, since)| now.duration_since(*since) < SAME_PULL);
            if pulls.len() >= PULLS {
                return;
            }
        }
        let (peers, since) = pulls.entry(Arc::clone(pull)).or_insert_with(|| (Vec::new(), now));
        *since = now;
        peers.retain(|known| known != peer);
        peers.insert(0, peer.clone());
        peers.truncate(PEERS);
    }

    /// The peers that gave blobs of this pull a moment ago.
    fn of(&self, pull: &str, now: Instant) -> Vec<Peer> {
        match self.pulls().get(pull) {
            Some((peers, since)) if now.duration_since(*since) < SAME_PULL => peers.clone(),
            _ => Vec::new(),
        }
    }

    /// A wait of this pull was in vain: it is not held up again.
    fn forget(&self, pull: &str) {
        self.pulls().remove(pull);
    }

    /// Whether `asker` should not wait for us, since we are waiting for others ourselves.
    pub(super) fn declines(&self, digest: &Digest, own: NodeId, asker: NodeId) -> bool {
        own <= asker && self.waiting().contains_key(digest)
    }

    fn wait_for<'a>(&'a self, digest: &'a Digest) -> Waiting<'a> {
        *self.waiting().entry(digest.clone()).or_default() += 1;
        Waiting { siblings: self, digest }
    }

    fn pulls(&self) -> MutexGuard<'_, Pulls> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.siblings.waiting();
        if let Some(count) = waiting.get_mut(self.digest) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(self.digest);
            }
        }
    }
}

/// Asks those who gave the blobs before this one to answer once they get it.
pub(super) async fn wait(shared: &Arc<Shared>, wanted: &Wanted) -> Option<(Peer, Taken)> {
    let (Some(pull), Key::Digest(digest)) = (&wanted.pull, &wanted.key) else { return None };
    let now = Instant::now();
    let mut peers = shared.siblings.of(pull, now);
    let is_out = |address: &SocketAddr| {
        shared.peers.is_set_aside(*address, now) || shared.blame.is_barred(&wanted.key, *address, now)
    };
    peers.retain(|peer| !peer.addresses.iter().any(is_out));
    if peers.is_empty() {
        return None;
    }
    let _waiting = shared.siblings.wait_for(digest);
    let _held = wanted.tale.hold();
    let is_race = peers.len() > 1;
    let hold = shared.settings.hold;
    let wanted = Wanted { wait: Some(hold), ..wanted.clone() };
    let timeouts = shared.settings.timeouts;
    let timeouts = Timeouts { head: timeouts.head.max(hold + ON_THE_WAY), ..timeouts };
    let ask = |peer: Peer| async {
        let result = match peer.addresses.first() {
            Some(first) => {
                wanted.tale.asks(is_race);
                attempt(shared, &wanted, &peer, timeouts, Use::new(shared, *first), &mut Contact::default()).await
            }
            None => Err(PeerError::Malformed("the peer has no address")),
        };
        (peer, result)
    };
    let mut attempts: FuturesUnordered<_> = peers.into_iter().map(ask).collect();
    while let Some((peer, result)) = attempts.next().await {
        match result {
            Ok(taken) => {
                wanted.tale.given(peer.addresses.first().copied(), Origin::Sibling);
                shared.sources.found(&wanted.key, &peer, Instant::now());
                return Some((peer, taken));
            }
            Err(error) => {
                // That it did not get it in time is no fault of its; wrong bytes are.
                shared.convict(&wanted.key, &peer, &error);
                let trace_id = wanted.tale.trace().id();
                debug!(%trace_id, key = %wanted.key, peer = %peer.id, %error, "waited for it in vain");
                wanted.tale.failed(peer.addresses.first().copied(), &error);
            }
        }
    }
    shared.siblings.forget(pull);
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn peer(n: u8) -> Peer {
        Peer { id: n.to_string().into(), addresses: vec![([127, 0, 0, n], 5000).into()], zone: None, load: None }
    }

    #[test]
    fn the_latest_who_gave_are_known_for_a_while() {
        let (siblings, start) = (Siblings::default(), Instant::now());
        let pull: Arc<str> = "registry.test/app".into();
        for n in [1, 2, 1, 3, 4] {
            siblings.gave(&pull, &peer(n), start);
        }
        assert_eq!(siblings.of(&pull, start), [peer(4), peer(3), peer(1)]);
        assert!(siblings.of("registry.test/other", start).is_empty());
        assert!(siblings.of(&pull, start + SAME_PULL).is_empty());
        siblings.forget(&pull);
        assert!(siblings.of(&pull, start).is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let (siblings, start) = (Siblings::default(), Instant::now());
        for n in 0..2 * PULLS {
            siblings.gave(&n.to_string().into(), &peer(1), start);
        }
        assert_eq!(siblings.pulls().len(), PULLS);
        siblings.gave(&"late".into(), &peer(1), start + SAME_PULL);
        assert_eq!(siblings.pulls().len(), 1);
    }

    #[test]
    fn of_two_who_wait_for_each_other_one_is_sent_away() {
        let digest: Digest = format!("sha256:{:064x}", 1).parse().unwrap();
        let (a, b) = (NodeId::of("a"), NodeId::of("b"));
        let (at_a, at_b) = (Siblings::default(), Siblings::default());
        assert!(!at_a.declines(&digest, a, b) && !at_b.declines(&digest, b, a), "nobody waits");
        let (waits_a, waits_b) = (at_a.wait_for(&digest), at_b.wait_for(&digest));
        assert_ne!(at_a.declines(&digest, a, b), at_b.declines(&digest, b, a), "exactly one");
        drop((waits_a, waits_b));
        assert!(at_a.waiting().is_empty() && !at_b.declines(&digest, b, a));
    }
}
