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
            Cell::text("Comes from", html! { (source(&pull.source)) }),
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

fn trees(storms: &StormsView, held: &Inventory) -> Markup {
    let digests = storms.pulls.iter().map(|pull| &pull.digest).chain(held.arriving.iter().map(|blob| &blob.digest));
    let digests = digests.chain(held.images.iter().map(|image| &image.digest));
    let names: HashMap<[u8; 32], String> = match storms.trees.is_empty() {
        true => HashMap::new(),
        false => digests.map(|digest| (Key::Digest(digest.clone()).sha256(), digest.to_string())).collect(),
    };
    html! {
        section aria-labelledby="trees-title" {
            h2 id="trees-title" { "Who gets it from whom" }
            @if storms.trees.is_empty() { p.quiet { "This node coordinates no blob. Each blob is coordinated by the nodes that are nearest to it." } }
            @for tree in &storms.trees {
                article.tree {
                    h3 {
                        @if let Some(name) = names.get(&tree.key.0) { (digest(name)) }
                        @else { code.digest title="A blob that this node does not know by its digest, by its key in the network" { "key " (hex::encode(&tree.key.0[..6])) } }
                        " " span.quiet { (tree.total.map_or_else(|| "length not told".to_owned(), bytes)) " · heard of " (time(tree.quiet)) " ago" }
                    }
                    (drawn(tree, storms))
                    (more(tree.more, "node"))
                }
            }
        }
    }
}

/// The tree as nested lists: whoever has no parent here stands at the top.
fn drawn(tree: &TreeView, storms: &StormsView) -> Markup {
    let known: HashSet<Node> = tree.places.iter().map(|place| place.node).collect();
    let mut children: HashMap<Option<Node>, Vec<&PlaceView>> = HashMap::new();
    for place in &tree.places {
        let parent = place.parent.filter(|parent| known.contains(parent) && *parent != place.node);
        children.entry(parent).or_default().push(place);
    }
    let mut left: HashSet<Node> = known;
    let drawn = beneath(None, &children, &mut left, tree, storms, 0);
    // Two that name each other, for as long as one of them has not been heard of.
    let circle: Vec<&PlaceView> = tree.places.iter().filter(|place| left.contains(&place.node)).collect();
    html! { (drawn) @if !circle.is_empty() { ul { @for place in circle { li { (node(place, tree, storms)) } } } } }
}

fn beneath(
    parent: Option<Node>,
    children: &HashMap<Option<Node>, Vec<&PlaceView>>,
    left: &mut HashSet<Node>,
    tree: &TreeView,
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
                        (node(place, tree, storms))
                        @if depth < DEEPEST { (beneath(Some(place.node), children, left, tree, storms, depth + 1)) }
                    }
                }
            }
        }
    }
}

fn node(place: &PlaceView, tree: &TreeView, storms: &StormsView) -> Markup {
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
    let total = tree.total.unwrap_or(0);
    let position = if place.stand == Stand::Complete { total } else { place.position };
    let share = percent(position, total).unwrap_or_else(|| bytes(place.position));
    html! {
        div.place {
            span.address { (name) }
            span class={ "chip " (class) } { (what) }
            (bar(&[(class, position)], total, &format!("{share} of it")))
            span.figure { (share) }
        }
    }
}
