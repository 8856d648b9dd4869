//! Looking something up and pulling it, to see how long that takes. The only addresses that are spoken to are the router's peers, by the
//! router, and this node's own registry. Bounded in time and bytes, and nothing of what comes is kept.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::time::timeout_at;

use super::facts::Parts;
use crate::hosts::NODE_HEADER;
use crate::oci::{Digest, Key, MAX_MANIFEST_BYTES, Manifest, Reference};
use crate::registry::SOURCE_HEADER;

/// How long the network is asked, and how many peers are told.
const LOOKUP: Duration = Duration::from_secs(2);
const PEERS: usize = 20;
/// How long a pull may take, how many bytes it may be, and how many pieces.
pub(super) const PULL: Duration = Duration::from_secs(20);
pub(super) const BYTES: u64 = 64 << 20;
const PIECES: usize = 64;

/// What a measurement says that it is, before its number.
pub(super) const CLIENT: &str = "debug-page-";

/// What to look for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    key: Key,
    /// Registry, name, and the tag or digest of an image; a digest alone has none.
    image: Option<(String, String, String)>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Measured {
    /// This node has it.
    pub(super) is_here: bool,
    pub(super) lookup: Lookup,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pull: Option<Pull>,
}

/// Who was found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Lookup {
    pub(super) key: String,
    pub(super) seconds: f64,
    /// There might be more.
    pub(super) is_cut: bool,
    pub(super) peers: Vec<Found>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Found {
    pub(super) address: SocketAddr,
    pub(super) zone: Option<String>,
    pub(super) seconds: f64,
}

/// What was pulled.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Pull {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    /// Why it went no further.
    pub(super) ended: Option<String>,
    /// It went no further because no more is measured; all that was asked for came.
    pub(super) is_enough: bool,
    pub(super) pieces: Vec<Piece>,
}

/// A manifest, a config or a layer.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Piece {
    pub(super) what: &'static str,
    pub(super) name: String,
    /// Where the mirror says that it is from: `local`, or a peer's address.
    pub(super) source: String,
    pub(super) size: Option<u64>,
    pub(super) bytes: u64,
    pub(super) first_byte_seconds: f64,
    pub(super) seconds: f64,
}

// === impl Request ===

impl Request {
    /// An image by a full name, or a digest.
    ///
    /// # Errors
    /// A sentence for who wrote it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if let Ok(digest) = text.parse::<Digest>() {
            return Ok(Self { key: Key::Digest(digest), image: None });
        }
        let reference: Reference = text.parse().map_err(|error| {
            format!("That is neither a digest nor a full name such as docker.io/library/alpine:3.20 ({error}).")
        })?;
        let (key, name) = match (&reference.digest, reference.tag_name()) {
            (Some(digest), _) => (Key::Digest(digest.clone()), digest.to_string()),
            (None, Some(tag)) => (Key::Tag(tag.clone()), tag.tag().to_owned()),
            (None, None) => return Err("The name has neither a tag nor a digest: add one, such as :latest.".to_owned()),
        };
        let repository = &reference.repository;
        Ok(Self { key, image: Some((repository.registry().to_owned(), repository.name().to_owned(), name)) })
    }
}

// === impl Pull ===

impl Pull {
    /// All that was asked for came.
    pub(super) fn is_good(&self) -> bool {
        self.ended.is_none() && !self.pieces.is_empty()
    }
}

/// Looks for it, and pulls it if `pulls`.
pub(super) async fn measure(parts: &Parts, request: &Request, pulls: bool) -> Measured {
    let is_here = match &request.key {
        Key::Tag(tag) => parts.store.resolve(tag).is_some(),
        Key::Digest(digest) => matches!(parts.store.open(digest, None).await, Ok(Some(_))),
    };
    let lookup = look_up(parts, &request.key).await;
    let pull = if pulls { Some(Puller::new(parts).pull(request).await) } else { None };
    Measured { is_here, lookup, pull }
}

async fn look_up(parts: &Parts, key: &Key) -> Lookup {
    let start = Instant::now();
    let deadline = tokio::time::Instant::now() + LOOKUP;
    let mut found = parts.router.lookup(key);
    let mut peers: Vec<Found> = Vec::new();
    let is_cut = loop {
        if peers.len() >= PEERS {
            break true;
        }
        match timeout_at(deadline, found.recv()).await {
            Err(_) => break true,
            Ok(None) => break false,
            Ok(Some(peer)) => peers.extend(peer.addresses.first().map(|address| Found {
                address: *address,
                zone: peer.zone.as_deref().map(str::to_owned),
                seconds: start.elapsed().as_secs_f64(),
            })),
        }
    };
    Lookup { key: key.to_string(), seconds: start.elapsed().as_secs_f64(), is_cut, peers }
}

/// A client of our own registry.
struct Puller<'a> {
    parts: &'a Parts,
    /// A name of its own for each: what one is promised or given does not count for another, nor for containerd.
    client: String,
    start: Instant,
    deadline: tokio::time::Instant,
    pull: Pull,
}

// === impl Puller ===

impl<'a> Puller<'a> {
    fn new(parts: &'a Parts) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let client = format!("{CLIENT}{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let deadline = tokio::time::Instant::now() + PULL;
        Self { parts, client, start: Instant::now(), deadline, pull: Pull::default() }
    }

    async fn pull(mut self, request: &Request) -> Pull {
        self.pull.ended = self.all(request).await.err();
        self.pull.seconds = self.start.elapsed().as_secs_f64();
        self.pull
    }

    async fn all(&mut self, request: &Request) -> Result<(), String> {
        let Some((registry, name, reference)) = &request.image else {
            // A repository that nothing is in: what a digest names is the same everywhere.
            let path = format!("/v2/spegel/measure/blobs/{}", request.key);
            return self.get("blob", &request.key.to_string(), &path, None, false).await.map(|_| ());
        };
        let ns = utf8_percent_encode(registry, NON_ALPHANUMERIC);
        let manifest = |reference: &str| format!("/v2/{name}/manifests/{reference}?ns={ns}");
        let bytes = self.get("manifest", reference, &manifest(reference), None, true).await?;
        let mut parsed = Manifest::parse(&bytes).map_err(|error| error.to_string())?;
        if parsed.is_index {
            let Some(child) = for_this_machine(&bytes, &parsed) else {
                return Err("the index names no manifest".to_owned());
            };
            let bytes = self.get("manifest", &child, &manifest(&child), None, true).await?;
            parsed = Manifest::parse(&bytes).map_err(|error| error.to_string())?;
        }
        if parsed.is_index {
            return Err("an index within an index is not followed".to_owned());
        }
        for (number, blob) in parsed.children.iter().enumerate() {
            let what = if number == 0 { "config" } else { "layer" };
            let path = format!("/v2/{name}/blobs/{}?ns={ns}", blob.digest);
            self.get(what, blob.digest.as_str(), &path, Some(blob.size), false).await?;
        }
        Ok(())
    }

    /// One piece; its bytes if they are to be kept.
    async fn get(
        &mut self,
        what: &'static str,
        name: &str,
        path: &str,
        size: Option<u64>,
        keep: bool,
    ) -> Result<Vec<u8>, String> {
        if self.pull.pieces.len() >= PIECES {
            self.pull.is_enough = true;
            return Err(format!("only {PIECES} pieces are measured"));
        }
        let deadline = self.deadline;
        let late = |_| format!("{} seconds were over", PULL.as_secs());
        timeout_at(deadline, self.fetch(what, name, path, size, keep)).await.map_err(late)?
    }

    async fn fetch(
        &mut self,
        what: &'static str,
        name: &str,
        path: &str,
        size: Option<u64>,
        keep: bool,
    ) -> Result<Vec<u8>, String> {
        let failed = |error: &dyn std::fmt::Display| format!("this node's registry did not give a {what}: {error}");
        let start = Instant::now();
        let at = self.parts.registry_at;
        let stream = TcpStream::connect(at).await.map_err(|error| failed(&error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
        // It ends with the sender.
        let connection = tokio::spawn(connection);
        let mut request =
            http::Request::get(path).header(http::header::HOST, at.to_string()).header(NODE_HEADER, &self.client);
        if let Some(authorization) = &self.parts.authorization {
            request = request.header(http::header::AUTHORIZATION, authorization);
        }
        let left = BYTES - self.pull.bytes;
        if size.is_some_and(|size| size > left) || (size.is_none() && !keep) {
            request = request.header(http::header::RANGE, format!("bytes=0-{}", left.max(1) - 1));
        }
        let request = request.body(Empty::<bytes::Bytes>::new()).map_err(|error| failed(&error))?;
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        let (head, mut body) = response.into_parts();
        if !head.status.is_success() {
            connection.abort();
            return Err(match head.status.as_u16() {
                404 => format!("no node gave the {what} {name}"),
                status => failed(&format!("status {status}")),
            });
        }
        let source = head.headers.get(SOURCE_HEADER).and_then(|source| source.to_str().ok()).unwrap_or("?").to_owned();
        let mut piece = Piece {
            what,
            name: name.to_owned(),
            source,
            size: size.or_else(|| whole_length(&head.headers)),
            bytes: 0,
            first_byte_seconds: start.elapsed().as_secs_f64(),
            seconds: 0.0,
        };
        let (mut kept, mut broken) = (Vec::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) => {
                    broken = Some(failed(&error));
                    break;
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            if piece.bytes == 0 {
                piece.first_byte_seconds = start.elapsed().as_secs_f64();
            }
            piece.bytes += data.len() as u64;
            if keep && kept.len() + data.len() <= MAX_MANIFEST_BYTES {
                kept.extend_from_slice(&data);
            }
            if piece.bytes >= left {
                break;
            }
        }
        connection.abort();
        piece.seconds = start.elapsed().as_secs_f64();
        self.pull.bytes += piece.bytes;
        let is_part = piece.size.is_some_and(|size| piece.bytes < size);
        self.pull.pieces.push(piece);
        match broken {
            Some(broken) => Err(broken),
            None if is_part && self.pull.bytes >= BYTES => {
                self.pull.is_enough = true;
                Err(format!("no more than {} MiB are measured", BYTES >> 20))
            }
            None if is_part => Err(format!("the {what} ended early")),
            None => Ok(kept),
        }
    }
}

/// The length of all of it, from what tells the length of a part.
fn whole_length(headers: &http::HeaderMap) -> Option<u64> {
    let text = |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
    match text(http::header::CONTENT_RANGE) {
        Some(range) => range.rsplit_once('/')?.1.parse().ok(),
        None => text(http::header::CONTENT_LENGTH)?.parse().ok(),
    }
}

/// The manifest of an index that is for this machine; the first if none says so.
fn for_this_machine(bytes: &[u8], index: &Manifest) -> Option<String> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let document: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let manifests = document["manifests"].as_array()?;
    let is_ours = |entry: &&serde_json::Value| {
        entry["platform"]["architecture"] == architecture && entry["platform"]["os"] == std::env::consts::OS
    };
    let ours = manifests.iter().find(is_ours).and_then(|entry| entry["digest"].as_str());
    // One that is not among what was parsed and checked is not asked for.
    let ours = ours.and_then(|ours| index.children.iter().find(|child| child.digest.as_str() == ours));
    ours.or(index.children.first()).map(|child| child.digest.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn images_and_digests_are_asked_for_and_nothing_else() {
        let digest = format!("sha256:{}", "ab".repeat(32));
        let key = |text: &str| Request::parse(text).unwrap().key.to_string();
        assert_eq!(key(&digest), digest);
        assert_eq!(key("registry.test/app:1"), "registry.test/app:1");
        assert_eq!(key(&format!("registry.test/app:1@{digest}")), digest);
        for wrong in [
            "",
            "app",
            "registry.test/app",
            "http://10.0.0.1/",
            "registry.test/../x:1",
            "<script>",
            "a.test/b:c d",
            "sha256:zz",
        ] {
            assert!(Request::parse(wrong).is_err(), "{wrong}");
        }
    }
}
