//! `cargo xtask test`.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use spegel_benches::containerd::{self, Version};
use spegel_benches::daemon::{find_program, output};
use spegel_benches::gopeer;

use crate::ebpf::Checked;
use crate::helm::Version as Helm;
use crate::suites::{Counts, End, Outcome, Suite, report};

/// The Debian packages of the end-to-end tests.
const PACKAGES: [&str; 11] = [
    "containerd",
    "runc",
    "docker-registry",
    "iproute2",
    "util-linux",
    "procps",
    "strace",
    "systemd",
    "prometheus",
    "chromium",
    "chromium-driver",
];

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Leave out the end-to-end tests, and install nothing
    #[arg(long)]
    quick: bool,
    /// Write the table of suites there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl Test {
    pub(crate) fn run(&self) -> Result<bool> {
        let mut outcomes = Vec::new();
        if !self.quick {
            install();
        }
        for suite in suites(self.quick) {
            outcomes.push(suite.run()?);
            if suite.name == "lints" {
                outcomes.push(tidy()?);
                outcomes.extend((!self.quick).then(object));
            }
        }
        let (text, value, good) = report(&outcomes);
        crate::write_json(self.json.as_ref(), &value)?;
        println!("{text}");
        Ok(good)
    }
}

fn suites(quick: bool) -> Vec<Suite> {
    let minutes = |n: u64| Duration::from_secs(60 * n);
    let cargo = |name, limit, arguments: &str| Suite {
        name,
        limit,
        command: std::iter::once(env!("CARGO")).chain(arguments.split(' ')).map(str::to_owned).collect(),
        environment: Vec::new(),
    };
    let mut suites = vec![
        cargo("format", minutes(1), "fmt --all --check"),
        cargo("lints", minutes(10), "clippy --workspace --all-targets -- -D warnings"),
        // --show-output: the reasons of tests that could not run.
        cargo("tests", minutes(16), "test --workspace --no-fail-fast -- --skip e2e:: --show-output"),
    ];
    if !quick {
        suites.push(cargo("end to end", minutes(15), "test -p spegel --test it -- e2e:: --test-threads=1 --nocapture"));
    }
    if !quick {
        // The debug binary that the tests before have built.
        suites.push(cargo("hosts", minutes(8), "run --quiet -p xtask -- hosts-test --binary target/debug/spegel"));
        suites.push(cargo("pages", minutes(3), "run --quiet -p xtask -- docs --binary target/debug/spegel"));
    }
    suites.push(cargo("audit", minutes(3), "run --quiet -p xtask -- audit"));
    let mut documentation = cargo("docs", minutes(4), "doc --workspace --no-deps");
    documentation.environment.push(("RUSTDOCFLAGS", "-D warnings"));
    suites.push(documentation);
    suites
}

fn tidy() -> Result<Outcome> {
    println!("\n=== tidy");
    let start = Instant::now();
    let end = if crate::tidy::run()? { End::Passed } else { End::Failed };
    Ok(Outcome { name: "tidy", end, time: start.elapsed(), counts: Counts::default() })
}

/// Whether the kernel programs' object is its source's own; where there is no compiler for them, that is said.
fn object() -> Outcome {
    println!("\n=== ebpf object");
    let start = Instant::now();
    let (end, skipped) = match crate::ebpf::toolchain() {
        Err(reason) => {
            println!("skipped: the kernel programs' compiler is not there: {reason:#}");
            (End::Passed, 1)
        }
        Ok(toolchain) => match crate::ebpf::check(crate::root(), &toolchain) {
            Ok(Checked::Same) => (End::Passed, 0),
            Ok(Checked::OtherCompiler) => (End::Passed, 1),
            Ok(Checked::Different) => (End::Failed, 0),
            Err(error) => {
                println!("{error:#}");
                (End::Failed, 0)
            }
        },
    };
    Outcome { name: "object", end, time: start.elapsed(), counts: Counts { skipped, ..Counts::default() } }
}

/// Installs what is missing; what cannot be installed is said, and the tests that need it say so again when they are skipped.
fn install() {
    let missing: Vec<&str> = PACKAGES.into_iter().filter(|package| !installed(package)).collect();
    if !missing.is_empty() {
        let said = match install_packages(&missing) {
            Ok(()) => format!("installed: {}", missing.join(" ")),
            Err(reason) => format!("not installed: {} ({reason:#})", missing.join(" ")),
        };
        println!("{said}");
    }
    if crate::helm::find(Helm::V3).is_err() {
        println!("building Helm with Go, once");
        match crate::helm::helm(Helm::V3) {
            Ok(_) => println!("built Helm"),
            Err(reason) => println!("Helm is not built: {reason:#}"),
        }
    }
    if Version::V2_2.find().is_err() {
        println!("building containerd 2.2 with Go, once");
        match containerd::build() {
            Ok(_) => println!("built containerd 2.2"),
            Err(reason) => println!("containerd 2.2 is not built: {reason:#}"),
        }
    }
    if crate::audit::find().is_none() {
        println!("building cargo-deny with cargo, once");
        match crate::audit::install() {
            Ok(()) => println!("built cargo-deny"),
            Err(reason) => println!("cargo-deny is not built: {reason:#}"),
        }
    }
    if gopeer::find().is_err() {
        println!("building the reference peer on go-libp2p, once");
        match gopeer::build() {
            Ok(_) => println!("built the reference peer"),
            Err(reason) => println!("the reference peer is not built: {reason:#}"),
        }
    }
}

fn installed(package: &str) -> bool {
    output(Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]))
        .is_ok_and(|status| status == "installed")
}

/// Installs Debian packages.
///
/// # Errors
/// What apt-get says, or it is not there.
pub(crate) fn install_packages(packages: &[&str]) -> Result<()> {
    anyhow::ensure!(find_program("apt-get").is_some(), "this machine has no apt-get");
    let identity = output(Command::new("id").arg("-u"))?;
    anyhow::ensure!(identity.trim() == "0", "that needs root");
    // The lock is waited for: another installation may be running.
    let apt = || {
        let mut command = Command::new("timeout");
        command
            .args(["300", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"])
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    output(apt().arg("update"))?;
    output(apt().args(["install", "--yes", "--no-install-recommends"]).args(packages)).map(|_| ())
}
