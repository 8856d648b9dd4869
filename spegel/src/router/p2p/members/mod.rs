//! The member protocol: nodes that speak it keep the full list of each other. Messages and a clock go in, messages come out.
//!
//! A node that has heard news tells one neighbour every few seconds, by names of four bytes, hears what that one has heard, and each
//! asks the other for what it did not know; so each piece of news comes to each node about once. What is missed that way is found by
//! comparing lists with a neighbour, first by one sum, then by 256; while nothing is found, ever more seldom. A neighbour is a member
//! with whom there is a connection anyhow: this protocol makes none, but for one look a minute at a member that nobody may be
//! connected to.
//!
//! A card is signed by its member, and only its member can make a newer one. Anybody can say that a member is gone, which those
//! connected to it do not believe, and which it answers with a newer card.

mod budget;
mod comparing;
#[cfg(test)]
mod hostile_tests;
mod list;
mod message;
mod news;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use libp2p::PeerId;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::addresses::Scope;
use super::keys::Position;

use budget::Budget;
use comparing::Comparison;
use list::{List, MAX_MEMBERS, PARTS};
pub(super) use message::{Believed, Card, MAX_KEYS, Message, Read, SignedCard, Signer, Tag, ids};
use message::{NewsId, Rumour, VERSION, VERSION_WITH_STORMS};
use news::News;

/// How often [`Membership::tick`] is to be called.
pub(super) const TICK: Duration = Duration::from_millis(500);

/// How often what is too old is forgotten: nothing of it is looked at as if it were not.
const SWEEP: Duration = Duration::from_secs(5);

/// How often a neighbour is told news while there is some, varied by a quarter. With as many who tell as are told, news comes to
/// three thousand nodes in ten rounds, and in six if a hundred hear it at first.
const ROUND: Duration = Duration::from_millis(2_500);

/// How many neighbours hear of a death from one that noticed it itself in as many ticks, and not in rounds: noticing has taken half of the
/// time within which all are to know.
const FIRST_HAND: u8 = 3;

/// How long after there was news lists are compared at the latest.
const AFTER_NEWS: Duration = Duration::from_secs(45);

/// How often a member without connection is looked at.
const PROBE_INTERVAL: Duration = Duration::from_secs(60);

/// How long is waited between the first failed contact and the second.
const SECOND_TRY: Duration = Duration::from_secs(1);

/// After how many failed contacts a member is gone.
const MAX_FAILURES: u8 = 2;

/// How long news is waited for before another neighbour is asked for it.
const WANT_TIMEOUT: Duration = Duration::from_secs(2);

/// How much the clocks of those who speak of the dead may be apart, in milliseconds.
const AHEAD_MS: u64 = 600_000;

/// By how much a node's own clock may ever have been wrong: ten years, in milliseconds.
const AGES_MS: u64 = 10 * 365 * 86_400_000;

/// How often a member that is said to be gone says otherwise.
const DEFENCE_INTERVAL: Duration = Duration::from_secs(5);

/// How much is asked for at once.
const MAX_ASKED: usize = 4_096;

/// What news may cost, in bytes a second, and how much at once: that of 3,000 members, should all restart. What is too much waits
/// until lists are compared.
const NEWS_RATE: usize = 400;
const NEWS_BURST: usize = 600_000;

/// What a piece of news has in bytes: a card of an address or two.
const NEWS_SIZE: usize = 160;

/// What one neighbour may make us send it in cards: a list of 3,000 at once, and then a fifth of that a minute.
const CARDS_BURST: usize = 1_500_000;
const CARDS_RATE: usize = 5_000;

/// What one neighbour may make us look at in cards: twice of what it would send if it were one of us.
const HEARD_BURST: usize = 2 * CARDS_BURST;
const HEARD_RATE: usize = 2 * CARDS_RATE;

/// What is reckoned for one that is gone, in bytes.
const RUMOUR_SIZE: usize = 20;

/// How many bytes of cards one message has.
const CARDS_CHUNK: usize = 60_000;

/// By how many percent the load has to change to be news, and how long is waited between two such. In a large network longer, so that
/// there is no more than one such piece of news a second.
const LOAD_STEP: u8 = 20;
const LOAD_INTERVAL: Duration = Duration::from_secs(30);
const LOAD_INTERVAL_EACH: Duration = Duration::from_secs(1);

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
    /// Whether it takes part in storms.
    pub(super) storms: bool,
}

/// One node's part in the protocol.
pub(super) struct Membership {
    local: PeerId,
    own_tag: Tag,
    own: Own,
    told_load: Option<u8>,
    announced: Instant,
    /// That it was said that this node, with a card of that time, is gone.
    doubted: Option<u64>,
    scope: Scope,
    signer: Box<dyn Signer>,
    rng: StdRng,
    /// The clock's start, in both of its forms.
    epoch: (Instant, u64),
    list: List,
    news: News,
    neighbours: BTreeMap<PeerId, Neighbour>,
    asked: BTreeMap<NewsId, Instant>,
    second_tries: Vec<(Instant, PeerId)>,
    budget: Budget,
    next_round: Instant,
    first_hand: u8,
    comparison: Comparison,
    probed: Instant,
    swept: Instant,
    actions: VecDeque<Action>,
    /// Cards that were not believed.
    refused: u64,
}

struct Neighbour {
    /// What it is sent, and what is heard of it.
    budget: Budget,
    heard: Budget,
    /// One of those that are told news and compared with. The others are answered.
    chosen: bool,
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
            told_load: own.load,
            announced: now,
            doubted: None,
            own,
            scope,
            signer,
            rng: StdRng::seed_from_u64(seed),
            epoch: (now, unix),
            list: List::default(),
            news: News::default(),
            neighbours: BTreeMap::new(),
            asked: BTreeMap::new(),
            second_tries: Vec::new(),
            budget: Budget::new(NEWS_RATE, NEWS_BURST, now),
            next_round: now,
            first_hand: 0,
            comparison: Comparison::default(),
            probed: now,
            swept: now,
            actions: VecDeque::new(),
            refused: 0,
        };
        membership.announce(now, 0);
        membership
    }

    /// The members but this node.
    #[cfg(test)]
    pub(super) fn others(&self) -> impl Iterator<Item = &Card> {
        self.list.members().map(|known| &known.card).filter(|card| card.peer != self.local)
    }

    /// A member's card.
    pub(super) fn card(&self, peer: &PeerId) -> Option<&Card> {
        self.list.get(Tag::of(&Position::of_peer(peer))).map(|known| &known.card)
    }

    /// How many cards were not believed since this was last asked.
    pub(super) fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// What has changed of others since this was last asked: each with its newest card, or nothing if it is gone.
    pub(super) fn take_changes(&mut self) -> BTreeMap<PeerId, Option<Arc<Believed>>> {
        let mut changes = self.list.take_changes();
        changes.remove(&self.local);
        changes
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

    /// There is a connection that will last to a peer that speaks the protocol.
    pub(super) fn connected(&mut self, now: Instant, peer: PeerId) {
        self.neighbour(now, peer).chosen = true;
        if let Some(known) = self.list.get_mut(Tag::of(&Position::of_peer(&peer))) {
            known.failures = 0;
        }
        // It hears of us at once, and a node that knows nobody asks it for everything.
        let own = self.list.get(self.own_tag).filter(|own| !own.card.addresses.is_empty());
        if let Some(own) = own.map(|own| own.signed.clone()) {
            let sum = self.comparison.next.is_none().then(|| self.begin_comparing(now, peer, 0)).flatten();
            self.send(peer, Message { cards: vec![own], sum, ..Message::default() });
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
        let Some(known) = self.list.get_mut(tag) else { return };
        known.failures += 1;
        if known.failures >= MAX_FAILURES {
            let stamp = known.card.card.stamp;
            self.bury(now, tag, stamp);
            self.first_hand = FIRST_HAND;
        } else if self.second_tries.len() < MAX_ASKED {
            self.second_tries.push((now + SECOND_TRY, *peer));
        }
    }

    /// What is to be done twice a second.
    pub(super) fn tick(&mut self, now: Instant) {
        if now.duration_since(self.swept) >= SWEEP {
            self.swept = now;
            self.list.sweep(now);
            self.news.sweep(now);
        }
        self.asked.retain(|_, at| now.duration_since(*at) < WANT_TIMEOUT);
        self.defend(now);
        self.tell_load(now);
        self.tell_news(now);
        self.compare_in_time(now);
        self.probe(now);
    }

    /// The message of a peer to which there is a connection.
    pub(super) fn receive(&mut self, now: Instant, from: PeerId, message: Message) {
        // Who speaks unasked has this node in its table, and keeps the connection. To be told news is not left to those who have it in
        // theirs: a node that came late is in few.
        let unasked = message.sum.is_some() || !message.news.is_empty() || !message.cards.is_empty();
        self.neighbour(now, from).chosen |= unasked && !message.answer;
        let mut answer = Message { answer: true, ..Message::default() };
        self.hear(now, &message, &mut answer);
        // Of each member the newest, once: what is said a thousand times is not passed on as often.
        let deaths = message.rumours.iter().take(MAX_MEMBERS).filter(|rumour| rumour.gone);
        for (tag, stamp) in deaths.map(|rumour| (rumour.tag, rumour.stamp)).collect::<BTreeSet<_>>().into_iter().rev() {
            self.hear_of_death(now, from, &Rumour { tag, stamp, gone: true });
        }
        let had_cards = !message.cards.is_empty();
        for signed in message.cards {
            let size = signed.size();
            if !self.neighbour(now, from).heard.spend(now, size) || !self.take_card(now, signed, !message.old_news) {
                break;
            }
        }
        // It is there, and does not know what is said of it: only a newer card of its own makes it a member again.
        let sender = Tag::of(&Position::of_peer(&from));
        if let Some(stamp) = self.list.gone(sender).filter(|_| had_cards) {
            answer.rumours.push(Rumour { tag: sender.0, stamp, gone: true });
        }
        let mut cards = Vec::new();
        let wanted: BTreeSet<NewsId> = message.wanted.into_iter().take(MAX_ASKED).map(NewsId).collect();
        for name in wanted {
            self.news.was_new(name);
            self.answer_want(now, from, name, &mut cards, &mut answer.rumours);
        }
        if let Some(theirs) = message.sum.filter(|theirs| *theirs != self.list.sum(now, theirs.from)) {
            answer.parts = self.list.parts(now, theirs.from);
        }
        if message.parts.len() == PARTS {
            answer.compare = self.compare(now, from, &message.parts);
        }
        self.answer(now, from, answer, cards);
        if let Some(compare) = message.compare {
            self.answer_comparison(now, from, &compare);
        }
    }

    fn neighbour(&mut self, now: Instant, peer: PeerId) -> &mut Neighbour {
        let neighbour = || Neighbour {
            budget: Budget::new(CARDS_RATE, CARDS_BURST, now),
            heard: Budget::new(HEARD_RATE, HEARD_BURST, now),
            chosen: false,
        };
        self.neighbours.entry(peer).or_insert_with(neighbour)
    }

    fn any_neighbour(&mut self) -> Option<PeerId> {
        let chosen = self.neighbours.iter().filter(|(_, neighbour)| neighbour.chosen);
        chosen.map(|(peer, _)| *peer).choose(&mut self.rng)
    }

    fn vary(&mut self, pause: Duration) -> Duration {
        pause.mul_f64(self.rng.random_range(0.75..1.25))
    }

    fn send(&mut self, to: PeerId, message: Message) {
        self.actions.push_back(Action::Send(to, message));
    }

    fn unix(&self, now: Instant) -> u64 {
        let since = u64::try_from(now.saturating_duration_since(self.epoch.0).as_millis()).unwrap_or(0);
        self.epoch.1 + since
    }

    // --- This node's own card ---

    fn announce(&mut self, now: Instant, at_least: u64) {
        let before = self.list.stamp(self.own_tag).unwrap_or(0);
        let stamp = self.unix(now).max(before.saturating_add(1)).max(at_least);
        let Own { addresses, zone, load, storms } = self.own.clone();
        (self.told_load, self.announced, self.doubted) = (load, now, None);
        let version = if storms { VERSION_WITH_STORMS } else { VERSION };
        let card = Card { peer: self.local, stamp, addresses, zone, version, load };
        let signed = card.sign(&*self.signer);
        self.put(now, Arc::new(Believed::new(card, signed)), true);
    }

    fn defend(&mut self, now: Instant) {
        if let Some(stamp) = self.doubted.filter(|_| now.duration_since(self.announced) >= DEFENCE_INTERVAL) {
            self.announce(now, stamp.saturating_add(1));
        }
    }

    fn tell_load(&mut self, now: Instant) {
        let changed = match (self.told_load, self.own.load) {
            (Some(told), Some(load)) => told.abs_diff(load) >= LOAD_STEP,
            (told, load) => told != load,
        };
        let members = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        let pause = LOAD_INTERVAL.max(LOAD_INTERVAL_EACH.saturating_mul(members));
        if changed && now.duration_since(self.announced) >= pause {
            self.announce(now, 0);
        }
    }

    // --- News ---

    fn tell_news(&mut self, now: Instant) {
        if (now < self.next_round && self.first_hand == 0) || !self.news.is_hot() {
            return;
        }
        self.first_hand = self.first_hand.saturating_sub(1);
        let Some(peer) = self.any_neighbour() else { return };
        self.next_round = now + self.vary(ROUND);
        let news = numbers(&self.news.tell(&BTreeSet::new()));
        self.send(peer, Message { news, ..Message::default() });
    }

    /// The names of news: what of it is new here is asked for, and what is new here and not among it is told.
    fn hear(&mut self, now: Instant, message: &Message, answer: &mut Message) {
        let theirs: BTreeSet<NewsId> = message.news.iter().take(MAX_ASKED).copied().map(NewsId).collect();
        for name in &theirs {
            let known = self.news.about(*name).is_some() || self.list.named(*name).is_some();
            if !known
                && !self.asked.contains_key(name)
                && self.asked.len() < MAX_ASKED
                && self.budget.spend(now, NEWS_SIZE)
            {
                self.asked.insert(*name, now);
                answer.wanted.push(name.0);
            }
        }
        if !theirs.is_empty() && !message.answer {
            answer.news = numbers(&self.news.tell(&theirs));
        }
    }

    /// The newest that is known of whom the news is about.
    fn answer_want(
        &mut self,
        now: Instant,
        to: PeerId,
        name: NewsId,
        cards: &mut Vec<SignedCard>,
        rumours: &mut Vec<Rumour>,
    ) {
        let Some(tag) = self.news.about(name).or(self.list.named(name)) else { return };
        if let Some(card) = self.list.get(tag) {
            cards.push(card.signed.clone());
        } else if let Some(stamp) = self.list.gone(tag)
            && self.neighbour(now, to).budget.spend(now, RUMOUR_SIZE)
        {
            rumours.push(Rumour { tag: tag.0, stamp, gone: true });
        }
    }

    fn hear_of_death(&mut self, now: Instant, from: PeerId, rumour: &Rumour) {
        let tag = Tag(rumour.tag);
        self.asked.remove(&tag.news(rumour.stamp, true));
        let Some(known) = self.list.get(tag) else {
            // A time that has not come is nobody's, and would keep its member away until it has.
            let is_of_use = rumour.stamp <= self.unix(now).saturating_add(AHEAD_MS);
            if is_of_use && self.list.gone(tag).is_none_or(|stamp| stamp < rumour.stamp) {
                self.list.bury(now, tag, rumour.stamp);
            }
            return;
        };
        let (stamp, peer) = (known.card.stamp, known.card.peer);
        if rumour.stamp < stamp {
            return;
        }
        // Of a newer card than it has nobody can say here that its member is gone.
        let rumour = &Rumour { stamp: if tag == self.own_tag { rumour.stamp } else { stamp }, ..*rumour };
        if tag == self.own_tag {
            // A member that is said to be gone says otherwise; of a card that it cannot have made only by chance, before a restart and with a clock
            // that was wrong. There must be later times left.
            if rumour.stamp == stamp || rumour.stamp < self.unix(now).saturating_add(AGES_MS) {
                self.doubted = Some(rumour.stamp);
                self.defend(now);
            }
        } else if self.neighbours.contains_key(&peer) {
            // We know better, and it should know what is said of it.
            if peer != from {
                self.send(peer, Message { rumours: vec![*rumour], ..Message::default() });
            }
        } else {
            self.bury(now, tag, rumour.stamp);
        }
    }

    /// False if its member did not sign it: nobody of us passes such a card on, and the others of the same message are not looked at.
    fn take_card(&mut self, now: Instant, signed: SignedCard, is_news: bool) -> bool {
        let list = &self.list;
        let read = self.signer.read(signed, &self.scope, &|tag, stamp| list.lacks(tag, stamp));
        let card = match read {
            Read::Believed(card) => card,
            Read::Known(name) => {
                self.asked.remove(&name);
                return true;
            }
            Read::Unusable => {
                self.refused += 1;
                return true;
            }
            Read::Forged => {
                self.refused += 1;
                return false;
            }
        };
        self.asked.remove(&card.news());
        if card.tag == self.own_tag {
            // Of before a restart, or of a clock that ran ahead.
            if self.list.stamp(card.tag).is_none_or(|own| card.card.stamp > own) {
                self.announce(now, card.card.stamp.saturating_add(1));
            }
        } else if self.list.lacks(card.tag, card.card.stamp) {
            if !is_news {
                self.comparison.found_something();
            }
            self.put(now, card, is_news);
        }
        true
    }

    fn put(&mut self, now: Instant, card: Arc<Believed>, is_news: bool) {
        if is_news {
            self.spread(now, card.news(), card.tag);
        }
        self.list.put(card);
    }

    fn bury(&mut self, now: Instant, tag: Tag, stamp: u64) {
        if self.list.bury(now, tag, stamp) {
            self.spread(now, tag.news(stamp, true), tag);
        }
    }

    /// Few miss what is passed on like this: they are looked for once it has come round.
    fn spread(&mut self, now: Instant, name: NewsId, tag: Tag) {
        self.news.spread(now, name, tag);
        let soon = now + self.vary(AFTER_NEWS);
        self.comparison.next = self.comparison.next.map(|next| next.min(soon));
    }

    /// As far as what this neighbour may cost allows.
    fn answer(&mut self, now: Instant, to: PeerId, mut message: Message, cards: Vec<SignedCard>) {
        let mut size = 0;
        for card in cards {
            let bytes = card.size();
            if !self.neighbour(now, to).budget.spend(now, bytes) {
                break;
            }
            if size + bytes > CARDS_CHUNK {
                size = 0;
                let rest = Message { old_news: message.old_news, answer: true, ..Message::default() };
                let full = std::mem::replace(&mut message, rest);
                self.send(to, full);
            }
            size += bytes;
            message.cards.push(card);
        }
        let empty = Message { old_news: message.old_news, answer: true, ..Message::default() };
        if message != empty {
            self.send(to, message);
        }
    }

    // --- Looks at members ---

    fn probe(&mut self, now: Instant) {
        let mut due: Vec<PeerId> =
            self.second_tries.iter().filter(|(at, _)| *at <= now).map(|(_, peer)| *peer).collect();
        self.second_tries.retain(|(at, _)| *at > now);
        if now.duration_since(self.probed) >= PROBE_INTERVAL {
            self.probed = now;
            let apart = self.list.members().map(|known| known.card.peer);
            let apart = apart.filter(|peer| *peer != self.local && !self.neighbours.contains_key(peer));
            due.extend(apart.choose(&mut self.rng));
        }
        self.actions.extend(due.into_iter().map(Action::Probe));
    }
}

fn numbers(names: &[NewsId]) -> Vec<u32> {
    names.iter().map(|name| name.0).collect()
}
