//! What was found, for people, scripts and scrapers.

use std::fmt::{self, Write as _};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde::Serialize;

use crate::metrics::{Described, Figures, Label};

static FINDINGS: Described = Described::gauge(
    "spegel_doctor_findings",
    "What the checks at the start found, or those at the end while the process stops, by state",
)
.labels(&[
    Label::at_most("check", 32, "the checks of `spegel doctor`"),
    Label::of("state", &["good", "note", "unknown", "warning", "failure"]),
]);

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Good,
    /// Worth knowing, and no fault.
    Note,
    /// It cannot be seen from here.
    Unknown,
    /// Pulls go through the mirror, and something is wrong all the same.
    Warning,
    /// It keeps pulls from going through the mirror.
    Failure,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// How it is.
    pub state: State,
    /// What was found, in a sentence.
    pub said: String,
    /// What to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

/// All findings.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether nothing keeps pulls from going through the mirror.
    good: bool,
    checks: Vec<Finding>,
}

/// How many findings of each state each check had, when the process started or while it stops.
#[derive(Clone, Debug, Default)]
pub struct DoctorMetrics(Family<Labels, Gauge>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    check: &'static str,
    state: &'static str,
}

// === impl State ===

impl State {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Failure => "failure",
        }
    }
}

// === impl Finding ===

impl Finding {
    fn new(check: &'static str, state: State, said: impl Into<String>, change: Option<String>) -> Self {
        Self { check, state, said: said.into(), change }
    }

    pub(super) fn good(check: &'static str, said: impl Into<String>) -> Self {
        Self::new(check, State::Good, said, None)
    }

    pub(super) fn note(check: &'static str, said: impl Into<String>) -> Self {
        Self::new(check, State::Note, said, None)
    }

    pub(super) fn unknown(check: &'static str, said: impl Into<String>, change: impl Into<String>) -> Self {
        Self::new(check, State::Unknown, said, Some(change.into()))
    }

    pub(super) fn warning(check: &'static str, said: impl Into<String>, change: impl Into<String>) -> Self {
        Self::new(check, State::Warning, said, Some(change.into()))
    }

    pub(super) fn failure(check: &'static str, said: impl Into<String>, change: impl Into<String>) -> Self {
        Self::new(check, State::Failure, said, Some(change.into()))
    }
}

// === impl Report ===

impl Report {
    pub(super) fn new(checks: Vec<Finding>) -> Self {
        Self { good: checks.iter().all(|finding| finding.state != State::Failure), checks }
    }

    /// Whether nothing keeps pulls from going through the mirror, as far as can be seen.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.good
    }

    /// What was found.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.checks
    }

    /// How many findings have this state.
    #[must_use]
    pub fn count(&self, state: State) -> usize {
        self.checks.iter().filter(|finding| finding.state == state).count()
    }

    /// The findings of this state in one line; nothing if there are none.
    #[must_use]
    pub fn line(&self, state: State) -> Option<String> {
        let told = self.checks.iter().filter(|finding| finding.state == state);
        let told: Vec<String> = told.map(|finding| format!("{}: {}", finding.check, finding.said)).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}

/// A line for each finding, what to change below it, and a last line that sums up.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
        for Finding { check, state, said, change } in &self.checks {
            writeln!(f, "{:<8} {check:<width$}  {said}", state.name())?;
            if let Some(change) = change {
                writeln!(f, "{:8} {:width$}  -> {change}", "", "")?;
            }
        }
        let mut rest = String::new();
        for state in [State::Warning, State::Unknown] {
            let count = self.count(state);
            if count > 0 {
                let plural = if count == 1 || state == State::Unknown { "" } else { "s" };
                write!(rest, ", {count} {}{plural}", state.name())?;
            }
        }
        match self.count(State::Failure) {
            0 => writeln!(f, "\nNothing keeps pulls from going through the mirror{rest}."),
            1 => writeln!(f, "\n1 failure keeps pulls from going through the mirror{rest}."),
            count => writeln!(f, "\n{count} failures keep pulls from going through the mirror{rest}."),
        }
    }
}

// === impl DoctorMetrics ===

impl DoctorMetrics {
    /// Adds them to what is scraped.
    pub fn register(figures: &mut Figures) -> Self {
        let this = Self::default();
        figures.register(&FINDINGS, this.0.clone());
        this
    }

    /// Tells what was found.
    pub fn set(&self, report: &Report) {
        self.0.clear();
        for finding in report.findings() {
            self.0.get_or_create(&Labels { check: finding.check, state: finding.state.name() }).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_by_people_and_scripts() {
        let report = Report::new(vec![
            Finding::good("one", "it is there"),
            Finding::warning("another", "it is late", "wait"),
            Finding::failure("one", "it is gone", "look for it"),
        ]);
        assert!(!report.is_good());
        let text = report.to_string();
        assert!(text.contains("failure  one      it is gone\n                  -> look for it\n"), "{text}");
        assert!(text.ends_with("1 failure keeps pulls from going through the mirror, 1 warning.\n"), "{text}");
        let value = serde_json::to_value(&report).unwrap_or_default();
        assert_eq!((&value["good"], &value["checks"][2]["state"]), (&false.into(), &"failure".into()));
        let mut figures = Figures::default();
        DoctorMetrics::register(&mut figures).set(&report);
        let text = crate::metrics::encode(&figures, crate::metrics::Format::OpenMetrics).unwrap_or_default();
        assert!(text.contains("spegel_doctor_findings{check=\"one\",state=\"failure\"} 1"), "{text}");
    }

    #[test]
    fn warnings_are_no_failure() {
        let report = Report::new(vec![Finding::warning("a", "b", "c"), Finding::unknown("a", "b", "c")]);
        assert!(report.is_good());
        assert!(report.to_string().contains("Nothing keeps pulls"));
    }
}
