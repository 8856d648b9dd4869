//! One simulated node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use libp2p::PeerId;
use libp2p::identity::Keypair;
use rand::Rng as _;
use rand::rngs::StdRng;

use super::super::addresses::Scope;
use super::super::advertise::{self, Offers, Outbox, Plan};
use super::super::members::{Believed, Card, Membership, Own, Read, SignedCard, Signer, Tag};
use super::super::records::{RecordLimits, Records};
use super::super::table::{Contact, REPLICAS, Table};
use super::{IDLE, Kind, contact_of};
use crate::router::P2pSettings;

/// Believes everything, and reads each card once for all nodes: signatures would take most of a simulation's time, and copies of the
/// list most of its memory.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct NoSigner(Arc<Mutex<BTreeMap<Bytes, Arc<Believed>>>>);

impl Signer for NoSigner {
    fn sign(&self, _: &[u8]) -> Vec<u8> {
        vec![0; 64]
    }

    fn verify(&self, _: &PeerId, _: &[u8], _: &[u8]) -> bool {
        true
    }

    fn read(&self, signed: SignedCard, scope: &Scope, _: &dyn Fn(Tag, u64) -> bool) -> Read {
        let mut read = self.0.lock().unwrap();
        if let Some(known) = read.get(&signed.card) {
            return Read::Believed(Arc::clone(known));
        }
        let Some(card) = Card::read(&signed, scope) else { return Read::Unusable };
        let text = signed.card.clone();
        let believed = Arc::new(Believed::new(card, signed));
        read.insert(text, Arc::clone(&believed));
        Read::Believed(believed)
    }
}

pub(in super::super) fn scope() -> Scope {
    Scope::of_listeners(&["0.0.0.0:5001".parse().unwrap()])
}

/// Messages and bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

/// What a node sent, and for the member list also what it received.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) members: Count,
    pub(super) offers: Count,
}

pub(in super::super) struct Node {
    pub(super) contact: Contact,
    pub(in super::super) membership: Option<Membership>,
    /// As the daemon has it.
    pub(in super::super) table: Table,
    /// What kad answers from: the connected ones alone.
    pub(super) kad: Table,
    buckets: BTreeMap<usize, usize>,
    pub(super) records: Records,
    pub(super) offers: Offers,
    pub(super) outbox: Outbox,
    due: Option<usize>,
    /// Those with whom there is a connection that one of both keeps.
    pub(in super::super) connected: BTreeSet<PeerId>,
    /// Those with whom there is one for the moment, and when it was used.
    pub(super) recent: BTreeMap<PeerId, Instant>,
    pub(super) traffic: Traffic,
}

// === impl Count ===

impl Count {
    pub(super) fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes;
    }
}

// === impl Node ===

impl Node {
    pub(super) fn new(
        rng: &mut StdRng,
        number: u32,
        kind: Kind,
        signer: &NoSigner,
        clock: (Instant, SystemTime),
    ) -> Self {
        let mut secret = [0; 32];
        rng.fill(&mut secret);
        let peer = Keypair::ed25519_from_bytes(secret).unwrap().public().to_peer_id();
        let address = SocketAddr::from(((0x0a00_0000 + number).to_be_bytes(), 5001));
        let own = Own { addresses: vec![address], zone: Some("zone-a".into()), load: None, storms: false };
        let seed = rng.random();
        let membership =
            (kind == Kind::Member).then(|| Membership::new(peer, own, scope(), Box::new(signer.clone()), seed, clock));
        let limits = RecordLimits {
            foreign: P2pSettings::MAX_RECORDS,
            validity: P2pSettings::ADVERTISE_TTL + Duration::from_secs(240),
        };
        Self {
            contact: contact_of(peer, address),
            membership,
            table: Table::default(),
            kad: Table::default(),
            buckets: BTreeMap::new(),
            records: Records::new(peer, limits, clock.0),
            offers: Offers::default(),
            outbox: Outbox::default(),
            due: None,
            connected: BTreeSet::new(),
            recent: BTreeMap::new(),
            traffic: Traffic::default(),
        }
    }

    /// Whether a connection for the moment is still open.
    pub(super) fn is_recent(&self, now: Instant, peer: &PeerId) -> bool {
        self.recent.get(peer).is_some_and(|used| now.duration_since(*used) < IDLE)
    }

    pub(super) fn kind(&self) -> Kind {
        if self.membership.is_some() { Kind::Member } else { Kind::Plain }
    }

    pub(super) fn in_bucket(&self, bucket: usize) -> usize {
        self.buckets.get(&bucket).copied().unwrap_or(0)
    }

    /// True if it was not there and there is room for it.
    pub(super) fn take_in(&mut self, contact: Contact) -> bool {
        let bucket = self.contact.position().common_bits(contact.position());
        if self.in_bucket(bucket) >= REPLICAS || self.kad.contains(&contact.peer()) {
            return false;
        }
        *self.buckets.entry(bucket).or_default() += 1;
        self.kad.insert(contact.clone());
        self.table.insert(contact)
    }

    /// A connection ended, and calling again failed.
    pub(super) fn lose(&mut self, now: Instant, peer: &PeerId) {
        self.connected.remove(peer);
        if let Some(contact) = self.kad.remove(peer) {
            let bucket = self.contact.position().common_bits(contact.position());
            *self.buckets.entry(bucket).or_default() -= 1;
        }
        self.table.remove(peer);
        self.records.forget(peer);
        if let Some(membership) = &mut self.membership {
            membership.disconnected(now, peer);
            membership.failed(now, peer);
        }
    }

    pub(super) fn round(&mut self) {
        for peer in self.outbox.take_failed() {
            self.offers.newcomer(peer);
        }
        self.due = Some(advertise::pace(P2pSettings::ADVERTISE_TTL).1);
    }

    /// As the advertiser's loop. A node that has no member list walks to those nearest to each key, and `everyone` is what it finds.
    pub(super) fn plan(&mut self, everyone: &Table) {
        while self.due.is_some() || (self.outbox.is_clear() && !self.offers.is_idle()) {
            let mut batch = self.offers.take(self.due.take(), &self.table);
            let mut plan = Plan::new();
            while !batch.is_empty() {
                batch.place(if self.membership.is_some() { &self.table } else { everyone }, &mut plan);
            }
            // It does not tell itself.
            plan.remove(&self.contact.peer());
            self.outbox.add(plan);
        }
    }

    pub(super) fn take_changes(&mut self, content: bool) {
        let Some(membership) = &mut self.membership else { return };
        let changes = membership.take_changes();
        if !content {
            return;
        }
        for (peer, change) in changes {
            if let Some(card) = change {
                if !self.table.is_member(&peer) {
                    self.records.recall(&peer);
                }
                self.table.set_member(card.contact.clone(), Arc::clone(&card.traits));
            } else {
                self.table.remove_member(&peer);
                self.records.forget(&peer);
            }
        }
    }

    /// What the daemon keeps for others, in bytes: records, members, tables.
    pub(super) fn memory(&self) -> usize {
        let entry = size_of::<(super::Position, [Option<Contact>; 3])>() * 3 / 2;
        let contact = size_of::<PeerId>() + 32 + 16 + 2 * size_of::<SocketAddr>();
        // A card beside its text, its signature, its names in two maps, and the form shown to the rooms above.
        let member = 2 * contact + size_of::<Card>() + 64 + 100 + 2 * 64 + 200;
        self.records.memory()
            + self.table.members() * (entry + member)
            + self.table.connected() * (entry + contact)
            + self.offers.memory()
    }
}
