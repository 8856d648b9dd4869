//! `cargo xtask dist`: everything that a release consists of, each file the same to the byte from the same binaries.

mod deb;
mod parts;

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use spegel_benches::daemon::output;
use spegel_benches::image::digest_of_file;

use crate::image::{self, header};
use parts::Dependencies;

/// Shells that the program writes completions for, and the name that each looks for.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "spegel.bash"), ("fish", "spegel.fish"), ("zsh", "_spegel")];

const VERSION: &str = concat!("v", env!("CARGO_PKG_VERSION"));

pub(crate) use deb::package_of;

#[derive(Debug, clap::Args)]
pub(crate) struct Dist {
    /// A static binary, one for each architecture [default: built for this machine]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    binary: Vec<PathBuf>,
    /// Where the files are written
    #[arg(long, default_value = "target/dist", value_name = "DIR")]
    output: PathBuf,
    /// The image's name
    #[arg(long, default_value_t = format!("ghcr.io/spegel-org/spegel:{VERSION}"), value_name = "NAME")]
    image_name: String,
}

// === impl Dist ===

impl Dist {
    /// Writes all files, and their list with checksums last.
    pub(crate) fn run(&self, root: &Path) -> Result<bool> {
        let binaries = if self.binary.is_empty() { vec![crate::build::static_spegel()?] } else { self.binary.clone() };
        let folder = root.join(&self.output);
        fs::create_dir_all(&folder)?;
        let dependencies = Dependencies::read(root)?;
        let shared = shared(root, &binaries, &dependencies)?;
        let mut files = Vec::new();
        for binary in &binaries {
            let architecture = image::architecture(binary)?;
            let name = format!("spegel-{VERSION}-linux-{architecture}");
            let mut content = vec![Entry { path: "spegel".to_owned(), mode: 0o755, bytes: fs::read(binary)? }];
            content.extend(shared.iter().cloned());
            files.push(archive(&folder.join(format!("{name}.tar.gz")), &name, &content)?);
            files.push(deb::write(root, &folder, architecture, env!("CARGO_PKG_VERSION"), &content)?);
        }
        let image = folder.join(format!("spegel-{VERSION}-image.tar"));
        image::write(&binaries, &self.image_name, &image)?;
        let sbom = folder.join(format!("spegel-{VERSION}.cdx.json"));
        fs::write(&sbom, dependencies.sbom()?)?;
        files.extend([image, sbom, chart(root, &folder)?]);
        fs::write(folder.join("SHA256SUMS"), checksums(&mut files)?)?;
        for file in files {
            println!("{} ({} bytes)", file.display(), fs::metadata(&file)?.len());
        }
        Ok(true)
    }
}

/// A file of an archive.
#[derive(Clone)]
pub(crate) struct Entry {
    path: String,
    mode: u32,
    bytes: Vec<u8>,
}

/// What stands beside the binary, whatever its architecture.
fn shared(root: &Path, binaries: &[PathBuf], dependencies: &Dependencies) -> Result<Vec<Entry>> {
    let plain = |path: &str, bytes: Vec<u8>| Entry { path: path.to_owned(), mode: 0o644, bytes };
    let mut entries = vec![
        plain("LICENSE", fs::read(root.join("LICENSE"))?),
        plain("THIRD-PARTY-LICENSES", dependencies.licences()?.into_bytes()),
    ];
    let runs = binaries.iter().find(|binary| output(Command::new(binary).arg("version")).is_ok());
    let runs = runs.context("none of the binaries runs here, and one must write the shells' completions")?;
    for (shell, name) in COMPLETIONS {
        let text = output(Command::new(runs).args(["completions", shell]))?;
        entries.push(plain(&format!("completions/{name}"), text.into_bytes()));
    }
    Ok(entries)
}

/// The chart as Helm's own `package` would make it, but without times.
fn chart(root: &Path, folder: &Path) -> Result<PathBuf> {
    let source = root.join("charts/spegel");
    let mut entries = Vec::new();
    let mut folders = vec![source.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(&source)?.display().to_string();
                entries.push(Entry { path: name, mode: 0o644, bytes: fs::read(&path)? });
            }
        }
    }
    archive(&folder.join(concat!("spegel-", env!("CARGO_PKG_VERSION"), ".tgz")), "spegel", &entries)
}

/// A gzipped tar of files below one folder, sorted.
fn archive(file: &Path, folder: &str, entries: &[Entry]) -> Result<PathBuf> {
    let mut entries: Vec<&Entry> = entries.iter().collect();
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let output = File::create(file).with_context(|| format!("create {}", file.display()))?;
    let gzip = flate2::GzBuilder::new().mtime(0).write(output, flate2::Compression::best());
    let mut tar = tar::Builder::new(gzip);
    for entry in entries {
        let mut header = header(tar::EntryType::Regular, entry.mode, entry.bytes.len() as u64);
        tar.append_data(&mut header, format!("{folder}/{}", entry.path), &entry.bytes[..])?;
    }
    tar.into_inner()?.finish()?.flush()?;
    Ok(file.to_owned())
}

/// As `sha256sum --check` reads it.
fn checksums(files: &mut [PathBuf]) -> Result<String> {
    files.sort();
    let mut text = String::new();
    for file in files {
        let digest = digest_of_file(file)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        text.push_str(&format!("{}  {name}\n", digest.trim_start_matches("sha256:")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn root() -> &'static Path {
        crate::root()
    }

    #[test]
    fn a_chart_package_is_what_helm_reads_and_always_the_same() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let packages = [&first, &second].map(|dir| chart(root(), dir.path()).unwrap());
        assert!(fs::read(&packages[0]).unwrap() == fs::read(&packages[1]).unwrap());
        let Ok(helm) =
            crate::helm::find(crate::helm::Version::V3).inspect_err(|reason| println!("half skipped: {reason:#}"))
        else {
            return;
        };
        let said = output(Command::new(helm).arg("show").arg("chart").arg(&packages[0])).unwrap();
        assert!(said.contains("appVersion: v"), "{said}");
    }

    #[test]
    fn checksums_are_those_of_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = ["b", "a"].map(|name| {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            path
        });
        fs::write(dir.path().join("SHA256SUMS"), checksums(&mut files).unwrap()).unwrap();
        output(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(dir.path())).unwrap();
    }
}
