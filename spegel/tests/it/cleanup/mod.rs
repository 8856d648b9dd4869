//! `cleanup` and `cleanup-wait` as processes on loopback addresses, each a node, with a fake of the Kubernetes API.

#![allow(clippy::unwrap_used)]

mod nodes;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use spegel_benches::daemon::Daemon;
use spegel_benches::spegel::{Ports, configure};

use crate::kube::fake::{FakeApi, State};

/// A process has this long to do what takes it milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the wait looks for in the API.
const SELECTORS: [&str; 2] = ["--daemonset=spegel-cleanup", "--mirror-selector=app=spegel,part=mirror"];

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_spegel"))
}

/// Nodes with containerd configuration of an administrator and of the mirror.
struct Cluster {
    dir: tempfile::TempDir,
    api: FakeApi,
    port: u16,
    before: BTreeMap<PathBuf, Vec<u8>>,
}

impl Cluster {
    fn new(nodes: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = FakeApi::start(dir.path(), Ipv4Addr::LOCALHOST);
        let port = Ports::free().unwrap().registry;
        let mut cluster = Self { dir, api, port, before: BTreeMap::new() };
        for number in 1..=nodes {
            let certs = cluster.certs(number);
            fs::create_dir_all(certs.join("example.org")).unwrap();
            fs::write(certs.join("example.org/hosts.toml"), format!("server = 'http://10.0.0.{number}'\n")).unwrap();
        }
        cluster.before = cluster.files();
        (1..=nodes).for_each(|number| cluster.mirror(number));
        assert_ne!(cluster.files(), cluster.before);
        cluster
    }

    fn certs(&self, number: u8) -> PathBuf {
        self.dir.path().join(format!("node-{number}/certs.d"))
    }

    /// What the mirror's pod does in its beginning.
    fn mirror(&self, number: u8) {
        let registries = ["http://example.org", "https://docker.io"];
        configure(program(), &self.certs(number), "http://127.0.0.1:30020", &registries, "node").unwrap();
    }

    /// All nodes' configuration files.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        configuration_below(self.dir.path())
    }

    /// Starts a node's cleanup.
    fn clean(&self, number: u8) -> Daemon {
        let addr = format!("--addr={}", SocketAddr::from((Ipv4Addr::new(127, 0, 0, number), self.port)));
        let path = format!("--containerd-registry-config-path={}", self.certs(number).display());
        let command = [program().to_str().unwrap(), "cleanup", &addr, &path];
        let log = self.dir.path().join(format!("node-{number}.log"));
        let mut daemon = Daemon::start(&format!("cleanup {number}"), None, &command, &log).unwrap();
        daemon.wait_until(PATIENCE, "an open port", || log_of(&log).contains("answering probes")).unwrap();
        daemon
    }

    fn start_wait(&self, flags: &[&str]) -> std::process::Child {
        let mut command = Command::new(program());
        command.args(["cleanup-wait", &format!("--probe-endpoint=cleanup.invalid:{}", self.port), "--period=50ms"]);
        command.args(self.api.flags()).args(SELECTORS).args(["--repeat-command", "kubectl clean again"]).args(flags);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    }

    fn wait(&self, flags: &[&str]) -> Output {
        self.start_wait(flags).wait_with_output().unwrap()
    }

    /// Returns once the API was asked for a whole round more.
    fn a_round_later(&self) {
        let (asked, began) = (self.api.state().asked.len(), Instant::now());
        while self.api.state().asked.len() < asked + 6 {
            assert!(began.elapsed() < PATIENCE, "the API is asked no more");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What stands in any certs.d below a directory.
fn configuration_below(top: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut directories: Vec<PathBuf> = vec![top.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.components().any(|part| part.as_os_str() == "certs.d") {
                files.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

fn log_of(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn running(number: u8) -> Value {
    running_at(number, Ipv4Addr::new(127, 0, 0, number))
}

fn running_at(number: u8, address: Ipv4Addr) -> Value {
    json!({
        "metadata": { "name": format!("cleanup-{number}") },
        "spec": { "nodeName": format!("node-{number}") },
        "status": { "phase": "Running", "podIP": address },
    })
}

fn pending(number: u8) -> Value {
    json!({
        "metadata": { "name": format!("cleanup-{number}") },
        "spec": { "nodeName": format!("node-{number}") },
        "status": { "phase": "Pending" },
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_node_is_as_it_was_before() {
    let cluster = Cluster::new(3);
    let _cleaners: Vec<Daemon> = (1..=3).map(|number| cluster.clean(number)).collect();
    *cluster.api.state() =
        State { observed: true, desired: 3, pods: (1..=3).map(running).collect(), ..State::default() };
    let output = cluster.wait(&[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "All 3 nodes are clean: containerd asks the mirror no more.\n");
    assert_eq!(cluster.files(), cluster.before);
}

#[test]
fn a_node_whose_pod_does_not_start_is_named_with_what_repeats_the_cleanup() {
    let cluster = Cluster::new(3);
    let _cleaners = [cluster.clean(1), cluster.clean(2)];
    *cluster.api.state() =
        State { observed: true, desired: 3, pods: vec![running(1), running(2), pending(3)], ..State::default() };
    let output = cluster.wait(&["--deadline=4s"]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stdout);
    assert!(told.contains("1 of 3 nodes") && told.contains("node-3: pod cleanup-3 has not started"), "{told}");
    assert!(told.ends_with("  kubectl clean again\n"), "{told}");
    assert!(!told.contains("node-1:"), "{told}");
}

/// One that takes the place of a wait that was lost with its node.
#[test]
fn a_wait_has_no_more_time_than_is_left_since_the_daemon_set_was_made() {
    let cluster = Cluster::new(1);
    *cluster.api.state() = State {
        observed: true,
        // By the API server's clock, which says two hours later; this host's has nothing to do with it.
        made: Some("2030-01-01T00:00:00Z"),
        desired: 1,
        pods: vec![pending(1)],
        ..State::default()
    };
    let start = Instant::now();
    let output = cluster.wait(&["--deadline=1h"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("node-1: pod cleanup-1 has not started"), "{}", text(&output.stdout));
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn success_waits_for_the_controller_for_late_nodes_and_for_pods_of_the_mirror_that_still_start() {
    let cluster = Cluster::new(2);
    let first = cluster.clean(1);
    let mut wait = cluster.start_wait(&["--threshold=2"]);
    // The controller has not seen the DaemonSet, so "no node is needed" means nothing.
    cluster.a_round_later();
    *cluster.api.state() = State { observed: true, desired: 2, pods: vec![running(1)], ..State::default() };
    cluster.a_round_later();
    let starting = json!({
        "metadata": { "name": "spegel-2", "deletionTimestamp": "2026-01-01T00:00:00Z" },
        "spec": { "nodeName": "node-2" },
        "status": { "phase": "Pending", "initContainerStatuses": [{ "state": { "running": {} } }] },
    });
    let second = cluster.clean(2);
    {
        let mut state = cluster.api.state();
        state.pods.push(running(2));
        state.mirror.push(starting);
    }
    cluster.a_round_later();
    assert!(wait.try_wait().unwrap().is_none(), "it must not have succeeded");
    // The pod on its way out writes once more, while the cleanup is at work there, and then is gone.
    cluster.mirror(2);
    cluster.api.state().mirror.clear();
    let output = wait.wait_with_output().unwrap();
    assert!(output.status.success(), "{} {}", text(&output.stdout), text(&output.stderr));
    assert_eq!(cluster.files(), cluster.before);
    for cleaner in [first, second] {
        assert!(cleaner.stop().unwrap().success());
    }
}

#[test]
fn an_api_that_refuses_is_told_of() {
    let cluster = Cluster::new(1);
    let output = cluster.wait(&["--deadline=4s", "--namespace=elsewhere"]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stdout);
    assert!(told.contains("403 Forbidden: this service account may not do that"), "{told}");
}

#[test]
fn an_api_server_of_another_authority_is_not_believed() {
    let (cluster, other) = (Cluster::new(1), Cluster::new(1));
    let is_account = |flag: &String| flag.starts_with("--service-account-dir");
    let account = other.api.flags().into_iter().filter(is_account);
    let rest = cluster.api.flags().into_iter().filter(|flag| !is_account(flag));
    let mut command = Command::new(program());
    command.args(["cleanup-wait", "--probe-endpoint=x:1", "--deadline=4s"]).args(SELECTORS).args(rest).args(account);
    let told = text(&command.output().unwrap().stdout);
    assert!(told.contains("does not answer") && told.contains("ertificate"), "{told}");
    assert!(cluster.api.state().asked.is_empty());
}

#[test]
fn without_a_daemon_set_the_addresses_of_the_endpoint_are_asked() {
    let cluster = Cluster::new(1);
    let _cleaner = cluster.clean(1);
    let endpoint = format!("--probe-endpoint=127.0.0.1:{}", cluster.port);
    let output = Command::new(program()).args(["cleanup-wait", &endpoint, "--period=50ms"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("without --daemonset"));
    assert_eq!(cluster.files(), cluster.before);
}

#[test]
fn once_does_the_same_on_a_host() {
    let cluster = Cluster::new(1);
    let path = format!("--containerd-registry-config-path={}", cluster.certs(1).display());
    let output = Command::new(program()).args(["cleanup", "--once", &path]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(cluster.files(), cluster.before);
    let output = Command::new(program()).args(["cleanup", &path]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "neither --addr nor --once");
    assert!(text(&output.stderr).contains("--once"));
}
