//! The cluster, by kubectl: a DaemonSet whose pods pull, and the events that tell how long that took.
//!
//! The images hold no program, so their containers do not start; the pull is over by then. A pod is never restarted for it before it is replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use spegel_benches::daemon::output;

const NAME: &str = "image-pull-bench";
const POLL: Duration = Duration::from_millis(500);

pub(super) struct Cluster {
    kubectl: PathBuf,
    namespace: String,
    nodes: Vec<String>,
    patience: Duration,
}

// === impl Cluster ===

impl Cluster {
    /// Chooses the nodes and makes the namespace.
    pub(super) fn prepare(kubectl: &Path, namespace: &str, count: Option<usize>, patience: Duration) -> Result<Self> {
        let mut this =
            Self { kubectl: kubectl.to_owned(), namespace: namespace.to_owned(), nodes: Vec::new(), patience };
        let nodes = this.get(&["get", "nodes"])?;
        let takes_pods = |node: &&Value| {
            let taints = node["spec"]["taints"].as_array();
            node["spec"]["unschedulable"] != true
                && taints.is_none_or(|taints| taints.iter().all(|taint| taint["effect"] == "PreferNoSchedule"))
        };
        let names = nodes["items"].as_array().into_iter().flatten().filter(takes_pods);
        this.nodes = names.filter_map(|node| Some(node["metadata"]["name"].as_str()?.to_owned())).collect();
        if let Some(count) = count {
            ensure!(this.nodes.len() >= count, "{} nodes take pods, and {count} are asked for", this.nodes.len());
            this.nodes.truncate(count);
        }
        ensure!(!this.nodes.is_empty(), "no node takes pods");
        this.kubectl(&["create", "namespace", namespace])?;
        Ok(this)
    }

    pub(super) fn nodes(&self) -> &[String] {
        &self.nodes
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.args(["--namespace", &self.namespace]).args(arguments);
        command
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        output(&mut self.command(arguments))
    }

    fn get(&self, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&[arguments, &["--output", "json"]].concat())?)?)
    }

    fn apply(&self, object: &Value) -> Result<()> {
        let mut child = self
            .command(&["apply", "--filename", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("run kubectl")?;
        child.stdin.take().context("kubectl has an input")?.write_all(object.to_string().as_bytes())?;
        ensure!(child.wait()?.success(), "kubectl does not take the DaemonSet");
        Ok(())
    }

    fn daemon_set(&self, image: &str) -> Value {
        let labels = json!({ "app": NAME });
        let nodes = json!({ "key": "kubernetes.io/hostname", "operator": "In", "values": self.nodes });
        let affinity = json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [{ "matchExpressions": [nodes] }] } } });
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": NAME },
            "spec": {
                "selector": { "matchLabels": labels },
                // The order of an update is this program's.
                "updateStrategy": { "type": "OnDelete" },
                "template": {
                    "metadata": { "labels": labels },
                    "spec": {
                        "affinity": affinity,
                        "automountServiceAccountToken": false,
                        "terminationGracePeriodSeconds": 0,
                        "containers": [{ "name": "image", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["/none"] }],
                    },
                },
            },
        })
    }

    /// All nodes at once.
    pub(super) fn create(&self, image: &str) -> Result<Vec<Duration>> {
        self.apply(&self.daemon_set(image))?;
        self.wait(image, self.nodes.len())
    }

    /// One node after the other.
    pub(super) fn update(&self, image: &str) -> Result<Vec<Duration>> {
        self.apply(&self.daemon_set(image))?;
        let pods = self.get(&["get", "pods", "--selector", &format!("app={NAME}")])?;
        let names = pods["items"].as_array().into_iter().flatten().filter_map(|pod| pod["metadata"]["name"].as_str());
        let mut pulls = Vec::new();
        for (done, name) in names.enumerate() {
            self.kubectl(&["delete", "pod", name, "--wait=false"])?;
            pulls = self.wait(image, done + 1)?;
        }
        Ok(pulls)
    }

    /// Waits until so many nodes have pulled an image; how long each took, shortest first.
    fn wait(&self, image: &str, count: usize) -> Result<Vec<Duration>> {
        let end = Instant::now() + self.patience;
        loop {
            let events = self.get(&["get", "events"])?;
            let mut found = pulls(&events, image);
            if found.len() >= count {
                found.sort_unstable();
                return Ok(found);
            }
            if Instant::now() > end {
                let said: BTreeSet<&str> = events["items"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter(|event| event["type"] == "Warning")
                    .filter_map(|event| event["message"].as_str())
                    .collect();
                bail!(
                    "{} of {count} nodes have pulled {image} after {} s: {said:?}",
                    found.len(),
                    self.patience.as_secs()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// Removes the pods; their events go by their names.
    pub(super) fn clear(&self) -> Result<()> {
        self.kubectl(&["delete", "daemonset", NAME, "--wait=true", "--cascade=foreground"]).map(|_| ())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]) {
            println!("the namespace {} is left: {error:#}", self.namespace);
        }
    }
}

/// How long each pod's pull of an image took, by the events of the kubelets.
fn pulls(events: &Value, image: &str) -> Vec<Duration> {
    let start = format!("Successfully pulled image \"{image}\" in ");
    let mut by_pod = BTreeMap::new();
    for event in events["items"].as_array().into_iter().flatten() {
        let Some(rest) = event["message"].as_str().and_then(|message| message.strip_prefix(&start)) else { continue };
        let waited = rest.split_once('(').and_then(|(_, rest)| rest.split_once(" including waiting"));
        let text = waited.map_or_else(|| rest.split(['.', ' ']).next().unwrap_or(rest), |(text, _)| text);
        if let (Some(took), Some(pod)) = (go_duration(text), event["involvedObject"]["name"].as_str()) {
            by_pod.insert(pod.to_owned(), took);
        }
    }
    by_pod.into_values().collect()
}

/// `1m2.5s`, `345ms`, `1.2s`.
fn go_duration(text: &str) -> Option<Duration> {
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        seconds += number
            * match &rest[digits..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "µs" | "us" => 1e-6,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubelets_events_are_read() {
        let event = |pod: &str, message: &str| json!({ "involvedObject": { "name": pod }, "message": message });
        let events = json!({ "items": [
            event("a", "Successfully pulled image \"r/i:1\" in 1.2s (1.5s including waiting). Image size: 10 bytes."),
            event("b", "Successfully pulled image \"r/i:1\" in 1m2.5s (1m2.5s including waiting). Image size: 10 bytes."),
            event("c", "Successfully pulled image \"r/i:2\" in 1.2s (1.5s including waiting). Image size: 10 bytes."),
            event("d", "Pulling image \"r/i:1\""),
        ] });
        assert_eq!(pulls(&events, "r/i:1"), [Duration::from_millis(1500), Duration::from_millis(62_500)]);
        assert_eq!(go_duration("345ms"), Some(Duration::from_millis(345)));
        assert_eq!(go_duration("soon"), None);
    }
}
