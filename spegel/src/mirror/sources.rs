//! Who was found for a key a moment ago. The chunks of a blob, and the nodes' many connections, ask for the same within
//! seconds: they need not each search, and a search that comes late on a busy machine must not become a false miss.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::seq::SliceRandom as _;

use crate::oci::Key;
use crate::router::Peer;

/// How long peers are remembered for a key after the last of them was found or answered. A pull of many layers asks for the last of them long
/// after the manifest.
const LIFETIME: Duration = Duration::from_secs(60);
/// How many keys are remembered.
const KEYS: usize = 16 * 1024;
/// How many peers are remembered for each.
const PEERS: usize = 16;

/// The memory of peers by key.
#[derive(Debug, Default)]
pub(super) struct Sources {
    by_key: Mutex<HashMap<Key, (Vec<Peer>, Instant)>>,
}

impl Sources {
    /// A peer is said to have it, or gave it.
    pub(super) fn found(&self, key: &Key, peer: &Peer, now: Instant) {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if by_key.len() >= KEYS && !by_key.contains_key(key) {
            by_key.retain(|_, (_, since)| now.duration_since(*since) < LIFETIME);
            if by_key.len() >= KEYS {
                return;
            }
        }
        let (peers, since) = by_key.entry(key.clone()).or_insert_with(|| (Vec::new(), now));
        *since = now;
        if !peers.contains(peer) && peers.len() < PEERS {
            peers.push(peer.clone());
        }
    }

    /// Who has a manifest has what is beneath it: whoever was found for `parent` is found for its children.
    pub(super) fn inherit(&self, parent: &Key, children: impl Iterator<Item = Key>, now: Instant) {
        let peers = self.of(parent, |_| false, now);
        for child in children {
            peers.iter().for_each(|peer| self.found(&child, peer, now));
        }
    }

    /// The peer at this address failed to give it.
    pub(super) fn failed(&self, key: &Key, address: &SocketAddr) {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((peers, _)) = by_key.get_mut(key) {
            peers.retain(|known| !known.addresses.contains(address));
            if peers.is_empty() {
                by_key.remove(key);
            }
        }
    }

    /// The remembered peers in random order, so that they share the load, without those at `excluded` addresses.
    pub(super) fn of(&self, key: &Key, excluded: impl Fn(&SocketAddr) -> bool, now: Instant) -> Vec<Peer> {
        let by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((peers, since)) = by_key.get(key) else { return Vec::new() };
        if now.duration_since(*since) >= LIFETIME {
            return Vec::new();
        }
        let mut peers: Vec<Peer> = peers.iter().filter(|peer| !peer.addresses.iter().all(&excluded)).cloned().collect();
        peers.shuffle(&mut rand::rng());
        peers
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(n: u32) -> Key {
        Key::Digest(format!("sha256:{n:064x}").parse().unwrap())
    }

    fn peer(n: u32) -> Peer {
        Peer::new(n.to_string().into(), vec![SocketAddr::from((n.to_be_bytes(), 5000))])
    }

    fn ids(sources: &Sources, key: &Key, now: Instant) -> Vec<String> {
        let mut ids: Vec<_> = sources.of(key, |_| false, now).iter().map(|peer| peer.id.to_string()).collect();
        ids.sort();
        ids
    }

    #[test]
    fn peers_are_remembered_until_they_fail_or_time_passes() {
        let (sources, now) = (Sources::default(), Instant::now());
        sources.found(&key(1), &peer(1), now);
        sources.found(&key(1), &peer(2), now);
        sources.found(&key(1), &peer(2), now);
        assert_eq!(ids(&sources, &key(1), now), ["1", "2"]);
        assert_eq!(sources.of(&key(1), |address| *address == peer(1).addresses[0], now), [peer(2)]);
        sources.failed(&key(1), &peer(1).addresses[0]);
        assert_eq!(ids(&sources, &key(1), now), ["2"]);
        assert!(ids(&sources, &key(1), now + LIFETIME).is_empty());
        sources.failed(&key(1), &peer(2).addresses[0]);
        assert!(sources.by_key.lock().unwrap().is_empty());
    }

    #[test]
    fn who_has_a_manifest_is_asked_for_what_is_beneath_it() {
        let (sources, now) = (Sources::default(), Instant::now());
        sources.found(&key(1), &peer(1), now);
        sources.found(&key(1), &peer(2), now);
        sources.found(&key(3), &peer(3), now);
        sources.inherit(&key(1), [key(2), key(3)].into_iter(), now);
        assert_eq!(ids(&sources, &key(2), now), ["1", "2"]);
        assert_eq!(ids(&sources, &key(3), now), ["1", "2", "3"]);
    }

    #[test]
    fn memory_is_bounded() {
        let (sources, now) = (Sources::default(), Instant::now());
        for n in 0..2 * KEYS as u32 {
            sources.found(&key(n), &peer(1), now);
        }
        for n in 0..2 * PEERS as u32 {
            sources.found(&key(0), &peer(n), now);
        }
        assert_eq!(sources.by_key.lock().unwrap().len(), KEYS);
        assert_eq!(sources.of(&key(0), |_| false, now).len(), PEERS);
    }
}
