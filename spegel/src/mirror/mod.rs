//! Getting content from a peer: choosing one, asking, and handing on what it sends.

mod attempt;
mod blame;
mod check;
mod client;
mod family;
mod fetch;
mod flights;
mod lineage;
mod metrics;
mod peers;
mod pool;
mod relay;
mod shelf;
mod siblings;
mod sources;
mod storms;
mod verify;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::ebpf::Watch;
use crate::oci::{Digest, Key, Repository};
use crate::router::{Peer, Router};
use crate::store::{Change, Outcome, Store};
use crate::storm::{Rank, Refusal};
use crate::story::Tale;
use crate::zerocopy::Body;

pub(crate) use check::{check_hints, check_peer_head};
pub use client::{HOLDERS_HEADER, MAX_HOLDERS, PeerError, Timeouts};
pub use lineage::{Asker, Chain, MAX_CHAIN, NodeId, ParseChainError, Tie};
pub use metrics::MirrorMetrics;
pub use shelf::Verified;
pub use storms::{Feed, Served, StormImage, StormPull, StormSource, StormsView};

/// Marks a request between nodes: it is answered from local content only, so that no request goes in circles.
pub const MIRRORED_HEADER: &str = "X-Spegel-Mirrored";

/// Marks a peer's HEAD for a blob that says: what you sent of it is wrong.
pub const COMPLAINT_HEADER: &str = "X-Spegel-Complaint";

/// Marks an answer for a blob that the answering node is still receiving: `<position>/<total>`, both in bytes.
pub const RECEIVING_HEADER: &str = "X-Spegel-Receiving";

/// The nodes that such an answer's bytes come through, a [`Chain`].
pub const CHAIN_HEADER: &str = "X-Spegel-Chain";

/// Which file such an answer is of: 16 hexadecimal digits that stay the same as long as it is written on from where it was.
pub const INGEST_HEADER: &str = "X-Spegel-Ingest";

/// In an answer to a node: how busy the answering one is with what it gives its peers, in percent.
pub const LOAD_HEADER: &str = "X-Spegel-Load";

/// In a request between nodes: for how many milliseconds to wait for a blob that the asked node's containerd is about to receive.
pub const WAIT_HEADER: &str = "X-Spegel-Wait";

/// In a request between nodes that waits for first bytes: where a coordinator counted the asker, a [`Rank`]'s number.
pub const RANK_HEADER: &str = "X-Spegel-Rank";

/// Whole bodies up to this many bytes are verified before they are passed on.
const VERIFIED_BODY: u64 = 1024 * 1024;
/// Memory for bodies that are being verified, in KiB.
const VERIFY_BUDGET_KIB: usize = 32 * 1024;
/// Memory for verified content that is kept ready, in bytes, and for how long.
const SHELF_BYTES: usize = 16 * 1024 * 1024;
const SHELF_LIFETIME: Duration = Duration::from_secs(60);
/// How many searches may go on after their requests have ended.
const SEARCHES: usize = 256;

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
    /// The bytes a second that a peer must send, on average over [`Settings::stall`] of waiting for it.
    pub floor: u64,
    /// How long a request may wait for the first bytes of a blob at a peer that gave other blobs of the same image.
    pub hold: Duration,
    /// The zone of this node: peers that say that they are in another are asked after those that do not.
    pub zone: Option<Arc<str>>,
    /// The `Authorization` header's value for peers, where basic authentication is on.
    pub authorization: Option<String>,
    /// Whether what nobody has is coordinated, if the router takes part in that.
    pub storm: Option<StormSettings>,
    /// What is known of connections with peers: how much has to be sent again counts against them.
    pub watch: Option<Watch>,
}

/// How cold storms are met.
#[derive(Clone, Copy, Debug)]
pub struct StormSettings {
    /// How long the requests of one image pull may be held in all.
    pub max_wait: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolve_timeout: Duration::from_millis(20),
            resolve_retries: 3,
            timeouts: Timeouts { connect: Duration::from_secs(1), head: Duration::from_secs(2) },
            hedge: Duration::from_millis(200),
            stall: Duration::from_secs(5),
            floor: 32 << 10,
            hold: Duration::from_secs(2),
            zone: None,
            authorization: None,
            storm: None,
            watch: None,
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
    /// The blob's length in bytes, where the client was told it: nothing else may be given.
    pub total: Option<u64>,
    /// A body goes on with it, whose client waits.
    pub resumes: bool,
    /// What to wait for before a body that breaks off is ended.
    pub gate: Option<Gate>,
    /// The node whose containerd gets it, by name.
    pub node: Option<Arc<str>>,
    /// That node may be this one.
    pub feeds_us: bool,
    /// That node is this one, for sure.
    pub is_own: bool,
    /// What the request is a part of: the upstream's name and the repository.
    pub pull: Option<Arc<str>>,
    /// The repository in whose name it is asked for.
    pub repository: Option<Repository>,
    /// How long a peer is asked to wait for its own first bytes.
    pub wait: Option<Duration>,
    /// Where a coordinator counted this node, if that sent it to the peer.
    pub rank: Option<Rank>,
    /// The client's request, and what it meets here.
    pub tale: Tale,
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
    peers: peers::Peers,
    blame: blame::Blame,
    sizes: family::Sizes,
    /// Searches that go on after their requests have ended.
    searches: Arc<Semaphore>,
    sources: sources::Sources,
    siblings: siblings::Siblings,
    storms: Option<Arc<storms::Storms>>,
    shelf: shelf::Shelf,
    lineage: Arc<lineage::Lineage>,
    flights: flights::Flights,
    budget: Arc<Semaphore>,
    deliveries: Arc<Semaphore>,
    metrics: MirrorMetrics,
}

impl Shared {
    fn punish(&self, digest: &Digest, verdict: &blame::Verdict) {
        self.metrics.wrong_bytes(verdict.barred.len() + verdict.spoiled.len(), verdict.outcast.len());
        for peer in &verdict.barred {
            warn!(%digest, %peer, "a peer sent wrong bytes: it is not asked for this digest any more");
        }
        for peer in &verdict.spoiled {
            warn!(%digest, %peer, "a peer passed on wrong bytes that it was receiving: its upstream's, or their sender's. That file of it is not used any more");
        }
        for peer in &verdict.doubted {
            debug!(%digest, %peer, "asked for again, and not seen to be stored: its sender is not asked for it for a minute");
        }
        for peer in &verdict.outcast {
            warn!(%peer, "a peer sent wrong bytes three times: it is not asked for anything for ten minutes. Check its disk");
        }
    }
}

impl Mirror {
    /// A mirror that finds its peers by `router`.
    pub fn new(router: Arc<dyn Router>, settings: Settings, metrics: MirrorMetrics) -> Self {
        let storms = storms::Storms::new(&*router, settings.storm, metrics.storm.clone());
        let (pool, peers) = (pool::Pool::new(settings.watch.clone()), peers::Peers::new(settings.watch.as_ref()));
        let shared = Shared {
            router,
            settings,
            pool,
            peers,
            blame: blame::Blame::default(),
            sizes: family::Sizes::default(),
            searches: Arc::new(Semaphore::new(SEARCHES)),
            sources: sources::Sources::default(),
            siblings: siblings::Siblings::default(),
            storms,
            shelf: shelf::Shelf::new(SHELF_BYTES, SHELF_LIFETIME),
            lineage: Arc::default(),
            flights: flights::Flights::default(),
            budget: Arc::new(Semaphore::new(VERIFY_BUDGET_KIB)),
            deliveries: Arc::new(Semaphore::new(VERIFY_BUDGET_KIB)),
            metrics,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Where it is seen how much this node's containerd has got of what it pulls from upstream. Until it is known nothing is held.
    pub fn look_at(&self, store: &Arc<dyn Store>) {
        if let Some(storms) = &self.shared.storms {
            storms.look_at(Arc::clone(store));
        }
    }

    /// The storms that this node takes part in, for people, with `limit` of what is wanted at the most; nothing where they are off.
    pub fn storms(&self, limit: usize) -> Option<StormsView> {
        self.shared.storms.as_ref().map(|storms| storms.view(limit))
    }

    /// Whether somebody of this rank may wait for the first bytes of a blob that this node's containerd has none of either.
    pub fn may_wait(&self, digest: &Digest, rank: Rank) -> bool {
        self.shared.storms.as_ref().is_some_and(|storms| storms.may_wait(digest, rank))
    }

    /// Ends when somebody of this rank may not wait for the first bytes of a blob any more.
    pub async fn sent_away(&self, digest: &Digest, rank: Rank) {
        match &self.shared.storms {
            Some(storms) => storms.sent_away(digest, rank).await,
            None => std::future::pending().await,
        }
    }

    /// Takes a node as one who is given a blob from now on, as long as what is returned lasts; nothing where storms are off. The slots of this node
    /// follow from how fast each gets it.
    ///
    /// # Errors
    /// It was sent here by a coordinator, and should go elsewhere.
    pub fn serve(&self, served: &Served<'_>) -> Result<Option<Feed>, Refusal> {
        self.shared.storms.as_ref().map(|storms| storms.serve(served, Instant::now())).transpose()
    }

    /// The nodes through which this node's containerd is being given a blob that they still receive.
    pub fn lineage(&self, digest: &Digest) -> Chain {
        self.shared.lineage.of(digest)
    }

    /// Takes `asker` as one who is given a blob that this node's containerd is still being given, as long as what is returned lasts, and says
    /// through which nodes that comes; none if this node may be waiting for the asker.
    pub fn admit(&self, digest: &Digest, asker: Asker) -> Option<(Chain, Option<Tie>)> {
        self.shared.lineage.admit(digest, asker)
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

    /// A client asks again for what it was given all of. If its store was seen to discard it, what peers sent was not what the digest says: they
    /// are not asked for it any more, and one that this happens with three times is not asked for anything for a while. Otherwise it may have
    /// been stored and removed where nobody saw it: they are not asked for it for a minute. Either way they are told, to look at what they
    /// have. `target` is the request's path and query.
    pub fn complained(&self, digest: &Digest, target: &str) {
        let verdict = self.shared.blame.again(&Key::Digest(digest.clone()), Instant::now());
        self.shared.punish(digest, &verdict);
        attempt::complain(&self.shared, [verdict.barred, verdict.doubted].concat(), target);
    }

    /// This node does not have it after all.
    pub fn withdraw(&self, key: Key) {
        self.shared.router.announce(Change::Removed(vec![key]));
    }

    /// What became of content that was received: whoever sent what is stored sent what was right.
    pub fn hear(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Stored(digest) => self.shared.blame.confirmed(&Key::Digest(digest.clone())),
            Outcome::Discarded(digest) => self.shared.blame.discarded(&Key::Digest(digest.clone())),
        }
    }

    /// Other nodes that are known to have `key`, [`MAX_HOLDERS`] at the most and none at `asker`. Does not wait.
    pub fn holders(&self, key: &Key, asker: IpAddr) -> Vec<SocketAddr> {
        let mut peers = self.shared.sources.of(key, |_| false, Instant::now());
        let mut lookup = self.shared.router.lookup(key);
        while peers.len() < 2 * MAX_HOLDERS
            && let Ok(peer) = lookup.try_recv()
        {
            peers.push(peer);
        }
        // On loopback many nodes share an address.
        let is_asker = |address: &SocketAddr| address.ip() == asker && !address.ip().is_loopback();
        let mut holders = Vec::new();
        for address in peers.iter().filter_map(|peer| peer.addresses.first()) {
            if !is_asker(address) && !holders.contains(address) && holders.len() < MAX_HOLDERS {
                holders.push(*address);
            }
        }
        holders
    }
}
