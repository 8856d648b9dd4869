//! What it costs that a node can be watched: the same server with everything on and with all of it off, by turns in each round.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spegel_benches::http::Client;
use spegel_benches::load::Waits;

use super::{CLIENT_CORE, GROUND, Plane, Rival, Running, Settings, median, rivals, socket};
use crate::bench::Figures;

/// How long each measurement lasts, in seconds.
const TIME: &str = "2";
/// How often the figures are scraped, as the most impatient Prometheus would.
const SCRAPE: Duration = Duration::from_secs(1);
/// The least that is aimed at: requests a second with everything on, beside all off.
const AIM: f64 = 0.98;

/// What is asked for.
const KINDS: [&str; 2] = ["manifest of 2 KiB", "blob of 2 bytes"];

/// Requests a second, and a CPU second of the server.
type Rates = [f64; 2];

/// A server with everything on, and one with all off.
pub(in crate::bench) fn everything(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let has_pages = has_debug_pages(settings)?;
    let servers = [start(&plane, true, has_pages)?, start(&plane, false, has_pages)?];
    let metrics = socket(plane.address(), rivals::metrics_port(0));
    let paths = [plane.manifest_path(), plane.config_path()];
    // By kind and server: what each round found.
    let mut found: [[Vec<Rates>; 2]; 2] = Default::default();
    let mut scrapes = 0;
    // The first round is not counted.
    for round in 0..=plane.settings.rounds {
        for (path, found) in paths.iter().zip(&mut found) {
            let mut figures = [[0.0; 2]; 2];
            // Who comes first alternates.
            for place in 0..2 {
                let which = (round + place) % 2;
                let (rates, seen) = if which == 0 {
                    scraped(metrics, || measure(&plane, &servers[0], path))?
                } else {
                    (measure(&plane, &servers[1], path)?, 0)
                };
                figures[which] = rates;
                scrapes += seen;
            }
            if round > 0 {
                found.iter_mut().zip(figures).for_each(|(found, figures)| found.push(figures));
            }
        }
    }
    ensure!(scrapes > 0, "nobody scraped");
    Ok(figures_of(&plane, &found, scrapes, has_pages))
}

fn figures_of(plane: &Plane, found: &[[Vec<Rates>; 2]; 2], scrapes: usize, has_pages: bool) -> Figures {
    let (mut rows, mut told) = (Vec::new(), Vec::new());
    for (kind, [on, off]) in KINDS.iter().zip(found) {
        let rate = |rounds: &[Rates], at: usize| median(rounds.iter().map(|round| round[at]).collect());
        // Of each round by itself: what else the machine does then, both have.
        let ratio = |at: usize| median(on.iter().zip(off).map(|(on, off)| on[at] / off[at]).collect());
        for (mode, rounds) in [("on", on), ("off", off)] {
            rows.push(vec![
                format!("{kind}, everything {mode}"),
                format!("{:.0}", rate(rounds, 0)),
                format!("{:.0}", rate(rounds, 1)),
            ]);
        }
        rows.push(vec![format!("{kind}, on / off"), format!("{:.3}", ratio(0)), format!("{:.3}", ratio(1))]);
        told.push(
            json!({"what": kind, "on_per_second": rate(on, 0), "off_per_second": rate(off, 0), "ratio": ratio(0),
            "on_per_cpu_second": rate(on, 1), "off_per_cpu_second": rate(off, 1), "cpu_ratio": ratio(1), "aim": AIM}),
        );
    }
    let pages = if has_pages { "the debug pages open" } else { "no debug pages in this program" };
    Figures {
        name: "everything",
        method: format!(
            "GET by digest on 64 keep-alive connections, each asking anew when its answer is there. On: `/metrics` scraped each second \
             ({scrapes} times in all), the log at INFO into a file, `--ebpf auto`, {pages}. Off: nobody scrapes, errors only are logged, \
             `--ebpf off`. {GROUND}{} rounds of {TIME} s each; who comes first alternates; the last line of each kind is the median of the \
             rounds' own ratios, of which {AIM} and more is the aim.",
            plane.settings.rounds
        ),
        columns: ["", "requests a second", "requests a CPU second"].map(str::to_owned).to_vec(),
        rows,
        json: Value::Array(told),
    }
}

/// Starts spegel in a control group of its own. A namespace that `ip` made shows none, so the hierarchy is mounted there first. The level of the log
/// that all benches have is put in the place of another one.
fn start(plane: &Plane, is_on: bool, has_pages: bool) -> Result<Running> {
    let (mode, level, ebpf) = if is_on { ("on", "INFO", "auto") } else { ("off", "ERROR", "off") };
    let pages = if has_pages { format!("--debug-web-enabled={is_on}") } else { String::new() };
    let script = plane.folder.path().join(format!("spegel-{mode}"));
    let group = format!("/sys/fs/cgroup/spegel-bench-{mode}-{}", std::process::id());
    let text = format!(
        "#!/bin/sh\nset -e\nmount -t cgroup2 cgroup2 /sys/fs/cgroup\nmkdir -p {group}\necho $$ > {group}/cgroup.procs\n\
         for given; do [ \"$given\" = WARN ] && given={level}; shift; set -- \"$@\" \"$given\"; done\n\
         exec {} \"$@\" --ebpf {ebpf} {pages}\n",
        plane.settings.program.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Rival::TOKIO.serve_by(plane, u16::from(!is_on), &script)
}

/// Whether the program has pages to turn off.
fn has_debug_pages(settings: &Settings) -> Result<bool> {
    let help = Command::new(&settings.program).args(["registry", "--help"]).output()?;
    Ok(String::from_utf8_lossy(&help.stdout).contains("--debug-web-enabled"))
}

fn measure(plane: &Plane, server: &Running, path: &str) -> Result<Rates> {
    let before = server.cpu()?;
    let waits: Waits = plane.client(&["small", &server.address.to_string(), path, "GET", "64", TIME])?;
    let cpu = server.cpu()? - before;
    Ok([waits.count as f64 / waits.seconds, waits.count as f64 / cpu])
}

/// Does some work while the figures are scraped, and says how often they were.
fn scraped<T>(metrics: SocketAddr, work: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let (is_over, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            let (client, url) = (Client::new(SCRAPE), format!("http://{metrics}/metrics"));
            let scrape = || {
                let start = Instant::now();
                let seen = client.get(&url, &[]).is_ok_and(|answer| answer.head.status == 200);
                count.fetch_add(usize::from(seen), Ordering::Relaxed);
                while !is_over.load(Ordering::Relaxed) && start.elapsed() < SCRAPE {
                    thread::sleep(Duration::from_millis(50));
                }
            };
            // Where it cannot be kept to the clients' core it runs where it likes.
            let _ = rivals::on_core(CLIENT_CORE, || {
                while !is_over.load(Ordering::Relaxed) {
                    scrape();
                }
                Ok(())
            });
        });
        let done = work();
        is_over.store(true, Ordering::Relaxed);
        done
    });
    Ok((done?, count.into_inner()))
}
