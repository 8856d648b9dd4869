//! What a server counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::Limits;
use super::runtime::Chosen;
use crate::metrics::{Described, Figures, Label};
use crate::zerocopy::Traffic;

static OPEN: Described = Described::gauge("spegel_serve_connections", "Connections open now");
static LIMIT: Described = Described::gauge("spegel_serve_connections_limit", "Connections that may be open at once");
static REFUSED: Described =
    Described::counter("spegel_serve_connections_refused", "Connections closed because too many were open");
static BYTES: Described = Described::counter(
    "spegel_serve_bytes",
    "Bytes sent to clients by kind, and by the way they took through the kernel",
)
.labels(&[Label::of("kind", &["bytes", "file", "relay"]), Label::of("way", &["memory", "sendfile", "splice", "copy"])]);
static ENGINE: Described = Described::gauge(
    "spegel_serve_engine_info",
    "1 for the engine that drives connections, with the reason why it is that one",
)
.labels(&[Label::of("engine", &["io-uring", "tokio"]), Label::at_most("reason", 8, "why, in a word or two")]);
static PIPES: Described = Described::gauge("spegel_serve_pipes", "Pipes that relays use now");
static BOUNDS: Described =
    Described::gauge("spegel_serve_bound", "What is allowed at most, in numbers, bytes or seconds")
        .labels(&[Label::of("of", &BOUND_NAMES)])
        .measured_in("what `of` says");

const BOUND_NAMES: [&str; 8] = [
    "connections",
    "pipes",
    "header_bytes",
    "header_seconds",
    "idle_seconds",
    "write_stall_seconds",
    "open_files",
    "memory_bytes",
];

/// A server's figures. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ServeMetrics {
    open: Gauge,
    limit: Gauge,
    refused: prometheus_client::metrics::counter::Counter,
    traffic: Traffic,
    engine: Family<EngineLabels, Gauge>,
    pipes: Gauge,
    bounds: Family<BoundLabels, Gauge<f64, AtomicU64>>,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct BoundLabels {
    of: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct EngineLabels {
    engine: &'static str,
    reason: &'static str,
}

// === impl ServeMetrics ===

impl ServeMetrics {
    /// Figures that `figures` shows.
    pub fn register(figures: &mut Figures) -> Self {
        let metrics = Self::default();
        figures.register(&OPEN, metrics.open.clone());
        figures.register(&LIMIT, metrics.limit.clone());
        figures.register(&REFUSED, metrics.refused.clone());
        figures.register(&BYTES, metrics.traffic.family());
        figures.register(&ENGINE, metrics.engine.clone());
        figures.register(&PIPES, metrics.pipes.clone());
        figures.register(&BOUNDS, metrics.bounds.clone());
        metrics
    }

    /// How many files the process may have open; how many it has is a figure of the process.
    pub fn set_open_files(&self, bound: u64) {
        self.set_bound("open_files", bound as f64);
    }

    /// How much memory the control group may be charged for; what this process holds of it is a figure of the process.
    pub fn set_memory(&self, bytes: u64) {
        self.set_bound("memory_bytes", bytes as f64);
    }

    /// Bytes sent.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> i64 {
        self.open.get()
    }

    /// Connections refused so far because too many were open.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.get()
    }

    pub(super) fn set_limits(&self, limits: &Limits, pipes: usize) {
        self.limit.set(i64::try_from(limits.connections).unwrap_or(i64::MAX));
        for (of, bound) in [
            ("connections", limits.connections as f64),
            ("pipes", pipes as f64),
            ("header_bytes", limits.header_bytes as f64),
            ("header_seconds", limits.header_read.as_secs_f64()),
            ("idle_seconds", limits.idle.as_secs_f64()),
            ("write_stall_seconds", limits.write_stall.as_secs_f64()),
        ] {
            self.set_bound(of, bound);
        }
    }

    fn set_bound(&self, of: &'static str, bound: f64) {
        self.bounds.get_or_create(&BoundLabels { of }).set(bound);
    }

    /// Follows the pipes in use.
    pub(super) fn pipes(&self) -> Gauge {
        self.pipes.clone()
    }

    pub(super) fn set_engine(&self, chosen: &Chosen) {
        let labels = EngineLabels { engine: chosen.engine.name(), reason: chosen.reason };
        self.engine.get_or_create(&labels).set(1);
    }

    pub(super) fn opened(&self) {
        self.open.inc();
    }

    pub(super) fn closed(&self) {
        self.open.dec();
    }

    pub(super) fn refuse(&self) {
        self.refused.inc();
    }
}
