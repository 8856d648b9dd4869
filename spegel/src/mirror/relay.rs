//! A peer's body as the body of our response: who is told how it went, and who goes on when the peer breaks off.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::TcpStream;
use tracing::{debug, info};

use super::fetch::{Streamed, Taken, race};
use super::metrics::End;
use super::{Shared, Wanted, health, lineage};
use crate::oci::Key;
use crate::zerocopy::{Body, Relay, RelayEnd};

/// The peers of one body, one after the other.
struct Chain {
    shared: Arc<Shared>,
    wanted: Wanted,
    /// The bytes of the blob that the client is sent.
    start: u64,
    end: u64,
    state: Mutex<State>,
}

struct State {
    address: SocketAddr,
    keep_alive: bool,
    /// Our containerd gets it by way of nodes that still receive it, as long as this lasts.
    fed: Option<lineage::Fed>,
    /// Peers that broke off: they are not asked for the rest.
    broken: HashSet<SocketAddr>,
}

/// The body of a response that began to arrive. When its peer breaks off, another goes on at the same byte.
pub(super) fn body(shared: &Arc<Shared>, wanted: &Wanted, streamed: Streamed) -> Body {
    let Streamed { address, response, part, chain } = streamed;
    let length = response.head.content_length;
    let start = part.map_or(0, |(start, _)| start);
    let state =
        State { address, keep_alive: response.head.keep_alive, fed: shared.fed(wanted, chain), broken: HashSet::new() };
    let chain = Arc::new(Chain {
        shared: Arc::clone(shared),
        wanted: wanted.clone(),
        start,
        end: start + length,
        state: Mutex::new(state),
    });
    let ending = Arc::clone(&chain);
    let relay = Relay::new(response.stream, response.leftover, length, Box::new(move |end| ending.ended(end)))
        .stall_timeout(shared.settings.stall)
        .resume(Box::new(move |offset| Chain::resume(Arc::clone(&chain), offset)));
    Body::relay(relay)
}

impl Shared {
    /// Notes that our containerd is given this by nodes that still receive it themselves.
    fn fed(&self, wanted: &Wanted, chain: Option<lineage::Chain>) -> Option<lineage::Fed> {
        match &wanted.key {
            Key::Digest(digest) if wanted.feeds_us => Some(self.lineage.fed(digest, chain?)),
            _ => None,
        }
    }

    /// The peer at this address gave less than it had promised.
    fn broke(&self, wanted: &Wanted, address: SocketAddr) {
        self.health.failed(address, Instant::now(), health::jitter());
        self.sources.failed(&wanted.key, &address);
    }
}

impl Chain {
    fn ended(&self, end: RelayEnd) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let end = match end {
            RelayEnd::Complete(stream) => {
                if state.keep_alive {
                    self.shared.pool.put(state.address, stream);
                }
                End::Complete
            }
            RelayEnd::Broken { sent, error } => {
                self.shared.broke(&self.wanted, state.address);
                info!(key = %self.wanted.key, peer = %state.address, sent, %error, "a peer broke off, nobody could go on");
                End::PeerBroke
            }
            RelayEnd::Dropped { .. } => End::ClientLeft,
        };
        self.shared.metrics.relayed(end);
    }

    /// Finds another peer for the bytes from `offset` of the body on.
    fn resume(chain: Arc<Self>, offset: u64) -> BoxFuture<'static, Option<(TcpStream, Bytes)>> {
        Box::pin(async move {
            let (wanted, broken) = chain.rest(offset);
            let Ok((_, Taken::Streamed(streamed))) = race(&chain.shared, &wanted, &broken).await else {
                if let Some(gate) = &wanted.gate {
                    gate.wait().await;
                }
                return None;
            };
            let Streamed { address, response, chain: lineage, .. } = streamed;
            debug!(key = %wanted.key, peer = %address, offset, "another peer goes on");
            chain.shared.metrics.resumed();
            let mut state = chain.state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.address, state.keep_alive) = (address, response.head.keep_alive);
            state.fed = chain.shared.fed(&wanted, lineage);
            Some((response.stream, response.leftover))
        })
    }

    fn rest(&self, offset: u64) -> (Wanted, HashSet<SocketAddr>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let address = state.address;
        if state.broken.insert(address) {
            self.shared.broke(&self.wanted, address);
        }
        let range = format!("bytes={}-{}", self.start + offset, self.end - 1);
        (Wanted { range: Some(range), ..self.wanted.clone() }, state.broken.clone())
    }
}
