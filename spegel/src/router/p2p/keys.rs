//! Keys as the network knows them, and where they and the peers lie in its key space.

use std::ops::RangeInclusive;

use libp2p::PeerId;
use sha2::{Digest as _, Sha256};

use crate::oci::Key;

/// What stands before the hash in a sha2-256 multihash: its code and its length.
const MULTIHASH_PREFIX: [u8; 2] = [0x12, 0x20];

/// The SHA-256 of a key's text. Its multihash is what CIDv1(raw, sha2-256) of that text holds, and so the key of the
/// provider records that the Go program writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ContentId([u8; 32]);

/// A place in the key space, in which distance is the exclusive or. In four numbers, the first the most significant: comparing is what a
/// table does most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Position([u64; 4]);

/// How far two positions are from each other; the smaller the nearer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Distance([u64; 4]);

// === impl ContentId ===

impl ContentId {
    pub(super) fn of(key: &Key) -> Self {
        Self(key.sha256())
    }

    /// The id in a record's key; other kinds of keys are not of this network.
    pub(super) fn from_multihash(bytes: &[u8]) -> Option<Self> {
        bytes.strip_prefix(&MULTIHASH_PREFIX)?.try_into().ok().map(Self)
    }

    /// The hash alone.
    pub(super) fn hash(&self) -> &[u8; 32] {
        &self.0
    }

    pub(super) fn from_hash(hash: [u8; 32]) -> Self {
        Self(hash)
    }

    pub(super) fn multihash(&self) -> [u8; 34] {
        let mut bytes = [0; 34];
        bytes[..2].copy_from_slice(&MULTIHASH_PREFIX);
        bytes[2..].copy_from_slice(&self.0);
        bytes
    }

    pub(super) fn position(&self) -> Position {
        Position::of(&self.multihash())
    }
}

// === impl Position ===

impl Position {
    pub(super) fn of_peer(peer: &PeerId) -> Self {
        Self::of(&peer.to_bytes())
    }

    fn of(bytes: &[u8]) -> Self {
        let hash: [u8; 32] = Sha256::digest(bytes).into();
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(hash.as_chunks::<8>().0) {
            *word = u64::from_be_bytes(*bytes);
        }
        Self(words)
    }

    /// The first of those that begin with these eight bytes.
    pub(super) fn with_prefix(prefix: u64) -> Self {
        Self([prefix, 0, 0, 0])
    }

    /// Its first eight bytes.
    pub(super) fn prefix(&self) -> u64 {
        self.0[0]
    }

    pub(super) fn distance(&self, other: &Self) -> Distance {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        Distance([a ^ e, b ^ f, c ^ g, d ^ h])
    }

    /// How many bits both begin with alike: 256 if they are the same.
    pub(super) fn common_bits(&self, other: &Self) -> usize {
        let differing = self.distance(other).0.into_iter().enumerate().find(|(_, word)| *word != 0);
        differing.map_or(256, |(at, word)| at * 64 + word.leading_zeros() as usize)
    }

    /// All positions that begin with the first `bits` bits of this one.
    pub(super) fn around(&self, bits: usize) -> RangeInclusive<Self> {
        let (mut low, mut high) = (self.0, self.0);
        if bits < 256 {
            let (at, rest) = (bits / 64, u64::MAX >> (bits % 64));
            low[at] &= !rest;
            high[at] |= rest;
            low[at + 1..].fill(0);
            high[at + 1..].fill(u64::MAX);
        }
        Self(low)..=Self(high)
    }

    /// All positions that begin with the first `bits` bits of this one and differ in the next. Every one of them is nearer than any
    /// that shares fewer bits. `bits` is less than 256.
    pub(super) fn branch(&self, bits: usize) -> RangeInclusive<Self> {
        let mut other = *self;
        other.0[bits / 64] ^= 1 << (63 - bits % 64);
        other.around(bits + 1)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use libp2p::kad::{KBucketKey, RecordKey};

    use super::*;

    fn id() -> ContentId {
        ContentId::of(&"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a".parse().unwrap())
    }

    /// The expected hash is `printf %s sha256:4413… | sha256sum`.
    #[test]
    fn record_key_is_the_multihash_of_the_text() {
        let bytes = id().multihash();
        let text = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        assert_eq!(bytes[..2], [0x12, 0x20]);
        assert_eq!(bytes[2..], Sha256::digest(text)[..]);
        assert_eq!(ContentId::from_multihash(&bytes), Some(id()));
    }

    #[test]
    fn other_keys_are_not_ours() {
        let bytes = id().multihash();
        assert_eq!(ContentId::from_multihash(&bytes[1..]), None);
        assert_eq!(ContentId::from_multihash(&bytes[..33]), None);
        assert_eq!(ContentId::from_multihash(&[&bytes[..], &[0]].concat()), None);
        assert_eq!(ContentId::from_multihash(b""), None);
    }

    #[test]
    fn branches_divide_the_key_space_by_distance() {
        let target = id().position();
        let (mut before, mut last) = (0, None);
        for bits in (0..256).rev() {
            let branch = target.branch(bits);
            for end in [branch.start(), branch.end()] {
                assert_eq!(target.common_bits(end), bits);
            }
            let mut ends = [branch.start(), branch.end()].map(|end| end.distance(&target));
            ends.sort();
            assert!(last.is_none_or(|last| last < ends[0]), "nearer than a branch before it");
            last = Some(ends[1]);
            before += 1;
        }
        assert_eq!((before, target.common_bits(&target)), (256, 256));
        assert_eq!(target.around(256), target..=target);
        assert_eq!(target.around(0), Position([0; 4])..=Position([u64::MAX; 4]));
    }

    #[test]
    fn distances_order_as_the_routing_table_orders() {
        let target = KBucketKey::new(RecordKey::new(&id().multihash()));
        let mut peers: Vec<PeerId> = (0..50).map(|_| PeerId::random()).collect();
        peers.sort_by_key(|peer| Position::of_peer(peer).distance(&id().position()));
        let theirs: Vec<_> = peers.iter().map(|peer| KBucketKey::from(*peer).distance(&target)).collect();
        assert!(theirs.is_sorted());
    }
}
