//! How changes travel from a store to those who follow it, without a queue that a slow reader could make grow.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

use super::Change;
use crate::oci::Key;

/// What one subscriber has not been told yet.
#[derive(Debug, Default)]
struct Pending {
    /// The keys that changed since the last read; true where the key was added.
    keys: BTreeMap<Key, bool>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Mailbox {
    pending: Mutex<Pending>,
    changed: Notify,
}

/// What a subscriber has not been told yet. Changes that undo each other before they are read cancel out, so that what is
/// pending is bounded by the node's own content however slow the reader is.
#[derive(Debug)]
pub struct Changes {
    mailbox: Arc<Mailbox>,
}

/// The sending side of [`Changes`]: whoever owns content tells all subscribers at once.
///
/// Closing it, or dropping it, ends every subscription once what is pending has been read.
#[derive(Debug, Default)]
pub struct Feed {
    subscribers: Mutex<Subscribers>,
}

#[derive(Debug, Default)]
struct Subscribers {
    mailboxes: Vec<Weak<Mailbox>>,
    closed: bool,
}

// === impl Mailbox ===

impl Mailbox {
    fn with<T>(&self, act: impl FnOnce(&mut Pending) -> T) -> T {
        act(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn close(&self) {
        self.with(|pending| pending.closed = true);
        self.changed.notify_one();
    }
}

impl Pending {
    fn record(&mut self, key: Key, added: bool) {
        match self.keys.get(&key) {
            Some(&before) if before != added => {
                self.keys.remove(&key);
            }
            _ => {
                self.keys.insert(key, added);
            }
        }
    }

    /// Withdrawals come first: a peer that is sent here in vain costs more than one that comes a moment later.
    fn take(&mut self) -> Option<Change> {
        let any_removed = self.keys.values().any(|&added| !added);
        let (taken, kept) = std::mem::take(&mut self.keys).into_iter().partition(|&(_, added)| added != any_removed);
        self.keys = kept;
        let taken: BTreeMap<Key, bool> = taken;
        let keys: Vec<Key> = taken.into_keys().collect();
        match (keys.is_empty(), any_removed) {
            (true, _) => None,
            (false, true) => Some(Change::Removed(keys)),
            (false, false) => Some(Change::Added(keys)),
        }
    }
}

// === impl Changes ===

impl Changes {
    /// The next change, all that is pending of one kind at once and never empty; `None` once the store is gone and
    /// everything has been read. Cancel-safe.
    pub async fn next(&mut self) -> Option<Change> {
        loop {
            let (change, closed) = self.mailbox.with(|pending| (pending.take(), pending.closed));
            if change.is_some() || closed {
                return change;
            }
            self.mailbox.changed.notified().await;
        }
    }
}

// === impl Feed ===

impl Feed {
    /// Follows the changes from now on, beginning with `held` as added. The caller holds whatever lock orders its changes,
    /// so that nothing falls between `held` and the first change.
    pub fn subscribe(&self, held: impl IntoIterator<Item = Key>) -> Changes {
        let mailbox = Arc::new(Mailbox::default());
        let mut subscribers = self.subscribers();
        mailbox.with(|pending| {
            pending.keys.extend(held.into_iter().map(|key| (key, true)));
            pending.closed = subscribers.closed;
        });
        subscribers.mailboxes.push(Arc::downgrade(&mailbox));
        Changes { mailbox }
    }

    /// Tells every subscriber.
    pub fn send(&self, change: &Change) {
        let (keys, added) = match change {
            Change::Added(keys) => (keys, true),
            Change::Removed(keys) => (keys, false),
        };
        if keys.is_empty() {
            return;
        }
        self.subscribers().mailboxes.retain(|mailbox| {
            let Some(mailbox) = mailbox.upgrade() else { return false };
            mailbox.with(|pending| keys.iter().for_each(|key| pending.record(key.clone(), added)));
            mailbox.changed.notify_one();
            true
        });
    }

    /// Ends every subscription.
    pub fn close(&self) {
        let mut subscribers = self.subscribers();
        subscribers.closed = true;
        for mailbox in subscribers.mailboxes.drain(..).filter_map(|mailbox| mailbox.upgrade()) {
            mailbox.close();
        }
    }

    fn subscribers(&self) -> MutexGuard<'_, Subscribers> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use futures::FutureExt as _;

    use super::*;
    use crate::oci::Digest;

    fn key(n: u8) -> Key {
        format!("sha256:{n:064x}").parse::<Digest>().unwrap().into()
    }

    fn next(changes: &mut Changes) -> Option<Option<Change>> {
        changes.next().now_or_never()
    }

    #[test]
    fn what_is_held_comes_first_as_one_batch() {
        let feed = Feed::default();
        let mut changes = feed.subscribe([key(2), key(1)]);
        assert_eq!(next(&mut changes), Some(Some(Change::Added(vec![key(1), key(2)]))));
        assert_eq!(next(&mut changes), None);
    }

    #[test]
    fn nothing_held_yields_no_empty_batch() {
        let feed = Feed::default();
        let mut changes = feed.subscribe([]);
        feed.send(&Change::Added(vec![]));
        assert_eq!(next(&mut changes), None);
    }

    #[test]
    fn changes_that_undo_each_other_cancel_out() {
        let feed = Feed::default();
        let mut changes = feed.subscribe([key(1)]);
        feed.send(&Change::Added(vec![key(2)]));
        feed.send(&Change::Removed(vec![key(1), key(2)]));
        assert_eq!(next(&mut changes), None);
    }

    #[test]
    fn withdrawals_come_before_additions() {
        let feed = Feed::default();
        let mut changes = feed.subscribe([key(1)]);
        next(&mut changes);
        feed.send(&Change::Added(vec![key(2)]));
        feed.send(&Change::Removed(vec![key(1)]));
        assert_eq!(next(&mut changes), Some(Some(Change::Removed(vec![key(1)]))));
        assert_eq!(next(&mut changes), Some(Some(Change::Added(vec![key(2)]))));
        assert_eq!(next(&mut changes), None);
    }

    #[test]
    fn each_subscriber_has_its_own_place() {
        let feed = Feed::default();
        let mut early = feed.subscribe([]);
        feed.send(&Change::Added(vec![key(1)]));
        let mut late = feed.subscribe([key(1)]);
        feed.send(&Change::Removed(vec![key(1)]));
        assert_eq!(next(&mut early), None);
        assert_eq!(next(&mut late), None);
    }

    #[test]
    fn the_end_comes_after_what_is_pending() {
        let feed = Feed::default();
        let mut changes = feed.subscribe([key(1)]);
        drop(feed);
        assert_eq!(next(&mut changes), Some(Some(Change::Added(vec![key(1)]))));
        assert_eq!(next(&mut changes), Some(None));
    }

    #[test]
    fn who_comes_after_the_end_is_told_so() {
        let feed = Feed::default();
        feed.close();
        assert_eq!(next(&mut feed.subscribe([])), Some(None));
    }

    #[tokio::test]
    async fn a_waiting_reader_is_woken() {
        let feed = Feed::default();
        let mut changes = feed.subscribe([]);
        let (change, ()) = tokio::join!(changes.next(), async { feed.send(&Change::Added(vec![key(1)])) });
        assert_eq!(change, Some(Change::Added(vec![key(1)])));
        let (end, ()) = tokio::join!(changes.next(), async { feed.close() });
        assert_eq!(end, None);
    }
}
