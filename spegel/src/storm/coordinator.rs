//! The part of a node that is near to a blob's key: it says who gets the blob from whom.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::rate::Rate;
use super::tree::{Roots, Seeker, Standing, Tree};
use super::{
    BEYOND_USUAL, FED_FIRST_BYTE, GRACE, Have, Holding, Key, Node, REPORT, Request, Response, SUSPECT, TreeView, Want,
    Why, Zone, view,
};

/// How long a blob is remembered of which nothing is heard.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// How long a holder of a lease is given for its first byte where nothing is known of upstream, and the least where it is.
const FIRST_BYTE: Duration = Duration::from_secs(1);
const SHORTEST_FIRST_BYTE: Duration = Duration::from_millis(500);
/// The most for what this coordinator itself has seen, of all registries: a second lease must fit in what a pull may be held.
const SEEN_FIRST_BYTE: Duration = Duration::from_millis(1500);
/// How long somebody is given whom another coordinator told to pull, or nobody.
const UNTOLD_FIRST_BYTE: Duration = Duration::from_millis(1500);
/// How long to wait at a parent that has bytes.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long at a root that gave nothing before: both times and another one's first byte must fit in what a pull may be held.
const ONCE_MORE: Duration = Duration::from_millis(500);
/// What a child may lack of what a root has, if that is so for all.
const SLACK: u64 = 4 << 20;
/// Whoever lacks so much of what another has should get that from it before it pulls itself; or this part of the blob.
const WORTHWHILE: u64 = 8 << 20;
const WORTHWHILE_PART: u64 = 8;
/// How long to wait for another answer: while a root is silent, and where there is no better parent.
const SOON: Duration = Duration::from_millis(300);
const LATER: Duration = Duration::from_secs(1);
const MUCH_LATER: Duration = Duration::from_secs(5);
/// How long somebody who pulls something else already is kept from pulling this as well: if others want it, one of them comes meanwhile. containerd
/// asks for more layers than it gets at a time, so that a lease for the last of them would run out. Not of what comes in one piece.
const SPREAD: Duration = Duration::from_millis(150);
const ONE_PIECE: u64 = 1 << 20;
/// How rare the reports of all nodes but roots are.
const REPORTS_A_SECOND: u32 = 200;
const LEAST_PAUSE: Duration = Duration::from_secs(2);

/// What a coordinator may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many blobs it keeps.
    pub blobs: usize,
    /// How many places of nodes, in all blobs.
    pub places: usize,
    /// How many messages a second it answers, and how many at once.
    pub messages: (u32, u32),
    /// The same for each node.
    pub messages_of_node: (u32, u32),
}

/// A coordinator. What it knows is lost with it, which costs time and no pull.
#[derive(Debug)]
pub struct Coordinator {
    limits: Limits,
    trees: BTreeMap<Key, Tree>,
    places: usize,
    rate: Rate,
    rates: HashMap<Node, Rate>,
    /// How long upstream's first byte took after a lease, smoothed.
    usual: Option<Duration>,
    leases: u64,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self { blobs: 4096, places: 131_072, messages: (20_000, 40_000), messages_of_node: (200, 400) }
    }
}

// === impl Coordinator ===

impl Coordinator {
    /// One that knows nothing.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            trees: BTreeMap::new(),
            places: 0,
            rate: Rate::new(limits.messages.1, now),
            rates: HashMap::new(),
            usual: None,
            leases: 0,
        }
    }

    /// How many times it told somebody to pull.
    pub fn leases(&self) -> u64 {
        self.leases
    }

    /// How many blobs and how many places of nodes it keeps.
    pub fn size(&self) -> (usize, usize) {
        (self.trees.len(), self.places)
    }

    /// The trees that it heard of last, `trees` at the most with `places` nodes each, for people.
    pub fn view(&self, trees: usize, places: usize, now: Instant) -> Vec<TreeView> {
        view::of(&self.trees, trees, places, now)
    }

    /// Whether nothing is known of the blob: then [`Coordinator::holders`] should be told before anything else.
    pub fn is_new(&self, key: &Key) -> bool {
        !self.trees.contains_key(key)
    }

    /// Whether a message of this node would be answered now: it may have sent too many.
    pub fn hears(&self, node: Node, now: Instant) -> bool {
        let Limits { messages, messages_of_node: of_node, .. } = self.limits;
        let of_node = self.rates.get(&node).is_none_or(|rate| rate.has_some(of_node.0, of_node.1, now));
        of_node && self.rate.has_some(messages.0, messages.1, now)
    }

    /// These nodes are said to have all of the blob.
    pub fn holders(&mut self, key: &Key, holders: &[Node], now: Instant) {
        if holders.is_empty() || self.places + holders.len() > self.limits.places {
            return;
        }
        let tree = self.tree(key, now);
        let before = tree.len();
        holders.iter().for_each(|holder| tree.is_said_to_have(*holder, 1, now));
        let more = tree.len() - before;
        self.places += more;
    }

    /// Answers a node's message; not at all if it sends too many.
    pub fn receive(&mut self, from: Node, zone: Zone, request: &Request, now: Instant) -> Option<Response> {
        if !self.may_speak(from, now) {
            return None;
        }
        if !self.trees.contains_key(request.key()) {
            if matches!(request, Request::Have(Have { holding: Holding::Nothing | Holding::Child, .. })) {
                return Some(Response::Ack { again: LEAST_PAUSE, furthest: 0 });
            }
            self.tree(request.key(), now);
        }
        let is_known = self.trees.get(request.key()).is_some_and(|tree| tree.get(from).is_some());
        if !is_known && self.places >= self.limits.places {
            self.forget(now);
            if self.places >= self.limits.places {
                return Some(Response::Refuse);
            }
        }
        let tree = self.trees.get_mut(request.key())?;
        let before = tree.len();
        // What comes a second time is answered as it was, and what was overtaken not at all.
        if let Some(place) = tree.get(from)
            && request.number() <= place.number
        {
            return (request.number() == place.number).then_some(place.answer);
        }
        let mut asked = Asked { tree, from, zone, now, usual: &mut self.usual, leases: &mut self.leases };
        let answer = match request {
            Request::Want(want) => asked.want(want),
            Request::Have(have) => asked.have(have),
        };
        if let Some(place) = tree.get_mut(from) {
            (place.number, place.answer) = (request.number(), answer);
        }
        self.places = self.places + tree.len() - before;
        Some(answer)
    }

    /// The node is gone: nobody is sent to it any more.
    pub fn lost(&mut self, node: Node) {
        for tree in self.trees.values_mut() {
            self.places -= usize::from(tree.remove(node));
        }
        self.rates.remove(&node);
    }

    /// Drops what nothing was heard of for a while. To be called now and then.
    pub fn forget(&mut self, now: Instant) {
        self.trees.retain(|_, tree| now.saturating_duration_since(tree.touched) < FORGOTTEN);
        self.places = self.trees.values().map(Tree::len).sum();
        let (per_second, burst) = self.limits.messages_of_node;
        self.rates.retain(|_, rate| !rate.is_full(per_second, burst, now));
    }

    /// The tree of a blob, a new one if there was none.
    fn tree(&mut self, key: &Key, now: Instant) -> &mut Tree {
        if !self.trees.contains_key(key) {
            self.make_room(now);
        }
        self.trees.entry(*key).or_insert_with(|| Tree::new(now))
    }

    fn make_room(&mut self, now: Instant) {
        if self.trees.len() < self.limits.blobs {
            return;
        }
        self.forget(now);
        while self.trees.len() >= self.limits.blobs {
            let stalest = self.trees.iter().min_by_key(|(_, tree)| tree.touched).map(|(key, _)| *key);
            let Some(tree) = stalest.and_then(|key| self.trees.remove(&key)) else { return };
            self.places -= tree.len();
        }
    }

    fn may_speak(&mut self, node: Node, now: Instant) -> bool {
        let Limits { messages, messages_of_node: of_node, places, .. } = self.limits;
        if self.rates.len() >= places && !self.rates.contains_key(&node) {
            self.forget(now);
            if self.rates.len() >= places {
                return false;
            }
        }
        let rate = self.rates.entry(node).or_insert_with(|| Rate::new(of_node.1, now));
        rate.take(of_node.0, of_node.1, now) && self.rate.take(messages.0, messages.1, now)
    }
}

/// A message that is being answered.
struct Asked<'a> {
    tree: &'a mut Tree,
    from: Node,
    zone: Zone,
    now: Instant,
    usual: &'a mut Option<Duration>,
    leases: &'a mut u64,
}

impl Asked<'_> {
    fn want(&mut self, want: &Want) -> Response {
        let (from, now) = (self.from, self.now);
        self.tree.heard(from, self.zone, want.position, want.slots, now);
        self.tree.total = self.tree.total.or(want.total);
        self.hear_why(want);
        self.tree.end_leases(now);
        match want.why {
            Why::Slow => self.better(want, true),
            // Whatever holds it up holds up the root, or it is not behind.
            Why::Still
                if self.is_fed() && (!self.tree.progresses(now) || self.tree.furthest <= want.position + SLACK) =>
            {
                Response::Wait { pause: LATER }
            }
            Why::Still => self.better(want, false),
            Why::New | Why::Refused | Why::Broke => self.place(want),
        }
    }

    /// What the question says of those that it names.
    fn hear_why(&mut self, want: &Want) {
        let Some(place) = self.tree.get(self.from) else { return };
        let parent = place.parent;
        match (want.why, place.standing) {
            // It was told to pull, or did so, and is back: upstream does not give it to it.
            (_, Standing::Leased { .. } | Standing::Root) => {
                if let Some(place) = self.tree.get_mut(self.from) {
                    place.refused = true;
                }
                self.tree.stand(self.from, Standing::Orphan, None);
            }
            (Why::New | Why::Still, _) => {}
            (why, _) => {
                if let Some(parent) = parent {
                    self.hear_of(parent, why);
                    if want.position == 0 && why != Why::Slow {
                        self.tree.was_in_vain(parent);
                    }
                }
                if why != Why::Slow {
                    self.tree.stand(self.from, Standing::Orphan, None);
                }
            }
        }
    }

    fn hear_of(&mut self, parent: Node, why: Why) {
        match why {
            Why::Refused | Why::Broke if self.tree.is_hearsay(parent) => {
                self.tree.remove(parent);
            }
            Why::Refused => self.tree.refused(parent),
            _ => self.tree.complain(parent, why == Why::Broke, self.now),
        }
    }

    /// Whether the asker's way up leads to somebody who gets the blob from elsewhere.
    fn is_fed(&self) -> bool {
        let mut at = self.tree.get(self.from).and_then(|place| place.parent);
        for _ in 0..self.tree.len() {
            let Some(node) = at else { return false };
            if self.tree.is_source(node, self.now) {
                return true;
            }
            at = self.tree.get(node).and_then(|place| place.parent);
        }
        false
    }

    /// A place for one that has none.
    fn place(&mut self, want: &Want) -> Response {
        let seeker = Seeker::of(self.from, want.position, &want.avoid);
        let sure = Seeker { only_good: true, only_near: true, ..seeker };
        if want.position > 0
            && let Some(parent) = self.tree.parent_for(sure, self.now)
        {
            return self.fetch(parent);
        }
        if let Some(parent) = self.parent(seeker) {
            return self.fetch(parent);
        }
        // Not the one that it has just lost.
        let latest = want.avoid.len().saturating_sub(1);
        let at_need = Seeker { avoid: &want.avoid[latest..], at_need: true, ..seeker };
        if let Some(parent) = self.tree.parent_for(at_need, self.now)
            && !at_need.avoid.contains(&parent)
            && (want.position > 0 || self.tree.has_some(parent))
        {
            return self.fetch(parent);
        }
        let avoid = if want.position == 0 { &want.avoid[..] } else { &[] };
        match self.tree.judge_roots(avoid, self.now) {
            // Nobody is ahead of the asker and would do.
            Roots::Hope => Response::Wait { pause: SOON },
            Roots::Again(root) => match self.fetch(root) {
                Response::Fetch { parent, rank, .. } => Response::Fetch { parent, rank, patience: ONCE_MORE },
                answer => answer,
            },
            Roots::None | Roots::InVain => self.pull(want),
        }
    }

    /// Another place for one that has one, if there is a better one; what gives it something it is to leave for a good one only.
    fn better(&mut self, want: &Want, only_good: bool) -> Response {
        let Some(place) = self.tree.get(self.from) else { return Response::Refuse };
        let mut avoid = want.avoid.clone();
        avoid.extend(place.parent);
        let seeker = Seeker { only_good, ..Seeker::of(self.from, want.position, &avoid) };
        if let Some(parent) = self.parent(seeker) {
            return self.fetch(parent);
        }
        if only_good || self.tree.has_root(self.now) {
            let pause = if only_good { MUCH_LATER.max(self.turn()) } else { LATER };
            return Response::Wait { pause };
        }
        self.pull(want)
    }

    fn parent(&mut self, seeker: Seeker<'_>) -> Option<Node> {
        if let Some(parent) = self.tree.parent_for(seeker, self.now) {
            return Some(parent);
        }
        if seeker.position > 0 || seeker.only_good || !self.tree.has_root(self.now) {
            return None;
        }
        // All that could take it were counted after it.
        self.tree.count_anew(seeker.node);
        self.tree.parent_for(seeker, self.now)
    }

    fn fetch(&mut self, parent: Node) -> Response {
        // One that waits itself is asked now and then whether it is there at all, and sends its children away once there is no hope.
        let waits = self.tree.get(parent).is_some_and(|place| place.position == 0 && !place.is_complete());
        let patience = if waits { FED_FIRST_BYTE + BEYOND_USUAL } else { PATIENCE };
        self.tree.stand(self.from, Standing::Child, Some(parent));
        Response::Fetch { parent, rank: self.tree.rank(self.from), patience }
    }

    /// Nobody gets it from upstream: the asker may.
    fn pull(&mut self, want: &Want) -> Response {
        let (from, now) = (self.from, self.now);
        if want.skipped > 0 && now.saturating_duration_since(self.tree.first_heard) < GRACE {
            return Response::Wait { pause: SOON };
        }
        let alone = now.saturating_duration_since(self.tree.first_heard);
        let is_spread = want.busy && want.position == 0 && self.tree.total.is_none_or(|total| total > ONE_PIECE);
        if is_spread && alone < SPREAD {
            return Response::Wait { pause: SPREAD - alone };
        }
        let worthwhile = self.tree.total.map_or(WORTHWHILE, |total| WORTHWHILE.max(total / WORTHWHILE_PART));
        if let Some(further) = self.tree.further_than(want.position + worthwhile, &want.avoid, now)
            && further != from
            && !self.leads_to(further)
        {
            return self.fetch(further);
        }
        if self.tree.get(from).is_none_or(|place| place.refused) {
            // It has its own right to try, and does not count as who pulls for the others.
            return Response::Refuse;
        }
        let within = if want.fed { FED_FIRST_BYTE } else { first_byte(want.usual, *self.usual) };
        self.tree.stand(from, Standing::Leased { until: now + within }, None);
        if let Some(place) = self.tree.get_mut(from) {
            place.grown = now;
        }
        *self.leases += 1;
        Response::Pull { within }
    }

    /// Whether the way up from a node leads to the asker.
    fn leads_to(&self, node: Node) -> bool {
        let mut at = Some(node);
        for _ in 0..=self.tree.len() {
            match at {
                Some(node) if node == self.from => return true,
                Some(node) => at = self.tree.get(node).and_then(|place| place.parent),
                None => return false,
            }
        }
        true
    }

    fn have(&mut self, have: &Have) -> Response {
        let (from, now) = (self.from, self.now);
        let before = self.tree.get(from).map(|place| (place.standing, place.grown, place.position));
        self.tree.heard(from, self.zone, have.position, have.slots, now);
        self.tree.total = self.tree.total.or(have.total);
        match have.holding {
            Holding::Root => match before {
                Some((Standing::Leased { .. }, granted, 0)) if have.position > 0 => {
                    self.learn(now.saturating_duration_since(granted));
                    self.tree.stand(from, Standing::Root, None);
                }
                Some((Standing::Leased { until }, granted, position)) if have.position <= position => {
                    let until = until.max((now + SUSPECT).min(granted + FED_FIRST_BYTE));
                    self.tree.stand(from, Standing::Leased { until }, None);
                }
                // Another coordinator told it to pull, or nobody did: it has time to get something all the same.
                None if have.position == 0 => {
                    let until = now + UNTOLD_FIRST_BYTE;
                    self.tree.stand(from, Standing::Leased { until }, None);
                }
                // Its lease ran out, and it still has nothing.
                Some((Standing::Orphan, ..)) if have.position == 0 && self.is_refused() => {}
                _ => self.tree.stand(from, Standing::Root, None),
            },
            Holding::All => self.tree.stand(from, Standing::Complete, None),
            // From whom it gets it is known if it was told so here.
            Holding::Child => {}
            Holding::Nothing => {
                let was_root = matches!(before, Some((Standing::Leased { .. } | Standing::Root, ..)));
                self.tree.stand(from, Standing::Orphan, None);
                if let Some(place) = self.tree.get_mut(from) {
                    place.refused |= was_root;
                }
            }
        }
        let again = match have.holding {
            Holding::Root if self.tree.is_main_root(from) => REPORT,
            _ => LEAST_PAUSE.max(self.turn()),
        };
        Response::Ack { again, furthest: self.tree.furthest }
    }

    fn is_refused(&self) -> bool {
        self.tree.get(self.from).is_some_and(|place| place.refused)
    }

    /// The time in which each node may say something once, if they are not to say too much together.
    fn turn(&self) -> Duration {
        Duration::from_secs(1) * u32::try_from(self.tree.len()).unwrap_or(u32::MAX) / REPORTS_A_SECOND
    }

    /// Upstream's first byte took so long.
    fn learn(&mut self, took: Duration) {
        *self.usual = Some(self.usual.map_or(took, |usual| (usual * 3 + took) / 4));
    }
}

/// By what the asker knows of its registry, and by what was seen here.
fn first_byte(told: Option<Duration>, seen: Option<Duration>) -> Duration {
    let bound = |usual: Duration, most| (3 * usual + BEYOND_USUAL).clamp(SHORTEST_FIRST_BYTE, most);
    let told = told.map(|usual| bound(usual, FED_FIRST_BYTE));
    let seen = seen.map(|usual| bound(usual, SEEN_FIRST_BYTE));
    told.max(seen).unwrap_or(FIRST_BYTE)
}
