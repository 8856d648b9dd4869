//! Connections of the side port, which may not cost the registry its descriptors: so many at once, and none that is silent for long.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// Connections at once. Those beyond wait in the kernel's queue.
pub(super) const CONNECTIONS: usize = 128;
/// How long a connection may be silent in both directions: longer than the longest profile takes.
const SILENCE: Duration = Duration::from_secs(75);

/// A listener with [`CONNECTIONS`] places.
#[derive(Debug)]
pub(super) struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

pin_project! {
    /// A connection that ends with [`ErrorKind::TimedOut`] when nothing has come or gone for [`SILENCE`].
    #[derive(Debug)]
    pub(super) struct Bounded<T> {
        #[pin]
        io: T,
        #[pin]
        silence: Sleep,
        place: OwnedSemaphorePermit,
    }
}

// === impl BoundedListener ===

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(CONNECTIONS)) }
    }
}

impl Listener for BoundedListener {
    type Io = Pin<Box<Bounded<TcpStream>>>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // It is never closed.
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { continue };
            let (stream, address) = Listener::accept(&mut self.listener).await;
            return (Box::pin(Bounded::new(stream, place)), address);
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

// === impl Bounded ===

impl<T> Bounded<T> {
    fn new(io: T, place: OwnedSemaphorePermit) -> Self {
        Self { io, silence: sleep(SILENCE), place }
    }

    pub(super) fn get_ref(&self) -> &T {
        &self.io
    }

    /// What came of a read or write, or an end if nothing has for too long.
    fn heard<V>(silence: Pin<&mut Sleep>, context: &mut Context<'_>, done: Poll<io::Result<V>>) -> Poll<io::Result<V>> {
        match done {
            Poll::Ready(done) => {
                silence.reset(Instant::now() + SILENCE);
                Poll::Ready(done)
            }
            Poll::Pending => silence.poll(context).map(|()| Err(ErrorKind::TimedOut.into())),
        }
    }
}

impl<T: AsyncRead> AsyncRead for Bounded<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        let done = this.io.poll_read(context, buffer);
        Self::heard(this.silence, context, done)
    }
}

impl<T: AsyncWrite> AsyncWrite for Bounded<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.project();
        let done = this.io.poll_write(context, bytes);
        Self::heard(this.silence, context, done)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_silent_is_let_go_and_who_speaks_is_not() {
        let places = Arc::new(Semaphore::new(1));
        let (near, mut far) = tokio::io::duplex(64);
        let mut near = Box::pin(Bounded::new(near, Arc::clone(&places).acquire_owned().await.unwrap()));
        for _ in 0..3 {
            tokio::time::advance(SILENCE * 9 / 10).await;
            far.write_all(b"x").await.unwrap();
            assert_eq!(near.read_u8().await.unwrap(), b'x');
        }
        let start = Instant::now();
        assert_eq!(near.read_u8().await.unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(start.elapsed() >= SILENCE && start.elapsed() < SILENCE * 2);
        assert_eq!(places.available_permits(), 0);
        drop(near);
        assert_eq!(places.available_permits(), 1);
    }

    #[tokio::test]
    async fn there_are_so_many_places_and_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut listener = BoundedListener::new(listener);
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS {
            let client = TcpStream::connect(address).await.unwrap();
            held.push((client, listener.accept().await));
        }
        let _late = TcpStream::connect(address).await.unwrap();
        let soon = Duration::from_millis(50);
        assert!(timeout(soon, listener.accept()).await.is_err());
        held.pop();
        timeout(Duration::from_secs(10), listener.accept()).await.unwrap();
    }
}
