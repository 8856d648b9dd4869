//! The chart's objects before a real API server, without creating them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;
use spegel_benches::daemon::output;

use super::Stage;
use super::machine::Machine;
use super::release::Release;

/// Each value's case, as the chart's snapshots have them.
const CASES: &str = include_str!("../chart/cases.json");

/// Kinds whose definitions operators bring along, and which a plain API server does not know.
const FOREIGN: [&str; 4] = ["ServiceMonitor", "PrometheusRule", "VerticalPodAutoscaler", "GrafanaDashboard"];

/// Namespaces that a case may name, made for the time of the scenario: a dry run needs them.
const NAMESPACES: [&str; 2] = ["objects", "elsewhere"];

/// The API server takes the chart's objects, by default and with each value changed.
pub(super) fn accepted(stage: &mut Stage<'_>) -> Result<()> {
    let (machine, helm) = (stage.machine, stage.helm);
    let cases: BTreeMap<String, Value> = serde_json::from_str(CASES)?;
    for namespace in NAMESPACES {
        machine.kubectl(&["create", "namespace", namespace])?;
    }
    machine.kubectl(&["create", "priorityclass", "high", "--value", "1000"])?;
    let taken = stage.step("the API server takes the chart's objects, by default and with each value changed", || {
        let mut taken = take(helm, machine, &[]).context("by default")?;
        for (path, case) in &cases {
            let with = case["with"].as_object().into_iter().flatten();
            let sets = with.chain([(path, &case["value"])]).map(|(path, value)| format!("{path}={value}"));
            taken += take(helm, machine, &sets.collect::<Vec<_>>()).with_context(|| path.clone())?;
        }
        Ok(((), format!("{taken} objects in {} cases", cases.len() + 1)))
    });
    machine.kubectl(&["delete", "namespace", "--wait", NAMESPACES[0], NAMESPACES[1]])?;
    machine.kubectl(&["delete", "priorityclass", "high"])?;
    taken
}

/// Has the API server check what the chart makes of some values, and returns how many objects that were.
fn take(helm: &Path, machine: &Machine, sets: &[String]) -> Result<usize> {
    let mut command = machine.client(helm);
    command.args(["template", "spegel"]).arg(Release::chart()).args(["--namespace", NAMESPACES[0]]);
    command.args(["--kube-version", "1.34.0"]);
    for set in sets {
        command.args(["--set-json", set]);
    }
    let text = output(&mut command)?;
    let objects: Vec<&str> =
        text.split("\n---\n").filter(|object| kind(object).is_some_and(|kind| !FOREIGN.contains(&kind))).collect();
    // A pod is refused while its account is not there, even in a dry run.
    let accounts: Vec<&str> = objects.iter().copied().filter(|object| kind(object) == Some("ServiceAccount")).collect();
    machine.feed(&["apply", "--filename", "-"], &accounts.join("\n---\n"))?;
    machine.feed(&["apply", "--dry-run=server", "--validate=strict", "--filename", "-"], &objects.join("\n---\n"))?;
    Ok(objects.len())
}

fn kind(object: &str) -> Option<&str> {
    object.lines().find_map(|line| line.strip_prefix("kind: "))
}
