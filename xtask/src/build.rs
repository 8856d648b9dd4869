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
