#![allow(clippy::unwrap_used, clippy::cast_precision_loss)]

use libp2p::identity::Keypair;
use proptest::prelude::*;

use super::super::pulse::SILENCE;
use super::super::simulation::{Aim, Kind, Network, NoSigner, Report, scope};
use super::list::{ON_ITS_WAY, PARTS};
use super::message::{Card, SignedCard};
use super::*;

pub(super) fn network(seed: u64, size: usize) -> Network {
    let mut network = Network::new(seed, false);
    for _ in 0..size {
        network.join(Kind::Member);
        network.run(Duration::from_millis(20));
    }
    network.run(Duration::from_secs(90));
    network
}

fn others(network: &Network) -> impl Iterator<Item = usize> + '_ {
    network.nodes.values().map(|node| node.membership.as_ref().unwrap().others().count())
}

/// The aims of the member list: who joins or dies is known, or forgotten, by 99 of 100 within half a minute, and a node sends and
/// receives less than a kilobyte a second with one change a second.
fn missed_aims(seed: u64, size: usize) -> Vec<String> {
    println!("seed {seed}");
    let mut report = Report::new(size);
    let mut network = network(seed, size);
    let fewest = others(&network).min().unwrap() as f64;
    report.check("members known to the one that knows the fewest", fewest, Aim::AtLeast(size as f64 - 1.0));

    network.reset_traffic();
    network.run(Duration::from_secs(120));
    let at_rest = network.member_bytes() / 120.0;
    report.check("member list alone at rest, bytes/s a node, sent and received", at_rest, Aim::AtMost(1_000.0));

    let (mut joined, mut died) = (0.0_f64, 0.0_f64);
    for _ in 0..5 {
        let newcomer = network.join(Kind::Member);
        joined = joined.max(network.seconds_until(&newcomer, true, 0.99));
        let victim = network.any();
        network.kill(victim, SILENCE);
        died = died.max(network.seconds_until(&victim, false, 0.99));
    }
    report.check("a join known to 99 %, slowest of 5 (s)", joined, Aim::AtMost(30.0));
    report.check("a silent death known to 99 %, slowest of 5 (s)", died, Aim::AtMost(30.0));

    let changing = changes(&mut network, Duration::from_secs(1));
    let what = "member list with a change a second, bytes/s a node, sent and received";
    report.check(what, changing, Aim::AtMost(1_000.0));
    network.run(Duration::from_secs(150));
    let right = others(&network).filter(|known| *known == network.nodes.len() - 1).count();
    let share = right as f64 / network.nodes.len() as f64;
    report.check("lists that are right 150 s after the last change (share)", share, Aim::AtLeast(1.0));
    report.missed()
}

/// Nodes come and go in turn for two minutes, half of those who go without a word. What that costs a node, in bytes a second.
fn changes(network: &mut Network, pause: Duration) -> f64 {
    network.reset_traffic();
    let mut passed = Duration::ZERO;
    for n in 0.. {
        match n % 4 {
            1 | 3 => {
                let victim = network.any();
                network.kill(victim, if n % 4 == 1 { SILENCE } else { Duration::from_millis(100) });
            }
            _ => drop(network.join(Kind::Member)),
        }
        network.run(pause);
        passed += pause;
        if passed >= Duration::from_secs(120) {
            break;
        }
    }
    network.member_bytes() / passed.as_secs_f64()
}

#[test]
fn a_hundred_nodes_know_each_other_at_little_cost() {
    assert_eq!(missed_aims(7, 100), [""; 0]);
}

#[test]
#[ignore = "takes minutes; cargo xtask bench router runs it"]
fn bench_members() {
    for size in [10, 100, 1_000, 3_000] {
        missed_aims(7, size);
    }
}

/// A network that was split is whole again some minutes after its halves meet, by comparing alone.
#[test]
fn lists_that_were_apart_become_one() {
    let mut pair = Pair::new();
    pair.pass(200);
    let strangers: Vec<Keypair> = (0..300).map(|_| Keypair::generate_ed25519()).collect();
    for (n, stranger) in strangers.iter().enumerate() {
        let card = Card { peer: stranger.public().to_peer_id(), stamp: 1_000 + n as u64, ..own_card(&pair.a) };
        // An answer: whoever tells it is no neighbour with whom to compare.
        let message = Message { cards: vec![card.sign(stranger)], old_news: true, answer: true, ..Message::default() };
        let node = if n % 2 == 0 { &mut pair.a } else { &mut pair.b };
        node.receive(pair.now, PeerId::random(), message);
    }
    pair.pass(200);
    assert_eq!((pair.a.others().count(), pair.b.others().count()), (301, 301));
}

pub(super) fn own_card(node: &Membership) -> Card {
    node.card(&node.local).unwrap().clone()
}

pub(super) fn address(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 5001))
}

pub(super) fn node(keypair: &Keypair, n: u8, now: Instant) -> Membership {
    let own = Own { addresses: vec![address(n)], zone: Some("b".into()), load: None, storms: n.is_multiple_of(2) };
    let clock = (now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    Membership::new(keypair.public().to_peer_id(), own, scope(), Box::new(keypair.clone()), 1, clock)
}

pub(super) fn sent(node: &mut Membership) -> Vec<(PeerId, Message)> {
    let actions = std::iter::from_fn(|| node.next_action());
    actions
        .filter_map(|action| if let Action::Send(to, message) = action { Some((to, message)) } else { None })
        .collect()
}

/// Two nodes that are connected, until neither has anything to say.
pub(super) struct Pair {
    pub(super) a: Membership,
    pub(super) b: Membership,
    pub(super) now: Instant,
}

impl Pair {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        let (a, b) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let mut pair = Self { a: node(&a, 1, now), b: node(&b, 2, now), now };
        pair.a.connected(now, pair.b.local);
        pair.b.connected(now, pair.a.local);
        pair.talk();
        pair
    }

    pub(super) fn talk(&mut self) {
        loop {
            let (from_a, from_b) = (sent(&mut self.a), sent(&mut self.b));
            if from_a.is_empty() && from_b.is_empty() {
                return;
            }
            let (a, b) = (self.a.local, self.b.local);
            from_a.into_iter().filter(|(to, _)| *to == b).for_each(|(_, m)| self.b.receive(self.now, a, m));
            from_b.into_iter().filter(|(to, _)| *to == a).for_each(|(_, m)| self.a.receive(self.now, b, m));
        }
    }

    pub(super) fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            for _ in 0..2 {
                self.now += TICK;
                self.a.tick(self.now);
                self.b.tick(self.now);
                self.talk();
            }
        }
    }
}

#[test]
fn neighbours_learn_each_others_cards() {
    let pair = Pair::new();
    let card = pair.a.card(&pair.b.local).unwrap();
    assert_eq!(
        (card.addresses.as_slice(), card.zone.as_deref(), card.version),
        (&[address(2)][..], Some("b"), VERSION_WITH_STORMS)
    );
    let other = pair.b.card(&pair.a.local).unwrap();
    assert_eq!(other.version, VERSION, "it takes no part in storms");
}

#[test]
fn a_new_address_and_a_new_load_are_told() {
    let mut pair = Pair::new();
    pair.b.set_addresses(pair.now, vec![address(9)]);
    pair.pass(2);
    assert_eq!(pair.a.card(&pair.b.local).unwrap().addresses, [address(9)]);
    pair.b.set_load(70);
    pair.pass(40);
    assert_eq!(pair.a.card(&pair.b.local).unwrap().load, Some(70));
    pair.b.set_load(60);
    pair.pass(40);
    assert_eq!(pair.a.card(&pair.b.local).unwrap().load, Some(70), "what changes little is not told");
}

#[test]
fn two_failed_contacts_and_not_one_make_a_member_leave() {
    let mut pair = Pair::new();
    let peer = pair.b.local;
    pair.a.failed(pair.now, &peer);
    assert!(pair.a.card(&peer).is_some(), "there is a connection to it");
    pair.a.disconnected(pair.now, &peer);
    assert!(pair.a.card(&peer).is_some());
    pair.a.tick(pair.now + SECOND_TRY);
    assert!(
        std::iter::from_fn(|| pair.a.next_action()).any(|action| action == Action::Probe(peer)),
        "it is tried again"
    );
    pair.a.failed(pair.now, &peer);
    assert!(pair.a.card(&peer).is_none());
}

#[test]
fn a_contact_that_works_forgives_the_one_before() {
    let mut pair = Pair::new();
    let peer = pair.b.local;
    for _ in 0..5 {
        pair.a.disconnected(pair.now, &peer);
        pair.a.connected(pair.now, peer);
    }
    assert!(pair.a.card(&peer).is_some());
}

#[test]
fn whoever_is_said_to_be_gone_and_is_not_says_so() {
    let mut pair = Pair::new();
    let (stamp, b) = (pair.a.card(&pair.b.local).unwrap().stamp, pair.b.local);
    let lie = Rumour { tag: Tag::of(&Position::of_peer(&b)).0, stamp, gone: true };
    let liar = PeerId::random();
    pair.a.receive(pair.now, liar, Message { rumours: vec![lie], ..Message::default() });
    assert!(pair.a.card(&b).is_some(), "its neighbour does not believe it");
    pair.talk();
    pair.pass(6);
    assert!(pair.a.card(&b).unwrap().stamp > stamp, "and it made a newer card");

    // Whoever is not connected to it believes it until then.
    pair.a.parted(&b);
    let stamp = pair.a.card(&b).unwrap().stamp;
    pair.a.receive(pair.now, liar, Message { rumours: vec![Rumour { stamp, ..lie }], ..Message::default() });
    assert!(pair.a.card(&b).is_none());
    pair.b.receive(pair.now, liar, Message { rumours: vec![Rumour { stamp, ..lie }], ..Message::default() });
    pair.a.connected(pair.now, b);
    pair.pass(12);
    assert!(pair.a.card(&b).unwrap().stamp > stamp);
}

#[test]
fn an_old_card_does_not_bring_the_dead_back() {
    let mut pair = Pair::new();
    let b = pair.b.local;
    let old = pair.a.list.get(Tag::of(&Position::of_peer(&b))).unwrap().signed.clone();
    pair.a.disconnected(pair.now, &b);
    pair.a.failed(pair.now, &b);
    pair.a.receive(pair.now, PeerId::random(), Message { cards: vec![old], ..Message::default() });
    assert!(pair.a.card(&b).is_none());
}

#[test]
fn only_its_member_can_make_a_card() {
    let now = Instant::now();
    let (ours, victim, thief) = (Keypair::generate_ed25519(), Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let mut node = node(&ours, 1, now);
    let card = Card {
        peer: victim.public().to_peer_id(),
        stamp: u64::MAX / 2,
        addresses: vec![address(66)],
        zone: None,
        version: 1,
        load: None,
    };
    let mut believe = |signed: SignedCard| {
        node.receive(now, PeerId::random(), Message { cards: vec![signed], ..Message::default() });
        node.card(&card.peer).is_some()
    };
    assert!(!believe(card.sign(&thief)), "signed by another");
    let mut changed = card.sign(&victim);
    let mut bytes = changed.card.to_vec();
    bytes[40] ^= 1;
    changed.card = bytes.into();
    assert!(!believe(changed), "changed since");
    let loopback = Card { addresses: vec!["127.0.0.1:5001".parse().unwrap()], ..card.clone() };
    assert!(!believe(loopback.sign(&victim)), "an address that is none here");
    assert!(believe(card.sign(&victim)));
    assert_eq!(node.take_refused(), 3);
}

#[test]
fn sums_spare_what_is_on_its_way() {
    let mut pair = Pair::new();
    pair.pass(60);
    let (now, from) = (pair.now, pair.a.unix(pair.now) - 30_000);
    assert_eq!(pair.a.list.sum(now, from), pair.b.list.sum(now, from));
    let young = Keypair::generate_ed25519();
    let card = Card { peer: young.public().to_peer_id(), stamp: pair.a.unix(now), ..own_card(&pair.a) };
    pair.a.receive(now, PeerId::random(), Message { cards: vec![card.sign(&young)], ..Message::default() });
    assert_eq!(pair.a.list.sum(now, from), pair.b.list.sum(now, from), "a card of just now");
    assert_ne!(pair.a.list.sum(now, 0), pair.b.list.sum(now, 0));
    pair.talk();
    pair.pass(60);
    let (now, from) = (pair.now, pair.a.unix(pair.now) - 30_000);
    assert_eq!(pair.b.list.len(), 3);
    pair.b.list.bury(now, Tag::of(&Position::of_peer(&card.peer)), card.stamp);
    assert_eq!(pair.a.list.sum(now, from), pair.b.list.sum(now, from), "a death of just now");
    let later = now + ON_ITS_WAY;
    assert_ne!(pair.a.list.sum(later, from), pair.b.list.sum(later, from));
    assert_eq!(pair.a.list.parts(now, from).len(), PARTS);
}

#[test]
fn a_node_that_restarts_behind_its_own_past_overtakes_it() {
    let now = Instant::now();
    let keypair = Keypair::generate_ed25519();
    let mut node = node(&keypair, 1, now);
    let past =
        Card { stamp: node.card(&node.local).unwrap().stamp + 5_000_000, ..node.card(&node.local).unwrap().clone() };
    node.receive(now, PeerId::random(), Message { cards: vec![past.sign(&keypair)], ..Message::default() });
    assert!(node.card(&node.local).unwrap().stamp > past.stamp);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = Message::read(&bytes) {
            let mut node = Membership::new(
                PeerId::random(), Own::default(), scope(), Box::new(NoSigner::default()), 1, (Instant::now(), SystemTime::now()),
            );
            node.connected(Instant::now(), PeerId::random());
            node.receive(Instant::now(), PeerId::random(), message);
        }
    }

    #[test]
    fn cards_survive_the_wire(stamp: u64, zone in "[a-z]{0,63}", load in proptest::option::of(0..=100_u8)) {
        let keypair = Keypair::generate_ed25519();
        let card = Card {
            peer: keypair.public().to_peer_id(),
            stamp,
            addresses: vec![address(1), "[fd00::1]:7".parse().unwrap()],
            zone: Some(zone).filter(|zone| !zone.is_empty()),
            version: 3,
            load,
        };
        prop_assert_eq!(Card::read(&card.sign(&keypair), &scope()), Some(card));
    }
}

#[test]
fn a_death_that_was_noticed_is_told_to_some_at_once() {
    let mut pair = Pair::new();
    let b = pair.b.local;
    let others: Vec<PeerId> = (0..20).map(|_| PeerId::random()).collect();
    others.iter().for_each(|other| pair.a.connected(pair.now, *other));
    pair.pass(60);
    let name = Tag::of(&Position::of_peer(&b)).news(pair.a.card(&b).unwrap().stamp, true);
    pair.a.disconnected(pair.now, &b);
    pair.a.failed(pair.now, &b);
    sent(&mut pair.a);
    for told in 1..=usize::from(FIRST_HAND) {
        pair.now += TICK;
        pair.a.tick(pair.now);
        let news = sent(&mut pair.a).iter().filter(|(_, message)| message.news.contains(&name.0)).count();
        assert_eq!(news, 1, "tick {told}");
    }
    pair.now += TICK;
    pair.a.tick(pair.now);
    assert!(sent(&mut pair.a).iter().all(|(_, message)| message.news.is_empty()), "and then in rounds");
}
