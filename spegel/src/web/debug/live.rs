//! Pages that are kept up to date: what has changed of one is sent once a second, as long as somebody looks at it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::page::Page;
use super::{Debug, Wish};

/// How often it is looked what has changed.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a stream lasts; the browser begins another one.
const LONGEST: Duration = Duration::from_secs(600);

/// A page that somebody looks at.
struct Looked {
    debug: Debug,
    page: Page,
    wish: Wish,
    shown: HashMap<&'static str, String>,
    ticks: Interval,
    until: Instant,
    _stream: OwnedSemaphorePermit,
}

/// The changes of `?page=`.
pub(super) async fn events(State(debug): State<Debug>, Query(wish): Query<Wish>) -> Response {
    let named = wish.page.as_deref().and_then(Page::named).filter(|page| *page != Page::Try);
    let Some(page) = named else { return (StatusCode::NOT_FOUND, "no such page\n").into_response() };
    let Ok(stream) = std::sync::Arc::clone(&debug.0.streams).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many pages are open\n").into_response();
    };
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let until = Instant::now() + LONGEST;
    let looked = Looked { debug, page, wish, shown: HashMap::new(), ticks, until, _stream: stream };
    let changes = stream::unfold(looked, |mut looked| async move { Some((looked.next().await?, looked)) });
    Sse::new(changes).keep_alive(KeepAlive::default()).into_response()
}

// === impl Looked ===

impl Looked {
    /// What has changed since it was last told; nothing once the process stops or the stream has lasted long enough.
    async fn next(&mut self) -> Option<Result<Event, Infallible>> {
        let stop = self.debug.0.stop.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return None,
                _ = self.ticks.tick() => {}
            }
            if Instant::now() >= self.until {
                return None;
            }
            let mut changed = serde_json::Map::new();
            for part in self.debug.parts(self.page, &self.wish) {
                let html = part.html.into_string();
                if self.shown.get(part.id) != Some(&html) {
                    changed.insert(part.id.to_owned(), html.clone().into());
                    self.shown.insert(part.id, html);
                }
            }
            if !changed.is_empty() {
                let event = Event::default().event("parts");
                return Some(Ok(event.data(serde_json::Value::from(changed).to_string())));
            }
        }
    }
}
