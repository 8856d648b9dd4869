//! A directory of blobs, `<dir>/blobs/<algorithm>/<hex>`: the form that OCI image layouts and containerd's content directory share.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::small::SmallCache;
use super::{Blob, StoreError};
use crate::oci::{Digest, MAX_MANIFEST_BYTES};

/// A directory of blobs.
#[derive(Clone, Debug)]
pub(super) struct BlobDir {
    root: PathBuf,
    /// Of all clones.
    small: Arc<SmallCache>,
}

/// An error with the path that it is about.
pub(super) fn io_error(path: &Path, source: std::io::Error) -> StoreError {
    StoreError::Io { path: path.display().to_string(), source }
}

// === impl BlobDir ===

impl BlobDir {
    pub(super) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), small: Arc::default() }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        let mut path = self.root.join("blobs");
        path.push(digest.algorithm().as_str());
        path.push(digest.hex());
        path
    }

    /// Opens a blob, or says that it is not there. Small ones come from memory, where they were for less than a second.
    pub(super) fn open(&self, digest: &Digest) -> Result<Option<Blob>, StoreError> {
        let now = Instant::now();
        if let Some(blob) = self.small.get(digest, now) {
            return Ok(Some(blob));
        }
        let Some(opened) = self.open_file(digest)? else {
            self.small.forget(digest);
            return Ok(None);
        };
        Ok(Some(self.small.admit(digest, opened, now)))
    }

    /// A small blob that was seen less than a second ago, from memory.
    pub(super) fn held(&self, digest: &Digest, now: Instant) -> Option<Blob> {
        self.small.glance(digest, now)
    }

    /// Two system calls on a local file: no reason to leave the thread.
    fn open_file(&self, digest: &Digest) -> Result<Option<Blob>, StoreError> {
        let path = self.path(digest);
        match open_regular(&path) {
            Ok(opened) => Ok(opened.map(|(file, size)| Blob { file: Arc::new(file), size, small: None })),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(io_error(&path, error)),
        }
    }

    /// A blob's length, if it is there.
    pub(super) fn size(&self, digest: &Digest) -> std::io::Result<Option<u64>> {
        match std::fs::metadata(self.path(digest)) {
            Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A manifest's bytes, unless it is absent, unreadable or too large.
    pub(super) fn manifest(&self, digest: &Digest) -> Option<Vec<u8>> {
        let blob = self.open_file(digest).ok()??;
        read_bounded(&blob.file, MAX_MANIFEST_BYTES)
    }
}

fn is_absence(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Opens a file, and says how long it is; nothing if something else is there.
pub(super) fn open_regular(path: &Path) -> std::io::Result<Option<(File, u64)>> {
    // Were it a pipe, opening it would otherwise wait for a writer.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some((file, metadata.len())))
}

/// Reads a whole file of at most `limit` bytes; nothing if it has more. The bound is on what is read, so that a file that
/// grows meanwhile cannot exceed it.
pub(super) fn read_bounded(file: &File, limit: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() <= limit).then_some(bytes)
}
