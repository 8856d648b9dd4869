//! What is seen of a storm: bytes on each node's disk, who gave them, and how busy the cores were.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::containerd::Containerd;
use crate::netns::Node;
use crate::spegel::Spegel;

/// What the nodes had at a moment.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds from the storm's start.
    pub at: f64,
    /// One for each node.
    pub nodes: Vec<NodeSample>,
}

/// What a node had.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct NodeSample {
    /// Bytes of content, complete and arriving.
    pub bytes: u64,
}

/// What a node's own metrics say of the storm: what an operator sees. All are 0 of a mirror that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Told {
    /// Manifests, configs and layers that it went upstream for.
    pub from_upstream: f64,
    /// Bytes from upstream, and from peers.
    pub bytes: [f64; 2],
    /// The most nodes that bytes came through.
    pub depth: f64,
    /// Seconds waited for first bytes while held, for upstream, and for parents that stood still.
    pub waited: [f64; 3],
    /// How many times another node went on.
    pub moves: f64,
    /// Seconds from the pull's first request to its last part.
    pub seconds: f64,
}

// === impl Told ===

impl Told {
    pub(super) fn of(spegel: &Spegel) -> Self {
        // An empty sum is -0.
        let metric = |name: &str, labels: &[&str]| spegel.metric(name, labels).unwrap_or(0.0) + 0.0;
        let of = |name: &str, label: &str, values: &[&str]| -> Vec<f64> {
            values.iter().map(|value| metric(name, &[&format!("{label}=\"{value}\"")])).collect()
        };
        let bytes = of("spegel_storm_received_bytes_total", "source", &["upstream", "peers"]);
        let waited = of("spegel_storm_waited_seconds_total", "what", &["first_byte", "upstream", "parent"]);
        Self {
            from_upstream: metric("spegel_storm_blobs_total", &["source=\"upstream\""]),
            bytes: [bytes[0], bytes[1]],
            depth: metric("spegel_storm_depth", &[]),
            waited: [waited[0], waited[1], waited[2]],
            moves: metric("spegel_storm_moves_total", &[]),
            seconds: metric("spegel_storm_pull_duration_seconds", &[]),
        }
    }

    /// Whether it says anything.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.bytes != [0.0, 0.0]
    }

    /// What the node waited for longest, if for anything.
    #[must_use]
    pub fn why_slow(&self) -> Option<(&'static str, f64)> {
        let named = ["for first bytes", "for upstream", "for a parent"].into_iter().zip(self.waited);
        named.filter(|(_, seconds)| *seconds >= 0.05).max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// The time that the machine's cores had spent, and how much of it doing something.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    all: u64,
    idle: u64,
}

// === impl Cores ===

impl Cores {
    /// Until now.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("/proc/stat is empty")?;
        let fields: Vec<u64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
        // idle and iowait: proc_stat(5).
        Ok(Self { all: fields.iter().take(8).sum(), idle: fields.iter().skip(3).take(2).sum() })
    }

    /// The share of the time since then that the cores were busy.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn busy_since(&self) -> Result<f64> {
        let now = Self::now()?;
        let all = now.all.saturating_sub(self.all).max(1);
        Ok(1.0 - now.idle.saturating_sub(self.idle) as f64 / all as f64)
    }
}

pub(super) fn take<'a>(at: Duration, containerds: impl Iterator<Item = &'a Containerd>) -> Sample {
    let nodes = containerds.map(|containerd| NodeSample { bytes: content(&containerd.content_path()) });
    Sample { at: at.as_secs_f64(), nodes: nodes.collect() }
}

/// Bytes below a content directory: `blobs/sha256/HEX` and `ingest/HEX/data`.
fn content(folder: &Path) -> u64 {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let blobs = entries(&folder.join("blobs/sha256")).filter_map(|entry| entry.metadata().ok());
    let ingests = entries(&folder.join("ingest")).filter_map(|entry| entry.path().join("data").metadata().ok());
    blobs.chain(ingests).map(|metadata| metadata.len()).sum()
}

/// The bytes that each other node gave, from the mirror's own story of each request: `… "peer":"10.77.1.3:5000" … "bytes":N`.
pub(super) fn peers(spegel: &Spegel, nodes: &[Node]) -> Vec<(usize, u64)> {
    let log = spegel.daemon.log();
    let mut given = vec![0; nodes.len()];
    for line in log.lines().filter(|line| line.contains("/blobs/") && line.contains("pull")) {
        let bytes = field(line, "bytes").and_then(|text| text.parse::<u64>().ok()).unwrap_or_default();
        let Some(peer) = field(line, "peer") else { continue };
        if let Some(number) = nodes.iter().position(|node| peer.starts_with(&format!("{}:", node.address()))) {
            given[number] += bytes;
        }
    }
    given.into_iter().enumerate().filter(|(_, bytes)| *bytes > 0).collect()
}

/// The value of a field in a line of log.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let rest = line.split_once(&format!("\"{name}\":"))?.1;
    Some(match rest.strip_prefix('"') {
        Some(text) => text.split('"').next()?,
        None => rest.split([',', '}']).next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_from_a_line() {
        let line = r#"{"level":"INFO","method":"GET","source":"peer","peer":"10.77.1.3:5000","status":200,"bytes":12345,"whole":true}"#;
        assert_eq!(field(line, "peer"), Some("10.77.1.3:5000"));
        assert_eq!(
            (field(line, "bytes"), field(line, "whole"), field(line, "none")),
            (Some("12345"), Some("true"), None)
        );
    }
}
