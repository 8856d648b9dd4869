//! The messages of the member protocol, and a member's card.
//!
//! All messages go one way: each node writes to a stream of its own to each neighbour, framed as kad's messages are. Fields that a
//! later version adds are skipped by this one, which is what its number is for.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use libp2p::identity::{Keypair, PublicKey};
use libp2p::{Multiaddr, PeerId};
use prost::Message as _;

use super::super::addresses::{MAX_ADDRESSES, Scope, multiaddr};
use super::super::keys::{ContentId, Position};
use super::super::table::{Contact, Traits};

/// What this program speaks; who takes part in storms says so by the second.
pub(in super::super) const VERSION: u32 = 1;
pub(in super::super) const VERSION_WITH_STORMS: u32 = 2;

/// What a signature is over, before the card: it cannot be taken for a signature of anything else.
const CONTEXT: &[u8] = b"spegel/members/1 card:";

/// The largest zone name, in bytes: Kubernetes labels have at most 63.
const MAX_ZONE: usize = 63;

/// How many keys one message offers or withdraws.
pub(in super::super) const MAX_KEYS: usize = 2_000;

/// A member's short name in rumours: the first eight bytes of its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in super::super) struct Tag(pub(super) u64);

/// The name of one piece of news, in four bytes. Two with one name are taken for the same until lists are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct NewsId(pub(super) u32);

/// One message. What is absent is not said.
#[derive(Clone, PartialEq, prost::Message)]
pub(in super::super) struct Message {
    /// The names of what the sender has heard lately.
    #[prost(fixed32, repeated, tag = "1")]
    pub(super) news: Vec<u32>,
    /// The names of the news that the sender asks for.
    #[prost(fixed32, repeated, tag = "2")]
    pub(super) wanted: Vec<u32>,
    /// Cards, asked for or not.
    #[prost(message, repeated, tag = "3")]
    pub(super) cards: Vec<SignedCard>,
    /// That the cards are old news, for one who compared its list.
    #[prost(bool, tag = "4")]
    pub(super) old_news: bool,
    /// A sum over the sender's list: who has another compares.
    #[prost(message, optional, tag = "5")]
    pub(super) sum: Option<Sum>,
    /// The sums of the parts of the sender's list.
    #[prost(fixed32, repeated, tag = "6")]
    pub(super) parts: Vec<u32>,
    /// Parts of the sender's list, whole.
    #[prost(message, optional, tag = "7")]
    pub(super) compare: Option<Compare>,
    /// Content that the sender offers.
    #[prost(message, optional, tag = "8")]
    pub(in super::super) offer: Option<Offer>,
    /// Content that the sender offers no more: hashes of 32 bytes each.
    #[prost(bytes = "vec", tag = "9")]
    pub(in super::super) withdrawn: Vec<u8>,
    /// Who is said to be gone, and what a comparison found.
    #[prost(message, repeated, tag = "10")]
    pub(super) rumours: Vec<Rumour>,
    /// That the names of news are an answer to others, and need none.
    #[prost(bool, tag = "11")]
    pub(super) answer: bool,
}

/// A sum over a list, but for what is on its way just now.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Sum {
    #[prost(fixed64, tag = "1")]
    pub(super) value: u64,
    /// Cards that were made from then on, for a minute, do not count; from 0 on: all count. Milliseconds since 1970.
    #[prost(uint64, tag = "2")]
    pub(super) from: u64,
}

/// That there is a newer card, or that its member is gone.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Rumour {
    #[prost(fixed64, tag = "1")]
    pub(super) tag: u64,
    #[prost(uint64, tag = "2")]
    pub(super) stamp: u64,
    #[prost(bool, tag = "3")]
    pub(super) gone: bool,
}

/// All that the sender has in these parts.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Compare {
    #[prost(uint32, repeated, tag = "1")]
    pub(super) parts: Vec<u32>,
    #[prost(message, repeated, tag = "2")]
    pub(super) rumours: Vec<Rumour>,
}

/// Content ids, 32 bytes each, and where the sender says it is: one message where plain Kademlia takes one for each.
#[derive(Clone, PartialEq, prost::Message)]
pub(in super::super) struct Offer {
    #[prost(bytes = "vec", tag = "1")]
    pub(in super::super) keys: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(in super::super) addrs: Vec<Vec<u8>>,
}

/// A card as its member signed it. Others pass it on and cannot change it.
#[derive(Clone, PartialEq, prost::Message)]
pub(in super::super) struct SignedCard {
    #[prost(bytes = "bytes", tag = "1")]
    pub(in super::super) card: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) signature: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireCard {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(uint64, tag = "2")]
    stamp: u64,
    #[prost(bytes = "vec", repeated, tag = "3")]
    addrs: Vec<Vec<u8>>,
    #[prost(string, tag = "4")]
    zone: String,
    #[prost(uint32, tag = "5")]
    version: u32,
    /// One more than the percentage, so that 0 is not known.
    #[prost(uint32, tag = "6")]
    load: u32,
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Card {
    pub(in super::super) peer: PeerId,
    /// Newer cards have larger ones: milliseconds since 1970 when it was made.
    pub(in super::super) stamp: u64,
    /// Where its router listens.
    pub(in super::super) addresses: Vec<SocketAddr>,
    pub(in super::super) zone: Option<String>,
    pub(in super::super) version: u32,
    pub(in super::super) load: Option<u8>,
}

/// A card that its member has signed, and what others need of it.
#[derive(Debug)]
pub(in super::super) struct Believed {
    pub(in super::super) card: Card,
    pub(in super::super) contact: Contact,
    pub(in super::super) traits: Arc<Traits>,
    pub(super) tag: Tag,
    pub(super) signed: SignedCard,
}

/// Makes and reads cards: with signatures in the network, without in simulations.
pub(in super::super) trait Signer: Send {
    /// Signs the bytes.
    fn sign(&self, bytes: &[u8]) -> Vec<u8>;
    /// Whether the peer has signed the bytes.
    fn verify(&self, peer: &PeerId, bytes: &[u8], signature: &[u8]) -> bool;
    /// Reads a card. Its signature is looked at only if there is something new in it, by what `lacks` says of its member and its time:
    /// that takes more time than all else.
    fn read(&self, signed: SignedCard, scope: &Scope, lacks: &dyn Fn(Tag, u64) -> bool) -> Read {
        let Some(card) = Card::read(&signed, scope) else { return Read::Unusable };
        let tag = Tag::of(&Position::of_peer(&card.peer));
        if !lacks(tag, card.stamp) {
            Read::Known(tag.news(card.stamp, false))
        } else if self.verify(&card.peer, &signed.card, &signed.signature) {
            Read::Believed(Arc::new(Believed::new(card, signed)))
        } else {
            Read::Forged
        }
    }
}

/// What a card turned out to be.
#[derive(Debug)]
pub(in super::super) enum Read {
    Believed(Arc<Believed>),
    /// Nothing new, with the name of the news that it would be.
    Known(NewsId),
    /// Not readable, or without an address where its member could be.
    Unusable,
    /// Not signed by its member.
    Forged,
}

impl Signer for Keypair {
    fn sign(&self, bytes: &[u8]) -> Vec<u8> {
        // Ed25519 cannot fail to sign, and what is not signed is not believed.
        self.sign(&[CONTEXT, bytes].concat()).unwrap_or_default()
    }

    /// The key is in the identity, as it is for all Ed25519 keys; other kinds are not members.
    fn verify(&self, peer: &PeerId, bytes: &[u8], signature: &[u8]) -> bool {
        let key = PublicKey::try_decode_protobuf(peer.as_ref().digest());
        key.is_ok_and(|key| key.to_peer_id() == *peer && key.verify(&[CONTEXT, bytes].concat(), signature))
    }
}

// === impl Tag ===

impl Tag {
    pub(in super::super) fn of(position: &Position) -> Self {
        Self(position.prefix())
    }

    /// The name of the news that this member has a card of that time, or is gone.
    pub(super) fn news(self, stamp: u64, gone: bool) -> NewsId {
        // The lower half is the list's sum of parts.
        #[allow(clippy::cast_possible_truncation, reason = "half of it is meant")]
        NewsId((self.mixed(stamp) ^ u64::from(gone).wrapping_neg()) as u32)
    }

    /// A number for this card of this member in the sums of a list.
    pub(super) fn mixed(self, stamp: u64) -> u64 {
        mix(self.0 ^ mix(stamp))
    }

    /// Which of the 256 parts of a list it belongs to.
    pub(super) fn part(self) -> usize {
        usize::from(self.0.to_be_bytes()[0])
    }
}

/// The finalizer of splitmix64: every bit of the result depends on every bit of the number.
fn mix(mut n: u64) -> u64 {
    n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

// === impl Believed ===

impl Believed {
    pub(in super::super) fn new(card: Card, signed: SignedCard) -> Self {
        let contact = Contact::new(card.peer, &card.addresses);
        let storms = card.version >= VERSION_WITH_STORMS;
        let traits = Arc::new(Traits { zone: card.zone.as_deref().map(Arc::from), load: card.load, storms });
        Self { tag: Tag::of(contact.position()), card, contact, traits, signed }
    }

    /// The name of the news of this card.
    pub(super) fn news(&self) -> NewsId {
        self.tag.news(self.card.stamp, false)
    }
}

// === impl Card ===

impl Card {
    pub(in super::super) fn sign(&self, signer: &dyn Signer) -> SignedCard {
        let wire = WireCard {
            id: self.peer.to_bytes(),
            stamp: self.stamp,
            addrs: self.addresses.iter().map(|address| multiaddr(*address).to_vec()).collect(),
            zone: self.zone.clone().unwrap_or_default(),
            version: self.version,
            load: self.load.map_or(0, |load| u32::from(load) + 1),
        };
        let card = wire.encode_to_vec();
        SignedCard { signature: signer.sign(&card).into(), card: card.into() }
    }

    /// What a card says, with the believable ones of its addresses, if there are any. Whether its member signed it is not looked at.
    pub(in super::super) fn read(signed: &SignedCard, scope: &Scope) -> Option<Self> {
        let wire = WireCard::decode(&*signed.card).ok()?;
        let peer = PeerId::from_bytes(&wire.id).ok()?;
        if wire.zone.len() > MAX_ZONE || wire.addrs.len() > MAX_ADDRESSES {
            return None;
        }
        let addresses = addresses(scope, &wire.addrs);
        if addresses.is_empty() {
            return None;
        }
        Some(Self {
            peer,
            stamp: wire.stamp,
            addresses,
            zone: Some(wire.zone).filter(|zone| !zone.is_empty()),
            version: wire.version,
            load: wire.load.checked_sub(1).map(|load| u8::try_from(load.min(100)).unwrap_or(100)),
        })
    }
}

// === impl SignedCard ===

impl SignedCard {
    /// What it has in a message, in bytes.
    pub(super) fn size(&self) -> usize {
        self.card.len() + self.signature.len() + 8
    }
}

// === impl Message ===

impl Message {
    /// An offer of these keys; a longer list is cut.
    pub(in super::super) fn offer(own: &[SocketAddr], ids: &[ContentId]) -> Self {
        let keys = ids.iter().take(MAX_KEYS).flat_map(|id| *id.hash()).collect();
        let addrs = own.iter().map(|address| multiaddr(*address).to_vec()).collect();
        Self { offer: Some(Offer { keys, addrs }), ..Self::default() }
    }

    pub(in super::super) fn withdraw(ids: &[ContentId]) -> Self {
        Self { withdrawn: ids.iter().take(MAX_KEYS).flat_map(|id| *id.hash()).collect(), ..Self::default() }
    }

    /// Cards that nobody asked for.
    #[cfg(test)]
    pub(in super::super) fn cards(cards: Vec<SignedCard>) -> Self {
        Self { cards, ..Self::default() }
    }

    /// The message in a text of bytes, whatever they are.
    pub(in super::super) fn read(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        Self::decode(bytes)
    }

    /// What kind of message it is, for the figures: by the weightiest of what it says.
    pub(in super::super) fn kind(&self) -> &'static str {
        match self {
            _ if self.offer.is_some() => "offer",
            _ if !self.withdrawn.is_empty() => "withdraw",
            _ if !self.cards.is_empty() => "cards",
            _ if self.compare.is_some() => "compare",
            _ if !self.parts.is_empty() => "parts",
            _ if !self.rumours.is_empty() => "rumours",
            _ if !self.wanted.is_empty() => "want",
            _ if !self.news.is_empty() => "news",
            _ => "sum",
        }
    }
}

// === impl Offer ===

impl Offer {
    /// The believable addresses.
    pub(in super::super) fn addresses(&self, scope: &Scope) -> Vec<SocketAddr> {
        addresses(scope, &self.addrs)
    }
}

/// The whole ids in a text of hashes.
pub(in super::super) fn ids(hashes: &[u8]) -> impl Iterator<Item = ContentId> + '_ {
    hashes.as_chunks::<32>().0.iter().take(MAX_KEYS).map(|hash| ContentId::from_hash(*hash))
}

fn addresses(scope: &Scope, texts: &[Vec<u8>]) -> Vec<SocketAddr> {
    let parsed: Vec<Multiaddr> = texts.iter().filter_map(|bytes| Multiaddr::try_from(bytes.clone()).ok()).collect();
    scope.filter(&parsed)
}
