//! Answers that stand ready: the same as those that are made anew, and gone with what they stand for.

use std::fs;
use std::net::IpAddr;

use spegel::mirror::{Mirror, MirrorMetrics};
use spegel::router::MemoryNetwork;
use spegel::store::OciLayout;
use spegel::zerocopy::{Body, BodyEnd};

use super::*;

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A registry over a layout with one image.
struct Kept {
    folder: tempfile::TempDir,
    registry: Registry,
    figures: spegel::metrics::Figures,
    digest: Digest,
}

impl Kept {
    fn new(auth: Option<BasicAuth>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
        fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        put(&folder, b"{}");
        let digest = name(&folder, MANIFEST);
        let network = MemoryNetwork::new();
        let router = network.join("a", (Ipv4Addr::LOCALHOST, 1).into());
        let mut figures = spegel::metrics::Figures::default();
        let registry = Registry::new(Settings {
            store: OciLayout::open(vec![folder.path().to_owned()], Filters::new(&[], &[]).unwrap()).unwrap(),
            mirror: Mirror::new(router.clone(), MirrorSettings::default(), MirrorMetrics::register(&mut figures)),
            readiness: router.readiness(),
            filters: Filters::new(&[], &[]).unwrap(),
            basic_auth: auth,
            node_name: Some("a".into()),
            uploads: UploadLimits::default(),
            metrics: RegistryMetrics::register(&mut figures),
        });
        Self { folder, registry, figures, digest }
    }

    /// By the handler; its head in lines, and its body's length.
    async fn handle(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> (u16, Vec<String>, u64) {
        let mut request = http::Request::builder().method(method).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let response: http::Response<Body> = self.registry.handle(&parts, CLIENT).await;
        let lines = response.headers().iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap()));
        (response.status().as_u16(), lines.collect(), response.body().len())
    }

    /// At once; its head in lines, and its body.
    fn prompt(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Option<(Vec<String>, Vec<u8>)> {
        let headers = headers.iter().map(|(name, value)| (*name, value.as_bytes()));
        let prompt = self.registry.prompt(method == "HEAD", target, headers, CLIENT)?;
        (prompt.end)(BodyEnd { sent: prompt.body.len() as u64, complete: true, cut: false });
        let text = String::from_utf8(prompt.head.to_vec()).unwrap();
        let mut lines = text.strip_suffix("\r\n").unwrap().split("\r\n").map(str::to_owned);
        assert_eq!(lines.next().unwrap(), "HTTP/1.1 200 OK");
        Some((lines.collect(), prompt.body.to_vec()))
    }

    fn figure(&self, line: &str) -> Option<f64> {
        let text = spegel::metrics::encode(&self.figures, spegel::metrics::Format::OpenMetrics).unwrap();
        text.lines().find_map(|shown| shown.strip_prefix(line)?.trim().parse().ok())
    }
}

fn put(folder: &tempfile::TempDir, bytes: &[u8]) -> Digest {
    let digest = digest_of(bytes);
    fs::write(folder.path().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    digest
}

/// Makes `manifest` what the tag names.
fn name(folder: &tempfile::TempDir, manifest: &[u8]) -> Digest {
    let digest = put(folder, manifest);
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest.as_str(), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "registry.test/app:v1"},
    }]});
    let fresh = folder.path().join("fresh");
    fs::write(&fresh, index.to_string()).unwrap();
    fs::rename(fresh, folder.path().join("index.json")).unwrap();
    digest
}

const TAG: &str = "/v2/app/manifests/v1?ns=registry.test";

#[tokio::test]
async fn what_stands_ready_is_what_was_answered() {
    let kept = Kept::new(None);
    let by_digest = format!("/v2/app/manifests/{}", kept.digest);
    for target in [TAG, &by_digest, &format!("{by_digest}?ns=registry.test")] {
        assert_eq!(kept.prompt("GET", target, &[]), None, "before it was asked for");
        for method in ["GET", "HEAD"] {
            let (status, head, length) = kept.handle(method, target, &[]).await;
            assert_eq!(status, 200);
            let body = if method == "GET" { MANIFEST } else { b"" };
            assert_eq!(length, body.len() as u64);
            assert_eq!(kept.prompt(method, target, &[]), Some((head, body.to_vec())), "{method} {target}");
        }
    }
    for node in ["a", "b"] {
        assert!(kept.prompt("GET", TAG, &[("x-spegel-node", node)]).is_some());
    }
    let from_peer = [("X-Spegel-Mirrored", "true")];
    let (_, head, _) = kept.handle("GET", TAG, &from_peer).await;
    assert!(head.contains(&"x-spegel-load: 0".to_owned()), "{head:?}");
    let told = |head: Vec<String>| head.into_iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(kept.prompt("GET", TAG, &from_peer).map(|(prompt, _)| told(prompt)), Some(told(head)));
    for (line, count) in [
        ("http_request_duration_seconds_count{handler=\"manifest\",method=\"GET\",code=\"200\"}", 10.0),
        ("http_request_duration_seconds_count{handler=\"manifest\",method=\"HEAD\",code=\"200\"}", 6.0),
        ("spegel_mirror_requests_total{registry=\"registry.test\",cache=\"hit\"}", 10.0),
        ("spegel_mirror_requests_total{registry=\"unknown\",cache=\"hit\"}", 4.0),
        ("spegel_client_requests_total{client=\"own\"}", 1.0),
        ("spegel_client_requests_total{client=\"other_node\"}", 1.0),
        ("spegel_client_requests_total{client=\"unknown\"}", 12.0),
        ("http_requests_inflight{handler=\"manifest\"}", 0.0),
    ] {
        assert_eq!(kept.figure(line), Some(count), "{line}");
    }
    assert_eq!(kept.registry.in_flight(), 0);
}

#[tokio::test]
async fn whoever_wants_more_is_answered_anew() {
    let kept = Kept::new(None);
    kept.handle("GET", TAG, &[]).await;
    for header in [("range", "bytes=0-1"), ("x-spegel-complaint", "1"), ("X-Spegel-Wait", "10"), ("x-spegel-node", "")]
    {
        assert_eq!(kept.prompt("GET", TAG, &[header]), None, "{header:?}");
    }
    for other in ["/v2/app/manifests/v1", "/v2/app/manifests/v1?ns=registry.test&x=y", "/v2/", "/readyz", ""] {
        assert_eq!(kept.prompt("GET", other, &[]), None, "{other:?}");
    }
    assert!(kept.prompt("GET", TAG, &[]).is_some());
    kept.registry.drain();
    assert_eq!(kept.prompt("GET", TAG, &[]), None, "a node that stops refuses");
}

#[tokio::test]
async fn credentials_are_looked_at_each_time() {
    let auth = BasicAuth::new("user", "secret");
    let right = auth.header().to_owned();
    let kept = Kept::new(Some(auth));
    assert_eq!(kept.handle("GET", TAG, &[("authorization", &right)]).await.0, 200);
    assert!(kept.prompt("GET", TAG, &[("Authorization", &right)]).is_some());
    assert_eq!(kept.prompt("GET", TAG, &[]), None);
    assert_eq!(kept.prompt("GET", TAG, &[("authorization", "Basic dXNlcjp3cm9uZw==")]), None);
}

#[tokio::test]
async fn a_deleted_file_is_noticed_within_a_moment() {
    let kept = Kept::new(None);
    kept.handle("GET", TAG, &[]).await;
    assert!(kept.prompt("GET", TAG, &[]).is_some());
    fs::remove_file(kept.folder.path().join("blobs/sha256").join(kept.digest.hex())).unwrap();
    // Within ten milliseconds what was seen is believed.
    tokio::time::sleep(Duration::from_millis(11)).await;
    assert_eq!(kept.prompt("GET", TAG, &[]), None);
    assert_eq!(kept.handle("GET", TAG, &[]).await.0, 404);
}

#[tokio::test]
async fn a_tag_that_moved_names_the_new_manifest() {
    let kept = Kept::new(None);
    kept.handle("GET", TAG, &[]).await;
    assert!(kept.prompt("GET", TAG, &[]).is_some());
    let other = String::from_utf8(MANIFEST.to_vec()).unwrap().replace("\"layers\"", "\"annotations\":{},\"layers\"");
    let moved = name(&kept.folder, other.as_bytes());
    let new = |lines: &[String]| lines.iter().any(|line| line.ends_with(moved.as_str()));
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some((head, body)) = kept.prompt("GET", TAG, &[]) {
            assert_eq!(new(&head), body == other.as_bytes(), "never a mixture");
        }
        let (status, head, _) = kept.handle("GET", TAG, &[]).await;
        assert_eq!(status, 200);
        if new(&head) {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "the move is not noticed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(kept.prompt("GET", TAG, &[]).unwrap().1, other.as_bytes());
}

#[tokio::test]
async fn who_asks_in_ever_new_words_costs_bounded_memory() {
    let kept = Kept::new(None);
    let target = |n: usize| format!("{TAG}&x={n}");
    for n in 0..600 {
        assert_eq!(kept.handle("GET", &target(n), &[]).await.0, 200);
    }
    let ready = (0..600).filter(|n| kept.prompt("HEAD", &target(*n), &[]).is_some()).count();
    assert!(ready <= 512, "{ready}");
    kept.handle("GET", &target(1), &[]).await;
    assert!(kept.prompt("GET", &target(1), &[]).is_some());
    let long = format!("{TAG}&x={}", "y".repeat(2000));
    assert_eq!(kept.handle("GET", &long, &[]).await.0, 200);
    assert_eq!(kept.prompt("GET", &long, &[]), None);
}

/// A flood of them must not push out all other stories, nor have one built for each.
#[tokio::test]
async fn of_answers_that_stand_ready_some_are_kept_as_stories() {
    let kept = Kept::new(None);
    kept.handle("GET", TAG, &[]).await;
    let stories = kept.registry.stories();
    let made = stories.latest(usize::MAX).len();
    assert_eq!(made, 1, "its body was dropped");
    let id = "0af7651916cd43dd8448eb211c80319c";
    let traceparent = format!("00-{id}-b7ad6b7169203331-01");
    for _ in 0..1000 {
        assert!(kept.prompt("GET", TAG, &[("Traceparent", &traceparent), ("X-Spegel-Node", "n")]).is_some());
    }
    let latest = stories.latest(usize::MAX);
    assert!((2..100).contains(&latest.len()), "{}", latest.len());
    let story = &latest[0];
    assert_eq!((story.trace_id.as_str(), story.client.as_str(), story.status), (id, "n", Some(200)));
    assert_eq!((story.bytes, story.whole, story.path.as_str()), (MANIFEST.len() as u64, true, "/v2/app/manifests/v1"));
    kept.prompt("GET", TAG, &[("X-Spegel-Mirrored", "true")]).unwrap();
    assert_eq!(stories.latest(usize::MAX).len(), latest.len(), "a peer's is another node's story");
}
