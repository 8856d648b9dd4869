//! The stretch of address space whose slices stand for bytes that live elsewhere.

use std::io;
use std::sync::OnceLock;

use memmap2::{Mmap, MmapMut};

/// Bytes in the region, and so the most that one frame of a body can stand for. Bounds what hyper would copy if it ever
/// flattened a frame, and is far above what a socket takes in one turn.
pub(super) const LEN: usize = 4 << 20;

static REGION: OnceLock<Mmap> = OnceLock::new();

/// The process's region. It is anonymous, read-only and never touched, so it costs address space and no memory.
pub(super) fn get() -> io::Result<&'static [u8]> {
    if let Some(region) = REGION.get() {
        return Ok(region);
    }
    let fresh = MmapMut::map_anon(LEN)?.make_read_only()?;
    Ok(REGION.get_or_init(|| fresh))
}

/// Whether `slice` lies in the region. An empty slice stands for nothing and is not in it.
pub(super) fn contains(region: &[u8], slice: &[u8]) -> bool {
    !slice.is_empty() && region.as_ptr_range().contains(&slice.as_ptr())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn knows_its_own_slices_only() {
        let region = get().unwrap();
        assert!(contains(region, &region[..1]));
        assert!(contains(region, &region[LEN - 1..]));
        assert!(!contains(region, &region[..0]));
        assert!(!contains(region, &[0_u8; 8]));
        assert!(std::ptr::eq(region.as_ptr(), get().unwrap().as_ptr()));
    }
}
