//! The demo with real containerds: a network namespace for each node, a containerd and a spegel in each.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use spegel_benches::containerd::{Binaries, Containerd, Options, Version, check_content};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::image::{Image, host_platform};
use spegel_benches::netns::Lab;
use spegel_benches::spegel::{Settings, Spegel, configure};

use super::table::{Pulled, Round};
use super::{Demo, keep_running, patience, print_round};

const NODES: usize = 3;

pub(super) fn run(program: &Path, folder: &Path, image: &Image, demo: &Demo) -> Result<Vec<Round>> {
    Lab::available().map_err(|reason| anyhow!(reason))?;
    let binaries = find_containerd()?;
    let mut lab = Lab::new()?;
    let mut containerds = Vec::new();
    for _ in 0..NODES {
        containerds.push(Containerd::start(&binaries, &lab.add_node()?, &Options::default())?);
    }
    let archive = folder.join("image.tar");
    image.write_archive(&archive)?;
    containerds[0].import(&archive)?;
    let nodes = start(program, folder, &containerds)?;
    wait_announced(&nodes[1], image)?;

    let mut rounds = Vec::new();
    for title in ["first round: only the first node has the image", "second round: the second node lost it"] {
        let pullers = if rounds.is_empty() { &containerds[1..] } else { &containerds[1..2] };
        if !rounds.is_empty() {
            containerds[1].remove_with_aliases(image.reference())?;
        }
        let pulled = pull_all(pullers, image)?;
        print_round(title, &pulled);
        rounds.push((title, pulled));
    }
    println!("\ncontainerd {}: every digest was verified in the stores; there is no upstream", binaries.version);
    if demo.keep {
        keep_running(&nodes, image)?;
    }
    Ok(rounds)
}

fn find_containerd() -> Result<Binaries> {
    let mut reasons = Vec::new();
    for version in [Version::V2_2, Version::V1_6] {
        match version.find() {
            Ok(binaries) => return Ok(binaries),
            Err(reason) => reasons.push(reason),
        }
    }
    bail!("{}", reasons.join("; "))
}

fn start(program: &Path, folder: &Path, containerds: &[Containerd]) -> Result<Vec<Spegel>> {
    let addresses: Vec<_> = containerds.iter().map(|containerd| containerd.node().address().into()).collect();
    let mut nodes = Vec::new();
    for (number, containerd) in containerds.iter().enumerate() {
        let log = folder.join(format!("node{}.log", number + 1));
        let mut settings = Settings::on_node(program, containerd, &addresses, &log);
        settings.arguments = patience();
        let node = settings.spawn()?;
        configure(program, &containerd.certs_dir(), &node.url(), &[], &node.settings().address.to_string())?;
        nodes.push(node);
    }
    for node in &mut nodes {
        node.wait_ready(Duration::from_secs(30))?;
    }
    Ok(nodes)
}

/// Waits until a node can resolve the tag by way of the one that has it.
fn wait_announced(node: &Spegel, image: &Image) -> Result<()> {
    let client = Client::new(Duration::from_secs(2));
    let url = format!("{}/v2/{}/manifests/{}?ns={}", node.url(), image.repository(), image.tag(), image.registry());
    wait_until(Duration::from_secs(20), "answer by way of the first node", || {
        client.head(&url, &[]).is_ok_and(|head| head.status == 200)
    })
}

fn pull_all(containerds: &[Containerd], image: &Image) -> Result<Vec<Pulled>> {
    thread::scope(|scope| {
        let threads: Vec<_> = containerds.iter().map(|containerd| scope.spawn(|| pull(containerd, image))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a pull panicked")))).collect()
    })
}

fn pull(containerd: &Containerd, image: &Image) -> Result<Pulled> {
    let start = Instant::now();
    containerd.pull(image.reference())?;
    let time = start.elapsed();
    let needed: Vec<_> = image.contents_for(host_platform()).collect();
    check_content(containerd, needed.iter().map(|content| content.digest.as_str())).context("after the pull")?;
    let bytes = needed.iter().map(|content| content.size).sum();
    let sources = BTreeMap::from([("peers".to_owned(), bytes)]);
    Ok(Pulled { node: containerd.node().address().to_string(), bytes, time, sources })
}
