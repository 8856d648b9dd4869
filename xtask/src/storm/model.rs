//! The model beside what really happened: the same scenario, simulated.

use std::time::Duration;

use spegel_benches::storm::{Storm as Lab, Stormed, Victim};

use super::Storm;
use super::report::Outcome;
use super::scenario::{Kill, Scenario};

/// How far the model may be off.
const CLOSE: f64 = 0.2;

/// One figure, as it was and as the model has it.
struct Figure {
    what: &'static str,
    real: f64,
    model: f64,
}

/// What upstream's first byte takes in the lab, where it is no further away than the nodes.
const FIRST_BYTE: Duration = Duration::from_millis(20);

/// What was made with real nodes, for the model.
pub(super) fn scenario(name: &str, storm: &Storm, lab: &Lab) -> Scenario {
    let bytes = |mbit: u32| f64::from(mbit) * 125e3;
    Scenario {
        name: name.to_owned(),
        nodes: lab.nodes - usize::from(lab.seeded),
        upstream: bytes(lab.upstream),
        node: bytes(lab.node),
        layers: lab.layers,
        size: lab.size,
        stagger: lab.stagger,
        kill: lab.kill.map(|victim| match victim {
            Victim::Root => Kill::Root,
            Victim::Inner => Kill::Inner,
        }),
        slow: usize::from(lab.slow_node),
        refuse: lab.refuse,
        mute: usize::from(storm.mixed) * lab.nodes / 2,
        seeds: usize::from(lab.seeded),
        first_byte: FIRST_BYTE,
        storm: storm.held(),
        ..Scenario::default()
    }
}

/// How far the model is off.
pub(super) fn beside(model: &Outcome, stormed: &Stormed) -> String {
    let figures = [
        Figure { what: "one pull alone (s)", real: stormed.solo, model: model.solo.as_secs_f64() },
        Figure { what: "the last node (s)", real: stormed.last(), model: model.last.as_secs_f64() },
        Figure { what: "the slowest pull (s)", real: stormed.slowest(), model: model.slowest.as_secs_f64() },
        Figure { what: "upstream (times the image)", real: stormed.upstream_share(), model: model.upstream },
    ];
    figures.iter().fold("beside the model:\n".to_owned(), |text, figure| text + &figure.line())
}

/// The model's word for what really was so much, for a table.
pub(super) fn cell(real: f64, model: f64) -> String {
    let is_close = Figure { what: "", real, model }.off().abs() <= CLOSE + 1e-9;
    format!("{model:.2}{}", if is_close { "" } else { ", further than 20 %" })
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
