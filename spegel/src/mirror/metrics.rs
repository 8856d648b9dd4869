//! What the mirror counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

use super::storms::StormFigures;
use crate::metrics::{Described, Figures, Label};

const RESOLVE_SECONDS: [f64; 12] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];
const HOLD_SECONDS: [f64; 10] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0];

static RESOLVE: Described = Described::histogram(
    "spegel_resolve_duration_seconds",
    "Time until the first peer for a key was found, or it was settled that there is none",
)
.labels(&[Label::of("router", &[ROUTER])])
.as_in_go();
static ATTEMPTS: Described = Described::counter(
    "spegel_peer_requests",
    "Requests to peers for content, by outcome; given_up: another gave it first, or the client left; late: the same after the time in which nobody else is asked, or a bound passed; no_memory: here",
)
.labels(&[Label::of("outcome", &OUTCOMES)]);
static RELAYS: Described = Described::counter("spegel_relays", "Bodies relayed from peers, by how they ended")
    .labels(&[Label::of("end", &ENDS)]);
static RESUMES: Described = Described::counter(
    "spegel_relay_resumes",
    "Bodies that another peer went on with at the byte where the first broke off",
);
static WRONG: Described = Described::counter(
    "spegel_wrong_bytes",
    "Peers that are not asked for a digest any more, because what they sent for it was wrong",
)
.measured_in("peers");
static OUTCASTS: Described = Described::counter(
    "spegel_peers_set_aside",
    "Peers that are not asked for anything for a while, because they sent wrong bytes three times",
);
static HOLDS: Described = Described::histogram(
    "spegel_storm_hold_seconds",
    "How long requests waited for who a coordinator names, by whether that one gave it or they went on to look for others, and upstream",
)
.labels(&[Label::of("outcome", &["fed", "upstream"])]);

/// The only router that there is.
const ROUTER: &str = "libp2p";
const OUTCOMES: [&str; 10] =
    ["answered", "unreachable", "late", "lost", "malformed", "refused", "busy", "wrong_bytes", "given_up", "no_memory"];
const ENDS: [&str; 3] = ["complete", "peer_broke", "client_left"];

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

/// How a request to a peer ended; [`OUTCOMES`] has their names in this order.
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
    GivenUp,
    NoMemory,
}

/// How a relayed body ended; [`ENDS`] has their names in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Complete,
    PeerBroke,
    ClientLeft,
}

impl MirrorMetrics {
    /// Adds the mirror's figures to `figures`.
    pub fn register(figures: &mut Figures) -> Self {
        let metrics = Self {
            resolve: Family::new_with_constructor(|| Histogram::new(RESOLVE_SECONDS)),
            attempts: Family::default(),
            relays: Family::default(),
            resumes: Counter::default(),
            wrong: Counter::default(),
            outcasts: Counter::default(),
            holds: Family::new_with_constructor(|| Histogram::new(HOLD_SECONDS)),
            storm: StormFigures::register(figures),
        };
        figures.register(&RESOLVE, metrics.resolve.clone());
        figures.register(&ATTEMPTS, metrics.attempts.clone());
        figures.register(&RELAYS, metrics.relays.clone());
        figures.register(&RESUMES, metrics.resumes.clone());
        figures.register(&WRONG, metrics.wrong.clone());
        figures.register(&OUTCASTS, metrics.outcasts.clone());
        figures.register(&HOLDS, metrics.holds.clone());
        metrics
    }

    pub(super) fn held(&self, fed: bool, seconds: f64) {
        let outcome = if fed { "fed" } else { "upstream" };
        self.holds.get_or_create(&AttemptLabel { outcome }).observe(seconds);
    }

    pub(super) fn resolved(&self, seconds: f64) {
        self.resolve.get_or_create(&RouterLabel { router: ROUTER }).observe(seconds);
    }

    pub(super) fn attempted(&self, outcome: Outcome) {
        self.attempts.get_or_create(&AttemptLabel { outcome: OUTCOMES[outcome as usize] }).inc();
    }

    pub(super) fn resumed(&self) {
        self.resumes.inc();
    }

    pub(super) fn wrong_bytes(&self, barred: usize, outcast: usize) {
        self.wrong.inc_by(barred as u64);
        self.outcasts.inc_by(outcast as u64);
    }

    pub(super) fn relayed(&self, end: End) {
        self.relays.get_or_create(&RelayLabel { end: ENDS[end as usize] }).inc();
    }
}
