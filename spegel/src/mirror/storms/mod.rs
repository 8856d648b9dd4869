//! What nobody has yet: asking who pulls it, and holding the request of our own containerd until a peer gives it.
//!
//! The decisions are [`storm`](crate::storm)'s. Here they are carried out: messages sent, peers asked, and what our containerd gets followed in
//! the store.

mod drive;
mod feeds;
mod figures;
mod held;
mod images;
mod view;

use std::collections::HashMap;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use socket2::{SockRef, Socket};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, watch};
use tracing::warn;

use super::{StormSettings, Wanted};
use crate::oci::{Digest, Key};
use crate::router::{self, Router};
use crate::store::Store;
use crate::storm::{Asker, Budget, Budgets, Failure, Node, Rank, Standing};

use drive::Driver;

pub use feeds::{Feed, Served};
pub(crate) use figures::StormFigures;
pub use view::{StormImage, StormPull, StormSource, StormsView};

pub(super) use held::{Line, Offer, follow, hold, resume};

/// How many blobs are followed at a time. More are not held.
const PULLS: usize = 1024;
/// How many events of a blob wait for who follows it.
const EVENTS: usize = 64;
/// For how long after it was sent upstream a request is not held: containerd comes to us with it once more when a body ends early.
const JUST_TOLD: Duration = Duration::from_secs(3);

/// The storms that this node takes part in.
#[derive(Debug)]
pub(crate) struct Storms {
    asked: Arc<dyn router::Storms>,
    store: OnceLock<Arc<dyn Store>>,
    budgets: Mutex<Budgets<Arc<str>>>,
    pulls: Mutex<HashMap<Digest, Arc<Pull>>>,
    images: images::Images,
    feeds: feeds::Feeds,
    figures: StormFigures,
    /// Somebody was seen that does not say who it is.
    is_unnamed: AtomicBool,
    /// The microseconds since 1970 at an instant.
    numbers: (Instant, u64),
}

/// Something that our containerd wants, as long as it has not got it.
#[derive(Debug)]
struct Pull {
    digest: Digest,
    /// The image that it is a part of.
    image: Arc<str>,
    state: Mutex<PullState>,
    /// Whoever waits here for first bytes has to leave.
    away: Notify,
    /// What the request is to do, or the body's end: the latest.
    orders: watch::Sender<Order>,
    events: mpsc::Sender<Event>,
    /// The connection that it comes by, if it does.
    socket: Mutex<Option<Socket>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct PullState {
    rank: Option<Rank>,
    is_root: bool,
    /// A coordinator said so.
    was_leased: bool,
    /// When it was sent upstream.
    told: Option<Instant>,
}

/// What is to be done for our containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// To wait.
    Wait,
    /// To ask this node.
    Fetch { parent: Node, rank: Rank },
    /// To let it go upstream.
    Upstream,
}

/// What our containerd's request for something came to.
enum Begun {
    /// It is followed from now on.
    New(Arc<Pull>, mpsc::Receiver<Event>),
    /// It was sent upstream a moment ago, and is followed.
    Back(Arc<Pull>),
    /// Too many are.
    TooMany,
}

/// What happened to a request or a body.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// The parent gives it.
    Fed,
    /// The parent that was asked, or gave it, failed. It is held again until then at the most.
    Failed(Failure, Option<Instant>),
    /// A peer gives it that no coordinator named.
    Elsewhere,
    /// Nobody gives it: our containerd goes upstream, if it was not sent there already.
    Upstream,
    /// The body has ended.
    Ended,
    /// The client has left before it got anything.
    Left,
    /// So many children can be had for it.
    Slots(u16),
}

// === impl Storms ===

impl Storms {
    /// Nothing if the router takes no part in storms, or the settings say so.
    pub(super) fn new(
        router: &dyn Router,
        settings: Option<StormSettings>,
        figures: StormFigures,
    ) -> Option<Arc<Self>> {
        let (asked, settings) = router.storms().zip(settings)?;
        Some(Arc::new(Self {
            asked,
            store: OnceLock::new(),
            budgets: Mutex::new(Budgets::new(settings.max_wait)),
            pulls: Mutex::default(),
            images: images::Images::default(),
            feeds: feeds::Feeds::new(Instant::now()),
            figures,
            is_unnamed: AtomicBool::new(false),
            numbers: (Instant::now(), since_1970()),
        }))
    }

    /// Where it is seen how much our containerd has got.
    pub(super) fn look_at(&self, store: Arc<dyn Store>) {
        // Only the first is kept: there is one.
        let _ = self.store.set(store);
    }

    /// Whether a request may be held at all: that of our own containerd for a digest, from some byte on.
    pub(super) fn concern(&self, wanted: &Wanted) -> bool {
        matches!(wanted.key, Key::Digest(_)) && wanted.pull.is_some() && wanted.is_own && !wanted.head_only
    }

    /// Says once if nothing can come of storms since our containerd, or whoever asks, does not say who it is.
    pub(super) fn look_for_name(&self, wanted: &Wanted) {
        let is_unnamed = matches!(wanted.key, Key::Digest(_)) && wanted.pull.is_some() && !wanted.is_own;
        if is_unnamed && !self.is_unnamed.swap(true, Ordering::Relaxed) {
            warn!(
                "a pull does not say whose it is, and takes no part in storms: `spegel configuration` and `spegel registry` need the same \
                 --node-name, which hosts.toml then carries as X-Spegel-Node"
            );
        }
    }

    /// Whether somebody of this rank may wait here for the first bytes of a blob that our containerd has none of either.
    pub(super) fn may_wait(&self, digest: &Digest, rank: Rank) -> bool {
        let Some(state) = self.pulls().get(digest).map(|pull| *pull.state()) else { return false };
        let own = Standing { position: 0, complete: false, is_root: state.is_root, rank: state.rank };
        own.may_feed(&Asker { position: 0, rank: Some(rank) })
    }

    /// Ends when somebody of this rank may not wait for the first bytes of a blob any more.
    pub(super) async fn sent_away(&self, digest: &Digest, rank: Rank) {
        loop {
            let Some(pull) = self.pulls().get(digest).cloned() else { return };
            // Before the look: what is told between the two counts as well.
            let away = pull.away.notified();
            if !self.may_wait(digest, rank) {
                return;
            }
            away.await;
        }
    }

    fn standing(&self, digest: &Digest) -> PullState {
        self.pulls().get(digest).map(|pull| *pull.state()).unwrap_or_default()
    }

    /// From now on our containerd wants it.
    fn begin(&self, digest: &Digest, image: &Arc<str>, now: Instant) -> Begun {
        let mut pulls = self.pulls();
        let before = pulls.get(digest);
        let is_recent = |told: Instant| now.saturating_duration_since(told) < JUST_TOLD;
        if let Some(before) = before.filter(|before| before.state().told.is_some_and(is_recent)) {
            return Begun::Back(Arc::clone(before));
        }
        if before.is_none() && pulls.len() >= PULLS {
            return Begun::TooMany;
        }
        let (events, heard) = mpsc::channel(EVENTS);
        let pull = Arc::new(Pull {
            digest: digest.clone(),
            image: Arc::clone(image),
            state: Mutex::default(),
            away: Notify::new(),
            orders: watch::Sender::new(Order::Wait),
            events,
            socket: Mutex::default(),
        });
        if let Some(before) = pulls.insert(digest.clone(), Arc::clone(&pull)) {
            before.away.notify_waiters();
        }
        Begun::New(pull, heard)
    }

    /// Larger than any before of this node: what comes later is newer. A clock that is set back does not matter while the process lasts.
    fn number(&self, now: Instant) -> u64 {
        let (since, epoch) = self.numbers;
        epoch.saturating_add(u64::try_from(now.saturating_duration_since(since).as_micros()).unwrap_or(u64::MAX / 2))
    }

    /// It is not wanted any more, unless it was asked for anew since.
    fn end(&self, pull: &Arc<Pull>) {
        let mut pulls = self.pulls();
        if pulls.get(&pull.digest).is_some_and(|known| Arc::ptr_eq(known, pull)) {
            pulls.remove(&pull.digest);
        }
    }

    /// Whether our containerd pulls anything from upstream.
    fn is_root(&self) -> bool {
        self.pulls().values().any(|pull| pull.state().is_root)
    }

    fn is_current(&self, pull: &Arc<Pull>) -> bool {
        self.pulls().get(&pull.digest).is_some_and(|known| Arc::ptr_eq(known, pull))
    }

    /// More or fewer children can be had.
    fn tell_slots(&self, slots: impl Fn(Option<u64>) -> u16) {
        for pull in self.pulls().values() {
            // The blob's length is with who follows it: all but small ones have as many. One that is too busy to hear it hears the next one.
            let _ = pull.events.try_send(Event::Slots(slots(None)));
        }
    }

    fn with_budget<T>(&self, name: &Arc<str>, now: Instant, what: impl FnOnce(&mut Budget) -> Option<T>) -> Option<T> {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        budgets.of(Arc::clone(name), now).and_then(what)
    }

    fn pulls(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Pull>>> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn since_1970() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX / 2)
}

// === impl Pull ===

impl Pull {
    fn state(&self) -> MutexGuard<'_, PullState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn socket(&self) -> MutexGuard<'_, Option<Socket>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells who follows it. That reads at once, or has ended.
    fn tell(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// It comes by this connection now.
    fn comes_by(&self, stream: &TcpStream) {
        *self.socket() = SockRef::from(stream).try_clone().ok();
    }

    /// Ends the connection that it comes by: what came is still passed on, and then another one is looked for.
    fn cut(&self) {
        if let Some(socket) = &*self.socket() {
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Whether bytes came that our containerd has not taken yet.
    fn has_unread(&self) -> bool {
        let socket = self.socket();
        socket.as_ref().is_some_and(|socket| rustix::io::ioctl_fionread(socket).is_ok_and(|unread| unread > 0))
    }
}
