//! Content that goes, and daemons that restart.

use std::time::Duration;

use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image};

use super::cluster::{Cluster, Member, NOTICED};
use super::for_each_containerd;

for_each_containerd!(a_deleted_image_is_not_found, restarts_lose_nothing);

/// From the moment that A's containerd has deleted an image, B hears 404, or for the moment that the event takes an answer that is whole:
/// never a 200 that breaks off, and never another error.
fn a_deleted_image_is_not_found(version: Version) {
    let Some(mut cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    let gone = cluster.push("gone:1", |image| image.layers(2, 4 << 20, Compression::None, 1));
    let kept = cluster.push("kept:1", |image| image.layers(1, 300_000, Compression::Gzip, 2));
    for image in [&gone, &kept] {
        cluster.nodes[0].pull(image, image.reference());
    }
    cluster.upstream.stop();
    for image in [&gone, &kept] {
        cluster.wait_resolved(1, image);
    }
    let (a, b) = (&cluster.nodes[0], &cluster.nodes[1]);
    a.containerd.remove_with_aliases(gone.reference()).unwrap();
    wait_until(Duration::from_secs(5), "404 for everything that was deleted", || all_gone(b, &gone))
        .unwrap_or_else(|error| panic!("{error}\n{}\n{}", a.spegel().daemon.log(), b.spegel().daemon.log()));
    let error = b.containerd.pull(gone.reference()).unwrap_err().to_string();
    // 1.6 tells of the last host that it tried, which is upstream, 2.2 of the first 404.
    assert!(error.contains("refused") || error.contains("not found"), "{error}");
    b.pull(&kept, kept.reference());
}

/// Asks for every blob: each answer must be a whole one or a 404.
fn all_gone(b: &Member, image: &Image) -> bool {
    let client = Client::new(Duration::from_secs(10));
    let mut gone = b.head(image, image.tag()).status == 404;
    for content in image.contents() {
        let kind = if content.media_type.contains(".manifest.") { "manifests" } else { "blobs" };
        let (head, digest, length) = client.download(&b.url(image, kind, &content.digest), |_| Ok(())).unwrap();
        match head.status {
            404 => {}
            200 => {
                assert_eq!((digest.as_str(), length), (content.digest.as_str(), content.size));
                // What B verified a moment ago it may give again: that is B's own, and whole.
                gone &= head.header("x-spegel-source") == Some("ready");
            }
            status => panic!("{status} for {} after it was deleted", content.digest),
        }
    }
    gone
}

/// After A's containerd, or its spegel, was stopped and started, B's next pull works.
fn restarts_lose_nothing(version: Version) {
    let Some(mut cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    let images: Vec<Image> = (1..=3)
        .map(|n| cluster.push(&format!("app{n}:1"), |image| image.layers(2, 300_000, Compression::Gzip, n)))
        .collect();
    for image in &images {
        cluster.nodes[0].pull(image, image.reference());
    }
    cluster.upstream.stop();
    cluster.wait_resolved(1, &images[0]);
    cluster.nodes[1].pull(&images[0], images[0].reference());

    cluster.nodes[0].containerd.restart().unwrap();
    cluster.wait_resolved(1, &images[1]);
    cluster.nodes[1].pull(&images[1], images[1].reference());
    // It listens to the new containerd's events, too.
    cluster.nodes[0].containerd.remove_with_aliases(images[1].reference()).unwrap();
    let (a, image) = (&cluster.nodes[0], &images[1]);
    let url = a.url(image, "manifests", image.tag());
    let local = || Client::new(Duration::from_secs(5)).head(&url, &[("X-Spegel-Mirrored", "true")]).unwrap().status;
    wait_until(NOTICED, "404 for what was deleted after the restart", || local() == 404).unwrap();

    let spegel = cluster.nodes[0].spegel.take().unwrap();
    cluster.nodes[0].spegel = Some(spegel.restart().unwrap());
    cluster.wait_resolved(1, &images[2]);
    cluster.nodes[1].pull(&images[2], images[2].reference());
}
