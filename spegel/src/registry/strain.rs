//! Why a node takes no new work for now.

use std::sync::atomic::{AtomicU8, Ordering};

/// What this process is about to run out of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strain {
    /// Open files.
    Descriptors,
    /// Memory of its control group.
    Memory,
}

/// Why a request is refused that could be answered at another time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The process is told to end.
    Stopping,
    /// The connection is one too many.
    Connections,
    /// Something is about to run out.
    Strained(Strain),
}

/// What it is now, if anything.
#[derive(Debug, Default)]
pub(super) struct Strained(AtomicU8);

// === impl Refused ===

impl Refused {
    /// What the client is told.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Stopping => "this node is stopping",
            Self::Connections => "this node has as many connections as it may",
            Self::Strained(Strain::Descriptors) => "this node has as many open files as it may",
            Self::Strained(Strain::Memory) => "this node has nearly as much memory in use as it may",
        }
    }

    /// The same as a label's value.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Stopping => "stopping",
            Self::Connections => "connections",
            Self::Strained(Strain::Descriptors) => "descriptors",
            Self::Strained(Strain::Memory) => "memory",
        }
    }
}

// === impl Strained ===

impl Strained {
    pub(super) fn set(&self, strain: Option<Strain>) {
        let number = match strain {
            None => 0,
            Some(Strain::Descriptors) => 1,
            Some(Strain::Memory) => 2,
        };
        self.0.store(number, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Option<Strain> {
        match self.0.load(Ordering::Relaxed) {
            1 => Some(Strain::Descriptors),
            2 => Some(Strain::Memory),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_is_what_it_is() {
        let strained = Strained::default();
        for strain in [None, Some(Strain::Memory), Some(Strain::Descriptors), None] {
            strained.set(strain);
            assert_eq!(strained.get(), strain);
        }
    }
}
