//! Large layers, whole and in parallel chunks.

use spegel_benches::containerd::{Options, Version};
use spegel_benches::image::Compression;

use super::cluster::Cluster;
use super::for_each_containerd;

for_each_containerd!(a_layer_of_512_mib);

/// Streamed from peer to client: the relaying process's memory stays small.
fn a_layer_of_512_mib(version: Version) {
    let Some(mut cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    let image = cluster.push("large:1", |image| image.layers(1, 512 << 20, Compression::None, 1));
    cluster.nodes[0].pull(&image, image.reference());
    cluster.upstream.stop();
    cluster.wait_resolved(1, &image);
    let member = &cluster.nodes[1];
    member.pull_by_cri(&image, image.reference());
    let peak = peak_memory_mib(member.spegel().daemon.pid());
    assert!(peak < 128, "spegel's memory rose to {peak} MiB");
}

/// containerd 2.2 would ask for a layer in several ranges at once, and fail the pull where one of them ends early: it is given the whole
/// in its first answer, which it can resume anywhere.
#[test]
fn a_parallel_fetch_gets_each_layer_whole() {
    let options = Options { layer_fetch_buffer: Some(8 << 20), ..Options::default() };
    let Some(mut cluster) = Cluster::start(Version::V2_2, 3, &options) else { return };
    let image = cluster.push("chunks:1", |image| image.layers(2, 64 << 20, Compression::None, 2));
    cluster.nodes[0].pull_by_cri(&image, image.reference());
    cluster.upstream.stop();
    for n in [1, 2] {
        cluster.wait_resolved(n, &image);
        cluster.nodes[n].pull_by_cri(&image, image.reference());
        let spegel = cluster.nodes[n].spegel();
        let parts = spegel.metric("http_request_duration_seconds_count", &["code=\"206\""]).unwrap_or(0.0);
        assert!(parts == 0.0, "{parts} answers with a part of a layer");
        let log = spegel.daemon.log();
        assert!(!log.contains("ERROR"), "a client that leaves early is no error:\n{log}");
    }
}

/// `VmHWM` is the largest resident set of a process, file pages included.
fn peak_memory_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
