//! `cargo xtask faults`: what each fault does to a pull.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::json;
use spegel_benches::containerd::{Options, Version};
use spegel_benches::faults::{Outcome, Row, Scene, Setup, rows};

#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// Only rows whose group or name contains one of these
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "TEXT")]
    rows: Vec<String>,
    /// Which containerd pulls; all if not told
    #[arg(long, value_enum)]
    containerd: Vec<Kind>,
    /// The size of each of the three layers, in MiB
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    layer: u64,
    /// Without a second peer that is well
    #[arg(long)]
    alone: bool,
    /// What the upstream registry's link carries, in Mbit/s
    #[arg(long, default_value_t = 200, value_name = "NUMBER")]
    upstream: u32,
    /// Arguments for every spegel
    #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "ARGUMENT")]
    with: Vec<String>,
    /// Print log lines and metrics of each row
    #[arg(long)]
    verbose: bool,
    /// Write the table into benches/results, with date, kernel and method
    #[arg(long)]
    record: bool,
    /// Write the outcomes there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take the outcomes from such files instead of running anything; a row of a later file replaces that of an earlier one
    #[arg(long, num_args = 1.., value_name = "FILE")]
    from: Vec<PathBuf>,
    /// Run this program instead of building spegel
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    #[value(name = "1.6")]
    V1_6,
    #[value(name = "2.2")]
    V2_2,
    #[value(name = "2.2-parallel")]
    V2_2Parallel,
}

/// The outcomes of one containerd.
#[derive(Deserialize, Serialize)]
struct Run {
    containerd: String,
    baseline: f64,
    outcomes: Vec<Outcome>,
}

// === impl Faults ===

impl Faults {
    pub(crate) fn run(&self) -> Result<bool> {
        let runs = if self.from.is_empty() { self.run_all()? } else { read(&self.from)? };
        let good = runs.iter().all(|run| run.outcomes.iter().all(|outcome| verdict(outcome, run.baseline).is_ok()));
        crate::write_json(self.json.as_ref(), &json!(runs))?;
        if self.record {
            let company = if self.alone { "The peer that fails is the only one." } else { "A second peer is well." };
            let method = format!(
                "A containerd pulls an image of three layers of {} MiB through its mirror, each node in a network namespace, upstream at \
                 {} Mbit/s. {company} For each containerd: what became of the pull, its seconds, and the MiB of layers from the failing peer, \
                 the good peer and upstream; a body counts for the peer that began it. \"ok\": it succeeded, at most 7 s slower than without a mirror (5 s until a stall is noticed, and \
                 2 s); where the bytes are wrong, the next pull did.",
                self.layer, self.upstream
            );
            crate::bench::record("faults", &method, &table(&runs), "cargo xtask faults --record")?;
        }
        Ok(good)
    }

    fn run_all(&self) -> Result<Vec<Run>> {
        let program = match &self.binary {
            Some(program) => std::path::absolute(program)?,
            None => crate::build::spegel("fast")?,
        };
        let chosen: Vec<Row> = rows().into_iter().filter(|row| self.wants(row)).collect();
        let all = [Kind::V1_6, Kind::V2_2, Kind::V2_2Parallel];
        let kinds = if self.containerd.is_empty() { &all[..] } else { &self.containerd };
        kinds.iter().map(|kind| self.run_kind(&program, *kind, &chosen)).collect()
    }

    fn wants(&self, row: &Row) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|text| row.group == text || row.name.contains(text.as_str()))
    }

    fn run_kind(&self, program: &std::path::Path, kind: Kind, chosen: &[Row]) -> Result<Run> {
        let layer = self.layer << 20;
        let buffer = (kind == Kind::V2_2Parallel).then(|| u32::try_from(layer / 8).unwrap_or(u32::MAX));
        let setup = Setup {
            program: program.to_path_buf(),
            version: if kind == Kind::V1_6 { Version::V1_6 } else { Version::V2_2 },
            options: Options { layer_fetch_buffer: buffer, ..Options::default() },
            layer,
            company: !self.alone,
            upstream_mbit: self.upstream,
            arguments: self.with.clone(),
        };
        let mut scene = Scene::start(&setup)?;
        let baseline = scene.baseline()?;
        let name = kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        println!("\ncontainerd {name}, 3 layers of {} MiB, no mirror: {baseline:.1} s", self.layer);
        println!(
            "{:<11} {:<26} {:<8} {:>6} {:>5} {:>5} {:>5}  log, descriptors",
            "at", "fault", "pull", "s", "bad", "good", "up"
        );
        let mut outcomes = Vec::new();
        for row in chosen {
            if let Some(reason) = row.lacks() {
                println!("{:<11} {:<26} skipped: {reason}", row.group, row.name);
                continue;
            }
            let outcome = match scene.run(row) {
                Ok(outcome) => outcome,
                Err(error) => {
                    // What it has left behind is not for the next row.
                    drop(scene);
                    scene = Scene::start(&setup)?;
                    Outcome::broken(row, &error)
                }
            };
            self.print(&outcome, baseline);
            outcomes.push(outcome);
        }
        Ok(Run { containerd: name, baseline, outcomes })
    }

    fn print(&self, outcome: &Outcome, baseline: f64) {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let from = |name: &str| mib(outcome.mirror_bytes.get(name).copied().unwrap_or_default());
        let said = match verdict(outcome, baseline) {
            Ok(()) => "ok".to_owned(),
            Err(word) => word.to_owned(),
        };
        let (before, after) = outcome.descriptors;
        println!(
            "{:<11} {:<26} {said:<8} {:>6.1} {:>5} {:>5} {:>5}  {} lines, {before} to {after}",
            outcome.group,
            outcome.name,
            outcome.seconds,
            from("bad peer"),
            from("good peer"),
            mib(outcome.upstream_bytes),
            outcome.log.len()
        );
        outcome.notes.iter().chain(&outcome.unhealed).for_each(|note| println!("    {note}"));
        if let Some(error) = &outcome.failed {
            let error = error.lines().last().unwrap_or_default();
            let again = if outcome.failed_again.is_none() { "succeeded" } else { "failed too" };
            println!("    {error}\n    pull {} {again}", outcome.pulls);
        }
        if self.verbose {
            outcome.log.iter().for_each(|line| println!("    {line}"));
            outcome.metrics.iter().for_each(|(name, value)| println!("    {name} {value}"));
        }
    }
}

/// A line for each row, with two fields for each containerd.
fn table(runs: &[Run]) -> String {
    let mut text = "| at | fault |".to_owned();
    for run in runs {
        text.push_str(&format!(" {} (no mirror {:.1} s) | bad/good/upstream |", run.containerd, run.baseline));
    }
    text.push_str(&format!("\n|---|---|{}\n", "---|---|".repeat(runs.len())));
    let rows = runs.first().map(|run| run.outcomes.len()).unwrap_or_default();
    let mut notes = String::new();
    for row in 0..rows {
        for (number, run) in runs.iter().enumerate() {
            let Some(outcome) = run.outcomes.get(row) else { continue };
            if number == 0 {
                text.push_str(&format!("| {} | {} |", outcome.group, outcome.name));
            }
            let said = verdict(outcome, run.baseline).err().unwrap_or("ok");
            if !outcome.notes.is_empty() {
                notes.push_str(&format!("- {}, {}: {}.\n", outcome.name, run.containerd, outcome.notes.join("; ")));
            }
            let from = |name: &str| outcome.mirror_bytes.get(name).copied().unwrap_or_default().div_ceil(1 << 20);
            text.push_str(&format!(
                " {said}, {:.1} s | {}/{}/{} |",
                outcome.seconds,
                from("bad peer"),
                from("good peer"),
                outcome.upstream_bytes.div_ceil(1 << 20)
            ));
        }
        text.push('\n');
    }
    text + "\n" + &notes
}

/// The outcomes of files that `--json` has written.
fn read(files: &[PathBuf]) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for file in files {
        let text = std::fs::read(file).with_context(|| file.display().to_string())?;
        for run in serde_json::from_slice::<Vec<Run>>(&text)? {
            let Some(known) = runs.iter_mut().find(|known| known.containerd == run.containerd) else {
                runs.push(run);
                continue;
            };
            for outcome in run.outcomes {
                match known.outcomes.iter_mut().find(|old| (&old.group, &old.name) == (&outcome.group, &outcome.name)) {
                    Some(old) => *old = outcome,
                    None => known.outcomes.push(outcome),
                }
            }
        }
    }
    Ok(runs)
}

/// Whether the outcome is what the mirror promises.
fn verdict(outcome: &Outcome, baseline: f64) -> Result<(), &'static str> {
    // A file that gets shorter while its pages are on their way has zeros at its new end: wrong bytes too.
    let may_fail = ["wrong bytes", "content truncated"].contains(&outcome.name.as_str());
    match (&outcome.failed, &outcome.failed_again) {
        (Some(_), again) if !may_fail || again.is_some() => Err("FAILED"),
        (None, _) if !outcome.met && outcome.group != "none" => Err("NOT MET"),
        _ if outcome.unhealed.is_some() => Err("NOT HEALED"),
        // A stall is noticed after five seconds, and going elsewhere may take two.
        _ if outcome.seconds > baseline + outcome.link_seconds + 7.0 => Err("SLOW"),
        _ => Ok(()),
    }
}
