//! The real Helm, for tests of the chart.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use spegel_benches::daemon::{find_program, output};

/// Which Helm; each is one release, built from the module proxy, so that tests say the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// What `cargo xtask test` uses.
    V3,
    /// Not built by `cargo xtask test`: that takes minutes.
    V4,
}

// === impl Version ===

impl Version {
    fn number(self) -> &'static str {
        match self {
            Self::V3 => "3.22.0",
            Self::V4 => "4.3.1",
        }
    }

    fn major(self) -> char {
        match self {
            Self::V3 => '3',
            Self::V4 => '4',
        }
    }

    fn how_to_build(self) -> &'static str {
        match self {
            Self::V3 => "`cargo xtask chart --build-helm`",
            Self::V4 => "`cargo xtask chart --build-helm4`",
        }
    }

    fn built(self) -> Option<PathBuf> {
        Some(PathBuf::from(std::env::var_os("HOME")?).join(format!(".cache/spegel-tests/helm-{}/helm", self.number())))
    }
}

/// Where it lies: built before, or in `PATH` with the same major version.
///
/// # Errors
/// What to do to have one.
pub(crate) fn find(version: Version) -> Result<PathBuf> {
    let built = version.built().filter(|file| file.is_file());
    let in_path = || find_program("helm").filter(|helm| major_of(helm) == Some(version.major()));
    built.or_else(in_path).with_context(|| {
        format!("there is no Helm {} in PATH: {} builds one with Go", version.major(), version.how_to_build())
    })
}

/// `helm version --short` prints `v3.22.0+g...`.
fn major_of(helm: &Path) -> Option<char> {
    output(Command::new(helm).args(["version", "--short"])).ok()?.strip_prefix('v')?.chars().next()
}

/// Where it lies, built with Go if there is none yet.
///
/// # Errors
/// There is no Go, or no module proxy.
pub(crate) fn helm(version: Version) -> Result<PathBuf> {
    if let Ok(found) = find(version) {
        return Ok(found);
    }
    let file = version.built().context("HOME is not set")?;
    let go = find_program("go").context("building Helm needs Go in PATH or /usr/local/go")?;
    let module = format!("helm.sh/helm/v{}/cmd/helm@v{}", version.major(), version.number());
    output(Command::new(go).args(["install", &module]).env("GOBIN", file.parent().unwrap_or(&file)))?;
    Ok(file)
}
