//! The taint that keeps workloads off a new node until its mirror is ready.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use super::api::{Api, ApiError, ApiSettings};

/// The first wait after a failure. The kubelet and controllers write a new node's object often, and each may be in the way.
const FIRST_WAIT: Duration = Duration::from_millis(250);

/// How long the wait has become when it is no chance any more that others were faster.
const NO_CHANCE: Duration = Duration::from_secs(2);

/// The longest wait. Each node asks by itself, so 3,000 of them ask an API server that fails 50 times a second.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A taint that nodes are created with, by its key, whatever its value and effect.
#[derive(Clone, Debug)]
pub struct StartupTaint {
    /// Its key, like `spegel.dev/agent-not-ready`.
    pub key: String,
    /// Where the node's object is.
    pub api: ApiSettings,
}

/// Removes the taints of this key from a node, and tries until it has, at longer and longer intervals. True if there was one.
///
/// Only the taints are written, and only while they are what was just read, so nothing of what others write meanwhile is lost.
pub async fn remove_startup_taint(api: &Api, node: &str, key: &str) -> bool {
    let mut wait = Wait(FIRST_WAIT);
    let mut told = String::new();
    loop {
        match remove_once(api, node, key).await {
            Ok(removed) => return removed,
            Err(error) if is_overtaken(&error) && wait.0 < NO_CHANCE => {
                tracing::debug!(%error, "the node was changed meanwhile; looking again");
            }
            Err(error) => {
                let reason = error.to_string();
                if reason != told {
                    tracing::warn!(taint = key, node, reason, "the startup taint is still there; trying again");
                    told = reason;
                }
            }
        }
        tokio::time::sleep(wait.next(rand::random_range(0.5..1.0))).await;
    }
}

async fn remove_once(api: &Api, node: &str, key: &str) -> Result<bool, ApiError> {
    let taints = api.node(node).await?.spec.taints;
    let Some(patch) = patch(&taints, key) else { return Ok(false) };
    api.patch_node(node, &patch).await.map(|()| true)
}

/// The change that leaves out the taints of this key; nothing if there are none.
fn patch(taints: &[Value], key: &str) -> Option<Value> {
    let left: Vec<&Value> = taints.iter().filter(|taint| taint["key"] != key).collect();
    if left.len() == taints.len() {
        return None;
    }
    let test = json!({ "op": "test", "path": "/spec/taints", "value": taints });
    let change = json!({ "op": "replace", "path": "/spec/taints", "value": left });
    Some(json!([test, change]))
}

/// Whether the taints, or the object, were no more what they had been when they were read.
fn is_overtaken(error: &ApiError) -> bool {
    let statuses = [StatusCode::CONFLICT, StatusCode::UNPROCESSABLE_ENTITY];
    matches!(error, ApiError::Refused { status, .. } if statuses.contains(status))
}

/// The time until the next attempt, doubled each time.
struct Wait(Duration);

// === impl Wait ===

impl Wait {
    /// `part` of the time, from 0 to 1: nodes that failed together do not ask together again.
    fn next(&mut self, part: f64) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(LONGEST_WAIT);
        now.mul_f64(part)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn taint(key: &str, effect: &str) -> Value {
        json!({ "key": key, "effect": effect, "timeAdded": "2026-01-01T00:00:00Z" })
    }

    #[test]
    fn only_the_taints_of_the_key_go_and_others_stay_as_they_are() {
        let taints = [taint("a", "NoSchedule"), taint("b", "NoExecute"), taint("a", "NoExecute")];
        let expected = json!([
            { "op": "test", "path": "/spec/taints", "value": taints },
            { "op": "replace", "path": "/spec/taints", "value": [taints[1]] },
        ]);
        assert_eq!(patch(&taints, "a"), Some(expected));
        assert_eq!(patch(&taints, "c"), None);
        assert_eq!(patch(&[], "a"), None);
    }

    #[test]
    fn waits_grow_to_a_minute() {
        let mut wait = Wait(FIRST_WAIT);
        let waits: Vec<u128> = (0..10).map(|_| wait.next(1.0).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000]);
        assert_eq!(wait.next(0.5), LONGEST_WAIT / 2);
    }
}
