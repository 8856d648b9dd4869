//! What real containerds get from upstream, as the kernel counts it, beside what the upstream and the nodes' links count.

use std::net::IpAddr;
use std::time::Duration;

use spegel::ebpf::{Report, Watch};
use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::{output, wait_until};
use spegel_benches::image::Compression;
use spegel_benches::netns::Node;

use super::cluster::Cluster;
use crate::ebpf::upstream::Group;
use crate::ebpf::{settings, watch};

/// Heads, connections, tokens: little beside layers.
const LITTLE: f64 = 0.02;

/// The first node pulls from upstream, the second the same from the first.
#[test]
fn upstreams_bytes_are_those_that_its_link_counts() {
    let Some(cluster) = Cluster::start(Version::V2_2, 2, &Options::default()) else { return };
    let upstream = cluster.upstream.node().address();
    let port = cluster.upstream.host().rsplit_once(':').unwrap().1.parse().unwrap();
    let image = cluster.push("counted:1", |image| image.layers(3, 4 << 20, Compression::None, 1));
    let names = ["spegel-test-first", "spegel-test-second"];
    let mut views = Vec::new();
    for (member, name) in cluster.nodes.iter().zip(names) {
        let Some(group) = Group::new(name) else {
            return println!("skipped: no control groups of version 2 can be made here");
        };
        member.containerd.enter_group(&group.0).unwrap();
        let mut kernels = settings(2);
        (kernels.upstream_ports, kernels.containerd_cgroup) = (vec![port], Some(group.0.clone()));
        let Some(view) = watch(&kernels) else { return };
        views.push((view, group));
    }
    let (first, second) = (&cluster.nodes[0], &cluster.nodes[1]);
    let before = link_received(first.containerd.node());
    first.pull_by_cri(&image, image.reference());
    let link = link_received(first.containerd.node()) - before;
    let content = cluster.upstream.sent(first.containerd.node(), "/v2/");
    let received = received(&views[0].0, upstream.into(), content);
    println!("content {content}, counted by the kernel {received}, by the link {link}");
    assert!(received >= content && received <= link, "content {content}, counted {received}, link {link}");
    assert!((received as f64) < content as f64 * (1.0 + LITTLE), "content {content}, counted {received}");

    cluster.wait_resolved(1, &image);
    second.pull_by_cri(&image, image.reference());
    let sent = cluster.upstream.sent(second.containerd.node(), "/v2/");
    let report = views[1].0.report();
    println!("the second node: {sent} from upstream, counted {}", of(&report, upstream.into()));
    assert!(of(&report, upstream.into()) < content / 10, "{report:#?}");
}

fn of(report: &Report, upstream: IpAddr) -> u64 {
    let rows = report.peers.iter().filter(|row| row.address == upstream && row.role == "upstream");
    rows.map(|row| row.received).sum()
}

/// What the kernel has counted once all of `content` is in it: what a connection has received since it last sent something is seen when it is
/// used again or ends, and containerd keeps idle ones for half a minute.
fn received(watch: &Watch, upstream: IpAddr, content: u64) -> u64 {
    let idle = Duration::from_secs(60);
    let seen = wait_until(idle, "all of the content", || of(&watch.report(), upstream) >= content);
    seen.unwrap_or_else(|error| panic!("{error:#}: {:#?}", watch.report()));
    of(&watch.report(), upstream)
}

/// Bytes that a node's link has received, with all their headers.
fn link_received(node: &Node) -> u64 {
    let text = output(node.command("cat").arg("/proc/net/dev")).unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
