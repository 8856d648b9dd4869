//! Nobody has it: the pull goes upstream, and the mirror is hardly in the way.

use std::time::{Duration, Instant};

use spegel_benches::containerd::{Options, Version};
use spegel_benches::image::{Compression, Image};

use super::cluster::Cluster;
use super::for_each_containerd;

for_each_containerd!(nobody_has_it);

/// What each miss may cost: the whole pull asks for a tag, a manifest, a configuration and its layers.
const MOST_PER_REQUEST: Duration = Duration::from_millis(250);

fn nobody_has_it(version: Version) {
    let Some(cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    let member = &cluster.nodes[0];
    let images: Vec<Image> = (1..=6)
        .map(|n| cluster.push(&format!("app{n}:1"), |image| image.layers(4, 500_000, Compression::Gzip, n)))
        .collect();
    let timed = |images: &[Image]| -> Duration {
        let start = Instant::now();
        for image in images {
            member.pull(image, image.reference());
        }
        start.elapsed() / u32::try_from(images.len()).unwrap()
    };
    let with = timed(&images[..3]);
    let misses = member.spegel().metric("spegel_mirror_requests_total", &["cache=\"miss\""]).unwrap();
    assert!(misses >= 15.0, "the mirror was asked {misses} times before upstream was");

    // Without a mirror: the same file, that names the upstream only.
    member.containerd.use_registry(&cluster.upstream.host(), &cluster.upstream.url()).unwrap();
    let without = timed(&images[3..]);
    let cost = with.saturating_sub(without);
    println!(
        "containerd {version}, an image of 4 layers that nobody has: {:.0} ms with the mirror, {:.0} ms without, {:.0} ms more",
        with.as_secs_f64() * 1e3,
        without.as_secs_f64() * 1e3,
        cost.as_secs_f64() * 1e3,
    );
    assert!(cost < MOST_PER_REQUEST * 7, "the mirror costs {cost:?} a pull");
}
