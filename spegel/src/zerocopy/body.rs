//! What a response consists of after its head.

use std::convert::Infallible;
use std::fmt;
use std::fs::File;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};

use super::file::FileSource;
use super::growing::Growing;
use super::ops::{Ops, Shared, Source};
use super::region;
use super::relay::Relay;

/// A response's body, of known length, not yet tied to a connection.
#[derive(Debug)]
pub struct Body {
    kind: Kind,
    hooks: Vec<Hook>,
    counter: Option<Arc<AtomicU64>>,
}

#[derive(Debug)]
enum Kind {
    Bytes(Bytes),
    File { file: Arc<File>, offset: u64, len: u64 },
    Growing { growing: Growing, offset: u64, len: u64 },
    Relay(Relay),
    Cut { claimed: u64 },
}

// === impl Body ===

impl Body {
    /// No bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self::bytes(Bytes::new())
    }

    /// Bytes in memory. The best choice below some 32 KiB, whatever their origin.
    #[must_use]
    pub fn bytes(bytes: impl Into<Bytes>) -> Self {
        Self::new(Kind::Bytes(bytes.into()))
    }

    /// `len` bytes of `file` from `offset` on. The file may be unlinked or renamed meanwhile; if it gets shorter, the
    /// connection ends with an orderly close after the bytes that were there.
    #[must_use]
    pub fn file(file: Arc<File>, offset: u64, len: u64) -> Self {
        Self::new(Kind::File { file, offset, len })
    }

    /// `len` bytes of a file that is still being written, from `offset` on: those that are there at once, the others as they
    /// come. If its writer gives up, the connection ends with an orderly close after the bytes that came. How long that may
    /// take is for who tells the file's progress to bound.
    #[must_use]
    pub fn growing(growing: Growing, offset: u64, len: u64) -> Self {
        Self::new(Kind::Growing { growing, offset, len })
    }

    /// What a peer sends.
    #[must_use]
    pub fn relay(relay: Relay) -> Self {
        Self::new(Kind::Relay(relay))
    }

    /// A head that claims `claimed` bytes, then none of them and an orderly close. It makes a client that may not be given an
    /// error status look elsewhere: containerd's parallel fetch fails the pull on one, and asks the other hosts after this.
    #[must_use]
    pub fn cut(claimed: u64) -> Self {
        Self::new(Kind::Cut { claimed })
    }

    fn new(kind: Kind) -> Self {
        Self { kind, hooks: Vec::new(), counter: None }
    }

    /// Calls `hook` once when the body has ended, however it ended. It runs on the connection's runtime and must not block.
    #[must_use]
    pub fn with_end(mut self, hook: impl FnOnce(BodyEnd) + Send + 'static) -> Self {
        self.hooks.push(Hook(Box::new(hook)));
        self
    }

    /// Counts in `counter` the bytes that were handed to the client's socket, as they are. There is one counter: the last one told.
    #[must_use]
    pub fn counted_in(mut self, counter: Arc<AtomicU64>) -> Self {
        self.counter = Some(counter);
        self
    }

    /// Bytes in the body, the response's Content-Length.
    #[must_use]
    pub fn len(&self) -> u64 {
        match &self.kind {
            Kind::Bytes(bytes) => bytes.len() as u64,
            Kind::File { len, .. } | Kind::Growing { len, .. } => *len,
            Kind::Relay(relay) => relay.len(),
            Kind::Cut { claimed } => *claimed,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ties the body to the connection that sends it, on whose runtime this must be called. One response at a time.
    #[must_use]
    pub fn bind(self, ops: &Ops) -> BoundBody {
        let shared = ops.shared().clone();
        let transfer = shared.settings.transfer;
        let len = self.len();
        let end = EndHooks { hooks: self.hooks, counter: self.counter, sent: 0, len, cut: false };
        let (bytes, source) = match self.kind {
            Kind::Bytes(bytes) => (Some(bytes).filter(|bytes| !bytes.is_empty()), None),
            Kind::File { file, offset, .. } => {
                (None, Some(Source::File(Box::new(FileSource::new(file, offset, len, &shared.settings)))))
            }
            Kind::Growing { growing, offset, .. } => {
                (None, Some(Source::Growing(Box::new(growing.into_source(offset, len, &shared.settings)))))
            }
            Kind::Relay(relay) => {
                (None, Some(Source::Relay(Box::new(relay.into_source(transfer, &shared.settings.pipes)))))
            }
            Kind::Cut { .. } => (None, Some(Source::Cut)),
        };
        let source = match source {
            // Nothing will be asked for, so it is complete as it stands.
            Some(source) if len == 0 => {
                source.complete();
                None
            }
            source => source,
        };
        let unclaimed = if source.is_some() { len } else { 0 };
        // An empty body ends here; bytes take their hooks along in their chunk.
        let (bytes, source) = match (bytes, source) {
            (Some(bytes), _) => (Some((bytes, end)), None),
            (None, Some(source)) => (None, Some((source, end))),
            (None, None) => (None, None),
        };
        shared.body_begins(source);
        BoundBody { shared, bytes, unclaimed }
    }
}

/// How a body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyEnd {
    /// Bytes that were handed to the client's socket.
    pub sent: u64,
    /// Whether these are all of the body's.
    pub complete: bool,
    /// Whether what gave the bytes ended it before its time, and not the client.
    pub cut: bool,
}

struct Hook(Box<dyn FnOnce(BodyEnd) + Send>);

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

/// Counts a body's bytes, and tells its owner when it is dropped.
pub(super) struct EndHooks {
    hooks: Vec<Hook>,
    counter: Option<Arc<AtomicU64>>,
    sent: u64,
    len: u64,
    cut: bool,
}

impl EndHooks {
    /// What gives the bytes gives no more.
    pub(super) fn cut(&mut self) {
        self.cut = true;
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        if let Some(counter) = &self.counter {
            counter.store(self.sent, Ordering::Relaxed);
        }
    }
}

impl Drop for EndHooks {
    fn drop(&mut self) {
        let end = BodyEnd { sent: self.sent, complete: self.sent == self.len, cut: self.cut };
        for hook in self.hooks.drain(..) {
            (hook.0)(end);
        }
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

/// A body tied to its connection.
pub struct BoundBody {
    shared: Arc<Shared>,
    bytes: Option<(Bytes, EndHooks)>,
    /// Bytes of the source that hyper has not asked for.
    unclaimed: u64,
}

// === impl BoundBody ===

impl http_body::Body for BoundBody {
    type Data = Chunk;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Chunk>, Infallible>>> {
        if let Some((bytes, end)) = self.bytes.take() {
            return Poll::Ready(Some(Ok(Frame::data(Chunk { kind: ChunkKind::Bytes(bytes, end) }))));
        }
        if self.unclaimed == 0 {
            return Poll::Ready(None);
        }
        let len = usize::try_from(self.unclaimed).unwrap_or(usize::MAX).min(region::LEN);
        self.unclaimed -= len as u64;
        self.shared.promise(len);
        let kind = ChunkKind::Region { shared: self.shared.clone(), len };
        Poll::Ready(Some(Ok(Frame::data(Chunk { kind }))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none() && self.unclaimed == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.unclaimed + self.bytes.as_ref().map_or(0, |(bytes, _)| bytes.len() as u64))
    }
}

impl Drop for BoundBody {
    fn drop(&mut self) {
        self.shared.body_ends(self.unclaimed);
    }
}

impl fmt::Debug for BoundBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundBody").field("unclaimed", &self.unclaimed).finish_non_exhaustive()
    }
}

/// A piece of a body as hyper queues it: bytes, or a slice of the region that stands for bytes.
pub struct Chunk {
    kind: ChunkKind,
}

enum ChunkKind {
    Bytes(Bytes, EndHooks),
    Region { shared: Arc<Shared>, len: usize },
}

// === impl Chunk ===

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        match &self.kind {
            ChunkKind::Bytes(bytes, _) => bytes.len(),
            ChunkKind::Region { len, .. } => *len,
        }
    }

    fn chunk(&self) -> &[u8] {
        match &self.kind {
            ChunkKind::Bytes(bytes, _) => bytes,
            ChunkKind::Region { shared, len } => &shared.region[..*len],
        }
    }

    fn advance(&mut self, count: usize) {
        match &mut self.kind {
            ChunkKind::Bytes(bytes, end) => {
                bytes.advance(count);
                end.sent(count);
            }
            ChunkKind::Region { shared, len } => {
                assert!(count <= *len, "advanced past the end of a chunk");
                *len -= count;
                shared.passed_over(count);
            }
        }
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").field("remaining", &self.remaining()).finish_non_exhaustive()
    }
}
