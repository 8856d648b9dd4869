//! Blobs that containerd is receiving: noticed on disk, followed as they grow, and offered while they do.

mod reference;
mod tracker;
mod watcher;
mod watches;

use std::fs::File;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use self::tracker::{MAX_KNOWN, Tracker};
use super::blobs::{BlobDir, io_error};
use super::{Arriving, StoreError};
use crate::oci::Digest;
use crate::zerocopy::Growing;

pub(super) use watcher::{News, Watcher};

/// A blob that is still arriving. Its bytes are not verified: whoever takes them has to.
#[derive(Clone, Debug)]
pub struct Receiving {
    /// The file that it is written to, which becomes the blob.
    pub growing: Growing,
    /// The length in bytes that it will have.
    pub total: u64,
    /// Which file it is: the same as long as that is written on from where it was, and another when it starts over.
    pub ingest: u64,
}

/// How the pulls in progress of this node are noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ingests {
    /// The kernel tells of each change.
    pub watched: usize,
    /// They are looked at now and then: there are too many to be watched, or the kernel refuses.
    pub looked_at: usize,
    /// They are not followed: there are too many.
    pub overlooked: usize,
}

/// The blobs of one containerd namespace that are being received.
#[derive(Debug)]
pub(super) struct Receptions {
    tracker: Mutex<Tracker>,
    /// Something began, ended or became complete.
    changed: watch::Sender<()>,
    /// How many are watched, looked at, and overlooked.
    counts: [AtomicUsize; 3],
}

// === impl Receptions ===

impl Receptions {
    /// None, as long as no [`Watcher`] finds them. What does not grow for `stall` is given up.
    pub(super) fn new(stall: Duration) -> Self {
        Self::bounded(stall, MAX_KNOWN)
    }

    fn bounded(stall: Duration, max_known: usize) -> Self {
        Self {
            tracker: Mutex::new(Tracker::new(stall, max_known)),
            changed: watch::Sender::new(()),
            counts: Default::default(),
        }
    }

    /// How they are noticed.
    pub(super) fn ingests(&self) -> Ingests {
        let [watched, looked_at, overlooked] = self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        Ingests { watched, looked_at, overlooked }
    }

    fn count(&self, counts: [usize; 3]) {
        self.counts.iter().zip(counts).for_each(|(known, count)| known.store(count, Ordering::Relaxed));
    }

    /// Opens a blob that is being received, or says that it is not.
    pub(super) fn open(&self, digest: &Digest, dir: &BlobDir) -> Result<Option<Receiving>, StoreError> {
        let Some(growth) = self.lock().growth(digest) else { return Ok(None) };
        let path = dir.root().join("ingest").join(&*growth.folder).join("data");
        let file = match File::open(&path) {
            Ok(file) => Arc::new(file),
            // It became the blob just now, or is gone.
            Err(error) if error.kind() == ErrorKind::NotFound => match dir.open(digest)? {
                Some(blob) if blob.size == growth.total => blob.file,
                _ => return Ok(None),
            },
            Err(error) => return Err(io_error(&path, error)),
        };
        Ok(Some(Receiving { growing: Growing::new(file, growth.progress), total: growth.total, ingest: growth.file }))
    }

    /// Whether a blob is about to be received: containerd has asked for it, and has no bytes of it.
    pub(super) fn expects(&self, digest: &Digest) -> bool {
        self.lock().expects(digest)
    }

    /// What is being received, the largest first, `limit` at the most, and how much more.
    pub(super) fn arriving(&self, limit: usize) -> (Vec<Arriving>, usize) {
        let mut arriving = self.lock().arriving();
        arriving.sort_unstable_by(|a, b| (b.total, &b.digest).cmp(&(a.total, &a.digest)));
        let more = arriving.len().saturating_sub(limit);
        arriving.truncate(limit);
        (arriving, more)
    }

    /// Tells when [`Self::open`] or [`Self::expects`] may have another answer than before.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Tracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
