//! Whether bytes are those of a digest.

use sha2::{Digest as _, Sha256, Sha512};

use crate::oci::{Algorithm, Digest};

/// Whether `bytes` hash to `digest`.
pub(super) fn matches(digest: &Digest, bytes: &[u8]) -> bool {
    let actual = match digest.algorithm() {
        Algorithm::Sha256 => hex::encode(Sha256::digest(bytes)),
        Algorithm::Sha512 => hex::encode(Sha512::digest(bytes)),
    };
    actual == digest.hex()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn bytes_match_their_own_digest_only() {
        let sha256: Digest = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".parse().unwrap();
        assert!(matches(&sha256, b"abc"));
        assert!(!matches(&sha256, b"abd"));
        let sha512: Digest = format!("sha512:{}", hex::encode(Sha512::digest(b"abc"))).parse().unwrap();
        assert!(matches(&sha512, b"abc"));
        assert!(!matches(&sha512, b""));
    }
}
