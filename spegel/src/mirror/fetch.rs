//! One request to the network of peers: look up, ask the first, ask the next as well when it is late, take the first good
//! answer.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::client::{self, PeerError, PeerHead, PeerRequest, PeerResponse, Timeouts};
use super::metrics::Outcome;
use super::{
    Chain, Content, Found, Kind, MIRRORED_HEADER, Miss, NodeId, Shared, VERIFIED_BODY, Verified, WAIT_HEADER, Wanted,
    health, relay, siblings, verify,
};
use crate::hosts::NODE_HEADER;
use crate::oci::{ContentRange, Digest, Key, MAX_MANIFEST_BYTES, RangeOutcome, parse_range};
use crate::router::Peer;

/// How long a peer that failed lately may take to connect, and to answer.
const PROBE: Duration = Duration::from_millis(500);

type Attempt = BoxFuture<'static, (Peer, Result<Taken, PeerError>)>;

/// A good answer.
pub(super) enum Taken {
    /// It is at hand.
    Content(Content),
    /// Its body is still to come.
    Streamed(Streamed),
}

/// A response to be relayed.
pub(super) struct Streamed {
    pub(super) address: SocketAddr,
    pub(super) response: PeerResponse,
    /// Where it begins in the blob, and the blob's length, for a part.
    pub(super) part: Option<(u64, u64)>,
    /// The nodes that it comes through, if the peer is still receiving it.
    pub(super) chain: Option<Chain>,
}

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
    let (peer, taken) = match race(shared, wanted, &HashSet::new()).await {
        Ok(taken) => taken,
        Err(miss) if wanted.kind == Kind::Manifest => return Err(miss),
        Err(miss) => siblings::wait(shared, wanted).await.ok_or(miss)?,
    };
    if let Some(pull) = &wanted.pull {
        shared.siblings.gave(pull, &peer, now());
    }
    let content = match taken {
        Taken::Content(content) => content,
        Taken::Streamed(streamed) => {
            let part = streamed.part;
            Content::Relay { body: relay::body(shared, wanted, streamed), part }
        }
    };
    Ok(Found { peer: Some(peer), content })
}

/// The first good answer of a peer that is not among `excluded`.
pub(super) async fn race(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    excluded: &HashSet<SocketAddr>,
) -> Result<(Peer, Taken), Miss> {
    let mut race = Race {
        shared,
        wanted,
        candidates: shared.sources.of(&wanted.key, |address| excluded.contains(address), now()).into(),
        attempts: FuturesUnordered::new(),
        found: 0,
        tried: 0,
    };
    race.found = race.candidates.len();
    if race.found > 0
        && let Some(taken) = race.run(None, excluded).await
    {
        return Ok(taken);
    }
    // Those who were remembered do not count against those who are found now.
    race.tried = 0;
    let lookup = shared.router.lookup(&wanted.key);
    let taken = race.run(Some(lookup), excluded).await;
    taken.ok_or(Miss { found: race.found, tried: race.tried })
}

fn now() -> std::time::Instant {
    std::time::Instant::now()
}

async fn next_peer(lookup: &mut Option<mpsc::Receiver<Peer>>) -> Option<Peer> {
    match lookup {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

impl Race<'_> {
    /// Asks the candidates, and those that `lookup` finds, until one gives a good answer or there is nobody left to ask.
    async fn run(
        &mut self,
        mut lookup: Option<mpsc::Receiver<Peer>>,
        excluded: &HashSet<SocketAddr>,
    ) -> Option<(Peer, Taken)> {
        let start = Instant::now();
        let until = start + self.shared.settings.resolve_timeout;
        let mut resolving = lookup.is_some();
        let mut hedge_at = start;
        loop {
            if self.wants_next(hedge_at) {
                self.ask_next();
                hedge_at = Instant::now() + self.shared.settings.hedge;
            }
            if self.is_lost(lookup.is_some()) {
                if resolving {
                    self.shared.metrics.resolved(start.elapsed().as_secs_f64());
                }
                return None;
            }
            tokio::select! {
                biased;
                Some((peer, result)) = self.attempts.next() => match result {
                    Ok(taken) => {
                        self.shared.sources.found(&self.wanted.key, &peer, now());
                        return Some((peer, taken));
                    }
                    Err(error) => {
                        debug!(key = %self.wanted.key, peer = %peer.id, %error, "peer gave nothing");
                        for address in &peer.addresses {
                            self.shared.sources.failed(&self.wanted.key, address);
                        }
                        hedge_at = Instant::now();
                    }
                },
                peer = next_peer(&mut lookup) => match peer {
                    Some(peer) if peer.addresses.iter().all(|address| excluded.contains(address)) => {}
                    Some(peer) => {
                        if std::mem::take(&mut resolving) {
                            self.shared.metrics.resolved(start.elapsed().as_secs_f64());
                        }
                        self.found += 1;
                        self.shared.sources.found(&self.wanted.key, &peer, now());
                        self.candidates.push_back(peer);
                    }
                    None => lookup = None,
                },
                () = sleep_until(until), if lookup.is_some() => lookup = None,
                () = sleep_until(hedge_at), if self.can_ask() => {}
            }
        }
    }

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
        // In the order in which they were found, which the router shuffles; those that failed lately come last.
        let now = now();
        let is_good =
            |peer: &Peer| peer.addresses.iter().any(|address| !self.shared.health.is_set_aside(*address, now));
        let good = self.candidates.iter().position(is_good);
        let Some(peer) = self.candidates.remove(good.unwrap_or(0)) else { return };
        self.tried += 1;
        // One that failed lately gets a chance to show that it is well again, not the time to make the client wait.
        let timeouts = self.shared.settings.timeouts;
        let timeouts = if good.is_some() { timeouts } else { timeouts.at_most(PROBE) };
        let (shared, wanted) = (Arc::clone(self.shared), self.wanted.clone());
        self.attempts.push(Box::pin(async move {
            let result = attempt(&shared, &wanted, &peer, timeouts).await;
            shared.metrics.attempted(outcome(&result));
            shared.judge(&peer, &result);
            (peer, result)
        }));
    }
}

impl Shared {
    /// Remembers who failed. A peer that refuses works: it has not got what it was said to have.
    fn judge(&self, peer: &Peer, result: &Result<Taken, PeerError>) {
        for &address in &peer.addresses {
            match result {
                Ok(_) | Err(PeerError::Status(404) | PeerError::Circle) => self.health.answered(address),
                Err(_) => self.health.failed(address, now(), health::jitter()),
            }
        }
    }
}

fn outcome(result: &Result<Taken, PeerError>) -> Outcome {
    match result {
        Ok(_) => Outcome::Answered,
        Err(PeerError::Connect(_)) => Outcome::Unreachable,
        Err(PeerError::Late { .. }) => Outcome::Late,
        Err(PeerError::Lost(_)) => Outcome::Lost,
        Err(PeerError::Malformed(_)) => Outcome::Malformed,
        Err(PeerError::Status(_) | PeerError::Circle) => Outcome::Refused,
        Err(PeerError::WrongBytes) => Outcome::WrongBytes,
    }
}

/// Asks one peer. Everything in it is bounded in time by the settings' timeouts, or, for a small body, by the stall bound.
pub(super) async fn attempt(
    shared: &Shared,
    wanted: &Wanted,
    peer: &Peer,
    timeouts: Timeouts,
) -> Result<Taken, PeerError> {
    // A manifest is fetched whole even for a HEAD: what is promised must be at hand when it is asked for.
    let head_only = wanted.head_only && wanted.kind == Kind::Blob;
    let mut extra = format!("{MIRRORED_HEADER}: true\r\nUser-Agent: spegel/{}\r\n", env!("CARGO_PKG_VERSION"));
    if let Some(authorization) = &shared.settings.authorization {
        extra.push_str(&format!("Authorization: {authorization}\r\n"));
    }
    if let Some(wait) = wanted.wait {
        extra.push_str(&format!("{WAIT_HEADER}: {}\r\n", wait.as_millis()));
    }
    if let Some(node) = wanted.node.as_ref().filter(|node| node.bytes().all(|byte| byte.is_ascii_graphic())) {
        extra.push_str(&format!("{NODE_HEADER}: {node}\r\n"));
    }
    let request = PeerRequest {
        method: if head_only { "HEAD" } else { "GET" },
        target: wanted.target.clone(),
        range: wanted.range.clone().filter(|_| !head_only && wanted.kind == Kind::Blob),
        extra,
    };
    let (address, response) = client::request(&shared.pool, &peer.addresses, &request, timeouts).await?;
    match (wanted.kind, response.head.status) {
        (Kind::Manifest, 200) => {
            let verified = manifest(shared, wanted, response, address).await?;
            if wanted.head_only {
                shared.shelf.put(verified.clone(), now());
            }
            Ok(Taken::Content(Content::Verified(verified)))
        }
        (Kind::Blob, 200) if head_only => {
            let length = response.head.content_length;
            shared.keep(address, response);
            Ok(Taken::Content(Content::Head { length }))
        }
        (Kind::Blob, 200 | 206) => blob(shared, wanted, response, address).await,
        (Kind::Blob, 416) if request.range.is_some() => unsatisfiable(&response.head).map(Taken::Content),
        (_, status) => Err(PeerError::Status(status)),
    }
}

impl Shared {
    /// Keeps a connection whose response has been read to its end.
    fn keep(&self, address: SocketAddr, response: PeerResponse) {
        if response.head.keep_alive {
            self.pool.put(address, response.stream);
        }
    }
}

async fn manifest(
    shared: &Shared,
    wanted: &Wanted,
    mut response: PeerResponse,
    address: SocketAddr,
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
    let media_type = response.head.content_type.take();
    shared.keep(address, response);
    Ok(Verified { digest, bytes, media_type })
}

async fn blob(
    shared: &Shared,
    wanted: &Wanted,
    mut response: PeerResponse,
    address: SocketAddr,
) -> Result<Taken, PeerError> {
    let length = response.head.content_length;
    let chain = chain(wanted, &response.head)?;
    let part = match (&wanted.range, response.head.status) {
        (Some(range), 206) => Some(checked_part(range, &response.head)?),
        (Some(_), _) => return Err(PeerError::Malformed("the whole where a part was asked for")),
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
        shared.keep(address, response);
        let verified = Verified { digest: digest.clone(), bytes, media_type: None };
        return Ok(Taken::Content(Content::Verified(verified)));
    }
    Ok(Taken::Streamed(Streamed { address, response, part, chain }))
}

/// The nodes above the one that gets the blob, if the peer is still receiving it. That one must not be among them.
fn chain(wanted: &Wanted, head: &PeerHead) -> Result<Option<Chain>, PeerError> {
    if !head.receiving {
        return Ok(None);
    }
    let chain = head.chain.as_deref().and_then(|text| text.parse::<Chain>().ok());
    let chain = chain.ok_or(PeerError::Malformed("it receives the blob and does not tell from whom"))?;
    match &wanted.node {
        Some(node) if chain.contains(NodeId::of(node)) => Err(PeerError::Circle),
        _ => Ok(Some(chain)),
    }
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

/// Reads a small body to its end. `bound` is for all of it: it is small, and a peer that trickles is of no use.
async fn read_whole(response: &mut PeerResponse, bound: Duration) -> Result<Bytes, PeerError> {
    timeout(bound, read_to_length(response)).await.map_err(|_| PeerError::Late { what: "body", bound })?
}

async fn read_to_length(response: &mut PeerResponse) -> Result<Bytes, PeerError> {
    let length = usize::try_from(response.head.content_length).map_err(|_| PeerError::Malformed("too long"))?;
    let mut bytes = BytesMut::with_capacity(length);
    bytes.extend_from_slice(&response.leftover);
    while bytes.len() < length {
        let mut rest = (&mut response.stream).take((length - bytes.len()) as u64);
        let read = rest.read_buf(&mut bytes).await.map_err(PeerError::Lost)?;
        if read == 0 {
            return Err(PeerError::Lost(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(bytes.freeze())
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).max(1)
}
