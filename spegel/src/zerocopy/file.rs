//! A range of a file as the source of a body.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;

use super::error::BodyError;
use super::ops::{Client, Push, Settings, Transfer};
use super::stage::Stage;
use super::traffic::Way;
use super::warm::{PAGE, STRIDE, Warm, Window};

/// Bytes that are read at once where a file is not in memory. One turn's budget.
const WINDOW: usize = 512 << 10;

/// Bytes that are looked at once where so many in a row were in memory, and how far they are then apart: the probes were a tenth of
/// what a warm body cost.
const WARM_WINDOW: usize = 2 << 20;
const WARM_STRIDE: u64 = 512 << 10;

/// Bytes of a cold file that wait in a socket to be sent. Its pages count as ours, and cannot be taken back while they wait: beside 200
/// clients that take nothing, a process whose group is limited to 128 MiB reset new connections.
const UNSENT: u32 = 128 << 10;

/// How long a window may take to be read. A disk that is slower than that is no source.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is left of a file's range.
pub(super) struct FileSource {
    file: Arc<File>,
    offset: u64,
    left: u64,
    transfer: Transfer,
    stage: Option<Stage>,
    warmer: Arc<dyn Warm>,
    /// Up to here the file was in memory when last looked at.
    resident_to: u64,
    /// So many bytes in a row were.
    warm_run: u64,
    warming: Option<Warming>,
    /// Whether a window was cold, and the client's socket does not know yet.
    is_news: bool,
    failed: Option<BodyError>,
}

/// A window that is being read.
struct Warming {
    end: u64,
    done: BoxFuture<'static, Result<(), tokio::time::error::Elapsed>>,
}

impl FileSource {
    pub(super) fn new(file: Arc<File>, offset: u64, len: u64, settings: &Settings) -> Self {
        Self {
            file,
            offset,
            left: len,
            transfer: settings.transfer,
            stage: None,
            warmer: settings.warmer.clone(),
            resident_to: offset,
            warm_run: 0,
            warming: None,
            is_news: false,
            failed: None,
        }
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Whether bytes are in memory, so that a head may wait for them in the kernel.
    pub(super) fn at_hand(&mut self, cx: &mut Context<'_>) -> bool {
        match self.poll_resident(cx) {
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
            return Err(error.into());
        }
        match self.poll_resident(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Err(error.into()),
            Poll::Pending => return Ok(Push::Waiting),
        }
        if std::mem::take(&mut self.is_news) {
            // Where the kernel refuses, more waits.
            let _ = socket2::SockRef::from(client.stream).set_tcp_notsent_lowat(UNSENT);
        }
        let resident = self.resident_to - self.offset;
        let max = usize::try_from(self.left.min(resident)).unwrap_or(usize::MAX).min(max);
        let moved = match self.transfer {
            Transfer::Zerocopy => match self.sendfile(client, max) {
                // A file system that sendfile(2) does not know, or a sandbox that refuses it.
                Err(error) if super::ops::is_refused(&error) => {
                    self.transfer = Transfer::Copy;
                    self.copy(client, max)
                }
                other => other,
            },
            Transfer::Copy => self.copy(client, max),
        };
        match moved {
            Ok(n) => {
                self.offset += n as u64;
                self.left -= n as u64;
                Ok(Push::Moved(n))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Push::ClientFull),
            Err(error) => Err(error),
        }
    }

    /// Waits until the next bytes are in memory. While a file is found not to be, the window after the next is read ahead.
    fn poll_resident(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if self.offset < self.resident_to {
            return Poll::Ready(Ok(()));
        }
        if self.warming.is_none() {
            match self.probe() {
                0 => {
                    self.is_news = true;
                    self.warm_run = 0;
                    self.warming = Some(self.warm(self.window(self.offset, WINDOW)));
                }
                resident => {
                    self.resident_to = self.offset + resident as u64;
                    self.warm_run += resident as u64;
                    return Poll::Ready(Ok(()));
                }
            }
        }
        let Some(warming) = &mut self.warming else { return Poll::Ready(Ok(())) };
        if ready!(warming.done.as_mut().poll(cx)).is_err() {
            return Poll::Ready(Err(BodyError::Disk { waited: PATIENCE }));
        }
        let end = warming.end;
        self.warming = None;
        // Some of it may be gone again, or could not be read. Of that a page is tried, which says why.
        let there = self.window(self.offset, usize::try_from(end - self.offset).unwrap_or(WINDOW)).resident(PAGE);
        self.resident_to = self.offset + (there as u64).max(PAGE).min(self.left);
        if self.resident_to < end {
            return Poll::Ready(Ok(()));
        }
        let next = self.window(self.resident_to, WINDOW);
        self.warming = (next.resident(STRIDE) < next.len).then(|| self.warm(next));
        Poll::Ready(Ok(()))
    }

    /// How many of the next bytes are in memory.
    fn probe(&self) -> usize {
        if self.warm_run < WARM_WINDOW as u64 {
            return self.window(self.offset, WINDOW).resident(STRIDE);
        }
        let window = self.window(self.offset, WARM_WINDOW);
        match window.resident(WARM_STRIDE) {
            all if all == window.len => all,
            // Somewhere before that the cold begins.
            _ => window.resident(STRIDE),
        }
    }

    /// The window of up to `len` bytes from `start` on, which ends with the body.
    fn window(&self, start: u64, len: usize) -> Window {
        let left = usize::try_from(self.offset + self.left - start).unwrap_or(usize::MAX);
        Window { file: self.file.clone(), offset: start, len: left.min(len) }
    }

    fn warm(&self, window: Window) -> Warming {
        let end = window.offset + window.len as u64;
        Warming { end, done: Box::pin(tokio::time::timeout(PATIENCE, self.warmer.warm(window))) }
    }

    fn sendfile(&self, client: &Client<'_>, max: usize) -> io::Result<usize> {
        let mut offset = self.offset;
        let n = client.io(|stream| Ok(rustix::fs::sendfile(stream, &*self.file, Some(&mut offset), max)?))?;
        if n == 0 {
            return Err(BodyError::Truncated { missing: self.left }.into());
        }
        client.traffic.add(Way::Sendfile, n);
        Ok(n)
    }

    fn copy(&mut self, client: &Client<'_>, max: usize) -> io::Result<usize> {
        let stage = self.stage.get_or_insert_with(Stage::new);
        if stage.held().is_empty() && stage.fill(max as u64, |buf| self.file.read_at(buf, self.offset))? == 0 {
            return Err(BodyError::Truncated { missing: self.left }.into());
        }
        let n = client.send(&stage.held()[..stage.held().len().min(max)])?;
        stage.take(n);
        client.traffic.add(Way::FileCopy, n);
        Ok(n)
    }
}
