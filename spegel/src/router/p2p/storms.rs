//! The coordinators of cold storms: this node's own, and how others are asked. One stream carries one question and its answer.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::AsyncWriteExt as _;
use libp2p::PeerId;
use libp2p::swarm::Stream;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::addresses::registries;
use super::client::Client;
use super::keys::{ContentId, Position};
use super::opener::Purpose;
use super::records::SharedRecords;
use super::table::{Contact, SharedTable};
use super::wire::read_frame;
use crate::oci::Key;
use crate::router::{self, Peer};
use crate::storm::{self, COORDINATORS, Coordinator, Limits, MAX_MESSAGE, Node, Request, Response, Zone};

/// How long a question may take on its way: longer than a coordinator is waited for, so that a late answer is still of use.
const QUESTION: Duration = Duration::from_secs(2);
/// How many questions of one peer, and of all, are read at a time. More are closed.
const MAX_OF_PEER: usize = 32;
const MAX_OF_ALL: usize = 4096;

/// This node's part in the storms of all.
#[derive(Clone)]
pub(super) struct Storms(Arc<Inner>);

struct Inner {
    local: Position,
    zone: Zone,
    registry_port: u16,
    coordinator: Mutex<Coordinator>,
    table: SharedTable,
    records: SharedRecords,
    client: Client,
    runtime: Handle,
    reading: Mutex<HashMap<PeerId, usize>>,
}

/// What of the router the storms need.
pub(super) struct Context {
    pub(super) local: PeerId,
    pub(super) zone: Option<String>,
    pub(super) registry_port: u16,
    pub(super) table: SharedTable,
    pub(super) records: SharedRecords,
    pub(super) client: Client,
    pub(super) runtime: Handle,
}

fn node(position: &Position) -> Node {
    Node(position.prefix())
}

/// The name's hash; 0 is for those that are in none.
fn zone(name: Option<&str>) -> Zone {
    let Some(name) = name else { return Zone::default() };
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(name));
    Zone(u32::from_be_bytes([a, b, c, d]).max(1))
}

// === impl Storms ===

impl Storms {
    pub(super) fn new(context: Context) -> Self {
        Self(Arc::new(Inner {
            local: Position::of_peer(&context.local),
            zone: zone(context.zone.as_deref()),
            registry_port: context.registry_port,
            coordinator: Mutex::new(Coordinator::new(Limits::default(), Instant::now())),
            table: context.table,
            records: context.records,
            client: context.client,
            runtime: context.runtime,
            reading: Mutex::default(),
        }))
    }

    /// Reads a stream that a peer opened, and answers, unless it has too many already.
    pub(super) fn accept(&self, peer: PeerId, mut stream: Stream) {
        if !self.0.may_read(peer) {
            return tracing::debug!(%peer, "asks too much at a time");
        }
        let inner = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            let answer = timeout(QUESTION, inner.serve(peer, &mut stream)).await;
            if let Ok(Err(error)) = answer {
                tracing::debug!(%peer, %error, "a question about a storm failed");
            }
            inner.has_read(peer);
        });
    }

    /// The peer is gone.
    pub(super) fn lost(&self, peer: &PeerId) {
        self.0.coordinator().lost(node(&Position::of_peer(peer)));
    }

    /// Drops what has expired.
    pub(super) fn sweep(&self, now: Instant) {
        self.0.coordinator().forget(now);
    }
}

impl router::Storms for Storms {
    fn coordinators(&self, key: &Key) -> (storm::Key, Vec<Node>) {
        let id = ContentId::of(key);
        let target = id.position();
        let mut nearest = self.0.table.read().nearest_for_storms(&target, COORDINATORS);
        nearest.push(self.0.local);
        nearest.sort_unstable_by_key(|position| position.distance(&target));
        (storm::Key(*id.hash()), nearest.iter().take(COORDINATORS).map(node).collect())
    }

    fn ask(&self, to: Node, request: Request) -> oneshot::Receiver<Response> {
        let (reply, answer) = oneshot::channel();
        if to == node(&self.0.local) {
            // Whoever asked may have given up.
            let _ = self.0.answer(None, &request).map(|response| reply.send(response));
            return answer;
        }
        let contact = self.0.table.read().with_prefix(to.0).cloned();
        let inner = Arc::clone(&self.0);
        self.0.runtime.spawn(async move {
            let Some(contact) = contact else { return };
            match timeout(QUESTION, inner.put(&contact, &request)).await {
                Ok(Ok(response)) => {
                    let _ = reply.send(response);
                }
                Ok(Err(error)) => tracing::debug!(peer = %contact.peer(), %error, "no answer about a storm"),
                Err(_) => tracing::debug!(peer = %contact.peer(), "no answer about a storm in time"),
            }
        });
        answer
    }

    fn own(&self) -> Node {
        node(&self.0.local)
    }

    fn trees(&self, trees: usize, places: usize) -> Vec<storm::TreeView> {
        self.0.coordinator().view(trees, places, Instant::now())
    }

    fn peer(&self, wanted: Node) -> Option<Peer> {
        let table = self.0.table.read();
        let contact = table.with_prefix(wanted.0)?;
        let addresses = registries(contact.addresses(), self.0.records.lock().own_addresses(), self.0.registry_port);
        let traits = table.traits(&contact.peer());
        let id = contact.peer().to_base58().into();
        (!addresses.is_empty()).then_some(Peer { id, addresses, zone: traits.zone, load: traits.load })
    }
}

impl fmt::Debug for Storms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storms").field("size", &self.0.coordinator().size()).finish_non_exhaustive()
    }
}

// === impl Inner ===

impl Inner {
    async fn serve(&self, peer: PeerId, stream: &mut Stream) -> io::Result<()> {
        let bytes = read_frame(stream, MAX_MESSAGE).await?;
        let request = Request::decode(&bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        if let Some(response) = self.answer(Some(peer), &request) {
            stream.write_all(&framed(&response.encode())).await?;
        }
        stream.close().await
    }

    async fn put(&self, to: &Contact, request: &Request) -> io::Result<Response> {
        let mut stream = self.client.open_stream(to, Purpose::Storms).await?;
        stream.write_all(&framed(&request.encode())).await?;
        stream.close().await?;
        let bytes = read_frame(&mut stream, MAX_MESSAGE).await?;
        Response::decode(&bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
    }

    /// The answer of this node's own coordinator to a peer, or to this node itself. Who asks is known by the connection.
    fn answer(&self, peer: Option<PeerId>, request: &Request) -> Option<Response> {
        let now = Instant::now();
        let (from, zone) = match peer {
            Some(peer) => (Position::of_peer(&peer), zone(self.table.read().traits(&peer).zone.as_deref())),
            None => (self.local, self.zone),
        };
        let mut coordinator = self.coordinator();
        let is_heard = coordinator.hears(node(&from), now);
        if is_heard && coordinator.is_new(request.key()) && matches!(request, Request::Want(_)) {
            // The nodes nearest to the key are those that keep its records.
            let id = ContentId::from_hash(request.key().0);
            let holders = self.records.lock().others(now, &id, &mut rand::rng());
            let holders: Vec<Node> = holders.iter().map(|(peer, _)| node(&Position::of_peer(peer))).collect();
            coordinator.holders(request.key(), &holders, now);
        }
        coordinator.receive(node(&from), zone, request, now)
    }

    fn coordinator(&self) -> MutexGuard<'_, Coordinator> {
        self.coordinator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn may_read(&self, peer: PeerId) -> bool {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = reading.values().sum();
        let of_peer = reading.entry(peer).or_default();
        let may = *of_peer < MAX_OF_PEER && all < MAX_OF_ALL;
        *of_peer += usize::from(may);
        if *of_peer == 0 {
            reading.remove(&peer);
        }
        may
    }

    fn has_read(&self, peer: PeerId) {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_peer) = reading.get_mut(&peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                reading.remove(&peer);
            }
        }
    }
}

/// With its length before it, as all messages between nodes have it.
fn framed(message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(message.len() + 2);
    prost::encode_length_delimiter(message.len(), &mut bytes).unwrap_or_default();
    bytes.extend_from_slice(message);
    bytes
}
