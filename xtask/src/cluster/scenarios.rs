//! What is done to a cluster, and what must be true of it afterwards.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use spegel_benches::daemon::{output, wait_until};

use super::Stage;
use super::machine::NODES;
use super::objects;
use super::pods::{self, Images, Load};
use super::release::{Asked, NEXT_TAG, Release, TAG, UPSTREAM, said};

/// A scenario: its name, and what it does.
pub(super) type Scenario = fn(&mut Stage<'_>) -> Result<()>;

/// All of them. Each finds a cluster without a release, and leaves one.
pub(super) const SCENARIOS: [(&str, Scenario); 11] = [
    ("lifecycle", lifecycle),
    ("upgrade-under-load", upgrade_under_load),
    ("host-port", host_port),
    ("kubelet-stopped", kubelet_stopped),
    ("kubelet-late", kubelet_late),
    ("tainted", tainted),
    ("other-namespace", other_namespace),
    ("go-values", go_values),
    ("from-go-chart", from_go_chart),
    ("broken-install", broken_install),
    ("startup-taint", startup_taint),
];

/// What is asked once, since the Helms make the same objects of the chart (the chart's own tests compare them).
pub(super) const FIRST: (&str, Scenario) = ("objects", objects::accepted);

/// What an administrator has on a node before and adds later.
const ADMINISTRATORS: &str =
    "# by hand\nserver = \"https://quay.test\"\n\n[host.\"https://cache.test\"]\ncapabilities = [\"pull\"]\n";

/// Bytes of a test image's layer: enough for a relay, quick to make.
const LAYER: usize = 8 << 20;

/// Images that each node pulls to show which mirror is asked.
const ASKS: usize = 5;

fn chart() -> PathBuf {
    Release::chart()
}

fn older_chart() -> PathBuf {
    crate::root().join("xtask/src/cluster/older")
}

/// Installs our chart, and sees that every node's containerd is told of its own node's mirror.
fn install(stage: &mut Stage<'_>, release: &Release<'_>, more: &[&str]) -> Result<()> {
    stage.step("install, until every pod is ready", || Ok((release.install(&chart(), more)?, String::new())))?;
    check_targets(release)
}

fn check_targets(release: &Release<'_>) -> Result<()> {
    for number in 1..=NODES {
        let hosts = release.machine.hosts(number, UPSTREAM)?;
        let own = format!("10.250.1.{number}:30020");
        ensure!(hosts.contains(&own), "node{number} is not told of {own}: {hosts}");
    }
    Ok(())
}

/// Uninstalls it, and sees that nothing is left: on the nodes what was there before, in the cluster nothing.
fn uninstall(stage: &mut Stage<'_>, release: &Release<'_>, before: &str) -> Result<()> {
    stage.step("uninstall", || {
        let done = release.uninstall()?;
        ensure!(done.status.success(), "helm uninstall failed: {}", said(&done));
        Ok(((), String::new()))
    })?;
    check_removed(stage, release, before)
}

fn check_removed(stage: &mut Stage<'_>, release: &Release<'_>, before: &str) -> Result<()> {
    stage.step("certs.d of every node is what it was", || {
        check_same(before, &release.machine.certs()?)?;
        let left = release.machine.left_on_nodes()?;
        ensure!(left.is_empty(), "left on nodes: {left}");
        Ok(((), String::new()))
    })?;
    stage.step("nothing is left in the namespace", || {
        Ok((release.machine.wait_empty(release.namespace)?, String::new()))
    })
}

fn check_same(before: &str, after: &str) -> Result<()> {
    let only = |text: &str, other: &str, sign: char| -> String {
        let other: Vec<&str> = other.lines().collect();
        text.lines().filter(|line| !other.contains(line)).fold(String::new(), |mut told, line| {
            // Writing to a String cannot fail.
            let _ = write!(told, "\n{sign} {line}");
            told
        })
    };
    ensure!(before == after, "certs.d differs:{}{}", only(before, after, '-'), only(after, before, '+'));
    Ok(())
}

/// Every node pulls images that nobody has: each mirror counts a miss for each request, so the counts tell who was asked.
fn who_was_asked(stage: &mut Stage<'_>, release: &Release<'_>, prefix: &str) -> Result<()> {
    pods::prepare(release.machine)?;
    let mut images = Images::new(prefix)?;
    for number in 1..=NODES {
        let before = release.asked()?;
        stage.step(&format!("node{number} pulls {ASKS} images that nobody has"), || {
            let asks = (0..ASKS).map(|_| images.push(release.machine, 1024)).collect::<Result<Vec<_>>>()?;
            pods::run_all(release.machine, &format!("{prefix}-{number}"), number, &asks)?;
            let asked = since(&before, &release.asked()?);
            let told = asked.iter().zip(1..).map(|(asked, node)| format!("node{node} {}", asked.misses));
            let told = format!("misses at {}", told.collect::<Vec<_>>().join(", "));
            let elsewhere: u64 =
                asked.iter().zip(1..).filter(|(_, node)| *node != number).map(|(asked, _)| asked.misses).sum();
            ensure!(asked[number - 1].misses > 0 && elsewhere == 0, "another node's mirror was asked: {told}");
            Ok(((), told))
        })?;
    }
    Ok(())
}

fn since(before: &[Asked], after: &[Asked]) -> Vec<Asked> {
    let difference = |(before, after): (&Asked, &Asked)| Asked {
        hits: after.hits.saturating_sub(before.hits),
        misses: after.misses.saturating_sub(before.misses),
    };
    before.iter().zip(after).map(difference).collect()
}

fn lifecycle(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    machine.write_hosts(1, "quay.test", ADMINISTRATORS)?;
    machine.write_hosts(3, "_default", ADMINISTRATORS)?;
    let before = machine.certs()?;
    install(stage, &release, &[])?;
    who_was_asked(stage, &release, "own-node-port")?;

    let image = Images::new("shared")?.push(&machine, LAYER)?;
    stage.step("a pod on node1 pulls from upstream", || Ok(((), pods::run(&machine, "first", 1, &image)?)))?;
    stage.step("upstream is stopped, a pod on node2 pulls the same", || {
        machine.down(Some("upstream/registry"))?;
        let asked = release.asked()?;
        let told = pods::run(&machine, "second", 2, &image);
        let asked = since(&asked, &release.asked()?);
        ensure!(told.is_err() || asked[1].hits > 0, "node2's mirror was not asked: {asked:?}");
        Ok(((), format!("{}; {} hits at node2", told?, asked[1].hits)))
    })?;
    stage.step("containerd of node1 is restarted, a pod on node3 pulls the same", || {
        machine.down(Some("node1/containerd"))?;
        machine.up_without_registry()?;
        Ok(((), pods::run(&machine, "third", 3, &image)?))
    })?;
    machine.up()?;

    machine.write_hosts(2, "later.test", ADMINISTRATORS)?;
    stage.step("uninstall", || {
        let done = release.uninstall()?;
        ensure!(done.status.success(), "helm uninstall failed: {}", said(&done));
        Ok(((), String::new()))
    })?;
    ensure!(machine.hosts(2, "later.test")? == ADMINISTRATORS, "what was added after the install is gone");
    machine.remove_hosts(2, "later.test")?;
    check_removed(stage, &release, &before)?;
    machine.remove_hosts(1, "quay.test")?;
    machine.remove_hosts(3, "_default")
}

fn upgrade_under_load(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    let before = machine.certs()?;
    install(stage, &release, &[])?;
    upgrade(stage, &release, NEXT_TAG, &[], "node-port")?;
    upgrade(stage, &release, TAG, &["--set", "service.registry.access=hostPort"], "to-host-port")?;
    upgrade(stage, &release, NEXT_TAG, &["--set", "service.registry.access=hostPort"], "host-port")?;
    uninstall(stage, &release, &before)
}

/// Upgrades while pods are created on all nodes.
fn upgrade(stage: &mut Stage<'_>, release: &Release<'_>, tag: &str, more: &[&str], what: &str) -> Result<()> {
    let machine = Arc::clone(stage.machine);
    pods::prepare(&machine)?;
    let images = pods::push_many(&machine, what, 40, 1 << 20)?;
    let load = Load::start(&machine, images);
    thread::sleep(Duration::from_secs(2));
    let upgraded =
        stage.step(&format!("upgrade under load ({what})"), || Ok((release.upgrade(tag, more)?, String::new())));
    stage.step("pulls meanwhile", || {
        let pulls = load.finish(&machine)?;
        Ok(((), format!("{pulls} pulls, none failed")))
    })?;
    upgraded.map(drop)
}

fn host_port(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let before = stage.machine.certs()?;
    install(stage, &release, &["--set", "service.registry.access=hostPort"])?;
    who_was_asked(stage, &release, "own-host-port")?;
    uninstall(stage, &release, &before)
}

/// A node is down during the uninstall: it is named, and the command that is printed repeats the cleanup once it is back.
fn kubelet_stopped(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    let before = machine.certs()?;
    install(stage, &release, &["--set", "cleanup.deadline=2m"])?;
    machine.down(Some("node3/kubelet"))?;
    let text = stage.step("uninstall with node3's kubelet stopped, deadline 2 m", || {
        let done = release.uninstall()?;
        let text = said(&done);
        ensure!(!done.status.success(), "helm uninstall succeeded: {text}");
        let verdict = text.split_once("have not said that they are clean").map_or("", |(_, rest)| rest).to_owned();
        ensure!(verdict.contains("node3"), "Helm's output does not name node3: {text}");
        ensure!(!verdict.contains("node2") && !verdict.contains("node1"), "a node that is clean is named: {text}");
        Ok((verdict, "fails and names node3".to_owned()))
    })?;
    // Helm 3 prints the log as it is, Helm 4 as one quoted line.
    let lines = text.replace("\\n", "\n");
    let command = lines.lines().find_map(|line| line.find("kubectl -n ").map(|start| line[start..].to_owned()));
    let Some(command) = command else { bail!("Helm's output has no command that repeats the cleanup: {text}") };
    stage.step("the wait and its log remain", || {
        let log = machine.kubectl(&["logs", "job/spegel-cleanup-wait", "--namespace", release.namespace])?;
        ensure!(log.contains("node3"), "its log: {log}");
        Ok(((), String::new()))
    })?;
    machine.up()?;
    machine.wait_ready()?;
    stage.step("the kubelet is back, the printed command", || {
        output(machine.client("bash").args(["-c", &command]))?;
        Ok(((), String::new()))
    })?;
    check_removed(stage, &release, &before)
}

/// A node comes back while the uninstall waits for it.
fn kubelet_late(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    let before = machine.certs()?;
    install(stage, &release, &[])?;
    machine.down(Some("node3/kubelet"))?;
    stage.step("uninstall with node3's kubelet stopped for 20 s", || {
        let other = Arc::clone(&machine);
        let back = thread::spawn(move || {
            thread::sleep(Duration::from_secs(20));
            other.up()
        });
        let done = release.uninstall()?;
        back.join().map_err(|_| anyhow::anyhow!("the thread that starts the kubelet panicked"))??;
        ensure!(done.status.success(), "helm uninstall failed: {}", said(&done));
        Ok(((), String::new()))
    })?;
    check_removed(stage, &release, &before)?;
    machine.wait_ready()
}

/// Every node has a taint that no pod tolerates by itself.
fn tainted(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    let taints = [("node1", "a", "NoSchedule"), ("node2", "b", "NoSchedule"), ("node3", "c", "NoExecute")];
    for (node, key, effect) in taints {
        machine.kubectl(&["taint", "node", node, &format!("{key}=x:{effect}")])?;
    }
    let before = machine.certs()?;
    install(stage, &release, &[])?;
    uninstall(stage, &release, &before)?;
    for (node, key, effect) in taints {
        machine.kubectl(&["taint", "node", node, &format!("{key}=x:{effect}-")])?;
    }
    Ok(())
}

fn other_namespace(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("mirror-spegel", "team-images");
    let before = stage.machine.certs()?;
    install(stage, &release, &["--set", "networkPolicy.enabled=true"])?;
    uninstall(stage, &release, &before)
}

/// The values file of the Go program's chart, with nothing but the image changed.
fn go_values(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let before = stage.machine.certs()?;
    let values = crate::root().join("xtask/src/chart/go-values.yaml");
    install(stage, &release, &["--values", &values.display().to_string()])?;
    uninstall(stage, &release, &before)
}

/// From a chart of the Go chart's shape to ours, with nothing deleted by hand, and then away.
fn from_go_chart(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    machine.write_hosts(1, "quay.test", ADMINISTRATORS)?;
    let before = machine.certs()?;
    stage.step("install a chart of the Go chart's shape", || {
        Ok((release.install(&older_chart(), &[])?, String::new()))
    })?;
    let moved = machine.certs()?;
    ensure!(moved.contains("_backup/quay.test/hosts.toml"), "the older chart did its work: {moved}");
    let values = crate::root().join("xtask/src/chart/go-values.yaml");
    let values = values.display().to_string();
    stage.step("upgrade to ours, with the Go chart's values", || {
        Ok((release.upgrade(TAG, &["--values", &values])?, String::new()))
    })?;
    check_targets(&release)?;
    ensure!(machine.hosts(1, "quay.test")? == ADMINISTRATORS, "the administrator's file does not take part meanwhile");
    uninstall(stage, &release, &before)?;
    machine.remove_hosts(1, "quay.test")
}

/// The mirror has never come up, but its configuration is on the nodes.
fn broken_install(stage: &mut Stage<'_>) -> Result<()> {
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    let before = machine.certs()?;
    stage.step("install with the content directory of another containerd, which never becomes ready", || {
        let path = "spegel.containerdContentPath=/var/lib/kubelet";
        let failed = release.install(&chart(), &["--set", path, "--timeout", "10s"]);
        ensure!(failed.is_err(), "it became ready");
        Ok(((), String::new()))
    })?;
    let written = || (1..=NODES).all(|node| machine.hosts(node, UPSTREAM).is_ok_and(|text| text.contains("30020")));
    wait_until(Duration::from_secs(30), "the configuration of the nodes", written)?;
    uninstall(stage, &release, &before)
}

/// New nodes carry a taint until their mirror is ready; each mirror knows its node's zone by the node's label.
fn startup_taint(stage: &mut Stage<'_>) -> Result<()> {
    const TAINT: &str = "spegel.dev/agent-not-ready";
    let release = stage.release("spegel", "spegel");
    let machine = Arc::clone(stage.machine);
    let before = machine.certs()?;
    machine.kubectl(&["label", "nodes", "--all", "--overwrite", "topology.kubernetes.io/zone=zone-a"])?;
    machine.kubectl(&["taint", "nodes", "--all", &format!("{TAINT}=:NoSchedule"), "other=:PreferNoSchedule"])?;
    install(stage, &release, &["--set", "startupTaint.enabled=true", "--set", "spegel.zoneFromNode=true"])?;
    stage.step("the startup taint of every node is taken away, another one stays", || {
        let taints = || machine.kubectl(&["get", "nodes", "--output", "jsonpath={.items[*].spec.taints[*].key}"]);
        let gone = || taints().is_ok_and(|taints| !taints.contains(TAINT));
        wait_until(Duration::from_secs(60), "the taints to go", gone)?;
        let left = taints()?;
        ensure!(left.split_whitespace().eq(["other"; NODES]), "taints that are left: {left}");
        Ok(((), String::new()))
    })?;
    for (node, address) in release.pods()? {
        let figures = release.figures(&address)?;
        let known = figures.lines().find(|line| line.starts_with("spegel_node_info{")).unwrap_or_default();
        let (node, zone) = (format!("node=\"{node}\""), "zone=\"zone-a\"");
        ensure!(known.contains(&node) && known.contains(zone), "the mirror does not know {node} and {zone}: {known}");
    }
    machine.kubectl(&["taint", "nodes", "--all", "other:PreferNoSchedule-"])?;
    uninstall(stage, &release, &before)?;
    machine.kubectl(&["label", "nodes", "--all", "topology.kubernetes.io/zone-"]).map(drop)
}
