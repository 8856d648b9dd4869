//! What a node costs that does nothing, and what a miss costs its containerd.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use spegel_benches::spegel::Spegel;

use super::Figures;
use crate::demo::layouts;

/// Starts whose median is told.
const STARTS: usize = 5;
/// Requests for content that nobody has.
const MISSES: usize = 2000;
/// How long the nodes do nothing before their memory is read.
const SETTLE: Duration = Duration::from_secs(10);

const METHOD: &str = "Three `spegel registry` processes on 127.0.0.1 to 127.0.0.3, each with an empty OCI layout and the other two as \
static peers, default settings. Ready: from the first process's start until all three answer 200 on /readyz, the median of five starts. \
Memory: from /proc after ten idle seconds, the largest of the three. Time to 404: 2,000 requests one after the other on one connection to \
one node, each for another digest that nobody has.";

pub(super) fn run(program: &Path) -> Result<Figures> {
    let mut starts = Vec::new();
    for _ in 1..STARTS {
        let (nodes, ready, _folder) = start(program)?;
        starts.push(ready);
        stop(nodes)?;
    }
    let (nodes, ready, _folder) = start(program)?;
    starts.push(ready);
    starts.sort();
    let ready = starts[STARTS / 2];
    std::thread::sleep(SETTLE);
    let (rss, anonymous) = memory(&nodes)?;
    let misses = misses(SocketAddr::new(nodes[0].settings().address, nodes[0].settings().ports.registry))?;
    stop(nodes)?;
    let (p50, p99) = (misses[MISSES / 2], misses[MISSES * 99 / 100]);
    let size = std::fs::metadata(program)?.len();
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    Ok(Figures {
        name: "idle",
        method: METHOD.to_owned(),
        columns: vec!["what".into(), "figure".into()],
        rows: vec![
            vec!["start to ready, three nodes".into(), ms(ready)],
            vec!["resident memory, idle".into(), mib(rss)],
            vec!["of it anonymous".into(), mib(anonymous)],
            vec!["time to 404, p50".into(), ms(p50)],
            vec!["time to 404, p99".into(), ms(p99)],
            vec!["size of the program".into(), mib(size)],
        ],
        json: json!({
            "ready_seconds": ready.as_secs_f64(), "rss_bytes": rss, "anonymous_bytes": anonymous,
            "miss_p50_seconds": p50.as_secs_f64(), "miss_p99_seconds": p99.as_secs_f64(), "binary_bytes": size,
        }),
    })
}

/// Three nodes, how long they took until all were ready, and the folder that they live in.
fn start(program: &Path) -> Result<(Vec<Spegel>, Duration, tempfile::TempDir)> {
    let folder = tempfile::Builder::new().prefix("spegel-bench-").tempdir()?;
    let dirs: Vec<PathBuf> = (1..=layouts::NODES).map(|n| folder.path().join(format!("node{n}"))).collect();
    let ports = layouts::free_ports()?;
    let start = Instant::now();
    let mut nodes = layouts::spawn(program, folder.path(), &dirs, ports, &[])?;
    for node in &mut nodes {
        let address = SocketAddr::new(node.settings().address, ports.registry);
        while !is_ready(address) {
            ensure!(node.daemon.is_alive(), "a node ended:\n{}", node.daemon.log());
            ensure!(start.elapsed() < Duration::from_secs(30), "not ready within 30 s:\n{}", node.daemon.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok((nodes, start.elapsed(), folder))
}

fn stop(nodes: Vec<Spegel>) -> Result<()> {
    for node in nodes {
        node.daemon.stop()?;
    }
    Ok(())
}

fn is_ready(address: SocketAddr) -> bool {
    let ask = || -> Result<bool> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(exchange(&mut stream, "/readyz")? == 200)
    };
    ask().unwrap_or(false)
}

/// The largest resident set and the largest anonymous part of it, in bytes.
fn memory(nodes: &[Spegel]) -> Result<(u64, u64)> {
    let mut largest = (0, 0);
    for node in nodes {
        let field = |name| field_of(node.daemon.pid(), name);
        largest = (field("VmRSS:")?.max(largest.0), field("RssAnon:")?.max(largest.1));
    }
    Ok(largest)
}

/// A field of a process's status, in bytes.
pub(super) fn field_of(pid: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// How long each miss took, sorted.
fn misses(address: SocketAddr) -> Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut times = Vec::with_capacity(MISSES);
    for n in 0..MISSES {
        let path =
            format!("/v2/app/blobs/sha256:{:064x}?ns=registry.test", (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let start = Instant::now();
        let status = exchange(&mut stream, &path)?;
        times.push(start.elapsed());
        ensure!(status == 404, "{status} for {path}");
    }
    times.sort();
    Ok(times)
}

/// One request on a connection that is kept: the status, once the whole response was read.
fn exchange(stream: &mut TcpStream, path: &str) -> Result<u16> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: node\r\n\r\n")?;
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            bail!("the connection ended in a response");
        }
        bytes.extend_from_slice(&buffer[..read]);
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("no length")?;
        if bytes.len() >= end + 4 + length.parse::<usize>()? {
            return Ok(head.split(' ').nth(1).context("no status")?.parse()?);
        }
    }
}
