//! Counters of what went out and how.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// How bytes went to a client's socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// From our memory: heads, and bodies that are held as bytes.
    Memory,
    /// From a file by sendfile(2).
    Sendfile,
    /// From a file by read and write.
    FileCopy,
    /// From a peer by splice(2).
    Splice,
    /// From a peer by read and write.
    RelayCopy,
}

/// Labels of [`Traffic`]'s family.
#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct TrafficLabels {
    kind: &'static str,
    way: &'static str,
}

/// Bytes sent, by kind (`bytes`, `file`, `relay`) and by way. Clones share their figures.
#[derive(Clone, Debug)]
pub struct Traffic {
    family: Family<TrafficLabels, Counter>,
    by_way: [Counter; 5],
}

impl Traffic {
    /// All counters at 0.
    #[must_use]
    pub fn new() -> Self {
        let family = Family::<TrafficLabels, Counter>::default();
        let by_way = [Way::Memory, Way::Sendfile, Way::FileCopy, Way::Splice, Way::RelayCopy]
            .map(|way| family.get_or_create_owned(&labels(way)));
        Self { family, by_way }
    }

    /// The family behind the counters, for a metrics registry.
    #[must_use]
    pub fn family(&self) -> Family<TrafficLabels, Counter> {
        self.family.clone()
    }

    /// Bytes that went out by `way`.
    #[must_use]
    pub fn sent(&self, way: Way) -> u64 {
        self.by_way[way as usize].get()
    }

    pub(super) fn add(&self, way: Way, bytes: usize) {
        self.by_way[way as usize].inc_by(bytes as u64);
    }
}

impl Default for Traffic {
    fn default() -> Self {
        Self::new()
    }
}

fn labels(way: Way) -> TrafficLabels {
    let (kind, way) = match way {
        Way::Memory => ("bytes", "memory"),
        Way::Sendfile => ("file", "sendfile"),
        Way::FileCopy => ("file", "copy"),
        Way::Splice => ("relay", "splice"),
        Way::RelayCopy => ("relay", "copy"),
    };
    TrafficLabels { kind, way }
}
