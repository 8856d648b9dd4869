//! The router under simulated time: its own test runs the daemon's code and prints figures, which are made a table and a plot here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Figures;

const METHOD: &str = "Simulated: the daemon's walk, table, records, advertiser's plan and member protocol, with 0.5 ms links, a \
    cold connection of three round trips and 1.5 ms, and requests to the dead unanswered for a second. 600 lookups of 60 keys \
    with 10 providers each. Bytes include TCP/IP, noise, yamux, streams and new connections by estimate.";

/// The tests that print figures.
const TESTS: [&str; 2] = ["simulation::bench_router", "members::tests::bench_members"];

/// One figure at each size, in the order in which they were first printed.
#[derive(Debug, Default)]
struct Growth {
    rows: Vec<(String, BTreeMap<u32, f64>)>,
    seeds: Vec<String>,
}

/// Runs the simulation; with `plot`, its growth is written into benches/results as SVG.
///
/// # Errors
/// The simulation fails, or an aim that it asserts is missed.
pub(super) fn run(plot: bool) -> Result<Figures> {
    let mut growth = Growth::default();
    for test in TESTS {
        let output = Command::new(env!("CARGO"))
            .args(["test", "-p", "spegel", "--lib", "--profile", "fast", "--", "--ignored", "--nocapture", test])
            .current_dir(crate::root())
            .output()
            .context("run cargo test")?;
        let text = String::from_utf8_lossy(&output.stdout);
        print!("{text}");
        ensure!(output.status.success(), "the simulation failed:\n{}", String::from_utf8_lossy(&output.stderr));
        text.lines().for_each(|line| growth.read(line));
    }
    ensure!(!growth.rows.is_empty(), "the simulation printed no figures");
    if plot {
        let file = crate::root().join("benches/results/router.svg");
        std::fs::write(&file, growth.svg())?;
        println!("written to {}", file.display());
    }
    Ok(growth.figures())
}

// === impl Growth ===

impl Growth {
    fn read(&mut self, line: &str) {
        if let Some((_, seed)) = line.split_once("seed ") {
            let seed = seed.split([' ', ':']).next().unwrap_or_default().to_owned();
            if !self.seeds.contains(&seed) {
                self.seeds.push(seed);
            }
        }
        let Some(figure) = line.strip_prefix("figure ") else { return };
        let mut fields = figure.split('|');
        let (Some(size), Some(what), Some(value)) = (fields.next(), fields.next(), fields.next()) else { return };
        let (Ok(size), Ok(value)) = (size.parse(), value.parse()) else { return };
        match self.rows.iter_mut().find(|(name, _)| name == what) {
            Some((_, values)) => {
                values.insert(size, value);
            }
            None => self.rows.push((what.to_owned(), BTreeMap::from([(size, value)]))),
        }
    }

    fn figures(&self) -> Figures {
        let mut sizes: Vec<u32> = self.rows.iter().flat_map(|(_, values)| values.keys().copied()).collect();
        sizes.sort_unstable();
        sizes.dedup();
        let columns = std::iter::once("nodes".to_owned()).chain(sizes.iter().map(u32::to_string)).collect();
        let field = |value: Option<&f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value}"));
        let rows = self.rows.iter().map(|(what, values)| {
            std::iter::once(what.clone()).chain(sizes.iter().map(|size| field(values.get(size)))).collect()
        });
        Figures {
            name: "router",
            method: format!("{METHOD} Seeds: {}.", self.seeds.join(", ")),
            columns,
            rows: rows.collect(),
            json: json!(
                self.rows.iter().map(|(what, values)| json!({ "what": what, "by_nodes": values })).collect::<Vec<_>>()
            ),
        }
    }

    /// A small chart for each figure: the number of nodes by its logarithm, the figure from nothing.
    fn svg(&self) -> String {
        const WIDTH: f64 = 300.0;
        const HEIGHT: f64 = 150.0;
        let grown: Vec<_> = self.rows.iter().filter(|(_, values)| values.len() > 1).collect();
        let lines = grown.len().div_ceil(3);
        let mut svg = format!(
            "<svg xmlns='http://www.w3.org/2000/svg' width='900' height='{}' font-family='sans-serif' font-size='10'>\n\
             <rect width='100%' height='100%' fill='white'/>\n",
            lines as f64 * HEIGHT
        );
        for (place, (what, values)) in grown.into_iter().enumerate() {
            let (left, top) = ((place % 3) as f64 * WIDTH, (place / 3) as f64 * HEIGHT);
            let most = values.values().copied().fold(f64::MIN_POSITIVE, f64::max);
            let at = |size: u32, value: f64| {
                let x = left + 40.0 + (f64::from(size).log10() - 1.0) / 2.5 * (WIDTH - 60.0);
                (x, top + HEIGHT - 25.0 - value / most * (HEIGHT - 60.0))
            };
            let points: Vec<String> =
                values.iter().map(|(size, value)| at(*size, *value)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let text = what.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(svg, "<text x='{}' y='{}' font-weight='bold'>{text}</text>", left + 10.0, top + 15.0);
            let _ = writeln!(svg, "<polyline points='{}' fill='none' stroke='#0b62a4'/>", points.join(" "));
            for (size, value) in values {
                let (x, y) = at(*size, *value);
                let _ = writeln!(svg, "<circle cx='{x:.1}' cy='{y:.1}' r='2.5' fill='#0b62a4'/>");
                let _ = writeln!(svg, "<text x='{:.1}' y='{:.1}'>{value}</text>", x - 12.0, y - 5.0);
                let _ =
                    writeln!(svg, "<text x='{:.1}' y='{:.1}' fill='#666'>{size}</text>", x - 8.0, top + HEIGHT - 10.0);
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
        for line in
            ["seed 7", "noise", "figure 10|p99 (ms)|1.5", "figure 1000|p99 (ms)|2", "figure 10|hot|1.2", "figure x|y|z"]
        {
            growth.read(line);
        }
        let figures = growth.figures();
        assert_eq!(figures.columns, ["nodes", "10", "1000"]);
        assert_eq!(figures.rows, [["p99 (ms)", "1.5", "2"], ["hot", "1.2", "–"]]);
        assert!(figures.method.ends_with("Seeds: 7."));
        let svg = growth.svg();
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (1, 2));
    }
}
