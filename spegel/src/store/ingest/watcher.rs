//! The thread that looks at containerd's ingests: inotify says where something happens, stat(2) says what it came to.
//!
//! containerd makes `ingest/<hash>/` with `ref`, `total` and then `data`, appends to `data`, and at last renames it to the blob's path.
//! The order of the first is what makes `ref` and `total` whole once `data` is there.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::super::blobs::{BlobDir, open_regular, read_bounded};
use super::Receptions;
use super::reference::Reference;
use super::tracker::{MAX_KNOWN, Sight};
use super::watches::{IDLE, LOOK, Limits, Watches};
use crate::oci::Digest;

/// The time between two looks at what happens all the time: a layer that arrives at 400 MB/s would else wake two threads for each
/// MiB. What happens after a pause is seen at once.
const PACE: Duration = Duration::from_millis(6);
/// How often it is tried again to watch a directory that is not there.
const RETRY: Duration = Duration::from_secs(5);
/// How often all are looked through while there are more than are followed.
const LOOK_THROUGH: Duration = Duration::from_secs(30);
/// How often the log says that there are too many.
const SAY_AGAIN: Duration = Duration::from_secs(600);
/// How many are looked through at the most.
const MAX_ENTRIES: usize = 65_536;
/// The largest `ref` and `total` that are read, in bytes.
const MAX_TEXT: usize = 4096;

/// What became of a digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum News {
    /// It is being received, and can be had.
    Receiving(Digest),
    /// It cannot be had as something that is being received any more.
    NotReceiving(Digest),
    /// It is complete, and was received for our namespace.
    Arrived(Digest),
    /// It is complete, and was being received for our namespace a moment ago. That the one is the other was not seen: it may be another's.
    MayHaveArrived(Digest),
    /// All of it came for our namespace, and was not kept.
    Discarded(Digest),
}

/// Ends the thread when dropped.
#[derive(Debug)]
pub(in super::super) struct Watcher {
    stop: Arc<OwnedFd>,
}

/// The thread's state.
struct Watch<F> {
    dir: BlobDir,
    namespace: String,
    receptions: Arc<Receptions>,
    tell: F,
    watches: Watches,
    root: Root,
    /// The directory of ingests is there, and cannot be watched: it is looked at.
    is_blind: bool,
    /// When it is tried again to get an instance of the kernel's, where it had none left.
    retry_at: Option<Instant>,
    /// There are more than are followed: so many, and when they are looked through again.
    overlooked: usize,
    look_through_at: Option<Instant>,
    /// When it was last said that there are too many to be watched, and to be followed.
    told_late: Option<Instant>,
    told_overlooked: Option<Instant>,
    /// Ingests that were seen to be made, and whose `ref` was not read yet.
    new: HashSet<Box<str>>,
}

/// Where new ingests are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    /// The directory of ingests itself.
    Ingests(i32),
    /// One above it, since it is not there yet.
    Above(i32),
    Nowhere,
}

/// What the events of one turn say about an ingest.
#[derive(Clone, Copy, Debug, Default)]
struct Hint {
    made: bool,
    closed: bool,
    moved: bool,
}

/// What the events of one turn say.
#[derive(Debug, Default)]
struct Turn {
    folders: HashMap<Box<str>, Hint>,
    ignored: Vec<i32>,
    look_everywhere: bool,
    root_changed: bool,
}

// === impl Watcher ===

impl Watcher {
    /// Looks at the ingests beside the blobs of `dir` until dropped, and tells what comes of those of `namespace`.
    /// What begins after this returned is noticed from its first byte. Reads the directory, so it is not for async threads.
    ///
    /// # Errors
    /// No thread or descriptor is left for it.
    pub(in super::super) fn start(
        dir: BlobDir,
        namespace: &str,
        receptions: Arc<Receptions>,
        tell: impl Fn(News) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        if let Err(error) = &inotify {
            tracing::warn!(%error, "no inotify instance is left (fs.inotify.max_user_instances): pulls in progress are noticed late");
        }
        let mut watch = Watch::new(dir, namespace, receptions, tell, inotify.ok());
        // Not by the thread: an ingest that begins before it runs would be taken for one that a crash left.
        watch.watch_root(Instant::now());
        let stopped = stop.clone();
        std::thread::Builder::new().name("ingest".to_owned()).spawn(move || watch.run(&stopped))?;
        Ok(Self { stop })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Cannot fail: the counter is 0.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
    }
}

// === impl Watch ===

impl<F: Fn(News)> Watch<F> {
    fn new(dir: BlobDir, namespace: &str, receptions: Arc<Receptions>, tell: F, inotify: Option<OwnedFd>) -> Self {
        Self {
            dir,
            namespace: namespace.to_owned(),
            receptions,
            tell,
            watches: Watches::new(inotify, Limits::default()),
            root: Root::Nowhere,
            is_blind: false,
            retry_at: None,
            overlooked: 0,
            look_through_at: None,
            told_late: None,
            told_overlooked: None,
            new: HashSet::new(),
        }
    }

    fn run(&mut self, stop: &OwnedFd) {
        loop {
            let timeout = self.timeout(Instant::now());
            match self.wait(stop, timeout) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%error, "pulls in progress are not noticed any more");
                    break;
                }
            }
            let turn = self.read_events();
            let is_busy = !turn.folders.is_empty();
            self.handle(turn, Instant::now());
            if is_busy {
                std::thread::sleep(PACE);
            }
        }
        let all: Vec<Box<str>> = self.receptions.lock().folders().map(Into::into).collect();
        all.iter().for_each(|folder| self.gone(folder));
    }

    /// Waits for events. True if it is time to end.
    fn wait(&self, stop: &OwnedFd, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = timeout.map(|time| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(self.watches.inotify().map(|inotify| PollFd::new(inotify, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(!fds[0].revents().is_empty()),
            Err(error) => Err(error.into()),
        }
    }

    /// How long nothing has to be done but for events; no end to it if nothing is received.
    fn timeout(&self, now: Instant) -> Option<Duration> {
        let deadline = self.receptions.lock().deadline();
        let times = [deadline, self.watches.next_look(now), self.look_through_at];
        let next = times.into_iter().flatten().min().map(|at| at.saturating_duration_since(now));
        let look = (self.watches.inotify().is_none() || self.is_blind).then_some(LOOK);
        let retry = (!matches!(self.root, Root::Ingests(_))).then_some(RETRY);
        [next, look, retry].into_iter().flatten().min()
    }

    fn read_events(&self) -> Turn {
        let mut turn = Turn { look_everywhere: self.watches.inotify().is_none(), ..Turn::default() };
        let Some(inotify) = self.watches.inotify() else { return turn };
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = inotify::Reader::new(inotify.as_fd(), &mut buffer);
        // A turn is bounded, so that a flood of events cannot keep the deadlines from being met.
        for _ in 0..4096 {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::INTR) => continue,
                Err(_) => break,
            };
            let name = event.file_name().and_then(|name| name.to_str().ok()).unwrap_or_default();
            self.note(&mut turn, event.wd(), event.events(), name);
        }
        turn
    }

    fn note(&self, turn: &mut Turn, wd: i32, events: ReadFlags, name: &str) {
        let is_over = events.intersects(ReadFlags::IGNORED);
        turn.look_everywhere |= events.intersects(ReadFlags::QUEUE_OVERFLOW);
        match self.root {
            Root::Ingests(root) if root == wd && !name.is_empty() => {
                turn.folders.entry(name.into()).or_default().made |= events.intersects(ReadFlags::CREATE);
            }
            Root::Ingests(root) | Root::Above(root) if root == wd => turn.root_changed = true,
            _ => {
                let Some(folder) = self.watches.folder(wd) else { return };
                if is_over {
                    turn.ignored.push(wd);
                }
                if name == "data" || is_over {
                    let hint = turn.folders.entry(folder.into()).or_default();
                    hint.closed |= events.intersects(ReadFlags::CLOSE_WRITE);
                    hint.moved |= events.intersects(ReadFlags::MOVED_FROM);
                }
            }
        }
    }

    fn handle(&mut self, turn: Turn, now: Instant) {
        turn.ignored.into_iter().for_each(|wd| self.watches.lost(wd));
        for (folder, hint) in &turn.folders {
            self.look(folder, *hint, now);
        }
        self.retry(now);
        if turn.root_changed || !matches!(self.root, Root::Ingests(_)) {
            self.watch_root(now);
        } else if turn.look_everywhere {
            self.look_everywhere(now);
        } else if self.look_through_at.is_some_and(|at| at <= now) {
            self.look_through(now);
        }
        for folder in self.watches.due(now) {
            self.look(&folder, Hint::default(), now);
        }
        let (given_up, discarded) = {
            let mut tracker = self.receptions.lock();
            (tracker.tick(now), tracker.take_discarded())
        };
        discarded.into_iter().for_each(|digest| (self.tell)(News::Discarded(digest)));
        given_up.into_iter().for_each(|digest| self.tell_receiving(digest));
        self.count(now);
    }

    /// Tries to get what the kernel did not have before.
    fn retry(&mut self, now: Instant) {
        if self.watches.inotify().is_some() || self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_at = Some(now + RETRY);
        if let Ok(inotify) = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) {
            tracing::info!("there is an inotify instance again: pulls in progress are noticed at once");
            self.watches.set_inotify(inotify);
        }
    }

    /// Says how the ingests are noticed: in the figures, and in the log where that is late, or not at all.
    fn count(&mut self, now: Instant) {
        let [watched, looked_at, late] = self.watches.counts(now);
        self.receptions.count([watched, looked_at, self.overlooked]);
        let is_news = |told: &mut Option<Instant>| {
            let is_news = told.is_none_or(|at| now.saturating_duration_since(at) >= SAY_AGAIN);
            *told = if is_news { Some(now) } else { *told };
            is_news
        };
        // Of a kernel that has no instance for us it was said before.
        if late > 0 && self.watches.inotify().is_some() && is_news(&mut self.told_late) {
            tracing::warn!(
                watched,
                late,
                "more pulls in progress than can be watched (fs.inotify.max_user_watches?): the others are noticed late"
            );
        }
        if self.overlooked > 0 && is_news(&mut self.told_overlooked) {
            let (overlooked, path) = (self.overlooked, self.ingests());
            tracing::warn!(overlooked, path = %path.display(), "more ingests than are followed: those that grow go first. Did pulls leave them behind?");
        }
    }

    fn ingests(&self) -> PathBuf {
        self.dir.root().join("ingest")
    }

    /// Watches the directory of ingests, or the nearest one above it that is there.
    fn watch_root(&mut self, now: Instant) {
        let Some(inotify) = self.watches.inotify() else {
            self.root = Root::Nowhere;
            return self.look_everywhere(now);
        };
        let ingests = self.ingests();
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let before = self.root;
        for _ in 0..3 {
            // Two steps up are the most that containerd makes with its first content.
            let mut paths = ingests.ancestors().take(3).enumerate();
            let found = paths.find_map(|(up, path)| Some((up, inotify::add_watch(inotify, path, flags).ok()?)));
            self.root = match found {
                Some((0, wd)) => Root::Ingests(wd),
                Some((_, wd)) => Root::Above(wd),
                None => Root::Nowhere,
            };
            if matches!(self.root, Root::Ingests(_)) {
                if let Root::Above(wd) = before {
                    let _ = inotify::remove_watch(inotify, wd);
                }
                self.is_blind = false;
                return self.look_everywhere(now);
            }
            // It may have come between the two tries.
            if !ingests.is_dir() {
                self.is_blind = false;
                return;
            }
        }
        if !std::mem::replace(&mut self.is_blind, true) {
            let path = ingests.display();
            tracing::warn!(%path, "cannot be watched (fs.inotify.max_user_watches?): pulls in progress are noticed late");
        }
        self.look_everywhere(now);
    }

    /// Looks at every ingest there is, and at those that are known.
    fn look_everywhere(&mut self, now: Instant) {
        let known: Vec<Box<str>> = self.receptions.lock().folders().map(Into::into).collect();
        known.iter().for_each(|folder| self.look(folder, Hint::default(), now));
        self.look_through(now);
    }

    /// Looks at those that are not known, while there is room for them, and then at those that were written to lately.
    fn look_through(&mut self, now: Instant) {
        self.overlooked = 0;
        for folder in folders(&self.ingests()) {
            let (is_known, has_room) = {
                let receptions = self.receptions.lock();
                (receptions.knows(&folder), receptions.has_room())
            };
            if is_known {
                continue;
            }
            if has_room || was_written_lately(&self.ingests().join(&*folder).join("data")) {
                self.look(&folder, Hint::default(), now);
            } else {
                self.overlooked += 1;
            }
        }
        self.look_through_at = (self.overlooked > 0).then(|| now + LOOK_THROUGH);
    }

    /// There is one more than can be followed.
    fn overlook(&mut self, now: Instant) {
        self.overlooked += 1;
        self.look_through_at.get_or_insert(now + LOOK_THROUGH);
    }

    /// Brings what is known of an ingest in line with what is there.
    fn look(&mut self, folder: &str, hint: Hint, now: Instant) {
        let path = self.ingests().join(folder);
        let mut sight = look_at(&path.join("data"));
        let is_known = self.receptions.lock().knows(folder);
        if hint.made && !is_known && self.new.len() < MAX_KNOWN {
            self.new.insert(folder.into());
        }
        if !is_known {
            if !self.meet(folder, &path, sight.is_some() || hint.moved, now) {
                return;
            }
            // What was written since the first look, and before the folder was watched, is told by no event.
            // What was committed meanwhile had been seen before.
            sight = look_at(&path.join("data")).or(sight);
        }
        let Some(sight) = sight else { return self.missing(folder, &path, hint) };
        let mut tracker = self.receptions.lock();
        if !tracker.has_seen(folder, sight) {
            self.watches.used(folder, now);
            // There may be a watch for it now.
            self.watches.hold(folder, &path, now);
        }
        let changed = tracker.saw(folder, sight, now);
        if hint.closed {
            tracker.closed(folder, now);
        } else if self.watches.is_looked_at(folder) {
            tracker.unheard(folder, now);
        }
        drop(tracker);
        changed.into_iter().for_each(|digest| self.tell_receiving(digest));
        if hint.closed {
            self.receptions.changed.send_replace(());
        }
    }

    /// A folder that is not known. True if it is known now.
    fn meet(&mut self, folder: &str, path: &Path, has_data: bool, now: Instant) -> bool {
        if !path.is_dir() {
            self.forget(folder);
            return false;
        }
        if !self.watches.hold(folder, path, now) {
            self.overlook(now);
            return false;
        }
        // What is written before `data` is whole once `data` is there, or was.
        if !has_data && look_at(&path.join("data")).is_none() {
            return false;
        }
        let read = |name: &str| {
            let (file, _) = open_regular(&path.join(name)).ok()??;
            String::from_utf8(read_bounded(&file, MAX_TEXT)?).ok()
        };
        let Some(text) = read("ref") else { return false };
        let Some(reference) = Reference::parse(&text, &self.namespace) else {
            self.forget(folder);
            return false;
        };
        let total = read("total").and_then(|text| text.trim().parse().ok()).filter(|total| *total > 0);
        let is_new = self.new.remove(folder);
        let mut receptions = self.receptions.lock();
        let given_up = match receptions.has_room() {
            true => None,
            // What has stood still for long is looked through now and then.
            false => now.checked_sub(IDLE).and_then(|before| receptions.make_room(before)),
        };
        let is_followed = receptions.begin(folder, reference, total, is_new);
        drop(receptions);
        given_up.iter().for_each(|other| self.watches.forget(other));
        if !is_followed {
            self.watches.forget(folder);
        }
        if given_up.is_some() || !is_followed {
            self.overlook(now);
        }
        is_followed
    }

    /// The `data` of a known ingest is not there: not yet, not any more, or it is the blob now.
    fn missing(&mut self, folder: &str, path: &Path, hint: Hint) {
        let Some((digest, inode)) = self.receptions.lock().last_seen(folder) else { return };
        let blob = look_at(&self.dir.path(&digest)).map(|sight| sight.inode);
        if blob.is_some() && blob == inode {
            let arrived = self.receptions.lock().committed(folder);
            // First that it is there, so that it is offered throughout.
            arrived.iter().cloned().for_each(|digest| (self.tell)(News::Arrived(digest)));
            arrived.into_iter().for_each(|digest| self.tell_receiving(digest));
        } else if inode.is_some() || hint.moved || !path.is_dir() {
            self.gone(folder);
            // One that came and went between two looks left its blob, as does one that another namespace had received before. But so does
            // one of another namespace that has nothing to do with it.
            if blob.is_some() {
                (self.tell)(News::MayHaveArrived(digest));
            }
        } else {
            return;
        }
        // The kernel lets go of a watch only once the last file in the folder is closed.
        if !path.is_dir() {
            self.watches.forget(folder);
        }
    }

    fn gone(&self, folder: &str) {
        let (gone, discarded) = {
            let mut tracker = self.receptions.lock();
            (tracker.gone(folder), tracker.take_discarded())
        };
        discarded.into_iter().for_each(|digest| (self.tell)(News::Discarded(digest)));
        gone.into_iter().for_each(|digest| self.tell_receiving(digest));
    }

    /// Tells whether a digest can be had while it is received. Telling the same twice does no harm.
    fn tell_receiving(&self, digest: Digest) {
        let is_offered = self.receptions.lock().is_offered(&digest);
        (self.tell)(if is_offered { News::Receiving(digest) } else { News::NotReceiving(digest) });
        self.receptions.changed.send_replace(());
    }

    /// Lets go of a folder that is not ours, or gone.
    fn forget(&mut self, folder: &str) {
        self.watches.forget(folder);
        self.new.remove(folder);
    }
}

/// The names of the folders in a directory.
fn folders(path: &Path) -> Vec<Box<str>> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.take(MAX_ENTRIES).filter_map(|entry| Some(entry.file_name().to_str()?.into())).collect()
}

/// By the file system's clock, which is the machine's.
fn was_written_lately(path: &Path) -> bool {
    let written = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    // What is from the future is as good as new.
    written.is_ok_and(|at| at.elapsed().is_ok_and(|ago| ago < IDLE) || at > SystemTime::now())
}

fn look_at(path: &Path) -> Option<Sight> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.is_file().then(|| Sight {
            position: metadata.len(),
            inode: (metadata.dev(), metadata.ino()),
            born: metadata
                .created()
                .ok()
                .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
                .map_or(0, |at| at.as_nanos()),
        }),
        Err(error) => {
            if error.kind() != ErrorKind::NotFound {
                tracing::debug!(path = %path.display(), %error, "cannot look at an ingest");
            }
            None
        }
    }
}

#[cfg(test)]
#[path = "watcher_tests.rs"]
mod tests;
