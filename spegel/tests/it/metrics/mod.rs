//! What is said of metrics: `docs/metrics.md`, which is written from the code.

#![allow(clippy::unwrap_used)]

mod log;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use spegel::app::catalogue;
use spegel::metrics::{Bound, Label};

/// What the page says before its table.
const HEAD: &str = "# Metrics

Made from the code by `cargo xtask metrics-docs`: change it there.

`--metrics-addr` (port 9090) answers `/metrics`: OpenMetrics to those who ask for it, as Prometheus does, and the older text to all others.
The chart's `serviceMonitor.enabled` has Prometheus scrape it, `grafanaDashboard.enabled` brings a dashboard, and `prometheusRule.enabled`
alerts; [runbooks.md](runbooks.md) says what to do when one of these fires.

Names and labels marked *Go* are those of the Go program, so that its dashboards and alerts go on working; the others are ours.
A metric that nothing was counted for yet may be absent from the text: a missing counter is 0. A label never has more values than the
table says, whatever clients and peers send.

The column *room* names the part of the program that counts; [ARCHITECTURE.md](../ARCHITECTURE.md) says what each decides.

| metric | type | unit | labels | what it says | room | since |
|---|---|---|---|---|---|---|
";

const ENDING: &str = "
A histogram has `_bucket`, `_sum` and `_count` after its name. `code` 0 is a client that left before it got a status.
";

fn page() -> String {
    let mut lines: Vec<String> = catalogue()
        .into_iter()
        .map(|metric| {
            let labels: Vec<String> = metric.label_list().iter().map(label).collect();
            let unit = match metric.measured() {
                "" => "number",
                unit => unit,
            };
            let since = if metric.is_gos() { "Go" } else { "ours" };
            let (name, kind, help, room) = (metric.sample(), metric.kind(), metric.help(), metric.room());
            format!(
                "| `{name}` | {kind} | {unit} | {} | {} | {room} | {since} |\n",
                labels.join("<br>"),
                help.replace('|', "\\|")
            )
        })
        .collect();
    lines.sort();
    format!("{HEAD}{}{ENDING}", lines.concat())
}

fn label(label: &Label) -> String {
    let mut text = format!("`{}`: ", label.name);
    let written = match label.bound {
        Bound::Words(words) => {
            let words: Vec<String> = words
                .iter()
                .map(|word| if word.is_empty() { "nothing".to_owned() } else { format!("`{word}`") })
                .collect();
            write!(text, "{}", words.join(", "))
        }
        Bound::AtMost(1, what) => write!(text, "{what}"),
        Bound::AtMost(number, what) => write!(text, "at most {number}: {what}"),
    };
    written.unwrap();
    text
}

#[test]
fn the_page_says_what_the_code_counts() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let page = page();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == page,
        "docs/metrics.md is stale: run `cargo xtask metrics-docs`"
    );
}

/// What dashboards and alerts of the Go program name.
#[test]
fn the_go_programs_names_are_there_with_their_labels() {
    let names: [(&str, &[&str]); 9] = [
        ("spegel_mirror_requests_total", &["registry", "cache"]),
        ("spegel_mirror_last_success_timestamp_seconds", &[]),
        ("spegel_resolve_duration_seconds", &["router"]),
        ("spegel_advertised_image_tags", &["registry"]),
        ("spegel_advertised_image_digests", &["registry"]),
        ("spegel_advertised_content_digests", &["registry"]),
        ("http_request_duration_seconds", &["handler", "method", "code"]),
        ("http_response_size_bytes", &["handler", "method", "code"]),
        ("http_requests_inflight", &["handler"]),
    ];
    for (name, labels) in names {
        let metric =
            catalogue().into_iter().find(|metric| metric.sample() == name).unwrap_or_else(|| panic!("no {name}"));
        assert!(metric.is_gos(), "{name}");
        assert_eq!(metric.label_list().iter().map(|label| label.name).collect::<Vec<_>>(), labels, "{name}");
    }
}

#[test]
fn each_metric_is_described_once_and_bounded() {
    let all = catalogue();
    let names: BTreeSet<String> = all.iter().map(|metric| metric.sample()).collect();
    assert_eq!(names.len(), all.len());
    for metric in all {
        assert!(metric.help().len() > 10 && !metric.help().ends_with('.'), "{}", metric.name());
        // All labels together: what one node can have of one metric at most.
        let series: usize = metric
            .label_list()
            .iter()
            .map(|label| match label.bound {
                Bound::Words(words) => words.len(),
                Bound::AtMost(number, _) => number,
            })
            .product();
        assert!(series <= 400, "{} may have {series} series", metric.name());
    }
}
