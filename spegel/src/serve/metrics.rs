//! What a server counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::runtime::Chosen;
use crate::zerocopy::Traffic;

/// A server's figures. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ServeMetrics {
    open: Gauge,
    limit: Gauge,
    refused: prometheus_client::metrics::counter::Counter,
    traffic: Traffic,
    engine: Family<EngineLabels, Gauge>,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct EngineLabels {
    engine: &'static str,
    reason: &'static str,
}

// === impl ServeMetrics ===

impl ServeMetrics {
    /// Figures that `registry` shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("spegel_serve_connections", "Connections open now", metrics.open.clone());
        registry.register(
            "spegel_serve_connections_limit",
            "Connections that may be open at once",
            metrics.limit.clone(),
        );
        registry.register(
            "spegel_serve_connections_refused",
            "Connections closed because too many were open",
            metrics.refused.clone(),
        );
        registry.register(
            "spegel_serve_bytes",
            "Bytes sent to clients by kind, and by the way they took through the kernel",
            metrics.traffic.family(),
        );
        registry.register(
            "spegel_serve_engine_info",
            "1 for the engine that drives connections, with the reason why it is that one",
            metrics.engine.clone(),
        );
        metrics
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

    pub(super) fn set_limit(&self, limit: usize) {
        self.limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
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
