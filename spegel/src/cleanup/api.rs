//! The few questions to the Kubernetes API, with the rights of the pod's service account.
//!
//! A small client on hyper and the rustls that libp2p brings along: the general ones generate every type of the API for the
//! two objects that are looked at here, which would cost more code than the mirror has.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, HeaderValue, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::probe::with_causes;

/// How long one answer of the API server may take. A list of 3,000 pods takes it a second or two.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The largest answer that is read, in bytes: 3,000 pods are about 25 MB.
const MAX_ANSWER: usize = 64 << 20;

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
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
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
    #[error("the API server does not answer GET {path}: {reason}")]
    NoAnswer {
        /// What was asked.
        path: String,
        /// What happened instead.
        reason: String,
    },
    /// The server refuses.
    #[error("the API server answers GET {path} with {status}: {message}")]
    Refused {
        /// What was asked.
        path: String,
        /// Its status.
        status: StatusCode,
        /// Its reason.
        message: String,
    },
    /// The answer is not of the form that the API promises.
    #[error("the API server's answer to GET {path} is not understood: {reason}")]
    Answer {
        /// What was asked.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A DaemonSet, as far as it is looked at (`apps/v1`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DaemonSet {
    pub(super) metadata: Metadata,
    pub(super) spec: DaemonSetSpec,
    #[serde(default)]
    pub(super) status: DaemonSetStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: String,
    #[serde(default)]
    pub(super) generation: i64,
    pub(super) deletion_timestamp: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct DaemonSetSpec {
    pub(super) selector: Selector,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Selector {
    pub(super) match_labels: std::collections::BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DaemonSetStatus {
    #[serde(default)]
    pub(super) observed_generation: i64,
    #[serde(default)]
    pub(super) desired_number_scheduled: usize,
}

#[derive(Debug, Deserialize)]
struct PodList {
    items: Vec<Pod>,
}

/// A Pod, as far as it is looked at (`v1`).
#[derive(Debug, Deserialize)]
pub(super) struct Pod {
    pub(super) metadata: Metadata,
    pub(super) spec: PodSpec,
    #[serde(default)]
    pub(super) status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub(super) node_name: Option<String>,
    pub(super) affinity: Option<serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    #[serde(default)]
    pub(super) phase: String,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: Option<String>,
    #[serde(default)]
    pub(super) init_container_statuses: Vec<ContainerStatus>,
    #[serde(default)]
    pub(super) container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ContainerStatus {
    #[serde(default)]
    pub(super) state: ContainerState,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct ContainerState {
    pub(super) waiting: Option<Waiting>,
    pub(super) terminated: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Waiting {
    pub(super) reason: Option<String>,
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

    pub(super) async fn daemon_set(&self, namespace: &str, name: &str) -> Result<DaemonSet, ApiError> {
        self.get(&format!("/apis/apps/v1/namespaces/{}/daemonsets/{}", plain(namespace), plain(name))).await
    }

    /// From the server's watch cache (`resourceVersion=0`), which spares etcd; it may lag by a moment.
    pub(super) async fn pods(&self, namespace: &str, selector: &str) -> Result<Vec<Pod>, ApiError> {
        let (namespace, selector) = (plain(namespace), plain(selector));
        let path = format!("/api/v1/namespaces/{namespace}/pods?resourceVersion=0&labelSelector={selector}");
        Ok(self.get::<PodList>(&path).await?.items)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        let unanswered = |reason: String| ApiError::NoAnswer { path: path.to_owned(), reason };
        let (status, body) = tokio::time::timeout(TIMEOUT, self.fetch(path))
            .await
            .map_err(|_| unanswered(format!("nothing within {} s", TIMEOUT.as_secs())))??;
        if status != StatusCode::OK {
            let message = serde_json::from_slice::<Status>(&body).map(|status| status.message).unwrap_or_default();
            return Err(ApiError::Refused { path: path.to_owned(), status, message });
        }
        serde_json::from_slice(&body)
            .map_err(|error| ApiError::Answer { path: path.to_owned(), reason: error.to_string() })
    }

    async fn fetch(&self, path: &str) -> Result<(StatusCode, Bytes), ApiError> {
        let unanswered = |reason: String| ApiError::NoAnswer { path: path.to_owned(), reason };
        // Read each time: the kubelet replaces it before it expires.
        let authorization = read_token(&self.token)?;
        let request = Request::get(format!("https://{}{path}", self.authority))
            .header(AUTHORIZATION, authorization)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("spegel/", env!("CARGO_PKG_VERSION")))
            .body(Empty::new())
            .map_err(|error| unanswered(error.to_string()))?;
        let response = self.client.request(request).await.map_err(|error| unanswered(with_causes(&error)))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(|error| unanswered(with_causes(&*error)))?.to_bytes()))
    }
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
