//! The chart's `values.yaml` and the table in its README, both made from `values.schema.json`, so that a value is described in one place.

#[cfg(test)]
mod monitoring;
#[cfg(test)]
mod rendered;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value};

use crate::helm::Version;

/// Between these lines of the README stands what is made.
const MARKS: (&str, &str) = ("<!-- values: made by `cargo xtask chart` -->\n", "<!-- end of values -->\n");

#[derive(Debug, clap::Args)]
pub(crate) struct Chart {
    /// Write nothing; fail if something differs
    #[arg(long)]
    check: bool,
    /// Build the Helm of the chart's tests first, with Go, if there is none
    #[arg(long)]
    build_helm: bool,
    /// Build Helm 4 as well, which takes minutes: the chart's tests then use both
    #[arg(long)]
    build_helm4: bool,
}

// === impl Chart ===

impl Chart {
    /// Writes, or says what differs. False if something does.
    pub(crate) fn run(&self, root: &Path) -> Result<bool> {
        for (wanted, version) in [(self.build_helm, Version::V3), (self.build_helm4, Version::V4)] {
            if wanted {
                println!("{}", crate::helm::helm(version)?.display());
            }
        }
        let chart = root.join("charts/spegel");
        let schema = fs::read_to_string(chart.join("values.schema.json")).context("read values.schema.json")?;
        let schema: Value = serde_json::from_str(&schema).context("values.schema.json")?;
        check_versions(&fs::read_to_string(chart.join("Chart.yaml"))?, env!("CARGO_PKG_VERSION"))?;
        let readme = fs::read_to_string(chart.join("README.md")).context("read the chart's README.md")?;
        let made = [("values.yaml", values(&schema)?), ("README.md", with_table(&readme, &table(&schema)?)?)];
        let mut in_order = true;
        for (name, text) in made {
            let path = chart.join(name);
            if fs::read_to_string(&path).unwrap_or_default() == text {
                continue;
            }
            if self.check {
                println!("{} is not what values.schema.json makes it: run `cargo xtask chart`", path.display());
                in_order = false;
            } else {
                fs::write(&path, text)?;
            }
        }
        Ok(in_order)
    }
}

/// The chart has the program's version.
fn check_versions(chart: &str, version: &str) -> Result<()> {
    for line in [format!("version: {version}"), format!("appVersion: v{version}")] {
        ensure!(chart.lines().any(|found| found == line), "Chart.yaml must have the line `{line}`");
    }
    Ok(())
}

fn properties(schema: &Value) -> Option<&Map<String, Value>> {
    schema.get("properties")?.as_object()
}

fn description<'a>(path: &str, schema: &'a Value) -> Result<&'a str> {
    schema["description"].as_str().with_context(|| format!("{path} has no description"))
}

/// Accepted, but without a default and without effect.
fn is_idle(schema: &Value) -> bool {
    match properties(schema) {
        Some(inner) => inner.values().all(is_idle),
        None => schema.get("default").is_none(),
    }
}

// === values.yaml ===

fn values(schema: &Value) -> Result<String> {
    let mut text = "# Made from values.schema.json by `cargo xtask chart`: change it there.\n".to_owned();
    write_values(&mut text, schema, "", 0)?;
    Ok(text)
}

fn write_values(text: &mut String, schema: &Value, path: &str, depth: usize) -> Result<()> {
    let indent = "  ".repeat(depth);
    for (name, inner) in properties(schema).into_iter().flatten().filter(|(_, inner)| !is_idle(inner)) {
        let path = format!("{path}{name}");
        if depth == 0 {
            text.push('\n');
        }
        for line in wrapped(description(&path, inner)?, 118 - indent.len()) {
            writeln!(text, "{indent}# {line}")?;
        }
        if properties(inner).is_some() {
            writeln!(text, "{indent}{name}:")?;
            write_values(text, inner, &format!("{path}."), depth + 1)?;
        } else {
            write!(text, "{indent}{name}:")?;
            write_yaml(text, &inner["default"], depth + 1)?;
        }
    }
    Ok(())
}

/// A value after `name:`, at its own depth if it takes lines of its own.
fn write_yaml(text: &mut String, value: &Value, depth: usize) -> Result<()> {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            for (key, value) in map {
                write!(text, "{indent}{key}:")?;
                write_yaml(text, value, depth + 1)?;
            }
        }
        // A scalar, or a list, is JSON, which is YAML too.
        other => writeln!(text, " {other}")?,
    }
    Ok(())
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

// === README.md ===

fn with_table(readme: &str, table: &str) -> Result<String> {
    let missing = "the chart's README has lost a line that shows where the values stand";
    let (before, rest) = readme.split_once(MARKS.0).context(missing)?;
    let (_, after) = rest.split_once(MARKS.1).context(missing)?;
    Ok(format!("{before}{}{table}{}{after}", MARKS.0, MARKS.1))
}

fn table(schema: &Value) -> Result<String> {
    let mut rows = Vec::new();
    collect(&mut rows, schema, "")?;
    let mut text = "| value | default | what it does |\n|---|---|---|\n".to_owned();
    for (path, default, description) in rows {
        writeln!(text, "| `{path}` | {default} | {} |", description.replace('|', "\\|"))?;
    }
    Ok(text)
}

fn collect(rows: &mut Vec<(String, String, String)>, schema: &Value, path: &str) -> Result<()> {
    for (name, inner) in properties(schema).into_iter().flatten() {
        let path = format!("{path}{name}");
        let description = description(&path, inner)?;
        if is_idle(inner) {
            rows.push((path, String::new(), description.to_owned()));
        } else if properties(inner).is_some() {
            collect(rows, inner, &format!("{path}."))?;
        } else {
            let choices = inner["enum"].as_array().map(|choices| {
                let choices: Vec<&str> = choices.iter().filter_map(Value::as_str).collect();
                format!(" One of {}.", choices.join(", "))
            });
            let default = format!("`{}`", inner["default"].to_string().replace('|', "\\|"));
            rows.push((path, default, description.to_owned() + &choices.unwrap_or_default()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    #[test]
    fn values_and_table_say_what_the_schema_says() {
        let schema = json!({ "properties": {
            "port": { "description": "A port.", "default": 5000 },
            "level": { "description": "A level.", "default": "a", "enum": ["a", "b"] },
            "inner": { "description": "Things.", "properties": {
                "list": { "description": "A list.", "default": [{ "k": "v" }] },
                "map": { "description": "A map.", "default": { "a": { "b": true } } },
            } },
            "later": { "description": "Nothing yet.", "properties": { "x": { "description": "Nothing." } } },
        } });
        let values = values(&schema).unwrap();
        let inner =
            "# Things.\ninner:\n  # A list.\n  list: [{\"k\":\"v\"}]\n  # A map.\n  map:\n    a:\n      b: true\n";
        for part in ["\n# A port.\nport: 5000\n", "\n# A level.\nlevel: \"a\"\n", inner] {
            assert!(values.contains(part), "{values}");
        }
        assert!(!values.contains("later"));
        let table = table(&schema).unwrap();
        assert!(table.contains("| `level` | `\"a\"` | A level. One of a, b. |\n"), "{table}");
        assert!(table.contains("| `later` |  | Nothing yet. |\n"), "{table}");
    }

    #[test]
    fn what_is_made_stands_between_its_lines() {
        let readme = format!("before\n{}old\n{}after\n", MARKS.0, MARKS.1);
        assert_eq!(with_table(&readme, "new\n").unwrap(), format!("before\n{}new\n{}after\n", MARKS.0, MARKS.1));
        assert!(with_table("nothing", "").is_err());
    }

    #[test]
    fn versions_agree() {
        assert!(check_versions("version: 1.2.3\nappVersion: v1.2.3\n", "1.2.3").is_ok());
        assert!(check_versions("version: 1.2.3\nappVersion: v1.2.2\n", "1.2.3").is_err());
    }

    #[test]
    fn the_chart_is_what_its_schema_makes_it() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        assert!(
            Chart { check: true, build_helm: false, build_helm4: false }.run(root).unwrap(),
            "run `cargo xtask chart`"
        );
    }
}
