//! What a node gets from peers for its clients.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use spegel::oci::Key;
use spegel::router::MemoryNetwork;

use super::{MANIFEST, Node, digest_of, noise, ok, rogue, scripted, target};

#[tokio::test]
async fn content_is_found_at_a_peer_by_tag_and_by_digest() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let digest = a.offer_tag("registry.test/team/app:v1", MANIFEST);
    let reply = b.ask("HEAD", "/v2/team/app/manifests/v1?ns=registry.test", &[]).await;
    assert_eq!((reply.status, reply.header("docker-content-digest")), (200, digest.as_str()));
    assert_eq!(reply.header("content-type"), "application/vnd.oci.image.manifest.v1+json");
    assert_eq!(reply.header("content-length"), MANIFEST.len().to_string());
    let reply = b.get(&format!("/v2/team/app/manifests/{digest}?ns=registry.test")).await;
    assert_eq!((reply.status, reply.body.as_slice()), (200, MANIFEST));

    let (small, large) = (noise(1, 1000), noise(2, 8 << 20));
    for bytes in [&small, &large] {
        let reply = b.get(&format!("/v2/team/app/blobs/{}?ns=registry.test", a.offer(bytes))).await;
        assert_eq!((reply.status, reply.body.len()), (200, bytes.len()));
        assert!(reply.body == *bytes && reply.orderly);
        assert_eq!(reply.header("x-spegel-source"), a.address().to_string());
    }
}

#[tokio::test]
async fn a_tag_that_was_promised_can_be_had_after_its_peer_left() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let digest = a.offer_tag("registry.test/team/app:v1", MANIFEST);
    assert_eq!(b.ask("HEAD", "/v2/team/app/manifests/v1?ns=registry.test", &[]).await.status, 200);
    a.server.shutdown(Duration::ZERO).await;
    drop(a.router);
    let reply = b.get(&format!("/v2/team/app/manifests/{digest}?ns=registry.test")).await;
    assert_eq!((reply.status, reply.body.as_slice()), (200, MANIFEST));
}

#[tokio::test]
async fn ranges_pass_through_a_relay() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let bytes = noise(3, 3 << 20);
    let target = format!("/v2/app/blobs/{}?ns=registry.test", a.offer(&bytes));
    for (range, start, end) in
        [("bytes=0-", 0, 3 << 20), ("bytes=7-1000006", 7, 1_000_007), ("bytes=-5", (3 << 20) - 5, 3 << 20)]
    {
        let reply = b.ask("GET", &target, &[("Range", range)]).await;
        assert_eq!((reply.status, reply.body.len()), (206, end - start), "{range}");
        assert!(reply.body == bytes[start..end]);
        assert_eq!(reply.header("content-range"), format!("bytes {start}-{}/{}", end - 1, 3 << 20));
    }
    let reply = b.ask("GET", &target, &[("Range", "bytes=3145728-")]).await;
    assert_eq!((reply.status, reply.header("content-range")), (416, "bytes */3145728"));
    let reply = b.ask("GET", &target, &[("Range", "bytes=1-2,4-5")]).await;
    assert_eq!((reply.status, reply.body.len()), (200, 3 << 20));
    let reply = b.ask("HEAD", &target, &[("Range", "bytes=1-2")]).await;
    assert_eq!((reply.status, reply.header("content-length")), (200, "3145728"));
}

#[tokio::test]
async fn a_peers_request_is_answered_from_local_content_only() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let target = format!("/v2/app/blobs/{}?ns=registry.test", a.offer(b"x"));
    assert_eq!(b.ask("GET", &target, &[("X-Spegel-Mirrored", "true")]).await.status, 404);
    assert_eq!(b.get(&target).await.status, 200);
}

#[tokio::test]
async fn wrong_bytes_are_not_passed_on_and_the_next_peer_is_asked() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let digest = digest_of(b"right");
    let _liar = rogue(&network, "1-liar", Key::Digest(digest.clone()), ok(b"wrong")).await;
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    assert_eq!(b.get(&target).await.status, 404);
    let honest = Node::join(&network, "2-honest");
    honest.offer(b"right");
    let reply = b.get(&target).await;
    assert_eq!((reply.status, reply.body.as_slice()), (200, &b"right"[..]));
}

#[tokio::test]
async fn peers_that_misbehave_before_the_body_cost_a_retry_only() {
    let whole = noise(4, 4 << 20);
    let digest = digest_of(&whole);
    for (fault, answer) in [
        ("closes", b"".to_vec()),
        ("404", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec()),
        ("429", b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n".to_vec()),
        ("redirect", b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\nContent-Length: 0\r\n\r\n".to_vec()),
        ("no length", b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        (
            "another part",
            b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-6/4194304\r\nContent-Length: 2\r\n\r\nxx".to_vec(),
        ),
        ("not HTTP", noise(5, 3000)),
        ("endless head", [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 64 << 10]].concat()),
    ] {
        let network = MemoryNetwork::new();
        let b = Node::join(&network, "b");
        let _bad = rogue(&network, "1-bad", Key::Digest(digest.clone()), answer).await;
        let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
        assert_eq!(b.get(&target).await.status, 404, "{fault}: alone");
        let good = Node::join(&network, "2-good");
        good.offer(&whole);
        let reply = b.get(&target).await;
        assert!(reply.status == 200 && reply.body == whole, "{fault}: {}", reply.status);
        let reply = b.ask("GET", &target, &[("Range", "bytes=1-2")]).await;
        assert!(reply.status == 206 && reply.body == whole[1..3], "{fault}: {}", reply.status);
    }
}

#[tokio::test]
async fn a_silent_peer_delays_by_the_hedge_only() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = network.join("1-silent", listener.local_addr().unwrap());
    let good = Node::join(&network, "2-good");
    let digest = good.offer(b"x");
    spegel::router::Router::announce(&*silent, spegel::store::Change::Added(vec![Key::Digest(digest.clone())]));
    let start = Instant::now();
    let reply = b.get(&format!("/v2/app/blobs/{digest}?ns=registry.test")).await;
    assert_eq!(reply.status, 200);
    assert!(start.elapsed() < Duration::from_millis(1500), "the silent peer's own bound is 2 s");
    // Which of the two is asked first is chance.
    let outcome = |outcome: &str| b.metric("spegel_peer_requests_total", &[&format!("outcome=\"{outcome}\"")]);
    let others = || outcome("late") + outcome("given_up");
    assert_eq!((outcome("answered"), b.figure("spegel_peer_requests_total")), (1.0, 1.0 + others()));
    for n in 0.. {
        assert!(n < 100, "the silent one is never asked first");
        let digest = good.offer(&noise(n, 10));
        spegel::router::Router::announce(&*silent, spegel::store::Change::Added(vec![Key::Digest(digest.clone())]));
        assert_eq!(b.get(&target(&digest)).await.status, 200);
        if outcome("late") > 0.0 {
            break;
        }
    }
    assert_eq!(b.figure("spegel_peer_requests_total"), outcome("answered") + others(), "each counts once");
}

#[tokio::test]
async fn peers_that_are_silent_end_in_a_404_within_their_bounds() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let digest = digest_of(b"x");
    let mut silent = Vec::new();
    for n in 0..5 {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let router = network.join(&format!("{n}-silent"), listener.local_addr().unwrap());
        spegel::router::Router::announce(&*router, spegel::store::Change::Added(vec![Key::Digest(digest.clone())]));
        silent.push((listener, router));
    }
    let start = Instant::now();
    assert_eq!(b.get(&format!("/v2/app/blobs/{digest}?ns=registry.test")).await.status, 404);
    // Three of them are tried, each from a hedge after the one before, each for 2 s.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn many_connections_that_want_the_same_are_all_served() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    for bytes in [noise(6, 2000), noise(7, 2 << 20)] {
        let target = format!("/v2/app/blobs/{}?ns=registry.test", a.offer(&bytes));
        let asked = (0..64).map(|_| b.get(&target));
        let replies = futures::future::join_all(asked).await;
        assert!(replies.iter().all(|reply| reply.status == 200 && reply.body == bytes));
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_goes_on_from_another_peer_at_the_same_byte() {
    let bytes = noise(8, 4 << 20);
    let digest = digest_of(&bytes);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
    let short = [head.as_bytes(), &bytes[..1_234_567]].concat();
    // Which of two is asked first is left to chance.
    for _ in 0..30 {
        let network = MemoryNetwork::new();
        let b = Node::join(&network, "b");
        let answer = short.clone();
        let keys = [Key::Digest(digest.clone())];
        let (_broken, asked) = scripted(&network, "1-short", &keys, move |_| answer.clone()).await;
        let good = Node::join(&network, "2-good");
        good.offer(&bytes);
        let reply = b.get(&format!("/v2/app/blobs/{digest}?ns=registry.test")).await;
        assert!(reply.status == 200 && reply.orderly);
        assert!(reply.body == bytes, "{} of {} bytes", reply.body.len(), bytes.len());
        if asked.load(Ordering::Relaxed) > 0 {
            assert_eq!(b.figure("spegel_relay_resumes_total"), 1.0);
            return;
        }
    }
    panic!("the one that breaks off was never asked");
}

#[tokio::test]
async fn a_part_that_breaks_off_goes_on_within_its_bounds() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(9, 4 << 20);
    let digest = digest_of(&bytes);
    let head =
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 1000-3000999/4194304\r\nContent-Length: 3000000\r\n\r\n";
    let short = [head.as_bytes(), &bytes[1000..500_000]].concat();
    let _broken = rogue(&network, "1-short", Key::Digest(digest.clone()), short).await;
    let good = Node::join(&network, "2-good");
    good.offer(&bytes);
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    let reply = b.ask("GET", &target, &[("Range", "bytes=1000-3000999")]).await;
    assert!(reply.status == 206 && reply.orderly && reply.body == bytes[1000..3_001_000], "{}", reply.body.len());
}
