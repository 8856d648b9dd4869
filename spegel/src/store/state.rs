//! What every store shares: the index with the feed of its changes, and the store's health.

use std::sync::{PoisonError, RwLock};

use tokio::sync::watch;

use super::Health;
use super::changes::{Changes, Feed};
use super::index::{Delta, Index};
use crate::oci::Filters;

/// The index behind its lock. Changes are told under the lock, so that subscribers see them in order and without a gap.
#[derive(Debug)]
pub(super) struct State {
    index: RwLock<Index>,
    feed: Feed,
    health: watch::Sender<Health>,
}

// === impl State ===

impl State {
    pub(super) fn new(filters: Filters, health: Health) -> Self {
        Self { index: RwLock::new(Index::new(filters)), feed: Feed::default(), health: watch::Sender::new(health) }
    }

    /// Asks the index. Never held across a wait.
    pub(super) fn read<T>(&self, ask: impl FnOnce(&Index) -> T) -> T {
        ask(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the index and tells the subscribers. Says how many keys were added and removed.
    pub(super) fn change(&self, act: impl FnOnce(&mut Index) -> Delta) -> (usize, usize) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let delta = act(&mut index);
        let counts = (delta.added.len(), delta.removed.len());
        delta.into_changes().for_each(|change| self.feed.send(&change));
        counts
    }

    pub(super) fn subscribe(&self) -> Changes {
        self.read(|index| self.feed.subscribe(index.offered_keys()))
    }

    /// Ends all subscriptions.
    pub(super) fn close(&self) {
        self.feed.close();
    }

    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Says how the store stands; true if that is news.
    pub(super) fn set_health(&self, health: Health) -> bool {
        self.health.send_if_modified(|now| {
            let is_news = *now != health;
            *now = health;
            is_news
        })
    }
}
