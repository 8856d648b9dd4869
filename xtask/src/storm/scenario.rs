//! What is simulated.

use std::time::Duration;

/// The node that is killed half way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Kill {
    /// The one that gets the first layer from upstream.
    Root,
    /// The one that gives it to most others, directly or not, but for the root.
    Inner,
}

/// What upstream and the nodes can do, and what happens.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) name: String,
    pub(super) nodes: usize,
    /// Bytes a second.
    pub(super) upstream: f64,
    pub(super) node: f64,
    /// What one connection to upstream carries, and what one containerd takes of one blob.
    pub(super) throttle: f64,
    pub(super) takes: f64,
    pub(super) layers: usize,
    /// All layers together.
    pub(super) size: u64,
    /// Nodes start one after the other within this time.
    pub(super) stagger: Duration,
    /// Which part of the nodes dies in a minute, each replaced by a new one; half of them without a word.
    pub(super) churn: f64,
    pub(super) kill: Option<Kill>,
    /// Whether who is killed is silent, as a machine that is lost.
    pub(super) silent: bool,
    /// How many nodes send only a tenth as fast.
    pub(super) slow: usize,
    /// How many of the first to ask are refused by upstream.
    pub(super) refuse: usize,
    /// How many nodes do not speak the protocol.
    pub(super) mute: usize,
    /// How many nodes have the image.
    pub(super) seeds: usize,
    /// How many zones the nodes are in.
    pub(super) zones: u32,
    /// One way between two nodes, and until upstream's first byte.
    pub(super) latency: Duration,
    pub(super) first_byte: Duration,
    /// The protocol's bound for a pull; none: the protocol is off.
    pub(super) storm: Option<Duration>,
    pub(super) seed: u64,
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            name: String::new(),
            nodes: 8,
            upstream: 25e6,
            node: 125e6,
            throttle: f64::INFINITY,
            takes: 400e6,
            layers: 1,
            size: 256 << 20,
            stagger: Duration::ZERO,
            churn: 0.0,
            kill: None,
            silent: false,
            slow: 0,
            refuse: 0,
            mute: 0,
            seeds: 0,
            zones: 1,
            latency: Duration::from_micros(500),
            first_byte: Duration::from_millis(300),
            storm: Some(Duration::from_secs(2)),
            seed: 1,
        }
    }
}

impl Scenario {
    /// The lengths of the image's blobs: its manifest, its config and its layers.
    pub(super) fn blobs(&self) -> Vec<u64> {
        let layer = self.size / self.layers.max(1) as u64;
        [4096, 4096].into_iter().chain(std::iter::repeat_n(layer, self.layers)).collect()
    }
}
