//! Counts what kad's codec could not read. kad ends the stream, tells its own log, and nobody else.

use std::fmt::{self, Write as _};
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterFn, Filtered, filter_fn};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::metrics::{Reason, RouterMetrics};

/// Where kad says it, and how the line begins.
const TARGET: &str = "libp2p_kad::handler";
const LINE: &str = "Inbound substream error";
/// How an [`std::io::Error`] of that kind is written: a length beyond the bound, no protobuf, no request. A stream that was reset has another.
const KIND: &str = "InvalidData";

/// Listens to kad's log for requests that could not be read, once there are figures to count them in.
#[derive(Debug, Default)]
pub struct KadErrors(OnceLock<RouterMetrics>);

/// What of a line is of interest.
#[derive(Default)]
struct Line(String);

/// Only the lines that are looked for come here: spans of the same target are on the path of every message.
fn is_of_interest(metadata: &Metadata<'_>) -> bool {
    metadata.is_event() && *metadata.level() == Level::TRACE && metadata.target() == TARGET
}

// === impl KadErrors ===

impl KadErrors {
    /// Counts nothing yet.
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// Counts in `metrics` from now on. Only the first call has an effect.
    pub fn count_in(&self, metrics: &RouterMetrics) {
        let _ = self.0.set(metrics.clone());
    }

    /// What a subscriber needs to hear them.
    pub fn layer<S>(&'static self) -> Filtered<&'static Self, FilterFn, S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        self.with_filter(filter_fn(is_of_interest as fn(&Metadata<'_>) -> bool))
    }
}

impl<S: Subscriber> Layer<S> for &'static KadErrors {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Some(metrics) = self.0.get() else { return };
        let mut line = Line::default();
        event.record(&mut line);
        if line.0.starts_with(LINE) && line.0.contains(KIND) {
            metrics.0.refuse(Reason::Undecodable);
        }
    }
}

// === impl Line ===

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.0, "{value:?}");
        }
    }
}
