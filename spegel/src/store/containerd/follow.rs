//! Following containerd: connect, subscribe, list, and keep the index with what its events tell.

use std::collections::HashSet;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use rand::Rng as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::blobs::{BlobDir, io_error};
use super::super::index::Index;
use super::super::ingest::Watcher;
use super::super::tree::{Contents, Tree};
use super::super::{Health, Outcome, StoreError};
use super::Inner;
use super::rpc::{Event, ImageRecord, Rpc};
use crate::oci::Digest;

/// The wait before the second try to reach containerd; each further one doubles it.
const FIRST_RETRY: Duration = Duration::from_millis(250);

/// The longest wait between two tries.
const LAST_RETRY: Duration = Duration::from_secs(10);

/// The second list follows the first by this much: containerd does not say when its events begin.
const SECOND_LIST: Duration = Duration::from_secs(2);

/// How often everything is listed again, in case an event was lost. Twice as long at most, so that nodes do not do it at
/// the same time.
const RELIST: Duration = Duration::from_secs(180);

/// How many questions for the owner of content are under way at once while an image is walked.
const PARALLEL_QUESTIONS: usize = 16;

/// Content as a walk sees it: here, and of our namespace.
struct Ours {
    inner: Arc<Inner>,
    dir: BlobDir,
    ours: HashSet<Digest>,
    others: HashSet<Digest>,
    /// Whether what the walk meets outside these two sets is to be asked for; else it is not ours.
    asks: bool,
    questions: Mutex<Vec<Digest>>,
}

/// What is followed across connections: pulls go on in the directory whatever becomes of those.
#[derive(Default)]
struct Receiving {
    dir: Option<PathBuf>,
    watcher: Option<Watcher>,
}

/// One connection's time.
struct Session {
    inner: Arc<Inner>,
    rpc: Rpc,
    dir: BlobDir,
}

/// Follows containerd until the token fires, or until another try cannot help.
pub(super) async fn run(inner: Arc<Inner>, token: CancellationToken) -> Result<(), StoreError> {
    let outcome = token.run_until_cancelled(reconnect(&inner)).await;
    inner.set_link(|link| link.rpc = None);
    inner.state.close();
    match outcome {
        Some(Err(error)) => Err(error),
        _ => Ok(()),
    }
}

async fn reconnect(inner: &Arc<Inner>) -> Result<Infallible, StoreError> {
    let mut wait = FIRST_RETRY;
    let mut receiving = Receiving::default();
    loop {
        let Err(error) = session(inner, &mut wait, &mut receiving).await;
        inner.set_link(|link| link.rpc = None);
        match error {
            StoreError::Containerd(_) => {}
            fatal => return Err(fatal),
        }
        let socket = inner.settings.socket.display();
        // That it is away is said once, however the reason changes while it starts.
        let is_first = wait == FIRST_RETRY;
        inner.state.set_health(Health::Waiting(format!("waiting for containerd at {socket}: {error}")));
        match is_first {
            true => tracing::warn!(%socket, %error, "containerd cannot be followed; waiting for it"),
            false => tracing::debug!(%socket, %error, "containerd still cannot be followed"),
        }
        tokio::time::sleep(jittered(wait)).await;
        wait = (wait * 2).min(LAST_RETRY);
    }
}

/// Between the duration and twice that.
fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(rand::rng().random_range(1.0..2.0))
}

/// One connection, from subscribing to the error that ends it.
async fn session(inner: &Arc<Inner>, wait: &mut Duration, receiving: &mut Receiving) -> Result<Infallible, StoreError> {
    let rpc = Rpc::connect(&inner.settings.socket, &inner.settings.namespace).await?;
    let path = match &inner.settings.content_path {
        Some(path) => path.clone(),
        None => rpc.content_path().await?,
    };
    let dir = BlobDir::new(path);
    let mut events = rpc.events();
    let session = Session { inner: inner.clone(), rpc, dir };
    let mut listed = 0_u64;
    let mut list_at = Instant::now();
    loop {
        tokio::select! {
            event = events.next() => session.handle(event?).await?,
            () = tokio::time::sleep_until(list_at) => {
                session.list().await?;
                receiving.watch(inner, &session.dir).await?;
                *wait = FIRST_RETRY;
                listed += 1;
                list_at = Instant::now() + if listed == 1 { SECOND_LIST } else { jittered(RELIST) };
            }
        }
    }
}

// === impl Receiving ===

impl Receiving {
    /// Watches what is received beside the blobs of `dir`, from the first call on or when the directory is another.
    async fn watch(&mut self, inner: &Arc<Inner>, dir: &BlobDir) -> Result<(), StoreError> {
        if self.dir.as_deref() == Some(dir.root()) {
            return Ok(());
        }
        let (inner, dir) = (inner.clone(), dir.clone());
        self.dir = Some(dir.root().to_path_buf());
        let watcher = blocking(move || {
            let (receptions, told) = (inner.receptions.clone(), inner.clone());
            Watcher::start(dir, &inner.settings.namespace, receptions, move |news| Inner::received(&told, news))
        });
        self.watcher = watcher
            .await?
            .inspect_err(
                |error| tracing::warn!(%error, "pulls in progress are not noticed, only what they leave is offered"),
            )
            .ok();
        Ok(())
    }
}

// === impl Session ===

impl Session {
    /// Lists everything and takes over the differences.
    async fn list(&self) -> Result<(), StoreError> {
        let images = self.rpc.images().await?;
        let ours = self.owned_content().await?;
        let total = images.len();
        let contents = self.contents(ours, false);
        let trees = blocking(move || {
            let walk = |image: ImageRecord| (image.name, Tree::walk(&image.top, image.size, &contents));
            images.into_iter().map(walk).collect::<Vec<_>>()
        })
        .await?;
        let (added, removed) = self.inner.state.change(|index| index.replace(trees));
        self.inner.ownership.forget_all();
        self.drop_what_went().await?;
        self.inner.set_link(|link| {
            link.rpc = Some(self.rpc.clone());
            link.contents = Some(self.dir.clone());
        });
        if self.inner.state.set_health(Health::Ready) {
            tracing::info!(images = total, content = %self.dir.root().display(), "follows containerd");
        }
        tracing::debug!(images = total, added, removed, "listed containerd's images");
        Ok(())
    }

    /// Content that came without an image may have been collected without an event.
    async fn drop_what_went(&self) -> Result<(), StoreError> {
        let (arrived, dir) = (self.inner.state.read(Index::arrived), self.dir.clone());
        let is_gone = move |digest: &Digest| matches!(dir.size(digest), Ok(None));
        let gone = blocking(move || arrived.into_iter().filter(is_gone).collect::<Vec<_>>()).await?;
        for digest in gone {
            self.inner.state.change(|index| index.set_absent(&digest));
        }
        Ok(())
    }

    /// What containerd lists as ours, checked against the directory that it ought to be in.
    async fn owned_content(&self) -> Result<HashSet<Digest>, StoreError> {
        let mut is_second_look = false;
        loop {
            let listed = self.rpc.contents().await?;
            let dir = self.dir.clone();
            let (is_there, listed) = blocking(move || (has_any(&dir, &listed), listed)).await?;
            if is_there? {
                return Ok(listed);
            }
            // All of it may have been collected between the list and the look.
            if is_second_look {
                return Err(self.mismatch(listed.len()));
            }
            is_second_look = true;
        }
    }

    fn mismatch(&self, listed: usize) -> StoreError {
        let (socket, path) = (self.inner.settings.socket.display(), self.dir.root().display());
        let found = match listed {
            0 => format!("there is neither {path} nor the directory that it should be in"),
            _ => format!("containerd at {socket} lists {listed} blobs, and none of them is in {path}"),
        };
        StoreError::Mismatch(format!(
            "{found}: this is not its content directory; \
             set --containerd-content-path to <root>/io.containerd.content.v1.content, where <root> is that of `containerd config dump`, \
             and mount it into the container at that path"
        ))
    }

    async fn handle(&self, event: Event) -> Result<(), StoreError> {
        tracing::trace!(?event, "containerd told");
        match event {
            Event::Image(name) => match self.rpc.image(&name).await? {
                Some(image) => self.put(&image).await?,
                None => {
                    self.inner.state.change(|index| index.remove(&name));
                }
            },
            Event::ContentCreated(digest) => {
                self.inner.ownership.learn(&digest, true);
                self.inner.tell(Outcome::Stored(digest.clone()));
                if !self.inner.state.read(|index| index.is_present(&digest)) {
                    let waiting = self.inner.state.read(|index| index.images_that_name(&digest));
                    self.walk_again(waiting).await?;
                }
            }
            Event::ContentDeleted(digest) => {
                self.inner.ownership.learn(&digest, false);
                self.inner.state.change(|index| index.set_absent(&digest));
            }
        }
        Ok(())
    }

    /// An image is there, or is another than before.
    async fn put(&self, image: &ImageRecord) -> Result<(), StoreError> {
        let tree = self.walk(&image.top, image.size).await?;
        // Before anything was there to compare, the directory could not be told from the right one.
        if tree.nodes()[0].size.is_none() && self.rpc.has(&image.top).await? {
            self.owned_content().await?;
        }
        let (added, removed) = self.inner.state.change(|index| index.put(&image.name, tree));
        tracing::debug!(image = image.name, added, removed, "an image changed");
        let outdated = self.inner.state.read(Index::outdated_images);
        self.walk_again(outdated).await
    }

    async fn walk_again(&self, images: Vec<(String, Digest)>) -> Result<(), StoreError> {
        for (name, top) in images {
            let tree = self.walk(&top, None).await?;
            self.inner.state.change(|index| index.put(&name, tree));
        }
        Ok(())
    }

    /// Walks an image, asking containerd for the owner of each piece that is not known to be ours. Each round goes a level
    /// deeper at least, and the depth of an image is bounded.
    async fn walk(&self, top: &Digest, size: Option<u64>) -> Result<Tree, StoreError> {
        let mut contents = self.contents(HashSet::new(), true);
        loop {
            let top = top.clone();
            let (tree, back) = blocking(move || (Tree::walk(&top, size, &contents), contents)).await?;
            contents = back;
            let questions = std::mem::take(contents.questions.get_mut().unwrap_or_else(PoisonError::into_inner));
            if questions.is_empty() {
                return Ok(tree);
            }
            let ask = |digest: Digest| async move { self.rpc.has(&digest).await.map(|is_ours| (digest, is_ours)) };
            let mut answers = futures::stream::iter(questions).map(ask).buffer_unordered(PARALLEL_QUESTIONS);
            while let Some(answer) = answers.next().await {
                let (digest, is_ours) = answer?;
                if is_ours {
                    contents.ours.insert(digest)
                } else {
                    contents.others.insert(digest)
                };
            }
        }
    }

    fn contents(&self, ours: HashSet<Digest>, asks: bool) -> Ours {
        let (inner, dir) = (self.inner.clone(), self.dir.clone());
        Ours { inner, dir, ours, others: HashSet::new(), asks, questions: Mutex::default() }
    }
}

/// Reads files beside the async threads.
async fn blocking<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> Result<T, StoreError> {
    let outcome = tokio::task::spawn_blocking(read).await;
    outcome.map_err(|error| StoreError::Containerd(format!("reading content: {error}")))
}

/// Whether the directory has any of these, or may become it if there are none: containerd 2.2 makes it with the first
/// content, below a root that is there.
fn has_any(dir: &BlobDir, digests: &HashSet<Digest>) -> Result<bool, StoreError> {
    for digest in digests {
        match dir.size(digest) {
            Ok(Some(_)) => return Ok(true),
            Ok(None) => {}
            Err(error) => return Err(io_error(&dir.path(digest), error)),
        }
    }
    Ok(digests.is_empty() && (dir.root().is_dir() || dir.root().parent().is_some_and(Path::is_dir)))
}

// === impl Contents for Ours ===

impl Ours {
    fn is_ours(&self, digest: &Digest) -> bool {
        if self.ours.contains(digest) {
            return true;
        }
        if !self.asks || self.others.contains(digest) {
            return false;
        }
        // What an image has is ours until an event says otherwise.
        if self.inner.state.read(|index| index.is_present(digest)) {
            return true;
        }
        self.questions.lock().unwrap_or_else(PoisonError::into_inner).push(digest.clone());
        false
    }
}

impl Contents for Ours {
    /// containerd verified what it committed. Were the image's claim believed, an index that gives a wrong length for
    /// another image's content would hide that content.
    fn size(&self, digest: &Digest, _expected: Option<u64>) -> Option<u64> {
        let size = self.dir.size(digest).ok()??;
        self.is_ours(digest).then_some(size)
    }

    fn manifest(&self, digest: &Digest) -> Option<Vec<u8>> {
        // Asked for only after `size` said that it is ours.
        self.dir.manifest(digest)
    }
}
