//! Where a made image goes: an OCI image layout, an archive for `ctr images import`, or a registry.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Descriptor, Image, MEDIA_TYPE_INDEX, MEDIA_TYPE_MANIFEST, REF_NAME, blob_path};

/// The name by which containerd's importer calls an image of an archive, before it looks at [`REF_NAME`].
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// The marker file of a layout, by the OCI image layout specification.
const LAYOUT_MARKER: &str = "{\"imageLayoutVersion\":\"1.0.0\"}";

impl Image {
    /// Puts the image into an OCI image layout beside what is there; an entry of the same name is replaced.
    /// `index.json` is replaced by a rename after the blobs are in place, so that a reader never sees a name without content.
    ///
    /// # Errors
    /// The disk's, or an `index.json` that is not one.
    pub fn write_layout(&self, layout: &Path) -> Result<()> {
        fs::create_dir_all(layout.join("blobs/sha256"))?;
        fs::write(layout.join("oci-layout"), LAYOUT_MARKER)?;
        for content in &self.contents {
            let target = blob_path(layout, &content.digest);
            if !target.exists() {
                let part = target.with_extension("part");
                fs::copy(self.blob_path(&content.digest), &part)
                    .and_then(|_| fs::rename(&part, &target))
                    .with_context(|| format!("store {}", target.display()))?;
            }
        }
        let mut entry = self.root.to_json();
        entry["annotations"] = json!({ REF_NAME: self.reference });
        change_index(layout, &self.reference, Some(entry))
    }

    /// Writes a tar of an OCI image layout, as `ctr images import` reads it.
    ///
    /// # Errors
    /// The disk's.
    pub fn write_archive(&self, file: &Path) -> Result<()> {
        let file = File::create(file).with_context(|| format!("create {}", file.display()))?;
        let mut tar = tar::Builder::new(BufWriter::new(file));
        tar.mode(tar::HeaderMode::Deterministic);
        let mut entry = self.root.to_json();
        entry["annotations"] = json!({ REF_NAME: self.reference, CONTAINERD_NAME: self.reference });
        append(&mut tar, "oci-layout", LAYOUT_MARKER.as_bytes())?;
        append(&mut tar, "index.json", &serde_json::to_vec(&index_of(vec![entry]))?)?;
        for content in &self.contents {
            let name = format!("blobs/{}", content.digest.replacen(':', "/", 1));
            tar.append_file(name, &mut File::open(self.blob_path(&content.digest))?)?;
        }
        tar.into_inner()?.flush()?;
        Ok(())
    }

    /// Pushes the image to the registry at `url` (`http://host:port`), whatever registry its name says.
    /// A registry refuses an image made partial by [`Image::only`].
    ///
    /// # Errors
    /// A registry that does not answer or refuses.
    pub fn push(&self, url: &str) -> Result<()> {
        let base = format!("{}/v2/{}", url.trim_end_matches('/'), self.repository());
        for content in &self.contents {
            let pushed = match content.media_type.as_str() {
                MEDIA_TYPE_INDEX | MEDIA_TYPE_MANIFEST => self.push_manifest(&base, content, &content.digest),
                _ => self.push_blob(&base, content),
            };
            pushed.with_context(|| format!("push {} of {} to {url}", content.digest, self.reference))?;
        }
        self.push_manifest(&base, &self.root, self.tag()).with_context(|| format!("push {} to {url}", self.reference))
    }

    fn push_blob(&self, base: &str, content: &Descriptor) -> Result<()> {
        let begun = ureq::post(format!("{base}/blobs/uploads/")).send_empty()?;
        let location = begun.headers().get("location").and_then(|value| value.to_str().ok());
        let location = location.context("the registry accepted an upload without saying where")?;
        let location = match location.strip_prefix('/') {
            Some(path) => format!("{}/{path}", base.split("/v2/").next().unwrap_or_default()),
            None => location.to_owned(),
        };
        let separator = if location.contains('?') { '&' } else { '?' };
        ureq::put(format!("{location}{separator}digest={}", content.digest))
            .content_type("application/octet-stream")
            .send(File::open(self.blob_path(&content.digest))?)?;
        Ok(())
    }

    fn push_manifest(&self, base: &str, content: &Descriptor, name: &str) -> Result<()> {
        ureq::put(format!("{base}/manifests/{name}"))
            .content_type(&content.media_type)
            .send(self.read(&content.digest)?)?;
        Ok(())
    }
}

/// Takes a name out of a layout's `index.json`; the blobs stay.
///
/// # Errors
/// The disk's, an `index.json` that is not one, or a name that it does not have.
pub fn remove_from_layout(layout: &Path, reference: &str) -> Result<()> {
    let before = read_index(layout)?;
    ensure!(before.iter().any(|entry| names(entry, reference)), "{} has no {reference}", layout.display());
    change_index(layout, reference, None)
}

fn change_index(layout: &Path, reference: &str, entry: Option<Value>) -> Result<()> {
    let mut entries = read_index(layout)?;
    entries.retain(|entry| !names(entry, reference));
    entries.extend(entry);
    let mut part = tempfile::NamedTempFile::new_in(layout)?;
    part.write_all(&serde_json::to_vec_pretty(&index_of(entries))?)?;
    part.persist(layout.join("index.json"))?;
    Ok(())
}

fn read_index(layout: &Path) -> Result<Vec<Value>> {
    let path = layout.join("index.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let index: Value = serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
    Ok(index["manifests"].as_array().cloned().unwrap_or_default())
}

fn names(entry: &Value, reference: &str) -> bool {
    entry["annotations"][REF_NAME] == reference
}

fn index_of(entries: Vec<Value>) -> Value {
    json!({ "schemaVersion": 2, "mediaType": MEDIA_TYPE_INDEX, "manifests": entries })
}

fn append<W: Write>(tar: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(0);
    tar.append_data(&mut header, name, bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{Compression, ImageBuilder};
    use super::*;

    #[test]
    fn a_layout_holds_several_images_once_each() {
        let (blobs, layout) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let one = ImageBuilder::new("r.test/a:1").layers(1, 100, Compression::None, 1).build(blobs.path()).unwrap();
        let two = ImageBuilder::new("r.test/a:2").layers(1, 100, Compression::None, 2).build(blobs.path()).unwrap();
        for image in [&one, &two, &one] {
            image.write_layout(layout.path()).unwrap();
        }
        let entries = read_index(layout.path()).unwrap();
        assert_eq!(entries.len(), 2);
        two.renamed("r.test/a:1").unwrap().write_layout(layout.path()).unwrap();
        let entries = read_index(layout.path()).unwrap();
        assert_eq!(entries.len(), 2);
        assert!(entries.iter().all(|entry| entry["digest"] == two.root().digest.as_str()));
        remove_from_layout(layout.path(), "r.test/a:1").unwrap();
        assert_eq!(read_index(layout.path()).unwrap().len(), 1);
        assert!(remove_from_layout(layout.path(), "r.test/a:1").is_err());
        assert!(blob_path(layout.path(), &one.root().digest).exists());
    }

    #[test]
    fn an_archive_is_a_layout_in_a_tar() {
        let dir = tempfile::tempdir().unwrap();
        let image = ImageBuilder::new("r.test/a:1").layers(2, 100, Compression::Gzip, 1).build(dir.path()).unwrap();
        let file = dir.path().join("image.tar");
        image.write_archive(&file).unwrap();
        let unpacked = dir.path().join("unpacked");
        tar::Archive::new(File::open(&file).unwrap()).unpack(&unpacked).unwrap();
        let entry = &read_index(&unpacked).unwrap()[0];
        assert_eq!(entry["annotations"][CONTAINERD_NAME], "r.test/a:1");
        for content in image.contents() {
            assert!(blob_path(&unpacked, &content.digest).exists());
        }
    }
}
