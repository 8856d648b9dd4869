//! What a mirror says of a pull: its log, its figures, and whether it is ready.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Scene;
use crate::http::Client;
use crate::netns::Node;
use crate::spegel::Spegel;

/// How long a mirror may take to be ready again once a fault has passed.
const HEALED: Duration = Duration::from_secs(10);

/// The status of `/readyz`, and what it says; 0 where there is no answer.
pub(super) fn ready(client: &Spegel) -> (u16, String) {
    let answer = Client::new(Duration::from_secs(1)).get(&format!("{}/readyz", client.url()), &[]);
    answer.map_or((0, String::new()), |answer| (answer.head.status, answer.text().trim().to_owned()))
}

/// Waits until `/readyz` has this status, and says how long that took; none if it takes too long.
pub(super) fn wait_for(client: &Spegel, status: u16) -> Option<Duration> {
    let start = Instant::now();
    while start.elapsed() < HEALED {
        if ready(client).0 == status {
            return Some(start.elapsed());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

impl Scene {
    pub(super) fn descriptors(&self) -> usize {
        let Some(client) = &self.client else { return 0 };
        std::fs::read_dir(format!("/proc/{}/fd", client.daemon.pid())).map_or(0, Iterator::count)
    }

    /// The bytes that the mirror sent by source, and the lines that matter.
    pub(super) fn read_log(&self) -> (BTreeMap<String, u64>, Vec<String>) {
        let (mut bytes, mut lines) = (BTreeMap::new(), Vec::new());
        let log = self.client.as_ref().map(|client| client.daemon.log()).unwrap_or_default();
        for line in log.lines() {
            let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
            let text = |name: &str| value["fields"][name].as_str().or_else(|| value[name].as_str()).unwrap_or_default();
            let message = text("message");
            if message == "pull" && text("method") == "GET" {
                let sent = value["fields"]["bytes"].as_u64().or_else(|| value["bytes"].as_u64()).unwrap_or_default();
                let peer = text("peer");
                let source = if peer.is_empty() { text("source") } else { peer };
                *bytes.entry(self.name_of(source)).or_default() += sent;
            } else if text("level") != "INFO" || message.contains("peer") {
                lines.push(format!("{} {message} {}", text("level"), text("error")));
            }
        }
        (bytes, lines)
    }

    fn name_of(&self, source: &str) -> String {
        let at = |node: &Node| source.starts_with(&format!("{}:", node.address()));
        match source {
            _ if at(&self.nodes.bad) => "bad peer".into(),
            _ if at(&self.nodes.good) => "good peer".into(),
            other => other.to_owned(),
        }
    }

    pub(super) fn metrics(&self) -> BTreeMap<String, f64> {
        let Some(client) = &self.client else { return BTreeMap::new() };
        let text = Client::new(Duration::from_secs(5)).get(&format!("{}/metrics", client.metrics_url()), &[]);
        let text = text.map(|answer| answer.text()).unwrap_or_default();
        let interesting = [
            "spegel_peer_requests",
            "spegel_relay",
            "spegel_cut",
            "spegel_mirror_requests",
            "spegel_refused",
            "spegel_wrong",
            "spegel_serve_connections_refused",
        ];
        let samples = text.lines().filter(|line| interesting.iter().any(|name| line.starts_with(name)));
        samples
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse::<f64>().ok()?)))
            .filter(|(_, value)| *value > 0.0)
            .collect()
    }
}
