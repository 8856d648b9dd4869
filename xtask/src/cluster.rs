//! `cargo xtask cluster-test`: the chart in a real Kubernetes cluster, from install to uninstall, with the real Helm.

mod machine;
mod objects;
mod pods;
mod release;
mod scenarios;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use machine::Machine;
use release::{NEXT_TAG, REPOSITORY, Release, TAG};
use scenarios::{FIRST, SCENARIOS};

#[derive(Debug, Args)]
pub(crate) struct ClusterTest {
    /// The folder with the cluster's scripts
    #[arg(long, env = "SPEGEL_TEST_CLUSTER", value_name = "DIR")]
    cluster: Option<PathBuf>,
    /// A static binary to install [default: built for this machine]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// The major versions of Helm to test with
    #[arg(long, value_name = "MAJOR", num_args = 1.., default_values_t = [3, 4], value_parser = clap::value_parser!(u8).range(3..=4))]
    helm: Vec<u8>,
    /// Only scenarios whose names contain one of these
    #[arg(long, value_name = "NAME", num_args = 1..)]
    only: Vec<String>,
    /// Use a cluster that is running as it is, stop at the first failure, and leave the cluster running
    #[arg(long)]
    keep: bool,
    /// Write the figures there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table into benches/results, with date, kernel and method
    #[arg(long)]
    record: bool,
}

/// A step that was taken, what is to be told of it, and how long it took.
#[derive(Debug)]
struct Step {
    what: String,
    told: String,
    took: Duration,
}

/// What a scenario acts on, and the steps that it took so far.
struct Stage<'a> {
    machine: &'a Arc<Machine>,
    helm: &'a Path,
    steps: Vec<Step>,
}

/// A scenario's name with Helm's version, and how it went.
struct Outcome {
    name: String,
    steps: Vec<Step>,
    result: Result<()>,
}

const METHOD: &str = "Three nodes with real kubelets, containerds and kube-proxies in network namespaces, a real API server, the real Helm, \
                      and the static binary in the image that is shipped; times include the Helm command.";

// === impl ClusterTest ===

impl ClusterTest {
    pub(crate) fn run(&self, root: &Path) -> Result<bool> {
        let folder = self.cluster.clone().unwrap_or_else(|| root.join("../shared/cluster"));
        let machine = Arc::new(Machine::find(&folder)?);
        let helms = self.helms(&machine)?;
        let binary = self.binary.clone().map_or_else(crate::build::static_spegel, Ok)?;
        let scratch = tempfile::tempdir()?;
        let archive = scratch.path().join("spegel.tar");
        let name = format!("{REPOSITORY}:{TAG}");
        crate::image::write(&[binary], &name, &archive)?;
        let start = || -> Result<()> {
            machine.up()?;
            machine.import(&archive, &name, &format!("{REPOSITORY}:{NEXT_TAG}"))
        };
        if !self.keep {
            machine.down(None)?;
        }
        let outcomes = self.run_all(&machine, &helms, &start);
        if !self.keep {
            machine.down(None)?;
        }
        self.report(&outcomes?)
    }

    /// The Helms to test with, by major version.
    fn helms(&self, machine: &Machine) -> Result<Vec<(u8, PathBuf)>> {
        let find = |&major: &u8| {
            Ok((major, if major == 3 { machine.helm()? } else { crate::helm::helm(crate::helm::Version::V4)? }))
        };
        self.helm.iter().map(find).collect()
    }

    fn run_all(
        &self,
        machine: &Arc<Machine>,
        helms: &[(u8, PathBuf)],
        start: &dyn Fn() -> Result<()>,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        start().context("start the cluster")?;
        for (round, (major, helm)) in helms.iter().enumerate() {
            let once = (round == 0).then_some(FIRST);
            for (name, scenario) in once.into_iter().chain(SCENARIOS) {
                if !self.only.is_empty() && !self.only.iter().any(|part| name.contains(part)) {
                    continue;
                }
                let name = format!("{name} (Helm {major})");
                println!("\n{name}");
                let mut stage = Stage { machine, helm, steps: Vec::new() };
                let result = scenario(&mut stage);
                let failed = result.is_err();
                if let Err(error) = &result {
                    println!("  FAILED: {error:#}");
                }
                outcomes.push(Outcome { name, steps: stage.steps, result });
                if failed && self.keep {
                    return Ok(outcomes);
                }
                if failed {
                    // What a failed scenario left would make the next one fail.
                    machine.down(None)?;
                    start().context("start the cluster anew")?;
                }
            }
        }
        ensure!(!outcomes.is_empty(), "no scenario has such a name");
        Ok(outcomes)
    }

    fn report(&self, outcomes: &[Outcome]) -> Result<bool> {
        let table = table(outcomes);
        println!("\n{table}");
        crate::write_json(self.json.as_ref(), &Value::from_iter(outcomes.iter().map(Outcome::to_json)))?;
        if self.record {
            crate::bench::record("cluster", METHOD, &table, "cargo xtask cluster-test --record")?;
        }
        Ok(outcomes.iter().all(|outcome| outcome.result.is_ok()))
    }
}

// === impl Stage ===

impl<'a> Stage<'a> {
    /// Takes a step, prints and keeps what it tells.
    fn step<T>(&mut self, what: &str, step: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        let start = Instant::now();
        let (value, told) = step().with_context(|| what.to_owned())?;
        let step = Step { what: what.to_owned(), told, took: start.elapsed() };
        println!("  {:6.1} s  {}{}", step.took.as_secs_f64(), step.what, comma(&step.told));
        self.steps.push(step);
        Ok(value)
    }

    fn release(&self, name: &'a str, namespace: &'a str) -> Release<'a> {
        Release { machine: self.machine, helm: self.helm, name, namespace }
    }
}

// === impl Outcome ===

impl Outcome {
    fn to_json(&self) -> Value {
        let steps = self.steps.iter().map(|step| {
            json!({"step": step.what, "told": step.told, "seconds": (step.took.as_secs_f64() * 10.0).round() / 10.0})
        });
        let error = self.result.as_ref().err().map(|error| format!("{error:#}"));
        json!({"scenario": self.name, "error": error, "steps": Value::from_iter(steps)})
    }
}

fn comma(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

fn table(outcomes: &[Outcome]) -> String {
    let mut text = "| scenario | step | seconds | seen |\n|---|---|---|---|\n".to_owned();
    for Outcome { name, steps, result } in outcomes {
        for step in steps {
            let seconds = step.took.as_secs_f64();
            text.push_str(&format!("| {name} | {} | {seconds:.1} | {} |\n", step.what, step.told));
        }
        if let Err(error) = result {
            let error = format!("{error:#}").replace(['\n', '|'], " ");
            text.push_str(&format!("| {name} | **failed** | | {error} |\n"));
        }
    }
    text
}
