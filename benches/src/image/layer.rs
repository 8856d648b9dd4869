//! One layer: a tar with a file of noise, compressed or not, hashed on both sides of the compressor while it is written.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::hash::HashWriter;
use super::{Descriptor, blob_path};

/// What the media type of every layer starts with.
pub(super) const MEDIA_TYPE_PREFIX: &str = "application/vnd.oci.image.layer.v1.tar";

/// How a layer is stored and sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// The tar as it is: digest and diff id are the same.
    None,
    /// What most images have.
    Gzip,
    /// What newer builders write; containerd reads it since 1.5.
    Zstd,
}

#[derive(Clone, Debug)]
pub(super) struct Spec {
    pub(super) size: u64,
    pub(super) compression: Compression,
    pub(super) seed: u64,
}

pub(super) struct Made {
    pub(super) descriptor: Descriptor,
    pub(super) diff_id: String,
}

impl Compression {
    fn media_type(self) -> String {
        let suffix = match self {
            Self::None => "",
            Self::Gzip => "+gzip",
            Self::Zstd => "+zstd",
        };
        format!("{MEDIA_TYPE_PREFIX}{suffix}")
    }
}

impl Spec {
    pub(super) fn build(&self, folder: &Path, position: usize, platform: &str) -> Result<Made> {
        let part = tempfile::NamedTempFile::new_in(folder).context("make a file for a layer")?;
        let (digest, size, diff_id) = self.write(part.as_file(), position, platform)?;
        let path = blob_path(folder, &digest);
        part.persist(&path).with_context(|| format!("store {}", path.display()))?;
        // A temporary file is readable by its owner only; daemons of other users serve these blobs.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        let media_type = self.compression.media_type();
        Ok(Made { descriptor: Descriptor { media_type, digest, size, platform: Some(platform.to_owned()) }, diff_id })
    }

    fn write(&self, file: &File, position: usize, platform: &str) -> Result<(String, u64, String)> {
        let stored = HashWriter::new(BufWriter::with_capacity(256 << 10, file));
        let (stored, diff_id) = match self.compression {
            Compression::None => (self.write_tar(stored, position, platform)?, None),
            Compression::Gzip => {
                let encoder = flate2::write::GzEncoder::new(stored, flate2::Compression::fast());
                let (encoder, diff_id, _) = self.write_tar(HashWriter::new(encoder), position, platform)?.finish();
                (encoder.finish()?, Some(diff_id))
            }
            Compression::Zstd => {
                let encoder = zstd::Encoder::new(stored, 1)?;
                let (encoder, diff_id, _) = self.write_tar(HashWriter::new(encoder), position, platform)?.finish();
                (encoder.finish()?, Some(diff_id))
            }
        };
        let (mut buffered, digest, size) = stored.finish();
        buffered.flush()?;
        let diff_id = diff_id.unwrap_or_else(|| digest.clone());
        Ok((digest, size, diff_id))
    }

    fn write_tar<W: Write>(&self, to: W, position: usize, platform: &str) -> Result<W> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(self.size);
        header.set_mode(0o644);
        header.set_mtime(0);
        let mut tar = tar::Builder::new(to);
        let noise = Noise::new(self.seed, position, platform).take(self.size);
        tar.append_data(&mut header, format!("layer-{position}.bin"), noise)?;
        Ok(tar.into_inner()?)
    }
}

/// An endless stream of bytes that do not compress: SplitMix64, the same on every machine and in every version.
struct Noise {
    state: u64,
}

impl Noise {
    fn new(seed: u64, position: usize, platform: &str) -> Self {
        let start = Sha256::digest(format!("{seed}/{position}/{platform}"));
        let state = start.iter().take(8).fold(0, |state, byte| state << 8 | u64::from(*byte));
        Self { state }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        for piece in buffer.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
        Ok(buffer.len())
    }
}
