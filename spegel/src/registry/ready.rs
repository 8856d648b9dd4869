//! Small manifests that were answered a moment ago, with all that their answer consists of. Asked for again in the same words they
//! are answered without a future, a map of headers, or a label looked up.

use std::collections::HashMap;
use std::fmt;
use std::io::Write as _;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use bytes::Bytes;
use foldhash::quality::RandomState;
use http::{Response, StatusCode, Uri};
use prometheus_client::metrics::counter::Counter;

use super::content::Ask;
use super::metrics::Resolved;
use super::telling::{Telling, begin, is_logged};
use super::{Registry, respond};
use crate::hosts::NODE_HEADER;
use crate::mirror::{COMPLAINT_HEADER, MIRRORED_HEADER, WAIT_HEADER};
use crate::oci::{Digest, Repository, Request, TagOrDigest};
use crate::story::{Source, TRACE_HEADER, Told, Trace};
use crate::zerocopy::{Body, BodyEnd};

/// Answers kept: who asks in ever new words gets each of them made anew.
const CAPACITY: usize = 512;

/// The longest target that is kept, in bytes.
const LONGEST: usize = 1024;

/// An answer from memory, with status 200.
pub struct Prompt {
    /// Status line and headers, each with its line end, without the date and the empty line.
    pub head: Bytes,
    /// The body; none for HEAD.
    pub body: Bytes,
    /// To be told how much of the body was sent.
    pub end: Box<dyn FnOnce(BodyEnd) + Send>,
}

impl fmt::Debug for Prompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prompt").field("head", &self.head).field("body", &self.body.len()).finish_non_exhaustive()
    }
}

/// The answers that stand ready, by the request's target.
#[derive(Debug, Default)]
pub(super) struct Ready {
    answers: RwLock<HashMap<Box<str>, Arc<Answer>, RandomState>>,
}

/// What an answer consists of beside its bytes, which are asked of the store each time.
#[derive(Debug)]
struct Answer {
    reference: TagOrDigest,
    repository: Option<Repository>,
    digest: Digest,
    head: Bytes,
    path: String,
    registry: Option<String>,
    hits: Counter,
}

/// What the headers of a request say, if that is no more than who asks.
#[derive(Default)]
struct Said<'a> {
    node: Option<&'a str>,
    mirrored: Option<bool>,
    authorization: Option<&'a [u8]>,
    trace: Option<&'a [u8]>,
}

// === impl Said ===

impl<'a> Said<'a> {
    /// Nothing for a request that wants more than what stands ready.
    fn read(headers: impl Iterator<Item = (&'a str, &'a [u8])>) -> Option<Self> {
        let mut said = Self::default();
        for (name, value) in headers {
            let is = |known: &str| name.eq_ignore_ascii_case(known);
            if is(NODE_HEADER) {
                // As of an `http::HeaderMap`, the first counts.
                if said.node.is_none() {
                    said.node =
                        Some(std::str::from_utf8(value).ok().filter(|text| !text.is_empty() && text.len() <= 253)?);
                }
            } else if is(MIRRORED_HEADER) {
                said.mirrored = said.mirrored.or(Some(value.eq_ignore_ascii_case(b"true")));
            } else if is("authorization") {
                said.authorization = said.authorization.or(Some(value));
            } else if is(TRACE_HEADER) {
                // Two of them are as none.
                said.trace = Some(if said.trace.is_none() { value } else { b"" });
            } else if is("range") || is(COMPLAINT_HEADER) || is(WAIT_HEADER) {
                return None;
            }
        }
        Some(said)
    }
}

// === impl Ready ===

impl Ready {
    fn get(&self, target: &str) -> Option<Arc<Answer>> {
        self.answers.read().unwrap_or_else(PoisonError::into_inner).get(target).cloned()
    }

    fn keep(&self, target: &str, answer: Answer) {
        let mut answers = self.answers.write().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= CAPACITY && !answers.contains_key(target) {
            let any = answers.keys().next().cloned();
            any.map(|any| answers.remove(&any));
        }
        answers.insert(target.into(), Arc::new(answer));
    }
}

impl Registry {
    /// Keeps the answer to a request for a manifest that is here and in memory.
    pub(super) fn keep_ready(&self, uri: &Uri, parsed: &Request, ask: &Ask, digest: Digest, response: &Response<Body>) {
        let target = uri.path_and_query().map_or("", |target| target.as_str());
        let Request::Manifest { reference, .. } = parsed else { return };
        if target.len() > LONGEST || response.status() != StatusCode::OK || ask.mirrored {
            return;
        }
        let mut head = b"HTTP/1.1 200 OK\r\n".to_vec();
        for (name, value) in response.headers() {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        let answer = Answer {
            reference: reference.clone(),
            repository: ask.repository.clone(),
            digest,
            head: head.into(),
            path: ask.path.clone(),
            registry: ask.registry.clone(),
            hits: self.settings.metrics.hits(self.label_of(ask.registry.as_deref())),
        };
        self.ready.keep(target, answer);
    }

    /// Answers a request at once, if it is for a small manifest that was answered a moment ago and is still here.
    pub fn prompt<'a>(
        &self,
        is_head: bool,
        target: &str,
        headers: impl Iterator<Item = (&'a str, &'a [u8])>,
        remote: IpAddr,
    ) -> Option<Prompt> {
        if self.refusal().is_some() {
            return None;
        }
        let answer = self.ready.get(target)?;
        let start = Instant::now();
        let Said { node, mirrored, authorization, trace } = Said::read(headers)?;
        let mirrored = mirrored.unwrap_or_default();
        if self.settings.basic_auth.as_ref().is_some_and(|auth| !auth.admits(authorization)) {
            return None;
        }
        if let TagOrDigest::Tag(tag) = &answer.reference
            && !self.settings.store.names(tag, &answer.digest)
        {
            return None;
        }
        if self.audits.is_spoiled(&answer.digest) {
            return None;
        }
        let blob = self.settings.store.held(&answer.digest, answer.repository.as_ref(), start)?;
        let body = if is_head { Bytes::new() } else { blob.small.as_ref()?.bytes().clone() };
        let observed = self.settings.metrics.begin_prompt(is_head, start, &self.flight);
        if !mirrored {
            observed.metrics.hit(&answer.hits, self.kind_of(node));
        }
        let settled = if mirrored { Told::default() } else { self.stories.tells(Source::Local, is_logged(true)) };
        let telling = (!settled.is_nothing() || mirrored && is_logged(false)).then(|| {
            let client = node.map_or_else(|| remote.to_string(), str::to_owned);
            let story = begin(&Trace::of(trace), is_head, &answer.path, answer.registry.as_deref(), client);
            Telling::ready(story, start, (!mirrored).then(|| self.stories()), settled)
        });
        let head = if mirrored { self.with_load(&answer.head) } else { answer.head.clone() };
        let kind = (!mirrored).then(|| self.kind_of(node));
        let end = move |end: BodyEnd| {
            if let Some(kind) = kind {
                observed.metrics.pulled(end.sent, kind);
            }
            observed.end(end.sent);
            telling.into_iter().for_each(|telling| telling.ends(end));
        };
        Some(Prompt { head, body, end: Box::new(end) })
    }
}

impl Registry {
    /// A head that also tells a peer how busy this node is, as every answer to one does.
    fn with_load(&self, head: &[u8]) -> Bytes {
        let mut told = head.to_vec();
        // A write to memory does not fail.
        let _ = write!(told, "{}: {}\r\n", respond::LOAD, self.load());
        told.into()
    }
}

/// A request under way that is answered from what stands ready.
pub(super) struct Observed {
    pub(super) metrics: Arc<Resolved>,
    pub(super) is_head: bool,
    pub(super) start: Instant,
    pub(super) _flight: Arc<()>,
}

impl Observed {
    /// Counts it.
    fn end(self, sent: u64) {
        self.metrics.answered(self.is_head, self.start.elapsed(), sent);
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.metrics.is_over();
    }
}
