//! A request that is held, or a body that has lost who gave it: it does what is ordered, until somebody gives it or it is to go upstream.

use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep_until, timeout};
use tracing::debug;

use super::figures::Wait;
use super::{Begun, Driver, Event, Order, Pull, Storms};
use crate::mirror::attempt::{Contact, attempt};
use crate::mirror::client::{PeerError, Timeouts};
use crate::mirror::fetch::{Streamed, Taken, Use, race_among};
use crate::mirror::peers::jitter;
use crate::mirror::{Kind, Shared, Wanted, family};
use crate::oci::{Key, MAX_MANIFEST_BYTES, RangeSpec};
use crate::router::Peer;
use crate::store::Store;
use crate::storm::{Child, Failure, Hold, HoldEnd, Node, Rank, Wish};
use crate::story::Origin;

/// How long upstream's first byte is taken to need, as long as none was measured.
const USUAL: Duration = Duration::from_millis(300);
/// How long a request is held where upstream is known to be slower than it may be held.
const BRIEFLY: Duration = Duration::from_millis(300);
/// How long the reading of manifests may take.
const READ: Duration = Duration::from_millis(50);
/// How long a parent is asked to hold a request for which it has no byte itself. What is left of the budget bounds it before.
const WAIT: Duration = Duration::from_secs(5);
/// How long a parent may give nothing until those are asked as well that were found without a coordinator.
const SILENT: Duration = Duration::from_secs(2);
/// How long after its bound a request is held that nobody has told anything.
const BEYOND: Duration = Duration::from_millis(100);

/// Our containerd's time, until dropped.
pub(super) struct Held<'a> {
    storms: &'a Storms,
    image: &'a Arc<str>,
    hold: Hold,
    deadline: Instant,
    /// Nobody but a parent that has bytes is waited for, and that until then.
    brief: Option<Instant>,
    pub(super) end: HoldEnd,
}

/// Tells who follows the blob that its client has left, if dropped before it is known how it went.
pub(super) struct Ended<'a>(pub(super) Option<&'a Pull>);

/// What a coordinator's word came to.
pub(in crate::mirror) enum Offer {
    /// Somebody gives it, and the body's end is to be told here.
    Taken(Peer, Box<Taken>, Line),
    /// No coordinator named one who gives it: whoever has it may, and else upstream.
    Nobody(Line),
    /// It was not held: it is as without storms.
    Unheld(Option<Line>),
}

/// What a body has to do with the storm that it comes by.
#[derive(Clone)]
pub(in crate::mirror) struct Line {
    storms: Arc<Storms>,
    pull: Arc<Pull>,
    orders: watch::Receiver<Order>,
    /// It comes from whom a coordinator named, and may come from another such one.
    is_led: bool,
}

type Asked = BoxFuture<'static, (Peer, Result<Taken, PeerError>)>;

// === impl Held ===

impl<'a> Held<'a> {
    pub(super) fn begin(storms: &'a Storms, image: &'a Arc<str>, now: Instant) -> Option<Self> {
        let (hold, deadline) = storms.with_budget(image, now, |budget| budget.begin(now))?;
        Some(Self { storms, image, hold, deadline, brief: None, end: HoldEnd::InVain })
    }

    /// Until when it may be held: it may have become later.
    fn deadline(&self, now: Instant) -> Instant {
        let deadline = self.storms.with_budget(self.image, now, |budget| budget.deadline()).unwrap_or(self.deadline);
        self.brief.map_or(deadline, |brief| brief.min(deadline))
    }

    /// What nobody has yet comes no sooner than upstream's first byte: where there is no time for that, only a parent that has bytes is of use.
    fn brief_beyond(mut self, usual: Option<Duration>, now: Instant) -> Self {
        self.brief = usual.filter(|usual| now + *usual >= self.deadline).map(|_| now + BRIEFLY);
        self
    }

    fn was_fed(&mut self) {
        self.end = HoldEnd::Fed { usual: self.storms.images.usual(self.image).unwrap_or(USUAL) };
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        self.storms.with_budget(self.image, now, |budget| {
            budget.end(self.hold, self.end, now);
            Some(())
        });
    }
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if let Some(pull) = self.0 {
            pull.tell(Event::Left);
        }
    }
}

// === impl Line ===

impl Line {
    fn of(storms: &Arc<Storms>, pull: Arc<Pull>, is_led: bool) -> Self {
        Self { storms: Arc::clone(storms), orders: pull.orders.subscribe(), pull, is_led }
    }

    /// The body comes by this connection now.
    pub(in crate::mirror) fn comes_by(&self, stream: &tokio::net::TcpStream) {
        self.pull.comes_by(stream);
    }

    /// The body has ended.
    pub(in crate::mirror) fn ended(&self) {
        *self.pull.socket() = None;
        self.pull.tell(Event::Ended);
    }

    /// Whether it comes from whom a coordinator named.
    pub(in crate::mirror) fn is_led(&self) -> bool {
        self.is_led
    }

    /// Whether the body was cut off here for a better place, not by its peer.
    pub(in crate::mirror) fn is_moved(&self) -> bool {
        self.is_led && self.orders.has_changed().unwrap_or(false)
    }

    /// Whether our containerd is to get the rest from upstream, for all the others.
    pub(in crate::mirror) fn is_sent_upstream(&self) -> bool {
        self.is_led && *self.orders.borrow() == Order::Upstream && self.pull.state().was_leased
    }

    /// A peer gives it that no coordinator named.
    pub(in crate::mirror) fn is_given_elsewhere(&mut self) {
        self.is_led = false;
        self.pull.tell(Event::Elsewhere);
    }
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line").field("digest", &self.pull.digest).finish_non_exhaustive()
    }
}

/// Asks who pulls what may be here for nobody, and takes it from whom a coordinator names. It goes upstream if it is told so, or for want of
/// anything better, after what is left of the pull's time at the most.
pub(in crate::mirror) async fn hold(shared: &Arc<Shared>, storms: &Arc<Storms>, wanted: &Wanted) -> Offer {
    let (Key::Digest(digest), Some(image), Some(store)) = (&wanted.key, &wanted.pull, storms.store.get()) else {
        return Offer::Unheld(None);
    };
    let (key, coordinators) = storms.asked.coordinators(&wanted.key);
    let position = match wanted.range.as_deref().map(RangeSpec::parse) {
        None => Some(0),
        Some(Some(RangeSpec::From { first, .. })) => Some(first),
        Some(_) => None,
    };
    // Alone there is nobody to wait for.
    let Some(position) = position.filter(|_| coordinators.len() >= 2) else { return Offer::Unheld(None) };
    // It is of use, and not worth a wait: containerd may be slow to say whose a manifest is.
    let total = timeout(READ, total_of(shared, storms, store, wanted)).await.unwrap_or_default();
    let now = Instant::now();
    storms.figures.asked(image, now);
    let (pull, events) = match storms.begin(digest, image, now) {
        Begun::New(pull, events) => (pull, events),
        Begun::Back(pull) => return Offer::Unheld(Some(Line::of(storms, pull, false))),
        Begun::TooMany => return Offer::Unheld(None),
    };
    let mut ended = Ended(Some(&pull));
    let usual = storms.images.usual(image);
    let held = Held::begin(storms, image, now).map(|held| held.brief_beyond(usual, now));
    let wish = Wish {
        key,
        position,
        total,
        usual,
        busy: storms.is_root() && storms.images.may_leave(image, now),
        fed: storms.images.is_arriving(image, digest, now),
    };
    let (slots, number) = (storms.feeds.slots(total), storms.number(now));
    let child = match &held {
        Some(held) => Child::new(wish, slots, coordinators, number, held.deadline(now), now),
        None => Child::apart(wish, slots, coordinators, number, now),
    };
    let mut line = Line::of(storms, Arc::clone(&pull), held.is_some());
    let driver = Driver::new(Arc::clone(shared), Arc::clone(storms), Arc::clone(store), wanted, child, &pull, events);
    tokio::spawn(driver.run());
    let Some(mut held) = held else {
        ended.0 = None;
        return Offer::Unheld(Some(line));
    };
    let holding = wanted.tale.hold();
    let lookup = shared.router.lookup(&wanted.key);
    let taken = obey(shared, &mut line, wanted, &held, Some(lookup)).await;
    if taken.is_some() {
        held.was_fed();
    }
    ended.0 = None;
    drop((held, holding));
    let (took, outcome) = (now.elapsed(), if taken.is_some() { "fed" } else { "upstream" });
    storms.figures.waited(image, Wait::FirstByte, took);
    shared.metrics.held(taken.is_some(), took.as_secs_f64());
    let trace_id = wanted.tale.trace().id();
    debug!(%trace_id, %digest, outcome, ms = took.as_secs_f64() * 1e3, "asked who has it");
    match taken {
        Some((peer, taken)) => Offer::Taken(peer, Box::new(taken), line),
        None => Offer::Nobody(line),
    }
}

/// How long what is wanted is, if a manifest tells that. What came from upstream was not seen on its way: our containerd has it.
async fn total_of(shared: &Shared, storms: &Storms, store: &Arc<dyn Store>, wanted: &Wanted) -> Option<u64> {
    let (Key::Digest(digest), Some(image)) = (&wanted.key, &wanted.pull) else { return None };
    if wanted.kind == Kind::Manifest {
        storms.images.is_described_by(image, digest, Instant::now());
    } else if shared.sizes.of(digest).is_none() {
        for manifest in storms.images.unread(image) {
            if let Ok(Some(blob)) = store.open(&manifest, wanted.repository.as_ref()).await {
                let is_manifest = blob.size <= MAX_MANIFEST_BYTES as u64;
                let bytes = if is_manifest { blob.bytes().unwrap_or_default() } else { Bytes::new() };
                shared.sizes.learn(&family::children(&bytes));
                storms.images.was_read(image, &manifest);
            }
        }
    }
    shared.sizes.of(digest)
}

/// Tells who follows a blob that no coordinator's word brought what came of looking for it otherwise.
///
/// # Errors
/// That of `search`.
pub(in crate::mirror) async fn follow<T, E>(
    mut line: Option<Line>,
    search: impl Future<Output = Result<T, E>>,
) -> Result<(T, Option<Line>), E> {
    let pull = line.as_ref().map(|line| Arc::clone(&line.pull));
    let mut ended = Ended(pull.as_deref());
    let found = search.await;
    ended.0 = None;
    match (&found, &mut line) {
        (Ok(_), Some(line)) => line.is_given_elsewhere(),
        (Err(_), Some(line)) => line.pull.tell(Event::Upstream),
        (_, None) => {}
    }
    found.map(|found| (found, line))
}

/// Takes the rest of a body from whom a coordinator names, after the peer that gave it was left or failed.
pub(in crate::mirror) async fn resume(
    shared: &Arc<Shared>,
    line: &mut Line,
    wanted: &Wanted,
    failure: Failure,
) -> Option<(Peer, Streamed)> {
    if !line.is_led {
        return None;
    }
    let (storms, pull) = (Arc::clone(&line.storms), Arc::clone(&line.pull));
    let image = Arc::clone(&pull.image);
    let now = Instant::now();
    let mut held = Held::begin(&storms, &image, now);
    if !line.is_moved() {
        let deadline = held.as_ref().map(|held| held.deadline);
        pull.tell(Event::Failed(failure, deadline));
    }
    let Some(held) = &mut held else { return None };
    let _holding = wanted.tale.hold();
    let taken = obey(shared, line, wanted, held, None).await;
    storms.figures.waited(&image, Wait::Parent, now.elapsed());
    match taken {
        Some((peer, Taken::Streamed(streamed))) => {
            held.was_fed();
            Some((peer, streamed))
        }
        _ => None,
    }
}

/// Does what is ordered until somebody gives it; nothing if it is to go upstream.
async fn obey(
    shared: &Arc<Shared>,
    line: &mut Line,
    wanted: &Wanted,
    held: &Held<'_>,
    mut lookup: Option<mpsc::Receiver<Peer>>,
) -> Option<(Peer, Taken)> {
    let mut asked: Option<Asked> = None;
    let mut beside: Option<Asked> = None;
    let mut found: Vec<Peer> = Vec::new();
    let began = Instant::now();
    let listen = began + shared.settings.resolve_timeout;
    loop {
        if line.is_moved() {
            match *line.orders.borrow_and_update() {
                Order::Wait => {}
                Order::Upstream => return None,
                Order::Fetch { parent, rank } => {
                    asked = ask(shared, &line.storms, wanted, parent, rank);
                    asked.iter().for_each(|_| wanted.tale.asks(beside.is_some()));
                    if asked.is_none() {
                        line.pull.tell(Event::Failed(Failure::Refused, Some(held.deadline(Instant::now()))));
                    }
                }
            }
        }
        let bound = held.deadline(Instant::now()) + BEYOND;
        let beside_at = began + if asked.is_some() { SILENT } else { shared.settings.hedge };
        tokio::select! {
            biased;
            (peer, result) = ready(&mut asked) => {
                asked = None;
                match result {
                    Ok(taken) => {
                        line.pull.tell(Event::Fed);
                        wanted.tale.given(peer.addresses.first().copied(), Origin::Coordinator);
                        shared.sources.found(&wanted.key, &peer, Instant::now());
                        return Some((peer, taken));
                    }
                    Err(error) => {
                        let trace_id = wanted.tale.trace().id();
                        debug!(%trace_id, digest = %line.pull.digest, peer = %peer.id, %error, "the parent gave nothing");
                        wanted.tale.failed(peer.addresses.first().copied(), &error);
                        shared.met_as_parent(&wanted.key, &peer, &error);
                        let failure = match error {
                            PeerError::Status(_) | PeerError::Circle | PeerError::Busy(_) | PeerError::Unfit(_) => Failure::Refused,
                            _ => Failure::Broke,
                        };
                        line.pull.tell(Event::Failed(failure, Some(held.deadline(Instant::now()))));
                    }
                }
            }
            (peer, result) = ready(&mut beside) => {
                beside = None;
                if let Ok(taken) = result {
                    line.is_given_elsewhere();
                    return Some((peer, taken));
                }
            }
            peer = next(&mut lookup), if Instant::now() < listen => match peer {
                Some(peer) => found.push(peer),
                None => lookup = None,
            },
            changed = line.orders.changed() => {
                if changed.is_err() {
                    return None;
                }
                // Seen above.
                line.orders.mark_changed();
            }
            // They had it before we asked. A parent may wait for first bytes itself, and whether it is there is asked apart: to leave it for them
            // at once would bring all to the few that had it.
            () = sleep_until(beside_at.into()),
                if !found.is_empty() && beside.is_none() =>
            {
                if asked.is_some() {
                    wanted.tale.races();
                }
                let (shared, wanted, among) = (Arc::clone(shared), wanted.clone(), std::mem::take(&mut found));
                beside = Some(Box::pin(async move { race_among(&shared, &wanted, among).await }));
            }
            // It may have become later.
            () = sleep_until(bound.into()) => if Instant::now() >= held.deadline(Instant::now()) + BEYOND {
                return None;
            },
        }
    }
}

async fn ready(asked: &mut Option<Asked>) -> (Peer, Result<Taken, PeerError>) {
    match asked {
        Some(asked) => asked.await,
        None => pending().await,
    }
}

async fn next(lookup: &mut Option<mpsc::Receiver<Peer>>) -> Option<Peer> {
    match lookup {
        Some(lookup) => lookup.recv().await,
        None => pending().await,
    }
}

/// Asks a parent that a coordinator named; nothing if it is not known here, or has sent what was wrong.
fn ask(shared: &Arc<Shared>, storms: &Storms, wanted: &Wanted, parent: Node, rank: Rank) -> Option<Asked> {
    let now = Instant::now();
    let mut peer = storms.asked.peer(parent)?;
    let is_barred = |address: &SocketAddr| shared.blame.is_barred(&wanted.key, *address, now);
    peer.addresses.retain(|address| !is_barred(address));
    let first = *peer.addresses.first()?;
    let timeouts = shared.settings.timeouts;
    let timeouts = Timeouts { head: timeouts.head.max(WAIT), ..timeouts };
    let (shared, wanted) = (Arc::clone(shared), Wanted { wait: Some(WAIT), rank: Some(rank), ..wanted.clone() });
    Some(Box::pin(async move {
        let mut contact = Contact::default();
        let bound = timeouts.connect + timeouts.head + shared.settings.stall * 2;
        let asking = attempt(&shared, &wanted, &peer, timeouts, Use::new(&shared, first), &mut contact);
        let late = PeerError::Late { what: "answer", bound };
        let result = timeout(bound, asking).await.unwrap_or(Err(late));
        if let Some(met) = contact.address {
            peer.addresses = vec![met];
        }
        (peer, result)
    }))
}

impl Shared {
    /// Remembers what a parent did that was asked for by a coordinator's word.
    fn met_as_parent(&self, key: &Key, peer: &Peer, error: &PeerError) {
        self.convict(key, peer, error);
        if matches!(error, PeerError::Connect(_) | PeerError::Malformed(_)) {
            let now = Instant::now();
            peer.addresses.iter().for_each(|address| {
                self.peers.failed(*address, self.settings.timeouts.connect, now, jitter());
            });
        }
    }
}
