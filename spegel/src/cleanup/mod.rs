//! The end of an installation: each node takes back what `configuration` wrote, and one process waits until all of them have.
//!
//! A [`Cleaner`] runs on each node and does the work anew for each probe that it answers: a mirror's pod that is still on
//! its way out may write the configuration once more, and what it wrote is gone again before the next answer. [`wait()`]
//! probes all nodes in rounds, and believes only several good rounds in a row. How many nodes there are it learns from the
//! Kubernetes API ([`ApiNodes`]): DNS ([`DnsNodes`]) knows only the nodes whose pod runs already, which is how the
//! Go program reports success while a node keeps its dead mirror.

mod cleaner;
mod nodes;
mod probe;
mod wait;

pub use cleaner::{Cleaned, Cleaner, CleanupError};
pub use nodes::{ApiNodes, DnsNodes, Node, Nodes, View};
pub use probe::{HttpProbe, Probe};
pub use wait::{Unfinished, WaitSettings, wait};
