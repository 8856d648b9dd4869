//! What counting in the kernel costs: the same server with eBPF and without, one after the other in each round, and the time that the kernel's
//! programs took by the kernel's own account.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use spegel_benches::load::{Bulk, Waits};

use super::paired::{self, Change, ORDERS, TURNS, middle, significant};
use super::{Plane, Running, Settings, median};
use crate::bench::Figures;

/// The servers of a round. The third is what the first two would differ by if eBPF cost nothing.
const SERVERS: [(&str, &str); 3] = [("off", "off"), ("on", "on"), ("off-again", "off")];
/// How long a turn asks a server for small things, in seconds, and again for connections.
const TIME: &str = "0.6";
/// What a turn takes of the large blob, in MiB.
const BULK: u64 = 1024;
/// Where the kernel is told to account for its programs.
const ACCOUNT: &str = "/proc/sys/kernel/bpf_stats_enabled";
const GIB: f64 = (1_u64 << 30) as f64;

/// What is measured of a server in a turn. CPU is of both ends, since acknowledgements, for which the programs run, are handled in whichever process
/// is running.
const FIGURES: [&str; 6] = [
    "bulk: CPU s / GiB",
    "GiB / s",
    "2 KiB: CPU µs a request",
    "requests / s",
    "a connection each: CPU µs",
    "connect to first byte, p50, µs",
];
/// By how much they may change, in per cent, where that was promised, and whether more is worse.
const AIMS: [(Option<f64>, bool); 6] =
    [(Some(1.0), true), (None, false), (Some(2.0), true), (Some(2.0), false), (None, true), (None, true)];

type Turn = [f64; FIGURES.len()];

/// What the kernel's programs took: runs, nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    runs: u64,
    nanoseconds: u64,
}

/// A server with, and two without.
pub(in crate::bench) fn ebpf(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let mut found: [Vec<Turn>; SERVERS.len()] = Default::default();
    let (mut accounts, mut maps) = (Vec::new(), 0);
    for round in 0..plane.settings.rounds {
        let start = |number: usize| {
            let (name, mode) = SERVERS[number];
            // The port's place says nothing of the mode: it changes with the rounds.
            paired::start(&plane, (number + round) % SERVERS.len(), round, name, &format!("--ebpf {mode}"), None)
        };
        let servers = (0..SERVERS.len()).map(start).collect::<Result<Vec<_>>>()?;
        for turn in 0..=TURNS {
            for number in ORDERS[turn % ORDERS.len()] {
                let figures = measure(&plane, &servers[number].running)?;
                if turn > 0 {
                    found[number].push(figures);
                }
            }
        }
        accounts.push(account(&plane, &servers[1].running)?);
        maps = field_of_descriptors(&servers[1].running, "memlock:")?;
    }
    Ok(tell(&plane, &found, &accounts, maps))
}

fn tell(plane: &Plane, found: &[Vec<Turn>; SERVERS.len()], accounts: &[[(f64, f64); 3]], maps: u64) -> Figures {
    let column = |number: usize, at: usize| middle(&found[number], at);
    let row = |name: &str, field: &dyn Fn(usize) -> String| -> Vec<String> {
        std::iter::once(name.to_owned()).chain((0..FIGURES.len()).map(field)).collect()
    };
    let plain = |number: usize| move |at: usize| significant(column(number, at));
    let changed = |number: usize, at: usize| Change::of(&found[number], &found[0], at);
    let shares = |at: usize| -> Option<(f64, f64, f64)> {
        let take = |of: fn(&(f64, f64)) -> f64| median(accounts.iter().map(|account| of(&account[at / 2])).collect());
        let (runs, seconds) = (take(|(runs, _)| *runs), take(|(_, seconds)| *seconds));
        let whole = column(0, at) / if at == 0 { 1.0 } else { 1e6 };
        at.is_multiple_of(2).then_some((seconds / whole * 100.0, seconds, runs))
    };
    let programs = |at: usize| match shares(at) {
        Some((share, seconds, runs)) => format!("{share:+.2} % ({:.2} µs, {runs:.1} runs)", seconds * 1e6),
        None => "-".to_owned(),
    };
    let aims = |at: usize| match AIMS[at] {
        (Some(aim), is_worse) => {
            let change = changed(1, at).median;
            let verdict = if (if is_worse { change } else { -change }) <= aim { "reached" } else { "missed" };
            format!("{}{aim} %: {verdict}", if is_worse { "≤ +" } else { "≥ -" })
        }
        (None, _) => "-".to_owned(),
    };
    let rows = vec![
        row("eBPF off", &plain(0)),
        row("eBPF on", &plain(1)),
        row("on beside off", &|at| changed(1, at).text()),
        row("off beside off", &|at| changed(2, at).text()),
        row("the programs' own time", &programs),
        row("aim for on beside off", &aims),
    ];
    let told = (0..FIGURES.len()).map(|at| {
        let change = |number: usize| changed(number, at).json();
        json!({"figure": FIGURES[at], "off": column(0, at), "on": column(1, at), "on_beside_off": change(1), "off_beside_off": change(2),
            "programs": shares(at).map(|(share, seconds, runs)| json!({"percent": share, "seconds": seconds, "runs": runs}))})
    });
    let json = json!({"figures": told.collect::<Vec<_>>(), "pairs": found[0].len(), "map_bytes": maps});
    Figures {
        name: "ebpf",
        method: format!(
            "The same program with `--ebpf off`, `--ebpf on`, and `off` once more, each in a control group of its own; {} times new processes, each \
             time {TURNS} turns in which the three are measured one right after the other, in changing order. One network namespace, loopback, congestion control reno; server \
             on core 0, client on core 1; CPU is that of both processes together, from schedstat. spegel logs warnings only. A change is the median of the {} pairs, each of one turn, with the interval that holds the true median in 95 of 100 cases; \
             `off beside off` is what such a comparison makes of nothing. The programs' own time is the kernel's own account \
             (kernel.bpf_stats_enabled), taken apart from the turns, for a GiB, a request and a connection, beside the CPU of those; the account itself \
             costs more than what is counted. The maps take {:.1} MiB.",
            plane.settings.rounds,
            found[0].len(),
            maps as f64 / f64::from(1 << 20),
        ),
        columns: std::iter::once("").chain(FIGURES).map(str::to_owned).collect(),
        rows,
        json,
    }
}

fn measure(plane: &Plane, server: &Running) -> Result<Turn> {
    let before = server.cpu()?;
    let bulk = bulk(plane, server)?;
    let gib = bulk.bytes as f64 / GIB;
    let cpu_bulk = (server.cpu()? - before + bulk.cpu_seconds) / gib;
    let before = server.cpu()?;
    let small = small(plane, server)?;
    let cpu_small = (server.cpu()? - before + small.cpu_seconds) / small.count as f64 * 1e6;
    let before = server.cpu()?;
    let connects = connects(plane, server)?;
    let cpu_connect = (server.cpu()? - before + connects.cpu_seconds) / connects.count as f64 * 1e6;
    let rate = small.count as f64 / small.seconds;
    Ok([cpu_bulk, gib / bulk.seconds, cpu_small, rate, cpu_connect, connects.p50])
}

fn bulk(plane: &Plane, server: &Running) -> Result<Bulk> {
    let count = BULK.div_ceil(plane.settings.mib).max(1).to_string();
    plane.client(&["bulk", &server.address.to_string(), &plane.blob_path(), "1", &count, "discard"])
}

fn small(plane: &Plane, server: &Running) -> Result<Waits> {
    plane.client(&["small", &server.address.to_string(), &plane.manifest_path(), "GET", "64", TIME])
}

fn connects(plane: &Plane, server: &Running) -> Result<Waits> {
    plane.client(&["connects", &server.address.to_string(), &plane.manifest_path(), TIME])
}

/// Runs and seconds of the kernel's programs for a GiB, a small request and a connection.
fn account(plane: &Plane, server: &Running) -> Result<[(f64, f64); 3]> {
    let _counting = Counting::start()?;
    let took = |work: &dyn Fn() -> Result<f64>| -> Result<(f64, f64)> {
        let before = accounts(server)?;
        let units = work()?;
        let after = accounts(server)?;
        let runs = (after.runs - before.runs) as f64;
        Ok((runs / units, (after.nanoseconds - before.nanoseconds) as f64 / 1e9 / units))
    };
    Ok([
        took(&|| Ok(bulk(plane, server)?.bytes as f64 / GIB))?,
        took(&|| Ok(small(plane, server)?.count as f64))?,
        took(&|| Ok(connects(plane, server)?.count as f64))?,
    ])
}

/// The kernel accounts for its programs as long as this is there, if it did not before.
struct Counting(String);

impl Counting {
    fn start() -> Result<Self> {
        let before = fs::read_to_string(ACCOUNT).context("this kernel does not account for its programs")?;
        fs::write(ACCOUNT, "1")?;
        Ok(Self(before))
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = fs::write(ACCOUNT, &self.0);
    }
}

fn accounts(server: &Running) -> Result<Account> {
    let account = Account {
        runs: field_of_descriptors(server, "run_cnt:")?,
        nanoseconds: field_of_descriptors(server, "run_time_ns:")?,
    };
    Ok(account)
}

/// The sum of what the kernel says by this name of all descriptors of a process.
fn field_of_descriptors(server: &Running, name: &str) -> Result<u64> {
    let folder = PathBuf::from(format!("/proc/{}/fdinfo", server.daemon.pid()));
    let mut sum = None;
    for entry in fs::read_dir(folder)? {
        // A descriptor may be closed meanwhile.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let field = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        sum = field.map(|field| sum.unwrap_or(0) + field).or(sum);
    }
    ensure!(sum.is_some(), "the process has no {name} in the kernel:\n{}", server.daemon.log());
    Ok(sum.unwrap_or_default())
}
