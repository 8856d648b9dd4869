//! The same with a network namespace for each node, so that a node can be cut off.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use spegel_benches::daemon::{Daemon, output};
use spegel_benches::netns::{Lab, Node};
use spegel_benches::spegel::configure;

use super::{PATIENCE, SELECTORS, configuration_below, log_of, program, running_at, text};
use crate::kube::fake::{FakeApi, State};

/// The port of the cleanup on each node.
const PORT: u16 = 8080;

/// Three nodes with a mirror's configuration and a running cleanup, and a place for the wait.
struct Nodes {
    cleaners: Vec<Daemon>,
    api: FakeApi,
    waiting: Node,
    nodes: Vec<Node>,
    lab: Lab,
    dir: tempfile::TempDir,
}

impl Nodes {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Lab::new().unwrap();
        let nodes: Vec<Node> = (0..3).map(|_| lab.add_node().unwrap()).collect();
        let waiting = lab.add_node().unwrap();
        let api = FakeApi::start(dir.path(), lab.host_address());
        let pods = (1..).zip(&nodes).map(|(number, node)| running_at(number, node.address())).collect();
        *api.state() = State { observed: true, desired: 3, pods, ..State::default() };
        Self { cleaners: Vec::new(), api, waiting, nodes, lab, dir }
    }

    fn certs(&self, node: &Node) -> PathBuf {
        self.dir.path().join(node.namespace()).join("certs.d")
    }

    /// What an administrator has there.
    fn prepare(&self) {
        for node in &self.nodes {
            let directory = self.certs(node).join("example.org");
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("hosts.toml"), format!("server = 'http://{}'\n", node.address())).unwrap();
        }
    }

    fn mirror(&self) {
        for node in &self.nodes {
            let target = format!("http://{}:30020", node.address());
            configure(program(), &self.certs(node), &target, &["http://example.org", "https://docker.io"], "n")
                .unwrap();
        }
    }

    fn clean(&mut self) {
        for node in &self.nodes {
            let addr = format!("--addr={}:{PORT}", node.address());
            let path = format!("--containerd-registry-config-path={}", self.certs(node).display());
            let command = [program().to_str().unwrap(), "cleanup", &addr, &path];
            let log = self.dir.path().join(format!("{}.log", node.namespace()));
            let mut daemon = Daemon::start(node.namespace(), Some(node), &command, &log).unwrap();
            daemon.wait_until(PATIENCE, "an open port", || log_of(&log).contains("answering probes")).unwrap();
            self.cleaners.push(daemon);
        }
    }

    /// The wait, in a namespace of its own.
    fn wait(&self, deadline: &str) -> Output {
        let mut command = self.waiting.command(program().to_str().unwrap());
        command.args(["cleanup-wait", &format!("--probe-endpoint=cleanup.invalid:{PORT}"), "--period=50ms", deadline]);
        command.args(self.api.flags()).args(SELECTORS).args(["--repeat-command", "kubectl clean again"]);
        command.output().unwrap()
    }
}

#[test]
fn a_node_that_is_cut_off_is_named_and_is_clean_when_it_is_back() {
    if let Err(reason) = Lab::available() {
        println!("skipped: {reason}");
        return;
    }
    let mut cluster = Nodes::new();
    cluster.prepare();
    let before = configuration_below(cluster.dir.path());
    cluster.mirror();
    assert_ne!(configuration_below(cluster.dir.path()), before);
    cluster.clean();

    let lost = cluster.nodes[2].clone();
    cluster.lab.set_connected(&lost, false).unwrap();
    let waited = cluster.wait("--deadline=6s");
    let told = text(&waited.stdout);
    assert_eq!(waited.status.code(), Some(1), "{told}");
    assert!(told.contains("1 of 3 nodes") && told.contains("node-3: "), "{told}");
    assert!(told.contains(&lost.address().to_string()) && told.ends_with("  kubectl clean again\n"), "{told}");

    cluster.lab.set_connected(&lost, true).unwrap();
    let reached =
        || output(cluster.waiting.command("bash").args(["-c", &format!("exec 3<>/dev/tcp/{}/{PORT}", lost.address())]));
    spegel_benches::daemon::wait_until(PATIENCE, "way to the node", || reached().is_ok()).unwrap();
    let waited = cluster.wait("--deadline=30s");
    assert!(waited.status.success(), "{} {}", text(&waited.stdout), text(&waited.stderr));
    assert_eq!(text(&waited.stdout), "All 3 nodes are clean: containerd asks the mirror no more.\n");
    assert_eq!(configuration_below(cluster.dir.path()), before);
    for cleaner in cluster.cleaners.drain(..) {
        assert!(cleaner.stop().unwrap().success());
    }
}
