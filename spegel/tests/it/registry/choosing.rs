//! Which of several peers is asked.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use spegel::mirror::Settings as MirrorSettings;
use spegel::oci::{Digest, Key};
use spegel::registry::UploadLimits;
use spegel::router::MemoryNetwork;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Node, Setup, digest_of, noise, scripted, target};

/// Which node gave how many of so many small blobs that all of them have.
async fn sources(asker: &Node, nodes: &[&Node], count: u64) -> BTreeMap<String, usize> {
    let mut sources = BTreeMap::new();
    for n in 0..count {
        let bytes = noise(1000 + n, 3000);
        let digests: Vec<Digest> = nodes.iter().map(|node| node.offer(&bytes)).collect();
        let reply = asker.get(&target(&digests[0])).await;
        assert!(reply.status == 200 && reply.body == bytes);
        *sources.entry(reply.header("x-spegel-source").to_owned()).or_default() += 1;
    }
    sources
}

fn share(sources: &BTreeMap<String, usize>, node: &Node) -> usize {
    sources.get(&node.address().to_string()).copied().unwrap_or_default()
}

#[tokio::test]
async fn equals_share_the_requests() {
    let network = MemoryNetwork::new();
    let (a, b, c) = (Node::join(&network, "a"), Node::join(&network, "b"), Node::join(&network, "c"));
    let sources = sources(&b, &[&a, &c], 100).await;
    assert!(share(&sources, &a) > 10 && share(&sources, &c) > 10, "{sources:?}");
}

#[tokio::test]
async fn a_peer_of_another_zone_is_asked_after_those_of_ours() {
    let network = MemoryNetwork::new();
    let mirror = MirrorSettings { zone: Some("here".into()), ..MirrorSettings::default() };
    let (far, near) = (Node::join(&network, "1-far"), Node::join(&network, "2-near"));
    let b = Node::with(&network, "b", Setup { mirror: Some(mirror), ..Setup::default() });
    network.set_zone("1-far", "there");
    network.set_zone("2-near", "here");
    let both = sources(&b, &[&far, &near], 20).await;
    assert_eq!(share(&both, &near), 20, "{both:?}");
    let digest = far.offer(&noise(1, 3000));
    let reply = b.get(&target(&digest)).await;
    assert_eq!(
        (reply.status, reply.header("x-spegel-source")),
        (200, &*far.address().to_string()),
        "better than nobody"
    );
}

/// Three of its four places are taken: it says so in its answers, and is asked less often.
#[tokio::test]
async fn the_load_that_a_peer_tells_moves_requests_to_others() {
    let network = MemoryNetwork::new();
    let uploads = UploadLimits { count: 4, rate: 0 };
    let loaded = Node::with(&network, "1-loaded", Setup { uploads, ..Setup::default() });
    let (free, b) = (Node::join(&network, "2-free"), Node::join(&network, "b"));
    let large = loaded.shelf.put(&noise(2, 24 << 20));
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut client = tokio::net::TcpStream::connect(loaded.address()).await.unwrap();
        let request = format!("GET {} HTTP/1.1\r\nHost: a\r\nX-Spegel-Mirrored: true\r\n\r\n", target(&large));
        client.write_all(request.as_bytes()).await.unwrap();
        client.read_exact(&mut [0; 100]).await.unwrap();
        held.push(client);
    }
    let reply = loaded.ask("HEAD", &target(&large), &[("X-Spegel-Mirrored", "true")]).await;
    assert_eq!((reply.status, reply.header("x-spegel-load")), (200, "75"));
    let reply = loaded.ask("HEAD", &target(&large), &[]).await;
    assert_eq!(reply.header("x-spegel-load"), "", "clients are not told");

    // Of two that chance names the better is taken: three of four times that is the free one.
    let sources = sources(&b, &[&loaded, &free], 200).await;
    assert!(share(&sources, &free) > 125, "{sources:?}");
    drop(held);
}

/// Those that were remembered from an earlier search count as those that are found anew.
#[tokio::test]
async fn no_request_tries_more_peers_than_it_may() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let digest = digest_of(b"x");
    let mut dead = Vec::new();
    for n in 0..9 {
        let keys = [Key::Digest(digest.clone())];
        dead.push(scripted(&network, &format!("{n}-dead"), &keys, |_| Vec::new()).await);
    }
    let asked = || dead.iter().map(|(_, asked)| asked.load(Ordering::Relaxed)).sum::<usize>();
    for n in 1..=2 {
        assert_eq!(b.get(&target(&digest)).await.status, 404);
        assert_eq!(asked(), 3 * n);
    }
}
