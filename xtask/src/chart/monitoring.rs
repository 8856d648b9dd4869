//! The chart's alerts and its dashboard: what can be said of them without a Prometheus that has figures. The end-to-end test `e2e::monitoring`
//! has one evaluate them.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use spegel_benches::daemon::{find_program, output};

use super::rendered;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The alerts of the file, each with its lines.
fn alerts(file: &str) -> Vec<(String, String)> {
    let parts = file.split("- alert: ").skip(1);
    parts.map(|part| (part.lines().next().unwrap().trim().to_owned(), part.to_owned())).collect()
}

/// Where there is one.
fn promtool() -> Option<PathBuf> {
    let found = find_program("promtool");
    if found.is_none() {
        println!("skipped: the program 'promtool' is not installed (Debian's package prometheus)");
    }
    found
}

#[test]
fn each_alert_says_what_to_do_and_has_its_cases() {
    let (file, runbooks, cases) = (
        read("charts/spegel/monitoring/alerts.yaml"),
        read("docs/runbooks.md"),
        read("xtask/src/chart/alerts_test.yaml"),
    );
    let alerts = alerts(&file);
    assert!((5..=15).contains(&alerts.len()), "few and meaningful: {}", alerts.len());
    let headings: BTreeSet<&str> = runbooks.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    for (name, text) in &alerts {
        for part in ["severity: ", "summary: ", "description: ", "expr: "] {
            assert!(text.contains(part), "{name} has no {part}");
        }
        assert!(text.contains("for: ") || text.contains("increase("), "{name} fires on one scrape");
        assert!(
            ["warning", "info", "critical"].iter().any(|word| text.contains(&format!("severity: {word}\n"))),
            "{name}"
        );
        let page = format!("/docs/runbooks.md#{}\n", name.to_lowercase());
        assert!(text.contains(&page), "{name} does not lead to {page}");
        assert!(headings.contains(name.as_str()), "docs/runbooks.md has no section {name}");
        let of_it = cases.split("alertname: ").filter_map(|case| case.strip_prefix(&format!("{name}\n")));
        let (quiet, firing): (Vec<&str>, Vec<&str>) = of_it.partition(|case| case.contains("exp_alerts: []"));
        assert!(!quiet.is_empty() && !firing.is_empty(), "{name}: {} quiet, {} firing", quiet.len(), firing.len());
    }
    let names: BTreeSet<&str> = alerts.iter().map(|(name, _)| name.as_str()).collect();
    let stale: Vec<_> = headings.difference(&names).collect();
    assert!(stale.is_empty(), "docs/runbooks.md tells of alerts that there are not: {stale:?}");
}

#[test]
fn prometheus_takes_the_alerts_and_they_fire_when_they_should() {
    let Some(promtool) = promtool() else { return };
    let file = root().join("charts/spegel/monitoring/alerts.yaml");
    output(Command::new(&promtool).args(["check", "rules"]).arg(&file)).unwrap();
    let cases = root().join("xtask/src/chart/alerts_test.yaml");
    output(Command::new(&promtool).args(["test", "rules"]).arg(&cases)).unwrap();
}

#[test]
fn helm_leaves_the_alerts_as_they_are() {
    let Some(helm) = rendered::helm() else { return };
    let (on, out) = (Value::Bool(true), serde_json::json!(["SpegelSavesLittle"]));
    let objects =
        rendered::render(&helm, "1.34.0", &[("prometheusRule.enabled", &on), ("prometheusRule.disabled", &out)]);
    let object = objects.split("---\n").find(|object| object.contains("kind: PrometheusRule\n")).unwrap();
    assert!(
        object.contains("{{ $labels.instance }}") && object.contains("job=\"spegel\",namespace=\"spegel\""),
        "{object}"
    );
    assert!(!object.contains("SpegelSavesLittle"));
    let unknown = serde_json::json!(["SpegelDown"]);
    let refused =
        rendered::run(&helm, "1.34.0", &[("prometheusRule.enabled", &on), ("prometheusRule.disabled", &unknown)]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("there is no alert SpegelDown"));
    let Some(promtool) = promtool() else { return };
    let folder = tempfile::tempdir().unwrap();
    let rules = object.split_once("\nspec:\n").unwrap().1;
    let rules: String = rules.lines().map(|line| format!("{}\n", line.strip_prefix("  ").unwrap_or(line))).collect();
    fs::write(folder.path().join("rules.yaml"), rules).unwrap();
    let told = output(Command::new(&promtool).args(["check", "rules"]).arg(folder.path().join("rules.yaml"))).unwrap();
    let count = alerts(&read("charts/spegel/monitoring/alerts.yaml")).len() - 1;
    assert!(told.contains(&format!("{count} rules found")), "{told}");
}

/// The dashboard as both ways of provisioning hand it over.
#[test]
fn helm_leaves_the_dashboard_as_it_is() {
    let Some(helm) = rendered::helm() else { return };
    let on = Value::Bool(true);
    for (mode, kind, before) in
        [("Sidecar", "ConfigMap", "  spegel.json: |\n"), ("GrafanaOperator", "GrafanaDashboard", "  json: |\n")]
    {
        let mode = Value::from(mode);
        let objects =
            rendered::render(&helm, "1.34.0", &[("grafanaDashboard.enabled", &on), ("grafanaDashboard.mode", &mode)]);
        let object = objects.split("---\n").find(|object| object.contains(&format!("kind: {kind}\n"))).unwrap();
        let text = object.split_once(before).unwrap().1;
        let text: String = text.lines().map(|line| line.strip_prefix("    ").unwrap_or(line)).collect();
        assert!(serde_json::from_str::<Value>(&text).unwrap() == dashboard(), "{kind}");
    }
}

fn dashboard() -> Value {
    serde_json::from_str(&read("charts/spegel/monitoring/dashboard.json")).unwrap()
}

#[test]
fn the_dashboard_can_be_imported_anywhere() {
    let dashboard = dashboard();
    assert!(dashboard["schemaVersion"].as_u64().unwrap() >= 38 && dashboard.get("id").is_none());
    let own = ["row", "stat", "timeseries", "bargauge", "table"];
    let panels = dashboard["panels"].as_array().unwrap();
    let mut taken = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(own.contains(&panel["type"].as_str().unwrap()), "{title} needs a plugin");
        assert!(panel.get("id").is_none(), "{title}");
        let place = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        for (x, y) in (place("x")..place("x") + place("w"))
            .flat_map(|x| (place("y")..place("y") + place("h")).map(move |y| (x, y)))
        {
            assert!(x < 24 && taken.insert((x, y)), "{title} lies over another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        assert!(
            panel["description"].as_str().is_some_and(|text| text.len() > 40),
            "{title} does not say what it shows"
        );
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title} has no unit");
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title}");
    }
    assert!(panels.len() > 30, "{}", panels.len());
}

/// Names of metrics in queries are names of metrics.
#[test]
fn dashboard_and_alerts_name_metrics_that_there_are() {
    let page = read("docs/metrics.md");
    let known: BTreeSet<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let texts = read("charts/spegel/monitoring/dashboard.json")
        + &read("charts/spegel/monitoring/alerts.yaml")
        + &read("xtask/src/chart/alerts_test.yaml");
    let words = texts.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let named: BTreeSet<&str> = words
        .filter(|word| {
            ["spegel_", "http_request", "http_response", "process_"].iter().any(|start| word.starts_with(start))
        })
        .collect();
    assert!(named.len() > 30, "{named:?}");
    for name in named {
        let plain = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(known.contains(name) || known.contains(plain), "{name} is not in docs/metrics.md");
    }
}
