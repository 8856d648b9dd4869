//! What counting in the kernel costs: the same server with eBPF and without, one after the other in each round, and the time that the kernel's
//! programs took by the kernel's own account.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use spegel_benches::load::{Bulk, Waits};

use super::{GROUND, Plane, Rival, Running, Settings, median};
use crate::bench::Figures;

/// How long each measurement of small requests lasts, in seconds.
const TIME: &str = "1.5";
/// Where the kernel is told to account for its programs.
const ACCOUNT: &str = "/proc/sys/kernel/bpf_stats_enabled";
const GIB: f64 = (1_u64 << 30) as f64;

/// What a round gives: CPU seconds a GiB and GiB a second of one stream, small requests a CPU second and a second, microseconds of a connection.
type Round = [f64; 5];

/// What the kernel's programs took: runs, nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Account {
    runs: u64,
    nanoseconds: u64,
}

/// A server with and one without.
pub(in crate::bench) fn ebpf(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let servers = [("on", start(&plane, "on", 0)?), ("off", start(&plane, "off", 1)?)];
    let mut found: [Vec<Round>; 2] = Default::default();
    // The first round is not counted.
    for round in 0..=plane.settings.rounds {
        for ((_, server), found) in servers.iter().zip(&mut found) {
            let figures = measure(&plane, server)?;
            if round > 0 {
                found.push(figures);
            }
        }
    }
    let accounts = account(&plane, &servers[0].1)?;
    let maps = field_of_descriptors(&servers[0].1, "memlock:")?;
    let column = |rounds: &[Round], at: usize| median(rounds.iter().map(|round| round[at]).collect());
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for ((mode, _), rounds) in servers.iter().zip(&found) {
        let [cpu, speed, per_cpu, rate, connect] = [0, 1, 2, 3, 4].map(|at| column(rounds, at));
        rows.push(vec![
            format!("eBPF {mode}"),
            format!("{cpu:.4} / {speed:.2}"),
            format!("{per_cpu:.0} / {rate:.0}"),
            format!("{connect:.1} µs"),
        ]);
        told.push(
            json!({"ebpf": mode, "cpu_seconds_per_gib": cpu, "gib_per_second": speed, "get_per_cpu_second": per_cpu,
            "get_per_second": rate, "connect_to_first_byte_us": connect}),
        );
    }
    let [gib, request, connection] = accounts;
    rows.push(vec![
        "the programs themselves".to_owned(),
        format!("{:.6} ({:.0} runs)", gib.1, gib.0),
        format!("{:.0} ns ({:.3} runs)", request.1 * 1e9, request.0),
        format!("{:.2} µs ({:.1} runs)", connection.1 * 1e6, connection.0),
    ]);
    told.push(json!({"program_seconds_per_gib": gib.1, "program_seconds_per_request": request.1,
        "program_seconds_per_connection": connection.1, "map_bytes": maps}));
    let columns = [
        "",
        "one stream: CPU s / GiB, GiB / s",
        "2 KiB: requests a CPU second, a second",
        "connect to first byte, p50",
    ];
    Ok(Figures {
        name: "ebpf",
        method: format!(
            "The same program with `--ebpf on` and `off`, one after the other in each round, each in a control group of its own. {GROUND}The \
             time of the kernel's programs is the kernel's own account (kernel.bpf_stats_enabled), taken apart from the rounds, of all of both \
             programs' runs: part of it is the client's, whose acknowledgements they run for. The maps take {:.1} MiB. {} rounds.",
            maps as f64 / f64::from(1 << 20),
            plane.settings.rounds
        ),
        columns: columns.map(str::to_owned).to_vec(),
        rows,
        json: Value::Array(told),
    })
}

/// Starts spegel in a control group of its own. A namespace that `ip` made shows none, so the hierarchy is mounted there first.
fn start(plane: &Plane, mode: &str, number: u16) -> Result<Running> {
    let script = plane.folder.path().join(format!("spegel-{mode}"));
    let group = format!("/sys/fs/cgroup/spegel-bench-{mode}-{}", std::process::id());
    let text = format!(
        "#!/bin/sh\nset -e\nmount -t cgroup2 cgroup2 /sys/fs/cgroup\nmkdir -p {group}\necho $$ > {group}/cgroup.procs\n\
         exec {} \"$@\" --ebpf {mode}\n",
        plane.settings.program.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Rival::TOKIO.serve_by(plane, number, &script)
}

fn measure(plane: &Plane, server: &Running) -> Result<Round> {
    let before = server.cpu()?;
    let bulk = bulk(plane, server)?;
    let gib = bulk.bytes as f64 / GIB;
    let cpu = (server.cpu()? - before) / gib;
    let before = server.cpu()?;
    let small = small(plane, server)?;
    let per_cpu = small.count as f64 / (server.cpu()? - before);
    let connects = connects(plane, server)?;
    Ok([cpu, gib / bulk.seconds, per_cpu, small.count as f64 / small.seconds, connects.p50])
}

fn bulk(plane: &Plane, server: &Running) -> Result<Bulk> {
    let count = 2048_u64.div_ceil(plane.settings.mib).max(1).to_string();
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
