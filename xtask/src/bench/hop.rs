//! What it costs to pass on a layer that is still arriving: the latency of a hop, and the CPU beside that of a complete layer.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use spegel_benches::containerd::{Binaries, Containerd, NAMESPACE, Options, Version};
use spegel_benches::daemon::output;
use spegel_benches::netns::{Lab, Node};
use spegel_benches::spegel::{Settings, Spegel};

use super::Figures;

/// What containerd writes at a time.
const STEP: usize = 1 << 20;
/// Steps whose latency is taken, and the time between two.
const STEPS: usize = 600;
const PAUSE: Duration = Duration::from_millis(10);
/// Steps of the layer whose CPU time is taken: 1 GiB.
const LARGE: usize = 1024;
/// How often that is done.
const ROUNDS: usize = 5;
/// What a growing layer gets of a busy network: 400 MiB/s, about what containerd can hash.
const LARGE_PAUSE: Duration = Duration::from_micros(2500);
/// The longest that anything may take.
const LIMIT: Duration = Duration::from_secs(60);

const METHOD: &str = "Two nodes in network namespaces (reno), each with a containerd and a `spegel registry`; what follows is done in the \
first one's content directory as containerd does it: a folder in `ingest`, `data` that grows by 1 MiB at a time, and its rename. One hop: \
a client of the first node asks it as a peer would. Two: a client of the second node asks that one as its containerd would, which \
relays. Latency: from the return of write(2) to the first and to the last byte of that MiB at the client, 600 times, one every 10 ms. CPU: \
of the first node's process for 1 GiB to one client that follows the growth at 400 MiB/s, to one that reads the complete blob at that \
speed, and to one that reads it as fast as it can, in turn, the medians of five; and of that process and its client together, since the \
kernel charges the same segments to the server where its client waits for them, and to the client where they wait for it. The limit: a \
loop of sendfile(2) on loopback that sends a MiB and sleeps, beside one that sends all it can to a client that sleeps: what sending in \
steps costs the kernel.";

/// CPU time for a layer.
#[derive(Clone, Copy)]
struct Cost {
    /// Of the process that sends it.
    server: Duration,
    /// Of its thread that watches the ingests.
    watcher: Duration,
    /// Of the client's thread.
    client: Duration,
}

/// Both nodes.
struct Bench {
    spegels: [Spegel; 2],
    containerd: Containerd,
    _other: Containerd,
    _folder: tempfile::TempDir,
    _lab: Lab,
    /// Layers so far.
    layers: u64,
}

/// A layer that "containerd" is receiving.
struct Ingest {
    folder: PathBuf,
    data: File,
    blob: PathBuf,
    digest: String,
}

/// The latencies of one run, sorted.
struct Latencies {
    first: Vec<Duration>,
    last: Vec<Duration>,
}

pub(super) fn run(program: &Path) -> Result<Figures> {
    let mut bench = Bench::start(program)?;
    let one = bench.latencies(0)?;
    let two = bench.latencies(1)?;
    let mut costs = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for (costs, cost) in costs.iter_mut().zip(bench.cpu()?) {
            costs.push(cost);
        }
    }
    let of = |which: fn(&Cost) -> Duration| {
        costs.each_ref().map(|costs| {
            let mut times: Vec<Duration> = costs.iter().map(which).collect();
            times.sort();
            times[ROUNDS / 2].as_secs_f64()
        })
    };
    let [growing, paced, complete] = of(|cost| cost.server);
    let [both_growing, both_paced, both_complete] = of(|cost| cost.server + cost.client);
    let [watcher, ..] = of(|cost| cost.watcher);
    let bare = bare_ratio()?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default();
    let mut rows = Vec::new();
    for (hops, latencies) in [("one hop", &one), ("two hops", &two)] {
        for (which, times) in [("first", &latencies.first), ("last", &latencies.last)] {
            let (p50, p99) = (ms(percentile(times, 50)), ms(percentile(times, 99)));
            rows.push(vec![
                format!("{hops}, to the {which} byte of a MiB, p50 / p99"),
                format!("{p50:.2} ms / {p99:.2} ms"),
            ]);
        }
    }
    rows.push(vec!["CPU for a growing GiB".into(), format!("{growing:.3} s")]);
    rows.push(vec!["of which the thread that watches the ingests".into(), format!("{watcher:.3} s")]);
    rows.push(vec!["CPU for a complete GiB, as fast as the growing one".into(), format!("{paced:.3} s")]);
    rows.push(vec!["CPU for a complete GiB, as fast as it goes".into(), format!("{complete:.3} s")]);
    rows.push(vec!["growing beside complete, as fast as each other".into(), format!("{:.2}", growing / paced)]);
    rows.push(vec!["growing beside complete, as fast as it goes".into(), format!("{:.2}", growing / complete)]);
    let both = |complete: f64| format!("{:.2}", both_growing / complete);
    rows.push(vec!["the same with the client's, as fast as each other".into(), both(both_paced)]);
    rows.push(vec!["the same with the client's, as fast as it goes".into(), both(both_complete)]);
    rows.push(vec![
        "growing beside complete, as fast as each other, of a bare sendfile(2) loop".into(),
        format!("{bare:.2}"),
    ]);
    rows.push(vec!["load of the machine at the end".into(), load.to_owned()]);
    let json = json!({
        "one_hop_last_byte_p50_ms": ms(percentile(&one.last, 50)), "one_hop_last_byte_p99_ms": ms(percentile(&one.last, 99)),
        "two_hops_last_byte_p50_ms": ms(percentile(&two.last, 50)), "two_hops_last_byte_p99_ms": ms(percentile(&two.last, 99)),
        "cpu_seconds_per_growing_gib": growing, "cpu_seconds_per_paced_gib": paced,
        "cpu_seconds_per_complete_gib": complete, "cpu_seconds_per_growing_gib_both_ends": both_growing,
        "cpu_seconds_per_paced_gib_both_ends": both_paced, "cpu_seconds_per_complete_gib_both_ends": both_complete, "bare_sendfile_growing_beside_paced": bare, "load": load,
    });
    Ok(Figures { name: "hop", method: METHOD.to_owned(), columns: vec!["what".into(), "figure".into()], rows, json })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

// === impl Bench ===

impl Bench {
    fn start(program: &Path) -> Result<Self> {
        Lab::available().map_err(anyhow::Error::msg)?;
        let found = Version::ALL.iter().rev().find_map(|version| version.find().ok());
        let binaries = found.context("no containerd is installed: `cargo xtask test` does it")?;
        let mut lab = Lab::new()?;
        let nodes = [lab.add_node()?, lab.add_node()?];
        let containerds = [containerd(&binaries, &nodes[0])?, containerd(&binaries, &nodes[1])?];
        let folder = tempfile::Builder::new().prefix("spegel-bench-").tempdir()?;
        let peers: Vec<IpAddr> = nodes.iter().map(|node| node.address().into()).collect();
        let spawn = |n: usize| {
            Settings::on_node(program, &containerds[n], &peers, &folder.path().join(format!("{n}.log"))).spawn()
        };
        let mut spegels = [spawn(0)?, spawn(1)?];
        for spegel in &mut spegels {
            spegel.wait_ready(LIMIT)?;
        }
        let [containerd, other] = containerds;
        Ok(Self { spegels, containerd, _other: other, _folder: folder, _lab: lab, layers: 0 })
    }

    fn begin(&mut self, steps: usize) -> Result<Ingest> {
        self.layers += 1;
        let digest = format!("sha256:{:064x}", self.layers);
        let content = self.containerd.content_path();
        let folder = content.join("ingest").join(format!("{:064x}", self.layers));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("ref"), format!("{NAMESPACE}/1/layer-{digest}"))?;
        fs::write(folder.join("total"), (steps * STEP).to_string())?;
        let data = File::create(folder.join("data"))?;
        Ok(Ingest { folder, data, blob: self.containerd.blob_path(&digest), digest })
    }

    /// A client's connection on which the layer's head has been read. `node` is whose mirror is asked: the first as a peer would, the
    /// second as its containerd would.
    fn ask(&self, node: usize, digest: &str) -> Result<TcpStream> {
        let spegel = &self.spegels[node];
        let address = SocketAddr::new(spegel.settings().address, spegel.settings().ports.registry);
        let header = match node {
            0 => "X-Spegel-Mirrored: true".to_owned(),
            _ => format!("X-Spegel-Node: {}", spegel.settings().address),
        };
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(LIMIT))?;
            write!(stream, "GET /v2/app/blobs/{digest}?ns=registry.test HTTP/1.1\r\nHost: node\r\n{header}\r\n\r\n")?;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                head.push(byte[0]);
            }
            match String::from_utf8_lossy(&head).split(' ').nth(1) {
                Some("200") => return Ok(stream),
                // It is not announced yet.
                Some("404") if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
                status => bail!("{status:?} for {digest}"),
            }
        }
    }

    fn latencies(&mut self, node: usize) -> Result<Latencies> {
        let mut ingest = self.begin(STEPS + 1)?;
        let step = vec![0x5a; STEP];
        // It is offered once it grows.
        thread::sleep(Duration::from_millis(100));
        ingest.data.write_all(&step)?;
        let mut stream = self.ask(node, &ingest.digest)?;
        let client = thread::spawn(move || -> Result<Vec<(Instant, Instant)>> {
            let mut buffer = vec![0; STEP];
            let mut times = Vec::with_capacity(STEPS + 1);
            for _ in 0..=STEPS {
                stream.read_exact(&mut buffer[..1])?;
                let first = Instant::now();
                stream.read_exact(&mut buffer[1..])?;
                times.push((first, Instant::now()));
            }
            Ok(times)
        });
        let mut written = Vec::with_capacity(STEPS);
        for _ in 0..STEPS {
            thread::sleep(PAUSE);
            ingest.data.write_all(&step)?;
            written.push(Instant::now());
        }
        let times = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        fs::remove_dir_all(ingest.folder)?;
        let pairs = written.iter().zip(&times[1..]);
        let (mut first, mut last): (Vec<_>, Vec<_>) = pairs
            .map(|(at, (first, last))| (first.saturating_duration_since(*at), last.saturating_duration_since(*at)))
            .unzip();
        first.sort();
        last.sort();
        Ok(Latencies { first, last })
    }

    /// What a growing layer costs, the same layer when it is complete, read as fast, and that read without a pause.
    fn cpu(&mut self) -> Result<[Cost; 3]> {
        let mut ingest = self.begin(LARGE)?;
        let step = vec![0x5a; STEP];
        thread::sleep(Duration::from_millis(100));
        ingest.data.write_all(&step)?;
        let stream = self.ask(0, &ingest.digest)?;
        let before = self.cpu_time()?;
        let client = thread::spawn(move || read(stream, Duration::ZERO));
        for _ in 1..LARGE {
            ingest.data.write_all(&step)?;
            thread::sleep(LARGE_PAUSE);
        }
        let client = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        let growing = self.cpu_time()?.since(before, client);
        fs::create_dir_all(ingest.blob.parent().context("a blob has a folder")?)?;
        fs::rename(ingest.folder.join("data"), &ingest.blob)?;
        fs::remove_dir_all(&ingest.folder)?;

        thread::sleep(Duration::from_millis(100));
        let paced = self.cpu_to_read(&ingest.digest, LARGE_PAUSE)?;
        let complete = self.cpu_to_read(&ingest.digest, Duration::ZERO)?;
        fs::remove_file(&ingest.blob)?;
        Ok([growing, paced, complete])
    }

    /// The CPU time of the first node's process for a client that reads a complete blob and pauses after each step.
    fn cpu_to_read(&self, digest: &str, pause: Duration) -> Result<Cost> {
        let stream = self.ask(0, digest)?;
        let before = self.cpu_time()?;
        let client = read(stream, pause)?;
        Ok(self.cpu_time()?.since(before, client))
    }

    /// User and system time of the first node's process, from its threads' run times in nanoseconds: the ticks of `/proc/PID/stat` are
    /// too coarse.
    fn cpu_time(&self) -> Result<Cost> {
        let mut cost = Cost { server: Duration::ZERO, watcher: Duration::ZERO, client: Duration::ZERO };
        for thread in fs::read_dir(format!("/proc/{}/task", self.spegels[0].daemon.pid()))? {
            let thread = thread?.path();
            let time = run_time(&thread)?;
            cost.server += time;
            if fs::read_to_string(thread.join("comm"))?.trim() == "ingest" {
                cost.watcher += time;
            }
        }
        Ok(cost)
    }
}

impl Cost {
    /// What was used since then, and by a client.
    fn since(self, before: Self, client: Duration) -> Self {
        Self { server: self.server - before.server, watcher: self.watcher - before.watcher, client }
    }
}

fn containerd(binaries: &Binaries, node: &Node) -> Result<Containerd> {
    output(node.command("sysctl").args(["-q", "-w", "net.ipv4.tcp_congestion_control=reno"]))?;
    Containerd::start(binaries, node, &Options::default())
}

/// Reads a large layer, with a pause after each step. Returns the CPU time that it took.
fn read(mut stream: TcpStream, pause: Duration) -> Result<Duration> {
    let before = own_cpu_time()?;
    let mut buffer = vec![0; STEP];
    for step in 0..LARGE {
        stream.read_exact(&mut buffer).with_context(|| format!("the body ended in its MiB {step}"))?;
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    Ok(own_cpu_time()? - before)
}

/// How much more CPU time sending in steps takes than sending as the client takes it, of sendfile(2) alone.
fn bare_ratio() -> Result<f64> {
    let file = tempfile::tempfile()?;
    file.set_len((LARGE * STEP) as u64)?;
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let in_steps = bare(&file, LARGE_PAUSE, Duration::ZERO)?.as_secs_f64();
        ratios.push(in_steps / bare(&file, Duration::ZERO, LARGE_PAUSE)?.as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios[ROUNDS / 2])
}

/// The CPU time of a thread that sends a file and pauses after each step, to a client that pauses too.
fn bare(file: &File, pause: Duration, clients: Duration) -> Result<Duration> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let client = thread::spawn(move || read(stream, clients));
    let (server, _) = listener.accept()?;
    server.set_write_timeout(Some(LIMIT))?;
    let before = own_cpu_time()?;
    for step in 0..LARGE {
        let (mut offset, end) = ((step * STEP) as u64, ((step + 1) * STEP) as u64);
        while offset < end {
            let left = usize::try_from(end - offset)?;
            rustix::fs::sendfile(&server, file, Some(&mut offset), left)?;
        }
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    let took = own_cpu_time()?.saturating_sub(before);
    client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
    Ok(took)
}

/// The run time of this thread.
fn own_cpu_time() -> Result<Duration> {
    run_time(Path::new("/proc/thread-self"))
}

/// The run time of a thread, by its folder in procfs.
fn run_time(thread: &Path) -> Result<Duration> {
    let stat = fs::read_to_string(thread.join("schedstat"))?;
    Ok(Duration::from_nanos(stat.split(' ').next().context("no run time")?.parse()?))
}
