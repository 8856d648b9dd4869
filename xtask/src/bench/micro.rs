//! Small things by themselves: criterion's estimates as a table.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Figures;

const METHOD: &str = "Medians of criterion, on one core. `body`: a head and a body to a TCP socket on loopback, and their being \
    discarded on the other side (MSG_TRUNC), by the way that the body takes from the page cache. `request`: a GET of a manifest of \
    2 KiB, without the socket.";

/// Runs the benches on the second core.
///
/// # Errors
/// They do not compile, or fail.
pub(super) fn run() -> Result<Figures> {
    let target = crate::root().join("target");
    let output = target.join("criterion");
    // What an older run left is not told as this one's.
    if output.exists() {
        std::fs::remove_dir_all(&output)?;
    }
    let cargo = [env!("CARGO"), "bench", "-p", "spegel", "--bench", "micro", "--no-run"];
    let built = Command::new(cargo[0]).args(&cargo[1..]).current_dir(crate::root()).status()?;
    ensure!(built.success(), "the benches do not compile");
    let mut command = Command::new("taskset");
    command.args(["-c", "1", env!("CARGO"), "bench", "-p", "spegel", "--bench", "micro"]).args(["--", "--noplot"]);
    ensure!(command.current_dir(crate::root()).status()?.success(), "the benches failed");
    let mut found = BTreeMap::new();
    collect(&output, &mut found)?;
    ensure!(!found.is_empty(), "criterion has written no estimates");
    let rows = found.iter().map(|(name, ns)| vec![name.clone(), format!("{:.2} µs", ns / 1e3)]).collect();
    let told: Vec<Value> = found.iter().map(|(name, ns)| json!({"name": name, "nanoseconds": ns})).collect();
    Ok(Figures {
        name: "micro",
        method: METHOD.to_owned(),
        columns: ["what", "time"].map(str::to_owned).to_vec(),
        rows,
        json: Value::Array(told),
    })
}

/// The medians below a folder, in nanoseconds, by the benches' own names.
fn collect(folder: &Path, found: &mut BTreeMap<String, f64>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let (bench, estimates) = (path.join("benchmark.json"), path.join("estimates.json"));
        if bench.is_file() && estimates.is_file() {
            let read = |path: &Path| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
            let name = read(&bench)?["full_id"].as_str().context("a bench without a name")?.to_owned();
            let median = read(&estimates)?["median"]["point_estimate"].as_f64().context("no median")?;
            found.insert(name, median);
        } else if path.is_dir() {
            collect(&path, found)?;
        }
    }
    Ok(())
}
