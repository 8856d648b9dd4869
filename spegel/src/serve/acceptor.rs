//! Takes connections from a listener and hands them to the data runtimes.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use rustix::process::{Resource, getrlimit};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::Shared;
use super::engine::Engine;

/// Pause after a failed accept: without descriptors the listener stays readable, and every try would fail at once.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Connections that are only told to go elsewhere; beyond these a connection is closed without an answer.
const REFUSALS: usize = 1024;

/// So much of the bound of open files, and so many at the most, are kept for clients that are refused when there is no other descriptor left.
/// Each may hold its own for as long as a connection is read on after its end.
const RESERVE_SHARE: u64 = 8;
const MOST_RESERVED: u64 = 64;

pub(super) struct Acceptor {
    listener: TcpListener,
    engines: Vec<Arc<Engine>>,
    shared: Arc<Shared>,
    refusals: Arc<Semaphore>,
    /// Descriptors to give up when there are no others, so that clients can be refused instead of left waiting.
    reserve: Vec<File>,
}

// === impl Acceptor ===

impl Acceptor {
    pub(super) fn new(
        listener: std::net::TcpListener,
        engines: Vec<Arc<Engine>>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let listener = TcpListener::from_std(listener)?;
        Ok(Self { listener, engines, shared, refusals: Arc::new(Semaphore::new(REFUSALS)), reserve: reserve() })
    }

    pub(super) async fn run(mut self) {
        let stop = self.shared.stop.accepting.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.accept_all() => {}
        }
    }

    async fn accept_all(&mut self) {
        let mut failing = false;
        loop {
            match self.accept().await {
                Ok((stream, remote)) => {
                    failing = false;
                    refill(&mut self.reserve);
                    self.place(stream, remote);
                }
                // The client left before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot accept connections for now: new ones are refused");
                    }
                    while self.reserve.pop().is_some() {
                        let Some(Ok((stream, remote))) = self.accept().now_or_never() else { break };
                        self.hand_over(stream, remote, true);
                    }
                    tokio::time::sleep(BACK_OFF).await;
                    refill(&mut self.reserve);
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, remote) = self.listener.accept().await?;
        // Another runtime's reactor will watch it.
        Ok((stream.into_std()?, SocketAddr::new(remote.ip().to_canonical(), remote.port())))
    }

    fn place(&self, stream: TcpStream, remote: SocketAddr) {
        let open: usize = self.engines.iter().map(|engine| engine.load()).sum();
        self.hand_over(stream, remote, open >= self.shared.limits.connections);
    }

    /// Gives a connection to the least loaded runtime, to be served, or only told to go elsewhere.
    fn hand_over(&self, stream: TcpStream, remote: SocketAddr, one_too_many: bool) {
        let refusal = match one_too_many.then(|| self.refusals.clone().try_acquire_owned()).transpose() {
            Ok(refusal) => refusal,
            Err(_) => return self.shared.metrics.refuse(),
        };
        let engine = self.engines.iter().min_by_key(|engine| engine.load());
        let is_placed = engine.is_some_and(|engine| engine.push(stream, remote, refusal, &self.shared));
        if one_too_many || !is_placed {
            self.shared.metrics.refuse();
        }
    }
}

fn reserve() -> Vec<File> {
    let mut files = Vec::new();
    refill(&mut files);
    files
}

/// Fills the reserve up again, as far as there are descriptors.
fn refill(reserve: &mut Vec<File>) {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let wanted = usize::try_from((limit / RESERVE_SHARE).min(MOST_RESERVED)).unwrap_or_default();
    while reserve.len() < wanted
        && let Ok(file) = File::open("/dev/null")
    {
        reserve.push(file);
    }
}
