//! Many nodes under simulated time: the member protocol, the table, the searches, the records and the advertiser of the daemon, with a
//! queue for a network. What is not ours, kad's table and the swarm, is replaced by what they come to.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]

mod bench;
mod lookups;
mod node;
mod report;
mod swarms;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use libp2p::PeerId;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::advertise::{self, Told};
use super::keys::{ContentId, Position};
use super::members::{self, Action, Message};
use super::table::{Contact, REPLICAS, Table};
use crate::router::P2pSettings;

pub(super) use node::{NoSigner, Node, scope};
pub(super) use report::{Aim, Report};

/// One way between two nodes; varied by a fifth.
pub(super) const LINK: Duration = Duration::from_micros(500);
/// What a node takes to answer.
const SERVICE: Duration = Duration::from_micros(50);
/// TCP, security and multiplexer before the first request: three round trips and the handshake's arithmetic.
const COLD: Duration = Duration::from_micros(3 * 1_000 + 1_500);
/// What a node that has no member list takes to find those nearest to a key: four questions in a row.
const WALK: Duration = Duration::from_micros(4 * 5_550);
/// Until it is known that a peer that is connected or dialled does not answer.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);
/// After how long kad looks for others once it knows one, and how often it does again.
const REFRESH_SOON: Duration = Duration::from_millis(500);
const REFRESH: Duration = Duration::from_secs(60);
/// How often the daemon's driver looks after its records and how many members there are.
const SWEEP: Duration = Duration::from_secs(2);
/// How long an unused connection to a peer outside of the table stays open.
const IDLE: Duration = Duration::from_secs(60);

/// TCP, IP, noise and yamux around one message, with the acknowledgement; a stream's opening, end and negotiation; a new connection.
const FRAMING: usize = 134;
const STREAM: usize = 300;
const CONNECTION: usize = 4_000;
/// An ADD_PROVIDER of one key with one address.
const ADD_PROVIDER: usize = 110;

/// Whether a node speaks the member protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Member,
    Plain,
}

#[allow(clippy::large_enum_variant, reason = "nearly all are of the larger kind")]
enum Event {
    Tick(PeerId),
    /// Some keys have their turn.
    Round(PeerId),
    Sweep(PeerId),
    /// kad looks for peers.
    Refresh(PeerId),
    Connect(PeerId, PeerId),
    Deliver(PeerId, PeerId, Message),
    /// What the first offers or withdraws has come to the second.
    Told(PeerId, PeerId, Vec<ContentId>, Vec<ContentId>),
    /// The first is done with telling the second, which may not have heard it.
    Sent(PeerId, PeerId, bool),
    /// The first no longer reaches the second: its connection ended, and calling again failed.
    Lost(PeerId, PeerId),
    Probe(PeerId, PeerId),
}

/// The network.
pub(super) struct Network {
    pub(super) nodes: BTreeMap<PeerId, Node>,
    start: Instant,
    pub(super) now: Instant,
    queue: BTreeMap<(Instant, u64), Box<Event>>,
    sequence: u64,
    rng: StdRng,
    joined: u32,
    signer: NoSigner,
    /// All that live.
    everyone: Table,
    /// Whether lookups and advertising are looked at, and so tables and records are kept.
    content: bool,
}

impl Network {
    pub(super) fn new(seed: u64, content: bool) -> Self {
        let start = Instant::now();
        Self {
            nodes: BTreeMap::new(),
            start,
            now: start,
            queue: BTreeMap::new(),
            sequence: 0,
            rng: StdRng::seed_from_u64(seed),
            joined: 0,
            signer: NoSigner::default(),
            everyone: Table::default(),
            content,
        }
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + after, self.sequence), Box::new(event));
    }

    fn link(&mut self) -> Duration {
        LINK.mul_f64(self.rng.random_range(0.8..1.2))
    }

    /// A node that calls one that is there, and that kad makes known to others half a second later.
    pub(super) fn join(&mut self, kind: Kind) -> PeerId {
        self.joined += 1;
        let clock = (self.now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + (self.now - self.start));
        let node = Node::new(&mut self.rng, self.joined, kind, &self.signer, clock);
        let peer = node.contact.peer();
        let first = self.nodes.keys().copied().choose(&mut self.rng);
        self.everyone.insert(node.contact.clone());
        self.nodes.insert(peer, node);
        if let Some(first) = first {
            self.schedule(COLD, Event::Connect(peer, first));
        }
        self.schedule(COLD + REFRESH_SOON, Event::Refresh(peer));
        for (interval, event) in [
            (members::TICK, Event::Tick(peer)),
            (advertise::pace(P2pSettings::ADVERTISE_TTL).0, Event::Round(peer)),
            (SWEEP, Event::Sweep(peer)),
        ] {
            let first = self.rng.random_range(Duration::ZERO..interval);
            self.schedule(first, event);
        }
        peer
    }

    /// The node vanishes; those connected to it notice after a while.
    pub(super) fn kill(&mut self, peer: PeerId, noticed: Duration) {
        let Some(node) = self.nodes.remove(&peer) else { return };
        self.everyone.remove(&peer);
        for other in node.connected {
            let jitter = self.rng.random_range(Duration::ZERO..Duration::from_millis(500));
            let after = noticed.mul_f64(self.rng.random_range(0.7..1.0)) + jitter;
            self.schedule(after, Event::Lost(other, peer));
        }
    }

    /// A node of its own choice.
    pub(super) fn any(&mut self) -> PeerId {
        self.nodes.keys().copied().choose(&mut self.rng).unwrap()
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= end) {
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.handle(*event);
        }
        self.now = end;
    }

    fn handle(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Tick(peer) => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                let Some(membership) = &mut node.membership else { return };
                membership.tick(now);
                self.schedule(members::TICK, Event::Tick(peer));
                self.follow(peer);
            }
            Event::Round(peer) if self.content => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.recent.retain(|_, used| now.duration_since(*used) < IDLE);
                node.round();
                self.schedule(advertise::pace(P2pSettings::ADVERTISE_TTL).0, Event::Round(peer));
                self.send_offers(peer);
            }
            Event::Sweep(peer) if self.content => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.records.sweep(now);
                node.offers.grown(node.table.members());
                self.schedule(SWEEP, Event::Sweep(peer));
                self.send_offers(peer);
            }
            Event::Round(_) | Event::Sweep(_) => {}
            Event::Refresh(peer) => self.refresh(peer),
            Event::Connect(one, other) => self.connect(one, other),
            Event::Deliver(from, to, message) => {
                let Some(node) = self.nodes.get_mut(&to) else { return };
                node.traffic.members.add(message.encoded_len() + FRAMING);
                let Some(membership) = &mut node.membership else { return };
                membership.receive(now, from, message);
                self.follow(to);
            }
            Event::Told(from, to, offered, withdrawn) => {
                let Some(addresses) = self.nodes.get(&from).map(|node| node.contact.clone()) else { return };
                let Some(node) = self.nodes.get_mut(&to) else { return };
                std::hint::black_box(node.records.touch(&offered));
                node.records.add(now, offered, from, addresses.addresses());
                withdrawn.iter().for_each(|id| node.records.withdrawn(id, &from));
            }
            Event::Sent(peer, to, missed) => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.outbox.done(to, missed && node.table.contains(&to));
                self.send_offers(peer);
            }
            Event::Lost(peer, lost) => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.lose(now, &lost);
                self.follow(peer);
            }
            Event::Probe(peer, target) => {
                if self.nodes.contains_key(&target) {
                    return;
                }
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                if let Some(membership) = &mut node.membership {
                    membership.failed(now, &target);
                }
                self.follow(peer);
            }
        }
    }

    /// A connection on which both say who they are. Each takes the other into its table if there is room in its bucket.
    fn connect(&mut self, one: PeerId, other: PeerId) {
        let now = self.now;
        let Some(kinds) = self.nodes.get(&one).zip(self.nodes.get(&other)).map(|(a, b)| (a.kind(), b.kind())) else {
            return;
        };
        for (peer, other) in [(one, other), (other, one)] {
            let contact = self.nodes[&other].contact.clone();
            let node = self.nodes.get_mut(&peer).unwrap();
            node.connected.insert(other);
            if !node.take_in(contact) {
                continue;
            }
            if kinds == (Kind::Member, Kind::Member)
                && let Some(membership) = &mut node.membership
            {
                membership.connected(now, other);
            }
            // Others than ours tell whoever came later in their next round only.
            if self.content && node.kind() == Kind::Member {
                node.offers.newcomer(other);
                self.send_offers(peer);
            }
            self.follow(peer);
        }
    }

    /// kad fills its buckets with whom it finds: some of each part of the network.
    fn refresh(&mut self, peer: PeerId) {
        let Some(node) = self.nodes.get(&peer) else { return };
        let own = *node.contact.position();
        let mut buckets: BTreeMap<usize, Vec<PeerId>> = BTreeMap::new();
        for (other, found) in self.nodes.iter().filter(|(other, _)| **other != peer) {
            if !node.table.contains(other) {
                buckets.entry(own.common_bits(found.contact.position())).or_default().push(*other);
            }
        }
        let mut called = Vec::new();
        for (bucket, found) in buckets {
            let room = REPLICAS.saturating_sub(node.in_bucket(bucket));
            called.extend(found.into_iter().choose_multiple(&mut self.rng, room));
        }
        for other in called {
            let at = COLD + self.rng.random_range(Duration::ZERO..Duration::from_millis(20));
            self.schedule(at, Event::Connect(peer, other));
        }
        let again = REFRESH.mul_f64(self.rng.random_range(0.9..1.1));
        self.schedule(again, Event::Refresh(peer));
    }

    /// Does what a node's member list asks for.
    fn follow(&mut self, peer: PeerId) {
        loop {
            let Some(node) = self.nodes.get_mut(&peer) else { return };
            let Some(membership) = &mut node.membership else { return };
            match membership.next_action() {
                Some(Action::Send(to, message)) => {
                    node.traffic.members.add(message.encoded_len() + FRAMING);
                    let after = self.link();
                    self.schedule(after, Event::Deliver(peer, to, message));
                }
                Some(Action::Probe(target)) => {
                    let after = if self.nodes.contains_key(&target) { COLD } else { DIAL_TIMEOUT };
                    self.schedule(after, Event::Probe(peer, target));
                }
                None => break,
            }
        }
        let content = self.content;
        let node = self.nodes.get_mut(&peer).unwrap();
        node.take_changes(content);
    }

    /// Plans and sends what a node has to tell, as its advertiser does.
    fn send_offers(&mut self, peer: PeerId) {
        loop {
            let Some(node) = self.nodes.get_mut(&peer) else { return };
            node.plan(&self.everyone);
            let mut sent = Vec::new();
            while let Some(told) = node.outbox.next() {
                sent.push(told);
            }
            if sent.is_empty() {
                return;
            }
            for told in sent {
                self.send_told(peer, told);
            }
        }
    }

    fn send_told(&mut self, peer: PeerId, told: Told) {
        let to = told.contact.peer();
        let there = self.nodes.contains_key(&to);
        let node = self.nodes.get_mut(&peer).unwrap();
        let open = node.table.contains(&to) || node.is_recent(self.now, &to);
        node.recent.insert(to, self.now);
        let bytes = STREAM + if open { 0 } else { CONNECTION };
        if node.table.is_member(&to) {
            let own = node.contact.addresses();
            told.messages(own).iter().for_each(|message| node.traffic.offers.add(message.encoded_len() + FRAMING));
        } else {
            told.offered.iter().for_each(|_| node.traffic.offers.add(ADD_PROVIDER));
            node.traffic.offers.bytes += FRAMING;
        }
        node.traffic.offers.bytes += bytes;
        let is_member = node.kind() == Kind::Member;
        let there_after =
            if open { self.link() } else { self.link() + COLD } + if is_member { Duration::ZERO } else { WALK };
        let back = self.link();
        if there {
            self.schedule(there_after, Event::Told(peer, to, told.offered, told.withdrawn));
            self.schedule(there_after + back, Event::Sent(peer, to, false));
        } else {
            self.schedule(DIAL_TIMEOUT, Event::Sent(peer, to, true));
        }
    }

    /// This node offers the keys from now on.
    pub(super) fn offer(&mut self, peer: PeerId, ids: impl IntoIterator<Item = ContentId>) {
        let now = self.now;
        let node = self.nodes.get_mut(&peer).unwrap();
        for id in ids {
            node.offers.add(now, id);
            node.records.offer(id);
        }
        self.send_offers(peer);
    }

    /// The share of the nodes whose list has, or has not, this member.
    pub(super) fn share(&self, member: &PeerId, known: bool) -> f64 {
        let others = self.nodes.iter().filter(|(peer, _)| *peer != member);
        let lists: Vec<bool> =
            others.filter_map(|(_, node)| Some(node.membership.as_ref()?.card(member).is_some() == known)).collect();
        lists.iter().filter(|good| **good).count() as f64 / lists.len().max(1) as f64
    }

    /// How long until so large a share knows, or has forgotten, the member, in seconds and by half of them.
    pub(super) fn seconds_until(&mut self, member: &PeerId, known: bool, share: f64) -> f64 {
        let step = Duration::from_millis(500);
        for passed in 0..240 {
            if self.share(member, known) >= share {
                return f64::from(passed) / 2.0;
            }
            self.run(step);
        }
        f64::INFINITY
    }

    /// Sets all counts to nothing.
    pub(super) fn reset_traffic(&mut self) {
        self.nodes.values_mut().for_each(|node| node.traffic = node::Traffic::default());
    }

    /// What the nodes sent and received for the member list, in bytes a node on average.
    pub(super) fn member_bytes(&self) -> f64 {
        let sum: usize = self.nodes.values().map(|node| node.traffic.members.bytes).sum();
        sum as f64 / self.nodes.len().max(1) as f64
    }

    /// What they sent to advertise, in messages and bytes a node on average.
    fn offer_traffic(&self) -> (f64, f64) {
        let count = self.nodes.len().max(1) as f64;
        let sum = |what: fn(&node::Count) -> usize| -> usize {
            self.nodes.values().map(|node| what(&node.traffic.offers)).sum()
        };
        (sum(|count| count.messages) as f64 / count, sum(|count| count.bytes) as f64 / count)
    }

    /// Those who offer it and live.
    fn providers(&self, id: &ContentId) -> BTreeSet<PeerId> {
        self.nodes.iter().filter(|(_, node)| node.records.offers(id)).map(|(peer, _)| *peer).collect()
    }
}

/// A content of the simulated cluster.
pub(super) fn id(n: u32) -> ContentId {
    ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
}

fn position(peer: &PeerId) -> Position {
    Position::of_peer(peer)
}

fn contact_of(peer: PeerId, address: std::net::SocketAddr) -> Contact {
    Contact::new(peer, &[address])
}
