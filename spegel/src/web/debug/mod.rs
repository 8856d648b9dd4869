//! The pages for people, `/debug/web/`: a question a page. Made when somebody looks, and kept nowhere. Reading
//! them has the node look at itself now and then: what makes it do more is a POST.

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

use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Form, Router};
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
/// The longest form that is read, in bytes: a name of 512 characters, each escaped, and room.
const LONGEST_FORM: usize = 8 << 10;
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
        .route("/debug/web/measure", post(measured).get(by_post))
        .route("/debug/web/style.css", file("text/css; charset=utf-8", include_str!("style.css")))
        .route("/debug/web/live.js", file("text/javascript; charset=utf-8", include_str!("live.js")))
        .route("/debug/web/icon.svg", file("image/svg+xml", include_str!("icon.svg")));
    for page in Page::ALL {
        let show = move |State(debug): State<Debug>, Query(wish): Query<Wish>| async move {
            let parts = debug.parts(page, &wish);
            debug.show(page, &wish, &parts)
        };
        let route = match page {
            Page::Try => get(show).post(tried_by_form).layer(DefaultBodyLimit::max(LONGEST_FORM)),
            _ => get(show),
        };
        router = router.route(&page.path(), route);
    }
    router.with_state(debug)
}

// === impl Debug ===

impl Debug {
    fn show(&self, page: Page, wish: &Wish, parts: &[Part]) -> Response {
        Html(page::document(&self.0.parts, page, wish, parts).into_string()).into_response()
    }

    /// The pieces of a page as it is now.
    fn parts(&self, page: Page, wish: &Wish) -> Vec<Part> {
        let Shared { parts, history, .. } = &*self.0;
        match page {
            Page::Working => working::parts(parts),
            Page::Content => content::parts(parts),
            Page::Peers => peers::parts(parts, history, wish.sort.as_deref()),
            Page::Storm => storm::parts(parts),
            Page::Try => tried::parts(parts, named(wish), None),
        }
    }

    /// Looks something up, and pulls it if `pulls`. The error is for people.
    async fn measure(&self, image: &str, pulls: bool) -> Result<measure::Measured, String> {
        let Ok(_turn) = self.0.measuring.try_acquire() else {
            return Err("Another measurement is under way. Try again in some seconds.".to_owned());
        };
        let request = Request::parse(image)?;
        Ok(measure::measure(&self.0.parts, &request, pulls).await)
    }
}

async fn metadata(State(debug): State<Debug>) -> Response {
    json(&facts::metadata(&debug.0.parts))
}

async fn stats(State(debug): State<Debug>) -> Response {
    json(&facts::stats(&debug.0.parts))
}

/// What the form on the page asks for, on the same page.
async fn tried_by_form(State(debug): State<Debug>, headers: HeaderMap, Form(wish): Form<Wish>) -> Response {
    if let Some(why) = guard::refuses_to_act(&headers) {
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let image = named(&wish);
    let outcome = match image {
        "" => None,
        image => Some(debug.measure(image, wish.action.as_deref() == Some("measure")).await),
    };
    let parts = tried::parts(&debug.0.parts, image, outcome.as_ref());
    debug.show(Page::Try, &wish, &parts)
}

fn named(wish: &Wish) -> &str {
    wish.image.as_deref().map(str::trim).unwrap_or_default()
}

/// `?image=`: looked up and pulled, as JSON.
async fn measured(State(debug): State<Debug>, Query(wish): Query<Wish>, headers: HeaderMap) -> Response {
    if let Some(why) = guard::refuses_to_act(&headers) {
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let image = named(&wish);
    if image.is_empty() {
        return (StatusCode::BAD_REQUEST, "ask for ?image=registry/repository:tag, or a digest\n").into_response();
    }
    match debug.measure(image, true).await {
        Ok(measured) => json(&measured),
        Err(why) => (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response(),
    }
}

/// In the Go program it was a GET, which any page can send.
async fn by_post() -> Response {
    let why = "a measurement is started by POST: curl -X POST 'http://127.0.0.1:9090/debug/web/measure?image=NAME'\n";
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "POST")], why).into_response()
}

#[cfg(test)]
mod tests;
