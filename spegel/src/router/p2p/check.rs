//! What must hold for any bytes that a peer sends to this room; panics where it does not. For the fuzz targets.

use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use futures::executor::block_on;
use libp2p::{Multiaddr, PeerId};

use super::addresses::{MAX_ADDRESSES, Scope};
use super::members::{Action, Card, MAX_KEYS, Membership, Message, Own, Signer, ids};
use super::wire::{MAX_MESSAGE, read_message};

/// The largest message of the member protocol that is read.
const MAX_MEMBERS_MESSAGE: usize = 1 << 20;

/// How many messages one node of the check is sent until it is made anew.
const MESSAGES: u32 = 1_000;

/// A message of kad, with its length before it.
pub(crate) fn check_kad(bytes: &[u8]) {
    let mut stream = bytes;
    let Ok(message) = block_on(read_message(&mut stream)) else { return };
    let mut written = Vec::new();
    message.frame(&mut written);
    assert!(written.len() <= MAX_MESSAGE + 4);
    assert_eq!(block_on(read_message(&mut written.as_slice())).ok(), Some(message.clone()));
    for peer in message.closer_peers.iter().chain(&message.provider_peers) {
        let addresses: Vec<_> = peer.addrs.iter().filter_map(|bytes| Multiaddr::try_from(bytes.clone()).ok()).collect();
        check_addresses(&scope().filter(&addresses));
    }
}

/// A message of the member protocol, to a node that takes every signature for good.
pub(crate) fn check_members(bytes: &[u8]) {
    let Ok(message) = Message::read(&bytes[..bytes.len().min(MAX_MEMBERS_MESSAGE)]) else { return };
    if let Some(offer) = &message.offer {
        check_addresses(&offer.addresses(&scope()));
        assert!(ids(&offer.keys).count() <= MAX_KEYS);
    }
    NODE.with_borrow_mut(|node| {
        if node.as_ref().is_none_or(|node| node.messages >= MESSAGES) {
            *node = Some(Node::new());
        }
        if let Some(node) = node {
            node.receive(message);
        }
    });
}

fn scope() -> Scope {
    Scope::of_listeners(&[SocketAddr::from((Ipv4Addr::UNSPECIFIED, 5001))])
}

fn check_addresses(addresses: &[SocketAddr]) {
    assert!(addresses.len() <= MAX_ADDRESSES);
    assert!(addresses.iter().all(|address| scope().accepts(*address)), "{addresses:?}");
}

thread_local! {
    static NODE: RefCell<Option<Node>> = const { RefCell::new(None) };
}

/// Takes every signature for good: a peer may sign for as many identities as it makes.
struct Believer;

impl Signer for Believer {
    fn sign(&self, _: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn verify(&self, _: &PeerId, _: &[u8], _: &[u8]) -> bool {
        true
    }
}

/// A node with one neighbour, which says whatever it likes.
struct Node {
    membership: Membership,
    neighbour: PeerId,
    now: Instant,
    messages: u32,
}

// === impl Node ===

impl Node {
    fn new() -> Self {
        let now = Instant::now();
        let own = Own { addresses: vec![([10, 0, 0, 1], 5001).into()], zone: None, load: None };
        let clock = (now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let mut membership = Membership::new(PeerId::random(), own, scope(), Box::new(Believer), 1, clock);
        let neighbour = PeerId::random();
        membership.connected(now, neighbour);
        Self { membership, neighbour, now, messages: 0 }
    }

    fn receive(&mut self, message: Message) {
        self.messages += 1;
        self.now += Duration::from_millis(100);
        self.membership.receive(self.now, self.neighbour, message);
        self.membership.tick(self.now);
        let mut actions = 0;
        while let Some(action) = self.membership.next_action() {
            actions += 1;
            assert!(actions < 10_000, "one message makes no end of work");
            if let Action::Send(_, message) = action {
                assert!(prost::Message::encoded_len(&message) <= MAX_MESSAGE);
            }
        }
        for Card { addresses, zone, load, .. } in self.membership.others() {
            check_addresses(addresses);
            assert!(zone.as_ref().is_none_or(|zone| zone.len() <= 63) && load.is_none_or(|load| load <= 100));
        }
    }
}
