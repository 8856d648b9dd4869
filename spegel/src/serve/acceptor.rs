//! Takes connections from a listener and hands them to the data runtimes.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::engine::Engine;
use super::{Shared, linger};

/// Pause after a failed accept: without descriptors the listener stays readable, and every try would fail at once.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Refusals under way; beyond these a connection is closed without an answer.
const REFUSALS: usize = 64;

/// containerd goes upstream on a 503 at once, and a probe of /readyz is told the reason.
const REFUSAL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 53\r\n\
connection: close\r\n\r\nnot ready: as many connections are open as there may\n";

pub(super) struct Acceptor {
    listener: TcpListener,
    engines: Vec<Arc<Engine>>,
    shared: Arc<Shared>,
    refusals: Arc<Semaphore>,
    /// A descriptor to give up when there is no other, so that a client can be refused instead of left waiting.
    reserve: Option<File>,
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
                        && let Ok((stream, _)) = self.accept().await
                    {
                        self.turn_away(stream);
                    }
                    tokio::time::sleep(BACK_OFF).await;
                    self.reserve = reserve();
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
        let refused = if open >= self.shared.limits.connections {
            Some(stream)
        } else {
            let engine = self.engines.iter().min_by_key(|engine| engine.load());
            engine.and_then(|engine| engine.push(stream, remote, &self.shared).err())
        };
        if let Some(stream) = refused {
            self.turn_away(stream);
        }
    }

    fn turn_away(&self, stream: TcpStream) {
        self.shared.metrics.refuse();
        if let Ok(permit) = self.refusals.clone().try_acquire_owned() {
            let limit = self.shared.limits.linger;
            tokio::spawn(async move {
                let _permit = permit;
                // A client that leaves while it is refused is what was wanted.
                let _ = refuse(stream, limit).await;
            });
        }
    }
}

fn reserve() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Answers 503 once the request begins: Go's client discards a response that comes before.
async fn refuse(stream: TcpStream, limit: Duration) -> io::Result<()> {
    let mut stream = tokio::net::TcpStream::from_std(stream)?;
    let answered = tokio::time::timeout(limit, async {
        if stream.read(&mut [0; 1024]).await? > 0 {
            stream.write_all(REFUSAL).await?;
        }
        Ok::<_, io::Error>(())
    });
    answered.await.map_err(io::Error::from)??;
    linger::close(stream, limit).await;
    Ok(())
}
