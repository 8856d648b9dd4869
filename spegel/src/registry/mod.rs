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
mod ready;
mod respond;
mod strain;
mod telling;
mod turns;
mod uploads;
mod waiting;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{Response, StatusCode, header};
use tokio::sync::watch;
use tracing::debug;

use crate::hosts::NODE_HEADER;
use crate::mirror::{COMPLAINT_HEADER, MIRRORED_HEADER, Mirror, RANK_HEADER, WAIT_HEADER};
use crate::oci::{ErrorCode, Filters, OciError, Request, TagOrDigest};
use crate::router::Readiness;
use crate::store::{Health, Outcome, Store};
use crate::storm::Rank;
use crate::story::{Stories, Tale};
use crate::zerocopy::{Body, BodyEnd};

pub use auth::BasicAuth;
pub use metrics::{ReadyCollector, RegistryMetrics};
pub use promises::Client;
pub use ready::Prompt;
pub use strain::Strain;
pub use uploads::UploadLimits;

use content::{Answer, Ask, Source};
use metrics::{ClientKind, Observed};
use promises::Promises;
use strain::{Refused, Strained};
use telling::{Telling, trace_of};

/// The response header that tells where content is from: `local`, `ready` (fetched and verified a moment ago), or the
/// address of a peer.
pub const SOURCE_HEADER: &str = "X-Spegel-Source";

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
    ready: ready::Ready,
    stories: Arc<Stories>,
    /// The router was ready once.
    joined: AtomicBool,
    /// New requests are refused.
    draining: AtomicBool,
    /// New requests are refused until it passes.
    strained: Strained,
    /// A clone for each request under way.
    flight: Arc<()>,
}

impl Registry {
    /// A registry over its parts.
    pub fn new(settings: Settings) -> Self {
        settings.mirror.look_at(&settings.store);
        Self {
            uploads: Arc::new(uploads::Uploads::new(settings.uploads)),
            audits: Arc::new(audit::Audits::new(settings.mirror.clone())),
            settings,
            chunked: chunks::Chunked::default(),
            ready: ready::Ready::default(),
            stories: Arc::default(),
            promises: Arc::default(),
            turns: Arc::default(),
            joined: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            strained: Strained::default(),
            flight: Arc::default(),
        }
    }

    /// Answers one request, that came from `remote`. A request body is not looked at.
    pub async fn handle(&self, request: &Parts, remote: IpAddr) -> Response<Body> {
        self.respond(request, remote, self.refusal()).await
    }

    /// Refuses one request, that came on a connection too many, in the way that makes containerd look elsewhere.
    pub async fn turn_away(&self, request: &Parts, remote: IpAddr) -> Response<Body> {
        self.respond(request, remote, Some(self.refusal().unwrap_or(Refused::Connections))).await
    }

    fn refusal(&self) -> Option<Refused> {
        if self.draining.load(Ordering::Relaxed) {
            return Some(Refused::Stopping);
        }
        self.strained.get().map(Refused::Strained)
    }

    async fn respond(&self, request: &Parts, remote: IpAddr, refusal: Option<Refused>) -> Response<Body> {
        match request.uri.path() {
            "/livez" => self.health(request, "livez", Ok(())),
            "/readyz" => {
                let state = refusal.map_or_else(|| self.ready(), |why| Err(why.text().to_owned()));
                self.health(request, "readyz", state)
            }
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

    /// Hears what became of what this node's containerd received: what was relayed and is stored is what its digest says.
    pub fn hear(&self, outcome: &Outcome) {
        self.settings.mirror.hear(outcome);
        if let Outcome::Stored(digest) = outcome {
            self.audits.stored(digest);
        }
    }

    /// Refuses new requests from now on, in the way that makes containerd look elsewhere; what is under way goes on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Refuses new requests, in the same way, for as long as something is about to run out; what is under way goes on.
    /// Returns what it was before.
    pub fn set_strain(&self, strain: Option<Strain>) -> Option<Strain> {
        let before = self.strained.get();
        self.strained.set(strain);
        before
    }

    /// How busy this node is with what it gives its peers, in percent of what it may or can give.
    pub fn load(&self) -> u8 {
        self.uploads.load(Instant::now())
    }

    /// What became of clients' latest requests for content.
    pub fn stories(&self) -> Arc<Stories> {
        Arc::clone(&self.stories)
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
        if let Some(why) = self.refusal() {
            return Err(why.text().to_owned());
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
    async fn refuse_all(&self, ask: &Ask, parsed: &Request, why: Refused) -> Result<Answer, OciError> {
        self.settings.metrics.refused(why.label());
        let cut = match parsed {
            Request::Blob { digest, .. } if !ask.mirrored => self.refuse(ask, digest).await,
            _ => None,
        };
        cut.ok_or_else(|| OciError::new(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unknown, why.text()))
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
        refusal: Option<Refused>,
    ) -> Response<Body> {
        let observed = self.begin(handler_name(parsed), request);
        if let Some(auth) = &self.settings.basic_auth
            && !auth.admits(request.headers.get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes))
        {
            let error = OciError::new(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, "credentials are needed");
            return finish(respond::error(&error), observed, |_| {});
        }
        let ask = self.ask(request, parsed, remote);
        let telling = Telling::of(&ask, &self.stories);
        let answer = match (refusal, parsed) {
            (Some(why), _) => self.refuse_all(&ask, parsed, why).await,
            (None, Request::Base) => Ok(Answer::local(respond::base())),
            (None, Request::Manifest { reference, .. }) => self.manifest(&ask, reference).await,
            (None, Request::Blob { digest, .. }) => self.blob(&ask, digest).await,
            (None, Request::Referrers { digest, artifact_type, .. }) => {
                self.referrers(&ask, digest, artifact_type.as_deref()).await
            }
        };
        let mut response = self.conclude(request, parsed, ask, answer, (observed, telling));
        if let Some(Refused::Strained(_)) = refusal {
            // An idle connection holds what there is too little of.
            response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        }
        response
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
        let mirrored = text(MIRRORED_HEADER).is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let trace = trace_of(&request.headers);
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
            mirrored,
            range: range.filter(|_| !is_chunk),
            client,
            remote,
            // A peer's request meets nothing: it is not passed on.
            tale: if mirrored { Tale::unheard(trace) } else { Tale::new(trace) },
            wait: text(WAIT_HEADER).and_then(|text| text.parse().ok()).map(Duration::from_millis),
            rank: text(RANK_HEADER).and_then(|text| text.parse().ok()).map(Rank),
        }
    }

    fn is_excluded(&self, parsed: &Request) -> bool {
        match parsed {
            Request::Manifest { reference: TagOrDigest::Tag(tag), .. } => self.settings.filters.excludes_tag(tag),
            _ => parsed.repository().is_some_and(|name| self.settings.filters.excludes_repository(&name)),
        }
    }

    /// Counts the answer, and tells its story once its body has ended.
    fn conclude(
        &self,
        request: &Parts,
        parsed: &Request,
        ask: Ask,
        answer: Result<Answer, OciError>,
        (observed, mut telling): (Observed, Telling),
    ) -> Response<Body> {
        let Answer { mut response, source, held } = answer.unwrap_or_else(|error| {
            let response = respond::error(&error);
            Answer { response, source: Source::Nobody, held: None }
        });
        if let (Some(ns), headers) = (&ask.registry, response.headers_mut())
            && let Ok(value) = header::HeaderValue::from_str(ns)
        {
            headers.insert("OCI-Namespace", value);
        }
        if ask.mirrored && ask.is_content {
            respond::tell_load(&mut response, self.load());
        }
        if ask.head_only {
            response = respond::bodiless(response);
        }
        if ask.is_content && !ask.mirrored {
            let kind = self.client_kind(&ask.client);
            // A range outside of a blob that is here is the client's matter.
            let hit = source != Source::Nobody;
            self.settings.metrics.mirrored(self.label_of(ask.registry.as_deref()), hit, kind);
        }
        if let Some(digest) = held {
            self.keep_ready(&request.uri, parsed, &ask, digest, &response);
        }
        let is_clients = ask.is_content && !ask.mirrored;
        let broken = (is_clients && source != Source::Nobody).then(|| self.settings.metrics.broken());
        let is_pull = is_clients && self.client_kind(&ask.client) != ClientKind::OtherNode;
        let pulled = is_pull.then(|| self.settings.metrics.pulled());
        telling.answers(response.status(), &source);
        finish(response, observed, move |end| {
            match (pulled, &source) {
                (Some(pulled), Source::Local | Source::Receiving) => pulled.add_local(end.sent),
                (Some(pulled), Source::Ready | Source::Peer(_)) => pulled.add_peer(end.sent),
                _ => {}
            }
            if let (Some(broken), true) = (broken, end.cut) {
                broken.count(matches!(source, Source::Local | Source::Receiving));
            }
            telling.ends(end);
        })
    }

    fn client_kind(&self, client: &Client) -> ClientKind {
        self.kind_of(if let Client::Node(name) = client { Some(name) } else { None })
    }

    fn kind_of(&self, node: Option<&str>) -> ClientKind {
        match (node, &self.settings.node_name) {
            (Some(name), Some(own)) if *name == **own => ClientKind::Own,
            (Some(_), Some(_)) => ClientKind::OtherNode,
            _ => ClientKind::Unknown,
        }
    }
}

fn handler_name(parsed: &Request) -> &'static str {
    match parsed {
        Request::Base => "v2",
        Request::Manifest { .. } => metrics::MANIFEST,
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

/// Follows the response's body to its end.
fn finish(
    response: Response<Body>,
    mut observed: Observed,
    then: impl FnOnce(BodyEnd) + Send + 'static,
) -> Response<Body> {
    observed.code = response.status().as_u16();
    response.map(|body| {
        body.with_end(move |end| {
            observed.sent = end.sent;
            drop(observed);
            then(end);
        })
    })
}
