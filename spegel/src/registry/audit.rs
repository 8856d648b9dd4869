//! Content of this node that is not what its digest says: found when a peer complains or a file gets shorter, and not given any more.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256, Sha512};
use tokio::sync::Semaphore;
use tracing::{error, info};

use crate::mirror::Mirror;
use crate::oci::{Algorithm, Digest, Key};

/// How often one piece of content is audited at the most.
const AGAIN: Duration = Duration::from_secs(600);
/// How much is read at once, and how fast at the most, in bytes a second: the disk is for those who want content.
const STEP: usize = 1 << 20;
const RATE: f64 = 100e6;
/// How many bodies that ended early are looked into at a time.
const TRIALS: usize = 4;
/// How many digests are remembered.
const CAPACITY: usize = 4096;

/// The memory of audits. The clock is the caller's.
#[derive(Debug)]
pub(super) struct Audits {
    mirror: Mirror,
    state: Mutex<State>,
    /// One at a time; who comes meanwhile is not heard.
    running: Arc<Semaphore>,
    /// Places where the disk is tried; who comes meanwhile is not heard.
    trials: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct State {
    spoiled: HashSet<Digest>,
    audited: HashMap<Digest, Instant>,
}

// === impl Audits ===

impl Audits {
    pub(super) fn new(mirror: Mirror) -> Self {
        Self {
            mirror,
            state: Mutex::default(),
            running: Arc::new(Semaphore::new(1)),
            trials: Arc::new(Semaphore::new(TRIALS)),
        }
    }

    /// Whether this node's content of that digest is known to be wrong.
    pub(super) fn is_spoiled(&self, digest: &Digest) -> bool {
        self.lock().spoiled.contains(digest)
    }

    /// It was stored anew.
    pub(super) fn stored(&self, digest: &Digest) {
        self.lock().spoiled.remove(digest);
    }

    /// A body of it ended early, before the byte at `next`: if its file is shorter than `size`, or the disk does not give that byte, it is
    /// not given any more. Mostly it was the client that left.
    pub(super) fn cut_short(self: &Arc<Self>, digest: &Digest, file: &Arc<File>, size: u64, next: u64) {
        match file.metadata() {
            Ok(metadata) if metadata.len() < size => return self.withdraw(digest, "its file has become shorter"),
            Ok(_) => {}
            Err(error) => return self.withdraw(digest, &error.to_string()),
        }
        let runtime = tokio::runtime::Handle::try_current();
        let (Ok(permit), Ok(runtime)) = (Arc::clone(&self.trials).try_acquire_owned(), runtime) else { return };
        let (audits, digest, file) = (Arc::clone(self), digest.clone(), Arc::clone(file));
        runtime.spawn_blocking(move || {
            let _permit = permit;
            if let Err(error) = file.read_at(&mut [0], next) {
                audits.withdraw(&digest, &format!("the disk does not give its byte at {next}: {error}"));
            }
        });
    }

    /// A peer says that what it got of this is wrong: hashes it, unless that was done lately or another is hashed. True if it begins.
    pub(super) fn hear(self: &Arc<Self>, digest: &Digest, file: Arc<File>, size: u64, now: Instant) -> bool {
        let Ok(permit) = Arc::clone(&self.running).try_acquire_owned() else { return false };
        {
            let mut state = self.lock();
            if state.audited.len() >= CAPACITY {
                state.audited.retain(|_, at| now.duration_since(*at) < AGAIN);
            }
            let lately = state.audited.get(digest).is_some_and(|at| now.duration_since(*at) < AGAIN);
            if lately || state.audited.len() >= CAPACITY {
                return false;
            }
            state.audited.insert(digest.clone(), now);
        }
        let (audits, digest) = (Arc::clone(self), digest.clone());
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            match hash(digest.algorithm(), &file, size) {
                Ok(hex) if hex == digest.hex() => info!(%digest, "a peer complained of content that is right here"),
                Ok(_) => audits.withdraw(&digest, "its bytes are not those of its digest"),
                Err(error) => audits.withdraw(&digest, &error.to_string()),
            }
        });
        true
    }

    fn withdraw(&self, digest: &Digest, reason: &str) {
        {
            let mut state = self.lock();
            if state.spoiled.len() >= CAPACITY || !state.spoiled.insert(digest.clone()) {
                return;
            }
        }
        error!(%digest, reason, "content of this node is damaged and is not given to peers any more: check the disk, and remove and pull its images");
        self.mirror.withdraw(Key::Digest(digest.clone()));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The hexadecimal hash of a file's first `size` bytes, read slowly. Blocks.
fn hash(algorithm: Algorithm, file: &File, size: u64) -> io::Result<String> {
    match algorithm {
        Algorithm::Sha256 => hash_with(Sha256::new(), file, size),
        Algorithm::Sha512 => hash_with(Sha512::new(), file, size),
    }
}

fn hash_with<D: sha2::Digest>(mut hasher: D, file: &File, size: u64) -> io::Result<String> {
    let mut buffer = vec![0; STEP];
    let (mut offset, start) = (0, Instant::now());
    while offset < size {
        let wanted = usize::try_from(size - offset).unwrap_or(STEP).min(STEP);
        let read = file.read_at(&mut buffer[..wanted], offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buffer[..read]);
        offset += read as u64;
        let due = Duration::from_secs_f64(offset as f64 / RATE);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    Ok(hex::encode(hasher.finalize()))
}
