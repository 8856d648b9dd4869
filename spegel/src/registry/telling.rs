//! One line for each piece of content that a client asked for, once its body has ended, and the latest of them for who looks.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use http::StatusCode;
use tracing::{Level, debug, enabled, info};

use super::content::{Ask, Source};
use crate::story::{self, Break, Carriage, Met, Origin, Stories, Story, TRACE_HEADER, Tale, Told, Trace};
use crate::zerocopy::BodyEnd;

/// A story that is told when this is dropped, whatever became of its request.
#[derive(Debug)]
pub(super) struct Telling {
    /// Nothing where nobody hears it.
    story: Option<Box<Story>>,
    tale: Tale,
    start: Instant,
    /// Who keeps it and says whether it has a line. Requests of peers are part of another node's story.
    news: Option<Arc<Stories>>,
    /// What was said of that already.
    settled: Option<Told>,
}

/// The id of a request with these headers.
pub(super) fn trace_of(headers: &HeaderMap) -> Trace {
    let mut values = headers.get_all(TRACE_HEADER).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Trace::of(Some(value.as_bytes())),
        _ => Trace::of(None),
    }
}

/// Whether the line of a request is written, if it is news or not.
pub(super) fn is_logged(is_news: bool) -> bool {
    if is_news { enabled!(Level::INFO) } else { enabled!(Level::DEBUG) }
}

// === impl Telling ===

impl Telling {
    /// Begins to follow a request. What a client asks for is news.
    pub(super) fn of(ask: &Ask, stories: &Arc<Stories>) -> Self {
        let is_news = ask.is_content && !ask.mirrored;
        let story = (is_news || is_logged(false)).then(|| {
            Box::new(Story {
                range: ask.range.map(|range| range.to_string()),
                ..begin(ask.tale.trace(), ask.head_only, &ask.path, ask.registry.as_deref(), ask.client.to_string())
            })
        });
        let news = is_news.then(|| Arc::clone(stories));
        Self { story, tale: ask.tale.clone(), start: Instant::now(), news, settled: None }
    }

    /// Follows an answer that stood ready, of which is settled what becomes of its story.
    pub(super) fn ready(story: Story, start: Instant, news: Option<Arc<Stories>>, settled: Told) -> Self {
        let tale = Tale::unheard(Trace::of(None));
        let head = Some(start.elapsed());
        let story = Story { source: story::Source::Local, status: Some(StatusCode::OK.as_u16()), head, ..story };
        Self { story: Some(Box::new(story)), tale, start, news, settled: Some(settled) }
    }

    /// The head is on its way.
    pub(super) fn answers(&mut self, status: StatusCode, source: &Source) {
        if let Some(story) = &mut self.story {
            story.status = Some(status.as_u16());
            story.head = Some(self.start.elapsed());
            story.source = match source {
                Source::Local => story::Source::Local,
                Source::Receiving => story::Source::Receiving,
                Source::Ready => story::Source::Ready,
                Source::Peer(_) => story::Source::Peer,
                Source::Nobody => story::Source::Upstream,
            };
        }
    }

    /// The body has ended.
    pub(super) fn ends(mut self, end: BodyEnd) {
        if let Some(story) = &mut self.story {
            (story.bytes, story.whole) = (end.sent, end.complete);
        }
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        let Some(mut story) = self.story.take() else { return };
        story.met = self.tale.met();
        story.total = self.start.elapsed();
        let Some(stories) = &self.news else { return answered(&story) };
        let settled = self.settled.unwrap_or_else(|| stories.tells(story.source, is_logged(true)));
        if let Some(left_out) = settled.line {
            pull(&story, left_out);
        }
        if settled.is_kept {
            stories.keep(*story);
        }
    }
}

/// A story of which no more is known than what its request says.
pub(super) fn begin(trace: &Trace, head_only: bool, path: &str, registry: Option<&str>, client: String) -> Story {
    Story {
        began: SystemTime::now(),
        trace_id: trace.id().to_string(),
        method: if head_only { "HEAD" } else { "GET" },
        path: path.to_owned(),
        range: None,
        registry: registry.map(str::to_owned),
        client,
        source: story::Source::Upstream,
        met: Met::default(),
        status: None,
        bytes: 0,
        whole: false,
        head: None,
        total: Duration::ZERO,
    }
}

/// A peer's request, which is part of another node's line.
fn answered(story: &Story) {
    let Story { trace_id, method, path, client, bytes, whole, status, .. } = story;
    let (range, registry, source) =
        (story.range.as_deref(), story.registry.as_deref().unwrap_or("-"), story.source.name());
    debug!(
        trace_id,
        method,
        path,
        range,
        registry,
        client,
        source,
        status,
        bytes,
        whole,
        ms = ms(story.total),
        "answered"
    );
}

/// What does not apply is left out of the line. `left_out` lines like it were not written since the last one.
fn pull(story: &Story, left_out: u64) {
    let Story { trace_id, method, path, client, bytes, whole, status, .. } = story;
    let Met { known, asked, raced, resumed, breaks, .. } = &story.met;
    let (range, registry, source) =
        (story.range.as_deref(), story.registry.as_deref().unwrap_or("-"), story.source.name());
    let (ms_to_head, ms_in_all) = (story.head.map(ms), ms(story.total));
    let is_elsewhere = matches!(story.source, story::Source::Peer | story::Source::Upstream);
    let (known, asked) = (is_elsewhere.then_some(*known), is_elsewhere.then_some(*asked));
    let peer = story.met.peer.map(tracing::field::display);
    let (found, carried) = (story.met.found.map(Origin::name), story.met.carried.map(Carriage::name));
    let raced = raced.then_some(true);
    let resumed = (!breaks.is_empty()).then_some(*resumed);
    let why = (!breaks.is_empty()).then(|| breaks.iter().map(Break::to_string).collect::<Vec<_>>().join("; "));
    let held_ms = (!story.met.held.is_zero()).then(|| ms(story.met.held));
    let failure = story.met.failure.as_deref();
    info!(
        trace_id,
        method,
        path,
        range,
        registry,
        client,
        source,
        peer,
        found,
        known,
        asked,
        raced,
        carried,
        resumed,
        why,
        held_ms,
        failure,
        status,
        bytes,
        whole,
        head_ms = ms_to_head,
        ms = ms_in_all,
        left_out = (left_out > 0).then_some(left_out),
        "pull"
    );
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
