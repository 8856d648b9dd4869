//! `cargo xtask ebpf`: builds the kernel programs of `spegel-ebpf` into the object that is committed beside their source, so that building
//! spegel itself needs neither their compiler nor LLVM.

mod toolchain;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use spegel_benches::image::digest_of;

use toolchain::Toolchain;

/// The object, and what it was made of and by.
const OBJECT: &str = "spegel-ebpf/spegel-ebpf.o";
const RECORD: &str = "spegel-ebpf/spegel-ebpf.o.txt";

/// What the object depends on.
const SOURCES: [&str; 5] = [
    "spegel-common/src",
    "spegel-ebpf/src",
    "spegel-ebpf/Cargo.toml",
    "spegel-ebpf/Cargo.lock",
    "spegel-common/Cargo.toml",
];

#[derive(Debug, clap::Args)]
pub(crate) struct Ebpf {
    /// Write nothing; fail if the committed object is not what the source makes
    #[arg(long)]
    check: bool,
}

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// The object is the source's, to the byte.
    Same,
    /// It is not.
    Different,
    /// It was made of this source, by another compiler than the one that can be had here.
    OtherCompiler,
}

// === impl Ebpf ===

impl Ebpf {
    /// Builds, or checks. False if the committed object is not the source's.
    pub(crate) fn run(&self, root: &Path) -> Result<bool> {
        if self.check {
            let toolchain = Toolchain::get();
            // What can be said without a compiler is said in any case.
            ensure_recorded(root)?;
            return Ok(match check(root, &toolchain?)? {
                Checked::Same => true,
                Checked::Different => false,
                // Nothing speaks against it, so it is no failure; nor is it the proof that was asked for.
                Checked::OtherCompiler => {
                    println!("skipped: only that {RECORD} names this source and this object is shown");
                    true
                }
            });
        }
        let toolchain = Toolchain::get()?;
        let object = build(root, &toolchain)?;
        fs::write(root.join(OBJECT), &object)?;
        fs::write(root.join(RECORD), record(root, &object, &toolchain.versions()?)?)?;
        println!("{OBJECT}: {} bytes", object.len());
        Ok(true)
    }
}

/// Builds the object anew and compares, and says what it found.
///
/// # Errors
/// It does not build.
pub(crate) fn check(root: &Path, toolchain: &Toolchain) -> Result<Checked> {
    let committed = fs::read(root.join(OBJECT)).with_context(|| format!("read {OBJECT}"))?;
    let (recorded, versions) = (fs::read_to_string(root.join(RECORD))?, toolchain.versions()?);
    let object = build(root, toolchain)?;
    if object == committed {
        println!("{OBJECT} is what its source makes, to the byte ({versions})");
        return Ok(Checked::Same);
    }
    if !recorded.contains(&versions) {
        let by =
            recorded.lines().find_map(|line| line.strip_prefix("compiler: ")).unwrap_or("one that is not recorded");
        println!(
            "NOT PROVEN: {OBJECT} was made by {by}, and what is to be had here is {versions}, which makes {} other bytes of the same source. \
             That the object is this source's own is proven only where that compiler is, or after `cargo xtask ebpf`.",
            object.len()
        );
        return Ok(Checked::OtherCompiler);
    }
    println!("{OBJECT} is not what its source makes: run `cargo xtask ebpf`");
    Ok(Checked::Different)
}

/// The compiler, where it is installed or can be.
pub(crate) fn toolchain() -> Result<Toolchain> {
    Toolchain::get()
}

/// Fails unless the record names the sources and the object that are there.
fn ensure_recorded(root: &Path) -> Result<()> {
    let recorded = fs::read_to_string(root.join(RECORD)).with_context(|| format!("read {RECORD}"))?;
    let object = fs::read(root.join(OBJECT)).with_context(|| format!("read {OBJECT}"))?;
    for (what, digest) in [("source", digest_of_sources(root)?), ("object", digest_of(&object))] {
        ensure!(
            recorded.contains(&format!("{what}: {digest}\n")),
            "the {what} is not the one that {RECORD} names: run `cargo xtask ebpf`"
        );
    }
    Ok(())
}

fn record(root: &Path, object: &[u8], versions: &str) -> Result<String> {
    let mut text = "Made by `cargo xtask ebpf`; `cargo xtask ebpf --check` makes it anew and compares.\n".to_owned();
    writeln!(text, "compiler: {versions}")?;
    writeln!(text, "source: {}", digest_of_sources(root)?)?;
    writeln!(text, "object: {}", digest_of(object))?;
    Ok(text)
}

/// A digest of all sources with their names.
fn digest_of_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut all = Vec::new();
    for file in files {
        let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
        all.extend_from_slice(format!("{name}\n").as_bytes());
        all.extend_from_slice(&fs::read(&file)?);
    }
    Ok(digest_of(&all))
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            collect(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_path_buf());
    }
    Ok(())
}

fn build(root: &Path, toolchain: &Toolchain) -> Result<Vec<u8>> {
    let folder = root.join("spegel-ebpf");
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(&folder).args(["build", "--quiet", "--release", "--locked", "-Z", "build-std=core"]);
    command.args(["--target", "bpfel-unknown-none"]);
    toolchain.enter(&mut command);
    if !command.status().context("run cargo")?.success() {
        bail!("the kernel programs do not build");
    }
    let object = toolchain.target().join("bpfel-unknown-none/release/spegel-ebpf");
    fs::read(&object).with_context(|| format!("read {}", object.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Needs no compiler: whoever changes the source and forgets the object is told at once.
    #[test]
    fn the_committed_object_was_made_of_this_source() {
        ensure_recorded(crate::root()).unwrap();
    }
}
