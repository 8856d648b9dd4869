//! What an operator can see of a storm: for each image who pulled it from upstream, how deep the tree was, where the bytes came from, and what a
//! node waited for.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::metrics::{Described, Figures, Label};
use crate::storm::{GAP, Why};

static BLOBS: Described = Described::counter(
    "spegel_storm_blobs",
    "Manifests, configs and layers that this node's containerd got while storms were coordinated, by image and by whether it went upstream \
     for them (who pulled an image is where upstream is not 0)",
)
.labels(&[IMAGE, SOURCE]);
static BYTES: Described = Described::counter(
    "spegel_storm_received_bytes",
    "Bytes of what this node's containerd got while storms were coordinated, by image and source",
)
.labels(&[IMAGE, SOURCE]);
static DEPTH: Described = Described::gauge(
    "spegel_storm_depth",
    "The most nodes that bytes of the image came through to this one in its latest pull, the first of which had them from upstream: the \
     largest of all nodes' is the depth of the tree",
)
.labels(&[IMAGE]);
static WAITED: Described = Described::counter(
    "spegel_storm_waited_seconds",
    "Time that this node's containerd waited for parts of the image, side by side ones added: for a first_byte while the request was held, \
     for upstream once told to pull, for a parent that stood still: why a node was slow",
)
.labels(&[IMAGE, Label::of("what", &["first_byte", "upstream", "parent"])]);
static MOVES: Described = Described::counter(
    "spegel_storm_moves",
    "Changes of the node that gives a part of the image, by why the one before was left",
)
.labels(&[IMAGE, Label::of("why", &["new", "refused", "broke", "slow", "still"])]);
static DURATION: Described = Described::gauge(
    "spegel_storm_pull_duration_seconds",
    "From the first request of this node's latest pull of the image to the last part that came: the slowest node is the one with the most",
)
.labels(&[IMAGE]);
static SHED: Described =
    Described::counter("spegel_storm_shed", "Nodes that were let go because this node's link was full");

const IMAGE: Label = Label::at_most("image", IMAGES, "the images that were pulled last, `registry/repository`");
const SOURCE: Label = Label::of("source", &["upstream", "peers"]);

/// How many images are told apart: the latest. Their repositories are named by our own containerd.
const IMAGES: usize = 32;
/// The longest name of one.
const LONGEST: usize = 255;

/// The figures of storms.
#[derive(Clone, Debug, Default)]
pub(crate) struct StormFigures {
    blobs: Family<SourceLabel, Counter>,
    bytes: Family<SourceLabel, Counter>,
    depth: Family<ImageLabel, Gauge>,
    waits: Family<WaitLabel, Counter<f64, AtomicU64>>,
    moves: Family<MoveLabel, Counter>,
    duration: Family<ImageLabel, Gauge<f64, AtomicU64>>,
    shed: Counter,
    images: Arc<Mutex<VecDeque<Image>>>,
}

/// A pull as it is remembered.
#[derive(Debug)]
struct Image {
    name: Arc<str>,
    began: Instant,
    used: Instant,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ImageLabel {
    image: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    image: String,
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WaitLabel {
    image: String,
    what: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MoveLabel {
    image: String,
    why: &'static str,
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Upstream,
    Peers,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// A first byte, while the request is held.
    FirstByte,
    /// Upstream's first byte.
    Upstream,
    /// More of what has begun to come from a peer.
    Parent,
}

impl From {
    const ALL: [Self; 2] = [Self::Upstream, Self::Peers];

    fn name(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Peers => "peers",
        }
    }
}

impl Wait {
    const ALL: [Self; 3] = [Self::FirstByte, Self::Upstream, Self::Parent];

    fn name(self) -> &'static str {
        match self {
            Self::FirstByte => "first_byte",
            Self::Upstream => "upstream",
            Self::Parent => "parent",
        }
    }
}

const WHYS: [(Why, &str); 5] =
    [(Why::New, "new"), (Why::Refused, "refused"), (Why::Broke, "broke"), (Why::Slow, "slow"), (Why::Still, "still")];

// === impl StormFigures ===

impl StormFigures {
    /// Adds them to `figures`.
    pub(crate) fn register(figures: &mut Figures) -> Self {
        let this = Self::default();
        figures.register(&BLOBS, this.blobs.clone());
        figures.register(&BYTES, this.bytes.clone());
        figures.register(&DEPTH, this.depth.clone());
        figures.register(&WAITED, this.waits.clone());
        figures.register(&MOVES, this.moves.clone());
        figures.register(&DURATION, this.duration.clone());
        figures.register(&SHED, this.shed.clone());
        this
    }

    /// A part of the image is asked for.
    pub(super) fn asked(&self, image: &Arc<str>, now: Instant) {
        let mut images = self.images();
        if let Some(place) = images.iter().position(|known| known.name == *image) {
            let Some(mut known) = images.remove(place) else { return };
            if now.duration_since(known.used) >= GAP {
                known.began = now;
                self.depth.get_or_create(&ImageLabel { image: image.to_string() }).set(0);
            }
            known.used = now;
            images.push_back(known);
            return;
        }
        if image.len() > LONGEST {
            return;
        }
        if images.len() >= IMAGES
            && let Some(oldest) = images.pop_front()
        {
            self.forget(&oldest.name);
        }
        images.push_back(Image { name: Arc::clone(image), began: now, used: now });
    }

    /// Bytes of it came.
    pub(super) fn came(&self, image: &Arc<str>, from: From, bytes: u64, now: Instant) {
        self.images().iter_mut().filter(|known| known.name == *image).for_each(|known| known.used = now);
        if let Some(image) = self.known(image) {
            self.bytes.get_or_create(&SourceLabel { image, source: from.name() }).inc_by(bytes);
        }
    }

    /// A part of it is here, and came by way of so many nodes.
    pub(super) fn got(&self, image: &Arc<str>, from: From, depth: usize, now: Instant) {
        let began = {
            let mut images = self.images();
            let Some(known) = images.iter_mut().find(|known| known.name == *image) else { return };
            known.used = now;
            known.began
        };
        let name = image.to_string();
        self.blobs.get_or_create(&SourceLabel { image: name.clone(), source: from.name() }).inc();
        let label = ImageLabel { image: name };
        let deepest = self.depth.get_or_create(&label).get();
        self.depth.get_or_create(&label).set(deepest.max(i64::try_from(depth).unwrap_or(i64::MAX)));
        self.duration.get_or_create(&label).set(now.duration_since(began).as_secs_f64());
    }

    /// It was waited for it.
    pub(super) fn waited(&self, image: &Arc<str>, what: Wait, took: Duration) {
        if let Some(image) = self.known(image) {
            self.waits.get_or_create(&WaitLabel { image, what: what.name() }).inc_by(took.as_secs_f64());
        }
    }

    /// Another node gives it.
    pub(super) fn moved(&self, image: &Arc<str>, why: Why) {
        let name = WHYS.iter().find(|(known, _)| *known == why).map_or("new", |(_, name)| *name);
        if let Some(image) = self.known(image) {
            self.moves.get_or_create(&MoveLabel { image, why: name }).inc();
        }
    }

    /// The latest images, the newest first, for people.
    pub(super) fn rows(&self) -> Vec<super::StormImage> {
        let names: Vec<Arc<str>> = self.images().iter().rev().map(|image| Arc::clone(&image.name)).collect();
        let bytes = |name: &Arc<str>, from: From| {
            let label = SourceLabel { image: name.to_string(), source: from.name() };
            self.bytes.get(&label).map_or(0, |counter| counter.get())
        };
        let row = |name: Arc<str>| {
            let label = ImageLabel { image: name.to_string() };
            super::StormImage {
                upstream: bytes(&name, From::Upstream),
                peers: bytes(&name, From::Peers),
                depth: self.depth.get(&label).map_or(0, |gauge| gauge.get()),
                seconds: self.duration.get(&label).map_or(0.0, |gauge| gauge.get()),
                name,
            }
        };
        names.into_iter().map(row).collect()
    }

    /// Somebody was let go.
    pub(super) fn shed(&self) {
        self.shed.inc();
    }

    fn images(&self) -> MutexGuard<'_, VecDeque<Image>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, image: &Arc<str>) -> Option<String> {
        self.images().iter().any(|known| known.name == *image).then(|| image.to_string())
    }

    fn forget(&self, image: &Arc<str>) {
        let image = image.to_string();
        for source in From::ALL.map(From::name) {
            let label = SourceLabel { image: image.clone(), source };
            self.blobs.remove(&label);
            self.bytes.remove(&label);
        }
        for what in Wait::ALL.map(Wait::name) {
            self.waits.remove(&WaitLabel { image: image.clone(), what });
        }
        for (_, why) in WHYS {
            self.moves.remove(&MoveLabel { image: image.clone(), why });
        }
        self.depth.remove(&ImageLabel { image: image.clone() });
        self.duration.remove(&ImageLabel { image });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_latest_images_are_told_apart_and_no_more() {
        let mut shown = Figures::default();
        let figures = StormFigures::register(&mut shown);
        let start = Instant::now();
        for n in 0..3 * IMAGES {
            let image: Arc<str> = format!("registry.test/app{n}").into();
            figures.asked(&image, start);
            figures.came(&image, From::Upstream, 5, start);
            figures.waited(&image, Wait::Parent, GAP);
            figures.moved(&image, Why::Slow);
            figures.got(&image, From::Upstream, 2, start + GAP / 2);
        }
        let text = crate::metrics::encode(&shown, crate::metrics::Format::OpenMetrics).unwrap();
        let images = |name: &str| text.lines().filter(|line| line.starts_with(&format!("{name}{{"))).count();
        for name in ["spegel_storm_blobs_total", "spegel_storm_depth", "spegel_storm_pull_duration_seconds"] {
            assert_eq!(images(name), IMAGES, "{name}");
        }
        assert!(!text.contains("app0\"") && text.contains(&format!("app{}\"", 3 * IMAGES - 1)));
        let long: Arc<str> = "x".repeat(LONGEST + 1).into();
        figures.asked(&long, start);
        figures.came(&long, From::Peers, 1, start);
        assert!(!crate::metrics::encode(&shown, crate::metrics::Format::OpenMetrics).unwrap().contains(&*long));
    }

    #[test]
    fn who_is_shed_is_counted() {
        let mut shown = Figures::default();
        StormFigures::register(&mut shown).shed();
        let text = crate::metrics::encode(&shown, crate::metrics::Format::OpenMetrics).unwrap();
        assert!(text.contains("spegel_storm_shed_total 1\n"), "{text}");
    }

    #[test]
    fn a_pull_after_a_gap_is_another_one() {
        let (figures, start, image) = (StormFigures::default(), Instant::now(), Arc::<str>::from("registry.test/app"));
        let label = ImageLabel { image: image.to_string() };
        figures.asked(&image, start);
        figures.got(&image, From::Peers, 1, start + GAP);
        assert_eq!(figures.duration.get_or_create(&label).get(), 10.0);
        figures.asked(&image, start + 3 * GAP);
        figures.got(&image, From::Peers, 3, start + 3 * GAP + Duration::from_secs(1));
        assert_eq!(figures.duration.get_or_create(&label).get(), 1.0);
        // One layer for longer than the gap, and then the next one: it is still the same pull.
        let (began, end) = (start + 6 * GAP, start + 9 * GAP);
        figures.asked(&image, began);
        (1..30).for_each(|n| figures.came(&image, From::Peers, 1, began + GAP * n / 10));
        figures.asked(&image, end);
        figures.got(&image, From::Peers, 1, end);
        assert_eq!(figures.duration.get_or_create(&label).get(), (3 * GAP).as_secs_f64());
        assert_eq!(figures.depth.get_or_create(&label).get(), 1, "the deepest of this pull");
    }
}
