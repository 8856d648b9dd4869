//! A network of peers inside one process, for the tests of the rooms above and for runs without a network.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Member, Members, Peer, Readiness, Router, Storms};
use crate::oci::Key;
use crate::store::Change;
use crate::storm::{self, COORDINATORS, Coordinator, Limits, Request, Response, Zone};

/// What version of the member protocol the nodes of such a network seem to speak.
const MEMBER_VERSION: u32 = 1;

/// A table of who offers what, shared by the [`MemoryRouter`]s that joined it.
#[derive(Clone, Default)]
pub struct MemoryNetwork {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    nodes: BTreeMap<Arc<str>, Node>,
    providers: HashMap<Key, BTreeSet<Arc<str>>>,
}

struct Node {
    peer: Peer,
    readiness: watch::Sender<Readiness>,
    members: watch::Sender<Members>,
    coordinator: Coordinator,
}

/// A node's part in storms: all nodes of such a network take part.
#[derive(Debug)]
struct MemoryStorms {
    id: Arc<str>,
    network: MemoryNetwork,
}

/// One node of a [`MemoryNetwork`]. It leaves the network when it is dropped.
pub struct MemoryRouter {
    id: Arc<str>,
    network: MemoryNetwork,
    readiness: watch::Receiver<Readiness>,
    members: watch::Receiver<Members>,
}

// === impl MemoryNetwork ===

impl MemoryNetwork {
    /// A network without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says which zone a node is in, as its `--zone` would.
    pub fn set_zone(&self, id: &str, zone: &str) {
        let mut table = self.lock();
        if let Some(node) = table.nodes.get_mut(id) {
            node.peer.zone = Some(zone.into());
        }
        table.settle();
    }

    /// Adds a node whose registry listens on `registry`. A node of the same name is replaced, and what it offered is gone.
    pub fn join(&self, id: &str, registry: SocketAddr) -> Arc<MemoryRouter> {
        self.join_at(id, vec![registry])
    }

    /// The same for a node that says that its registry has several addresses.
    pub fn join_at(&self, id: &str, registry: Vec<SocketAddr>) -> Arc<MemoryRouter> {
        let id: Arc<str> = id.into();
        let (readiness, readiness_seen) = watch::channel(Readiness::Alone);
        let (members, members_seen) = watch::channel(Members::default());
        let peer = Peer::new(id.clone(), registry);
        let mut table = self.lock();
        table.withdraw_all(&id);
        let coordinator = Coordinator::new(Limits::default(), Instant::now());
        table.nodes.insert(id.clone(), Node { peer, readiness, members, coordinator });
        table.settle();
        Arc::new(MemoryRouter { id, network: self.clone(), readiness: readiness_seen, members: members_seen })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for MemoryNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryNetwork").field("nodes", &self.lock().nodes.len()).finish_non_exhaustive()
    }
}

// === impl Table ===

impl Table {
    fn withdraw_all(&mut self, id: &str) {
        self.providers.retain(|_, ids| {
            ids.remove(id);
            !ids.is_empty()
        });
    }

    /// Tells every node who is there.
    fn settle(&self) {
        let readiness = if self.nodes.len() > 1 { Readiness::Connected } else { Readiness::Alone };
        for (id, node) in &self.nodes {
            node.readiness.send_if_modified(|current| std::mem::replace(current, readiness) != readiness);
            let others = self.nodes.iter().filter(|(other, _)| *other != id);
            node.members.send_replace(
                others.map(|(_, node)| Member { peer: node.peer.clone(), version: MEMBER_VERSION }).collect(),
            );
        }
    }
}

// === impl MemoryRouter ===

impl Router for MemoryRouter {
    fn lookup(&self, key: &Key) -> mpsc::Receiver<Peer> {
        let table = self.network.lock();
        let peers: Vec<Peer> = table
            .providers
            .get(key)
            .into_iter()
            .flatten()
            .filter(|id| **id != self.id)
            .filter_map(|id| table.nodes.get(id).map(|node| node.peer.clone()))
            .collect();
        let (sender, receiver) = mpsc::channel(peers.len().max(1));
        for peer in peers {
            if sender.try_send(peer).is_err() {
                break;
            }
        }
        receiver
    }

    fn announce(&self, change: Change) {
        let mut table = self.network.lock();
        match change {
            Change::Added(keys) => {
                for key in keys {
                    table.providers.entry(key).or_default().insert(self.id.clone());
                }
            }
            Change::Removed(keys) => {
                for key in &keys {
                    if let Some(ids) = table.providers.get_mut(key) {
                        ids.remove(&self.id);
                        if ids.is_empty() {
                            table.providers.remove(key);
                        }
                    }
                }
            }
        }
    }

    fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.clone()
    }

    fn members(&self) -> watch::Receiver<Members> {
        self.members.clone()
    }

    fn storms(&self) -> Option<Arc<dyn Storms>> {
        Some(Arc::new(MemoryStorms { id: self.id.clone(), network: self.network.clone() }))
    }

    fn set_load(&self, percent: u8) {
        let mut table = self.network.lock();
        if let Some(node) = table.nodes.get_mut(&self.id) {
            node.peer.load = Some(percent.min(100));
        }
        table.settle();
    }
}

/// The first eight bytes of its hash.
fn number(text: &str) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(Sha256::digest(text));
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

impl Storms for MemoryStorms {
    fn coordinators(&self, key: &Key) -> (storm::Key, Vec<storm::Node>) {
        let text = key.to_string();
        let target = number(&text);
        let mut nearest: Vec<u64> = self.network.lock().nodes.keys().map(|id| number(id)).collect();
        nearest.sort_unstable_by_key(|node| node ^ target);
        let nodes = nearest.into_iter().take(COORDINATORS).map(storm::Node).collect();
        (storm::Key(key.sha256()), nodes)
    }

    fn ask(&self, to: storm::Node, request: Request) -> oneshot::Receiver<Response> {
        let (reply, answer) = oneshot::channel();
        let mut table = self.network.lock();
        let zone = |id: &Arc<str>| table.nodes.get(id).and_then(|node| node.peer.zone.as_deref().map(number));
        // Casting keeps the lower half, which does as well.
        let zone = Zone(zone(&self.id).map_or(0, |zone| zone as u32));
        let coordinator = table.nodes.iter_mut().find(|(id, _)| number(id) == to.0);
        let response = coordinator.and_then(|(_, node)| {
            node.coordinator.receive(storm::Node(number(&self.id)), zone, &request, Instant::now())
        });
        // Whoever asked may have given up.
        let _ = response.map(|response| reply.send(response));
        answer
    }

    fn own(&self) -> storm::Node {
        storm::Node(number(&self.id))
    }

    fn trees(&self, trees: usize, places: usize) -> Vec<storm::TreeView> {
        let table = self.network.lock();
        let own = table.nodes.get(&self.id);
        own.map(|node| node.coordinator.view(trees, places, Instant::now())).unwrap_or_default()
    }

    fn peer(&self, node: storm::Node) -> Option<Peer> {
        let table = self.network.lock();
        let found = table.nodes.iter().find(|(id, _)| **id != self.id && number(id) == node.0);
        found.map(|(_, node)| node.peer.clone())
    }
}

impl Drop for MemoryRouter {
    fn drop(&mut self) {
        let mut table = self.network.lock();
        // A successor of the same name has its own watch, and keeps its place.
        let ours =
            table.nodes.get(&self.id).is_some_and(|node| node.readiness.subscribe().same_channel(&self.readiness));
        if ours {
            table.nodes.remove(&self.id);
            table.withdraw_all(&self.id);
            table.settle();
        }
    }
}

impl fmt::Debug for MemoryRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRouter").field("id", &self.id).finish_non_exhaustive()
    }
}
