//! Peers, and what they say, that must not make this node think worse of others, or ask where it should not.

use std::sync::atomic::AtomicU64;

use super::*;

/// They are many connections of one containerd, or of many pods, and the one who has it has a slow link.
#[tokio::test]
async fn who_asks_for_the_same_small_blob_at_once_shares_one_body() {
    let network = MemoryNetwork::new();
    let b = Arc::new(Node::join(&network, "b"));
    let bytes = noise(40, 900_000);
    let digest = digest_of(&bytes);
    let answer = ok(&bytes);
    let (_router, asked) = scripted(&network, "slow", &[Key::Digest(digest.clone())], move |_| {
        std::thread::sleep(Duration::from_millis(300));
        answer.clone()
    })
    .await;
    let asks = (0..64).map(|_| {
        let (b, target) = (Arc::clone(&b), target(&digest));
        tokio::spawn(async move { b.get(&target).await })
    });
    for ask in asks.collect::<Vec<_>>() {
        let reply = ask.await.unwrap();
        assert!(reply.status == 200 && reply.body == bytes, "{}: {} bytes", reply.status, reply.body.len());
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

/// It has the digest that it should have, so it is a manifest of somebody's; what it says of another's layer may be wrong.
#[tokio::test]
async fn a_manifest_that_tells_a_wrong_length_is_held_against_no_peer() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let layer = noise(41, 2 << 20);
    let digest = a.offer(&layer);
    let manifest = |size: usize| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{0}","size":2}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{digest}","size":{size}}}]}}"#,
            digest_of(b"{}"),
        )
    };
    let of = |digest: &Digest| format!("/v2/app/manifests/{digest}?ns=registry.test");
    let (wrong, right) = (a.offer(manifest(12_345).as_bytes()), a.offer(manifest(layer.len()).as_bytes()));
    assert_eq!(b.get(&of(&wrong)).await.status, 200);
    assert_eq!(b.get(&target(&digest)).await.status, 404, "all that is known of it is that it is shorter");
    assert_eq!(b.get(&of(&right)).await.status, 200, "its holder was not set aside");
    assert!(b.get(&target(&digest)).await.body == layer);
    assert_eq!(b.get(&of(&wrong)).await.status, 200);
    assert!(b.get(&target(&digest)).await.body == layer, "the right length was told as well");
}

/// A client that was told how long the blob is must hear nothing else, as long as another peer has it.
#[tokio::test]
async fn a_peer_that_knows_of_no_such_range_is_not_believed() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(42, 4 << 20);
    let digest = digest_of(&bytes);
    let key = [Key::Digest(digest.clone())];
    let half =
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len()).as_bytes(), &bytes[..2 << 20]].concat();
    let (_breaks, _) = scripted(&network, "1-breaks", &key, move |_| half.clone()).await;
    let own = ("X-Spegel-Node", "b");
    assert_eq!(b.ask("GET", &target(&digest), &[own]).await.body.len(), 2 << 20);
    let none = b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */1000\r\nContent-Length: 0\r\n\r\n";
    let (_liar, asked) = scripted(&network, "2-liar", &key, move |_| none.to_vec()).await;
    let honest = Node::join(&network, "3-honest");
    honest.offer(&bytes);
    for _ in 0..16 {
        let reply = b.ask("GET", &target(&digest), &[own, ("Range", "bytes=2097152-")]).await;
        assert!(reply.status == 206 && reply.body == bytes[2 << 20..], "{}", reply.status);
    }
    assert!(asked.load(Ordering::Relaxed) > 0, "it was never met");
}

/// A node that others can reach says that it can be reached where another is, and sends wrong bytes for content of its own.
#[tokio::test]
async fn who_names_the_address_of_another_does_not_harm_it() {
    let network = MemoryNetwork::new();
    let (honest, b) = (Node::join(&network, "honest"), Node::join(&network, "b"));
    let right = noise(43, 3 << 20);
    let held = honest.offer(&right);
    let (own, claimed) = (noise(44, 1000), digest_of(b"something else"));
    let answer = ok(&own);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = vec![listener.local_addr().unwrap(), honest.address()];
    let liar = network.join_at("liar", addresses);
    liar.announce(Change::Added(vec![Key::Digest(claimed.clone())]));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(&answer).await;
        }
    });
    assert_eq!(b.get(&target(&claimed)).await.status, 404);
    let reply = b.get(&target(&held)).await;
    assert!(reply.status == 200 && reply.body == right, "{}", reply.status);
}

/// Its bytes trickle, and so does what it says that it has: neither is a step of containerd's.
#[tokio::test]
async fn who_receives_byte_by_byte_is_left_for_another() {
    let network = MemoryNetwork::new();
    let stall = Duration::from_millis(200);
    let mirror = spegel::mirror::Settings { stall, ..spegel::mirror::Settings::default() };
    let b = Node::with(&network, "b", Setup { mirror: Some(mirror), ..Setup::default() });
    let bytes = noise(45, 4 << 20);
    let digest = digest_of(&bytes);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let trickler = network.join("1-trickler", listener.local_addr().unwrap());
    trickler.announce(Change::Added(vec![Key::Digest(digest.clone())]));
    let (content, position) = (bytes.clone(), Arc::new(AtomicU64::new(100_000)));
    let chain = spegel::mirror::Chain::default().below(spegel::mirror::NodeId::of("x")).unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (content, position, chain) = (content.clone(), Arc::clone(&position), chain.clone());
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let read = stream.read(&mut request).await.unwrap_or_default();
                let (has, total) = (position.load(Ordering::Relaxed), content.len());
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {total}\r\nX-Spegel-Receiving: {has}/{total}\r\nX-Spegel-Chain: {chain}\r\nConnection: close\r\n\r\n"
                );
                let _ = stream.write_all(head.as_bytes()).await;
                if request[..read].starts_with(b"GET") {
                    let _ = stream.write_all(&content[..100_000]).await;
                    for at in 100_000.. {
                        tokio::time::sleep(stall / 2).await;
                        position.fetch_add(1, Ordering::Relaxed);
                        if stream.write_all(&content[at..=at]).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    let blob = target(&digest);
    let asking = b.get(&blob);
    let honest = async {
        tokio::time::sleep(stall).await;
        let honest = Node::join(&network, "2-honest");
        honest.offer(&bytes);
        honest
    };
    let (reply, _honest) = tokio::join!(asking, honest);
    assert!(
        reply.status == 200 && reply.orderly && reply.body == bytes,
        "{} of {} bytes",
        reply.body.len(),
        bytes.len()
    );
}
