//! The figures of a run and the aims that they miss. `cargo xtask bench router` reads the lines that begin with `figure `.

use std::fmt;

/// What a figure is to be.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum Aim {
    AtMost(f64),
    AtLeast(f64),
}

/// What was measured on one network.
#[derive(Debug)]
pub(in super::super) struct Report {
    network: String,
    /// What stands before each figure's name.
    prefix: &'static str,
    missed: Vec<String>,
}

// === impl Aim ===

impl Aim {
    /// What is no number is no success.
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(most) => write!(f, "≤ {most}"),
            Self::AtLeast(least) => write!(f, "≥ {least}"),
        }
    }
}

// === impl Report ===

impl Report {
    pub(in super::super) fn new(network: impl ToString) -> Self {
        Self { network: network.to_string(), prefix: "", missed: Vec::new() }
    }

    pub(super) fn with_prefix(self, prefix: &'static str) -> Self {
        Self { prefix, ..self }
    }

    pub(in super::super) fn figure(&self, what: &str, value: f64) {
        println!("figure {}|{}{what}|{value:.3}", self.network, self.prefix);
    }

    /// A figure that is to be like that. One that is not ends nothing: all of them are shown.
    pub(in super::super) fn check(&mut self, what: &str, value: f64, aim: Aim) {
        let met = aim.is_met(value);
        println!(
            "figure {}|{}{what}|{value:.3}|{aim}|{}",
            self.network,
            self.prefix,
            if met { "met" } else { "missed" }
        );
        if !met {
            self.missed.push(format!("{}{what} is {value:.3}, and was to be {aim}", self.prefix));
        }
    }

    /// What was missed.
    pub(in super::super) fn missed(self) -> Vec<String> {
        self.missed
    }
}
