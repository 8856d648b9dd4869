//! Telling the peers nearest to each of our keys that we offer it: at once, again within its time to live, and to peers
//! that come later.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::keys::{ContentId, Position};
use super::members::{MAX_KEYS, Message};
use super::metrics::RouterMetrics;
use super::records::SharedRecords;
use super::table::{Contact, SharedTable};
use crate::store::Change;

/// How often a share of the keys is told again.
const TICK: Duration = Duration::from_secs(10);

/// How many keys are placed before other tasks get their turn.
const CHUNK: usize = 1024;

/// How many withdrawn keys wait to be told. More are left to expire.
const MAX_WITHDRAWN: usize = 100_000;

/// What we offer, and what of it the peers have yet to hear. In the order of the key space, so that neighbours, which are
/// told to the same peers, go together.
#[derive(Debug, Default)]
struct Offers {
    keys: BTreeMap<Position, ContentId>,
    fresh: BTreeSet<Position>,
    /// The last key that was told again in its turn.
    cursor: Option<Position>,
    newcomers: HashSet<PeerId>,
    /// What members are to be told that we offer no more.
    withdrawn: Vec<ContentId>,
    /// Since when something is fresh.
    fresh_since: Option<Instant>,
}

/// Advertises. Cheap to clone, and usable from any thread.
#[derive(Clone)]
pub(super) struct Advertiser {
    offers: Arc<Mutex<Offers>>,
    wake: Arc<Notify>,
    records: SharedRecords,
    table: SharedTable,
    client: Client,
    metrics: RouterMetrics,
}

/// For each peer what it is to be told.
type Plan = HashMap<PeerId, Told>;

struct Told {
    contact: Contact,
    offered: Vec<ContentId>,
    withdrawn: Vec<ContentId>,
}

// === impl Offers ===

impl Offers {
    fn add(&mut self, id: ContentId) {
        let position = id.position();
        if self.keys.insert(position, id).is_none() {
            self.fresh.insert(position);
            self.fresh_since.get_or_insert_with(Instant::now);
        }
    }

    fn remove(&mut self, id: &ContentId) {
        let position = id.position();
        let told = !self.fresh.remove(&position);
        if self.keys.remove(&position).is_some() && told && self.withdrawn.len() < MAX_WITHDRAWN {
            self.withdrawn.push(*id);
        }
    }

    fn take_fresh(&mut self) -> Vec<ContentId> {
        self.fresh_since = None;
        let fresh = std::mem::take(&mut self.fresh);
        fresh.iter().filter_map(|position| self.keys.get(position)).copied().collect()
    }

    /// The next keys in turn, so many that all had theirs after `rounds`.
    fn take_due(&mut self, rounds: usize) -> Vec<ContentId> {
        let count = self.keys.len().div_ceil(rounds.max(1));
        let start = self.cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.keys.range((start, Bound::Unbounded));
        let due: Vec<_> = behind.chain(self.keys.iter()).take(count).map(|(at, id)| (*at, *id)).collect();
        self.cursor = due.last().map(|(position, _)| *position);
        due.into_iter().map(|(_, id)| id).collect()
    }
}

// === impl Advertiser ===

impl Advertiser {
    pub(super) fn new(records: SharedRecords, table: SharedTable, client: Client, metrics: RouterMetrics) -> Self {
        Self { offers: Arc::default(), wake: Arc::default(), records, table, client, metrics }
    }

    /// Brings the figures of the queue up to date.
    pub(super) fn measure(&self) {
        let offers = self.offers();
        let figures = &self.metrics.0;
        figures.advertise_queue.set(i64::try_from(offers.fresh.len()).unwrap_or(i64::MAX));
        let age = offers.fresh_since.map_or(0, |since| since.elapsed().as_secs());
        figures.advertise_age.set(i64::try_from(age).unwrap_or(i64::MAX));
    }

    /// Takes over a change. Our own answers follow it at once, the peers soon.
    pub(super) fn change(&self, change: &Change) {
        let mut offers = self.offers();
        let mut records = self.records.lock();
        match change {
            Change::Added(keys) => {
                for id in keys.iter().map(ContentId::of) {
                    offers.add(id);
                    records.offer(id);
                }
            }
            Change::Removed(keys) => {
                for id in keys.iter().map(ContentId::of) {
                    offers.remove(&id);
                    records.withdraw(&id);
                }
            }
        }
        drop((offers, records));
        self.wake.notify_one();
    }

    /// Tells a peer that came, or that may have missed something, what it is to keep.
    pub(super) fn newcomer(&self, peer: PeerId) {
        self.offers().newcomers.insert(peer);
        self.wake.notify_one();
    }

    /// Tells everything again: our addresses changed.
    pub(super) fn tell_all(&self) {
        let mut offers = self.offers();
        offers.fresh = offers.keys.keys().copied().collect();
        drop(offers);
        self.wake.notify_one();
    }

    /// Advertises until cancelled. Every key is told again within four fifths of `ttl`.
    pub(super) async fn run(self, ttl: Duration, cancelled: CancellationToken) {
        let rounds = rounds(ttl);
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sending = Sending::default();
        loop {
            let due = tokio::select! {
                () = cancelled.cancelled() => return,
                () = self.wake.notified() => Vec::new(),
                Some(done) = sending.tasks.join_next() => {
                    if let Ok((peer, result)) = done {
                        self.sent(peer, result, &mut sending);
                    }
                    continue;
                }
                _ = tick.tick() => {
                    self.offers().newcomers.extend(sending.failed.drain());
                    self.offers().take_due(rounds)
                }
            };
            let plan = self.plan(due).await;
            self.send(plan, &mut sending);
        }
    }

    /// Who is to be told what now.
    async fn plan(&self, mut keys: Vec<ContentId>) -> Plan {
        let (newcomers, all, withdrawn) = {
            let mut offers = self.offers();
            keys.extend(offers.take_fresh());
            let mut withdrawn = std::mem::take(&mut offers.withdrawn);
            // What has come back since is not taken back.
            withdrawn.retain(|id| !offers.keys.contains_key(&id.position()));
            let newcomers = std::mem::take(&mut offers.newcomers);
            let all: Vec<ContentId> =
                if newcomers.is_empty() { vec![] } else { offers.keys.values().copied().collect() };
            (newcomers, all, withdrawn)
        };
        let mut plan = Plan::new();
        for chunk in keys.chunks(CHUNK) {
            self.place(chunk, &mut plan);
            tokio::task::yield_now().await;
        }
        for chunk in withdrawn.chunks(CHUNK) {
            self.place_withdrawn(chunk, &mut plan);
            tokio::task::yield_now().await;
        }
        for peer in newcomers {
            for chunk in all.chunks(CHUNK) {
                self.place_at(peer, chunk, &mut plan);
                tokio::task::yield_now().await;
            }
        }
        plan
    }

    fn place(&self, ids: &[ContentId], plan: &mut Plan) {
        let table = self.table.read();
        for id in ids {
            for contact in table.closest(&id.position()) {
                plan.entry(contact.peer).or_insert_with(|| Told::new(contact)).offered.push(*id);
            }
        }
    }

    /// Only members know how to take something back. Others forget it when it expires.
    fn place_withdrawn(&self, ids: &[ContentId], plan: &mut Plan) {
        let table = self.table.read();
        for id in ids {
            for contact in table.closest(&id.position()) {
                if table.is_member(&contact.peer) {
                    plan.entry(contact.peer).or_insert_with(|| Told::new(contact)).withdrawn.push(*id);
                }
            }
        }
    }

    /// A newcomer is told all that it is near to, which includes what is told to everyone just now.
    fn place_at(&self, peer: PeerId, ids: &[ContentId], plan: &mut Plan) {
        let table = self.table.read();
        let Some(contact) = table.get(&peer).cloned() else { return };
        let told = &mut plan.entry(peer).or_insert_with(|| Told::new(contact)).offered;
        let known: HashSet<ContentId> = told.iter().copied().collect();
        let near = |id: &&ContentId| !known.contains(id) && table.is_among_closest(&peer, &id.position());
        told.extend(ids.iter().filter(near));
    }

    fn send(&self, plan: Plan, sending: &mut Sending) {
        let own: Arc<[_]> = self.records.lock().own_addresses().into();
        for (peer, told) in plan {
            if (told.offered.is_empty() && told.withdrawn.is_empty()) || own.is_empty() {
                continue;
            }
            if !sending.busy.insert(peer) {
                sending.again.insert(peer);
                // What is taken back would not be said again as what is offered is.
                sending.miss(told);
                continue;
            }
            self.tell(told, own.clone(), sending);
        }
    }

    fn tell(&self, told: Told, own: Arc<[SocketAddr]>, sending: &mut Sending) {
        let (client, peer) = (self.client.clone(), told.contact.peer);
        let is_member = self.table.read().is_member(&peer);
        sending.tasks.spawn(async move { (peer, told.tell(&client, &own, is_member).await) });
    }

    fn sent(&self, peer: PeerId, result: io::Result<()>, sending: &mut Sending) {
        sending.busy.remove(&peer);
        let again = sending.again.remove(&peer);
        let missed = sending.missed.remove(&peer);
        match result {
            Ok(()) if again => {
                self.newcomer(peer);
                if let Some(told) = missed {
                    let own: Arc<[_]> = self.records.lock().own_addresses().into();
                    sending.busy.insert(peer);
                    self.tell(told, own, sending);
                }
            }
            Ok(()) => {}
            Err(error) => {
                tracing::debug!(%peer, %error, "could not be told what we offer; trying again");
                if self.table.read().contains(&peer) {
                    sending.failed.insert(peer);
                }
            }
        }
    }

    fn offers(&self) -> MutexGuard<'_, Offers> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Told ===

impl Told {
    fn new(contact: Contact) -> Self {
        Self { contact, offered: Vec::new(), withdrawn: Vec::new() }
    }

    /// In as few messages as the peer understands.
    async fn tell(self, client: &Client, own: &[SocketAddr], is_member: bool) -> io::Result<()> {
        if !is_member {
            return client.advertise(&self.contact, own, &self.offered).await;
        }
        let withdrawn = self.withdrawn.chunks(MAX_KEYS).map(Message::withdraw);
        let offered = self.offered.chunks(MAX_KEYS).map(|ids| Message::offer(own, ids));
        client.tell_member(&self.contact, &withdrawn.chain(offered).collect::<Vec<_>>()).await
    }
}

/// In how many shares the keys are told again.
fn rounds(ttl: Duration) -> usize {
    usize::try_from((ttl.as_secs() * 4 / 5) / TICK.as_secs()).unwrap_or(usize::MAX)
}

/// The shares, for the bench.
#[cfg(test)]
pub(super) fn bench_rounds(ids: &[ContentId], ttl: Duration) -> Vec<Vec<ContentId>> {
    let mut offers = Offers::default();
    ids.iter().for_each(|id| offers.add(*id));
    (0..rounds(ttl)).map(|_| offers.take_due(rounds(ttl))).collect()
}

/// One message stream a peer at a time, so that one that hangs holds up nobody else.
#[derive(Default)]
struct Sending {
    tasks: JoinSet<(PeerId, io::Result<()>)>,
    busy: HashSet<PeerId>,
    /// Those that missed something while they were busy.
    again: HashSet<PeerId>,
    /// What they are to be told that we offer no more. Each by itself: told to all again, it would multiply for as long as one hangs.
    missed: HashMap<PeerId, Told>,
    /// Those to try again at the next tick.
    failed: HashSet<PeerId>,
}

// === impl Sending ===

impl Sending {
    /// The peer is busy, and has to be told later what is withdrawn. What is too much is left to expire.
    fn miss(&mut self, told: Told) {
        let withdrawn = told.withdrawn;
        if withdrawn.is_empty() {
            return;
        }
        let missed = &mut self.missed.entry(told.contact.peer).or_insert_with(|| Told::new(told.contact)).withdrawn;
        missed.extend(withdrawn);
        missed.truncate(MAX_WITHDRAWN);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn id(n: u16) -> ContentId {
        ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
    }

    #[test]
    fn what_is_added_is_told_once_and_what_is_removed_is_not() {
        let mut offers = Offers::default();
        (0..3).for_each(|n| offers.add(id(n)));
        offers.remove(&id(1));
        assert_eq!(offers.take_fresh().into_iter().collect::<HashSet<_>>(), HashSet::from([id(0), id(2)]));
        offers.add(id(0));
        assert_eq!(offers.take_fresh(), []);
        offers.remove(&id(0));
        offers.add(id(0));
        assert_eq!(offers.take_fresh(), [id(0)]);
    }

    /// A peer that hangs for long: what it missed is kept once, and no more than so much of it.
    #[test]
    fn what_a_busy_peer_missed_is_bounded() {
        let contact = Contact { peer: PeerId::random(), addresses: vec![([10, 0, 0, 1], 5001).into()].into() };
        let mut sending = Sending::default();
        for n in 0..=MAX_WITHDRAWN / 1000 {
            let withdrawn = (0..1000).map(|m| id(u16::try_from(n % 60 * 1000 + m).unwrap_or_default())).collect();
            sending.miss(Told { contact: contact.clone(), offered: Vec::new(), withdrawn });
        }
        assert_eq!(sending.missed.len(), 1);
        assert_eq!(sending.missed[&contact.peer].withdrawn.len(), MAX_WITHDRAWN);
    }

    #[test]
    fn nothing_is_due_where_nothing_is_offered() {
        assert_eq!(Offers::default().take_due(10), []);
    }

    proptest! {
        #[test]
        fn every_key_has_its_turn(keys in 1..300u16, rounds in 1..100usize, more in 0..50u16) {
            let mut offers = Offers::default();
            (0..keys).for_each(|n| offers.add(id(n)));
            let mut told = HashSet::new();
            for round in 0..rounds {
                let due = offers.take_due(rounds);
                prop_assert!(due.len() <= (usize::from(keys + more)).div_ceil(rounds));
                told.extend(due);
                if round == rounds / 2 {
                    (0..more).for_each(|n| offers.add(id(10_000 + n)));
                }
            }
            // What came meanwhile was told as fresh, and may have taken some turns: they come next.
            while told.len() < usize::from(keys + more) {
                let before = told.len();
                let due = offers.take_due(1);
                told.extend(due);
                prop_assert!(told.len() > before);
            }
        }
    }
}
