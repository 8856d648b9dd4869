//! `cargo xtask image`: an OCI image archive from static binaries, the same to the byte whoever makes it, without a container engine.

mod elf;
mod layout;

use std::fs::{self, File};
use std::io::{BufReader, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use spegel_benches::image::HashWriter;

use layout::Layout;

/// Where the trust anchors lie, as programs on Debian and Alpine expect them.
const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

/// root, since containerd's socket and directories are root's, and a user for what needs neither.
const PASSWD: &str = "root:x:0:0:root:/:/spegel\nnonroot:x:65532:65532:nonroot:/:/spegel\n";
const GROUP: &str = "root:x:0:\nnonroot:x:65532:\n";

#[derive(Debug, clap::Args)]
pub(crate) struct Image {
    /// A static binary, one for each architecture [default: built for this machine]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    binary: Vec<PathBuf>,
    /// The image's name
    #[arg(long, default_value_t = format!("ghcr.io/spegel-org/spegel:v{}", env!("CARGO_PKG_VERSION")), value_name = "NAME")]
    name: String,
    /// The archive
    #[arg(long, default_value = "target/dist/spegel-image.tar", value_name = "FILE")]
    output: PathBuf,
}

// === impl Image ===

impl Image {
    /// Writes the archive, and says where and what.
    pub(crate) fn run(&self, root: &Path) -> Result<bool> {
        let binaries = if self.binary.is_empty() { vec![crate::build::static_spegel()?] } else { self.binary.clone() };
        let output = root.join(&self.output);
        let digest = write(&binaries, &self.name, &output)?;
        let size = fs::metadata(&output)?.len() as f64 / f64::from(1 << 20);
        println!(
            "{}: {} {digest}, {size:.1} MiB; `ctr --namespace k8s.io images import` reads it",
            output.display(),
            self.name
        );
        Ok(true)
    }
}

/// Writes an archive with the binaries' image and returns the digest of its manifest, or of its index if there are several.
///
/// # Errors
/// A binary that would not start in an empty root, two for one architecture, or the disk's.
pub(crate) fn write(binaries: &[PathBuf], name: &str, output: &Path) -> Result<String> {
    ensure!(!binaries.is_empty(), "an image needs a binary");
    let folder = output.parent().context("the archive needs a folder")?;
    fs::create_dir_all(folder)?;
    let scratch = tempfile::tempdir_in(folder)?;
    let mut layout = Layout::new(scratch.path())?;
    let mut architectures = Vec::new();
    for binary in binaries {
        let architecture = elf::check_static(binary)?;
        ensure!(
            !architectures.contains(&architecture),
            "{}: there is a binary for {architecture:?} already",
            binary.display()
        );
        layout.add_manifest(architecture.oci_name(), |file| layer(binary, file))?;
        architectures.push(architecture);
    }
    let partial = scratch.path().join("archive.tar");
    let digest = layout.write_archive(name, &partial)?;
    fs::rename(&partial, output)?;
    Ok(digest)
}

/// The architecture of a static binary, by its name in the OCI specification.
///
/// # Errors
/// It would not start in an empty root.
pub(crate) fn architecture(binary: &Path) -> Result<&'static str> {
    Ok(elf::check_static(binary)?.oci_name())
}

/// The only layer: a gzipped tar in which nothing depends on time, user or file system. Returns the digest of the tar.
fn layer(binary: &Path, file: File) -> Result<String> {
    let gzip = flate2::GzBuilder::new().mtime(0).write(file, flate2::Compression::best());
    let mut tar = tar::Builder::new(HashWriter::new(gzip));
    for folder in ["etc/", "etc/ssl/", "etc/ssl/certs/"] {
        let mut header = header(tar::EntryType::Directory, 0o755, 0);
        tar.append_data(&mut header, folder, std::io::empty())?;
    }
    for (path, text) in [("etc/group", GROUP), ("etc/passwd", PASSWD), (CERTIFICATES, &certificates())] {
        let mut header = header(tar::EntryType::Regular, 0o644, text.len() as u64);
        tar.append_data(&mut header, path, text.as_bytes())?;
    }
    let program = File::open(binary).with_context(|| format!("open {}", binary.display()))?;
    let mut header = header(tar::EntryType::Regular, 0o755, program.metadata()?.len());
    tar.append_data(&mut header, "spegel", BufReader::new(program))?;
    let (gzip, digest, _) = tar.into_inner()?.finish();
    gzip.finish()?.flush()?;
    Ok(digest)
}

pub(crate) fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Mozilla's trust anchors, of the version that Cargo.lock names, so that they are the same on every machine.
fn certificates() -> String {
    let mut text = String::new();
    for certificate in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = STANDARD.encode(certificate);
        // Base64 is ASCII, so any cut is between characters.
        for start in (0..encoded.len()).step_by(64) {
            text.push_str(&encoded[start..encoded.len().min(start + 64)]);
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;
    use std::io::Read as _;

    use serde_json::Value;
    use spegel_benches::image::digest_of;

    use super::*;

    fn read(tar: impl std::io::Read) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(tar).entries().unwrap() {
            let mut entry = entry.unwrap();
            let (name, mut bytes) = (entry.path().unwrap().display().to_string(), Vec::new());
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(name, bytes);
        }
        files
    }

    fn binaries(folder: &Path) -> Vec<PathBuf> {
        let write = |name: &str, machine: u16| {
            let path = folder.join(name);
            fs::write(&path, elf::tests::program(machine, &[1])).unwrap();
            path
        };
        vec![write("a", 62), write("b", 183)]
    }

    #[test]
    fn an_image_is_the_same_wherever_and_whenever_it_is_made() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let archives = [&first, &second].map(|dir| {
            let output = dir.path().join("deep/image.tar");
            write(&binaries(dir.path()), "registry.test/spegel:1", &output).unwrap();
            assert_eq!(fs::read_dir(dir.path().join("deep")).unwrap().count(), 1, "nothing else is left");
            fs::read(output).unwrap()
        });
        assert!(archives[0] == archives[1]);
    }

    #[test]
    fn every_descriptor_names_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("image.tar");
        let digest = write(&binaries(dir.path()), "registry.test/spegel:1", &output).unwrap();
        let files = read(File::open(&output).unwrap());
        let blob = |digest: &str| {
            let bytes = &files[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(digest_of(bytes), digest);
            bytes.clone()
        };
        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let top = json(&files["index.json"]);
        assert_eq!(top["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], "registry.test/spegel:1");
        assert_eq!(top["manifests"][0]["digest"], digest.as_str());
        let index = json(&blob(&digest));
        for (number, architecture) in ["amd64", "arm64"].into_iter().enumerate() {
            let descriptor = &index["manifests"][number];
            assert_eq!(descriptor["platform"]["architecture"], architecture);
            let manifest = json(&blob(descriptor["digest"].as_str().unwrap()));
            let config = json(&blob(manifest["config"]["digest"].as_str().unwrap()));
            assert_eq!(
                (&config["architecture"], &config["config"]["Entrypoint"][0]),
                (&architecture.into(), &"/spegel".into())
            );
            let layer = blob(manifest["layers"][0]["digest"].as_str().unwrap());
            let mut tar = Vec::new();
            flate2::read::GzDecoder::new(&layer[..]).read_to_end(&mut tar).unwrap();
            assert_eq!(config["rootfs"]["diff_ids"][0], digest_of(&tar).as_str());
            let content = read(&tar[..]);
            assert!(content["spegel"].starts_with(b"\x7fELF") && content["etc/passwd"].starts_with(b"root:"));
            assert!(content[CERTIFICATES].len() > 100_000);
        }
    }

    #[test]
    fn two_binaries_of_one_architecture_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut binaries = binaries(dir.path());
        binaries[1] = binaries[0].clone();
        assert!(write(&binaries, "registry.test/spegel:1", &dir.path().join("image.tar")).is_err());
    }
}
