//! Nodes with a containerd each, the protocol's state machines, and time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::fluid::{Flow, From, Links, Sharing};
use super::machines::{
    ANSWER, Action, Asker, Budget, COORDINATORS, Child, Coordinator, Failure, Hold, HoldEnd, Key, Limits, Node, Parent,
    Rank, Request, Response, Source, Standing, Wish, Zone,
};
use super::scenario::{Kill, Scenario};

/// How long bytes flow between two looks at who has what.
const STEP: Duration = Duration::from_millis(10);
/// containerd writes in such steps, and others see no more of a file than what is written.
const WRITE: u64 = 1 << 20;
/// How often a node looks at its children.
const LOOK: Duration = Duration::from_millis(250);
/// How long a coordinator takes for a message.
const WORK: Duration = Duration::from_micros(20);
/// How long a node that died silently is taken to be alive.
const NOTICED: Duration = Duration::from_secs(15);
/// How long a client waits until it tries again to pull what failed.
const RETRY: Duration = Duration::from_secs(10);
/// What upstream's first byte is taken to need where nothing is known.
const USUAL: Duration = Duration::from_millis(300);
/// Blobs that containerd gets at a time.
const PULLS_AT_ONCE: usize = 3;

#[derive(Clone, Debug)]
enum Event {
    Start(usize),
    Request { to: usize, from: usize, blob: usize, request: Request },
    Response { to: usize, blob: usize, number: u64, response: Option<Response> },
    Wake { node: usize, blob: usize },
    Ask { parent: usize, child: usize, blob: usize, rank: Rank, pull: u32 },
    Refused { child: usize, blob: usize, failure: Failure, pull: u32 },
    Probed { parent: usize, child: usize, blob: usize, pull: u32 },
    Upstream { node: usize, blob: usize, pull: u32 },
    Die { node: usize, silent: bool },
}

/// A blob at a node.
#[derive(Debug, Default)]
pub(super) struct Blob {
    pub(super) position: f64,
    pub(super) done: bool,
    pub(super) asked: bool,
    child: Option<Child>,
    hold: Option<(Hold, Instant)>,
    pub(super) from: Option<From>,
    /// Counts the sources that it had: what belongs to an older one is void.
    pull: u32,
    wake: Option<Instant>,
    /// It stands in the list of what flows.
    listed: bool,
    pub(super) depth: u32,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) blobs: Vec<Blob>,
    pub(super) started: Option<Instant>,
    pub(super) finished: Option<Instant>,
    pub(super) died: Option<Instant>,
    silent: bool,
    speaks: bool,
    refused: bool,
    /// Another node takes part in its pull; it left a part to others, and none came.
    shared: bool,
    left_in_vain: bool,
    coordinator: Coordinator,
    parent: Parent,
    budget: Budget,
    busy: Instant,
    pub(super) held: Duration,
    holding: (usize, Instant),
    pub(super) messages: u64,
    numbers: u64,
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) upstream_bytes: f64,
    pub(super) upstream_requests: u64,
    pub(super) reparented: u64,
    pub(super) given_up: u64,
    pub(super) leases: u64,
}

pub(super) struct World {
    pub(super) scenario: Scenario,
    lengths: Vec<u64>,
    keys: Vec<Key>,
    /// For each blob all nodes, the nearest first.
    nearest: Vec<Vec<usize>>,
    pub(super) members: Vec<Member>,
    links: Links,
    sharing: Sharing,
    flows: Vec<Flow>,
    active: Vec<(usize, usize)>,
    active_set: HashSet<(usize, usize)>,
    children: HashMap<(usize, usize), Vec<usize>>,
    events: BinaryHeap<Reverse<(Instant, u64)>>,
    queued: HashMap<u64, Event>,
    order: u64,
    pub(super) start: Instant,
    now: Instant,
    rng: StdRng,
    pub(super) totals: Totals,
    to_refuse: usize,
    to_kill: Option<Kill>,
    /// Whom a plain node finds that looks a blob up: those that have it, and those that receive it.
    found: Vec<Vec<usize>>,
}

fn spread(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

impl World {
    pub(super) fn new(scenario: Scenario) -> Self {
        let (start, rng) = (Instant::now(), StdRng::seed_from_u64(scenario.seed));
        let lengths = scenario.blobs();
        let keys = (0..lengths.len()).map(|blob| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&spread(scenario.seed ^ (blob as u64 + 1) << 32).to_be_bytes());
            Key(key)
        });
        let mut world = Self {
            keys: keys.collect(),
            nearest: vec![Vec::new(); lengths.len()],
            found: vec![Vec::new(); lengths.len()],
            lengths,
            members: Vec::new(),
            links: Links { upstream: 0.0, up: Vec::new(), down: Vec::new() },
            sharing: Sharing::default(),
            flows: Vec::new(),
            active: Vec::new(),
            active_set: HashSet::new(),
            children: HashMap::new(),
            events: BinaryHeap::new(),
            queued: HashMap::new(),
            order: 0,
            start,
            now: start,
            rng,
            totals: Totals::default(),
            to_refuse: scenario.refuse,
            to_kill: scenario.kill,
            scenario,
        };
        world.links.upstream = world.scenario.upstream * STEP.as_secs_f64();
        let n = world.scenario.nodes;
        for node in 0..n {
            world.add_member(node >= world.scenario.mute);
            let part = world.scenario.stagger.mul_f64(node as f64 / n.max(2) as f64);
            // Nobody is told at the very same moment.
            let jitter = Duration::from_micros(world.rng.random_range(0..20_000));
            world.at(start + part + jitter, Event::Start(node));
        }
        for node in 0..world.scenario.slow.min(n) {
            // Not one of those that ask first only.
            let node = n / 2 + node;
            world.links.up[node.min(n - 1)] /= 10.0;
        }
        for _ in 0..world.scenario.seeds {
            world.add_seed();
        }
        world
    }

    fn add_member(&mut self, speaks: bool) -> usize {
        let (node, now) = (self.members.len(), self.now);
        let blobs = self.lengths.iter().map(|_| Blob::default()).collect();
        self.members.push(Member {
            blobs,
            started: None,
            finished: None,
            died: None,
            silent: false,
            speaks,
            refused: false,
            shared: false,
            left_in_vain: false,
            coordinator: Coordinator::new(Limits::default(), now),
            parent: Parent::new(64, now),
            budget: Budget::new(self.scenario.storm.unwrap_or_default(), now),
            busy: now,
            held: Duration::ZERO,
            holding: (0, now),
            messages: 0,
            numbers: 0,
        });
        let bytes = self.scenario.node * STEP.as_secs_f64();
        self.links.up.push(bytes);
        self.links.down.push(bytes);
        if speaks {
            for blob in 0..self.keys.len() {
                let distance = self.distance(node, blob);
                let place = self.nearest[blob].partition_point(|other| self.distance(*other, blob) < distance);
                self.nearest[blob].insert(place, node);
            }
        }
        node
    }

    fn add_seed(&mut self) {
        let node = self.add_member(true);
        for (blob, length) in self.lengths.clone().into_iter().enumerate() {
            let held = &mut self.members[node].blobs[blob];
            (held.position, held.done, held.asked) = (length as f64, true, true);
            self.found[blob].push(node);
        }
        (self.members[node].started, self.members[node].finished) = (Some(self.start), Some(self.start));
    }

    fn distance(&self, node: usize, blob: usize) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.keys[blob].0[..8]);
        spread(node as u64 + 1) ^ u64::from_be_bytes(first)
    }

    fn at(&mut self, time: Instant, event: Event) {
        self.order += 1;
        self.events.push(Reverse((time, self.order)));
        self.queued.insert(self.order, event);
    }

    fn soon(&mut self, event: Event) {
        let jitter = self.rng.random_range(0.8..1.5);
        self.at(self.now + self.scenario.latency.mul_f64(jitter), event);
    }

    /// Runs until all that live have everything, or for `bound` at most. False if it took longer.
    pub(super) fn run(&mut self, bound: Duration) -> bool {
        let mut looked = self.start;
        let mut died = self.start;
        // Where all go upstream alone nothing is as quick as to need fine steps.
        let mut step = STEP;
        if self.scenario.storm.is_none() && self.scenario.nodes > 200 {
            let all = self.scenario.nodes as f64 * self.scenario.size as f64 / self.scenario.upstream;
            step = STEP.max(Duration::from_secs_f64(all / 5000.0));
        }
        let scale = step.as_secs_f64() / STEP.as_secs_f64();
        self.links.upstream *= scale;
        self.links.up.iter_mut().for_each(|link| *link *= scale);
        self.links.down.iter_mut().for_each(|link| *link *= scale);
        while self.now < self.start + bound {
            let next = self.now + step;
            while let Some(Reverse((time, order))) = self.events.peek().copied()
                && time <= next
            {
                self.events.pop();
                self.now = self.now.max(time);
                if let Some(event) = self.queued.remove(&order) {
                    self.on(event);
                }
            }
            self.now = next;
            self.flow(step);
            if self.now >= looked + LOOK {
                looked = self.now;
                self.look();
            }
            if self.scenario.churn > 0.0 && self.now >= died + Duration::from_millis(100) {
                self.churn(self.now - died);
                died = self.now;
            }
            self.kill_half_way();
            if self.is_over() {
                self.count_leases();
                return true;
            }
        }
        self.count_leases();
        false
    }

    fn count_leases(&mut self) {
        self.totals.leases = self.members.iter().map(|member| member.coordinator.leases()).sum();
    }

    fn is_over(&self) -> bool {
        self.members.iter().all(|member| member.finished.is_some() || member.died.is_some())
    }

    fn churn(&mut self, passed: Duration) {
        let deaths = self.scenario.nodes as f64 * self.scenario.churn * passed.as_secs_f64() / 60.0;
        let mut deaths = deaths as usize + usize::from(self.rng.random_bool(deaths.fract()));
        // Who joins late must not keep the others from coming to an end.
        if self.members.iter().take(self.scenario.nodes).all(|m| m.finished.is_some() || m.died.is_some()) {
            deaths = 0;
        }
        for _ in 0..deaths {
            let node = self.rng.random_range(0..self.members.len());
            if self.members[node].died.is_none() {
                let silent = self.rng.random_bool(0.5);
                self.die(node, silent);
                let new = self.add_member(true);
                self.soon(Event::Start(new));
            }
        }
    }

    fn kill_half_way(&mut self) {
        let Some(kill) = self.to_kill else { return };
        let layer = 2;
        let half = self.lengths[layer] as f64 / 2.0;
        let root = (0..self.members.len()).find(|node| {
            let blob = &self.members[*node].blobs[layer];
            blob.from == Some(From::Upstream) && blob.position >= half
        });
        let Some(root) = root else { return };
        let node = match kill {
            Kill::Root => Some(root),
            Kill::Inner => {
                let inner = (0..self.members.len()).filter(|node| *node != root && self.members[*node].died.is_none());
                inner.max_by_key(|node| self.below(*node, layer))
            }
        };
        self.to_kill = None;
        if let Some(node) = node {
            self.die(node, self.scenario.silent);
        }
    }

    fn below(&self, node: usize, blob: usize) -> usize {
        let children = self.children.get(&(node, blob));
        children.into_iter().flatten().map(|child| 1 + self.below(*child, blob)).sum()
    }

    fn die(&mut self, node: usize, silent: bool) {
        self.on(Event::Die { node, silent });
    }

    /// Moves the bytes of one step.
    fn flow(&mut self, step: Duration) {
        let seconds = step.as_secs_f64();
        self.flows.clear();
        for (node, blob) in &self.active {
            let at = &self.members[*node].blobs[*blob];
            let from = at.from.unwrap_or(From::Upstream);
            let (there, most) = match from {
                From::Upstream => (self.lengths[*blob] as f64, self.scenario.throttle.min(self.scenario.takes)),
                From::Node(parent) if self.members[parent].died.is_some() => (0.0, 0.0),
                From::Node(parent) => (self.visible(parent, *blob) as f64, self.scenario.takes),
            };
            let wants = (there - at.position).max(0.0).min(most * seconds);
            self.flows.push(Flow { from, to: *node, wants, gets: 0.0 });
        }
        let mut flows = std::mem::take(&mut self.flows);
        self.sharing.share(&self.links, &mut flows);
        let active = self.active.clone();
        for (flow, (node, blob)) in flows.iter().zip(active) {
            if flow.gets > 0.0 {
                self.got(node, blob, flow);
            }
        }
        self.flows = flows;
        let (set, members) = (&self.active_set, &mut self.members);
        self.active.retain(|(node, blob)| {
            let stays = set.contains(&(*node, *blob));
            members[*node].blobs[*blob].listed = stays;
            stays
        });
    }

    fn got(&mut self, node: usize, blob: usize, flow: &Flow) {
        if flow.from == From::Upstream {
            self.totals.upstream_bytes += flow.gets;
        }
        let (length, now) = (self.lengths[blob], self.now);
        let at = &mut self.members[node].blobs[blob];
        let before = at.position;
        at.position = (at.position + flow.gets).min(length as f64);
        if length as f64 - at.position < 1.0 {
            at.position = length as f64;
        }
        let is_first = before == 0.0;
        if let From::Node(parent) = flow.from
            && (is_first || at.depth == 0)
        {
            let depth = self.members[parent].blobs[blob].depth + 1;
            self.members[node].blobs[blob].depth = depth;
        }
        let at = &mut self.members[node].blobs[blob];
        let (position, done) = (at.position, at.position >= length as f64);
        let visible = if done { length } else { position as u64 / WRITE * WRITE };
        if let Some(child) = &mut at.child {
            let was_held = matches!(child.source(), Source::Asked(_));
            child.fed(now);
            child.grew(visible, now);
            if was_held {
                self.unhold(node, blob, HoldEnd::Fed { usual: USUAL });
            }
            if is_first || was_held || (before as u64) < WRITE && visible >= WRITE {
                self.drive(node, blob);
            }
        }
        if is_first && visible > 0 || (before as u64) < WRITE && visible >= WRITE {
            self.found[blob].push(node);
        }
        if done {
            self.is_done(node, blob);
        }
    }

    fn is_done(&mut self, node: usize, blob: usize) {
        self.detach(node, blob);
        let now = self.now;
        let member = &mut self.members[node];
        let at = &mut member.blobs[blob];
        at.done = true;
        if let Some(child) = &mut at.child {
            child.complete(now);
        }
        if member.blobs.iter().all(|blob| blob.done) {
            member.finished = Some(now);
        }
        if !self.found[blob].contains(&node) || self.lengths[blob] <= WRITE {
            self.found[blob].push(node);
        }
        self.drive(node, blob);
        self.next_blobs(node);
    }

    /// What others see of a blob at a node.
    fn visible(&self, node: usize, blob: usize) -> u64 {
        let at = &self.members[node].blobs[blob];
        if at.done { self.lengths[blob] } else { at.position as u64 / WRITE * WRITE }
    }

    /// The blob comes from somewhere else from now on, or from nowhere.
    fn detach(&mut self, node: usize, blob: usize) {
        let at = &mut self.members[node].blobs[blob];
        at.pull += 1;
        if let Some(From::Node(parent)) = at.from.take() {
            if let Some(children) = self.children.get_mut(&(parent, blob)) {
                children.retain(|child| *child != node);
            }
            self.members[parent].parent.end(feed_number(node, blob));
        }
        self.active_set.remove(&(node, blob));
    }

    fn attach(&mut self, node: usize, blob: usize, from: From) {
        let at = &mut self.members[node].blobs[blob];
        at.from = Some(from);
        self.active_set.insert((node, blob));
        if !std::mem::replace(&mut at.listed, true) {
            self.active.push((node, blob));
        }
    }
}

/// A child's number at its parent.
fn feed_number(node: usize, blob: usize) -> u64 {
    (node as u64) << 16 | blob as u64
}

mod node;
