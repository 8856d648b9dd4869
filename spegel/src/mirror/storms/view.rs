//! The storms that this node takes part in, as they are shown to people.

use std::sync::Arc;

use super::{Order, Storms};
use crate::oci::Digest;
use crate::router::Peer;
use crate::storm::{Node, PlaceView, TreeView};

/// How many trees are told, and how many nodes of each.
const TREES: usize = 20;
const PLACES: usize = 64;

/// What this node does in storms, and what it knows of others as their coordinator.
#[derive(Clone, Debug)]
pub struct StormsView {
    /// What this node's containerd wants at the moment, in the order of its images.
    pub pulls: Vec<StormPull>,
    /// How many more.
    pub more_pulls: usize,
    /// The latest images, the newest first.
    pub images: Vec<StormImage>,
    /// The blobs that this node coordinates, those heard of last first.
    pub trees: Vec<TreeView>,
    /// The other nodes that are in these trees, as far as they are known here.
    pub nodes: Vec<(Node, Peer)>,
    /// This node.
    pub own: Node,
}

/// A blob that this node's containerd wants.
#[derive(Clone, Debug)]
pub struct StormPull {
    /// Which.
    pub digest: Digest,
    /// The image that it is a part of.
    pub image: Arc<str>,
    /// Where it is to come from.
    pub source: StormSource,
}

/// Where a blob is to come from.
#[derive(Clone, Debug)]
pub enum StormSource {
    /// That is not settled.
    Waiting,
    /// From another node; nothing if that is not known any more.
    Peer(Option<Peer>),
    /// From upstream.
    Upstream,
}

/// What came of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct StormImage {
    /// Registry and repository.
    pub name: Arc<str>,
    /// Bytes that came from upstream.
    pub upstream: u64,
    /// Bytes that came from peers.
    pub peers: u64,
    /// The most nodes that bytes of it came through to this one.
    pub depth: i64,
    /// Seconds from the first request of the latest pull to the last part that came.
    pub seconds: f64,
}

impl Storms {
    /// All of it, with `limit` of what is wanted at the most.
    pub(in crate::mirror) fn view(&self, limit: usize) -> StormsView {
        let mut pulls: Vec<StormPull> = self.pulls().values().map(|pull| self.view_of(pull)).collect();
        pulls.sort_by(|a, b| (&a.image, &a.digest).cmp(&(&b.image, &b.digest)));
        let more_pulls = pulls.len().saturating_sub(limit);
        pulls.truncate(limit);
        let trees = self.asked.trees(TREES, PLACES);
        let mut nodes: Vec<_> =
            trees.iter().flat_map(|tree| &tree.places).map(|place: &PlaceView| place.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let nodes = nodes.into_iter().filter_map(|node| Some((node, self.asked.peer(node)?))).collect();
        StormsView { pulls, more_pulls, images: self.figures.rows(), trees, nodes, own: self.asked.own() }
    }

    fn view_of(&self, pull: &super::Pull) -> StormPull {
        let source = match *pull.orders.borrow() {
            Order::Wait => StormSource::Waiting,
            Order::Fetch { parent, .. } => StormSource::Peer(self.asked.peer(parent)),
            Order::Upstream => StormSource::Upstream,
        };
        StormPull { digest: pull.digest.clone(), image: Arc::clone(&pull.image), source }
    }
}
