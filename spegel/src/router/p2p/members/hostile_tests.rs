//! What a hostile peer can make the member protocol do.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use libp2p::identity::Keypair;
use prost::Message as _;

use super::super::simulation::NoSigner;
use super::list::MAX_GONE;
use super::tests::{Pair, address, network, node, own_card, sent};
use super::*;

/// Counts how often a signature is looked at.
#[derive(Clone)]
struct Counting(Keypair, Arc<AtomicUsize>);

impl Signer for Counting {
    fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        Signer::sign(&self.0, bytes)
    }

    fn verify(&self, peer: &PeerId, bytes: &[u8], signature: &[u8]) -> bool {
        self.1.fetch_add(1, Ordering::Relaxed);
        Signer::verify(&self.0, peer, bytes, signature)
    }
}

fn counting(now: Instant) -> (Membership, Arc<AtomicUsize>) {
    let signer = Counting(Keypair::generate_ed25519(), Arc::default());
    let (peer, count) = (signer.0.public().to_peer_id(), signer.1.clone());
    let own = Own { addresses: vec![address(1)], ..Own::default() };
    let clock = (now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    (Membership::new(peer, own, super::super::simulation::scope(), Box::new(signer), 1, clock), count)
}

fn card(peer: PeerId, stamp: u64) -> Card {
    Card { peer, stamp, addresses: vec![address(9)], zone: None, version: 1, load: None }
}

#[test]
fn what_a_peer_can_make_us_send_is_bounded() {
    let mut network = network(3, 120);
    let peer = network.any();
    let now = network.now;
    let node = network.nodes.get_mut(&peer).unwrap().membership.as_mut().unwrap();
    let all: Vec<u32> = node.list.members().map(|card| card.news().0).collect();
    for asker in [*node.neighbours.keys().next().unwrap(), PeerId::random()] {
        let mut bytes = 0;
        for _ in 0..1_000 {
            node.receive(now, asker, Message { wanted: all.clone(), ..Message::default() });
            bytes += sent(node).iter().map(|(_, message)| message.encoded_len()).sum::<usize>();
        }
        assert!(bytes <= CARDS_BURST + CARDS_CHUNK, "{bytes} bytes");
    }
}

#[test]
fn what_a_peer_makes_up_is_bounded() {
    let now = Instant::now();
    let mut node = node(&Keypair::generate_ed25519(), 1, now);
    let mut wanted = 0;
    for batch in 0..20_u64 {
        let rumours = (0..5_000).map(|n| Rumour { tag: batch * 5_000 + n, stamp: 1, gone: n % 2 == 0 }).collect();
        let news = (0..5_000).map(|n| u32::try_from(batch * 5_000 + n).unwrap()).collect();
        node.receive(now, PeerId::random(), Message { rumours, news, ..Message::default() });
        wanted += sent(&mut node).iter().map(|(_, message)| message.wanted.len()).sum::<usize>();
    }
    let gone = (0..100_000).filter(|tag| node.list.gone(Tag(*tag)).is_some()).count();
    assert!(gone <= MAX_GONE && node.asked.len() <= MAX_ASKED && wanted * NEWS_SIZE <= NEWS_BURST);
    assert!(!node.news.is_hot() || node.news.tell(&BTreeSet::new()).len() <= 1, "and none of it is passed on");
}

/// Whoever lies about a member again and again makes it defend itself now and then, and not each time.
#[test]
fn lies_are_answered_in_measure() {
    let mut pair = Pair::new();
    let (first, mut answers) = (own_card(&pair.b).stamp, 0);
    for _ in 0..60 {
        let before = own_card(&pair.b).stamp;
        let lie = Rumour { tag: pair.b.own_tag.0, stamp: before, gone: true };
        pair.b.receive(pair.now, PeerId::random(), Message { rumours: vec![lie], ..Message::default() });
        pair.pass(1);
        answers += usize::from(own_card(&pair.b).stamp > before);
    }
    assert!(own_card(&pair.b).stamp > first && (2..=13).contains(&answers), "{answers} answers");
}

#[test]
fn what_is_asked_for_a_thousand_times_is_told_once() {
    let mut pair = Pair::new();
    let (b, now) = (pair.b.local, pair.now);
    let tag = Tag::of(&Position::of_peer(&b));
    let stamp = pair.a.card(&b).unwrap().stamp;
    let ask = |pair: &mut Pair, name: NewsId| {
        let wanted = vec![name.0; 200_000];
        pair.a.receive(now, PeerId::random(), Message { wanted, ..Message::default() });
        let told = sent(&mut pair.a);
        (
            told.iter().map(|(_, m)| m.cards.len()).sum::<usize>(),
            told.iter().map(|(_, m)| m.rumours.len()).sum::<usize>(),
        )
    };
    assert_eq!(ask(&mut pair, tag.news(stamp, false)), (1, 0));
    pair.a.disconnected(now, &b);
    pair.a.failed(now, &b);
    assert_eq!(ask(&mut pair, tag.news(stamp, true)), (0, 1));
}

#[test]
fn those_who_are_gone_are_told_in_measure() {
    let now = Instant::now();
    let mut node = node(&Keypair::generate_ed25519(), 1, now);
    let rumours = (0..4_000).map(|tag| Rumour { tag, stamp: 1, gone: true }).collect();
    node.receive(now, PeerId::random(), Message { rumours, ..Message::default() });
    sent(&mut node);
    let wanted: Vec<u32> = (0..4_000).map(|tag| Tag(tag).news(1, true).0).collect();
    let (asker, mut told) = (PeerId::random(), 0);
    for _ in 0..100 {
        node.receive(now, asker, Message { wanted: wanted.clone(), ..Message::default() });
        told += sent(&mut node).iter().map(|(_, message)| message.rumours.len()).sum::<usize>();
    }
    assert!(told >= 4_000 && told * RUMOUR_SIZE <= CARDS_BURST, "{told} told");
}

#[test]
fn a_lie_that_is_said_a_thousand_times_is_passed_on_once() {
    let mut pair = Pair::new();
    let b = pair.b.local;
    let lie = Rumour { tag: Tag::of(&Position::of_peer(&b)).0, stamp: pair.a.card(&b).unwrap().stamp, gone: true };
    let older = Rumour { stamp: lie.stamp - 1, ..lie };
    let rumours = (0..10_000).map(|n| if n % 2 == 0 { lie } else { older }).collect();
    pair.a.receive(pair.now, PeerId::random(), Message { rumours, ..Message::default() });
    let told = sent(&mut pair.a);
    assert_eq!(
        told.iter().map(|(to, message)| (*to, message.rumours.as_slice())).collect::<Vec<_>>(),
        [(b, &[lie][..])]
    );
}

/// Looking at a signature takes fifty microseconds, in which nothing else happens.
#[test]
fn a_known_card_is_not_looked_at_again_nor_what_comes_after_a_forged_one() {
    let now = Instant::now();
    let (mut node, count) = counting(now);
    let (member, thief) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let peer = member.public().to_peer_id();
    let mut hear = |cards: Vec<SignedCard>| {
        node.receive(now, PeerId::random(), Message { cards, ..Message::default() });
        (count.swap(0, Ordering::Relaxed), node.card(&peer).map(|card| card.stamp), node.take_refused())
    };
    assert_eq!(hear(vec![card(peer, 5).sign(&member); 1_000]), (1, Some(5), 0));
    assert_eq!(hear(vec![card(peer, 4).sign(&thief); 1_000]), (0, Some(5), 0), "it is old, whoever signed it");
    let mut cards = vec![card(peer, 6).sign(&thief); 1_000];
    cards.push(card(peer, 6).sign(&member));
    assert_eq!(hear(cards), (1, Some(5), 1));
    let nowhere = Card { addresses: vec!["127.0.0.1:1".parse().unwrap()], ..card(peer, 7) };
    assert_eq!(hear(vec![nowhere.sign(&member), card(peer, 6).sign(&member)]), (1, Some(6), 1), "not forged");
}

#[test]
fn cards_that_a_peer_makes_up_are_heard_in_measure() {
    let now = Instant::now();
    let own = Own { addresses: vec![address(1)], ..Own::default() };
    let clock = (now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let signer = NoSigner::default();
    let local = PeerId::random();
    let mut node = Membership::new(local, own, super::super::simulation::scope(), Box::new(signer.clone()), 1, clock);
    // Newer and newer ones of few members, so that it is not the length of the list that bounds them.
    let (hostile, peers) = (PeerId::random(), [PeerId::random(), PeerId::random()]);
    let mut taken = 0;
    for stamp in 0..50_000_u64 {
        let peer = peers[usize::from(stamp.is_multiple_of(2))];
        node.receive(
            now,
            hostile,
            Message { cards: vec![card(peer, 1_000_000 + stamp).sign(&signer)], ..Message::default() },
        );
        taken += node.take_changes().len();
    }
    let size = card(peers[0], 1_000_000).sign(&signer).size();
    assert!(taken * size <= HEARD_BURST && (taken + 1_000) * size > HEARD_BURST, "{taken} cards of {size} bytes");
    node.receive(now, PeerId::random(), Message { cards: vec![card(local, 1).sign(&signer)], ..Message::default() });
    node.receive(
        now,
        PeerId::random(),
        Message { cards: vec![card(PeerId::random(), 1).sign(&signer)], ..Message::default() },
    );
    assert_eq!(node.take_changes().len(), 1, "others are heard");
}

/// A member that starts anew, of whom it is said that it is gone at a time that has not come, or never will.
#[test]
fn a_lie_about_the_future_keeps_nobody_away() {
    for ahead in [Some(300_000), None] {
        let mut now = Instant::now();
        let (mut told, mut victim) =
            (node(&Keypair::generate_ed25519(), 1, now), node(&Keypair::generate_ed25519(), 2, now));
        let stamp = ahead.map_or(u64::MAX, |ahead| own_card(&victim).stamp + ahead);
        let lie = Rumour { tag: victim.own_tag.0, stamp, gone: true };
        let hear = |told: &mut Membership, now| {
            told.receive(now, PeerId::random(), Message { rumours: vec![lie], ..Message::default() });
        };
        hear(&mut told, now);
        let (one, two) = (told.local, victim.local);
        told.connected(now, two);
        victim.connected(now, one);
        for tick in 0..40 {
            if tick == 20 {
                hear(&mut told, now);
            }
            now += TICK;
            told.tick(now);
            victim.tick(now);
            for _ in 0..3 {
                for (_, message) in sent(&mut told) {
                    victim.receive(now, one, message);
                }
                for (_, message) in sent(&mut victim) {
                    told.receive(now, two, message);
                }
            }
        }
        assert!(told.card(&two).is_some(), "{ahead:?}");
        // Nor does it spoil its clock.
        victim.receive(now, one, Message { rumours: vec![Rumour { stamp: u64::MAX, ..lie }], ..Message::default() });
        now += DEFENCE_INTERVAL;
        victim.tick(now);
        assert!(own_card(&victim).stamp < u64::MAX / 2);
    }
}

#[test]
fn nobody_is_gone_later_than_is_known_of_it() {
    let mut pair = Pair::new();
    let (b, now) = (pair.b.local, pair.now);
    let known = pair.a.card(&b).unwrap().stamp;
    pair.a.parted(&b);
    let lie = Rumour { tag: Tag::of(&Position::of_peer(&b)).0, stamp: u64::MAX, gone: true };
    pair.a.receive(now, PeerId::random(), Message { rumours: vec![lie], ..Message::default() });
    assert_eq!(pair.a.list.gone(Tag(lie.tag)), Some(known), "so that its next card brings it back");
}
