//! What the bodies of a connection and its IO wrapper share.

use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::body::EndHooks;
use super::error::BodyError;
use super::file::FileSource;
use super::growing::GrowingSource;
use super::pipe::PipePool;
use super::relay::RelaySource;
use super::traffic::{Traffic, Way};
use super::warm::{ThreadWarmer, Warm};

/// The most that a connection sends in a turn, whatever others do. A socket takes no more at once.
const MOST: usize = 4 << 20;

/// How the bytes of files and peers are moved.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transfer {
    /// By sendfile(2) and splice(2), and by copying where the kernel refuses.
    #[default]
    Zerocopy,
    /// By read and write through a buffer.
    Copy,
}

impl FromStr for Transfer {
    type Err = &'static str;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        match given {
            "zerocopy" => Ok(Self::Zerocopy),
            "copy" => Ok(Self::Copy),
            _ => Err("the ways are zerocopy and copy"),
        }
    }
}

/// What every connection of a server has in common.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How bytes are moved.
    pub transfer: Transfer,
    /// Bytes that a connection may send before others of its runtime get their turn, however many these are. 512 KiB keeps the wait of
    /// a small request beside 32 bulk streams at a few milliseconds.
    pub budget: usize,
    /// Bytes that all busy connections of a runtime may send before the first has its turn again. Where they are few, each sends more
    /// than its budget at once: a client that is woken less often costs less.
    pub round: usize,
    /// Connections of the runtime whose bodies come from a file or a peer.
    pub busy: Arc<AtomicUsize>,
    /// Pipes for relays.
    pub pipes: Arc<PipePool>,
    /// Who reads what is not in memory.
    pub warmer: Arc<dyn Warm>,
    /// Where sent bytes are counted.
    pub traffic: Traffic,
}

impl Settings {
    /// Bytes that a connection may send in a turn now.
    fn turn(&self) -> usize {
        let share = self.round / self.busy.load(Ordering::Relaxed).max(1);
        share.min(MOST).max(self.budget)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            transfer: Transfer::default(),
            budget: 512 << 10,
            round: 16 << 20,
            busy: Arc::default(),
            pipes: PipePool::new(256),
            warmer: Arc::new(ThreadWarmer::new()),
            traffic: Traffic::new(),
        }
    }
}

/// One connection's meeting point of bodies and IO wrapper. Clones mean the same connection.
#[derive(Clone)]
pub struct Ops {
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) region: &'static [u8],
    pub(super) settings: Arc<Settings>,
    state: Mutex<State>,
}

pub(super) struct State {
    /// The source of the response under way.
    pub(super) source: Option<Source>,
    /// Who is told when it ends.
    end: Option<EndHooks>,
    busy: Option<Busy>,
    /// Bytes of the region handed to hyper and not moved yet.
    pub(super) promised: u64,
    /// Bytes moved that hyper has not been told of yet. hyper passing over more than these means that it copied the region.
    credit: u64,
    /// Set once; from then on nothing is written.
    failed: Option<io::Error>,
    out_of_step: bool,
    /// Bytes that this turn may still move.
    pub(super) budget: usize,
    /// Try the socket even where the runtime believes it to be full.
    pub(super) force: bool,
    blocked_since: Option<Instant>,
    sent: u64,
    received: bool,
    bodies: usize,
    /// No response waits to be written.
    flushed: bool,
}

/// What a connection is doing, as far as its socket and bodies tell.
#[derive(Clone, Copy, Debug)]
pub struct Activity {
    /// Bytes came from the client since this was last asked.
    pub received: bool,
    /// Since when the client has taken no byte of what we have for it.
    pub blocked_since: Option<Instant>,
    /// A response's body is still being produced or moved.
    pub body: bool,
    /// Bytes that the kernel took for the client since the connection, or this way of serving it, began.
    pub sent: u64,
}

/// Where the bytes of a body come from.
pub(super) enum Source {
    File(Box<FileSource>),
    Growing(Box<GrowingSource>),
    Relay(Box<RelaySource>),
    Cut,
}

/// A source that is over. Dropping it tells those who wait for its end.
pub(super) struct Ended {
    source: Source,
    _end: Option<EndHooks>,
    _busy: Option<Busy>,
}

/// A busy connection, until dropped.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a source achieved.
pub(super) enum Push {
    /// So many bytes went to the client, at least one.
    Moved(usize),
    /// The client's socket takes nothing now.
    ClientFull,
    /// The source has nothing now; it will wake the task.
    Waiting,
}

/// Whether a system call is not to be had here: of a file system or kernel that does not know it, or in a sandbox that refuses it.
pub(super) fn is_refused(error: &io::Error) -> bool {
    let refusals = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM, Errno::ACCESS];
    Errno::from_io_error(error).is_some_and(|errno| refusals.contains(&errno))
}

/// The client's side of a transfer.
pub(super) struct Client<'a> {
    pub(super) stream: &'a TcpStream,
    pub(super) force: bool,
    pub(super) traffic: &'a Traffic,
}

// === impl Ops ===

impl Ops {
    /// For one connection.
    ///
    /// # Errors
    /// The kernel refuses the few MiB of address space that stand for bodies.
    pub fn new(settings: &Arc<Settings>) -> io::Result<Self> {
        let region = super::region::get()?;
        let state = State {
            source: None,
            end: None,
            busy: None,
            promised: 0,
            credit: 0,
            failed: None,
            out_of_step: false,
            budget: settings.budget,
            force: false,
            blocked_since: None,
            sent: 0,
            received: false,
            bodies: 0,
            flushed: true,
        };
        Ok(Self { shared: Arc::new(Shared { region, settings: settings.clone(), state: Mutex::new(state) }) })
    }

    /// Starts a turn: the connection may send its budget again. To be called before each poll of the connection, which
    /// otherwise waits for ever once its budget is used up.
    pub fn begin_turn(&self) {
        self.shared.lock().budget = self.shared.settings.turn();
    }

    /// Makes the next write try the socket even where the runtime believes it to be full: the kernel reports room only once a
    /// third of the buffer is free, which a slow client may not reach for long.
    pub fn force_write(&self) {
        self.shared.lock().force = true;
    }

    /// What the connection is doing.
    #[must_use]
    pub fn activity(&self) -> Activity {
        let mut state = self.shared.lock();
        let received = std::mem::take(&mut state.received);
        let body = state.bodies > 0 || state.source.is_some() || state.promised > 0;
        Activity { received, blocked_since: state.blocked_since, body, sent: state.sent }
    }

    /// Whether everything of the responses that began has been handed to the kernel.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.shared.lock().flushed
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl fmt::Debug for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ops").finish_non_exhaustive()
    }
}

// === impl Shared ===

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A response begins, with the source of its body if that is not in memory.
    pub(super) fn body_begins(&self, source: Option<(Source, EndHooks)>) {
        let mut state = self.lock();
        state.bodies += 1;
        state.flushed = false;
        if state.source.is_some() || state.promised > 0 {
            state.out_of_step = true;
        } else {
            state.busy = source.is_some().then(|| Busy::new(&self.settings.busy));
            (state.source, state.end) = source.unzip();
            // The turn began before this one was counted.
            state.budget = state.budget.min(self.settings.turn());
        }
    }

    /// hyper let go of a body; `unclaimed` bytes of it were never asked for.
    pub(super) fn body_ends(&self, unclaimed: u64) {
        let mut state = self.lock();
        state.bodies -= 1;
        let ended = if unclaimed > 0 { state.take() } else { None };
        drop(state);
        drop(ended);
    }

    pub(super) fn promise(&self, bytes: usize) {
        self.lock().promised += bytes as u64;
    }

    /// hyper passes over `bytes` of the region, which it may do only after they were moved.
    pub(super) fn passed_over(&self, bytes: usize) {
        let mut state = self.lock();
        match state.credit.checked_sub(bytes as u64) {
            Some(credit) => state.credit = credit,
            None => state.out_of_step = true,
        }
    }

    /// The connection is over: nothing is moved any more.
    pub(super) fn close(&self) {
        let ended = self.lock().take();
        drop(ended);
    }
}

// === impl State ===

impl State {
    /// The reason for which nothing may be written any more.
    pub(super) fn check(&mut self) -> io::Result<()> {
        if self.out_of_step {
            return Err(BodyError::OutOfStep.into());
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Reports `error` at the next write.
    pub(super) fn fail_later(&mut self, error: io::Error) {
        self.failed = Some(error);
    }

    pub(super) fn received(&mut self) {
        self.received = true;
    }

    pub(super) fn flushed(&mut self) {
        self.flushed = true;
    }

    pub(super) fn progressed(&mut self, bytes: usize) {
        self.blocked_since = None;
        self.sent += bytes as u64;
        self.budget = self.budget.saturating_sub(bytes);
    }

    pub(super) fn blocked(&mut self) {
        self.blocked_since.get_or_insert_with(Instant::now);
    }

    /// The source under way and who is told of its end, to be dropped outside of the lock.
    fn take(&mut self) -> Option<Ended> {
        let (end, busy) = (self.end.take(), self.busy.take());
        self.source.take().map(|source| Ended { source, _end: end, _busy: busy })
    }

    /// The source gives no more.
    pub(super) fn cut(&mut self) {
        if let Some(end) = &mut self.end {
            end.cut();
        }
    }

    /// Accounts for `bytes` moved, and returns the source when that was all of it.
    pub(super) fn moved(&mut self, bytes: usize) -> Option<Ended> {
        if let Some(end) = &mut self.end {
            end.sent(bytes);
        }
        self.promised -= bytes as u64;
        self.credit += bytes as u64;
        let done = self.source.as_ref().is_some_and(|source| source.left() == Some(0));
        if done { self.take() } else { None }
    }
}

// === impl Ended ===

impl Ended {
    /// Every byte was moved.
    pub(super) fn complete(self) {
        self.source.complete();
    }
}

// === impl Source ===

impl Source {
    fn left(&self) -> Option<u64> {
        match self {
            Self::File(file) => Some(file.left()),
            Self::Growing(growing) => Some(growing.left()),
            Self::Relay(relay) => Some(relay.left()),
            Self::Cut => None,
        }
    }

    /// Whether body bytes will follow a head at once.
    pub(super) fn at_hand(&mut self, cx: &mut Context<'_>) -> bool {
        match self {
            Self::File(file) => file.at_hand(cx),
            Self::Growing(growing) => growing.at_hand(cx),
            Self::Relay(relay) => relay.at_hand(cx),
            Self::Cut => false,
        }
    }

    pub(super) fn push(&mut self, cx: &mut Context<'_>, client: &Client<'_>, max: usize) -> io::Result<Push> {
        match self {
            Self::File(file) => file.push(cx, client, max),
            Self::Growing(growing) => growing.push(cx, client, max),
            Self::Relay(relay) => relay.push(cx, client, max),
            Self::Cut => Err(BodyError::Cut.into()),
        }
    }

    /// Every byte was moved.
    pub(super) fn complete(self) {
        if let Self::Relay(relay) = self {
            relay.complete();
        }
    }
}

/// Sends from memory on a client's socket, as much as the kernel takes; with `force` even where the runtime believes the socket to
/// be full.
///
/// # Errors
/// `WouldBlock` where the socket takes nothing now, and what the kernel says.
pub fn send(stream: &TcpStream, bufs: &[IoSlice<'_>], force: bool, traffic: &Traffic) -> io::Result<usize> {
    let client = Client { stream, force, traffic };
    match bufs {
        // Of one piece send(2) costs less.
        [whole] => client.send(whole).inspect(|n| traffic.add(Way::Memory, *n)),
        parts => client.send_vectored(parts, false),
    }
}

// === impl Client ===

impl Client<'_> {
    /// Runs a system call that writes to the client.
    pub(super) fn io<R>(&self, call: impl FnOnce(&TcpStream) -> io::Result<R>) -> io::Result<R> {
        if self.force { call(self.stream) } else { self.stream.try_io(Interest::WRITABLE, || call(self.stream)) }
    }

    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.io(|stream| Ok(rustix::net::send(stream, bytes, SendFlags::NOSIGNAL)?))
    }

    /// Sends from memory; with `more` the kernel waits for what follows before it sends a short segment.
    pub(super) fn send_vectored(&self, bufs: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
        let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
        let mut space: [MaybeUninit<u8>; 0] = [];
        let n = self.io(|stream| Ok(sendmsg(stream, bufs, &mut SendAncillaryBuffer::new(&mut space), flags)?))?;
        self.traffic.add(Way::Memory, n);
        Ok(n)
    }
}
