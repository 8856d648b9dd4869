//! `cargo xtask docs`: runs the shell blocks of the README, the chart's page, and `docs/`.
//!
//! Each block's line before it says where it is run (`<!-- run: host -->`) or why it is not (`<!-- not run: reason -->`); a block that says
//! neither is an error, and so is an indented block, which could be a command as well. `host` is a plain host with the Debian package installed, one for each page; `chart` is the repository with Helm.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use spegel_benches::daemon::output;
use spegel_benches::netns::Lab;

use crate::helm;
use crate::hosts::{Host, available};

#[derive(Debug, Args)]
pub(crate) struct Docs {
    /// The program to package [default: built with the profile `fast`]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Where a block is run.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Host,
    Chart,
    Nowhere(String),
}

#[derive(Debug)]
struct Block {
    line: usize,
    place: Place,
    script: String,
}

// === impl Docs ===

impl Docs {
    pub(crate) fn run(&self) -> Result<bool> {
        let mut good = true;
        let mut run = 0;
        let (folder, mut package) = (tempfile::tempdir()?, None);
        for page in pages()? {
            let name = page.strip_prefix(crate::root()).unwrap_or(&page).display().to_string();
            let blocks = blocks(&fs::read_to_string(&page)?).with_context(|| name.clone())?;
            let mut host = None;
            for block in blocks {
                let at = format!("{name}:{}", block.line);
                match self.run_block(&block, folder.path(), &mut package, &mut host) {
                    Ok(None) => run += 1,
                    Ok(Some(reason)) => println!("{at} ... not run: {reason}"),
                    Err(error) => {
                        println!("{at} ... FAILED: {error:#}\n{}", block.script);
                        good = false;
                    }
                }
            }
        }
        println!("{run} blocks were run");
        Ok(good)
    }

    /// Runs one, or says why it is not run.
    fn run_block(
        &self,
        block: &Block,
        folder: &Path,
        package: &mut Option<PathBuf>,
        host: &mut Option<Page>,
    ) -> Result<Option<String>> {
        match &block.place {
            Place::Nowhere(reason) => Ok(Some(reason.clone())),
            Place::Chart => {
                let Ok(helm) = helm::find(helm::Version::V3) else {
                    return Ok(Some("skipped: there is no Helm".into()));
                };
                let folder = tempfile::tempdir()?;
                std::os::unix::fs::symlink(helm, folder.path().join("helm"))?;
                let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap_or_default());
                let mut command = Command::new("sh");
                command.current_dir(crate::root()).env("PATH", path).args(["-euc", &block.script]);
                output(&mut command).map(|_| None)
            }
            Place::Host => {
                if let Err(reason) = available() {
                    return Ok(Some(format!("skipped: {reason}")));
                }
                if host.is_none() {
                    let package = match package {
                        Some(package) => package,
                        None => package.insert(self.package(folder)?),
                    };
                    *host = Some(Page::start(package)?);
                }
                let page = host.as_ref().context("there is no host")?;
                output(page.host.command("sh").args(["-euc", &block.script])).map(|_| None)
            }
        }
    }

    /// The package that hosts are installed from.
    fn package(&self, folder: &Path) -> Result<PathBuf> {
        let binary = self.binary.clone().map_or_else(|| crate::build::spegel("fast"), Ok)?;
        crate::dist::package_of(crate::root(), &binary, "0.1.0~docs", folder)
    }
}

/// Writes `docs/metrics.md`. The test that fails when it is stale knows how, since this crate does not depend on the program.
///
/// # Errors
/// cargo cannot be started.
pub(crate) fn write_metrics() -> Result<bool> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "test",
        "--quiet",
        "-p",
        "spegel",
        "--test",
        "it",
        "--",
        "metrics::the_page_says_what_the_code_counts",
    ]);
    Ok(cargo.current_dir(crate::root()).env("UPDATE_SNAPSHOTS", "1").status()?.success())
}

/// What is declared first ends first.
struct Page {
    host: Host,
    _lab: Lab,
    _folder: tempfile::TempDir,
}

// === impl Page ===

impl Page {
    /// A host for one page.
    fn start(package: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("spegel-docs-").tempdir()?;
        let mut lab = Lab::new()?;
        let host = Host::start(lab.add_node()?, folder.path())?;
        host.dpkg(&["--install"], Some(package))?;
        Ok(Self { host, _lab: lab, _folder: folder })
    }
}

fn pages() -> Result<Vec<PathBuf>> {
    let single = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "charts/spegel/README.md"];
    let mut pages: Vec<PathBuf> = single.iter().map(|page| crate::root().join(page)).collect();
    for entry in fs::read_dir(crate::root().join("docs"))? {
        pages.push(entry?.path());
    }
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    pages.sort();
    Ok(pages)
}

/// The blocks of a page.
fn blocks(text: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate();
    let mut before = "";
    let mut was_blank = true;
    while let Some((number, line)) = lines.next() {
        ensure!(
            !was_blank || !line.starts_with("    "),
            "line {}: an indented block: write ```sh, or what it is",
            number + 1
        );
        was_blank = line.trim().is_empty();
        if line.trim_start() == "```sh" {
            let place = place(before).with_context(|| format!("line {}", number + 1))?;
            let script: Vec<&str> =
                lines.by_ref().map(|(_, line)| line).take_while(|line| line.trim() != "```").collect();
            blocks.push(Block { line: number + 1, place, script: script.join("\n") });
        } else if line.trim_start().starts_with("```") {
            // Another language's.
            lines.by_ref().find(|(_, line)| line.trim() == "```");
        }
        if !line.trim().is_empty() {
            before = line;
        }
    }
    Ok(blocks)
}

fn place(mark: &str) -> Result<Place> {
    let inner = mark.trim().strip_prefix("<!--").and_then(|rest| rest.strip_suffix("-->")).map(str::trim);
    let Some(inner) = inner else {
        bail!("the block is not marked: write <!-- run: host --> or <!-- not run: reason -->")
    };
    match (inner.strip_prefix("run: "), inner.strip_prefix("not run: ")) {
        (Some("host"), _) => Ok(Place::Host),
        (Some("chart"), _) => Ok(Place::Chart),
        (_, Some(reason)) => {
            ensure!(!reason.trim().is_empty(), "why is it not run?");
            Ok(Place::Nowhere(reason.to_owned()))
        }
        _ => bail!("{inner:?} names no place: host or chart"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn blocks_are_found_and_must_be_marked() {
        let found =
            blocks("a\n\n<!-- run: host -->\n```sh\nb\nc\n```\n<!-- not run: d -->\n```sh\n```\n```toml\n```\n")
                .unwrap();
        assert_eq!((found.len(), found[0].script.as_str(), found[0].line), (2, "b\nc", 4));
        assert_eq!((&found[0].place, &found[1].place), (&Place::Host, &Place::Nowhere("d".to_owned())));
        for wrong in [
            "a\n\n    indented\n",
            "```sh\n```\n",
            "<!-- run: moon -->\n```sh\n```\n",
            "<!-- run: host -->\nbetween\n```sh\n```\n",
        ] {
            assert!(blocks(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_block_of_the_pages_is_marked() {
        let count = |page: PathBuf| {
            blocks(&fs::read_to_string(&page).unwrap())
                .unwrap_or_else(|error| panic!("{}: {error:#}", page.display()))
                .len()
        };
        assert!(pages().unwrap().into_iter().map(count).sum::<usize>() > 10);
    }
}
