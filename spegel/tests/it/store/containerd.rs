//! The store of a running containerd, with each version that is here.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Stdio;
use std::time::Instant;

use spegel::store::{Containerd, ContainerdSettings, StoreError};
use spegel_benches::containerd::{self as daemon, Version};
use spegel_benches::image::MEDIA_TYPE_CONFIG;
use spegel_benches::netns::Lab;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;

/// A containerd on a node of its own.
pub(super) struct Daemon {
    pub(super) containerd: daemon::Containerd,
    archives: TempDir,
    _lab: Lab,
}

impl Daemon {
    fn start(version: Version) -> Result<Self, String> {
        Lab::available()?;
        let binaries = version.find()?;
        let mut lab = Lab::new().unwrap();
        let node = lab.add_node().unwrap();
        let containerd = daemon::Containerd::start(&binaries, &node, &daemon::Options::default()).unwrap();
        Ok(Self { containerd, archives: tempfile::tempdir().unwrap(), _lab: lab })
    }

    fn settings(&self) -> ContainerdSettings {
        ContainerdSettings {
            socket: self.containerd.socket(),
            namespace: daemon::NAMESPACE.to_owned(),
            content_path: Some(self.containerd.content_path()),
            filters: everything(),
            stall: Duration::from_secs(5),
        }
    }

    fn archive(&self, image: &Image) -> String {
        let archive = self.archives.path().join("image.tar");
        image.write_archive(&archive).unwrap();
        archive.display().to_string()
    }

    /// The images' names and top digests. The CRI follows the same events as we do, and records each image once more
    /// under its config's digest.
    fn records(&self) -> BTreeMap<String, String> {
        let list = self.containerd.ctr(&["images", "ls"]).unwrap();
        let lines = list.lines().skip(1).map(|line| line.split_whitespace());
        lines.filter_map(|mut words| Some((words.next()?.to_owned(), words.nth(1)?.to_owned()))).collect()
    }

    pub(super) fn ctr(&self, arguments: &[&str]) {
        self.containerd.ctr(arguments).unwrap();
    }
}

/// The digest of the config that this machine runs.
fn config(image: &Image) -> String {
    let mut contents = image.contents_for(spegel_benches::image::host_platform());
    contents.find(|content| content.media_type == MEDIA_TYPE_CONFIG).unwrap().digest.clone()
}

impl Host for Daemon {
    fn put(&mut self, image: &Image) {
        let archive = self.archive(image);
        let is_whole = image.contents().iter().any(|content| content.platform.as_deref() == Some(OTHER_PLATFORM));
        let mut arguments = vec!["images", "import", "--no-unpack"];
        // What the archive lacks cannot be imported.
        arguments.extend(is_whole.then_some("--all-platforms"));
        self.ctr(&[arguments, vec![&archive]].concat());
        let deadline = Instant::now() + DEADLINE;
        while !self.records().contains_key(&config(image)) {
            assert!(Instant::now() < deadline, "the CRI has not recorded {}", image.reference());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn remove(&mut self, image: &Image) {
        let mut names = vec![image.reference().to_owned()];
        let has_others = self.records().iter().any(|(name, top)| {
            name.starts_with("registry.test") && name != image.reference() && *top == image.root().digest
        });
        names.extend((!has_others).then(|| config(image)));
        for name in names {
            self.containerd.remove(&name).unwrap();
        }
    }

    fn store(&self, filters: Filters) -> Arc<dyn Store> {
        start(ContainerdSettings { filters, ..self.settings() }).0
    }
}

fn start(settings: ContainerdSettings) -> (Arc<dyn Store>, JoinHandle<Result<(), StoreError>>) {
    let (store, follower) = Containerd::start(settings, CancellationToken::new());
    (store, follower)
}

async fn all(version: Version) {
    let mut daemon = match Daemon::start(version) {
        Ok(daemon) => daemon,
        Err(reason) => return println!("skipped: {reason}"),
    };
    conformance::conforms(&mut daemon).await;
    other_namespaces_are_not_served(&mut daemon).await;
    content_before_its_image(&mut daemon).await;
    receiving::conforms(&mut daemon).await;
    content_deleted_beneath_its_image(&mut daemon).await;
    path_from_introspection(&mut daemon).await;
    wrong_path(&mut daemon).await;
    restart(&mut daemon).await;
    absent_at_first(&mut daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containerd_1_6_conforms() {
    all(Version::V1_6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containerd_2_2_conforms() {
    all(Version::V2_2).await;
}

async fn other_namespaces_are_not_served(daemon: &mut Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let theirs = image(&folder, "registry.test/theirs:v1", 20);
    let shared = multi_platform(&folder, "registry.test/shared:v1", 21);
    let ours = shared.only(spegel_benches::image::host_platform()).unwrap();
    let import = ["--namespace", "other", "images", "import", "--no-unpack", "--all-platforms"];
    for image in [&theirs, &shared] {
        let archive = daemon.archive(image);
        daemon.ctr(&[import.as_slice(), &[&archive]].concat());
    }
    daemon.put(&ours);
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&ours)).await;
    let hidden: BTreeSet<Digest> =
        digests(&shared).difference(&digests(&ours)).cloned().chain(digests(&theirs)).collect();
    for digest in &hidden {
        assert!(daemon.containerd.blob_path(digest.as_str()).exists(), "the file is there");
        assert_eq!(bytes(&store, digest).await, None, "another namespace's {digest}");
        assert!(!follower.held.contains(&digest.clone().into()));
    }
    assert_eq!(store.resolve(&tag(&theirs)), None);
    daemon.remove(&ours);
    for image in [&theirs, &shared] {
        daemon.ctr(&["--namespace", "other", "images", "remove", "--sync", image.reference()]);
    }
}

/// A pull records the image last; its finished layers are content of our namespace before.
async fn content_before_its_image(daemon: &mut Daemon) {
    let store = daemon.store(without("^registry\\.test/secret$"));
    until_ready(&store).await;
    let digest: Digest = digest_of(b"a layer of a pull").parse().unwrap();
    assert_eq!(bytes(&store, &digest).await, None);
    let mut ingest = daemon
        .containerd
        .node()
        .command(&daemon.containerd.version().find().unwrap().ctr.display().to_string())
        .arg("--address")
        .arg(daemon.containerd.socket())
        .args(["--namespace", daemon::NAMESPACE, "content", "ingest", "--expected-digest", digest.as_str(), "test"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    ingest.stdin.take().unwrap().write_all(b"a layer of a pull").unwrap();
    assert!(ingest.wait().unwrap().success());

    let repository = |name| Repository::new("registry.test", name).unwrap();
    assert_eq!(bytes_for(&store, &digest, Some(&repository("app"))).await.unwrap(), b"a layer of a pull");
    assert_eq!(bytes_for(&store, &digest, Some(&repository("secret"))).await, None);
    daemon.ctr(&["content", "rm", digest.as_str()]);
    until_gone(&store, &digest).await;
}

async fn content_deleted_beneath_its_image(daemon: &mut Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/holed:v1", 22);
    daemon.put(&image);
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&image)).await;
    let layer: Digest = image.contents()[0].digest.parse().unwrap();
    daemon.ctr(&["content", "rm", layer.as_str()]);
    let gone: BTreeSet<Key> = [layer.clone().into(), tag(&image).into()].into();
    follower.until_none(&gone).await;
    assert_eq!(store.resolve(&tag(&image)), None, "a tag stands for all that is beneath");
    assert_eq!(bytes(&store, &layer).await, None);
    daemon.put(&image);
    follower.until_all(&keys(&image)).await;
    daemon.remove(&image);
}

async fn path_from_introspection(daemon: &mut Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/asked:v1", 23);
    daemon.put(&image);
    let (store, _follower) = start(ContainerdSettings { content_path: None, ..daemon.settings() });
    until_ready(&store).await;
    for digest in digests(&image) {
        assert!(bytes(&store, &digest).await.is_some());
    }
    daemon.remove(&image);
}

async fn wrong_path(daemon: &mut Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/elsewhere:v1", 24);
    daemon.put(&image);
    let settings = ContainerdSettings { content_path: Some(folder.path().join("not-content")), ..daemon.settings() };
    let (store, follower) = start(settings.clone());
    let outcome = tokio::time::timeout(DEADLINE, follower).await.expect("ends by itself").unwrap();
    let Err(StoreError::Mismatch(text)) = outcome else { panic!("{outcome:?}") };
    for part in ["none of them is in", "not-content", "--containerd-content-path"] {
        assert!(text.contains(part), "{text}");
    }
    assert_ne!(*store.health().borrow(), Health::Ready);
    daemon.remove(&image);

    // Nothing listed, nothing to compare: the mistake shows with the first image.
    let (store, follower) = start(settings);
    until_ready(&store).await;
    daemon.put(&image);
    let outcome = tokio::time::timeout(DEADLINE, follower).await.expect("ends by itself").unwrap();
    assert!(matches!(outcome, Err(StoreError::Mismatch(_))), "{outcome:?}");
    daemon.remove(&image);
}

async fn restart(daemon: &mut Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let (kept, new) = (image(&folder, "registry.test/kept:v1", 25), image(&folder, "registry.test/new:v1", 26));
    daemon.put(&kept);
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    follower.until_all(&keys(&kept)).await;

    daemon.containerd.stop().unwrap();
    until_health(&store, "waiting", |health| matches!(health, Health::Waiting(_))).await;
    for digest in digests(&kept) {
        assert!(bytes(&store, &digest).await.is_some(), "what it had is served on");
    }
    daemon.containerd.restart().unwrap();
    daemon.put(&new);
    until_ready(&store).await;
    // The follower checks that nothing is told twice.
    follower.until_all(&keys(&new)).await;
    assert!(keys(&kept).is_subset(&follower.held));
    daemon.remove(&kept);
    follower.until_none(&keys(&kept)).await;
    daemon.remove(&new);
}

async fn absent_at_first(daemon: &mut Daemon) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(&folder, "registry.test/patience:v1", 27);
    daemon.put(&image);
    daemon.containerd.stop().unwrap();
    let (store, follower) = start(daemon.settings());
    let mut changes = Follower::new(&store);
    let socket = daemon.containerd.socket().display().to_string();
    let names_it =
        |health: &Health| matches!(health, Health::Waiting(text) if text.contains(&socket) && text.contains("waiting"));
    until_health(&store, "waiting, with the socket named", names_it).await;
    assert_eq!(store.resolve(&tag(&image)), None);
    daemon.containerd.restart().unwrap();
    until_ready(&store).await;
    changes.until_all(&keys(&image)).await;

    drop(store);
    let outcome = tokio::time::timeout(DEADLINE, follower).await.expect("ends with the store").unwrap();
    assert!(outcome.is_ok());
    daemon.remove(&image);
}
