//! Hosts on one link that find each other by multicast alone, in a namespace each.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use spegel_benches::daemon::{Daemon, wait_until};
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, ImageBuilder};
use spegel_benches::netns::{Lab, Node};

use super::cluster::PROGRAM;

/// A connection that is silent for 15 s is closed, its peer is tried twice and then gone; the rest is for a machine that has much to do.
const LOST: Duration = Duration::from_secs(60);

/// Multicast is asked often at first; far above what it takes.
const TOGETHER: Duration = Duration::from_secs(30);

/// A layout without images: what is served does not matter here.
fn layout(folder: &Path) {
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(folder.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
}

fn start(node: &Node, address: Ipv4Addr, folder: &Path, kind: &[&str]) -> Daemon {
    let at = |port| SocketAddr::from((address, port)).to_string();
    let (layout, data) = (folder.join("layout"), folder.join(node.namespace()));
    let mut command = vec![PROGRAM.to_owned(), "registry".to_owned()];
    for (flag, value) in [
        ("--registry-addr", at(5000)),
        ("--router-addr", at(5001)),
        ("--metrics-addr", at(9090)),
        ("--node-name", address.to_string()),
        ("--oci-layout", layout.display().to_string()),
        ("--data-dir", data.display().to_string()),
    ] {
        command.extend([flag.to_owned(), value]);
    }
    command.extend(kind.iter().map(|word| (*word).to_owned()));
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    Daemon::start(&format!("spegel on {address}"), Some(node), &command, &folder.join("log")).unwrap()
}

/// How many others the node at this address lists.
fn members(address: Ipv4Addr) -> Option<u32> {
    let url = format!("http://{}/metrics", SocketAddr::from((address, 9090)));
    let text = Client::new(Duration::from_secs(1)).get(&url, &[]).ok()?.text();
    text.lines().find_map(|line| line.strip_prefix("spegel_router_members "))?.parse().ok()
}

fn are_together(addresses: &[Ipv4Addr]) {
    let others = u32::try_from(addresses.len() - 1).unwrap();
    wait_until(TOGETHER, "list of all others on every node", || {
        addresses.iter().all(|address| members(*address) == Some(others))
    })
    .unwrap();
}

fn lab(size: usize) -> Option<(Lab, Vec<Node>)> {
    if let Err(reason) = Lab::available() {
        println!("skipped: {reason}");
        return None;
    }
    let mut lab = Lab::new().unwrap();
    let nodes = (0..size).map(|_| lab.add_node().unwrap()).collect();
    Some((lab, nodes))
}

/// They come together, and again when all of them have other addresses, which nobody tells them.
#[test]
fn hosts_on_one_link_find_each_other_wherever_they_move() {
    let Some((_lab, nodes)) = lab(3) else { return };
    let folder = tempfile::tempdir().unwrap();
    layout(&folder.path().join("layout"));
    let mut addresses: Vec<Ipv4Addr> = nodes.iter().map(Node::address).collect();
    let start_all = |addresses: &[Ipv4Addr]| -> Vec<Daemon> {
        let started = nodes.iter().zip(addresses);
        started.map(|(node, address)| start(node, *address, folder.path(), &["--bootstrap-kind", "mdns"])).collect()
    };
    let daemons = start_all(&addresses);
    are_together(&addresses);
    // What they remember of each other will be wrong, and must not keep them from what is right.
    let remembers = |node: &Node| folder.path().join(node.namespace()).join("peers.json").exists();
    wait_until(TOGETHER, "memory of the others", || nodes.iter().all(remembers)).unwrap();
    drop(daemons);
    for (node, address) in nodes.iter().zip(&mut addresses) {
        let [a, b, c, d] = address.octets();
        *address = Ipv4Addr::new(a, b, c, d + 100);
        node.ip(&["address", "flush", "dev", "eth0"]).unwrap();
        node.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"]).unwrap();
    }
    let _daemons = start_all(&addresses);
    are_together(&addresses);
}

/// What brings them together is multicast: the same hosts with a list that names nobody who lives stay apart.
#[test]
fn without_multicast_hosts_do_not_find_each_other() {
    let Some((lab, nodes)) = lab(3) else { return };
    let folder = tempfile::tempdir().unwrap();
    layout(&folder.path().join("layout"));
    let dead = SocketAddr::from((lab.host_address(), 5001)).to_string();
    let kind = ["--bootstrap-kind", "static", "--static-bootstrap-peers", dead.as_str()];
    let mut daemons: Vec<Daemon> = nodes.iter().map(|node| start(node, node.address(), folder.path(), &kind)).collect();
    let up = |daemon: &mut Daemon, node: &Node| {
        daemon.wait_until(TOGETHER, "metrics", || members(node.address()).is_some()).unwrap();
    };
    daemons.iter_mut().zip(&nodes).for_each(|(daemon, node)| up(daemon, node));
    std::thread::sleep(Duration::from_secs(5));
    assert!(nodes.iter().all(|node| members(node.address()) == Some(0)));
}

/// One machine is lost, and the process on another stands still while its kernel goes on: neither says a word. One comes back elsewhere with the
/// identity that it had.
#[test]
fn who_is_lost_without_a_word_is_noticed_and_may_come_back_elsewhere() {
    let Some((lab, nodes)) = lab(4) else { return };
    let folder = tempfile::tempdir().unwrap();
    layout(&folder.path().join("layout"));
    let mdns = ["--bootstrap-kind", "mdns"];
    let mut addresses: Vec<Ipv4Addr> = nodes.iter().map(Node::address).collect();
    let started = nodes.iter().zip(&addresses);
    let mut daemons: Vec<Daemon> = started.map(|(node, address)| start(node, *address, folder.path(), &mdns)).collect();
    are_together(&addresses);
    lab.set_connected(&nodes[3], false).unwrap();
    daemons[2].signal(Signal::STOP).unwrap();
    wait_until(LOST, "only those to be listed who are there", || {
        addresses[..2].iter().all(|address| members(*address) == Some(1))
    })
    .unwrap();
    daemons[2].signal(Signal::CONT).unwrap();
    drop(daemons.pop());
    let [a, b, c, d] = addresses[3].octets();
    addresses[3] = Ipv4Addr::new(a, b, c, d + 100);
    nodes[3].ip(&["address", "flush", "dev", "eth0"]).unwrap();
    nodes[3].ip(&["address", "add", &format!("{}/24", addresses[3]), "dev", "eth0"]).unwrap();
    lab.set_connected(&nodes[3], true).unwrap();
    let _back = start(&nodes[3], addresses[3], folder.path(), &mdns);
    are_together(&addresses);
}

/// Every host has a bridge for its containers with the same address. Nobody asks itself for what others have, nor takes others for itself.
#[test]
fn an_address_that_all_hosts_have_is_no_way_to_others() {
    let Some((_lab, nodes)) = lab(2) else { return };
    let folder = tempfile::tempdir().unwrap();
    let builder = ImageBuilder::new("registry.test/app:1").layers(1, 4 << 10, Compression::None, 1);
    let image = builder.build(&folder.path().join("image")).unwrap();
    let digest = &image.root().digest;
    let addresses: Vec<Ipv4Addr> = nodes.iter().map(Node::address).collect();
    let mut daemons = Vec::new();
    for (node, number) in nodes.iter().zip(0..) {
        let own = folder.path().join(format!("host-{number}"));
        layout(&own.join("layout"));
        if number == 0 {
            image.write_layout(&own.join("layout")).unwrap();
        }
        node.ip(&["link", "add", "docker0", "type", "bridge"]).unwrap();
        // It comes before the node's own in any order of numbers.
        node.ip(&["address", "add", "10.1.0.1/16", "dev", "docker0"]).unwrap();
        node.ip(&["link", "set", "docker0", "up"]).unwrap();
        let anywhere = Ipv4Addr::UNSPECIFIED;
        daemons.push(start(node, anywhere, &own, &["--bootstrap-kind", "mdns"]));
    }
    are_together(&addresses);
    let registry = SocketAddr::from((addresses[1], 5000));
    let url = format!("http://{registry}/v2/app/manifests/{digest}?ns=registry.test");
    let content = image.read(digest).unwrap();
    wait_until(TOGETHER, "the other's content", || {
        Client::new(Duration::from_secs(5)).get(&url, &[]).is_ok_and(|answer| answer.body == content)
    })
    .unwrap();
}
