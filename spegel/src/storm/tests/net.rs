//! A network that loses, doubles, delays and reorders, between nodes whose clocks go differently and that may die; with one blob.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::storm::{
    ANSWER, Action, Asker, Budget, COORDINATORS, Child, Coordinator, Failure, Hold, HoldEnd, Key, LEASE, Limits, Node,
    Parent, Rank, Request, Response, Source, Standing, Wish, Zone,
};

pub(super) const KEY: Key = Key([7; 32]);
pub(super) const TOTAL: u64 = 64 << 20;
/// How far apart two looks at everything are.
const STEP: Duration = Duration::from_millis(10);
/// What one wait may take beyond its bound: a step, and the clock's error.
const TOLERANCE: Duration = Duration::from_millis(30);

/// How bad the network is.
#[derive(Clone, Debug)]
pub(super) struct Weather {
    pub(super) seed: u64,
    pub(super) nodes: usize,
    /// Of a hundred messages so many are lost, and so many come twice.
    pub(super) lost: u32,
    pub(super) doubled: u32,
    /// No two messages in a row between the same two are lost.
    pub(super) fair: bool,
    /// Messages take up to so long, doubles up to so much longer.
    pub(super) delay: Duration,
    pub(super) later: Duration,
    /// Clocks go wrong by up to so many thousandths.
    pub(super) skew: i32,
    /// So many nodes die, at some time, and so many are refused by upstream.
    pub(super) deaths: usize,
    pub(super) refused: usize,
    /// Of a thousand steps in which a node is fed, so many end the connection, though both ends live.
    pub(super) breaks: u32,
    /// Coordinators answer anything.
    pub(super) hostile: bool,
    pub(super) max_wait: Duration,
}

#[derive(Debug)]
enum Event {
    Start(usize),
    Request { to: usize, from: usize, bytes: Vec<u8> },
    Response { to: usize, number: u64, bytes: Vec<u8> },
    Ask { parent: usize, child: usize, rank: Rank, pull: u32 },
    Failed { child: usize, failure: Failure, pull: u32 },
    Probed { parent: usize, child: usize, pull: u32 },
    Upstream { node: usize, pull: u32 },
    Die { node: usize, silent: bool },
}

/// A node.
struct Peer {
    coordinator: Coordinator,
    parent: Parent,
    budget: Budget,
    child: Option<Child>,
    hold: Option<(Hold, Instant, Instant)>,
    position: u64,
    feeder: Option<usize>,
    from_upstream: bool,
    pull: u32,
    numbers: u64,
    dead: Option<bool>,
    refused: bool,
    /// Bytes in a step: from upstream, and what it can take.
    rate: u64,
    /// When it first got something as a root, and when last.
    grows: Option<(Duration, Duration)>,
    /// Its clock: where it began, and how many thousandths it is too fast.
    clock: (Instant, i32),
}

pub(super) struct Net {
    weather: Weather,
    peers: Vec<Peer>,
    events: BinaryHeap<Reverse<(Duration, u64)>>,
    queued: HashMap<u64, Event>,
    order: u64,
    now: Duration,
    rng: StdRng,
    /// The last message between two was lost.
    lost: BTreeMap<(usize, usize), bool>,
    /// How many times somebody was told to pull, or gave up.
    pub(super) leases: usize,
    pub(super) given_up: usize,
    pub(super) from_peers: usize,
}

impl Net {
    pub(super) fn new(weather: Weather) -> Self {
        let mut rng = StdRng::seed_from_u64(weather.seed);
        let base = Instant::now() + Duration::from_secs(10);
        let mut net = Self {
            peers: Vec::new(),
            events: BinaryHeap::new(),
            queued: HashMap::new(),
            order: 0,
            now: Duration::ZERO,
            lost: BTreeMap::new(),
            leases: 0,
            given_up: 0,
            from_peers: 0,
            rng: StdRng::seed_from_u64(rng.random()),
            weather,
        };
        for node in 0..net.weather.nodes {
            let began = base + Duration::from_millis(rng.random_range(0..3_600_000));
            let clock = (began, rng.random_range(-net.weather.skew..=net.weather.skew));
            net.peers.push(Peer {
                coordinator: Coordinator::new(Limits::default(), began),
                parent: Parent::new(64, began),
                budget: Budget::new(net.weather.max_wait, began),
                child: None,
                hold: None,
                position: 0,
                feeder: None,
                from_upstream: false,
                pull: 0,
                numbers: 0,
                dead: None,
                refused: false,
                rate: rng.random_range(40_000..400_000),
                grows: None,
                clock,
            });
            net.at(Duration::from_millis(rng.random_range(0..1500)), Event::Start(node));
        }
        for _ in 0..net.weather.refused {
            let node = rng.random_range(0..net.peers.len());
            net.peers[node].refused = true;
        }
        for _ in 0..net.weather.deaths {
            let node = rng.random_range(0..net.peers.len());
            let (at, silent) = (Duration::from_millis(rng.random_range(0..9000)), rng.random_bool(0.5));
            net.at(at, Event::Die { node, silent });
        }
        net
    }

    /// What a node's clock shows.
    fn clock(&self, node: usize) -> Instant {
        let (began, skew) = self.peers[node].clock;
        began + self.now.mul_f64(1.0 + f64::from(skew) / 1000.0)
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.order += 1;
        self.events.push(Reverse((time, self.order)));
        self.queued.insert(self.order, event);
    }

    fn delay(&mut self) -> Duration {
        self.now + self.weather.delay.mul_f64(self.rng.random_range(0.0..=1.0))
    }

    /// Sends, or loses, and perhaps once more.
    fn send(&mut self, from: usize, to: usize, event: impl Fn() -> Event) {
        let was_lost = self.lost.get(&(from, to)).copied().unwrap_or(false);
        let is_lost = self.rng.random_range(0..100) < self.weather.lost && !(self.weather.fair && was_lost);
        self.lost.insert((from, to), is_lost);
        if !is_lost {
            let at = self.delay();
            self.at(at, event());
        }
        if self.rng.random_range(0..100) < self.weather.doubled {
            let at = self.delay() + self.weather.later.mul_f64(self.rng.random_range(0.0..=1.0));
            self.at(at, event());
        }
    }

    /// Lets so much time pass, and looks after every step whether all is as it must be.
    pub(super) fn run(&mut self, time: Duration) -> Result<(), String> {
        let end = self.now + time;
        while self.now < end {
            let next = self.now + STEP;
            while let Some(Reverse((at, order))) = self.events.peek().copied()
                && at <= next
            {
                self.events.pop();
                self.now = self.now.max(at);
                if let Some(event) = self.queued.remove(&order) {
                    self.on(event)?;
                }
            }
            self.now = next;
            self.flow();
            for node in 0..self.peers.len() {
                self.drive(node)?;
            }
            self.check()?;
        }
        Ok(())
    }

    fn on(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Start(node) => self.start(node)?,
            Event::Request { to, from, bytes } => self.on_request(to, from, &bytes),
            Event::Response { to, number, bytes } => {
                let now = self.clock(to);
                let response = Response::decode(&bytes).map_err(|error| error.to_string())?;
                let can_move = self.peers[to].budget.has_left(now);
                if let Some(child) = &mut self.peers[to].child {
                    child.can_move(can_move);
                    child.answered(number, response, now);
                }
                self.drive(to)?;
            }
            Event::Ask { parent, child, rank, pull } => self.on_ask(parent, child, rank, pull),
            Event::Failed { child, failure, pull } if self.peers[child].pull == pull => self.failed(child, failure)?,
            Event::Probed { parent, child, pull } if self.peers[child].pull == pull => {
                let (now, has) = (self.clock(child), self.peers[parent].position);
                if self.peers[parent].dead.is_some() {
                    let wait = self.now + ANSWER;
                    self.at(wait, Event::Failed { child, failure: Failure::Broke, pull });
                } else if let Some(machine) = &mut self.peers[child].child {
                    machine.parent_has(has, now);
                }
            }
            Event::Upstream { node, pull } if self.peers[node].pull == pull => self.on_upstream(node)?,
            Event::Die { node, silent } => self.die(node, silent),
            Event::Failed { .. } | Event::Probed { .. } | Event::Upstream { .. } => {}
        }
        Ok(())
    }

    fn start(&mut self, node: usize) -> Result<(), String> {
        if self.peers[node].dead.is_some() || self.peers[node].position == TOTAL {
            return Ok(());
        }
        let now = self.clock(node);
        let coordinators = (0..COORDINATORS.min(self.peers.len())).map(|node| Node(node as u64)).collect();
        let peer = &mut self.peers[node];
        peer.numbers += 1_000_000;
        let Some((hold, deadline)) = peer.budget.begin(now) else {
            self.go_upstream(node);
            return Ok(());
        };
        let wish = Wish {
            key: KEY,
            position: peer.position,
            total: Some(TOTAL),
            usual: None,
            busy: self.rng.random_bool(0.2),
            fed: self.rng.random_bool(0.2),
        };
        peer.hold = Some((hold, now, deadline));
        peer.child = Some(Child::new(wish, 1, coordinators, peer.numbers, deadline, now));
        self.drive(node)
    }

    fn drive(&mut self, node: usize) -> Result<(), String> {
        if self.peers[node].dead.is_some() {
            return Ok(());
        }
        let now = self.clock(node);
        while let Some(action) = self.peers[node].child.as_mut().and_then(|child| child.poll(now)) {
            let pull = self.peers[node].pull;
            match action {
                Action::Send { to, request } => {
                    let (bytes, to) = (request.encode(), to.0 as usize);
                    self.send(node, to, || Event::Request { to, from: node, bytes: bytes.clone() });
                }
                Action::Fetch { parent, rank } => {
                    self.detach(node);
                    let (at, pull, parent) = (self.delay(), self.peers[node].pull, parent.0 as usize);
                    self.at(at, Event::Ask { parent, child: node, rank, pull });
                }
                Action::Probe { parent } => {
                    let (at, parent) = (self.delay(), parent.0 as usize);
                    self.at(at, Event::Probed { parent, child: node, pull });
                }
                Action::Pull => {
                    self.no_root_but(node)?;
                    self.leases += 1;
                    self.unhold(node, HoldEnd::InVain);
                    self.go_upstream(node);
                }
                Action::GiveUp => {
                    self.given_up += 1;
                    self.unhold(node, HoldEnd::InVain);
                    self.go_upstream(node);
                }
                Action::SendAway => {
                    for child in 0..self.peers.len() {
                        if self.peers[child].feeder == Some(node) && self.peers[child].position == 0 {
                            // The parent ends the request at once; the child hears of it later.
                            self.detach(child);
                            let (at, pull) = (self.delay(), self.peers[child].pull);
                            self.at(at, Event::Failed { child, failure: Failure::Refused, pull });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn unhold(&mut self, node: usize, end: HoldEnd) {
        let now = self.clock(node);
        let peer = &mut self.peers[node];
        if let Some((hold, ..)) = peer.hold.take() {
            peer.budget.end(hold, end, now);
        }
    }

    fn detach(&mut self, node: usize) {
        let peer = &mut self.peers[node];
        (peer.pull, peer.from_upstream, peer.grows) = (peer.pull + 1, false, None);
        if let Some(feeder) = peer.feeder.take() {
            self.peers[feeder].parent.end(node as u64);
        }
    }

    fn go_upstream(&mut self, node: usize) {
        self.detach(node);
        let (wait, pull) = (Duration::from_millis(self.rng.random_range(50..400)), self.peers[node].pull);
        self.at(self.now + wait, Event::Upstream { node, pull });
    }

    fn on_upstream(&mut self, node: usize) -> Result<(), String> {
        if self.peers[node].dead.is_some() {
            return Ok(());
        }
        if !self.peers[node].refused {
            self.peers[node].from_upstream = true;
            return Ok(());
        }
        let now = self.clock(node);
        if let Some(child) = &mut self.peers[node].child {
            child.gone(now);
        }
        self.drive(node)?;
        self.at(self.now + Duration::from_secs(4), Event::Start(node));
        for child in 0..self.peers.len() {
            if self.peers[child].feeder == Some(node) {
                let (at, pull) = (self.delay(), self.peers[child].pull);
                self.at(at, Event::Failed { child, failure: Failure::Refused, pull });
            }
        }
        Ok(())
    }

    fn on_request(&mut self, to: usize, from: usize, bytes: &[u8]) {
        if self.peers[to].dead.is_some() {
            return;
        }
        let now = self.clock(to);
        let Ok(request) = Request::decode(bytes) else { return };
        let mut answer = self.peers[to].coordinator.receive(Node(from as u64), Zone(0), &request, now);
        if self.weather.hostile {
            answer = Some(self.anything());
        }
        if let Some(response) = answer {
            let number = request.number();
            self.send(to, from, || Event::Response { to: from, number, bytes: response.encode() });
        }
    }

    /// Few ranks, so that many fit each other by chance.
    fn anything(&mut self) -> Response {
        let pause = Duration::from_millis(self.rng.random_range(0..3000));
        let parent = Node(self.rng.random_range(0..self.peers.len() as u64));
        let rank = Rank(self.rng.random_range(0..6));
        match self.rng.random_range(0..20) {
            0 => Response::Pull { within: pause },
            1 => Response::Refuse,
            2 => Response::Wait { pause },
            3 => Response::Ack { again: pause, furthest: TOTAL },
            _ => Response::Fetch { parent, rank, patience: pause },
        }
    }

    fn standing(&self, node: usize) -> Standing {
        let peer = &self.peers[node];
        Standing {
            position: peer.position,
            complete: peer.position == TOTAL,
            is_root: peer.child.as_ref().is_some_and(|child| child.source() == Source::Upstream),
            rank: peer.child.as_ref().and_then(Child::rank),
        }
    }

    fn on_ask(&mut self, parent: usize, child: usize, rank: Rank, pull: u32) {
        if self.peers[child].pull != pull || self.peers[child].dead.is_some() {
            return;
        }
        match self.peers[parent].dead {
            Some(true) => return,
            Some(false) => {
                let at = self.delay();
                return self.at(at, Event::Failed { child, failure: Failure::Broke, pull });
            }
            None => {}
        }
        let own = self.standing(parent);
        let asker = Asker { position: self.peers[child].position, rank: Some(rank) };
        let is_wanted = self.peers[parent].child.is_some();
        if !is_wanted || self.peers[parent].parent.admit(&KEY, &own, &asker).is_err() {
            let at = self.delay();
            return self.at(at, Event::Failed { child, failure: Failure::Refused, pull });
        }
        let now = self.clock(parent);
        self.peers[parent].parent.begin(child as u64, KEY, &asker, &own, now);
        self.peers[child].feeder = Some(parent);
    }

    fn failed(&mut self, node: usize, failure: Failure) -> Result<(), String> {
        self.detach(node);
        let now = self.clock(node);
        let peer = &mut self.peers[node];
        let deadline = match peer.hold {
            Some(_) => peer.budget.deadline(),
            None => peer.budget.begin(now).map(|(hold, deadline)| {
                peer.hold = Some((hold, now, deadline));
                deadline
            }),
        };
        if let (Some((_, _, until)), Some(deadline)) = (&mut peer.hold, deadline) {
            *until = deadline;
        }
        if let Some(child) = &mut peer.child {
            child.failed(failure, deadline, now);
        }
        self.drive(node)
    }

    fn die(&mut self, node: usize, silent: bool) {
        self.peers[node].dead = Some(silent);
        self.detach(node);
        self.peers[node].child = None;
        for child in 0..self.peers.len() {
            if self.peers[child].feeder == Some(node) && !silent {
                let (at, pull) = (self.delay(), self.peers[child].pull);
                self.at(at, Event::Failed { child, failure: Failure::Broke, pull });
            }
        }
    }

    /// The bytes of one step.
    fn flow(&mut self) {
        let positions: Vec<u64> = self.peers.iter().map(|peer| peer.position).collect();
        for node in 0..self.peers.len() {
            let peer = &self.peers[node];
            let there = match peer.feeder {
                _ if peer.dead.is_some() => continue,
                _ if peer.from_upstream => TOTAL,
                Some(feeder) if self.peers[feeder].dead.is_none() => positions[feeder],
                _ => continue,
            };
            if peer.feeder.is_some() && self.rng.random_range(0..1000) < self.weather.breaks {
                let pull = peer.pull;
                self.at(self.now, Event::Failed { child: node, failure: Failure::Broke, pull });
                continue;
            }
            let peer = &self.peers[node];
            let more = there.saturating_sub(peer.position).min(peer.rate * 4);
            // Upstream has bad moments, too.
            if more == 0 || self.rng.random_range(0..10) < 3 {
                continue;
            }
            let (clock, now, is_root) = (self.clock(node), self.now, peer.from_upstream);
            let peer = &mut self.peers[node];
            peer.position += if is_root { more.min(peer.rate) } else { more };
            let position = peer.position;
            if is_root {
                let first = peer.grows.map_or(now, |(first, _)| first);
                peer.grows = Some((first, now));
            }
            if let Some(child) = &mut peer.child {
                child.fed(clock);
                child.grew(position, clock);
                if position == TOTAL {
                    child.complete(clock);
                }
            }
            self.unhold(node, HoldEnd::Fed { usual: Duration::from_millis(300) });
            if position == TOTAL {
                self.from_peers += usize::from(!is_root);
                self.detach(node);
            }
        }
    }

    /// Somebody is told to pull: then nobody else may have been doing so for longer than a lease, and be well.
    fn no_root_but(&self, node: usize) -> Result<(), String> {
        for (other, peer) in self.peers.iter().enumerate() {
            let Some((first, last)) = peer.grows.filter(|_| peer.from_upstream && peer.dead.is_none()) else {
                continue;
            };
            if other != node && self.now - first > LEASE && self.now - last < Duration::from_millis(500) {
                return Err(format!(
                    "at {:?} {node} is told to pull while {other} has done so since {first:?} and is at {}",
                    self.now, peer.position
                ));
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        for node in 0..self.peers.len() {
            let mut at = node;
            for _ in 0..=self.peers.len() {
                match self.peers[at].feeder {
                    Some(feeder) => at = feeder,
                    None => break,
                }
                if at == node {
                    return Err(format!("at {:?} {node} is above itself", self.now));
                }
            }
            let peer = &self.peers[node];
            let now = self.clock(node);
            if let Some((_, since, until)) = peer.hold
                && peer.dead.is_none()
            {
                let bound = until.max(since) + TOLERANCE;
                if now > bound || now > since + self.weather.max_wait + TOLERANCE + Duration::from_secs(1) {
                    return Err(format!("at {:?} {node} is held since {:?}", self.now, now - since));
                }
            }
            if peer.budget.spent() > self.weather.max_wait + TOLERANCE {
                return Err(format!("{node} was held for {:?} in all", peer.budget.spent()));
            }
        }
        Ok(())
    }

    /// Whether all that live and may pull have everything.
    pub(super) fn is_over(&self) -> bool {
        self.peers.iter().all(|peer| peer.dead.is_some() || peer.refused || peer.position == TOTAL)
    }
}
