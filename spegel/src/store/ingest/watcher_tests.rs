#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::store::ingest::{Ingests, Receiving};

const PATIENCE: Duration = Duration::from_secs(20);
const STALL: Duration = Duration::from_millis(400);

/// A content directory in which we do what containerd does.
struct Content {
    folder: tempfile::TempDir,
    receptions: Arc<Receptions>,
    news: Receiver<News>,
    watcher: Watcher,
}

/// What containerd does for one blob.
struct Ingest {
    path: PathBuf,
    data: fs::File,
    digest: Digest,
    blob: PathBuf,
}

impl Content {
    fn new(stall: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("ingest")).unwrap();
        Self::watch(folder, stall)
    }

    fn watch(folder: tempfile::TempDir, stall: Duration) -> Self {
        let receptions = Arc::new(Receptions::new(stall));
        let (sender, news) = channel();
        let tell = move |news| sender.send(news).unwrap_or_default();
        let dir = BlobDir::new(folder.path());
        let watcher = Watcher::start(dir, "k8s.io", receptions.clone(), tell).unwrap();
        Self { folder, receptions, news, watcher }
    }

    fn begin(&self, n: u64, namespace: &str, total: Option<u64>) -> Ingest {
        begin(self.folder.path(), n, namespace, total)
    }

    #[track_caller]
    fn expect(&self, news: &News) {
        assert_eq!(self.news.recv_timeout(PATIENCE).as_ref(), Ok(news));
    }

    /// Nothing is told, as far as can be seen: a later event is told of first.
    #[track_caller]
    fn expect_nothing(&self) {
        let mut marker = self.begin(999, "k8s.io", Some(10));
        marker.write(1);
        self.expect(&News::Receiving(marker.digest.clone()));
        fs::remove_dir_all(&marker.path).unwrap();
        self.expect(&News::NotReceiving(marker.digest));
    }

    fn open(&self, digest: &Digest) -> Option<Receiving> {
        self.receptions.open(digest, &BlobDir::new(self.folder.path())).unwrap()
    }

    fn wait(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn digest(n: u64) -> Digest {
    format!("sha256:{n:064x}").parse().unwrap()
}

fn begin(root: &Path, n: u64, namespace: &str, total: Option<u64>) -> Ingest {
    let digest = digest(n);
    let path = root.join("ingest").join(format!("{n:064x}"));
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("ref"), format!("{namespace}/1/layer-{digest}")).unwrap();
    fs::write(path.join("startedat"), "now").unwrap();
    if let Some(total) = total {
        fs::write(path.join("total"), total.to_string()).unwrap();
    }
    let data = fs::File::create(path.join("data")).unwrap();
    let blob = root.join("blobs/sha256").join(digest.hex());
    Ingest { path, data, digest, blob }
}

impl Ingest {
    fn write(&mut self, bytes: usize) {
        self.data.write_all(&vec![7; bytes]).unwrap();
    }

    fn commit(self) -> Digest {
        drop(self.data);
        fs::create_dir_all(self.blob.parent().unwrap()).unwrap();
        fs::rename(self.path.join("data"), self.blob).unwrap();
        fs::remove_dir_all(self.path).unwrap();
        self.digest
    }
}

#[test]
fn a_pull_is_told_from_its_first_bytes_to_its_end() {
    let content = Content::new(PATIENCE);
    let mut ingest = content.begin(1, "k8s.io", Some(3000));
    assert!(content.open(&ingest.digest).is_none(), "it does not grow yet");
    ingest.write(1000);
    content.expect(&News::Receiving(ingest.digest.clone()));
    let receiving = content.open(&ingest.digest).unwrap();
    assert_eq!(receiving.total, 3000);
    ingest.write(1000);
    content.wait("news of the growth", || receiving.growing.progress().position == 2000);
    ingest.write(1000);
    let digest = ingest.commit();
    content.expect(&News::Arrived(digest.clone()));
    content.expect(&News::NotReceiving(digest.clone()));
    let progress = receiving.growing.progress();
    assert_eq!((progress.position, progress.ended), (3000, true));
    assert!(content.open(&digest).is_none());
}

#[test]
fn what_comes_in_one_piece_is_told_when_it_is_there() {
    let content = Content::new(PATIENCE);
    for n in 1..50 {
        let mut ingest = content.begin(n, "k8s.io", Some(2048));
        // containerd waits for its first bytes for a round trip at least.
        content.wait("the first sight", || content.receptions.lock().knows(&format!("{n:064x}")));
        ingest.write(2048);
        let digest = ingest.commit();
        loop {
            match content.news.recv_timeout(PATIENCE).unwrap() {
                News::Arrived(arrived) => break assert_eq!(arrived, digest),
                // Where it was seen to grow first.
                News::Receiving(other) | News::NotReceiving(other) => assert!(other == digest || n > 1),
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Some of what is written comes before the folder is watched, some between any two looks at it, and then nothing more.
#[test]
fn what_is_written_while_the_folder_is_met_is_told() {
    let content = Content::new(PATIENCE * 10);
    let _open: Vec<Ingest> = (1..=500)
        .map(|n| {
            let mut ingest = content.begin(n, "k8s.io", Some(3000));
            ingest.write(1000);
            content.expect(&News::Receiving(ingest.digest.clone()));
            ingest
        })
        .collect();
}

#[test]
fn others_namespaces_and_lengths_that_are_not_known_are_not_told() {
    let content = Content::new(PATIENCE);
    let mut theirs = content.begin(1, "moby", Some(3000));
    theirs.write(1000);
    let mut unknown = content.begin(2, "k8s.io", None);
    unknown.write(1000);
    content.expect_nothing();
    assert!(content.open(&theirs.digest).is_none() && content.open(&unknown.digest).is_none());
    theirs.write(2000);
    theirs.commit();
    let digest = unknown.commit();
    content.expect(&News::Arrived(digest.clone()));
    content.expect(&News::NotReceiving(digest));
}

#[test]
fn what_a_crash_left_is_told_once_it_grows() {
    let folder = tempfile::tempdir().unwrap();
    let mut ingest = begin(folder.path(), 1, "k8s.io", Some(3000));
    ingest.write(1000);
    let content = Content::watch(folder, PATIENCE);
    content.expect_nothing();
    assert!(content.open(&ingest.digest).is_none());
    ingest.write(1000);
    content.expect(&News::Receiving(ingest.digest.clone()));
    assert_eq!(content.open(&ingest.digest).unwrap().growing.progress().position, 2000);
}

#[test]
fn an_abort_a_stall_and_a_new_start_withdraw_it() {
    let content = Content::new(STALL);
    let mut ingest = content.begin(1, "k8s.io", Some(3000));
    let digest = ingest.digest.clone();
    ingest.write(1000);
    content.expect(&News::Receiving(digest.clone()));
    let receiving = content.open(&digest).unwrap();
    content.expect(&News::NotReceiving(digest.clone()));
    assert!(receiving.growing.progress().ended && content.open(&digest).is_none(), "it stalled");

    ingest.write(1000);
    content.expect(&News::Receiving(digest.clone()));
    ingest.data.set_len(0).unwrap();
    content.expect(&News::NotReceiving(digest.clone()));

    let data = fs::File::options().append(true).open(ingest.path.join("data")).unwrap();
    (&data).write_all(&[1; 500]).unwrap();
    content.expect(&News::Receiving(digest.clone()));
    fs::remove_dir_all(&ingest.path).unwrap();
    content.expect(&News::NotReceiving(digest));
}

/// As containerd does whose check of the digest failed.
#[test]
fn a_writer_that_closes_and_does_not_commit_is_given_up_early() {
    let content = Content::new(PATIENCE * 10);
    let mut ingest = content.begin(1, "k8s.io", Some(3000));
    ingest.write(3000);
    content.expect(&News::Receiving(ingest.digest.clone()));
    drop(ingest.data);
    content.expect(&News::Discarded(ingest.digest.clone()));
    content.expect(&News::NotReceiving(ingest.digest.clone()));
    assert!(content.open(&ingest.digest).is_none(), "its bytes were wrong");
}

#[test]
fn a_directory_that_comes_later_or_anew_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let content = Content::watch(folder, PATIENCE);
    for n in 1..4 {
        let mut ingest = content.begin(n, "k8s.io", Some(3000));
        // Whatever of it is seen first: it grows on.
        content.wait("the first sight", || {
            ingest.write(1);
            std::thread::sleep(Duration::from_millis(20));
            content.news.try_recv() == Ok(News::Receiving(ingest.digest.clone()))
        });
        fs::remove_dir_all(content.folder.path().join("ingest")).unwrap();
        content.expect(&News::NotReceiving(ingest.digest.clone()));
    }
}

#[test]
fn the_end_of_the_watcher_ends_what_is_followed() {
    let content = Content::new(PATIENCE);
    let mut ingest = content.begin(1, "k8s.io", Some(3000));
    ingest.write(1000);
    content.expect(&News::Receiving(ingest.digest.clone()));
    let receiving = content.open(&ingest.digest).unwrap();
    drop(content.watcher);
    assert_eq!(content.news.recv_timeout(PATIENCE), Ok(News::NotReceiving(ingest.digest.clone())));
    assert!(receiving.growing.progress().ended);
}

/// More than are watched: those beyond are looked at now and then. None of them costs a descriptor.
#[test]
fn many_pulls_at_once_are_all_told_within_bounds() {
    let content = Content::new(PATIENCE * 10);
    let max_watches = Limits::default().watches;
    let count = max_watches as u64 + 200;
    let begin = |n| {
        let ingest = content.begin(n, "k8s.io", Some(3000));
        // The descriptor is ours, not the watcher's.
        Ingest { data: fs::File::open("/dev/null").unwrap(), ..ingest }
    };
    let ingests: Vec<Ingest> = (1..=count).map(begin).collect();
    content.wait("the first sight of all", || content.receptions.lock().folders().count() as u64 == count);
    let append = |ingest: &Ingest, bytes: usize| {
        let mut data = fs::File::options().append(true).open(ingest.path.join("data")).unwrap();
        data.write_all(&vec![1; bytes]).unwrap();
        data
    };
    // A close without a commit would be an abort.
    let _open: Vec<fs::File> = ingests.iter().map(|ingest| append(ingest, 10)).collect();
    let told: HashSet<Digest> = (0..count)
        .map(|_| match content.news.recv_timeout(PATIENCE) {
            Ok(News::Receiving(digest)) => digest,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told.len() as u64, count);
    assert!(own_watches() <= max_watches + 200, "the tests beside this one have some, too: {}", own_watches());
    for ingest in &ingests {
        fs::remove_dir_all(&ingest.path).unwrap();
    }
    for _ in 0..count {
        assert!(matches!(content.news.recv_timeout(PATIENCE), Ok(News::NotReceiving(_))));
    }
    assert_eq!(content.receptions.lock().folders().count(), 0);
}

/// Watches of this process, of all its inotify instances.
fn own_watches() -> usize {
    let fds = fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    let infos = fds.filter_map(|fd| fs::read_to_string(fd.path()).ok());
    infos.map(|info| info.lines().filter(|line| line.starts_with("inotify wd:")).count()).sum()
}

// === without a thread, at times of our own ===

/// The thread's work, one turn after the other.
struct Turns {
    folder: tempfile::TempDir,
    watch: Watch<Box<dyn Fn(News)>>,
    news: Receiver<News>,
    now: Instant,
}

impl Turns {
    fn new(folder: tempfile::TempDir, inotify: Option<OwnedFd>, max_known: usize) -> Self {
        fs::create_dir_all(folder.path().join("ingest")).unwrap();
        let receptions = Arc::new(Receptions::bounded(PATIENCE, max_known));
        let (sender, news) = channel();
        let tell: Box<dyn Fn(News)> = Box::new(move |news| sender.send(news).unwrap());
        let mut watch = Watch::new(BlobDir::new(folder.path()), "k8s.io", receptions, tell, inotify);
        let now = Instant::now();
        watch.watch_root(now);
        Self { folder, watch, news, now }
    }

    fn watching(max_known: usize) -> Self {
        Self::new(tempfile::tempdir().unwrap(), inotify::init(CreateFlags::NONBLOCK).ok(), max_known)
    }

    fn begin(&mut self, n: u64) -> Ingest {
        let ingest = begin(self.folder.path(), n, "k8s.io", Some(3000));
        self.turn();
        ingest
    }

    fn turn(&mut self) -> Vec<News> {
        let turn = self.watch.read_events();
        self.watch.handle(turn, self.now);
        self.news.try_iter().collect()
    }

    fn ingests(&self) -> Ingests {
        self.watch.receptions.ingests()
    }
}

#[test]
fn nothing_is_done_while_nothing_is_received() {
    let folder = tempfile::tempdir().unwrap();
    let mut stale = begin(folder.path(), 1, "k8s.io", Some(3000));
    stale.write(1000);
    let mut turns = Turns::new(folder, inotify::init(CreateFlags::NONBLOCK).ok(), MAX_KNOWN);
    turns.turn();
    assert_eq!(turns.ingests(), Ingests { watched: 1, looked_at: 0, overlooked: 0 });
    assert_eq!(turns.watch.timeout(turns.now), None, "it sleeps until the kernel wakes it");
}

/// No watch is left for this user: what can be done is to look.
#[test]
fn a_directory_that_cannot_be_watched_is_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let mut ingest = begin(folder.path(), 1, "k8s.io", Some(3000));
    let refuses_every_watch = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let mut turns = Turns::new(folder, Some(refuses_every_watch), MAX_KNOWN);
    assert_eq!(turns.watch.timeout(turns.now), Some(LOOK));
    ingest.write(1000);
    turns.turn();
    ingest.write(1000);
    turns.turn();
    let growing = turns.watch.receptions.open(&ingest.digest, &turns.watch.dir).unwrap().unwrap().growing;
    assert_eq!(growing.progress().position, 2000);
}

#[test]
fn an_instance_that_the_kernel_did_not_have_is_asked_for_again() {
    let mut turns = Turns::new(tempfile::tempdir().unwrap(), None, MAX_KNOWN);
    let mut ingest = turns.begin(1);
    assert!(turns.watch.watches.inotify().is_some(), "this kernel has one");
    turns.turn();
    ingest.write(1000);
    assert_eq!(turns.turn(), [News::Receiving(ingest.digest.clone())]);
    assert_eq!((turns.ingests().watched, turns.watch.timeout(turns.now) > Some(LOOK)), (1, true));
}

/// A crash leaves more than can be watched. They give way to what comes, and are found all the same when they go on.
#[test]
fn what_was_left_behind_gives_its_watches_to_what_comes() {
    let folder = tempfile::tempdir().unwrap();
    let max_watches = Limits::default().watches as u64;
    let stale: Vec<Ingest> = (1..=max_watches + 10)
        .map(|n| {
            let mut stale = begin(folder.path(), n, "k8s.io", Some(3000));
            stale.write(1000);
            // The descriptor is ours, not the watcher's.
            Ingest { data: fs::File::open("/dev/null").unwrap(), ..stale }
        })
        .collect();
    let mut turns = Turns::new(folder, inotify::init(CreateFlags::NONBLOCK).ok(), MAX_KNOWN);
    turns.turn();
    assert_eq!(turns.ingests(), Ingests { watched: max_watches as usize, looked_at: 10, overlooked: 0 });
    turns.now += IDLE;
    let mut ingest = turns.begin(5000);
    assert_eq!(turns.ingests().watched, Limits::default().idle + 1, "the others have stood still for long enough");
    ingest.write(1000);
    assert_eq!(turns.turn(), [News::Receiving(ingest.digest.clone())]);
    turns.now += RETRY;
    for stale in &stale {
        let data = fs::File::options().append(true).open(stale.path.join("data")).unwrap();
        (&data).write_all(&[1; 500]).unwrap();
    }
    assert_eq!(turns.turn().len(), stale.len(), "each is found when it goes on");
    assert_eq!(turns.ingests().watched, max_watches as usize);
}

#[test]
fn what_was_left_behind_makes_room_for_what_comes() {
    let folder = tempfile::tempdir().unwrap();
    let long_ago = SystemTime::now() - 2 * IDLE;
    let stale: Vec<Ingest> = (1..=20)
        .map(|n| {
            let mut stale = begin(folder.path(), n, "k8s.io", Some(3000));
            stale.write(1000);
            stale.data.set_modified(long_ago).unwrap();
            stale
        })
        .collect();
    let mut turns = Turns::new(folder, inotify::init(CreateFlags::NONBLOCK).ok(), 4);
    assert_eq!(turns.ingests().overlooked, 0, "not counted yet");
    turns.turn();
    assert_eq!(turns.ingests(), Ingests { watched: 4, looked_at: 0, overlooked: 16 });
    turns.now += IDLE;
    let mut fresh = turns.begin(30);
    fresh.write(1000);
    assert_eq!(turns.turn(), [News::Receiving(fresh.digest.clone())]);

    // One that is not followed goes on, and is found in a while.
    let followed: HashSet<Box<str>> = turns.watch.receptions.lock().folders().map(Into::into).collect();
    let mut overlooked = stale.into_iter().find(|stale| {
        let name = stale.path.file_name().unwrap().to_str().unwrap();
        !followed.contains(name)
    });
    let overlooked = overlooked.as_mut().unwrap();
    overlooked.write(10);
    assert_eq!(turns.turn(), []);
    turns.now += LOOK_THROUGH;
    turns.turn();
    overlooked.write(10);
    assert_eq!(turns.turn(), [News::Receiving(overlooked.digest.clone())]);

    // All go, and nothing is overlooked any more. The kernel keeps a folder as long as a file in it is open.
    fresh.data = fs::File::open("/dev/null").unwrap();
    overlooked.data = fs::File::open("/dev/null").unwrap();
    fs::remove_dir_all(turns.folder.path().join("ingest")).unwrap();
    fs::create_dir_all(turns.folder.path().join("ingest")).unwrap();
    turns.turn();
    turns.turn();
    assert_eq!(turns.ingests(), Ingests::default());
    assert_eq!(turns.watch.look_through_at, None);
}

/// Nothing tells of a writer that closes a file that is not watched.
#[test]
fn a_whole_file_that_is_not_watched_and_not_committed_is_given_up_early() {
    let refuses_every_watch = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let mut turns = Turns::new(tempfile::tempdir().unwrap(), Some(refuses_every_watch), MAX_KNOWN);
    let mut ingest = turns.begin(1);
    turns.turn();
    ingest.write(3000);
    let mut told = Vec::new();
    for _ in 0..8 {
        turns.now += LOOK;
        told.extend(turns.turn());
    }
    let [received, discarded] = [News::Receiving(ingest.digest.clone()), News::Discarded(ingest.digest.clone())];
    assert_eq!(told, [received, discarded, News::NotReceiving(ingest.digest)]);
}

/// The directory is every namespace's: a blob in it need not be what was received for ours.
#[test]
fn a_blob_that_was_not_seen_to_be_what_was_received_is_not_taken_for_it() {
    for was_seen in [true, false] {
        let mut turns = Turns::watching(MAX_KNOWN);
        let mut ingest = begin(turns.folder.path(), 1, "k8s.io", Some(3000));
        if was_seen {
            ingest.write(10);
            turns.turn();
        }
        fs::create_dir_all(ingest.blob.parent().unwrap()).unwrap();
        fs::write(&ingest.blob, [7; 3000]).unwrap();
        fs::remove_file(ingest.path.join("data")).unwrap();
        let hint = Hint { moved: true, ..Hint::default() };
        let turn = Turn { folders: HashMap::from([(format!("{:064x}", 1).into(), hint)]), ..Turn::default() };
        turns.watch.handle(turn, turns.now);
        let told: Vec<News> = turns.news.try_iter().filter(|news| !matches!(news, News::Receiving(_))).collect();
        let digest = ingest.digest;
        assert_eq!(told, [News::NotReceiving(digest.clone()), News::MayHaveArrived(digest)], "{was_seen}");
    }
}

#[test]
fn a_pipe_in_the_place_of_a_file_holds_nobody_up() {
    let content = Content::new(PATIENCE);
    let path = content.folder.path().join("ingest/pipe");
    fs::create_dir_all(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, path.join("ref"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    fs::write(path.join("data"), "x").unwrap();
    content.expect_nothing();
}
