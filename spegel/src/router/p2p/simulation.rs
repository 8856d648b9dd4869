//! The router's bench under simulated time: the walk, the table, the records and the advertiser's plan of the daemon, with a queue for
//! a network. `cargo xtask bench router` runs it and reads the lines that begin with `figure `.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::identity::Keypair;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::advertise::bench_rounds;
use super::client::REQUEST_TIMEOUT;
use super::keys::{ContentId, Position};
use super::lookup::Walk;
use super::members::Message as MemberMessage;
use super::records::{RecordLimits, Records};
use super::table::{Contact, REPLICAS, Table, Traits};
use super::wire::{Kind, Message};

const SEED: u64 = 20_260_801;
const KEYS_PER_NODE: u32 = 2_000;
/// How many keys are looked up, and how many providers each has.
const SAMPLE: u32 = 60;
const PROVIDERS: usize = 10;
const LOOKUPS: usize = 600;

/// One way between two nodes; varied by a fifth.
const LINK: Duration = Duration::from_micros(500);
/// What a node takes to answer.
const SERVICE: Duration = Duration::from_micros(50);
/// TCP, security and multiplexer before the first request: three round trips and the handshake's arithmetic.
const COLD: Duration = Duration::from_micros(3 * 1_000 + 1_500);
/// As the daemon's searches.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(2);
/// TCP, IP, noise and yamux around one message, with the acknowledgement; a stream's opening, end and negotiation; a new connection.
const FRAMING: usize = 134;
const STREAM: usize = 300;
const CONNECTION: usize = 4_000;

/// Which of the nodes speak the member protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinds {
    All,
    Half,
}

struct Network {
    rng: StdRng,
    now: Instant,
    contacts: Vec<Contact>,
    speaks: HashSet<PeerId>,
    alive: BTreeSet<PeerId>,
    /// What every member knows, and what kad's table of each node has.
    members: Table,
    tables: HashMap<PeerId, Table>,
    records: HashMap<PeerId, Records>,
}

/// How one lookup went.
struct Outcome {
    first: Option<Duration>,
    wrong: bool,
}

impl Network {
    fn new(size: usize, kinds: Kinds) -> Self {
        let mut rng = StdRng::seed_from_u64(SEED ^ size as u64);
        let contacts: Vec<Contact> = (0..size).map(|n| contact(&mut rng, n)).collect();
        let peers: Vec<PeerId> = contacts.iter().map(|contact| contact.peer).collect();
        let speaks = peers.iter().enumerate().filter(|(n, _)| kinds == Kinds::All || n % 2 == 0).map(|(_, peer)| *peer);
        let now = Instant::now();
        let records = peers.iter().map(|peer| {
            let limits = RecordLimits { foreign: 300_000, validity: Duration::from_secs(1_140) };
            (*peer, Records::new(*peer, limits, now))
        });
        let mut network = Self {
            now,
            speaks: speaks.collect(),
            alive: peers.iter().copied().collect(),
            members: Table::default(),
            tables: HashMap::new(),
            records: records.collect(),
            contacts,
            rng,
        };
        network.learn_members();
        network.fill_tables();
        network
    }

    /// The member lists are as after half a minute: everyone that lives, and nobody else.
    fn learn_members(&mut self) {
        let known = self.contacts.iter().filter(|c| self.speaks.contains(&c.peer) && self.alive.contains(&c.peer));
        self.members.set_members(known.cloned().map(|contact| (contact, Traits::default())).collect::<Vec<_>>());
    }

    /// Twenty of each bucket, as kad's table has them.
    fn fill_tables(&mut self) {
        for one in &self.contacts {
            let position = Position::of_peer(&one.peer).prefix();
            let mut buckets: BTreeMap<u32, Vec<&Contact>> = BTreeMap::new();
            for other in self.contacts.iter().filter(|other| other.peer != one.peer) {
                let bucket = (position ^ Position::of_peer(&other.peer).prefix()).leading_zeros();
                buckets.entry(bucket).or_default().push(other);
            }
            let mut table = Table::default();
            for bucket in buckets.into_values() {
                for chosen in bucket.into_iter().choose_multiple(&mut self.rng, REPLICAS) {
                    table.insert(chosen.clone());
                }
            }
            self.tables.insert(one.peer, table);
        }
    }

    /// The nearest that a node knows: of all members and of its table if it is one, else of its table.
    fn closest(&self, peer: &PeerId, target: &Position) -> Vec<Contact> {
        let mut known: HashMap<PeerId, Contact> =
            self.tables[peer].closest(target).into_iter().map(|contact| (contact.peer, contact)).collect();
        if self.speaks.contains(peer) {
            known.extend(self.members.closest(target).into_iter().map(|contact| (contact.peer, contact)));
        }
        known.remove(peer);
        let mut ranked: Vec<Contact> = known.into_values().collect();
        ranked.sort_by_key(|contact| Position::of_peer(&contact.peer).distance(target));
        ranked.truncate(REPLICAS);
        ranked
    }

    fn provide(&mut self, id: ContentId) {
        let providers: Vec<Contact> = self.contacts.iter().cloned().choose_multiple(&mut self.rng, PROVIDERS);
        for provider in providers {
            for holder in self.closest(&provider.peer, &id.position()) {
                let records = self.records.get_mut(&holder.peer).unwrap();
                records.add(self.now, id, provider.peer, &provider.addresses);
            }
        }
    }

    fn delay(&mut self) -> Duration {
        LINK.mul_f64(self.rng.random_range(0.8..1.2))
    }

    /// The daemon's search loop over a queue of answers.
    fn look_up(&mut self, from: &PeerId, id: ContentId, cold: bool) -> Outcome {
        let known = self.closest(from, &id.position());
        let mut walk = Walk::new(*from, id.position(), known);
        let mut queue: BTreeMap<(Duration, u32), (Contact, bool)> = BTreeMap::new();
        let (mut now, mut sequence) = (Duration::ZERO, 0);
        let (mut first, mut wrong) = (None, false);
        while now < SEARCH_TIMEOUT && !walk.is_over() {
            while let Some(contact) = walk.next(self.now + now) {
                let lives = self.alive.contains(&contact.peer);
                let round_trip = self.delay() + SERVICE + self.delay();
                let setup = if cold { COLD } else { Duration::ZERO };
                let at = now + if lives { setup + round_trip } else { REQUEST_TIMEOUT };
                sequence += 1;
                queue.insert((at, sequence), (contact, lives));
            }
            let patience = walk.patience(self.now + now).map_or(SEARCH_TIMEOUT, |patience| now + patience);
            match queue.first_entry() {
                Some(entry) if entry.key().0 <= patience => {
                    let ((at, _), (contact, lives)) = entry.remove_entry();
                    now = at;
                    if !lives {
                        walk.failed(&contact.peer);
                        continue;
                    }
                    let told = self.records[&contact.peer].others(self.now, &id);
                    wrong |= told.iter().any(|(_, addresses)| addresses.is_empty());
                    if first.is_none() && told.iter().any(|(peer, _)| peer != from && self.alive.contains(peer)) {
                        first = Some(now);
                    }
                    walk.answered(&contact.peer, self.closest(&contact.peer, &id.position()));
                }
                _ => now = patience,
            }
        }
        Outcome { first, wrong }
    }

    /// Many lookups: p50 and p99 until the first provider, in milliseconds, and the share of those that found one.
    fn look_up_many(&mut self, ids: &[ContentId], cold: bool) -> (f64, f64, f64) {
        let mut times = Vec::new();
        let mut found = 0;
        for _ in 0..LOOKUPS {
            let id = *ids.iter().choose(&mut self.rng).unwrap();
            let from = *self.alive.iter().min_by_key(|_| self.rng.random::<u32>()).unwrap();
            let outcome = self.look_up(&from, id, cold);
            assert!(!outcome.wrong, "an answer named a provider without an address");
            if let Some(first) = outcome.first {
                times.push(first.as_secs_f64() * 1e3);
                found += 1;
            }
        }
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or(f64::NAN);
        (at(0.5), at(0.99), f64::from(found) / LOOKUPS as f64)
    }

    fn kill(&mut self, share: f64) {
        let count = (self.contacts.len() as f64 * share) as usize;
        for contact in self.contacts.iter().choose_multiple(&mut self.rng, count) {
            self.alive.remove(&contact.peer);
        }
    }

    /// What one node sends to advertise 2,000 keys for one round: messages and bytes, ours and with a walk for each key.
    fn advertising(&self) -> [(usize, usize); 2] {
        let own = &self.contacts[0];
        let ids: Vec<ContentId> = (0..KEYS_PER_NODE).map(|n| id(1_000_000 + n)).collect();
        let (mut messages, mut bytes) = (0, 0);
        let (mut each_messages, mut each_bytes) = (0, 0);
        let address = [SocketAddr::from(([10, 0, 0, 1], 5001))];
        let request = Message::request(Kind::GetProviders, &ids[0].multihash()).encoded_len() + FRAMING;
        // An answer names twenty peers of some sixty bytes.
        let answer = REPLICAS * 60 + FRAMING;
        for due in bench_rounds(&ids, Duration::from_secs(900)) {
            let mut plan: HashMap<PeerId, Vec<ContentId>> = HashMap::new();
            for id in due {
                let closest = self.closest(&own.peer, &id.position());
                each_messages += 2 * closest.len();
                each_bytes += closest.len() * (request + answer + request + 60 + STREAM + CONNECTION / 4);
                closest.iter().for_each(|contact| plan.entry(contact.peer).or_default().push(id));
            }
            for (peer, ids) in plan {
                let connected = self.tables[&own.peer].contains(&peer);
                bytes += STREAM + if connected { 0 } else { CONNECTION };
                if self.speaks.contains(&peer) {
                    messages += 1;
                    bytes += MemberMessage::offer(&address, &ids).encoded_len() + FRAMING;
                } else {
                    messages += ids.len();
                    bytes += ids.len() * 110 + FRAMING;
                }
            }
        }
        [(messages, bytes), (each_messages, each_bytes)]
    }
}

fn contact(rng: &mut StdRng, n: usize) -> Contact {
    let mut secret = [0; 32];
    rng.fill(&mut secret);
    let peer = Keypair::ed25519_from_bytes(secret).unwrap().public().to_peer_id();
    let ip = (0x0a00_0001 + u32::try_from(n).unwrap()).to_be_bytes();
    Contact { peer, addresses: Arc::from([SocketAddr::from((ip, 5001))]) }
}

fn id(n: u32) -> ContentId {
    ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
}

fn figure(size: usize, what: &str, value: f64) {
    println!("figure {size}|{what}|{value:.3}");
}

fn measure(size: usize) -> f64 {
    let ids: Vec<ContentId> = (0..SAMPLE).map(id).collect();
    let mut network = Network::new(size, Kinds::All);
    ids.iter().for_each(|id| network.provide(*id));
    let (p50, p99, found) = network.look_up_many(&ids, false);
    figure(size, "lookup p50, warm connections (ms)", p50);
    figure(size, "lookup p99, warm connections (ms)", p99);
    figure(size, "lookup p99, cold connections (ms)", network.look_up_many(&ids, true).1);
    assert!(found >= 0.999, "only {found} found at {size}");
    let round = 720.0;
    let [(messages, bytes), (each_messages, each_bytes)] = network.advertising();
    figure(size, "advertising 2,000 keys, messages/s a node", messages as f64 / round);
    figure(size, "the same key by key, messages/s a node", each_messages as f64 / round);
    figure(size, "advertising 2,000 keys, bytes/s a node", bytes as f64 / round);
    figure(size, "the same key by key, bytes/s a node", each_bytes as f64 / round);
    // Each key is held by twenty, wherever there are so many.
    let held = KEYS_PER_NODE as usize * REPLICAS.min(size - 1);
    figure(size, "records of 2,000 keys a node, memory a node (MB)", held as f64 * 64.0 / 1e6);
    network.kill(0.2);
    let (_, p99, found) = network.look_up_many(&ids, false);
    figure(size, "20 % dead, at once: found (share)", found);
    figure(size, "20 % dead, at once: p99 (ms)", p99);
    network.learn_members();
    let alive = network.alive.clone();
    for table in network.tables.values_mut() {
        let dead: Vec<PeerId> = table.contacts().map(|c| c.peer).filter(|peer| !alive.contains(peer)).collect();
        dead.iter().for_each(|peer| drop(table.remove(peer)));
    }
    let (_, p99, settled) = network.look_up_many(&ids, false);
    figure(size, "20 % dead, noticed: found (share)", settled);
    figure(size, "20 % dead, noticed: p99 (ms)", p99);

    let mut mixed = Network::new(size, Kinds::Half);
    ids.iter().for_each(|id| mixed.provide(*id));
    let (_, p99, found) = mixed.look_up_many(&ids, false);
    figure(size, "half not members: found (share)", found);
    figure(size, "half not members: p99 (ms)", p99);
    settled
}

#[test]
fn ten_nodes_find_everything_though_two_die() {
    assert!(measure(10) >= 0.999);
}

/// Which provider of a hot key is named first, over many answers.
#[test]
fn providers_of_a_hot_key_are_named_evenly() {
    let now = Instant::now();
    let limits = RecordLimits { foreign: 300_000, validity: Duration::from_secs(1_140) };
    let mut records = Records::new(PeerId::random(), limits, now);
    let mut rng = StdRng::seed_from_u64(SEED);
    (0..100).for_each(|n| {
        let provider = contact(&mut rng, n);
        records.add(now, id(1), provider.peer, &provider.addresses);
    });
    let mut named: HashMap<PeerId, u32> = HashMap::new();
    for _ in 0..20_000 {
        *named.entry(records.others(now, &id(1))[0].0).or_default() += 1;
    }
    let share = f64::from(*named.values().max().unwrap()) / 200.0;
    figure(100, "one hot key of 100 providers: largest share (x mean)", share);
    assert!(named.len() == 100 && share <= 2.0, "{share} x the mean");
}

#[test]
#[ignore = "takes minutes; cargo xtask bench router runs it"]
fn bench_router() {
    println!("seed {SEED}");
    for size in [10, 100, 1_000] {
        assert!(measure(size) >= 0.999, "at {size} nodes");
    }
}
