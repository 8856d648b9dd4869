//! What nodes advertise to each other.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use super::{Digest, ParseReferenceError, TagName};

/// A name under which a node can be found as a source: a digest, or a tag with its full name.
///
/// Its text is what the Kademlia network hashes: `sha256:…` or `registry/repository:tag`. It is never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// Content named by its digest.
    Digest(Digest),
    /// A tag, which names the digest of a manifest.
    Tag(TagName),
}

impl Key {
    /// The SHA-256 of its text, by which the network knows it.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.to_string()).into()
    }
}

impl From<Digest> for Key {
    fn from(digest: Digest) -> Self {
        Self::Digest(digest)
    }
}

impl From<TagName> for Key {
    fn from(tag: TagName) -> Self {
        Self::Tag(tag)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Digest(digest) => digest.fmt(f),
            Self::Tag(tag) => tag.fmt(f),
        }
    }
}

impl FromStr for Key {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<Digest>() {
            Ok(digest) => Ok(Self::Digest(digest)),
            Err(_) => text.parse().map(Self::Tag),
        }
    }
}
