//! The side port: what a scraper reads, and what people look at.

mod bounded;
mod debug;
mod guard;
mod level;
mod pprof;

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::extract::connect_info::Connected;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::IncomingStream;
use tokio_util::sync::CancellationToken;

use bounded::BoundedListener;

use crate::ebpf::Watch;
use crate::metrics::{self, Figures, Format};

pub use debug::{Examination, Examined, Parts, Verdict};
pub use level::{LEVEL_PATH, LogControl};
pub use pprof::PROFILE_PATH;

/// Where a process on the same node reads what is known of peers, as JSON.
pub const PEERS_PATH: &str = "/debug/peers";

/// The side port, open and not yet served.
#[derive(Debug)]
pub struct Web {
    listener: tokio::net::TcpListener,
    router: Router,
}

impl Web {
    /// Takes over a listener. `debug` is what the pages for people are made of; without it there are none, and no profiles. They end with `stop`.
    ///
    /// # Errors
    /// The runtime does not accept it.
    pub fn new(
        listener: std::net::TcpListener,
        figures: Figures,
        watch: Watch,
        log: Arc<dyn LogControl>,
        debug: Option<Parts>,
        stop: CancellationToken,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let level = level::routes(log).layer(from_fn(guard::same_node));
        Ok(Self { listener, router: router(figures, watch, debug, stop).merge(level) })
    }

    /// Serves until `stop`; requests under way are finished.
    pub async fn serve(self, stop: CancellationToken) {
        let listener = BoundedListener::new(self.listener);
        let served = axum::serve(listener, self.router.into_make_service_with_connect_info::<Ends>())
            .with_graceful_shutdown(stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::warn!(%error, "the side port ended");
        }
    }
}

/// Scrapers may come from anywhere, all else is for this node.
fn router(figures: Figures, watch: Watch, debug: Option<Parts>, stop: CancellationToken) -> Router {
    let mut inside = Router::new().route(PEERS_PATH, get(peers)).with_state(watch);
    if let Some(parts) = debug {
        inside = inside.merge(pprof::routes(parts.memory_left)).merge(debug::router(parts, stop));
    }
    let inside = inside.layer(from_fn(guard::same_node));
    Router::new().route("/metrics", get(scrape)).with_state(Arc::new(figures)).merge(inside)
}

async fn scrape(State(figures): State<Arc<Figures>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let format = Format::of_accept(accept);
    match metrics::encode(&figures, format) {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn peers(State(watch): State<Watch>) -> Response {
    json(&watch.report())
}

fn json(value: &impl serde::Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(json) => ([(header::CONTENT_TYPE, "application/json")], json).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// The addresses of a connection.
#[derive(Clone, Copy, Debug)]
struct Ends {
    local: IpAddr,
    remote: IpAddr,
}

impl Connected<IncomingStream<'_, BoundedListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, BoundedListener>) -> Self {
        let remote = stream.remote_addr().ip().to_canonical();
        // What cannot be told is not the same.
        let local =
            stream.io().get_ref().local_addr().map_or(IpAddr::from([0, 0, 0, 0]), |local| local.ip().to_canonical());
        Self { local, remote }
    }
}
