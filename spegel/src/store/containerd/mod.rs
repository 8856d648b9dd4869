//! containerd as a store: its API says what there is, its content directory has the bytes.

mod follow;
mod inspect;
mod ownership;
mod rpc;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::inspect::{Cri, Inspection, inspect};
use self::ownership::Ownership;
use self::rpc::Rpc;
use super::blobs::BlobDir;
use super::index::{Index, Verdict};
use super::ingest::{Ingests, News, Receptions};
use super::state::State;
use super::{Blob, Changes, Found, Health, Inventory, Offered, Outcome, Referrer, Store, StoreError};
use crate::oci::{Digest, Filters, Repository, TagName, TagOrDigest};

/// How long a request may wait for containerd to say whose content is. Past it the answer is that it is not here, which
/// sends the asker elsewhere.
const OWNERSHIP_TIMEOUT: Duration = Duration::from_secs(1);

/// When containerd is asked whose content is that came unseen: it says so only a moment after the file is in place.
const CLAIMS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(200), Duration::from_secs(2)];

/// For how much such content containerd is asked at a time. What is beyond waits for its image.
const MAX_CLAIMS: usize = 64;

/// How much that became of content is kept for who has not read it yet.
const MAX_OUTCOMES: usize = 1024;

/// How to reach containerd, and what of it to serve.
#[derive(Clone, Debug)]
pub struct ContainerdSettings {
    /// Its gRPC socket.
    pub socket: PathBuf,
    /// The namespace whose images count; the kubelet's are in `k8s.io`.
    pub namespace: String,
    /// The content directory as this process sees it, `<root>/io.containerd.content.v1.content`; none asks containerd's
    /// introspection, which tells the path as containerd sees it.
    pub content_path: Option<PathBuf>,
    /// What is neither offered nor served.
    pub filters: Filters,
    /// How long content that is being received may not grow until it is given up.
    pub stall: Duration,
}

/// The store of a running containerd, versions 1.6 to 2.3.
///
/// Its events keep an index, so that a request costs no call to containerd. While containerd is away, what it had is
/// served on: nothing can take content away meanwhile but a restart, after which everything is listed again.
///
/// The directory is shared by all namespaces of containerd. What an image of our namespace names is served if it was ours
/// when the image was walked; for other content that is there, containerd is asked whether it is ours.
#[derive(Debug)]
pub struct Containerd {
    inner: Arc<Inner>,
    /// Ends the follower with the store.
    _follower: DropGuard,
}

#[derive(Debug)]
struct Inner {
    settings: ContainerdSettings,
    state: State,
    ownership: Ownership,
    receptions: Arc<Receptions>,
    outcomes: broadcast::Sender<Outcome>,
    link: RwLock<Link>,
    /// For the threads that are none of tokio's.
    runtime: Handle,
    claims: Arc<Semaphore>,
}

/// What is known of the other side.
#[derive(Clone, Debug, Default)]
struct Link {
    /// The connection, while there is one.
    rpc: Option<Rpc>,
    /// The content directory, once it is known.
    contents: Option<BlobDir>,
}

// === impl Containerd ===

impl Containerd {
    /// Follows containerd on the current tokio runtime until the token fires or the store is dropped. containerd need not
    /// be there yet.
    ///
    /// The handle ends with an error when another try cannot help: [`StoreError::Mismatch`] for a content directory that is
    /// not this containerd's, [`StoreError::Io`] for one that cannot be read.
    pub fn start(
        settings: ContainerdSettings,
        token: CancellationToken,
    ) -> (Arc<Self>, JoinHandle<Result<(), StoreError>>) {
        let waiting = Health::Waiting(format!("containerd at {} has not answered yet", settings.socket.display()));
        let contents = settings.content_path.clone().map(BlobDir::new);
        let inner = Arc::new(Inner {
            state: State::new(settings.filters.clone(), waiting),
            ownership: Ownership::default(),
            receptions: Arc::new(Receptions::new(settings.stall)),
            outcomes: broadcast::channel(MAX_OUTCOMES).0,
            link: RwLock::new(Link { rpc: None, contents }),
            runtime: Handle::current(),
            claims: Arc::new(Semaphore::new(MAX_CLAIMS)),
            settings,
        });
        let token = token.child_token();
        let follower = tokio::spawn(follow::run(inner.clone(), token.clone()));
        (Arc::new(Self { inner, _follower: token.drop_guard() }), follower)
    }
}

#[async_trait]
impl Store for Containerd {
    fn resolve(&self, tag: &TagName) -> Option<Digest> {
        self.inner.state.read(|index| index.resolve(tag).cloned())
    }

    fn names(&self, tag: &TagName, digest: &Digest) -> bool {
        self.inner.state.read(|index| index.resolve(tag) == Some(digest))
    }

    async fn open(&self, digest: &Digest, asked: Option<&Repository>) -> Result<Option<Blob>, StoreError> {
        let verdict = self.inner.state.read(|index| index.verdict(digest, asked));
        let Link { rpc, contents: Some(contents) } = self.inner.link() else { return Ok(None) };
        if verdict == Verdict::Refuse {
            return Ok(None);
        }
        let Some(blob) = contents.open(digest)? else {
            if verdict == Verdict::Serve || self.inner.state.read(|index| index.has_arrived(digest)) {
                self.inner.state.change(|index| index.set_absent(digest));
            }
            return Ok(None);
        };
        let is_served = verdict == Verdict::Serve || self.inner.is_ours(digest, rpc).await;
        Ok(is_served.then_some(blob))
    }

    fn held(&self, digest: &Digest, asked: Option<&Repository>, now: Instant) -> Option<Blob> {
        if self.inner.state.read(|index| index.verdict(digest, asked)) != Verdict::Serve {
            return None;
        }
        self.inner.link.read().unwrap_or_else(PoisonError::into_inner).contents.as_ref()?.held(digest, now)
    }

    async fn find(&self, digest: &Digest, asked: Option<&Repository>) -> Result<Option<Found>, StoreError> {
        if let Some(blob) = self.open(digest, asked).await? {
            return Ok(Some(Found::Complete(blob)));
        }
        let is_refused = self.inner.state.read(|index| index.verdict(digest, asked)) == Verdict::Refuse;
        let Link { contents: Some(contents), .. } = self.inner.link() else { return Ok(None) };
        if is_refused {
            return Ok(None);
        }
        match self.inner.receptions.open(digest, &contents)? {
            Some(receiving) => Ok(Some(Found::Receiving(receiving))),
            // It may have become complete between the two looks.
            None => Ok(self.open(digest, asked).await?.map(Found::Complete)),
        }
    }

    async fn expect(
        &self,
        digest: &Digest,
        asked: Option<&Repository>,
        patience: Duration,
    ) -> Result<Option<Found>, StoreError> {
        let mut changes = self.inner.receptions.changes();
        let deadline = tokio::time::Instant::now() + patience;
        while self.inner.receptions.expects(digest) {
            if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                break;
            }
            if let Some(found) = self.find(digest, asked).await? {
                return Ok(Some(found));
            }
        }
        self.find(digest, asked).await
    }

    fn pulls(&self, repository: &Repository, reference: &TagOrDigest) {
        // Without filters all that is received is offered.
        if !self.inner.settings.filters.exclude_nothing() {
            self.inner.state.change(|index| index.pulls(repository, reference, Instant::now()));
        }
    }

    async fn referrers(&self, subject: &Digest) -> Result<Vec<Referrer>, StoreError> {
        Ok(self.inner.state.read(|index| index.referrers(subject)))
    }

    fn subscribe(&self) -> Changes {
        self.inner.state.subscribe()
    }

    fn offered(&self) -> BTreeMap<String, Offered> {
        self.inner.state.read(Index::offered)
    }

    fn knows_registry(&self, registry: &str) -> bool {
        self.inner.state.read(|index| index.knows_registry(registry))
    }

    fn outcomes(&self) -> broadcast::Receiver<Outcome> {
        self.inner.outcomes.subscribe()
    }

    fn inventory(&self, limit: usize) -> Inventory {
        let held = self.inner.state.read(|index| index.inventory(limit));
        let (arriving, more_arriving) = self.inner.receptions.arriving(limit);
        Inventory { arriving, more_arriving, ..held }
    }

    fn ingests(&self) -> Option<Ingests> {
        Some(self.inner.receptions.ingests())
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.inner.state.health()
    }
}

// === impl Inner ===

impl Inner {
    fn link(&self) -> Link {
        self.link.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_link(&self, change: impl FnOnce(&mut Link)) {
        change(&mut self.link.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// What is told of content that is being received.
    fn received(self: &Arc<Self>, news: News) {
        tracing::trace!(?news, "ingests");
        match news {
            News::Receiving(digest) => {
                self.state.change(|index| index.set_receiving(&digest, true));
            }
            News::NotReceiving(digest) => {
                self.state.change(|index| index.set_receiving(&digest, false));
            }
            News::Arrived(digest) => self.stored(&digest),
            News::Discarded(digest) => self.tell(Outcome::Discarded(digest)),
            News::MayHaveArrived(digest) => self.claim_later(digest),
        }
    }

    /// Content was received for our namespace, and is in place.
    fn stored(&self, digest: &Digest) {
        // containerd records whose it is only after the file is in place.
        self.ownership.learn(digest, true);
        self.state.change(|index| index.set_arrived(digest));
        self.tell(Outcome::Stored(digest.clone()));
    }

    fn tell(&self, outcome: Outcome) {
        // Nobody may be listening.
        let _ = self.outcomes.send(outcome);
    }

    /// Finds out whose content is that may be ours.
    fn claim_later(self: &Arc<Self>, digest: Digest) {
        if let Ok(permit) = Arc::clone(&self.claims).try_acquire_owned() {
            let inner = Arc::clone(self);
            self.runtime.spawn(async move {
                let _permit = permit;
                inner.claim(&digest).await;
            });
        }
    }

    /// Takes content for arrived if containerd says that it is ours.
    async fn claim(&self, digest: &Digest) {
        for wait in CLAIMS {
            tokio::time::sleep(wait).await;
            let Some(rpc) = self.link().rpc else { continue };
            if let Ok(Ok(true)) = tokio::time::timeout(OWNERSHIP_TIMEOUT, rpc.has(digest)).await {
                self.stored(digest);
                return;
            }
        }
    }

    /// Whether content that no image is known to have belongs to our namespace.
    async fn is_ours(&self, digest: &Digest, rpc: Option<Rpc>) -> bool {
        let asked = digest.clone();
        let ask = || async move {
            let answer = tokio::time::timeout(OWNERSHIP_TIMEOUT, rpc?.has(&asked)).await;
            match answer {
                Ok(Ok(is_ours)) => Some(is_ours),
                Ok(Err(error)) => {
                    tracing::debug!(digest = %asked, %error, "not served: its owner is not known");
                    None
                }
                Err(_) => None,
            }
        };
        self.ownership.is_ours(digest, ask).await
    }
}
