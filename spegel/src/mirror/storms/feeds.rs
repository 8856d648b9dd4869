//! What this node gives to others while a storm lasts: who is taken, how fast each gets it, and who is let go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;

use super::Storms;
use crate::oci::{self, Digest};
use crate::storm::{Asker, Key, MAX_SLOTS, Parent, Refusal, Standing};
use crate::zerocopy::Growing;

/// How often it is looked how fast each gets it.
const LOOK: Duration = Duration::from_millis(250);

/// Who asks this node for a blob, and how much of it is here.
#[derive(Clone, Debug)]
pub struct Served<'a> {
    /// The blob.
    pub digest: &'a Digest,
    /// Its bytes as they come in; nothing if all are here.
    pub growing: Option<&'a Growing>,
    /// The blob's length in bytes; 0 if it is not known yet.
    pub total: u64,
    /// The first byte that is asked for.
    pub first: u64,
    /// Where a coordinator counted the asker, if that sent it here.
    pub rank: Option<crate::storm::Rank>,
}

/// What is given to all.
#[derive(Debug)]
pub(super) struct Feeds {
    state: Mutex<State>,
    /// Bytes of all blobs that our containerd has got.
    received: AtomicU64,
}

#[derive(Debug)]
struct State {
    parent: Parent,
    given: HashMap<u64, Given>,
    next: u64,
    is_looked_at: bool,
}

#[derive(Debug)]
struct Given {
    digest: Digest,
    first: u64,
    total: u64,
    growing: Option<Growing>,
    is_complete: bool,
    sent: Arc<AtomicU64>,
    away: watch::Sender<bool>,
}

/// A blob that is given to somebody, until dropped.
#[derive(Debug)]
pub struct Feed {
    storms: Arc<Storms>,
    number: u64,
    sent: Arc<AtomicU64>,
    away: watch::Receiver<bool>,
}

// === impl Feeds ===

impl Feeds {
    pub(super) fn new(now: Instant) -> Self {
        let state = State { parent: Parent::new(MAX_SLOTS, now), given: HashMap::new(), next: 0, is_looked_at: false };
        Self { state: Mutex::new(state), received: AtomicU64::new(0) }
    }

    /// Our containerd has got so many bytes more.
    pub(super) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many children a blob of this length may have here while it comes in.
    pub(super) fn slots(&self, total: Option<u64>) -> u16 {
        self.state().parent.slots(total, false)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// How much of it is here now.
    fn standing(given: &Given, storms: &Storms) -> Standing {
        let pull = storms.standing(&given.digest);
        let progress = given.growing.as_ref().map(Growing::progress);
        let complete = given.is_complete || progress.is_some_and(|progress| progress.position == given.total);
        Standing {
            position: if given.is_complete { given.total } else { progress.map_or(0, |progress| progress.position) },
            complete,
            is_root: pull.is_root,
            rank: pull.rank,
        }
    }
}

// === impl Storms ===

impl Storms {
    /// Takes somebody as one who is given a blob from now on. Who was sent here by a coordinator is told no if there are too many or it may be
    /// above us; others are only counted.
    ///
    /// # Errors
    /// Why it is not taken.
    pub(crate) fn serve(self: &Arc<Self>, served: &Served<'_>, now: Instant) -> Result<Feed, Refusal> {
        let key = Key(oci::Key::from(served.digest.clone()).sha256());
        let asker = Asker { position: served.first, rank: served.rank };
        let (away, seen) = watch::channel(false);
        let sent = Arc::new(AtomicU64::new(0));
        let given = Given {
            digest: served.digest.clone(),
            first: served.first,
            total: served.total,
            growing: served.growing.cloned(),
            is_complete: served.growing.is_none() && served.total > 0,
            sent: Arc::clone(&sent),
            away,
        };
        let own = State::standing(&given, self);
        let mut state = self.feeds.state();
        if served.rank.is_some() {
            state.parent.admit(&key, &own, &asker)?;
            if let Some(pull) = self.pulls().get(served.digest) {
                self.images.is_shared(&pull.image, now);
            }
        }
        let number = state.next;
        state.next += 1;
        // Who was not sent by a coordinator is bounded by the uploads.
        if state.given.len() < usize::from(MAX_SLOTS) {
            state.parent.begin(number, key, &asker, &own, now);
            state.given.insert(number, given);
        }
        if !std::mem::replace(&mut state.is_looked_at, true) {
            tokio::spawn(look_on(Arc::clone(self)));
        }
        drop(state);
        Ok(Feed { storms: Arc::clone(self), number, sent, away: seen })
    }

    /// Looks at how fast each gets it; false if nobody gets anything.
    fn look(&self, now: Instant) -> bool {
        let mut state = self.feeds.state();
        let state = &mut *state;
        if state.given.is_empty() {
            state.is_looked_at = false;
            return false;
        }
        for (number, given) in &state.given {
            let own = State::standing(given, self);
            state.parent.sent(*number, given.first + given.sent.load(Ordering::Relaxed), &own);
        }
        state.parent.received(self.feeds.received.load(Ordering::Relaxed));
        let look = state.parent.look(now);
        if let Some(given) = look.shed.and_then(|number| state.given.get(&number)) {
            // It may take a while to go.
            if !given.away.send_replace(true) {
                self.figures.shed();
            }
        }
        if look.changed {
            self.tell_slots(|total| state.parent.slots(total, false));
        }
        true
    }
}

async fn look_on(storms: Arc<Storms>) {
    loop {
        sleep(LOOK).await;
        if !storms.look(Instant::now()) {
            return;
        }
    }
}

// === impl Feed ===

impl Feed {
    /// What was waited for has come.
    pub(crate) fn comes(&self, growing: Option<&Growing>, total: u64) {
        if let Some(given) = self.storms.feeds.state().given.get_mut(&self.number) {
            (given.growing, given.total, given.is_complete) = (growing.cloned(), total, growing.is_none());
        }
    }

    /// Where the bytes are counted that are sent.
    pub(crate) fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.sent)
    }

    /// Becomes true if it has to go elsewhere.
    pub(crate) fn away(&self) -> watch::Receiver<bool> {
        self.away.clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut state = self.storms.feeds.state();
        state.given.remove(&self.number);
        state.parent.end(self.number);
    }
}
