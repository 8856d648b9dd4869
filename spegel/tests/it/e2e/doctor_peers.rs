//! What `spegel doctor` says of peers, and what it is told of them.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use serde_json::Value;
use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::{Daemon, wait_until};

use super::cluster::{Cluster, NOTICED, PROGRAM};
use super::doctor::{cluster, doctor};

/// A program that answers at the ports 6001 and 6000 of an address: what it says to a router, to `/livez`, and to any other path. Its clock is late.
fn answering(greeting: &str, alive: &str, other: &str, address: Ipv4Addr) -> String {
    format!(
        "import socket,threading\n\
         def serve(port, answer):\n \
         s=socket.create_server(('{address}',port))\n \
         print('up',flush=True)\n \
         while True:\n  \
         c,_=s.accept()\n  \
         c.sendall(answer(c.recv(4096)))\n  \
         c.close()\n\
         def http(asked):\n \
         status='{alive}' if b' /livez ' in asked else '{other}'\n \
         return f'HTTP/1.1 {{status}}\\r\\nDate: Wed, 01 Jan 2025 00:00:00 GMT\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n'.encode()\n\
         threading.Thread(target=serve,args=(6001,lambda _: {greeting})).start()\n\
         serve(6000,http)\n"
    )
}

/// A port that another program has is no peer, whatever that program answers.
#[test]
fn a_peers_port_that_another_program_has_is_named() {
    let Some(cluster) = cluster(&Options::default()) else { return };
    let (own, other) = (cluster.nodes[0].containerd.node(), cluster.nodes[1].containerd.node());
    let router = "b'\\x13/multistream/1.0.0\\n'";
    for (number, (greeting, alive, rest, says)) in [
        (router, "404 Not Found", "404 Not Found", "(registry): another program answers there, with 404 to /livez"),
        (router, "200 OK", "200 OK", "(registry): another program answers there, which has whatever"),
        (
            "b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'",
            "200 OK",
            "404 Not Found",
            "(router): another program answers there",
        ),
        ("b''", "200 OK", "404 Not Found", "(router): closes the connection before a word"),
    ]
    .into_iter()
    .enumerate()
    {
        let log = cluster.folder.path().join(format!("another-{number}.log"));
        let script = answering(greeting, alive, rest, other.address());
        let mut daemon = Daemon::start("another program", Some(other), &["python3", "-c", &script], &log).unwrap();
        daemon
            .wait_until(NOTICED, "listen", || fs::read_to_string(&log).is_ok_and(|log| log.matches("up").count() == 2))
            .unwrap();
        let (peer, at) = (format!("{}:6001", other.address()), format!("{}:6000", own.address()));
        let flags = ["--bootstrap-kind", "static", "--static-bootstrap-peers", &peer, "--registry-addr", &at];
        let said = doctor(&cluster.nodes[0].containerd, &flags);
        said.has("addresses", "failure", says);
        daemon.stop().unwrap();
    }
}

/// The file of the unit's variables, with what a shell would take apart; and flags that are wrong.
#[test]
fn variables_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings");
    fs::write(
        &file,
        "BOOTSTRAP_KIND=static\nSTATIC_BOOTSTRAP_PEERS=127.0.0.8:1 127.0.0.9:1\nMETRICS_ADDR=\"127.0.0.1:1\"\nX=a|(b\n",
    )
    .unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        let nowhere = folder.path().join("nowhere.sock");
        command.arg("doctor").args(arguments).arg("--containerd-sock").arg(nowhere).env_remove("BOOTSTRAP_KIND");
        command.env("ROUTER_ADDR", "127.0.0.1:2").env("REGISTRY_ADDR", "127.0.0.1:3").output().unwrap()
    };
    let path = file.to_str().unwrap();
    let given = format!("--env-file={path}");
    // The last one lacks what stands in the file.
    let lacking = vec!["--bootstrap-kind", "static", "--json", "--env-file", path];
    for flags in [vec!["--json", "--env-file", path], vec![&*given, "--json"], lacking] {
        let said = run(&flags);
        let report: Value = serde_json::from_slice(&said.stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let found = checks.iter().find(|check| check["check"] == "addresses").unwrap();
        assert!(found["said"].as_str().unwrap().contains("none of 2 peers is reached"), "{report:#}");
        assert_eq!(said.status.code(), Some(1));
    }
    // What is wrong with the flags is not what is wrong with the node.
    fs::write(&file, "BOOTSTRAP_KIND=nonsense\n").unwrap();
    let wrong: [&[&str]; 4] =
        [&["--nonsense"], &["--env-file", path], &["--env-file", "/nowhere"], &["--registry-addr", "nonsense"]];
    for flags in wrong {
        let said = run(flags);
        let text = String::from_utf8_lossy(&said.stderr);
        assert_eq!(said.status.code(), Some(2), "{flags:?}: {text}");
        assert!(!text.is_empty(), "{flags:?}");
    }
}

/// Until it has met somebody, or given up waiting, and nobody answers where its peers should be.
#[test]
fn a_mirror_that_reaches_nobody_is_named() {
    let Some(mut cluster) = Cluster::start(Version::V2_2, 1, &Options::default()) else { return };
    cluster.nodes[0].spegel.take().unwrap().daemon.stop().unwrap();
    let mut settings = cluster.settings(0);
    let [a, b, c, _] = cluster.nodes[0].containerd.node().address().octets();
    let nobody = Ipv4Addr::new(a, b, c, 254);
    settings.peers = vec![nobody.into()];
    let spegel = settings.spawn().unwrap();
    wait_until(NOTICED, "serve metrics", || spegel.metric("spegel_node_info", &[]).is_ok()).unwrap();
    let peers = ["--bootstrap-kind", "static", "--static-bootstrap-peers", &nobody.to_string()];
    let said = doctor(&cluster.nodes[0].containerd, &peers);
    said.has_code(1);
    said.has("members", "failure", "the mirror is not ready: ");
    said.has("addresses", "failure", "none of 1 peers is reached");
}

/// A peer whose clock is not this node's: it answers as a registry does, with a date of its own.
#[test]
fn a_clock_that_differs_from_a_peers_is_named() {
    let Some(cluster) = cluster(&Options::default()) else { return };
    let other = cluster.nodes[1].containerd.node();
    let script = answering("b'\\x13/multistream/1.0.0\\n'", "200 OK", "404 Not Found", other.address());
    let command = ["python3", "-c", &script];
    let log = cluster.folder.path().join("late.log");
    let mut late = Daemon::start("a late peer", Some(other), &command, &log).unwrap();
    late.wait_until(NOTICED, "listen", || fs::read_to_string(&log).is_ok_and(|log| log.matches("up").count() == 2))
        .unwrap();
    // Its registry's port is the one of this node: another mirror than the one that runs here.
    let (own, peer) = (cluster.nodes[0].containerd.node().address(), format!("{}:6001", other.address()));
    let ports = ["--registry-addr".to_owned(), format!("{own}:6000")];
    let ports = ports.iter().map(String::as_str);
    let flags = ["--bootstrap-kind", "static", "--static-bootstrap-peers", &peer].into_iter().chain(ports);
    let said = doctor(&cluster.nodes[0].containerd, &flags.collect::<Vec<_>>());
    said.has("clock", "warning", &format!("that of {} are ", other.address()));
    // That of a mirror as it is.
    let peer = format!("{}:5001", other.address());
    let said = doctor(&cluster.nodes[0].containerd, &["--bootstrap-kind", "static", "--static-bootstrap-peers", &peer]);
    said.has("clock", "good", "clocks agree with those of 1 peers");
}
