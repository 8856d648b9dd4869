//! The demo that needs nothing: three processes on loopback, each with its own OCI layout.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::image::Image;
use spegel_benches::spegel::{Ports, Settings, Source, Spegel};

use super::pull::Puller;
use super::table::{Pulled, Round};
use super::{Demo, keep_running, patience, print_round};

/// 127.0.0.1 to 127.0.0.3, which Linux answers for without being told.
pub(crate) const NODES: u8 = 3;

/// How long a change of a layout may take until it is served.
const NOTICED: Duration = Duration::from_secs(20);

pub(super) fn run(program: &Path, folder: &Path, image: &Image, demo: &Demo) -> Result<Vec<Round>> {
    let ports = free_ports()?;
    let layouts: Vec<PathBuf> = (1..=NODES).map(|n| folder.join(format!("node{n}"))).collect();
    let nodes = start(program, folder, &layouts, ports)?;
    image.write_layout(&layouts[0])?;
    wait_served(&nodes[0], image).context("the first node does not serve the image that was put into its layout")?;

    let mut rounds = Vec::new();
    for (title, stored) in
        [("first round: only the first node has the image", true), ("second round: every node has it", false)]
    {
        let pulled = pull_all(folder, &nodes, &layouts, image, stored)?;
        print_round(title, &pulled);
        if stored {
            for (node, layout) in nodes.iter().zip(&layouts).skip(1) {
                // All blobs are there: this adds the name.
                image.write_layout(layout)?;
                wait_served(node, image).with_context(|| format!("{} does not serve what it pulled", node.url()))?;
            }
        }
        rounds.push((title, pulled));
    }
    println!("\nevery digest was verified");
    if demo.keep {
        keep_running(&nodes, image)?;
    }
    for node in nodes {
        node.daemon.stop()?;
    }
    Ok(rounds)
}

/// All processes at once, then waits until they found each other.
fn start(program: &Path, folder: &Path, layouts: &[PathBuf], ports: Ports) -> Result<Vec<Spegel>> {
    let mut nodes = spawn(program, folder, layouts, ports, &patience())?;
    for node in &mut nodes {
        node.wait_ready(Duration::from_secs(30))?;
    }
    Ok(nodes)
}

/// A process on each of the demo's addresses, with an empty layout each and the others as peers.
pub(crate) fn spawn(
    program: &Path,
    folder: &Path,
    layouts: &[PathBuf],
    ports: Ports,
    arguments: &[String],
) -> Result<Vec<Spegel>> {
    let mut nodes = Vec::new();
    for (number, layout) in (1..=NODES).zip(layouts) {
        // An empty layout, so that a process has something to watch.
        std::fs::create_dir_all(layout.join("blobs/sha256"))?;
        std::fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
        std::fs::write(layout.join("index.json"), "{\"schemaVersion\":2,\"manifests\":[]}")?;
        let others = (1..=NODES).filter(|other| *other != number).map(address).collect();
        let settings = Settings {
            program: program.to_path_buf(),
            node: None,
            address: address(number),
            ports,
            source: Source::Layout(layout.clone()),
            peers: others,
            arguments: arguments.to_vec(),
            log: folder.join(format!("node{number}.log")),
        };
        nodes.push(settings.spawn()?);
    }
    Ok(nodes)
}

/// Every node but the first pulls at the same time, through its own mirror.
fn pull_all(folder: &Path, nodes: &[Spegel], layouts: &[PathBuf], image: &Image, stored: bool) -> Result<Vec<Pulled>> {
    let bars = MultiProgress::new();
    let scratch = folder.join("scratch");
    let pulled = thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter()
            .zip(layouts)
            .skip(1)
            .map(|(node, layout)| {
                let name = node.settings().address.to_string();
                let bar = bars.add(progress_bar(&name, image.size()));
                let (mirror, scratch) = (node.url(), scratch.join(&name));
                scope.spawn(move || {
                    let layout = if stored { layout } else { &scratch };
                    Puller { node: name, mirror, layout, image, bar }.pull()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a pull panicked")))).collect()
    });
    if scratch.exists() {
        std::fs::remove_dir_all(&scratch)?;
    }
    pulled
}

fn progress_bar(node: &str, size: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}");
    ProgressBar::new(size)
        .with_prefix(node.to_owned())
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Waits until a node answers for the image's tag itself.
fn wait_served(node: &Spegel, image: &Image) -> Result<()> {
    let client = Client::new(Duration::from_secs(2));
    let url = format!("{}/v2/{}/manifests/{}?ns={}", node.url(), image.repository(), image.tag(), image.registry());
    wait_until(NOTICED, "answer from the node itself", || {
        // A mirrored request is answered from local content only.
        client.head(&url, &[("X-Spegel-Mirrored", "true")]).is_ok_and(|head| head.status == 200)
    })
}

fn address(number: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, number).into()
}

/// Three ports that are free on every address of the demo: 15000, 15001 and 19090, or some hundreds more.
pub(crate) fn free_ports() -> Result<Ports> {
    let free = |port| (1..=NODES).all(|number| TcpListener::bind((address(number), port)).is_ok());
    for offset in (0..4000).step_by(100) {
        let ports = Ports { registry: 15000 + offset, router: 15001 + offset, metrics: 19090 + offset };
        if [ports.registry, ports.router, ports.metrics].into_iter().all(free) {
            return Ok(ports);
        }
    }
    bail!("no free ports between 15000 and 23090 on 127.0.0.1 to 127.0.0.{NODES}")
}
