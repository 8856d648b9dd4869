//! One request to one peer: what of its answer is used, and what is verified before it is.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{timeout, timeout_at};

use super::client::{self, PeerError, PeerHead, PeerRequest, PeerResponse, Timeouts};
use super::fetch::{Streamed, Taken, Use};
use super::lineage::Tie;
use super::metrics::Outcome;
use super::{
    COMPLAINT_HEADER, Chain, Content, Kind, MIRRORED_HEADER, NodeId, RANK_HEADER, Shared, VERIFIED_BODY, Verified,
    WAIT_HEADER, Wanted, relay, verify,
};
use crate::hosts::NODE_HEADER;
use crate::oci::{ContentRange, Digest, Key, MAX_MANIFEST_BYTES, RangeOutcome, RangeSpec, parse_range};
use crate::router::Peer;
use crate::storm::Rank;
use crate::story::TRACE_HEADER;

/// How much of a blob a peer may lack of what it is to go on with, if it is still receiving that: its client waits meanwhile.
const BEHIND: u64 = 8 << 20;

/// Whom a request met, as far as it came.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Contact {
    /// Which of the peer's addresses; none if it could not be reached.
    pub(super) address: Option<SocketAddr>,
    /// When the response's head was there.
    pub(super) answered: Option<Instant>,
}

/// A request that is counted when its outcome is known, or it is dropped without one.
struct Counted<'a> {
    shared: &'a Shared,
    contact: &'a mut Contact,
    /// From when on it is late.
    late: Instant,
    outcome: Option<Outcome>,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let is_late = self.contact.answered.is_none() && Instant::now() >= self.late;
        let without = if is_late { Outcome::Late } else { Outcome::GivenUp };
        self.shared.metrics.attempted(self.outcome.unwrap_or(without));
    }
}

/// Asks one peer, and notes whom it met. Everything in it is bounded in time by the settings' timeouts, or, for a small body, by
/// the stall bound. It is counted once, also if it is dropped because another gave it first, or its client has left.
pub(super) async fn attempt(
    shared: &Shared,
    wanted: &Wanted,
    peer: &Peer,
    timeouts: Timeouts,
    use_of: Use,
    contact: &mut Contact,
) -> Result<Taken, PeerError> {
    // One that was asked to wait for its own first byte may; another is late once the next one would be asked.
    let patience = if wanted.wait.is_some() { timeouts.head } else { shared.settings.hedge };
    let late = Instant::now() + patience;
    let mut counted = Counted { shared, contact, late, outcome: None };
    let result = ask(shared, wanted, peer, timeouts, use_of, counted.contact).await;
    counted.outcome = Some(outcome(&result));
    result
}

fn outcome(result: &Result<Taken, PeerError>) -> Outcome {
    match result {
        Ok(_) => Outcome::Answered,
        Err(PeerError::Connect(_)) => Outcome::Unreachable,
        Err(PeerError::Late { .. }) => Outcome::Late,
        Err(PeerError::Lost(_) | PeerError::GaveUp) => Outcome::Lost,
        Err(PeerError::Malformed(_) | PeerError::Unfit(_)) => Outcome::Malformed,
        Err(PeerError::Status(_) | PeerError::Circle | PeerError::Spoiled) => Outcome::Refused,
        Err(PeerError::Busy(_)) => Outcome::Busy,
        Err(PeerError::WrongBytes | PeerError::PassedOnWrong(_)) => Outcome::WrongBytes,
        Err(PeerError::NoMemory(_)) => Outcome::NoMemory,
    }
}

async fn ask(
    shared: &Shared,
    wanted: &Wanted,
    peer: &Peer,
    timeouts: Timeouts,
    use_of: Use,
    contact: &mut Contact,
) -> Result<Taken, PeerError> {
    // A manifest is fetched whole even for a HEAD: what is promised must be at hand when it is asked for.
    let head_only = wanted.head_only && wanted.kind == Kind::Blob;
    let request = request(shared, wanted, head_only);
    let asked = client::request(&shared.pool, &peer.addresses, &request, timeouts, &mut contact.address);
    let (address, response) = asked.await?;
    contact.answered = Some(Instant::now());
    shared.peers.told_load(address, response.head.load, Instant::now());
    if response.head.receiving.is_some()
        && shared.blame.is_spoiled(&wanted.key, address, response.head.ingest, Instant::now())
    {
        return Err(PeerError::Spoiled);
    }
    match (wanted.kind, response.head.status) {
        (Kind::Manifest, 200) => {
            let verified = manifest(shared, wanted, response, address).await?;
            if wanted.head_only {
                shared.shelf.put(&verified, Instant::now());
            }
            Ok(Taken::Content(Content::Verified(verified)))
        }
        (Kind::Blob, 200) if head_only => {
            let length = response.head.content_length;
            shared.check_length(&wanted.key, length)?;
            shared.keep(address, response);
            Ok(Taken::Content(Content::Head { length }))
        }
        (Kind::Blob, 200 | 206) => blob(shared, wanted, response, address, use_of).await,
        (Kind::Blob, 416) if request.range.is_some() => {
            let content = unsatisfiable(&response.head)?;
            if let Content::Unsatisfiable { length } = &content {
                shared.check_length(&wanted.key, *length)?;
                wanted.check_total(*length)?;
                if matches!(request.range.as_deref().and_then(RangeSpec::parse), Some(RangeSpec::From { first, .. }) if first < *length)
                {
                    return Err(PeerError::Malformed("it refuses a part that there is"));
                }
            }
            Ok(Taken::Content(content))
        }
        (_, 503) => Err(PeerError::Busy(response.head.holders)),
        (_, status) => Err(PeerError::Status(status)),
    }
}

pub(super) fn request(shared: &Shared, wanted: &Wanted, head_only: bool) -> PeerRequest {
    let mut extra = shared.headers();
    if let Some(wait) = wanted.wait {
        extra.push_str(&format!("{WAIT_HEADER}: {}\r\n", wait.as_millis()));
    }
    if let Some(Rank(rank)) = wanted.rank {
        extra.push_str(&format!("{RANK_HEADER}: {rank}\r\n"));
    }
    if let Some(node) = wanted.node.as_ref().filter(|node| node.bytes().all(|byte| byte.is_ascii_graphic())) {
        extra.push_str(&format!("{NODE_HEADER}: {node}\r\n"));
    }
    extra.push_str(&format!("{TRACE_HEADER}: {}\r\n", wanted.tale.trace().header()));
    PeerRequest {
        method: if head_only { "HEAD" } else { "GET" },
        target: wanted.target.clone(),
        range: wanted.range.clone().filter(|_| !head_only && wanted.kind == Kind::Blob),
        extra,
    }
}

impl Shared {
    /// The header lines of every request to a peer.
    fn headers(&self) -> String {
        let mut lines = format!("{MIRRORED_HEADER}: true\r\nUser-Agent: spegel/{}\r\n", env!("CARGO_PKG_VERSION"));
        if let Some(authorization) = &self.settings.authorization {
            lines.push_str(&format!("Authorization: {authorization}\r\n"));
        }
        lines
    }

    /// A manifest that we saw has told how long this is: containerd fails a pull on any other length.
    fn check_length(&self, key: &Key, length: u64) -> Result<(), PeerError> {
        match key {
            Key::Digest(digest) if !self.sizes.allow(digest, length) => {
                Err(PeerError::Unfit("another length than the manifest tells"))
            }
            _ => Ok(()),
        }
    }

    /// Waits for the memory that a body to be verified needs.
    async fn afford(&self, length: u64) -> Result<OwnedSemaphorePermit, PeerError> {
        let bound = self.settings.stall;
        let acquired = timeout(bound, Arc::clone(&self.budget).acquire_many_owned(kib(length))).await;
        acquired.map_err(|_| PeerError::NoMemory(bound))?.map_err(|_| PeerError::NoMemory(bound))
    }

    /// Keeps a connection whose response has been read to its end.
    pub(super) fn keep(&self, address: SocketAddr, response: PeerResponse) {
        if response.head.keep_alive {
            self.pool.put(address, response.stream, response.probe);
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
    let _permit = shared.afford(response.head.content_length).await?;
    let bound = shared.settings.stall;
    let bytes = read_whole(shared, &mut response, 1).await?.ok_or(PeerError::Late { what: "body", bound })?;
    if !verify::matches(&digest, &bytes) {
        return Err(PeerError::WrongBytes);
    }
    let bytes = shared.deliver(wanted, bytes)?;
    let media_type = response.head.content_type.take();
    shared.keep(address, response);
    Ok(Verified { digest, bytes, media_type })
}

async fn blob(
    shared: &Shared,
    wanted: &Wanted,
    mut response: PeerResponse,
    address: SocketAddr,
    use_of: Use,
) -> Result<Taken, PeerError> {
    let length = response.head.content_length;
    let fed = shared.fed(wanted, &response.head)?;
    let part = match (&wanted.range, response.head.status) {
        (Some(range), 206) => Some(checked_part(range, &response.head)?),
        (Some(_), _) => return Err(PeerError::Malformed("the whole where a part was asked for")),
        (None, 206) => return Err(PeerError::Malformed("a part where the whole was asked for")),
        _ => None,
    };
    shared.check_length(&wanted.key, part.map_or(length, |(_, total)| total))?;
    wanted.check_total(part.map_or(length, |(_, total)| total))?;
    if wanted.resumes && response.head.receiving.is_some_and(|has| has + BEHIND < part.map_or(0, |(start, _)| start)) {
        return Err(PeerError::Unfit("it has too little of it yet"));
    }
    if part.is_none()
        && length <= VERIFIED_BODY
        && let Key::Digest(digest) = &wanted.key
        && let Some(verified) = small(shared, wanted, digest, &mut response, address).await?
    {
        shared.keep(address, response);
        return Ok(Taken::Content(Content::Verified(verified)));
    }
    Ok(Taken::Streamed(Streamed { address, response, part, use_of, fed }))
}

/// A small body, verified. None if its sender is still receiving it and needs longer than the stall bound: then it is relayed as a large one
/// is, which its sender's growth is an excuse for, and which gives our client a head meanwhile. What came of it is in the response again.
async fn small(
    shared: &Shared,
    wanted: &Wanted,
    digest: &Digest,
    response: &mut PeerResponse,
    address: SocketAddr,
) -> Result<Option<Verified>, PeerError> {
    let bound = shared.settings.stall;
    let _permit = shared.afford(response.head.content_length).await?;
    let Some(bytes) = read_whole(shared, response, 2).await? else {
        let late = PeerError::Late { what: "body", bound };
        let Some(before) = response.head.receiving else { return Err(late) };
        // It does not send what it had.
        if before > response.leftover.len() as u64 {
            return Err(late);
        }
        return match relay::position(shared, wanted, address).await {
            Some((now, receives)) if receives || now > before => Ok(None),
            _ => Err(late),
        };
    };
    if !verify::matches(digest, &bytes) {
        return Err(match response.head.receiving {
            Some(_) => PeerError::PassedOnWrong(response.head.ingest),
            None => PeerError::WrongBytes,
        });
    }
    Ok(Some(Verified { digest: digest.clone(), bytes: shared.deliver(wanted, bytes)?, media_type: None }))
}

impl Shared {
    /// Notes that our containerd is about to be given this by nodes that still receive it themselves, if that is so. None of them may get it
    /// from us.
    fn fed(&self, wanted: &Wanted, head: &PeerHead) -> Result<Option<Tie>, PeerError> {
        let Some(chain) = chain(wanted, head)? else { return Ok(None) };
        match &wanted.key {
            Key::Digest(digest) if wanted.may_be_fed() => {
                self.lineage.adopt(digest, chain).map(Some).ok_or(PeerError::Circle)
            }
            _ => Ok(None),
        }
    }
}

/// The nodes above the one that gets the blob, if the peer is still receiving it. That one must not be among them.
fn chain(wanted: &Wanted, head: &PeerHead) -> Result<Option<Chain>, PeerError> {
    if head.receiving.is_none() {
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
pub(super) fn checked_part(asked: &str, head: &PeerHead) -> Result<(u64, u64), PeerError> {
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

pub(super) fn unsatisfiable(head: &PeerHead) -> Result<Content, PeerError> {
    match told_range(head) {
        Some(ContentRange::Unsatisfied { total }) => Ok(Content::Unsatisfiable { length: total }),
        _ => Err(PeerError::Status(head.status)),
    }
}

fn told_range(head: &PeerHead) -> Option<ContentRange> {
    head.content_range.as_deref().and_then(|text| text.parse().ok())
}

/// Bytes that count against a budget as long as anybody has them.
struct Afforded {
    bytes: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl Shared {
    /// Verified bytes on their way to a client. They count against another budget than those that are being verified, which slow clients must not
    /// use up; beyond it only our own containerd gets any.
    fn deliver(&self, wanted: &Wanted, bytes: Bytes) -> Result<Bytes, PeerError> {
        match Arc::clone(&self.deliveries).try_acquire_many_owned(kib(bytes.len() as u64)) {
            Ok(permit) => Ok(Bytes::from_owner(Afforded { bytes, _permit: permit })),
            Err(_) if wanted.is_own => Ok(bytes),
            Err(_) => Err(PeerError::NoMemory(Duration::ZERO)),
        }
    }
}

impl AsRef<[u8]> for Afforded {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads a small body to its end, which takes so many `times` the stall timeout at the most, in each of which as much has to come as the floor says.
/// None if less came; what did is in the response again.
async fn read_whole(shared: &Shared, response: &mut PeerResponse, times: u32) -> Result<Option<Bytes>, PeerError> {
    let (bound, floor) = (shared.settings.stall, shared.settings.floor);
    let deadline = tokio::time::Instant::now() + bound * times;
    let length = usize::try_from(response.head.content_length).map_err(|_| PeerError::Malformed("too long"))?;
    let least = usize::try_from(floor.saturating_mul(bound.as_secs().max(1))).unwrap_or(usize::MAX).max(1);
    let mut bytes = BytesMut::with_capacity(length);
    bytes.extend_from_slice(&response.leftover);
    let is_growing = response.head.receiving.is_some();
    loop {
        let before = bytes.len();
        let until = deadline.min(tokio::time::Instant::now() + bound);
        match timeout_at(until, fill(&mut response.stream, &mut bytes, length)).await {
            Ok(Ok(())) => return Ok(Some(bytes.freeze())),
            Ok(Err(error)) if is_growing && error.kind() == ErrorKind::UnexpectedEof => return Err(PeerError::GaveUp),
            Ok(Err(error)) => return Err(PeerError::Lost(error)),
            Err(_) if bytes.len() - before >= least && until < deadline => {}
            Err(_) => {
                response.leftover = bytes.freeze();
                return Ok(None);
            }
        }
    }
}

/// Reads until there are `length` bytes. What was read is kept when this is dropped.
async fn fill(stream: &mut TcpStream, bytes: &mut BytesMut, length: usize) -> std::io::Result<()> {
    while bytes.len() < length {
        let mut rest = (&mut *stream).take((length - bytes.len()) as u64);
        if rest.read_buf(bytes).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).max(1)
}

/// Tells peers that what they sent is wrong, so that they look at what they have. Nothing waits for it.
pub(super) fn complain(shared: &Arc<Shared>, peers: Vec<SocketAddr>, target: &str) {
    let extra = format!("{}{COMPLAINT_HEADER}: true\r\n", shared.headers());
    let request = PeerRequest { method: "HEAD", target: target.to_owned(), range: None, extra };
    for peer in peers {
        let Ok(permit) = Arc::clone(&shared.searches).try_acquire_owned() else { return };
        let (shared, request) = (Arc::clone(shared), request.clone());
        tokio::spawn(async move {
            let _permit = permit;
            // One that does not answer is barred all the same.
            let _ = client::request(&shared.pool, &[peer], &request, shared.settings.timeouts, &mut None).await;
        });
    }
}
