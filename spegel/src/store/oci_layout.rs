//! Directories in the [OCI image layout](https://github.com/opencontainers/image-spec/blob/main/image-layout.md) as a
//! store: for hosts without containerd, for tests and for the demo.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::{Notify, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::blobs::{BlobDir, io_error, read_bounded};
use super::index::{Index, Verdict};
use super::state::State;
use super::tree::{Contents, Tree};
use super::{Blob, Changes, Health, Inventory, Offered, Referrer, Store, StoreError};
use crate::oci::{Algorithm, Descriptor, Digest, Filters, MAX_MANIFEST_BYTES, Manifest, Repository, TagName};

/// How long to let changes gather before the layout is read again: writers put many blobs at once and the index last.
const SETTLE: Duration = Duration::from_millis(100);

/// How often the directories are looked at without being told: inotify drops events when its queue is full, and file
/// systems of a network send none.
const RECHECK: Duration = Duration::from_secs(5);

/// How long a layout may take to be read again before its reader is left to itself and the failure is logged.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(60);

/// The annotation of a descriptor in `index.json` that holds the image's name.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A store of one or more OCI image layouts.
///
/// An image's tag is the full reference in `org.opencontainers.image.ref.name` (`registry/repository:tag`); an image
/// without one is there by digest only. Where two entries have one name, the first counts. Changes are noticed while it
/// runs; a layout that cannot be read any more keeps its last state until it can.
#[derive(Debug)]
pub struct OciLayout {
    inner: Arc<Inner>,
    /// Ends the watcher with the store.
    _watcher: DropGuard,
}

#[derive(Debug)]
struct Inner {
    layouts: Vec<Layout>,
    state: State,
}

/// One directory, and the images that it named when it could last be read.
#[derive(Debug)]
struct Layout {
    blobs: BlobDir,
    images: Mutex<Vec<(Option<String>, Descriptor)>>,
}

/// What changes with a layout's content: `index.json` (replaced by rename, or written in place), and the directories of
/// blobs, whose time of change moves with each file that comes or goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Fingerprint(Vec<Option<(u64, u64, u64, SystemTime)>>);

#[derive(serde::Deserialize)]
struct Marker {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

/// The part of `index.json` that [`Manifest`] leaves out: how its entries are annotated.
#[derive(serde::Deserialize)]
struct Annotated {
    manifests: Vec<AnnotatedEntry>,
}

#[derive(serde::Deserialize)]
struct AnnotatedEntry {
    annotations: Option<BTreeMap<String, String>>,
}

// === impl OciLayout ===

impl OciLayout {
    /// Reads the layouts and goes on following them on the current tokio runtime, until the store is dropped.
    ///
    /// # Errors
    /// [`StoreError::Io`] for what cannot be read, [`StoreError::Mismatch`] for a directory that is no image layout.
    pub fn open(dirs: Vec<PathBuf>, filters: Filters) -> Result<Arc<Self>, StoreError> {
        let layouts = dirs.into_iter().map(Layout::open).collect::<Result<Vec<_>, _>>()?;
        let inner = Arc::new(Inner { layouts, state: State::new(filters, Health::Ready) });
        let before = inner.fingerprint();
        inner.reload();
        let token = CancellationToken::new();
        tokio::spawn(follow(inner.clone(), before, token.clone()));
        Ok(Arc::new(Self { inner, _watcher: token.drop_guard() }))
    }
}

#[async_trait]
impl Store for OciLayout {
    fn resolve(&self, tag: &TagName) -> Option<Digest> {
        self.inner.state.read(|index| index.resolve(tag).cloned())
    }

    fn names(&self, tag: &TagName, digest: &Digest) -> bool {
        self.inner.state.read(|index| index.resolve(tag) == Some(digest))
    }

    async fn open(&self, digest: &Digest, asked: Option<&Repository>) -> Result<Option<Blob>, StoreError> {
        let (verdict, size) =
            self.inner.state.read(|index| (index.verdict(digest, asked), index.expected_size(digest)));
        if verdict == Verdict::Refuse {
            return Ok(None);
        }
        for layout in &self.inner.layouts {
            let blob = layout.blobs.open(digest)?;
            if let Some(blob) = blob.filter(|blob| size.is_none_or(|size| size == blob.size)) {
                return Ok(Some(blob));
            }
        }
        if self.inner.state.read(|index| index.is_present(digest)) {
            self.inner.state.change(|index| index.set_absent(digest));
        }
        Ok(None)
    }

    fn held(&self, digest: &Digest, asked: Option<&Repository>, now: Instant) -> Option<Blob> {
        let (verdict, size) =
            self.inner.state.read(|index| (index.verdict(digest, asked), index.expected_size(digest)));
        if verdict != Verdict::Serve {
            return None;
        }
        let mut held = self.inner.layouts.iter().filter_map(|layout| layout.blobs.held(digest, now));
        held.find(|blob| size.is_none_or(|size| size == blob.size))
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

    fn inventory(&self, limit: usize) -> Inventory {
        self.inner.state.read(|index| index.inventory(limit))
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.inner.state.health()
    }
}

// === impl Layout ===

impl Layout {
    fn open(dir: PathBuf) -> Result<Self, StoreError> {
        let layout = Self { blobs: BlobDir::new(dir), images: Mutex::default() };
        layout.read()?;
        Ok(layout)
    }

    fn dir(&self) -> &Path {
        self.blobs.root()
    }

    /// Reads the layout's marker and its index.
    fn read(&self) -> Result<(), StoreError> {
        let path = self.dir().join("oci-layout");
        let marker: Marker = parse(&path, &read(&path)?)?;
        if marker.version.split('.').next() != Some("1") {
            let version = marker.version;
            return Err(StoreError::Mismatch(format!(
                "{} says version {version:?}, but only OCI image layouts of version 1 are known: write the layout with a tool that makes these",
                path.display()
            )));
        }
        let path = self.dir().join("index.json");
        let bytes = read(&path)?;
        let not_an_index = |reason: &dyn std::fmt::Display| malformed(&path, reason);
        let manifest = Manifest::parse(&bytes).map_err(|error| not_an_index(&error))?;
        if !manifest.is_index {
            return Err(not_an_index(&"it is a manifest and not an index"));
        }
        let annotated: Annotated = parse(&path, &bytes)?;
        let names = annotated.manifests.into_iter().map(|entry| entry.annotations?.remove(REF_NAME));
        let images = names.zip(manifest.children).collect();
        *self.images.lock().unwrap_or_else(PoisonError::into_inner) = images;
        Ok(())
    }

    /// What is watched: the directory rather than `index.json`, because that is replaced by rename.
    fn watched(&self) -> Vec<PathBuf> {
        let blobs = self.dir().join("blobs");
        let algorithms = [Algorithm::Sha256, Algorithm::Sha512].map(|algorithm| blobs.join(algorithm.as_str()));
        [self.dir().to_owned(), blobs].into_iter().chain(algorithms).collect()
    }
}

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    let file = File::open(path).map_err(|error| io_error(path, error))?;
    read_bounded(&file, MAX_MANIFEST_BYTES)
        .ok_or_else(|| malformed(path, &format!("it cannot be read, or has more than {MAX_MANIFEST_BYTES} bytes")))
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| malformed(path, &error))
}

fn malformed(path: &Path, reason: &dyn std::fmt::Display) -> StoreError {
    StoreError::Mismatch(format!(
        "{} does not belong to an OCI image layout: {reason}; name a directory with oci-layout, index.json and blobs",
        path.display()
    ))
}

// === impl Inner ===

impl Contents for Inner {
    /// Layouts are also copied file by file, and half a file has the name of the whole.
    fn size(&self, digest: &Digest, expected: Option<u64>) -> Option<u64> {
        let mut sizes = self.layouts.iter().filter_map(|layout| layout.blobs.size(digest).ok().flatten());
        sizes.find(|&size| expected.is_none_or(|expected| expected == size))
    }

    fn manifest(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.layouts.iter().find_map(|layout| layout.blobs.manifest(digest))
    }
}

impl Inner {
    fn fingerprint(&self) -> Fingerprint {
        let stat = |path: PathBuf| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.dev(), metadata.ino(), metadata.len(), metadata.modified().ok()?))
        };
        let paths = self.layouts.iter().flat_map(|layout| {
            let index = ["index.json", "oci-layout"].map(|name| layout.dir().join(name));
            index.into_iter().chain(layout.watched().into_iter().skip(1))
        });
        Fingerprint(paths.map(stat).collect())
    }

    /// Takes over the images that the layouts name, as far as their content is here.
    fn reload(&self) {
        let mut names = HashSet::new();
        let mut trees = Vec::new();
        for layout in &self.layouts {
            let images = layout.images.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for (name, top) in images {
                let name = match name {
                    Some(name) if names.insert(name.clone()) => name,
                    // Its repository still counts, for the filters.
                    Some(taken) => format!("{taken}@{}", top.digest),
                    None => top.digest.to_string(),
                };
                trees.push((name, Tree::walk(&top.digest, Some(top.size), self)));
            }
        }
        let (added, removed) = self.state.change(|index| index.replace(trees));
        if added + removed > 0 {
            tracing::debug!(added, removed, "read the OCI layouts");
        }
    }

    /// Reads all layouts again. The error is that of the first that could not be read, which keeps its last state.
    fn refresh(&self) -> Result<(), StoreError> {
        let results: Vec<_> = self.layouts.iter().map(Layout::read).collect();
        self.reload();
        results.into_iter().collect()
    }
}

// === following ===

/// Follows the layouts until the token fires.
async fn follow(inner: Arc<Inner>, mut seen: Fingerprint, token: CancellationToken) {
    let changed = Arc::new(Notify::new());
    let mut watcher = watch_all(&inner, &changed);
    let mut trouble: Option<String> = None;
    let mut recheck = tokio::time::interval(RECHECK);
    recheck.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let is_told = tokio::select! {
            () = token.cancelled() => break,
            () = changed.notified() => true,
            _ = recheck.tick() => false,
        };
        if is_told {
            tokio::time::sleep(SETTLE).await;
        }
        let now = inner.fingerprint();
        if !is_told && now == seen && trouble.is_none() {
            continue;
        }
        if now != seen {
            // Directories that were replaced or have come since are not watched yet.
            watcher = watch_all(&inner, &changed);
        }
        seen = now;
        let outcome = refresh(&inner).await.err();
        report(outcome.as_deref(), trouble.as_deref());
        trouble = outcome;
    }
    drop(watcher);
    inner.state.close();
}

async fn refresh(inner: &Arc<Inner>) -> Result<(), String> {
    let inner = inner.clone();
    let reading = tokio::task::spawn_blocking(move || inner.refresh());
    match tokio::time::timeout(RELOAD_TIMEOUT, reading).await {
        Ok(Ok(outcome)) => outcome.map_err(|error| error.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("reading takes more than {RELOAD_TIMEOUT:?}")),
    }
}

/// Each trouble is told once, and once that it is over.
fn report(now: Option<&str>, before: Option<&str>) {
    match (now, before) {
        (Some(error), before) if before != Some(error) => {
            tracing::warn!(error, "an OCI layout cannot be read; what it held before goes on being served");
        }
        (None, Some(_)) => tracing::info!("the OCI layout can be read again"),
        _ => {}
    }
}

/// A watcher of all layouts' directories. What cannot be watched is found by the periodic look.
fn watch_all(inner: &Inner, changed: &Arc<Notify>) -> Option<RecommendedWatcher> {
    let notify = changed.clone();
    let tell = move |event: notify::Result<notify::Event>| {
        // Our own reads are events too.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            notify.notify_one();
        }
    };
    let mut watcher = notify::recommended_watcher(tell)
        .inspect_err(
            |error| tracing::warn!(%error, "cannot watch OCI layouts; changes are noticed within seconds instead"),
        )
        .ok()?;
    for path in inner.layouts.iter().flat_map(Layout::watched) {
        if let Err(error) = watcher.watch(&path, RecursiveMode::NonRecursive) {
            tracing::debug!(path = %path.display(), %error, "not watched");
        }
    }
    Some(watcher)
}
