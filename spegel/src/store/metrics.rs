//! What is offered, as gauges.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::{Offered, Store};

/// Reads from a store, at each scrape, how much it offers to peers, by registry, and how it notices what is received.
#[derive(Debug)]
pub struct OfferedCollector {
    store: Arc<dyn Store>,
}

impl OfferedCollector {
    /// The figures of `store`.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }
}

type Figure = (&'static str, &'static str, fn(&Offered) -> usize);

const FIGURES: [Figure; 3] = [
    ("spegel_advertised_image_tags", "Tags that are offered to peers", |offered| offered.image_tags),
    ("spegel_advertised_image_digests", "Images, by their own digest, that are offered to peers", |offered| {
        offered.image_digests
    }),
    ("spegel_advertised_content_digests", "Manifests, configs and layers that are offered to peers", |offered| {
        offered.content_digests
    }),
];

impl Collector for OfferedCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let offered = self.store.offered();
        for (name, help, figure) in FIGURES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (registry, offered) in &offered {
                let gauge = ConstGauge::new(i64::try_from(figure(offered)).unwrap_or(i64::MAX));
                gauge.encode(family.encode_family(&[("registry", registry.as_str())])?)?;
            }
        }
        let Some(ingests) = self.store.ingests() else { return Ok(()) };
        let help = "Pulls in progress or left behind, by how they are noticed";
        let mut family = encoder.encode_descriptor("spegel_ingests", help, None, MetricType::Gauge)?;
        let states =
            [("watched", ingests.watched), ("looked_at", ingests.looked_at), ("overlooked", ingests.overlooked)];
        for (state, count) in states {
            let gauge = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            gauge.encode(family.encode_family(&[("state", state)])?)?;
        }
        Ok(())
    }
}
