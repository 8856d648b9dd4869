//! What is offered, as gauges.

use std::collections::BTreeMap;
use std::sync::Weak;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;

use super::{Health, Offered, Store};
use crate::metrics::{Described, Figures, Label};

static TAGS: Described =
    Described::gauge("spegel_advertised_image_tags", "Tags that are offered to peers").labels(&[REGISTRY]).as_in_go();
static IMAGES: Described =
    Described::gauge("spegel_advertised_image_digests", "Images, by their own digest, that are offered to peers")
        .labels(&[REGISTRY])
        .as_in_go();
static CONTENTS: Described =
    Described::gauge("spegel_advertised_content_digests", "Manifests, configs and layers that are offered to peers")
        .labels(&[REGISTRY])
        .as_in_go();
static INGESTS: Described =
    Described::gauge("spegel_ingests", "Pulls in progress or left behind, by how they are noticed")
        .labels(&[Label::of("state", &["watched", "looked_at", "overlooked"])]);
static READY: Described = Described::gauge(
    "spegel_store_ready",
    "1 while this node's content is listed and followed; 0 while containerd does not answer",
)
.measured_in("0 or 1");

const REGISTRY: Label = Label::at_most(
    "registry",
    REGISTRIES + 1,
    "the registries that most content is from; empty for images without a name; all others are `other`",
);

/// How many registries are told apart: whoever names images on this node names these, too.
const REGISTRIES: usize = 64;

/// Reads from a store, at each scrape, how much it offers to peers, by registry, and how it notices what is received.
#[derive(Debug)]
pub struct OfferedCollector {
    store: Weak<dyn Store>,
}

impl OfferedCollector {
    /// Adds the figures of `store` to `figures`.
    pub fn register(figures: &mut Figures, store: Weak<dyn Store>) {
        figures.collect([&TAGS, &IMAGES, &CONTENTS, &INGESTS, &READY], Self { store });
    }
}

type Figure = (&'static Described, fn(&Offered) -> usize);

const FIGURES: [Figure; 3] = [
    (&TAGS, |offered| offered.image_tags),
    (&IMAGES, |offered| offered.image_digests),
    (&CONTENTS, |offered| offered.content_digests),
];

impl Collector for OfferedCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(store) = self.store.upgrade() else { return Ok(()) };
        let gauge = |count: usize| ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
        let offered = bounded(store.offered());
        for (what, figure) in FIGURES {
            let mut family = what.begin(&mut encoder)?;
            for (registry, offered) in &offered {
                gauge(figure(offered)).encode(family.encode_family(&[("registry", registry.as_str())])?)?;
            }
        }
        let is_ready = *store.health().borrow() == Health::Ready;
        READY.encode(&mut encoder, &gauge(usize::from(is_ready)))?;
        let Some(ingests) = store.ingests() else { return Ok(()) };
        let mut family = INGESTS.begin(&mut encoder)?;
        let states =
            [("watched", ingests.watched), ("looked_at", ingests.looked_at), ("overlooked", ingests.overlooked)];
        for (state, count) in states {
            gauge(count).encode(family.encode_family(&[("state", state)])?)?;
        }
        Ok(())
    }
}

/// The registries that most content is from, and the sum of the others.
fn bounded(offered: BTreeMap<String, Offered>) -> BTreeMap<String, Offered> {
    if offered.len() <= REGISTRIES {
        return offered;
    }
    let mut largest: Vec<_> = offered.into_iter().collect();
    largest.sort_by_key(|(_, offered)| std::cmp::Reverse(offered.content_digests));
    let mut other = Offered::default();
    for (_, offered) in largest.drain(REGISTRIES..) {
        other.image_tags += offered.image_tags;
        other.image_digests += offered.image_digests;
        other.content_digests += offered.content_digests;
    }
    largest.into_iter().chain([("other".to_owned(), other)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_bounded_and_none_is_lost() {
        let of = |number: usize| Offered { image_tags: 1, image_digests: 1, content_digests: number };
        let offered = |count: usize| (1..=count).map(|n| (format!("{n:03}.test"), of(n))).collect::<BTreeMap<_, _>>();
        assert_eq!(bounded(offered(REGISTRIES)).len(), REGISTRIES);
        let many = bounded(offered(REGISTRIES + 10));
        assert_eq!(many.len(), REGISTRIES + 1);
        assert!(many.contains_key("011.test") && !many.contains_key("010.test"));
        assert_eq!((many["other"].image_tags, many["other"].content_digests), (10, (1..=10).sum()));
    }
}
