//! The client's socket as hyper sees it.

use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::ops::{Client, Ended, Ops, Push, Shared, State};
use super::region;

/// A client's socket that writes what a slice of the region stands for. To be wrapped in [`hyper_util::rt::TokioIo`].
#[derive(Debug)]
pub struct Io {
    stream: TcpStream,
    /// Read from the client before the wrapper was made.
    unread: Bytes,
    ops: OpenOps,
}

/// Ends the transfers of a connection whose wrapper is gone.
#[derive(Debug)]
struct OpenOps(Ops);

/// What became of one attempt to write.
enum Attempt {
    Wrote(usize),
    ClientFull,
    SourceWaits,
}

// === impl Io ===

impl Io {
    /// Wraps `stream`, whose bodies are bound to `ops`.
    #[must_use]
    pub fn new(stream: TcpStream, ops: Ops) -> Self {
        Self::after(stream, Bytes::new(), ops)
    }

    /// The same, where `unread` has been read from the socket already.
    #[must_use]
    pub fn after(stream: TcpStream, unread: Bytes, ops: Ops) -> Self {
        Self { stream, unread, ops: OpenOps(ops) }
    }

    /// The socket, and what has been read from it that nobody has taken yet. Whatever was still to be moved is given up.
    #[must_use]
    pub fn into_parts(self) -> (TcpStream, Bytes) {
        (self.stream, self.unread)
    }

    fn poll_write_bufs(&self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let shared = self.ops.0.shared();
        loop {
            let mut state = shared.lock();
            state.check()?;
            if state.budget == 0 {
                yield_turn(cx);
                return Poll::Pending;
            }
            match self.attempt(cx, shared, &mut state, bufs) {
                Ok((Attempt::Wrote(n), done)) => {
                    state.progressed(n);
                    drop(state);
                    // Outside the lock, since it tells the source's owner.
                    if let Some(source) = done {
                        source.complete();
                    }
                    return Poll::Ready(Ok(n));
                }
                Ok((Attempt::ClientFull, _)) => {
                    // Only now is it known what the kernel takes: a piece that it took whole may have ended before that.
                    state.force = false;
                    state.blocked();
                    drop(state);
                    ready!(self.stream.poll_write_ready(cx))?;
                }
                Ok((Attempt::SourceWaits, _)) => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Writes of the first run of slices from memory, and of the slice of the region that follows.
    fn attempt(
        &self,
        cx: &mut Context<'_>,
        shared: &Arc<Shared>,
        state: &mut State,
        bufs: &[IoSlice<'_>],
    ) -> io::Result<(Attempt, Option<Ended>)> {
        let client = Client { stream: &self.stream, force: state.force, traffic: &shared.settings.traffic };
        let split = bufs.iter().position(|buf| region::contains(shared.region, buf)).unwrap_or(bufs.len());
        let (memory, rest) = bufs.split_at(split);
        let owed: usize = memory.iter().map(|buf| buf.len()).sum();
        let mut wrote = 0;
        if owed > 0 {
            let follows = !rest.is_empty() && state.source.as_mut().is_some_and(|source| source.at_hand(cx));
            wrote = match client.send_vectored(memory, follows) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((Attempt::ClientFull, None)),
                Err(error) => return Err(error),
            };
            if wrote < owed || !follows {
                return Ok((Attempt::Wrote(wrote), None));
            }
        }
        let Some(slice) = rest.first() else { return Ok((Attempt::Wrote(0), None)) };
        match push(cx, state, &client, slice.len()) {
            Ok((Push::Moved(n), done)) => Ok((Attempt::Wrote(wrote + n), done)),
            // hyper asks again for what is left, and then the wait is arranged for.
            Ok(_) if wrote > 0 => Ok((Attempt::Wrote(wrote), None)),
            Ok((Push::ClientFull, _)) => Ok((Attempt::ClientFull, None)),
            Ok((Push::Waiting, _)) => Ok((Attempt::SourceWaits, None)),
            Err(error) if wrote > 0 => {
                state.fail_later(error);
                Ok((Attempt::Wrote(wrote), None))
            }
            Err(error) => Err(error),
        }
    }
}

/// Moves up to `len` bytes of what the region stands for. The budget bounds it.
fn push(cx: &mut Context<'_>, state: &mut State, client: &Client<'_>, len: usize) -> io::Result<(Push, Option<Ended>)> {
    let max = len.min(state.budget);
    if len as u64 > state.promised {
        return Err(super::BodyError::OutOfStep.into());
    }
    let Some(source) = &mut state.source else { return Err(super::BodyError::OutOfStep.into()) };
    let pushed = source.push(cx, client, max);
    if pushed.as_ref().is_err_and(|error| !is_clients(error)) {
        state.cut();
    }
    let pushed = pushed?;
    let done = if let Push::Moved(n) = pushed { state.moved(n) } else { None };
    Ok((pushed, done))
}

/// Whether moving bytes failed at the client's socket.
fn is_clients(error: &io::Error) -> bool {
    const SOCKET: [Errno; 6] =
        [Errno::PIPE, Errno::CONNRESET, Errno::TIMEDOUT, Errno::HOSTUNREACH, Errno::NETUNREACH, Errno::NETDOWN];
    Errno::from_io_error(error).is_some_and(|errno| SOCKET.contains(&errno))
}

/// Arranges for the task to run again after the others of its runtime and its reactor. Waking it directly would put it
/// before the reactor, which tokio asks only every 61 polls then.
fn yield_turn(cx: &mut Context<'_>) {
    let _ = pin!(tokio::task::yield_now()).poll(cx);
}

impl Drop for OpenOps {
    fn drop(&mut self) {
        self.0.shared().close();
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        if self.unread.is_empty() {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        } else {
            let now = self.unread.len().min(buf.remaining());
            buf.put_slice(&self.unread[..now]);
            self.unread.advance(now);
        }
        if buf.filled().len() > before {
            self.ops.0.shared().lock().received();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_bufs(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_bufs(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper comes here once it has nothing left to write.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ops.0.shared().lock().flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
