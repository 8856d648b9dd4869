//! Made images: deterministic from a seed, real enough for containerd to unpack, and streamed to disk so that
//! a layer may be larger than memory.
//!
//! ```no_run
//! use spegel_benches::image::{Compression, ImageBuilder};
//! # fn main() -> anyhow::Result<()> {
//! let scratch = tempfile::tempdir()?;
//! let image = ImageBuilder::new("registry.test/app:1")
//!     .platforms(&["linux/amd64", "linux/arm64"])
//!     .layers(3, 1 << 20, Compression::Gzip, 7)
//!     .build(scratch.path())?;
//! image.write_layout("/var/lib/layout".as_ref())?;
//! # Ok(())
//! # }
//! ```

mod hash;
mod layer;
mod outputs;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

pub use hash::{HashWriter, digest_of, digest_of_file};
pub use layer::Compression;
pub use outputs::remove_from_layout;

/// The media type of an image index.
pub const MEDIA_TYPE_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The media type of a manifest.
pub const MEDIA_TYPE_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The media type of an image's configuration.
pub const MEDIA_TYPE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// The annotation that names an image in a layout's `index.json`.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The platform of an image for which none was asked: the one that a containerd on this machine picks.
pub fn host_platform() -> &'static str {
    if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" }
}

/// What an index, a manifest or a configuration says about a piece of content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// One of the OCI media types.
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// In bytes.
    pub size: u64,
    /// `os/architecture[/variant]` of what only that platform needs; none of an index.
    pub platform: Option<String>,
}

/// Describes an image; [`ImageBuilder::build`] makes it.
#[derive(Clone, Debug)]
pub struct ImageBuilder {
    reference: String,
    layers: Vec<layer::Spec>,
    platforms: Vec<String>,
}

/// A made image: its blobs lie in the folder that it was built in.
#[derive(Clone, Debug)]
pub struct Image {
    reference: String,
    root: Descriptor,
    contents: Vec<Descriptor>,
    folder: PathBuf,
}

// === impl ImageBuilder ===

impl ImageBuilder {
    /// An image without layers, named `registry/repository:tag`.
    pub fn new(reference: impl Into<String>) -> Self {
        Self { reference: reference.into(), layers: Vec::new(), platforms: Vec::new() }
    }

    /// Adds `count` layers with an incompressible file of `size` bytes each; may be called again for layers of another kind.
    ///
    /// The content depends on the seed, the layer's position and the platform, so two images of the same seed and layers share them.
    #[must_use]
    pub fn layers(mut self, count: usize, size: u64, compression: Compression, seed: u64) -> Self {
        self.layers.extend((0..count).map(|_| layer::Spec { size, compression, seed }));
        self
    }

    /// Makes the image an index of one manifest a platform (`os/architecture[/variant]`), each with layers of its own.
    /// Without this call the image is a single manifest for [`host_platform`].
    #[must_use]
    pub fn platforms(mut self, platforms: &[&str]) -> Self {
        self.platforms = platforms.iter().map(ToString::to_string).collect();
        self
    }

    /// Makes the blobs in `folder/blobs/sha256`. Several images may share a folder.
    ///
    /// # Errors
    /// A reference that is not `registry/repository:tag`, a platform that is not `os/architecture[/variant]`, or the disk's.
    pub fn build(&self, folder: &Path) -> Result<Image> {
        Name::parse(&self.reference)?;
        fs::create_dir_all(folder.join("blobs/sha256"))?;
        let mut contents = Vec::new();
        let root = if self.platforms.is_empty() {
            self.build_platform(folder, host_platform(), &mut contents)?
        } else {
            let mut manifests = Vec::new();
            for platform in &self.platforms {
                manifests.push(self.build_platform(folder, platform, &mut contents)?);
            }
            let manifests: Vec<Value> = manifests.iter().map(Descriptor::to_json).collect();
            let index = json!({ "schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": manifests });
            let index = write_json(folder, MEDIA_TYPE_INDEX, None, &index)?;
            contents.push(index.clone());
            index
        };
        Ok(Image { reference: self.reference.clone(), root, contents, folder: folder.to_path_buf() })
    }

    fn build_platform(&self, folder: &Path, platform: &str, contents: &mut Vec<Descriptor>) -> Result<Descriptor> {
        let mut diff_ids = Vec::new();
        let mut layers = Vec::new();
        for (position, spec) in self.layers.iter().enumerate() {
            let made = spec.build(folder, position, platform)?;
            diff_ids.push(made.diff_id);
            layers.push(made.descriptor.to_json());
            contents.push(made.descriptor);
        }
        let mut config = platform_json(platform)?;
        config["created"] = "1970-01-01T00:00:00Z".into();
        config["config"] = json!({ "Cmd": ["/bin/true"] });
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = write_json(folder, MEDIA_TYPE_CONFIG, Some(platform), &config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MEDIA_TYPE_MANIFEST,
            "config": config.to_json(),
            "layers": layers,
        });
        let manifest = write_json(folder, MEDIA_TYPE_MANIFEST, Some(platform), &manifest)?;
        contents.push(config);
        contents.push(manifest.clone());
        Ok(manifest)
    }
}

// === impl Image ===

impl Image {
    /// `registry/repository:tag`.
    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// The registry's host, with its port if it has one: the `ns` of a mirror request.
    pub fn registry(&self) -> &str {
        Name::parse(&self.reference).map(|name| name.registry).unwrap_or_default()
    }

    /// The path between registry and tag.
    pub fn repository(&self) -> &str {
        Name::parse(&self.reference).map(|name| name.repository).unwrap_or_default()
    }

    /// What follows the colon.
    pub fn tag(&self) -> &str {
        Name::parse(&self.reference).map(|name| name.tag).unwrap_or_default()
    }

    /// What the tag stands for: an index, or a single manifest.
    pub fn root(&self) -> &Descriptor {
        &self.root
    }

    /// Every blob, children before the parents that name them.
    pub fn contents(&self) -> &[Descriptor] {
        &self.contents
    }

    /// The blobs that a pull for one platform needs, in the order of [`Image::contents`]: the index, and the platform's own.
    pub fn contents_for(&self, platform: &str) -> impl Iterator<Item = &Descriptor> {
        self.contents.iter().filter(move |c| c.platform.as_deref().is_none_or(|p| p == platform))
    }

    /// The layers of a platform, lowest first.
    pub fn layers_for(&self, platform: &str) -> impl Iterator<Item = &Descriptor> {
        self.contents_for(platform).filter(|c| c.media_type.starts_with(layer::MEDIA_TYPE_PREFIX))
    }

    /// All blobs together, in bytes.
    pub fn size(&self) -> u64 {
        self.contents.iter().map(|content| content.size).sum()
    }

    /// Where a blob lies. The file belongs to the image's folder: copy it rather than change it.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        blob_path(&self.folder, digest)
    }

    /// A blob's bytes; for manifests and configurations.
    ///
    /// # Errors
    /// The disk's.
    pub fn read(&self, digest: &str) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        fs::read(&path).with_context(|| format!("read {}", path.display()))
    }

    /// The same image with one platform's content only, as a node has it that pulled for its own platform: the index still names all.
    ///
    /// # Errors
    /// A platform that the image does not have.
    pub fn only(&self, platform: &str) -> Result<Self> {
        ensure!(
            self.contents.iter().any(|content| content.platform.as_deref() == Some(platform)),
            "the image {} has no content for {platform}",
            self.reference
        );
        Ok(Self { contents: self.contents_for(platform).cloned().collect(), ..self.clone() })
    }

    /// The same content under another name.
    ///
    /// # Errors
    /// A reference that is not `registry/repository:tag`.
    pub fn renamed(&self, reference: impl Into<String>) -> Result<Self> {
        let reference = reference.into();
        Name::parse(&reference)?;
        Ok(Self { reference, ..self.clone() })
    }
}

// === impl Descriptor ===

impl Descriptor {
    /// As an index, a manifest or a layout's `index.json` says it; the platform only where the specification has it.
    pub fn to_json(&self) -> Value {
        let mut value = json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size });
        if self.media_type == MEDIA_TYPE_MANIFEST
            && let Some(platform) = self.platform.as_deref().and_then(|platform| platform_json(platform).ok())
        {
            value["platform"] = platform;
        }
        value
    }
}

/// The parts of `registry/repository:tag`.
struct Name<'a> {
    registry: &'a str,
    repository: &'a str,
    tag: &'a str,
}

impl<'a> Name<'a> {
    fn parse(reference: &'a str) -> Result<Self> {
        let parts = reference.split_once('/').and_then(|(registry, rest)| {
            let (repository, tag) = rest.rsplit_once(':')?;
            Some(Self { registry, repository, tag })
        });
        match parts {
            Some(name) if ![name.registry, name.repository, name.tag].contains(&"") && !name.tag.contains('/') => {
                Ok(name)
            }
            _ => bail!("an image of the tests is named registry/repository:tag, not '{reference}'"),
        }
    }
}

fn platform_json(platform: &str) -> Result<Value> {
    let parts: Vec<&str> = platform.split('/').collect();
    match parts[..] {
        [os, architecture] => Ok(json!({ "os": os, "architecture": architecture })),
        [os, architecture, variant] => Ok(json!({ "os": os, "architecture": architecture, "variant": variant })),
        _ => bail!("a platform is os/architecture[/variant], not '{platform}'"),
    }
}

fn blob_path(folder: &Path, digest: &str) -> PathBuf {
    folder.join("blobs").join(digest.replacen(':', "/", 1))
}

fn write_json(folder: &Path, media_type: &str, platform: Option<&str>, value: &Value) -> Result<Descriptor> {
    let bytes = serde_json::to_vec(value)?;
    let digest = digest_of(&bytes);
    fs::write(blob_path(folder, &digest), &bytes)?;
    Ok(Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size: bytes.len() as u64,
        platform: platform.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn small(folder: &Path, seed: u64) -> Image {
        ImageBuilder::new("registry.test:5000/team/app:1.0")
            .platforms(&["linux/amd64", "linux/arm64/v8"])
            .layers(1, 1000, Compression::None, seed)
            .layers(1, 70_000, Compression::Gzip, seed)
            .layers(1, 200_000, Compression::Zstd, seed)
            .build(folder)
            .unwrap()
    }

    #[test]
    fn same_seed_same_image() {
        let (a, b, c) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(small(a.path(), 1).contents(), small(b.path(), 1).contents());
        assert_ne!(small(a.path(), 1).root().digest, small(c.path(), 2).root().digest);
    }

    #[test]
    fn every_blob_is_what_its_descriptor_says() {
        let dir = tempfile::tempdir().unwrap();
        let image = small(dir.path(), 3);
        // Three layers, a configuration and a manifest for each of two platforms, and the index.
        assert_eq!(image.contents().len(), 11);
        for content in image.contents() {
            let path = image.blob_path(&content.digest);
            assert_eq!(digest_of_file(&path).unwrap(), content.digest);
            assert_eq!(fs::metadata(&path).unwrap().len(), content.size);
        }
    }

    #[test]
    fn diff_ids_are_the_digests_of_the_unpacked_layers() {
        let dir = tempfile::tempdir().unwrap();
        let image = small(dir.path(), 4);
        let config = image.contents_for("linux/amd64").find(|c| c.media_type == MEDIA_TYPE_CONFIG).unwrap();
        let config: Value = serde_json::from_slice(&image.read(&config.digest).unwrap()).unwrap();
        for (layer, diff_id) in image.layers_for("linux/amd64").zip(config["rootfs"]["diff_ids"].as_array().unwrap()) {
            let file = fs::File::open(image.blob_path(&layer.digest)).unwrap();
            let mut plain: Box<dyn std::io::Read> = match layer.media_type.rsplit_once('+') {
                Some((_, "gzip")) => Box::new(flate2::read::GzDecoder::new(file)),
                Some((_, "zstd")) => Box::new(zstd::Decoder::new(file).unwrap()),
                _ => Box::new(file),
            };
            let mut bytes = Vec::new();
            plain.read_to_end(&mut bytes).unwrap();
            assert_eq!(digest_of(&bytes), diff_id.as_str().unwrap());
            assert_eq!(tar::Archive::new(&bytes[..]).entries().unwrap().count(), 1);
        }
    }

    #[test]
    fn names_are_taken_apart() {
        let dir = tempfile::tempdir().unwrap();
        let image = small(dir.path(), 5);
        assert_eq!((image.registry(), image.repository(), image.tag()), ("registry.test:5000", "team/app", "1.0"));
        for bad in ["app", "app:1", "registry.test/app", "registry.test/:1", "registry.test/app:", "/app:1", "r:5/app"]
        {
            assert!(ImageBuilder::new(bad).build(dir.path()).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_platform_keeps_the_index() {
        let dir = tempfile::tempdir().unwrap();
        let image = small(dir.path(), 6);
        let partial = image.only("linux/amd64").unwrap();
        assert_eq!(partial.contents().len(), 6);
        assert_eq!(partial.root(), image.root());
        assert!(image.only("linux/riscv64").is_err());
    }
}
