//! What the registry counts of its requests.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry as Metrics, Unit};

use crate::metrics::BoundedLabel;

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
    last_success: Gauge<f64, std::sync::atomic::AtomicU64>,
    duration: Family<HttpLabel, Histogram>,
    size: Family<HttpLabel, Histogram>,
    inflight: Family<HandlerLabel, Gauge>,
    clients: Family<ClientLabel, Counter>,
    cuts: Counter,
    refused_uploads: Counter,
    refused: Family<ReasonLabel, Counter>,
    registries: Arc<BoundedLabel>,
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
struct ReasonLabel {
    reason: &'static str,
}

impl RegistryMetrics {
    /// Adds the registry's figures to `metrics`.
    pub fn register(metrics: &mut Metrics) -> Self {
        let this = Self {
            mirror_requests: Family::default(),
            last_success: Gauge::default(),
            duration: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            size: Family::new_with_constructor(|| Histogram::new(BYTES)),
            inflight: Family::default(),
            clients: Family::default(),
            cuts: Counter::default(),
            refused_uploads: Counter::default(),
            refused: Family::default(),
            registries: Arc::new(BoundedLabel::new(MAX_REGISTRIES)),
        };
        let help = "Requests of clients for content, by whether they got it";
        metrics.register("spegel_mirror_requests", help, this.mirror_requests.clone());
        let help = "When a client last got content, seconds since the Unix epoch";
        let name = "spegel_mirror_last_success_timestamp";
        metrics.register_with_unit(name, help, Unit::Seconds, this.last_success.clone());
        let help = "Time from a request's head to its response's last byte";
        metrics.register_with_unit("http_request_duration", help, Unit::Seconds, this.duration.clone());
        let help = "Bytes of response bodies";
        metrics.register_with_unit("http_response_size", help, Unit::Bytes, this.size.clone());
        metrics.register("http_requests_inflight", "Requests that are being answered", this.inflight.clone());
        let help = "Requests of clients for content, by whether the client is this node's own containerd";
        metrics.register("spegel_client_requests", help, this.clients.clone());
        let help = "Refusals that were said by an orderly close, because the client had been given a part of that blob";
        metrics.register("spegel_cut_responses", help, this.cuts.clone());
        let help = "Requests of peers that were sent elsewhere because of --max-uploads or --upload-rate";
        metrics.register("spegel_rejected_uploads", help, this.refused_uploads.clone());
        let help =
            "Requests that were refused because this node was stopping, or about to run out of what the reason names";
        metrics.register("spegel_refused_requests", help, this.refused.clone());
        this
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

    /// Counts a client's request for content of `registry`.
    pub(super) fn mirrored(&self, registry: &str, hit: bool, client: &'static str) {
        let label =
            MirrorLabel { registry: self.registries.of(registry, hit), cache: if hit { "hit" } else { "miss" } };
        self.mirror_requests.get_or_create(&label).inc();
        self.clients.get_or_create(&ClientLabel { client }).inc();
        if hit {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.last_success.set(now.as_secs_f64());
        }
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

impl Observed {
    /// How long it has been under way.
    pub(super) fn elapsed(&self) -> std::time::Duration {
        self.start.elapsed()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let label = HttpLabel { handler: self.handler, method: self.method, code: self.code };
        self.metrics.inflight.get_or_create(&HandlerLabel { handler: self.handler }).dec();
        self.metrics.duration.get_or_create(&label).observe(self.start.elapsed().as_secs_f64());
        self.metrics.size.get_or_create(&label).observe(self.sent as f64);
    }
}
