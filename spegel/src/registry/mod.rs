//! The distribution API: a request in, a response out. Touches no socket.
//!
//! The paths are those of the [OCI distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#endpoints)
//! that read; what writes is refused. How a refusal is said follows what containerd makes of it, see `promises`.

mod audit;
mod auth;
mod chunks;
mod content;
mod metrics;
mod promises;
mod respond;
mod turns;
mod uploads;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{Response, StatusCode, header};
use tokio::sync::watch;
use tracing::{debug, info};

use crate::hosts::NODE_HEADER;
use crate::mirror::{COMPLAINT_HEADER, MIRRORED_HEADER, Mirror, WAIT_HEADER};
use crate::oci::{ErrorCode, Filters, Key, OciError, Request, TagOrDigest};
use crate::router::Readiness;
use crate::store::{Health, Store};
use crate::zerocopy::{Body, BodyEnd};

pub use auth::BasicAuth;
pub use metrics::RegistryMetrics;
pub use promises::Client;
pub use uploads::UploadLimits;

use content::{Answer, Ask, Source};
use metrics::Observed;
use promises::Promises;

/// The response header that tells where content is from: `local`, `ready` (fetched and verified a moment ago), or the
/// address of a peer.
pub const SOURCE_HEADER: &str = "X-Spegel-Source";

/// How this node's own containerd is told in the figures of clients.
const OWN: &str = "own";

/// What a registry is built from.
#[derive(Debug)]
pub struct Settings {
    /// What this node has.
    pub store: Arc<dyn Store>,
    /// What others have.
    pub mirror: Mirror,
    /// How this node stands among its peers.
    pub readiness: watch::Receiver<Readiness>,
    /// What is not mirrored.
    pub filters: Filters,
    /// Who may ask; anyone if not set.
    pub basic_auth: Option<BasicAuth>,
    /// This node's name, to tell its own containerd's requests from others'.
    pub node_name: Option<String>,
    /// How much is given to peers.
    pub uploads: UploadLimits,
    /// Where requests are counted.
    pub metrics: RegistryMetrics,
}

/// Answers the requests of this node's containerd and of peers.
#[derive(Debug)]
pub struct Registry {
    settings: Settings,
    promises: Arc<Promises>,
    turns: Arc<turns::Turns>,
    uploads: Arc<uploads::Uploads>,
    audits: Arc<audit::Audits>,
    chunked: chunks::Chunked,
    /// The router was ready once.
    joined: AtomicBool,
    /// New requests are refused.
    draining: AtomicBool,
    /// A clone for each request under way.
    flight: Arc<()>,
}

impl Registry {
    /// A registry over its parts.
    pub fn new(settings: Settings) -> Self {
        Self {
            uploads: Arc::new(uploads::Uploads::new(settings.uploads)),
            audits: Arc::new(audit::Audits::new(settings.mirror.clone())),
            settings,
            chunked: chunks::Chunked::default(),
            promises: Arc::default(),
            turns: Arc::default(),
            joined: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            flight: Arc::default(),
        }
    }

    /// Answers one request, that came from `remote`. A request body is not looked at.
    pub async fn handle(&self, request: &Parts, remote: IpAddr) -> Response<Body> {
        let refusal = self.draining.load(Ordering::Relaxed).then_some("this node is stopping");
        self.respond(request, remote, refusal).await
    }

    /// Refuses one request, that came on a connection too many, in the way that makes containerd look elsewhere.
    pub async fn turn_away(&self, request: &Parts, remote: IpAddr) -> Response<Body> {
        self.respond(request, remote, Some("this node has as many connections as it may")).await
    }

    async fn respond(&self, request: &Parts, remote: IpAddr, refusal: Option<&'static str>) -> Response<Body> {
        match request.uri.path() {
            "/livez" => self.health(request, "livez", Ok(())),
            "/readyz" => self.health(request, "readyz", self.ready()),
            path => match Request::parse(&request.method, path, request.uri.query()) {
                Ok(parsed) => self.distribution(request, &parsed, remote, refusal).await,
                Err(error) => {
                    let observed = self.begin("invalid", request);
                    debug!(%remote, path, %error, "refused");
                    finish(respond::error(&error), observed, |_| {})
                }
            },
        }
    }

    /// Hears what this node's store has from now on: content that was relayed and is stored is what its digest says.
    pub fn stored(&self, keys: &[Key]) {
        self.settings.mirror.confirmed(keys);
        self.audits.stored(keys);
    }

    /// Refuses new requests from now on, in the way that makes containerd look elsewhere; what is under way goes on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// How much of what may be given to peers at once is in use, in percent; 0 where that is not bounded.
    pub fn upload_load(&self) -> u8 {
        self.uploads.load(Instant::now())
    }

    /// Requests whose responses have not ended.
    pub fn in_flight(&self) -> usize {
        Arc::strong_count(&self.flight) - 1
    }

    /// Whether requests should be sent here, as `/readyz` says.
    ///
    /// # Errors
    /// What it waits for.
    pub fn ready(&self) -> Result<(), String> {
        if self.draining.load(Ordering::Relaxed) {
            return Err("it is stopping".to_owned());
        }
        if let Health::Waiting(what) = &*self.settings.store.health().borrow() {
            return Err(what.clone());
        }
        // Once joined stays joined: a node that has lost its peers still serves its own content.
        if self.settings.readiness.borrow().is_ready() {
            self.joined.store(true, Ordering::Relaxed);
        }
        if self.joined.load(Ordering::Relaxed) { Ok(()) } else { Err("no peer has answered yet".to_owned()) }
    }

    fn begin(&self, handler: &'static str, request: &Parts) -> Observed {
        self.settings.metrics.begin(handler, &request.method, &self.flight)
    }

    /// What a node says that is stopping or has too much to do: containerd goes upstream on a 503, but not where it was given a part of that blob.
    async fn refuse_all(&self, ask: &Ask, parsed: &Request, why: &'static str) -> Result<Answer, OciError> {
        let cut = match parsed {
            Request::Blob { digest, .. } if !ask.mirrored => self.refuse(ask, digest).await,
            _ => None,
        };
        cut.ok_or_else(|| OciError::new(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unknown, why))
    }

    fn health(&self, request: &Parts, handler: &'static str, state: Result<(), String>) -> Response<Body> {
        let observed = self.begin(handler, request);
        let response = match state {
            Ok(()) => respond::text(StatusCode::OK, "ok\n"),
            Err(why) => respond::text(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready: {why}\n")),
        };
        finish(respond::without_body_for_head(request, response), observed, |_| {})
    }

    async fn distribution(
        &self,
        request: &Parts,
        parsed: &Request,
        remote: IpAddr,
        refusal: Option<&'static str>,
    ) -> Response<Body> {
        let observed = self.begin(handler_name(parsed), request);
        if let Some(auth) = &self.settings.basic_auth
            && !auth.admits(request.headers.get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes))
        {
            let error = OciError::new(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, "credentials are needed");
            return finish(respond::error(&error), observed, |_| {});
        }
        let ask = self.ask(request, parsed, remote);
        let answer = match (refusal, parsed) {
            (Some(why), _) => self.refuse_all(&ask, parsed, why).await,
            (None, Request::Base) => Ok(Answer::local(respond::base())),
            (None, Request::Manifest { reference, .. }) => self.manifest(&ask, reference).await,
            (None, Request::Blob { digest, .. }) => self.blob(&ask, digest).await,
            (None, Request::Referrers { digest, artifact_type, .. }) => {
                self.referrers(&ask, digest, artifact_type.as_deref()).await
            }
        };
        self.conclude(ask, answer, observed)
    }

    /// What the request says beside its path.
    fn ask(&self, request: &Parts, parsed: &Request, remote: IpAddr) -> Ask {
        let text = |name: &str| request.headers.get(name).and_then(|value| value.to_str().ok());
        let client = match text(NODE_HEADER).filter(|name| !name.is_empty() && name.len() <= 253) {
            Some(name) => Client::Node(name.into()),
            None => Client::Address(remote),
        };
        let range = text("range").and_then(crate::oci::RangeSpec::parse);
        let is_chunk = self.chunked.is_chunk(&client, text("user-agent"), range, Instant::now());
        Ask {
            is_chunk,
            excluded: self.is_excluded(parsed),
            is_content: matches!(parsed, Request::Manifest { .. } | Request::Blob { .. }),
            head_only: request.method == http::Method::HEAD,
            target: peer_target(parsed, request.uri.path()),
            repository: parsed.repository(),
            registry: parsed.ns().map(str::to_owned),
            path: request.uri.path().to_owned(),
            complains: text(COMPLAINT_HEADER).is_some(),
            mirrored: text(MIRRORED_HEADER).is_some_and(|value| value.eq_ignore_ascii_case("true")),
            range: range.filter(|_| !is_chunk),
            client,
            remote,
            wait: text(WAIT_HEADER).and_then(|text| text.parse().ok()).map(Duration::from_millis),
        }
    }

    fn is_excluded(&self, parsed: &Request) -> bool {
        match parsed {
            Request::Manifest { reference: TagOrDigest::Tag(tag), .. } => self.settings.filters.excludes_tag(tag),
            _ => parsed.repository().is_some_and(|name| self.settings.filters.excludes_repository(&name)),
        }
    }

    /// Counts the answer, and tells its story once its body has ended.
    fn conclude(&self, ask: Ask, answer: Result<Answer, OciError>, observed: Observed) -> Response<Body> {
        let (mut response, source) = match answer {
            Ok(answer) => (answer.response, answer.source),
            Err(error) => (respond::error(&error), Source::Nobody),
        };
        if let (Some(ns), headers) = (&ask.registry, response.headers_mut())
            && let Ok(value) = header::HeaderValue::from_str(ns)
        {
            headers.insert("OCI-Namespace", value);
        }
        if ask.head_only {
            response = respond::bodiless(response);
        }
        let status = response.status();
        if ask.is_content && !ask.mirrored {
            let kind = self.client_kind(&ask.client);
            // A range outside of a blob that is here is the client's matter.
            let hit = source != Source::Nobody;
            self.settings.metrics.mirrored(ask.registry.as_deref().unwrap_or("unknown"), hit, kind);
        }
        finish(response, observed, move |end| tell(&ask, &source, status, end))
    }

    fn client_kind(&self, client: &Client) -> &'static str {
        match (client, &self.settings.node_name) {
            (Client::Node(name), Some(own)) if **name == **own => OWN,
            (Client::Node(_), Some(_)) => "other_node",
            _ => "unknown",
        }
    }
}

fn handler_name(parsed: &Request) -> &'static str {
    match parsed {
        Request::Base => "v2",
        Request::Manifest { .. } => "manifest",
        Request::Blob { .. } => "blob",
        Request::Referrers { .. } => "referrers",
    }
}

/// The same path for a peer, with nothing of the query but the upstream's name.
fn peer_target(parsed: &Request, path: &str) -> String {
    match parsed.ns() {
        Some(ns) => {
            let ns = percent_encoding::utf8_percent_encode(ns, percent_encoding::NON_ALPHANUMERIC);
            format!("{path}?ns={ns}")
        }
        None => path.to_owned(),
    }
}

/// How a body ended, beside what was counted of its request.
struct Ended {
    end: BodyEnd,
    elapsed: Duration,
}

/// Follows the response's body to its end.
fn finish(
    response: Response<Body>,
    mut observed: Observed,
    then: impl FnOnce(Ended) + Send + 'static,
) -> Response<Body> {
    observed.code = response.status().as_u16();
    response.map(|body| {
        body.with_end(move |end| {
            observed.sent = end.sent;
            then(Ended { elapsed: observed.elapsed(), end });
        })
    })
}

/// One line for each piece of content that a client asked for. Requests of peers are part of another node's line.
fn tell(ask: &Ask, source: &Source, status: StatusCode, ended: Ended) {
    let (bytes, whole, ms) = (ended.end.sent, ended.end.complete, ended.elapsed.as_secs_f64() * 1e3);
    let method = if ask.head_only { "HEAD" } else { "GET" };
    let (path, registry, client) = (&ask.path, ask.registry.as_deref().unwrap_or("-"), &ask.client);
    let status = status.as_u16();
    if ask.mirrored || !ask.is_content {
        debug!(method, path, registry, %client, %source, status, bytes, whole, ms, "answered");
    } else {
        info!(method, path, registry, %client, %source, status, bytes, whole, ms, "pull");
    }
}
