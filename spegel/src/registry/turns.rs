//! The order in which the bodies of one client's parallel fetch are ended before their time.
//!
//! containerd's parallel fetch cancels all chunks when one fails, and the pull with them, unless the chunk that it reads at that moment,
//! the lowest, was the one that ended: that one it asks for again, at all hosts. So the lowest is ended first, and the others only if the
//! client has not left them a moment later.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::promises::Client;
use crate::oci::Digest;

/// The longest that an end is held back. Less than the stall bound of a relay.
const LONGEST: Duration = Duration::from_secs(4);
/// What a client needs to notice an end, and to leave the other chunks.
const SETTLE: Duration = Duration::from_millis(300);

type Blob = (Client, Digest);

/// The bodies under way, by client and blob.
#[derive(Debug, Default)]
pub(super) struct Turns {
    active: Mutex<HashMap<Blob, BTreeSet<(u64, u64)>>>,
    changed: Notify,
    next: AtomicU64,
}

/// One body under way, until dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    blob: Blob,
    /// Where the body begins in the blob, and a number of its own.
    place: (u64, u64),
}

impl Turns {
    /// A body for `client` that begins at `offset` of the blob.
    pub(super) fn begin(self: &Arc<Self>, client: &Client, digest: &Digest, offset: u64) -> Turn {
        let place = (offset, self.next.fetch_add(1, Ordering::Relaxed));
        let blob = (client.clone(), digest.clone());
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        active.entry(blob.clone()).or_default().insert(place);
        drop(active);
        Turn { turns: Arc::clone(self), blob, place }
    }

    /// Waits until no body for `client` that begins before `offset` of the blob is under way.
    pub(super) async fn come(&self, client: &Client, digest: &Digest, offset: u64) {
        let blob = (client.clone(), digest.clone());
        let mut waited = false;
        let lowest = async {
            loop {
                let changed = self.changed.notified();
                if self.is_lowest(&blob, offset) {
                    return;
                }
                waited = true;
                changed.await;
            }
        };
        // Beyond the bound it ends whatever comes of it.
        let came = timeout(LONGEST, lowest).await.is_ok();
        if came && waited {
            sleep(SETTLE).await;
        }
    }

    fn is_lowest(&self, blob: &Blob, offset: u64) -> bool {
        let active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        active.get(blob).and_then(BTreeSet::first).is_none_or(|first| first.0 >= offset)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut active = self.turns.active.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(places) = active.get_mut(&self.blob) {
            places.remove(&self.place);
            if places.is_empty() {
                active.remove(&self.blob);
            }
        }
        drop(active);
        self.turns.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn digest() -> Digest {
        format!("sha256:{}", "0".repeat(64)).parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_lowest_ends_first_and_the_next_a_moment_later() {
        let (turns, client) = (Arc::<Turns>::default(), Client::Node("n".into()));
        let low = turns.begin(&client, &digest(), 0);
        let high = turns.begin(&client, &digest(), 100);
        let start = tokio::time::Instant::now();
        turns.come(&client, &digest(), 0).await;
        turns.come(&Client::Node("other".into()), &digest(), 100).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        let waiting = tokio::spawn({
            let turns = Arc::clone(&turns);
            async move { turns.come(&client, &digest(), 100).await }
        });
        sleep(Duration::from_secs(1)).await;
        assert!(!waiting.is_finished());
        drop(low);
        waiting.await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_secs(1) + SETTLE);
        drop(high);
        assert!(turns.active.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_longer_than_the_bound() {
        let (turns, client) = (Arc::<Turns>::default(), Client::Node("n".into()));
        let _low = turns.begin(&client, &digest(), 0);
        let start = tokio::time::Instant::now();
        turns.come(&client, &digest(), 1).await;
        assert_eq!(start.elapsed(), LONGEST);
    }
}
