//! The last pulls, each with its story.

use std::time::SystemTime;

use maud::{Markup, html};

use super::Part;
use super::facts::Parts;
use super::measure::CLIENT;
use super::page::{Cell, digest, head, table};
use super::text::{bytes, count, time};
use crate::story::{Carriage, Met, Origin, Source, Story};

/// How many are shown.
const SHOWN: usize = 40;

pub(super) fn part(parts: &Parts) -> Part {
    let stories = parts.registry.stories().latest(SHOWN);
    Part { id: "pulls", html: pulls(&stories, SystemTime::now()) }
}

fn pulls(stories: &[Story], now: SystemTime) -> Markup {
    let rows: Vec<_> = stories.iter().map(|story| row(story, now)).collect();
    let heads = [
        head("What", false),
        head("From", false),
        head("Its story", false),
        head("Bytes", true),
        head("Took", true),
        head("Ago", true),
    ];
    html! {
        section aria-labelledby="pulls-title" {
            h2 id="pulls-title" { "The last requests" }
            @if rows.is_empty() { p.quiet { "Nothing was asked for yet." } }
            @else { (table("What was asked for last, and how it went", &heads, &rows)) }
        }
    }
}

fn row(story: &Story, now: SystemTime) -> Vec<Cell> {
    let ended = story.began + story.total;
    let ago = now.duration_since(ended).unwrap_or_default();
    vec![
        Cell::text("What", what(story)),
        Cell::text("From", html! { span class={ "chip " (class(story.source)) } { (from(story)) } }),
        Cell::text("Its story", html! { span.story title=(format!("trace {}", story.trace_id)) { (told(story)) } }),
        Cell::figure(
            "Bytes",
            html! { @if story.source == Source::Upstream { span.quiet { "–" } } @else if story.method == "HEAD" { span.quiet { "head" } } @else { (bytes(story.bytes)) } },
        ),
        Cell::figure("Took", html! { (time(story.total)) }),
        Cell::figure("Ago", html! { (time(ago)) }),
    ]
}

/// The repository, and beneath it the tag or digest.
fn what(story: &Story) -> Markup {
    let path = story.path.strip_prefix("/v2/").unwrap_or(&story.path);
    let split = ["/manifests/", "/blobs/", "/referrers/"].iter().find_map(|kind| path.split_once(kind));
    let (repository, name) = split.unwrap_or((path, ""));
    let registry = story.registry.as_deref().map(|registry| format!("{registry}/")).unwrap_or_default();
    html! { (registry) (repository) @if !name.is_empty() { " " @if name.contains(':') { (digest(name)) } @else { b { (name) } } } }
}

fn class(source: Source) -> &'static str {
    match source {
        Source::Local | Source::Receiving => "local",
        Source::Ready | Source::Peer => "peers",
        Source::Upstream => "upstream",
    }
}

fn from(story: &Story) -> String {
    match (story.source, story.met.peer) {
        (Source::Local | Source::Receiving, _) => "here".to_owned(),
        (Source::Ready | Source::Peer, Some(peer)) => peer.ip().to_string(),
        (Source::Ready | Source::Peer, None) => "a peer".to_owned(),
        (Source::Upstream, _) => "registry".to_owned(),
    }
}

/// What happened, in a line.
fn told(story: &Story) -> String {
    let Met { known, asked, raced, resumed, held, .. } = &story.met;
    let mut told = vec![match story.source {
        Source::Local => "it was here".to_owned(),
        Source::Receiving => "it was arriving here, and given meanwhile".to_owned(),
        Source::Ready => "it was verified a moment before".to_owned(),
        Source::Peer => story.met.found.map_or("a peer had it", found).to_owned(),
        Source::Upstream if *known == 0 => "no node had it".to_owned(),
        Source::Upstream => format!("{} said to have it, none gave it", count(*known as usize, "node")),
    }];
    if *asked > 1 {
        told.push(format!(
            "{} asked{}",
            count(*asked as usize, "node"),
            if *raced { ", some side by side" } else { "" }
        ));
    }
    if let (Source::Peer, Some(carried)) = (story.source, story.met.carried) {
        told.push(match carried {
            Carriage::Relayed => "relayed".to_owned(),
            Carriage::Verified => "verified".to_owned(),
        });
    }
    if !held.is_zero() {
        told.push(format!("held for {}", time(*held)));
    }
    if *resumed > 0 {
        told.push(format!("resumed {}", if *resumed == 1 { "once".to_owned() } else { format!("{resumed} times") }));
    }
    told.extend(story.met.breaks.last().map(|last| format!("broke off {last}")));
    told.extend(story.met.failure.as_ref().filter(|_| story.source == Source::Upstream).cloned());
    if story.client.starts_with(CLIENT) {
        told.push("measured by a debug page".to_owned());
    }
    match (story.status, story.whole) {
        (None, _) => told.push("the client left first".to_owned()),
        (Some(200..300), false) if story.method != "HEAD" => told.push("it ended early".to_owned()),
        _ => {}
    }
    told.join("; ")
}

fn found(origin: Origin) -> &'static str {
    match origin {
        Origin::Lookup => "found by asking the network",
        Origin::Remembered => "found a moment before",
        Origin::Named => "named by a peer that was busy",
        Origin::Sibling => "from a peer that gave other parts of the image",
        Origin::Coordinator => "named by the storm's coordinator",
        Origin::Shared => "shared with another request for the same",
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Duration;

    use super::*;
    use crate::story::Break;

    fn story(source: Source, met: Met) -> Story {
        Story {
            began: SystemTime::UNIX_EPOCH,
            trace_id: "0".repeat(32),
            method: "GET",
            path: format!("/v2/shop/app/blobs/sha256:{}", "ab".repeat(32)),
            range: None,
            registry: Some("registry.test".into()),
            client: "node".into(),
            source,
            met,
            status: Some(200),
            bytes: 5 << 20,
            whole: true,
            head: Some(Duration::from_millis(2)),
            total: Duration::from_millis(40),
        }
    }

    #[test]
    fn a_story_is_told_in_a_line() {
        let (one, two) = (SocketAddr::from(([10, 0, 0, 1], 5000)), SocketAddr::from(([10, 0, 0, 2], 5000)));
        assert_eq!(told(&story(Source::Local, Met::default())), "it was here");
        assert_eq!(told(&story(Source::Upstream, Met::default())), "no node had it");
        let failed = Met { known: 2, asked: 2, raced: true, failure: Some("refused".into()), ..Met::default() };
        assert_eq!(
            told(&story(Source::Upstream, failed)),
            "2 nodes said to have it, none gave it; 2 nodes asked, some side by side; refused"
        );
        let broke = Break { offset: 7, from: one, to: Some(two), why: "it stood still".into() };
        let met = Met {
            peer: Some(one),
            found: Some(Origin::Coordinator),
            known: 2,
            asked: 2,
            carried: Some(Carriage::Relayed),
            resumed: 1,
            breaks: vec![broke],
            held: Duration::from_millis(300),
            ..Met::default()
        };
        let cut = Story { whole: false, ..story(Source::Peer, met) };
        assert_eq!(
            told(&cut),
            "named by the storm's coordinator; 2 nodes asked; relayed; held for 300 ms; resumed once; broke off at byte 7 from \
             10.0.0.1:5000 to 10.0.0.2:5000: it stood still; it ended early"
        );
        assert_eq!(from(&cut), "10.0.0.1");
        let measured = Story { client: format!("{CLIENT}7"), ..story(Source::Local, Met::default()) };
        assert_eq!(told(&measured), "it was here; measured by a debug page");
    }

    #[test]
    fn what_clients_write_is_text() {
        let hostile = "<script>alert(1)</script>";
        let mut story = story(Source::Upstream, Met { known: 1, failure: Some(hostile.into()), ..Met::default() });
        story.path = format!("/v2/{hostile}/manifests/{hostile}");
        story.registry = Some(hostile.into());
        let html = pulls(&[story], SystemTime::UNIX_EPOCH + Duration::from_secs(5)).into_string();
        assert!(!html.contains("<script>") && html.contains("&lt;script&gt;"), "{html}");
    }
}
