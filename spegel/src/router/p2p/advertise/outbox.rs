//! What is planned to be told and not sent yet: one message stream a peer at a time, so that one that hangs holds up nobody else, and
//! not many at once.

use std::collections::{BTreeMap, BTreeSet};

use libp2p::PeerId;

use super::offers::{Plan, Told};

/// How many peers are told something at once. Those that have to be dialled take a handshake each.
const MAX_SENDING: usize = 64;

/// The peers that wait to be told something, and those that are being told.
#[derive(Debug, Default)]
pub(in super::super) struct Outbox {
    waiting: BTreeMap<PeerId, Told>,
    sending: BTreeSet<PeerId>,
    /// Those that did not hear everything, to be tried again.
    failed: BTreeSet<PeerId>,
}

// === impl Outbox ===

impl Outbox {
    pub(in super::super) fn add(&mut self, plan: Plan) {
        for (peer, told) in plan {
            match self.waiting.get_mut(&peer) {
                Some(before) => before.add(told),
                None => {
                    self.waiting.insert(peer, told);
                }
            }
        }
    }

    /// Who is to be told something now. Asked until it gives nobody.
    pub(in super::super) fn next(&mut self) -> Option<Told> {
        if self.sending.len() >= MAX_SENDING {
            return None;
        }
        let free = self.waiting.keys().find(|peer| !self.sending.contains(peer)).copied()?;
        self.sending.insert(free);
        self.waiting.remove(&free)
    }

    /// A peer was told, or could not be; in the latter case it is one of those to try again if there is a connection to it.
    pub(in super::super) fn done(&mut self, peer: PeerId, missed: bool) {
        self.sending.remove(&peer);
        if missed {
            self.failed.insert(peer);
        }
    }

    /// Those to be told anew what they are near to.
    pub(in super::super) fn take_failed(&mut self) -> BTreeSet<PeerId> {
        std::mem::take(&mut self.failed)
    }

    /// Whether all that was planned has been sent or is being sent.
    pub(in super::super) fn is_clear(&self) -> bool {
        self.waiting.keys().all(|peer| self.sending.contains(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::keys::ContentId;
    use super::super::super::table::Contact;
    use super::*;

    fn plan(peers: &[PeerId], hash: u8) -> Plan {
        let told = |peer: &PeerId| Told {
            contact: Contact::new(*peer, &[]),
            offered: vec![ContentId::from_hash([hash; 32])],
            withdrawn: vec![],
        };
        peers.iter().map(|peer| (*peer, told(peer))).collect()
    }

    #[test]
    fn each_peer_has_one_stream_and_there_are_not_many() {
        let peers: Vec<PeerId> = (0..MAX_SENDING + 5).map(|_| PeerId::random()).collect();
        let mut outbox = Outbox::default();
        outbox.add(plan(&peers, 1));
        let first: Vec<PeerId> = std::iter::from_fn(|| outbox.next()).map(|told| told.contact.peer()).collect();
        assert_eq!((first.len(), outbox.is_clear()), (MAX_SENDING, false));
        // More for one that is busy waits until it is not.
        outbox.add(plan(&first[..1], 2));
        outbox.add(plan(&first[..1], 3));
        (1..=5).for_each(|n| outbox.done(first[n], false));
        let rest: Vec<Told> = std::iter::from_fn(|| outbox.next()).collect();
        assert!(rest.len() == 5 && rest.iter().all(|told| told.contact.peer() != first[0]));
        assert!(outbox.is_clear(), "what waits for a busy peer holds up nothing");
        outbox.done(first[0], true);
        assert_eq!(outbox.next().map(|told| told.offered.len()), Some(2));
        assert_eq!(outbox.take_failed(), BTreeSet::from([first[0]]));
    }
}
