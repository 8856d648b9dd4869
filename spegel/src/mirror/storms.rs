//! What nobody has yet: asking who pulls it, and holding the request of our own containerd until a peer gives it.
//!
//! The decisions are [`storm`]'s. Here they are carried out: messages sent, peers asked, and what our containerd gets followed in the store.

use std::collections::HashMap;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until, timeout};
use tracing::{debug, info};

use super::attempt::{Contact, attempt};
use super::client::{PeerError, Timeouts};
use super::fetch::{Taken, Use};
use super::relay;
use super::{Shared, StormSettings, Wanted};
use crate::oci::{Digest, Key, RangeSpec};
use crate::router::{self, Peer, Router};
use crate::store::{Found, Store};
use crate::storm::{
    ANSWER, Action, Asker, Budget, Budgets, Child, Failure, Hold, HoldEnd, Node, Parent, Rank, Request, Response,
    Source, Standing, Wish,
};

/// How long upstream's first byte is taken to need, as long as none was measured.
const USUAL: Duration = Duration::from_millis(300);
/// How long a parent is asked to hold a request for which it has no byte itself. What is left of the budget bounds it before.
const WAIT: Duration = Duration::from_secs(5);
/// How often it is looked how much our containerd has got.
const LOOK: Duration = Duration::from_millis(100);
/// How long after the last sign of a blob in the store it counts as given up. containerd 2.2 shows none between the mirror's 404 and upstream's
/// first bytes.
const GONE: Duration = Duration::from_millis(1500);
/// How many blobs are followed at a time. More are not held.
const PULLS: usize = 1024;
/// How long a blob is followed at the longest.
const LONGEST: Duration = Duration::from_secs(3600);

/// The storms that this node takes part in.
#[derive(Debug)]
pub(super) struct Storms {
    asked: Arc<dyn router::Storms>,
    store: OnceLock<Arc<dyn Store>>,
    budgets: Mutex<Budgets<Arc<str>>>,
    pulls: Mutex<HashMap<Digest, Arc<Pull>>>,
    /// What upstream's first byte takes, smoothed.
    usual: Mutex<Option<Duration>>,
}

/// A blob that our containerd wants, as long as it has not got it.
#[derive(Debug, Default)]
struct Pull {
    state: Mutex<PullState>,
    /// Whoever waits here for first bytes has to leave.
    away: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct PullState {
    rank: Option<Rank>,
    is_root: bool,
}

/// A request is held, until dropped.
struct Held<'a> {
    storms: &'a Storms,
    name: &'a Arc<str>,
    hold: Hold,
    deadline: Instant,
    end: HoldEnd,
}

/// What comes back of what was sent.
enum News {
    Answered(u64, Option<Response>),
    /// How many bytes a parent has, if it says so.
    Probed(Node, Option<u64>),
}

type Asked<'a> = BoxFuture<'a, (Peer, Result<Taken, PeerError>)>;

// === impl Storms ===

impl Storms {
    /// Nothing if the router takes no part in storms, or the settings say so.
    pub(super) fn new(router: &dyn Router, settings: Option<StormSettings>) -> Option<Arc<Self>> {
        let (asked, settings) = router.storms().zip(settings)?;
        Some(Arc::new(Self {
            asked,
            store: OnceLock::new(),
            budgets: Mutex::new(Budgets::new(settings.max_wait)),
            pulls: Mutex::default(),
            usual: Mutex::default(),
        }))
    }

    /// Where it is seen how much our containerd has got.
    pub(super) fn look_at(&self, store: Arc<dyn Store>) {
        // Only the first is kept: there is one.
        let _ = self.store.set(store);
    }

    /// Whether somebody of this rank may wait here for the first bytes of a blob that our containerd has none of either.
    pub(super) fn may_wait(&self, digest: &Digest, rank: Rank) -> bool {
        let Some(state) = self.pulls().get(digest).map(|pull| *pull.state()) else { return false };
        let own = Standing { position: 0, complete: false, is_root: state.is_root, rank: state.rank };
        own.may_feed(&Asker { position: 0, rank: Some(rank) })
    }

    /// Ends when those who wait for the first bytes of a blob have to leave.
    pub(super) async fn sent_away(&self, digest: &Digest) {
        let pull = self.pulls().get(digest).cloned();
        match pull {
            Some(pull) => pull.away.notified().await,
            None => pending().await,
        }
    }

    /// From now on our containerd wants the blob; nothing if too many are wanted.
    fn begin(&self, digest: &Digest) -> Option<Arc<Pull>> {
        let pull = Arc::new(Pull::default());
        let mut pulls = self.pulls();
        if pulls.len() >= PULLS && !pulls.contains_key(digest) {
            return None;
        }
        if let Some(before) = pulls.insert(digest.clone(), Arc::clone(&pull)) {
            before.away.notify_waiters();
        }
        Some(pull)
    }

    /// It is not wanted any more, unless it was asked for anew since.
    fn end(&self, digest: &Digest, pull: &Arc<Pull>) {
        let mut pulls = self.pulls();
        if pulls.get(digest).is_some_and(|known| Arc::ptr_eq(known, pull)) {
            pulls.remove(digest);
        }
    }

    /// Whether our containerd pulls anything from upstream.
    fn is_root(&self) -> bool {
        self.pulls().values().any(|pull| pull.state().is_root)
    }

    fn is_current(&self, digest: &Digest, pull: &Arc<Pull>) -> bool {
        self.pulls().get(digest).is_some_and(|known| Arc::ptr_eq(known, pull))
    }

    fn with_budget<T>(&self, name: &Arc<str>, now: Instant, what: impl FnOnce(&mut Budget) -> Option<T>) -> Option<T> {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        budgets.of(Arc::clone(name), now).and_then(what)
    }

    fn usual(&self) -> Option<Duration> {
        *self.usual.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, took: Duration) {
        let mut usual = self.usual.lock().unwrap_or_else(PoisonError::into_inner);
        *usual = Some(usual.map_or(took, |usual| (usual * 3 + took) / 4));
    }

    fn pulls(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Pull>>> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Pull ===

impl Pull {
    fn state(&self) -> MutexGuard<'_, PullState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Held ===

impl<'a> Held<'a> {
    fn begin(storms: &'a Storms, name: &'a Arc<str>, now: Instant) -> Option<Self> {
        let (hold, deadline) = storms.with_budget(name, now, |budget| budget.begin(now))?;
        Some(Self { storms, name, hold, deadline, end: HoldEnd::InVain })
    }

    /// Until when it may be held: it may have become later.
    fn deadline(&self, now: Instant) -> Option<Instant> {
        self.storms.with_budget(self.name, now, |budget| budget.deadline()).or(Some(self.deadline))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        self.storms.with_budget(self.name, now, |budget| {
            budget.end(self.hold, self.end, now);
            Some(())
        });
    }
}

/// Larger than any before of this node: what comes later is newer.
fn number() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX / 2)
}

/// Asks who pulls what nobody has, and takes it from there. Nothing if containerd is to go upstream: told so, or for want of anything
/// better, after what is left of the pull's time at the most.
pub(super) async fn hold(shared: &Arc<Shared>, storms: &Arc<Storms>, wanted: &Wanted) -> Option<(Peer, Taken)> {
    let (Key::Digest(digest), Some(name), true) = (&wanted.key, &wanted.pull, wanted.is_own) else { return None };
    let (key, coordinators) = storms.asked.coordinators(&wanted.key);
    let now = Instant::now();
    // Alone there is nobody to wait for.
    if coordinators.len() < 2 || storms.store.get().is_none() {
        return None;
    }
    let position = match wanted.range.as_deref().map(RangeSpec::parse) {
        None => 0,
        Some(Some(RangeSpec::From { first, .. })) => first,
        Some(_) => return None,
    };
    let held = Held::begin(storms, name, now)?;
    let pull = storms.begin(digest)?;
    let total = shared.sizes.of(digest);
    let wish = Wish { key, position, total, usual: storms.usual(), busy: storms.is_root() };
    let child = Child::new(wish, Parent::slots_at_first(total), coordinators, number(), held.deadline, now);
    let mut holding = Holding { shared, storms, wanted, digest, held, child, pull: Arc::clone(&pull) };
    let found = holding.run().await;
    let Holding { mut held, child, .. } = holding;
    let outcome = match (&found, child.source()) {
        (Some(_), _) => "fed",
        (None, _) => "upstream",
    };
    if found.is_some() {
        held.end = HoldEnd::Fed { usual: storms.usual().unwrap_or(USUAL) };
    } else {
        pull.state().is_root = true;
    }
    drop(held);
    info!(%digest, outcome, ms = now.elapsed().as_secs_f64() * 1e3, "nobody had it");
    shared.metrics.held(found.is_some(), now.elapsed().as_secs_f64());
    tokio::spawn(follow(Arc::clone(storms), digest.clone(), pull, child, found.is_none()));
    found
}

/// A request that is held.
struct Holding<'a> {
    shared: &'a Arc<Shared>,
    storms: &'a Arc<Storms>,
    wanted: &'a Wanted,
    digest: &'a Digest,
    held: Held<'a>,
    child: Child,
    pull: Arc<Pull>,
}

impl<'a> Holding<'a> {
    async fn run(&mut self) -> Option<(Peer, Taken)> {
        let mut news: FuturesUnordered<BoxFuture<'a, News>> = FuturesUnordered::new();
        let mut asked: Option<Asked<'a>> = None;
        loop {
            while let Some(action) = self.child.poll(Instant::now()) {
                match action {
                    Action::Send { to, request } => news.push(send(self.storms, to, request)),
                    Action::Fetch { parent, rank } => {
                        self.pull.state().rank = Some(rank);
                        asked = self.ask(parent, rank);
                        if asked.is_none() {
                            self.failed(Failure::Refused);
                        }
                    }
                    Action::Probe { parent } => news.push(self.probe(parent)),
                    Action::SendAway => self.pull.away.notify_waiters(),
                    Action::Pull | Action::GiveUp => return None,
                }
            }
            if !matches!(self.child.source(), Source::Asked(_)) {
                asked = None;
            }
            let wake = self.child.wake().unwrap_or_else(|| Instant::now() + ANSWER);
            tokio::select! {
                biased;
                (peer, result) = async { match &mut asked { Some(asked) => asked.await, None => pending().await } } => {
                    asked = None;
                    match result {
                        Ok(taken) => {
                            self.child.fed(Instant::now());
                            self.shared.sources.found(&self.wanted.key, &peer, Instant::now());
                            return Some((peer, taken));
                        }
                        Err(error) => {
                            debug!(digest = %self.digest, peer = %peer.id, %error, "the parent gave nothing");
                            self.failed(match error {
                                PeerError::Status(_) | PeerError::Circle | PeerError::Busy(_) => Failure::Refused,
                                _ => Failure::Broke,
                            });
                        }
                    }
                }
                Some(news) = news.next() => self.hear(news),
                () = sleep_until(wake.into()) => {}
            }
        }
    }

    fn hear(&mut self, news: News) {
        let now = Instant::now();
        match news {
            News::Answered(number, Some(response)) => self.child.answered(number, response, now),
            News::Answered(number, None) => self.child.not_reached(number, now),
            News::Probed(node, position) if self.child.source() == Source::Asked(node) => match position {
                Some(position) => self.child.parent_has(position, now),
                None => self.failed(Failure::Broke),
            },
            News::Probed(..) => {}
        }
    }

    fn failed(&mut self, failure: Failure) {
        let now = Instant::now();
        self.child.failed(failure, self.held.deadline(now), now);
    }

    fn ask(&self, parent: Node, rank: Rank) -> Option<Asked<'a>> {
        let peer = self.storms.asked.peer(parent)?;
        let first = *peer.addresses.first()?;
        let timeouts = self.shared.settings.timeouts;
        let timeouts = Timeouts { head: timeouts.head.max(WAIT), ..timeouts };
        let (shared, wanted) = (Arc::clone(self.shared), self.wanted.clone());
        Some(Box::pin(async move {
            let wanted = Wanted { wait: Some(WAIT), rank: Some(rank), ..wanted };
            let result =
                attempt(&shared, &wanted, &peer, timeouts, Use::new(&shared, first), &mut Contact::default()).await;
            (peer, result)
        }))
    }

    /// Asks a parent whether it is there at all. It answers that it has nothing as well as how much it has.
    fn probe(&self, parent: Node) -> BoxFuture<'a, News> {
        let peer = self.storms.asked.peer(parent);
        let (shared, wanted) = (Arc::clone(self.shared), self.wanted.clone());
        Box::pin(async move {
            let Some(first) = peer.as_ref().and_then(|peer| peer.addresses.first()) else {
                return News::Probed(parent, None);
            };
            let answer = timeout(ANSWER, relay::answers(&shared, &wanted, *first)).await;
            News::Probed(parent, answer.unwrap_or(None))
        })
    }
}

fn send<'a>(storms: &Storms, to: Node, request: Request) -> BoxFuture<'a, News> {
    let number = request.number();
    let answer = storms.asked.ask(to, request);
    Box::pin(async move { News::Answered(number, answer.await.ok()) })
}

/// Follows what our containerd gets of the blob until it has all or gave it up, and tells coordinators: all the way if it comes from upstream,
/// else once it is here.
async fn follow(storms: Arc<Storms>, digest: Digest, pull: Arc<Pull>, mut child: Child, is_root: bool) {
    let Some(store) = storms.store.get().cloned() else { return };
    let (began, mut seen, mut first) = (Instant::now(), Instant::now(), is_root);
    let mut answers: FuturesUnordered<BoxFuture<'static, News>> = FuturesUnordered::new();
    while storms.is_current(&digest, &pull) && began.elapsed() < LONGEST {
        let found = store.expect(&digest, None, LOOK).await.ok().flatten();
        let now = Instant::now();
        match found {
            Some(Found::Complete(_)) => {
                child.complete(now);
                break;
            }
            Some(Found::Receiving(receiving)) => {
                seen = now;
                let position = receiving.growing.progress().position;
                if position > 0 && std::mem::take(&mut first) {
                    storms.learn(began.elapsed());
                }
                child.grew(position, now);
                sleep(LOOK).await;
            }
            None if now.duration_since(seen) >= GONE => {
                child.gone(now);
                break;
            }
            // Awaited as yet, or being renamed.
            None => sleep(LOOK / 10).await,
        }
        if is_root {
            tell(&storms, &mut child, &mut answers);
            while let Ok(Some(News::Answered(number, Some(response)))) = timeout(Duration::ZERO, answers.next()).await {
                child.answered(number, response, Instant::now());
            }
        }
    }
    pull.away.notify_waiters();
    storms.end(&digest, &pull);
    tell(&storms, &mut child, &mut answers);
    // Nobody waits for the answers.
    let _ = timeout(ANSWER, async { while answers.next().await.is_some() {} }).await;
}

/// Sends what the child has to report. A blob that is followed only is asked no questions about.
fn tell(storms: &Storms, child: &mut Child, answers: &mut FuturesUnordered<BoxFuture<'static, News>>) {
    while let Some(action) = child.poll(Instant::now()) {
        if let Action::Send { to, request: request @ Request::Have(_) } = action {
            answers.push(send(storms, to, request));
        }
    }
}
