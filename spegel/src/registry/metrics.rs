//! What the registry counts of its requests.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;

use super::{Registry, ready};
use crate::ebpf::Pulled;
use crate::metrics::{BoundedLabel, Described, Figures, Label};

static MIRROR_REQUESTS: Described =
    Described::counter("spegel_mirror_requests", "Requests of clients for content, by whether the head of their answer gave it to them")
        .labels(&[
            Label::at_most(
                "registry",
                MAX_REGISTRIES + 2,
                "those of --mirrored-registries, however many; where it names none, up to 64 others, of which 48 are kept for registries that this node has images of; `other`; `unknown` where no name was told",
            ),
            Label::of("cache", &["hit", "miss"]),
        ])
        .as_in_go();
static LAST_SUCCESS: Described = Described::gauge(
    "spegel_mirror_last_success_timestamp_seconds",
    "When a client last got content, seconds since the Unix epoch",
)
.as_in_go();
static DURATION: Described =
    Described::histogram("http_request_duration_seconds", "Time from a request's head to its response's last byte")
        .labels(&[HANDLER, METHOD, CODE])
        .as_in_go();
static SIZE: Described = Described::histogram("http_response_size_bytes", "Bytes of response bodies")
    .labels(&[HANDLER, METHOD, CODE])
    .as_in_go();
static INFLIGHT: Described =
    Described::gauge("http_requests_inflight", "Requests that are being answered").labels(&[HANDLER]).as_in_go();
static CLIENTS: Described = Described::counter(
    "spegel_client_requests",
    "Requests of clients for content, by whether the client is this node's own containerd",
)
.labels(&[Label::of("client", &["own", "other_node", "unknown"])]);
static CUTS: Described = Described::counter(
    "spegel_cut_responses",
    "Refusals that were said by an orderly close, because the client had been given a part of that blob",
);
static BROKEN: Described = Described::counter(
    "spegel_broken_bodies",
    "Bodies for clients that ended early because their peer broke off and no other went on, the rest was to come from upstream, or this node's file did not give them; their requests count as hits",
)
.labels(&[Label::of("source", &["local", "peer"])]);
static REJECTED: Described = Described::counter(
    "spegel_rejected_uploads",
    "Requests of peers that were sent elsewhere because of --max-uploads or --upload-rate",
);
static REFUSED: Described = Described::counter(
    "spegel_refused_requests",
    "Requests that were refused because this node was stopping, or about to run out of what the reason names",
)
.labels(&[Label::of("reason", &["stopping", "connections", "descriptors", "memory"])]);

static READY: Described =
    Described::gauge("spegel_ready", "1 while /readyz says 200: requests should be sent here").measured_in("0 or 1");

const HANDLER: Label = Label::of("handler", &["livez", "readyz", "v2", MANIFEST, "blob", "referrers", "invalid"]);
const METHOD: Label = Label::of("method", &["GET", "HEAD", "other"]);
const CODE: Label = Label::at_most("code", 16, "the status; 0 if the client left before there was one");

/// The label of requests for manifests.
pub(super) const MANIFEST: &str = "manifest";

/// How many registries are told apart; a client chooses the name, so there must be a bound.
const MAX_REGISTRIES: usize = 64;

/// The buckets of durations, in seconds.
const SECONDS: [f64; 15] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// The buckets of body lengths, in bytes.
const BYTES: [f64; 9] = [100.0, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10];

/// The registry's figures.
#[derive(Clone, Debug)]
pub struct RegistryMetrics {
    mirror_requests: Family<MirrorLabel, Counter>,
    last_success: Gauge<f64, AtomicU64>,
    duration: Family<HttpLabel, Histogram>,
    size: Family<HttpLabel, Histogram>,
    inflight: Family<HandlerLabel, Gauge>,
    clients: Family<ClientLabel, Counter>,
    cuts: Counter,
    broken: Family<SourceLabel, Counter>,
    refused_uploads: Counter,
    refused: Family<ReasonLabel, Counter>,
    registries: Arc<BoundedLabel>,
    resolved: Arc<Resolved>,
    pulled: Arc<Pulled>,
}

/// Who asks, as the figures tell clients apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientKind {
    /// This node's own containerd.
    Own,
    OtherNode,
    Unknown,
}

/// What is counted of answers that stand ready, looked up once.
#[derive(Debug)]
pub(super) struct Resolved {
    inflight: Gauge,
    /// Durations and sizes of GET, and of HEAD.
    answers: [OnceLock<(Histogram, Histogram)>; 2],
    clients: [OnceLock<Counter>; 3],
    last_success: Gauge<f64, AtomicU64>,
    pulled: Arc<Pulled>,
    duration: Family<HttpLabel, Histogram>,
    size: Family<HttpLabel, Histogram>,
    by_client: Family<ClientLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MirrorLabel {
    registry: String,
    cache: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HttpLabel {
    handler: &'static str,
    method: &'static str,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandlerLabel {
    handler: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClientLabel {
    client: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl RegistryMetrics {
    /// Adds the registry's figures to `figures`.
    pub fn register(figures: &mut Figures) -> Self {
        let last_success = Gauge::<f64, AtomicU64>::default();
        let duration: Family<HttpLabel, Histogram> = Family::new_with_constructor(|| Histogram::new(SECONDS));
        let size: Family<HttpLabel, Histogram> = Family::new_with_constructor(|| Histogram::new(BYTES));
        let inflight = Family::<HandlerLabel, Gauge>::default();
        let clients = Family::<ClientLabel, Counter>::default();
        let pulled = Arc::<Pulled>::default();
        let resolved = Resolved {
            pulled: Arc::clone(&pulled),
            inflight: inflight.get_or_create_owned(&HandlerLabel { handler: MANIFEST }),
            answers: Default::default(),
            clients: Default::default(),
            last_success: last_success.clone(),
            duration: duration.clone(),
            size: size.clone(),
            by_client: clients.clone(),
        };
        let this = Self {
            resolved: Arc::new(resolved),
            pulled,
            mirror_requests: Family::default(),
            last_success,
            duration,
            size,
            inflight,
            clients,
            cuts: Counter::default(),
            broken: Family::default(),
            refused_uploads: Counter::default(),
            refused: Family::default(),
            registries: Arc::new(BoundedLabel::new(MAX_REGISTRIES)),
        };
        figures.register(&MIRROR_REQUESTS, this.mirror_requests.clone());
        figures.register(&LAST_SUCCESS, this.last_success.clone());
        figures.register(&DURATION, this.duration.clone());
        figures.register(&SIZE, this.size.clone());
        figures.register(&INFLIGHT, this.inflight.clone());
        figures.register(&CLIENTS, this.clients.clone());
        figures.register(&CUTS, this.cuts.clone());
        figures.register(&BROKEN, this.broken.clone());
        figures.register(&REJECTED, this.refused_uploads.clone());
        figures.register(&REFUSED, this.refused.clone());
        this
    }

    /// Bytes that this node's containerd got through us.
    pub fn pulled(&self) -> Arc<Pulled> {
        Arc::clone(&self.pulled)
    }

    /// Counts a request from now until what is returned is finished or dropped.
    pub(super) fn begin(&self, handler: &'static str, method: &http::Method, flight: &Arc<()>) -> Observed {
        self.inflight.get_or_create(&HandlerLabel { handler }).inc();
        Observed {
            metrics: self.clone(),
            handler,
            method: method_label(method),
            code: 0,
            sent: 0,
            start: Instant::now(),
            _flight: Arc::clone(flight),
        }
    }

    /// Counts a client's request for content of a registry with this label.
    pub(super) fn mirrored(&self, registry: String, hit: bool, client: ClientKind) {
        if hit {
            self.resolved.hit(&self.hits(registry), client);
            return;
        }
        self.mirror_requests.get_or_create(&MirrorLabel { registry, cache: "miss" }).inc();
        self.clients.get_or_create(&ClientLabel { client: client.name() }).inc();
    }

    /// The counter of requests for content of a registry with this label that got it.
    pub(super) fn hits(&self, registry: String) -> Counter {
        self.mirror_requests.get_or_create_owned(&MirrorLabel { registry, cache: "hit" })
    }

    /// The label of a registry that no setting names. A client chooses the name, and gets what is here whatever it chooses, so its word does not count.
    fn label_of(&self, registry: &str, is_known: impl FnOnce() -> bool) -> String {
        self.registries.of(registry, is_known)
    }

    /// As [`RegistryMetrics::begin`], for an answer that stands ready.
    pub(super) fn begin_prompt(&self, is_head: bool, start: Instant, flight: &Arc<()>) -> ready::Observed {
        self.resolved.inflight.inc();
        ready::Observed { metrics: Arc::clone(&self.resolved), is_head, start, _flight: Arc::clone(flight) }
    }

    pub(super) fn refused_upload(&self) {
        self.refused_uploads.inc();
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(super) fn cut(&self) {
        self.cuts.inc();
    }

    /// Counts bodies of clients that are not given to their end.
    pub(super) fn broken(&self) -> Broken {
        Broken(self.broken.clone())
    }
}

/// A body that may end early.
pub(super) struct Broken(Family<SourceLabel, Counter>);

impl Broken {
    /// It was not given to its end.
    pub(super) fn count(&self, is_local: bool) {
        self.0.get_or_create(&SourceLabel { source: if is_local { "local" } else { "peer" } }).inc();
    }
}

// === impl Resolved ===

impl Resolved {
    /// Counts a client's request for content that it got.
    pub(super) fn hit(&self, hits: &Counter, client: ClientKind) {
        hits.inc();
        let label = ClientLabel { client: client.name() };
        self.clients[client as usize].get_or_init(|| self.by_client.get_or_create_owned(&label)).inc();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_success.set(now.as_secs_f64());
    }

    /// Counts bytes that a client got of what is here.
    pub(super) fn pulled(&self, bytes: u64, client: ClientKind) {
        if client != ClientKind::OtherNode {
            self.pulled.add_local(bytes);
        }
    }

    /// Counts an answer.
    pub(super) fn answered(&self, is_head: bool, took: Duration, sent: u64) {
        let (duration, size) = self.answers[usize::from(is_head)].get_or_init(|| {
            let label = HttpLabel { handler: MANIFEST, method: if is_head { "HEAD" } else { "GET" }, code: 200 };
            (self.duration.get_or_create_owned(&label), self.size.get_or_create_owned(&label))
        });
        duration.observe(took.as_secs_f64());
        size.observe(sent as f64);
    }

    /// The request is not under way any more.
    pub(super) fn is_over(&self) {
        self.inflight.dec();
    }
}

impl Registry {
    /// Under which label requests for content of a registry are counted.
    pub(super) fn label_of(&self, registry: Option<&str>) -> String {
        let settings = &self.settings;
        match registry {
            None => "unknown".to_owned(),
            Some(registry) if settings.filters.mirror_all() => {
                settings.metrics.label_of(registry, || settings.store.knows_registry(registry))
            }
            Some(registry) => settings.filters.mirrored(registry).unwrap_or("other").to_owned(),
        }
    }
}

impl ClientKind {
    fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::OtherNode => "other_node",
            Self::Unknown => "unknown",
        }
    }
}

/// Asks at each scrape whether the registry is ready.
#[derive(Debug)]
pub struct ReadyCollector {
    registry: Weak<Registry>,
}

// === impl ReadyCollector ===

impl ReadyCollector {
    /// Adds whether `registry` is ready to `figures`.
    pub fn register(figures: &mut Figures, registry: Weak<Registry>) {
        figures.collect([&READY], Self { registry });
    }
}

impl Collector for ReadyCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let is_ready = self.registry.upgrade().is_some_and(|registry| registry.ready().is_ok());
        READY.encode(&mut encoder, &ConstGauge::new(i64::from(is_ready)))
    }
}

fn method_label(method: &http::Method) -> &'static str {
    match *method {
        http::Method::GET => "GET",
        http::Method::HEAD => "HEAD",
        _ => "other",
    }
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Observed {
    metrics: RegistryMetrics,
    handler: &'static str,
    method: &'static str,
    pub(super) code: u16,
    pub(super) sent: u64,
    start: Instant,
    /// Tells that the request is under way.
    _flight: Arc<()>,
}

impl Drop for Observed {
    fn drop(&mut self) {
        let label = HttpLabel { handler: self.handler, method: self.method, code: self.code };
        self.metrics.inflight.get_or_create(&HandlerLabel { handler: self.handler }).dec();
        self.metrics.duration.get_or_create(&label).observe(self.start.elapsed().as_secs_f64());
        self.metrics.size.get_or_create(&label).observe(self.sent as f64);
    }
}
