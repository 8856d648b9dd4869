//! Every scenario of the table of aims with real containerds, each with the protocol, without it, and without a mirror.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use spegel_benches::storm::{Storm as Lab, Stormed, Victim};

use super::Storm;
use super::report::Outcome;

use super::{lab, model};

/// How the figures come about.
const METHOD: &str = "Each node is a network namespace with a containerd 2.2 and the mirror of its own; upstream is a docker-registry behind \
    a token bucket, and so is each node's link, in both directions; congestion control reno. Layers are not compressed and not unpacked. All are told at the same \
    moment to fetch an image that none has. Bytes and requests are counted in the registry's log, HEADs are not; solo is one such pull \
    without a mirror when nobody else pulls; last is from the storm's start to the last node that was not killed, with nodes that start \
    over time the longest single pull. Depth, what nodes waited for and who went upstream are from the nodes' own metrics. Void: the cores \
    were busy all the time, so that they, and no link, may have been the limit. \
    Model: what the simulator makes of last / solo";

/// A line of the table of aims: what is different in it, and what is to be reached.
struct Row {
    name: &'static str,
    change: fn(&mut Lab),
    /// Half of the nodes do not speak the protocol.
    mixed: bool,
    /// Upstream's bytes, and the last node's end as a multiple of solo.
    most_bytes: f64,
    most_time: f64,
    /// It is the same without a mirror as a row above.
    as_one_layer: bool,
}

const ROWS: [Row; 10] = [
    Row::new("1 layer", 1.1, 1.3, |_| {}),
    Row { as_one_layer: false, ..Row::new("4 layers", 1.1, 1.3, |lab| lab.layers = 4) },
    Row::new("one uploads a tenth", 1.1, 1.3, |lab| lab.slow_node = true),
    Row::new("root killed half way", 2.1, 1.6, |lab| lab.kill = Some(Victim::Root)),
    Row::new("inner node killed half way", 1.1, 1.6, |lab| lab.kill = Some(Victim::Inner)),
    Row { mixed: true, ..Row::new("half do not speak it", 5.0, f64::INFINITY, |_| {}) },
    Row { as_one_layer: false, ..Row::new("start over 10 s", 1.1, 1.3, |lab| lab.stagger = super::TEN_SECONDS) },
    Row { as_one_layer: false, ..Row::new("upstream as fast as the links", 1.1, f64::INFINITY, fast_upstream) },
    Row { as_one_layer: false, ..Row::new("one seed, all links alike", 0.0, 2.0, seeded) },
    Row::new("upstream refuses one", 1.1, 1.3, |lab| lab.refuse = 1),
];

/// Each node's link carries a share of what upstream's does.
fn fast_upstream(lab: &mut Lab) {
    lab.node = (lab.upstream / 2).max(1);
    lab.upstream = lab.node * u32::try_from(lab.nodes).unwrap_or(u32::MAX);
}

/// Upstream's link is as each node's, so that one pull alone is as long as one copy between two nodes.
fn seeded(lab: &mut Lab) {
    (lab.seeded, lab.node) = (true, lab.upstream);
}

/// What runs on the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    On,
    Off,
    NoMirror,
}

impl Variant {
    const ALL: [Self; 3] = [Self::On, Self::Off, Self::NoMirror];

    fn name(self) -> &'static str {
        match self {
            Self::On => "storms on",
            Self::Off => "storms off",
            Self::NoMirror => "no mirror",
        }
    }
}

impl Row {
    const fn new(name: &'static str, most_bytes: f64, most_time: f64, change: fn(&mut Lab)) -> Self {
        Self { name, change, mixed: false, most_bytes, most_time, as_one_layer: true }
    }

    /// Whether it says something new.
    fn is_run(&self, number: usize, variant: Variant) -> bool {
        let is_first = number == 0;
        match variant {
            Variant::On => true,
            // Without the protocol nobody speaks it.
            Variant::Off => !self.mixed,
            Variant::NoMirror => is_first || !self.as_one_layer,
        }
    }
}

/// Runs the scenarios, those of `--rows` if that is given, and prints and writes down what came of them; false if a pull failed or an aim
/// was missed in a run that is not void.
pub(super) fn run(storm: &Storm) -> Result<bool> {
    let mut lines: Vec<Value> = storm.from.iter().map(read).collect::<Result<Vec<_>>>()?.concat();
    for (number, row) in ROWS.iter().enumerate() {
        let is_wanted = if storm.rows.is_empty() { storm.from.is_empty() } else { storm.rows.contains(&(number + 1)) };
        for variant in Variant::ALL.into_iter().filter(|variant| is_wanted && row.is_run(number, *variant)) {
            println!("=== {}, {}", row.name, variant.name());
            let off = variant != Variant::On;
            let asked = Storm { off, no_mirror: variant == Variant::NoMirror, mixed: row.mixed, ..storm.clone() };
            let mut lab = lab::lab(&asked)?;
            (row.change)(&mut lab);
            match lab::show(&lab) {
                Ok(stormed) => lines.push(line(number, variant, &asked, &lab, &stormed)),
                Err(error) => {
                    println!("{error:#}");
                    lines.push(json!({ "row": number, "variant": variant.name(), "error": format!("{error:#}") }));
                }
            }
            crate::write_json(storm.json.as_ref(), &Value::from(lines.clone()))?;
        }
    }
    let table = table(&lines);
    println!("{table}");
    if storm.record {
        let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.contains('/')).collect();
        crate::bench::record("storm", METHOD, &table, &format!("cargo xtask {}", words.join(" ")))?;
    }
    Ok(lines.iter().all(is_good))
}

fn read(file: &PathBuf) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(file).with_context(|| Path::new(file).display().to_string())?;
    match serde_json::from_str(&text)? {
        Value::Array(lines) => Ok(lines),
        _ => bail!("{} is none of --all's", file.display()),
    }
}

/// A run's figures.
fn line(row: usize, variant: Variant, storm: &Storm, lab: &Lab, stormed: &Stormed) -> Value {
    let time = if lab.stagger.is_zero() { stormed.last() } else { stormed.slowest() };
    let slowest = stormed.pulls.iter().filter(|pull| !pull.killed).max_by(|a, b| a.seconds.total_cmp(&b.seconds));
    // It has no pulls that share nothing at all.
    let model = (variant != Variant::NoMirror).then(|| {
        let outcome = Outcome::of(model::scenario(ROWS[row].name, storm, lab));
        print!("{}", model::beside(&outcome, stormed));
        let time = if lab.stagger.is_zero() { outcome.last_of_solo() } else { outcome.worst_of_solo() };
        (time, outcome.upstream)
    });
    let why = slowest.and_then(|pull| pull.told.why_slow());
    json!({
        "row": row,
        "variant": variant.name(),
        "links": format!("{} of {}, {}/{} Mbit/s", lab.nodes, size(lab.size), lab.upstream, lab.node),
        "bytes": stormed.upstream_share(),
        "manifests": stormed.upstream_requests[0],
        "blobs": stormed.upstream_requests[1],
        "solo": stormed.solo,
        "time": time / stormed.solo,
        "depth": stormed.depth(),
        "roots": stormed.pulls.iter().filter(|pull| pull.told.from_upstream > 0.0).count(),
        "moves": stormed.pulls.iter().map(|pull| pull.told.moves).sum::<f64>(),
        "why": why.map_or_else(String::new, |(what, seconds)| format!("{seconds:.1} s {what}")),
        "failed": failed(lab, stormed),
        "model_time": model.map(|(time, _)| time),
        "model_bytes": model.map(|(_, bytes)| bytes),
        "void": stormed.is_void(),
        "busy": stormed.busy,
    })
}

/// Pulls that failed, but for those that upstream refuses: they may get it from others, or not.
fn failed(lab: &Lab, stormed: &Stormed) -> usize {
    let first_refused = lab.nodes - lab.refuse;
    let refused = |pull: &&spegel_benches::storm::Pulled| pull.node >= first_refused;
    let all = stormed.pulls.iter().filter(|pull| !pull.killed && pull.failed.is_some());
    all.filter(|pull| !refused(pull)).count()
}

fn size(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or(f64::NAN)
}

fn row(line: &Value) -> Option<&'static Row> {
    ROWS.get(usize::try_from(line["row"].as_u64()?).ok()?)
}

/// Whether the aims are reached, where it is the protocol's part.
fn is_good(line: &Value) -> bool {
    let Some(row) = row(line) else { return false };
    let has_failed = line["failed"].as_u64() != Some(0) || line["error"].is_string();
    let has_missed = number(line, "bytes") > row.most_bytes + 0.01 || number(line, "time") > row.most_time;
    let is_on = line["variant"] == Variant::On.name();
    let counts = is_on && line["void"] != true;
    !(has_failed || counts && has_missed)
}

fn table(lines: &[Value]) -> String {
    let mut text = String::from(
        "| scenario | links (upstream/node) | | upstream bytes / image | GETs of manifests, blobs | last / solo (s) | model | depth | roots | moves | slowest waited | aim |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for line in lines {
        let Some(row) = row(line) else { continue };
        let variant = line["variant"].as_str().unwrap_or_default();
        if let Some(error) = line["error"].as_str() {
            let _ = writeln!(text, "| {} | | {variant} | not run: {error} | | | | | | | | |", row.name);
            continue;
        }
        let limit = |most: f64| if most.is_finite() { format!("≤ {most}") } else { "as without".to_owned() };
        let aim = if variant == Variant::On.name() {
            let reached = if is_good(line) { "reached" } else { "missed" };
            format!("{}, {}: {reached}", limit(row.most_bytes), limit(row.most_time))
        } else {
            String::new()
        };
        let mut notes = String::new();
        if line["failed"].as_u64() != Some(0) {
            let _ = write!(notes, " {} FAILED", line["failed"]);
        }
        if line["void"] == true {
            notes += " (void)";
        }
        let _ = writeln!(
            text,
            "| {} | {} | {variant} | {:.2} | {}, {} | {:.2} ({:.1}){notes} | {} | {} | {} | {} | {} | {aim} |",
            row.name,
            line["links"].as_str().unwrap_or_default(),
            number(line, "bytes"),
            line["manifests"],
            line["blobs"],
            number(line, "time"),
            number(line, "solo"),
            line["model_time"].as_f64().map_or_else(String::new, |time| model::cell(number(line, "time"), time)),
            line["depth"],
            line["roots"],
            line["moves"],
            line["why"].as_str().unwrap_or_default(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_aim_is_told_unless_the_run_is_void() {
        let line = |bytes: f64, variant: Variant, void: bool, failed: usize| json!({ "row": 0, "variant": variant.name(), "bytes": bytes, "time": 1.0, "failed": failed, "void": void });
        assert!(is_good(&line(1.0, Variant::On, false, 0)));
        assert!(!is_good(&line(8.0, Variant::On, false, 0)));
        assert!(is_good(&line(8.0, Variant::On, true, 0)) && is_good(&line(8.0, Variant::Off, false, 0)));
        assert!(!is_good(&line(1.0, Variant::Off, false, 1)));
        let text = table(&[line(8.0, Variant::On, false, 0)]);
        assert!(text.contains("8.00") && text.contains("missed"), "{text}");
        let modelled = |time: f64| {
            let mut line = line(1.0, Variant::On, false, 0);
            line["model_time"] = json!(time);
            table(&[line])
        };
        assert!(modelled(1.2).contains("| 1.20 |") && modelled(1.21).contains("| 1.21, further than 20 % |"));
    }
}
