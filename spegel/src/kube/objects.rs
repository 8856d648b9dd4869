//! Objects of the API, each with the few fields that are looked at.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A DaemonSet, as far as it is looked at (`apps/v1`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DaemonSet {
    pub(crate) metadata: Metadata,
    pub(crate) spec: DaemonSetSpec,
    #[serde(default)]
    pub(crate) status: DaemonSetStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Metadata {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) generation: i64,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    /// When it was made (RFC 3339).
    pub(crate) creation_timestamp: Option<String>,
    pub(crate) deletion_timestamp: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct DaemonSetSpec {
    pub(crate) selector: Selector,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Selector {
    pub(crate) match_labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DaemonSetStatus {
    #[serde(default)]
    pub(crate) observed_generation: i64,
    #[serde(default)]
    pub(crate) desired_number_scheduled: usize,
}

#[derive(Debug, Deserialize)]
pub(super) struct PodList {
    pub(super) items: Vec<Pod>,
}

/// A Pod, as far as it is looked at (`v1`).
#[derive(Debug, Deserialize)]
pub(crate) struct Pod {
    pub(crate) metadata: Metadata,
    pub(crate) spec: PodSpec,
    #[serde(default)]
    pub(crate) status: PodStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodSpec {
    pub(crate) node_name: Option<String>,
    pub(crate) affinity: Option<serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodStatus {
    #[serde(default)]
    pub(crate) phase: String,
    #[serde(rename = "podIP")]
    pub(crate) pod_ip: Option<String>,
    #[serde(default)]
    pub(crate) init_container_statuses: Vec<ContainerStatus>,
    #[serde(default)]
    pub(crate) container_statuses: Vec<ContainerStatus>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ContainerStatus {
    #[serde(default)]
    pub(crate) state: ContainerState,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ContainerState {
    pub(crate) waiting: Option<Waiting>,
    pub(crate) terminated: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Waiting {
    pub(crate) reason: Option<String>,
}

/// A Node, as far as it is looked at (`v1`).
#[derive(Debug, Deserialize)]
pub(super) struct Node {
    pub(super) metadata: Metadata,
    #[serde(default)]
    pub(super) spec: NodeSpec,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct NodeSpec {
    /// Each whole: what is written back must have the fields that are not known here, too.
    #[serde(default)]
    pub(super) taints: Vec<serde_json::Value>,
}
