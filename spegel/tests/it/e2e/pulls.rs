//! The main job: what one node pulled from the registry, others pull from it.

use spegel_benches::containerd::{Options, Version};
use spegel_benches::image::{Compression, host_platform};

use super::cluster::{Cluster, by_digest};
use super::for_each_containerd;

for_each_containerd!(from_a_peer, an_imported_image);

const PLATFORMS: &[&str] = &["linux/amd64", "linux/arm64"];

/// A pulls, the registry stops, B and C pull: by tag and by digest, through `ctr` and through the CRI. The images are indexes of which
/// A has its own platform only; one has 12 layers, one has a layer in each compression.
fn from_a_peer(version: Version) {
    let Some(mut cluster) = Cluster::start(version, 3, &Options::default()) else { return };
    let many =
        cluster.push("team/many:1.0", |image| image.platforms(PLATFORMS).layers(12, 200_000, Compression::Gzip, 1));
    let kinds = cluster.push("kinds:latest", |image| {
        image
            .platforms(PLATFORMS)
            .layers(1, 500_000, Compression::Zstd, 2)
            .layers(1, 500_000, Compression::None, 2)
            .layers(1, 500_000, Compression::Gzip, 2)
    });
    let [a, b, c] = &cluster.nodes[..] else { panic!("three nodes") };
    a.pull(&many, many.reference());
    a.pull_by_cri(&kinds, kinds.reference());
    let had = a.containerd.content().unwrap();
    let other = PLATFORMS.iter().find(|platform| **platform != host_platform()).unwrap();
    let lacks = many.layers_for(other).filter(|layer| !had.contains(&layer.digest)).count();
    assert_eq!(lacks, 12, "of the index, only this machine's platform was pulled");
    cluster.upstream.stop();

    for n in [1, 2] {
        cluster.wait_resolved(n, &many);
        cluster.wait_resolved(n, &kinds);
    }
    b.pull(&many, many.reference());
    b.pull_by_cri(&kinds, kinds.reference());
    c.pull(&many, &by_digest(&many));
    c.pull_by_cri(&kinds, &by_digest(&kinds));
    for member in [b, c] {
        let hits = member.spegel().metric("spegel_mirror_requests_total", &["cache=\"hit\""]).unwrap();
        assert!(hits >= 18.0, "only {hits} requests were answered by the mirror");
    }
}

/// An air-gap archive: its blobs carry no label that says where they are from, and it comes with both platforms.
fn an_imported_image(version: Version) {
    let Some(mut cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    cluster.upstream.stop();
    let image = cluster.make("airgap:1", |image| image.platforms(PLATFORMS).layers(2, 300_000, Compression::Gzip, 3));
    let archive = cluster.folder.path().join("image.tar");
    image.write_archive(&archive).unwrap();
    cluster.nodes[0].containerd.import(&archive).unwrap();
    cluster.wait_resolved(1, &image);
    cluster.nodes[1].pull_by_cri(&image, image.reference());
}
