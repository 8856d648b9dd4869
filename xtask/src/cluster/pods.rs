//! Pods whose images come from the upstream registry, one after the other or as load.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use spegel_benches::daemon::wait_until;

use super::machine::{Machine, NODES};
use super::release::UPSTREAM;

/// The namespace of the pods.
const NAMESPACE: &str = "load";

/// How long a pod may take to pull its image and end.
const LIMIT: Duration = Duration::from_secs(90);

/// Images in the upstream registry that no node has.
#[derive(Debug)]
pub(super) struct Images {
    folder: tempfile::TempDir,
    prefix: String,
    made: usize,
}

/// Pods that are created on all nodes, round after round, until it is told to stop.
#[derive(Debug)]
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize>>,
}

// === impl Images ===

impl Images {
    /// Images whose names begin with `prefix` and the time: a node that knew a name of an earlier round would answer for it,
    /// with what it had then.
    ///
    /// # Errors
    /// The disk's, or the clock's.
    pub(super) fn new(prefix: &str) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
        Ok(Self { folder: tempfile::tempdir()?, prefix: format!("{prefix}-{}", now.as_secs()), made: 0 })
    }

    /// Pushes an image of one program and one layer of `bytes`, and returns its name.
    ///
    /// # Errors
    /// The disk's, or the registry's.
    pub(super) fn push(&mut self, machine: &Machine, bytes: usize) -> Result<String> {
        self.made += 1;
        let image = format!("{UPSTREAM}/{}-{}:1", self.prefix, self.made);
        let file = self.random(bytes)?;
        machine.push(&image, &[&file])?;
        Ok(image)
    }

    fn random(&self, bytes: usize) -> Result<PathBuf> {
        let file = self.folder.path().join(format!("{}-{}", self.prefix, self.made));
        let mut source = std::io::Read::take(std::fs::File::open("/dev/urandom")?, bytes as u64);
        std::io::copy(&mut source, &mut std::fs::File::create(&file)?)?;
        Ok(file)
    }
}

fn pod(name: &str, node: usize, image: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "nodeName": format!("node{node}"), "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false, "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "app", "image": image, "imagePullPolicy": "Always"}]
        }
    })
}

fn create(machine: &Machine, pods: &[Value]) -> Result<()> {
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": pods});
    machine.feed(&["apply", "--filename", "-"], &objects.to_string()).map(drop)
}

/// Makes the namespace of the pods, without any pod.
///
/// # Errors
/// The API server's.
pub(super) fn prepare(machine: &Machine) -> Result<()> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    machine.feed(&["apply", "--filename", "-"], &namespace.to_string())?;
    machine.kubectl(&["delete", "pods,events", "--all", "--namespace", NAMESPACE, "--wait"])?;
    let account = || machine.kubectl(&["get", "serviceaccount", "default", "--namespace", NAMESPACE]).is_ok();
    wait_until(Duration::from_secs(30), "a service account", account)
}

/// Runs an image on a node to its end, and returns what the kubelet says of the pull.
///
/// # Errors
/// It does not end well.
pub(super) fn run(machine: &Machine, name: &str, node: usize, image: &str) -> Result<String> {
    create(machine, &[pod(name, node, image)])?;
    wait_for_all(machine)?;
    let selector = format!("involvedObject.name={name},reason=Pulled");
    let events = machine.get(&["events", "--namespace", NAMESPACE, "--field-selector", &selector])?;
    let message = events["items"][0]["message"].as_str().unwrap_or("no event").to_owned();
    Ok(message)
}

/// Runs images on a node at once, each to its end.
///
/// # Errors
/// One does not end well.
pub(super) fn run_all(machine: &Machine, prefix: &str, node: usize, images: &[String]) -> Result<()> {
    let pods: Vec<_> = images.iter().zip(1..).map(|(image, n)| pod(&format!("{prefix}-{n}"), node, image)).collect();
    create(machine, &pods)?;
    wait_for_all(machine)
}

/// Waits until no pod is pending or running.
fn wait_for_all(machine: &Machine) -> Result<()> {
    let phases = || machine.get(&["pods", "--namespace", NAMESPACE]).map(|list| list["items"].clone());
    let ended = |pod: &Value| matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed"));
    let all_ended = || phases().is_ok_and(|pods| pods.as_array().is_some_and(|pods| pods.iter().all(ended)));
    let waited = wait_until(LIMIT, "the pods", all_ended);
    let pods = phases()?;
    let left: Vec<_> = pods
        .as_array()
        .into_iter()
        .flatten()
        .filter(|pod| pod["status"]["phase"] != "Succeeded")
        .map(|pod| format!("{}: {}", pod["metadata"]["name"], pod["status"]))
        .collect();
    ensure!(waited.is_ok() && left.is_empty(), "pods did not end well: {}", left.join("\n"));
    Ok(())
}

/// What kubelets said of pulls that failed.
fn failures(machine: &Machine) -> Result<Vec<String>> {
    let events = machine.get(&["events", "--namespace", NAMESPACE, "--field-selector", "reason=Failed"])?;
    let messages = events["items"].as_array().into_iter().flatten();
    Ok(messages.map(|event| format!("{}: {}", event["involvedObject"]["name"], event["message"])).collect())
}

// === impl Load ===

impl Load {
    /// Starts with images that are in the registry; one round uses up one of them.
    pub(super) fn start(machine: &Arc<Machine>, images: Vec<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (machine, told) = (Arc::clone(machine), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut pulls = 0;
            for (round, image) in images.iter().enumerate() {
                if told.load(Ordering::Relaxed) {
                    break;
                }
                // One node first, so that the others find it at a peer, which may be the one that is replaced just then.
                let order: Vec<_> = (0..NODES).map(|step| (round + step) % NODES + 1).collect();
                let pods: Vec<_> =
                    order.iter().map(|&node| pod(&format!("load-{round}-{node}"), node, image)).collect();
                create(&machine, &pods[..1])?;
                thread::sleep(Duration::from_millis(500));
                create(&machine, &pods[1..])?;
                pulls += NODES;
                thread::sleep(Duration::from_millis(500));
            }
            Ok(pulls)
        });
        Self { stop, thread }
    }

    /// Ends it and returns how many pulls there were, if all of them succeeded at the first try.
    ///
    /// # Errors
    /// Those that did not.
    pub(super) fn finish(self, machine: &Machine) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        let pulls = self.thread.join().map_err(|_| anyhow!("the load panicked"))?.context("create pods")?;
        wait_for_all(machine)?;
        let failures = failures(machine)?;
        ensure!(failures.is_empty(), "{} of {pulls} pulls failed: {}", failures.len(), failures.join("\n"));
        Ok(pulls)
    }
}

/// Pushes images for a load: `count` of them with layers of `bytes`.
///
/// # Errors
/// The registry's.
pub(super) fn push_many(machine: &Machine, prefix: &str, count: usize, bytes: usize) -> Result<Vec<String>> {
    let mut images = Images::new(prefix)?;
    (0..count).map(|_| images.push(machine, bytes)).collect()
}
