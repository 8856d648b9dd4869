//! Blobs that a node is still receiving: who may have them, by which ways, and what becomes of a writer that gives up.

use std::os::unix::fs::FileExt as _;

use spegel::mirror::{Chain, NodeId};
use spegel::zerocopy::{Growing, Progress};

use super::*;

const MIB: usize = 1 << 20;

/// What a node's containerd writes to its ingest.
struct Writer {
    bytes: Vec<u8>,
    file: Arc<std::fs::File>,
    progress: watch::Sender<Progress>,
    target: String,
    digest: Digest,
}

impl Writer {
    /// `node` receives `bytes`, none of which is there yet, and offers them.
    fn at(node: &Node, bytes: &[u8]) -> Self {
        Self::of(node, digest_of(bytes), bytes, 1)
    }

    /// The same of bytes that need not be those of the digest, into the file of this name.
    fn of(node: &Node, digest: Digest, bytes: &[u8], ingest: u64) -> Self {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let progress = watch::Sender::new(Progress { position: 0, ended: false });
        let growing = Growing::new(file.clone(), progress.subscribe());
        let receiving = Receiving { growing, total: bytes.len() as u64, ingest };
        node.shelf.receiving.lock().unwrap().insert(digest.clone(), receiving);
        node.announce(Key::Digest(digest.clone()));
        let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
        Self { bytes: bytes.to_vec(), file, progress, target, digest }
    }

    fn write_to(&self, end: usize) {
        self.file.write_all_at(&self.bytes[..end], 0).unwrap();
        self.progress.send_replace(Progress { position: end as u64, ended: end == self.bytes.len() });
    }

    fn give_up(&self) {
        self.progress.send_modify(|progress| progress.ended = true);
    }
}

fn chain(names: &[&str]) -> String {
    let none = Chain::default();
    names.iter().rev().fold(none, |chain, name| chain.below(NodeId::of(name)).unwrap()).to_string()
}

/// Asks as the containerd of the node `name`.
async fn ask_as(node: &Node, name: &str, target: &str) -> Reply {
    node.ask("GET", target, &[("X-Spegel-Node", name)]).await
}

/// Asks as a peer whose own containerd wants it.
async fn ask_for(node: &Node, name: &str, target: &str, range: &str) -> Reply {
    node.ask("GET", target, &[("X-Spegel-Mirrored", "true"), ("X-Spegel-Node", name), ("Range", range)]).await
}

/// Asks in the background.
fn pull(node: &Node, name: &str, target: &str) -> tokio::task::JoinHandle<Reply> {
    let (address, name, target) = (node.address(), name.to_owned(), target.to_owned());
    tokio::spawn(async move {
        let headers = [("X-Spegel-Node", name.as_str())];
        let asked = exchange(address, "GET", &target, &headers);
        tokio::time::timeout(PATIENCE, asked).await.expect("an answer")
    })
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let polling = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, polling).await.is_ok(), "not in time: {what}");
}

#[tokio::test]
async fn a_peer_is_given_what_is_there_and_the_rest_as_it_comes() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let writer = Writer::at(&a, &noise(1, 5 * MIB));
    writer.write_to(MIB);
    let part = ask_for(&a, "b", &writer.target, "bytes=10-99").await;
    assert_eq!((part.status, part.body.as_slice()), (206, &writer.bytes[10..100]));
    assert_eq!(part.header("x-spegel-receiving"), format!("{MIB}/{}", 5 * MIB));
    assert_eq!((part.header("x-spegel-chain"), part.header("x-spegel-source")), (&*chain(&["a"]), "receiving"));

    let pulled = pull(&b, "b", &writer.target);
    for end in 2..=5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        writer.write_to(end * MIB);
    }
    let reply = pulled.await.unwrap();
    assert_eq!((reply.status, reply.header("x-spegel-source")), (200, &*a.address().to_string()));
    assert!(reply.body == writer.bytes && reply.orderly);
}

#[tokio::test]
async fn small_content_is_waited_for_and_verified() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let writer = Writer::at(&a, &noise(2, 100_000));
    writer.write_to(1000);
    let pulled = pull(&b, "b", &writer.target);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!pulled.is_finished());
    writer.write_to(100_000);
    let reply = pulled.await.unwrap();
    assert!(reply.status == 200 && reply.body == writer.bytes);
}

#[tokio::test]
async fn who_may_be_receiving_it_is_not_given_it() {
    let network = MemoryNetwork::new();
    let a = Node::join(&network, "a");
    let writer = Writer::at(&a, &noise(3, 2 * MIB));
    writer.write_to(2 * MIB);
    assert_eq!(ask_as(&a, "a", &writer.target).await.status, 404, "its own containerd would wait for itself");
    assert_eq!(a.get(&writer.target).await.status, 404, "nobody knows whose containerd this is");
    let reply = ask_as(&a, "b", &writer.target).await;
    assert!(reply.status == 200 && reply.body == writer.bytes, "another node's containerd");
    let complete = a.shelf.put(&noise(3, 2 * MIB));
    assert_eq!(complete, writer.digest);
    assert_eq!(ask_as(&a, "a", &writer.target).await.status, 200, "once it is complete");
}

/// B takes it from A, and C from B: then neither may take it from one that has it of him.
#[tokio::test]
async fn a_child_is_never_its_own_ancestor() {
    let network = MemoryNetwork::new();
    let (a, b, c) = (Node::join(&network, "a"), Node::join(&network, "b"), Node::join(&network, "c"));
    let bytes = noise(4, 4 * MIB);
    let at_a = Writer::at(&a, &bytes);
    at_a.write_to(MIB);
    let target = &at_a.target;
    let to_b = pull(&b, "b", target);
    let at_b = Writer::at(&b, &bytes);
    at_b.write_to(MIB);
    until("B has it by way of A", async || {
        ask_for(&b, "x", target, "bytes=0-9").await.header("x-spegel-chain") == chain(&["b", "a"])
    })
    .await;
    a.router.announce(Change::Removed(vec![Key::Digest(at_a.digest.clone())]));
    let to_c = pull(&c, "c", target);
    let at_c = Writer::at(&c, &bytes);
    at_c.write_to(MIB);
    until("C has it by way of B", async || {
        ask_for(&c, "x", target, "bytes=0-9").await.header("x-spegel-chain") == chain(&["c", "b", "a"])
    })
    .await;

    for (node, child) in [(&b, "a"), (&c, "a"), (&c, "b"), (&a, "a")] {
        assert_eq!(ask_for(node, child, target, "bytes=0-9").await.status, 404, "{child} is above");
    }
    for (node, child) in [(&a, "b"), (&a, "c"), (&b, "c")] {
        assert_eq!(ask_for(node, child, target, "bytes=0-9").await.status, 206, "{child} is below");
    }
    for writer in [&at_a, &at_b, &at_c] {
        writer.write_to(bytes.len());
    }
    for pulled in [to_b, to_c] {
        assert!(pulled.await.unwrap().body == bytes);
    }
    until("nobody feeds C any more", async || ask_for(&c, "a", target, "bytes=0-9").await.status == 206).await;
}

/// What a peer says of the chain is not trusted to be sensible.
#[tokio::test]
async fn an_answer_that_comes_through_us_or_does_not_tell_its_way_is_not_used() {
    let bytes = noise(5, 2 * MIB);
    let digest = digest_of(&bytes);
    for way in [
        format!("X-Spegel-Chain: {}\r\n", chain(&["x", "b", "y"])),
        "X-Spegel-Chain: circle\r\n".to_owned(),
        String::new(),
    ] {
        let network = MemoryNetwork::new();
        let b = Node::join(&network, "b");
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nX-Spegel-Receiving: 1/2\r\n{way}\r\n", bytes.len());
        let _peer = rogue(&network, "x", Key::Digest(digest.clone()), [head.as_bytes(), &bytes].concat()).await;
        let reply = ask_as(&b, "b", &format!("/v2/app/blobs/{digest}?ns=registry.test")).await;
        assert_eq!(reply.status, 404, "{way}");
    }
}

#[tokio::test]
async fn another_goes_on_where_a_writer_gave_up() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "1-a"), Node::join(&network, "b"));
    let writer = Writer::at(&a, &noise(6, 5 * MIB));
    writer.write_to(2 * MIB + 5);
    let pulled = pull(&b, "b", &writer.target);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let c = Node::join(&network, "2-c");
    c.offer(&writer.bytes);
    writer.give_up();
    let reply = pulled.await.unwrap();
    assert!(reply.status == 200 && reply.orderly && reply.body == writer.bytes, "{} bytes", reply.body.len());
}

#[tokio::test]
async fn a_writer_that_gave_up_ends_in_an_orderly_close_where_nobody_goes_on() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let writer = Writer::at(&a, &noise(7, 5 * MIB));
    writer.write_to(2 * MIB + 5);
    let pulled = pull(&b, "b", &writer.target);
    tokio::time::sleep(Duration::from_millis(100)).await;
    writer.give_up();
    let reply = pulled.await.unwrap();
    assert!(reply.orderly && reply.body == writer.bytes[..2 * MIB + 5], "{} bytes", reply.body.len());
}

/// B follows A through an image: for the second layer it waits at A, where nothing is offered yet.
#[tokio::test]
async fn who_follows_a_node_waits_there_for_the_next_blob_and_only_within_bounds() {
    let network = MemoryNetwork::new();
    let hold = Duration::from_millis(400);
    let patient = MirrorSettings { hold, ..MirrorSettings::default() };
    let a = Node::join(&network, "a");
    let b = Node::with(&network, "b", Setup { mirror: Some(patient), ..Setup::default() });
    let (one, two, three) = (noise(8, 2 * MIB), noise(9, 2 * MIB), noise(10, 2 * MIB));
    let target = |bytes: &[u8]| format!("/v2/app/blobs/{}?ns=registry.test", digest_of(bytes));
    a.shelf.expected.lock().unwrap().extend([digest_of(&two), digest_of(&three)]);
    let timed = async |bytes: &[u8]| {
        let start = std::time::Instant::now();
        (ask_as(&b, "b", &target(bytes)).await.status, start.elapsed())
    };
    let (status, took) = timed(&two).await;
    assert!(status == 404 && took < hold, "B follows nobody: {status} after {took:?}");

    a.offer(&one);
    assert_eq!(timed(&one).await.0, 200);
    let waiting = pull(&b, "b", &target(&two));
    tokio::time::sleep(hold / 4).await;
    assert!(!waiting.is_finished());
    let writer = Writer::at(&a, &two);
    writer.write_to(MIB);
    a.shelf.expected.lock().unwrap().remove(&writer.digest);
    tokio::time::sleep(hold).await;
    writer.write_to(2 * MIB);
    let reply = waiting.await.unwrap();
    assert!(reply.status == 200 && reply.body == two, "{}", reply.status);

    let (status, took) = timed(&three).await;
    assert!(status == 404 && took >= hold && took < hold * 5, "in vain: {status} after {took:?}");
    let (status, took) = timed(&three).await;
    assert!(status == 404 && took < hold, "and not again: {status} after {took:?}");
}

/// A part that lies ahead waits longer than the stall bound, as long as the peer gets on; one that does not is given up.
#[tokio::test]
async fn a_stall_is_judged_by_the_growth_of_who_receives_it() {
    let network = MemoryNetwork::new();
    let stall = Duration::from_millis(300);
    let a = Node::join(&network, "a");
    let hasty = MirrorSettings { stall, ..MirrorSettings::default() };
    let b = Node::with(&network, "b", Setup { mirror: Some(hasty), ..Setup::default() });
    let writer = Writer::at(&a, &noise(11, 8 * MIB));
    writer.write_to(1);
    let (address, target) = (b.address(), writer.target.clone());
    let ahead = |range: &'static str| {
        let target = target.clone();
        tokio::spawn(async move {
            let headers = [("X-Spegel-Node", "b"), ("Range", range)];
            tokio::time::timeout(PATIENCE, exchange(address, "GET", &target, &headers)).await.expect("an answer")
        })
    };
    let part = ahead("bytes=6291456-8388607");
    for n in 1..=20 {
        tokio::time::sleep(stall / 4).await;
        writer.write_to(n * 100_000);
    }
    assert!(!part.is_finished(), "five times the stall bound, and A got on all the time");
    writer.write_to(8 * MIB);
    let reply = part.await.unwrap();
    assert!(reply.status == 206 && reply.body == writer.bytes[6 * MIB..], "{}", reply.body.len());

    let still = Writer::at(&a, &noise(12, 8 * MIB));
    still.write_to(MIB);
    let start = std::time::Instant::now();
    let reply = pull(&b, "b", &still.target).await.unwrap();
    assert!(reply.orderly && reply.body == still.bytes[..MIB], "{} bytes", reply.body.len());
    assert!(start.elapsed() < stall * 15, "{:?}", start.elapsed());
}

/// containerd writes in steps of 1 MiB: at a low rate each takes longer than the stall bound, and the file looks still meanwhile.
#[tokio::test]
async fn who_receives_slowly_is_waited_for_from_step_to_step() {
    let network = MemoryNetwork::new();
    let stall = Duration::from_millis(200);
    let a = Node::join(&network, "a");
    let hasty = MirrorSettings { stall, ..MirrorSettings::default() };
    let b = Node::with(&network, "b", Setup { mirror: Some(hasty), ..Setup::default() });
    let writer = Writer::at(&a, &noise(13, 4 * MIB));
    writer.write_to(MIB);
    let pulled = pull(&b, "b", &writer.target);
    for n in 2..=4 {
        tokio::time::sleep(stall * 3).await;
        assert!(!pulled.is_finished(), "given up before step {n}");
        writer.write_to(n * MIB);
    }
    let reply = pulled.await.unwrap();
    assert!(reply.status == 200 && reply.body == writer.bytes, "{} bytes", reply.body.len());
}

/// Each question finds it one byte further, and it sends none: growth is no excuse for what it holds and does not send.
#[tokio::test]
async fn who_grows_and_sends_nothing_is_given_up() {
    let network = MemoryNetwork::new();
    let mirror = MirrorSettings { stall: Duration::from_millis(300), ..MirrorSettings::default() };
    let b = Node::with(&network, "b", Setup { mirror: Some(mirror), ..Setup::default() });
    let bytes = noise(14, 4 * MIB);
    let digest = digest_of(&bytes);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let liar = network.join("x", listener.local_addr().unwrap());
    liar.announce(Change::Added(vec![Key::Digest(digest.clone())]));
    let content = bytes.clone();
    tokio::spawn(async move {
        let mut position = 2 * MIB;
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let read = stream.read(&mut request).await.unwrap_or_default();
            position += 1;
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {total}\r\nX-Spegel-Receiving: {position}/{total}\r\nX-Spegel-Chain: {}\r\nConnection: close\r\n\r\n",
                chain(&["x"]),
                total = content.len()
            );
            let _ = stream.write_all(head.as_bytes()).await;
            if request[..read].starts_with(b"GET") {
                let _ = stream.write_all(&content[..100_000]).await;
                tokio::spawn(async move {
                    let _silent = stream.read(&mut [0]).await;
                });
            }
        }
    });
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    let asked = tokio::time::timeout(Duration::from_secs(10), ask_as(&b, "b", &target));
    let reply = asked.await.expect("it was waited for without bound");
    assert!(reply.status == 200 && reply.orderly && reply.body == bytes[..100_000], "{}", reply.body.len());
}

/// With filters that is what decides whether it is offered while it comes, also where they keep back what is asked for.
#[tokio::test]
async fn the_store_hears_what_its_own_containerd_pulls() {
    let network = MemoryNetwork::new();
    let filters = Filters::new(&[], &[":latest$".to_owned()]).unwrap();
    let a = Node::with(&network, "a", Setup { filters: Some(filters), ..Setup::default() });
    let (here, gone) = (a.offer(&noise(80, 100)), digest_of(b"not here"));
    let blob = |digest: &Digest| format!("/v2/app/blobs/{digest}?ns=registry.test");
    let manifest = |name: &str| format!("/v2/app/manifests/{name}?ns=registry.test");
    for target in [blob(&here), blob(&gone), manifest("latest"), manifest(gone.as_str())] {
        ask_as(&a, "a", &target).await;
        ask_as(&a, "b", &target).await;
        ask_for(&a, "b", &target, "bytes=0-").await;
    }
    let pulls = std::mem::take(&mut *a.shelf.pulls.lock().unwrap());
    let repository = Repository::new("registry.test", "app").unwrap();
    let asked = [
        TagOrDigest::Digest(gone.clone()),
        TagOrDigest::Tag("registry.test/app:latest".parse().unwrap()),
        TagOrDigest::Digest(gone),
    ];
    assert_eq!(pulls, asked.map(|reference| (repository.clone(), reference)));
}

// === circles ===

/// Asks as the node's own containerd, and hears who gives it: the port of the peer, or nobody.
fn parent(node: &Node, name: &str, target: &str, first: usize) -> tokio::task::JoinHandle<(Option<u16>, TcpStream)> {
    let (address, name, target) = (node.address(), name.to_owned(), target.to_owned());
    tokio::spawn(async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("GET {target} HTTP/1.1\r\nHost: n\r\nX-Spegel-Node: {name}\r\nRange: bytes={first}-\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("a head").unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let source =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("x-spegel-source: ").map(str::to_owned));
        let port = source.filter(|_| head.starts_with("HTTP/1.1 206"));
        (port.map(|source| source.parse::<SocketAddr>().unwrap().port()), stream)
    })
}

/// All have lost their parent at the same time, and ask each other at the same time. Whoever gets it from nobody goes upstream; nobody gets it
/// from himself, and of those who have as much as each other not all go upstream.
#[tokio::test]
async fn of_nodes_that_ask_each_other_at_once_none_is_its_own_ancestor() {
    let mut fed = 0;
    for round in 0..12 {
        for count in [2, 3] {
            let network = MemoryNetwork::new();
            let names: Vec<String> = (0..count).map(|n| format!("{round}-{n}")).collect();
            let nodes: Vec<Node> = names.iter().map(|name| Node::join(&network, name)).collect();
            let bytes = noise(40 + round, 4 * MIB);
            let writers: Vec<Writer> = nodes.iter().map(|node| Writer::at(node, &bytes)).collect();
            writers.iter().for_each(|writer| writer.write_to(MIB));
            // Some start over: what their files look like is not what they have.
            let first = if round % 2 == 0 { MIB } else { 0 };
            let asked: Vec<_> =
                nodes.iter().zip(&names).map(|(node, name)| parent(node, name, &writers[0].target, first)).collect();
            let mut parents = HashMap::new();
            let mut open = Vec::new();
            for (node, asked) in nodes.iter().zip(asked) {
                let (port, stream) = asked.await.unwrap();
                parents.extend(port.map(|port| (node.address().port(), port)));
                open.push(stream);
            }
            for node in &nodes {
                let way = std::iter::successors(parents.get(&node.address().port()), |port| parents.get(port));
                assert!(way.take(count + 1).count() <= count, "round {round}: a circle in {parents:?}");
            }
            assert!(parents.len() < count);
            fed += parents.len();
        }
    }
    assert!(fed > 0, "somebody gives it to others");
}

// === wrong bytes ===

/// A's upstream sent wrong bytes of three layers, which B had of A as they came. That is no lie of A's: what it has verified is good.
#[tokio::test]
async fn who_passed_on_wrong_bytes_is_no_outcast_and_its_file_is_not_used_again() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let right: Vec<Vec<u8>> = (50..53).map(|seed| noise(seed, 2 * MIB)).collect();
    let status = async |target: &str| {
        let reply = ask_as(&b, "b", target).await;
        // What was given before is refused by an orderly close.
        if reply.body.len() == 2 * MIB { (reply.status, reply.body) } else { (404, Vec::new()) }
    };
    let poison = |n: usize, ingest: u64| {
        let mut wrong = right[n].clone();
        wrong[MIB] ^= 1;
        let writer = Writer::of(&a, digest_of(&right[n]), &wrong, ingest);
        writer.write_to(2 * MIB);
        (writer, wrong)
    };
    let (writer, wrong) = poison(0, 1);
    assert!(status(&writer.target).await == (200, wrong), "not verified here");
    assert_eq!(status(&writer.target).await.0, 404, "B's containerd asks again: that file is not used again");
    assert_eq!(status(&writer.target).await.0, 404);
    let anew = Writer::of(&a, digest_of(&right[0]), &right[0], 2);
    anew.write_to(2 * MIB);
    assert!(status(&anew.target).await == (200, right[0].clone()), "A starts over");

    for n in 1..3 {
        let (writer, wrong) = poison(n, 3);
        assert!(status(&writer.target).await == (200, wrong), "{n}");
        assert_eq!(status(&writer.target).await.0, 404, "{n}");
    }
    // Small ones are verified here.
    let small = noise(54, 1000);
    let writer = Writer::of(&a, digest_of(&small), &[7; 1000], 4);
    writer.write_to(1000);
    assert_eq!(ask_as(&b, "b", &writer.target).await.status, 404);
    a.shelf.receiving.lock().unwrap().clear();
    for bytes in right.iter().chain([&small, &noise(55, 3 * MIB)]) {
        let digest = a.offer(bytes);
        let reply = ask_as(&b, "b", &format!("/v2/app/blobs/{digest}?ns=registry.test")).await;
        assert!(reply.status == 200 && reply.body == *bytes, "{}: A has verified it", reply.status);
    }
}

// === small and slow ===

/// 400 KB in steps that take longer than the stall bound together.
#[tokio::test]
async fn small_content_that_comes_slowly_is_waited_for_as_long_as_its_sender_gets_on() {
    let network = MemoryNetwork::new();
    let stall = Duration::from_millis(300);
    let a = Node::join(&network, "a");
    let hasty = MirrorSettings { stall, ..MirrorSettings::default() };
    let b = Node::with(&network, "b", Setup { mirror: Some(hasty), ..Setup::default() });
    let writer = Writer::at(&a, &noise(60, 400_000));
    writer.write_to(1);
    let pulled = pull(&b, "b", &writer.target);
    for n in 1..=4 {
        tokio::time::sleep(stall * 2 / 3).await;
        assert!(!pulled.is_finished(), "given up before step {n}");
        writer.write_to(n * 100_000);
    }
    let reply = pulled.await.unwrap();
    assert!(reply.status == 200 && reply.body == writer.bytes, "{}: {} bytes", reply.status, reply.body.len());
    let other = a.offer(&noise(61, 1000));
    assert_eq!(b.get(&format!("/v2/app/blobs/{other}?ns=registry.test")).await.status, 200, "A is not set aside");

    let still = Writer::at(&a, &noise(62, 400_000));
    still.write_to(100_000);
    let pulled = pull(&b, "b", &still.target);
    tokio::time::sleep(stall / 2).await;
    still.give_up();
    assert_eq!(pulled.await.unwrap().status, 404, "its own pull was given up");
    let other = a.offer(&noise(63, 1000));
    assert_eq!(b.get(&format!("/v2/app/blobs/{other}?ns=registry.test")).await.status, 200, "A is not set aside");
}

/// A pull that is given up at A says nothing about the next thing that A is asked for.
#[tokio::test]
async fn a_pull_that_is_given_up_does_not_set_its_node_aside() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let other = a.offer(&noise(70, 2 * MIB));
    for seed in 71..75 {
        let writer = Writer::at(&a, &noise(seed, 5 * MIB));
        writer.write_to(2 * MIB);
        let pulled = pull(&b, "b", &writer.target);
        tokio::time::sleep(Duration::from_millis(50)).await;
        writer.give_up();
        assert_eq!(pulled.await.unwrap().body.len(), 2 * MIB);
        let reply = b.get(&format!("/v2/app/blobs/{other}?ns=registry.test")).await;
        assert_eq!((reply.status, reply.body.len()), (200, 2 * MIB), "{seed}");
    }
}
