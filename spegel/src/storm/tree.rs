//! Who gets one blob from whom, as its coordinator knows it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::{Holding, LEASE, Node, Rank, Response, STILL, STUCK, SUSPECT, Zone};

/// How long a parent that does not deliver is given no more children.
const SHUNNED: Duration = Duration::from_secs(5);
/// How long a complete node counts as a source without being heard of.
const COMPLETE: Duration = Duration::from_secs(60);
/// How many candidates of one class and zone are looked at for one question of a node that has no byte yet, and of one that has some: in a
/// rolling start those near the root, which come first, may all have less.
const LOOKS: usize = 64;
const LOOKS_OF_THE_FED: usize = 512;
/// A longer way up is a circle that two views made.
const LONGEST: usize = 4096;
/// How many zones are told apart; nodes of others are in none.
const ZONES: usize = 64;
/// How many roots are told apart.
const ROOTS: usize = 64;
/// How many of them report often.
const MAIN_ROOTS: usize = 3;
/// How many times a root must have been asked in vain before another one may pull beside it.
const IN_VAIN: u8 = 2;
/// How long it must have had bytes by then.
const TRIED: Duration = Duration::from_secs(1);
/// One level for each so many bytes of the blob, between these bounds, and no fewer than a tree of two children each needs.
const BYTES_A_LEVEL: u64 = 4 << 20;
const FEWEST_LEVELS: u64 = 4;
const MOST_LEVELS: u64 = 24;

/// What is reckoned since a node's report may be wrong by so much, and by an eighth of what the furthest has: a guess. Reports are seconds old,
/// and those of the root, by which it is reckoned, a quarter of one.
const DOUBT: u64 = 4 << 20;

/// A node's place.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) rank: u32,
    zone: Zone,
    pub(super) parent: Option<Node>,
    pub(super) level: u16,
    pub(super) position: u64,
    /// The furthest position of all when it told its own.
    furthest: u64,
    slots: u16,
    children: u16,
    pub(super) standing: Standing,
    /// When it was last heard of, and when its position last grew.
    pub(super) heard: Instant,
    pub(super) grown: Instant,
    /// It is given no children until then.
    shunned: Option<Instant>,
    /// A child has said since it was last heard of that it broke off.
    suspected: bool,
    /// When its first bytes were heard of.
    began: Option<Instant>,
    /// How many times somebody without a byte asked it in vain since it gave anything to anybody.
    in_vain: u8,
    /// It was told to pull once, and got nothing: it is not told again.
    pub(super) refused: bool,
    /// It is only said to have it, and was never heard of itself.
    is_hearsay: bool,
    /// The number of its last message, and what it was answered.
    pub(super) number: u64,
    pub(super) answer: Response,
}

/// What a node is to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It has no source that is known of.
    Orphan,
    /// It gets it from its parent.
    Child,
    /// It was told to pull, and is given until then to get something.
    Leased { until: Instant },
    /// It gets it from upstream.
    Root,
    /// It has all of it.
    Complete,
}

/// How full a parent is, how deep, and its rank: the lower the better. Nodes whose slots are not full are in class 0.
type Order = (u16, u16, u32, Node);

/// Everybody who wants or has one blob.
#[derive(Debug)]
pub(super) struct Tree {
    next: u32,
    pub(super) total: Option<u64>,
    places: HashMap<Node, Place>,
    open: BTreeMap<Zone, BTreeSet<Order>>,
    /// Those that get it from upstream or were told to.
    roots: Vec<Node>,
    pub(super) furthest: u64,
    pub(super) first_heard: Instant,
    pub(super) touched: Instant,
}

/// What may come of those that get a blob from upstream, for one that finds no parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// There are none.
    None,
    /// Something, of one at least.
    Hope,
    /// This one may be asked once more.
    Again(Node),
    /// Nothing: they grow, and whoever was sent to them got nothing.
    InVain,
}

/// Who asks for a parent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seeker<'a> {
    pub(super) node: Node,
    pub(super) position: u64,
    pub(super) avoid: &'a [Node],
    /// Only a parent will do that is not full, and that has said that it is ahead, or is by more than [`DOUBT`].
    pub(super) only_good: bool,
    /// One will do, for want of a better one, that it or others had trouble with.
    pub(super) at_need: bool,
    /// Only one of its own zone will do.
    pub(super) only_near: bool,
}

// === impl Seeker ===

impl<'a> Seeker<'a> {
    /// One that has so many bytes, avoids these, and takes what it gets otherwise.
    pub(super) fn of(node: Node, position: u64, avoid: &'a [Node]) -> Self {
        Self { node, position, avoid, only_good: false, at_need: false, only_near: false }
    }
}

// === impl Tree ===

impl Tree {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            next: 0,
            total: None,
            places: HashMap::new(),
            open: BTreeMap::new(),
            roots: Vec::new(),
            furthest: 0,
            first_heard: now,
            touched: now,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn places(&self) -> impl Iterator<Item = (&Node, &Place)> {
        self.places.iter()
    }

    pub(super) fn get(&self, node: Node) -> Option<&Place> {
        self.places.get(&node)
    }

    pub(super) fn get_mut(&mut self, node: Node) -> Option<&mut Place> {
        self.places.get_mut(&node)
    }

    /// The node has so many bytes and takes so many children. It is entered if it is not known.
    pub(super) fn heard(&mut self, node: Node, zone: Zone, position: u64, slots: u16, now: Instant) {
        self.touched = now;
        if !self.places.contains_key(&node) {
            let zone = if self.open.contains_key(&zone) || self.open.len() < ZONES { zone } else { Zone::default() };
            let place = Place {
                rank: self.next,
                zone,
                parent: None,
                level: 0,
                position: 0,
                furthest: 0,
                slots,
                children: 0,
                standing: Standing::Orphan,
                heard: now,
                grown: now,
                shunned: None,
                suspected: false,
                began: None,
                in_vain: 0,
                refused: false,
                is_hearsay: false,
                number: 0,
                answer: Response::Refuse,
            };
            self.next = self.next.wrapping_add(1);
            self.places.insert(node, place);
        }
        let furthest = self.furthest.max(position);
        if position > 0
            && let Some(parent) = self.places.get(&node).and_then(|place| place.parent)
        {
            self.change(parent, |place| place.in_vain = 0);
        }
        self.change(node, |place| {
            if position > place.position {
                (place.position, place.grown) = (position, now);
                place.began = place.began.or(Some(now));
            }
            place.furthest = furthest;
            (place.slots, place.heard, place.suspected, place.is_hearsay) = (slots, now, false, false);
        });
        self.furthest = furthest;
    }

    /// Where the node was counted.
    pub(super) fn rank(&self, node: Node) -> Rank {
        Rank(self.places.get(&node).map_or(0, |place| place.rank))
    }

    /// Counts the node anew, behind all others.
    pub(super) fn count_anew(&mut self, node: Node) {
        let next = self.next;
        self.next = self.next.wrapping_add(1);
        self.change(node, |place| place.rank = next);
    }

    /// What the node is from now on; what it was before, it is no more.
    pub(super) fn stand(&mut self, node: Node, standing: Standing, parent: Option<Node>) {
        let Some(before) = self.places.get(&node).and_then(|place| place.parent) else {
            return self.stand_apart(node, standing, parent);
        };
        if Some(before) != parent {
            self.change(before, |place| place.children = place.children.saturating_sub(1));
        }
        self.stand_apart(node, standing, parent);
    }

    fn stand_apart(&mut self, node: Node, standing: Standing, parent: Option<Node>) {
        let Some(place) = self.places.get(&node) else { return };
        let is_new_child = parent.is_some() && place.parent != parent;
        let level = match parent.and_then(|parent| self.places.get(&parent)) {
            Some(parent) => parent.level.saturating_add(1),
            // How far it is, is told by how deep it was.
            None if standing == Standing::Orphan => place.level,
            None => 0,
        };
        self.change(node, |place| (place.standing, place.parent, place.level) = (standing, parent, level));
        if let (true, Some(parent)) = (is_new_child, parent) {
            self.change(parent, |place| place.children = place.children.saturating_add(1));
        }
        let is_root = matches!(standing, Standing::Root | Standing::Leased { .. });
        match self.roots.iter().position(|root| *root == node) {
            None if is_root && self.roots.len() < ROOTS => self.roots.push(node),
            Some(place) if !is_root => {
                self.roots.swap_remove(place);
            }
            _ => {}
        }
    }

    /// The node is no more.
    pub(super) fn remove(&mut self, node: Node) -> bool {
        self.stand(node, Standing::Orphan, None);
        let Some(place) = self.places.remove(&node) else { return false };
        if let Some(open) = self.open.get_mut(&place.zone) {
            open.remove(&order(node, &place));
        }
        true
    }

    /// A child says that this node is of no use to it. Whoever does not deliver gets no more children for a while.
    pub(super) fn complain(&mut self, about: Node, broke: bool, now: Instant) {
        self.change(about, |place| {
            place.suspected |= broke;
            place.shunned = Some(now + SHUNNED);
        });
    }

    /// A child without a byte got nothing from the node.
    pub(super) fn was_in_vain(&mut self, node: Node) {
        // What has nothing itself can give nothing.
        self.change(node, |place| place.in_vain = place.in_vain.saturating_add(u8::from(place.position > 0)));
    }

    /// Whether the node has bytes to give at once, and is not known to give them to nobody.
    pub(super) fn has_some(&self, node: Node) -> bool {
        self.places.get(&node).is_some_and(|place| place.position > 0 && place.in_vain < IN_VAIN)
    }

    /// What is to be done about roots, if there are some and none of them gives anything to one who avoids these.
    pub(super) fn judge_roots(&self, avoid: &[Node], now: Instant) -> Roots {
        let mut found = Roots::None;
        for node in &self.roots {
            let Some(place) = self.places.get(node).filter(|place| place.is_source(now)) else { continue };
            // One that grows and is well may yet be a bad parent. Who was sent to it and does not complain gets something.
            let is_tried = place.standing == Standing::Root && avoid.contains(node) && place.children == 0;
            let is_old = place.began.is_some_and(|began| now.saturating_duration_since(began) >= TRIED);
            match (is_tried, place.in_vain >= IN_VAIN) {
                (false, _) => return Roots::Hope,
                (true, false) => found = Roots::Again(*node),
                (true, true) if !is_old => return Roots::Hope,
                (true, true) if found == Roots::None => found = Roots::InVain,
                (true, true) => {}
            }
        }
        found
    }

    /// The node is said to have all of it.
    pub(super) fn is_said_to_have(&mut self, node: Node, slots: u16, now: Instant) {
        if !self.places.contains_key(&node) {
            self.heard(node, Zone::default(), 0, slots, now);
            self.change(node, |place| place.is_hearsay = true);
            self.stand(node, Standing::Complete, None);
        }
    }

    /// The node took somebody not.
    pub(super) fn refused(&mut self, node: Node) {
        self.change(node, |place| place.slots = place.slots.min(place.children));
    }

    /// Whether the node is only said to have it.
    pub(super) fn is_hearsay(&self, node: Node) -> bool {
        self.places.get(&node).is_some_and(|place| place.is_hearsay)
    }

    /// Whether the node can be taken to have a source that is not another node.
    pub(super) fn is_source(&self, node: Node, now: Instant) -> bool {
        self.places.get(&node).is_some_and(|place| place.is_source(now))
    }

    /// Whether anybody gets the blob from upstream, or may be about to.
    pub(super) fn has_root(&self, now: Instant) -> bool {
        self.roots.iter().any(|root| self.is_source(*root, now))
    }

    /// Whether somebody gets the blob from upstream who has got more of it a moment ago.
    pub(super) fn progresses(&self, now: Instant) -> bool {
        let recent = |place: &Place| now.saturating_duration_since(place.grown) < STILL;
        self.roots.iter().filter_map(|root| self.places.get(root)).any(|place| place.is_source(now) && recent(place))
    }

    /// Whether the node is one of the first of those that get the blob from upstream.
    pub(super) fn is_main_root(&self, node: Node) -> bool {
        self.roots.iter().take(MAIN_ROOTS).any(|root| *root == node)
    }

    /// Takes leases back whose holders got nothing in their time, and forgets roots that are silent.
    pub(super) fn end_leases(&mut self, now: Instant) {
        for n in (0..self.roots.len()).rev() {
            let node = self.roots[n];
            let Some(place) = self.places.get(&node) else {
                self.roots.swap_remove(n);
                continue;
            };
            if !place.is_source(now) {
                let was_leased = matches!(place.standing, Standing::Leased { .. });
                self.change(node, |place| place.refused |= was_leased);
                self.stand(node, Standing::Orphan, None);
            }
        }
    }

    /// The best parent for the one who seeks one.
    pub(super) fn parent_for(&self, seeker: Seeker<'_>, now: Instant) -> Option<Node> {
        let own = self.places.get(&seeker.node)?;
        let deepest = self.deepest();
        let near = own.zone;
        let looks = if seeker.position > 0 { LOOKS_OF_THE_FED } else { LOOKS };
        let mut best: Option<((u16, bool, u16), Node)> = None;
        for (zone, open) in &self.open {
            let is_far = *zone != near;
            if is_far && seeker.only_near {
                continue;
            }
            let mut class = 0;
            // Class by class, the shallow ones of each first.
            while let Some(first) = open.range((class, 0, 0, Node(0))..).next() {
                class = first.0;
                // In the own zone one child too many is as good as a free place in another.
                let merit = (class.saturating_sub(u16::from(!is_far)), is_far, class);
                if best.is_some_and(|(known, _)| known <= merit) || (seeker.only_good && class > 0) {
                    break;
                }
                let within = open.range((class, 0, 0, Node(0))..=(class, u16::MAX, u32::MAX, Node(u64::MAX)));
                for (_, level, _, node) in within.take(looks) {
                    if *level >= deepest {
                        break;
                    }
                    if self.may_feed(*node, own, seeker, now).is_some_and(|level| level < deepest) {
                        best = Some((merit, *node));
                        break;
                    }
                }
                class = class.saturating_add(1);
            }
        }
        best.map(|(_, node)| node)
    }

    /// Whether the node may be the parent of the one who seeks one, and how deep it is.
    fn may_feed(&self, node: Node, own: &Place, seeker: Seeker<'_>, now: Instant) -> Option<u16> {
        let place = self.places.get(&node)?;
        let is_out = seeker.avoid.contains(&node) || place.shunned.is_some_and(|until| now < until);
        if node == seeker.node || (is_out && !seeker.at_need) {
            return None;
        }
        let is_ahead = match seeker.position {
            0 => place.position > 0 || place.is_apart() || place.rank < own.rank,
            _ if place.is_hearsay => !seeker.only_good,
            position => {
                // Nodes tell it rarely. Whoever is fed gets at least what the furthest gets meanwhile, and in one chain the upper has more.
                let seems = place.position + (self.furthest - place.furthest);
                let (surely, maybe) = (position.saturating_add(self.doubt()), position.saturating_sub(self.doubt()));
                let is_sure = place.is_complete() || place.position > position || seems > surely;
                let is_above = place.level < own.level && (seems > maybe || seeker.at_need);
                is_sure || (!seeker.only_good && (seems > position || is_above))
            }
        };
        if !is_ahead {
            return None;
        }
        self.level_of(node, seeker.node, now)
    }

    /// See [`DOUBT`].
    fn doubt(&self) -> u64 {
        DOUBT + self.furthest / 8
    }

    /// How far the node is from a source; nothing if its way up leads through `seeker`, or to none.
    fn level_of(&self, node: Node, seeker: Node, now: Instant) -> Option<u16> {
        let (mut at, mut level) = (node, 0_u16);
        for _ in 0..LONGEST {
            let place = self.places.get(&at)?;
            if at == seeker {
                return None;
            }
            match place.parent {
                // Nobody is sent to one that may be dead, until that is known.
                None => return (place.is_source(now) && !place.suspected).then_some(level),
                Some(parent) => (at, level) = (parent, level.saturating_add(1)),
            }
        }
        None
    }

    /// The node that has most of those with more than `position`, were it of no use otherwise.
    pub(super) fn further_than(&self, position: u64, avoid: &[Node], now: Instant) -> Option<Node> {
        let recent = |place: &Place| now.saturating_duration_since(place.heard) < LEASE && !place.suspected;
        let ahead = self.places.iter().filter(|(node, place)| {
            place.position > position && recent(place) && !avoid.contains(node) && !place.refused
        });
        ahead.max_by_key(|(node, place)| (place.position, **node)).map(|(node, _)| *node)
    }

    /// No place is deeper than this.
    fn deepest(&self) -> u16 {
        let by_length = (self.total.unwrap_or(0) / BYTES_A_LEVEL).clamp(FEWEST_LEVELS, MOST_LEVELS);
        let by_nodes = u64::from(usize::BITS - self.places.len().leading_zeros()) + 1;
        u16::try_from(by_length.max(by_nodes)).unwrap_or(u16::MAX)
    }

    fn change(&mut self, node: Node, change: impl FnOnce(&mut Place)) {
        let Some(place) = self.places.get_mut(&node) else { return };
        let before = order(node, place);
        let (was_open, zone) = (place.is_open(), place.zone);
        change(place);
        let (after, is_open) = (order(node, place), place.is_open());
        if (before, was_open) != (after, is_open) {
            let open = self.open.entry(zone).or_default();
            if was_open {
                open.remove(&before);
            }
            if is_open {
                open.insert(after);
            }
        }
    }
}

fn order(node: Node, place: &Place) -> Order {
    let class = if place.children < place.slots { 0 } else { place.children - place.slots + 1 };
    (class, place.level, place.rank, node)
}

// === impl Place ===

impl Place {
    /// Whether it can be anybody's parent at all.
    fn is_open(&self) -> bool {
        self.standing != Standing::Orphan
    }

    /// Whether it depends on no other node, so that no circle can go through it.
    fn is_apart(&self) -> bool {
        matches!(self.standing, Standing::Root | Standing::Leased { .. } | Standing::Complete)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.standing == Standing::Complete
    }

    fn is_source(&self, now: Instant) -> bool {
        let silent = now.saturating_duration_since(self.heard);
        match self.standing {
            Standing::Orphan | Standing::Child => false,
            Standing::Leased { until } => now < until,
            Standing::Root => {
                let patience = if self.suspected { SUSPECT } else { LEASE };
                silent < patience && now.saturating_duration_since(self.grown) < STUCK
            }
            Standing::Complete => silent < COMPLETE,
        }
    }
}

impl From<Holding> for Standing {
    fn from(holding: Holding) -> Self {
        match holding {
            Holding::Root => Self::Root,
            Holding::Child => Self::Child,
            Holding::All => Self::Complete,
            Holding::Nothing => Self::Orphan,
        }
    }
}
