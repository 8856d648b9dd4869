//! A data runtime: a thread that drives connections. Plain tokio over epoll, the engine that works everywhere.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;

use super::{Shared, connection};

/// Connections on their way from the acceptor to a runtime.
const QUEUE: usize = 1024;

/// A connection as accepted. Counts as open until dropped.
pub(super) struct Accepted {
    stream: Option<TcpStream>,
    pub(super) remote: SocketAddr,
    load: Arc<AtomicUsize>,
    shared: Arc<Shared>,
}

impl Accepted {
    pub(super) fn take_stream(&mut self) -> io::Result<TcpStream> {
        self.stream.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
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
}

// === impl Engine ===

impl Engine {
    pub(super) fn start(index: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (alive, done) = watch::channel(());
        std::thread::Builder::new().name(format!("data-{index}")).spawn(move || {
            runtime.block_on(run(receiver, shared));
            drop(alive);
        })?;
        Ok(Self { queue: Mutex::new(Some(sender)), load: Arc::default(), done })
    }

    /// Connections that it has.
    pub(super) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Hands a connection over, or back when the queue is full: the runtime does not keep up.
    pub(super) fn push(&self, stream: TcpStream, remote: SocketAddr, shared: &Arc<Shared>) -> Result<(), TcpStream> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(permit) = queue.as_ref().and_then(|queue| queue.try_reserve().ok()) else { return Err(stream) };
        self.load.fetch_add(1, Ordering::Relaxed);
        shared.metrics.opened();
        permit.send(Accepted { stream: Some(stream), remote, load: self.load.clone(), shared: shared.clone() });
        Ok(())
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

async fn run(mut queue: mpsc::Receiver<Accepted>, shared: Arc<Shared>) {
    let connections = TaskTracker::new();
    while let Some(accepted) = queue.recv().await {
        connections.spawn(connection::serve(accepted, shared.clone()));
    }
    connections.close();
    connections.wait().await;
}
