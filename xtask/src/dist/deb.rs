//! The Debian package: two gzipped tars in an ar archive, as `deb(5)` describes it, the same to the byte from the same binary.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use spegel_benches::daemon::output;

use super::{COMPLETIONS, Entry};
use crate::image::header;

/// Where each shell looks for completions that packages bring.
const COMPLETION_PATHS: [&str; 3] = [
    "usr/share/bash-completion/completions/spegel",
    "usr/share/fish/vendor_completions.d/spegel.fish",
    "usr/share/zsh/vendor-completions/_spegel",
];
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Makes a package of any binary and version, without licences of others: for tests.
///
/// # Errors
/// No such binary, or it does not run here.
pub(crate) fn package_of(root: &Path, binary: &Path, version: &str, folder: &Path) -> Result<PathBuf> {
    // Without its symbols a debug build is half the size; where there is no `strip` it is packed as it is.
    let stripped = tempfile::NamedTempFile::new()?;
    let strip = output(Command::new("strip").arg("-o").arg(stripped.path()).arg(binary));
    let bytes = fs::read(if strip.is_ok() { stripped.path() } else { binary })?;
    let mut content = vec![Entry { path: "spegel".to_owned(), mode: 0o755, bytes }];
    content.push(Entry { path: "LICENSE".to_owned(), mode: 0o644, bytes: fs::read(root.join("LICENSE"))? });
    for (shell, name) in COMPLETIONS {
        let text = output(Command::new(binary).args(["completions", shell]))?;
        content.push(Entry { path: format!("completions/{name}"), mode: 0o644, bytes: text.into_bytes() });
    }
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    write(root, folder, architecture, version, &content)
}

/// Writes the package; `content` is what the archive of the same binary has.
pub(super) fn write(
    root: &Path,
    folder: &Path,
    architecture: &str,
    version: &str,
    content: &[Entry],
) -> Result<PathBuf> {
    let files = files(root, content)?;
    let size: usize = files.iter().map(|file| file.bytes.len()).sum();
    let control = format!(
        "Package: spegel\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: The spegel developers <spegel@users.noreply.github.com>\n\
         Installed-Size: {}\nSection: admin\nPriority: optional\nDepends: init-system-helpers (>= 1.54~)\nRecommends: containerd\nHomepage: {}\n\
         Description: cluster-local mirror for container images\n containerd asks it for images before it asks the registry; it serves what this\n \
         host or another one has already.\n",
        size.div_ceil(1024),
        env!("CARGO_PKG_REPOSITORY"),
    );
    let mut about = vec![
        Entry { path: "control".to_owned(), mode: 0o644, bytes: control.into_bytes() },
        Entry { path: "conffiles".to_owned(), mode: 0o644, bytes: b"/etc/default/spegel\n".to_vec() },
    ];
    for name in SCRIPTS {
        about.push(Entry { path: name.to_owned(), mode: 0o755, bytes: fs::read(root.join("packaging").join(name))? });
    }
    let path = folder.join(format!("spegel_{version}_{architecture}.deb"));
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    let mut archive = ar::Builder::new(file);
    let parts = [("debian-binary", b"2.0\n".to_vec()), ("control.tar.gz", tar(&about)?), ("data.tar.gz", tar(&files)?)];
    for (name, bytes) in parts {
        let mut header = ar::Header::new(name.as_bytes().to_vec(), bytes.len() as u64);
        header.set_mode(0o100_644);
        archive.append(&header, &bytes[..])?;
    }
    archive.into_inner()?.flush()?;
    Ok(path)
}

fn files(root: &Path, content: &[Entry]) -> Result<Vec<Entry>> {
    let of = |name: &str| {
        let found = content.iter().find(|entry| entry.path == name);
        found.map(|entry| entry.bytes.clone()).with_context(|| format!("the package lacks {name}"))
    };
    let read = |path: &str| fs::read(root.join(path)).with_context(|| format!("read {path}"));
    let mut files = vec![
        ("usr/bin/spegel", 0o755, of("spegel")?),
        ("etc/default/spegel", 0o644, read("packaging/spegel.env")?),
        ("usr/lib/systemd/system/spegel.service", 0o644, read("packaging/spegel.service")?),
        ("usr/share/doc/spegel/copyright", 0o644, of("LICENSE")?),
        ("usr/share/doc/spegel/systemd.md", 0o644, read("docs/systemd.md")?),
        ("usr/share/doc/spegel/CHANGELOG.md", 0o644, read("CHANGELOG.md")?),
    ];
    if let Ok(licences) = of("THIRD-PARTY-LICENSES") {
        files.push(("usr/share/doc/spegel/THIRD-PARTY-LICENSES", 0o644, licences));
    }
    for ((_, name), path) in COMPLETIONS.iter().zip(COMPLETION_PATHS) {
        files.push((path, 0o644, of(&format!("completions/{name}"))?));
    }
    Ok(files.into_iter().map(|(path, mode, bytes)| Entry { path: path.to_owned(), mode, bytes }).collect())
}

/// A gzipped tar with the directories before what is in them, as dpkg wants it.
fn tar(files: &[Entry]) -> Result<Vec<u8>> {
    let mut files: Vec<&Entry> = files.iter().collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let gzip = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::best());
    let mut tar = tar::Builder::new(gzip);
    let parents = |file: &&Entry| Path::new(&file.path).ancestors().skip(1).map(Path::to_owned).collect::<Vec<_>>();
    let folders: BTreeSet<PathBuf> = files.iter().flat_map(parents).collect();
    for folder in folders {
        let mut header = header(tar::EntryType::Directory, 0o755, 0);
        tar.append_data(&mut header, format!("./{}", folder.display()), std::io::empty())?;
    }
    for file in files {
        let mut header = header(tar::EntryType::Regular, file.mode, file.bytes.len() as u64);
        tar.append_data(&mut header, format!("./{}", file.path), &file.bytes[..])?;
    }
    Ok(tar.into_inner()?.finish()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_package_is_what_dpkg_reads_and_always_the_same() {
        let content =
            ["spegel", "LICENSE", "completions/spegel.bash", "completions/spegel.fish", "completions/_spegel"];
        let content = content.map(|path| Entry { path: path.to_owned(), mode: 0o755, bytes: path.into() });
        let folder = tempfile::tempdir().unwrap();
        let make = || fs::read(write(crate::root(), folder.path(), "amd64", "0.1.0", &content).unwrap()).unwrap();
        assert!(make() == make());
        let path = folder.path().join("spegel_0.1.0_amd64.deb");
        let Ok(said) = output(Command::new("dpkg-deb").arg("--info").arg(&path)) else {
            println!("skipped: there is no dpkg-deb here");
            return;
        };
        assert!(said.contains("Version: 0.1.0") && said.contains("prerm"), "{said}");
        let list = output(Command::new("dpkg-deb").arg("--contents").arg(&path)).unwrap();
        for part in [
            "usr/bin/spegel",
            "etc/default/spegel",
            "system/spegel.service",
            "_spegel",
            "usr/share/doc/spegel/systemd.md",
        ] {
            assert!(list.contains(part), "{part} in {list}");
        }
    }
}
