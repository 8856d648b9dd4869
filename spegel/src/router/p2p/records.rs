//! Provider records: what this node offers, and what others told it, as one of the nodes nearest to a key.

use std::borrow::Cow;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use libp2p::kad::store::{Error as StoreError, RecordStore};
use libp2p::kad::{ProviderRecord, Record, RecordKey};
use rand::Rng;
use rand::seq::{IteratorRandom as _, SliceRandom as _};

use super::addresses::multiaddr;
use super::holdings::Holdings;
use super::keys::ContentId;

/// How many providers of one key are told to one who asks: enough to choose from, in a message of a few kilobytes.
const MAX_TOLD: usize = 32;

/// Settings of a [`Records`].
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordLimits {
    /// How many records of others are kept. One costs 64 bytes at most.
    pub(super) foreign: usize,
    /// How long a record is valid from when it was told.
    pub(super) validity: Duration,
}

/// The records. Those of others are bounded in number and time: the oldest go first. Our own are neither.
pub(super) struct Records {
    local: PeerId,
    limits: RecordLimits,
    epoch: Instant,
    own: HashSet<ContentId>,
    own_addresses: Vec<SocketAddr>,
    foreign: Holdings,
    providers: Vec<Provider>,
    free: Vec<u32>,
    by_peer: HashMap<PeerId, u32>,
}

struct Provider {
    peer: PeerId,
    addresses: Arc<[SocketAddr]>,
    records: usize,
    /// Known to be dead: its records are not told, until it tells one again or they expire.
    gone: bool,
}

// === impl Records ===

impl Records {
    pub(super) fn new(local: PeerId, limits: RecordLimits, now: Instant) -> Self {
        Self {
            local,
            limits,
            epoch: now,
            own: HashSet::new(),
            own_addresses: Vec::new(),
            foreign: Holdings::new(),
            providers: Vec::new(),
            free: Vec::new(),
            by_peer: HashMap::new(),
        }
    }

    pub(super) fn set_own_addresses(&mut self, addresses: Vec<SocketAddr>) {
        self.own_addresses = addresses;
    }

    pub(super) fn own_addresses(&self) -> &[SocketAddr] {
        &self.own_addresses
    }

    pub(super) fn offer(&mut self, id: ContentId) {
        self.own.insert(id);
    }

    pub(super) fn withdraw(&mut self, id: &ContentId) {
        self.own.remove(id);
    }

    /// How many records of others are held.
    pub(super) fn foreign_count(&self) -> usize {
        self.foreign.len()
    }

    /// Reads what adding these will read.
    #[cfg(test)]
    pub(super) fn touch(&self, ids: &[ContentId]) -> u32 {
        self.foreign.touch(ids)
    }

    /// What the records of others take now, in bytes.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        let provider = size_of::<Provider>() + size_of::<(PeerId, u32)>() + 2 * size_of::<SocketAddr>();
        self.foreign.memory() + self.providers.len() * provider
    }

    /// Keeps what `peer` told about itself, and says of how many of the keys. One peer may fill half of the store at most; beyond that it
    /// is not heard.
    pub(super) fn add(
        &mut self,
        now: Instant,
        ids: impl IntoIterator<Item = ContentId>,
        peer: PeerId,
        addresses: &[SocketAddr],
    ) -> usize {
        if peer == self.local || addresses.is_empty() || self.limits.foreign == 0 {
            return 0;
        }
        let told = self.seconds(now);
        let mut ids = ids.into_iter();
        let Some(first) = ids.next() else { return 0 };
        // It stays valid: after each of them the peer has a record, and is not forgotten.
        let index = self.intern(peer, addresses);
        self.providers[index as usize].gone = false;
        std::iter::once(first).chain(ids).filter(|id| self.add_of(index, *id, told)).count()
    }

    fn add_of(&mut self, index: u32, id: ContentId, told: u32) -> bool {
        if self.foreign.renew(&id, index, told) {
            return true;
        }
        let provider = &mut self.providers[index as usize];
        if provider.records >= self.limits.foreign.div_ceil(2) {
            return false;
        }
        provider.records += 1;
        self.foreign.add(id, index, told);
        while self.foreign.len() > self.limits.foreign && self.remove_oldest() {}
        true
    }

    /// Others that offer `id`, in random order, not more than are told to one who asks.
    pub(super) fn others(&self, now: Instant, id: &ContentId, rng: &mut impl Rng) -> Vec<(PeerId, Arc<[SocketAddr]>)> {
        let oldest = self.oldest_valid(now);
        let valid = self.foreign.of(id).filter(|held| oldest.is_none_or(|oldest| held.told >= oldest));
        let alive = valid.map(|held| &self.providers[held.provider as usize]).filter(|provider| !provider.gone);
        let mut chosen = alive.choose_multiple(rng, MAX_TOLD);
        chosen.shuffle(rng);
        chosen.into_iter().map(|provider| (provider.peer, provider.addresses.clone())).collect()
    }

    pub(super) fn offers(&self, id: &ContentId) -> bool {
        self.own.contains(id)
    }

    /// Drops what has expired.
    pub(super) fn sweep(&mut self, now: Instant) {
        let Some(oldest) = self.oldest_valid(now) else { return };
        while self.foreign.oldest().is_some_and(|(_, held)| held.told < oldest) {
            self.remove_oldest();
        }
    }

    /// Drops what `peer` told about itself and has taken back.
    pub(super) fn withdrawn(&mut self, id: &ContentId, peer: &PeerId) {
        if let Some(index) = self.by_peer.get(peer) {
            self.remove(id, *index);
        }
    }

    /// Stops telling about a peer that is dead.
    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.set_gone(peer, true);
    }

    /// Tells about it again: it was not dead.
    pub(super) fn recall(&mut self, peer: &PeerId) {
        self.set_gone(peer, false);
    }

    fn set_gone(&mut self, peer: &PeerId, gone: bool) {
        if let Some(index) = self.by_peer.get(peer) {
            self.providers[*index as usize].gone = gone;
        }
    }

    fn seconds(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.epoch).as_secs()).unwrap_or(u32::MAX)
    }

    /// What was told before this has expired; `None` while the store is younger than a record's life.
    fn oldest_valid(&self, now: Instant) -> Option<u32> {
        let validity = u32::try_from(self.limits.validity.as_secs()).unwrap_or(u32::MAX);
        self.seconds(now).checked_sub(validity)
    }

    fn intern(&mut self, peer: PeerId, addresses: &[SocketAddr]) -> u32 {
        match self.by_peer.entry(peer) {
            Entry::Occupied(entry) => {
                let provider = &mut self.providers[*entry.get() as usize];
                if *provider.addresses != *addresses {
                    provider.addresses = addresses.into();
                }
                *entry.get()
            }
            Entry::Vacant(entry) => {
                let provider = Provider { peer, addresses: addresses.into(), records: 0, gone: false };
                let index = match self.free.pop() {
                    Some(index) => {
                        self.providers[index as usize] = provider;
                        index
                    }
                    None => {
                        self.providers.push(provider);
                        // The number of providers is bounded by that of the records.
                        u32::try_from(self.providers.len() - 1).unwrap_or(u32::MAX)
                    }
                };
                *entry.insert(index)
            }
        }
    }

    /// False if there is none.
    fn remove_oldest(&mut self) -> bool {
        let Some((id, held)) = self.foreign.oldest() else { return false };
        self.remove(&id, held.provider);
        true
    }

    fn remove(&mut self, id: &ContentId, index: u32) {
        if !self.foreign.remove(id, index) {
            return;
        }
        let provider = &mut self.providers[index as usize];
        provider.records -= 1;
        if provider.records == 0 {
            self.by_peer.remove(&provider.peer);
            provider.addresses = Arc::default();
            self.free.push(index);
        }
    }
}

/// The records as kad's behaviour uses them: it answers with them, and what it is told passes through our checks first.
#[derive(Clone)]
pub(super) struct SharedRecords(Arc<Mutex<Records>>);

// === impl SharedRecords ===

impl SharedRecords {
    pub(super) fn new(records: Records) -> Self {
        Self(Arc::new(Mutex::new(records)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RecordStore for SharedRecords {
    type RecordsIter<'a> = std::iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = std::iter::Empty<Cow<'a, ProviderRecord>>;

    /// No value records exist in this network.
    fn get(&self, _: &RecordKey) -> Option<Cow<'_, Record>> {
        None
    }

    fn put(&mut self, _: Record) -> Result<(), StoreError> {
        Err(StoreError::ValueTooLarge)
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        std::iter::empty()
    }

    /// Never used: inserts are filtered, and the driver adds what passes.
    fn add_provider(&mut self, _: ProviderRecord) -> Result<(), StoreError> {
        Err(StoreError::MaxProvidedKeys)
    }

    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let Some(id) = ContentId::from_multihash(key.as_ref()) else { return Vec::new() };
        let records = self.lock();
        let record = |peer, addresses: &[SocketAddr]| {
            ProviderRecord::new(key.clone(), peer, addresses.iter().copied().map(multiaddr).collect())
        };
        let others = records.others(Instant::now(), &id, &mut rand::rng());
        let mut told: Vec<_> = others.iter().map(|(peer, addresses)| record(*peer, addresses)).collect();
        // Without addresses kad would fill in every listener's, loopback included.
        if records.offers(&id) && !records.own_addresses.is_empty() {
            let place = rand::random_range(0..=told.len());
            told.insert(place, record(records.local, &records.own_addresses));
        }
        told
    }

    /// Our own are advertised by the `advertise` module, not by kad.
    fn provided(&self) -> Self::ProvidedIter<'_> {
        std::iter::empty()
    }

    fn remove_provider(&mut self, _: &RecordKey, _: &PeerId) {}
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
