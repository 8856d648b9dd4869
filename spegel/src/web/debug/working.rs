//! Is it working?

use maud::{Markup, html};

use super::Part;
use super::facts::{Examination, Parts, Sources, Verdict};
use super::page::{bar, sign};
use super::text::{bytes, count, percent};
use crate::router::Readiness;
use crate::store::{Health, Inventory};

/// The state of one part of the mirror.
struct State {
    part: &'static str,
    verdict: Verdict,
    said: String,
    more: Option<String>,
}

pub(super) fn parts(parts: &Parts) -> Vec<Part> {
    parts.examine.notify_one();
    let states = states(parts);
    let sources = Sources::of(parts);
    let examination = parts.examination.borrow().clone();
    vec![
        Part { id: "verdict", html: verdict(parts, &states, sources) },
        Part { id: "sources", html: by_source(sources) },
        Part { id: "states", html: cards(&states) },
        super::pulls::part(parts),
        Part { id: "doctor", html: doctor(examination.as_ref()) },
    ]
}

/// The answer in a sentence: the first thing that is seen.
fn verdict(parts: &Parts, states: &[State], sources: Sources) -> Markup {
    let worst = states.iter().map(|state| state.verdict).max().unwrap_or(Verdict::Idle);
    let culprits: Vec<&str> = states.iter().filter(|state| state.verdict == worst).map(|state| state.part).collect();
    let (verdict, answer, said) = match (parts.registry.ready(), worst) {
        (Err(why), _) => (Verdict::Failure, "Not now.", format!("This node answers no requests: {why}.")),
        (Ok(()), Verdict::Failure) => {
            (Verdict::Failure, "No.", format!("Something keeps it from helping: {}.", culprits.join(", ")))
        }
        (Ok(()), Verdict::Warning) => (Verdict::Warning, "Yes, but look at this:", format!("{}.", culprits.join(", "))),
        (Ok(()), _) => (Verdict::Good, "Yes.", saved(sources)),
    };
    html! {
        p class={ "verdict " (verdict.word()) } { (sign(verdict)) span { strong { (answer) } " " span { (said) } } }
    }
}

fn saved(sources: Sources) -> String {
    let here = sources.local.saturating_add(sources.peers);
    match (sources.upstream, percent(here, sources.sum())) {
        (_, None) => "It is ready, and this node has pulled nothing through it yet.".to_owned(),
        (None, Some(_)) => format!("{} did not have to come from a registry.", bytes(here)),
        (Some(_), Some(share)) => format!("{share} of what this node pulled did not come from a registry."),
    }
}

fn by_source(sources: Sources) -> Markup {
    let whole = sources.sum();
    let share = |part| percent(part, whole).unwrap_or_else(|| "0 %".to_owned());
    let rows = [
        ("peers", "from peers", Some(sources.peers)),
        ("local", "already here", Some(sources.local)),
        ("upstream", "from registries", sources.upstream),
    ];
    let told = rows.iter().filter_map(|(_, name, bytes)| bytes.map(|bytes| format!("{} {name}", share(bytes))));
    let label = told.collect::<Vec<_>>().join(", ");
    // Without the kernel's word the bar is of what went through the mirror, and must not look like all of it.
    let title = match sources.upstream {
        Some(_) => "Where pulled bytes came from",
        None => "Where the bytes came from that the mirror gave",
    };
    let shares: Vec<_> = rows.iter().map(|(class, _, bytes)| (*class, bytes.unwrap_or(0))).collect();
    html! {
        section aria-labelledby="sources-title" {
            h2 id="sources-title" { (title) }
            (bar(&shares, whole, &label))
            dl.legend {
                @for (class, name, part) in rows {
                    div { dt { span class={ "swatch " (class) } aria-hidden="true" {} (name) }
                        dd {
                            @if let Some(part) = part { b { (bytes(part)) } " " span.quiet { (share(part)) } }
                            @else { span.quiet { "beside these, and not seen without eBPF" } }
                        } }
                }
            }
        }
    }
}

fn states(parts: &Parts) -> Vec<State> {
    let held = parts.store.inventory(0);
    vec![store(parts, &held), router(parts), serving(parts), kernel(parts), storms(parts), examined(parts)]
}

fn store(parts: &Parts, held: &Inventory) -> State {
    let health = parts.store.health().borrow().clone();
    let (verdict, said) = match health {
        Health::Ready => (Verdict::Good, format!("{} in {}", bytes(held.bytes), count(held.more_images, "image"))),
        Health::Waiting(what) => (Verdict::Failure, what),
    };
    let more = match held.more_arriving {
        0 => format!("{} to offer", count(held.blobs, "blob")),
        n => format!("{} to offer, {} arriving", count(held.blobs, "blob"), count(n, "blob")),
    };
    State { part: "Content", verdict, said, more: Some(more) }
}

fn router(parts: &Parts) -> State {
    let members = parts.router.members().borrow().len();
    let (verdict, said) = match *parts.router.readiness().borrow() {
        Readiness::Connected => (Verdict::Good, format!("{} known", count(members, "other node"))),
        Readiness::Alone => (Verdict::Idle, "This node is the only one".to_owned()),
        Readiness::Joining => (Verdict::Warning, "Looking for first peers".to_owned()),
        Readiness::Isolated => (Verdict::Warning, "No peer could be reached; the search goes on".to_owned()),
    };
    State {
        part: "Network of peers",
        verdict,
        said,
        more: Some(format!("this node is {}", super::text::short(&parts.identity))),
    }
}

fn serving(parts: &Parts) -> State {
    let (flight, load) = (parts.registry.in_flight(), parts.registry.load());
    let verdict = if load >= 95 { Verdict::Warning } else { Verdict::Good };
    State {
        part: "Serving",
        verdict,
        said: format!("{} under way", count(flight, "request")),
        more: Some(format!("{load} % of what it may give peers; {}", parts.engine)),
    }
}

fn kernel(parts: &Parts) -> State {
    let report = parts.watch.report();
    let said = match (report.source.as_str(), &report.containerd_unseen) {
        ("ebpf", None) => (Verdict::Good, "The kernel counts, upstream too".to_owned(), None),
        ("ebpf", Some(why)) => (Verdict::Idle, "The kernel counts, but not upstream".to_owned(), Some(why.clone())),
        _ => (Verdict::Idle, "Only our own sockets are seen".to_owned(), report.reason),
    };
    State { part: "eBPF", verdict: said.0, said: said.1, more: said.2 }
}

fn storms(parts: &Parts) -> State {
    let (verdict, said) = match parts.mirror.storms(0) {
        Some(storms) if storms.more_pulls > 0 => {
            (Verdict::Good, format!("{} coordinated now", count(storms.more_pulls, "blob")))
        }
        Some(_) => (Verdict::Good, "Calm".to_owned()),
        None => (Verdict::Idle, "Off".to_owned()),
    };
    let more = match verdict {
        Verdict::Idle => "--storm on lets one node pull for all",
        _ => "one node pulls for all",
    };
    State { part: "Storms", verdict, said, more: Some(more.to_owned()) }
}

fn examined(parts: &Parts) -> State {
    let (verdict, said, more) = match &*parts.examination.borrow() {
        None => (Verdict::Idle, "Not examined".to_owned(), None),
        Some(Examination { good, found }) => {
            let worst = found.iter().map(|examined| examined.verdict).max().unwrap_or(Verdict::Good);
            let wrong = found.iter().filter(|examined| examined.verdict > Verdict::Idle).count();
            let said = match wrong {
                0 => "Nothing keeps pulls from the mirror".to_owned(),
                n => count(n, "finding"),
            };
            // What cannot be seen is no fault.
            let verdict = if wrong == 0 { Verdict::Good } else { worst };
            (verdict, said, Some(format!("{} good", count(*good, "check"))))
        }
    };
    State { part: "Doctor", verdict, said, more }
}

fn cards(states: &[State]) -> Markup {
    html! {
        section aria-labelledby="states-title" {
            h2 id="states-title" { "Its parts" }
            ul.cards {
                @for state in states {
                    li class={ "card " (state.verdict.word()) } {
                        h3 { (sign(state.verdict)) (state.part) }
                        p { (state.said) }
                        @if let Some(more) = &state.more { p.quiet { (more) } }
                    }
                }
            }
        }
    }
}

fn doctor(examination: Option<&Examination>) -> Markup {
    let found = examination.map(|examination| examination.found.as_slice()).unwrap_or_default();
    html! {
        @if !found.is_empty() {
            section aria-labelledby="doctor-title" {
                h2 id="doctor-title" { "What doctor found" }
                ul.findings {
                    @for examined in found {
                        li { (sign(examined.verdict)) div {
                            p { b { (examined.check) } " " (examined.said) }
                            @if let Some(change) = &examined.change { p.quiet { (change) } }
                        } }
                    }
                }
                p.quiet { code { "spegel doctor" } " on the node looks at more." }
            }
        }
    }
}
