//! Many nodes at once.

use std::thread;

use spegel_benches::containerd::{Options, Version};
use spegel_benches::image::Compression;

use super::cluster::Cluster;

/// Seven nodes pull what an eighth has, at the same time: upstream is asked for nothing.
#[test]
fn seven_nodes_pull_what_an_eighth_has() {
    let Some(cluster) = Cluster::start(Version::V2_2, 8, &Options::default()) else { return };
    let image = cluster.push("seven:1", |image| image.layers(4, 3 << 20, Compression::Gzip, 8));
    cluster.nodes[0].pull(&image, image.reference());
    // It is announced once another finds it; the others find out for themselves.
    cluster.wait_resolved(1, &image);
    let before = cluster.upstream.requests("GET", "/v2/") + cluster.upstream.requests("HEAD", "/v2/");
    thread::scope(|scope| {
        for node in &cluster.nodes[1..] {
            scope.spawn(|| node.pull(&image, image.reference()));
        }
    });
    let after = cluster.upstream.requests("GET", "/v2/") + cluster.upstream.requests("HEAD", "/v2/");
    assert_eq!(after, before, "requests to upstream");
}
