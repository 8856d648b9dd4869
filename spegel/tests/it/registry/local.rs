//! What a node answers from its own content.

use spegel::oci::Filters;
use spegel::registry::BasicAuth;
use spegel::router::MemoryNetwork;
use spegel::store::Health;

use super::{MANIFEST, Node, Setup, noise, target};

#[tokio::test]
async fn a_manifest_is_had_by_tag_and_by_digest_with_its_own_media_type() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let digest = node.offer_tag("registry.test/team/app:v1", MANIFEST);
    for target in ["v1?ns=registry.test", &format!("{digest}?ns=registry.test"), digest.as_str()] {
        for method in ["GET", "HEAD"] {
            let reply = node.ask(method, &format!("/v2/team/app/manifests/{target}"), &[]).await;
            assert_eq!(reply.status, 200, "{method} {target}");
            assert_eq!(reply.header("docker-content-digest"), digest.as_str());
            assert_eq!(reply.header("content-type"), "application/vnd.oci.image.manifest.v1+json");
            assert_eq!(reply.header("content-length"), MANIFEST.len().to_string());
            assert_eq!(reply.header("x-spegel-source"), "local");
            assert_eq!(reply.body, if method == "GET" { MANIFEST } else { b"" });
        }
    }
}

#[tokio::test]
async fn the_upstream_is_named_back() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let digest = node.offer(b"x");
    let reply = node.get(&format!("/v2/app/blobs/{digest}?ns=registry.test:5000")).await;
    assert_eq!(reply.header("oci-namespace"), "registry.test:5000");
}

#[tokio::test]
async fn ranges_are_those_of_the_http_standard() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let bytes = noise(1, 100_000);
    let target = format!("/v2/app/blobs/{}", node.offer(&bytes));
    let part = |range: &'static str| {
        let (node, target) = (&node, &target);
        async move { node.ask("GET", target, &[("Range", range)]).await }
    };
    for (range, start, end) in [
        ("bytes=0-", 0, 100_000),
        ("bytes=5-9", 5, 10),
        ("bytes=-1", 99_999, 100_000),
        ("bytes=99999-", 99_999, 100_000),
        ("bytes=40000-200000", 40_000, 100_000),
    ] {
        let reply = part(range).await;
        assert_eq!((reply.status, reply.body.len()), (206, end - start), "{range}");
        assert_eq!(reply.body, bytes[start..end], "{range}");
        assert_eq!(reply.header("content-range"), format!("bytes {start}-{}/100000", end - 1));
    }
    let reply = part("bytes=100000-").await;
    assert_eq!((reply.status, reply.header("content-range")), (416, "bytes */100000"));
    assert_eq!(reply.error_code(), "RANGE_INVALID");
    for ignored in ["bytes=0-1,5-6", "lines=1-2", "bytes=9-5", "nonsense"] {
        let reply = part(ignored).await;
        assert_eq!((reply.status, reply.body.len()), (200, 100_000), "{ignored}");
    }
    let reply = node.ask("HEAD", &target, &[("Range", "bytes=1-2")]).await;
    assert_eq!((reply.status, reply.header("content-length")), (200, "100000"));
    assert_eq!(reply.header("accept-ranges"), "bytes");
}

#[tokio::test]
async fn what_is_wrong_is_said_as_an_oci_error() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let zeros = "0".repeat(64);
    for (method, target, status, code) in [
        ("GET", "/v2/app/blobs/sha256:123".to_owned(), 400, "DIGEST_INVALID"),
        ("GET", format!("/v2/app/blobs/sha256:{}", "A".repeat(64)), 400, "DIGEST_INVALID"),
        ("GET", format!("/v2/APP/blobs/sha256:{zeros}"), 400, "NAME_INVALID"),
        ("GET", format!("/v2/../etc/blobs/sha256:{zeros}"), 400, "NAME_INVALID"),
        ("GET", "/v2/app/manifests/latest".to_owned(), 400, "NAME_INVALID"),
        ("GET", format!("/v2/app/blobs/sha256:{zeros}?ns=a%2Fb"), 400, "NAME_INVALID"),
        ("GET", format!("/v2/app/blobs/sha256:{zeros}"), 404, "BLOB_UNKNOWN"),
        ("GET", format!("/v2/app/manifests/sha256:{zeros}"), 404, "MANIFEST_UNKNOWN"),
        ("POST", "/v2/app/blobs/uploads/".to_owned(), 405, "UNSUPPORTED"),
        ("PUT", "/v2/app/manifests/latest?ns=registry.test".to_owned(), 405, "UNSUPPORTED"),
        ("DELETE", format!("/v2/app/manifests/sha256:{zeros}"), 405, "UNSUPPORTED"),
    ] {
        let reply = node.ask(method, &target, &[]).await;
        assert_eq!((reply.status, reply.error_code().as_str()), (status, code), "{method} {target}");
        assert_eq!(reply.header("content-type"), "application/json");
        assert_eq!(!reply.header("allow").is_empty(), status == 405);
    }
    assert_eq!(node.get("/v2/").await.status, 200);
    assert_eq!(node.get("/elsewhere").await.status, 404);
}

#[tokio::test]
async fn readiness_follows_the_store_and_liveness_does_not() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    assert_eq!(node.get("/readyz").await.status, 200, "alone is ready");
    node.shelf.health.send_replace(Health::Waiting("containerd does not answer".into()));
    let reply = node.get("/readyz").await;
    assert_eq!(reply.status, 503);
    assert!(String::from_utf8_lossy(&reply.body).contains("containerd does not answer"));
    assert_eq!(node.get("/livez").await.status, 200);
    node.shelf.health.send_replace(Health::Ready);
    assert_eq!(node.get("/readyz").await.status, 200);
}

#[tokio::test]
async fn credentials_are_asked_of_clients_and_sent_to_peers() {
    let network = MemoryNetwork::new();
    let setup = || Setup { basic_auth: Some(BasicAuth::new("user", "secret")), ..Setup::default() };
    let (a, b) = (Node::with(&network, "a", setup()), Node::with(&network, "b", setup()));
    let target = format!("/v2/app/blobs/{}", a.offer(b"private"));
    let reply = b.get(&target).await;
    assert_eq!((reply.status, reply.error_code().as_str()), (401, "UNAUTHORIZED"));
    assert!(reply.header("www-authenticate").starts_with("Basic "));
    assert_eq!(b.ask("GET", &target, &[("Authorization", "Basic dXNlcjp3cm9uZw==")]).await.status, 401);
    let reply = b.ask("GET", &target, &[("Authorization", "Basic dXNlcjpzZWNyZXQ=")]).await;
    assert_eq!((reply.status, reply.body.as_slice()), (200, &b"private"[..]));
    assert_eq!(b.get("/readyz").await.status, 200, "probes have no credentials");
}

#[tokio::test]
async fn a_filtered_repository_is_not_looked_for_at_peers() {
    let network = MemoryNetwork::new();
    let filters = Filters::new(&[], &["^registry.test/secret/".to_owned()]).unwrap();
    let a = Node::join(&network, "a");
    let b = Node::with(&network, "b", Setup { filters: Some(filters), ..Setup::default() });
    a.offer_tag("registry.test/secret/app:v1", MANIFEST);
    let digest = a.offer_tag("registry.test/open/app:v1", MANIFEST);
    assert_eq!(b.get("/v2/secret/app/manifests/v1?ns=registry.test").await.status, 404);
    assert_eq!(b.get(&format!("/v2/secret/app/manifests/{digest}?ns=registry.test")).await.status, 404);
    assert_eq!(b.get("/v2/open/app/manifests/v1?ns=registry.test").await.status, 200);
}

#[tokio::test]
async fn referrers_are_listed_only_where_no_upstream_is_meant() {
    let node = Node::join(&MemoryNetwork::new(), "a");
    let target = format!("/v2/app/referrers/{}", node.offer(MANIFEST));
    let list = |reply: &super::Reply| {
        serde_json::from_slice::<serde_json::Value>(&reply.body).unwrap()["manifests"].as_array().unwrap().len()
    };
    let reply = node.get(&target).await;
    assert_eq!((reply.status, list(&reply)), (200, 2));
    assert_eq!(reply.header("content-type"), "application/vnd.oci.image.index.v1+json");
    let reply = node.get(&format!("{target}?artifactType=test/sbom")).await;
    assert_eq!((list(&reply), reply.header("oci-filters-applied")), (1, "artifactType"));
    assert_eq!(node.get(&format!("{target}?ns=registry.test")).await.status, 404);
}

/// A client chooses the registry's name, and gets by digest what is here whatever it chooses.
#[tokio::test]
async fn made_up_registries_push_no_real_one_out_of_the_figures() {
    let network = MemoryNetwork::new();
    let registries = |entries: &[&str]| {
        let entries: Vec<String> = entries.iter().map(|entry| (*entry).to_owned()).collect();
        Setup { filters: Some(Filters::new(&entries, &[]).unwrap()), ..Setup::default() }
    };
    let all = Node::with(&network, "all", registries(&[]));
    let named = Node::with(&network, "named", registries(&["https://registry.test", "https://docker.io"]));
    for (node, made_up) in [(&all, 16.0), (&named, 0.0)] {
        let digest = node.offer(b"x");
        for n in 0..200 {
            node.get(&format!("/v2/app/blobs/{digest}?ns=made-up-{n}.test")).await;
        }
        let requests = |label: &str| node.metric("spegel_mirror_requests_total", &[label]);
        assert_eq!(requests("registry=\"made-up-"), made_up);
        assert_eq!(requests("registry=\"other\""), 200.0 - made_up);
        assert_eq!(node.get(&target(&digest)).await.status, 200);
        assert_eq!(requests("registry=\"registry.test\""), 1.0);
    }
    // All names of one registry are its own.
    for name in ["docker.io", "registry-1.docker.io", "DOCKER.IO"] {
        named.get(&format!("/v2/library/app/manifests/1?ns={name}")).await;
    }
    assert_eq!(named.metric("spegel_mirror_requests_total", &["registry=\"docker.io\""]), 3.0);
}
