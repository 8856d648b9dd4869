//! The router under simulated time: its own test runs the daemon's code and prints figures, which are made a table and a plot here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::io::{BufRead as _, BufReader};
use std::num::ParseIntError;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Figures;

const METHOD: &str = "Simulated: the daemon's searches, table, records, advertiser and member protocol, with 0.5 ms links, a cold \
    connection of three round trips and 1.5 ms, and requests to the dead unanswered for a second; kad's table and the swarm are \
    replaced by what they come to. Each node has 2,000 keys of a catalogue in which each key is on 10 nodes, each held by the \
    20 nearest (half not members: 200). Deaths are without a word: those connected notice after 10.5 to 15.5 s. 600 lookups a row, of any key from any node. \
    Bytes include TCP/IP, noise, yamux, streams and new connections by estimate; memory is by the size of what is held. Real: swarms \
    in one process on loopback, of which those that die close their connections, and where a node answers itself what it holds.";

/// The tests that print figures.
const TESTS: [&str; 6] = [
    "simulation::bench::bench_10_nodes",
    "simulation::bench::bench_30_nodes",
    "simulation::bench::bench_100_nodes",
    "simulation::bench::bench_1000_nodes",
    "members::tests::bench_members",
    "simulation::swarms::bench_swarms",
];

/// The figures at each size, in the order in which they were first printed.
#[derive(Debug, Default)]
struct Growth {
    rows: Vec<Row>,
    seeds: Vec<String>,
}

/// One figure at each size.
#[derive(Debug, Default)]
struct Row {
    what: String,
    values: BTreeMap<Size, f64>,
    /// What it was to be.
    aim: Option<String>,
    /// Where it was not.
    missed: BTreeSet<Size>,
}

/// How many nodes, and whether they are real.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Size {
    real: bool,
    nodes: u32,
}

/// Runs the simulation; with `plot`, its growth is written into benches/results as SVG. Whatever happens on the way, the figures that it
/// printed are given back, and with them whether all aims were met.
///
/// # Errors
/// It does not compile, cannot be run, or printed nothing.
pub(super) fn run(plot: bool) -> Result<(Figures, bool)> {
    let mut growth = Growth::default();
    let program = test_program()?;
    let mut met = true;
    for test in TESTS {
        let mut child = alone(&program)
            .args(["--ignored", "--nocapture", "--exact", &format!("router::p2p::{test}")])
            .current_dir(crate::root())
            // A thousand nodes are gigabytes, read all over the place: with large pages that takes a tenth less time.
            .env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
            .stdout(Stdio::piped())
            .spawn()
            .context("run the simulation")?;
        let output = child.stdout.take().context("the simulation has no output")?;
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            growth.read(&line);
        }
        if !child.wait()?.success() {
            println!("{test} failed");
            met = false;
        }
    }
    ensure!(!growth.rows.is_empty(), "the simulation printed no figures");
    if plot {
        let file = crate::root().join("benches/results/router.svg");
        std::fs::write(&file, growth.svg())?;
        println!("written to {}", file.display());
    }
    for Row { what, aim, missed, .. } in growth.rows.iter().filter(|row| !row.missed.is_empty()) {
        let sizes: Vec<String> = missed.iter().map(Size::to_string).collect();
        println!("missed at {} nodes: {what} (aim {})", sizes.join(", "), aim.as_deref().unwrap_or_default());
        met = false;
    }
    Ok((growth.figures(), met))
}

/// Builds the library's tests, optimised, and says where they are.
fn test_program() -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args([
            "test",
            "-p",
            "spegel",
            "--lib",
            "--profile",
            "fast",
            "--no-run",
            "--message-format",
            "json-render-diagnostics",
        ])
        .current_dir(crate::root())
        .stderr(Stdio::inherit())
        .output()
        .context("run cargo test")?;
    ensure!(output.status.success(), "the simulation does not compile");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut messages = text.lines().rev().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let program = messages.find_map(|message| message["executable"].as_str().map(PathBuf::from));
    program.context("cargo names no test program")
}

/// In a network namespace of its own, where that can be had: nothing else is counted there.
fn alone(program: &Path) -> Command {
    let can = Command::new("unshare").args(["--net", "true"]).status().is_ok_and(|status| status.success());
    if !can {
        println!("no network namespace can be made: bytes on the wire include those of other processes on loopback");
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", r#"ip link set lo up && exec "$0" "$@""#]).arg(program);
    command
}

// === impl Size ===

impl FromStr for Size {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let (nodes, real) = text.strip_suffix(" real").map_or((text, false), |nodes| (nodes, true));
        Ok(Self { real, nodes: nodes.parse()? })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.nodes, if self.real { " real" } else { "" })
    }
}

// === impl Row ===

impl Row {
    /// A figure that is not what it was to be says so.
    fn field(&self, size: Size) -> String {
        match self.values.get(&size) {
            None => "–".to_owned(),
            Some(value) if self.missed.contains(&size) => format!("**{value}** (missed)"),
            Some(value) => value.to_string(),
        }
    }
}

// === impl Growth ===

impl Growth {
    fn read(&mut self, line: &str) {
        if let Some(seed) = line.strip_prefix("seed ")
            && !self.seeds.iter().any(|known| known == seed)
        {
            self.seeds.push(seed.to_owned());
        }
        let Some(figure) = line.strip_prefix("figure ") else { return };
        let mut fields = figure.split('|');
        let (Some(size), Some(what), Some(value)) = (fields.next(), fields.next(), fields.next()) else { return };
        let (Ok(size), Ok(value)) = (size.parse(), value.parse()) else { return };
        let row = match self.rows.iter_mut().find(|row| row.what == what) {
            Some(row) => row,
            None => {
                self.rows.push(Row { what: what.to_owned(), ..Row::default() });
                let Some(row) = self.rows.last_mut() else { return };
                row
            }
        };
        row.values.insert(size, value);
        if let Some(aim) = fields.next() {
            row.aim = Some(aim.to_owned());
        }
        if fields.next() == Some("missed") {
            row.missed.insert(size);
        }
    }

    fn figures(&self) -> Figures {
        let mut sizes: Vec<Size> = self.rows.iter().flat_map(|row| row.values.keys().copied()).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let heads = ["nodes".to_owned(), "aim".to_owned()].into_iter();
        let columns = heads.chain(sizes.iter().map(Size::to_string)).collect();
        let rows = self.rows.iter().map(|row| {
            let first = [row.what.clone(), row.aim.clone().unwrap_or_else(|| "–".to_owned())];
            first.into_iter().chain(sizes.iter().map(|size| row.field(*size))).collect()
        });
        Figures {
            name: "router",
            method: format!("{METHOD} Seeds: {}.", self.seeds.join(", ")),
            columns,
            rows: rows.collect(),
            json: json!(
                self.rows
                    .iter()
                    .map(|Row { what, values, aim, missed }| {
                        let values: BTreeMap<String, f64> =
                            values.iter().map(|(size, value)| (size.to_string(), *value)).collect();
                        let missed: Vec<String> = missed.iter().map(Size::to_string).collect();
                        json!({ "what": what, "by_nodes": values, "aim": aim, "missed": missed })
                    })
                    .collect::<Vec<_>>()
            ),
        }
    }

    /// A small chart for each figure: the number of nodes by its logarithm, the figure from nothing. Real swarms are a square.
    fn svg(&self) -> String {
        const WIDTH: f64 = 420.0;
        const HEIGHT: f64 = 150.0;
        let simulated = |row: &&Row| row.values.keys().filter(|size| !size.real).count() > 1;
        let grown: Vec<_> = self.rows.iter().filter(simulated).collect();
        let lines = grown.len().div_ceil(2);
        let mut svg = format!(
            "<svg xmlns='http://www.w3.org/2000/svg' width='{}' height='{}' font-family='sans-serif' font-size='10'>\n\
             <rect width='100%' height='100%' fill='white'/>\n",
            2.0 * WIDTH,
            lines as f64 * HEIGHT
        );
        for (place, Row { what, values, .. }) in grown.into_iter().enumerate() {
            let (left, top) = ((place % 2) as f64 * WIDTH, (place / 2) as f64 * HEIGHT);
            let most = values.values().copied().fold(f64::MIN_POSITIVE, f64::max);
            let at = |size: &Size, value: f64| {
                let x = left + 40.0 + (f64::from(size.nodes).log10() - 1.0) / 2.5 * (WIDTH - 80.0);
                (x, top + HEIGHT - 25.0 - value / most * (HEIGHT - 60.0))
            };
            let points: Vec<String> = values
                .iter()
                .filter(|(size, _)| !size.real)
                .map(|(size, value)| at(size, *value))
                .map(|(x, y)| format!("{x:.1},{y:.1}"))
                .collect();
            let text = what.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(svg, "<text x='{}' y='{}' font-weight='bold'>{text}</text>", left + 10.0, top + 15.0);
            let _ = writeln!(svg, "<polyline points='{}' fill='none' stroke='#0b62a4'/>", points.join(" "));
            for (size, value) in values {
                let (x, y) = at(size, *value);
                let _ = if size.real {
                    writeln!(svg, "<rect x='{:.1}' y='{:.1}' width='6' height='6' fill='#c0392b'/>", x - 3.0, y - 3.0)
                } else {
                    writeln!(svg, "<circle cx='{x:.1}' cy='{y:.1}' r='2.5' fill='#0b62a4'/>")
                };
                let _ = writeln!(svg, "<text x='{:.1}' y='{:.1}'>{value}</text>", x - 12.0, y - 6.0);
                let (x, y) = (x - 8.0, top + HEIGHT - if size.real { 0.0 } else { 10.0 });
                let _ = writeln!(svg, "<text x='{x:.1}' y='{y:.1}' fill='#666'>{size}</text>");
            }
        }
        svg + "</svg>\n"
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn figures_become_a_table_and_a_plot() {
        let mut growth = Growth::default();
        for line in [
            "seed 7",
            "noise",
            "figure 10|p99 (ms)|1.5|≤ 1.7|met",
            "figure 1000|p99 (ms)|2|≤ 1.7|missed",
            "figure 30 real|p99 (ms)|3",
            "figure 10|hot|1.2",
            "figure x|y|z",
        ] {
            growth.read(line);
        }
        let figures = growth.figures();
        assert_eq!(figures.columns, ["nodes", "aim", "10", "1000", "30 real"]);
        let missed = ["p99 (ms)", "≤ 1.7", "1.5", "**2** (missed)", "3"];
        assert_eq!(figures.rows, [missed, ["hot", "–", "1.2", "–", "–"]]);
        assert!(figures.method.ends_with("Seeds: 7."));
        let svg = growth.svg();
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (1, 2));
    }
}
