//! Who is above whom while a blob travels down a chain of nodes that are all still receiving it.
//!
//! A node that took a blob from a node that takes it from the first would wait for itself. Three things keep a child from being its own
//! ancestor:
//! - Each answer for a blob that is being received names the nodes that its bytes come through, and each node remembers who these are for
//!   what its own containerd is being given: it gives the blob to none of them, and takes it from nobody who has it of one that it gives to.
//! - What is looked for is noted before anybody is asked, so that two who ask each other at once know it. Of two who have as much the one
//!   whose [`NodeId`] is smaller is the child.
//! - Who is given a blob by peers, or looks for it, gives it only to those who have less of it. A child never has more than its parent, so
//!   nobody finds more of it below himself, however long ago he was told who is there.
//!
//! What is left is a circle of nodes that all have the same number of bytes, some of which have changed their parents since they said who
//! these are. It stands still, and ends at the stall bound.

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

    /// How many nodes there are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
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

/// How this node stands to others for each blob that it is giving or being given while that still arrives.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    blobs: Mutex<HashMap<Digest, Ties>>,
    next: AtomicU64,
}

/// Of one blob, each under its number.
#[derive(Debug, Default)]
struct Ties {
    /// The chains by way of which our containerd is given it.
    above: Vec<(u64, Chain)>,
    /// The first bytes from which on it is being looked for, for our containerd.
    sought: Vec<(u64, u64)>,
    /// Who is given it by us.
    below: Vec<(u64, NodeId)>,
}

/// What this node has to do with a blob that still arrives: that it looks for it, is given it, or gives it. Until dropped.
#[derive(Debug)]
pub struct Tie {
    lineage: Arc<Lineage>,
    digest: Digest,
    number: u64,
}

/// Who wants a blob that this node is receiving, and how both stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// This node.
    pub own: NodeId,
    /// The node whose containerd gets it, if that is known.
    pub node: Option<NodeId>,
    /// The first byte that it wants.
    pub first: u64,
    /// How many bytes this node has.
    pub position: u64,
}

// === impl Lineage ===

impl Lineage {
    /// The blob is about to be looked for, from its byte `first` on, for our containerd.
    pub(super) fn seek(self: &Arc<Self>, digest: &Digest, first: u64) -> Tie {
        self.tie(&mut self.blobs(), digest, |ties, number| ties.sought.push((number, first)))
    }

    /// Our containerd is given the blob by way of these nodes; none if one of them is given it by us.
    pub(super) fn adopt(self: &Arc<Self>, digest: &Digest, chain: Chain) -> Option<Tie> {
        let mut blobs = self.blobs();
        let below = blobs.get(digest).map(|ties| &*ties.below).unwrap_or_default();
        if below.iter().any(|(_, child)| chain.contains(*child)) {
            return None;
        }
        Some(self.tie(&mut blobs, digest, |ties, number| ties.above.push((number, chain))))
    }

    /// Takes the asker as one who is given the blob by us, and says by way of which nodes it gets it; none if we may be waiting for it, or
    /// come to.
    pub(super) fn admit(self: &Arc<Self>, digest: &Digest, asker: Asker) -> Option<(Chain, Option<Tie>)> {
        let mut blobs = self.blobs();
        let empty = Ties::default();
        let ties = blobs.get(digest).unwrap_or(&empty);
        let chain = ties.chain().below(asker.own)?;
        if asker.node.is_some_and(|node| chain.contains(node)) || !ties.may_give_to(asker) {
            return None;
        }
        let tie = asker.node.map(|node| self.tie(&mut blobs, digest, |ties, number| ties.below.push((number, node))));
        Some((chain, tie))
    }

    /// The nodes through which our containerd is being given the blob, by whatever connection.
    pub(super) fn of(&self, digest: &Digest) -> Chain {
        self.blobs().get(digest).map(Ties::chain).unwrap_or_default()
    }

    fn tie(
        self: &Arc<Self>,
        blobs: &mut HashMap<Digest, Ties>,
        digest: &Digest,
        add: impl FnOnce(&mut Ties, u64),
    ) -> Tie {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        add(blobs.entry(digest.clone()).or_default(), number);
        Tie { lineage: Arc::clone(self), digest: digest.clone(), number }
    }

    fn blobs(&self) -> MutexGuard<'_, HashMap<Digest, Ties>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ties {
    fn chain(&self) -> Chain {
        let mut all = Vec::new();
        for node in self.above.iter().flat_map(|(_, chain)| &chain.0) {
            if !all.contains(node) {
                all.push(*node);
            }
        }
        Chain(all)
    }

    /// Whether the asker has less than we do, or as much and the smaller name. Where no peer gives it to us or is asked for it, it comes from
    /// upstream, and anybody may wait for it.
    fn may_give_to(&self, asker: Asker) -> bool {
        if self.above.is_empty() && self.sought.is_empty() {
            return true;
        }
        // What it asks for again it does not have, whatever its file looks like.
        let has = self.sought.iter().map(|(_, first)| *first).fold(asker.position, u64::min);
        asker.first < has || (asker.first == has && asker.node.is_some_and(|node| node < asker.own))
    }
}

impl Drop for Tie {
    fn drop(&mut self) {
        let mut blobs = self.lineage.blobs();
        let Some(ties) = blobs.get_mut(&self.digest) else { return };
        ties.above.retain(|(number, _)| *number != self.number);
        ties.sought.retain(|(number, _)| *number != self.number);
        ties.below.retain(|(number, _)| *number != self.number);
        if ties.above.is_empty() && ties.sought.is_empty() && ties.below.is_empty() {
            blobs.remove(&self.digest);
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
        let one = lineage.adopt(&digest(1), chain(&["a", "b"]));
        let two = lineage.adopt(&digest(1), chain(&["c", "b"]));
        let _other = lineage.adopt(&digest(2), chain(&["d"]));
        assert_eq!(lineage.of(&digest(1)), chain(&["a", "b", "c"]));
        drop(one);
        assert_eq!(lineage.of(&digest(1)), chain(&["c", "b"]));
        drop(two);
        assert_eq!(lineage.of(&digest(1)), Chain::default());
        assert_eq!(lineage.blobs().len(), 1);
    }

    fn asker(own: u64, node: u64, first: u64, position: u64) -> Asker {
        Asker { own: NodeId(own), node: Some(NodeId(node)), first, position }
    }

    #[test]
    fn who_gets_it_from_upstream_gives_it_to_all() {
        let lineage = Arc::new(Lineage::default());
        for asker in
            [asker(1, 2, 0, 5), asker(1, 2, 9, 5), asker(2, 1, 5, 5), Asker { node: None, ..asker(1, 0, 9, 5) }]
        {
            assert!(lineage.admit(&digest(1), asker).is_some(), "{asker:?}");
        }
        assert_eq!(lineage.blobs().len(), 0, "nobody is given it any more");
    }

    #[test]
    fn who_looks_for_it_or_is_given_it_gives_it_to_those_who_have_less() {
        let lineage = Arc::new(Lineage::default());
        let ties = [lineage.seek(&digest(1), 7), lineage.adopt(&digest(1), Chain(vec![NodeId(9)])).unwrap()];
        for tie in ties {
            let admits = |asker| lineage.admit(&digest(1), asker).is_some();
            assert!(admits(asker(1, 2, 4, 5)) && !admits(asker(1, 2, 6, 5)));
            assert!(admits(asker(2, 1, 5, 5)) && !admits(asker(1, 2, 5, 5)), "of two who have as much, one");
            assert!(!admits(Asker { node: None, ..asker(2, 1, 5, 5) }));
            drop(tie);
        }
        let _anew = lineage.seek(&digest(1), 0);
        assert!(lineage.admit(&digest(1), asker(1, 2, 0, 5)).is_none(), "its own file starts over");
    }

    #[test]
    fn nobody_takes_it_from_those_that_he_gives_it_to() {
        let lineage = Arc::new(Lineage::default());
        let (_, tie) = lineage.admit(&digest(1), asker(1, 2, 0, 5)).unwrap();
        assert!(lineage.adopt(&digest(1), Chain(vec![NodeId(3), NodeId(2)])).is_none());
        assert!(lineage.adopt(&digest(2), Chain(vec![NodeId(3), NodeId(2)])).is_some());
        drop(tie);
        assert!(lineage.adopt(&digest(1), Chain(vec![NodeId(3), NodeId(2)])).is_some());
    }

    // === every order of events ===

    /// Nodes that lost their parent at the same time, each of which then asks one of the others.
    #[derive(Clone, Debug)]
    struct Ring {
        nodes: Vec<Seeker>,
    }

    #[derive(Clone, Debug)]
    struct Seeker {
        has: u64,
        asks: usize,
        state: Step,
    }

    #[derive(Clone, Debug, PartialEq)]
    enum Step {
        Seeks,
        /// It was given this chain, and has not heard of it.
        Answered(Option<Chain>),
        Fed,
        Alone,
    }

    /// What a node knows, made anew from the steps so far, since [`Lineage`] is not to be copied.
    fn replay(ring: &Ring, order: &[usize]) -> Ring {
        let mut ring = ring.clone();
        let lineages: Vec<Arc<Lineage>> = ring.nodes.iter().map(|_| Arc::default()).collect();
        let mut sought: Vec<Option<Tie>> = ring
            .nodes
            .iter()
            .zip(&lineages)
            .map(|(node, lineage)| (node.state == Step::Seeks).then(|| lineage.seek(&digest(1), node.has)))
            .collect();
        let mut kept = Vec::new();
        for &n in order {
            let parent = ring.nodes[n].asks;
            ring.nodes[n].state = match ring.nodes[n].state.clone() {
                Step::Seeks => {
                    let asker = Asker {
                        own: NodeId(parent as u64),
                        node: Some(NodeId(n as u64)),
                        first: ring.nodes[n].has,
                        position: ring.nodes[parent].has,
                    };
                    let admitted = lineages[parent].admit(&digest(1), asker);
                    let (chain, tie) = admitted.unzip();
                    kept.push(tie.flatten());
                    Step::Answered(chain)
                }
                Step::Answered(chain) => {
                    let tie = chain
                        .filter(|chain| !chain.contains(NodeId(n as u64)))
                        .and_then(|chain| lineages[n].adopt(&digest(1), chain));
                    sought[n] = None;
                    let is_fed = tie.is_some();
                    kept.push(tie);
                    if is_fed { Step::Fed } else { Step::Alone }
                }
                over => over,
            };
        }
        ring
    }

    /// Whether somebody is fed by way of himself.
    fn has_circle(ring: &Ring) -> bool {
        (0..ring.nodes.len()).any(|start| {
            let mut at = start;
            for _ in 0..ring.nodes.len() {
                if ring.nodes[at].state != Step::Fed {
                    return false;
                }
                at = ring.nodes[at].asks;
                if at == start {
                    return true;
                }
            }
            false
        })
    }

    fn orders(steps: &[usize], so_far: &mut Vec<usize>, visit: &mut impl FnMut(&[usize])) {
        if steps.iter().all(|left| *left == 0) {
            return visit(so_far);
        }
        for n in 0..steps.len() {
            if steps[n] > 0 {
                let mut left = steps.to_vec();
                left[n] -= 1;
                so_far.push(n);
                orders(&left, so_far, visit);
                so_far.pop();
            }
        }
    }

    /// Two and three nodes that ask each other, in every order of asking and hearing, whoever has how much.
    #[test]
    fn in_no_order_of_events_is_a_child_its_own_ancestor() {
        let mut fed = 0;
        for count in [2usize, 3] {
            for ways in 0..count.pow(count as u32) {
                let asks: Vec<usize> = (0..count).map(|n| ways / count.pow(n as u32) % count).collect();
                if asks.iter().enumerate().any(|(n, parent)| n == *parent) {
                    continue;
                }
                for amounts in 0..2usize.pow(count as u32) {
                    let seeker =
                        |n: usize| Seeker { has: 5 + (amounts >> n & 1) as u64, asks: asks[n], state: Step::Seeks };
                    let ring = Ring { nodes: (0..count).map(seeker).collect() };
                    orders(&vec![2; count], &mut Vec::new(), &mut |order| {
                        let end = replay(&ring, order);
                        assert!(!has_circle(&end), "{ring:?} {order:?} {end:?}");
                        fed += end.nodes.iter().filter(|node| node.state == Step::Fed).count();
                    });
                }
            }
        }
        assert!(fed > 1000, "most are fed by somebody: {fed}");
    }
}
