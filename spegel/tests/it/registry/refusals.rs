//! How a node refuses a client that it has given something: what fails a pull of containerd is never said.

use spegel::oci::Key;
use spegel::registry::Strain;
use spegel::router::MemoryNetwork;

use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Node, digest_of, noise, rogue};

/// Fewer bytes than announced, then an orderly end.
fn short(total: usize, bytes: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n").as_bytes(), bytes].concat()
}

#[tokio::test]
async fn a_chunk_after_the_first_is_refused_by_an_orderly_close_and_then_by_a_status() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let bytes = noise(1, 2 << 20);
    let digest = a.offer(&bytes);
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    let chunk = |range: &'static str| {
        let (b, target) = (&b, &target);
        async move { b.ask("GET", target, &[("Range", range), ("X-Spegel-Node", "b")]).await }
    };
    assert_eq!(chunk("bytes=0-").await.status, 206);
    a.withdraw(&digest);

    let reply = chunk("bytes=1048576-").await;
    assert_eq!((reply.status, reply.body.len(), reply.orderly), (206, 0, true));
    assert_eq!(reply.header("content-range"), "bytes 1048576-2097151/2097152");
    assert_eq!(reply.header("content-length"), "1048576");
    let reply = chunk("bytes=1048576-").await;
    assert_eq!((reply.status, reply.error_code().as_str()), (404, "BLOB_UNKNOWN"));
    assert_eq!(b.figure("spegel_cut_responses_total"), 1.0);

    let reply = b.ask("GET", &target, &[("X-Spegel-Node", "b")]).await;
    assert_eq!((reply.status, reply.body.len(), reply.orderly), (200, 0, true), "the whole, to the same client");
    let reply = b.ask("GET", &target, &[("X-Spegel-Node", "c")]).await;
    assert_eq!(reply.status, 404, "another client was given nothing");
    let reply = b.ask("HEAD", &target, &[("X-Spegel-Node", "b")]).await;
    assert_eq!(reply.status, 404, "only the parts of a blob are fetched in parallel");
}

#[tokio::test]
async fn a_body_that_breaks_off_ends_orderly_and_its_rest_is_refused_by_a_status() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(2, 2 << 20);
    let digest = digest_of(&bytes);
    let _short = rogue(&network, "short", Key::Digest(digest.clone()), short(bytes.len(), &bytes[..1_500_000])).await;
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    let reply = b.get(&target).await;
    assert_eq!((reply.status, reply.body.len(), reply.orderly), (200, 1_500_000, true));
    assert!(reply.body == bytes[..1_500_000]);
    let reply = b.ask("GET", &target, &[("Range", "bytes=1500000-")]).await;
    assert_eq!(reply.status, 404, "the peer's answer is no part, and the client looks elsewhere already");
}

#[tokio::test]
async fn a_local_file_that_shrinks_ends_orderly() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let bytes = noise(3, 1 << 20);
    let digest = node.shelf.put(&bytes);
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    let (file, whole) = (node.shelf.file(&digest), node.get(&target).await);
    assert!(whole.body == bytes);
    file.set_len(1000).unwrap();
    let reply = node.ask("GET", &target, &[("Range", "bytes=2000-")]).await;
    assert_eq!(reply.status, 416);
}

#[tokio::test]
async fn a_node_that_stops_sends_clients_elsewhere_in_the_way_that_they_understand() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let (given, other) = (node.shelf.put(&noise(4, 1 << 20)), node.shelf.put(b"other"));
    let target = |digest: &spegel::oci::Digest| format!("/v2/app/blobs/{digest}?ns=registry.test");
    let part = [("Range", "bytes=0-99"), ("X-Spegel-Node", "n")];
    assert_eq!(node.ask("GET", &target(&given), &part).await.status, 206);
    node.registry.drain();

    let next = [("Range", "bytes=500-"), ("X-Spegel-Node", "n")];
    let reply = node.ask("GET", &target(&given), &next).await;
    assert_eq!((reply.status, reply.body.len(), reply.orderly), (206, 0, true));
    assert_eq!(node.ask("GET", &target(&given), &next).await.status, 503);
    assert_eq!(node.get(&target(&other)).await.status, 503);
    assert_eq!(node.get("/readyz").await.status, 503);
    assert_eq!(node.get("/livez").await.status, 200);
    assert_eq!(node.registry.in_flight(), 0);
}

/// A containerd that would fetch in parallel chunks gets the whole in one answer, which it can resume anywhere; others get what they ask for.
#[tokio::test]
async fn a_parallel_fetch_is_kept_to_one_request() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let bytes = noise(90, 3 << 20);
    let digest = a.offer(&bytes);
    let target = format!("/v2/app/blobs/{digest}?ns=registry.test");
    let ask = |range: &'static str, agent: &'static str| {
        let (b, target) = (&b, &target);
        async move { b.ask("GET", target, &[("Range", range), ("User-Agent", agent)]).await }
    };
    assert_eq!(ask("bytes=1000-", "containerd/v2.2.7").await.status, 206, "it resumes");
    assert_eq!(ask("bytes=0-", "curl/8.0").await.status, 206);
    for range in ["bytes=0-", "bytes=1000-"] {
        let reply = ask(range, "containerd/v2.2.7").await;
        assert_eq!((reply.status, reply.header("content-range")), (200, ""), "{range}");
        assert!(reply.body == bytes);
    }
    a.withdraw(&digest);
    for _ in 0..2 {
        assert_eq!(ask("bytes=1000-", "containerd/v2.2.7").await.status, 404, "no chunk can fail");
    }
}

/// What runs goes on, what comes is sent elsewhere, and all is well again once it has passed.
#[tokio::test]
async fn a_node_that_is_about_to_run_out_refuses_new_work_until_that_has_passed() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let bytes = noise(5, 24 << 20);
    let (given, other) = (node.shelf.put(&bytes), node.shelf.put(b"other"));
    let target = |digest: &spegel::oci::Digest| format!("/v2/app/blobs/{digest}?ns=registry.test");
    // At another byte each time: a second end without progress would be a refusal.
    for (strain, word, next) in
        [(Strain::Memory, "memory", "bytes=500-"), (Strain::Descriptors, "open files", "bytes=600-")]
    {
        assert_eq!(node.get("/readyz").await.status, 200);
        let mut under_way = tokio::net::TcpStream::connect(node.address()).await.unwrap();
        let request = format!("GET {} HTTP/1.1\r\nHost: a\r\nX-Spegel-Node: n\r\n\r\n", target(&given));
        under_way.write_all(request.as_bytes()).await.unwrap();
        under_way.read_exact(&mut [0; 1000]).await.unwrap();

        assert_eq!(node.registry.set_strain(Some(strain)), None);
        let ready = node.get("/readyz").await;
        assert!(ready.status == 503 && String::from_utf8(ready.body).unwrap().contains(word));
        assert_eq!(node.get("/livez").await.status, 200);
        assert_eq!(node.get(&target(&other)).await.status, 503);
        assert_eq!(node.ask("GET", &target(&other), &[("X-Spegel-Mirrored", "true")]).await.status, 503);
        let reply = node.ask("GET", &target(&given), &[("Range", next), ("X-Spegel-Node", "n")]).await;
        assert_eq!(
            (reply.status, reply.body.len(), reply.orderly),
            (206, 0, true),
            "an error status would fail its pull"
        );
        under_way.read_exact(&mut vec![0; 23 << 20]).await.expect("what is under way goes on");

        assert_eq!(node.registry.set_strain(None), Some(strain));
        // As a peer, which is promised nothing by it.
        assert!(node.ask("GET", &target(&other), &[("X-Spegel-Mirrored", "true")]).await.body == b"other");
        assert!(node.figure("spegel_refused_requests_total") >= 3.0);
    }
}

#[tokio::test]
async fn a_connection_too_many_is_sent_elsewhere_in_the_same_way() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let (given, other) = (node.shelf.put(&noise(4, 1 << 20)), node.shelf.put(b"other"));
    let target = |digest: &spegel::oci::Digest| format!("/v2/app/blobs/{digest}?ns=registry.test");
    let part = [("Range", "bytes=0-99"), ("X-Spegel-Node", "n")];
    assert_eq!(node.ask("GET", &target(&given), &part).await.status, 206);
    let turn_away = |digest: &spegel::oci::Digest| {
        let request = http::Request::get(target(digest)).header("Range", "bytes=500-").header("X-Spegel-Node", "n");
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let registry = Arc::clone(&node.registry);
        async move { registry.turn_away(&parts, Ipv4Addr::LOCALHOST.into()).await.status().as_u16() }
    };
    assert_eq!(turn_away(&given).await, 206, "an error status would fail the pull");
    assert_eq!(turn_away(&given).await, 503, "a second empty body would, too");
    assert_eq!(turn_away(&other).await, 503);
    let (parts, ()) = http::Request::get("/readyz").body(()).unwrap().into_parts();
    assert_eq!(node.registry.turn_away(&parts, Ipv4Addr::LOCALHOST.into()).await.status().as_u16(), 503);
    // Others are served meanwhile.
    assert_eq!(node.get(&target(&other)).await.status, 200);
}
