//! The router's figures.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::metrics::{Described, Figures as Shown, Label};

static MEMBERS: Described =
    Described::gauge("spegel_router_members", "Nodes that speak the member protocol, without this one");
static PEERS: Described =
    Described::gauge("spegel_router_table_peers", "Peers in the routing table, to which there is a connection");
static RECORDS: Described =
    Described::gauge("spegel_router_records", "Records of other nodes' content that this node holds");
static QUEUE: Described =
    Described::gauge("spegel_router_advertise_queue", "Keys of this node that wait to be told to peers that are there");
static AGE: Described = Described::gauge(
    "spegel_router_advertise_age_seconds",
    "How long the oldest key that waits to be told to peers has waited",
);
static LOOKUPS: Described =
    Described::counter("spegel_router_lookups", "Lookups by how they ended").labels(&[Label::of("outcome", &OUTCOMES)]);
static HOPS: Described = Described::histogram(
    "spegel_router_lookup_hops",
    "How many peers in a row had to be asked until one named the first provider",
);
static MESSAGES: Described =
    Described::counter("spegel_router_messages", "Messages to and from peers by kind").labels(&[
        Label::of("direction", &DIRECTIONS),
        Label::at_most("kind", 16, "the kinds of Kademlia's and the members' messages"),
    ]);
static REFUSED: Described = Described::counter("spegel_router_refused", "What peers said and was not taken, by reason")
    .labels(&[Label::of("reason", &REASONS)]);

const OUTCOMES: [&str; 7] = ["found", "none", "abandoned", "timed_out", "cached", "joined", "refused"];
const DIRECTIONS: [&str; 2] = ["sent", "received"];
const REASONS: [&str; 5] = ["undecodable", "key", "address", "provider", "card"];

/// The router's figures. Without a registry they are counted all the same, and nobody sees them.
#[derive(Clone, Debug)]
pub struct RouterMetrics(pub(super) Arc<Figures>);

/// The figures themselves.
#[derive(Debug)]
pub(super) struct Figures {
    pub(super) members: Gauge,
    pub(super) peers: Gauge,
    pub(super) records: Gauge,
    pub(super) advertise_queue: Gauge,
    pub(super) advertise_age: Gauge,
    pub(super) lookups: Family<OutcomeLabel, Counter>,
    pub(super) hops: Histogram,
    pub(super) messages: Family<MessageLabels, Counter>,
    pub(super) refused: Family<ReasonLabel, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OutcomeLabel {
    outcome: &'static str,
}

/// How a lookup ended; [`OUTCOMES`] has their names in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Somebody offers the key.
    Found,
    /// Nobody does, by all who would know.
    None,
    /// Whoever asked stopped listening before anybody was found.
    Abandoned,
    /// The time was over before all had answered, and nobody was found.
    TimedOut,
    /// It was answered with what a lookup just before had found.
    Cached,
    /// It shares the lookup of the same key that was under way.
    Joined,
    /// Too many were under way.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct MessageLabels {
    direction: &'static str,
    kind: &'static str,
}

/// Whose message it is; [`DIRECTIONS`] has their names in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// Ours.
    Sent,
    /// A peer's.
    Received,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabel {
    reason: &'static str,
}

/// Why what a peer said was not taken; [`REASONS`] has their names in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// It is no message, or too long.
    Undecodable,
    /// Its key is none of this network.
    Key,
    /// It names no address that could be the peer's.
    Address,
    /// It names another provider than the peer that told it.
    Provider,
    /// A card without its member's signature, or without an address.
    Card,
}

// === impl RouterMetrics ===

impl RouterMetrics {
    /// Registers the figures.
    pub fn register(shown: &mut Shown) -> Self {
        let metrics = Self::default();
        let figures = &metrics.0;
        shown.register(&MEMBERS, figures.members.clone());
        shown.register(&PEERS, figures.peers.clone());
        shown.register(&RECORDS, figures.records.clone());
        shown.register(&QUEUE, figures.advertise_queue.clone());
        shown.register(&AGE, figures.advertise_age.clone());
        shown.register(&LOOKUPS, figures.lookups.clone());
        shown.register(&HOPS, figures.hops.clone());
        shown.register(&MESSAGES, figures.messages.clone());
        shown.register(&REFUSED, figures.refused.clone());
        metrics
    }
}

impl Default for RouterMetrics {
    fn default() -> Self {
        Self(Arc::new(Figures {
            members: Gauge::default(),
            peers: Gauge::default(),
            records: Gauge::default(),
            advertise_queue: Gauge::default(),
            advertise_age: Gauge::default(),
            lookups: Family::default(),
            hops: Histogram::new((1..=8).map(f64::from)),
            messages: Family::default(),
            refused: Family::default(),
        }))
    }
}

// === impl Figures ===

impl Figures {
    pub(super) fn lookup(&self, outcome: Outcome) {
        let outcome = OUTCOMES[outcome as usize];
        self.lookups.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    pub(super) fn message(&self, direction: Direction, kind: &'static str, count: u64) {
        let direction = DIRECTIONS[direction as usize];
        self.messages.get_or_create(&MessageLabels { direction, kind }).inc_by(count);
    }

    /// How many messages of a kind were sent.
    #[cfg(test)]
    pub(super) fn sent(&self, kind: &'static str) -> u64 {
        self.messages.get_or_create(&MessageLabels { direction: "sent", kind }).get()
    }

    /// How much was refused for a reason.
    #[cfg(test)]
    pub(super) fn refused(&self, reason: &'static str) -> u64 {
        self.refused.get_or_create(&ReasonLabel { reason }).get()
    }

    pub(super) fn refuse(&self, reason: Reason) {
        let reason = REASONS[reason as usize];
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}
