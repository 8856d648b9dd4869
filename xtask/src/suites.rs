//! Commands with a time cap each, and what their tests said.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// A command whose process group is ended when its time is over.
#[derive(Debug)]
pub(crate) struct Suite {
    pub(crate) name: &'static str,
    pub(crate) limit: Duration,
    pub(crate) command: Vec<String>,
    pub(crate) environment: Vec<(&'static str, &'static str)>,
}

/// How a suite ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Passed,
    Failed,
    TimedOut,
}

/// Counted from libtest's result lines, and from the reasons that skipped tests print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

/// A suite's line in the table.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) end: End,
    pub(crate) time: Duration,
    pub(crate) counts: Counts,
}

// === impl Suite ===

impl Suite {
    /// Runs the command with its output shown and counted.
    ///
    /// coreutils' `timeout` gives it a process group and ends that with its time, or when this process ends (which the kernel
    /// tells `timeout`, for `setpriv` asked it to): nothing that a test started is left behind.
    ///
    /// # Errors
    /// The command cannot be started.
    pub(crate) fn run(&self) -> Result<Outcome> {
        println!("\n=== {}: {}", self.name, self.command.join(" "));
        let start = Instant::now();
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "timeout", "--kill-after=10"])
            .arg(self.limit.as_secs().to_string())
            .args(&self.command)
            .envs(self.environment.iter().copied())
            .current_dir(crate::root())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start setpriv and timeout, of util-linux and coreutils")?;
        let mut counts = Counts::default();
        let mut output = BufReader::new(child.stdout.take().context("the suite has no output")?);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line)? > 0 {
            std::io::stdout().write_all(&line)?;
            counts.read(&String::from_utf8_lossy(&line));
            line.clear();
        }
        let status = child.wait()?;
        let end = match status.code() {
            Some(0) => End::Passed,
            // `timeout` says 124, or 137 where SIGTERM was not enough.
            Some(124 | 137) => End::TimedOut,
            _ => End::Failed,
        };
        if end == End::TimedOut {
            println!("{}: ended after its {} s", self.name, self.limit.as_secs());
        }
        Ok(Outcome { name: self.name, end, time: start.elapsed(), counts })
    }
}

// === impl Counts ===

impl Counts {
    fn read(&mut self, line: &str) {
        // A test that cannot run says why and returns; to libtest it passed.
        if line.contains("skipped: ") {
            self.skipped += 1;
            self.passed = self.passed.saturating_sub(1);
        }
        let Some((_, result)) = line.split_once("test result: ") else { return };
        let number = |what: &str| {
            let (before, _) = result.split_once(what)?;
            before.trim_end().rsplit(' ').next()?.parse::<usize>().ok()
        };
        self.passed += number("passed").unwrap_or(0);
        self.failed += number("failed").unwrap_or(0);
        self.skipped += number("ignored").unwrap_or(0);
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// The table of suites, and below it the line with the sums. A suite without tests of its own counts as one.
pub(crate) fn report(outcomes: &[Outcome]) -> (String, Value, bool) {
    let mut text =
        format!("\n{:<10} {:<10} {:>8} {:>7} {:>7} {:>8}\n", "suite", "result", "time", "passed", "failed", "skipped");
    let mut sum = Counts::default();
    let mut good = true;
    for outcome in outcomes {
        let mut counts = outcome.counts;
        let result = match outcome.end {
            End::Passed => "ok",
            End::Failed => "FAILED",
            End::TimedOut => "TIMED OUT",
        };
        if outcome.end != End::Passed && counts.failed == 0 {
            counts.failed = 1;
        } else if counts == Counts::default() {
            counts.passed = 1;
        }
        good &= outcome.end == End::Passed;
        sum.add(counts);
        let time = outcome.time.as_secs_f64();
        let Counts { passed, failed, skipped } = counts;
        let _ = writeln!(text, "{:<10} {result:<10} {time:>6.1} s {passed:>7} {failed:>7} {skipped:>8}", outcome.name);
    }
    let _ = write!(text, "\n{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.skipped);
    let suites: Vec<Value> = outcomes
        .iter()
        .map(|outcome| json!({ "name": outcome.name, "passed": outcome.end == End::Passed, "seconds": outcome.time.as_secs_f64() }))
        .collect();
    let value = json!({ "suites": suites, "passed": sum.passed, "failed": sum.failed, "skipped": sum.skipped });
    (text, value, good)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn suite(name: &'static str, script: &str, limit: u64) -> Suite {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        Suite { name, limit: Duration::from_secs(limit), command, environment: vec![] }
    }

    #[test]
    fn results_are_counted_over_binaries() {
        let mut counts = Counts::default();
        for line in [
            "test a::b ... ok",
            "test e2e::pull ... skipped: network namespaces need root",
            "test result: ok. 7 passed; 0 failed; 2 ignored; 0 measured; 5 filtered out; finished in 0.36s",
            "test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ] {
            counts.read(line);
        }
        assert_eq!(counts, Counts { passed: 10, failed: 1, skipped: 3 });
    }

    #[test]
    fn ends_are_told_apart() {
        assert_eq!(suite("good", "exit 0", 60).run().unwrap().end, End::Passed);
        assert_eq!(suite("bad", "exit 3", 60).run().unwrap().end, End::Failed);
        let late = suite("late", "sleep 600 & echo $!; wait", 1).run().unwrap();
        assert_eq!(late.end, End::TimedOut);
        assert!(late.time < Duration::from_secs(30));
    }

    #[test]
    fn a_failed_suite_without_tests_counts() {
        let counts = Counts { passed: 4, failed: 0, skipped: 0 };
        let outcomes = [
            Outcome { name: "format", end: End::Failed, time: Duration::ZERO, counts: Counts::default() },
            Outcome { name: "unit", end: End::Passed, time: Duration::ZERO, counts },
        ];
        let (text, _, good) = report(&outcomes);
        assert!(!good && text.ends_with("4 passed, 1 failed, 0 skipped"), "{text}");
    }
}
