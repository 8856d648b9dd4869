//! Idle connections to peers, so that the next request needs no handshake.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use crate::ebpf::{Probe, Role, Watch};
use crate::zerocopy::TcpInfo;

/// Kept per peer address.
const PER_PEER: usize = 8;
/// Kept in all.
const TOTAL: usize = 256;
/// Kept no longer than this; a peer keeps an idle connection longer.
const IDLE: Duration = Duration::from_secs(20);

/// Idle connections by address. They are held outside of any runtime, since each request may run on another.
#[derive(Debug, Default)]
pub(super) struct Pool {
    idle: Mutex<Idle>,
    watch: Option<Watch>,
}

/// An idle connection, since when, and what asks its socket, if that is wanted.
type Kept = (StdStream, Instant, Option<Probe>);

#[derive(Debug, Default)]
struct Idle {
    by_address: HashMap<SocketAddr, VecDeque<Kept>>,
    total: usize,
    looked_through_at: Option<Instant>,
}

impl Pool {
    /// Without connections.
    pub(super) fn new(watch: Option<Watch>) -> Self {
        Self { idle: Mutex::default(), watch }
    }

    /// A new connection to `address` stands.
    pub(super) fn probe(&self, address: SocketAddr) -> Option<Probe> {
        self.watch.as_ref()?.probe(address.ip(), Role::Fetched)
    }

    /// None could be had.
    pub(super) fn failed(&self, address: SocketAddr) {
        if let Some(watch) = &self.watch {
            watch.failed(address.ip(), Role::Fetched);
        }
    }

    /// The most recently used idle connection to `address` that is still open, on the current runtime.
    pub(super) fn take(&self, address: SocketAddr) -> Option<(TcpStream, Option<Probe>)> {
        loop {
            let (stream, since, probe) = {
                let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
                let queue = idle.by_address.get_mut(&address)?;
                let newest = queue.pop_back();
                if queue.is_empty() {
                    idle.by_address.remove(&address);
                }
                idle.total -= usize::from(newest.is_some());
                newest?
            };
            if since.elapsed() < IDLE && is_silent(&stream) {
                return Some((TcpStream::from_std(stream).ok()?, probe));
            }
        }
    }

    /// Drops what is kept of a peer: it has closed one of them.
    pub(super) fn forget(&self, address: SocketAddr) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let dropped = idle.by_address.remove(&address).map_or(0, |queue| queue.len());
        idle.total -= dropped;
    }

    /// Keeps a connection whose last response was read to its end.
    pub(super) fn put(&self, address: SocketAddr, stream: TcpStream, mut probe: Option<Probe>) {
        if let Some(probe) = &mut probe
            && let Ok(info) = TcpInfo::of(&stream)
        {
            probe.take(&info);
        }
        let Ok(stream) = stream.into_std() else { return };
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.total >= TOTAL || idle.looked_through_at.is_none_or(|at| at.elapsed() >= IDLE) {
            idle.drop_stale();
        }
        if idle.total >= TOTAL {
            return;
        }
        let queue = idle.by_address.entry(address).or_default();
        if queue.len() >= PER_PEER {
            return;
        }
        queue.push_back((stream, Instant::now(), probe));
        idle.total += 1;
    }
}

impl Idle {
    fn drop_stale(&mut self) {
        self.looked_through_at = Some(Instant::now());
        self.by_address.retain(|_, queue| {
            queue.retain(|(stream, since, _)| since.elapsed() < IDLE && is_silent(stream));
            !queue.is_empty()
        });
        self.total = self.by_address.values().map(VecDeque::len).sum();
    }
}

/// An idle HTTP connection has nothing to read: neither an end nor stray bytes.
fn is_silent(stream: &StdStream) -> bool {
    matches!(stream.peek(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn an_idle_connection_is_used_again_unless_the_peer_closed_or_spoke() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pool = Pool::default();
        assert!(pool.take(address).is_none());

        let first = TcpStream::connect(address).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let port = first.local_addr().unwrap();
        pool.put(address, first, None);
        let again = pool.take(address).unwrap().0;
        assert_eq!(again.local_addr().unwrap(), port);
        assert!(pool.take(address).is_none());

        pool.put(address, again, None);
        drop(server);
        wait_for_input(&pool, address).await;
        assert!(pool.take(address).is_none(), "closed by the peer");

        let second = TcpStream::connect(address).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        pool.put(address, second, None);
        server.write_all(b"x").await.unwrap();
        wait_for_input(&pool, address).await;
        assert!(pool.take(address).is_none(), "stray bytes");
    }

    async fn wait_for_input(pool: &Pool, address: SocketAddr) {
        let stream = pool.idle.lock().unwrap().by_address[&address][0].0.try_clone().unwrap();
        let stream = TcpStream::from_std(stream).unwrap();
        stream.readable().await.unwrap();
    }

    #[tokio::test]
    async fn idle_connections_are_bounded_per_peer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pool = Pool::default();
        for _ in 0..PER_PEER + 3 {
            pool.put(address, TcpStream::connect(address).await.unwrap(), None);
        }
        assert_eq!(pool.idle.lock().unwrap().total, PER_PEER);
    }
}
