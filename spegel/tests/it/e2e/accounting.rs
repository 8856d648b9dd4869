//! What the kernel was asked to do with a body's bytes, as strace sees it: none of them is read into the process.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use spegel_benches::daemon::{Daemon, find_program, wait_until};
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image, ImageBuilder, host_platform};
use spegel_benches::netns::{Lab, Node};
use spegel_benches::spegel::{Ports, Settings, Source, Spegel};

use super::cluster::{NOTICED, PROGRAM};

/// Bytes of the layer, and how often it is fetched of each node.
const LAYER: u64 = 64 << 20;
const FETCHES: u64 = 4;

/// Calls that bring bytes into the process, and those that send bytes of the process.
const IN: [&str; 7] = ["read", "readv", "pread64", "preadv", "preadv2", "recvfrom", "recvmsg"];
const OUT: [&str; 6] = ["write", "writev", "pwrite64", "sendto", "sendmsg", "pwritev"];

/// Heads, log lines, the swarm's own traffic, and what came with a peer's head: far below one body.
const SLACK: u64 = 2 << 20;

#[test]
fn no_byte_of_a_body_is_read_into_the_process() {
    if let Err(reason) = Lab::available() {
        return println!("skipped: {reason}");
    }
    if find_program("strace").is_none() {
        return println!("skipped: the program 'strace' is not installed");
    }
    for engine in ["io-uring", "tokio"] {
        check(engine);
    }
}

fn check(engine: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.add_node().unwrap(), lab.add_node().unwrap());
    let image = ImageBuilder::new("registry.test/counted:1")
        .layers(1, LAYER, Compression::None, 1)
        .build(folder.path())
        .unwrap();
    let (full, empty) = (folder.path().join("full"), folder.path().join("empty"));
    image.write_layout(&full).unwrap();
    fs::create_dir_all(empty.join("blobs/sha256")).unwrap();
    fs::write(empty.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    fs::write(empty.join("index.json"), "{\"schemaVersion\":2,\"manifests\":[]}").unwrap();
    let holder = start(&a, &full, &b, engine, folder.path());
    let mut relay = start(&b, &empty, &a, engine, folder.path());
    relay.wait_ready(Duration::from_secs(30)).unwrap();
    let layer = image.layers_for(host_platform()).next().unwrap();
    wait_until(NOTICED, "the layer by way of the relay", || {
        let url = url(&relay, &image, &layer.digest);
        Client::new(Duration::from_secs(5)).head(&url, &[]).is_ok_and(|head| head.status == 200)
    })
    .unwrap();

    let bodies = FETCHES * layer.size;
    let calls = traced(&holder, folder.path(), || fetch(&holder, &image, &layer.digest));
    println!("{engine}, from a file: {calls:?}");
    assert_eq!(calls.get("sendfile").copied(), Some(bodies), "every byte, and once");
    check_no_copies(&calls);

    let calls = traced(&relay, folder.path(), || fetch(&relay, &image, &layer.digest));
    println!("{engine}, relayed: {calls:?}");
    // Into the pipe, and out of it; what came with the peer's head is sent from memory.
    let spliced = calls.get("splice").copied().unwrap_or_default();
    assert!(spliced <= 2 * bodies && spliced + 2 * SLACK >= 2 * bodies, "{spliced} of {bodies}, twice");
    check_no_copies(&calls);
}

fn start(node: &Node, layout: &Path, other: &Node, engine: &str, folder: &Path) -> Spegel {
    let settings = Settings {
        program: PROGRAM.into(),
        address: node.address().into(),
        node: Some(node.clone()),
        ports: Ports::default(),
        source: Source::Layout(layout.to_path_buf()),
        peers: vec![other.address().into()],
        arguments: ["--serve-engine", engine, "--mirror-resolve-timeout", "1s"].map(str::to_owned).to_vec(),
        log: folder.join(format!("{}.log", node.namespace())),
    };
    settings.spawn().unwrap()
}

fn url(node: &Spegel, image: &Image, digest: &str) -> String {
    format!("{}/v2/{}/blobs/{digest}?ns={}", node.url(), image.repository(), image.registry())
}

fn fetch(node: &Spegel, image: &Image, digest: &str) {
    let client = Client::new(Duration::from_secs(120));
    for _ in 0..FETCHES {
        let (head, actual, _) = client.download(&url(node, image, digest), |_| Ok(())).unwrap();
        assert_eq!((head.status, actual.as_str()), (200, digest));
    }
}

fn check_no_copies(calls: &BTreeMap<String, u64>) {
    for kinds in [&IN[..], &OUT[..]] {
        let bytes: u64 = kinds.iter().filter_map(|name| calls.get(*name)).sum();
        assert!(bytes < SLACK, "{bytes} bytes by {kinds:?}: {calls:?}");
    }
}

/// Bytes by system call, of all threads of a process, while `work` is done.
fn traced(node: &Spegel, folder: &Path, work: impl FnOnce()) -> BTreeMap<String, u64> {
    let trace = folder.join(format!("trace-{}", node.daemon.pid()));
    let (pid, names) = (node.daemon.pid().to_string(), [&IN[..], &OUT[..], &["sendfile", "splice"]].concat().join(","));
    let command =
        ["strace", "-f", "-q", "-e", &format!("trace={names}"), "-s", "0", "-o", &trace.to_string_lossy(), "-p", &pid];
    let mut strace = Daemon::start("strace", None, &command, &folder.join("strace.log")).unwrap();
    let status = format!("/proc/{pid}/status");
    let is_traced = || !fs::read_to_string(&status).unwrap().contains("TracerPid:\t0\n");
    strace.wait_until(Duration::from_secs(10), "the process traced", is_traced).unwrap();
    work();
    strace.signal(Signal::INT).unwrap();
    strace.wait_exit(Duration::from_secs(10)).unwrap();
    let mut calls = BTreeMap::new();
    for line in fs::read_to_string(&trace).unwrap().lines() {
        if let Some((name, bytes)) = parse(line) {
            *calls.entry(name.to_owned()).or_default() += bytes;
        }
    }
    calls
}

/// `123 sendfile(9, 10, [0] => [5], 5) = 5`, or `123 <... splice resumed>) = 5`: the call and what it moved. Failed calls moved nothing.
fn parse(line: &str) -> Option<(&str, u64)> {
    let (_, call) = line.split_once(' ')?;
    let call = call.trim_start();
    let name = match call.strip_prefix("<... ") {
        Some(resumed) => resumed.split(' ').next()?,
        None => call.split('(').next()?,
    };
    let result = call.rsplit_once(" = ")?.1;
    Some((name, result.split(' ').next()?.parse().ok()?))
}

#[test]
fn lines_of_strace_are_understood() {
    assert_eq!(parse("12 sendfile(9, 10, [0] => [524288], 524288) = 524288"), Some(("sendfile", 524_288)));
    assert_eq!(parse("12 <... splice resumed>) = 7"), Some(("splice", 7)));
    assert_eq!(parse("12 splice(9, NULL, 12, NULL, 1048576, SPLICE_F_MOVE <unfinished ...>"), None);
    assert_eq!(parse("12 recvfrom(9, 0x7f, 8192, 0, NULL, NULL) = -1 EAGAIN (Resource temporarily unavailable)"), None);
}
