//! Takes connections from a listener and hands them to the data runtimes. It runs on the first of them: a connection that it keeps for
//! its own runtime is served by the thread that accepted it, with no other one to wake.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use super::engine::{Engine, Socket};
use super::{Shared, connection};
use crate::zerocopy::Settings;

/// Pause after a failed accept: without descriptors the listener stays readable, and every try would fail at once.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Connections that are only told to go elsewhere; beyond these a connection is closed without an answer.
const REFUSALS: usize = 64;

pub(super) struct Acceptor {
    listener: TcpListener,
    engines: Arc<[Arc<Engine>]>,
    /// The connections of the first engine, on whose thread this is.
    own: TaskTracker,
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    refusals: Arc<Semaphore>,
    /// A descriptor to give up when there is no other, so that a client can be refused instead of left waiting.
    reserve: Option<File>,
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
                    if self.reserve.is_none() {
                        self.reserve = reserve();
                    }
                    self.place(stream, remote);
                }
                // The client left before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot accept connections for now: new ones are refused");
                    }
                    if self.reserve.take().is_some()
                        && let Ok((stream, remote)) = self.accept().await
                    {
                        self.hand_over(stream, remote, true);
                    }
                    tokio::time::sleep(BACK_OFF).await;
                    self.reserve = reserve();
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

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}
