//! What must hold for any bytes that a peer, a bootstrap source or a file of the administrator holds; each panics where it does not.
//! For the fuzz targets.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use futures::executor::block_on;
use libp2p::PeerId;
use libp2p::identity::Keypair;
use prost::Message as _;

use super::addresses::Scope;
use super::identity::Identity;
use super::links;
use super::members::{self, Action, Membership, Message, Own, Signer};
use super::network_key::NetworkKey;
use super::search::contacts;
use super::wire;

/// Believes every signature, so that what is behind them is reached.
struct Credulous;

impl Signer for Credulous {
    fn sign(&self, _: &[u8]) -> Vec<u8> {
        vec![0; 64]
    }

    fn verify(&self, _: &PeerId, _: &[u8], _: &[u8]) -> bool {
        true
    }
}

fn scope() -> Scope {
    Scope::of_listeners(&[([0, 0, 0, 0], 5001).into()])
}

fn peer(secret: u8) -> PeerId {
    Keypair::ed25519_from_bytes([secret; 32]).expect("32 bytes are a key").public().to_peer_id()
}

/// Messages of the member protocol, one after the other, half a second apart.
pub(crate) fn member_messages(mut bytes: &[u8]) {
    let (local, from, mut now) = (peer(1), peer(2), Instant::now());
    let own = Own { addresses: vec![([10, 0, 0, 1], 5001).into()], ..Own::default() };
    let clock = (now, SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let mut node = Membership::new(local, own, scope(), Box::new(Credulous), 1, clock);
    node.connected(now, from);
    while let Ok(message) = Message::decode_length_delimited(&mut bytes) {
        if let Some(offer) = &message.offer {
            assert!(offer.addresses(&scope()).iter().all(|address| scope().accepts(*address)));
            assert!(members::ids(&offer.keys).count() <= members::MAX_KEYS);
        }
        node.receive(now, from, message);
        node.tick(now);
        now += members::TICK;
        while let Some(action) = node.next_action() {
            if let Action::Send(_, message) = action {
                let text = message.encode_to_vec();
                assert!(text.len() <= links::MAX_MESSAGE, "a message of {} bytes", text.len());
                assert_eq!(Message::read(&text).as_ref(), Ok(&message));
            }
        }
    }
    assert!(node.card(&local).is_some(), "it has lost itself");
    for card in node.take_changes().into_values().flatten() {
        assert!(!card.contact.addresses().is_empty());
        assert!(card.contact.addresses().iter().all(|address| scope().accepts(*address)));
    }
}

/// A message of Kademlia with its length before it.
pub(crate) fn kad_message(mut bytes: &[u8]) {
    let Ok(message) = block_on(wire::read_message(&mut bytes)) else { return };
    for contact in contacts(&scope(), &message.provider_peers).iter().chain(&contacts(&scope(), &message.closer_peers))
    {
        assert!(!contact.addresses().is_empty());
        assert!(contact.addresses().iter().all(|address| scope().accepts(*address)));
    }
    let mut again = Vec::new();
    message.frame(&mut again);
    assert_eq!(block_on(wire::read_message(&mut again.as_slice())).ok(), Some(message));
}

/// The file of a private network's key, and that of an identity.
pub(crate) fn key_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(key) = NetworkKey::parse(Path::new("key"), text) {
        assert!(!format!("{key:?}").is_empty());
    }
    if let Ok(identity) = Identity::parse(Path::new("key"), text) {
        let again = identity.to_pem().and_then(|text| Identity::parse(Path::new("key"), &text));
        assert_eq!(again.ok().map(|again| again.peer_id()), Some(identity.peer_id()));
    }
}
