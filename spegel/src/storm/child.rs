//! A blob that this node's containerd asks for and that is not here: where it comes from, and what is done when it does not come.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{
    ANSWER, EXCUSED, Have, Holding, Key, LEASE, MAX_AVOIDED, NOTHING, Node, PROBE, REPORT, Rank, Request, Response,
    STILL, Want, Why, mix,
};

/// What a parent may have that it has not delivered yet, and for how long it may have more without half of that being made up, before another
/// parent is asked for.
const SLACK: u64 = 4 << 20;
const SLOW: Duration = Duration::from_secs(1);
/// How often a parent is asked how much it has while it delivers.
const LOOK: Duration = Duration::from_secs(1);
/// Parents that refused one after the other are asked for at once, and from then on after a pause that doubles, up to a bound.
const AT_ONCE: u32 = 3;
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long after such a question before the next one.
const SLOW_PAUSE: Duration = Duration::from_secs(5);
/// Who waited for so long before it was told to pull left it for others first.
const LEFT: Duration = Duration::from_millis(100);
/// How long after its end without an answer it is told again that a blob is here, and how many times in all.
const TOLD_AGAIN: Duration = Duration::from_secs(1);
const TOLD: u8 = 3;

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The blob.
    pub key: Key,
    /// How many bytes of it are here.
    pub position: u64,
    /// Its length in bytes, if known.
    pub total: Option<u64>,
    /// How long upstream's first byte usually takes, if known.
    pub usual: Option<Duration>,
    /// Whether it is to be left for others to pull for a moment, since this node pulls something else from upstream already.
    pub busy: bool,
    /// Whether it is getting other parts of the same image.
    pub fed: bool,
}

/// Where the blob comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From nowhere yet: the request is held.
    Nobody,
    /// A parent was asked and has given nothing yet: the request is held.
    Asked(Node),
    /// A parent.
    Parent(Node),
    /// Upstream.
    Upstream,
    /// It is all here, or it was given up.
    Over,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this, and hand the answer, if one comes, to [`Child::answered`].
    Send {
        /// A coordinator, which may be this node.
        to: Node,
        /// What to send.
        request: Request,
    },
    /// Ask this node for the blob, from the byte that is missing on, and leave the one before.
    Fetch {
        /// Whom.
        parent: Node,
        /// What the parent is to be told of where we were counted.
        rank: Rank,
    },
    /// Ask the parent how much it has. [`Child::parent_has`] hears the answer; without one for as long as a coordinator may take, it failed.
    Probe {
        /// The parent.
        parent: Node,
    },
    /// Let containerd go upstream: for all the others.
    Pull,
    /// Let containerd go upstream, for want of anything better.
    GiveUp,
    /// End the requests of those who wait here for a first byte: they may be above us now.
    SendAway,
}

/// What went wrong with a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It did not take us.
    Refused,
    /// It could not be reached, or broke off.
    Broke,
}

#[derive(Clone, Copy, Debug)]
struct Question {
    number: u64,
    why: Why,
    sent: Instant,
}

/// One blob on its way to this node's containerd.
#[derive(Debug)]
pub struct Child {
    wish: Wish,
    slots: u16,
    coordinators: Vec<Node>,
    /// Which of them is asked; those before it gave no answer.
    at: usize,
    number: u64,
    source: Source,
    /// Until when a request is held without a byte.
    deadline: Instant,
    /// A body can be left for another parent: its request could be held until that gives it.
    can_move: bool,
    /// Until when a parent that was asked may give nothing.
    patience: Instant,
    rank: Option<Rank>,
    avoid: VecDeque<Node>,
    question: Option<Question>,
    /// When to ask again, and why.
    again: Option<(Instant, Why)>,
    grown: Instant,
    /// When the parent was asked last how much it has, and when it last said that it has no more.
    probed: Instant,
    excused: Option<Instant>,
    /// How many parents have refused since one gave something.
    refusals: u32,
    /// When the parent was first seen not to deliver, and how much it had more.
    slow: Option<(Instant, u64)>,
    not_slow_before: Instant,
    /// When something was reported last, when something may be, and whether there is something.
    reported: Instant,
    report_from: Instant,
    to_report: bool,
    told: u8,
    actions: VecDeque<Action>,
}

// === impl Child ===

impl Child {
    /// A request that is held until `deadline` at most. `coordinators` are the nearest live nodes to the key, the nearest first. `number` is
    /// larger than any that this node used for the key before; the microseconds since 1970 are.
    pub fn new(wish: Wish, slots: u16, coordinators: Vec<Node>, number: u64, deadline: Instant, now: Instant) -> Self {
        let mut child = Self::apart(wish, slots, coordinators, number, now);
        child.deadline = deadline;
        child.ask(Why::New, now);
        child
    }

    /// A request that is not held, for want of time, and of which no coordinator is asked: somebody may give it all the same, or it goes upstream
    /// when [`Child::give_up`] says so. The others follow it there.
    pub fn apart(wish: Wish, slots: u16, coordinators: Vec<Node>, number: u64, now: Instant) -> Self {
        Self {
            wish,
            slots,
            coordinators,
            at: 0,
            number,
            source: Source::Nobody,
            deadline: now + NOTHING,
            can_move: true,
            patience: now,
            rank: None,
            avoid: VecDeque::new(),
            question: None,
            again: None,
            grown: now,
            probed: now,
            excused: None,
            refusals: 0,
            slow: None,
            not_slow_before: now,
            reported: now,
            report_from: now,
            to_report: false,
            told: 0,
            actions: VecDeque::new(),
        }
    }

    /// What is to be done now. To be called until there is nothing, after each event and at [`Child::wake`].
    pub fn poll(&mut self, now: Instant) -> Option<Action> {
        if self.actions.is_empty() {
            self.mind_time(now);
        }
        self.actions.pop_front()
    }

    /// When [`Child::poll`] has something to do if nothing happens before.
    pub fn wake(&self) -> Option<Instant> {
        let report = self.to_report.then_some(self.report_from);
        let times = match self.source {
            Source::Nobody => [Some(self.deadline), None, None],
            Source::Asked(_) => [Some(self.deadline), Some(self.patience), Some(self.probe_at())],
            Source::Parent(_) => [Some(self.grown + NOTHING), self.still_at(), Some(self.probe_at())],
            Source::Upstream | Source::Over => [None, None, None],
        };
        let answer = self.question.map(|question| question.sent + ANSWER);
        let again = self.again.map(|(at, _)| at);
        times.into_iter().chain([report, answer, again]).flatten().min()
    }

    /// Where the blob comes from.
    pub fn source(&self) -> Source {
        self.source
    }

    /// How many bytes of it are here.
    pub fn position(&self) -> u64 {
        self.wish.position
    }

    /// Whether it was left for others to pull, and nobody came, if it is told to pull after so much time.
    pub fn was_left_in_vain(&self, waited: Duration) -> bool {
        self.wish.busy && self.wish.position == 0 && waited >= LEFT
    }

    /// Where it was counted, for those that ask this node.
    pub fn rank(&self) -> Option<Rank> {
        self.rank
    }

    /// Whether there will be nothing to do any more.
    pub fn is_finished(&self) -> bool {
        self.source == Source::Over && !self.to_report && self.actions.is_empty()
    }

    /// A coordinator's answer to the message of this number.
    pub fn answered(&mut self, number: u64, response: Response, now: Instant) {
        if let Response::Ack { again, .. } = response {
            return self.acknowledged(again);
        }
        let Some(question) = self.question.filter(|question| question.number == number) else { return };
        self.question = None;
        match (response, self.source) {
            (_, Source::Upstream | Source::Over) => {}
            (Response::Fetch { parent, .. }, Source::Parent(current)) if parent == current => {}
            // It has begun to come again.
            (_, Source::Parent(_)) if question.why == Why::Still && self.grown > question.sent => {}
            // It would be left for nobody.
            (Response::Fetch { .. }, Source::Parent(_)) if !self.can_move => {
                self.again = Some((now + SLOW_PAUSE, question.why));
            }
            (Response::Fetch { parent, rank, patience }, _) => self.fetch(parent, rank, patience, now),
            (Response::Pull { .. }, _) => self.go_upstream(Action::Pull, now),
            (Response::Wait { pause }, _) => self.again = Some((now + pause, question.why)),
            (_, Source::Nobody) => self.go_upstream(Action::GiveUp, now),
            (_, Source::Asked(_) | Source::Parent(_)) => {}
        }
    }

    /// A coordinator could not be reached for the message of this number.
    pub fn not_reached(&mut self, number: u64, now: Instant) {
        if self.question.is_some_and(|question| question.number == number) {
            self.next_coordinator(now);
        }
    }

    /// The parent that was asked has begun to give. The request is not held any more.
    pub fn fed(&mut self, now: Instant) {
        if let Source::Asked(parent) = self.source {
            (self.source, self.grown, self.probed) = (Source::Parent(parent), now, now);
            (self.again, self.question, self.refusals) = (None, None, 0);
        }
    }

    /// The parent failed. The request may be held again until `deadline`; not at all without one.
    pub fn failed(&mut self, failure: Failure, deadline: Option<Instant>, now: Instant) {
        let parent = match self.source {
            Source::Asked(parent) | Source::Parent(parent) => parent,
            // It was left already, for want of patience; the request is held from now on, and no longer than this all the same.
            Source::Nobody => match deadline {
                Some(deadline) => return self.deadline = deadline,
                None => return self.go_upstream(Action::GiveUp, now),
            },
            Source::Upstream | Source::Over => return,
        };
        self.leave(parent);
        let why = match failure {
            Failure::Refused => Why::Refused,
            Failure::Broke => Why::Broke,
        };
        match deadline {
            Some(deadline) => {
                self.deadline = deadline;
                self.ask_paced(why, now);
            }
            None => self.go_upstream(Action::GiveUp, now),
        }
    }

    /// So many bytes are here.
    pub fn grew(&mut self, position: u64, now: Instant) {
        if position <= self.wish.position || self.source == Source::Over {
            return;
        }
        let is_first = self.wish.position == 0;
        (self.wish.position, self.grown) = (position, now);
        if self.again.is_some_and(|(_, why)| why == Why::Still) {
            self.again = None;
        }
        if is_first && self.source == Source::Upstream {
            self.report_from = now;
        }
    }

    /// The parent has so many bytes.
    pub fn parent_has(&mut self, position: u64, now: Instant) {
        let lacks = position.saturating_sub(self.wish.position);
        if let Source::Parent(_) = self.source {
            self.excused = (lacks == 0).then_some(now);
        }
        if lacks <= SLACK || !matches!(self.source, Source::Parent(_)) {
            self.slow = None;
            self.again = self.again.filter(|(_, why)| *why != Why::Slow);
            return;
        }
        match self.slow {
            Some((since, _)) if now.saturating_duration_since(since) < SLOW => {}
            // It catches up.
            Some((_, before)) if lacks <= before / 2 => self.slow = Some((now, lacks)),
            Some(_) => {
                if self.can_move && self.question.is_none() && self.again.is_none() && now >= self.not_slow_before {
                    (self.slow, self.not_slow_before) = (None, now + SLOW_PAUSE);
                    self.ask(Why::Slow, now);
                }
            }
            None => self.slow = Some((now, lacks)),
        }
    }

    /// Whether a body may be left for another parent, since its request could be held until that gives it.
    pub fn can_move(&mut self, can: bool) {
        self.can_move = can;
    }

    /// Our containerd goes upstream for it.
    pub fn give_up(&mut self, now: Instant) {
        if !matches!(self.source, Source::Upstream | Source::Over) {
            self.go_upstream(Action::GiveUp, now);
        }
    }

    /// The request may be held until then: other parts of the image arrive meanwhile.
    pub fn held_until(&mut self, deadline: Instant) {
        self.wish.fed = true;
        self.deadline = self.deadline.max(deadline);
    }

    /// Others are the nearest to the key now.
    pub fn coordinators_are(&mut self, coordinators: Vec<Node>) {
        let asked = self.coordinators.get(self.at);
        self.at = coordinators.iter().position(|known| Some(known) == asked).unwrap_or(0);
        self.coordinators = coordinators;
    }

    /// This node takes so many children for the blob.
    pub fn takes(&mut self, slots: u16) {
        if slots != self.slots && self.source != Source::Over {
            self.slots = slots;
            self.to_report |= matches!(self.source, Source::Parent(_));
        }
    }

    /// All of it is here.
    pub fn complete(&mut self, now: Instant) {
        if let Some(total) = self.wish.total {
            self.wish.position = total;
        }
        self.end(Holding::All, now);
    }

    /// containerd has given it up.
    pub fn gone(&mut self, now: Instant) {
        self.end(Holding::Nothing, now);
    }

    fn end(&mut self, holding: Holding, now: Instant) {
        if self.source == Source::Over {
            return;
        }
        let was_root = self.source == Source::Upstream;
        (self.source, self.question, self.again) = (Source::Over, None, None);
        self.to_report = holding == Holding::All;
        self.report_from = now + TOLD_AGAIN;
        self.told = 1;
        self.tell(holding, was_root);
    }

    fn mind_time(&mut self, now: Instant) {
        match self.source {
            Source::Nobody | Source::Asked(_) if now >= self.deadline => {
                return self.go_upstream(Action::GiveUp, now);
            }
            Source::Asked(parent) if now >= self.patience && self.question.is_none() => {
                self.leave(parent);
                self.ask_paced(Why::Refused, now);
            }
            Source::Asked(parent) if now >= self.probe_at() => {
                self.probed = now;
                self.actions.push_back(Action::Probe { parent });
            }
            Source::Parent(_) if now >= self.grown + NOTHING => return self.go_upstream(Action::GiveUp, now),
            Source::Parent(parent) => {
                if self.still_at().is_some_and(|at| now >= at) {
                    self.ask(Why::Still, now);
                }
                if now >= self.probe_at() {
                    self.probed = now;
                    self.actions.push_back(Action::Probe { parent });
                }
            }
            _ => {}
        }
        if self.question.is_some_and(|question| now >= question.sent + ANSWER) {
            self.next_coordinator(now);
        }
        if let Some((at, why)) = self.again
            && now >= at
        {
            self.ask(why, now);
        }
        if self.to_report && now >= self.report_from {
            self.report(now);
        }
    }

    /// When to ask whether others stand still as well: not all at the same moment.
    fn still_at(&self) -> Option<Instant> {
        // What it may do about a slow parent later is no reason not to ask about one that gives nothing.
        let is_asking = self.question.is_some() || self.again.is_some_and(|(_, why)| why != Why::Slow);
        let spread = mix(self.number ^ u64::from_be_bytes([self.wish.key.0[0]; 8])) % 1000;
        let still = if self.excused.is_some_and(|at| at >= self.grown) { EXCUSED } else { STILL };
        (!is_asking).then(|| self.grown + still + STILL.mul_f64(spread as f64 / 1000.0))
    }

    /// When to ask the parent how much it has; while a request is held, whether it is there at all.
    fn probe_at(&self) -> Instant {
        if let Source::Asked(_) = self.source {
            return self.probed + PROBE / 2;
        }
        (self.probed + LOOK).min((self.grown + PROBE).max(self.probed + PROBE))
    }

    fn ask_paced(&mut self, why: Why, now: Instant) {
        self.refusals += 1;
        match self.refusals.checked_sub(AT_ONCE) {
            None | Some(0) => self.ask(why, now),
            Some(more) => self.again = Some((now + (PAUSE * 2_u32.pow(more.min(8))).min(LONGEST_PAUSE), why)),
        }
    }

    fn ask(&mut self, why: Why, now: Instant) {
        self.again = None;
        let Some(to) = self.coordinators.get(self.at).copied() else {
            if self.source == Source::Nobody {
                self.go_upstream(Action::GiveUp, now);
            }
            return;
        };
        self.number += 1;
        self.question = Some(Question { number: self.number, why, sent: now });
        let want = Want {
            key: self.wish.key,
            number: self.number,
            position: self.wish.position,
            total: self.wish.total,
            slots: self.slots,
            usual: self.wish.usual,
            why,
            avoid: self.avoid.iter().copied().collect(),
            skipped: u8::try_from(self.at).unwrap_or(u8::MAX),
            busy: self.wish.busy,
            fed: self.wish.fed,
        };
        self.actions.push_back(Action::Send { to, request: Request::Want(want) });
    }

    fn next_coordinator(&mut self, now: Instant) {
        let Some(question) = self.question.take() else { return };
        if self.at + 1 < self.coordinators.len() {
            self.at += 1;
            return self.ask(question.why, now);
        }
        // All were asked: from the beginning, if there is time.
        self.at = 0;
        match self.source {
            Source::Nobody => self.go_upstream(Action::GiveUp, now),
            Source::Asked(_) | Source::Parent(_) => self.again = Some((now + ANSWER, question.why)),
            Source::Upstream | Source::Over => {}
        }
    }

    fn fetch(&mut self, parent: Node, rank: Rank, patience: Duration, now: Instant) {
        if self.wish.position == 0 && self.rank != Some(rank) {
            self.rank = Some(rank);
            self.actions.push_back(Action::SendAway);
        }
        if let Source::Parent(_) = self.source {
            // It was fed, and may stand still no longer than otherwise.
            self.deadline = self.grown + NOTHING;
        }
        (self.source, self.slow, self.patience) = (Source::Asked(parent), None, now + patience);
        self.probed = now;
        self.actions.push_back(Action::Fetch { parent, rank });
    }

    fn leave(&mut self, parent: Node) {
        self.source = Source::Nobody;
        self.slow = None;
        self.question = None;
        self.avoid.retain(|known| *known != parent);
        if self.avoid.len() >= MAX_AVOIDED {
            self.avoid.pop_front();
        }
        self.avoid.push_back(parent);
    }

    fn go_upstream(&mut self, action: Action, now: Instant) {
        (self.source, self.question, self.again) = (Source::Upstream, None, None);
        self.actions.push_back(action);
        self.report(now);
    }

    fn acknowledged(&mut self, again: Duration) {
        match self.source {
            Source::Over => self.to_report = false,
            // Others need to hear of a root, whatever one of them says.
            Source::Upstream => self.report_from = self.report_from.max(self.reported + again.min(LEASE / 2)),
            _ => self.report_from = self.report_from.max(self.reported + again),
        }
    }

    fn report(&mut self, now: Instant) {
        self.reported = now;
        match self.source {
            Source::Upstream => {
                (self.to_report, self.report_from) = (true, now + REPORT);
                self.tell(Holding::Root, true);
            }
            Source::Over => {
                self.told += 1;
                (self.to_report, self.report_from) = (self.told < TOLD, now + TOLD_AGAIN);
                self.tell(Holding::All, false);
            }
            Source::Nobody | Source::Asked(_) | Source::Parent(_) => {
                (self.to_report, self.report_from) = (false, now + REPORT);
                self.tell(Holding::Child, false);
            }
        }
    }

    /// Tells all coordinators, or the one that is asked.
    fn tell(&mut self, holding: Holding, all: bool) {
        self.number += 1;
        let have = Have {
            key: self.wish.key,
            number: self.number,
            position: self.wish.position,
            total: self.wish.total,
            slots: self.slots,
            holding,
        };
        for (n, to) in self.coordinators.iter().enumerate() {
            if all || n == self.at {
                self.actions.push_back(Action::Send { to: *to, request: Request::Have(have) });
            }
        }
    }
}
