//! What a data runtime runs on: tokio with an io_uring beside it where the kernel gives one, else tokio alone. Sockets are epoll's
//! in both; the ring reads what is not in memory.

use std::fmt;
use std::future::Future;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::zerocopy::{RingWarmer, ThreadWarmer, Warm};

/// How long the kernel may take for the first operation, which does nothing. A sandbox may let a ring be made and not be used.
const TRIAL: Duration = Duration::from_secs(1);

/// Entries of the ring: see [`RingWarmer::start`].
const ENTRIES: u32 = 1;

/// Which engine drives connections.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum EngineChoice {
    /// io_uring where the kernel lets us, else tokio.
    #[default]
    Auto,
    /// io_uring, or no start.
    IoUring,
    /// Plain tokio.
    Tokio,
}

/// The engine in use.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum EngineKind {
    /// tokio over epoll, with a ring for cold files.
    IoUring,
    /// tokio over epoll, with a few threads for cold files.
    Tokio,
}

/// The engine in use, and why it is that one.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The engine.
    pub engine: EngineKind,
    /// Why, in a word that a metric can carry.
    pub reason: &'static str,
    /// What the kernel said where it refused io_uring.
    pub refusal: Option<Arc<io::Error>>,
}

/// A current-thread runtime.
pub(super) enum Runtime {
    IoUring(tokio_uring::Runtime),
    Tokio(tokio::runtime::Runtime),
}

// === impl EngineChoice ===

impl FromStr for EngineChoice {
    type Err = &'static str;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        match given {
            "auto" => Ok(Self::Auto),
            "io-uring" => Ok(Self::IoUring),
            "tokio" => Ok(Self::Tokio),
            _ => Err("the engines are auto, io-uring and tokio"),
        }
    }
}

// === impl EngineKind ===

impl EngineKind {
    /// The name that logs and metrics have for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io-uring",
            Self::Tokio => "tokio",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

// === impl Runtime ===

impl Runtime {
    /// Makes a runtime for the thread that this is called on.
    ///
    /// # Errors
    /// No descriptors or memory; or the kernel refuses io_uring, and nothing else was asked for.
    pub(super) fn new(choice: EngineChoice) -> io::Result<(Self, Chosen)> {
        let refusal = match choice {
            EngineChoice::Tokio => None,
            EngineChoice::Auto | EngineChoice::IoUring => match ring() {
                Ok(runtime) => {
                    let reason = if choice == EngineChoice::Auto { "available" } else { "asked for" };
                    let chosen = Chosen { engine: EngineKind::IoUring, reason, refusal: None };
                    return Ok((Self::IoUring(runtime), chosen));
                }
                Err(error) if choice == EngineChoice::IoUring => return Err(error),
                Err(error) => Some(Arc::new(error)),
            },
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let reason = refusal.as_deref().map_or("asked for", reason);
        Ok((Self::Tokio(runtime), Chosen { engine: EngineKind::Tokio, reason, refusal }))
    }

    /// Runs what `make` makes, within the runtime, of the runtime's way to read cold files; then gives the runtime up.
    pub(super) fn run<F: Future<Output = ()>>(self, make: impl FnOnce(Arc<dyn Warm>) -> F) {
        match self {
            Self::IoUring(runtime) => runtime.block_on(async { make(Arc::new(RingWarmer::start())).await }),
            Self::Tokio(runtime) => {
                runtime.block_on(async { make(Arc::new(ThreadWarmer::new())).await });
                // A thread that hangs at a disk must not keep this one.
                runtime.shutdown_background();
            }
        }
    }
}

/// A runtime with a ring that has been seen to work.
fn ring() -> io::Result<tokio_uring::Runtime> {
    let mut ring = tokio_uring::uring_builder();
    // Completions need not interrupt the thread, which enters the kernel often enough. From Linux 5.19 and 6.0.
    ring.setup_coop_taskrun().setup_single_issuer();
    let runtime = tokio_uring::Runtime::new(tokio_uring::builder().uring_builder(&ring).entries(ENTRIES))?;
    let tried = runtime.block_on(async { tokio::time::timeout(TRIAL, tokio_uring::no_op()).await });
    match tried {
        Ok(result) => result.map(|()| runtime),
        Err(_) => {
            // Dropping it would wait for the operation for ever. Lost once, at the start.
            std::mem::forget(runtime);
            Err(Errno::ACCESS.into())
        }
    }
}

/// Why the kernel refuses io_uring, as the figures name it.
fn reason(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        // The sysctl kernel.io_uring_disabled, seccomp, or a security module.
        Some(Errno::PERM | Errno::ACCESS) => "forbidden",
        Some(Errno::NOSYS) => "not in this kernel",
        // A flag that the kernel does not know.
        Some(Errno::INVAL) => "kernel older than 6.0",
        Some(Errno::NOMEM | Errno::MFILE | Errno::NFILE) => "out of resources",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn engines_have_names() {
        assert_eq!("io-uring".parse(), Ok(EngineChoice::IoUring));
        assert_eq!("auto".parse(), Ok(EngineChoice::Auto));
        assert!("epoll".parse::<EngineChoice>().unwrap_err().contains("auto, io-uring and tokio"));
    }

    #[test]
    fn tokio_is_had_for_the_asking() {
        let (runtime, chosen) = Runtime::new(EngineChoice::Tokio).unwrap();
        assert!(matches!(runtime, Runtime::Tokio(_)));
        assert_eq!((chosen.engine, chosen.reason, chosen.refusal.is_none()), (EngineKind::Tokio, "asked for", true));
    }

    #[test]
    fn refusals_are_told_apart() {
        let told = |errno: Errno| reason(&errno.into());
        assert_eq!(told(Errno::PERM), "forbidden");
        assert_eq!(told(Errno::NOSYS), "not in this kernel");
        assert_eq!(told(Errno::INVAL), "kernel older than 6.0");
        assert_eq!(told(Errno::MFILE), "out of resources");
        assert_eq!(told(Errno::IO), "failed");
    }
}
