//! Manifests and indexes: what kind a document is, and what it names.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use super::{Digest, ParseDigestError};

/// The largest manifest that is read, in bytes. Registries refuse larger ones, as the distribution specification lets
/// them from 4 MiB on.
pub const MAX_MANIFEST_BYTES: usize = 4 * 1024 * 1024;

/// The type of a document or blob, fit for a `Content-Type` header.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MediaType(Cow<'static, str>);

/// What one document says of another, or of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its type, as written: not checked, and possibly empty.
    pub media_type: String,
}

/// What a manifest or index names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Its own type.
    pub media_type: MediaType,
    /// Whether its children are manifests; else they are a config and layers.
    pub is_index: bool,
    /// The manifest that it refers to.
    pub subject: Option<Digest>,
    /// Its `artifactType`, or its config's media type, as the referrers API reports it.
    pub artifact_type: Option<String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// The manifests of an index; the config, then the layers of a manifest.
    pub children: Vec<Descriptor>,
}

/// Why a document is no manifest that can be served. The fault is the document's.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// More than [`MAX_MANIFEST_BYTES`].
    #[error("the manifest has {0} bytes, more than the {MAX_MANIFEST_BYTES} that are read")]
    TooLarge(usize),
    /// Not JSON, or not of the right form.
    #[error("the manifest is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Neither `manifests`, nor `config` with `layers`.
    #[error("the document has the shape neither of a manifest nor of an index")]
    UnknownShape,
    /// Both, or not what its `mediaType` says. Two readers could understand it differently.
    #[error("the document is a manifest and an index at once")]
    Ambiguous,
    /// A `mediaType` that is no media type.
    #[error("the manifest's mediaType {0:?} is not valid")]
    MediaType(String),
    /// A digest that does not parse, for example of an algorithm that is not known.
    #[error("the manifest names the digest {digest:?}: {source}")]
    Digest {
        /// As written, cut to a length fit for a log.
        digest: String,
        /// What is wrong with it.
        source: ParseDigestError,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    media_type: Option<String>,
    artifact_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
    subject: Option<RawDescriptor>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: Option<String>,
    digest: String,
    size: u64,
}

/// How much of a malformed text an error repeats, in characters.
const ERROR_TEXT_LEN: usize = 160;

fn shorten(text: &str) -> String {
    text.chars().take(ERROR_TEXT_LEN).collect()
}

// === impl MediaType ===

impl MediaType {
    /// An index of the OCI image specification.
    pub const OCI_INDEX: Self = Self(Cow::Borrowed("application/vnd.oci.image.index.v1+json"));
    /// A manifest of the OCI image specification.
    pub const OCI_MANIFEST: Self = Self(Cow::Borrowed("application/vnd.oci.image.manifest.v1+json"));
    /// A config of the OCI image specification.
    pub const OCI_CONFIG: Self = Self(Cow::Borrowed("application/vnd.oci.image.config.v1+json"));
    /// Docker's index, the manifest list.
    pub const DOCKER_INDEX: Self = Self(Cow::Borrowed("application/vnd.docker.distribution.manifest.list.v2+json"));
    /// Docker's manifest, second version.
    pub const DOCKER_MANIFEST: Self = Self(Cow::Borrowed("application/vnd.docker.distribution.manifest.v2+json"));
    /// Docker's config.
    pub const DOCKER_CONFIG: Self = Self(Cow::Borrowed("application/vnd.docker.container.image.v1+json"));
    /// Any bytes: what a blob is answered with.
    pub const OCTET_STREAM: Self = Self(Cow::Borrowed("application/octet-stream"));

    /// A media type of the form `type/subtype` of [RFC 6838, section 4.2](https://www.rfc-editor.org/rfc/rfc6838#section-4.2).
    pub fn new(text: &str) -> Option<Self> {
        let is_name = |name: &str| {
            name.len() <= 127
                && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&b))
        };
        let (kind, subtype) = text.split_once('/')?;
        (is_name(kind) && is_name(subtype)).then(|| Self(Cow::Owned(text.to_owned())))
    }

    /// The type of a manifest: its own `mediaType`, else told from its shape.
    ///
    /// # Errors
    /// [`ManifestError`] for what is no manifest, or is larger than [`MAX_MANIFEST_BYTES`].
    pub fn detect(manifest: &[u8]) -> Result<Self, ManifestError> {
        RawManifest::parse(manifest)?.kind().map(|(media_type, _)| media_type)
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is an index of OCI or Docker.
    pub fn is_index(&self) -> bool {
        *self == Self::OCI_INDEX || *self == Self::DOCKER_INDEX
    }

    /// Whether it is a manifest of OCI or Docker, not an index.
    pub fn is_manifest(&self) -> bool {
        *self == Self::OCI_MANIFEST || *self == Self::DOCKER_MANIFEST
    }
}

impl fmt::Display for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Manifest ===

impl Manifest {
    /// Reads a manifest or index of OCI or Docker. What it names may well not be there.
    ///
    /// # Errors
    /// [`ManifestError`]; whatever the bytes are, memory stays within a small multiple of [`MAX_MANIFEST_BYTES`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let raw = RawManifest::parse(bytes)?;
        let (media_type, is_index) = raw.kind()?;
        let config_type = raw.config.as_ref().and_then(|config| config.media_type.clone());
        let artifact_type = raw.artifact_type.or(config_type).filter(|text| !text.is_empty());
        let children = raw.config.into_iter().chain(raw.layers.into_iter().flatten());
        let children = children.chain(raw.manifests.into_iter().flatten());
        Ok(Self {
            media_type,
            is_index,
            subject: raw.subject.map(RawDescriptor::into_descriptor).transpose()?.map(|subject| subject.digest),
            artifact_type,
            annotations: raw.annotations.unwrap_or_default(),
            children: children.map(RawDescriptor::into_descriptor).collect::<Result<_, _>>()?,
        })
    }
}

impl RawManifest {
    fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge(bytes.len()));
        }
        let mut raw: Self = serde_json::from_slice(bytes)?;
        // Go writes empty texts where it means none.
        raw.artifact_type = raw.artifact_type.filter(|text| !text.is_empty());
        raw.media_type = raw.media_type.filter(|text| !text.is_empty());
        Ok(raw)
    }

    /// Its media type, and whether it is an index.
    fn kind(&self) -> Result<(MediaType, bool), ManifestError> {
        let is_index = match (&self.manifests, &self.config, &self.layers) {
            (Some(_), None, None) => true,
            (None, Some(_), Some(_)) => false,
            (Some(_), _, _) => return Err(ManifestError::Ambiguous),
            (None, _, _) => return Err(ManifestError::UnknownShape),
        };
        let Some(own) = &self.media_type else {
            return Ok((if is_index { MediaType::OCI_INDEX } else { MediaType::OCI_MANIFEST }, is_index));
        };
        let own = MediaType::new(own).ok_or_else(|| ManifestError::MediaType(shorten(own)))?;
        if (own.is_index() && !is_index) || (own.is_manifest() && is_index) {
            return Err(ManifestError::Ambiguous);
        }
        Ok((own, is_index))
    }
}

impl RawDescriptor {
    fn into_descriptor(self) -> Result<Descriptor, ManifestError> {
        let digest =
            self.digest.parse().map_err(|source| ManifestError::Digest { digest: shorten(&self.digest), source })?;
        Ok(Descriptor { digest, size: self.size, media_type: self.media_type.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn descriptor(digit: char) -> String {
        format!(r#"{{"mediaType":"a/b","digest":"sha256:{}","size":7}}"#, String::from(digit).repeat(64))
    }

    #[test]
    fn manifest_names_config_and_layers() {
        let (config, layer, subject) = (descriptor('c'), descriptor('1'), descriptor('5'));
        let text = format!(
            r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}],"subject":{subject},"annotations":{{"k":"v"}}}}"#
        );
        let manifest = Manifest::parse(text.as_bytes()).unwrap();
        assert_eq!(manifest.media_type, MediaType::OCI_MANIFEST);
        assert!(!manifest.is_index);
        assert_eq!(manifest.artifact_type.as_deref(), Some("a/b"), "the config's");
        assert_eq!(manifest.subject.unwrap().hex(), "5".repeat(64));
        assert_eq!(manifest.annotations["k"], "v");
        let children: Vec<_> = manifest.children.iter().map(|c| (&c.digest.hex()[..1], c.size)).collect();
        assert_eq!(children, [("c", 7), ("1", 7)]);
    }

    #[test]
    fn own_media_type_wins() {
        let index = format!(r#"{{"mediaType":"{}","manifests":[{}]}}"#, MediaType::DOCKER_INDEX, descriptor('1'));
        assert_eq!(MediaType::detect(index.as_bytes()).unwrap(), MediaType::DOCKER_INDEX);
        let other = br#"{"mediaType":"application/x.own+json","manifests":[]}"#;
        assert_eq!(MediaType::detect(other).unwrap().as_str(), "application/x.own+json");
        assert_eq!(MediaType::detect(br#"{"mediaType":"","manifests":[]}"#).unwrap(), MediaType::OCI_INDEX);
    }

    #[test]
    fn refused() {
        let error = |text: &str| Manifest::parse(text.as_bytes()).unwrap_err();
        assert!(matches!(error("{}"), ManifestError::UnknownShape));
        assert!(matches!(error("[1]"), ManifestError::Malformed(_)));
        assert!(matches!(error(r#"{"manifests":[],"layers":[]}"#), ManifestError::Ambiguous));
        let lie = format!(r#"{{"mediaType":"{}","manifests":[]}}"#, MediaType::OCI_MANIFEST);
        assert!(matches!(error(&lie), ManifestError::Ambiguous));
        assert!(matches!(error(r#"{"mediaType":"a/b\r\nX: y","manifests":[]}"#), ManifestError::MediaType(_)));
        let negative = descriptor('1').replace(":7", ":-7");
        assert!(matches!(error(&format!(r#"{{"manifests":[{negative}]}}"#)), ManifestError::Malformed(_)));
        let unknown = error(r#"{"manifests":[{"digest":"blake3:abc","size":1}]}"#);
        assert!(unknown.to_string().contains("blake3:abc"), "{unknown}");
        assert!(matches!(error(&"[".repeat(100_000)), ManifestError::Malformed(_)));
        assert!(matches!(error(&" ".repeat(MAX_MANIFEST_BYTES + 1)), ManifestError::TooLarge(_)));
    }
}
