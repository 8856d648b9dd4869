//! Searches: the walks of this node, shared by all who look for the same key.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use libp2p::{Multiaddr, PeerId};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::addresses::{Scope, registries};
use super::client::Client;
use super::keys::{ContentId, Position};
use super::metrics::{Outcome, RouterMetrics};
use super::quest::{Answer, Quest, Step};
use super::records::SharedRecords;
use super::results::Results;
use super::table::{Contact, REPLICAS, SharedTable, Table, Traits};
use super::wire::{Kind, Message, WirePeer};
use crate::router::Peer;

/// How many providers one search yields.
const MAX_FOUND: usize = 64;

/// How many peers are believed from one answer, as providers and as nearer peers.
const MAX_NAMED: usize = 64;

/// How many peers of whom nothing is known are asked because one answer named them, and how many of them at one address: whoever answers must
/// not be able to send us all over the place.
const MAX_STRANGERS: usize = REPLICAS;
const MAX_STRANGERS_AT_ONE: usize = 2;

/// How many searches may be under way. More are answered from what this node knows itself.
const MAX_SEARCHES: usize = 1024;

/// Starts searches. Cheap to clone, and usable from any thread.
#[derive(Clone)]
pub(super) struct Searches(Arc<Inner>);

struct Inner {
    context: Context,
    client: Client,
    runtime: Handle,
    running: Mutex<HashMap<ContentId, Arc<Mutex<Search>>>>,
    results: Mutex<Results>,
}

/// What a search reads.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) local: PeerId,
    pub(super) scope: Scope,
    pub(super) registry_port: u16,
    pub(super) records: SharedRecords,
    pub(super) table: SharedTable,
    pub(super) metrics: RouterMetrics,
}

/// What was found so far, and who wants to know.
#[derive(Default)]
struct Search {
    found: Vec<Peer>,
    listeners: Vec<mpsc::Sender<Peer>>,
}

// === impl Searches ===

impl Searches {
    /// Searches that run on the given runtime.
    pub(super) fn new(context: Context, client: Client, runtime: Handle) -> Self {
        Self(Arc::new(Inner { context, client, runtime, running: Mutex::default(), results: Mutex::default() }))
    }

    /// Starts a search or joins the one that is under way. What this node knows itself is there at once.
    pub(super) fn start(&self, id: ContentId) -> mpsc::Receiver<Peer> {
        let (listener, receiver) = mpsc::channel(MAX_FOUND);
        let mut running = self.running();
        if let Some(search) = running.get(&id) {
            self.0.context.metrics.0.lookup(Outcome::Joined);
            lock(search).join(listener);
            return receiver;
        }
        let mut search = Search::default();
        search.join(listener);
        let context = &self.0.context;
        if let Some(found) = self.results().get(Instant::now(), &id) {
            context.metrics.0.lookup(Outcome::Cached);
            found.iter().for_each(|peer| search.deliver(Some(peer.clone())));
            return receiver;
        }
        let others = context.records.lock().others(Instant::now(), &id, &mut rand::rng());
        for (peer, addresses) in others {
            search.deliver(context.peer_at(peer, &addresses));
        }
        let known = context.table.read().closest(&id.position());
        if known.is_empty() || running.len() >= MAX_SEARCHES {
            let nobody_to_ask = if known.is_empty() { Outcome::None } else { Outcome::Refused };
            context.metrics.0.lookup(if search.found.is_empty() { nobody_to_ask } else { Outcome::Found });
            return receiver;
        }
        let search = Arc::new(Mutex::new(search));
        running.insert(id, search.clone());
        self.0.runtime.spawn(self.clone().run(id, known, search));
        receiver
    }

    async fn run(self, id: ContentId, known: Vec<Contact>, search: Arc<Mutex<Search>>) {
        let context = &self.0.context;
        let mut quest = Quest::new(Instant::now(), Position::of_peer(&context.local), id.position(), known);
        let mut asking = FuturesUnordered::new();
        let outcome = loop {
            let until = match quest.step(Instant::now()) {
                Step::Ask(contact) => {
                    asking.push(self.ask(contact, id));
                    continue;
                }
                Step::Wait(until) => until,
                Step::Over(outcome) => break outcome,
            };
            if self.end_if_abandoned(&id, &search) {
                break Outcome::Abandoned;
            }
            tokio::select! {
                Some((contact, answer)) = asking.next() => match answer {
                    Ok(answer) => {
                        for found in quest.answered(&contact, answer) {
                            lock(&search).deliver(context.peer(&found));
                        }
                    }
                    Err(error) => {
                        tracing::debug!(peer = %contact.peer(), %error, "did not answer");
                        quest.failed(&contact);
                    }
                },
                () = tokio::time::sleep_until(until.into()) => {}
            }
        };
        let figures = &context.metrics.0;
        quest.hops().into_iter().for_each(|hops| figures.hops.observe(f64::from(hops)));
        let mut running = self.running();
        let found = lock(&search).found.clone();
        figures.lookup(if found.is_empty() { outcome } else { Outcome::Found });
        // Nobody found is a result only if all who would know have said so.
        if !found.is_empty() || outcome == Outcome::None {
            self.results().put(Instant::now(), id, found);
        }
        running.remove(&id);
    }

    async fn ask(&self, contact: Contact, id: ContentId) -> (Contact, io::Result<Answer>) {
        let request = Message::request(Kind::GetProviders, &id.multihash());
        let answer = self.0.client.request(&contact, request).await;
        let scope = &self.0.context.scope;
        let read = |message: Message| {
            let (providers, closer) =
                (contacts(scope, &message.provider_peers), contacts(scope, &message.closer_peers));
            let table = self.0.context.table.read();
            Answer { providers: as_known(&table, providers), closer: but_few_strangers(&table, closer) }
        };
        (contact, answer.map(read))
    }

    /// Under the lock that joining takes, so that nobody joins a search that is ending.
    fn end_if_abandoned(&self, id: &ContentId, search: &Mutex<Search>) -> bool {
        let mut running = self.running();
        let abandoned = lock(search).is_abandoned();
        if abandoned {
            running.remove(id);
        }
        abandoned
    }

    fn results(&self) -> MutexGuard<'_, Results> {
        self.0.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn running(&self) -> MutexGuard<'_, HashMap<ContentId, Arc<Mutex<Search>>>> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lock(search: &Mutex<Search>) -> MutexGuard<'_, Search> {
    search.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The usable ones of the peers in an answer.
pub(super) fn contacts(scope: &Scope, named: &[WirePeer]) -> Vec<Contact> {
    let contact = |named: &WirePeer| {
        let peer = PeerId::from_bytes(&named.id).ok()?;
        let addresses: Vec<Multiaddr> =
            named.addrs.iter().filter_map(|bytes| Multiaddr::try_from(bytes.clone()).ok()).collect();
        let addresses = scope.filter(&addresses);
        (!addresses.is_empty()).then(|| Contact::new(peer, &addresses))
    };
    named.iter().take(MAX_NAMED).filter_map(contact).collect()
}

/// Where we know a peer to be is where it is, whatever others say of it; who says that and more may know more, and is believed last.
fn as_known(table: &Table, named: Vec<Contact>) -> Vec<Contact> {
    let corrected = |contact: Contact| {
        let Some(known) = table.find(&contact.peer()) else { return contact };
        let is_more = |address: &&SocketAddr| !known.addresses().contains(address);
        let more: Vec<SocketAddr> = contact.addresses().iter().filter(is_more).copied().collect();
        if more.is_empty() || !known.addresses().iter().all(|address| contact.addresses().contains(address)) {
            return known.clone();
        }
        Contact::new(contact.peer(), &[known.addresses(), &more].concat())
    };
    named.into_iter().map(corrected).collect()
}

/// The same, and of those whom we do not know a bounded number.
fn but_few_strangers(table: &Table, named: Vec<Contact>) -> Vec<Contact> {
    let mut strangers = 0;
    let mut at: HashMap<IpAddr, usize> = HashMap::new();
    let mut few = |contact: Contact| {
        if let Some(known) = table.find(&contact.peer()) {
            return Some(known.clone());
        }
        let places = contact.addresses().iter().map(SocketAddr::ip).collect::<HashSet<_>>();
        let is_one_too_many = places.iter().any(|ip| at.get(ip).is_some_and(|count| *count >= MAX_STRANGERS_AT_ONE));
        if strangers >= MAX_STRANGERS || is_one_too_many {
            return None;
        }
        strangers += 1;
        places.into_iter().for_each(|ip| *at.entry(ip).or_default() += 1);
        Some(contact)
    };
    named.into_iter().filter_map(&mut few).collect()
}

// === impl Context ===

impl Context {
    fn peer(&self, found: &Contact) -> Option<Peer> {
        self.peer_at(found.peer(), found.addresses())
    }

    /// A provider as the rooms above know it, unless it is this node.
    fn peer_at(&self, peer: PeerId, router: &[SocketAddr]) -> Option<Peer> {
        if peer == self.local {
            return None;
        }
        let addresses = registries(router, self.records.lock().own_addresses(), self.registry_port);
        let Traits { zone, load, .. } = self.table.read().traits(&peer);
        (!addresses.is_empty()).then(|| Peer { id: peer.to_base58().into(), addresses, zone, load })
    }
}

// === impl Search ===

impl Search {
    fn join(&mut self, listener: mpsc::Sender<Peer>) {
        self.listeners.retain(|listener| !listener.is_closed());
        for peer in &self.found {
            // As many fit as are ever found.
            let _ = listener.try_send(peer.clone());
        }
        self.listeners.push(listener);
    }

    /// A second identity at the same place is the one before its restart, or the other way round: one is enough.
    fn deliver(&mut self, peer: Option<Peer>) {
        let Some(peer) = peer else { return };
        let known = |found: &Peer| found.id == peer.id || found.addresses == peer.addresses;
        if self.found.len() >= MAX_FOUND || self.found.iter().any(known) {
            return;
        }
        self.listeners.retain(|listener| listener.try_send(peer.clone()).is_ok());
        self.found.push(peer);
    }

    fn is_abandoned(&self) -> bool {
        self.listeners.iter().all(mpsc::Sender::is_closed)
    }
}
