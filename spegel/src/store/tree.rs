//! What an image consists of, as far as it is here: the walk from its top digest through index and manifests to config and layers.

use std::collections::HashMap;

use super::Referrer;
use crate::oci::{Descriptor, Digest, Manifest};

/// How deep indexes may nest. Images have two levels, some artifacts three; the rest is a loop or an attack.
const MAX_DEPTH: usize = 8;

/// How much one image may name. The largest published images have a few hundred.
const MAX_NODES: usize = 16_384;

/// The layers of a build attestation. A manifest of such layers is not something that can be run on any platform.
const ATTESTATION_LAYER: &str = "application/vnd.in-toto+json";

/// Content that may be here.
pub(super) trait Contents {
    /// Its length in bytes, if it is here, ours and whole. `expected` is what an image says of its length, which is the
    /// image's claim only: where content is known to be what its digest says, it does not count.
    fn size(&self, digest: &Digest, expected: Option<u64>) -> Option<u64>;

    /// A manifest's bytes, if it is here, ours, and no larger than [`crate::oci::MAX_MANIFEST_BYTES`].
    fn manifest(&self, digest: &Digest) -> Option<Vec<u8>>;
}

/// One piece of an image.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) digest: Digest,
    /// Its length in bytes as found by the walk; nothing if it was absent.
    pub(super) size: Option<u64>,
    /// How long it has to be, where something says so.
    pub(super) expected_size: Option<u64>,
    /// What it names, as positions in [`Tree::nodes`].
    children: Vec<u32>,
    kind: Kind,
    /// The subject of a manifest that has one, and how the referrers API describes the manifest.
    pub(super) referrer: Option<Box<(Digest, Referrer)>>,
}

/// What a node is for the question whether an image is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Index,
    Manifest,
    /// A manifest that no platform runs.
    Attestation,
    /// In a manifest's place, but absent, unreadable or too deep: nothing is known of what is beneath.
    Unread,
    /// A config or a layer.
    Blob,
    /// A layer that registries do not distribute; nodes get it elsewhere.
    Foreign,
}

/// An image as one walk found it.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// The first is the top.
    nodes: Vec<Node>,
}

struct Walk<'a, C> {
    contents: &'a C,
    nodes: Vec<Node>,
    seen: HashMap<Digest, u32>,
    /// The nodes between the top and where the walk is. Nothing may name these again: bytes that are not checked against
    /// their digest can form a loop.
    ancestors: Vec<u32>,
}

// === impl Tree ===

impl Tree {
    /// Walks what is here of the image whose top digest is `top`. Reads files: not for a thread that serves.
    pub(super) fn walk(top: &Digest, expected_size: Option<u64>, contents: &impl Contents) -> Self {
        let mut walk = Walk { contents, nodes: Vec::new(), seen: HashMap::new(), ancestors: Vec::new() };
        walk.manifest(top, expected_size, 0);
        walk.nodes.shrink_to_fit();
        Self { nodes: walk.nodes }
    }

    pub(super) fn top(&self) -> &Digest {
        &self.nodes[0].digest
    }

    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether the top is here and everything beneath it, for one platform at least: whether a node that asks for the
    /// image can have all of it.
    pub(super) fn is_whole(&self, is_present: impl Fn(&Digest) -> bool) -> bool {
        let mut known = vec![None; self.nodes.len()];
        self.is_whole_from(0, &is_present, &mut known)
    }

    /// `known` keeps this linear where many indexes name the same children.
    fn is_whole_from(&self, at: u32, is_present: &impl Fn(&Digest) -> bool, known: &mut [Option<bool>]) -> bool {
        if let Some(known) = known[at as usize] {
            return known;
        }
        let node = &self.nodes[at as usize];
        let mut children = node.children.iter();
        let is_whole = match node.kind {
            Kind::Foreign => true,
            Kind::Unread => false,
            _ if !is_present(&node.digest) => false,
            Kind::Blob => true,
            Kind::Manifest | Kind::Attestation => children.all(|&child| self.is_whole_from(child, is_present, known)),
            Kind::Index => children.any(|&child| {
                self.nodes[child as usize].kind != Kind::Attestation && self.is_whole_from(child, is_present, known)
            }),
        };
        known[at as usize] = Some(is_whole);
        is_whole
    }

    /// Whether something that this walk did not find is here now, so that another walk would go deeper.
    pub(super) fn is_outdated(&self, is_present: impl Fn(&Digest) -> bool) -> bool {
        self.nodes.iter().any(|node| node.size.is_none() && is_present(&node.digest))
    }

    /// Whether the image names this digest, here or not.
    pub(super) fn names(&self, digest: &Digest) -> bool {
        self.nodes.iter().any(|node| node.digest == *digest)
    }
}

// === impl Walk ===

impl<C: Contents> Walk<'_, C> {
    fn add(&mut self, digest: &Digest, expected_size: Option<u64>, kind: Kind) -> u32 {
        let at = self.nodes.len() as u32;
        let size = self.contents.size(digest, expected_size);
        let children = Vec::new();
        self.seen.insert(digest.clone(), at);
        self.nodes.push(Node { digest: digest.clone(), size, expected_size, children, kind, referrer: None });
        at
    }

    fn manifest(&mut self, digest: &Digest, expected_size: Option<u64>, depth: usize) -> Option<u32> {
        if let Some(&at) = self.seen.get(digest) {
            return self.unless_loop(at);
        }
        if self.nodes.len() >= MAX_NODES {
            return None;
        }
        let at = self.add(digest, expected_size, Kind::Unread);
        let size = self.nodes[at as usize].size?;
        if depth >= MAX_DEPTH {
            return Some(at);
        }
        let Some(bytes) = self.contents.manifest(digest) else { return Some(at) };
        let Ok(manifest) = Manifest::parse(&bytes) else { return Some(at) };
        drop(bytes);
        self.ancestors.push(at);
        let children: Vec<u32> = manifest
            .children
            .iter()
            .filter_map(|child| match manifest.is_index {
                true => self.manifest(&child.digest, Some(child.size), depth + 1),
                false => self.blob(child),
            })
            .collect();
        self.ancestors.pop();
        let node = &mut self.nodes[at as usize];
        node.kind = kind_of(&manifest);
        node.children = children;
        node.referrer = referrer(digest, size, manifest).map(Box::new);
        Some(at)
    }

    fn unless_loop(&self, at: u32) -> Option<u32> {
        (!self.ancestors.contains(&at)).then_some(at)
    }

    fn blob(&mut self, blob: &Descriptor) -> Option<u32> {
        if let Some(&at) = self.seen.get(&blob.digest) {
            return self.unless_loop(at);
        }
        // Names of OCI (`nondistributable`) and Docker (`foreign`).
        let is_foreign = [".nondistributable.", ".foreign."].iter().any(|part| blob.media_type.contains(part));
        let kind = if is_foreign { Kind::Foreign } else { Kind::Blob };
        (self.nodes.len() < MAX_NODES).then(|| self.add(&blob.digest, Some(blob.size), kind))
    }
}

fn kind_of(manifest: &Manifest) -> Kind {
    let is_attestation = |blobs: &[Descriptor]| {
        // The config comes first.
        blobs.len() > 1 && blobs[1..].iter().all(|layer| layer.media_type == ATTESTATION_LAYER)
    };
    match manifest.is_index {
        true => Kind::Index,
        false if is_attestation(&manifest.children) => Kind::Attestation,
        false => Kind::Manifest,
    }
}

fn referrer(digest: &Digest, size: u64, manifest: Manifest) -> Option<(Digest, Referrer)> {
    let subject = manifest.subject?;
    let referrer = Referrer {
        media_type: manifest.media_type.to_string(),
        digest: digest.to_string(),
        size,
        artifact_type: manifest.artifact_type,
        annotations: manifest.annotations,
    };
    Some((subject, referrer))
}
