//! One request to the network of peers: look up, ask the best, ask the next as well when it is late, take the first good answer.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use rand::Rng as _;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{SemaphorePermit, mpsc};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::client::{self, PeerError, PeerHead, PeerRequest, PeerResponse, Timeouts};
use super::metrics::Outcome;
use super::peers::{Leave, jitter};
use super::{
    COMPLAINT_HEADER, Chain, Content, Found, Kind, MIRRORED_HEADER, Miss, NodeId, RANK_HEADER, Shared, VERIFIED_BODY,
    Verified, WAIT_HEADER, Wanted, family, relay, siblings, storms, verify,
};
use crate::hosts::NODE_HEADER;
use crate::oci::{ContentRange, Digest, Key, MAX_MANIFEST_BYTES, RangeOutcome, parse_range};
use crate::router::Peer;
use crate::storm::Rank;

/// How long a peer that failed lately may take to connect, and to answer.
const PROBE: Duration = Duration::from_secs(1);
/// After how long the next peer is asked beside a probe.
const BESIDE_PROBE: Duration = Duration::from_millis(50);
/// How many peers are asked beyond those that a busy one does not count as.
const MORE: usize = 3;
/// How long a search goes on for the sake of later requests.
const SEARCH_ON: Duration = Duration::from_secs(2);

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
    pub(super) use_of: Use,
    /// The nodes that it comes through, if the peer is still receiving it.
    pub(super) chain: Option<Chain>,
}

/// A request or a body of a peer that is under way, until dropped.
pub(super) struct Use {
    shared: Arc<Shared>,
    peer: SocketAddr,
}

impl Use {
    pub(super) fn new(shared: &Arc<Shared>, peer: SocketAddr) -> Self {
        shared.peers.begins(peer, now());
        Self { shared: Arc::clone(shared), peer }
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.shared.peers.ends(self.peer);
    }
}

/// The state of one request.
struct Race<'a> {
    shared: &'a Arc<Shared>,
    wanted: &'a Wanted,
    excluded: &'a HashSet<SocketAddr>,
    candidates: Vec<Peer>,
    /// Nobody is asked twice in one request.
    asked: HashSet<SocketAddr>,
    attempts: FuturesUnordered<Attempt>,
    found: usize,
    tried: usize,
    /// Those of them that answered that they have not got it.
    refused: usize,
}

pub(super) async fn fetch(shared: &Arc<Shared>, wanted: &Wanted) -> Result<Found, Miss> {
    let (peer, taken) = match race(shared, wanted, &HashSet::new()).await {
        Ok(taken) => taken,
        Err(miss) if wanted.kind == Kind::Manifest => return Err(miss),
        Err(miss) => match &shared.storms {
            Some(storms) if wanted.is_own && !wanted.head_only => {
                storms::hold(shared, storms, wanted).await.ok_or(miss)?
            }
            _ => siblings::wait(shared, wanted).await.ok_or(miss)?,
        },
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
        excluded,
        candidates: Vec::new(),
        asked: HashSet::new(),
        attempts: FuturesUnordered::new(),
        found: 0,
        tried: 0,
        refused: 0,
    };
    for peer in shared.sources.of(&wanted.key, |_| false, now()) {
        race.consider(peer);
    }
    if race.found > 0
        && let Some(taken) = race.run(None).await
    {
        return Ok(taken);
    }
    // What was remembered of who has it may be out of date: those who said no do not count against those who are found now.
    race.tried -= race.refused;
    let lookup = shared.router.lookup(&wanted.key);
    let taken = race.run(Some(lookup)).await;
    taken.ok_or(Miss { found: race.found, tried: race.asked.len() })
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
    async fn run(&mut self, mut lookup: Option<mpsc::Receiver<Peer>>) -> Option<(Peer, Taken)> {
        let start = Instant::now();
        let until = start + self.shared.settings.resolve_timeout;
        let mut resolving = lookup.is_some();
        let mut hedge_at = start;
        loop {
            if self.can_ask() && (self.attempts.is_empty() || Instant::now() >= hedge_at) {
                match self.ask_next() {
                    Some(patience) => hedge_at = Instant::now() + patience,
                    // Those that were left are set aside.
                    None => continue,
                }
            }
            if self.attempts.is_empty() && !self.can_ask() && (lookup.is_none() || self.is_exhausted()) {
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
                        self.learn(&taken);
                        return Some((peer, taken));
                    }
                    Err(error) => {
                        self.gave_nothing(&peer, error);
                        hedge_at = Instant::now();
                    }
                },
                peer = next_peer(&mut lookup) => match peer {
                    Some(peer) => {
                        if std::mem::take(&mut resolving) {
                            self.shared.metrics.resolved(start.elapsed().as_secs_f64());
                        }
                        self.found(peer);
                        // With all that are known at once there is a choice.
                        while let Some(Ok(peer)) = lookup.as_mut().map(mpsc::Receiver::try_recv) {
                            self.found(peer);
                        }
                    }
                    None => lookup = None,
                },
                () = sleep_until(until), if lookup.is_some() => self.search_on(lookup.take()),
                () = sleep_until(hedge_at), if self.can_ask() => {}
            }
        }
    }

    fn found(&mut self, peer: Peer) {
        self.shared.sources.found(&self.wanted.key, &peer, now());
        self.consider(peer);
    }

    /// Takes a peer as a candidate, unless there is a reason not to ask it.
    fn consider(&mut self, peer: Peer) {
        let (now, key) = (now(), &self.wanted.key);
        let is_out = |address: &SocketAddr| {
            self.excluded.contains(address)
                || self.asked.contains(address)
                || self.shared.blame.is_barred(key, *address, now)
        };
        if peer.addresses.iter().any(is_out) || self.candidates.iter().any(|known| known.addresses == peer.addresses) {
            return;
        }
        self.found += 1;
        self.candidates.push(peer);
    }

    fn is_exhausted(&self) -> bool {
        let retries = self.shared.settings.resolve_retries;
        self.tried >= retries || self.asked.len() >= 2 * retries + MORE
    }

    fn can_ask(&self) -> bool {
        !self.candidates.is_empty() && !self.is_exhausted()
    }

    /// Asks the best of the candidates, and says for how long it alone; nobody if all that are left are set aside.
    fn ask_next(&mut self) -> Option<Duration> {
        while let Some(peer) = self.take_best() {
            let Some(&first) = peer.addresses.first() else { continue };
            let (timeouts, patience) = match self.shared.peers.may_ask(first, now()) {
                Leave::SetAside => continue,
                Leave::Ask => {
                    let patience = self.shared.peers.patience(first, self.shared.settings.hedge);
                    (self.shared.settings.timeouts, patience)
                }
                // It gets a chance to show that it is well again, not the time to make the client wait.
                Leave::Probe => (self.shared.settings.timeouts.at_most(PROBE), BESIDE_PROBE),
            };
            self.tried += 1;
            self.asked.extend(&peer.addresses);
            let (shared, wanted) = (Arc::clone(self.shared), self.wanted.clone());
            self.attempts.push(Box::pin(async move {
                let start = now();
                let use_of = Use::new(&shared, first);
                let result = attempt(&shared, &wanted, &peer, timeouts, use_of).await;
                shared.metrics.attempted(outcome(&result));
                shared.judge(&wanted.key, &peer, start, &result);
                (peer, result)
            }));
            return Some(patience);
        }
        None
    }

    /// The better one of two that chance names, so that nobody's first choice is everybody's. Busy ones come last.
    fn take_best(&mut self) -> Option<Peer> {
        let (now, mut rng) = (now(), rand::rng());
        let costs: Vec<_> = self.candidates.iter().map(|peer| self.cost(peer, now)).collect();
        let best = costs.iter().map(|(class, _)| *class).min()?;
        let eligible: Vec<usize> = (0..costs.len()).filter(|n| costs[*n].0 == best).collect();
        let mut draw = || eligible[rng.random_range(0..eligible.len())];
        let (one, other) = (draw(), draw());
        Some(self.candidates.swap_remove(if costs[other].1 < costs[one].1 { other } else { one }))
    }

    /// First whether the peer is busy and whether it is in another zone, then how long a body of it takes.
    fn cost(&self, peer: &Peer, now: std::time::Instant) -> ((bool, bool), f64) {
        let Some(first) = peer.addresses.first() else { return ((true, true), f64::INFINITY) };
        let (is_busy, seconds) = self.shared.peers.cost(*first, peer.load, now);
        let own = &self.shared.settings.zone;
        let is_far = own.is_some() && peer.zone.is_some() && peer.zone != *own;
        ((is_busy, is_far), seconds)
    }

    fn gave_nothing(&mut self, peer: &Peer, error: PeerError) {
        debug!(key = %self.wanted.key, peer = %peer.id, %error, "peer gave nothing");
        for address in &peer.addresses {
            self.shared.sources.failed(&self.wanted.key, address);
        }
        if matches!(error, PeerError::Status(404) | PeerError::Circle) {
            self.refused += 1;
        }
        if let PeerError::Busy(holders) = error {
            // It has it, and told us who else does: that is no failed try.
            self.tried -= 1;
            let by = peer.addresses.first().copied();
            for address in holders.into_iter().filter(|address| by.is_some_and(|by| client::is_plausible(*address, by)))
            {
                self.consider(Peer {
                    id: address.to_string().into(),
                    addresses: vec![address],
                    zone: None,
                    load: None,
                });
            }
        }
    }

    /// What is beneath a manifest can be had where the manifest is, and no search for it can come too late.
    fn learn(&self, taken: &Taken) {
        if let (Kind::Manifest, Taken::Content(Content::Verified(verified))) = (self.wanted.kind, taken) {
            let children = family::children(&verified.bytes);
            self.shared.sizes.learn(&children);
            let keys = children.into_iter().map(|(digest, _)| Key::Digest(digest));
            let keys = keys.chain([Key::Digest(verified.digest.clone())]);
            self.shared.sources.inherit(&self.wanted.key, keys, now());
        }
    }

    /// A search that comes too late for this request serves the next one.
    fn search_on(&self, lookup: Option<mpsc::Receiver<Peer>>) {
        let (Some(mut lookup), Ok(permit)) = (lookup, Arc::clone(&self.shared.searches).try_acquire_owned()) else {
            return;
        };
        let (shared, key) = (Arc::clone(self.shared), self.wanted.key.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let search = async {
                while let Some(peer) = lookup.recv().await {
                    shared.sources.found(&key, &peer, now());
                }
            };
            // Nobody waits for it.
            let _ = timeout(SEARCH_ON, search).await;
        });
    }
}

impl Shared {
    /// Remembers who failed. A peer that refuses works: it has not got what it was said to have.
    fn judge(&self, key: &Key, peer: &Peer, start: std::time::Instant, result: &Result<Taken, PeerError>) {
        let now = now();
        let took = now.duration_since(start);
        for &address in &peer.addresses {
            match result {
                Ok(_) | Err(PeerError::Status(404) | PeerError::Circle) => self.peers.answered(address, took, now),
                Err(PeerError::Busy(_)) => self.peers.busy(address, now),
                Err(PeerError::WrongBytes) => {
                    self.peers.failed(address, took, now, jitter());
                    if let Key::Digest(digest) = key {
                        self.punish(digest, &self.blame.convicted(key, address, now));
                    }
                }
                Err(_) => self.peers.failed(address, took, now, jitter()),
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
        Err(PeerError::Busy(_)) => Outcome::Busy,
        Err(PeerError::WrongBytes) => Outcome::WrongBytes,
    }
}

/// Asks one peer. Everything in it is bounded in time by the settings' timeouts, or, for a small body, by the stall bound.
pub(super) async fn attempt(
    shared: &Shared,
    wanted: &Wanted,
    peer: &Peer,
    timeouts: Timeouts,
    use_of: Use,
) -> Result<Taken, PeerError> {
    // A manifest is fetched whole even for a HEAD: what is promised must be at hand when it is asked for.
    let head_only = wanted.head_only && wanted.kind == Kind::Blob;
    let request = request(shared, wanted, head_only);
    let (address, response) = client::request(&shared.pool, &peer.addresses, &request, timeouts).await?;
    shared.peers.told_load(address, response.head.load, now());
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
            shared.check_length(&wanted.key, length)?;
            shared.keep(address, response);
            Ok(Taken::Content(Content::Head { length }))
        }
        (Kind::Blob, 200 | 206) => blob(shared, wanted, response, address, use_of).await,
        (Kind::Blob, 416) if request.range.is_some() => unsatisfiable(&response.head).map(Taken::Content),
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
                Err(PeerError::Malformed("another length than the manifest tells"))
            }
            _ => Ok(()),
        }
    }

    /// Waits for the memory that a body to be verified needs.
    async fn afford(&self, length: u64) -> Result<SemaphorePermit<'_>, PeerError> {
        let bound = self.settings.stall;
        let late = || PeerError::Late { what: "memory for its body", bound };
        timeout(bound, self.budget.acquire_many(kib(length))).await.map_err(|_| late())?.map_err(|_| late())
    }

    /// Keeps a connection whose response has been read to its end.
    pub(super) fn keep(&self, address: SocketAddr, response: PeerResponse) {
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
    let _budget = shared.afford(response.head.content_length).await?;
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
    use_of: Use,
) -> Result<Taken, PeerError> {
    let length = response.head.content_length;
    let chain = chain(wanted, &response.head)?;
    let part = match (&wanted.range, response.head.status) {
        (Some(range), 206) => Some(checked_part(range, &response.head)?),
        (Some(_), _) => return Err(PeerError::Malformed("the whole where a part was asked for")),
        (None, 206) => return Err(PeerError::Malformed("a part where the whole was asked for")),
        _ => None,
    };
    shared.check_length(&wanted.key, part.map_or(length, |(_, total)| total))?;
    if part.is_none()
        && length <= VERIFIED_BODY
        && let Key::Digest(digest) = &wanted.key
    {
        let _budget = shared.afford(length).await?;
        let bytes = read_whole(&mut response, shared.settings.stall).await?;
        if !verify::matches(digest, &bytes) {
            return Err(PeerError::WrongBytes);
        }
        shared.keep(address, response);
        let verified = Verified { digest: digest.clone(), bytes, media_type: None };
        return Ok(Taken::Content(Content::Verified(verified)));
    }
    Ok(Taken::Streamed(Streamed { address, response, part, use_of, chain }))
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
            let _ = client::request(&shared.pool, &[peer], &request, shared.settings.timeouts).await;
        });
    }
}
