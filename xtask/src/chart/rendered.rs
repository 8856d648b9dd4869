//! What the real Helm makes of the chart: the objects by default, and what each value changes in them.
//!
//! The expected texts are files beside this one; `UPDATE_SNAPSHOTS=1` writes them anew, to be read before they are committed.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use super::{is_idle, properties};
use crate::helm::Version;

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/chart")
}

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/spegel")
}

/// Helm 3, or nothing after the reason was said.
pub(super) fn helm() -> Option<PathBuf> {
    find(Version::V3)
}

fn find(version: Version) -> Option<PathBuf> {
    crate::helm::find(version).inspect_err(|reason| println!("skipped: {reason:#}")).ok()
}

pub(super) fn run(helm: &Path, kubernetes: &str, values: &[(&str, &Value)]) -> Output {
    let mut command = Command::new(helm);
    command.args(["template", "spegel"]).arg(chart()).args(["--namespace", "spegel", "--kube-version", kubernetes]);
    for (path, value) in values {
        command.args(["--set-json", &format!("{path}={value}")]);
    }
    command.output().unwrap()
}

pub(super) fn render(helm: &Path, kubernetes: &str, values: &[(&str, &Value)]) -> String {
    let output = run(helm, kubernetes, values);
    assert!(output.status.success(), "{values:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn check_snapshot(name: &str, text: &str) {
    let path = here().join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    if let Some((number, (is, was))) = text.lines().zip(expected.lines()).enumerate().find(|(_, (is, was))| is != was) {
        panic!("{name} differs in line {}:\n  is  {is}\n  was {was}\nUPDATE_SNAPSHOTS=1 writes it anew", number + 1);
    }
    assert_eq!(text.lines().count(), expected.lines().count(), "{name}: UPDATE_SNAPSHOTS=1 writes it anew");
}

/// Lines that only one of two texts has, in order, each with how often it does more than the other.
fn difference(from: &str, to: &str) -> String {
    let mut counts: BTreeMap<&str, i32> = BTreeMap::new();
    from.lines().for_each(|line| *counts.entry(line).or_default() -= 1);
    to.lines().for_each(|line| *counts.entry(line).or_default() += 1);
    let mut text = String::new();
    for (sign, source, want) in [('-', from, -1), ('+', to, 1)] {
        let mut told = BTreeSet::new();
        for line in source.lines().filter(|line| counts[line].signum() == want) {
            // The copy of the cleanup that a person may apply says again what the hook's own DaemonSet does.
            if told.insert(line) && !line.trim_start().starts_with("spegel-cleanup:") {
                writeln!(text, "{sign} {}x {line}", counts[line].abs()).unwrap();
            }
        }
    }
    text
}

/// The paths of all values that have an effect.
fn paths(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    for (name, inner) in properties(schema).into_iter().flatten().filter(|(_, inner)| !is_idle(inner)) {
        let path = format!("{path}{name}");
        if properties(inner).is_some() {
            paths(inner, &format!("{path}."), found);
        } else {
            found.insert(path);
        }
    }
}

/// The dashboard's own lines are a file of the chart, which another test compares.
fn without_dashboard(objects: &str) -> String {
    let file = fs::read_to_string(chart().join("monitoring/dashboard.json")).unwrap();
    let lines: Vec<String> = file.lines().map(|line| format!("    {line}")).collect();
    objects.replace(&lines.join("\n"), "    (monitoring/dashboard.json)")
}

#[test]
fn each_value_changes_what_it_says() {
    let Some(helm) = helm() else { return };
    // Each with a value that is not the default, and with what else must be set for it to count.
    let cases: BTreeMap<String, Value> =
        serde_json::from_str(&fs::read_to_string(here().join("cases.json")).unwrap()).unwrap();
    let schema = serde_json::from_str(&fs::read_to_string(chart().join("values.schema.json")).unwrap()).unwrap();
    let mut all = BTreeSet::new();
    paths(&schema, "", &mut all);
    assert_eq!(all, cases.keys().cloned().collect(), "each value needs a case, and each case a value");
    let mut text = String::new();
    for (path, case) in &cases {
        let value = &case["value"];
        let with = case["with"].as_object().into_iter().flatten();
        let with: Vec<(&str, &Value)> = with.map(|(path, value)| (path.as_str(), value)).collect();
        let before = without_dashboard(&render(&helm, "1.34.0", &with));
        let after = without_dashboard(&render(&helm, "1.34.0", &[with, vec![(path.as_str(), value)]].concat()));
        let changed = difference(&before, &after);
        assert!(!changed.is_empty(), "{path} changes nothing");
        writeln!(text, "=== {path}: {value}\n{changed}").unwrap();
    }
    check_snapshot("values.snapshot", &text);
}

#[test]
fn the_objects_are_as_expected_on_each_kubernetes() {
    let Some(helm) = helm() else { return };
    let new = render(&helm, "1.34.0", &[]);
    check_snapshot("objects.snapshot", &new);
    check_snapshot("older.snapshot", &difference(&new, &render(&helm, "1.33.9", &[])));
}

fn lint(helm: &Path) {
    let output =
        Command::new(helm).args(["lint", "--strict", "--kube-version", "1.34.0"]).arg(chart()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn helm_finds_nothing_to_complain_about() {
    let Some(helm) = helm() else { return };
    lint(&helm);
}

#[test]
fn helm_4_makes_the_same_objects_and_has_no_complaint() {
    let (Some(three), Some(four)) = (helm(), find(Version::V4)) else { return };
    lint(&four);
    let all = [("networkPolicy.enabled", &Value::Bool(true)), ("startupTaint.enabled", &Value::Bool(true))];
    for (kubernetes, values) in [("1.33.0", &all[..0]), ("1.34.0", &[]), ("1.35.0", &all)] {
        // It leaves more empty lines.
        let changed = difference(&render(&three, kubernetes, values), &render(&four, kubernetes, values));
        assert!(changed.lines().all(|line| line.ends_with("x ")), "{kubernetes}: {changed}");
    }
}

/// Everything that the level `restricted` of Pod Security asks of containers, but for the user, and no token but where it is used.
#[test]
fn containers_have_no_more_rights_than_they_need() {
    let Some(helm) = helm() else { return };
    let objects = render(&helm, "1.34.0", &[]);
    let count = |part: &str| objects.matches(part).count();
    let containers = count("  image: ");
    assert_eq!(containers, 4);
    for part in ["allowPrivilegeEscalation: false", "readOnlyRootFilesystem: true", "type: RuntimeDefault"] {
        assert_eq!(count(part), containers, "{part}");
    }
    assert_eq!(count("drop:\n") + count("drop: [ALL]"), containers);
    assert!(!["privileged:", "hostNetwork", "hostPID", "hostIPC"].iter().any(|part| objects.contains(part)));
    // Those that change containerd's configuration, whose files may be another user's: at the start, and after the uninstall.
    let editors = objects.split("        - name: ").flat_map(|part| part.split("      - name: "));
    let editors: Vec<&str> = editors.filter(|part| part.contains("add:\n")).collect();
    assert!(matches!(editors[..], [one, other] if one.starts_with("configuration") && other.starts_with("cleanup\n")));
    // The pod that waits has a token, and is restricted altogether.
    assert_eq!((count("automountServiceAccountToken: true"), count("runAsNonRoot: true")), (1, 1));
    assert!(!objects.contains("serviceAccountToken:") && !objects.contains("ClusterRole"));
}

/// What asks for a right brings that right and nothing else.
#[test]
fn rights_come_with_what_needs_them() {
    let Some(helm) = helm() else { return };
    let on = Value::Bool(true);
    let zone = render(&helm, "1.34.0", &[("spegel.zoneFromNode", &on)]);
    assert!(zone.contains("resources: [nodes]\n    verbs:\n      - get\n---\n"), "{zone}");
    assert_eq!(zone.matches("serviceAccountToken:").count(), 1);
    let taint = render(&helm, "1.34.0", &[("startupTaint.enabled", &on)]);
    assert!(taint.contains("      - get\n      - patch\n---\n") && taint.contains("kind: ValidatingAdmissionPolicy\n"));
    assert!(!render(&helm, "1.31.0", &[("startupTaint.enabled", &on)]).contains("ValidatingAdmissionPolicy"));
    let given = Value::from("a");
    let both = render(&helm, "1.34.0", &[("spegel.zoneFromNode", &on), ("spegel.zone", &given)]);
    assert!(
        !both.contains("ClusterRole") && !both.contains("--zone-from-node"),
        "a zone that is told is not asked for"
    );
}

/// The Go program's values at their defaults, as its users' files have them.
#[test]
fn the_values_of_the_go_chart_are_accepted_and_unknown_ones_are_not() {
    let Some(helm) = helm() else { return };
    let values = here().join("go-values.yaml");
    let output = Command::new(&helm)
        .args(["template", "spegel"])
        .arg(chart())
        .args(["--kube-version", "1.34.0", "--values"])
        .arg(values)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (path, value) in
        [("spegel.logLevl", "\"INFO\""), ("spegel.mirrorResolveTimeout", "\"20\""), ("service.registry.port", "0")]
    {
        let value: Value = serde_json::from_str(value).unwrap();
        assert!(!run(&helm, "1.34.0", &[(path, &value)]).status.success(), "{path}");
    }
}

/// Selectors cannot change in an upgrade; these are the Go program's.
#[test]
fn selectors_are_those_of_the_go_chart() {
    let Some(helm) = helm() else { return };
    let objects = render(&helm, "1.34.0", &[]);
    let set =
        objects.split("---\n").find(|object| object.contains("kind: DaemonSet\nmetadata:\n  name: spegel\n")).unwrap();
    let labels = "  selector:\n    matchLabels:\n      app.kubernetes.io/component: spegel\n      app.kubernetes.io/name: spegel\n      app.kubernetes.io/instance: spegel\n  template:";
    assert!(set.contains(labels), "{set}");
}

/// A service's name has 63 characters at the most (RFC 1035 labels).
#[test]
fn long_names_are_cut_to_what_kubernetes_takes() {
    let Some(helm) = helm() else { return };
    let long = Value::from("a".repeat(63));
    let objects = render(&helm, "1.34.0", &[("fullnameOverride", &long)]);
    let of_kind = |kind: &str| -> Vec<&str> {
        objects.split("---\n").filter(|object| object.contains(&format!("kind: {kind}\n"))).collect()
    };
    let (services, jobs) = (of_kind("Service"), of_kind("Job"));
    assert_eq!((services.len(), jobs.len()), (4, 1));
    for object in services.iter().chain(&jobs) {
        let name = object.lines().find_map(|line| line.strip_prefix("  name: ")).unwrap();
        assert!(name.len() <= 63, "{name}");
        // The command that repeats the cleanup names the Job.
        assert!(!object.contains("kind: Job") || object.matches(&format!("job {name} ")).count() == 1, "{object}");
    }
}

#[test]
fn what_the_api_server_refuses_is_not_asked_for() {
    let Some(helm) = helm() else { return };
    let yes = Value::Bool(true);
    let objects = render(&helm, "1.34.0", &[("securityContext.privileged", &yes)]);
    let mirror = objects.split("---\n").find(|object| object.contains("            - registry\n")).unwrap();
    assert!(mirror.contains("privileged: true") && !mirror.contains("allowPrivilegeEscalation"), "{mirror}");
    for path in ["nodeSelector", "priorityClassName"] {
        let objects = render(&helm, "1.34.0", &[(path, &Value::Null)]);
        assert!(!objects.contains("<no value>") && !objects.contains("priorityClassName:\n"), "{path}: {objects}");
    }
    for (path, value) in [
        ("cleanup.deadline", Value::from("0h0s")),
        ("cleanup.deadline", Value::from("soon")),
        ("spegel.additionalMirrorTargets", serde_json::json!(["other.test:5000"])),
    ] {
        let output = run(&helm, "1.34.0", &[(path, &value)]);
        assert!(!output.status.success(), "{path}={value}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(path.split('.').next_back().unwrap()), "{path}");
    }
}

/// Helm fills in no new values then.
#[test]
fn reused_values_of_an_older_chart_are_refused_with_what_to_do() {
    let Some(helm) = helm() else { return };
    let output = run(&helm, "1.34.0", &[("startupTaint", &Value::Null)]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("--reset-then-reuse-values"), "{said}");
}

#[test]
fn an_upgrade_that_leaves_containerd_alone_still_cleans_up() {
    let Some(helm) = helm() else { return };
    let template = |more: &[&str]| {
        let mut command = Command::new(&helm);
        command.args(["template", "spegel"]).arg(chart()).args(["--kube-version", "1.34.0"]);
        command.args(["--set", "spegel.containerdMirrorAdd=false"]).args(more);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    assert!(!template(&[]).contains("helm.sh/hook: post-delete"));
    assert!(template(&["--is-upgrade"]).contains("helm.sh/hook: post-delete"));
}
