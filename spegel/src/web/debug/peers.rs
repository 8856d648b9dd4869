//! Who is out there?

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use maud::{Markup, html};

use super::facts::Parts;
use super::history::History;
use super::page::{Cell, Page, head, more, table};
use super::text::{self, bytes, count};
use super::{Part, ROWS};
use crate::ebpf::{PeerRow, Report};
use crate::router::Member;

/// The columns by which peers are put in order, as the address bar names them.
const ORDERS: [&str; 7] = ["address", "given", "got", "now", "rtt", "resent", "load"];

/// Roles of connections with other nodes; the others are no peers.
const PEERS: [&str; 3] = ["served", "fetched", "router"];

/// What is known of one address.
#[derive(Debug, Default)]
struct Known {
    member: Option<Member>,
    given: u64,
    got: u64,
    segments: u64,
    resent: u64,
    failed: u64,
    open: u64,
    round_trip_us: Option<u32>,
    rates: Vec<f64>,
}

pub(super) fn is_order(order: &str) -> bool {
    ORDERS.contains(&order)
}

pub(super) fn parts(parts: &Parts, history: &History, order: Option<&str>) -> Vec<Part> {
    let report = parts.watch.report();
    let of_peers = || report.peers.iter().filter(|row| PEERS.contains(&row.role.as_str()));
    history.add(of_peers().map(|row| (row.address, row.sent + row.received)), Instant::now());
    let members = parts.router.members().borrow().clone();
    let mut known: BTreeMap<IpAddr, Known> = BTreeMap::new();
    for member in members.iter() {
        if let Some(address) = member.peer.addresses.first() {
            known.entry(address.ip()).or_default().member = Some(member.clone());
        }
    }
    for row in of_peers() {
        known.entry(row.address).or_default().add(row);
    }
    for (address, known) in &mut known {
        known.rates = history.rates(*address);
    }
    let order = order.filter(|order| is_order(order)).unwrap_or("got");
    let mut rows: Vec<(IpAddr, Known)> = known.into_iter().collect();
    rows.sort_by(|a, b| compare(order, a, b));
    let rest = rows.len().saturating_sub(ROWS);
    rows.truncate(ROWS);
    vec![
        Part { id: "sum", html: sum(members.len(), &report) },
        Part { id: "peers", html: peers(&rows, rest, order) },
        Part { id: "others", html: others(&report) },
    ]
}

// === impl Known ===

impl Known {
    fn add(&mut self, row: &PeerRow) {
        match row.role.as_str() {
            "served" => self.given += row.sent,
            "fetched" => self.got += row.received,
            _ => {}
        }
        self.segments += row.segments;
        self.resent += row.retransmits;
        self.failed += row.failed.unwrap_or(0) + row.reset.unwrap_or(0);
        self.open += row.open;
        self.round_trip_us = match (self.round_trip_us, row.round_trip_us) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }

    fn resent_share(&self) -> f64 {
        if self.segments == 0 { 0.0 } else { self.resent as f64 / self.segments as f64 }
    }
}

/// The largest first, but for addresses; what is not known comes last.
fn compare(order: &str, (address, a): &(IpAddr, Known), (other, b): &(IpAddr, Known)) -> Ordering {
    let last = |known: &Known| known.rates.last().copied().unwrap_or(-1.0);
    let load = |known: &Known| known.member.as_ref().and_then(|member| member.peer.load);
    let first = match order {
        "given" => b.given.cmp(&a.given),
        "got" => b.got.cmp(&a.got).then_with(|| b.given.cmp(&a.given)),
        "now" => last(b).total_cmp(&last(a)),
        "rtt" => b.round_trip_us.cmp(&a.round_trip_us),
        "resent" => b.resent_share().total_cmp(&a.resent_share()),
        "load" => load(b).cmp(&load(a)),
        _ => Ordering::Equal,
    };
    first.then_with(|| address.cmp(other))
}

fn sum(members: usize, report: &Report) -> Markup {
    let seen = match (report.source.as_str(), &report.reason) {
        ("ebpf", _) => "The figures are the kernel's, to the byte.".to_owned(),
        (_, Some(reason)) => format!("The figures are those of our own sockets: {reason}."),
        (_, None) => "The figures are those of our own sockets.".to_owned(),
    };
    html! { p.answer { strong { (count(members, "other node")) } " " @if members == 1 { "takes" } @else { "take" } " part. " span.quiet { (seen) } } }
}

fn peers(rows: &[(IpAddr, Known)], rest: usize, order: &str) -> Markup {
    let column = |name: &'static str, label: &str, is_figure: bool| {
        let is_chosen = name == order;
        let direction = if name == "address" { "ascending" } else { "descending" };
        html! {
            th scope="col" role="columnheader" class=(if is_figure { "figure" } else { "" }) aria-sort=[is_chosen.then_some(direction)] {
                a href=(format!("{}?sort={name}", Page::Peers.path())) { (label) @if is_chosen { span aria-hidden="true" { (if name == "address" { " ↑" } else { " ↓" }) } } }
            }
        }
    };
    let heads = [
        column("address", "Node", false),
        head("Zone", false),
        column("load", "Load", true),
        column("got", "Got from it", true),
        column("given", "Given to it", true),
        column("now", "Last minute", false),
        column("rtt", "Round trip", true),
        column("resent", "Sent again", true),
        head("Failed", true),
    ];
    let rows: Vec<_> = rows.iter().map(|(address, known)| row(*address, known)).collect();
    html! {
        section aria-labelledby="peers-title" {
            h2 id="peers-title" { "Nodes" }
            @if rows.is_empty() { p.quiet { "Nobody is known. This node serves what it has." } }
            @else { (table("Nodes, and what goes between them and this one", &heads, &rows)) (more(rest, "node")) }
        }
    }
}

fn row(address: IpAddr, known: &Known) -> Vec<Cell> {
    let dash = || html! { span.quiet { "–" } };
    let some = |bytes: u64| {
        if bytes == 0 {
            dash()
        } else {
            html! { (text::bytes(bytes)) }
        }
    };
    let member = known.member.as_ref().map(|member| &member.peer);
    let id = member.map_or_else(
        || html! { span.quiet { "no member" } },
        |peer| html! { code.digest title=(peer.id) { (tail(&peer.id)) } },
    );
    vec![
        Cell::text("Node", html! { span.address { (address) } " " (id) }),
        Cell::text("Zone", member.and_then(|peer| peer.zone.clone()).map_or_else(dash, |zone| html! { (zone) })),
        Cell::figure("Load", member.and_then(|peer| peer.load).map_or_else(dash, |load| html! { (load) " %" })),
        Cell::figure("Got from it", some(known.got)),
        Cell::figure("Given to it", some(known.given)),
        Cell::text("Last minute", sparkline(&known.rates)),
        Cell::figure(
            "Round trip",
            known.round_trip_us.map_or_else(dash, |us| html! { (text::time(Duration::from_micros(us.into()))) }),
        ),
        Cell::figure("Sent again", html! { (format!("{:.2} %", 100.0 * known.resent_share())) }),
        Cell::figure(
            "Failed",
            if known.failed == 0 {
                dash()
            } else {
                html! { (known.failed) }
            },
        ),
    ]
}

/// Identities begin alike: what tells them apart is their end.
fn tail(id: &str) -> String {
    let skipped = id.chars().count().saturating_sub(8);
    id.chars().skip(skipped).collect()
}

/// Bytes a second, the latest at the right, and the latest in words.
fn sparkline(rates: &[f64]) -> Markup {
    let most = rates.iter().copied().fold(0.0, f64::max);
    if rates.len() < 2 || most <= 0.0 {
        return html! { span.quiet { "–" } };
    }
    let left = 60 - rates.len().min(60);
    let point = |(place, rate): (usize, &f64)| format!("{},{:.1}", left + place, 15.0 - 13.0 * rate / most);
    let points: Vec<String> = rates.iter().enumerate().map(point).collect();
    let latest = rates.last().copied().unwrap_or_default();
    let now = format!("{}/s", bytes(latest as u64));
    let label = format!("{now} now, {}/s at the most", bytes(most as u64));
    html! {
        span.spark {
            svg viewBox="0 0 60 16" preserveAspectRatio="none" role="img" aria-label=(label) { polyline points=(points.join(" ")) {} }
            span.figure aria-hidden="true" { (now) }
        }
    }
}

fn others(report: &Report) -> Markup {
    let names = [
        ("containerd", "This node's own containerd, which asks the mirror"),
        ("upstream", "Registries, as containerd reaches them"),
        ("other", "What else containerd reaches"),
    ];
    let rows: Vec<_> = names
        .iter()
        .filter_map(|(role, name)| Some((name, report.roles.iter().find(|row| row.role == *role)?)))
        .collect();
    let rows: Vec<_> = rows
        .iter()
        .map(|(name, role)| {
            vec![
                Cell::text("Connections with", html! { (name) }),
                Cell::figure("Opened", html! { (role.opened) }),
                Cell::figure("Sent", html! { (bytes(role.sent)) }),
                Cell::figure("Received", html! { (bytes(role.received)) }),
            ]
        })
        .collect();
    let heads = [head("Connections with", false), head("Opened", true), head("Sent", true), head("Received", true)];
    html! {
        @if !rows.is_empty() {
            section aria-labelledby="others-title" {
                h2 id="others-title" { "Who else" }
                (table("Connections that are not with peers", &heads, &rows))
            }
        }
    }
}
