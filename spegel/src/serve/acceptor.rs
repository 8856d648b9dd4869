//! Takes connections from a listener and hands them to the data runtimes. It runs on the first of them: a connection that it keeps for
//! its own runtime is served by the thread that accepted it, with no other one to wake.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use super::engine::{Engine, Socket};
use super::{Shared, connection};
use crate::zerocopy::Settings;

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
    engines: Arc<[Arc<Engine>]>,
    /// The connections of the first engine, on whose thread this is.
    own: TaskTracker,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    refusals: Arc<Semaphore>,
    /// Descriptors to give up when there are no others, so that clients can be refused instead of left waiting.
    reserve: Vec<File>,
}

// === impl Acceptor ===

impl Acceptor {
    /// To be called on the first engine's thread.
    pub(super) fn new(
        listener: std::net::TcpListener,
        engines: Arc<[Arc<Engine>]>,
        own: TaskTracker,
        settings: Arc<Settings>,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let listener = TcpListener::from_std(listener)?;
        let refusals = Arc::new(Semaphore::new(REFUSALS));
        Ok(Self { listener, engines, own, settings, shared, refusals, reserve: reserve() })
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
        Ok((stream, SocketAddr::new(remote.ip().to_canonical(), remote.port())))
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
        let least = self.engines.iter().enumerate().min_by_key(|(_, engine)| engine.load());
        let is_placed = least.is_some_and(|(index, engine)| self.give(index == 0, engine, stream, remote, refusal));
        if one_too_many || !is_placed {
            self.shared.metrics.refuse();
        }
    }

    fn give(
        &self,
        is_own: bool,
        engine: &Engine,
        stream: TcpStream,
        remote: SocketAddr,
        refusal: Option<OwnedSemaphorePermit>,
    ) -> bool {
        if is_own {
            let accepted = engine.count(Socket::Registered(stream), remote, refusal, &self.shared);
            self.own.spawn(connection::serve(accepted, self.shared.clone(), self.settings.clone()));
            return true;
        }
        // The other runtime's reactor is to watch it.
        let Ok(stream) = stream.into_std() else { return false };
        engine.push(|| engine.count(Socket::Bare(stream), remote, refusal, &self.shared))
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
