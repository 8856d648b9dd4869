//! Who follows one blob: it hears coordinators, parents and the store, and says what is to be done, until our containerd has it or gave it up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use tracing::debug;

use super::figures::{From, Wait};
use super::{Event, Order, Pull, Storms};
use crate::mirror::{Shared, Wanted, relay};
use crate::store::{Found, Store};
use crate::storm::{
    ANSWER, Action, BEYOND_USUAL, Child, FED_FIRST_BYTE, Failure, Node, Parent, Request, Response, Source, Why,
};

/// How often it is looked how much our containerd has got, and how often at first, when small things come.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_AT_FIRST: Duration = Duration::from_millis(20);
const AT_FIRST: Duration = Duration::from_millis(500);
/// How often the coordinators are looked up anew.
const MEMBERS: Duration = Duration::from_secs(1);
/// How long after the last sign of a blob in the store it counts as given up. containerd 2.2 shows none between the mirror's 404 and upstream's
/// first bytes.
const GONE: Duration = Duration::from_millis(1500);
/// How long it is looked whether something that was given up comes after all, to learn what is usual.
const LATE: Duration = Duration::from_secs(10);
/// A pause that is shorter than this is none: containerd writes whole MiB.
const STOOD: Duration = Duration::from_millis(500);
/// How long a blob is followed at the longest.
const LONGEST: Duration = Duration::from_secs(3600);

/// What comes back of what was sent.
enum News {
    Answered(u64, Option<Response>),
    /// How many bytes a parent has, if it says so.
    Probed(Node, Option<u64>),
}

/// Who follows one blob.
pub(super) struct Driver {
    shared: Arc<Shared>,
    storms: Arc<Storms>,
    store: Arc<dyn Store>,
    wanted: Wanted,
    total: Option<u64>,
    child: Child,
    pull: Arc<Pull>,
    events: mpsc::Receiver<Event>,
    news: FuturesUnordered<BoxFuture<'static, News>>,
    began: Instant,
    /// When there was a sign of it last, and when it grew last.
    seen: Instant,
    grown: Instant,
    position: u64,
    /// A request waits for it, or a body brings it.
    is_awaited: bool,
    is_fed: bool,
    /// The body is left to its own bounds, and nothing is asked or told any more but the end.
    is_silent: bool,
    /// Why the parent was left that gave it before.
    left: Option<Why>,
    depth: usize,
    /// It comes from upstream now, or some of it did.
    from_upstream: bool,
    was_upstream: bool,
    /// Other parts of the image were arriving when it was sent upstream.
    is_fed_others: bool,
    /// When it was sent upstream, until something came.
    told: Option<Instant>,
    /// It was given up, and may come yet, until then.
    late: Option<Instant>,
    members: Instant,
}

// === impl Driver ===

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        storms: Arc<Storms>,
        store: Arc<dyn Store>,
        wanted: &Wanted,
        child: Child,
        pull: &Arc<Pull>,
        events: mpsc::Receiver<Event>,
    ) -> Self {
        let now = Instant::now();
        Self {
            total: shared.sizes.of(&pull.digest),
            position: child.position(),
            shared,
            storms,
            store,
            wanted: wanted.clone(),
            child,
            pull: Arc::clone(pull),
            events,
            news: FuturesUnordered::new(),
            began: now,
            seen: now,
            grown: now,
            is_awaited: true,
            is_fed: false,
            is_silent: false,
            left: None,
            depth: 0,
            from_upstream: false,
            was_upstream: false,
            is_fed_others: false,
            told: None,
            late: None,
            members: now,
        }
    }

    /// Until our containerd has it, or gave it up, or asked anew.
    pub(super) async fn run(mut self) {
        let mut look_at = Instant::now();
        while self.storms.is_current(&self.pull) && self.began.elapsed() < LONGEST {
            self.act();
            if self.child.source() == Source::Over && self.late.is_none_or(|late| Instant::now() >= late) {
                break;
            }
            let wake = self.child.wake().filter(|_| !self.is_silent).map_or(look_at, |wake| wake.min(look_at));
            tokio::select! {
                biased;
                Some(event) = self.events.recv() => self.hear(event),
                Some(news) = self.news.next() => self.be_told(news),
                () = sleep_until(wake.into()) => {}
            }
            let now = Instant::now();
            if now >= look_at {
                self.look(now).await;
                let often = now.duration_since(self.began) < AT_FIRST;
                look_at = now + if often { LOOK_AT_FIRST } else { LOOK };
            }
        }
        self.pull.orders.send_if_modified(|order| {
            let is_new = *order == Order::Wait;
            *order = if is_new { Order::Upstream } else { *order };
            is_new
        });
        // Those who wait look at what is there when they are told.
        self.storms.end(&self.pull);
        self.pull.away.notify_waiters();
        self.is_silent = false;
        if self.child.source() == Source::Over {
            self.act();
        }
        // Nobody waits for the answers.
        let _ = timeout(ANSWER, async { while self.news.next().await.is_some() {} }).await;
    }

    /// Does what is to be done now.
    fn act(&mut self) {
        while let Some(action) = self.child.poll(Instant::now()) {
            match action {
                _ if self.is_silent && self.child.source() != Source::Over => {}
                Action::Send { to, request } => self.send(to, request),
                Action::Fetch { parent, rank } => {
                    self.pull.state().rank = Some(rank);
                    self.order(Order::Fetch { parent, rank });
                    if let Some(why) = self.left.take() {
                        self.storms.figures.moved(&self.pull.image, why);
                    }
                }
                Action::Probe { parent } => self.probe(parent),
                Action::SendAway => {
                    // Those who wait look at it when they are told.
                    self.pull.state().rank = self.child.rank();
                    self.pull.away.notify_waiters();
                }
                // Nothing has come for long: that is for the body's own bounds.
                Action::GiveUp if self.is_fed => self.is_silent = true,
                Action::Pull | Action::GiveUp => {
                    let was_leased = action == Action::Pull;
                    let now = Instant::now();
                    if was_leased && self.child.was_left_in_vain(now.duration_since(self.began)) {
                        self.storms.images.was_in_vain(&self.pull.image, now);
                    }
                    let mut state = self.pull.state();
                    (state.is_root, state.was_leased, state.told) = (true, was_leased, Some(now));
                    drop(state);
                    self.is_fed_others = self.storms.images.is_arriving(&self.pull.image, &self.pull.digest, now);
                    (self.from_upstream, self.told, self.seen) = (true, Some(now), now);
                    self.order(Order::Upstream);
                    self.is_awaited = false;
                }
            }
        }
    }

    /// Gives an order to the request or the body; one that a peer gives is cut off for it.
    fn order(&mut self, order: Order) {
        self.pull.orders.send_replace(order);
        if std::mem::take(&mut self.is_fed) {
            debug!(digest = %self.pull.digest, ?order, "is to come from elsewhere");
            self.pull.cut();
        }
    }

    fn send(&mut self, to: Node, request: Request) {
        if let Request::Want(want) = &request {
            self.left = Some(want.why).filter(|why| *why != Why::New);
        }
        let number = request.number();
        let answer = self.storms.asked.ask(to, request);
        self.news.push(Box::pin(async move { News::Answered(number, answer.await.ok()) }));
    }

    /// Asks a parent how much it has. It answers that it has nothing as well.
    fn probe(&mut self, parent: Node) {
        let peer = self.storms.asked.peer(parent);
        let (shared, wanted) = (Arc::clone(&self.shared), self.wanted.clone());
        self.news.push(Box::pin(async move {
            let Some(first) = peer.as_ref().and_then(|peer| peer.addresses.first()) else {
                return News::Probed(parent, None);
            };
            let answer = timeout(ANSWER, relay::answers(&shared, &wanted, *first)).await;
            News::Probed(parent, answer.unwrap_or(None))
        }));
    }

    fn hear(&mut self, event: Event) {
        let now = Instant::now();
        // That others are given more or less says nothing of what is here.
        if !matches!(event, Event::Slots(_)) {
            self.seen = now;
        }
        match event {
            Event::Fed => {
                self.child.fed(now);
                (self.is_fed, self.is_awaited) = (true, true);
            }
            Event::Failed(failure, deadline) => {
                self.is_fed = false;
                self.child.failed(failure, deadline, now);
            }
            Event::Elsewhere => {
                let mut state = self.pull.state();
                (state.is_root, state.told) = (false, None);
                drop(state);
                // Those who were told that it comes from outside the tree are not told otherwise: it does.
                self.is_silent = self.child.source() != Source::Upstream;
                (self.from_upstream, self.told) = (false, None);
                (self.is_fed, self.is_awaited) = (true, true);
            }
            Event::Upstream => self.child.give_up(now),
            Event::Ended => (self.is_fed, self.is_awaited) = (false, false),
            Event::Left => {
                self.is_awaited = false;
                if matches!(self.child.source(), Source::Nobody | Source::Asked(_)) {
                    self.child.gone(now);
                }
            }
            Event::Slots(slots) => self.child.takes(slots.max(Parent::slots_at_first(self.total))),
        }
    }

    fn be_told(&mut self, news: News) {
        let now = Instant::now();
        let left = self.storms.with_budget(&self.pull.image, now, |budget| Some(budget.has_left(now)));
        self.child.can_move(left.unwrap_or(false));
        match news {
            News::Answered(number, Some(response)) => self.child.answered(number, response, now),
            News::Answered(number, None) => {
                self.child.not_reached(number, now);
                self.meet(now);
            }
            News::Probed(node, position) => match (self.child.source(), position) {
                // What it has sent, our containerd has not taken yet: it is not the parent that is slow.
                (Source::Parent(parent), Some(_)) if parent == node && self.pull.has_unread() => {
                    self.child.parent_has(self.child.position(), now);
                }
                (Source::Asked(parent) | Source::Parent(parent), Some(position)) if parent == node => {
                    self.child.parent_has(position, now);
                }
                (Source::Asked(parent), None) if parent == node => {
                    let deadline = self.storms.with_budget(&self.pull.image, now, |budget| budget.deadline());
                    self.child.failed(Failure::Broke, deadline, now);
                }
                _ => {}
            },
        }
    }

    /// Who is nearest to the blob may be another by now.
    fn meet(&mut self, now: Instant) {
        self.members = now;
        let (_, coordinators) = self.storms.asked.coordinators(&self.wanted.key);
        self.child.coordinators_are(coordinators);
    }

    /// Looks how much our containerd has got.
    async fn look(&mut self, now: Instant) {
        if now.duration_since(self.members) >= MEMBERS {
            self.meet(now);
        }
        let arrives = self.storms.images.is_arriving(&self.pull.image, &self.pull.digest, now);
        self.is_fed_others |= arrives && self.told.is_some();
        if matches!(self.child.source(), Source::Nobody | Source::Asked(_))
            && arrives
            && let Some(deadline) = self.storms.with_budget(&self.pull.image, now, |budget| {
                budget.arrives(now);
                budget.deadline()
            })
        {
            self.child.held_until(deadline);
        }
        let asked = self.wanted.repository.as_ref();
        match self.store.find(&self.pull.digest, asked).await.ok().flatten() {
            Some(Found::Complete(blob)) => {
                self.late = None;
                self.reached(blob.size, now);
                let from = if self.was_upstream { From::Upstream } else { From::Peers };
                let depth = if self.was_upstream { 0 } else { self.depth.max(1) };
                self.storms.figures.got(&self.pull.image, from, depth, now);
                self.child.complete(now);
            }
            Some(Found::Receiving(receiving)) => {
                self.seen = now;
                self.reached(receiving.growing.progress().position, now);
            }
            None if !self.is_awaited && now.duration_since(self.seen) >= self.gone_after() => self.lose(now),
            // Awaited as yet, or being renamed.
            None => {}
        }
    }

    /// Upstream's first byte takes longer while other parts of the image fill the links, and at some registries.
    fn gone_after(&self) -> Duration {
        match self.storms.images.usual(&self.pull.image) {
            _ if self.is_fed_others => FED_FIRST_BYTE,
            Some(usual) => (2 * usual + BEYOND_USUAL).clamp(GONE, FED_FIRST_BYTE),
            None => GONE,
        }
    }

    /// There is no sign of it: others need not wait for it.
    fn lose(&mut self, now: Instant) {
        if self.child.source() != Source::Over {
            self.child.gone(now);
            let mut state = self.pull.state();
            (state.is_root, state.rank) = (false, None);
            drop(state);
            self.pull.away.notify_waiters();
        }
        self.late = self.told.map(|told| told + LATE).filter(|late| now < *late);
    }

    /// So much of it is here.
    fn reached(&mut self, position: u64, now: Instant) {
        if position <= self.position {
            return;
        }
        let from = if self.from_upstream { From::Upstream } else { From::Peers };
        self.was_upstream |= self.from_upstream;
        let stood = now.duration_since(self.grown);
        if let Some(told) = self.told.take() {
            let took = now.duration_since(told);
            // What fills the links says nothing of the registry.
            if self.position == 0 && !self.is_fed_others {
                self.storms.images.learn(&self.pull.image, took);
            }
            self.storms.figures.waited(&self.pull.image, Wait::Upstream, took);
        } else if self.position > 0 && stood >= STOOD {
            let what = if self.from_upstream { Wait::Upstream } else { Wait::Parent };
            self.storms.figures.waited(&self.pull.image, what, stood);
        }
        let more = position - self.position;
        self.storms.feeds.received(more);
        self.storms.with_budget(&self.pull.image, now, |budget| {
            budget.goes_on(now);
            None::<()>
        });
        self.storms.figures.came(&self.pull.image, from, more, now);
        self.depth = self.depth.max(self.shared.lineage.of(&self.pull.digest).len());
        (self.position, self.grown) = (position, now);
        self.storms.images.came(&self.pull.image, &self.pull.digest, now);
        if !self.from_upstream {
            self.storms.images.is_shared(&self.pull.image, now);
        }
        self.child.grew(position, now);
    }
}
