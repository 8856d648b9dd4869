//! A peer's socket as the source of a body.

use std::fmt;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::future::BoxFuture;
use rustix::pipe::SpliceFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::error::BodyError;
use super::ops::{Client, Push, Transfer};
use super::pipe::{Pipe, PipePool};
use super::stage::Stage;
use super::traffic::Way;

/// How a relay ended.
#[derive(Debug)]
pub enum RelayEnd {
    /// Every byte was sent. The peer's connection is at the end of its response and can be used again.
    Complete(TcpStream),
    /// The peer failed, stalled or closed early, and nobody went on in its place.
    Broken {
        /// Bytes of the body sent to the client.
        sent: u64,
        /// What the peer did; `TimedOut` is a stall, and with `ConnectionAborted` it is our client that took nothing for long.
        error: io::Error,
    },
    /// The client left, or the response needed no body. No fault of the peer's.
    Dropped {
        /// Bytes of the body sent to the client.
        sent: u64,
    },
}

/// Finds another source for the rest of a body, which starts at the given offset of the body, and is told how the one before failed:
/// `UnexpectedEof` is an orderly close, `TimedOut` a stall. Yields that source's connection and the body bytes already read from it, or `None`
/// when nobody can go on. The time it may take is the relay's stall timeout. It is not called twice without a byte gained in between.
pub type Resume = Box<dyn FnMut(u64, &io::Error) -> BoxFuture<'static, Option<(TcpStream, Bytes)>> + Send>;

/// Says whether a peer that has sent nothing for the stall timeout is worth waiting for as long again: it has no more to send yet than
/// the given number of the body's bytes, which came, and gets on by itself. Has to bound its own time.
pub type Excuse = Box<dyn FnMut(u64) -> BoxFuture<'static, bool> + Send>;

type OnEnd = Box<dyn FnOnce(RelayEnd) + Send>;

/// Where a peer was left waiting for so long, its end is not its fault: the error is `ConnectionAborted` then.
const LEFT_WAITING: Duration = Duration::from_secs(10);

/// After how long a peer is read although there is still something of it to send.
const TOP_UP: Duration = Duration::from_secs(2);

/// A peer's response body on its way to a client, exactly `len` bytes of it.
pub struct Relay {
    peer: TcpStream,
    prefetched: Bytes,
    len: u64,
    stall: Duration,
    floor: u64,
    resume: Option<Resume>,
    excuse: Option<Excuse>,
    on_end: EndHook,
}

impl Relay {
    /// A body of `len` bytes: `prefetched`, which came with the peer's head, then what `peer` sends. `on_end` is called
    /// once, whatever happens, on the connection's runtime: it must not block. A `prefetched` longer than `len` breaks the
    /// relay before its first byte.
    #[must_use]
    pub fn new(peer: TcpStream, prefetched: Bytes, len: u64, on_end: Box<dyn FnOnce(RelayEnd) + Send>) -> Self {
        let on_end = EndHook { hook: Some(on_end), sent: 0 };
        Self { peer, prefetched, len, stall: Duration::from_secs(5), floor: 0, resume: None, excuse: None, on_end }
    }

    /// How long the peer may send nothing while the client waits, 5 s by default.
    #[must_use]
    pub fn stall_timeout(mut self, stall: Duration) -> Self {
        self.stall = stall;
        self
    }

    /// How many bytes a second the peer must send on average over the stall timeout, counted while the client waits for it; none by default.
    #[must_use]
    pub fn floor(mut self, floor: u64) -> Self {
        self.floor = floor;
        self
    }

    /// Whom to ask when the peer fails half way.
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = Some(resume);
        self
    }

    /// Whom to ask whether a peer that sends nothing has stalled.
    #[must_use]
    pub fn excuse(mut self, excuse: Excuse) -> Self {
        self.excuse = Some(excuse);
        self
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// A source that reads from the runtime that this is called on.
    pub(super) fn into_source(self, transfer: Transfer, pipes: &Arc<PipePool>) -> RelaySource {
        let Self { peer, prefetched, len, stall, floor, resume, excuse, on_end } = self;
        let mut source = RelaySource {
            peer: None,
            pending: Bytes::new(),
            unread: len,
            pipe: None,
            stage: None,
            transfer,
            pipes: pipes.clone(),
            stall: Stall::new(stall, floor),
            resume,
            excuse,
            excusing: None,
            resuming: None,
            resumed_at: None,
            read_at: None,
            topped_at: None,
            left_waiting: false,
            failed: None,
            on_end,
        };
        if let Err(error) = source.adopt(peer, prefetched) {
            source.failed = Some(error);
        }
        source
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("peer", &self.peer).field("len", &self.len).finish_non_exhaustive()
    }
}

/// Calls the owner back exactly once, at the latest when dropped.
struct EndHook {
    hook: Option<OnEnd>,
    sent: u64,
}

impl EndHook {
    fn call(&mut self, end: RelayEnd) {
        if let Some(hook) = self.hook.take() {
            hook(end);
        }
    }
}

impl Drop for EndHook {
    fn drop(&mut self) {
        self.call(RelayEnd::Dropped { sent: self.sent });
    }
}

/// A search for another source.
struct Resuming {
    next: BoxFuture<'static, Option<(TcpStream, Bytes)>>,
    /// Why the last source failed.
    cause: io::Error,
}

/// What is left of a relay.
pub(super) struct RelaySource {
    peer: Option<TcpStream>,
    /// Read from the peer before the relay began.
    pending: Bytes,
    /// Bytes that nobody has read yet.
    unread: u64,
    pipe: Option<Pipe>,
    stage: Option<Stage>,
    transfer: Transfer,
    pipes: Arc<PipePool>,
    stall: Stall,
    resume: Option<Resume>,
    excuse: Option<Excuse>,
    /// The peer has sent nothing for the stall timeout, and it is being asked after.
    excusing: Option<BoxFuture<'static, bool>>,
    resuming: Option<Resuming>,
    resumed_at: Option<u64>,
    /// When bytes of the peer's were last taken, if it has not been waited for since.
    read_at: Option<Instant>,
    /// When it was read last while there was still something to send.
    topped_at: Option<Instant>,
    /// It once had to wait for our client for long, and may have given up before what it had sent was read.
    left_waiting: bool,
    failed: Option<io::Error>,
    on_end: EndHook,
}

// === impl RelaySource ===

impl RelaySource {
    /// Bytes not sent yet.
    pub(super) fn left(&self) -> u64 {
        self.unread + self.held() as u64
    }

    fn held(&self) -> usize {
        self.pending.len()
            + self.pipe.as_ref().map_or(0, Pipe::held)
            + self.stage.as_ref().map_or(0, |stage| stage.held().len())
    }

    /// Whether bytes are at hand now, so that a head may wait for them in the kernel.
    pub(super) fn at_hand(&mut self, cx: &mut Context<'_>) -> bool {
        if self.failed.is_some() {
            return false;
        }
        if self.held() > 0 {
            return true;
        }
        match self.fill(cx) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => {
                self.failed = Some(error);
                false
            }
            Poll::Pending => false,
        }
    }

    pub(super) fn push(&mut self, cx: &mut Context<'_>, client: &Client<'_>, max: usize) -> io::Result<Push> {
        if let Some(error) = self.failed.take() {
            return Err(self.broken(error));
        }
        while self.held() == 0 {
            match self.fill(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(self.broken(error)),
                Poll::Pending => return Ok(Push::Waiting),
            }
        }
        self.top_up();
        match self.drain(client, max) {
            Ok(n) => {
                self.on_end.sent += n as u64;
                Ok(Push::Moved(n))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Push::ClientFull),
            Err(error) => Err(error),
        }
    }

    /// Takes what there is room for from a peer that was not read for a while, since our client is slow: it must see that somebody is there. Whether
    /// it has ended shows when nothing is held any more.
    fn top_up(&mut self) {
        let is_due = |at: Instant| at.elapsed() >= TOP_UP;
        if !self.topped_at.max(self.read_at).is_some_and(is_due) {
            return;
        }
        self.topped_at = Some(Instant::now());
        let (Some(peer), Some(pipe)) = (&self.peer, &mut self.pipe) else { return };
        if self.transfer == Transfer::Zerocopy
            && let Ok(n @ 1..) = splice_more(peer, pipe, self.unread)
        {
            self.unread -= n as u64;
            self.stall.gained(n);
        }
    }

    /// Gives the peer's connection back. Called once nothing is left.
    pub(super) fn complete(mut self) {
        // The pipe first: whoever hears of the end may start the next relay at once.
        self.pipe = None;
        if let Some(error) = self.failed.take() {
            self.broken(error);
        } else if let Some(peer) = self.peer.take() {
            self.on_end.call(RelayEnd::Complete(peer));
        }
    }

    fn broken(&mut self, error: io::Error) -> io::Error {
        let sent = self.on_end.sent;
        let reason = error.to_string();
        self.peer = None;
        self.on_end.call(RelayEnd::Broken { sent, error });
        BodyError::Peer { sent, reason }.into()
    }

    /// Makes `peer` the source of what is left, on the runtime that this is called on.
    fn adopt(&mut self, peer: TcpStream, prefetched: Bytes) -> io::Result<()> {
        self.peer = Some(TcpStream::from_std(peer.into_std()?)?);
        (self.read_at, self.topped_at, self.left_waiting) = (None, None, false);
        if prefetched.len() as u64 > self.unread {
            return Err(io::Error::new(ErrorKind::InvalidData, "the peer sent more than it said"));
        }
        self.unread -= prefetched.len() as u64;
        self.pending = prefetched;
        Ok(())
    }

    /// Sends of what is held, oldest first.
    fn drain(&mut self, client: &Client<'_>, max: usize) -> io::Result<usize> {
        if !self.pending.is_empty() {
            let n = client.send(&self.pending[..self.pending.len().min(max)])?;
            self.pending.advance(n);
            client.traffic.add(Way::RelayCopy, n);
            return Ok(n);
        }
        if let Some(pipe) = self.pipe.as_mut().filter(|pipe| pipe.held() > 0) {
            let (from, len) = (pipe.read_end()?, pipe.held().min(max));
            let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
            let n = client.io(|stream| Ok(rustix::pipe::splice(from, None, stream, None, len, flags)?))?;
            pipe.emptied(n);
            client.traffic.add(Way::Splice, n);
            return Ok(n);
        }
        let stage = self.stage.get_or_insert_with(Stage::new);
        let n = client.send(&stage.held()[..stage.held().len().min(max)])?;
        stage.take(n);
        client.traffic.add(Way::RelayCopy, n);
        Ok(n)
    }

    /// Reads from the peer, or from who goes on in its place. Only called when nothing is held, since splice(2) says
    /// "would block" for a full pipe and an empty socket alike.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(resuming) = &mut self.resuming {
                let answer = match resuming.next.as_mut().poll(cx) {
                    Poll::Ready(answer) => answer,
                    Poll::Pending if self.stall.is_over(cx) => None,
                    Poll::Pending => return Poll::Pending,
                };
                let cause = self.resuming.take().map(|resuming| resuming.cause);
                let adopted = match (answer, cause) {
                    (Some((peer, prefetched)), _) => self.adopt(peer, prefetched),
                    (None, cause) => Err(cause.unwrap_or_else(|| ErrorKind::TimedOut.into())),
                };
                self.stall.restart();
                match adopted {
                    Ok(()) if self.held() > 0 => return Poll::Ready(Ok(())),
                    Ok(()) => {}
                    Err(error) => return Poll::Ready(Err(error)),
                }
            }
            self.left_waiting |= self.read_at.take().is_some_and(|at| at.elapsed() >= LEFT_WAITING);
            let read = if self.stall.too_slow() { Poll::Pending } else { self.read(cx) };
            let error = match read {
                Poll::Ready(Ok(0) | Err(_)) if self.left_waiting => io::Error::new(
                    ErrorKind::ConnectionAborted,
                    "our client took nothing for so long that the peer gave up",
                ),
                Poll::Pending => match self.poll_stalled(cx) {
                    Poll::Ready(true) => io::Error::new(ErrorKind::TimedOut, "the peer stalled"),
                    Poll::Ready(false) => continue,
                    Poll::Pending => return Poll::Pending,
                },
                Poll::Ready(Ok(0)) => io::Error::new(ErrorKind::UnexpectedEof, "the peer closed early"),
                Poll::Ready(Ok(n)) => {
                    self.unread -= n as u64;
                    self.read_at = Some(Instant::now());
                    self.excusing = None;
                    self.stall.gained(n);
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Err(error)) => error,
            };
            self.peer = None;
            self.excusing = None;
            let sent = self.on_end.sent;
            match &mut self.resume {
                Some(resume) if self.resumed_at != Some(sent) => {
                    self.resumed_at = Some(sent);
                    self.resuming = Some(Resuming { next: resume(sent, &error), cause: error });
                    self.stall.restart();
                }
                _ => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Whether the peer has sent too little for too long: true if so, false if it has an excuse and the wait begins anew.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if self.excusing.is_none() {
            let came = self.on_end.sent + self.held() as u64;
            match (self.stall.is_over(cx), &mut self.excuse) {
                (false, _) => return Poll::Pending,
                (true, Some(excuse)) => self.excusing = Some(excuse(came)),
                (true, None) => return Poll::Ready(true),
            }
        }
        let Some(excusing) = &mut self.excusing else { return Poll::Ready(true) };
        let is_excused = ready!(excusing.as_mut().poll(cx));
        self.excusing = None;
        if is_excused {
            self.stall.restart();
        }
        Poll::Ready(!is_excused)
    }

    fn read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(peer) = &self.peer else {
            return Poll::Ready(Err(ErrorKind::NotConnected.into()));
        };
        loop {
            let read = if self.transfer == Transfer::Zerocopy {
                match &mut self.pipe {
                    Some(pipe) => splice_in(peer, pipe, self.unread),
                    None => {
                        self.pipe = self.pipes.take();
                        if self.pipe.is_none() {
                            self.transfer = Transfer::Copy;
                        }
                        continue;
                    }
                }
            } else {
                self.stage.get_or_insert_with(Stage::new).fill(self.unread, |buf| peer.try_read(buf))
            };
            match read {
                Err(error) if error.kind() == ErrorKind::WouldBlock => match peer.poll_read_ready(cx) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                },
                Err(error) if super::ops::is_refused(&error) => {
                    if self.transfer == Transfer::Copy {
                        return Poll::Ready(Err(error));
                    }
                    self.transfer = Transfer::Copy;
                }
                other => return Poll::Ready(other),
            }
        }
    }
}

/// To an empty pipe: where nothing comes, the socket has nothing.
fn splice_in(peer: &TcpStream, pipe: &mut Pipe, unread: u64) -> io::Result<usize> {
    peer.try_io(Interest::READABLE, || splice_more(peer, pipe, unread))
}

/// To one that may be full. The runtime must not take that for a socket that has nothing, and wait for more of it.
fn splice_more(peer: &TcpStream, pipe: &mut Pipe, unread: u64) -> io::Result<usize> {
    let len = usize::try_from(unread).unwrap_or(usize::MAX).min(pipe.capacity().saturating_sub(pipe.held()));
    let into = pipe.write_end()?;
    let n = rustix::pipe::splice(peer, None, into, None, len, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?;
    pipe.filled(n);
    Ok(n)
}

/// Notices that nothing, or too little, has come for a while. Only time spent waiting counts: a slow client is not the peer's fault.
struct Stall {
    after: Duration,
    /// Bytes that `after` of waiting must bring.
    least: u64,
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    waited: Duration,
    gained: u64,
    too_slow: bool,
    /// The last wait was not counted.
    pardoned: bool,
}

/// So much later than its timer a wait cannot end, unless this process did not run: it was stopped, or its machine was. Then the peer is not
/// to be blamed for it.
const NOT_RUN: Duration = Duration::from_secs(1);

// === impl Stall ===

impl Stall {
    fn new(after: Duration, floor: u64) -> Self {
        let least = floor.saturating_mul(after.as_secs().max(1));
        Self {
            after,
            least,
            since: None,
            timer: None,
            waited: Duration::ZERO,
            gained: 0,
            too_slow: false,
            pardoned: false,
        }
    }

    fn restart(&mut self) {
        self.since = None;
        (self.waited, self.gained, self.too_slow) = (Duration::ZERO, 0, false);
    }

    /// So many bytes came.
    fn gained(&mut self, bytes: usize) {
        let waited = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        if waited < self.after + NOT_RUN {
            self.waited += waited;
        }
        self.pardoned = false;
        self.gained += bytes as u64;
        if self.waited >= self.after {
            self.too_slow = self.gained < self.least;
            (self.waited, self.gained) = (Duration::ZERO, 0);
        }
    }

    fn too_slow(&self) -> bool {
        self.too_slow
    }

    /// Whether the wait has lasted too long; else the task is woken when it has.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        if self.too_slow {
            return true;
        }
        let now = Instant::now();
        let mut deadline = *self.since.get_or_insert(now) + self.after;
        // Once in a row: one whose turns always come late must not wait for ever.
        if now >= deadline + NOT_RUN && !std::mem::replace(&mut self.pardoned, true) {
            self.since = Some(now);
            deadline = now + self.after;
        }
        if now >= deadline {
            return true;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        // A timer that is due earlier only wakes us early; moving it for every wait would cost more.
        while timer.as_mut().poll(cx).is_ready() {
            timer.as_mut().reset(deadline);
            if Instant::now() >= deadline {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(5);

    async fn is_over(stall: &mut Stall) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(stall.is_over(cx))).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_is_over_after_its_time() {
        let mut stall = Stall::new(AFTER, 0);
        assert!(!is_over(&mut stall).await);
        tokio::time::advance(AFTER - Duration::from_millis(1)).await;
        assert!(!is_over(&mut stall).await);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(is_over(&mut stall).await);
    }

    /// The timer would have ended the wait at its time: so this process did not run.
    #[tokio::test(start_paused = true)]
    async fn a_time_in_which_we_did_not_run_is_not_the_peers_fault() {
        let mut stall = Stall::new(AFTER, 1000);
        assert!(!is_over(&mut stall).await);
        tokio::time::advance(10 * AFTER).await;
        assert!(!is_over(&mut stall).await, "stopped, and nothing has come yet");
        tokio::time::advance(10 * AFTER).await;
        assert!(is_over(&mut stall).await, "once in a row");

        stall.restart();
        assert!(!is_over(&mut stall).await);
        tokio::time::advance(10 * AFTER).await;
        stall.gained(1);
        assert!(!stall.too_slow(), "stopped, and what had come was there");
        for _ in 0..2 {
            assert!(!is_over(&mut stall).await);
            tokio::time::advance(AFTER / 2).await;
            stall.gained(1);
        }
        assert!(stall.too_slow(), "two bytes in five seconds of waiting");
    }
}
