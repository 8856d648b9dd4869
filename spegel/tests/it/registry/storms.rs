//! What no node has, and all want: one goes upstream, and the others get it from each other.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use spegel::mirror::StormSettings;
use spegel::zerocopy::{Growing, Progress};
use tokio::time::Instant;

use super::*;

const MIB: usize = 1 << 20;

fn storm(max_wait: Duration) -> Setup {
    let mirror = MirrorSettings { storm: Some(StormSettings { max_wait }), ..MirrorSettings::default() };
    Setup { mirror: Some(mirror), ..Setup::default() }
}

/// A containerd: it asks its node's mirror, and goes upstream for what that has not got.
struct Containerd {
    node: Arc<Node>,
    name: String,
    digest: Digest,
    file: Arc<std::fs::File>,
    progress: watch::Sender<Progress>,
}

/// How a pull went.
#[derive(Debug)]
struct Pulled {
    from_upstream: bool,
    answered_after: Duration,
}

impl Containerd {
    /// It wants the blob: its ingest is there before it asks.
    fn at(node: &Arc<Node>, name: &str, digest: &Digest, total: usize) -> Self {
        node.shelf.expected.lock().unwrap().insert(digest.clone());
        let file = Arc::new(tempfile::tempfile().unwrap());
        let progress = watch::Sender::new(Progress { position: 0, ended: false });
        let _ = total;
        Self { node: Arc::clone(node), name: name.to_owned(), digest: digest.clone(), file, progress }
    }

    fn wrote(&self, bytes: &[u8], total: usize) {
        self.file.write_all_at(bytes, 0).unwrap();
        let is_first = self.progress.borrow().position == 0;
        self.progress.send_replace(Progress { position: bytes.len() as u64, ended: bytes.len() == total });
        if is_first {
            let growing = Growing::new(self.file.clone(), self.progress.subscribe());
            let receiving = Receiving { growing, total: total as u64, ingest: 1 };
            self.node.shelf.receiving.lock().unwrap().insert(self.digest.clone(), receiving);
            self.node.shelf.expected.lock().unwrap().remove(&self.digest);
        }
        if bytes.len() == total {
            self.node.shelf.put_as(self.digest.clone(), bytes);
            self.node.announce(Key::Digest(self.digest.clone()));
        }
    }

    /// Pulls it. Upstream sends its first byte after `first`, and a MiB each 20 ms; or nothing but a refusal.
    async fn pull(self, upstream: impl FnOnce() -> Option<Vec<u8>>, total: usize, first: Duration) -> Pulled {
        let began = Instant::now();
        let target = format!("/v2/app/blobs/{}?ns=registry.test", self.digest);
        let mut stream = TcpStream::connect(self.node.address()).await.unwrap();
        let head =
            format!("GET {target} HTTP/1.1\r\nHost: node\r\nConnection: close\r\nX-Spegel-Node: {}\r\n\r\n", self.name);
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        let mut answered_after = None;
        let mut start = 0;
        loop {
            let read = stream.read(&mut buffer).await.unwrap();
            got.extend_from_slice(&buffer[..read]);
            if start == 0
                && let Some(end) = got.windows(4).position(|window| window == b"\r\n\r\n")
            {
                (start, answered_after) = (end + 4, Some(began.elapsed()));
                if got.starts_with(b"HTTP/1.1 404") {
                    break;
                }
            }
            // It writes whole MiB, as containerd does.
            let whole = got.len().saturating_sub(start);
            let whole = if whole == total { total } else { whole / MIB * MIB };
            if start > 0 && whole as u64 > self.progress.borrow().position {
                self.wrote(&got[start..start + whole], total);
            }
            if read == 0 {
                assert_eq!(got.len() - start, total, "a body without its end");
                return Pulled { from_upstream: false, answered_after: answered_after.unwrap() };
            }
        }
        tokio::time::sleep(first).await;
        match upstream() {
            Some(bytes) => {
                for end in (1..=total / MIB).map(|n| n * MIB) {
                    self.wrote(&bytes[..end], total);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            None => {
                self.node.shelf.expected.lock().unwrap().remove(&self.digest);
            }
        }
        Pulled { from_upstream: true, answered_after: answered_after.unwrap() }
    }
}

/// So many nodes of a network, each with these settings.
fn nodes(count: usize, setup: impl Fn() -> Setup) -> Vec<Arc<Node>> {
    let network = MemoryNetwork::new();
    (0..count).map(|n| Arc::new(Node::with(&network, &format!("node-{n}"), setup()))).collect()
}

/// All pull, nearly at once; upstream refuses the first so many that ask it.
async fn pull_all(nodes: &[Arc<Node>], bytes: &[u8], refused: usize) -> Vec<Pulled> {
    let digest = digest_of(bytes);
    let refusals = AtomicUsize::new(refused);
    let pulls = nodes.iter().enumerate().map(|(n, node)| {
        let containerd = Containerd::at(node, &format!("node-{n}"), &digest, bytes.len());
        let upstream = || {
            let refused = refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            refused.is_err().then(|| bytes.to_vec())
        };
        async move {
            tokio::time::sleep(Duration::from_millis(10 * n as u64)).await;
            containerd.pull(upstream, bytes.len(), Duration::from_millis(200)).await
        }
    });
    tokio::time::timeout(PATIENCE, futures::future::join_all(pulls)).await.expect("all come to an end")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_goes_upstream_and_the_others_get_it_from_each_other() {
    let nodes = nodes(6, || storm(Duration::from_secs(10)));
    let bytes = noise(71, 6 * MIB);
    let pulled = pull_all(&nodes, &bytes, 0).await;
    assert_eq!(pulled.iter().filter(|pulled| pulled.from_upstream).count(), 1, "{pulled:?}");
    assert!(nodes.iter().all(|node| node.shelf.blobs.lock().unwrap().contains_key(&digest_of(&bytes))));
    // A request that was made at a coordinator's word counts as any other.
    let answered = |node: &Arc<Node>| node.metric("spegel_peer_requests_total", &["outcome=\"answered\""]);
    assert_eq!(nodes.iter().filter(|node| answered(node) >= 1.0).count(), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_it_all_go_upstream_at_once() {
    let nodes = nodes(3, Setup::default);
    let bytes = noise(72, 2 * MIB);
    let pulled = pull_all(&nodes, &bytes, 0).await;
    assert!(
        pulled.iter().all(|pulled| pulled.from_upstream && pulled.answered_after < Duration::from_secs(5)),
        "{pulled:?}"
    );
}

/// Whom upstream refuses does not stop the others: the next one pulls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_one_pulls_if_upstream_refuses_the_first() {
    let nodes = nodes(4, || storm(Duration::from_secs(10)));
    let bytes = noise(73, 4 * MIB);
    let pulled = pull_all(&nodes, &bytes, 1).await;
    assert_eq!(pulled.iter().filter(|pulled| pulled.from_upstream).count(), 2, "{pulled:?}");
    let missing = nodes.iter().filter(|node| !node.shelf.blobs.lock().unwrap().contains_key(&digest_of(&bytes)));
    assert_eq!(missing.count(), 1, "only the one that was refused");
}

/// A pull is held for no longer than it may be, though the one that was told to pull gets nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_held_longer_than_is_allowed() {
    let nodes = nodes(3, || storm(Duration::from_millis(400)));
    let digest = digest_of(b"never there");
    let pulls = nodes.iter().enumerate().map(|(n, node)| {
        Containerd::at(node, &format!("node-{n}"), &digest, MIB).pull(|| None, MIB, Duration::from_secs(3))
    });
    let pulled = tokio::time::timeout(PATIENCE, futures::future::join_all(pulls)).await.unwrap();
    assert!(pulled.iter().all(|pulled| pulled.from_upstream), "{pulled:?}");
    let held = pulled.iter().map(|pulled| pulled.answered_after).max().unwrap();
    assert!(held >= Duration::from_millis(300) && held < Duration::from_secs(2), "{held:?}");
}

/// Another node's containerd is never held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_our_own_containerd_is_held() {
    let nodes = nodes(2, || storm(Duration::from_secs(15)));
    let digest = digest_of(b"never there either");
    let _first = Containerd::at(&nodes[0], "node-0", &digest, MIB);
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    assert_eq!(nodes[0].ask("GET", &target, &[("X-Spegel-Node", "node-0")]).await.status, 404, "it is to pull");
    let began = Instant::now();
    for headers in [&[("X-Spegel-Node", "somebody")][..], &[][..]] {
        assert_eq!(nodes[1].ask("GET", &target, headers).await.status, 404);
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Manifests too: one goes upstream, and the others wait for what it gets.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_comes_from_upstream_once() {
    let nodes = nodes(5, || storm(Duration::from_secs(10)));
    let digest = digest_of(MANIFEST);
    let pulls = nodes.iter().enumerate().map(|(n, node)| {
        let (node, digest) = (Arc::clone(node), digest.clone());
        async move {
            tokio::time::sleep(Duration::from_millis(10 * n as u64)).await;
            let target = format!("/v2/app/manifests/{digest}?ns=registry.test");
            let reply = node.ask("GET", &target, &[("X-Spegel-Node", &format!("node-{n}"))]).await;
            if reply.status == 404 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                node.shelf.put(MANIFEST);
            } else {
                assert_eq!(reply.body, MANIFEST);
                node.shelf.put(&reply.body);
            }
            reply.status
        }
    });
    let mut statuses = tokio::time::timeout(PATIENCE, futures::future::join_all(pulls)).await.unwrap();
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 200, 200, 404]);
}

/// A node in the middle that gives its pull up: its child goes on at the same byte at another node that a coordinator names. No lookup finds
/// any here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_its_parent_is_given_another_one() {
    let nodes = nodes(4, || storm(Duration::from_secs(10)));
    // So long that each has one child as long as nothing was measured.
    let bytes = noise(75, 48 * MIB);
    let digest = digest_of(&bytes);
    let pulls = nodes.iter().enumerate().map(|(n, node)| {
        let containerd = Containerd::at(node, &format!("node-{n}"), &digest, bytes.len());
        let (node, digest, bytes) = (Arc::clone(node), digest.clone(), &bytes);
        async move {
            tokio::time::sleep(Duration::from_millis(20 * n as u64)).await;
            let pull = containerd.pull(|| Some(bytes.clone()), bytes.len(), Duration::from_millis(200));
            if n != 1 {
                return Some(pull.await);
            }
            // It is cancelled half way, and its ingest goes.
            let half = async {
                loop {
                    let has =
                        node.shelf.receiving.lock().unwrap().get(&digest).map(|it| it.growing.progress().position);
                    if has.is_some_and(|has| has >= 16 * MIB as u64) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! {
                _ = pull => panic!("it was cancelled"),
                () = half => {}
            }
            node.shelf.receiving.lock().unwrap().remove(&digest);
            None
        }
    });
    let pulled = tokio::time::timeout(PATIENCE, futures::future::join_all(pulls)).await.expect("all come to an end");
    // Whoever of them was first; if it was the one that gave up, another one pulled the rest.
    let others = pulled.iter().flatten();
    assert_eq!(others.filter(|pulled| pulled.from_upstream).count(), 1, "{pulled:?}");
    assert!(nodes.iter().map(|node| node.figure("spegel_storm_moves_total")).sum::<f64>() > 0.0);
}

/// What is not held, for want of time, is followed as well: where it came from is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_held_is_counted_as_well() {
    let nodes = nodes(3, || storm(Duration::ZERO));
    let bytes = noise(76, 3 * MIB);
    let pulled = pull_all(&nodes[..2], &bytes, 0).await;
    assert!(
        pulled.iter().all(|pulled| pulled.from_upstream && pulled.answered_after < Duration::from_secs(5)),
        "{pulled:?}"
    );
    let got = |node: &Node, source: &str| {
        let label = [format!("source=\"{source}\"")];
        let labels = [label[0].as_str()];
        (node.metric("spegel_storm_blobs_total", &labels), node.metric("spegel_storm_received_bytes_total", &labels))
    };
    let (one, all) = (1.0, bytes.len() as f64);
    for node in &nodes[..2] {
        eventually("it is counted", || got(node, "upstream") == (one, all)).await;
        assert_eq!(got(node, "peers"), (0.0, 0.0));
    }
    // The third comes when they have it.
    let pulled =
        Containerd::at(&nodes[2], "node-2", &digest_of(&bytes), bytes.len()).pull(|| None, bytes.len(), Duration::ZERO);
    assert!(!tokio::time::timeout(PATIENCE, pulled).await.unwrap().from_upstream);
    eventually("it is counted", || got(&nodes[2], "peers") == (one, all)).await;
    assert_eq!(got(&nodes[2], "upstream"), (0.0, 0.0));
}

/// A node whose filters exclude an image pulls that by itself, at once, and nobody is sent to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_filters_exclude_an_image_has_no_part_in_its_storm() {
    let network = MemoryNetwork::new();
    let filters = |n: usize| (n == 0).then(|| Filters::new(&[], &["^registry.test/app".to_owned()]).unwrap());
    let make = |n: usize| Setup { filters: filters(n), ..storm(Duration::from_secs(10)) };
    let nodes: Vec<_> = (0..5).map(|n| Arc::new(Node::with(&network, &format!("node-{n}"), make(n)))).collect();
    let bytes = noise(77, 6 * MIB);
    let pulled = pull_all(&nodes, &bytes, 0).await;
    let from_upstream: Vec<usize> = (0..5).filter(|n| pulled[*n].from_upstream).collect();
    assert!(from_upstream.len() == 2 && from_upstream[0] == 0, "{pulled:?}");
    assert!(pulled[0].answered_after < Duration::from_secs(5), "{pulled:?}");
}

/// Nodes that a coordinator sent to this one, each for one of these. They are taken, and read no further than the status.
async fn children_of(node: &Node, targets: [&String; 3]) -> Vec<TcpStream> {
    let mut children = Vec::new();
    for (n, target) in targets.into_iter().enumerate() {
        let mut stream = TcpStream::connect(node.address()).await.unwrap();
        let head = format!(
            "GET {target} HTTP/1.1\r\nHost: node\r\nConnection: close\r\nX-Spegel-Mirrored: true\r\nX-Spegel-Node: child-{n}\r\nX-Spegel-Rank: 9\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200", "{n} is taken");
        children.push(stream);
    }
    children
}

/// Whether each gets all of it. All come to an orderly end.
async fn ends_of(children: Vec<TcpStream>, total: usize) -> Vec<bool> {
    let ends = children.into_iter().map(|mut stream| async move {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.map(|_| rest.len() >= total)
    });
    let ends = tokio::time::timeout(PATIENCE, futures::future::join_all(ends)).await.unwrap();
    ends.into_iter().map(Result::unwrap).collect()
}

/// Three who take nothing of what comes in, where one is the measure: the last of them is let go in good order, and may look elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_one_too_many_for_a_full_link_is_let_go() {
    let nodes = nodes(2, || storm(Duration::from_secs(10)));
    let (node, total) = (&nodes[0], 48 * MIB);
    let bytes = noise(78, total);
    let digest = digest_of(&bytes);
    let containerd = Containerd::at(node, "node-0", &digest, total);
    let target = target(&digest);
    assert_eq!(node.ask("GET", &target, &[("X-Spegel-Node", "node-0")]).await.status, 404, "it is to pull");
    containerd.wrote(&bytes[..MIB], total);
    let children = children_of(node, [&target; 3]).await;
    let shed = || node.metric("spegel_storm_shed_total", &[]);
    for end in (2..=total / MIB).map(|n| n * MIB) {
        containerd.wrote(&bytes[..end], total);
        // As long as it comes in it is seen who is behind.
        let before_end = if end == total { Duration::ZERO } else { Duration::from_millis(40) };
        tokio::time::sleep(before_end).await;
        if end + MIB == total {
            eventually("one is let go", || shed() > 0.0).await;
        }
    }
    let whole = ends_of(children, total).await;
    assert_eq!(whole, [true, true, false]);
    assert_eq!(shed(), 1.0);
}

/// One who gets something complete goes before one who gets what comes in, and in good order as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_gets_something_complete_is_let_go_first() {
    let nodes = nodes(2, || storm(Duration::from_secs(10)));
    let (node, total) = (&nodes[0], 48 * MIB);
    let (done, bytes) = (noise(79, total), noise(80, total));
    node.shelf.put(&done);
    let containerd = Containerd::at(node, "node-0", &digest_of(&bytes), total);
    let coming = target(&digest_of(&bytes));
    assert_eq!(node.ask("GET", &coming, &[("X-Spegel-Node", "node-0")]).await.status, 404, "it is to pull");
    containerd.wrote(&bytes[..MIB], total);
    let complete = target(&digest_of(&done));
    let children = children_of(node, [&coming, &complete, &complete]).await;
    let shed = || node.metric("spegel_storm_shed_total", &[]);
    for end in (2..total / MIB).map(|n| n * MIB) {
        containerd.wrote(&bytes[..end], total);
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    eventually("one is let go", || shed() > 0.0).await;
    containerd.wrote(&bytes, total);
    let whole = ends_of(children, total).await;
    assert_eq!((whole, shed()), (vec![true, true, false], 1.0), "the last, and it is counted once; not the only one");
}

/// Upstream is so slow that the pull was given up: what comes is counted all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_after_it_was_given_up_is_counted() {
    let nodes = nodes(2, || storm(Duration::from_secs(10)));
    let bytes = noise(81, 3 * MIB);
    let containerd = Containerd::at(&nodes[0], "node-0", &digest_of(&bytes), bytes.len());
    let pull = containerd.pull(|| Some(bytes.clone()), bytes.len(), Duration::from_millis(2500));
    assert!(tokio::time::timeout(PATIENCE, pull).await.unwrap().from_upstream);
    let labels = ["source=\"upstream\""];
    eventually("it is counted", || nodes[0].metric("spegel_storm_blobs_total", &labels) == 1.0).await;
    assert_eq!(nodes[0].metric("spegel_storm_received_bytes_total", &labels), bytes.len() as f64);
}

async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let waited = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.unwrap_or_else(|_| panic!("{what}"));
}
