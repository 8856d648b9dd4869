//! Buffers for where the kernel cannot move the bytes by itself. Pooled: fresh large ones for each connection cost twice
//! the time of the copy.

use std::sync::{Mutex, PoisonError};

/// Bytes in a buffer: a copy of 256 KiB at a time costs a third less than one of 64 KiB.
const LEN: usize = 256 << 10;

/// Buffers kept for the next user, 4 MiB in all.
const IDLE: usize = 16;

static POOL: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// A buffer that is filled, then emptied, then filled again.
pub(super) struct Stage {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Stage {
    pub(super) fn new() -> Self {
        let pooled = POOL.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Self { buf: pooled.unwrap_or_else(|| vec![0; LEN].into_boxed_slice()), start: 0, end: 0 }
    }

    /// Bytes filled in and not taken yet.
    pub(super) fn held(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Fills an empty stage with what `read` writes into a slice of at most `max` bytes.
    pub(super) fn fill<E>(&mut self, max: u64, read: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<usize, E> {
        debug_assert!(self.held().is_empty());
        let room = usize::try_from(max).unwrap_or(LEN).min(LEN);
        let n = read(&mut self.buf[..room])?;
        (self.start, self.end) = (0, n.min(room));
        Ok(self.end)
    }

    /// Takes `n` bytes off the front.
    pub(super) fn take(&mut self, n: usize) {
        self.start = self.end.min(self.start + n);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < IDLE {
            pool.push(std::mem::take(&mut self.buf));
        }
    }
}
