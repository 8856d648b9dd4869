//! The member protocol: nodes that speak it keep the full list of each other. Messages and a clock go in, messages come out.
//!
//! News is told to a few neighbours each second by name only; who has not heard it asks for the card. What is missed that way is
//! found by comparing lists with one neighbour every ten seconds, first by one sum, then by 256. A neighbour is a member with whom
//! there is a connection anyhow: this protocol makes none, but for one look a minute at a member that nobody may be connected to.
//!
//! A card is signed by its member, and only its member can make a newer one. Anybody can say that a member is gone, which those
//! connected to it do not believe, and which it answers with a newer card.

mod budget;
mod message;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use libp2p::PeerId;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;

use super::addresses::Scope;
use super::keys::Position;

use budget::Budget;
pub(super) use message::{Card, MAX_KEYS, Message, Signer, ids};
use message::{Compare, Rumour, SignedCard, Tag, VERSION};

/// How often [`Membership::tick`] is to be called.
pub(super) const TICK: Duration = Duration::from_secs(1);

/// How many neighbours are told news each second. Four reach all but two of a hundred nodes; comparing reaches the rest.
const FANOUT: usize = 4;

/// How many pieces of news one message has.
const MAX_RUMOURS: usize = 32;

/// How often lists are compared.
const COMPARE_INTERVAL: Duration = Duration::from_secs(10);

/// How long a comparison may take before another is begun.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a member without connection is looked at.
const PROBE_INTERVAL: Duration = Duration::from_secs(60);

/// How long is waited between the first failed contact and the second.
const SECOND_TRY: Duration = Duration::from_secs(1);

/// After how many failed contacts a member is gone.
const MAX_FAILURES: u8 = 2;

/// How long it is remembered that a member is gone, so that nobody's old card brings it back.
const GONE_KEPT: Duration = Duration::from_secs(600);

/// How long a card is waited for before another neighbour is asked.
const WANT_TIMEOUT: Duration = Duration::from_secs(2);

/// Bounds on what a peer can make grow.
const MAX_MEMBERS: usize = 20_000;
const MAX_GONE: usize = 20_000;
const MAX_NEWS: usize = 4_096;
const MAX_ASKED: usize = 4_096;

/// What news may cost, in bytes a second, and how much may be saved up. What is too much waits.
const RATE: usize = 700;
const BURST: usize = 8_000;

/// What one neighbour may make us send it in cards: a list of 3,000 at once, and then a fifth of that a minute.
const CARDS_BURST: usize = 1_500_000;
const CARDS_RATE: usize = 5_000;

/// How many bytes of cards one message has.
const CARDS_CHUNK: usize = 60_000;

/// The number of parts of a list.
const PARTS: usize = 256;

/// By how many percent the load has to change to be news, and how long is waited between two such.
const LOAD_STEP: u8 = 20;
const LOAD_INTERVAL: Duration = Duration::from_secs(30);

/// What the caller is to do.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "nearly all are of the larger kind")]
pub(super) enum Action {
    /// Send this to a neighbour.
    Send(PeerId, Message),
    /// See whether this member can be reached, and say so with [`Membership::failed`] if not.
    Probe(PeerId),
}

/// What of this node its card says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) zone: Option<String>,
    pub(super) load: Option<u8>,
}

/// One node's part in the protocol.
pub(super) struct Membership {
    local: PeerId,
    own_tag: Tag,
    own: Own,
    told_load: (Option<u8>, Option<Instant>),
    scope: Scope,
    signer: Box<dyn Signer>,
    rng: StdRng,
    /// The clock's start, in both of its forms.
    epoch: (Instant, u64),
    members: HashMap<Tag, Known>,
    sums: Sums,
    gone: HashMap<Tag, (u64, Instant)>,
    neighbours: HashMap<PeerId, Neighbour>,
    news: VecDeque<Rumour>,
    asked: HashMap<Tag, (u64, Instant)>,
    second_tries: Vec<(Instant, PeerId)>,
    budget: Budget,
    compared: Option<Instant>,
    comparing: Option<(PeerId, Instant)>,
    probed: Instant,
    actions: VecDeque<Action>,
    changed: bool,
    /// Cards that were not believed.
    refused: u64,
}

struct Known {
    card: Card,
    signed: SignedCard,
    failures: u8,
}

struct Neighbour {
    budget: Budget,
}

struct Sums {
    whole: u64,
    parts: Vec<u32>,
}

// === impl Sums ===

impl Sums {
    /// Adds an entry, or takes it out again.
    fn toggle(&mut self, tag: Tag, stamp: u64) {
        let mixed = mix(tag.0 ^ mix(stamp));
        self.whole ^= mixed;
        // The upper half, as the lower of the whole would do as well.
        self.parts[tag.part()] ^= (mixed >> 32) as u32;
    }
}

/// The finalizer of splitmix64: every bit of the result depends on every bit of the number.
fn mix(mut n: u64) -> u64 {
    n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

// === impl Membership ===

impl Membership {
    /// A node that knows nobody yet. `unix_now` is the wall clock at `now`.
    pub(super) fn new(
        local: PeerId,
        own: Own,
        scope: Scope,
        signer: Box<dyn Signer>,
        seed: u64,
        (now, unix_now): (Instant, SystemTime),
    ) -> Self {
        let unix = unix_now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let unix = u64::try_from(unix.as_millis()).unwrap_or(0);
        let mut membership = Self {
            local,
            own_tag: Tag::of(&Position::of_peer(&local)),
            told_load: (own.load, None),
            own,
            scope,
            signer,
            rng: StdRng::seed_from_u64(seed),
            epoch: (now, unix),
            members: HashMap::new(),
            sums: Sums { whole: 0, parts: vec![0; PARTS] },
            gone: HashMap::new(),
            neighbours: HashMap::new(),
            news: VecDeque::new(),
            asked: HashMap::new(),
            second_tries: Vec::new(),
            budget: Budget::new(RATE, BURST, now),
            compared: None,
            comparing: None,
            probed: now,
            actions: VecDeque::new(),
            changed: false,
            refused: 0,
        };
        membership.announce(now, 0);
        membership
    }

    /// The members but this node.
    pub(super) fn others(&self) -> impl Iterator<Item = &Card> {
        self.members.values().map(|known| &known.card).filter(|card| card.peer != self.local)
    }

    /// A member's card.
    pub(super) fn card(&self, peer: &PeerId) -> Option<&Card> {
        self.members.get(&Tag::of(&Position::of_peer(peer))).map(|known| &known.card)
    }

    /// How many cards were not believed since this was last asked.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// Whether the list has changed since this was last asked.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What is to be done, until it gives nothing.
    pub(super) fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// This node is now reached there.
    pub(super) fn set_addresses(&mut self, now: Instant, addresses: Vec<SocketAddr>) {
        if self.own.addresses != addresses {
            self.own.addresses = addresses;
            self.announce(now, 0);
        }
    }

    /// This node is now so busy. What changes little, or soon again, is not told.
    pub(super) fn set_load(&mut self, load: u8) {
        self.own.load = Some(load.min(100));
    }

    /// There is a connection to a peer that speaks the protocol.
    pub(super) fn connected(&mut self, now: Instant, peer: PeerId) {
        let neighbour = || Neighbour { budget: Budget::new(CARDS_RATE, CARDS_BURST, now) };
        self.neighbours.entry(peer).or_insert_with(neighbour);
        if let Some(known) = self.members.get_mut(&Tag::of(&Position::of_peer(&peer))) {
            known.failures = 0;
        }
        // It hears of us at once, and a node that knows nobody asks it for everything.
        if let Some(own) = self.members.get(&self.own_tag).filter(|own| !own.card.addresses.is_empty()) {
            let cards = vec![own.signed.clone()];
            let sum = self.compared.is_none().then_some(self.sums.whole);
            if sum.is_some() {
                self.compared = Some(now);
                self.comparing = Some((peer, now));
            }
            self.actions.push_back(Action::Send(peer, Message { cards, sum, ..Message::default() }));
        }
    }

    /// A connection ended because neither side had use for it.
    pub(super) fn parted(&mut self, peer: &PeerId) {
        self.neighbours.remove(peer);
    }

    /// The last connection to a peer ended, which is a failed contact.
    pub(super) fn disconnected(&mut self, now: Instant, peer: &PeerId) {
        if self.neighbours.remove(peer).is_some() {
            self.failed(now, peer);
        }
    }

    /// A member could not be reached. The second time in a row it is gone.
    pub(super) fn failed(&mut self, now: Instant, peer: &PeerId) {
        let tag = Tag::of(&Position::of_peer(peer));
        if self.neighbours.contains_key(peer) || tag == self.own_tag {
            return;
        }
        let Some(known) = self.members.get_mut(&tag) else { return };
        known.failures += 1;
        if known.failures >= MAX_FAILURES {
            let stamp = known.card.stamp;
            self.bury(now, tag, stamp);
            self.spread(Rumour { tag: tag.0, stamp, gone: true });
        } else if self.second_tries.len() < MAX_ASKED {
            self.second_tries.push((now + SECOND_TRY, *peer));
        }
    }

    /// What is to be done each second.
    pub(super) fn tick(&mut self, now: Instant) {
        self.gone.retain(|_, (_, at)| now.duration_since(*at) < GONE_KEPT);
        self.asked.retain(|_, (_, at)| now.duration_since(*at) < WANT_TIMEOUT);
        self.tell_load(now);
        self.tell_news(now);
        self.begin_comparing(now);
        self.probe(now);
    }

    /// A neighbour's message.
    pub(super) fn receive(&mut self, now: Instant, from: PeerId, message: Message) {
        let mut wanted = Vec::new();
        for rumour in message.rumours.iter().take(MAX_MEMBERS) {
            self.hear(now, from, rumour, &mut wanted);
        }
        for signed in message.cards {
            self.take_card(now, signed, !message.old_news);
        }
        if !wanted.is_empty() {
            self.actions.push_back(Action::Send(from, Message { wanted, ..Message::default() }));
        }
        if !message.wanted.is_empty() {
            let cards = message.wanted.iter().filter_map(|tag| self.members.get(&Tag(*tag)));
            let cards = cards.map(|known| known.signed.clone()).collect();
            self.send_cards(now, from, cards, false);
        }
        if message.sum.is_some_and(|sum| sum != self.sums.whole) {
            self.actions
                .push_back(Action::Send(from, Message { parts: self.sums.parts.clone(), ..Message::default() }));
        }
        if message.parts.len() == PARTS {
            self.compare(now, from, &message.parts);
        }
        if let Some(compare) = message.compare {
            self.answer_comparison(now, from, &compare);
        }
    }

    fn announce(&mut self, now: Instant, at_least: u64) {
        let since = u64::try_from(now.saturating_duration_since(self.epoch.0).as_millis()).unwrap_or(0);
        let before = self.members.get(&self.own_tag).map_or(0, |known| known.card.stamp);
        let stamp = (self.epoch.1 + since).max(before + 1).max(at_least);
        let Own { addresses, zone, load } = self.own.clone();
        self.told_load = (load, Some(now));
        let card = Card { peer: self.local, stamp, addresses, zone, version: VERSION, load };
        let signed = card.sign(&*self.signer);
        self.put(card, signed);
        self.spread(Rumour { tag: self.own_tag.0, stamp, gone: false });
    }

    fn tell_load(&mut self, now: Instant) {
        let (told, at) = self.told_load;
        let changed = match (told, self.own.load) {
            (Some(told), Some(load)) => told.abs_diff(load) >= LOAD_STEP,
            (told, load) => told != load,
        };
        if changed && at.is_none_or(|at| now.duration_since(at) >= LOAD_INTERVAL) {
            self.announce(now, 0);
        }
    }

    fn tell_news(&mut self, now: Instant) {
        if self.news.is_empty() || self.neighbours.is_empty() {
            return;
        }
        let count = self.news.len().min(MAX_RUMOURS);
        // With its framing a rumour has twenty bytes.
        if !self.budget.spend(now, count * 20 * FANOUT.min(self.neighbours.len())) {
            return;
        }
        let rumours: Vec<Rumour> = self.news.drain(..count).collect();
        for peer in self.neighbours.keys().copied().choose_multiple(&mut self.rng, FANOUT) {
            self.actions.push_back(Action::Send(peer, Message { rumours: rumours.clone(), ..Message::default() }));
        }
    }

    fn begin_comparing(&mut self, now: Instant) {
        let due = self.compared.is_none_or(|at| now.duration_since(at) >= COMPARE_INTERVAL);
        if !due {
            return;
        }
        if let Some(peer) = self.neighbours.keys().copied().choose(&mut self.rng) {
            self.compared = Some(now);
            self.comparing = Some((peer, now));
            let sum = Some(self.sums.whole);
            self.actions.push_back(Action::Send(peer, Message { sum, ..Message::default() }));
        }
    }

    fn probe(&mut self, now: Instant) {
        let mut due: Vec<PeerId> =
            self.second_tries.iter().filter(|(at, _)| *at <= now).map(|(_, peer)| *peer).collect();
        self.second_tries.retain(|(at, _)| *at > now);
        if now.duration_since(self.probed) >= PROBE_INTERVAL {
            self.probed = now;
            let apart = self.members.values().map(|known| known.card.peer);
            let apart = apart.filter(|peer| *peer != self.local && !self.neighbours.contains_key(peer));
            due.extend(apart.choose(&mut self.rng));
        }
        self.actions.extend(due.into_iter().map(Action::Probe));
    }

    fn hear(&mut self, now: Instant, from: PeerId, rumour: &Rumour, wanted: &mut Vec<u64>) {
        let tag = Tag(rumour.tag);
        let known = self.members.get(&tag).map(|known| (known.card.stamp, known.card.peer));
        if rumour.gone {
            match known {
                Some((stamp, _)) if rumour.stamp < stamp => {}
                // A member that is said to be gone says otherwise.
                Some(_) if tag == self.own_tag => self.announce(now, rumour.stamp.saturating_add(1)),
                // We know better, and it should know what is said of it.
                Some((_, peer)) if self.neighbours.contains_key(&peer) && peer != from => {
                    let message = Message { rumours: vec![*rumour], ..Message::default() };
                    self.actions.push_back(Action::Send(peer, message));
                }
                Some(_) => {
                    self.bury(now, tag, rumour.stamp);
                    self.spread(*rumour);
                }
                None if self.gone.get(&tag).is_none_or(|(stamp, _)| *stamp < rumour.stamp) => {
                    self.bury(now, tag, rumour.stamp);
                }
                None => {}
            }
            return;
        }
        let newer = known.is_none_or(|(stamp, _)| stamp < rumour.stamp)
            && self.gone.get(&tag).is_none_or(|(stamp, _)| *stamp < rumour.stamp);
        let asked = self.asked.get(&tag).is_some_and(|(stamp, _)| *stamp >= rumour.stamp);
        if newer && !asked && self.asked.len() < MAX_ASKED {
            self.asked.insert(tag, (rumour.stamp, now));
            wanted.push(tag.0);
        }
    }

    fn take_card(&mut self, now: Instant, signed: SignedCard, is_news: bool) {
        let Some(card) = Card::read(&signed, &self.scope, &*self.signer) else {
            self.refused += 1;
            return;
        };
        let tag = Tag::of(&Position::of_peer(&card.peer));
        self.asked.remove(&tag);
        if tag == self.own_tag {
            // Of before a restart, or of a clock that ran ahead.
            let own = self.members.get(&tag).map_or(0, |known| known.card.stamp);
            if card.stamp > own {
                self.announce(now, card.stamp.saturating_add(1));
            }
            return;
        }
        let stale = self.members.get(&tag).is_some_and(|known| known.card.stamp >= card.stamp)
            || self.gone.get(&tag).is_some_and(|(stamp, _)| *stamp >= card.stamp);
        if stale || (self.members.len() >= MAX_MEMBERS && !self.members.contains_key(&tag)) {
            return;
        }
        let rumour = Rumour { tag: tag.0, stamp: card.stamp, gone: false };
        self.put(card, signed);
        if is_news {
            self.spread(rumour);
        }
    }

    fn compare(&mut self, now: Instant, from: PeerId, theirs: &[u32]) {
        // Only the one that was asked: anybody else would make us tell our whole list.
        let asked = self.comparing.is_some_and(|(peer, at)| peer == from && now.duration_since(at) < COMPARE_TIMEOUT);
        if !asked {
            return;
        }
        self.comparing = None;
        let differing = self.sums.parts.iter().zip(theirs).enumerate().filter(|(_, (ours, theirs))| ours != theirs);
        let parts: Vec<u32> = differing.filter_map(|(part, _)| u32::try_from(part).ok()).collect();
        if parts.is_empty() {
            return;
        }
        let rumours = self.rumours_of(&parts);
        let compare = Some(Compare { parts, rumours });
        self.actions.push_back(Action::Send(from, Message { compare, ..Message::default() }));
    }

    fn answer_comparison(&mut self, now: Instant, from: PeerId, theirs: &Compare) {
        let told: HashMap<u64, u64> = theirs.rumours.iter().map(|rumour| (rumour.tag, rumour.stamp)).collect();
        let mut wanted = Vec::new();
        let mut rumours = Vec::new();
        for rumour in theirs.rumours.iter().take(MAX_MEMBERS) {
            match self.gone.get(&Tag(rumour.tag)) {
                Some((stamp, _)) if *stamp >= rumour.stamp => {
                    rumours.push(Rumour { stamp: *stamp, gone: true, ..*rumour });
                }
                _ => self.hear(now, from, &Rumour { gone: false, ..*rumour }, &mut wanted),
            }
        }
        let parts = parts_of(&theirs.parts);
        let missing = self
            .members
            .iter()
            .filter(|(tag, known)| parts[tag.part()] && told.get(&tag.0).is_none_or(|stamp| *stamp < known.card.stamp));
        let cards = missing.map(|(_, known)| known.signed.clone()).collect();
        self.send_cards(now, from, cards, true);
        if !wanted.is_empty() || !rumours.is_empty() {
            self.actions.push_back(Action::Send(from, Message { wanted, rumours, ..Message::default() }));
        }
    }

    fn rumours_of(&self, parts: &[u32]) -> Vec<Rumour> {
        let parts = parts_of(parts);
        let inside = self.members.iter().filter(|(tag, _)| parts[tag.part()]);
        inside.map(|(tag, known)| Rumour { tag: tag.0, stamp: known.card.stamp, gone: false }).collect()
    }

    /// As far as what this neighbour may cost allows.
    fn send_cards(&mut self, now: Instant, to: PeerId, cards: Vec<SignedCard>, old_news: bool) {
        let Some(neighbour) = self.neighbours.get_mut(&to) else { return };
        let mut chunk = Vec::new();
        let mut size = 0;
        let actions = &mut self.actions;
        let mut send = |cards: Vec<SignedCard>| {
            if !cards.is_empty() {
                actions.push_back(Action::Send(to, Message { cards, old_news, ..Message::default() }));
            }
        };
        for card in cards {
            let bytes = card.card.len() + card.signature.len() + 8;
            if !neighbour.budget.spend(now, bytes) {
                break;
            }
            size += bytes;
            chunk.push(card);
            if size >= CARDS_CHUNK {
                size = 0;
                send(std::mem::take(&mut chunk));
            }
        }
        send(chunk);
    }

    fn put(&mut self, card: Card, signed: SignedCard) {
        let tag = Tag::of(&Position::of_peer(&card.peer));
        self.sums.toggle(tag, card.stamp);
        if let Some(old) = self.members.insert(tag, Known { card, signed, failures: 0 }) {
            self.sums.toggle(tag, old.card.stamp);
        }
        self.changed = true;
    }

    fn bury(&mut self, now: Instant, tag: Tag, stamp: u64) {
        if let Some(old) = self.members.remove(&tag) {
            self.sums.toggle(tag, old.card.stamp);
            self.changed = true;
        }
        if self.gone.len() < MAX_GONE || self.gone.contains_key(&tag) {
            self.gone.insert(tag, (stamp, now));
        }
    }

    /// The newer of two pieces of news about one member is enough.
    fn spread(&mut self, rumour: Rumour) {
        self.news.retain(|older| older.tag != rumour.tag);
        if self.news.len() < MAX_NEWS {
            self.news.push_back(rumour);
        }
    }
}

fn parts_of(numbers: &[u32]) -> [bool; PARTS] {
    let mut parts = [false; PARTS];
    for part in numbers.iter().filter_map(|part| usize::try_from(*part).ok()) {
        if let Some(part) = parts.get_mut(part) {
            *part = true;
        }
    }
    parts
}
