//! `registry` and a fake of the Kubernetes API: the node's zone, and the taint that it starts with.

#![allow(clippy::unwrap_used)]

pub(crate) mod fake;

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::spegel::{Ports, Settings, Source, Spegel};

use fake::{FakeApi, State};

const PATIENCE: Duration = Duration::from_secs(30);
const TAINT: &str = "spegel.dev/agent-not-ready";

/// A mirror of an empty layout, not yet started. Its node's name is its address.
fn mirror(dir: &Path, flags: &[&str], api: &FakeApi) -> Settings {
    let layout = dir.join("layout");
    fs::create_dir_all(&layout).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(layout.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
    let flags = flags.iter().map(|&flag| flag.to_owned());
    Settings {
        program: env!("CARGO_BIN_EXE_spegel").into(),
        node: None,
        address: Ipv4Addr::LOCALHOST.into(),
        ports: Ports::free().unwrap(),
        source: Source::Layout(layout),
        peers: Vec::new(),
        arguments: flags.chain(api.flags()).collect(),
        log: dir.join("log"),
    }
}

fn taint(key: &str, effect: &str) -> Value {
    json!({ "key": key, "effect": effect, "timeAdded": "2026-01-01T00:00:00Z" })
}

fn node(taints: &[Value]) -> Value {
    json!({
        "metadata": { "name": "127.0.0.1", "labels": { "topology.kubernetes.io/zone": "zone-b" }, "generation": 3 },
        "spec": { "podCIDR": "10.0.0.0/24", "taints": taints },
    })
}

fn info(spegel: &Spegel) -> String {
    let answer = Client::new(PATIENCE).get(&format!("{}/metrics", spegel.metrics_url()), &[]).unwrap();
    answer.text().lines().find(|line| line.starts_with("spegel_node_info")).unwrap().to_owned()
}

#[test]
fn the_startup_taint_goes_once_the_mirror_is_ready_whatever_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let api = FakeApi::start(dir.path(), Ipv4Addr::LOCALHOST);
    let (others, late) = (taint("node.kubernetes.io/unschedulable", "NoSchedule"), taint("late", "NoExecute"));
    let started_with = [taint(TAINT, "NoSchedule"), others.clone(), taint(TAINT, "NoExecute")];
    *api.state() = State { node: node(&started_with), refuse: 1, add_taint: Some(late.clone()), ..State::default() };
    let spegel = mirror(dir.path(), &["--startup-taint", TAINT], &api).start().unwrap();
    let left = node(&[others, late]);
    wait_until(PATIENCE, "removal of the taint", || api.state().node == left).unwrap();
    let (get, patch) = ("GET /api/v1/nodes/127.0.0.1", "PATCH /api/v1/nodes/127.0.0.1");
    assert_eq!(api.state().asked, [get, get, patch, get, patch], "refused, overtaken, done");
    wait_until(PATIENCE, "word of it", || spegel.daemon.log().contains("the startup taint is removed")).unwrap();
}

#[test]
fn a_mirror_that_is_not_ready_keeps_the_taint() {
    let dir = tempfile::tempdir().unwrap();
    let api = FakeApi::start(dir.path(), Ipv4Addr::LOCALHOST);
    api.state().node = node(&[taint(TAINT, "NoSchedule")]);
    let mut settings = mirror(dir.path(), &["--startup-taint", TAINT], &api);
    // Nobody is there, so it cannot know whether it is alone.
    settings.peers = vec![Ipv4Addr::new(127, 0, 0, 77).into()];
    let mut spegel = settings.spawn().unwrap();
    let (client, url) = (Client::new(PATIENCE), format!("{}/readyz", spegel.url()));
    let mut answers = 0;
    let unready = || {
        answers += usize::from(client.get(&url, &[]).is_ok_and(|answer| answer.head.status == 503));
        answers > 20
    };
    spegel.daemon.wait_until(PATIENCE, "answers of a mirror that is not ready", unready).unwrap();
    assert_eq!(api.state().asked, [""; 0]);
}

#[test]
fn an_api_that_refuses_does_not_keep_the_mirror_from_serving() {
    let dir = tempfile::tempdir().unwrap();
    let api = FakeApi::start(dir.path(), Ipv4Addr::LOCALHOST);
    // It knows no node, so everything is forbidden.
    let spegel = mirror(dir.path(), &["--startup-taint", TAINT, "--zone-from-node"], &api).start().unwrap();
    let log = || spegel.daemon.log();
    wait_until(PATIENCE, "second attempt", || api.state().asked.len() > 3).unwrap();
    assert!(log().contains("this node's zone is not known"), "{}", log());
    assert_eq!(log().matches("the startup taint is still there").count(), 1, "{}", log());
    assert!(log().contains("403 Forbidden: this service account may not do that"), "{}", log());
    assert_eq!(info(&spegel), r#"spegel_node_info{node="127.0.0.1",zone=""} 1"#);
}

#[test]
fn the_zone_is_the_one_given_or_else_the_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let api = FakeApi::start(dir.path(), Ipv4Addr::LOCALHOST);
    api.state().node = node(&[]);
    let spegel = mirror(dir.path(), &["--zone-from-node"], &api).start().unwrap();
    assert_eq!(info(&spegel), r#"spegel_node_info{node="127.0.0.1",zone="zone-b"} 1"#);
    assert_eq!(api.state().asked.len(), 1);
    drop(spegel);
    let spegel = mirror(dir.path(), &["--zone-from-node", "--zone", "zone-a"], &api).start().unwrap();
    assert_eq!(info(&spegel), r#"spegel_node_info{node="127.0.0.1",zone="zone-a"} 1"#);
    assert_eq!(api.state().asked.len(), 1, "the API is not asked");
}
