//! Manifests, blobs and referrers: from here, else from a peer, else not.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Response, StatusCode};
use tracing::warn;

use super::metrics::ClientKind;
use super::promises::{Client, Refusal as Refused};
use super::{Registry, SOURCE_HEADER, respond};
use crate::mirror::{Asker, Chain, Content, Feed, Found, Gate, Kind, NodeId, Tie, Verified, Wanted};
use crate::oci::{
    Digest, ErrorCode, Key, MAX_MANIFEST_BYTES, MediaType, OciError, RangeOutcome, RangeSpec, Repository, TagOrDigest,
};
use crate::store::{Blob, Found as Local, Receiving};
use crate::storm::{Rank, Refusal};
use crate::story::Tale;
use crate::zerocopy::{Body, BodyEnd, Growing};

/// A request, beside what its path says.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) is_content: bool,
    pub(super) head_only: bool,
    pub(super) mirrored: bool,
    /// A peer says that what it got of this is wrong.
    pub(super) complains: bool,
    /// The operator's filters exclude what is asked for: then it is not looked for at peers.
    pub(super) excluded: bool,
    pub(super) path: String,
    /// The same request for a peer.
    pub(super) target: String,
    pub(super) repository: Option<Repository>,
    pub(super) registry: Option<String>,
    pub(super) range: Option<RangeSpec>,
    /// A range was asked for as containerd's parallel fetch does, and is not kept to.
    pub(super) is_chunk: bool,
    pub(super) client: Client,
    /// Where it comes from.
    pub(super) remote: IpAddr,
    /// A peer asks to wait for what is about to be received here.
    pub(super) wait: Option<Duration>,
    /// Where a coordinator that sent the peer here counted it.
    pub(super) rank: Option<Rank>,
    /// What it meets.
    pub(super) tale: Tale,
}

impl Ask {
    /// How many bytes of a blob of `size` bytes it asks for.
    fn length_of(&self, size: u64) -> u64 {
        match self.range.map_or(RangeOutcome::Whole, |range| range.resolve(size)) {
            RangeOutcome::Part { start, end_exclusive } => end_exclusive - start,
            RangeOutcome::Whole => size,
            RangeOutcome::Unsatisfiable => 0,
        }
    }

    /// What the request is a part of.
    fn pull(&self) -> Option<Arc<str>> {
        // A repository's name begins with its registry.
        self.registry.as_deref()?;
        Some(self.repository.as_ref()?.to_string().into())
    }

    /// The offset of the first byte that is asked for; unknown of a suffix, as long as the length is.
    pub(super) fn first_byte(&self) -> Option<u64> {
        match self.range {
            Some(RangeSpec::From { first, .. }) => Some(first),
            Some(RangeSpec::Suffix(_)) => None,
            None => Some(0),
        }
    }
}

/// Where an answer's content is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Local,
    /// This node has some of it, and is receiving the rest.
    Receiving,
    /// Fetched from a peer and verified a moment ago.
    Ready,
    Peer(Arc<str>),
    Nobody,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Receiving => "receiving",
            Self::Ready => "ready",
            Self::Peer(address) => address,
            Self::Nobody => "nobody",
        })
    }
}

/// A response, and where its content is from.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<Body>,
    pub(super) source: Source,
    /// A manifest of this node that is in memory.
    pub(super) held: Option<Digest>,
}

impl Answer {
    pub(super) fn local(response: Response<Body>) -> Self {
        Self { response, source: Source::Local, held: None }
    }

    fn from(mut response: Response<Body>, source: Source) -> Self {
        if let Ok(value) = http::HeaderValue::from_str(&source.to_string()) {
            response.headers_mut().insert(SOURCE_HEADER, value);
        }
        Self { response, source, held: None }
    }
}

fn source_of(found: &Found) -> Source {
    match &found.peer {
        Some(peer) => Source::Peer(peer.addresses.first().map(ToString::to_string).unwrap_or_default().into()),
        None => Source::Ready,
    }
}

/// A part of bytes in memory.
fn slice(bytes: &Bytes, start: u64, end: u64) -> Body {
    let to_index = |offset| usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    Body::bytes(bytes.slice(to_index(start)..to_index(end)))
}

impl Registry {
    pub(super) async fn manifest(&self, ask: &Ask, reference: &TagOrDigest) -> Result<Answer, OciError> {
        let key = match reference {
            TagOrDigest::Digest(digest) => Key::Digest(digest.clone()),
            TagOrDigest::Tag(tag) => Key::Tag(tag.clone()),
        };
        let local = match &key {
            Key::Digest(digest) => Some(digest.clone()),
            Key::Tag(_) if ask.excluded => None,
            Key::Tag(tag) => self.settings.store.resolve(tag),
        };
        if let Some(digest) = local {
            let mut answer = self.local_manifest(ask, &digest).await?;
            if answer.is_none() && self.comes(ask, &digest).await {
                answer = self.local_manifest(ask, &digest).await?;
            }
            if let Some(answer) = answer {
                return Ok(answer);
            }
        }
        self.note_pull(ask, reference);
        let unknown = || OciError::new(StatusCode::NOT_FOUND, ErrorCode::ManifestUnknown, "no node has this manifest");
        if ask.mirrored || ask.excluded {
            return Err(unknown());
        }
        let wanted = Wanted {
            key,
            target: ask.target.clone(),
            kind: Kind::Manifest,
            head_only: ask.head_only,
            range: None,
            total: None,
            resumes: false,
            gate: None,
            node: self.fed_node(ask),
            feeds_us: false,
            pull: ask.pull().filter(|_| !ask.head_only && self.may_be_ours(ask)),
            repository: ask.repository.clone(),
            wait: None,
            rank: None,
            tale: ask.tale.clone(),
            is_own: self.client_kind(&ask.client) == ClientKind::Own,
        };
        let found =
            self.settings.mirror.fetch(&wanted).await.map_err(|miss| unknown().with_detail(miss.to_string()))?;
        let source = source_of(&found);
        let Content::Verified(Verified { digest, bytes, media_type }) = found.content else { return Err(unknown()) };
        let own_type = MediaType::detect(&bytes).ok().map(|own| own.as_str().to_owned());
        let media_type = own_type.or(media_type).ok_or_else(unknown)?;
        Ok(Answer::from(respond::manifest(&digest, &media_type, Body::bytes(bytes)), source))
    }

    async fn local_manifest(&self, ask: &Ask, digest: &Digest) -> Result<Option<Answer>, OciError> {
        let Some(blob) = self.open(ask, digest).await else { return Ok(None) };
        if blob.size > MAX_MANIFEST_BYTES as u64 {
            let message = "a manifest has no more than 4 MiB";
            return Err(OciError::new(StatusCode::NOT_FOUND, ErrorCode::ManifestUnknown, message));
        }
        if let Some(small) = &blob.small {
            let Some(media_type) = small.media_type() else { return Ok(None) };
            let response = respond::manifest(digest, media_type.as_str(), Body::bytes(small.bytes().clone()));
            return Ok(Some(Answer { held: Some(digest.clone()), ..Answer::from(response, Source::Local) }));
        }
        let bytes = match blob.bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                warn!(%digest, %error, "cannot read a manifest of this node, asking peers");
                return Ok(None);
            }
        };
        let Ok(media_type) = MediaType::detect(&bytes) else { return Ok(None) };
        // Not these bytes: a client that takes its time would keep them in memory.
        let response = respond::manifest(digest, media_type.as_str(), Body::file(blob.file, 0, blob.size));
        Ok(Some(Answer::from(response, Source::Local)))
    }

    /// What this node has. A store that fails is told in the log, and then peers are as good.
    pub(super) async fn open(&self, ask: &Ask, digest: &Digest) -> Option<Blob> {
        if self.audits.is_spoiled(digest) {
            return None;
        }
        match self.settings.store.open(digest, ask.repository.as_ref()).await {
            Ok(blob) => blob,
            Err(error) => {
                warn!(%digest, %error, "cannot open content of this node, asking peers");
                None
            }
        }
    }

    pub(super) async fn blob(&self, ask: &Ask, digest: &Digest) -> Result<Answer, OciError> {
        if let Some(answer) = self.local_blob(ask, digest).await {
            return Ok(answer);
        }
        self.note_pull(ask, &TagOrDigest::Digest(digest.clone()));
        let unknown = || OciError::new(StatusCode::NOT_FOUND, ErrorCode::BlobUnknown, "no node has this blob");
        if ask.mirrored || ask.excluded {
            return Err(unknown());
        }
        if !ask.head_only
            && ask.first_byte() == Some(0)
            && self.client_kind(&ask.client) == ClientKind::Own
            && self.promises.is_complaint(&ask.client, digest, Instant::now())
        {
            self.settings.mirror.complained(digest, &ask.target);
        }
        let wanted = Wanted {
            key: Key::Digest(digest.clone()),
            target: ask.target.clone(),
            kind: Kind::Blob,
            head_only: ask.head_only,
            range: ask.range.filter(|_| !ask.head_only).map(|range| range.to_string()),
            total: self.told_total(ask, digest),
            resumes: false,
            gate: Some(self.gate(ask, digest)),
            node: self.fed_node(ask),
            feeds_us: self.may_be_ours(ask),
            pull: ask.pull().filter(|_| !ask.head_only && self.may_be_ours(ask)),
            repository: ask.repository.clone(),
            wait: None,
            rank: None,
            tale: ask.tale.clone(),
            is_own: self.client_kind(&ask.client) == ClientKind::Own,
        };
        match self.settings.mirror.fetch(&wanted).await {
            Ok(found) => Ok(self.relayed(ask, digest, found)),
            Err(miss) => self.refuse(ask, digest).await.ok_or_else(|| unknown().with_detail(miss.to_string())),
        }
    }

    /// What this node has, or receives. Only where the asker cannot be who receives it here is the latter looked for.
    async fn local_blob(&self, ask: &Ask, digest: &Digest) -> Option<Answer> {
        let mut feed = None;
        let found = if self.may_be_ours(ask) || self.is_above(ask, digest) {
            self.open(ask, digest).await.map(Local::Complete)
        } else {
            self.find(ask, digest, &mut feed).await
        };
        let found = found?;
        let (size, admitted) = match &found {
            Local::Complete(blob) => (blob.size, None),
            Local::Receiving(receiving) => (receiving.total, Some(self.admit(ask, digest, receiving)?)),
        };
        if let (true, Local::Complete(blob)) = (ask.mirrored && ask.complains, &found) {
            self.audits.hear(digest, Arc::clone(&blob.file), size, Instant::now());
        }
        let mut upload = None;
        if ask.mirrored && !ask.head_only {
            let growing = match &found {
                Local::Receiving(receiving) => Some(&receiving.growing),
                Local::Complete(_) => None,
            };
            match &feed {
                Some(feed) => feed.comes(growing, size),
                None => match self.serve(ask, digest, growing, size) {
                    Ok(taken) => feed = taken,
                    Err(Refusal::Busy) => return Some(self.busy(ask, digest)),
                    Err(Refusal::NotAhead) => return None,
                },
            }
            upload = self.uploads.begin(ask.length_of(size), Instant::now());
            if upload.is_none() {
                return Some(self.busy(ask, digest));
            }
        }
        let (chain, tie) = admitted.unzip();
        let Answer { response, source, held } = match &found {
            Local::Complete(blob) => self.complete_blob(ask, digest, blob, feed.as_ref()),
            Local::Receiving(receiving) => {
                let growing = match &feed {
                    Some(feed) => receiving.growing.clone().until(feed.away()),
                    None => receiving.growing.clone(),
                };
                let body = |start, end: u64| Body::growing(growing.clone(), start, end - start);
                let mut answer = self.give(ask, digest, size, Source::Receiving, body);
                respond::mark_receiving(&mut answer.response, receiving, &chain?);
                answer
            }
        };
        let response = response.map(|body| match &feed {
            Some(feed) => body.counted_in(feed.counter()),
            None => body,
        });
        Some(Answer { response: response.map(|body| body.with_end(move |_| drop((upload, tie, feed)))), source, held })
    }

    fn complete_blob(&self, ask: &Ask, digest: &Digest, blob: &Blob, feed: Option<&Feed>) -> Answer {
        let body = |start, end: u64| match (&blob.small, feed.filter(|_| ask.rank.is_some())) {
            (Some(small), _) => slice(small.bytes(), start, end),
            (None, None) => Body::file(Arc::clone(&blob.file), start, end - start),
            // Whom a coordinator sent here may be sent elsewhere by this node.
            (None, Some(feed)) => {
                let growing = Growing::whole(Arc::clone(&blob.file), blob.size).until(feed.away());
                Body::growing(growing, start, end - start)
            }
        };
        let Answer { response, source, held } = self.give(ask, digest, blob.size, Source::Local, body);
        let start = match ask.range.map(|range| range.resolve(blob.size)) {
            Some(RangeOutcome::Part { start, .. }) => start,
            _ => 0,
        };
        let (audits, of, file, size) = (Arc::clone(&self.audits), digest.clone(), Arc::clone(&blob.file), blob.size);
        let away = feed.map(Feed::away);
        let ended = move |end: BodyEnd| {
            let is_sent_away = away.is_some_and(|away| *away.borrow());
            if !end.complete && !is_sent_away {
                audits.cut_short(&of, &file, size, start + end.sent);
            }
        };
        Answer { response: response.map(|body| body.with_end(ended)), source, held }
    }

    /// Sends a peer elsewhere.
    fn busy(&self, ask: &Ask, digest: &Digest) -> Answer {
        self.settings.metrics.refused_upload();
        let holders = self.settings.mirror.holders(&Key::Digest(digest.clone()), ask.remote);
        Answer { response: respond::busy(&holders), source: Source::Nobody, held: None }
    }

    /// Whether the asker gives it to us, so that there is no point in waiting for anything.
    fn is_above(&self, ask: &Ask, digest: &Digest) -> bool {
        matches!(&ask.client, Client::Node(name) if self.settings.mirror.lineage(digest).contains(NodeId::of(name)))
    }

    /// Takes the asker as one who is given a blob while it is received, and says which nodes it comes through; none where it may come through
    /// the asker, or through too many. The name of this node has to be known for that.
    fn admit(&self, ask: &Ask, digest: &Digest, receiving: &Receiving) -> Option<(Chain, Option<Tie>)> {
        let own = NodeId::of(self.settings.node_name.as_deref()?);
        let node = match &ask.client {
            Client::Node(name) => Some(NodeId::of(name)),
            Client::Address(_) => None,
        };
        let first = match ask.range.map(|range| range.resolve(receiving.total)) {
            Some(RangeOutcome::Part { start, .. }) if !ask.head_only => start,
            _ => 0,
        };
        let position = receiving.growing.progress().position;
        self.settings.mirror.admit(digest, Asker { own, node, first, position })
    }

    /// Tells the store what our own containerd is about to receive, from us or from upstream.
    fn note_pull(&self, ask: &Ask, reference: &TagOrDigest) {
        if let Some(repository) = ask.repository.as_ref().filter(|_| self.may_be_ours(ask)) {
            self.settings.store.pulls(repository, reference);
        }
    }

    /// The blob's length, where the client goes on with one that it was told the length of.
    fn told_total(&self, ask: &Ask, digest: &Digest) -> Option<u64> {
        ask.first_byte().filter(|first| *first > 0 && !ask.head_only)?;
        self.promises.total(&ask.client, digest, Instant::now())
    }

    /// Whether our own containerd may be who asks.
    fn may_be_ours(&self, ask: &Ask) -> bool {
        match &ask.client {
            _ if ask.mirrored => false,
            Client::Node(name) => self.settings.node_name.as_deref().is_none_or(|own| own == &**name),
            Client::Address(_) => true,
        }
    }

    /// The node whose containerd gets what is asked for.
    fn fed_node(&self, ask: &Ask) -> Option<Arc<str>> {
        match &ask.client {
            Client::Node(name) => Some(Arc::clone(name)),
            Client::Address(_) => self.settings.node_name.as_deref().map(Into::into),
        }
    }

    /// Holds back the end of a body that breaks off until it is the client's lowest one.
    fn gate(&self, ask: &Ask, digest: &Digest) -> Gate {
        let first = ask.first_byte().unwrap_or(0);
        let (turns, client, digest) = (Arc::clone(&self.turns), ask.client.clone(), digest.clone());
        Gate::new(move || {
            let (turns, client, digest) = (Arc::clone(&turns), client.clone(), digest.clone());
            Box::pin(async move { turns.come(&client, &digest, first).await })
        })
    }

    /// A blob whose bytes can be had at any offset.
    fn give(&self, ask: &Ask, digest: &Digest, size: u64, source: Source, body: impl Fn(u64, u64) -> Body) -> Answer {
        if ask.head_only {
            return Answer::from(respond::blob_head(digest, size), source);
        }
        let response = match ask.range.map_or(RangeOutcome::Whole, |range| range.resolve(size)) {
            RangeOutcome::Whole => respond::blob(digest, self.promised(ask, digest, size, 0, body(0, size)), None),
            RangeOutcome::Part { start, end_exclusive } => {
                let body = self.promised(ask, digest, size, start, body(start, end_exclusive));
                respond::blob(digest, body, Some((start, size)))
            }
            RangeOutcome::Unsatisfiable => respond::unsatisfiable(size),
        };
        Answer::from(response, source)
    }

    fn relayed(&self, ask: &Ask, digest: &Digest, found: Found) -> Answer {
        let source = source_of(&found);
        match found.content {
            Content::Verified(verified) => {
                let bytes: Bytes = verified.bytes;
                self.give(ask, digest, bytes.len() as u64, source, |start, end| slice(&bytes, start, end))
            }
            Content::Relay { body, part } => {
                let (start, total) = part.unwrap_or((0, body.len()));
                let body = self.promised(ask, digest, total, start, body);
                let (promises, client, of) = (Arc::clone(&self.promises), ask.client.clone(), digest.clone());
                let body = body.with_end(move |end| promises.relayed(&client, &of, start, start + end.sent));
                Answer::from(respond::blob(digest, body, part), source)
            }
            Content::Head { length } => Answer::from(respond::blob_head(digest, length), source),
            Content::Unsatisfiable { length } => Answer::from(respond::unsatisfiable(length), source),
        }
    }

    /// Remembers that the client is given this blob, and where its body ends if that is before its time.
    fn promised(&self, ask: &Ask, digest: &Digest, total: u64, start: u64, body: Body) -> Body {
        if ask.mirrored {
            return body;
        }
        self.promises.given(&ask.client, digest, total, Instant::now());
        let turn = self.turns.begin(&ask.client, digest, start);
        let (promises, client, digest) = (Arc::clone(&self.promises), ask.client.clone(), digest.clone());
        body.with_end(move |end| {
            let _until_now = turn;
            if !end.complete {
                promises.cut_at(&client, &digest, start + end.sent, Instant::now());
            }
        })
    }

    /// A refusal that is not an error status, where one would fail the client's pull.
    pub(super) async fn refuse(&self, ask: &Ask, digest: &Digest) -> Option<Answer> {
        // A client that is kept to one request a blob has no other chunk that an error status could fail.
        if ask.head_only || ask.is_chunk {
            return None;
        }
        let first = ask.first_byte()?;
        let Refused::Cut { total } = self.promises.refuse(&ask.client, digest, first, Instant::now()) else {
            return None;
        };
        self.settings.metrics.cut();
        let turn = self.turns.begin(&ask.client, digest, first);
        self.turns.come(&ask.client, digest, first).await;
        let cut = |length| Body::cut(length).with_end(move |_| drop(turn));
        let response = match ask.range.map(|range| range.resolve(total)) {
            Some(RangeOutcome::Part { start, end_exclusive }) => {
                respond::blob(digest, cut(end_exclusive - start), Some((start, total)))
            }
            _ => respond::blob(digest, cut(total), None),
        };
        Some(Answer { response, source: Source::Nobody, held: None })
    }

    pub(super) async fn referrers(
        &self,
        ask: &Ask,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Answer, OciError> {
        // With an upstream, a list of what happens to be here would hide what the upstream has.
        if ask.registry.is_some() {
            let message = "referrers are the upstream registry's to list";
            return Err(OciError::new(StatusCode::NOT_FOUND, ErrorCode::ManifestUnknown, message));
        }
        let mut referrers =
            self.settings.store.referrers(digest).await.map_err(|error| {
                OciError::new(StatusCode::INTERNAL_SERVER_ERROR, ErrorCode::Unknown, error.to_string())
            })?;
        if let Some(wanted) = artifact_type {
            referrers.retain(|referrer| referrer.artifact_type.as_deref() == Some(wanted));
        }
        let media_type = "application/vnd.oci.image.index.v1+json";
        let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": referrers });
        let mut response = respond::json(media_type, index.to_string().into_bytes());
        if artifact_type.is_some() {
            response.headers_mut().insert("OCI-Filters-Applied", http::HeaderValue::from_static("artifactType"));
        }
        Ok(Answer::local(response))
    }
}
