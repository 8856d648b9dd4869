//! What this node has: images and blobs, where their bytes are, and how that changes.

mod blobs;
mod changes;
mod containerd;
mod index;
mod ingest;
mod inventory;
mod metrics;
mod oci_layout;
mod pulls;
mod small;
mod state;
mod tree;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{broadcast, watch};

use crate::oci::{Digest, Key, Repository, TagName, TagOrDigest};

pub use changes::{Changes, Feed};
pub use containerd::{Containerd, ContainerdSettings, Cri, Inspection, inspect};
pub use ingest::{Ingests, Receiving};
pub use inventory::{Arriving, HeldImage, Inventory};
pub use metrics::OfferedCollector;
pub use oci_layout::OciLayout;
pub use small::Small;

/// A complete piece of content, open for reading. Immutable: a later delete or rename does not touch it.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The open file.
    pub file: Arc<File>,
    /// Its length in bytes, as found when it was opened.
    pub size: u64,
    /// All of its bytes, verified, if it is small.
    pub small: Option<Arc<Small>>,
}

impl Blob {
    /// All of its bytes: from memory if it is small, else read now. For what has a bound on its length only.
    ///
    /// # Errors
    /// Those of pread(2), and an end before its length.
    pub fn bytes(&self) -> io::Result<Bytes> {
        if let Some(small) = &self.small {
            return Ok(small.bytes().clone());
        }
        let mut bytes = vec![0; usize::try_from(self.size).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes.into())
    }
}

/// Content of this node.
#[derive(Clone, Debug)]
pub enum Found {
    /// All of it.
    Complete(Blob),
    /// What came of it so far, and the rest as it comes.
    Receiving(Receiving),
}

/// A change of what this node can serve. The keys are never empty texts, and each is reported once until it changes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These can be had here from now on.
    Added(Vec<Key>),
    /// These cannot be had here any more.
    Removed(Vec<Key>),
}

/// What became of content that this node's containerd has received to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was stored: containerd has verified it.
    Stored(Digest),
    /// It was not stored, so its bytes were not those of its digest; or it came to its end as its pull was given up.
    Discarded(Digest),
}

/// Whether a store can answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Not yet, or not at the moment; the text says what it waits for.
    Waiting(String),
    /// Content is listed and followed.
    Ready,
}

/// Why a store failed. Content that is not there is not a failure.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// What was read.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// containerd refused or could not be reached.
    #[error("containerd: {0}")]
    Containerd(String),
    /// The store's content and its description do not belong together; text says how, and what to change.
    #[error("{0}")]
    Mismatch(String),
}

/// A descriptor of a manifest that refers to another (`subject`), for the referrers API.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrer {
    /// The referring manifest's media type.
    pub media_type: String,
    /// Its digest.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its `artifactType`, or its config's media type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Its annotations.
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// How much of one registry is offered to peers, for the `advertised` gauges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offered {
    /// Tags.
    pub image_tags: usize,
    /// Manifests that images are named by (an image's top digest).
    pub image_digests: usize,
    /// All digests that they reach: their own, and the manifests, configs and layers beneath.
    pub content_digests: usize,
}

/// The content of this node.
///
/// Lookups answer from memory: no call to containerd is made on the serving path, but for a digest that is not
/// known yet, which is asked for at most once.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// The digest that a tag names here.
    fn resolve(&self, tag: &TagName) -> Option<Digest>;

    /// Whether a tag names just that digest here.
    fn names(&self, tag: &TagName, digest: &Digest) -> bool {
        self.resolve(tag).as_ref() == Some(digest)
    }

    /// Opens content of this node, or says that it has none that may be served. `asked` is the repository in whose name
    /// the request came, if it named one: it decides for content that no image reaches yet.
    async fn open(&self, digest: &Digest, asked: Option<&Repository>) -> Result<Option<Blob>, StoreError>;

    /// As [`Store::open`], of what is small and was opened a moment ago: from memory, and at once. Nothing does not mean that it is not
    /// here. Stores that keep nothing in memory need not implement it.
    fn held(&self, _digest: &Digest, _asked: Option<&Repository>, _now: Instant) -> Option<Blob> {
        None
    }

    /// As [`Store::open`], but content will do that is only being received. Not for the one who receives it: it would wait for
    /// itself. Stores that never receive anything need not implement it.
    async fn find(&self, digest: &Digest, asked: Option<&Repository>) -> Result<Option<Found>, StoreError> {
        Ok(self.open(digest, asked).await?.map(Found::Complete))
    }

    /// As [`Store::find`], for content that is not here but that this node has asked for: waits up to `patience` for its first bytes.
    /// Nothing at once where it is not on its way. Stores that never receive anything need not implement it.
    async fn expect(
        &self,
        _digest: &Digest,
        _asked: Option<&Repository>,
        _patience: Duration,
    ) -> Result<Option<Found>, StoreError> {
        Ok(None)
    }

    /// Hears that this node's own containerd asks for something in the name of a repository, which is not here: where there are filters, that
    /// decides whether it is offered before its image is recorded. Stores that never receive anything need not implement it.
    fn pulls(&self, _repository: &Repository, _reference: &TagOrDigest) {}

    /// The manifests here whose `subject` is this digest.
    async fn referrers(&self, subject: &Digest) -> Result<Vec<Referrer>, StoreError>;

    /// What is offered now, as one `Added`, and every change from then on, in order, with no gap between the two.
    fn subscribe(&self) -> Changes;

    /// How much is offered, by registry. What has no registry, as images without a qualified name, is under the empty one.
    fn offered(&self) -> std::collections::BTreeMap<String, Offered>;

    /// Whether an image of this registry is here, offered or not. Stores that cannot tell need not implement it.
    fn knows_registry(&self, _registry: &str) -> bool {
        false
    }

    /// What becomes of content that is received, from now on. Who reads slowly misses some. Stores that never receive anything need not
    /// implement it: it ends at once.
    fn outcomes(&self) -> broadcast::Receiver<Outcome> {
        broadcast::channel(1).1
    }

    /// What is here, for people: `limit` images and as many arrivals at the most. Stores that have nothing to show need not implement it.
    fn inventory(&self, _limit: usize) -> Inventory {
        Inventory::default()
    }

    /// How pulls in progress are noticed; nothing for stores that never receive anything.
    fn ingests(&self) -> Option<Ingests> {
        None
    }

    /// Whether it can answer, followed.
    fn health(&self) -> watch::Receiver<Health>;
}
