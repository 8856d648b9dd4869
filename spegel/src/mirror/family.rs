//! What a manifest tells of the content beneath it: how long each piece is.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use crate::oci::{Digest, Manifest};

/// How many pieces of content are remembered.
const CAPACITY: usize = 32 * 1024;

/// The most children that are remembered of one manifest.
const CHILDREN: usize = 1024;

/// How many lengths are remembered of one piece of content. Where more are told, none is believed.
const LENGTHS: usize = 4;

/// The lengths of content, in bytes, as manifests tell them. Each was verified against its own digest only: somebody's may be wrong, so
/// content may have any of the lengths that were told.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_digest: HashMap<Digest, Vec<u64>>,
    order: VecDeque<Digest>,
}

/// The content that a manifest names, each with its length in bytes.
pub(super) fn children(manifest: &[u8]) -> Vec<(Digest, u64)> {
    let Ok(manifest) = Manifest::parse(manifest) else { return Vec::new() };
    manifest.children.into_iter().map(|child| (child.digest, child.size)).take(CHILDREN).collect()
}

// === impl Sizes ===

impl Sizes {
    pub(super) fn learn(&self, children: &[(Digest, u64)]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (digest, size) in children {
            match state.by_digest.get_mut(digest) {
                Some(told) if told.contains(size) || told.len() >= LENGTHS => {}
                Some(told) => told.push(*size),
                None => {
                    state.by_digest.insert(digest.clone(), vec![*size]);
                    state.order.push_back(digest.clone());
                }
            }
        }
        while state.by_digest.len() > CAPACITY {
            let Some(oldest) = state.order.pop_front() else { break };
            state.by_digest.remove(&oldest);
        }
    }

    /// How long a blob is, if manifests have told, and all the same.
    pub(super) fn of(&self, digest: &Digest) -> Option<u64> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.by_digest.get(digest).filter(|told| told.len() == 1).map(|told| told[0])
    }

    /// Whether a blob may have this length in all.
    pub(super) fn allow(&self, digest: &Digest, length: u64) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.by_digest.get(digest).is_none_or(|told| told.len() >= LENGTHS || told.contains(&length))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn digest(n: usize) -> Digest {
        format!("sha256:{n:064x}").parse().unwrap()
    }

    #[test]
    fn a_manifest_tells_the_lengths_of_what_it_names() {
        let (config, layer) = (digest(1), digest(2));
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":7}},
                "layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{layer}","size":9}}]}}"#
        );
        let children = children(manifest.as_bytes());
        assert_eq!(children, [(config.clone(), 7), (layer.clone(), 9)]);
        let sizes = Sizes::default();
        assert!(sizes.allow(&layer, 1), "nothing is known yet");
        sizes.learn(&children);
        assert!(sizes.allow(&layer, 9) && !sizes.allow(&layer, 10) && sizes.allow(&config, 7));
    }

    #[test]
    fn one_wrong_manifest_does_not_hide_what_another_tells() {
        let (sizes, layer) = (Sizes::default(), digest(1));
        for size in [9, 12_345] {
            sizes.learn(&[(layer.clone(), size)]);
        }
        assert!(sizes.allow(&layer, 9) && sizes.allow(&layer, 12_345) && !sizes.allow(&layer, 10));
        for size in 0..LENGTHS as u64 {
            sizes.learn(&[(layer.clone(), size)]);
        }
        assert!(sizes.allow(&layer, 9) && sizes.allow(&layer, 77), "too many are told for any to be believed");
    }

    #[test]
    fn memory_is_bounded() {
        let sizes = Sizes::default();
        for n in 0..2 * CAPACITY {
            sizes.learn(&[(digest(n), 1)]);
        }
        let state = sizes.state.lock().unwrap();
        assert_eq!((state.by_digest.len(), state.order.len()), (CAPACITY, CAPACITY));
    }
}
