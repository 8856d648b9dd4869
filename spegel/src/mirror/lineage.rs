//! Who is above whom while a blob travels down a chain of nodes that are all still receiving it.
//!
//! A node that took a blob from a node that takes it from the first would wait for itself. So each answer for a blob that is being
//! received names the nodes that its bytes come through, and each node remembers who these are for what its own containerd is being
//! given: it gives the blob to none of them. A node further up may have turned to another parent since; a circle that comes about so
//! stands still, and ends at the stall bound.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::oci::Digest;

/// How many nodes a blob may come through while it is received. A tree in which each node gives it to two others has fewer levels for any
/// cluster; the rest is for chunks that come by different ways.
pub const MAX_CHAIN: usize = 64;

/// A node in a chain: a hash of its name, since names may be long and hold anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// The nodes that a blob's bytes come through, the nearest first. At most [`MAX_CHAIN`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain(Vec<NodeId>);

/// Text that is no chain, or too long a one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a chain of at most {MAX_CHAIN} nodes")]
pub struct ParseChainError;

// === impl NodeId ===

impl NodeId {
    /// The node of this name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let hash = Sha256::digest(name);
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        Self(u64::from_be_bytes(first))
    }
}

// === impl Chain ===

impl Chain {
    /// Whether the bytes come through this node.
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        self.0.contains(&node)
    }

    /// The chain of those who get it from `node`; none if it would be too long.
    #[must_use]
    pub fn below(&self, node: NodeId) -> Option<Self> {
        (self.0.len() < MAX_CHAIN).then(|| Self([&[node], &*self.0].concat()))
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, NodeId(node)) in self.0.iter().enumerate() {
            write!(f, "{}{node:016x}", if n > 0 { " " } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for Chain {
    type Err = ParseChainError;

    fn from_str(text: &str) -> Result<Self, ParseChainError> {
        let node = |word: &str| match word.len() {
            16 if word.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u64::from_str_radix(word, 16).map(NodeId).map_err(|_| ParseChainError)
            }
            _ => Err(ParseChainError),
        };
        let words = text.split(' ').take(MAX_CHAIN + 1);
        let nodes = words.map(node).collect::<Result<Vec<_>, _>>()?;
        if nodes.len() > MAX_CHAIN { Err(ParseChainError) } else { Ok(Self(nodes)) }
    }
}

/// The chains of what this node's containerd is being given, each as long as it lasts.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    given: Mutex<HashMap<Digest, Vec<(u64, Chain)>>>,
    next: AtomicU64,
}

/// A blob is being given to our containerd, until dropped.
#[derive(Debug)]
pub(super) struct Fed {
    lineage: Arc<Lineage>,
    digest: Digest,
    number: u64,
}

// === impl Lineage ===

impl Lineage {
    /// Our containerd is given the blob by way of these nodes.
    pub(super) fn fed(self: &Arc<Self>, digest: &Digest, chain: Chain) -> Fed {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.given().entry(digest.clone()).or_default().push((number, chain));
        Fed { lineage: Arc::clone(self), digest: digest.clone(), number }
    }

    /// The nodes through which our containerd is being given the blob, by whatever connection.
    pub(super) fn of(&self, digest: &Digest) -> Chain {
        let mut all = Vec::new();
        for node in self.given().get(digest).into_iter().flatten().flat_map(|(_, chain)| &chain.0) {
            if !all.contains(node) {
                all.push(*node);
            }
        }
        Chain(all)
    }

    fn given(&self) -> MutexGuard<'_, HashMap<Digest, Vec<(u64, Chain)>>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        let mut given = self.lineage.given();
        let Some(chains) = given.get_mut(&self.digest) else { return };
        chains.retain(|(number, _)| *number != self.number);
        if chains.is_empty() {
            given.remove(&self.digest);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn digest(n: usize) -> Digest {
        format!("sha256:{n:064x}").parse().unwrap()
    }

    fn chain(names: &[&str]) -> Chain {
        names.iter().rev().fold(Chain::default(), |chain, name| chain.below(NodeId::of(name)).unwrap())
    }

    #[test]
    fn a_chain_is_read_as_it_was_written() {
        for names in [&["a"][..], &["a", "b, c", "ä\r\n"]] {
            let written = chain(names).to_string();
            assert!(written.bytes().all(|byte| byte == b' ' || byte.is_ascii_hexdigit()), "{written}");
            assert_eq!(written.parse(), Ok(chain(names)));
        }
        assert!(chain(&["a", "b"]).contains(NodeId::of("b")));
        assert!(!chain(&["a", "b"]).contains(NodeId::of("c")));
    }

    #[test]
    fn a_chain_is_bounded() {
        let names: Vec<String> = (0..MAX_CHAIN).map(|n| n.to_string()).collect();
        let longest = chain(&names.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(longest.below(NodeId::of("one more")), None);
        assert_eq!(longest.to_string().parse(), Ok(longest.clone()));
        for text in ["", "x", "0123456789abcdef ", &format!("{longest} 0123456789abcdef"), "+123456789abcdef"] {
            assert_eq!(text.parse::<Chain>(), Err(ParseChainError), "{text}");
        }
    }

    #[test]
    fn each_connection_counts_as_long_as_it_lasts() {
        let lineage = Arc::new(Lineage::default());
        let one = lineage.fed(&digest(1), chain(&["a", "b"]));
        let two = lineage.fed(&digest(1), chain(&["c", "b"]));
        let _other = lineage.fed(&digest(2), chain(&["d"]));
        assert_eq!(lineage.of(&digest(1)), chain(&["a", "b", "c"]));
        drop(one);
        assert_eq!(lineage.of(&digest(1)), chain(&["c", "b"]));
        drop(two);
        assert_eq!(lineage.of(&digest(1)), Chain::default());
        assert_eq!(lineage.given().len(), 1);
    }
}
