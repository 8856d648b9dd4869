//! Why a body ended before its length.

use std::io;
use std::time::Duration;

/// Why a body ended early. It reaches whoever drives the connection inside the [`io::Error`] that ended it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BodyError {
    /// [`Body::cut`](super::Body::cut) did what it is for: the head went out, and nothing more.
    #[error("the body was cut on purpose")]
    Cut,
    /// The file became shorter after its length was promised. Ours or containerd's doing; another source may help.
    #[error("the file ends {missing} bytes before the promised length")]
    Truncated {
        /// Bytes promised and not sent.
        missing: u64,
    },
    /// The disk gave none of the bytes that were asked of it. This node's fault.
    #[error("the disk has not given the next bytes within {waited:?}")]
    Disk {
        /// How long was waited.
        waited: Duration,
    },
    /// The file was not written to its end: its writer gave up, started over, or made no progress within its bound. Another
    /// source may help.
    #[error("the file was given up {missing} bytes before the promised length")]
    Abandoned {
        /// Bytes promised and not sent.
        missing: u64,
    },
    /// The peer that we relay from failed, stalled or closed, and nobody could go on. The peer's fault.
    #[error("the peer failed after {sent} bytes: {reason}")]
    Peer {
        /// Bytes of the body sent before that.
        sent: u64,
        /// What the peer did.
        reason: String,
    },
    /// The HTTP layer copied, skipped or reordered what stands for the body. Our fault; nothing wrong was sent.
    #[error("the HTTP layer did not hand the body's frames through as they were")]
    OutOfStep,
}

impl BodyError {
    /// The body error that `error` carries, however deep.
    #[must_use]
    pub fn find<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(found);
            }
            // An io::Error reports its inner error's source as its own, so the inner one is asked for by name.
            if let Some(found) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
                && let Some(found) = found.downcast_ref::<Self>()
            {
                return Some(found);
            }
            next = error.source();
        }
        None
    }
}

impl From<BodyError> for io::Error {
    fn from(error: BodyError) -> Self {
        let kind = match error {
            BodyError::Cut => io::ErrorKind::ConnectionAborted,
            BodyError::Truncated { .. } | BodyError::Abandoned { .. } | BodyError::Peer { .. } => {
                io::ErrorKind::UnexpectedEof
            }
            BodyError::Disk { .. } => io::ErrorKind::TimedOut,
            BodyError::OutOfStep => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}
