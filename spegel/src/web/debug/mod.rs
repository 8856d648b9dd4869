//! The pages for people, `/debug/web/`: a question a page. Read-only, made when somebody looks, and kept nowhere.

mod content;
mod facts;
mod history;
mod live;
mod measure;
mod page;
mod peers;
mod pulls;
mod storm;
mod text;
mod tried;
mod working;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::get;
use maud::Markup;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{guard, json};
use history::History;
use measure::Request;
use page::Page;

pub use facts::{Examination, Examined, Parts, Verdict};

/// How many rows a page has at the most; what is more is counted.
const ROWS: usize = 500;
/// How many pages are kept up to date at a time. Others are as they were loaded.
const STREAMS: usize = 16;

/// What all pages share.
#[derive(Clone, Debug)]
struct Debug(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    parts: Parts,
    history: History,
    streams: Arc<Semaphore>,
    /// One measurement at a time: each is a load.
    measuring: Semaphore,
    stop: CancellationToken,
}

/// A piece of a page that is sent again when it changes.
struct Part {
    id: &'static str,
    html: Markup,
}

/// What a page may be asked for.
#[derive(Clone, Debug, Default, serde::Deserialize)]
struct Wish {
    page: Option<String>,
    sort: Option<String>,
    image: Option<String>,
    #[serde(rename = "do")]
    action: Option<String>,
}

/// The pages over `parts`.
pub(super) fn router(parts: Parts, stop: CancellationToken) -> Router {
    let debug = Debug(Arc::new(Shared {
        parts,
        history: History::default(),
        streams: Arc::new(Semaphore::new(STREAMS)),
        measuring: Semaphore::new(1),
        stop,
    }));
    let file =
        |kind: &'static str, text: &'static str| get(move || async move { ([(header::CONTENT_TYPE, kind)], text) });
    let mut router = Router::new()
        .route("/debug/web", get(|| async { Redirect::permanent(page::ROOT) }))
        .route("/debug/web/events", get(live::events))
        .route("/debug/web/metadata", get(metadata))
        .route("/debug/web/stats", get(stats))
        .route("/debug/web/measure", get(measured))
        .route("/debug/web/style.css", file("text/css; charset=utf-8", include_str!("style.css")))
        .route("/debug/web/live.js", file("text/javascript; charset=utf-8", include_str!("live.js")))
        .route("/debug/web/icon.svg", file("image/svg+xml", include_str!("icon.svg")));
    for page in Page::ALL {
        let show = move |State(debug): State<Debug>, Query(wish): Query<Wish>, headers: HeaderMap| async move {
            debug.show(page, &wish, &headers).await
        };
        router = router.route(&page.path(), get(show));
    }
    router.with_state(debug)
}

// === impl Debug ===

impl Debug {
    async fn show(&self, page: Page, wish: &Wish, headers: &HeaderMap) -> Response {
        let parts = match page {
            Page::Try => match self.tried(wish, headers).await {
                Ok(parts) => parts,
                Err(refused) => return refused,
            },
            _ => self.parts(page, wish),
        };
        let facts = &self.0.parts;
        Html(page::document(facts, page, wish, &parts).into_string()).into_response()
    }

    /// The pieces of a page that is kept up to date.
    fn parts(&self, page: Page, wish: &Wish) -> Vec<Part> {
        let Shared { parts, history, .. } = &*self.0;
        match page {
            Page::Working => working::parts(parts),
            Page::Content => content::parts(parts),
            Page::Peers => peers::parts(parts, history, wish.sort.as_deref()),
            Page::Storm => storm::parts(parts),
            Page::Try => Vec::new(),
        }
    }

    async fn tried(&self, wish: &Wish, headers: &HeaderMap) -> Result<Vec<Part>, Response> {
        let image = wish.image.as_deref().map(str::trim).unwrap_or_default();
        let outcome = match image {
            "" => None,
            image => Some(self.measure(image, wish.action.as_deref() == Some("measure"), headers).await?),
        };
        Ok(tried::parts(&self.0.parts, image, outcome.as_ref()))
    }

    /// Looks something up, and pulls it if `pulls`. The outer error is for who may not ask.
    async fn measure(
        &self,
        image: &str,
        pulls: bool,
        headers: &HeaderMap,
    ) -> Result<Result<measure::Measured, String>, Response> {
        if guard::is_from_elsewhere(headers) {
            return Err(
                (StatusCode::FORBIDDEN, "a page of another site may not make this node do anything\n").into_response()
            );
        }
        let Ok(_turn) = self.0.measuring.try_acquire() else {
            return Ok(Err("Another measurement is under way. Try again in some seconds.".to_owned()));
        };
        let request = match Request::parse(image) {
            Ok(request) => request,
            Err(why) => return Ok(Err(why)),
        };
        Ok(Ok(measure::measure(&self.0.parts, &request, pulls).await))
    }
}

async fn metadata(State(debug): State<Debug>) -> Response {
    json(&facts::metadata(&debug.0.parts))
}

async fn stats(State(debug): State<Debug>) -> Response {
    json(&facts::stats(&debug.0.parts))
}

/// `?image=`: looked up and pulled, as JSON.
async fn measured(State(debug): State<Debug>, Query(wish): Query<Wish>, headers: HeaderMap) -> Response {
    let Some(image) = wish.image.as_deref() else {
        return (StatusCode::BAD_REQUEST, "ask for ?image=registry/repository:tag, or a digest\n").into_response();
    };
    match debug.measure(image.trim(), true, &headers).await {
        Ok(Ok(measured)) => json(&measured),
        Ok(Err(why)) => (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response(),
        Err(refused) => refused,
    }
}

#[cfg(test)]
mod tests;
