//! Content that this node is about to receive: who waits for it here, and who is given it.

use std::time::{Duration, Instant};

use tracing::warn;

use super::Registry;
use super::content::Ask;
use super::promises::Client;
use crate::mirror::{Feed, NodeId, Served};
use crate::oci::{Digest, RangeOutcome};
use crate::store::{Found as Local, StoreError};
use crate::storm::Refusal;
use crate::zerocopy::Growing;

/// The longest that a peer is made to wait for what is about to be received.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How often it is looked whether something has come that the store does not see coming.
const LOOK: Duration = Duration::from_millis(10);

impl Registry {
    /// Waits for a manifest that this node's containerd is about to receive, if a coordinator sent a peer here for it; true if it is here then.
    pub(super) async fn comes(&self, ask: &Ask, digest: &Digest) -> bool {
        let Some(wait) = ask.wait.filter(|_| ask.mirrored && ask.rank.is_some() && !ask.excluded) else { return false };
        let Ok(feed) = self.serve(ask, digest, None, 0) else { return false };
        let end = Instant::now() + wait.min(LONGEST_WAIT);
        while !self.declines(ask, digest) && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            match self.wait_in_line(ask, digest, left).await {
                // It counts once all of it is there.
                Ok(Some(Local::Receiving(_))) => tokio::time::sleep(LOOK.min(left)).await,
                Ok(Some(Local::Complete(_))) => return true,
                Ok(None) | Err(_) => break,
            }
        }
        drop(feed);
        // It may have come as the wait ended.
        self.open(ask, digest).await.is_some()
    }

    /// Takes the asker as one who is given a blob, of which this node has these bytes as yet, or all of `total`.
    pub(super) fn serve(
        &self,
        ask: &Ask,
        digest: &Digest,
        growing: Option<&Growing>,
        total: u64,
    ) -> Result<Option<Feed>, Refusal> {
        let first = match ask.range.map(|range| range.resolve(total.max(1))) {
            Some(RangeOutcome::Part { start, .. }) => start,
            _ => ask.first_byte().unwrap_or(0),
        };
        self.settings.mirror.serve(&Served { digest, growing, total, first, rank: ask.rank })
    }

    /// What this node has, receives, or is about to receive if the asker would wait for that.
    pub(super) async fn find(&self, ask: &Ask, digest: &Digest, feed: &mut Option<Feed>) -> Option<Local> {
        if self.audits.is_spoiled(digest) {
            return None;
        }
        let store = &self.settings.store;
        let found = match store.find(digest, ask.repository.as_ref()).await {
            Ok(None) => match ask.wait.filter(|_| !self.declines(ask, digest)) {
                Some(wait) if ask.rank.is_some() => match self.serve(ask, digest, None, 0) {
                    Ok(taken) => {
                        *feed = taken;
                        self.wait_in_line(ask, digest, wait.min(LONGEST_WAIT)).await
                    }
                    Err(_) => Ok(None),
                },
                Some(wait) => store.expect(digest, ask.repository.as_ref(), wait.min(LONGEST_WAIT)).await,
                None => Ok(None),
            },
            found => found,
        };
        found.unwrap_or_else(|error| {
            warn!(%digest, %error, "cannot open content of this node, asking peers");
            None
        })
    }

    /// Waits for the first bytes of what our containerd has asked for, as long as we may be above the asker. They may come though the store
    /// sees nothing on its way.
    async fn wait_in_line(&self, ask: &Ask, digest: &Digest, wait: Duration) -> Result<Option<Local>, StoreError> {
        let end = Instant::now() + wait;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let sent_away = async {
                match ask.rank {
                    Some(rank) => self.settings.mirror.sent_away(digest, rank).await,
                    None => std::future::pending().await,
                }
            };
            let found = tokio::select! {
                found = self.settings.store.expect(digest, ask.repository.as_ref(), left) => found?,
                // Its own pull may have ended because all of it has come.
                () = sent_away => return self.settings.store.find(digest, ask.repository.as_ref()).await,
            };
            if found.is_some() || Instant::now() >= end {
                return Ok(found);
            }
            tokio::time::sleep(LOOK.min(left)).await;
        }
    }

    /// Whether the asker would wait for us while we wait for others.
    fn declines(&self, ask: &Ask, digest: &Digest) -> bool {
        if let Some(rank) = ask.rank {
            return !self.settings.mirror.may_wait(digest, rank);
        }
        match (&ask.client, self.settings.node_name.as_deref()) {
            (Client::Node(name), Some(own)) => self.settings.mirror.declines(digest, NodeId::of(own), NodeId::of(name)),
            _ => true,
        }
    }
}
