//! Peers that promise and do not keep, and what is remembered of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use spegel::mirror::Settings as MirrorSettings;
use spegel::oci::{Digest, Key};
use spegel::registry::UploadLimits;
use spegel::router::{Member, MemoryNetwork, MemoryRouter, Peer, Readiness, Router};
use spegel::store::{Change, Outcome};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};

use super::{Node, Setup, digest_of, noise, scripted, target};

/// The first byte that a request asks for.
fn first_byte(request: &str) -> usize {
    let range = request.to_lowercase().split("range: bytes=").nth(1).map(str::to_owned).unwrap_or_default();
    range.split('-').next().and_then(|first| first.trim().parse().ok()).unwrap_or(0)
}

/// A head for the bytes from `first` on, as many as `length` is of all of them.
fn head(first: usize, total: usize) -> String {
    match first {
        0 => format!("HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n"),
        _ => format!(
            "HTTP/1.1 206 Partial\r\nContent-Range: bytes {first}-{}/{total}\r\nContent-Length: {}\r\n\r\n",
            total - 1,
            total - first
        ),
    }
}

/// One that gives half of what it is asked for would otherwise be asked for half of the rest, and so on, a stall each.
#[tokio::test]
async fn who_breaks_off_is_not_asked_for_the_rest() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(20, 4 << 20);
    let digest = digest_of(&bytes);
    let content = bytes.clone();
    let (_half, asked) = scripted(&network, "half", &[Key::Digest(digest.clone())], move |request| {
        let first = first_byte(request);
        let rest = &content[first..];
        [head(first, content.len()).as_bytes(), &rest[..rest.len() / 2]].concat()
    })
    .await;
    let reply = b.get(&target(&digest)).await;
    assert!(reply.status == 200 && reply.orderly && reply.body == bytes[..2 << 20], "{}", reply.body.len());
    assert_eq!(b.metric("spegel_mirror_requests_total", &["cache=\"hit\""]), 1.0, "as its head said");
    assert_eq!(broken(&b).await, [0.0, 1.0]);
    let reply = b.ask("GET", &target(&digest), &[("Range", "bytes=2097152-")]).await;
    assert_eq!(reply.status, 404, "containerd then goes upstream for the rest");
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_length_that_the_manifest_does_not_tell_is_not_passed_on() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(21, 3 << 20);
    let layer = digest_of(&bytes);
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{layer}","size":{}}},"layers":[]}}"#,
        bytes.len()
    );
    let honest = Node::join(&network, "a");
    let manifest = honest.offer(manifest.as_bytes());
    for difference in [-1000isize, 1000] {
        let length = bytes.len().checked_add_signed(difference).unwrap();
        let mut content = bytes.clone();
        content.resize(length, 7);
        let (_liar, asked) = scripted(&network, "liar", &[Key::Digest(layer.clone())], move |_| {
            [head(0, content.len()).as_bytes(), &content].concat()
        })
        .await;
        assert_eq!(b.get(&format!("/v2/app/manifests/{manifest}?ns=registry.test")).await.status, 200);
        assert_eq!(b.get(&target(&layer)).await.status, 404, "{difference}");
        assert!(asked.load(Ordering::Relaxed) > 0);
    }
}

/// A liar with large blobs, which are relayed unverified, and an honest node with the same.
struct Lies {
    b: Node,
    honest: Option<Node>,
    network: MemoryNetwork,
    blobs: Vec<(Digest, Vec<u8>)>,
    _liar: Arc<MemoryRouter>,
}

impl Lies {
    async fn new() -> Self {
        let network = MemoryNetwork::new();
        let blobs: Vec<_> = (30..34).map(|n| noise(n, 2 << 20)).map(|bytes| (digest_of(&bytes), bytes)).collect();
        let keys: Vec<Key> = blobs.iter().map(|(digest, _)| Key::Digest(digest.clone())).collect();
        let (liar, _) =
            scripted(&network, "1-liar", &keys, |_| [head(0, 2 << 20).as_bytes(), &vec![7; 2 << 20]].concat()).await;
        Self { b: Node::join(&network, "b"), honest: None, network, blobs, _liar: liar }
    }

    /// Whether the node's own containerd is given all of a blob, right or wrong, which it then does not store. What it had before is refused by
    /// a close.
    async fn gets(&self, n: usize) -> bool {
        let is_given = self.is_given(n).await;
        if is_given {
            self.b.registry.hear(&Outcome::Discarded(self.blobs[n].0.clone()));
        }
        is_given
    }

    async fn is_given(&self, n: usize) -> bool {
        let reply = self.b.ask("GET", &target(&self.blobs[n].0), &[("X-Spegel-Node", "b")]).await;
        assert!(reply.orderly && matches!(reply.status, 200 | 404));
        reply.status == 200 && reply.body.len() == self.blobs[n].1.len()
    }
}

#[tokio::test]
async fn what_is_asked_for_again_speaks_against_its_sender() {
    let mut lies = Lies::new().await;
    for n in 0..3 {
        assert!(lies.gets(n).await, "{n}: not verified here");
        assert!(!lies.gets(n).await, "{n}: its client found it wrong");
    }
    assert!(!lies.gets(3).await, "three times is enough for all");
    assert_eq!((lies.b.figure("spegel_wrong_bytes_total"), lies.b.figure("spegel_peers_set_aside_total")), (3.0, 1.0));
    let honest = Node::join(&lies.network, "2-honest");
    lies.blobs.iter().for_each(|(_, bytes)| {
        honest.offer(bytes);
    });
    lies.honest = Some(honest);
    for (digest, bytes) in &lies.blobs {
        let reply = lies.b.get(&target(digest)).await;
        assert!(reply.status == 200 && reply.body == *bytes);
    }
}

#[tokio::test]
async fn what_was_stored_meanwhile_speaks_against_nobody() {
    let lies = Lies::new().await;
    for _ in 0..4 {
        assert!(lies.is_given(0).await);
        lies.b.registry.hear(&Outcome::Stored(lies.blobs[0].0.clone()));
    }
}

/// Images are removed and pulled again, and some into a namespace of containerd's that this node does not see.
#[tokio::test]
async fn who_sent_what_nobody_saw_stored_or_discarded_is_no_liar() {
    let lies = Lies::new().await;
    for n in 0..3 {
        assert!(lies.is_given(n).await && !lies.is_given(n).await, "{n}: not asked again within a minute");
    }
    assert!(lies.is_given(3).await, "and asked for all else");
}

#[tokio::test]
async fn a_client_that_leaves_half_way_does_not_complain() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let bytes = noise(22, 8 << 20);
    let digest = a.offer(&bytes);
    for _ in 0..3 {
        let mut stream = tokio::net::TcpStream::connect(b.address()).await.unwrap();
        stream.write_all(format!("GET {} HTTP/1.1\r\nHost: b\r\n\r\n", target(&digest)).as_bytes()).await.unwrap();
        let mut some = vec![0; 1 << 20];
        stream.read_exact(&mut some).await.unwrap();
    }
    let reply = b.get(&target(&digest)).await;
    assert!(reply.status == 200 && reply.body == bytes);
}

/// A stall timeout of 300 ms: the peer moves, but not at the rate that is the least.
#[tokio::test]
async fn a_peer_that_trickles_is_left_for_another() {
    let network = MemoryNetwork::new();
    let mirror = MirrorSettings { stall: Duration::from_millis(300), ..MirrorSettings::default() };
    let b = Node::with(&network, "b", Setup { mirror: Some(mirror), ..Setup::default() });
    let bytes = noise(23, 2 << 20);
    let digest = digest_of(&bytes);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let slow = network.join("1-slow", listener.local_addr().unwrap());
    slow.announce(Change::Added(vec![Key::Digest(digest.clone())]));
    let content = bytes.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let content = content.clone();
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(head(0, content.len()).as_bytes()).await;
                for byte in content.chunks(100) {
                    if stream.write_all(byte).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        }
    });
    let start = Instant::now();
    let reply = b.get(&target(&digest)).await;
    assert!(reply.status == 200 && reply.orderly && reply.body.len() < 10_000, "{}", reply.body.len());
    let offset = reply.body.len();
    assert_eq!(b.ask("GET", &target(&digest), &[("Range", &format!("bytes={offset}-"))]).await.status, 404);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn our_own_address_as_a_peer_is_a_miss() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let digest = digest_of(b"x");
    let double = network.join("double", b.address());
    double.announce(Change::Added(vec![Key::Digest(digest.clone())]));
    assert_eq!(b.get(&target(&digest)).await.status, 404);
}

/// The dead are set aside after their first failure, and count for nothing then.
#[tokio::test]
async fn fifty_dead_peers_hide_a_live_one_for_a_while_only() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(24, 1000);
    let digest = digest_of(&bytes);
    let dead: Vec<_> = (0..50)
        .map(|n| {
            let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let router = network.join(&format!("{n}-dead"), address);
            router.announce(Change::Added(vec![Key::Digest(digest.clone())]));
            router
        })
        .collect();
    let live = Node::join(&network, "99-live");
    live.offer(&bytes);
    let start = Instant::now();
    let mut misses = 0;
    while b.get(&target(&digest)).await.status != 200 {
        misses += 1;
        assert!(misses < 100, "never found");
    }
    println!("{misses} misses among {} dead peers in {:?}", dead.len(), start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn nobody_is_asked_twice_in_one_request() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let digest = digest_of(b"x");
    let refusal = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n";
    let (_peer, asked) = scripted(&network, "a", &[Key::Digest(digest.clone())], |_| refusal.to_vec()).await;
    for n in 1..4 {
        assert_eq!(b.get(&target(&digest)).await.status, 404);
        assert_eq!(asked.load(Ordering::Relaxed), n);
    }
}

/// A router whose lookups come late.
#[derive(Debug)]
struct Late(Arc<MemoryRouter>, Duration);

impl Router for Late {
    fn lookup(&self, key: &Key) -> mpsc::Receiver<Peer> {
        let (sender, receiver) = mpsc::channel(8);
        let (mut found, delay) = (self.0.lookup(key), self.1);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            while let Some(peer) = found.recv().await {
                if sender.send(peer).await.is_err() {
                    return;
                }
            }
        });
        receiver
    }

    fn announce(&self, change: Change) {
        self.0.announce(change);
    }

    fn readiness(&self) -> watch::Receiver<Readiness> {
        self.0.readiness()
    }

    fn members(&self) -> watch::Receiver<Arc<[Member]>> {
        self.0.members()
    }

    fn set_load(&self, percent: u8) {
        self.0.set_load(percent);
    }
}

/// On a busy machine a lookup takes longer than the 20 ms that it may: it is late for one request, not for all that follow.
#[tokio::test]
async fn a_lookup_that_comes_too_late_serves_what_is_asked_next() {
    let network = MemoryNetwork::new();
    let a = Node::join(&network, "a");
    let mirror = MirrorSettings { resolve_timeout: Duration::from_millis(20), ..MirrorSettings::default() };
    let b = Node::behind(&network, "b", mirror, |router| Arc::new(Late(router, Duration::from_millis(150))));
    let layers: Vec<Digest> = (40..44).map(|n| a.offer(&noise(n, 5000))).collect();
    let entries: Vec<String> = layers
        .iter()
        .map(|layer| {
            format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":5000}}"#)
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":5000}},"layers":[{}]}}"#,
        layers[0],
        entries.join(",")
    );
    let manifest = a.offer(manifest.as_bytes());
    let target_of_manifest = format!("/v2/app/manifests/{manifest}?ns=registry.test");
    let start = Instant::now();
    assert_eq!(b.get(&target_of_manifest).await.status, 404);
    assert!(start.elapsed() < Duration::from_millis(140), "the bound holds: {:?}", start.elapsed());
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(b.get(&target_of_manifest).await.status, 200, "found meanwhile");
    for layer in &layers {
        assert_eq!(b.get(&target(layer)).await.status, 200, "who has the manifest has this");
    }
}

#[tokio::test]
async fn a_busy_peer_names_another_and_clients_are_never_refused() {
    let bytes = noise(25, 24 << 20);
    // What a knows, and what b knows: only a.
    let (wide, narrow) = (MemoryNetwork::new(), MemoryNetwork::new());
    let uploads = UploadLimits { count: 1, rate: 0 };
    let a = Node::with(&wide, "a", Setup { uploads, ..Setup::default() });
    let c = Node::join(&wide, "c");
    let digest = a.offer(&bytes);
    c.offer(&bytes);
    let b = Node::join(&narrow, "b");
    let alias = narrow.join("a", a.address());
    alias.announce(Change::Added(vec![Key::Digest(digest.clone())]));

    // Somebody takes a's only place, and reads nothing.
    let mut held = tokio::net::TcpStream::connect(a.address()).await.unwrap();
    let request = format!("GET {} HTTP/1.1\r\nHost: a\r\nX-Spegel-Mirrored: true\r\n\r\n", target(&digest));
    held.write_all(request.as_bytes()).await.unwrap();
    held.read_exact(&mut [0; 100]).await.unwrap();
    let refused = a.ask("GET", &target(&digest), &[("X-Spegel-Mirrored", "true")]).await;
    assert_eq!((refused.status, refused.header("x-spegel-holders")), (503, c.address().to_string().as_str()));
    assert_eq!(a.figure("spegel_rejected_uploads_total"), 1.0);

    let reply = b.get(&target(&digest)).await;
    assert!(reply.status == 200 && reply.body == bytes);
    assert_eq!(reply.header("x-spegel-source"), c.address().to_string());
    let own = a.get(&target(&digest)).await;
    assert!(own.status == 200 && own.body == bytes, "what has not our header is a client's");
    drop(held);
}

/// A node whose disk has changed a blob gives it until somebody complains, and then no more.
#[tokio::test]
async fn content_that_is_wrong_here_is_withdrawn_when_a_peer_complains() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let bytes = noise(26, 2 << 20);
    let digest = digest_of(&bytes);
    let mut damaged = bytes.clone();
    damaged[1_000_000] ^= 1;
    a.shelf.put_as(digest.clone(), &damaged);
    a.announce(Key::Digest(digest.clone()));
    let own = [("X-Spegel-Node", "b")];
    assert!(b.ask("GET", &target(&digest), &own).await.body == damaged, "nobody looks while it is relayed");
    let reply = b.ask("GET", &target(&digest), &own).await;
    assert!(reply.body.is_empty() && reply.orderly, "the client found it wrong");
    let found = || network.join("observer", "127.0.0.1:1".parse().unwrap()).lookup(&Key::Digest(digest.clone()));
    let deadline = Instant::now() + super::PATIENCE;
    while found().recv().await.is_some() {
        assert!(Instant::now() < deadline, "never withdrawn");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mirrored = [("X-Spegel-Mirrored", "true")];
    assert_eq!(a.ask("GET", &target(&digest), &mirrored).await.status, 404);
    a.shelf.put(&bytes);
    a.registry.hear(&Outcome::Stored(digest.clone()));
    assert!(a.ask("GET", &target(&digest), &mirrored).await.body == bytes, "stored anew");
}

#[tokio::test]
async fn a_complaint_of_what_is_right_changes_nothing() {
    let network = MemoryNetwork::new();
    let a = Node::join(&network, "a");
    let bytes = noise(27, 100_000);
    let digest = a.offer(&bytes);
    let complaint = [("X-Spegel-Mirrored", "true"), ("X-Spegel-Complaint", "true")];
    for _ in 0..3 {
        assert_eq!(a.ask("HEAD", &target(&digest), &complaint).await.status, 200);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(a.ask("GET", &target(&digest), &[("X-Spegel-Mirrored", "true")]).await.body == bytes);
}

#[tokio::test]
async fn a_file_that_gets_shorter_ends_in_order_and_is_withdrawn() {
    let network = MemoryNetwork::new();
    let a = Node::join(&network, "a");
    let bytes = noise(28, 8 << 20);
    let digest = a.offer(&bytes);
    let mut stream = tokio::net::TcpStream::connect(a.address()).await.unwrap();
    let request = format!("GET {} HTTP/1.1\r\nHost: a\r\n\r\n", target(&digest));
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.read_exact(&mut vec![0; 100_000]).await.unwrap();
    a.shelf.file(&digest).set_len(1000).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.expect("an orderly end");
    assert!(rest.len() < 8 << 20);
    assert_eq!(broken(&a).await, [1.0, 0.0]);
    withdrawn(&network, &a, digest).await;
}

/// Waits until bodies of local content, or of peers', are counted that were not given to their end.
async fn broken(node: &Node) -> [f64; 2] {
    let deadline = Instant::now() + super::PATIENCE;
    while node.figure("spegel_broken_bodies_total") == 0.0 {
        assert!(Instant::now() < deadline, "none is counted");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    ["local", "peer"].map(|source| node.metric("spegel_broken_bodies_total", &[&format!("source=\"{source}\"")]))
}

/// Waits until the node gives it to no peer any more, and it is offered no more then.
async fn withdrawn(network: &MemoryNetwork, node: &Node, digest: Digest) {
    let mirrored = [("X-Spegel-Mirrored", "true")];
    let deadline = Instant::now() + super::PATIENCE;
    while node.ask("GET", &target(&digest), &mirrored).await.status != 404 {
        assert!(Instant::now() < deadline, "still given");
    }
    let observer = network.join("observer", "127.0.0.1:1".parse().unwrap());
    assert!(observer.lookup(&Key::Digest(digest)).recv().await.is_none());
}

/// A directory stands for a file that the disk does not give: opened it can be, and read it cannot.
#[tokio::test]
async fn content_that_the_disk_does_not_give_ends_in_order_and_is_withdrawn() {
    let network = MemoryNetwork::new();
    let a = Node::join(&network, "a");
    let digest = digest_of(b"not this");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("something"), "in it").unwrap();
    let unreadable = Arc::new(std::fs::File::open(folder.path()).unwrap());
    assert!(unreadable.metadata().unwrap().len() > 0);
    a.shelf.blobs.lock().unwrap().insert(digest.clone(), unreadable);
    a.announce(Key::Digest(digest.clone()));
    let mirrored = [("X-Spegel-Mirrored", "true")];
    let reply = a.ask("GET", &target(&digest), &mirrored).await;
    assert!(reply.orderly && reply.body.is_empty(), "{reply:?}");
    withdrawn(&network, &a, digest).await;
}

/// Clients leave early all the time: that is not the disk's fault.
#[tokio::test]
async fn a_client_that_leaves_early_does_not_make_content_damaged() {
    let network = MemoryNetwork::new();
    let a = Node::join(&network, "a");
    let bytes = noise(29, 8 << 20);
    let digest = a.offer(&bytes);
    for _ in 0..3 {
        let mut stream = tokio::net::TcpStream::connect(a.address()).await.unwrap();
        let request = format!("GET {} HTTP/1.1\r\nHost: a\r\n\r\n", target(&digest));
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(a.figure("http_requests_inflight"), 0.0, "their bodies have ended");
    assert_eq!(a.figure("spegel_broken_bodies_total"), 0.0);
    assert!(a.ask("GET", &target(&digest), &[("X-Spegel-Mirrored", "true")]).await.body == bytes);
}
