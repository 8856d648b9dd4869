//! A data runtime: a thread that drives connections.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio_util::task::TaskTracker;

use super::runtime::{Chosen, EngineChoice, Runtime};
use super::watchdog::Pulse;
use super::{Shared, connection};
use crate::zerocopy::Settings;

/// Connections on their way from the acceptor to a runtime.
const QUEUE: usize = 1024;

/// A connection as accepted. Counts as open until dropped.
pub(super) struct Accepted {
    stream: Option<TcpStream>,
    pub(super) remote: SocketAddr,
    /// There where it is one too many, and is only told so.
    refusal: Option<OwnedSemaphorePermit>,
    load: Arc<AtomicUsize>,
    shared: Arc<Shared>,
}

impl Accepted {
    pub(super) fn take_stream(&mut self) -> io::Result<TcpStream> {
        self.stream.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    pub(super) fn is_refused(&self) -> bool {
        self.refusal.is_some()
    }
}

impl Drop for Accepted {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
        self.shared.metrics.closed();
    }
}

/// The acceptor's end of a data runtime.
#[derive(Debug)]
pub(super) struct Engine {
    queue: Mutex<Option<mpsc::Sender<Accepted>>>,
    load: Arc<AtomicUsize>,
    done: watch::Receiver<()>,
    pulse: Arc<Pulse>,
}

// === impl Engine ===

impl Engine {
    /// Starts a thread, with a pulse for a watchdog of this bound.
    ///
    /// # Errors
    /// No thread, no descriptors, or the engine that was asked for is not to be had.
    pub(super) fn start(
        index: usize,
        choice: EngineChoice,
        watchdog: Option<Duration>,
        shared: Arc<Shared>,
    ) -> io::Result<(Self, Chosen)> {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (alive, done) = watch::channel(());
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let pulse = Arc::new(Pulse::default());
        let beating = pulse.clone();
        std::thread::Builder::new().name(format!("data-{index}")).spawn(move || {
            let runtime = match Runtime::new(choice) {
                Ok((runtime, chosen)) => {
                    let _ = tell.send(Ok(chosen));
                    runtime
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                    return;
                }
            };
            runtime.run(|warmer| async {
                let settings = Arc::new(Settings { warmer, ..shared.settings.clone() });
                let pulse = beating.clone();
                if let Some(bound) = watchdog {
                    tokio::spawn(async move { pulse.beat(bound).await });
                }
                serve(receiver, shared, settings).await;
                // Before the runtime goes, whose end is no turn either.
                beating.end();
                drop(alive);
            });
        })?;
        // The thread says one or the other, unless it panics.
        let chosen = told.recv().map_err(io::Error::other)??;
        Ok((Self { queue: Mutex::new(Some(sender)), load: Arc::default(), done, pulse }, chosen))
    }

    pub(super) fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }

    /// Connections that it has.
    pub(super) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Hands a connection over. Closes it, and says so, when the queue is full: the runtime does not keep up.
    pub(super) fn push(
        &self,
        stream: TcpStream,
        remote: SocketAddr,
        refusal: Option<OwnedSemaphorePermit>,
        shared: &Arc<Shared>,
    ) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(permit) = queue.as_ref().and_then(|queue| queue.try_reserve().ok()) else { return false };
        self.load.fetch_add(1, Ordering::Relaxed);
        shared.metrics.opened();
        let (load, shared) = (self.load.clone(), shared.clone());
        permit.send(Accepted { stream: Some(stream), remote, refusal, load, shared });
        true
    }

    /// No connection comes any more; the thread ends with its last one.
    pub(super) fn close(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits for the thread's end.
    pub(super) async fn done(&self) {
        let mut done = self.done.clone();
        while done.changed().await.is_ok() {}
    }
}

async fn serve(mut queue: mpsc::Receiver<Accepted>, shared: Arc<Shared>, settings: Arc<Settings>) {
    let connections = TaskTracker::new();
    while let Some(accepted) = queue.recv().await {
        connections.spawn(connection::serve(accepted, shared.clone(), settings.clone()));
    }
    connections.close();
    connections.wait().await;
}
