//! All figures in one place: what a scraper gets, and what is said of it in `docs/metrics.md`.

use std::sync::Weak;

use crate::doctor::DoctorMetrics;
use crate::ebpf::Watch;
use crate::metrics::{self, Described, Figures};
use crate::mirror::MirrorMetrics;
use crate::registry::{ReadyCollector, RegistryMetrics};
use crate::router::RouterMetrics;
use crate::serve::ServeMetrics;
use crate::store::{OciLayout, OfferedCollector, Store};

/// Every room's figures.
pub(super) struct Shown {
    pub(super) all: Figures,
    pub(super) router: RouterMetrics,
    pub(super) mirror: MirrorMetrics,
    pub(super) registry: RegistryMetrics,
    pub(super) doctor: DoctorMetrics,
    pub(super) serve: ServeMetrics,
}

// === impl Shown ===

impl Shown {
    /// The figures of all rooms, but whether the registry is ready, which is there later.
    pub(super) fn register(node: &str, zone: Option<&str>, watch: &Watch, store: Weak<dyn Store>) -> Self {
        let mut all = metrics::figures();
        metrics::register_node(&mut all, node, zone);
        super::trace::register(&mut all);
        let (router, mirror) = (RouterMetrics::register(&mut all), MirrorMetrics::register(&mut all));
        let registry = RegistryMetrics::register(&mut all);
        watch.register(&mut all, registry.pulled());
        OfferedCollector::register(&mut all, store);
        let (doctor, serve) = (DoctorMetrics::register(&mut all), ServeMetrics::register(&mut all));
        Self { all, router, mirror, registry, doctor, serve }
    }
}

/// Every metric that `spegel registry` has, those included that a scraper is not told of yet because nothing was counted.
#[must_use]
pub fn catalogue() -> Vec<&'static Described> {
    let mut shown = Shown::register("", None, &Watch::without_kernel(), Weak::<OciLayout>::new());
    ReadyCollector::register(&mut shown.all, Weak::new());
    shown.all.described().to_vec()
}
