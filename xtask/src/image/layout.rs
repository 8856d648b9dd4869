//! An OCI image layout in the making, and its archive.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use spegel_benches::image::{
    MEDIA_TYPE_CONFIG, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, REF_NAME, digest_of, digest_of_file,
};

/// The media type of the layer.
const MEDIA_TYPE_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The name by which containerd's importer calls an image, before it looks at [`REF_NAME`].
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// What stands in every image, so that it is found again from the image alone.
fn labels() -> Value {
    json!({
        "org.opencontainers.image.description": "A stateless, cluster-local OCI image mirror",
        "org.opencontainers.image.licenses": "MIT",
        "org.opencontainers.image.source": "https://github.com/spegel-org/spegel",
        "org.opencontainers.image.title": "spegel",
        "org.opencontainers.image.version": concat!("v", env!("CARGO_PKG_VERSION")),
    })
}

/// Blobs in a folder, and the manifests among them.
pub(super) struct Layout {
    blobs: PathBuf,
    manifests: Vec<Value>,
}

// === impl Layout ===

impl Layout {
    /// An empty one.
    pub(super) fn new(folder: &Path) -> Result<Self> {
        let blobs = folder.join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        Ok(Self { blobs, manifests: Vec::new() })
    }

    /// Adds an image of one layer that `write` writes, returning the digest of its uncompressed form.
    pub(super) fn add_manifest(
        &mut self,
        architecture: &str,
        write: impl FnOnce(File) -> Result<String>,
    ) -> Result<()> {
        let partial = self.blobs.join("layer");
        let diff_id = write(File::create(&partial)?)?;
        let layer = digest_of_file(&partial)?;
        let size = fs::metadata(&partial)?.len();
        fs::rename(&partial, self.path(&layer))?;
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            // No time, so that the same input is the same image.
            "created": "1970-01-01T00:00:00Z",
            "config": { "Entrypoint": ["/spegel"], "WorkingDir": "/", "Labels": labels() },
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": [{ "created": "1970-01-01T00:00:00Z", "created_by": "cargo xtask image" }],
        });
        let config = self.put(MEDIA_TYPE_CONFIG, &config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MEDIA_TYPE_MANIFEST,
            "config": config,
            "layers": [{ "mediaType": MEDIA_TYPE_LAYER, "digest": layer, "size": size }],
            "annotations": labels(),
        });
        let mut manifest = self.put(MEDIA_TYPE_MANIFEST, &manifest)?;
        manifest["platform"] = json!({ "architecture": architecture, "os": "linux" });
        self.manifests.push(manifest);
        Ok(())
    }

    /// Writes the archive and returns the image's digest.
    pub(super) fn write_archive(mut self, name: &str, file: &Path) -> Result<String> {
        let mut root = match &self.manifests[..] {
            [] => bail!("there is no image"),
            [one] => one.clone(),
            several => {
                let index = json!({ "schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": several });
                self.put(MEDIA_TYPE_INDEX, &index)?
            }
        };
        root["annotations"] = json!({ REF_NAME: name, CONTAINERD_NAME: name });
        let digest = root["digest"].as_str().unwrap_or_default().to_owned();
        let mut tar = tar::Builder::new(BufWriter::new(File::create(file)?));
        let index = json!({ "schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": [root] });
        for (path, bytes) in
            [("oci-layout", &b"{\"imageLayoutVersion\":\"1.0.0\"}"[..]), ("index.json", &serde_json::to_vec(&index)?)]
        {
            append(&mut tar, path, bytes.len() as u64, bytes)?;
        }
        let mut blobs: Vec<_> = fs::read_dir(&self.blobs)?.collect::<std::io::Result<_>>()?;
        blobs.sort_by_key(fs::DirEntry::file_name);
        for blob in blobs {
            let path = format!("blobs/sha256/{}", blob.file_name().to_string_lossy());
            append(&mut tar, &path, blob.metadata()?.len(), File::open(blob.path())?)?;
        }
        tar.into_inner()?.flush()?;
        Ok(digest)
    }

    fn put(&mut self, media_type: &str, content: &Value) -> Result<Value> {
        let bytes = serde_json::to_vec(content)?;
        let digest = digest_of(&bytes);
        fs::write(self.path(&digest), &bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    }

    fn path(&self, digest: &str) -> PathBuf {
        self.blobs.join(digest.trim_start_matches("sha256:"))
    }
}

fn append(
    tar: &mut tar::Builder<impl std::io::Write>,
    path: &str,
    size: u64,
    content: impl std::io::Read,
) -> Result<()> {
    let mut header = super::header(tar::EntryType::Regular, 0o644, size);
    Ok(tar.append_data(&mut header, path, content)?)
}
