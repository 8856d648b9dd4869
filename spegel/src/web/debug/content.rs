//! What is here?

use maud::{Markup, html};

use super::facts::Parts;
use super::page::{Cell, digest, head, more, progress, table};
use super::text::{bytes, count, grouped};
use super::{Part, ROWS};
use crate::store::{Arriving, HeldImage, Inventory};

pub(super) fn parts(parts: &Parts) -> Vec<Part> {
    let held = parts.store.inventory(ROWS);
    vec![
        Part { id: "sum", html: sum(&held) },
        Part { id: "arriving", html: arriving(&held) },
        Part { id: "images", html: images(&held) },
    ]
}

fn sum(held: &Inventory) -> Markup {
    let images = held.images.len() + held.more_images;
    html! {
        p.answer { strong { (count(images, "image")) } ", " (count(held.blobs, "blob")) ", " (bytes(held.bytes)) " that peers can have from this node." }
    }
}

fn arriving(held: &Inventory) -> Markup {
    let row = |blob: &Arriving| {
        vec![
            Cell::text("Blob", digest(blob.digest.as_str())),
            Cell::figure("Came", html! { (bytes(blob.position)) }),
            Cell::figure("Of", html! { (blob.total.map_or_else(|| "–".to_owned(), bytes)) }),
            Cell::text("Progress", progress(blob.position, blob.total)),
            Cell::text(
                "Shared",
                html! { @if blob.is_offered { span.nowrap { "while it arrives" } } @else { "not yet" } },
            ),
        ]
    };
    let rows: Vec<_> = held.arriving.iter().map(row).collect();
    let heads =
        [head("Blob", false), head("Came", true), head("Of", true), head("Progress", false), head("Shared", false)];
    html! {
        section aria-labelledby="arriving-title" {
            h2 id="arriving-title" { "Receiving now" }
            @if rows.is_empty() { p.quiet { "Nothing at the moment." } }
            @else { (table("Blobs that containerd is receiving", &heads, &rows)) (more(held.more_arriving, "blob")) }
        }
    }
}

fn images(held: &Inventory) -> Markup {
    let rows: Vec<_> = held.images.iter().map(image).collect();
    let heads =
        [head("Image", false), head("Digest", false), head("Blobs", true), head("Size", true), head("State", false)];
    html! {
        section aria-labelledby="images-title" {
            h2 id="images-title" { "Images" }
            @if rows.is_empty() { p.quiet { "No image is here." } }
            @else { (table("Images of this node, by name", &heads, &rows)) (more(held.more_images, "image")) }
        }
    }
}

fn image(image: &HeldImage) -> Vec<Cell> {
    let state = match (image.is_whole, image.is_offered) {
        (true, true) => html! { "offered" },
        (true, false) => html! { span.quiet { "kept back by filters" } },
        (false, _) => html! { span.quiet { "parts of it" } },
    };
    let blobs = match image.present == image.named {
        true => html! { (grouped(image.present)) },
        false => html! { (grouped(image.present)) span.quiet { " of " (grouped(image.named)) } },
    };
    vec![
        Cell::text("Image", names(image)),
        Cell::text("Digest", digest(image.digest.as_str())),
        Cell::figure("Blobs", blobs),
        Cell::figure("Size", html! { (bytes(image.bytes)) }),
        Cell::text("State", state),
    ]
}

/// The repository once, quieter than what tells the names of an image apart. Names of digests are said beside.
fn names(image: &HeldImage) -> Markup {
    let is_digest = |name: &&String| name.contains("sha256:") || name.contains("sha512:");
    let tagged: Vec<&String> = image.names.iter().filter(|name| !is_digest(name)).collect();
    let shown = if tagged.is_empty() { image.names.iter().take(1).collect() } else { tagged };
    html! {
        ul.names {
            @for name in shown { li { (name) } }
            @if image.more_names > 0 { li.quiet { "and " (count(image.more_names, "name")) " more" } }
        }
    }
}
