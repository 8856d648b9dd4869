//! `cargo xtask audit`: what we depend on. cargo-deny checks licences, sources and duplicates by `deny.toml`, and known vulnerabilities where the
//! database can be fetched; what is not checked is said.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use spegel_benches::daemon::{find_program, output};

/// The version that is built.
const VERSION: &str = "0.20.2";
/// How long that may take, in seconds; far above what it takes on two cores of their own.
const BUILD: &str = "600";

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// Build cargo-deny with cargo where it is not there, once; it takes minutes
    #[arg(long)]
    install: bool,
}

impl Audit {
    pub(crate) fn run(&self) -> Result<bool> {
        let program = match find() {
            Some(program) => program,
            None if self.install => {
                install()?;
                find().context("cargo-deny was built, and is not there")?
            }
            None => {
                println!(
                    "licences, sources, duplicates ... skipped: cargo-deny is not here; `cargo xtask audit --install` builds it"
                );
                return Ok(true);
            }
        };
        let deny = |check: &[&str]| {
            let mut command = Command::new(&program);
            command.current_dir(crate::root()).args(["--all-features", "check", "--hide-inclusion-graph"]).args(check);
            command.status().context("run cargo-deny")
        };
        let good = deny(&["licenses", "bans", "sources"])?.success();
        println!("licences, sources, duplicates ... {}", if good { "ok" } else { "FAILED" });
        // The database is a repository on another host: where that cannot be reached, nothing is said against anybody.
        let fetched =
            output(Command::new("timeout").arg("60").arg(&program).args(["fetch", "db"]).current_dir(crate::root()));
        let safe = match fetched {
            Ok(_) => deny(&["advisories"])?.success(),
            Err(error) => {
                let why = error.to_string();
                let why = why.lines().last().unwrap_or_default();
                println!(
                    "advisories ... skipped: their database is a git repository, which cannot be fetched here ({why})"
                );
                true
            }
        };
        Ok(good && safe)
    }
}

fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("spegel-tests").join(format!("cargo-deny-{VERSION}")))
}

/// The program, if it is on this machine.
pub(crate) fn find() -> Option<PathBuf> {
    let built = folder().map(|folder| folder.join("bin/cargo-deny")).filter(|program| program.is_file());
    built.or_else(|| find_program("cargo-deny"))
}

/// Builds it with cargo into the cache folder.
///
/// # Errors
/// No registry of crates, or a build that fails or takes too long.
pub(crate) fn install() -> Result<()> {
    let folder = folder().context("neither XDG_CACHE_HOME nor HOME is set")?;
    let mut command = Command::new("timeout");
    command.args([BUILD, env!("CARGO"), "install", "cargo-deny", "--quiet", "--locked", "--no-default-features"]);
    let status = command.args(["--version", VERSION, "--root"]).arg(&folder).status().context("run cargo")?;
    ensure!(status.success(), "cargo-deny does not build ({status})");
    Ok(())
}
