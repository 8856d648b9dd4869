//! One request to the network of peers: look up, ask the first, ask the next as well when it is late, take the first good answer.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::client::{self, PeerError, PeerHead, PeerRequest, PeerResponse};
use super::metrics::{End, Outcome};
use super::{Content, Found, Kind, MIRRORED_HEADER, Miss, Shared, VERIFIED_BODY, Verified, Wanted, verify};
use crate::oci::{ContentRange, Digest, Key, MAX_MANIFEST_BYTES, RangeOutcome, parse_range};
use crate::router::Peer;
use crate::zerocopy::{Body, Relay, RelayEnd};

type Attempt = BoxFuture<'static, (Peer, Result<Content, PeerError>)>;

/// The state of one request.
struct Race<'a> {
    shared: &'a Arc<Shared>,
    wanted: &'a Wanted,
    candidates: VecDeque<Peer>,
    attempts: FuturesUnordered<Attempt>,
    found: usize,
    tried: usize,
}

pub(super) async fn fetch(shared: &Arc<Shared>, wanted: &Wanted) -> Result<Found, Miss> {
    let start = Instant::now();
    let mut lookup = Some(shared.router.lookup(&wanted.key));
    let until = start + shared.settings.resolve_timeout;
    let mut race =
        Race { shared, wanted, candidates: VecDeque::new(), attempts: FuturesUnordered::new(), found: 0, tried: 0 };
    let mut hedge_at = start;
    loop {
        if race.wants_next(hedge_at) {
            race.ask_next();
            hedge_at = Instant::now() + shared.settings.hedge;
        }
        if race.is_lost(lookup.is_some()) {
            if race.found == 0 {
                shared.metrics.resolved(start.elapsed().as_secs_f64());
            }
            return Err(Miss { found: race.found, tried: race.tried });
        }
        tokio::select! {
            biased;
            Some((peer, result)) = race.attempts.next() => match result {
                Ok(content) => return Ok(Found { peer: Some(peer), content }),
                Err(error) => {
                    debug!(key = %wanted.key, peer = %peer.id, %error, "peer gave nothing");
                    hedge_at = Instant::now();
                }
            },
            peer = next_peer(&mut lookup) => match peer {
                Some(peer) => {
                    if race.found == 0 {
                        shared.metrics.resolved(start.elapsed().as_secs_f64());
                    }
                    race.found += 1;
                    race.candidates.push_back(peer);
                }
                None => lookup = None,
            },
            () = sleep_until(until), if lookup.is_some() => lookup = None,
            () = sleep_until(hedge_at), if race.can_ask() => {}
        }
    }
}

async fn next_peer(lookup: &mut Option<mpsc::Receiver<Peer>>) -> Option<Peer> {
    match lookup {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

impl Race<'_> {
    fn can_ask(&self) -> bool {
        !self.candidates.is_empty() && self.tried < self.shared.settings.resolve_retries
    }

    fn wants_next(&self, hedge_at: Instant) -> bool {
        self.can_ask() && (self.attempts.is_empty() || Instant::now() >= hedge_at)
    }

    fn is_lost(&self, looking: bool) -> bool {
        let exhausted = self.tried >= self.shared.settings.resolve_retries;
        self.attempts.is_empty() && (exhausted || (!looking && self.candidates.is_empty()))
    }

    fn ask_next(&mut self) {
        let Some(peer) = self.candidates.pop_front() else { return };
        self.tried += 1;
        let (shared, wanted) = (Arc::clone(self.shared), self.wanted.clone());
        self.attempts.push(Box::pin(async move {
            let result = attempt(&shared, &wanted, &peer).await;
            shared.metrics.attempted(outcome(&result));
            (peer, result)
        }));
    }
}

fn outcome(result: &Result<Content, PeerError>) -> Outcome {
    match result {
        Ok(_) => Outcome::Answered,
        Err(PeerError::Connect(_)) => Outcome::Unreachable,
        Err(PeerError::Late { .. }) => Outcome::Late,
        Err(PeerError::Lost(_)) => Outcome::Lost,
        Err(PeerError::Malformed(_)) => Outcome::Malformed,
        Err(PeerError::Status(_)) => Outcome::Refused,
        Err(PeerError::WrongBytes) => Outcome::WrongBytes,
    }
}

/// Asks one peer. Everything in it is bounded in time by the settings' timeouts, or, for a small body, by the stall bound.
async fn attempt(shared: &Arc<Shared>, wanted: &Wanted, peer: &Peer) -> Result<Content, PeerError> {
    // A manifest is fetched whole even for a HEAD: what is promised must be at hand when it is asked for.
    let head_only = wanted.head_only && wanted.kind == Kind::Blob;
    let mut extra = format!("{MIRRORED_HEADER}: true\r\nUser-Agent: spegel/{}\r\n", env!("CARGO_PKG_VERSION"));
    if let Some(authorization) = &shared.settings.authorization {
        extra.push_str(&format!("Authorization: {authorization}\r\n"));
    }
    let request = PeerRequest {
        method: if head_only { "HEAD" } else { "GET" },
        target: wanted.target.clone(),
        range: wanted.range.clone().filter(|_| !head_only && wanted.kind == Kind::Blob),
        extra,
    };
    let (address, response) =
        client::request(&shared.pool, &peer.addresses, &request, shared.settings.timeouts).await?;
    let done = Done { shared: Arc::clone(shared), address };
    match (wanted.kind, response.head.status) {
        (Kind::Manifest, 200) => {
            let verified = manifest(shared, wanted, response, &done).await?;
            shared.shelf.put(verified.clone(), std::time::Instant::now());
            Ok(Content::Verified(verified))
        }
        (Kind::Blob, 200) if head_only => {
            let length = response.head.content_length;
            done.keep(response.head.keep_alive, response.stream);
            Ok(Content::Head { length })
        }
        (Kind::Blob, 200 | 206) => blob(shared, wanted, response, done).await,
        (Kind::Blob, 416) if request.range.is_some() => unsatisfiable(&response.head),
        (_, status) => Err(PeerError::Status(status)),
    }
}

/// Gives a connection back when its response has been read to its end.
struct Done {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
}

impl Done {
    fn keep(&self, keep_alive: bool, stream: tokio::net::TcpStream) {
        if keep_alive {
            self.shared.pool.put(self.address, stream);
        }
    }
}

async fn manifest(
    shared: &Shared,
    wanted: &Wanted,
    mut response: PeerResponse,
    done: &Done,
) -> Result<Verified, PeerError> {
    let told = response.head.digest.as_deref().map(str::parse::<Digest>);
    let digest = match (&wanted.key, told) {
        (Key::Digest(digest), _) => digest.clone(),
        (Key::Tag(_), Some(Ok(digest))) => digest,
        (Key::Tag(_), _) => return Err(PeerError::Malformed("it tells no digest for a tag")),
    };
    if response.head.content_length > MAX_MANIFEST_BYTES as u64 {
        return Err(PeerError::Malformed("its manifest is longer than 4 MiB"));
    }
    let _budget = shared.budget.acquire_many(kib(response.head.content_length)).await;
    let bytes = read_whole(&mut response, shared.settings.stall).await?;
    if !verify::matches(&digest, &bytes) {
        return Err(PeerError::WrongBytes);
    }
    done.keep(response.head.keep_alive, response.stream);
    Ok(Verified { digest, bytes, media_type: response.head.content_type })
}

async fn blob(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    mut response: PeerResponse,
    done: Done,
) -> Result<Content, PeerError> {
    let length = response.head.content_length;
    let part = match (&wanted.range, response.head.status) {
        (Some(range), 206) => Some(checked_part(range, &response.head)?),
        (None, 206) => return Err(PeerError::Malformed("a part where the whole was asked for")),
        _ => None,
    };
    if part.is_none()
        && length <= VERIFIED_BODY
        && let Key::Digest(digest) = &wanted.key
        && let Ok(_budget) = shared.budget.try_acquire_many(kib(length))
    {
        let bytes = read_whole(&mut response, shared.settings.stall).await?;
        if !verify::matches(digest, &bytes) {
            return Err(PeerError::WrongBytes);
        }
        done.keep(response.head.keep_alive, response.stream);
        return Ok(Content::Verified(Verified { digest: digest.clone(), bytes, media_type: None }));
    }
    let keep_alive = response.head.keep_alive;
    let on_end = Box::new(move |end: RelayEnd| {
        let end = match end {
            RelayEnd::Complete(stream) => {
                done.keep(keep_alive, stream);
                End::Complete
            }
            RelayEnd::Broken { sent, error } => {
                debug!(peer = %done.address, sent, %error, "peer broke off");
                End::PeerBroke
            }
            RelayEnd::Dropped { .. } => End::ClientLeft,
        };
        done.shared.metrics.relayed(end);
    });
    let relay = Relay::new(response.stream, response.leftover, length, on_end).stall_timeout(shared.settings.stall);
    Ok(Content::Relay { body: Body::relay(relay), part })
}

/// Where a 206 begins and the blob's length: it must be the part that was asked for.
fn checked_part(asked: &str, head: &PeerHead) -> Result<(u64, u64), PeerError> {
    const WRONG: PeerError = PeerError::Malformed("another part than was asked for");
    match told_range(head) {
        Some(ContentRange::Part { start, end_exclusive, total: Some(total) })
            if parse_range(Some(asked), total) == RangeOutcome::Part { start, end_exclusive }
                && end_exclusive - start == head.content_length =>
        {
            Ok((start, total))
        }
        _ => Err(WRONG),
    }
}

fn unsatisfiable(head: &PeerHead) -> Result<Content, PeerError> {
    match told_range(head) {
        Some(ContentRange::Unsatisfied { total }) => Ok(Content::Unsatisfiable { length: total }),
        _ => Err(PeerError::Status(head.status)),
    }
}

fn told_range(head: &PeerHead) -> Option<ContentRange> {
    head.content_range.as_deref().and_then(|text| text.parse().ok())
}

/// Reads a small body to its end, giving up when nothing comes for `stall`.
async fn read_whole(response: &mut PeerResponse, stall: std::time::Duration) -> Result<Bytes, PeerError> {
    let length = usize::try_from(response.head.content_length).map_err(|_| PeerError::Malformed("too long"))?;
    let mut bytes = BytesMut::with_capacity(length);
    bytes.extend_from_slice(&response.leftover);
    while bytes.len() < length {
        let mut rest = (&mut response.stream).take((length - bytes.len()) as u64);
        let read = timeout(stall, rest.read_buf(&mut bytes))
            .await
            .map_err(|_| PeerError::Late { what: "body", bound: stall })?
            .map_err(PeerError::Lost)?;
        if read == 0 {
            return Err(PeerError::Lost(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(bytes.freeze())
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).max(1)
}
