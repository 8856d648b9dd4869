//! Bytes from a file or a peer's socket to a client's socket without passing through user space. Knows no OCI.
//!
//! hyper queues a body's buffers uncopied beside the head, and hands both to `poll_write_vectored`. A [`Body`] that stands
//! for file or peer bytes therefore yields slices of a region of address space that is never read; [`Io`], which
//! wraps the client's socket, knows such a slice by its address and moves the real bytes with sendfile(2) or splice(2). The
//! two meet in [`Ops`], one a connection, which also proves after the fact that no slice of the region was ever sent itself:
//! hyper would copy bodies under `pipeline_flush(true)`, `writev(false)` or a wrapper without vectored writes, and such a
//! connection is ended before a byte of it leaves.
//!
//! The system calls come from `rustix`, whose wrappers are safe. The one file with `unsafe` is `tcp_info`, for what no library has.

mod body;
mod error;
mod file;
mod growing;
mod io;
mod ops;
mod pipe;
mod region;
mod relay;
mod stage;
mod tcp_info;
mod traffic;
mod warm;

pub use body::{Body, BodyEnd, BoundBody, Chunk};
pub use error::BodyError;
pub use growing::{Growing, Progress};
pub use io::Io;
pub use ops::{Activity, Ops, Settings, Transfer, send};
pub use pipe::PipePool;
pub use relay::{Excuse, Relay, RelayEnd, Resume};
pub use tcp_info::{TcpInfo, network_cookie};
pub use traffic::{Traffic, TrafficLabels, Way};
pub use warm::{RingWarmer, ThreadWarmer, Warm, Window};
