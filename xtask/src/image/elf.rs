//! What a binary is made for, and whether it needs anything but the kernel.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

/// The type of the program header that names a dynamic linker (System V ABI, "Program Header").
const PT_INTERP: u32 = 3;

/// An architecture that images are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    Amd64,
    Arm64,
}

impl Architecture {
    /// Its name in the OCI image specification, which is Go's.
    pub(crate) fn oci_name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// The architecture of a static binary.
///
/// # Errors
/// It is not a 64-bit little-endian ELF file of a known architecture, or it needs a dynamic linker, which an empty root does not have.
pub(crate) fn check_static(path: &Path) -> Result<Architecture> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    check(&bytes).with_context(|| path.display().to_string())
}

fn check(bytes: &[u8]) -> Result<Architecture> {
    ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let architecture = match number::<2>(bytes, 18)? {
        62 => Architecture::Amd64,
        183 => Architecture::Arm64,
        other => bail!("ELF machine {other} is neither x86-64 nor AArch64"),
    };
    let (start, size, count) = (number::<8>(bytes, 32)?, number::<2>(bytes, 54)?, number::<2>(bytes, 56)?);
    for index in 0..count {
        let at = usize::try_from(start.saturating_add(index * size))?;
        ensure!(
            number::<4>(bytes, at)? != u64::from(PT_INTERP),
            "it needs a dynamic linker: build it with RUSTFLAGS=\"-C target-feature=+crt-static\" and an explicit --target"
        );
    }
    Ok(architecture)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at.saturating_add(N)).context("the ELF file is cut short")?;
    Ok(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A header of a program with segments of these types.
    pub(crate) fn program(machine: u16, segments: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(segments.len()).unwrap();
        for segment in segments {
            bytes.extend(segment.to_le_bytes());
            bytes.extend([0; 52]);
        }
        bytes
    }

    #[test]
    fn static_binaries_are_told_from_others() {
        assert_eq!(check(&program(62, &[1, 2])).unwrap(), Architecture::Amd64);
        assert_eq!(check(&program(183, &[1])).unwrap(), Architecture::Arm64);
        let error = check(&program(62, &[1, PT_INTERP])).unwrap_err();
        assert!(error.to_string().contains("dynamic linker"), "{error}");
        for wrong in [&b"#!/bin/sh"[..], &program(40, &[1]), &program(62, &[1])[..66]] {
            assert!(check(wrong).is_err());
        }
    }
}
