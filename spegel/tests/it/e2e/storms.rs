//! What no node has, and all pull at once.

use std::thread;
use std::time::{Duration, Instant};

use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::image::{Compression, Image, ImageBuilder, host_platform};

use super::cluster::{Cluster, Member};
use super::{cri, for_each_containerd};

/// What the upstream's link carries, in Mbit/s.
const UPSTREAM: u32 = 100;

const NODES: usize = 6;

for_each_containerd!(upstream_sends_it_once);

fn upstream_sends_it_once(version: Version) {
    let Some(cluster) = Cluster::start_with(version, NODES, &Options::default(), &["--storm", "on"]) else { return };
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
    let alone = cluster.push(&format!("{name}-alone:1"), |image| shape(image, 40));
    let all = cluster.push(&format!("{name}:1"), |image| shape(image, 41));
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
    assert!(total >= 0.99, "the registry's log is not read right");
    assert!(total <= 1.2, "upstream sent {total:.2} times the layers\n{}", logs(cluster));
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
