//! What all pages look like: the frame, the ways between them, and the pieces that they share.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::facts::{Parts, Verdict};
use super::{Part, Wish, text};

/// Where the pages are.
pub(super) const ROOT: &str = "/debug/web/";

/// A page answers a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Working,
    Content,
    Peers,
    Try,
    Storm,
}

// === impl Page ===

impl Page {
    pub(super) const ALL: [Self; 5] = [Self::Working, Self::Content, Self::Peers, Self::Try, Self::Storm];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Working => "working",
            Self::Content => "content",
            Self::Peers => "peers",
            Self::Try => "try",
            Self::Storm => "storm",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|page| page.name() == name)
    }

    pub(super) fn path(self) -> String {
        match self {
            Self::Working => ROOT.to_owned(),
            _ => format!("{ROOT}{}", self.name()),
        }
    }

    fn question(self) -> &'static str {
        match self {
            Self::Working => "Is it working?",
            Self::Content => "What is here?",
            Self::Peers => "Who is out there?",
            Self::Try => "Try it",
            Self::Storm => "Storm",
        }
    }
}

/// A whole page.
pub(super) fn document(facts: &Parts, page: Page, wish: &Wish, parts: &[Part]) -> Markup {
    let sort = wish.sort.as_deref().filter(|sort| super::peers::is_order(sort));
    let events =
        format!("{ROOT}events?page={}{}", page.name(), sort.map(|sort| format!("&sort={sort}")).unwrap_or_default());
    let is_live = page != Page::Try;
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (page.question()) " · " (facts.node) " · spegel" }
                link rel="icon" href="/debug/web/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/debug/web/style.css";
                @if is_live { script src="/debug/web/live.js" defer {} }
            }
            body {
                a.skip href="#main" { "Skip to the content" }
                header.top {
                    div.brand {
                        (mark())
                        span.word { "spegel" }
                        span.node title="This node" { (facts.node) }
                        @if let Some(zone) = &facts.zone { span.zone title="Its zone" { (zone) } }
                    }
                    nav aria-label="Questions" {
                        ul {
                            @for other in Page::ALL {
                                li { a href=(other.path()) aria-current=[(other == page).then_some("page")] { (other.question()) } }
                            }
                        }
                    }
                }
                main id="main" tabindex="-1" data-events=[is_live.then_some(events.as_str())] {
                    h1 { (page.question()) }
                    @for part in parts { div.part id=(part.id) role=[(part.id == "verdict").then_some("status")] { (part.html) } }
                }
                footer {
                    p { "spegel " (env!("CARGO_PKG_VERSION")) " · for this node only · "
                        a href="/debug/web/stats" { "figures as JSON" } " · " a href="/metrics" { "metrics" } }
                    @if is_live {
                        p.live {
                            span id="live" role="status" { "As it was when the page was loaded." }
                            " " button id="pause" type="button" hidden { "Pause" }
                        }
                    }
                }
            }
        }
    }
}

fn mark() -> Markup {
    // Its parts are ours: no text from elsewhere is in it.
    PreEscaped(include_str!("icon.svg").replacen("<svg ", "<svg aria-hidden=\"true\" class=\"mark\" ", 1))
}

/// A sign for a verdict: told apart by shape, and by a word for those who do not see it.
pub(super) fn sign(verdict: Verdict) -> Markup {
    let path = match verdict {
        Verdict::Good => "M4.5 8.2l2.4 2.4 4.6-5",
        Verdict::Idle => "M5 8h6",
        Verdict::Warning => "M8 4.2v4.6M8 11.2v.4",
        Verdict::Failure => "M5.3 5.3l5.4 5.4M10.7 5.3l-5.4 5.4",
    };
    html! {
        span class={ "sign " (verdict.word()) } {
            svg viewBox="0 0 16 16" aria-hidden="true" focusable="false" {
                circle cx="8" cy="8" r="7.25" {}
                path d=(path) {}
            }
            span.unseen { (verdict.word()) ": " }
        }
    }
}

/// One bar out of several shares, each with its class. `label` says all of it in words.
pub(super) fn bar(shares: &[(&str, u64)], whole: u64, label: &str) -> Markup {
    let mut start = 0.0;
    let scaled = shares.iter().filter(|(_, share)| *share > 0).map(|(class, share)| {
        let from = start;
        let width = 1000.0 * (*share as f64 / whole.max(1) as f64).min(1.0);
        start += width;
        (class, from, width)
    });
    html! {
        svg.bar viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label=(label) {
            rect.empty width="1000" height="10" {}
            @for (class, from, width) in scaled {
                rect class=(class) x=(format!("{from:.1}")) width=(format!("{width:.1}")) height="10" {}
            }
        }
    }
}

/// How much of something has come.
pub(super) fn progress(position: u64, total: Option<u64>) -> Markup {
    let Some(total) = total else { return html! { span.figure { (text::bytes(position)) } } };
    let told = text::percent(position, total).unwrap_or_else(|| "0 %".to_owned());
    let label = format!("{told} of {}", text::bytes(total));
    html! {
        span.progress { (bar(&[("peers", position)], total, &label)) span.figure { (told) } }
    }
}

/// A table that scrolls by itself where it is too wide, and is a list of cards where the window is narrow.
pub(super) fn table(caption: &str, heads: &[Markup], rows: &[Vec<Cell>]) -> Markup {
    html! {
        // Only what has the keyboard can be scrolled by it.
        div.scroll role="region" aria-label=(caption) tabindex="0" {
            table role="table" {
                caption { (caption) }
                thead role="rowgroup" { tr role="row" { @for head in heads { (head) } } }
                tbody role="rowgroup" {
                    @for row in rows {
                        tr role="row" {
                            @for (number, cell) in row.iter().enumerate() {
                                @if number == 0 {
                                    th scope="row" role="rowheader" class=(cell.class) { (cell.html) }
                                } @else {
                                    td role="cell" class=(cell.class) data-label=(cell.label) { (cell.html) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// One cell; `label` is its column's, for narrow windows.
pub(super) struct Cell {
    pub(super) label: &'static str,
    pub(super) class: &'static str,
    pub(super) html: Markup,
}

// === impl Cell ===

impl Cell {
    pub(super) fn text(label: &'static str, html: Markup) -> Self {
        Self { label, class: "", html }
    }

    pub(super) fn figure(label: &'static str, html: Markup) -> Self {
        Self { label, class: "figure", html }
    }
}

/// The head of a column.
pub(super) fn head(label: &str, is_figure: bool) -> Markup {
    html! { th scope="col" role="columnheader" class=(if is_figure { "figure" } else { "" }) { (label) } }
}

/// Says that there is more than is shown.
pub(super) fn more(number: usize, what: &str) -> Markup {
    html! { @if number > 0 { p.more { "And " (text::count(number, what)) " more." } } }
}

/// A digest: short, and whole for who points at it or copies it.
pub(super) fn digest(digest: &str) -> Markup {
    html! { code.digest title=(digest) { (text::short(digest)) } }
}
