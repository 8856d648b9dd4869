//! What every store promises, checked of each, and what only one of them does.

#![allow(clippy::unwrap_used)]

mod conformance;
mod containerd;
mod oci_layout;
mod receiving;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use spegel::oci::{Digest, Filters, Key, Repository, TagName, TagOrDigest};
use spegel::store::{Change, Changes, Health, Store};
use spegel_benches::image::{Compression, Image, ImageBuilder, digest_of};
use tempfile::TempDir;

/// How long something may take that has to happen. Real daemons on a busy machine are slow.
const DEADLINE: Duration = Duration::from_secs(30);

/// A platform that no machine of ours has.
const OTHER_PLATFORM: &str = "linux/s390x";

/// What holds content for a store: the tests put images there and take them away.
trait Host {
    /// Adds an image with the content that it has.
    fn put(&mut self, image: &Image);

    /// Removes an image, and content that no other image needs.
    fn remove(&mut self, image: &Image);

    /// A store of it.
    fn store(&self, filters: Filters) -> Arc<dyn Store>;
}

/// Keeps what a subscriber knows, and checks that each change is one.
struct Follower {
    changes: Changes,
    held: BTreeSet<Key>,
}

impl Follower {
    fn new(store: &Arc<dyn Store>) -> Self {
        Self { changes: store.subscribe(), held: BTreeSet::new() }
    }

    /// Reads changes until what is held is as it should be.
    async fn until(&mut self, what: &str, is_done: impl Fn(&BTreeSet<Key>) -> bool) {
        let reading = async {
            while !is_done(&self.held) {
                match self.changes.next().await.expect("the store is still there") {
                    Change::Added(keys) => {
                        assert!(!keys.is_empty());
                        keys.into_iter().for_each(|key| assert!(self.held.insert(key.clone()), "{key} added twice"));
                    }
                    Change::Removed(keys) => {
                        assert!(!keys.is_empty());
                        keys.iter().for_each(|key| assert!(self.held.remove(key), "{key} removed, but never added"));
                    }
                }
            }
        };
        let outcome = tokio::time::timeout(DEADLINE, reading).await;
        assert!(outcome.is_ok(), "{what} did not happen; held: {:#?}", self.held);
    }

    async fn until_all(&mut self, keys: &BTreeSet<Key>) {
        self.until("all keys added", |held| keys.is_subset(held)).await;
    }

    async fn until_none(&mut self, keys: &BTreeSet<Key>) {
        self.until("all keys removed", |held| keys.is_disjoint(held)).await;
    }

    /// What is told without any wait.
    fn told(&mut self) -> Option<Option<Change>> {
        futures_now(self.changes.next())
    }
}

/// The value of a future that is ready at once.
fn futures_now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

/// Waits until content is not served any more.
async fn until_gone(store: &Arc<dyn Store>, digest: &Digest) {
    let polling = async {
        while store.open(digest, None).await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, polling).await.is_ok(), "{digest} is still served");
}

async fn until_health(store: &Arc<dyn Store>, what: &str, is_so: impl FnMut(&Health) -> bool) {
    let mut health = store.health();
    let outcome = tokio::time::timeout(DEADLINE, health.wait_for(is_so)).await;
    assert!(outcome.is_ok(), "{what} did not happen");
}

async fn until_ready(store: &Arc<dyn Store>) {
    until_health(store, "ready", |health| *health == Health::Ready).await;
}

fn everything() -> Filters {
    Filters::new(&[], &[]).unwrap()
}

fn without(pattern: &str) -> Filters {
    Filters::new(&[], &[pattern.to_owned()]).unwrap()
}

/// An image of two layers; what has another seed shares nothing.
fn image(folder: &TempDir, reference: &str, seed: u64) -> Image {
    ImageBuilder::new(reference).layers(2, 10_000, Compression::Gzip, seed).build(folder.path()).unwrap()
}

fn multi_platform(folder: &TempDir, reference: &str, seed: u64) -> Image {
    let platforms = [spegel_benches::image::host_platform(), OTHER_PLATFORM];
    let builder = ImageBuilder::new(reference).platforms(&platforms);
    builder.layers(2, 10_000, Compression::Gzip, seed).build(folder.path()).unwrap()
}

fn tag(image: &Image) -> TagName {
    image.reference().parse().unwrap()
}

fn repository(image: &Image) -> Repository {
    Repository::new(image.registry(), image.repository()).unwrap()
}

fn digests(image: &Image) -> BTreeSet<Digest> {
    image.contents().iter().map(|content| content.digest.parse().unwrap()).collect()
}

/// An image's tag and all of its digests.
fn keys(image: &Image) -> BTreeSet<Key> {
    digests(image).into_iter().map(Key::from).chain([tag(image).into()]).collect()
}

/// A blob's bytes as the store serves them.
async fn bytes(store: &Arc<dyn Store>, digest: &Digest) -> Option<Vec<u8>> {
    bytes_for(store, digest, None).await
}

async fn bytes_for(store: &Arc<dyn Store>, digest: &Digest, asked: Option<&Repository>) -> Option<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let blob = store.open(digest, asked).await.unwrap()?;
    let mut bytes = vec![0; usize::try_from(blob.size).unwrap()];
    blob.file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(digest_of(&bytes), digest.as_str(), "content is what its digest says");
    Some(bytes)
}
