//! The side port: what a scraper reads.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::metrics::{self, Format};

/// The side port, open and not yet served.
#[derive(Debug)]
pub struct Web {
    listener: tokio::net::TcpListener,
    router: Router,
}

impl Web {
    /// Takes over a listener.
    ///
    /// # Errors
    /// The runtime does not accept it.
    pub fn new(listener: std::net::TcpListener, registry: Registry) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let router = Router::new().route("/metrics", get(scrape)).with_state(Arc::new(registry));
        Ok(Self { listener, router })
    }

    /// Serves until `stop`; requests under way are finished.
    pub async fn serve(self, stop: CancellationToken) {
        let served = axum::serve(self.listener, self.router).with_graceful_shutdown(stop.cancelled_owned()).await;
        if let Err(error) = served {
            tracing::warn!(%error, "the side port ended");
        }
    }
}

async fn scrape(State(registry): State<Arc<Registry>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let format = Format::of_accept(accept);
    match metrics::encode(&registry, format) {
        Ok(text) => ([(header::CONTENT_TYPE, format.content_type())], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
