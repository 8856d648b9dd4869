//! What the `ref` of an ingest says: whose it is and what is received.

use crate::oci::Digest;

/// What sort of content an ingest is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A manifest or index: small, and of use only as a whole.
    Manifest,
    /// A config, a layer, or something else.
    Blob,
}

/// A `ref` of our namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    pub(super) kind: Kind,
    pub(super) digest: Digest,
}

impl Reference {
    /// Reads a `ref` as containerd's metadata store makes it of a pull's own: `<namespace>/<counter>/<kind>-<digest>`. Nothing for
    /// other namespaces, and for what is no pull.
    pub(super) fn parse(text: &str, namespace: &str) -> Option<Self> {
        let (counter, own) = text.strip_prefix(namespace)?.strip_prefix('/')?.split_once('/')?;
        if counter.is_empty() || !counter.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let (kind, digest) = own.split_once('-')?;
        let kind = if matches!(kind, "manifest" | "index") { Kind::Manifest } else { Kind::Blob };
        Some(Self { kind, digest: digest.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn the_references_of_pulls_in_our_namespace_are_read() {
        for (kind, expected) in
            [("layer", Kind::Blob), ("config", Kind::Blob), ("manifest", Kind::Manifest), ("index", Kind::Manifest)]
        {
            let read = Reference::parse(&format!("k8s.io/17/{kind}-{DIGEST}"), "k8s.io").unwrap();
            assert_eq!((read.kind, read.digest.as_str()), (expected, DIGEST));
        }
    }

    #[test]
    fn others_are_not() {
        for text in [
            format!("other/1/layer-{DIGEST}"),
            format!("k8s.io.evil/1/layer-{DIGEST}"),
            format!("k8s.io/1/{DIGEST}"),
            format!("k8s.io/x/layer-{DIGEST}"),
            format!("k8s.io//layer-{DIGEST}"),
            format!("k8s.io/layer-{DIGEST}"),
            format!("k8s.io/1/layer-{DIGEST}0"),
            "k8s.io/1/layer-sha256:../../x".to_owned(),
            "k8s.io/1/import-123".to_owned(),
            String::new(),
        ] {
            assert_eq!(Reference::parse(&text, "k8s.io"), None, "{text}");
        }
    }
}
