//! Storms: what many nodes want at once and none has.

use std::collections::{HashMap, HashSet};

use maud::{Markup, html};

use super::facts::Parts;
use super::page::{Cell, bar, digest, head, more, progress, table};
use super::text::{bytes, count, percent, time};
use super::{Part, ROWS};
use crate::mirror::{StormImage, StormPull, StormSource, StormsView};
use crate::oci::Key;
use crate::router::Peer;
use crate::store::{Arriving, Inventory};
use crate::storm::{Node, PlaceView, Stand, TreeView};

/// How deep a tree is drawn; what is beneath is drawn at that depth.
const DEEPEST: usize = 16;

pub(super) fn parts(parts: &Parts) -> Vec<Part> {
    let Some(storms) = parts.mirror.storms(ROWS) else { return vec![Part { id: "off", html: off() }] };
    let held = parts.store.inventory(ROWS);
    vec![
        Part { id: "sum", html: sum(&storms) },
        Part { id: "pulls", html: pulls(&storms, &held) },
        Part { id: "trees", html: trees(&storms, &held) },
        Part { id: "images", html: images(&storms.images) },
    ]
}

fn off() -> Markup {
    html! {
        p.answer { strong { "Storms are not coordinated." } " Each node pulls for itself what no other has." }
        p { "With " code { "--storm on" } " one node pulls from upstream for all, and the others get it from each other while it arrives." }
    }
}

fn sum(storms: &StormsView) -> Markup {
    let pulls = storms.pulls.len() + storms.more_pulls;
    html! {
        p.answer {
            @if pulls == 0 { strong { "Calm." } " No blob is being coordinated for this node." }
            @else { strong { (count(pulls, "blob")) } " under way for this node's containerd." }
            @if !storms.trees.is_empty() { " It coordinates " (count(storms.trees.len(), "blob")) " for others and itself." }
        }
    }
}

fn pulls(storms: &StormsView, held: &Inventory) -> Markup {
    let arriving: HashMap<_, &Arriving> = held.arriving.iter().map(|blob| (&blob.digest, blob)).collect();
    let row = |pull: &StormPull| {
        let (position, total) = arriving.get(&pull.digest).map_or((0, None), |blob| (blob.position, blob.total));
        vec![
            Cell::text("Image", html! { (pull.image) }),
            Cell::text("Blob", digest(pull.digest.as_str())),
            Cell::text("Comes from", html! { span.nowrap { (source(&pull.source)) } }),
            Cell::text("Progress", progress(position, total)),
        ]
    };
    let rows: Vec<_> = storms.pulls.iter().map(row).collect();
    let heads = [head("Image", false), head("Blob", false), head("Comes from", false), head("Progress", false)];
    html! {
        section aria-labelledby="pulls-title" {
            h2 id="pulls-title" { "Under way" }
            @if rows.is_empty() { p.quiet { "Nothing at the moment." } }
            @else { (table("What this node's containerd waits for", &heads, &rows)) (more(storms.more_pulls, "blob")) }
        }
    }
}

fn source(source: &StormSource) -> String {
    match source {
        StormSource::Waiting => "to be settled".to_owned(),
        StormSource::Upstream => "the registry, for all".to_owned(),
        StormSource::Peer(peer) => peer.as_ref().and_then(address).unwrap_or_else(|| "a node that is gone".to_owned()),
    }
}

fn address(peer: &Peer) -> Option<String> {
    peer.addresses.first().map(|address| address.ip().to_string())
}

fn images(images: &[StormImage]) -> Markup {
    let row = |image: &StormImage| {
        let whole = image.upstream + image.peers;
        let share = percent(image.peers, whole).unwrap_or_else(|| "0 %".to_owned());
        let label = format!("{share} from peers, the rest from upstream");
        vec![
            Cell::text("Image", html! { (image.name) }),
            Cell::text("From", bar(&[("peers", image.peers), ("upstream", image.upstream)], whole, &label)),
            Cell::figure("From peers", html! { (bytes(image.peers)) }),
            Cell::figure("From upstream", html! { (bytes(image.upstream)) }),
            Cell::figure("Hops", html! { (image.depth) }),
            Cell::figure(
                "Took",
                html! { (time(std::time::Duration::try_from_secs_f64(image.seconds).unwrap_or_default())) },
            ),
        ]
    };
    let rows: Vec<_> = images.iter().map(row).collect();
    let heads = [
        head("Image", false),
        head("From", false),
        head("From peers", true),
        head("From upstream", true),
        head("Hops", true),
        head("Took", true),
    ];
    html! {
        section aria-labelledby="latest-title" {
            h2 id="latest-title" { "The latest images" }
            @if rows.is_empty() { p.quiet { "No image was pulled in a storm yet." } }
            @else { (table("The latest images that this node pulled in storms", &heads, &rows)) }
        }
    }
}

/// What this node knows of blobs by their keys in the network: their digests, and how long those are that arrive here.
struct Names(HashMap<[u8; 32], (String, Option<u64>)>);

// === impl Names ===

impl Names {
    fn of(storms: &StormsView, held: &Inventory) -> Self {
        if storms.trees.is_empty() {
            return Self(HashMap::new());
        }
        let images = held.images.iter().map(|image| (&image.digest, None));
        let pulls = storms.pulls.iter().map(|pull| (&pull.digest, None));
        let arriving = held.arriving.iter().map(|blob| (&blob.digest, blob.total));
        let named = images.chain(pulls).chain(arriving);
        Self(named.map(|(digest, total)| (Key::Digest(digest.clone()).sha256(), (digest.to_string(), total))).collect())
    }

    fn shown(&self, tree: &TreeView) -> Markup {
        match self.0.get(&tree.key.0) {
            Some((name, _)) => digest(name),
            None => html! {
                code.digest title="A blob that this node does not know by its digest, by its key in the network" { "key " (hex::encode(&tree.key.0[..6])) }
            },
        }
    }

    /// The blob's length, where anybody told it or has all of it.
    fn total(&self, tree: &TreeView) -> Option<u64> {
        let complete = tree.places.iter().find(|place| is_complete(place)).map(|place| place.position);
        let own = || self.0.get(&tree.key.0).and_then(|(_, total)| *total);
        tree.total.or_else(own).or(complete.filter(|position| *position > 0))
    }
}

fn is_complete(place: &PlaceView) -> bool {
    place.stand == Stand::Complete
}

fn trees(storms: &StormsView, held: &Inventory) -> Markup {
    let names = Names::of(storms, held);
    let (done, open): (Vec<&TreeView>, Vec<_>) =
        storms.trees.iter().partition(|tree| tree.places.iter().all(is_complete));
    let heads =
        [head("Blob", false), head("Size", true), head("Nodes that have all of it", true), head("Heard of", true)];
    let row = |tree: &&TreeView| {
        vec![
            Cell::text("Blob", names.shown(tree)),
            Cell::figure("Size", html! { (names.total(tree).map_or_else(|| "–".to_owned(), bytes)) }),
            Cell::figure("Nodes that have it", html! { (tree.places.len() + tree.more) }),
            Cell::figure("Heard of", html! { (time(tree.quiet)) " ago" }),
        ]
    };
    let rows: Vec<_> = done.iter().map(row).collect();
    html! {
        section aria-labelledby="trees-title" {
            h2 id="trees-title" { "Who gets it from whom" }
            @if open.is_empty() { p.quiet { "No blob is under way of which this node is the coordinator. Each is coordinated by the nodes that are nearest to it." } }
            @for tree in &open {
                article.tree {
                    h3 {
                        (names.shown(tree)) " "
                        span.quiet { (names.total(tree).map_or_else(|| "length not told".to_owned(), bytes)) " · heard of " (time(tree.quiet)) " ago" }
                    }
                    (drawn(tree, names.total(tree), storms))
                    (more(tree.more, "node"))
                }
            }
            @if !rows.is_empty() {
                h3.apart { "Done" }
                (table("Blobs that this node coordinated and that all who wanted them have", &heads, &rows))
            }
        }
    }
}

/// The tree as nested lists: whoever has no parent here stands at the top.
fn drawn(tree: &TreeView, total: Option<u64>, storms: &StormsView) -> Markup {
    let known: HashSet<Node> = tree.places.iter().map(|place| place.node).collect();
    let mut children: HashMap<Option<Node>, Vec<&PlaceView>> = HashMap::new();
    for place in &tree.places {
        let parent = place.parent.filter(|parent| known.contains(parent) && *parent != place.node);
        children.entry(parent).or_default().push(place);
    }
    let mut left: HashSet<Node> = known;
    let drawn = beneath(None, &children, &mut left, total, storms, 0);
    // Two that name each other, for as long as one of them has not been heard of.
    let circle: Vec<&PlaceView> = tree.places.iter().filter(|place| left.contains(&place.node)).collect();
    html! { (drawn) @if !circle.is_empty() { ul { @for place in circle { li { (node(place, total, storms)) } } } } }
}

fn beneath(
    parent: Option<Node>,
    children: &HashMap<Option<Node>, Vec<&PlaceView>>,
    left: &mut HashSet<Node>,
    total: Option<u64>,
    storms: &StormsView,
    depth: usize,
) -> Markup {
    let own: Vec<&PlaceView> = children.get(&parent).into_iter().flatten().copied().collect();
    let own: Vec<&PlaceView> = own.into_iter().filter(|place| left.remove(&place.node)).collect();
    html! {
        @if !own.is_empty() {
            ul {
                @for place in own {
                    li {
                        (node(place, total, storms))
                        @if depth < DEEPEST { (beneath(Some(place.node), children, left, total, storms, depth + 1)) }
                    }
                }
            }
        }
    }
}

fn node(place: &PlaceView, total: Option<u64>, storms: &StormsView) -> Markup {
    let peer = storms.nodes.iter().find(|(node, _)| *node == place.node).and_then(|(_, peer)| address(peer));
    let name = match peer {
        _ if place.node == storms.own => "this node".to_owned(),
        Some(address) => address,
        None => format!("node {:08x}", place.node.0 >> 32),
    };
    let (class, what) = match place.stand {
        Stand::Waits => ("idle", "waits"),
        Stand::Child => ("peers", "from a peer"),
        Stand::Leased => ("upstream", "told to pull"),
        Stand::Root => ("upstream", "from the registry"),
        Stand::Complete => ("local", "has all of it"),
    };
    // Of an unknown length nothing is drawn.
    let whole = total.unwrap_or(u64::MAX);
    let position = if is_complete(place) { whole } else { place.position };
    let share = total.and_then(|total| percent(position, total)).unwrap_or_else(|| bytes(place.position));
    html! {
        div.place {
            span.address { (name) }
            span class={ "chip " (class) } { (what) }
            (bar(&[(class, position)], whole, &format!("{share} of it")))
            span.figure { (share) }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;

    fn place(node: u64, parent: Option<u64>, position: u64, stand: Stand) -> PlaceView {
        PlaceView { node: Node(node), parent: parent.map(Node), level: 0, position, stand }
    }

    fn storms(places: Vec<PlaceView>) -> StormsView {
        let tree = TreeView {
            key: crate::storm::Key([7; 32]),
            total: Some(100),
            quiet: Duration::from_secs(1),
            places,
            more: 0,
        };
        let peer = Peer::new("<b>".into(), vec![SocketAddr::from(([10, 0, 0, 2], 5000))]);
        let nodes = vec![(Node(2), peer)];
        StormsView { pulls: Vec::new(), more_pulls: 0, images: Vec::new(), trees: vec![tree], nodes, own: Node(1) }
    }

    #[test]
    fn who_gets_it_from_whom_is_drawn_as_a_tree() {
        let places = vec![
            place(1, None, 60, Stand::Root),
            place(2, Some(1), 50, Stand::Child),
            place(3, Some(2), 40, Stand::Child),
            place(4, Some(99), 0, Stand::Waits),
        ];
        let html = trees(&storms(places), &Inventory::default()).into_string();
        let order = ["this node", "60 %", "<ul>", "10.0.0.2", "50 %", "<ul>", "40 %", "</ul>", "0 %"];
        let mut rest = html.as_str();
        for text in order {
            rest = rest.split_once(text).unwrap_or_else(|| panic!("{text} is not there in its turn: {html}")).1;
        }
        assert!(!html.contains("Done"), "{html}");
    }

    #[test]
    fn nodes_that_name_each_other_are_drawn_once() {
        let places = vec![
            place(5, Some(6), 1, Stand::Child),
            place(6, Some(5), 1, Stand::Child),
            place(7, Some(7), 2, Stand::Child),
        ];
        let html = trees(&storms(places), &Inventory::default()).into_string();
        assert_eq!(html.matches("class=\"place\"").count(), 3, "{html}");
    }

    #[test]
    fn what_all_have_is_a_row() {
        let places = vec![place(1, None, 100, Stand::Complete), place(2, None, 100, Stand::Complete)];
        let html = trees(&storms(places), &Inventory::default()).into_string();
        assert!(html.contains("Done") && html.contains("key 070707") && !html.contains("class=\"place\""), "{html}");
    }
}
