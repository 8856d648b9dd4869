//! Peers behind a URL, and the endpoint behind such a URL.

use std::convert::Infallible;
use std::fmt;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::certificates::{CertificateError, Certificates};
use super::{Bootstrap, BootstrapError, BootstrapPeer, list};

/// How long one answer may take, the connection included.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long connecting may take, shared by the addresses that the name has: one that swallows all leaves time for the next.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// The largest list that is read, in bytes.
const MAX_ANSWER: usize = 256 * 1024;

/// How many clients are served at once, and how long one may take.
const MAX_CLIENTS: usize = 64;
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);

/// The path under which the endpoint serves.
const PATH: &str = "/id";

/// A URL that does not name an HTTP endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a URL such as http://bootstrap.test:5002/id")]
pub struct ParseUrlError(String);

/// The peers that a URL names.
#[derive(Clone, Debug)]
pub struct HttpBootstrap {
    url: Uri,
    certificates: Option<Certificates>,
}

// === impl HttpBootstrap ===

impl HttpBootstrap {
    /// A source that asks `url`, with the certificates of the directory if the URL is an https one.
    ///
    /// # Errors
    /// The URL is none of http or https.
    pub fn new(url: &str, certificates: Option<Certificates>) -> Result<Self, ParseUrlError> {
        let wrong = || ParseUrlError(crate::oci::without_userinfo(url));
        let parsed: Uri = url.parse().map_err(|_| wrong())?;
        let known = matches!(parsed.scheme_str(), Some("http" | "https")) && parsed.host().is_some();
        if known { Ok(Self { url: parsed, certificates }) } else { Err(wrong()) }
    }

    async fn fetch(&self) -> Result<Bytes, String> {
        let tls = Certificates::client(self.certificates.as_ref()).map_err(|error| error.to_string())?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let connector =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(tcp);
        // Seldom asked and perhaps behind a balancer: no connection is kept.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        let request = Request::get(&self.url).header(header::ACCEPT, "application/json").body(Empty::<Bytes>::new());
        let response = client.request(request.map_err(|error| error.to_string())?).await;
        let response = response.map_err(|error| with_causes(&error))?;
        if response.status() != StatusCode::OK {
            return Err(format!("the answer is {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok(body.map_err(|error| error.to_string())?.to_bytes())
    }
}

/// The URL without a password or a token: it stands in log lines.
fn without_secrets(url: &Uri) -> String {
    let (scheme, host) = (url.scheme_str().unwrap_or_default(), url.host().unwrap_or_default());
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{}", url.path())
}

#[async_trait]
impl Bootstrap for HttpBootstrap {
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        let name = || without_secrets(&self.url);
        let fetched = timeout(TIMEOUT, self.fetch())
            .await
            .map_err(|_| BootstrapError::Timeout { name: name(), seconds: TIMEOUT.as_secs() })?;
        let bytes = fetched.map_err(|reason| BootstrapError::Answer { name: name(), reason })?;
        list::decode(&bytes).map_err(|error| BootstrapError::Answer { name: name(), reason: error.to_string() })
    }
}

/// Serves this node, and peers that it knows, under `/id`.
pub struct HttpEndpoint {
    listener: tokio::net::TcpListener,
    certificates: Option<Certificates>,
    peers: Arc<dyn Fn() -> Vec<BootstrapPeer> + Send + Sync>,
}

// === impl HttpEndpoint ===

impl HttpEndpoint {
    /// Takes over a listener. `peers` is asked for each answer; this node comes first in it.
    ///
    /// # Errors
    /// The certificates cannot be used, or the runtime does not accept the listener.
    pub fn new(
        listener: TcpListener,
        certificates: Option<Certificates>,
        peers: Arc<dyn Fn() -> Vec<BootstrapPeer> + Send + Sync>,
    ) -> Result<Self, HttpEndpointError> {
        if let Some(certificates) = &certificates {
            certificates.server()?;
        }
        listener.set_nonblocking(true)?;
        Ok(Self { listener: tokio::net::TcpListener::from_std(listener)?, certificates, peers })
    }

    /// Serves until `stop`.
    pub async fn serve(self, stop: CancellationToken) {
        let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                // Out of descriptors, mostly: it passes.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Ok(permit) = clients.clone().try_acquire_owned() else { continue };
            let (certificates, peers) = (self.certificates.clone(), self.peers.clone());
            tokio::spawn(async move {
                let served = timeout(CLIENT_TIMEOUT, serve_client(stream, certificates, peers)).await;
                if let Ok(Err(error)) = served {
                    tracing::debug!(error, "bootstrap client");
                }
                drop(permit);
            });
        }
    }
}

impl fmt::Debug for HttpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpEndpoint").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// Why the endpoint does not serve.
#[derive(Debug, thiserror::Error)]
pub enum HttpEndpointError {
    /// The certificates.
    #[error("the bootstrap endpoint's certificates: {0}")]
    Certificates(#[from] CertificateError),
    /// The listener.
    #[error("the bootstrap endpoint's listener: {0}")]
    Listener(#[from] std::io::Error),
}

type Peers = Arc<dyn Fn() -> Vec<BootstrapPeer> + Send + Sync>;

async fn serve_client(stream: TcpStream, certificates: Option<Certificates>, peers: Peers) -> Result<(), String> {
    let tls = certificates.map(|certificates| certificates.server()).transpose().map_err(|error| {
        tracing::warn!(%error, "the bootstrap endpoint's certificates cannot be used any more");
        error.to_string()
    })?;
    match tls.flatten() {
        Some(config) => {
            let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await;
            answer(stream.map_err(|error| error.to_string())?, peers).await
        }
        None => answer(stream, peers).await,
    }
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, peers: Peers) -> Result<(), String> {
    let service = hyper::service::service_fn(|request: Request<Incoming>| {
        let response = respond(&request, &peers);
        async move { Ok::<_, Infallible>(response) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).keep_alive(false);
    http.serve_connection(TokioIo::new(stream), service).await.map_err(|error| error.to_string())
}

fn respond(request: &Request<Incoming>, peers: &Peers) -> Response<Full<Bytes>> {
    let plain = |status| {
        let mut response = Response::new(Full::default());
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, PATH) => {
            let mut response = Response::new(Full::from(list::encode(&peers())));
            response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
            response
        }
        (_, PATH) => plain(StatusCode::METHOD_NOT_ALLOWED),
        _ => plain(StatusCode::NOT_FOUND),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
