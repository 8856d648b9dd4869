//! Asking one node whether it is clean.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::kube::with_causes;

/// How long one answer may take. A clean node needs milliseconds, one whose disk is busy seconds.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The largest part of a reason that is repeated, in bytes.
const MAX_REASON: usize = 1024;

/// Asks nodes.
#[async_trait]
pub trait Probe: Send + Sync {
    /// Whether the node at `addr` is clean.
    ///
    /// # Errors
    /// What it, or the network, says instead.
    async fn probe(&self, addr: SocketAddr) -> Result<(), String>;
}

/// Asks for `/readyz` over HTTP, on a new connection each time.
#[derive(Debug)]
pub struct HttpProbe(Client<HttpConnector, Empty<Bytes>>);

// === impl HttpProbe ===

impl HttpProbe {
    /// A probe that keeps no connections.
    pub fn new() -> Self {
        Self(Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http())
    }

    async fn ask(&self, addr: SocketAddr) -> Result<(), String> {
        let request = Request::get(format!("http://{addr}/readyz")).body(Empty::new());
        let request = request.map_err(|error| error.to_string())?;
        let response = self.0.request(request).await.map_err(|error| with_causes(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let body = Limited::new(response.into_body(), MAX_REASON).collect().await;
        let body = body.map_or_else(|_| Bytes::new(), http_body_util::Collected::to_bytes);
        let reason: String = String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).collect();
        Err(format!("it answers {}: {reason}", status.as_u16()))
    }
}

impl Default for HttpProbe {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Probe for HttpProbe {
    async fn probe(&self, addr: SocketAddr) -> Result<(), String> {
        match tokio::time::timeout(TIMEOUT, self.ask(addr)).await {
            Ok(answer) => answer.map_err(|reason| format!("{addr}: {reason}")),
            Err(_) => Err(format!("{addr}: no answer within {} s", TIMEOUT.as_secs())),
        }
    }
}
