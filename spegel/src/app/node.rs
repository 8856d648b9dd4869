//! What this node is to its cluster: its zone, and the taint that it starts with.

use std::time::Duration;

use tracing::{error, info, warn};

use super::POLL;
use crate::cli::Zone;
use crate::kube::{self, Api, ApiError, StartupTaint};

/// How long a start may wait for the zone.
const ZONE_PATIENCE: Duration = Duration::from_secs(5);

/// The node's zone. That it cannot be known is told, and is no reason not to serve.
pub(super) async fn zone(zone: &Zone, node: &str) -> Option<String> {
    let api = match zone {
        Zone::Unknown => return None,
        Zone::Named(zone) => return Some(zone.clone()),
        Zone::OfNode(api) => api,
    };
    let asked = async { Api::new(api)?.zone_of(node).await };
    let told: Result<Result<_, ApiError>, _> = tokio::time::timeout(ZONE_PATIENCE, asked).await;
    let reason = match told {
        Ok(Ok(Some(zone))) => return Some(zone),
        Ok(Ok(None)) => "it has no label topology.kubernetes.io/zone".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("the Kubernetes API has not answered within {} s", ZONE_PATIENCE.as_secs()),
    };
    warn!(node, reason, "this node's zone is not known until the next start");
    None
}

/// Removes the startup taint as soon as `is_ready` says so.
pub(super) async fn untaint(taint: StartupTaint, node: String, is_ready: impl Fn() -> bool + Send) {
    while !is_ready() {
        tokio::time::sleep(POLL).await;
    }
    match Api::new(&taint.api) {
        Ok(api) if kube::remove_startup_taint(&api, &node, &taint.key).await => {
            info!(taint = taint.key, node, "ready: the startup taint is removed");
        }
        Ok(_) => {}
        Err(error) => error!(taint = taint.key, node, %error, "the startup taint stays"),
    }
}
