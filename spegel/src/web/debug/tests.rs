#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::{Request, StatusCode, header};
use http_body_util::BodyExt as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::{Examination, Examined, Parts, Verdict};
use crate::ebpf::Watch;
use crate::metrics::Figures;
use crate::mirror::{Mirror, MirrorMetrics};
use crate::oci::{Digest, Filters, Repository, TagName};
use crate::registry::{Registry, RegistryMetrics, Settings, UploadLimits};
use crate::router::{MemoryNetwork, Router as _};
use crate::store::{Arriving, Blob, Changes, Health, HeldImage, Inventory, Offered, Referrer, Store, StoreError};
use crate::web::Ends;

/// What somebody may call a thing to do harm, where it is not escaped.
const HOSTILE: &str = "registry.test/\"><script>alert(1)</script>'&amp;:<img src=x onerror=alert(1)>";
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A store that shows what it is told to.
#[derive(Debug)]
struct Shown(Inventory, watch::Sender<Health>);

#[async_trait]
impl Store for Shown {
    fn resolve(&self, _: &TagName) -> Option<Digest> {
        None
    }

    async fn open(&self, _: &Digest, _: Option<&Repository>) -> Result<Option<Blob>, StoreError> {
        Ok(None)
    }

    async fn referrers(&self, _: &Digest) -> Result<Vec<Referrer>, StoreError> {
        Ok(Vec::new())
    }

    fn subscribe(&self) -> Changes {
        unreachable!("nobody follows this store")
    }

    fn offered(&self) -> std::collections::BTreeMap<String, Offered> {
        std::collections::BTreeMap::new()
    }

    fn inventory(&self, limit: usize) -> Inventory {
        let mut shown = self.0.clone();
        shown.more_images += shown.images.len().saturating_sub(limit);
        shown.images.truncate(limit);
        shown
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.1.subscribe()
    }
}

struct Node {
    router: axum::Router,
    network: MemoryNetwork,
    stop: CancellationToken,
    _others: Vec<Arc<crate::router::MemoryRouter>>,
}

fn digest(n: u8) -> Digest {
    format!("sha256:{}", format!("{n:02x}").repeat(32)).parse().unwrap()
}

fn image(name: &str, n: u8) -> HeldImage {
    HeldImage {
        digest: digest(n),
        names: vec![name.to_owned()],
        more_names: 0,
        is_whole: true,
        is_offered: true,
        named: 3,
        present: 3,
        bytes: 5 << 20,
    }
}

fn node(inventory: Inventory, enabled: bool) -> Node {
    node_with(inventory, enabled, Health::Ready)
}

fn node_with(inventory: Inventory, enabled: bool, health: Health) -> Node {
    let network = MemoryNetwork::new();
    let router = network.join("us", SocketAddr::from(([10, 0, 0, 1], 5000)));
    let other = network.join("<b>them</b>", SocketAddr::from(([10, 0, 0, 2], 5000)));
    network.set_zone("<b>them</b>", "<i>zone");
    let store: Arc<dyn Store> = Arc::new(Shown(inventory, watch::Sender::new(health)));
    let mut metrics = Figures::default();
    let settings = crate::mirror::Settings {
        storm: Some(crate::mirror::StormSettings { max_wait: std::time::Duration::from_secs(1) }),
        ..Default::default()
    };
    let mirror = Mirror::new(router.clone(), settings, MirrorMetrics::register(&mut metrics));
    let registry_metrics = RegistryMetrics::register(&mut metrics);
    let pulled = registry_metrics.pulled();
    let registry = Registry::new(Settings {
        store: Arc::clone(&store),
        mirror: mirror.clone(),
        readiness: router.readiness(),
        filters: Filters::new(&[], &[]).unwrap(),
        basic_auth: None,
        node_name: None,
        uploads: UploadLimits { count: 0, rate: 0 },
        metrics: registry_metrics,
    });
    let found = vec![Examined {
        check: "certs.d",
        verdict: Verdict::Warning,
        said: "<script>alert(2)</script>".into(),
        change: Some("</ul><script>".into()),
    }];
    let parts = Parts {
        node: "<u>node</u>".into(),
        zone: Some("zone-1".into()),
        identity: "us".into(),
        store,
        router: router.clone(),
        mirror,
        registry: Arc::new(registry),
        watch: Watch::without_kernel(),
        pulled,
        engine: "tokio".into(),
        examination: watch::channel(Some(Examination { good: 7, found })).1,
        examine: Arc::default(),
        registry_at: SocketAddr::from((LOOPBACK, 1)),
        authorization: None,
        memory_left: || None,
    };
    let stop = CancellationToken::new();
    let pages = super::super::router(metrics, Watch::without_kernel(), enabled.then_some(parts), stop.clone());
    Node { router: pages, network, stop, _others: vec![router, other] }
}

type Answer = (StatusCode, http::HeaderMap, String);

/// An answer: status, headers, body.
async fn ask(node: &Node, request: http::request::Builder, remote: IpAddr) -> Answer {
    answer(node, request.body(Body::empty()).unwrap(), remote).await
}

async fn answer(node: &Node, mut request: Request<Body>, remote: IpAddr) -> Answer {
    request.extensions_mut().insert(ConnectInfo(Ends { local: IpAddr::from([10, 0, 0, 1]), remote }));
    let (head, body) = node.router.clone().oneshot(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (head.status, head.headers, String::from_utf8_lossy(&body).into_owned())
}

fn get(path: &str) -> http::request::Builder {
    Request::get(path).header(header::HOST, "localhost:9090")
}

fn post(path: &str) -> http::request::Builder {
    Request::post(path).header(header::HOST, "localhost:9090")
}

/// The page's form, filled in and sent by one of its two buttons.
fn form(action: &str, image: &str) -> Request<Body> {
    let image = percent_encoding::utf8_percent_encode(image, percent_encoding::NON_ALPHANUMERIC);
    let request = post("/debug/web/try").header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
    request.body(format!("image={image}&do={action}").into()).unwrap()
}

const PAGES: [&str; 5] =
    ["/debug/web/", "/debug/web/content", "/debug/web/peers", "/debug/web/try", "/debug/web/storm"];

#[tokio::test]
async fn each_page_answers_and_says_what_a_browser_may_do_with_it() {
    let node = node(Inventory::default(), true);
    for page in PAGES.iter().chain(&[
        "/debug/web/style.css",
        "/debug/web/live.js",
        "/debug/web/icon.svg",
        "/debug/web/stats",
        "/debug/web/metadata",
    ]) {
        let (status, headers, body) = ask(&node, get(page), LOOPBACK).await;
        assert_eq!(status, StatusCode::OK, "{page}: {body}");
        let policy = headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(headers[header::CACHE_CONTROL], "no-store");
        assert!(
            !body.contains(" style=") && !body.contains("<script>") && !body.contains(" onclick="),
            "{page}: {body}"
        );
    }
    let (status, headers, _) = ask(&node, get("/debug/web"), LOOPBACK).await;
    assert_eq!((status, &headers[header::LOCATION]), (StatusCode::PERMANENT_REDIRECT, &"/debug/web/".parse().unwrap()));
    let (status, ..) = ask(&node, Request::post("/debug/web/").header(header::HOST, "localhost"), LOOPBACK).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    let stats: serde_json::Value =
        serde_json::from_str(&ask(&node, get("/debug/web/stats"), LOOPBACK).await.2).unwrap();
    assert_eq!((&stats["ready"], &stats["members"], &stats["router"]), (&true.into(), &1.into(), &"connected".into()));
}

#[tokio::test]
async fn what_is_switched_off_is_not_there() {
    let node = node(Inventory::default(), false);
    for page in PAGES.iter().chain(&[
        "/debug/web/stats",
        "/debug/web/measure?image=a.test/b:c",
        "/debug/web/events?page=working",
    ]) {
        assert_eq!(ask(&node, get(page), LOOPBACK).await.0, StatusCode::NOT_FOUND, "{page}");
    }
    assert_eq!(ask(&node, get("/debug/peers"), LOOPBACK).await.0, StatusCode::OK);
    assert_eq!(ask(&node, get("/metrics"), IpAddr::from([10, 0, 0, 9])).await.0, StatusCode::OK);
}

#[tokio::test]
async fn only_this_node_is_answered_and_only_by_its_own_name() {
    let node = node(Inventory::default(), true);
    for page in PAGES.iter().chain(&["/debug/peers", "/debug/web/stats", "/debug/web/events?page=working"]) {
        let (status, headers, body) = ask(&node, get(page), IpAddr::from([10, 0, 0, 9])).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{page}: {body}");
        assert!(headers.contains_key(header::CONTENT_SECURITY_POLICY));
        let rebound = Request::get(*page).header(header::HOST, "evil.test:9090");
        assert_eq!(ask(&node, rebound, LOOPBACK).await.0, StatusCode::FORBIDDEN, "{page}");
    }
    let own =
        ask(&node, Request::get("/debug/web/").header(header::HOST, "10.0.0.1:9090"), IpAddr::from([10, 0, 0, 1]));
    assert_eq!(own.await.0, StatusCode::OK);
}

#[tokio::test]
async fn hostile_names_are_text() {
    let images = vec![image(HOSTILE, 1)];
    let arriving = vec![Arriving { digest: digest(2), position: 1, total: Some(3), is_offered: true }];
    let node = node(Inventory { images, arriving, blobs: 3, bytes: 5, ..Inventory::default() }, true);
    let asked: String = percent_encoding::utf8_percent_encode(HOSTILE, percent_encoding::NON_ALPHANUMERIC).to_string();
    let tried = format!("/debug/web/try?image={asked}");
    let sorted = format!("/debug/web/peers?sort={asked}");
    for page in PAGES.iter().copied().chain([tried.as_str(), sorted.as_str(), ""]) {
        let (status, _, body) = match page {
            "" => answer(&node, form("measure", HOSTILE), LOOPBACK).await,
            page => ask(&node, get(page), LOOPBACK).await,
        };
        assert_eq!(status, StatusCode::OK);
        // Neither a tag of theirs, nor an attribute that ends where they say.
        for harm in ["<script>", "<img", "<b>them", "<i>zone", "<u>node", "test/\""] {
            assert!(!body.contains(harm), "{page} has {harm}: {body}");
        }
    }
    let (_, _, body) = ask(&node, get("/debug/web/content"), LOOPBACK).await;
    assert!(body.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "it is shown, as text: {body}");
    assert!(body.contains("33 %"), "what arrives: {body}");
    let (_, _, body) = answer(&node, form("lookup", "nonsense"), LOOPBACK).await;
    assert!(body.contains("neither a digest nor a full name"), "{body}");
}

#[tokio::test]
async fn rows_have_a_bound_and_what_is_more_is_counted() {
    let images = (0..700).map(|n| image(&format!("registry.test/app:{n:03}"), 1)).collect();
    let node = node(Inventory { images, ..Inventory::default() }, true);
    let (_, _, body) = ask(&node, get("/debug/web/content"), LOOPBACK).await;
    assert!(body.contains("app:499") && !body.contains("app:500") && body.contains("And 200 images more."));
    assert!(body.contains("700 images"));
}

#[tokio::test]
async fn the_answer_is_no_where_requests_are_refused() {
    let node = node_with(Inventory::default(), true, Health::Waiting("containerd has not answered yet".into()));
    let (_, _, body) = ask(&node, get("/debug/web/"), LOOPBACK).await;
    assert!(body.contains("verdict failure") && body.contains("containerd has not answered yet"), "{body}");
}

#[tokio::test]
async fn other_sites_start_nothing() {
    let node = node(Inventory::default(), true);
    let measure = || post("/debug/web/measure?image=registry.test/app:1");
    let profile = || get("/debug/pprof/profile?seconds=0");
    for (name, value) in [("sec-fetch-site", "cross-site"), ("origin", "null"), ("origin", "http://evil.test")] {
        for request in [measure(), profile()] {
            assert_eq!(
                ask(&node, request.header(name, value), LOOPBACK).await.0,
                StatusCode::FORBIDDEN,
                "{name}: {value}"
            );
        }
        let mut form = form("measure", "registry.test/app:1");
        form.headers_mut().insert(name, value.parse().unwrap());
        assert_eq!(answer(&node, form, LOOPBACK).await.0, StatusCode::FORBIDDEN, "{name}: {value}");
    }
    // By plain http to an address that is not loopback a browser may say nothing at all.
    let silent = profile().header(header::USER_AGENT, "Mozilla/5.0");
    assert_eq!(ask(&node, silent, LOOPBACK).await.0, StatusCode::FORBIDDEN);
    assert_eq!(ask(&node, profile(), LOOPBACK).await.0, StatusCode::BAD_REQUEST, "of who may, the query is looked at");
    assert_eq!(ask(&node, measure().header("sec-fetch-site", "same-origin"), LOOPBACK).await.0, StatusCode::OK);
    assert_eq!(ask(&node, measure(), LOOPBACK).await.0, StatusCode::OK);
    assert_eq!(ask(&node, post("/debug/web/measure"), LOOPBACK).await.0, StatusCode::BAD_REQUEST);
}

/// A page can make a browser send any GET.
#[tokio::test]
async fn no_get_starts_a_measurement() {
    let node = node(Inventory::default(), true);
    let (status, headers, body) = ask(&node, get("/debug/web/measure?image=registry.test/app:1"), LOOPBACK).await;
    assert_eq!((status, &headers[header::ALLOW]), (StatusCode::METHOD_NOT_ALLOWED, &"POST".parse().unwrap()));
    assert!(body.contains("curl -X POST"), "{body}");
    for action in ["lookup", "measure"] {
        let path = format!("/debug/web/try?do={action}&image=registry.test/app:1");
        let (status, _, body) = ask(&node, get(&path), LOOPBACK).await;
        assert!(status == StatusCode::OK && body.contains("value=\"registry.test/app:1\""), "{body}");
        assert!(!body.contains("Who has it") && !body.contains("What came"), "{body}");
    }
}

#[tokio::test]
async fn a_lookup_names_who_has_it() {
    let node = node(Inventory::default(), true);
    let peer = node.network.join("third", SocketAddr::from(([10, 0, 0, 3], 5000)));
    peer.announce(crate::store::Change::Added(vec![digest(9).into()]));
    let (_, _, body) = answer(&node, form("lookup", digest(9).as_str()), LOOPBACK).await;
    assert!(body.contains("1 node can give it.") && body.contains("10.0.0.3:5000"), "{body}");
    let measure = post(&format!("/debug/web/measure?image={}", digest(9)));
    let measured: serde_json::Value = serde_json::from_str(&ask(&node, measure, LOOPBACK).await.2).unwrap();
    assert_eq!(measured["lookup"]["peers"][0]["address"], "10.0.0.3:5000");
    assert!(measured["pull"]["ended"].as_str().unwrap().contains("registry did not give"), "{measured}");
}

/// The first change tells all parts, and nothing more comes while nothing changes; the stream ends with the process.
#[tokio::test(start_paused = true)]
async fn a_page_is_told_what_has_changed() {
    let node = node(Inventory::default(), true);
    let mut request = get("/debug/web/events?page=content").body(Body::empty()).unwrap();
    request.extensions_mut().insert(ConnectInfo(Ends { local: LOOPBACK, remote: LOOPBACK }));
    let response = node.router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let mut body = response.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    let text = String::from_utf8(first.to_vec()).unwrap();
    assert!(text.starts_with("event: parts\ndata: {"), "{text}");
    let data = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    let parts: serde_json::Value = serde_json::from_str(data).unwrap();
    assert!(["sum", "arriving", "images"].iter().all(|id| parts[id].is_string()), "{parts}");
    let second = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(second.starts_with(b":"), "only a sign of life: {second:?}");
    node.stop.cancel();
    while let Some(frame) = body.frame().await {
        assert!(frame.unwrap().into_data().unwrap().starts_with(b":"));
    }
    for page in ["try", "nothing", ""] {
        let (status, ..) = ask(&node, get(&format!("/debug/web/events?page={page}")), LOOPBACK).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn no_more_than_some_pages_are_kept_up_to_date() {
    let node = node(Inventory::default(), true);
    let open = || {
        let mut request = get("/debug/web/events?page=working").body(Body::empty()).unwrap();
        request.extensions_mut().insert(ConnectInfo(Ends { local: LOOPBACK, remote: LOOPBACK }));
        node.router.clone().oneshot(request)
    };
    let mut streams = Vec::new();
    for _ in 0..super::STREAMS {
        let response = open().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        streams.push(response);
    }
    assert_eq!(open().await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
    streams.pop();
    assert_eq!(open().await.unwrap().status(), StatusCode::OK);
}
