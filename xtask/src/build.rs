//! `cargo xtask build`.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// `release` is what is shipped; `fast` builds in a fraction of the time and is nearly as fast
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
    /// Build what is shipped: a release binary that needs nothing but the kernel
    #[arg(long = "static", conflicts_with = "profile")]
    is_static: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Profile {
    Fast,
    Release,
}

impl Build {
    pub(crate) fn run(&self) -> Result<bool> {
        let start = Instant::now();
        let program = match self.profile {
            _ if self.is_static => static_spegel()?,
            Profile::Fast => spegel("fast")?,
            Profile::Release => spegel("release")?,
        };
        let size = std::fs::metadata(&program)?.len();
        let mib = size as f64 / f64::from(1 << 20);
        println!("{}: {mib:.1} MiB, built in {:.0} s", program.display(), start.elapsed().as_secs_f64());
        Ok(true)
    }
}

/// Builds spegel with a profile of the workspace and returns where the program lies.
///
/// # Errors
/// The build fails; cargo has said why.
pub(crate) fn spegel(profile: &str) -> Result<PathBuf> {
    let root = crate::root();
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root).args(["build", "--package", "spegel", "--profile", profile]);
    if !command.status().context("run cargo")?.success() {
        bail!("spegel does not build");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder));
    Ok(target.join(profile).join("spegel"))
}

/// Builds what is shipped: a release binary for this machine's architecture that needs nothing but the kernel, with no path of
/// this machine in it, and returns where it lies.
///
/// # Errors
/// The build fails; cargo has said why.
pub(crate) fn static_spegel() -> Result<PathBuf> {
    let root = crate::root();
    let triple = if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let flags = format!(
        "-C target-feature=+crt-static --remap-path-prefix={}=/cargo --remap-path-prefix={}=/spegel",
        cargo_home.display(),
        root.display()
    );
    let mut command = Command::new(env!("CARGO"));
    // Without an explicit target the flags would reach procedural macros, which cannot be static.
    command.current_dir(root).args(["build", "--locked", "--package", "spegel", "--release", "--target", triple]);
    if !command.env("RUSTFLAGS", flags).status().context("run cargo")?.success() {
        bail!("spegel does not build");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder));
    Ok(target.join(triple).join("release/spegel"))
}
