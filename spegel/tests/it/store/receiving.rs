//! Content that a real containerd is receiving. `ctr content ingest` writes what comes from its standard input, under the reference that
//! a pull would use.

use std::io::Write as _;
use std::process::{Child, Stdio};

use spegel::store::{Found, Receiving};
use spegel_benches::containerd::NAMESPACE;

use super::containerd::Daemon;
use super::*;

/// containerd passes on what it reads in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// A client of containerd that writes a blob.
struct Ingest {
    client: Child,
    bytes: Vec<u8>,
    digest: Digest,
}

impl Ingest {
    fn begin(daemon: &Daemon, namespace: &str, seed: u8, size_is_known: bool) -> Self {
        let bytes: Vec<u8> = (0..3 * PIECE).map(|n| (n / 7) as u8 ^ seed).collect();
        let digest: Digest = digest_of(&bytes).parse().unwrap();
        let containerd = &daemon.containerd;
        let mut command = containerd.node().command(&containerd.version().find().unwrap().ctr.display().to_string());
        command.arg("--address").arg(containerd.socket()).args(["--namespace", namespace, "content", "ingest"]);
        command.args(["--expected-digest", digest.as_str()]);
        if size_is_known {
            command.args(["--expected-size", &bytes.len().to_string()]);
        }
        let client = command.arg(format!("layer-{digest}")).stdin(Stdio::piped()).spawn().unwrap();
        Self { client, bytes, digest }
    }

    fn write(&mut self, pieces: std::ops::Range<usize>) {
        let bytes = &self.bytes[pieces.start * PIECE..pieces.end * PIECE];
        self.client.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Writes the rest, which makes containerd commit it.
    fn finish(mut self, pieces: std::ops::Range<usize>) -> Digest {
        self.write(pieces);
        drop(self.client.stdin.take());
        assert!(self.client.wait().unwrap().success());
        self.digest.clone()
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

async fn find(store: &Arc<dyn Store>, digest: &Digest, asked: Option<&Repository>) -> Option<Found> {
    store.find(digest, asked).await.unwrap()
}

async fn receiving(store: &Arc<dyn Store>, digest: &Digest) -> Option<Receiving> {
    match find(store, digest, None).await {
        Some(Found::Receiving(receiving)) => Some(receiving),
        _ => None,
    }
}

/// Waits for the news that no more comes, and returns how much came.
async fn ended_at(receiving: &Receiving) -> u64 {
    let polling = async {
        while !receiving.growing.progress().ended {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, polling).await.is_ok(), "no news of the end");
    receiving.growing.progress().position
}

pub(super) async fn conforms(daemon: &mut Daemon) {
    from_the_first_piece_to_the_commit(daemon).await;
    only_ours_and_only_with_a_length(daemon).await;
    anothers_blob_in_the_place_of_ours(daemon).await;
    a_client_that_is_killed(daemon).await;
    a_containerd_that_restarts(daemon).await;
}

async fn from_the_first_piece_to_the_commit(daemon: &mut Daemon) {
    let store = daemon.store(without("^registry\\.test/secret$"));
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    let mut ingest = Ingest::begin(daemon, NAMESPACE, 1, true);
    ingest.write(0..1);
    let reception = async {
        while receiving(&store, &ingest.digest).await.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, reception).await.is_ok(), "it is not found");
    assert!(follower.told().is_none(), "nobody said from which repository it is, and there are filters");
    let app = Repository::new("registry.test", "app").unwrap();
    store.pulls(&app, &TagOrDigest::Digest(ingest.digest.clone()));
    let key = BTreeSet::from([Key::from(ingest.digest.clone())]);
    follower.until_all(&key).await;
    let found = receiving(&store, &ingest.digest).await.expect("offered, so it can be had");
    assert_eq!(found.total, ingest.bytes.len() as u64);
    assert!(store.open(&ingest.digest, None).await.unwrap().is_none(), "it is not complete");
    let secret = Repository::new("registry.test", "secret").unwrap();
    assert!(find(&store, &ingest.digest, Some(&secret)).await.is_none(), "the filters hold");

    let bytes_then = ingest.bytes.clone();
    let digest = ingest.finish(1..3);
    assert_eq!(ended_at(&found).await, bytes_then.len() as u64);
    assert_eq!(bytes(&store, &digest).await, Some(bytes_then), "complete, without an image");
    assert!(follower.told().is_none(), "it was offered all along");
    daemon.ctr(&["content", "rm", digest.as_str()]);
    follower.until_none(&key).await;
}

async fn only_ours_and_only_with_a_length(daemon: &mut Daemon) {
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    let mut theirs = Ingest::begin(daemon, "other", 2, true);
    let mut unknown = Ingest::begin(daemon, NAMESPACE, 3, false);
    theirs.write(0..2);
    unknown.write(0..2);
    // What comes later is told, so what comes before would have been.
    let mut marker = Ingest::begin(daemon, NAMESPACE, 4, true);
    marker.write(0..1);
    follower.until_all(&BTreeSet::from([marker.digest.clone().into()])).await;
    for digest in [&theirs.digest, &unknown.digest] {
        assert!(find(&store, digest, None).await.is_none());
        assert!(!follower.held.contains(&digest.clone().into()));
    }
    let unknown = unknown.finish(2..3);
    follower.until_all(&BTreeSet::from([unknown.clone().into()])).await;
    let theirs = theirs.finish(2..3);
    assert!(find(&store, &theirs, None).await.is_none());
    let marker = marker.finish(1..3);
    for digest in [unknown, marker] {
        daemon.ctr(&["content", "rm", digest.as_str()]);
    }
    daemon.ctr(&["--namespace", "other", "content", "rm", theirs.as_str()]);
}

/// An ingest of ours that goes, and a blob of its digest that another namespace has: nobody said that it is ours.
async fn anothers_blob_in_the_place_of_ours(daemon: &mut Daemon) {
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    let theirs = Ingest::begin(daemon, "other", 7, true).finish(0..3);
    let folder = daemon.containerd.content_path().join("ingest").join("f".repeat(64));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("ref"), format!("{NAMESPACE}/1/layer-{theirs}")).unwrap();
    std::fs::write(folder.join("total"), (3 * PIECE).to_string()).unwrap();
    std::fs::write(folder.join("data"), "").unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    std::fs::rename(folder.join("data"), folder.with_extension("gone")).unwrap();
    let mut marker = Ingest::begin(daemon, NAMESPACE, 8, true);
    marker.write(0..1);
    follower.until_all(&BTreeSet::from([marker.digest.clone().into()])).await;
    let marker = marker.finish(1..3);
    assert!(!follower.held.contains(&theirs.clone().into()), "it is offered");
    assert!(store.open(&theirs, None).await.unwrap().is_none() && find(&store, &theirs, None).await.is_none());
    std::fs::remove_file(folder.with_extension("gone")).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    daemon.ctr(&["content", "rm", marker.as_str()]);
    daemon.ctr(&["--namespace", "other", "content", "rm", theirs.as_str()]);
}

async fn a_client_that_is_killed(daemon: &mut Daemon) {
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    let mut ingest = Ingest::begin(daemon, NAMESPACE, 5, true);
    ingest.write(0..2);
    let (digest, key) = (ingest.digest.clone(), BTreeSet::from([Key::from(ingest.digest.clone())]));
    follower.until_all(&key).await;
    let found = receiving(&store, &digest).await.unwrap();
    drop(ingest);
    follower.until_none(&key).await;
    assert!(ended_at(&found).await <= 2 * PIECE as u64);
    assert!(find(&store, &digest, None).await.is_none());
}

async fn a_containerd_that_restarts(daemon: &mut Daemon) {
    let store = daemon.store(everything());
    until_ready(&store).await;
    let mut follower = Follower::new(&store);
    let mut ingest = Ingest::begin(daemon, NAMESPACE, 6, true);
    ingest.write(0..1);
    let key = BTreeSet::from([Key::from(ingest.digest.clone())]);
    follower.until_all(&key).await;
    daemon.containerd.restart().unwrap();
    follower.until_none(&key).await;
    assert!(find(&store, &ingest.digest, None).await.is_none());
    drop(ingest);
    until_ready(&store).await;
}
