//! The client.
//!
//! It is small, on hyper and the rustls that libp2p brings along: the general ones generate every type of the API for the three
//! objects that are looked at here, which would cost more code than the mirror has.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, HeaderValue, USER_AGENT};
use http::{Method, Request, StatusCode, request};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::objects::{DaemonSet, Node, Pod, PodList};

/// How long one answer of the API server may take. A list of 3,000 pods takes it a second or two.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The largest answer that is read, in bytes: 3,000 pods are about 25 MB.
const MAX_ANSWER: usize = 64 << 20;

/// The [well-known label](https://kubernetes.io/docs/reference/labels-annotations-taints/#topologykubernetesiozone) of nodes.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What may stand in a path segment or a query's value as it is.
const PLAIN: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Where the API server is, and who asks.
#[derive(Clone, Debug)]
pub struct ApiSettings {
    /// Its host name or address; an IPv6 address without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The directory with `ca.crt` and `token`, as a pod's service account has it.
    pub service_account: PathBuf,
}

/// A client of the Kubernetes API.
#[derive(Debug)]
pub struct Api {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    authority: String,
    token: PathBuf,
}

/// Why the API could not be asked, or did not say.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The service account's files are not there.
    #[error("cannot read {path}: {source}; is a service account's token mounted here?")]
    ServiceAccount {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The certificate authority's file is none.
    #[error("{path} does not hold the certificates of the API server's authority: {reason}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The server cannot be reached, or is too slow.
    #[error("the API server does not answer {request}: {reason}")]
    NoAnswer {
        /// Its method and path.
        request: String,
        /// What happened instead.
        reason: String,
    },
    /// The server refuses.
    #[error("the API server answers {request} with {status}: {message}")]
    Refused {
        /// Its method and path.
        request: String,
        /// Its status.
        status: StatusCode,
        /// Its reason.
        message: String,
    },
    /// The answer is not of the form that the API promises.
    #[error("the API server's answer to {request} is not understood: {reason}")]
    Answer {
        /// Its method and path.
        request: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// An answer, and when the server gave it.
struct Answer {
    body: Bytes,
    date: Option<Timestamp>,
}

/// What the API says with an error status.
#[derive(Debug, Deserialize)]
struct Status {
    message: String,
}

// === impl Api ===

impl Api {
    /// A client that trusts the service account's authority only.
    ///
    /// # Errors
    /// The service account's files cannot be read or are not certificates.
    pub fn new(settings: &ApiSettings) -> Result<Self, ApiError> {
        let roots = authority(&settings.service_account.join("ca.crt"))?;
        let token = settings.service_account.join("token");
        read_token(&token)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ApiError::Authority {
                path: settings.service_account.join("ca.crt"),
                reason: error.to_string(),
            })?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http1().build();
        let host = &settings.host;
        let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(2).build(connector);
        Ok(Self { client, authority: format!("{host}:{}", settings.port), token })
    }

    pub(crate) async fn daemon_set(&self, namespace: &str, name: &str) -> Result<DaemonSet, ApiError> {
        self.get(&path_of_daemon_set(namespace, name)).await
    }

    /// How long ago a DaemonSet was made, by the API server's own clock; nothing where it does not tell the time.
    pub(crate) async fn age_of_daemon_set(&self, namespace: &str, name: &str) -> Result<Option<Duration>, ApiError> {
        let path = path_of_daemon_set(namespace, name);
        let Answer { body, date } = self.ask(Request::get(self.url(&path)), Bytes::new()).await?;
        let set: DaemonSet = read(&path, &body)?;
        let made = set.metadata.creation_timestamp.and_then(|made| made.parse::<Timestamp>().ok());
        Ok(date.zip(made).map(|(now, made)| now.duration_since(made).try_into().unwrap_or_default()))
    }

    /// From the server's watch cache (`resourceVersion=0`), which spares etcd; it may lag by a moment.
    pub(crate) async fn pods(&self, namespace: &str, selector: &str) -> Result<Vec<Pod>, ApiError> {
        let (namespace, selector) = (plain(namespace), plain(selector));
        let path = format!("/api/v1/namespaces/{namespace}/pods?resourceVersion=0&labelSelector={selector}");
        Ok(self.get::<PodList>(&path).await?.items)
    }

    /// The zone that a node's label names; nothing where it has none.
    ///
    /// # Errors
    /// The API cannot be asked, or says no.
    pub async fn zone_of(&self, node: &str) -> Result<Option<String>, ApiError> {
        Ok(self.node(node).await?.metadata.labels.remove(ZONE).filter(|zone| !zone.is_empty()))
    }

    pub(super) async fn node(&self, name: &str) -> Result<Node, ApiError> {
        self.get(&format!("/api/v1/nodes/{}", plain(name))).await
    }

    /// Changes a node with a JSON patch ([RFC 6902](https://www.rfc-editor.org/rfc/rfc6902)). What the patch tests and finds
    /// otherwise is refused with status 422.
    pub(super) async fn patch_node(&self, name: &str, patch: &serde_json::Value) -> Result<(), ApiError> {
        let request = Request::patch(format!("https://{}/api/v1/nodes/{}", self.authority, plain(name)))
            .header(CONTENT_TYPE, "application/json-patch+json");
        self.ask(request, Bytes::from(patch.to_string())).await.map(|_| ())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        read(path, &self.ask(Request::get(self.url(path)), Bytes::new()).await?.body)
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.authority)
    }

    async fn ask(&self, request: request::Builder, body: Bytes) -> Result<Answer, ApiError> {
        // Read each time: the kubelet replaces it before it expires.
        let request = request
            .header(AUTHORIZATION, read_token(&self.token)?)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("spegel/", env!("CARGO_PKG_VERSION")));
        let (method, uri) = (request.method_ref().unwrap_or(&Method::GET), request.uri_ref());
        let path = uri.and_then(http::Uri::path_and_query).map_or("/", http::uri::PathAndQuery::as_str);
        let told = format!("{method} {path}");
        let unanswered = |reason: String| ApiError::NoAnswer { request: told.clone(), reason };
        let request = request.body(Full::new(body)).map_err(|error| unanswered(error.to_string()))?;
        let (status, answer) = tokio::time::timeout(TIMEOUT, self.exchange(request))
            .await
            .map_err(|_| unanswered(format!("nothing within {} s", TIMEOUT.as_secs())))?
            .map_err(unanswered)?;
        if status == StatusCode::OK {
            return Ok(answer);
        }
        let message = serde_json::from_slice::<Status>(&answer.body).map(|status| status.message).unwrap_or_default();
        Err(ApiError::Refused { request: told, status, message })
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Answer), String> {
        let response = self.client.request(request).await.map_err(|error| with_causes(&error))?;
        let status = response.status();
        let date = response.headers().get(DATE).and_then(|date| rfc2822::parse(date.to_str().ok()?).ok());
        let date = date.map(|date| date.timestamp());
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| with_causes(&*error))?.to_bytes();
        Ok((status, Answer { body, date }))
    }
}

fn path_of_daemon_set(namespace: &str, name: &str) -> String {
    format!("/apis/apps/v1/namespaces/{}/daemonsets/{}", plain(namespace), plain(name))
}

fn read<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::Answer { request: format!("GET {path}"), reason: error.to_string() })
}

fn plain(text: &str) -> String {
    utf8_percent_encode(text, &PLAIN).to_string()
}

fn authority(path: &Path) -> Result<rustls::RootCertStore, ApiError> {
    let wrong = |reason: String| ApiError::Authority { path: path.to_owned(), reason };
    let pem = fs::read(path).map_err(|source| ApiError::ServiceAccount { path: path.to_owned(), source })?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
    }
    if roots.is_empty() { Err(wrong("there is no certificate in it".to_owned())) } else { Ok(roots) }
}

fn read_token(path: &Path) -> Result<HeaderValue, ApiError> {
    let unreadable = |source| ApiError::ServiceAccount { path: path.to_owned(), source };
    let token = fs::read_to_string(path).map_err(unreadable)?;
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.trim()))
        .map_err(|_| unreadable(io::Error::new(io::ErrorKind::InvalidData, "it is no token")))?;
    value.set_sensitive(true);
    Ok(value)
}

/// An error with what caused it, which HTTP clients leave out of their own text.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
