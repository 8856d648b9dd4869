//! Getting content from a peer: choosing one, asking, and handing on what it sends.

mod client;
mod fetch;
mod health;
mod lineage;
mod metrics;
mod pool;
mod relay;
mod shelf;
mod siblings;
mod sources;
mod verify;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::oci::{Digest, Key};
use crate::router::{Peer, Router};
use crate::zerocopy::Body;

pub use client::{PeerError, Timeouts};
pub use lineage::{Chain, MAX_CHAIN, NodeId, ParseChainError};
pub use metrics::MirrorMetrics;
pub use shelf::Verified;

/// Marks a request between nodes: it is answered from local content only, so that no request goes in circles.
pub const MIRRORED_HEADER: &str = "X-Spegel-Mirrored";

/// Marks an answer for a blob that the answering node is still receiving: `<position>/<total>`, both in bytes.
pub const RECEIVING_HEADER: &str = "X-Spegel-Receiving";

/// The nodes that such an answer's bytes come through, a [`Chain`].
pub const CHAIN_HEADER: &str = "X-Spegel-Chain";

/// In a request between nodes: for how many milliseconds to wait for a blob that the asked node's containerd is about to receive.
pub const WAIT_HEADER: &str = "X-Spegel-Wait";

/// Whole bodies up to this many bytes are verified before they are passed on.
const VERIFIED_BODY: u64 = 1024 * 1024;
/// Memory for bodies that are being verified, in KiB.
const VERIFY_BUDGET_KIB: usize = 32 * 1024;
/// Memory for verified content that is kept ready, in bytes, and for how long.
const SHELF_BYTES: usize = 16 * 1024 * 1024;
const SHELF_LIFETIME: Duration = Duration::from_secs(60);

/// How patient the mirror is, and how it presents itself.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long one request looks for peers, in all.
    pub resolve_timeout: Duration,
    /// How many peers one request tries.
    pub resolve_retries: usize,
    /// How long one peer may take to connect and to answer.
    pub timeouts: Timeouts,
    /// After how long without an answer the next peer is asked as well.
    pub hedge: Duration,
    /// How long a peer's body may stand still before it is given up.
    pub stall: Duration,
    /// How long a request may wait for the first bytes of a blob at a peer that gave other blobs of the same image.
    pub hold: Duration,
    /// The `Authorization` header's value for peers, where basic authentication is on.
    pub authorization: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolve_timeout: Duration::from_millis(20),
            resolve_retries: 3,
            timeouts: Timeouts { connect: Duration::from_secs(1), head: Duration::from_secs(3) },
            hedge: Duration::from_millis(200),
            stall: Duration::from_secs(5),
            hold: Duration::from_secs(2),
            authorization: None,
        }
    }
}

/// What a client wants of us and we do not have.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The key under which peers offer it.
    pub key: Key,
    /// Path and query of the request to a peer.
    pub target: String,
    /// Manifest or blob.
    pub kind: Kind,
    /// Only the head is wanted.
    pub head_only: bool,
    /// The `Range` header's value, where a part is wanted. Only for blobs.
    pub range: Option<String>,
    /// What to wait for before a body that breaks off is ended.
    pub gate: Option<Gate>,
    /// The node whose containerd gets it, by name.
    pub node: Option<Arc<str>>,
    /// That node may be this one.
    pub feeds_us: bool,
    /// What the request is a part of: the upstream's name and the repository.
    pub pull: Option<Arc<str>>,
    /// How long a peer is asked to wait for its own first bytes.
    pub wait: Option<Duration>,
}

/// Something to wait for. The wait is bounded by the stall bound.
#[derive(Clone)]
pub struct Gate(Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>);

impl Gate {
    /// A gate that opens when the future is ready that `wait` makes.
    pub fn new(wait: impl Fn() -> BoxFuture<'static, ()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(wait))
    }

    async fn wait(&self) {
        (self.0)().await;
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

/// What sort of content is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A manifest or index; always small, always verified.
    Manifest,
    /// A config or layer.
    Blob,
}

/// What a peer gave.
#[derive(Debug)]
pub struct Found {
    /// Who gave it; `None` for content that was kept ready.
    pub peer: Option<Peer>,
    /// The content.
    pub content: Content,
}

/// Content from a peer.
#[derive(Debug)]
pub enum Content {
    /// All of it, verified against its digest.
    Verified(Verified),
    /// Bytes of a blob that go from the peer's socket to the client's.
    Relay {
        /// The bytes, `first..first + body.len()` of the blob.
        body: Body,
        /// Where they begin in the blob, and the blob's length, in bytes, for a part.
        part: Option<(u64, u64)>,
    },
    /// A blob's length in bytes, where only the head was wanted.
    Head {
        /// The blob's length in bytes.
        length: u64,
    },
    /// The wanted range lies outside of the blob.
    Unsatisfiable {
        /// The blob's length in bytes.
        length: u64,
    },
}

/// Nobody gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no peer has it ({found} found, {tried} tried)")]
pub struct Miss {
    /// Peers that were said to have it.
    pub found: usize,
    /// Peers that were asked, in vain.
    pub tried: usize,
}

/// Gets content from peers.
#[derive(Clone, Debug)]
pub struct Mirror {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    router: Arc<dyn Router>,
    settings: Settings,
    pool: pool::Pool,
    health: health::Health,
    sources: sources::Sources,
    siblings: siblings::Siblings,
    shelf: shelf::Shelf,
    lineage: Arc<lineage::Lineage>,
    budget: Arc<Semaphore>,
    metrics: MirrorMetrics,
}

impl Mirror {
    /// A mirror that finds its peers by `router`.
    pub fn new(router: Arc<dyn Router>, settings: Settings, metrics: MirrorMetrics) -> Self {
        let shared = Shared {
            router,
            settings,
            pool: pool::Pool::default(),
            health: health::Health::default(),
            sources: sources::Sources::default(),
            siblings: siblings::Siblings::default(),
            shelf: shelf::Shelf::new(SHELF_BYTES, SHELF_LIFETIME),
            lineage: Arc::default(),
            budget: Arc::new(Semaphore::new(VERIFY_BUDGET_KIB)),
            metrics,
        };
        Self { shared: Arc::new(shared) }
    }

    /// The nodes through which this node's containerd is being given a blob that they still receive.
    pub fn lineage(&self, digest: &Digest) -> Chain {
        self.shared.lineage.of(digest)
    }

    /// Whether the node `asker` should not be made to wait for a blob that the node `own`, this one, is about to receive.
    pub fn declines(&self, digest: &Digest, own: NodeId, asker: NodeId) -> bool {
        self.shared.siblings.declines(digest, own, asker)
    }

    /// Finds peers that have `wanted`, and takes the first good answer.
    ///
    /// # Errors
    /// [`Miss`] when no peer gave it, after [`Settings::resolve_timeout`] and one bounded attempt with each of
    /// [`Settings::resolve_retries`] peers at the most, and for a blob of a pull that peers gave other blobs of, after
    /// [`Settings::hold`] more.
    pub async fn fetch(&self, wanted: &Wanted) -> Result<Found, Miss> {
        if let (Key::Digest(digest), Kind::Manifest, false) = (&wanted.key, wanted.kind, wanted.head_only)
            && let Some(verified) = self.shared.shelf.take(digest, Instant::now())
        {
            return Ok(Found { peer: None, content: Content::Verified(verified) });
        }
        fetch::fetch(&self.shared, wanted).await
    }
}
