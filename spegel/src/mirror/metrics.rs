//! What the mirror counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::storms::StormFigures;

const RESOLVE_SECONDS: [f64; 12] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const HOLD_SECONDS: [f64; 10] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0];

/// The mirror's figures.
#[derive(Clone, Debug)]
pub struct MirrorMetrics {
    resolve: Family<RouterLabel, Histogram>,
    attempts: Family<AttemptLabel, Counter>,
    relays: Family<RelayLabel, Counter>,
    resumes: Counter,
    wrong: Counter,
    outcasts: Counter,
    holds: Family<AttemptLabel, Histogram>,
    /// What an operator can see of storms.
    pub(super) storm: StormFigures,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouterLabel {
    router: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RelayLabel {
    end: &'static str,
}

/// How a request to a peer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    Unreachable,
    Late,
    Lost,
    Malformed,
    Refused,
    Busy,
    WrongBytes,
}

/// How a relayed body ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Complete,
    PeerBroke,
    ClientLeft,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Unreachable => "unreachable",
            Self::Late => "late",
            Self::Lost => "lost",
            Self::Malformed => "malformed",
            Self::Refused => "refused",
            Self::Busy => "busy",
            Self::WrongBytes => "wrong_bytes",
        }
    }
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::PeerBroke => "peer_broke",
            Self::ClientLeft => "client_left",
        }
    }
}

impl MirrorMetrics {
    /// Adds the mirror's figures to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            resolve: Family::new_with_constructor(|| Histogram::new(RESOLVE_SECONDS)),
            attempts: Family::default(),
            relays: Family::default(),
            resumes: Counter::default(),
            wrong: Counter::default(),
            outcasts: Counter::default(),
            holds: Family::new_with_constructor(|| Histogram::new(HOLD_SECONDS)),
            storm: StormFigures::register(registry),
        };
        registry.register_with_unit(
            "spegel_resolve_duration",
            "Time until the first peer for a key was found, or it was settled that there is none",
            Unit::Seconds,
            metrics.resolve.clone(),
        );
        registry.register("spegel_peer_requests", "Requests to peers by outcome", metrics.attempts.clone());
        registry.register("spegel_relays", "Bodies relayed from peers, by how they ended", metrics.relays.clone());
        let help = "Bodies that another peer went on with at the byte where the first broke off";
        registry.register("spegel_relay_resumes", help, metrics.resumes.clone());
        let help = "Peers that are not asked for a digest any more, because what they sent for it was wrong";
        registry.register("spegel_wrong_bytes", help, metrics.wrong.clone());
        let help = "Peers that are not asked for anything for a while, because they sent wrong bytes three times";
        registry.register("spegel_peers_set_aside", help, metrics.outcasts.clone());
        registry.register_with_unit(
            "spegel_storm_hold",
            "How long requests waited for who a coordinator names, by whether that one gave it or they went on to look for others, and upstream",
            Unit::Seconds,
            metrics.holds.clone(),
        );
        metrics
    }

    pub(super) fn held(&self, fed: bool, seconds: f64) {
        let outcome = if fed { "fed" } else { "upstream" };
        self.holds.get_or_create(&AttemptLabel { outcome }).observe(seconds);
    }

    pub(super) fn resolved(&self, seconds: f64) {
        self.resolve.get_or_create(&RouterLabel { router: "libp2p" }).observe(seconds);
    }

    pub(super) fn attempted(&self, outcome: Outcome) {
        self.attempts.get_or_create(&AttemptLabel { outcome: outcome.as_str() }).inc();
    }

    pub(super) fn resumed(&self) {
        self.resumes.inc();
    }

    pub(super) fn wrong_bytes(&self, barred: usize, outcast: usize) {
        self.wrong.inc_by(barred as u64);
        self.outcasts.inc_by(outcast as u64);
    }

    pub(super) fn relayed(&self, end: End) {
        self.relays.get_or_create(&RelayLabel { end: end.as_str() }).inc();
    }
}
