//! What the pages are made of: handles of the other rooms, that are read and never written.

use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use crate::ebpf::{Pulled, Watch};
use crate::mirror::Mirror;
use crate::registry::Registry;
use crate::router::{Readiness, Router};
use crate::store::{Health, Store};

/// What the pages are made of.
#[derive(Clone, Debug)]
pub struct Parts {
    /// This node's name.
    pub node: String,
    /// Where it says that it is.
    pub zone: Option<String>,
    /// Its identity in the network of peers.
    pub identity: Arc<str>,
    /// What is here.
    pub store: Arc<dyn Store>,
    /// Who is out there.
    pub router: Arc<dyn Router>,
    /// Storms.
    pub mirror: Mirror,
    /// Whether requests are answered.
    pub registry: Arc<Registry>,
    /// What is known of connections.
    pub watch: Watch,
    /// Bytes that this node's containerd got through us.
    pub pulled: Arc<Pulled>,
    /// How bytes are served, in a word or two.
    pub engine: String,
    /// What `doctor` found last.
    pub examination: watch::Receiver<Option<Examination>>,
    /// Asks for another look of it; one that is new is not done again.
    pub examine: Arc<Notify>,
    /// Where our own registry answers: the only address that anything here connects to.
    pub registry_at: SocketAddr,
    /// What it asks of clients.
    pub authorization: Option<String>,
    /// How many bytes of memory this process may still take; none where nobody limits it.
    pub memory_left: fn() -> Option<u64>,
}

/// What `doctor` found.
#[derive(Clone, Debug, Default)]
pub struct Examination {
    /// How many checks found what should be.
    pub good: usize,
    /// The others, but for what is merely noted.
    pub found: Vec<Examined>,
}

/// What one check found that is not as it should be, or cannot be seen.
#[derive(Clone, Debug)]
pub struct Examined {
    /// The check.
    pub check: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found, in a sentence.
    pub said: String,
    /// What to change.
    pub change: Option<String>,
}

/// How something is, the better first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Not in use, or it cannot be seen.
    Idle,
    /// It works, and somebody should look.
    Warning,
    /// It does not work.
    Failure,
}

// === impl Verdict ===

impl Verdict {
    /// The word for it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Idle => "idle",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

/// Bytes of pulled content by where they were: here, at peers, upstream where that is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    pub(super) local: u64,
    pub(super) peers: u64,
    pub(super) upstream: Option<u64>,
}

impl Sources {
    pub(super) fn of(parts: &Parts) -> Self {
        let (local, peers) = parts.pulled.bytes();
        let report = parts.watch.report();
        let upstream = report.roles.iter().find(|role| role.role == "upstream").map(|role| role.received);
        Self { local, peers, upstream }
    }

    pub(super) fn sum(self) -> u64 {
        self.local.saturating_add(self.peers).saturating_add(self.upstream.unwrap_or(0))
    }
}

/// Who this node is.
pub(super) fn metadata(parts: &Parts) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "node": parts.node,
        "zone": parts.zone,
        "peer_id": &*parts.identity,
        "registry": parts.registry_at.to_string(),
        "engine": parts.engine,
        "connections_seen_by": parts.watch.report().source,
    })
}

/// How it is, in figures.
pub(super) fn stats(parts: &Parts) -> Value {
    let held = parts.store.inventory(0);
    let sources = Sources::of(parts);
    let offered = parts.store.offered();
    let sum = |of: fn(&crate::store::Offered) -> usize| offered.values().map(of).sum::<usize>();
    json!({
        "ready": parts.registry.ready().is_ok(),
        "waits_for": parts.registry.ready().err(),
        "store": match &*parts.store.health().borrow() { Health::Ready => "ready", Health::Waiting(_) => "waiting" },
        "router": readiness(*parts.router.readiness().borrow()),
        "members": parts.router.members().borrow().len(),
        "images": held.more_images,
        "blobs": held.blobs,
        "bytes": held.bytes,
        "receiving": held.more_arriving,
        "advertised_tags": sum(|offered| offered.image_tags),
        "advertised_images": sum(|offered| offered.image_digests),
        "advertised_blobs": sum(|offered| offered.content_digests),
        "pulled_bytes": { "local": sources.local, "peer": sources.peers, "upstream": sources.upstream },
        "requests_in_flight": parts.registry.in_flight(),
        "load_percent": parts.registry.load(),
    })
}

fn readiness(readiness: Readiness) -> &'static str {
    match readiness {
        Readiness::Joining => "joining",
        Readiness::Alone => "alone",
        Readiness::Isolated => "isolated",
        Readiness::Connected => "connected",
    }
}
