//! Try it: looks an image or a digest up, and pulls it through the mirror as containerd would.

use std::time::Duration;

use maud::{Markup, html};

use super::Part;
use super::facts::{Parts, Verdict};
use super::measure::{BYTES, Lookup, Measured, PULL, Piece, Pull};
use super::page::{Cell, Page, digest, head, sign, table};
use super::text::{bytes, count, time};

/// How many names are proposed.
const PROPOSED: usize = 100;

pub(super) fn parts(parts: &Parts, image: &str, outcome: Option<&Result<Measured, String>>) -> Vec<Part> {
    let result = match outcome {
        None => html! {
            p.quiet { "Looking up asks the network who has it. Measuring also pulls it through this node's own mirror, as a containerd would, "
                "throws the bytes away, and tells what came from where. It ends by itself after " (BYTES >> 20) " MiB or " (PULL.as_secs()) " seconds." }
        },
        Some(Err(why)) => html! { p.verdict.failure role="status" { (sign(Verdict::Failure)) span { (why) } } },
        Some(Ok(measured)) => {
            html! { (told(measured)) (lookup(&measured.lookup)) @if let Some(pull) = &measured.pull { (pulled(pull)) } }
        }
    };
    vec![Part { id: "form", html: form(parts, image) }, Part { id: "result", html: result }]
}

fn form(parts: &Parts, image: &str) -> Markup {
    let held = parts.store.inventory(PROPOSED);
    let names = held.images.iter().filter_map(|image| image.names.first());
    html! {
        form.try method="post" action=(Page::Try.path()) {
            label for="image" { "Image or digest" }
            div.fields {
                input id="image" name="image" type="text" required maxlength="512" value=(image) list="names" autocomplete="off"
                    autocapitalize="none" spellcheck="false" placeholder="docker.io/library/alpine:3.20";
                datalist id="names" { @for name in names { option value=(name) {} } }
                button type="submit" name="do" value="lookup" { "Look it up" }
                button.second type="submit" name="do" value="measure" { "Measure a pull" }
            }
        }
    }
}

fn told(measured: &Measured) -> Markup {
    let found = measured.lookup.peers.len();
    let (verdict, answer) = match (&measured.pull, found, measured.is_here) {
        (Some(pull), _, _) if pull.is_good() => (
            Verdict::Good,
            format!("It came: {} in {}.", bytes(pull.bytes), time(Duration::from_secs_f64(pull.seconds))),
        ),
        (Some(pull), _, _) if pull.is_enough => (
            Verdict::Good,
            format!(
                "It comes: {} in {}, and no more is measured.",
                bytes(pull.bytes),
                time(Duration::from_secs_f64(pull.seconds))
            ),
        ),
        (Some(pull), _, _) => (
            Verdict::Warning,
            format!("Not all of it came: {}.", pull.ended.as_deref().unwrap_or("a piece is missing")),
        ),
        (None, 0, true) => (Verdict::Good, "This node has it, and no other is known to.".to_owned()),
        (None, 0, false) => (Verdict::Warning, "No node has it. containerd would go to the registry.".to_owned()),
        (None, n, true) => (Verdict::Good, format!("This node has it, and {} too.", count(n, "other node"))),
        (None, n, false) => (Verdict::Good, format!("{} can give it.", count(n, "node"))),
    };
    html! { p class={ "verdict " (verdict.word()) } role="status" { (sign(verdict)) span { strong { (answer) } } } }
}

fn lookup(lookup: &Lookup) -> Markup {
    let rows: Vec<_> = lookup
        .peers
        .iter()
        .map(|found| {
            vec![
                Cell::text("Node", html! { span.address { (found.address) } }),
                Cell::text(
                    "Zone",
                    found.zone.as_deref().map_or_else(|| html! { span.quiet { "–" } }, |zone| html! { (zone) }),
                ),
                Cell::figure("Found after", html! { (time(Duration::from_secs_f64(found.seconds))) }),
            ]
        })
        .collect();
    let heads = [head("Node", false), head("Zone", false), head("Found after", true)];
    html! {
        section aria-labelledby="lookup-title" {
            h2 id="lookup-title" { "Who has it" }
            p.quiet { "The network was asked for " code { (lookup.key) } " for " (time(Duration::from_secs_f64(lookup.seconds)))
                @if lookup.is_cut { ", and might have named more." } @else { "." } }
            @if !rows.is_empty() { (table("Nodes that offer it, in the order in which they were found", &heads, &rows)) }
        }
    }
}

fn pulled(pull: &Pull) -> Markup {
    let longest = pull.pieces.iter().map(|piece| piece.seconds).fold(0.0, f64::max);
    let row = |piece: &Piece| {
        let micros = |seconds: f64| (seconds * 1e6) as u64;
        let rate = if piece.seconds > 0.0 { piece.bytes as f64 / piece.seconds } else { 0.0 };
        vec![
            Cell::text("What", html! { (piece.what) " " (digest(&piece.name)) }),
            Cell::text("From", html! { (piece.source) }),
            Cell::figure(
                "Bytes",
                html! { (bytes(piece.bytes)) @if let Some(size) = piece.size.filter(|size| *size != piece.bytes) { span.quiet { " of " (bytes(size)) } } },
            ),
            Cell::figure("First byte", html! { (time(Duration::from_secs_f64(piece.first_byte_seconds))) }),
            Cell::figure("Took", html! { (time(Duration::from_secs_f64(piece.seconds))) }),
            Cell::text(
                "",
                super::page::bar(&[("peers", micros(piece.seconds))], micros(longest), "its share of the longest"),
            ),
            Cell::figure("A second", html! { (bytes(rate as u64)) }),
        ]
    };
    let rows: Vec<_> = pull.pieces.iter().map(row).collect();
    let heads = [
        head("What", false),
        head("From", false),
        head("Bytes", true),
        head("First byte", true),
        head("Took", true),
        html! { th scope="col" role="columnheader" { span.unseen { "Time as a bar" } } },
        head("A second", true),
    ];
    html! {
        section aria-labelledby="pull-title" {
            h2 id="pull-title" { "What came" }
            @if let Some(ended) = &pull.ended { p.quiet { "It ended there: " (ended) "." } }
            @if !rows.is_empty() { (table("Pieces of the image, in the order in which they were asked for", &heads, &rows)) }
        }
    }
}
