//! A data runtime: a thread that drives connections.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

use super::acceptor::Acceptor;
use super::runtime::{Chosen, EngineChoice, Runtime};
use super::watchdog::Pulse;
use super::{Shared, connection};
use crate::zerocopy::Settings;

/// Connections on their way from the acceptor to a runtime.
const QUEUE: usize = 1024;

/// What a runtime is given to do.
enum Work {
    Connection(Accepted),
    Listener(Listening),
}

/// A listener to accept from.
struct Listening {
    listener: TcpListener,
    engines: Arc<[Arc<Engine>]>,
    /// Told whether it began.
    begun: std::sync::mpsc::SyncSender<io::Result<()>>,
    /// Dropped when it ends.
    ended: oneshot::Sender<()>,
}

/// A client's socket.
pub(super) enum Socket {
    /// Watched by the reactor of the runtime that it is on.
    Registered(TcpStream),
    /// Not watched.
    Bare(std::net::TcpStream),
}

/// A connection as accepted. Counts as open until dropped.
pub(super) struct Accepted {
    socket: Option<Socket>,
    pub(super) remote: SocketAddr,
    /// There where it is one too many, and is only told so.
    refusal: Option<OwnedSemaphorePermit>,
    load: Arc<AtomicUsize>,
    shared: Arc<Shared>,
}

impl Accepted {
    /// The socket, on the runtime that this is called on.
    pub(super) fn take_stream(&mut self) -> io::Result<TcpStream> {
        match self.socket.take() {
            Some(Socket::Registered(stream)) => Ok(stream),
            Some(Socket::Bare(stream)) => TcpStream::from_std(stream),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
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
    queue: Mutex<Option<mpsc::Sender<Work>>>,
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
                let settings = Arc::new(Settings { warmer, busy: Arc::default(), ..shared.settings.clone() });
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

    /// Counts a connection as this runtime's.
    pub(super) fn count(
        &self,
        socket: Socket,
        remote: SocketAddr,
        refusal: Option<OwnedSemaphorePermit>,
        shared: &Arc<Shared>,
    ) -> Accepted {
        self.load.fetch_add(1, Ordering::Relaxed);
        shared.metrics.opened();
        Accepted { socket: Some(socket), remote, refusal, load: self.load.clone(), shared: shared.clone() }
    }

    /// Hands a connection over. Says so when the queue is full, since the runtime does not keep up: nothing is made then.
    pub(super) fn push(&self, connection: impl FnOnce() -> Accepted) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(permit) = queue.as_ref().and_then(|queue| queue.try_reserve().ok()) else { return false };
        permit.send(Work::Connection(connection()));
        true
    }

    /// Accepts from a listener on this runtime, for all of them, until told to stop. What is returned ends with that.
    ///
    /// # Errors
    /// The kernel refuses to watch the listener.
    pub(super) fn accept(&self, listener: TcpListener, engines: Arc<[Arc<Self>]>) -> io::Result<oneshot::Receiver<()>> {
        let (begun, told) = std::sync::mpsc::sync_channel(1);
        let (ended, until) = oneshot::channel();
        let work = Work::Listener(Listening { listener, engines, begun, ended });
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = queue.as_ref().is_some_and(|queue| queue.try_send(work).is_ok());
        drop(queue);
        if !sent {
            return Err(io::ErrorKind::NotConnected.into());
        }
        told.recv().map_err(io::Error::other)??;
        Ok(until)
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

async fn serve(mut queue: mpsc::Receiver<Work>, shared: Arc<Shared>, settings: Arc<Settings>) {
    let connections = TaskTracker::new();
    while let Some(work) = queue.recv().await {
        match work {
            Work::Connection(accepted) => {
                connections.spawn(connection::serve(accepted, shared.clone(), settings.clone()));
            }
            Work::Listener(Listening { listener, engines, begun, ended }) => {
                let acceptor = Acceptor::new(listener, engines, connections.clone(), settings.clone(), shared.clone());
                let _ = begun.send(match acceptor {
                    Ok(acceptor) => {
                        // Not a connection, but nothing ends before it either.
                        connections.spawn(async move {
                            acceptor.run().await;
                            drop(ended);
                        });
                        Ok(())
                    }
                    Err(error) => Err(error),
                });
            }
        }
    }
    connections.close();
    connections.wait().await;
}
