//! The real Helm, for tests of the chart.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use spegel_benches::daemon::{find_program, output};

/// The version that is built where there is none in `PATH`.
const VERSION: &str = "3.22.0";

/// Where it lies.
///
/// # Errors
/// What to do to have one.
pub(crate) fn find() -> Result<PathBuf> {
    let built = built().filter(|file| file.is_file());
    built
        .or_else(|| find_program("helm"))
        .context("there is no helm in PATH: `cargo xtask chart --build-helm` builds one with Go")
}

/// Builds it with Go, once.
///
/// # Errors
/// There is no Go, or no module proxy.
pub(crate) fn build() -> Result<PathBuf> {
    if let Ok(found) = find() {
        return Ok(found);
    }
    let file = built().context("HOME is not set")?;
    let go = find_program("go").context("building Helm needs Go in PATH or /usr/local/go")?;
    let module = format!("helm.sh/helm/v3/cmd/helm@v{VERSION}");
    output(Command::new(go).args(["install", &module]).env("GOBIN", file.parent().unwrap_or(&file)))?;
    Ok(file)
}

/// A major version's Helm, built with Go where it was not before.
///
/// # Errors
/// There is no Go, or no module proxy.
pub(crate) fn helm(major: u8) -> Result<PathBuf> {
    let version = if major == 3 { VERSION } else { "4.3.1" };
    let file = PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?)
        .join(format!(".cache/spegel-tests/helm-{version}/helm"));
    if !file.is_file() {
        let go = find_program("go").context("building Helm needs Go in PATH or /usr/local/go")?;
        let module = format!("helm.sh/helm/v{major}/cmd/helm@v{version}");
        output(Command::new(go).args(["install", &module]).env("GOBIN", file.parent().unwrap_or(&file)))?;
    }
    Ok(file)
}

fn built() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os("HOME")?).join(format!(".cache/spegel-tests/helm-{VERSION}/helm")))
}
