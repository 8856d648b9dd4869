//! The key of a libp2p private network: who does not have it cannot take part.

use std::fmt;
use std::path::{Path, PathBuf};

use libp2p::pnet::PreSharedKey;

/// A key of 256 bits, in a file of the form that IPFS's `swarm.key` has.
#[derive(Clone)]
pub struct NetworkKey(PreSharedKey);

/// Why a file holds no key.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}; a network key has the lines /key/swarm/psk/1.0.0/, /base16/ and 64 hexadecimal digits")]
pub struct NetworkKeyError {
    path: PathBuf,
    reason: String,
}

// === impl NetworkKey ===

impl NetworkKey {
    /// The key of a file.
    ///
    /// # Errors
    /// It cannot be read or is no key.
    pub fn load(path: &Path) -> Result<Self, NetworkKeyError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| NetworkKeyError { path: path.to_owned(), reason: error.to_string() })?;
        Self::parse(path, &text)
    }

    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, NetworkKeyError> {
        let wrong = |reason: String| NetworkKeyError { path: path.to_owned(), reason };
        // The parser wants no space around, and an editor leaves a line's end.
        text.trim().parse().map(Self).map_err(|error: libp2p::pnet::KeyParseError| wrong(error.to_string()))
    }

    pub(super) fn shared(&self) -> PreSharedKey {
        self.0
    }
}

/// The key is a secret: only its fingerprint is shown.
impl fmt::Debug for NetworkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NetworkKey").field(&self.0.fingerprint().to_string()).finish()
    }
}
