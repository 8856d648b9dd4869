//! spegel's own commands: `cargo xtask build`, `test`, `demo`, `bench`, `chart`, `image`, `dist`,
//! `cluster-test`, `hosts-test`, `docs`, `metrics-docs`, `audit`, `bench-cluster`, `storm`, `ebpf`, `tidy`.

mod audit;
mod bench;
mod bench_cluster;
mod build;
mod chart;
mod cluster;
mod demo;
mod dist;
mod docs;
mod ebpf;
mod faults;
mod helm;
mod hosts;
mod image;
mod protoc;
mod soak;
mod storm;
mod suites;
mod test;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Build, test and show spegel.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build spegel and say where it lies
    Build(build::Build),
    /// Install what tests need, then check format, lints and the repository's rules, and run every test
    Test(test::Test),
    /// Measure the whole process
    Bench(bench::Bench),
    /// What benches start as processes of their own
    #[command(hide = true)]
    BenchHelper(bench::Helper),
    /// Check the repository's own rules: who imports whom, file sizes, unsafe code, unfinished code
    Tidy,
    /// Three nodes on loopback, an image on the first: the others pull it through their mirrors
    Demo(demo::Demo),
    /// A containerd pulls while one thing after the other fails, and what becomes of it; needs root
    Faults(faults::Faults),
    /// Three containerds pull random images while faults come and go; needs root
    Soak(soak::Soak),
    /// Many nodes start at once what none has: a simulation of the daemon's own state machines
    Storm(storm::Storm),
    /// Write the chart's values.yaml and README from its schema
    Chart(chart::Chart),
    /// Make the container image from the static binary, without a container engine
    Image(image::Image),
    /// Build the kernel programs into the object that is committed beside their source
    Ebpf(ebpf::Ebpf),
    /// Install, upgrade and remove the chart in a real Kubernetes cluster on this machine
    ClusterTest(cluster::ClusterTest),
    /// Twelve plain hosts, installed from the Debian package, upgraded and removed; needs root
    HostsTest(hosts::HostsTest),
    /// Run the shell blocks of the README and of docs; needs root
    Docs(docs::Docs),
    /// Write docs/metrics.md from the code
    MetricsDocs,
    /// Check what we depend on: licences, sources, duplicates, known vulnerabilities
    Audit(audit::Audit),
    /// Time image pulls on all nodes of the cluster that kubectl points to, with any mirror or none
    BenchCluster(bench_cluster::BenchCluster),
    /// Make everything that a release consists of
    Dist(dist::Dist),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    match protoc::hand_over().and_then(|()| run(command)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command; false if what it checked is not in order, which it has said then.
fn run(command: Command) -> Result<bool> {
    match command {
        Command::Build(build) => build.run(),
        Command::Test(test) => test.run(),
        Command::Bench(bench) => bench.run(),
        Command::BenchHelper(helper) => helper.run(),
        Command::Tidy => tidy::run(),
        Command::Demo(demo) => demo.run(),
        Command::Faults(faults) => faults.run(),
        Command::Soak(soak) => soak.run(),
        Command::Storm(storm) => storm.run(),
        Command::Chart(chart) => chart.run(root()),
        Command::Image(image) => image.run(root()),
        Command::Ebpf(ebpf) => ebpf.run(root()),
        Command::ClusterTest(test) => test.run(root()),
        Command::HostsTest(test) => test.run(),
        Command::Docs(docs) => docs.run(),
        Command::MetricsDocs => docs::write_metrics(),
        Command::Audit(audit) => audit.run(),
        Command::BenchCluster(bench) => bench.run(),
        Command::Dist(dist) => dist.run(root()),
    }
}

/// The repository's top folder.
fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// Writes figures for `--json`.
fn write_json(file: Option<&PathBuf>, value: &serde_json::Value) -> Result<()> {
    if let Some(file) = file {
        std::fs::write(file, serde_json::to_vec_pretty(value)?)?;
    }
    Ok(())
}
