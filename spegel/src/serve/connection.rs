//! One client's connection, from accept to close.
//!
//! Between requests it is bare: a socket, and no buffer. What is small and was asked for before is answered there and then; any
//! other request makes a [`Session`] of hyper's, which ends when its answers are out.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::engine::Accepted;
use super::quick::{self, Parsed, Quick};
use super::session::{Client, Polled, Session};
use super::watch::{Expired, Verdict, Watch};
use super::{RemoteAddr, Shared, Step, linger};
use crate::ebpf::Probe;
use crate::zerocopy::{self, Activity, BodyEnd, BodyError, Settings, TcpInfo};

/// Bytes that are read of a bare connection at once: a request, or several of one who does not wait for answers.
const READ: usize = 16 << 10;

/// Bytes up to which an answer is copied into one piece: that costs less than what the kernel does for several.
const COPIED: usize = 8 << 10;

/// Answers from memory in a turn, before other connections get theirs.
const ANSWERS: usize = 16;

/// Bytes of heads that are not whole or not answered, of all connections together: whoever has sent half of one may take its time for the other.
const UNFINISHED: usize = 8 << 20;

/// How long a connection that is one too many may take for its head. Its place is wanted for the next.
const REFUSED_HEAD: Duration = Duration::from_millis(500);

/// How a connection ended.
#[derive(Debug)]
enum End {
    /// The client closed it between two requests.
    Left,
    /// It broke between two requests.
    Broke(io::Error),
    /// Either side closed it, or it broke, within hyper's part.
    Http(hyper::Result<()>),
    /// Who stops takes no further request.
    Drained,
    /// Too many have begun a request and not ended it.
    Crowded,
    Expired(Expired),
    /// The server ends.
    Aborted,
}

pub(super) async fn serve(mut accepted: Accepted, shared: Arc<Shared>, settings: Arc<Settings>) {
    let remote = accepted.remote;
    // The accepted connection stays counted until its socket is closed.
    let stream = match accepted.take_stream() {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%remote, %error, "a connection failed at its start");
            return;
        }
    };
    let client = Client {
        shared: shared.clone(),
        handling: Arc::default(),
        remote: RemoteAddr(remote),
        is_refused: accepted.is_refused(),
    };
    let mut limits = shared.limits;
    if accepted.is_refused() {
        limits.header_read = limits.header_read.min(REFUSED_HEAD);
    }
    let watch = Watch::new(limits);
    let probe = shared.watch.as_ref().and_then(|watch| watch.probe_client(remote.ip()));
    let mut lane =
        Lane { client, settings, phase: Phase::Bare(Bare::fresh(stream)), watch, draining: false, head: None, probe };
    let (mut drain, mut abort) = (pin!(shared.stop.drain.cancelled()), pin!(shared.stop.abort.cancelled()));
    let mut armed = false;
    let end = poll_fn(|cx| {
        // Once asked they wake this task, and what they have to say is in the step.
        if !std::mem::replace(&mut armed, true) {
            let _ = (drain.as_mut().poll(cx), abort.as_mut().poll(cx));
        }
        lane.poll(cx)
    })
    .await;
    report(remote, &end);
    let probe = lane.probe.take();
    if let Some(stream) = lane.into_stream() {
        match end {
            End::Left => look(probe, &stream),
            _ => linger::close(stream, shared.limits.linger, |stream| look(probe, stream)).await,
        }
    }
    drop(accepted);
}

/// Asks the socket for the last time.
fn look(probe: Option<Probe>, stream: &TcpStream) {
    if let Some(mut probe) = probe
        && let Ok(info) = TcpInfo::of(stream)
    {
        probe.take(&info);
    }
}

/// None of these is an error of ours but a body out of step: clients leave early, peers fail, files vanish.
fn report(remote: std::net::SocketAddr, end: &End) {
    match end {
        End::Left | End::Drained | End::Http(Ok(())) => {}
        End::Broke(error) => tracing::debug!(%remote, %error, "connection ended early"),
        End::Http(Err(error)) => match BodyError::find(error) {
            Some(BodyError::OutOfStep) => tracing::error!(%remote, error = %BodyError::OutOfStep, "response ended"),
            Some(error) => tracing::debug!(%remote, %error, "response ended early"),
            None => tracing::debug!(%remote, %error, "connection ended early"),
        },
        End::Crowded => tracing::debug!(%remote, "half a request, and no memory for more of them"),
        End::Expired(expired) => tracing::debug!(%remote, ?expired, "connection given up"),
        End::Aborted => tracing::debug!(%remote, "connection ended with the server"),
    }
}

/// A connection.
struct Lane {
    client: Client,
    settings: Arc<Settings>,
    phase: Phase,
    watch: Watch,
    draining: bool,
    /// The bytes of the head that hyper was given.
    head: Option<Unfinished>,
    /// Asks the socket now and then, where nobody else tells what it moved.
    probe: Option<Probe>,
}

enum Phase {
    Bare(Bare),
    Http(Box<Session>),
    /// On its way from one to the other; for good where that failed.
    Nothing,
}

// === impl Lane ===

impl Lane {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            let activity = match &mut self.phase {
                Phase::Bare(bare) => match bare.poll(cx, &self.client, &self.settings) {
                    Poll::Pending => bare.activity(),
                    Poll::Ready(Ok(Next::Crowded)) => return Poll::Ready(End::Crowded),
                    Poll::Ready(Ok(Next::Http(unread))) => match self.enter_http(unread) {
                        Ok(()) => continue,
                        Err(error) => return Poll::Ready(End::Broke(error)),
                    },
                    Poll::Ready(Ok(Next::Left)) => return Poll::Ready(End::Left),
                    Poll::Ready(Err(error)) => return Poll::Ready(End::Broke(error)),
                },
                Phase::Http(session) => match session.poll(cx) {
                    Polled::Ended(result) => return Poll::Ready(End::Http(result)),
                    Polled::Waiting(activity) => activity,
                    Polled::Idle => {
                        self.enter_bare();
                        continue;
                    }
                },
                Phase::Nothing => return Poll::Ready(End::Left),
            };
            match self.client.shared.stop.step() {
                Step::Aborting => return Poll::Ready(End::Aborted),
                Step::Draining if !self.draining => {
                    self.draining = true;
                    if let Phase::Http(session) = &mut self.phase {
                        session.drain();
                    }
                    continue;
                }
                _ => {}
            }
            if self.draining && matches!(&self.phase, Phase::Bare(bare) if bare.out.is_none()) {
                return Poll::Ready(End::Drained);
            }
            match self.watch.poll(cx, activity, self.client.handling.get()) {
                Verdict::Wait => return Poll::Pending,
                Verdict::TryWrite => match &mut self.phase {
                    Phase::Bare(bare) => bare.force = true,
                    Phase::Http(session) => session.force_write(),
                    Phase::Nothing => {}
                },
                Verdict::End(expired) => return Poll::Ready(End::Expired(expired)),
            }
        }
    }

    fn enter_http(&mut self, unread: Bytes) -> io::Result<()> {
        // What is in its headers stays as long as the request is under way.
        let held = Unfinished::new(&self.client.shared.unfinished, unread.len());
        self.head = Some(held.ok_or_else(|| io::Error::other("no memory for more requests"))?);
        let Phase::Bare(bare) = std::mem::replace(&mut self.phase, Phase::Nothing) else { return Ok(()) };
        let is_last = self.client.is_refused || self.draining;
        let session = Session::new(bare.stream, unread, is_last, &self.client, &self.settings)?;
        self.phase = Phase::Http(Box::new(session));
        Ok(())
    }

    fn enter_bare(&mut self) {
        self.head = None;
        if let Phase::Http(session) = std::mem::replace(&mut self.phase, Phase::Nothing) {
            let (stream, unread) = session.into_parts();
            if let Some(probe) = &mut self.probe
                && probe.is_due(Instant::now().into_std())
                && let Ok(info) = TcpInfo::of(&stream)
            {
                probe.take(&info);
            }
            self.phase = Phase::Bare(Bare::new(stream, unread));
        }
    }

    fn into_stream(self) -> Option<TcpStream> {
        match self.phase {
            Phase::Bare(bare) => Some(bare.stream),
            Phase::Http(session) => Some(session.into_parts().0),
            Phase::Nothing => None,
        }
    }
}

/// A connection between two requests, or with an answer from memory on its way.
struct Bare {
    stream: TcpStream,
    /// Read already. Nearly always nothing.
    unread: Bytes,
    /// That is less than a head.
    unfinished: Option<Unfinished>,
    /// Bytes came since this was last asked.
    received: bool,
    out: Option<Out>,
    /// Bytes that the kernel took.
    sent: u64,
    /// Try the socket even where the runtime believes it to be full.
    force: bool,
    /// Just accepted: nothing is known of it yet, and the first request is often there.
    is_new: bool,
}

/// What comes after being bare.
enum Next {
    /// The client has closed its side.
    Left,
    /// There is no room for its half of a head.
    Crowded,
    /// A request for hyper, of which this was read.
    Http(Bytes),
}

/// So many bytes among those of heads that are not whole or not answered, until dropped.
struct Unfinished {
    all: Arc<AtomicUsize>,
    bytes: usize,
}

impl Unfinished {
    /// None if there are too many.
    fn new(all: &Arc<AtomicUsize>, bytes: usize) -> Option<Self> {
        let before = all.fetch_add(bytes, Ordering::Relaxed);
        let counted = Self { all: Arc::clone(all), bytes };
        (before + bytes <= UNFINISHED).then_some(counted)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What the kernel did not take of an answer.
struct Out {
    rest: Bytes,
    since: Instant,
    body: usize,
    end: Option<Box<dyn FnOnce(BodyEnd) + Send>>,
}

thread_local! {
    /// Where requests are read to, for all of a runtime's connections.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
    /// Where answers are put together.
    static WHOLE: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(COPIED));
}

// === impl Bare ===

impl Bare {
    fn new(stream: TcpStream, unread: Bytes) -> Self {
        Self { stream, unread, unfinished: None, received: false, out: None, sent: 0, force: false, is_new: false }
    }

    fn fresh(stream: TcpStream) -> Self {
        Self { force: true, is_new: true, ..Self::new(stream, Bytes::new()) }
    }

    fn activity(&mut self) -> Activity {
        let received = std::mem::take(&mut self.received);
        let Self { out, sent, .. } = self;
        Activity { received, blocked_since: out.as_ref().map(|out| out.since), body: out.is_some(), sent: *sent }
    }

    fn poll(&mut self, cx: &mut Context<'_>, client: &Client, settings: &Settings) -> Poll<io::Result<Next>> {
        let mut answers = ANSWERS;
        loop {
            ready!(self.poll_out(cx, settings))?;
            if answers == 0 {
                // As `zerocopy::Io` does, after the others and the reactor.
                let _ = pin!(tokio::task::yield_now()).poll(cx);
                return Poll::Pending;
            }
            let next = if self.unread.is_empty() || self.unfinished.is_some() {
                BUFFER.with_borrow_mut(|buffer| {
                    let mut buffer = ReadBuf::new(buffer);
                    ready!(self.poll_read(cx, &mut buffer))?;
                    self.unfinished = None;
                    let unread = std::mem::take(&mut self.unread);
                    Poll::Ready(match buffer.filled() {
                        [] => Ok(Some(Next::Left)),
                        filled if unread.is_empty() => self.answer(filled, &mut answers, client, settings),
                        filled => self.answer(&[&unread, filled].concat(), &mut answers, client, settings),
                    })
                })
            } else {
                let unread = std::mem::take(&mut self.unread);
                Poll::Ready(self.answer(&unread, &mut answers, client, settings))
            };
            if let Some(next) = ready!(next)? {
                return Poll::Ready(Ok(next));
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.is_new)
            && let Ok((_, n @ 1..)) = recv(&self.stream, buffer.initialize_unfilled(), RecvFlags::DONTWAIT)
        {
            buffer.advance(n);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }

    /// Answers the requests that are read, one after the other, as long as the client takes the answers.
    fn answer(
        &mut self,
        mut read: &[u8],
        answers: &mut usize,
        client: &Client,
        settings: &Settings,
    ) -> io::Result<Option<Next>> {
        let Client { shared, handling, remote, is_refused } = client;
        let is_quick = !is_refused && shared.stop.step() == Step::Serving;
        while !read.is_empty() {
            if self.out.is_some() || *answers == 0 {
                self.unread = Bytes::copy_from_slice(read);
                break;
            }
            let ask = |head: &quick::Head<'_>| {
                let ask = || if is_quick { shared.handler.quick(head, remote.0) } else { None };
                catch_unwind(AssertUnwindSafe(ask)).ok().flatten()
            };
            match quick::parse(read, shared.limits.header_bytes, ask) {
                Parsed::Other => return Ok(Some(Next::Http(Bytes::copy_from_slice(read)))),
                Parsed::Partial => {
                    self.unfinished = Unfinished::new(&shared.unfinished, read.len());
                    self.unread = Bytes::copy_from_slice(read);
                    self.received = true;
                    return Ok(self.unfinished.is_none().then_some(Next::Crowded));
                }
                Parsed::Answered(length, quick) => {
                    handling.answered();
                    self.send(quick, settings)?;
                    read = &read[length..];
                    *answers -= 1;
                }
            }
        }
        Ok(None)
    }

    fn send(&mut self, quick: Quick, settings: &Settings) -> io::Result<()> {
        let Quick { head, body, end } = quick;
        let date = quick::date();
        let parts = [IoSlice::new(&head), IoSlice::new(&date), IoSlice::new(&body)];
        let force = std::mem::take(&mut self.force);
        let sent = if head.len() + date.len() + body.len() <= COPIED {
            WHOLE.with_borrow_mut(|whole| {
                whole.clear();
                parts.iter().for_each(|part| whole.extend_from_slice(part));
                zerocopy::send(&self.stream, &[IoSlice::new(whole)], force, &settings.traffic)
            })
        } else {
            zerocopy::send(&self.stream, &parts, force, &settings.traffic)
        };
        let sent = match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => {
                end(BodyEnd { sent: 0, complete: false, cut: false });
                return Err(error);
            }
            Ok(sent) => sent,
        };
        self.sent += sent as u64;
        if sent == head.len() + date.len() + body.len() {
            end(BodyEnd { sent: body.len() as u64, complete: true, cut: false });
        } else {
            let rest = quick::rest_of(&parts, sent);
            self.out = Some(Out { rest, since: Instant::now(), body: body.len(), end: Some(end) });
        }
        Ok(())
    }

    /// Sends what the kernel did not take before.
    fn poll_out(&mut self, cx: &mut Context<'_>, settings: &Settings) -> Poll<io::Result<()>> {
        while let Some(out) = &mut self.out {
            match zerocopy::send(&self.stream, &[IoSlice::new(&out.rest)], self.force, &settings.traffic) {
                Ok(sent) => {
                    self.sent += sent as u64;
                    out.rest.advance(sent);
                    out.since = Instant::now();
                    if out.rest.is_empty() {
                        self.out = None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.force = false;
                    ready!(self.stream.poll_write_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        let sent = self.body.saturating_sub(self.rest.len());
        if let Some(end) = self.end.take() {
            end(BodyEnd { sent: sent as u64, complete: sent == self.body, cut: false });
        }
    }
}
