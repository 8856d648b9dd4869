//! What a coordinator knows, as it is shown to people.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::tree::{Place, Standing, Tree};
use super::{Key, Node};

/// Who gets one blob from whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeView {
    /// The blob.
    pub key: Key,
    /// Its length in bytes, once somebody told it.
    pub total: Option<u64>,
    /// For how long nothing was heard of it.
    pub quiet: Duration,
    /// Its nodes: those that have most of it first.
    pub places: Vec<PlaceView>,
    /// How many nodes more.
    pub more: usize,
}

/// One node's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaceView {
    /// Who it is.
    pub node: Node,
    /// Whom it gets it from.
    pub parent: Option<Node>,
    /// How many nodes are above it.
    pub level: u16,
    /// How many bytes it has.
    pub position: u64,
    /// What it is to the others.
    pub stand: Stand,
}

/// What a node is to the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// It has no source that is known of.
    Waits,
    /// It gets it from another node.
    Child,
    /// It was told to pull from upstream, and has nothing yet.
    Leased,
    /// It gets it from upstream.
    Root,
    /// It has all of it.
    Complete,
}

/// The trees that were touched last, `trees` at the most with `places` nodes each.
pub(super) fn of(all: &BTreeMap<Key, Tree>, trees: usize, places: usize, now: Instant) -> Vec<TreeView> {
    let mut latest: Vec<(&Key, &Tree)> = all.iter().collect();
    latest.sort_by_key(|(_, tree)| std::cmp::Reverse(tree.touched));
    latest.truncate(trees);
    let view = |(key, tree): (&Key, &Tree)| {
        let mut all: Vec<PlaceView> = tree.places().map(|(node, place)| of_place(*node, place)).collect();
        all.sort_by_key(|place| (std::cmp::Reverse(place.position), place.level, place.node));
        let more = all.len().saturating_sub(places);
        all.truncate(places);
        let quiet = now.saturating_duration_since(tree.touched);
        TreeView { key: *key, total: tree.total, quiet, places: all, more }
    };
    latest.into_iter().map(view).collect()
}

fn of_place(node: Node, place: &Place) -> PlaceView {
    let stand = match place.standing {
        Standing::Orphan => Stand::Waits,
        Standing::Child => Stand::Child,
        Standing::Leased { .. } => Stand::Leased,
        Standing::Root => Stand::Root,
        Standing::Complete => Stand::Complete,
    };
    PlaceView { node, parent: place.parent, level: place.level, position: place.position, stand }
}
