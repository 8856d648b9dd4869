//! `spegel doctor` on nodes with a real containerd: each misconfiguration is made, and named.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::Value;
use spegel_benches::containerd::{Containerd, Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::image::{Compression, Image};
use spegel_benches::netns::Lab;

use super::cluster::{Cluster, NOTICED, PROGRAM};

/// io_uring_setup(2), and EPERM.
const IO_URING_SETUP: (i64, u32) = (425, 1);

/// What doctor says, and its exit code.
pub(super) struct Said {
    pub(super) checks: Vec<(String, String, String)>,
    pub(super) text: String,
    code: Option<i32>,
}

impl Said {
    #[track_caller]
    pub(super) fn has(&self, check: &str, state: &str, says: &str) {
        let found = self.checks.iter().any(|(name, was, said)| name == check && was == state && said.contains(says));
        assert!(found, "no {state} of {check} with {says:?} in:\n{}", self.text);
    }

    #[track_caller]
    pub(super) fn has_code(&self, code: i32) {
        assert_eq!(self.code, Some(code), "{}", self.text);
    }
}

/// Runs doctor beside a containerd, with its paths and the node's addresses.
pub(super) fn doctor(containerd: &Containerd, more: &[&str]) -> Said {
    let node = containerd.node();
    let mut command = node.command(PROGRAM);
    command.args(["doctor", "--json"]);
    let mut flag = |name: &str, value: String| {
        if !more.contains(&name) {
            command.arg(name).arg(value);
        }
    };
    flag("--node-name", node.address().to_string());
    flag("--containerd-sock", containerd.socket().display().to_string());
    flag("--containerd-content-path", containerd.content_path().display().to_string());
    flag("--containerd-registry-config-path", containerd.certs_dir().display().to_string());
    flag("--registry-addr", format!("{}:5000", node.address()));
    flag("--router-addr", format!("{}:5001", node.address()));
    flag("--metrics-addr", format!("{}:9090", node.address()));
    let output = command.args(more).output().unwrap();
    let value: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let checks = value["checks"].as_array().unwrap().iter();
    let checks = checks.map(|check| (text(&check["check"]), text(&check["state"]), text(&check["said"]))).collect();
    let code = output.status.code();
    assert_eq!(value["good"], code == Some(0));
    Said { checks, text: serde_json::to_string_pretty(&value).unwrap(), code }
}

pub(super) fn cluster(options: &Options) -> Option<Cluster> {
    Cluster::start(Version::V2_2, 2, options)
}

pub(super) fn image(cluster: &Cluster) -> Image {
    cluster.push("doctor:1", |image| image.layers(1, 100_000, Compression::Gzip, 1))
}

/// Nothing is wrong: all is good, with a pull through containerd, and the start said so in one line and a metric.
#[test]
fn a_node_in_order_is_said_to_be_so() {
    let Some(cluster) = cluster(&Options::default()) else { return };
    let image = image(&cluster);
    let [first, second] = &cluster.nodes[..] else { panic!("two nodes") };
    first.pull_by_cri(&image, image.reference());
    wait_until(NOTICED, "know the other", || {
        first.spegel().metric("spegel_router_members", &[]).is_ok_and(|members| members >= 1.0)
    })
    .unwrap();
    let peers = ["--bootstrap-kind", "static", "--static-bootstrap-peers"];
    let other = second.containerd.node().address().to_string();
    let said = doctor(&first.containerd, &[&peers[..], &[&other, "--pull", image.reference()]].concat());
    said.has_code(0);
    for check in [
        "containerd",
        "cri",
        "restart",
        "namespace",
        "content",
        "config_path",
        "discard_unpacked_layers",
        "certs.d",
        "proxy",
        "process",
        "members",
        "addresses",
        "clock",
        "mirrors",
        "probe",
        "pull",
    ] {
        said.has(check, "good", "");
    }
    said.has("addresses", "good", "1 peers reached");
    said.has("ebpf", "note", "");
    assert!(said.checks.iter().any(|(check, ..)| check == "io_uring"));
    // The log line and the metric are of the mirror's start; the configuration was there before it.
    let log = first.spegel().daemon.log();
    assert_eq!(log.matches("this node was examined").count(), 1, "{log}");
    for check in ["check=\"config_path\"", "check=\"certs.d\""] {
        let found = |state: &str| first.spegel().metric("spegel_doctor_findings", &[check, state]).unwrap_or(0.0);
        assert!(found("state=\"good\"") >= 1.0 && found("state=\"failure\"") <= 0.0, "{check}");
    }
    // The text form, for people.
    let mut command = first.containerd.node().command(PROGRAM);
    let text = command.args(["doctor", "--containerd-sock"]).arg(first.containerd.socket()).output().unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("good     containerd ") && text.contains("\n         "), "{text}");
}

/// The list that 2.2 has for its default: no pull by Kubernetes asks the mirror. The rule says so, and so does a pull.
#[test]
fn a_config_path_that_containerd_does_not_use_is_named() {
    let list = "/etc/containerd/certs.d:/etc/docker/certs.d";
    for (path, says) in
        [(list, "is a list"), ("", "its default, is a list"), ("/elsewhere", "looks for registry hosts in /elsewhere")]
    {
        let options = Options { config_path: Some(path.to_owned()), ..Options::default() };
        let Some(cluster) = cluster(&options) else { return };
        let image = image(&cluster);
        let said = doctor(&cluster.nodes[0].containerd, &["--pull", image.reference()]);
        said.has_code(1);
        said.has("config_path", "failure", says);
        // Without its hosts.toml containerd speaks TLS to the registry, which does not; what counts is that the mirror was not asked.
        said.has("pull", "failure", &format!("asked for content of {} 0 times", image.registry()));
    }
}

#[test]
fn a_proxy_in_containerds_environment_is_named() {
    let proxied = |more: &str| Options {
        environment: vec!["HTTP_PROXY=http://127.0.0.1:1".to_owned(), more.to_owned()],
        ..Options::default()
    };
    let Some(node) = cluster(&proxied("NO_PROXY=localhost")) else { return };
    let said = doctor(&node.nodes[0].containerd, &[]);
    said.has_code(1);
    said.has("proxy", "failure", "NO_PROXY does not name");
    drop(node);
    let Some(node) = cluster(&proxied("NO_PROXY=10.0.0.0/8,192.168.0.0/16,172.16.0.0/12,198.18.0.0/15")) else {
        return;
    };
    doctor(&node.nodes[0].containerd, &[]).has("proxy", "good", "");
}

#[test]
fn discarded_layers_are_named() {
    let Some(cluster) = cluster(&Options { discard_unpacked_layers: true, ..Options::default() }) else { return };
    let said = doctor(&cluster.nodes[0].containerd, &[]);
    said.has_code(1);
    said.has("discard_unpacked_layers", "failure", "throws layers away");
}

/// Each of what an administrator may do to certs.d, to the mirror, and in the flags.
#[test]
fn what_is_wrong_on_one_node_is_named() {
    let Some(mut cluster) = cluster(&Options::default()) else { return };
    let image = image(&cluster);
    cluster.nodes[0].pull_by_cri(&image, image.reference());
    let containerd = &cluster.nodes[0].containerd;
    let file = hosts_toml(&containerd.certs_dir());
    let ours = fs::read_to_string(&file).unwrap();
    flags(containerd);
    certs(containerd, &file, &ours);
    fs::write(&file, &ours).unwrap();

    // The mirror is gone, its configuration is not: what an uninstall without a cleanup leaves.
    let spegel = cluster.nodes[0].spegel.take().unwrap();
    spegel.daemon.stop().unwrap();
    let containerd = &cluster.nodes[0].containerd;
    let said = doctor(containerd, &[]);
    said.has_code(1);
    said.has("mirrors", "failure", "each request waits 0.2 to 0.3 s");
    said.has("process", "failure", "its ports are free");
    // Another program has the port.
    let at = format!("{}:5000", containerd.node().address());
    let script = format!(
        "import socket,time\ns=socket.create_server(('{}',5000))\nprint('up',flush=True)\ntime.sleep(60)",
        containerd.node().address()
    );
    let mut other = containerd
        .node()
        .command("python3")
        .args(["-c", &script])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(other.stdout.take().unwrap()), &mut line).unwrap();
    doctor(containerd, &[]).has(
        "ports",
        "failure",
        &format!("spegel cannot listen on {at} (registry): it is taken by"),
    );
    other.kill().unwrap();
    other.wait().unwrap();
    // containerd is gone, too.
    cluster.nodes[0].containerd.stop().unwrap();
    let said = doctor(&cluster.nodes[0].containerd, &[]);
    said.has_code(1);
    said.has("containerd", "failure", "does not answer");
    said.has("config_path", "unknown", "cannot be seen");
}

fn hosts_toml(certs: &Path) -> PathBuf {
    let mut found = fs::read_dir(certs).unwrap().map(|entry| entry.unwrap().path().join("hosts.toml"));
    found.find(|path| path.is_file()).unwrap()
}

fn flags(containerd: &Containerd) {
    let wrong = tempfile::tempdir().unwrap();
    let wrong = wrong.path().to_str().unwrap();
    doctor(containerd, &["--containerd-content-path", wrong]).has("content", "failure", "lacks what containerd has");
    doctor(containerd, &["--containerd-namespace", "elsewhere"]).has("namespace", "warning", "there are others: ");
    let said = doctor(containerd, &["--containerd-registry-config-path", wrong]);
    said.has("config_path", "failure", "are expected in");
    said.has("certs.d", "failure", "no hosts.toml below");
    doctor(containerd, &["--containerd-config", "/nowhere.toml"]).has(
        "config_path",
        "failure",
        "its default, is a list",
    );
    let dead = Ipv4Addr::new(127, 0, 0, 9).to_string();
    let said = doctor(containerd, &["--bootstrap-kind", "static", "--static-bootstrap-peers", &dead]);
    said.has("addresses", "failure", "none of 1 peers is reached");
    let said = doctor(containerd, &["--bootstrap-kind", "dns", "--dns-bootstrap-domain", "spegel.invalid."]);
    assert!(said.checks.iter().any(|(check, ..)| check == "addresses"));
    doctor(containerd, &[]).has("addresses", "unknown", "was not told");
    doctor(containerd, &["--node-name", "elsewhere"]).has("certs.d", "warning", "takes it for another's");
}

fn certs(containerd: &Containerd, file: &Path, ours: &str) {
    // Files are named as an administrator knows them, however doctor reaches them.
    let said = doctor(containerd, &["--node-name", "elsewhere"]);
    said.has("certs.d", "warning", &format!("{}: containerd says", file.display()));
    let try_with = |text: &str, state: &str, says: &str| {
        fs::write(file, text).unwrap();
        doctor(containerd, &[]).has("certs.d", state, says);
    };
    try_with(&format!("{ours}# changed\n"), "warning", "was changed after");
    try_with(&ours.replace("dial_timeout = '200ms'\n", ""), "warning", "no dial_timeout");
    try_with(&ours.replace("'resolve']", "'resolve', 'referrers']"), "warning", "referrers");
    try_with(&ours.replace("['pull', 'resolve']", "['pull']"), "note", "tags are resolved upstream");
    try_with(&ours.replace("['pull', 'resolve']", "['resolve']"), "failure", "no capability `pull`");
    try_with(&ours.replace("'resolve']", "'resolve', 'pish']"), "failure", "knows no capability `pish`");
    // Without any, containerd asks for all that there are; in which letters does not matter to it.
    for all in ["", "capabilities = ['Pull', 'Resolve', 'Referrers']\n"] {
        try_with(&ours.replace("capabilities = ['pull', 'resolve']\n", all), "warning", "is asked for referrers");
        let said = doctor(containerd, &[]);
        assert!(!said.checks.iter().any(|(check, state, _)| check == "certs.d" && state == "failure"), "{}", said.text);
    }
    try_with(&format!("{ours}Authorization = 'Basic x'\n"), "warning", "has credentials, and its mode lets others");
    let another = "[host.'http://10.255.255.1:5000']\ncapabilities = ['pull']\n\n[host.'http://";
    try_with(&ours.replacen("[host.'http://", another, 1), "warning", "is asked before the mirror");
    let elsewhere = ours.replace(&containerd.node().address().to_string(), "10.255.255.1");
    try_with(&elsewhere, "warning", "is not on this node");
    try_with("host = [", "failure", "cannot be read as containerd reads it");
    let unmarked = ours.split_once('\n').unwrap().1;
    try_with(unmarked, "warning", "was not written by spegel");
    fs::write(file, ours).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o666)).unwrap();
    doctor(containerd, &[]).has("certs.d", "warning", "can be changed by others");
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    chown(file, Some(65534), None).unwrap();
    doctor(containerd, &[]).has("certs.d", "warning", "belongs to user 65534");
    chown(file, Some(0), None).unwrap();
    let above = containerd.certs_dir();
    fs::set_permissions(&above, fs::Permissions::from_mode(0o777)).unwrap();
    let says = format!("{} can be changed by others", above.display());
    doctor(containerd, &[]).has("certs.d", "warning", &says);
    fs::set_permissions(&above, fs::Permissions::from_mode(0o755)).unwrap();
    // The Go program's: a file of its shape, and what it moved away.
    let certs = containerd.certs_dir();
    fs::create_dir_all(certs.join("_backup/quay.io")).unwrap();
    fs::write(certs.join("_backup/quay.io/hosts.toml"), "server = 'https://quay.io'\n").unwrap();
    let url = format!("http://{}:5000", containerd.node().address());
    try_with(
        &format!("[host.'{url}']\ncapabilities = ['pull', 'resolve']\ndial_timeout = '200ms'\n"),
        "warning",
        "written by the Go program",
    );
    doctor(containerd, &[]).has("certs.d", "warning", "of quay.io is only in");
    fs::remove_dir_all(certs.join("_backup")).unwrap();
    fs::write(file, ours).unwrap();
    // A registry with a configuration of its own, beside a mirror for all.
    fs::create_dir(certs.join("_default")).unwrap();
    fs::write(certs.join("_default/hosts.toml"), ours).unwrap();
    fs::create_dir(certs.join("ghcr.io")).unwrap();
    fs::write(certs.join("ghcr.io/hosts.toml"), "server = 'https://ghcr.io'\n").unwrap();
    doctor(containerd, &[]).has("certs.d", "note", "configuration of their own: ghcr.io");
    fs::remove_dir_all(certs.join("ghcr.io")).unwrap();
    fs::remove_dir_all(certs.join("_default")).unwrap();
}

/// Credentials that do not match are named, and 1.6's price of a dead mirror is told.
#[test]
fn credentials_and_an_older_containerd_are_judged() {
    let secrets = tempfile::tempdir().unwrap();
    fs::write(secrets.path().join("username"), "user").unwrap();
    fs::write(secrets.path().join("password"), "secret").unwrap();
    let basic = ["--basic-auth-dir", secrets.path().to_str().unwrap()];
    // `configuration` is run without the credentials that `registry` asks for.
    let Some(cluster) = Cluster::start_with(Version::V1_6, 1, &Options::default(), &basic) else { return };
    let said = doctor(&cluster.nodes[0].containerd, &[]);
    said.has_code(1);
    said.has("mirrors", "failure", "refuses the credentials");
    said.has("containerd", "note", "each request waits up to 30 s");
    said.has("members", "note", "knows no other");
}

/// Without a mirror at all, on a bare containerd.
#[test]
fn a_node_without_a_mirror_is_told_what_to_do_first() {
    let ready = Lab::available().and(Version::V2_2.find());
    let binaries = match ready {
        Ok(binaries) => binaries,
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    let mut lab = Lab::new().unwrap();
    let containerd = Containerd::start(&binaries, &lab.add_node().unwrap(), &Options::default()).unwrap();
    let said = doctor(&containerd, &[]);
    said.has_code(1);
    said.has("certs.d", "failure", "no hosts.toml below");
    said.has("process", "failure", "does not run");
    said.has("probe", "unknown", "no blob to fetch");
    // A containerd that has never pulled has no such directory as yet.
    said.has("content", "note", "makes it with its first pull");
}

/// A disk that has changed what is on it: the mirror gives it, and only its digest tells.
#[test]
fn wrong_bytes_are_named() {
    // In a storm the mirror reads what is small as it comes, and gives it from memory.
    let Some(cluster) = Cluster::start_with(Version::V2_2, 2, &Options::default(), &["--storm", "off"]) else { return };
    let image = image(&cluster);
    let node = &cluster.nodes[0];
    node.pull_by_cri(&image, image.reference());
    for digest in node.containerd.content().unwrap() {
        let path = node.containerd.blob_path(&digest);
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let said = doctor(&node.containerd, &[]);
    said.has_code(1);
    said.has("probe", "failure", "with wrong bytes");
}

/// The mirror looks into another of containerd's namespaces than pulls do.
#[test]
fn a_mirror_that_serves_another_namespace_is_named() {
    let Some(mut cluster) = Cluster::start(Version::V2_2, 1, &Options::default()) else { return };
    let image = image(&cluster);
    cluster.nodes[0].pull_by_cri(&image, image.reference());
    cluster.nodes[0].spegel.take().unwrap().daemon.stop().unwrap();
    let mut settings = cluster.settings(0);
    settings.arguments.extend(["--containerd-namespace".to_owned(), "elsewhere".to_owned()]);
    let _spegel = settings.start().unwrap();
    let said = doctor(&cluster.nodes[0].containerd, &[]);
    said.has_code(1);
    said.has("probe", "failure", "answers 404 for");
}

/// As containerd's profile for pods has it. The filter is this thread's, and that of every process that it starts.
#[test]
fn forbidden_io_uring_is_named() {
    let judge = || {
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let rules = BTreeMap::from([(IO_URING_SETUP.0, vec![])]);
        let refused = SeccompAction::Errno(IO_URING_SETUP.1);
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap();
        let program: BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
        let Some(cluster) = Cluster::start(Version::V2_2, 1, &Options::default()) else { return };
        let said = doctor(&cluster.nodes[0].containerd, &[]);
        said.has("io_uring", "note", "by threads instead of io_uring (");
    };
    std::thread::scope(|scope| scope.spawn(judge).join().unwrap());
}
