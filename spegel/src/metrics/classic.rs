//! Prometheus's older text format, which whatever does not ask for OpenMetrics reads.
//!
//! The samples are the same in both. What differs is the lines about them: the older
//! [format](https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format) has no units and no end, its types are told of the
//! samples' own names, and `info` and `unknown` are none of its types.

use std::fmt::Write as _;

/// The content type of [`from_openmetrics`]'s text.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the lines about one metric have said so far.
#[derive(Default)]
struct About<'a> {
    name: &'a str,
    help: Option<&'a str>,
}

/// The same figures in the older format.
pub(super) fn from_openmetrics(text: &str) -> String {
    let mut classic = String::with_capacity(text.len());
    let mut about = About::default();
    for line in text.lines() {
        match line.strip_prefix("# ").map(|rest| rest.splitn(3, ' ').collect::<Vec<_>>()).as_deref() {
            None => {
                classic.push_str(line);
                classic.push('\n');
            }
            Some(["HELP", name, help]) => about = About { name, help: Some(help) },
            Some(["TYPE", name, kind]) => {
                let help = about.help.take().filter(|_| about.name == *name);
                tell(&mut classic, name, kind, help);
            }
            // Units, which the names end with, and the end.
            Some(_) => {}
        }
    }
    classic
}

/// Says what a metric is, of the name that its samples have.
fn tell(classic: &mut String, name: &str, kind: &str, help: Option<&str>) {
    let (suffix, kind) = match kind {
        "counter" => ("_total", kind),
        "info" => ("_info", "gauge"),
        "gauge" | "histogram" | "summary" => ("", kind),
        _ => ("", "untyped"),
    };
    if let Some(help) = help {
        // A quotation mark is escaped in the newer format only.
        let _ = writeln!(classic, "# HELP {name}{suffix} {}", help.replace("\\\"", "\""));
    }
    let _ = writeln!(classic, "# TYPE {name}{suffix} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_told_of_the_samples_names() {
        let text = "# HELP cpu_seconds User \\\"and\\\" system.\n# TYPE cpu_seconds counter\n# UNIT cpu_seconds seconds\n\
            cpu_seconds_total 1.5\n# HELP node Who.\n# TYPE node info\nnode_info{node=\"# a\"} 1\n# HELP took_seconds Time.\n\
            # TYPE took_seconds histogram\n# UNIT took_seconds seconds\ntook_seconds_bucket{le=\"+Inf\"} 0\n# TYPE odd unknown\nodd 1\n# EOF\n";
        let classic = "# HELP cpu_seconds_total User \"and\" system.\n# TYPE cpu_seconds_total counter\ncpu_seconds_total 1.5\n\
            # HELP node_info Who.\n# TYPE node_info gauge\nnode_info{node=\"# a\"} 1\n# HELP took_seconds Time.\n\
            # TYPE took_seconds histogram\ntook_seconds_bucket{le=\"+Inf\"} 0\n# TYPE odd untyped\nodd 1\n";
        assert_eq!(from_openmetrics(text), classic);
    }
}
