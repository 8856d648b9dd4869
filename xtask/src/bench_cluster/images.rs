//! Images of random bytes, which nobody has and nothing compresses.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context as _, Result};
use rand::Rng as _;
use spegel_benches::image::{Compression, ImageBuilder};

/// A size in bytes, written as the existing project's tags write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

// === impl Size ===

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = [("GB", 1_000_000_000), ("MB", 1_000_000)];
        let found = parts.iter().find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
        let number = found.and_then(|(number, unit)| number.parse::<u64>().ok()?.checked_mul(unit));
        number.filter(|bytes| *bytes > 0).map(Self).ok_or_else(|| "write it like 10MB or 1GB".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes % 1_000_000_000 == 0 => write!(f, "{}GB", bytes / 1_000_000_000),
            bytes => write!(f, "{}MB", bytes / 1_000_000),
        }
    }
}

/// Makes an image and pushes it; returns its name.
pub(super) fn push(repository: &str, tag: &str, size: Size, layers: usize, url: &str) -> Result<String> {
    let seed: u32 = rand::rng().random();
    let name = format!("{repository}:{tag}-{seed:08x}");
    let folder = tempfile::tempdir()?;
    let image = ImageBuilder::new(&name).layers(layers, size.0 / layers as u64, Compression::Gzip, u64::from(seed));
    image.build(folder.path())?.push(url).with_context(|| format!("push {name}"))?;
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for text in ["10MB", "100MB", "1GB"] {
            assert_eq!(text.parse::<Size>().map(|size| size.to_string()), Ok(text.to_owned()));
        }
        for wrong in ["", "10", "0MB", "MB", "1TB"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
    }
}
