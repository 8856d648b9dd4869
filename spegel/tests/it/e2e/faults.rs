//! A peer that goes away in the middle of a layer: the pull goes on at the upstream registry.

use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::faults::{Scene, Setup, rows};
use spegel_benches::image::Compression;

use super::cluster::{Cluster, PROGRAM, RESOLVE_TIMEOUT};
use super::{cri, for_each_containerd};

for_each_containerd!(
    a_peer_is_killed_in_the_middle_of_a_layer,
    a_peer_is_stopped_in_the_middle_of_a_layer,
    a_peer_is_told_to_end_in_the_middle_of_a_layer,
    the_own_mirror_is_told_to_end_in_the_middle_of_a_layer,
    the_only_peer_speaks_badly
);

/// The rows of `cargo xtask faults` that have failed pulls once, or would hang one for ever; all of them take minutes.
const ROWS: [&str; 6] =
    ["length too small", "stops at 1, FIN", "stops at half, silence", "1 KiB/s", "wrong bytes", "silent"];

fn the_only_peer_speaks_badly(version: Version) {
    check_rows(version, Options::default());
}

#[test]
fn the_only_peer_speaks_badly_to_a_parallel_fetch() {
    check_rows(Version::V2_2, Options { layer_fetch_buffer: Some(1 << 20), ..Options::default() });
}

/// Each pull succeeds, with the rest from upstream; where the bytes were wrong the next one does.
fn check_rows(version: Version, options: Options) {
    let setup = Setup {
        program: PROGRAM.into(),
        version,
        options,
        layer: 6 << 20,
        company: false,
        upstream_mbit: 400,
        arguments: vec!["--mirror-resolve-timeout".into(), RESOLVE_TIMEOUT.into()],
    };
    let mut scene = match Scene::start(&setup) {
        Ok(scene) => scene,
        Err(reason) => {
            println!("skipped: {reason:#}");
            return;
        }
    };
    let baseline = scene.baseline().unwrap();
    for row in rows().iter().filter(|row| ROWS.contains(&row.name.as_str())) {
        let outcome = scene.run(row).unwrap();
        println!("{version}, {}: {:.1} s, no mirror {baseline:.1} s", row.name, outcome.seconds);
        assert!(outcome.met, "{outcome:#?}");
        assert!(outcome.failed.is_none() || row.name == "wrong bytes", "{outcome:#?}");
        assert!(outcome.failed_again.is_none(), "{outcome:#?}");
        // A stall is noticed after five seconds.
        assert!(outcome.seconds < baseline + 10.0, "{outcome:#?}");
    }
}

/// SIGKILL resets the connection: containerd resumes from upstream where the relay ended.
fn a_peer_is_killed_in_the_middle_of_a_layer(version: Version) {
    lose(0, version, &Options::default(), Signal::KILL);
}

/// SIGSTOP says nothing: the stall must be noticed first, after five seconds.
fn a_peer_is_stopped_in_the_middle_of_a_layer(version: Version) {
    lose(0, version, &Options::default(), Signal::STOP);
}

/// containerd's parallel fetch fails a pull on an error status for any chunk but the first.
#[test]
fn a_peer_is_killed_while_chunks_are_fetched_in_parallel() {
    let options = Options { layer_fetch_buffer: Some(8 << 20), ..Options::default() };
    lose(0, Version::V2_2, &options, Signal::KILL);
}

/// SIGTERM lets the response go on for a second; then an orderly close makes B go on elsewhere, as it does to B's containerd.
fn a_peer_is_told_to_end_in_the_middle_of_a_layer(version: Version) {
    lose(0, version, &Options::default(), Signal::TERM);
}

/// The same of B's own mirror: containerd resumes upstream, by itself.
fn the_own_mirror_is_told_to_end_in_the_middle_of_a_layer(version: Version) {
    lose(1, version, &Options::default(), Signal::TERM);
}

/// The own mirror ends while containerd fetches chunks in parallel.
#[test]
fn the_own_mirror_is_told_to_end_while_chunks_are_fetched_in_parallel() {
    let options = Options { layer_fetch_buffer: Some(8 << 20), ..Options::default() };
    lose(1, Version::V2_2, &options, Signal::TERM);
}

/// A has a layer of 48 MiB behind a link of 100 Mbit/s. A's mirror (0), or B's (1), is lost when B has some of it. The pull of B succeeds.
fn lose(whose: usize, version: Version, options: &Options, signal: Signal) {
    let Some(mut cluster) = Cluster::start_with(version, 2, options, &["--drain-timeout", "1s"]) else { return };
    let image = cluster.push("lost:1", |image| image.layers(1, 48 << 20, Compression::None, 5));
    cluster.nodes[0].pull(&image, image.reference());
    cluster.wait_resolved(1, &image);
    cluster.lab.limit(cluster.nodes[0].containerd.node(), 100).unwrap();
    let before = cluster.upstream.requests("GET", "/blobs/");

    let (a, b) = (&cluster.nodes[0], &cluster.nodes[1]);
    let (socket, reference) = (b.containerd.socket(), image.reference().to_owned());
    let start = Instant::now();
    let pull = thread::spawn(move || cri::pull(&socket, &reference));
    let relayed = || b.spegel().metric("spegel_serve_bytes_total", &["kind=\"relay\""]).unwrap_or_default();
    wait_until(Duration::from_secs(20), "some of the layer from the peer", || relayed() > 8e6).unwrap();
    [a, b][whose].spegel().daemon.signal(signal).unwrap();
    pull.join().unwrap().unwrap_or_else(|error| panic!("{error}\nspegel:\n{}", b.spegel().daemon.log()));
    let took = start.elapsed();
    b.check(&image, image.reference());
    let asked = cluster.upstream.requests("GET", "/blobs/") - before;
    println!(
        "containerd {version}, {signal:?} of {} in the middle of a layer: pulled in {took:.1?}, {asked} requests went upstream",
        ["the peer", "the own mirror"][whose]
    );
    assert!(asked >= 1, "the rest can only be upstream's");
    assert!(took < Duration::from_secs(30), "a bound was missed: {took:?}");
    if signal == Signal::TERM {
        let mut lost = cluster.nodes[whose].spegel.take().unwrap();
        let status = lost.daemon.wait_exit(Duration::from_secs(10)).unwrap();
        assert!(status.success(), "{status}: {}", lost.daemon.log());
        return;
    }
    // A stopped process would not hear that it is to end.
    cluster.nodes[0].spegel().daemon.signal(Signal::CONT).ok();
}
