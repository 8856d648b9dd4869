//! What is known of each metric beside its value, said where it is counted, and the registry that takes nothing else.

use std::panic::Location;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Metric, Registry, Unit};

/// A metric, as it is scraped and as `docs/metrics.md` lists it.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    name: &'static str,
    kind: MetricType,
    help: &'static str,
    labels: &'static [Label],
    is_gos: bool,
    measure: Option<&'static str>,
    declared: &'static Location<'static>,
}

/// A label, and which values it can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// Its values.
    pub bound: Bound,
}

/// What keeps a label's values from growing without end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// It is one of these words.
    Words(&'static [&'static str]),
    /// There are this many different ones at most, at one time.
    AtMost(usize, &'static str),
}

/// Metrics that are described, ready to be scraped.
#[derive(Debug, Default)]
pub struct Figures {
    registry: Registry,
    described: Vec<&'static Described>,
}

// === impl Label ===

impl Label {
    /// A label with these values and no others.
    pub const fn of(name: &'static str, words: &'static [&'static str]) -> Self {
        Self { name, bound: Bound::Words(words) }
    }

    /// A label with as many values at most, and what they are.
    pub const fn at_most(name: &'static str, number: usize, what: &'static str) -> Self {
        Self { name, bound: Bound::AtMost(number, what) }
    }
}

// === impl Described ===

impl Described {
    #[track_caller]
    const fn new(kind: MetricType, name: &'static str, help: &'static str) -> Self {
        Self { name, kind, help, labels: &[], is_gos: false, measure: None, declared: Location::caller() }
    }

    /// What only grows. The name is without `_total`, and with its unit: `_seconds` or `_bytes`.
    #[track_caller]
    pub const fn counter(name: &'static str, help: &'static str) -> Self {
        Self::new(MetricType::Counter, name, help)
    }

    /// What goes up and down.
    #[track_caller]
    pub const fn gauge(name: &'static str, help: &'static str) -> Self {
        Self::new(MetricType::Gauge, name, help)
    }

    /// How often which size was seen.
    #[track_caller]
    pub const fn histogram(name: &'static str, help: &'static str) -> Self {
        Self::new(MetricType::Histogram, name, help)
    }

    /// Always 1; its labels are the news. The name is without `_info`.
    #[track_caller]
    pub const fn info(name: &'static str, help: &'static str) -> Self {
        Self::new(MetricType::Info, name, help)
    }

    /// With these labels, in this order.
    pub const fn labels(self, labels: &'static [Label]) -> Self {
        Self { labels, ..self }
    }

    /// The Go program has it as well.
    pub const fn as_in_go(self) -> Self {
        Self { is_gos: true, ..self }
    }

    /// What it is measured in, where its name does not say so.
    pub const fn measured_in(self, measure: &'static str) -> Self {
        Self { measure: Some(measure), ..self }
    }

    /// The name that samples have, before `_bucket`, `_sum` and `_count`.
    #[must_use]
    pub fn sample(&self) -> String {
        match self.kind {
            MetricType::Counter => format!("{}_total", self.name),
            MetricType::Info => format!("{}_info", self.name),
            _ => self.name.to_owned(),
        }
    }

    /// The name in the lines about it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// `counter`, `gauge`, `histogram` or `info`.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.kind.as_str()
    }

    /// What it says, in a sentence without its full stop.
    #[must_use]
    pub fn help(&self) -> &'static str {
        self.help
    }

    /// Its labels.
    #[must_use]
    pub fn label_list(&self) -> &'static [Label] {
        self.labels
    }

    /// Whether the Go program has it too.
    #[must_use]
    pub fn is_gos(&self) -> bool {
        self.is_gos
    }

    /// What it is measured in.
    #[must_use]
    pub fn measured(&self) -> &str {
        self.measure.unwrap_or_else(|| {
            self.split().1.map_or("", |unit| if matches!(unit, Unit::Bytes) { "bytes" } else { "seconds" })
        })
    }

    /// The room that counts it.
    #[must_use]
    pub fn room(&self) -> &'static str {
        let path = self.declared.file().rsplit_once("src/").map_or(self.declared.file(), |(_, path)| path);
        path.split(['/', '.']).next().unwrap_or(path)
    }

    /// A collector's way to begin its samples.
    ///
    /// # Errors
    /// The text cannot be written.
    pub fn begin<'e>(
        &'static self,
        encoder: &'e mut DescriptorEncoder<'_>,
    ) -> Result<MetricEncoder<'e>, std::fmt::Error> {
        let (name, unit) = self.split();
        let unit = match unit {
            Some(Unit::Bytes) => Some(&Unit::Bytes),
            Some(_) => Some(&Unit::Seconds),
            None => None,
        };
        encoder.encode_descriptor(name, &format!("{}.", self.help), unit, self.kind)
    }

    /// A collector's only sample.
    ///
    /// # Errors
    /// The text cannot be written.
    pub fn encode(
        &'static self,
        encoder: &mut DescriptorEncoder<'_>,
        metric: &impl EncodeMetric,
    ) -> Result<(), std::fmt::Error> {
        metric.encode(self.begin(encoder)?)
    }

    /// The name without its unit, and the unit.
    fn split(&self) -> (&'static str, Option<Unit>) {
        let units = [("_seconds", Unit::Seconds), ("_bytes", Unit::Bytes)];
        let found = units.into_iter().find_map(|(end, unit)| Some((self.name.strip_suffix(end)?, Some(unit))));
        found.unwrap_or((self.name, None))
    }
}

// === impl Figures ===

impl Figures {
    /// Adds a metric.
    pub fn register(&mut self, what: &'static Described, metric: impl Metric) {
        debug_assert_eq!(metric.metric_type().as_str(), what.kind(), "{}", what.name);
        self.described.push(what);
        match what.split() {
            (name, Some(unit)) => self.registry.register_with_unit(name, what.help, unit, metric),
            (name, None) => self.registry.register(name, what.help, metric),
        }
    }

    /// Adds what a collector reads at each scrape: these, or some of them where the others are not known.
    pub fn collect(&mut self, what: impl IntoIterator<Item = &'static Described>, collector: impl Collector) {
        self.described.extend(what);
        self.registry.register_collector(Box::new(collector));
    }

    /// All that was added.
    #[must_use]
    pub fn described(&self) -> &[&'static Described] {
        &self.described
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use prometheus_client::metrics::counter::Counter;

    use super::*;
    use crate::metrics::{Format, encode};

    static SENT: Described =
        Described::counter("sent_bytes", "Bytes that were sent").labels(&[Label::of("way", &["a"])]);

    #[test]
    fn a_metric_is_scraped_as_it_is_described() {
        let mut figures = Figures::default();
        figures.register(&SENT, Counter::<u64>::default());
        let text = encode(&figures, Format::OpenMetrics).unwrap();
        let lines = ["# HELP sent_bytes Bytes that were sent.", "# TYPE sent_bytes counter", "# UNIT sent_bytes bytes"];
        assert_eq!(text, format!("{}\nsent_bytes_total 0\n# EOF\n", lines.join("\n")));
        assert_eq!((SENT.sample().as_str(), SENT.measured(), SENT.room()), ("sent_bytes_total", "bytes", "metrics"));
        assert_eq!(figures.described().len(), 1);
    }
}
