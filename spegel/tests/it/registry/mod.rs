//! Tests of `registry` and `mirror` together, through real sockets: nodes with a store in memory, joined by a memory router.
#![allow(clippy::unwrap_used)]

mod choosing;
mod hostile;
mod local;
mod misled;
mod peers;
mod ready;
mod receiving;
mod refusals;
mod stories;
mod storms;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Seek as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use sha2::{Digest as _, Sha256};
use spegel::mirror::{Mirror, MirrorMetrics, Settings as MirrorSettings};
use spegel::oci::{Digest, Filters, Key, Repository, TagName, TagOrDigest};
use spegel::registry::{BasicAuth, Registry, RegistryMetrics, Settings, UploadLimits};
use spegel::router::{MemoryNetwork, MemoryRouter, Router};
use spegel::serve::{ListenAddr, Options, RemoteAddr, Server};
use spegel::store::{Blob, Change, Changes, Found, Health, Offered, Receiving, Referrer, Store, StoreError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// How long any one step of a test may take.
const PATIENCE: Duration = Duration::from_secs(20);

// === content ===

fn digest_of(bytes: &[u8]) -> Digest {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes))).parse().unwrap()
}

/// Bytes that differ by seed and are larger than what a socket buffers, if `length` is.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) as u8).collect()
}

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#;

/// A store of given content.
#[derive(Debug)]
struct Shelf {
    blobs: Mutex<HashMap<Digest, Arc<std::fs::File>>>,
    receiving: Mutex<HashMap<Digest, Receiving>>,
    /// What was asked for and has not begun to arrive.
    expected: Mutex<HashSet<Digest>>,
    /// What its own containerd asked for.
    pulls: Mutex<Vec<(Repository, TagOrDigest)>>,
    tags: Mutex<HashMap<TagName, Digest>>,
    health: watch::Sender<Health>,
}

impl Shelf {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            blobs: Mutex::default(),
            receiving: Mutex::default(),
            expected: Mutex::default(),
            pulls: Mutex::default(),
            tags: Mutex::default(),
            health: watch::channel(Health::Ready).0,
        })
    }

    fn put(&self, bytes: &[u8]) -> Digest {
        let digest = digest_of(bytes);
        self.put_as(digest.clone(), bytes);
        digest
    }

    /// Content whose bytes need not be those of the digest.
    fn put_as(&self, digest: Digest, bytes: &[u8]) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        self.blobs.lock().unwrap().insert(digest, Arc::new(file));
    }

    fn file(&self, digest: &Digest) -> Arc<std::fs::File> {
        Arc::clone(&self.blobs.lock().unwrap()[digest])
    }
}

#[async_trait]
impl Store for Shelf {
    fn resolve(&self, tag: &TagName) -> Option<Digest> {
        self.tags.lock().unwrap().get(tag).cloned()
    }

    async fn open(&self, digest: &Digest, _: Option<&Repository>) -> Result<Option<Blob>, StoreError> {
        let file = self.blobs.lock().unwrap().get(digest).cloned();
        Ok(file.map(|file| Blob { size: file.metadata().unwrap().len(), file, small: None }))
    }

    async fn find(&self, digest: &Digest, asked: Option<&Repository>) -> Result<Option<Found>, StoreError> {
        if let Some(blob) = self.open(digest, asked).await? {
            return Ok(Some(Found::Complete(blob)));
        }
        Ok(self.receiving.lock().unwrap().get(digest).cloned().map(Found::Receiving))
    }

    async fn expect(
        &self,
        digest: &Digest,
        asked: Option<&Repository>,
        patience: Duration,
    ) -> Result<Option<Found>, StoreError> {
        let end = tokio::time::Instant::now() + patience;
        while self.expected.lock().unwrap().contains(digest) && tokio::time::Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.find(digest, asked).await
    }

    fn pulls(&self, repository: &Repository, reference: &TagOrDigest) {
        self.pulls.lock().unwrap().push((repository.clone(), reference.clone()));
    }

    async fn referrers(&self, subject: &Digest) -> Result<Vec<Referrer>, StoreError> {
        let referrer = |kind: &str| Referrer {
            media_type: "application/vnd.oci.image.manifest.v1+json".into(),
            digest: subject.to_string(),
            size: 1,
            artifact_type: Some(kind.into()),
            annotations: BTreeMap::new(),
        };
        Ok(vec![referrer("test/signature"), referrer("test/sbom")])
    }

    fn subscribe(&self) -> Changes {
        unimplemented_changes()
    }

    fn offered(&self) -> BTreeMap<String, Offered> {
        BTreeMap::new()
    }

    /// Its images, if it had any, would be those of the tests.
    fn knows_registry(&self, registry: &str) -> bool {
        registry == "registry.test"
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }
}

/// These tests announce by hand.
fn unimplemented_changes() -> Changes {
    unreachable!("nobody follows this store")
}

// === nodes ===

struct Node {
    registry: Arc<Registry>,
    shelf: Arc<Shelf>,
    router: Arc<MemoryRouter>,
    server: Server,
    figures: spegel::metrics::Figures,
}

#[derive(Default)]
struct Setup {
    basic_auth: Option<BasicAuth>,
    filters: Option<Filters>,
    mirror: Option<MirrorSettings>,
    uploads: UploadLimits,
    /// The lookup's bound as it is set, and not the tests' own.
    exact: bool,
}

impl Node {
    fn join(network: &MemoryNetwork, id: &str) -> Self {
        Self::with(network, id, Setup::default())
    }

    fn with(network: &MemoryNetwork, id: &str, setup: Setup) -> Self {
        Self::make(network, id, setup, |router| router)
    }

    /// A node whose mirror asks another router than the one it announces with, with just these settings.
    fn behind(
        network: &MemoryNetwork,
        id: &str,
        mirror: MirrorSettings,
        wrap: impl FnOnce(Arc<MemoryRouter>) -> Arc<dyn Router>,
    ) -> Self {
        Self::make(network, id, Setup { mirror: Some(mirror), exact: true, ..Setup::default() }, wrap)
    }

    fn make(
        network: &MemoryNetwork,
        id: &str,
        setup: Setup,
        wrap: impl FnOnce(Arc<MemoryRouter>) -> Arc<dyn Router>,
    ) -> Self {
        // The address must be known before the router that the server's handler needs.
        let reserved = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = reserved.local_addr().unwrap();
        drop(reserved);
        let router = network.join(id, address);
        let shelf = Shelf::new();
        let mut figures = spegel::metrics::Figures::default();
        let given = setup.mirror.unwrap_or_default();
        let settings = MirrorSettings {
            resolve_timeout: if setup.exact { given.resolve_timeout } else { Duration::from_millis(500) },
            authorization: setup.basic_auth.as_ref().map(|auth| auth.header().to_owned()),
            ..given
        };
        let registry = Arc::new(Registry::new(Settings {
            store: shelf.clone(),
            mirror: Mirror::new(wrap(router.clone()), settings, MirrorMetrics::register(&mut figures)),
            readiness: router.readiness(),
            filters: setup.filters.unwrap_or_else(|| Filters::new(&[], &[]).unwrap()),
            basic_auth: setup.basic_auth,
            node_name: Some(id.to_owned()),
            uploads: setup.uploads,
            metrics: RegistryMetrics::register(&mut figures),
        }));
        let served = registry.clone();
        let handler = move |request: http::Request<hyper::body::Incoming>| {
            let registry = served.clone();
            async move {
                let (parts, _) = request.into_parts();
                let remote = parts.extensions.get::<RemoteAddr>().unwrap().0.ip();
                registry.handle(&parts, remote).await
            }
        };
        let options = Options { runtimes: 2, ..Options::default() };
        let server = Server::bind(&[ListenAddr::One(address)], options, Arc::new(handler)).unwrap();
        Self { registry, shelf, router, server, figures }
    }

    /// The sum of a metric's samples, as they are scraped.
    fn figure(&self, name: &str) -> f64 {
        let text = spegel::metrics::encode(&self.figures, spegel::metrics::Format::OpenMetrics).unwrap();
        let samples =
            text.lines().filter_map(|line| line.strip_prefix(name)).filter(|rest| rest.starts_with([' ', '{']));
        samples.map(|rest| rest.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }

    /// The sum of what the lines of a metric say that have all these labels.
    fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let text = spegel::metrics::encode(&self.figures, spegel::metrics::Format::OpenMetrics).unwrap();
        let is_it =
            |line: &&str| line.split(['{', ' ']).next() == Some(name) && labels.iter().all(|it| line.contains(it));
        text.lines().filter(is_it).map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    fn address(&self) -> SocketAddr {
        self.server.addrs()[0]
    }

    /// Has content, and says so.
    fn offer(&self, bytes: &[u8]) -> Digest {
        let digest = self.shelf.put(bytes);
        self.announce(Key::Digest(digest.clone()));
        digest
    }

    fn offer_tag(&self, tag: &str, manifest: &[u8]) -> Digest {
        let digest = self.offer(manifest);
        let tag: TagName = tag.parse().unwrap();
        self.shelf.tags.lock().unwrap().insert(tag.clone(), digest.clone());
        self.announce(Key::Tag(tag));
        digest
    }

    /// Has it no more, and says so.
    fn withdraw(&self, digest: &Digest) {
        self.shelf.blobs.lock().unwrap().remove(digest);
        self.router.announce(Change::Removed(vec![Key::Digest(digest.clone())]));
    }

    fn announce(&self, key: Key) {
        self.router.announce(Change::Added(vec![key]));
    }

    async fn get(&self, target: &str) -> Reply {
        self.ask("GET", target, &[]).await
    }

    async fn ask(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
        tokio::time::timeout(PATIENCE, exchange(self.address(), method, target, headers)).await.expect("an answer")
    }
}

/// The path and query of a blob.
fn target(digest: &Digest) -> String {
    format!("/v2/app/blobs/{digest}?ns=registry.test")
}

/// A whole answer.
fn ok(bytes: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len()).as_bytes(), bytes].concat()
}

/// A peer that answers every connection with the same bytes, then closes in an orderly way.
async fn rogue(network: &MemoryNetwork, id: &str, key: Key, answer: Vec<u8>) -> Arc<MemoryRouter> {
    scripted(network, id, &[key], move |_| answer.clone()).await.0
}

/// A peer that answers every connection as its request's head says, then closes in an orderly way; and how many it has had.
async fn scripted(
    network: &MemoryNetwork,
    id: &str,
    keys: &[Key],
    answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static,
) -> (Arc<MemoryRouter>, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let router = network.join(id, listener.local_addr().unwrap());
    router.announce(Change::Added(keys.to_vec()));
    let (asked, answer) = (Arc::new(AtomicUsize::new(0)), Arc::new(answer));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            count.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).await.unwrap_or_default();
                let answer = answer(&String::from_utf8_lossy(&buffer[..read]));
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
                let _ = stream.read(&mut buffer).await;
            });
        }
    });
    (router, asked)
}

// === a client that sees how a connection ends ===

#[derive(Debug)]
struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
    /// The server closed in an orderly way, and did not reset.
    orderly: bool,
}

impl Reply {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }

    fn error_code(&self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.body).expect("an OCI error");
        body["errors"][0]["code"].as_str().unwrap().to_owned()
    }
}

async fn exchange(address: SocketAddr, method: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let orderly = stream.read_to_end(&mut bytes).await.is_ok();
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a response head");
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_owned()));
    Reply { status, headers: headers.collect(), body: bytes[end + 4..].to_vec(), orderly }
}
