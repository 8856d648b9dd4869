//! Small content in memory: what is asked for most often, manifests and configurations, costs no system call then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use foldhash::quality::RandomState;
use sha2::{Digest as _, Sha256, Sha512};

use super::Blob;
use crate::oci::{Algorithm, Digest, MediaType};

/// Content of up to so many bytes is kept. Above it a system call costs little beside the bytes themselves.
pub(super) const MAX_BYTES: u64 = 32 << 10;

/// Bytes kept in all.
const CAPACITY: usize = 8 << 20;

/// Descriptors kept, one for each piece.
const PIECES: usize = 512;

/// How long content is believed to be where it was last seen. Its bytes cannot change, but it can go.
const TRUST: Duration = Duration::from_secs(1);

/// How long it is believed without a look at its file. Under load a look for each request would be a twentieth of what that costs.
const GLANCE: Duration = Duration::from_millis(10);

/// Bytes that were found to be those of their digest.
#[derive(Debug)]
pub struct Small {
    bytes: Bytes,
    media_type: OnceLock<Option<MediaType>>,
}

// === impl Small ===

impl Small {
    /// All of the content.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The media type, if it is a manifest. Found out once.
    #[must_use]
    pub fn media_type(&self) -> Option<&MediaType> {
        self.media_type.get_or_init(|| MediaType::detect(&self.bytes).ok()).as_ref()
    }
}

/// A cache bounded in bytes, descriptors and time.
#[derive(Debug, Default)]
pub(super) struct SmallCache {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    by_digest: HashMap<Digest, Entry, RandomState>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    blob: Blob,
    /// Names that the file had when it was opened. Another number of them means that it may be gone.
    names: u64,
    seen: Instant,
    /// When the names were last counted.
    glanced: Instant,
    used: Instant,
}

// === impl SmallCache ===

impl SmallCache {
    /// Content that was seen on disk a moment ago.
    pub(super) fn get(&self, digest: &Digest, now: Instant) -> Option<Blob> {
        self.get_seen_within(Duration::ZERO, digest, now)
    }

    /// As [`Self::get`], but a look at the file of a moment ago will do.
    pub(super) fn glance(&self, digest: &Digest, now: Instant) -> Option<Blob> {
        self.get_seen_within(GLANCE, digest, now)
    }

    fn get_seen_within(&self, time: Duration, digest: &Digest, now: Instant) -> Option<Blob> {
        let (blob, before) = {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = held.by_digest.get_mut(digest)?;
            entry.used = now;
            if now.duration_since(entry.seen) >= TRUST {
                return None;
            }
            if now.duration_since(entry.glanced) < time {
                return Some(entry.blob.clone());
            }
            entry.glanced = now;
            (entry.blob.clone(), entry.names)
        };
        if names(&blob) == before {
            return Some(blob);
        }
        self.forget(digest);
        None
    }

    /// Content that has just been opened, with its bytes if it is small and they are its digest's. One that is known already is not
    /// read again.
    pub(super) fn admit(&self, digest: &Digest, opened: Blob, now: Instant) -> Blob {
        if opened.size > MAX_BYTES {
            return opened;
        }
        {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(entry) = held.by_digest.get_mut(digest).filter(|entry| entry.blob.size == opened.size) {
                let blob = Blob { small: entry.blob.small.clone(), ..opened };
                *entry = Entry { names: names(&blob), blob: blob.clone(), seen: now, glanced: now, used: now };
                return blob;
            }
        }
        let Some(small) = read(digest, &opened) else { return opened };
        let blob = Blob { small: Some(Arc::new(small)), ..opened };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(digest, Entry { names: names(&blob), blob: blob.clone(), seen: now, glanced: now, used: now });
        blob
    }

    /// Content that is gone.
    pub(super) fn forget(&self, digest: &Digest) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
    }
}

/// How many names the file has, as fstat(2) tells without waiting.
fn names(blob: &Blob) -> u64 {
    // 32 bits on some architectures.
    #[allow(clippy::useless_conversion)]
    let links = rustix::fs::fstat(&*blob.file).map_or(0, |stat| u64::from(stat.st_nlink));
    links
}

fn read(digest: &Digest, blob: &Blob) -> Option<Small> {
    let bytes = blob.bytes().ok()?;
    let actual = match digest.algorithm() {
        Algorithm::Sha256 => hex::encode(Sha256::digest(&bytes)),
        Algorithm::Sha512 => hex::encode(Sha512::digest(&bytes)),
    };
    (actual == digest.hex()).then(|| Small { bytes, media_type: OnceLock::new() })
}

// === impl Held ===

impl Held {
    fn insert(&mut self, digest: &Digest, entry: Entry) {
        self.remove(digest);
        let length = usize::try_from(entry.blob.size).unwrap_or(usize::MAX);
        while self.by_digest.len() >= PIECES || self.bytes + length > CAPACITY {
            let oldest = self.by_digest.iter().min_by_key(|(_, entry)| entry.used).map(|(digest, _)| digest.clone());
            let Some(oldest) = oldest else { break };
            self.remove(&oldest);
        }
        self.bytes += length;
        self.by_digest.insert(digest.clone(), entry);
    }

    fn remove(&mut self, digest: &Digest) {
        if let Some(entry) = self.by_digest.remove(digest) {
            self.bytes -= usize::try_from(entry.blob.size).unwrap_or(usize::MAX).min(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::*;

    fn blob(bytes: &[u8]) -> (Digest, Blob) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(bytes))).parse().unwrap();
        (digest, Blob { file: Arc::new(file), size: bytes.len() as u64, small: None })
    }

    #[test]
    fn bytes_are_kept_and_believed_for_a_moment() {
        let (cache, now) = (SmallCache::default(), Instant::now());
        let (digest, opened) = blob(b"{}");
        assert!(cache.get(&digest, now).is_none());
        assert_eq!(cache.admit(&digest, opened.clone(), now).small.unwrap().bytes(), "{}");
        let later = now + TRUST;
        assert!(cache.get(&digest, later - Duration::from_millis(1)).is_some());
        assert!(cache.get(&digest, later).is_none(), "it is to be looked for again");
        // Seen again it is not read again.
        let first = cache.admit(&digest, opened, later).small.unwrap();
        assert!(Arc::ptr_eq(&cache.admit(&digest, blob(b"{}").1, later).small.unwrap(), &first));
        assert!(cache.get(&digest, later).is_some());
        cache.forget(&digest);
        assert!(cache.get(&digest, later).is_none());
    }

    #[test]
    fn a_file_that_was_unlinked_is_believed_for_a_glance_at_most() {
        let (cache, now) = (SmallCache::default(), Instant::now());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, b"{}").unwrap();
        let (digest, _) = blob(b"{}");
        cache.admit(&digest, Blob { file: Arc::new(std::fs::File::open(&path).unwrap()), size: 2, small: None }, now);
        assert!(cache.glance(&digest, now + GLANCE).is_some());
        std::fs::remove_file(&path).unwrap();
        let before = now + 2 * GLANCE - Duration::from_micros(1);
        assert!(cache.glance(&digest, before).is_some(), "from the look of a moment ago");
        assert!(cache.glance(&digest, now + 2 * GLANCE).is_none());
        assert!(cache.glance(&digest, now + 2 * GLANCE).is_none(), "and not again");
    }

    #[test]
    fn wrong_and_large_content_is_not_kept() {
        let (cache, now) = (SmallCache::default(), Instant::now());
        let (_, opened) = blob(b"right");
        let (other, _) = blob(b"other");
        assert!(cache.admit(&other, opened, now).small.is_none());
        let (digest, opened) = blob(&vec![1; usize::try_from(MAX_BYTES).unwrap() + 1]);
        assert!(cache.admit(&digest, opened, now).small.is_none());
        assert!(cache.held.lock().unwrap().by_digest.is_empty());
    }

    #[test]
    fn the_least_used_goes_first() {
        let (cache, start) = (SmallCache::default(), Instant::now());
        let pieces: Vec<_> = (0..=PIECES).map(|n| blob(&vec![1; n + 1])).collect();
        for (n, (digest, opened)) in pieces.iter().enumerate().take(PIECES) {
            cache.admit(digest, opened.clone(), start + Duration::from_micros(n as u64));
        }
        let now = start + Duration::from_millis(10);
        assert!(cache.get(&pieces[0].0, now).is_some());
        cache.admit(&pieces[PIECES].0, pieces[PIECES].1.clone(), now);
        assert!(cache.get(&pieces[0].0, now).is_some() && cache.get(&pieces[1].0, now).is_none());
        let held = cache.held.lock().unwrap();
        assert_eq!(held.by_digest.len(), PIECES);
        assert_eq!(held.bytes as u64, held.by_digest.values().map(|entry| entry.blob.size).sum::<u64>());
    }

    #[test]
    fn a_manifests_media_type_is_known_with_it() {
        let (digest, opened) =
            blob(br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#);
        let small = SmallCache::default().admit(&digest, opened, Instant::now()).small.unwrap();
        assert_eq!(small.media_type().unwrap().as_str(), "application/vnd.oci.image.index.v1+json");
        let (digest, opened) = blob(b"no manifest");
        assert!(SmallCache::default().admit(&digest, opened, Instant::now()).small.unwrap().media_type().is_none());
    }
}
