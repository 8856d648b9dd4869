//! One request to the network of peers: look up, ask the best, ask the next as well when it is late, take the first good answer.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use rand::Rng as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use super::attempt::{Contact, attempt};
use super::blame::Sent;
use super::client::{self, PeerError, PeerResponse};
use super::flights::Landed;
use super::lineage::Tie;
use super::peers::{Leave, jitter};
use super::storms::{self, Line, Offer};
use super::{Content, Found, Kind, Miss, Shared, Wanted, family, relay, siblings};
use crate::oci::{Key, RangeSpec};
use crate::router::Peer;
use crate::story::{Carriage, Origin};

/// How long a peer that failed lately may take to connect, and to answer.
const PROBE: Duration = Duration::from_secs(1);
/// After how long the next peer is asked beside a probe.
const BESIDE_PROBE: Duration = Duration::from_millis(50);
/// How many peers are asked beyond those that a busy one does not count as.
const MORE: usize = 3;
/// How long a search goes on for the sake of later requests.
const SEARCH_ON: Duration = Duration::from_secs(2);
/// What comes of asking nobody.
const NOBODY: PeerError = PeerError::Malformed("nobody gave it");

/// A candidate as it is known, what of the peer was met, and what it gave.
type Attempt = BoxFuture<'static, (Candidate, Peer, Result<Taken, PeerError>)>;

/// A peer that may be asked, and how it was found.
struct Candidate {
    peer: Peer,
    found: Origin,
}

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
    /// Our containerd gets it by way of nodes that still receive it, as long as this lasts.
    pub(super) fed: Option<Tie>,
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
    candidates: Vec<Candidate>,
    /// Nobody is asked twice in one request.
    asked: HashSet<SocketAddr>,
    attempts: FuturesUnordered<Attempt>,
    found: usize,
    /// Peers that were asked, and how many of them count.
    met: usize,
    tried: usize,
    /// Those of them that answered that they have not got it.
    refused: usize,
}

pub(super) async fn fetch(shared: &Arc<Shared>, wanted: &Wanted) -> Result<Found, Miss> {
    // Before anybody is asked, who may be asking us at this moment.
    let _sought = shared.seek(wanted, wanted.first_byte());
    shared.storms.iter().for_each(|storms| storms.look_for_name(wanted));
    let (peer, taken, line) = match shared.storms.as_ref().filter(|storms| storms.concern(wanted)) {
        Some(storms) => match storms::hold(shared, storms, wanted).await {
            Offer::Taken(peer, taken, line) => (peer, *taken, Some(line)),
            Offer::Unheld(line) => {
                let ((peer, taken), line) = storms::follow(line, race_or_wait(shared, wanted)).await?;
                (peer, taken, line)
            }
            Offer::Nobody(line) => {
                let ((peer, taken), line) = storms::follow(Some(line), race_once(shared, wanted)).await?;
                (peer, taken, line)
            }
        },
        None => {
            let (peer, taken) = race_or_wait(shared, wanted).await?;
            (peer, taken, None)
        }
    };
    shared.learn(wanted, &taken);
    if let Some(pull) = &wanted.pull {
        shared.siblings.gave(pull, &peer, now());
    }
    let content = match taken {
        Taken::Content(content) => {
            line.inspect(Line::ended);
            if let Content::Verified(_) = &content {
                wanted.tale.carried(Carriage::Verified);
            }
            content
        }
        Taken::Streamed(streamed) => {
            let part = streamed.part;
            wanted.tale.carried(Carriage::Relayed);
            Content::Relay { body: relay::body(shared, wanted, streamed, line), part }
        }
    };
    Ok(Found { peer: Some(peer), content })
}

/// The first good answer; of a blob of an image that a peer gave others of, that one's once it has it.
async fn race_or_wait(shared: &Arc<Shared>, wanted: &Wanted) -> Result<(Peer, Taken), Miss> {
    match race_once(shared, wanted).await {
        Err(miss) if wanted.kind == Kind::Blob => siblings::wait(shared, wanted).await.ok_or(miss),
        other => other,
    }
}

/// The first good answer, which those who ask for the same at this time have in common, if it is small.
async fn race_once(shared: &Arc<Shared>, wanted: &Wanted) -> Result<(Peer, Taken), Miss> {
    let is_whole = wanted.range.is_none() && !wanted.head_only && matches!(wanted.key, Key::Digest(_));
    let flight = is_whole.then(|| shared.flights.join(&wanted.key));
    let Some(flight) = flight else { return race(shared, wanted, &HashSet::new()).await };
    // One who came upon a slow peer must not keep the others from better ones.
    let Ok(mut landed) = timeout(shared.settings.hold, flight.turn()).await else {
        return race(shared, wanted, &HashSet::new()).await;
    };
    match &*landed {
        Landed::Content(content) => {
            let (peer, verified) = (**content).clone();
            wanted.tale.given(peer.addresses.first().copied(), Origin::Shared);
            return Ok((peer, Taken::Content(Content::Verified(verified))));
        }
        Landed::Apart => drop(landed),
        Landed::Not => {
            let result = race(shared, wanted, &HashSet::new()).await;
            *landed = match &result {
                Ok((peer, Taken::Content(Content::Verified(verified)))) => {
                    Landed::Content(Box::new((peer.clone(), verified.clone())))
                }
                _ => Landed::Apart,
            };
            return result;
        }
    }
    race(shared, wanted, &HashSet::new()).await
}

/// The first good answer of a peer that is not among `excluded`.
pub(super) async fn race(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    excluded: &HashSet<SocketAddr>,
) -> Result<(Peer, Taken), Miss> {
    let mut race = Race::new(shared, wanted, excluded);
    for peer in shared.sources.of(&wanted.key, |_| false, now()) {
        race.consider(peer, Origin::Remembered);
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
    taken.ok_or(Miss { found: race.found, tried: race.met })
}

/// A good answer of one of these, whoever gives the first.
pub(super) async fn race_among(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    peers: Vec<Peer>,
) -> (Peer, Result<Taken, PeerError>) {
    let nobody = HashSet::new();
    let mut race = Race::new(shared, wanted, &nobody);
    let Some(first) = peers.first().cloned() else { return (Peer::new("".into(), Vec::new()), Err(NOBODY)) };
    peers.into_iter().for_each(|peer| race.consider(peer, Origin::Lookup));
    match race.run(None).await {
        Some((peer, taken)) => (peer, Ok(taken)),
        None => (first, Err(NOBODY)),
    }
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

impl<'a> Race<'a> {
    fn new(shared: &'a Arc<Shared>, wanted: &'a Wanted, excluded: &'a HashSet<SocketAddr>) -> Self {
        Self {
            shared,
            wanted,
            excluded,
            candidates: Vec::new(),
            asked: HashSet::new(),
            attempts: FuturesUnordered::new(),
            found: 0,
            met: 0,
            tried: 0,
            refused: 0,
        }
    }

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
                Some((Candidate { peer, found }, met, result)) = self.attempts.next() => match result {
                    Ok(taken) => {
                        self.wanted.tale.given(met.addresses.first().copied(), found);
                        self.shared.sources.found(&self.wanted.key, &peer, now());
                        return Some((met, taken));
                    }
                    Err(error) => {
                        self.asked.extend(&met.addresses);
                        self.gave_nothing(&met, error);
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
        self.consider(peer, Origin::Lookup);
    }

    /// Takes a peer as a candidate, unless there is a reason not to ask it.
    fn consider(&mut self, mut peer: Peer, found: Origin) {
        let (now, key) = (now(), &self.wanted.key);
        let is_out = |address: &SocketAddr| {
            self.excluded.contains(address)
                || self.asked.contains(address)
                || self.shared.blame.is_barred(key, *address, now)
        };
        // It may name addresses that are others': what is held against those says nothing about the rest.
        peer.addresses.retain(|address| !is_out(address));
        if peer.addresses.is_empty() || self.candidates.iter().any(|known| known.peer.addresses == peer.addresses) {
            return;
        }
        self.found += 1;
        self.wanted.tale.knows();
        self.candidates.push(Candidate { peer, found });
    }

    fn is_exhausted(&self) -> bool {
        let retries = self.shared.settings.resolve_retries;
        self.tried >= retries || self.met >= 2 * retries + MORE
    }

    fn can_ask(&self) -> bool {
        !self.candidates.is_empty() && !self.is_exhausted()
    }

    /// Asks the best of the candidates, and says for how long it alone; nobody if all that are left are set aside.
    fn ask_next(&mut self) -> Option<Duration> {
        while let Some(candidate) = self.take_best() {
            let Some(&first) = candidate.peer.addresses.first() else { continue };
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
            self.met += 1;
            self.asked.insert(first);
            self.wanted.tale.asks(!self.attempts.is_empty());
            let (shared, wanted) = (Arc::clone(self.shared), self.wanted.clone());
            self.attempts.push(Box::pin(async move {
                let (start, mut contact) = (now(), Contact::default());
                let use_of = Use::new(&shared, first);
                let peer = &candidate.peer;
                let result = attempt(&shared, &wanted, peer, timeouts, use_of, &mut contact).await;
                let now = now();
                let took = [contact.answered.unwrap_or(now), now].map(|end| end.duration_since(start));
                // Only what was met is judged, or what was tried in vain: a peer may name addresses that are others'.
                let addresses = match contact.address {
                    Some(address) => vec![address],
                    None => peer.addresses.iter().take(client::MAX_TRIED).copied().collect(),
                };
                let met = Peer { addresses, ..peer.clone() };
                shared.judge(&wanted.key, &met, took, &result);
                (candidate, met, result)
            }));
            return Some(patience);
        }
        None
    }

    /// The better one of two that chance names, so that nobody's first choice is everybody's. Busy ones come last.
    fn take_best(&mut self) -> Option<Candidate> {
        let (now, mut rng) = (now(), rand::rng());
        let costs: Vec<_> = self.candidates.iter().map(|known| self.cost(&known.peer, now)).collect();
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
        let tale = &self.wanted.tale;
        debug!(trace_id = %tale.trace().id(), key = %self.wanted.key, peer = %peer.id, %error, "peer gave nothing");
        tale.failed(peer.addresses.first().copied(), &error);
        for address in &peer.addresses {
            self.shared.sources.failed(&self.wanted.key, address);
        }
        if matches!(error, PeerError::Status(404) | PeerError::Circle | PeerError::Spoiled) {
            self.refused += 1;
        }
        if let PeerError::Busy(holders) = error {
            // It has it, and told us who else does: that is no failed try.
            self.tried -= 1;
            let by = peer.addresses.first().copied();
            let may_be_asked = |address: &SocketAddr| {
                by.is_some_and(|by| client::is_plausible(*address, by)) && self.shared.router.accepts(*address)
            };
            for address in holders.into_iter().filter(may_be_asked) {
                let id = address.to_string().into();
                self.consider(Peer { id, addresses: vec![address], zone: None, load: None }, Origin::Named);
            }
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
    /// What is beneath a manifest can be had where the manifest is, and no search for it can come too late.
    fn learn(&self, wanted: &Wanted, taken: &Taken) {
        if let (Kind::Manifest, Taken::Content(Content::Verified(verified))) = (wanted.kind, taken) {
            let children = family::children(&verified.bytes);
            self.sizes.learn(&children);
            let keys = children.into_iter().map(|(digest, _)| Key::Digest(digest));
            let keys = keys.chain([Key::Digest(verified.digest.clone())]);
            self.sources.inherit(&wanted.key, keys, now());
        }
    }

    /// Remembers who failed. A peer that refuses works: it has not got what it was said to have. `took` is the time until its head and until
    /// all that was read of its answer.
    fn judge(&self, key: &Key, peer: &Peer, took: [Duration; 2], result: &Result<Taken, PeerError>) {
        let now = now();
        if let Err(error) = result {
            self.convict(key, peer, error);
        }
        for &address in &peer.addresses {
            if let Ok(Taken::Content(Content::Verified(_))) = result {
                self.peers.delivered(address, now);
            }
            match result {
                Ok(_)
                | Err(
                    PeerError::Status(404)
                    | PeerError::Circle
                    | PeerError::Spoiled
                    | PeerError::GaveUp
                    | PeerError::Unfit(_)
                    | PeerError::PassedOnWrong(_),
                ) => self.peers.answered(address, took[0], now),
                Err(PeerError::Busy(_)) => self.peers.busy(address, now),
                Err(PeerError::NoMemory(_)) => {}
                Err(_) => self.peers.failed(address, took[1], now, jitter()),
            }
        }
    }

    /// Remembers who sent wrong bytes, if that is the error.
    pub(super) fn convict(&self, key: &Key, peer: &Peer, error: &PeerError) {
        let what = match error {
            PeerError::WrongBytes => Sent::Complete,
            PeerError::PassedOnWrong(file) => Sent::Receiving(*file),
            _ => return,
        };
        let Key::Digest(digest) = key else { return };
        for &address in &peer.addresses {
            self.punish(digest, &self.blame.convicted(key, address, what, now()));
        }
    }

    /// Notes that our containerd wants this from `first` on, if it is who wants it, and a blob.
    pub(super) fn seek(&self, wanted: &Wanted, first: u64) -> Option<Tie> {
        match &wanted.key {
            Key::Digest(digest) if wanted.may_be_fed() => Some(self.lineage.seek(digest, first)),
            _ => None,
        }
    }
}

impl Wanted {
    /// Whether our own containerd may get a blob's bytes by it.
    pub(super) fn may_be_fed(&self) -> bool {
        self.feeds_us && self.kind == Kind::Blob && !self.head_only
    }

    /// The client that was told the blob's length must not be given one of another length.
    pub(super) fn check_total(&self, told: u64) -> Result<(), PeerError> {
        match self.total {
            Some(total) if total != told => Err(PeerError::Unfit("another length than the client was told")),
            _ => Ok(()),
        }
    }

    /// The offset of the first byte that is wanted, as far as that is known without the blob's length.
    fn first_byte(&self) -> u64 {
        match self.range.as_deref().and_then(RangeSpec::parse) {
            Some(RangeSpec::From { first, .. }) => first,
            _ => 0,
        }
    }
}
