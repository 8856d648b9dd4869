//! Many nodes of the member protocol under simulated time: the same code as in the daemon, with a queue for a network.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use libp2p::PeerId;
use libp2p::identity::Keypair;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::super::addresses::Scope;
use super::super::keys::Position;
use super::super::table::REPLICAS;
use super::{Action, Membership, Message, Own, Signer, TICK};

/// What a message takes from node to node.
const LATENCY: Duration = Duration::from_micros(500);

/// What TCP, IP, noise and yamux add to each message, with the acknowledgement.
const OVERHEAD: usize = 134;

/// How long until the peers of a node that vanished without a word notice: ping's interval and timeout.
pub(super) const SILENCE: Duration = Duration::from_secs(15);

/// Believes everything: signatures would take most of a simulation's time.
#[derive(Debug)]
pub(super) struct NoSigner;

impl Signer for NoSigner {
    fn sign(&self, _: &[u8]) -> Vec<u8> {
        vec![0; 64]
    }

    fn verify(&self, _: &PeerId, _: &[u8], _: &[u8]) -> bool {
        true
    }
}

pub(super) fn scope() -> Scope {
    Scope::of_listeners(&["0.0.0.0:5001".parse().unwrap()])
}

pub(super) struct Node {
    pub(super) membership: Membership,
    position: Position,
    neighbours: HashSet<PeerId>,
    pub(super) sent: usize,
    pub(super) received: usize,
}

#[allow(clippy::large_enum_variant, reason = "nearly all are of the larger kind")]
enum Event {
    Tick(PeerId),
    Deliver(PeerId, PeerId, Message),
    /// The first no longer reaches the second: its connection ended, and calling again failed.
    Lost(PeerId, PeerId),
    Probe(PeerId, PeerId),
}

/// The network.
pub(super) struct Simulation {
    pub(super) nodes: BTreeMap<PeerId, Node>,
    start: Instant,
    pub(super) now: Instant,
    queue: BTreeMap<(Instant, u64), Event>,
    sequence: u64,
    rng: StdRng,
    joined: u32,
}

impl Simulation {
    pub(super) fn new(seed: u64) -> Self {
        let start = Instant::now();
        let rng = StdRng::seed_from_u64(seed);
        Self { nodes: BTreeMap::new(), start, now: start, queue: BTreeMap::new(), sequence: 0, rng, joined: 0 }
    }

    fn schedule(&mut self, after: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + after, self.sequence), event);
    }

    /// A node that is called by its nearest and by some of each bucket, as Kademlia's table makes it.
    pub(super) fn join(&mut self) -> PeerId {
        let mut secret = [0; 32];
        self.rng.fill(&mut secret);
        let peer = Keypair::ed25519_from_bytes(secret).unwrap().public().to_peer_id();
        self.joined += 1;
        let address = SocketAddr::from(((0x0a00_0000 + self.joined).to_be_bytes(), 5001));
        let own = Own { addresses: vec![address], zone: Some("zone-a".into()), load: None };
        let clock = (self.now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000) + (self.now - self.start));
        let membership = Membership::new(peer, own, scope(), Box::new(NoSigner), self.rng.random(), clock);
        let position = Position::of_peer(&peer);
        let chosen = self.choose_neighbours(&position);
        let neighbours = HashSet::new();
        self.nodes.insert(peer, Node { membership, position, neighbours, sent: 0, received: 0 });
        for other in chosen {
            self.connect(peer, other);
        }
        let first = self.rng.random_range(Duration::ZERO..TICK);
        self.schedule(first, Event::Tick(peer));
        peer
    }

    fn choose_neighbours(&mut self, position: &Position) -> Vec<PeerId> {
        let mut buckets: HashMap<u32, Vec<PeerId>> = HashMap::new();
        for (peer, node) in &self.nodes {
            let bucket = (position.prefix() ^ node.position.prefix()).leading_zeros();
            buckets.entry(bucket).or_default().push(*peer);
        }
        let rng = &mut self.rng;
        buckets.into_values().flat_map(|bucket| bucket.into_iter().choose_multiple(rng, REPLICAS)).collect()
    }

    fn connect(&mut self, a: PeerId, b: PeerId) {
        for (one, other) in [(a, b), (b, a)] {
            let now = self.now;
            if let Some(node) = self.nodes.get_mut(&one) {
                node.neighbours.insert(other);
                node.membership.connected(now, other);
            }
            self.act(one);
        }
    }

    /// The node vanishes; its neighbours notice after a while.
    pub(super) fn kill(&mut self, peer: PeerId, noticed: Duration) {
        let Some(node) = self.nodes.remove(&peer) else { return };
        for other in node.neighbours {
            let jitter = self.rng.random_range(Duration::ZERO..Duration::from_millis(500));
            let after = noticed.mul_f64(self.rng.random_range(0.7..1.0)) + jitter;
            self.schedule(after, Event::Lost(other, peer));
        }
    }

    pub(super) fn any(&mut self) -> PeerId {
        *self.nodes.keys().choose(&mut self.rng).unwrap()
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(entry) = self.queue.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.handle(event);
        }
        self.now = end;
    }

    fn handle(&mut self, event: Event) {
        let now = self.now;
        let acting = match event {
            Event::Tick(peer) => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.membership.tick(now);
                self.schedule(TICK, Event::Tick(peer));
                peer
            }
            Event::Deliver(from, to, message) => {
                let Some(node) = self.nodes.get_mut(&to) else { return };
                node.received += message.encoded_len() + OVERHEAD;
                node.membership.receive(now, from, message);
                to
            }
            Event::Lost(peer, lost) => {
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.neighbours.remove(&lost);
                node.membership.disconnected(now, &lost);
                node.membership.failed(now, &lost);
                peer
            }
            Event::Probe(peer, target) => {
                if self.nodes.contains_key(&target) {
                    return;
                }
                let Some(node) = self.nodes.get_mut(&peer) else { return };
                node.membership.failed(now, &target);
                peer
            }
        };
        self.act(acting);
    }

    fn act(&mut self, peer: PeerId) {
        loop {
            let Some(node) = self.nodes.get_mut(&peer) else { return };
            match node.membership.next_action() {
                Some(Action::Send(to, message)) => {
                    node.sent += message.encoded_len() + OVERHEAD;
                    self.schedule(LATENCY, Event::Deliver(peer, to, message));
                }
                Some(Action::Probe(target)) => self.schedule(2 * LATENCY, Event::Probe(peer, target)),
                None => return,
            }
        }
    }

    /// The share of the nodes whose list has, or has not, this member.
    pub(super) fn share(&self, member: &PeerId, known: bool) -> f64 {
        let others = self.nodes.iter().filter(|(peer, _)| *peer != member);
        let (mut all, mut good) = (0_u32, 0_u32);
        for (_, node) in others {
            all += 1;
            good += u32::from(node.membership.card(member).is_some() == known);
        }
        f64::from(good) / f64::from(all.max(1))
    }

    /// Sets the counts of bytes to nothing.
    pub(super) fn reset(&mut self) {
        for node in self.nodes.values_mut() {
            (node.sent, node.received) = (0, 0);
        }
    }

    /// What a node sent and received on average, in bytes.
    pub(super) fn traffic(&self) -> usize {
        self.nodes.values().map(|node| node.sent + node.received).sum::<usize>() / self.nodes.len().max(1)
    }

    /// How many seconds until so large a share knows, or has forgotten, the member.
    pub(super) fn seconds_until(&mut self, member: &PeerId, known: bool, share: f64) -> u32 {
        for second in 0..120 {
            if self.share(member, known) >= share {
                return second;
            }
            self.run(Duration::from_secs(1));
        }
        u32::MAX
    }
}
