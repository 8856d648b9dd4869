//! Reading into the page cache what is not there yet, off the thread that sends it: sendfile(2) of a page that is on disk only
//! holds up every other connection of the thread.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use futures::future::BoxFuture;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Distance between the bytes that are asked for where a file may be cold: the kernel's read-ahead comes in pieces of this size.
pub(super) const STRIDE: u64 = 128 << 10;

/// The smallest page of any kernel.
pub(super) const PAGE: u64 = 4 << 10;

/// Buffers that a ring keeps for the next windows.
const KEPT_BUFFERS: usize = 2;

/// Windows that one runtime's ring reads at once, each with a buffer of its length.
const RING_READS: usize = 16;

/// Windows that one runtime's threads read at once.
const POOL_THREADS: usize = 4;

/// A part of a file that is to be in the page cache.
#[derive(Clone, Debug)]
pub struct Window {
    /// The file.
    pub file: Arc<File>,
    /// Its first byte.
    pub offset: u64,
    /// How many bytes.
    pub len: usize,
}

/// Reads windows without holding up the thread that it is called on.
pub trait Warm: Send + Sync + fmt::Debug {
    /// Starts to read `window`; the future ends when that is done, or failed: then whoever reads next hears why. To be called on
    /// the data runtime that waits for it.
    fn warm(&self, window: Window) -> BoxFuture<'static, ()>;
}

// === impl Window ===

impl Window {
    /// How many bytes from the window's start on are in the page cache, found by asking for one byte in each `stride`, and the last one, without
    /// waiting (`RWF_NOWAIT`, preadv2(2)). Where one of them is not, the pages before it are asked one by one. All where the file system cannot
    /// say, and beyond the file's end.
    pub(super) fn resident(&self, stride: u64) -> usize {
        let end = self.offset + self.len as u64;
        let (mut known, mut at) = (self.offset, self.offset);
        while at < end {
            match self.is_cold(at) {
                Some(true) => return self.resident_pages(known, at),
                None => return self.len,
                Some(false) => known = at,
            }
            let next = (at / stride + 1) * stride;
            at = if next >= end && at + 1 < end { end - 1 } else { next };
        }
        self.len
    }

    /// The same, where the page at `known` is there, and the one at `cold` is not.
    fn resident_pages(&self, known: u64, cold: u64) -> usize {
        let mut at = known;
        while at < cold && self.is_cold(at) != Some(true) {
            at = (at / PAGE + 1) * PAGE;
        }
        usize::try_from(at.min(cold).saturating_sub(self.offset)).unwrap_or(self.len)
    }

    /// Whether the page of a byte would have to be read; none where that cannot be told, or there is no such byte.
    fn is_cold(&self, at: u64) -> Option<bool> {
        let mut byte = [0];
        match preadv2(&*self.file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT) {
            Err(Errno::AGAIN) => Some(true),
            Err(_) | Ok(0) => None,
            Ok(_) => Some(false),
        }
    }

    /// Reads the window on this thread, which waits for the disk. The null device takes the pages as they are: nothing is copied.
    fn read(&self) -> io::Result<()> {
        static NULL: OnceLock<File> = OnceLock::new();
        let null = match NULL.get() {
            Some(null) => null,
            None => {
                let fresh = File::options().write(true).open("/dev/null")?;
                NULL.get_or_init(|| fresh)
            }
        };
        let (mut offset, end) = (self.offset, self.offset + self.len as u64);
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(self.len);
            if rustix::fs::sendfile(null, &*self.file, Some(&mut offset), left)? == 0 {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Reads with a few blocking threads: what works everywhere.
#[derive(Debug)]
pub struct ThreadWarmer {
    threads: Arc<Semaphore>,
}

// === impl ThreadWarmer ===

impl ThreadWarmer {
    /// At most four threads at once.
    #[must_use]
    pub fn new() -> Self {
        Self { threads: Arc::new(Semaphore::new(POOL_THREADS)) }
    }
}

impl Default for ThreadWarmer {
    fn default() -> Self {
        Self::new()
    }
}

impl Warm for ThreadWarmer {
    fn warm(&self, window: Window) -> BoxFuture<'static, ()> {
        let threads = self.threads.clone();
        let (mut done, waiting) = oneshot::channel::<()>();
        tokio::spawn(async move {
            // Never closed. Who no longer waits must not hold the file until a disk that hangs is back.
            let _permit = tokio::select! {
                permit = threads.acquire_owned() => permit,
                () = done.closed() => return,
            };
            let _ = tokio::task::spawn_blocking(move || window.read()).await;
            let _ = done.send(());
        });
        Box::pin(async move {
            let _ = waiting.await;
        })
    }
}

/// Reads with the io_uring of the runtime that it was started on.
#[derive(Debug)]
pub struct RingWarmer {
    // Unbounded, and still bounded: a connection has one request in it at most.
    requests: mpsc::UnboundedSender<(Window, oneshot::Sender<()>)>,
}

// === impl RingWarmer ===

impl RingWarmer {
    /// To be called within a `tokio_uring` runtime whose ring has one entry: a second operation then submits the first at once.
    /// With more of them, the ring would be told of it only when the runtime finds nothing else to do.
    #[must_use]
    pub fn start() -> Self {
        let (requests, receiver) = mpsc::unbounded_channel();
        tokio_uring::spawn(serve_ring(receiver));
        Self { requests }
    }
}

impl Warm for RingWarmer {
    fn warm(&self, window: Window) -> BoxFuture<'static, ()> {
        let (done, waiting) = oneshot::channel();
        // Without the task on the other side the wait ends at once.
        let _ = self.requests.send((window, done));
        Box::pin(async move {
            let _ = waiting.await;
        })
    }
}

async fn serve_ring(mut requests: mpsc::UnboundedReceiver<(Window, oneshot::Sender<()>)>) {
    let slots = Rc::new(Semaphore::new(RING_READS));
    let buffers = Rc::new(std::cell::RefCell::new(Vec::<Vec<u8>>::new()));
    while let Some((window, mut done)) = requests.recv().await {
        let (slots, buffers) = (slots.clone(), buffers.clone());
        // A task each, since tokio-uring panics where the kernel refuses a submission: `done` is dropped then.
        tokio_uring::spawn(async move {
            // Who no longer waits must not hold the file until a disk that hangs is back.
            let _slot = tokio::select! {
                slot = slots.acquire() => slot,
                () = done.closed() => return,
            };
            let mut buffer = buffers.borrow_mut().pop().unwrap_or_default();
            buffer.clear();
            buffer.reserve_exact(window.len);
            if let Ok(file) = window.file.try_clone() {
                let file = tokio_uring::fs::File::from_std(file);
                let mut offset = window.offset;
                // A read may end early, at what was in memory for one.
                while offset < window.offset + window.len as u64 {
                    let read;
                    (read, buffer) = ring_read(&file, buffer, offset).await;
                    match read {
                        Ok(n @ 1..) => offset += n as u64,
                        _ => break,
                    }
                }
            }
            if buffers.borrow().len() < KEPT_BUFFERS {
                buffers.borrow_mut().push(buffer);
            }
            let _ = done.send(());
        });
    }
}

/// Reads as much as the buffer has room for, once.
async fn ring_read(file: &tokio_uring::fs::File, buffer: Vec<u8>, offset: u64) -> (io::Result<usize>, Vec<u8>) {
    let (read, _) = tokio::join!(file.read_at(buffer, offset), tokio_uring::no_op());
    read
}
