//! Pipes for splice(2), which moves bytes between two sockets only by way of a pipe.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::metrics::gauge::Gauge;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Bytes asked for a pipe: with 1 MiB a relay costs about half of what it does with the default of 64 KiB.
const CAPACITY: usize = 1 << 20;

/// What the kernel gives a pipe when it refuses [`CAPACITY`] (`pipe-user-pages-soft` is used up).
const DEFAULT_CAPACITY: usize = 64 << 10;

/// Pipes shared by every relay of a process. Bounded, since each holds two descriptors and up to 1 MiB of the kernel's.
#[derive(Debug)]
pub struct PipePool {
    max: usize,
    gauge: Gauge,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    idle: Vec<Ends>,
    in_use: usize,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl PipePool {
    /// A pool of at most `max` pipes; a relay that finds none left copies instead.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        Self::counted(max, Gauge::default())
    }

    /// The same, with a gauge of the pipes in use.
    #[must_use]
    pub fn counted(max: usize, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { max, gauge, inner: Mutex::default() })
    }

    /// An empty pipe, or `None` at the bound or where the kernel has no descriptors left.
    pub(super) fn take(self: &Arc<Self>) -> Option<Pipe> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.in_use >= self.max {
            return None;
        }
        let ends = match inner.idle.pop() {
            Some(ends) => ends,
            None => open().ok()?,
        };
        inner.in_use += 1;
        self.gauge.inc();
        Some(Pipe { ends: Some(ends), held: 0, pool: self.clone() })
    }
}

fn open() -> io::Result<Ends> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let capacity = fcntl_setpipe_size(&write, CAPACITY).unwrap_or(DEFAULT_CAPACITY);
    Ok(Ends { read, write, capacity })
}

/// A pipe on loan. Goes back when dropped, unless bytes are left in it.
#[derive(Debug)]
pub(super) struct Pipe {
    /// There until dropped.
    ends: Option<Ends>,
    held: usize,
    pool: Arc<PipePool>,
}

impl Pipe {
    /// The end that bytes come out of.
    pub(super) fn read_end(&self) -> io::Result<&OwnedFd> {
        self.ends.as_ref().map(|ends| &ends.read).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    /// The end that bytes go into.
    pub(super) fn write_end(&self) -> io::Result<&OwnedFd> {
        self.ends.as_ref().map(|ends| &ends.write).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    pub(super) fn capacity(&self) -> usize {
        self.ends.as_ref().map_or(0, |ends| ends.capacity)
    }

    /// Bytes in the pipe.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    pub(super) fn filled(&mut self, n: usize) {
        self.held += n;
    }

    pub(super) fn emptied(&mut self, n: usize) {
        self.held = self.held.saturating_sub(n);
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut inner = self.pool.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.in_use = inner.in_use.saturating_sub(1);
        self.pool.gauge.dec();
        if self.held == 0
            && let Some(ends) = self.ends.take()
        {
            inner.idle.push(ends);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lends_at_most_its_bound_and_reuses_empty_pipes_only() {
        let pool = PipePool::new(2);
        let mut first = pool.take().unwrap();
        let second = pool.take().unwrap();
        assert!(pool.take().is_none());
        rustix::io::write(first.write_end().unwrap(), b"left").unwrap();
        first.filled(4);
        drop(first);
        assert_eq!(pool.inner.lock().unwrap().idle.len(), 0);
        drop(second);
        assert_eq!(pool.inner.lock().unwrap().idle.len(), 1);
        assert_eq!(pool.take().unwrap().held(), 0);
        assert_eq!(pool.inner.lock().unwrap().idle.len(), 1);
    }
}
