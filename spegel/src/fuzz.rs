//! What must hold for any bytes that a client, a peer or an administrator's file can hold: one function a fuzz target of `fuzz/`,
//! which panics where it does not. The tests run them over the corpus that is kept there.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::metrics::Figures;
use async_trait::async_trait;
use http::Method;
use http::request::Parts;
use tokio::sync::watch;

use crate::mirror::{self, Mirror, MirrorMetrics};
use crate::oci::{
    ContentRange, Digest, Filters, Manifest, MediaType, RangeOutcome, RangeSpec, Repository, Request, TagName,
    parse_range,
};
use crate::registry::{Registry, RegistryMetrics, Settings, UploadLimits};
use crate::router::{self, MemoryNetwork, Router as _};
use crate::store::{Blob, Changes, Health, Offered, Referrer, Store, StoreError};
use crate::storm;

/// A fuzz target's name, which is also its corpus's folder, and its check.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 13] = [
    ("request_head", request_head),
    ("peer_head", peer_head),
    ("path", path),
    ("reference", reference),
    ("range", range),
    ("manifest", manifest),
    ("hosts_toml", hosts_toml),
    ("hints", hints),
    ("peer_list", peer_list),
    ("kad_message", kad_message),
    ("member_messages", member_messages),
    ("storm_messages", storm_messages),
    ("key_file", key_file),
];

/// A request as a client sends it to a node that has nothing: answered, and never as containerd must not be.
pub fn request_head(bytes: &[u8]) {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    if !matches!(request.parse(bytes), Ok(httparse::Status::Complete(_))) {
        return;
    }
    let builder =
        http::Request::builder().method(request.method.unwrap_or_default()).uri(request.path.unwrap_or_default());
    let builder = request.headers.iter().fold(builder, |builder, header| builder.header(header.name, header.value));
    let Ok(request) = builder.body(()) else { return };
    let (parts, ()) = request.into_parts();
    let status = EMPTY_NODE.with(|node| node.get_or_init(EmptyNode::new).answer(&parts));
    let expected = matches!(status, 200 | 400 | 404 | 405);
    assert!(expected, "{status} for {parts:?}");
}

/// The head of a peer's response.
pub fn peer_head(bytes: &[u8]) {
    mirror::check_peer_head(bytes);
}

/// The method, the path and the query of a request, with spaces between.
pub fn path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut words = text.splitn(3, ' ');
    let (method, path, query) = (words.next().unwrap_or_default(), words.next().unwrap_or_default(), words.next());
    let method = Method::from_bytes(method.as_bytes()).unwrap_or(Method::GET);
    match Request::parse(&method, path, query) {
        Ok(request) => {
            assert!(path.starts_with("/v2") && (method == Method::GET || method == Method::HEAD));
            if let Some(repository) = request.repository() {
                assert!(!repository.to_string().contains(".."), "{repository}");
            }
        }
        Err(error) => assert!(matches!(error.status.as_u16(), 400 | 404 | 405), "{error:?}"),
    }
}

/// A digest, a repository or a tag: what is understood is written as it was read.
pub fn reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
        assert_eq!(digest.hex().len(), digest.algorithm().hex_len());
    }
    if let Ok(repository) = text.parse::<Repository>() {
        assert_eq!(repository.to_string().parse::<Repository>().ok(), Some(repository));
    }
    if let Ok(tag) = text.parse::<TagName>() {
        assert_eq!(tag.to_string().parse::<TagName>().ok(), Some(tag));
    }
}

/// A content's size of eight bytes, then a `Range` or `Content-Range` header.
pub fn range(bytes: &[u8]) {
    let Some((size, text)) = bytes.split_first_chunk::<8>() else { return };
    let (size, Ok(text)) = (u64::from_le_bytes(*size), std::str::from_utf8(text)) else { return };
    if let RangeOutcome::Part { start, end_exclusive } = parse_range(Some(text), size) {
        assert!(start < end_exclusive && end_exclusive <= size);
    }
    if let Some(spec) = RangeSpec::parse(text) {
        let again = RangeSpec::parse(&spec.to_string());
        assert_eq!(again, Some(spec));
    }
    if let Ok(range) = text.parse::<ContentRange>() {
        assert_eq!(range.to_string().parse(), Ok(range));
        if let ContentRange::Part { start, end_exclusive, total } = range {
            assert!(start < end_exclusive && total.is_none_or(|total| end_exclusive <= total));
        }
    }
}

/// A manifest or an index of a peer or of the store.
pub fn manifest(bytes: &[u8]) {
    if let Ok(media_type) = MediaType::detect(bytes) {
        assert!(http::HeaderValue::from_str(media_type.as_str()).is_ok(), "{media_type:?} cannot stand in a header");
    }
    // A refusal is an answer too.
    let _ = Manifest::parse(bytes);
}

/// A `hosts.toml` that somebody else wrote.
pub fn hosts_toml(bytes: &[u8]) {
    crate::hosts::check_existing(bytes);
}

/// What a peer's headers say of others that have a blob, or of those that it comes through.
pub fn hints(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        mirror::check_hints(text);
    }
}

/// A list of peers from a URL or a file.
pub fn peer_list(bytes: &[u8]) {
    crate::bootstrap::check_list(bytes);
}

/// A message of Kademlia with its length before it.
pub fn kad_message(bytes: &[u8]) {
    router::checks::kad_message(bytes);
}

/// Messages of the member protocol, each with its length before it.
pub fn member_messages(bytes: &[u8]) {
    router::checks::member_messages(bytes);
}

/// Messages about storms to one coordinator: a byte for the sender, one for the tenths of a second that pass before, one for the length.
/// The last message is read as an answer as well.
pub fn storm_messages(mut bytes: &[u8]) {
    const LIMITS: storm::Limits =
        storm::Limits { blobs: 3, places: 12, messages: (50, 50), messages_of_node: (10, 20) };
    let mut now = Instant::now();
    let mut coordinator = storm::Coordinator::new(LIMITS, now);
    while let [from, tenths, length, rest @ ..] = bytes {
        let (message, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        bytes = rest;
        now += Duration::from_millis(100 * u64::from(*tenths));
        if let Ok(answer) = storm::Response::decode(message) {
            assert_eq!(storm::Response::decode(&answer.encode()), Ok(answer));
        }
        let Ok(request) = storm::Request::decode(message) else { continue };
        assert!(request.encode().len() <= storm::MAX_MESSAGE);
        assert_eq!(storm::Request::decode(&request.encode()).as_ref(), Ok(&request));
        let from = storm::Node(u64::from(*from));
        if coordinator.is_new(request.key()) {
            coordinator.holders(request.key(), &[storm::Node(u64::from(*tenths))], now);
        }
        let answer = coordinator.receive(from, storm::Zone(u32::from(*tenths) % 3), &request, now);
        if let Some(answer) = answer {
            assert_eq!(storm::Response::decode(&answer.encode()), Ok(answer));
            let to_itself = matches!(answer, storm::Response::Fetch { parent, .. } if parent == from);
            assert!(!to_itself, "{from:?} is sent to itself by {request:?}");
        }
        let (blobs, places) = coordinator.size();
        assert!(blobs <= LIMITS.blobs && places <= LIMITS.places, "{blobs} blobs, {places} places");
        if tenths % 7 == 6 {
            coordinator.lost(from);
        }
    }
    coordinator.forget(now + Duration::from_secs(3600));
    assert_eq!(coordinator.size(), (0, 0), "something is kept for ever");
}

/// The file of a network's key, or of an identity.
pub fn key_file(bytes: &[u8]) {
    router::checks::key_file(bytes);
}

thread_local! {
    static EMPTY_NODE: OnceCell<EmptyNode> = const { OnceCell::new() };
}

/// A registry without content and without peers.
struct EmptyNode {
    registry: Registry,
    runtime: tokio::runtime::Runtime,
}

impl EmptyNode {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let mut figures = Figures::default();
        let router = MemoryNetwork::new().join("node", SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
        let registry = Registry::new(Settings {
            store: Arc::new(Nothing(watch::channel(Health::Ready).0)),
            readiness: router.readiness(),
            mirror: Mirror::new(router, mirror::Settings::default(), MirrorMetrics::register(&mut figures)),
            filters: Filters::new(&[], &[]).expect("no filters"),
            basic_auth: None,
            node_name: None,
            uploads: UploadLimits::default(),
            metrics: RegistryMetrics::register(&mut figures),
        });
        Self { registry, runtime: runtime.expect("a runtime") }
    }

    fn answer(&self, parts: &Parts) -> u16 {
        let remote = IpAddr::from(Ipv4Addr::LOCALHOST);
        self.runtime.block_on(self.registry.handle(parts, remote)).status().as_u16()
    }
}

/// A store without content.
#[derive(Debug)]
struct Nothing(watch::Sender<Health>);

#[async_trait]
impl Store for Nothing {
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

    fn offered(&self) -> BTreeMap<String, Offered> {
        BTreeMap::new()
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.0.subscribe()
    }
}
