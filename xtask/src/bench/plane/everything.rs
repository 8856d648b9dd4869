//! What it costs that a node can be watched: the same server with everything on and with all of it off, in pairs.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spegel_benches::http::Client;
use spegel_benches::load::Waits;

use super::paired::{self, Change, Grouped, ORDERS, middle, significant};
use super::{CLIENT_CORE, Plane, Running, Settings, rivals, socket};
use crate::bench::Figures;

/// How long each measurement lasts, in seconds: the machine is not the same for long.
const TIME: &str = "0.3";
/// How long the server is under the same load before: what it may write and keep a second has run out by then, as it has under a load that lasts.
const BEFORE: &str = "0.1";
/// How often the figures are scraped, as the most impatient Prometheus would. Each measurement has a scrape at least.
const SCRAPE: Duration = Duration::from_secs(1);
/// Turns of a round, whose processes are the same; before them is one that is not counted.
const TURNS: usize = 60;
/// How many per cent of the requests a second everything may cost.
const AIM: f64 = 2.0;

/// The servers of a round. The third is what the first two would differ by if everything cost nothing.
const SERVERS: [&str; 3] = ["off", "on", "off-again"];
const ON: usize = 1;
/// What is measured of each in a turn.
const FIGURES: [&str; 4] = [
    "manifest of 2 KiB: requests / s",
    "a CPU second of the server",
    "blob of 2 bytes: requests / s",
    "a CPU second of the server",
];

type Turn = [f64; FIGURES.len()];

/// A server with everything on, and two with all off.
pub(in crate::bench) fn everything(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let has_pages = has_debug_pages(settings)?;
    let mut found: [Vec<Turn>; SERVERS.len()] = Default::default();
    let mut scrapes = 0;
    for round in 0..plane.settings.rounds {
        // The port's place says nothing of what is on: it changes with the rounds.
        let place = |number: usize| (number + round) % SERVERS.len();
        let servers = (0..SERVERS.len())
            .map(|number| start(&plane, number, place(number), round, has_pages))
            .collect::<Result<Vec<_>>>()?;
        let metrics = socket(plane.address(), rivals::metrics_port(u16::try_from(place(ON))?));
        for turn in 0..=TURNS {
            for number in ORDERS[turn % ORDERS.len()] {
                let (figures, seen) = measure(&plane, &servers[number].running, (number == ON).then_some(metrics))?;
                scrapes += seen;
                if turn > 0 {
                    found[number].push(figures);
                }
            }
        }
    }
    ensure!(scrapes > 0, "nobody scraped");
    Ok(figures_of(&plane, &found, scrapes, has_pages))
}

fn figures_of(plane: &Plane, found: &[Vec<Turn>; SERVERS.len()], scrapes: usize, has_pages: bool) -> Figures {
    let row = |name: &str, field: &dyn Fn(usize) -> String| -> Vec<String> {
        std::iter::once(name.to_owned()).chain((0..FIGURES.len()).map(field)).collect()
    };
    let changed = |number: usize, at: usize| Change::of(&found[number], &found[0], at);
    let aim = |at: usize| match changed(1, at).median {
        _ if at % 2 == 1 => "-".to_owned(),
        change if change >= -AIM => format!("≥ -{AIM} %: reached"),
        _ => format!("≥ -{AIM} %: missed"),
    };
    let rows = vec![
        row("everything off", &|at| significant(middle(&found[0], at))),
        row("everything on", &|at| significant(middle(&found[1], at))),
        row("on beside off", &|at| changed(1, at).text()),
        row("off beside off", &|at| changed(2, at).text()),
        row("aim for on beside off", &aim),
    ];
    let told = (0..FIGURES.len()).map(|at| {
        let change = |number: usize| changed(number, at).json();
        json!({"figure": FIGURES[at], "off": middle(&found[0], at), "on": middle(&found[1], at), "on_beside_off": change(1),
            "off_beside_off": change(2)})
    });
    let json = Value::Array(told.collect());
    let pages = if has_pages { "the debug pages open" } else { "no debug pages in this program" };
    Figures {
        name: "everything",
        method: format!(
            "GET by digest on 64 keep-alive connections, each asking anew when its answer is there. On: `/metrics` scraped during each \
             measurement ({scrapes} times in all), the log at INFO into a file, `--ebpf auto`, {pages}. Off: nobody scrapes, errors only \
             are logged, `--ebpf off`. {} times new processes, each time {TURNS} turns in which on, off and off once more are measured one right \
             after the other, in changing order, for {TIME} s, after {BEFORE} s of the same load: then the 1,000 lines that the log takes at once are \
             written, and it takes 100 a second. One network namespace, loopback, congestion control reno; server on core 0, client on core 1. A change is the \
             median of the {} pairs, each of one turn, with the interval that holds the true median in 95 of 100 cases; `off beside off` is what such a \
             comparison makes of nothing.",
            plane.settings.rounds,
            found[0].len(),
        ),
        columns: std::iter::once("").chain(FIGURES).map(str::to_owned).collect(),
        rows,
        json,
    }
}

fn start(plane: &Plane, number: usize, place: usize, round: usize, has_pages: bool) -> Result<Grouped> {
    let (name, is_on) = (SERVERS[number], number == ON);
    let (level, ebpf) = if is_on { ("INFO", "auto") } else { ("ERROR", "off") };
    let pages = if has_pages { format!("--debug-web-enabled={is_on}") } else { String::new() };
    paired::start(plane, place, round, name, &format!("--ebpf {ebpf} {pages}"), Some(level))
}

/// Whether the program has pages to turn off.
fn has_debug_pages(settings: &Settings) -> Result<bool> {
    let help = Command::new(&settings.program).args(["registry", "--help"]).output()?;
    Ok(String::from_utf8_lossy(&help.stdout).contains("--debug-web-enabled"))
}

/// What a server does, and how often it was scraped meanwhile at `metrics`, if anywhere.
fn measure(plane: &Plane, server: &Running, metrics: Option<SocketAddr>) -> Result<(Turn, usize)> {
    let [manifest, blob] = [plane.manifest_path(), plane.config_path()].map(|path| -> Result<([f64; 2], usize)> {
        let load = |time| plane.client::<Waits>(&["small", &server.address.to_string(), &path, "GET", "64", time]);
        load(BEFORE)?;
        let before = server.cpu()?;
        let (waits, scrapes) = match metrics {
            Some(metrics) => scraped(metrics, || load(TIME))?,
            None => (load(TIME)?, 0),
        };
        let cpu = server.cpu()? - before;
        Ok(([waits.count as f64 / waits.seconds, waits.count as f64 / cpu], scrapes))
    });
    let (([manifest, of_cpu], seen), ([blob, of_cpu_blob], seen_too)) = (manifest?, blob?);
    Ok(([manifest, of_cpu, blob, of_cpu_blob], seen + seen_too))
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
