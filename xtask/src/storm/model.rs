//! The model beside what really happened: the same scenario, simulated.

use spegel_benches::storm::Stormed;

use super::report::Outcome;
use super::scenario::Scenario;

/// How far the model may be off.
const CLOSE: f64 = 0.2;

/// One figure, as it was and as the model has it.
struct Figure {
    what: &'static str,
    real: f64,
    model: f64,
}

/// Simulates the scenario, and says how far it is off. It takes chance's first number, and milliseconds.
pub(super) fn beside(scenario: Scenario, stormed: &Stormed) -> String {
    let model = Outcome::of(scenario);
    let figures = [
        Figure { what: "one pull alone (s)", real: stormed.solo, model: model.solo.as_secs_f64() },
        Figure { what: "the last node (s)", real: stormed.last(), model: model.last.as_secs_f64() },
        Figure { what: "the slowest pull (s)", real: stormed.slowest(), model: model.slowest.as_secs_f64() },
        Figure { what: "upstream (times the image)", real: stormed.upstream_share(), model: model.upstream },
    ];
    figures.iter().fold("beside the model:\n".to_owned(), |text, figure| text + &figure.line())
}

// === impl Figure ===

impl Figure {
    /// Part of what really was; without anything, there is nothing to be part of.
    fn off(&self) -> f64 {
        if self.real == self.model { 0.0 } else { (self.model - self.real) / self.real }
    }

    fn line(&self) -> String {
        let Self { what, real, model } = self;
        let off = self.off();
        let verdict = if off.abs() <= CLOSE { "within 20 %" } else { "FURTHER than 20 %" };
        format!("  {what:<28} {real:>7.2}  model {model:>7.2}  {:>+5.0} %, {verdict}\n", 100.0 * off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_is_close_and_more_is_not() {
        let line = |real, model| Figure { what: "x", real, model }.line();
        assert!(line(10.0, 12.0).contains("+20 %, within"));
        assert!(line(10.0, 7.5).contains("-25 %, FURTHER"));
        assert!(line(0.0, 0.0).contains("+0 %, within"));
        assert!(line(0.0, 1.0).contains("FURTHER"));
    }
}
