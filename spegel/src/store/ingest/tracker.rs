//! What is being received, from what was seen of its files. Pure: sights and a clock come in.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::reference::{Kind, Reference};
use crate::oci::Digest;
use crate::store::Arriving;
use crate::zerocopy::Progress;

/// How long after its writer closed a file it may take until the file is renamed. containerd does the one right after the
/// other when it commits; a close without the other is an abort.
const COMMIT: Duration = Duration::from_millis(250);

/// The same from when a file was seen to be whole, where no event tells that its writer closed it: containerd may have to wait for its disk
/// between the two.
const COMMIT_UNHEARD: Duration = Duration::from_secs(1);

/// So many times the stall bound is the longest that a file may not grow, however slowly it has grown before. containerd writes in steps of
/// up to 1 MiB, which at the default bound is 35 KB a second.
const SLOWEST: u32 = 6;

/// How many ingests are known at a time.
pub(super) const MAX_KNOWN: usize = 4096;

/// A file's identity on its file system, which a rename keeps.
pub(super) type Inode = (u64, u64);

/// What an ingest's `data` looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sight {
    pub(super) position: u64,
    pub(super) inode: Inode,
    /// When it was made, in nanoseconds, where the file system knows: inodes are used again.
    pub(super) born: u128,
}

/// An ingest of ours.
#[derive(Debug)]
struct Reception {
    reference: Reference,
    /// The length that it will have, where that is known.
    total: Option<u64>,
    /// It was seen to be made, so that all of it has grown since.
    is_new: bool,
    /// None as long as its `data` was not seen.
    sight: Option<Sight>,
    /// How often it was seen to start over.
    starts: u32,
    /// When its `data` was last seen to be another than before.
    seen_at: Option<Instant>,
    /// When it was first seen, or grew last, and the longest that it has lately taken from one step to the next.
    changed_at: Option<Instant>,
    pace: Duration,
    /// While it grows.
    live: Option<Live>,
    /// It was made a moment ago and its writer has neither written nor left.
    is_awaited: bool,
}

#[derive(Debug)]
struct Live {
    progress: watch::Sender<Progress>,
    grown_at: Instant,
    pace: Duration,
    closed_at: Option<Instant>,
}

/// What can be served of a blob that is being received.
#[derive(Clone, Debug)]
pub(super) struct Growth {
    /// The name of the ingest's folder.
    pub(super) folder: Box<str>,
    /// The length that the blob will have.
    pub(super) total: u64,
    /// Which file it is.
    pub(super) file: u64,
    pub(super) progress: watch::Receiver<Progress>,
}

/// The ingests of our namespace, by the names of their folders.
#[derive(Debug)]
pub(super) struct Tracker {
    receptions: HashMap<Box<str>, Reception>,
    /// How many there may be.
    max_known: usize,
    /// How long a file may not grow until it is given up, unless it has grown in steps that took long before.
    stall: Duration,
    /// What came whole and was not committed, since that was last asked for.
    discarded: Vec<Digest>,
}

// === impl Tracker ===

impl Tracker {
    pub(super) fn new(stall: Duration, max_known: usize) -> Self {
        Self { receptions: HashMap::new(), max_known, stall, discarded: Vec::new() }
    }

    /// Whether one more can be followed.
    pub(super) fn has_room(&self) -> bool {
        self.receptions.len() < self.max_known
    }

    /// Forgets the one that has not grown for the longest time, if it has not grown since `before`. Returns its folder's name.
    pub(super) fn make_room(&mut self, before: Instant) -> Option<Box<str>> {
        let idle = self.receptions.iter().filter(|(_, reception)| reception.live.is_none() && !reception.is_awaited);
        let (folder, _) = idle
            .filter(|(_, reception)| reception.seen_at.is_none_or(|at| at <= before))
            .min_by_key(|(_, reception)| reception.seen_at)?;
        let folder = folder.clone();
        self.receptions.remove(&folder);
        Some(folder)
    }

    /// An ingest is there; `is_new` if it was seen to be made. False if there are too many.
    pub(super) fn begin(&mut self, folder: &str, reference: Reference, total: Option<u64>, is_new: bool) -> bool {
        if !self.has_room() {
            return false;
        }
        let reception = Reception {
            reference,
            total,
            is_new,
            sight: None,
            starts: 0,
            seen_at: None,
            changed_at: None,
            pace: Duration::ZERO,
            live: None,
            is_awaited: is_new,
        };
        self.receptions.entry(folder.into()).or_insert(reception);
        true
    }

    pub(super) fn knows(&self, folder: &str) -> bool {
        self.receptions.contains_key(folder)
    }

    /// The ingest's `data` was looked at. Returns its digest if that changes whether it is offered.
    pub(super) fn saw(&mut self, folder: &str, sight: Sight, now: Instant) -> Option<Digest> {
        let reception = self.receptions.get_mut(folder)?;
        let was_live = reception.live.is_some();
        reception.changed_at.get_or_insert(now);
        if reception.sight != Some(sight) {
            reception.seen_at = Some(now);
        }
        match reception.sight.replace(sight) {
            // What another process left behind, and what was there before we looked, may grow no more.
            None if !reception.is_new => {}
            Some(before) if before.inode != sight.inode || sight.position < before.position => {
                reception.starts += 1;
                reception.give_up();
            }
            before if sight.position > before.map_or(0, |before| before.position) => {
                reception.grew(sight.position, now);
            }
            _ => {}
        }
        (was_live != reception.live.is_some()).then(|| reception.reference.digest.clone())
    }

    /// The ingest's writer closed its `data`.
    pub(super) fn closed(&mut self, folder: &str, now: Instant) {
        let Some(reception) = self.receptions.get_mut(folder) else { return };
        reception.is_awaited = false;
        if let Some(live) = &mut reception.live {
            live.closed_at = Some(now);
        }
    }

    /// No event will tell that the ingest's writer closed its `data`: if that is whole, it should be the blob soon.
    pub(super) fn unheard(&mut self, folder: &str, now: Instant) {
        let Some(reception) = self.receptions.get_mut(folder) else { return };
        let is_whole = reception.is_whole();
        if let Some(live) = reception.live.as_mut().filter(|_| is_whole) {
            live.closed_at.get_or_insert(now + (COMMIT_UNHEARD - COMMIT));
        }
    }

    /// Whether the ingest's `data` looked like that already.
    pub(super) fn has_seen(&self, folder: &str, sight: Sight) -> bool {
        self.receptions.get(folder).is_some_and(|reception| reception.sight == Some(sight))
    }

    /// The identity of the ingest's `data` when it was last looked at, and what it is.
    pub(super) fn last_seen(&self, folder: &str) -> Option<(Digest, Option<Inode>)> {
        let reception = self.receptions.get(folder)?;
        Some((reception.reference.digest.clone(), reception.sight.map(|sight| sight.inode)))
    }

    /// The ingest's `data` became the blob: whoever follows it has all of it.
    pub(super) fn committed(&mut self, folder: &str) -> Option<Digest> {
        let reception = self.receptions.remove(folder)?;
        if let (Some(live), Some(total)) = (reception.live, reception.total) {
            live.progress.send_replace(Progress { position: total, ended: true });
        }
        Some(reception.reference.digest)
    }

    /// The ingest is gone, or its `data`: whoever follows it gets no more.
    pub(super) fn gone(&mut self, folder: &str) -> Option<Digest> {
        let mut reception = self.receptions.remove(folder)?;
        if reception.live.is_some() && reception.is_whole() {
            self.discarded.push(reception.reference.digest.clone());
        }
        reception.give_up();
        Some(reception.reference.digest)
    }

    /// What its receiver had all of and did not keep: its bytes are not those of its digest, or its pull was given up at that moment.
    pub(super) fn take_discarded(&mut self) -> Vec<Digest> {
        std::mem::take(&mut self.discarded)
    }

    /// Gives up what has not grown, or was closed and not committed, for too long. Returns what is offered no more.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<Digest> {
        let stall = self.stall;
        let over = |live: &Live| live.deadline(stall) <= now;
        let receptions = self.receptions.values_mut().filter(|reception| reception.live.as_ref().is_some_and(over));
        let discarded = &mut self.discarded;
        let given_up = receptions.map(|reception| {
            if reception.is_whole() && reception.live.as_ref().is_some_and(|live| live.closed_at.is_some()) {
                discarded.push(reception.reference.digest.clone());
            }
            reception.give_up();
            reception.reference.digest.clone()
        });
        given_up.collect()
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let lives = self.receptions.values().filter_map(|reception| reception.live.as_ref());
        lives.map(|live| live.deadline(self.stall)).min()
    }

    /// The growth of a blob that is offered while it is received.
    pub(super) fn growth(&self, digest: &Digest) -> Option<Growth> {
        self.receptions.iter().filter(|(_, reception)| reception.reference.digest == *digest).find_map(
            |(folder, reception)| {
                let (live, total) = (reception.live.as_ref()?, reception.total?);
                let file = reception.file();
                Some(Growth { folder: folder.clone(), total, file, progress: live.progress.subscribe() })
            },
        )
    }

    /// Whether a blob is offered while it is received.
    pub(super) fn is_offered(&self, digest: &Digest) -> bool {
        let mut receptions = self.receptions.values().filter(|reception| reception.reference.digest == *digest);
        receptions.any(|reception| reception.live.is_some())
    }

    /// Whether a blob is awaited: its ingest was made, and no byte has come.
    pub(super) fn expects(&self, digest: &Digest) -> bool {
        let mut receptions = self.receptions.values().filter(|reception| reception.reference.digest == *digest);
        receptions.any(|reception| reception.is_awaited && reception.total.is_some())
    }

    /// What grows, and what is awaited.
    pub(super) fn arriving(&self) -> Vec<Arriving> {
        let receptions = self.receptions.values().filter(|reception| reception.live.is_some() || reception.is_awaited);
        let arriving = receptions.map(|reception| Arriving {
            digest: reception.reference.digest.clone(),
            position: reception.sight.map_or(0, |sight| sight.position),
            total: reception.total,
            is_offered: reception.live.is_some(),
        });
        arriving.collect()
    }

    /// The folders of all known ingests.
    pub(super) fn folders(&self) -> impl Iterator<Item = &str> {
        self.receptions.keys().map(|folder| &**folder)
    }
}

// === impl Reception ===

impl Reception {
    fn grew(&mut self, position: u64, now: Instant) {
        self.is_awaited = false;
        // Small things arrive in one piece, and a length that is not known cannot be promised.
        let Some(total) = self.total.filter(|total| position <= *total && self.reference.kind == Kind::Blob) else {
            return self.give_up();
        };
        let took = self.changed_at.replace(now).map_or(Duration::ZERO, |before| now.duration_since(before));
        self.pace = took.max(self.pace / 2);
        let progress = Progress { position, ended: position == total };
        match &mut self.live {
            Some(live) => {
                live.progress.send_replace(progress);
                (live.grown_at, live.pace, live.closed_at) = (now, self.pace, None);
            }
            None => {
                let progress = watch::Sender::new(progress);
                self.live = Some(Live { progress, grown_at: now, pace: self.pace, closed_at: None });
            }
        }
    }

    /// Whether as much has come as was announced.
    fn is_whole(&self) -> bool {
        self.total.is_some() && self.sight.map(|sight| sight.position) == self.total
    }

    /// A name for what was written since it last started over, the same after a restart of this process if it has not.
    fn file(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.sight.map(|sight| (sight.inode, sight.born)), self.starts).hash(&mut hasher);
        hasher.finish()
    }

    /// Tells whoever follows it that no more will come. It is offered again when it grows again.
    fn give_up(&mut self) {
        if let Some(live) = self.live.take() {
            live.progress.send_modify(|progress| progress.ended = true);
        }
    }
}

// === impl Live ===

impl Live {
    fn deadline(&self, stall: Duration) -> Instant {
        let stalled = self.grown_at + stall.max((2 * self.pace).min(SLOWEST * stall));
        self.closed_at.map_or(stalled, |closed| stalled.min(closed + COMMIT))
    }
}

#[cfg(test)]
#[path = "tracker_tests.rs"]
mod tests;
