//! A peer's body as the body of our response: who is told how it went, and who goes on when the peer breaks off.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::TcpStream;
use tracing::debug;

use super::attempt::request;
use super::blame::Sent;
use super::client::{self, PeerHead};
use super::fetch::{Streamed, Taken, Use, race};
use super::lineage::Tie;
use super::metrics::End;
use super::peers::jitter;
use super::storms::{self, Line};
use super::{Shared, Wanted};
use crate::ebpf::Probe;
use crate::storm::Failure;
use crate::zerocopy::{Body, Relay, RelayEnd};

/// How long a peer that stands still may take to say how much it has: its client waits meanwhile.
const ASKED: Duration = Duration::from_secs(1);
/// So many times the stall bound may pass in which a peer that is still receiving a blob gets less of it than a step: containerd writes in steps
/// of up to 1 MiB, which may be long in coming. A peer that is well gives it up sooner, and ends the body, if its steps have come faster before.
const SLOWEST: u32 = 6;
/// The least that counts as a step. One that grows by a byte at a time keeps its client waiting for ever.
const STEP: u64 = 512 << 10;

/// The peers of one body, one after the other.
struct Chain {
    shared: Arc<Shared>,
    wanted: Wanted,
    /// The bytes of the blob that the client is sent.
    start: u64,
    end: u64,
    /// The blob's length.
    total: u64,
    state: Mutex<State>,
}

struct State {
    address: SocketAddr,
    keep_alive: bool,
    /// Asks the present peer's socket what it has moved, where that is wanted.
    probe: Option<Probe>,
    /// How many bytes of the blob the peer had when it was last asked, if it is still receiving it.
    position: Option<u64>,
    /// How many it had at its last step, and when that was.
    step: (u64, Instant),
    /// Where the present peer went on, and when.
    since: (u64, Instant),
    /// The present peer, and those before it, which sent a part.
    senders: Vec<(SocketAddr, Sent)>,
    _use_of: Use,
    /// Our containerd gets it by way of nodes that still receive it, as long as this lasts.
    fed: Option<Tie>,
    /// Peers that broke off: they are not asked for the rest.
    broken: HashSet<SocketAddr>,
    /// The present peer has done nothing wrong, and is left for one that says that it has all of it.
    is_left: bool,
    /// The storm that it is a part of: another peer is first looked for there.
    line: Option<Line>,
}

/// The body of a response that began to arrive. When its peer breaks off, another goes on at the same byte.
pub(super) fn body(shared: &Arc<Shared>, wanted: &Wanted, streamed: Streamed, line: Option<Line>) -> Body {
    let Streamed { address, response, part, use_of, fed } = streamed;
    line.as_ref().inspect(|line| line.comes_by(&response.stream));
    let length = response.head.content_length;
    let (start, total) = part.unwrap_or((0, length));
    let state = State {
        address,
        keep_alive: response.head.keep_alive,
        probe: response.probe,
        position: response.head.receiving,
        step: (response.head.receiving.unwrap_or_default(), Instant::now()),
        since: (0, Instant::now()),
        senders: vec![(address, sort(&response.head))],
        _use_of: use_of,
        fed,
        broken: HashSet::new(),
        is_left: false,
        line,
    };
    let chain = Arc::new(Chain {
        shared: Arc::clone(shared),
        wanted: wanted.clone(),
        start,
        end: start + length,
        total,
        state: Mutex::new(state),
    });
    let (ending, asking) = (Arc::clone(&chain), Arc::clone(&chain));
    let relay = Relay::new(response.stream, response.leftover, length, Box::new(move |end| ending.ended(end)))
        .stall_timeout(shared.settings.stall)
        .excuse(Box::new(move |came| Chain::still_growing(Arc::clone(&asking), came)))
        .floor(shared.settings.floor)
        .resume(Box::new(move |offset, cause| Chain::resume(Arc::clone(&chain), offset, cause)));
    Body::relay(relay)
}

/// How a peer stands to what it sends.
fn sort(head: &PeerHead) -> Sent {
    match head.receiving {
        Some(_) => Sent::Receiving(head.ingest),
        None => Sent::Complete,
    }
}

/// How many bytes of a blob a peer has now, and whether it still receives it; none if it says nothing sensible.
pub(super) async fn position(shared: &Shared, wanted: &Wanted, address: SocketAddr) -> Option<(u64, bool)> {
    look(shared, wanted, address).await?
}

/// How many bytes of a blob a node has now, none of what it has not got; nothing if it does not answer.
pub(super) async fn answers(shared: &Shared, wanted: &Wanted, address: SocketAddr) -> Option<u64> {
    look(shared, wanted, address).await.map(|has| has.map_or(0, |(position, _)| position))
}

/// What a peer that answers says of a blob, if it has any of it: how many bytes, and whether it still receives it.
async fn look(shared: &Shared, wanted: &Wanted, address: SocketAddr) -> Option<Option<(u64, bool)>> {
    let request = request(shared, &Wanted { wait: None, rank: None, ..wanted.clone() }, true);
    let timeouts = shared.settings.timeouts.at_most(ASKED);
    let (address, response) = client::request(&shared.pool, &[address], &request, timeouts, &mut None).await.ok()?;
    if response.head.status != 200 {
        return Some(None);
    }
    let position = match response.head.receiving {
        Some(position) => (position, true),
        None => (response.head.content_length, false),
    };
    shared.keep(address, response);
    Some(Some(position))
}

impl Shared {
    /// The peer at this address gave less than it had promised. One that was still receiving it and ended in an orderly way did what it should
    /// when its own pull is given up, which says nothing about the next thing that it is asked for.
    fn broke(&self, wanted: &Wanted, address: SocketAddr, gave_up: bool) {
        let now = Instant::now();
        if !gave_up {
            self.peers.failed(address, self.settings.timeouts.head, now, jitter());
        }
        self.blame.broke(&wanted.key, address, now);
        self.sources.failed(&wanted.key, &address);
    }
}

impl State {
    /// Whether the present peer, which a coordinator named and which has all of it, has let this node go for others' sake.
    fn let_go(&self, cause: &io::Error) -> bool {
        let is_led = self.line.as_ref().is_some_and(Line::is_led);
        is_led && self.position.is_none() && cause.kind() == ErrorKind::UnexpectedEof
    }

    /// Whether the present peer's end is that of a pull of its own that was given up.
    fn gave_up(&self, cause: &io::Error) -> bool {
        self.position.is_some() && cause.kind() == ErrorKind::UnexpectedEof
    }
}

impl Chain {
    fn ended(&self, end: RelayEnd) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let probe = state.probe.take();
        let now = Instant::now();
        let sent = match &end {
            RelayEnd::Complete(_) => self.end - self.start,
            RelayEnd::Broken { sent, .. } | RelayEnd::Dropped { sent } => *sent,
        };
        if sent > 0 {
            state.senders.iter().for_each(|(peer, sort)| self.shared.blame.sent(&self.wanted.key, *peer, *sort, now));
        }
        // Before the connection is anybody else's.
        state.line.as_ref().inspect(|line| line.ended());
        let (from, since) = state.since;
        if matches!(end, RelayEnd::Complete(_)) || sent.saturating_sub(from) >= STEP {
            self.shared.peers.delivered(state.address, now);
        }
        self.shared.peers.sent(state.address, sent.saturating_sub(from), now.duration_since(since), now);
        let end = match end {
            RelayEnd::Complete(stream) => {
                if state.keep_alive {
                    self.shared.pool.put(state.address, stream, probe);
                }
                End::Complete
            }
            RelayEnd::Broken { sent, error } => {
                if error.kind() != ErrorKind::ConnectionAborted {
                    self.blame(&state, &error);
                }
                let (trace_id, key) = (self.wanted.tale.trace().id(), &self.wanted.key);
                debug!(%trace_id, %key, peer = %state.address, sent, %error, "a peer broke off, nobody could go on");
                End::PeerBroke
            }
            RelayEnd::Dropped { .. } => End::ClientLeft,
        };
        self.shared.metrics.relayed(end);
    }

    /// The present peer gave less than it had promised, unless it has let us go.
    fn blame(&self, state: &State, cause: &io::Error) {
        if !state.let_go(cause) {
            self.shared.broke(&self.wanted, state.address, state.gave_up(cause));
        }
    }

    /// Whether the peer still receives the blob and gets on with it, step by step, or has all of it by now. It cannot send what it has not got;
    /// a part that lies ahead of all others may be long in coming. One that had more than `came` of the body when it was last asked, and has
    /// not sent it, has no excuse, however much it grows. Nor has one that stands still where another has all of the blob.
    fn still_growing(chain: Arc<Self>, came: u64) -> BoxFuture<'static, bool> {
        Box::pin(async move {
            let (address, before, step) = {
                let state = chain.state.lock().unwrap_or_else(PoisonError::into_inner);
                (state.address, state.position, state.step)
            };
            let Some(before) = before.filter(|before| *before <= chain.start + came) else { return false };
            let Some((now, receives)) = position(&chain.shared, &chain.wanted, address).await else { return false };
            let is_step = now >= step.0.saturating_add(STEP) || !receives;
            if !is_step && step.1.elapsed() >= SLOWEST * chain.shared.settings.stall {
                return false;
            }
            if !is_step && chain.is_elsewhere(address).await {
                let mut state = chain.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.is_left = true;
                return false;
            }
            let mut state = chain.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.position = Some(now.max(before));
            if is_step {
                state.step = (now, Instant::now());
            }
            receives || now > before
        })
    }

    /// Whether somebody else has all of the blob.
    async fn is_elsewhere(&self, present: SocketAddr) -> bool {
        let mut excluded = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.broken.clone()
        };
        excluded.insert(present);
        let tale = self.wanted.tale.aside();
        let wanted = Wanted { head_only: true, range: None, total: Some(self.total), tale, ..self.wanted.clone() };
        let search = async {
            let (peer, _) = race(&self.shared, &wanted, &excluded).await.ok()?;
            let address = *peer.addresses.first()?;
            position(&self.shared, &wanted, address).await
        };
        matches!(tokio::time::timeout(ASKED, search).await, Ok(Some((_, false))))
    }

    /// Finds another peer for the bytes from `offset` of the body on.
    fn resume(chain: Arc<Self>, offset: u64, cause: &io::Error) -> BoxFuture<'static, Option<(TcpStream, Bytes)>> {
        let (wanted, broken, left, failure) = chain.rest(offset, cause);
        Box::pin(async move {
            let _sought = chain.shared.seek(&wanted, chain.start + offset);
            let line = chain.state.lock().unwrap_or_else(PoisonError::into_inner).line.clone();
            if let Some(mut line) = line {
                let led = storms::resume(&chain.shared, &mut line, &wanted, failure).await;
                let is_upstreams = led.is_none() && line.is_sent_upstream();
                chain.state.lock().unwrap_or_else(PoisonError::into_inner).line = Some(line);
                match led {
                    Some((_, streamed)) if chain.fits(&streamed) => return Some(chain.go_on(streamed, offset)),
                    // It pulls the rest for all others.
                    None if is_upstreams => {
                        if let Some(gate) = &wanted.gate {
                            gate.wait().await;
                        }
                        return None;
                    }
                    _ => {}
                }
            }
            let mut excluded = broken.clone();
            excluded.extend(left);
            let mut found = race(&chain.shared, &wanted, &excluded).await;
            if found.is_err() && left.is_some() {
                // It was not true that another has it.
                found = race(&chain.shared, &wanted, &broken).await;
            }
            let streamed = match found {
                Ok((_, Taken::Streamed(streamed))) if chain.fits(&streamed) => streamed,
                _ => {
                    if let Some(gate) = &wanted.gate {
                        gate.wait().await;
                    }
                    return None;
                }
            };
            {
                let mut state = chain.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.line.iter_mut().for_each(Line::is_given_elsewhere);
            }
            Some(chain.go_on(streamed, offset))
        })
    }

    fn fits(&self, streamed: &Streamed) -> bool {
        streamed.part.is_some_and(|(_, total)| total == self.total)
    }

    /// Another peer goes on from `offset` of the body on.
    fn go_on(&self, streamed: Streamed, offset: u64) -> (TcpStream, Bytes) {
        let Streamed { address, response, use_of, fed, .. } = streamed;
        let (tale, key) = (&self.wanted.tale, &self.wanted.key);
        debug!(trace_id = %tale.trace().id(), %key, peer = %address, offset, "another peer goes on");
        tale.goes_on(address);
        self.shared.metrics.resumed();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.line.as_ref().inspect(|line| line.comes_by(&response.stream));
        (state.address, state.keep_alive) = (address, response.head.keep_alive);
        state.probe = response.probe;
        state.position = response.head.receiving;
        state.step = (response.head.receiving.unwrap_or_default(), Instant::now());
        (state.since, state._use_of) = ((offset, Instant::now()), use_of);
        let sender = (address, sort(&response.head));
        if !state.senders.contains(&sender) {
            state.senders.push(sender);
        }
        state.fed = fed;
        (response.stream, response.leftover)
    }

    /// What is still wanted, who is not to be asked for it, who only if nobody else gives it, and how the peer failed.
    fn rest(&self, offset: u64, cause: &io::Error) -> (Wanted, HashSet<SocketAddr>, Option<SocketAddr>, Failure) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let address = state.address;
        // One that our client left waiting is as good as any, and one that a coordinator knows a better one than has done nothing wrong.
        let is_left = std::mem::take(&mut state.is_left);
        let is_moved = state.line.as_ref().is_some_and(Line::is_moved);
        let why: &dyn std::fmt::Display = match (is_moved, is_left) {
            (true, _) => &"a coordinator named a better one",
            (_, true) => &"it stood still, and another one has all of it",
            _ => cause,
        };
        self.wanted.tale.broke(offset, address, why);
        let failure = if state.let_go(cause) { Failure::Refused } else { Failure::Broke };
        let is_done_with = is_moved || (!is_left && cause.kind() != ErrorKind::ConnectionAborted);
        if is_done_with && state.broken.insert(address) && !is_moved {
            self.blame(&state, cause);
        }
        let range = format!("bytes={}-{}", self.start + offset, self.end - 1);
        let wanted = Wanted { range: Some(range), total: Some(self.total), resumes: true, ..self.wanted.clone() };
        (wanted, state.broken.clone(), is_left.then_some(address), failure)
    }
}
