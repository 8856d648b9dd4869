//! Which nodes must become clean.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;

use crate::bootstrap::{Bootstrap, DnsBootstrap};
use crate::kube::{Api, DaemonSet, Pod};

/// A node that must say that it is clean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name, or its address where no name is known.
    pub name: String,
    /// Where it is asked, or why it cannot be.
    pub addr: Result<SocketAddr, String>,
}

/// The nodes at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Those that are known.
    pub nodes: Vec<Node>,
    /// Why these are not all yet, or why what they say does not count yet.
    pub unsettled: Option<String>,
}

/// Knows which nodes there are.
#[async_trait]
pub trait Nodes: Send + Sync {
    /// Looks anew.
    ///
    /// # Errors
    /// Why it cannot be known now; later it may.
    async fn look(&self) -> Result<View, String>;
}

/// The nodes for which the Kubernetes API says that a DaemonSet has a pod there, or must get one.
#[derive(Debug)]
pub struct ApiNodes {
    /// Whom to ask.
    pub api: Api,
    /// The namespace of all that is looked at.
    pub namespace: String,
    /// The DaemonSet whose pods clean.
    pub daemon_set: String,
    /// A label selector of the mirror's own pods: one that has not finished its init containers can still write the configuration.
    pub mirror_selector: Option<String>,
    /// The port that is probed.
    pub port: u16,
}

/// The addresses of a name. A node whose pod does not run yet is not among them.
#[derive(Debug)]
pub struct DnsNodes {
    source: DnsBootstrap,
    port: u16,
}

// === impl ApiNodes ===

impl ApiNodes {
    /// How long ago the cleanup began: when its DaemonSet was made, by the API server's clock. Unknown while the API does not answer.
    pub async fn age(&self) -> Option<Duration> {
        self.api.age_of_daemon_set(&self.namespace, &self.daemon_set).await.ok().flatten()
    }
}

#[async_trait]
impl Nodes for ApiNodes {
    async fn look(&self) -> Result<View, String> {
        let of_mirror = match &self.mirror_selector {
            Some(selector) => self.api.pods(&self.namespace, selector).await.map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        let set = self.api.daemon_set(&self.namespace, &self.daemon_set).await.map_err(|error| error.to_string())?;
        let labels = &set.spec.selector.match_labels;
        let selector: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let pods = self.api.pods(&self.namespace, &selector.join(",")).await.map_err(|error| error.to_string())?;
        Ok(view(&set, &pods, &of_mirror, self.port))
    }
}

/// What the API's answers say. `of_mirror` was asked first: what could write then is seen, and what is asked later is clean after it.
fn view(set: &DaemonSet, pods: &[Pod], of_mirror: &[Pod], port: u16) -> View {
    let alive = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let nodes: Vec<Node> = alive.map(|pod| node(pod, port)).collect();
    let (name, desired) = (&set.metadata.name, set.status.desired_number_scheduled);
    let writer = of_mirror.iter().find(|pod| may_write(pod));
    let unsettled = if set.status.observed_generation < set.metadata.generation {
        Some(format!("the cluster has not begun with DaemonSet {name}"))
    } else if nodes.len() < desired {
        Some(format!("DaemonSet {name} has {} of {desired} pods", nodes.len()))
    } else {
        writer.map(|pod| {
            format!("pod {} on {} has not ended and can still write the configuration", pod.metadata.name, place(pod))
        })
    };
    View { nodes, unsettled }
}

fn node(pod: &Pod, port: u16) -> Node {
    let addr = match pod.status.pod_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok()) {
        Some(ip) => Ok(SocketAddr::new(ip, port)),
        None => {
            let waiting = pod.status.container_statuses.iter().find_map(|status| status.state.waiting.as_ref());
            let reason = waiting.and_then(|waiting| waiting.reason.clone()).unwrap_or_else(|| pod.status.phase.clone());
            Err(format!("pod {} has not started there ({reason})", pod.metadata.name))
        }
    };
    Node { name: place(pod), addr }
}

/// Init containers run once, in the pod's beginning; a pod that has ended runs nothing more.
fn may_write(pod: &Pod) -> bool {
    let started = &pod.status.init_container_statuses;
    let initialised = !started.is_empty() && started.iter().all(|status| status.state.terminated.is_some());
    !initialised && !matches!(pod.status.phase.as_str(), "Succeeded" | "Failed")
}

/// The node of a pod, also of one that has not been put there: a DaemonSet's pod names it in its affinity.
fn place(pod: &Pod) -> String {
    let meant = || {
        let affinity = pod.spec.affinity.as_ref()?;
        let terms =
            affinity.pointer("/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms")?;
        let mut fields = terms.as_array()?.iter().filter_map(|term| term.get("matchFields")?.as_array()).flatten();
        let field = fields.find(|field| field.get("key").is_some_and(|key| key == "metadata.name"))?;
        field.pointer("/values/0")?.as_str().map(str::to_owned)
    };
    let name = pod.spec.node_name.clone().filter(|name| !name.is_empty());
    name.or_else(meant).unwrap_or_else(|| format!("the node of pod {}", pod.metadata.name))
}

// === impl DnsNodes ===

impl DnsNodes {
    /// The addresses of `name`, asked at `port`.
    pub fn new(name: &str, port: u16) -> Self {
        Self { source: DnsBootstrap::new(name), port }
    }
}

#[async_trait]
impl Nodes for DnsNodes {
    async fn look(&self) -> Result<View, String> {
        let peers = self.source.peers().await.map_err(|error| error.to_string())?;
        let addresses = peers.iter().flat_map(|peer| &peer.addresses);
        let nodes: Vec<Node> = addresses
            .map(|address| Node { name: address.ip.to_string(), addr: Ok(SocketAddr::new(address.ip, self.port)) })
            .collect();
        let unsettled = nodes.is_empty().then(|| "the name has no addresses yet".to_owned());
        Ok(View { nodes, unsettled })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    fn set(generation: i64, observed: i64, desired: usize) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": { "name": "cleanup", "generation": generation },
            "spec": { "selector": { "matchLabels": { "app": "x" } } },
            "status": { "observedGeneration": observed, "desiredNumberScheduled": desired },
        }))
        .unwrap()
    }

    fn pod(node: &str, status: Value) -> Pod {
        let value =
            json!({ "metadata": { "name": format!("pod-{node}") }, "spec": { "nodeName": node }, "status": status });
        serde_json::from_value(value).unwrap()
    }

    fn running(node: &str, ip: &str) -> Pod {
        pod(
            node,
            json!({ "phase": "Running", "podIP": ip, "initContainerStatuses": [{ "state": { "terminated": {} } }] }),
        )
    }

    #[track_caller]
    fn check_unsettled(set: &DaemonSet, pods: &[Pod], mirror: &[Pod], expected: Option<&str>) {
        let unsettled = view(set, pods, mirror, 1).unsettled;
        match expected {
            Some(part) => assert!(unsettled.as_deref().is_some_and(|reason| reason.contains(part)), "{unsettled:?}"),
            None => assert_eq!(unsettled, None),
        }
    }

    #[test]
    fn all_pods_of_the_current_generation_are_needed() {
        let pods = [running("a", "10.0.0.1"), running("b", "fd00::2")];
        check_unsettled(&set(1, 1, 2), &pods, &[], None);
        check_unsettled(&set(2, 1, 2), &pods, &[], Some("not begun"));
        check_unsettled(&set(1, 1, 3), &pods, &[], Some("2 of 3 pods"));
        let mut going = running("b", "10.0.0.2");
        going.metadata.deletion_timestamp = Some("2026-01-01T00:00:00Z".to_owned());
        check_unsettled(&set(1, 1, 2), &[running("a", "10.0.0.1"), going], &[], Some("1 of 2 pods"));
        let view = view(&set(1, 1, 2), &pods, &[], 8080);
        assert_eq!(view.nodes[1], Node { name: "b".to_owned(), addr: Ok("[fd00::2]:8080".parse().unwrap()) });
    }

    #[test]
    fn a_mirror_that_still_starts_can_write() {
        let pods = [running("a", "10.0.0.1")];
        let starting =
            pod("a", json!({ "phase": "Pending", "initContainerStatuses": [{ "state": { "running": {} } }] }));
        let unknown = pod("a", json!({ "phase": "Pending" }));
        let failed = pod("a", json!({ "phase": "Failed" }));
        check_unsettled(&set(1, 1, 1), &pods, &[starting], Some("pod pod-a on a"));
        check_unsettled(&set(1, 1, 1), &pods, &[unknown], Some("can still write"));
        check_unsettled(&set(1, 1, 1), &pods, &[failed, running("a", "10.0.0.9")], None);
    }

    #[test]
    fn nodes_without_a_running_pod_have_their_name_and_a_reason() {
        let pulling = pod(
            "a",
            json!({ "phase": "Pending", "containerStatuses": [{ "state": { "waiting": { "reason": "ImagePullBackOff" } } }] }),
        );
        assert_eq!(
            node(&pulling, 1),
            Node { name: "a".to_owned(), addr: Err("pod pod-a has not started there (ImagePullBackOff)".to_owned()) }
        );
        let affinity = json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
            { "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["node-7"] }] } ] } } });
        let unplaced =
            json!({ "metadata": { "name": "p" }, "spec": { "affinity": affinity }, "status": { "phase": "Pending" } });
        assert_eq!(node(&serde_json::from_value(unplaced).unwrap(), 1).name, "node-7");
    }
}
