//! The table as metrics, for as many peers as are named; the others are one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use spegel_common::{Counts, Role};

use super::refusal::REASONS;
use super::report::knows_failures;
use super::table::{Row, SHOWN};
use super::{Source, Watch};
use crate::metrics::{Described, Figures, Label};

static SENT: Described =
    Described::counter("spegel_peer_sent_bytes", "Bytes that a peer acknowledged").labels(&[PEER, ROLE]);
static RECEIVED: Described =
    Described::counter("spegel_peer_received_bytes", "Bytes that came from a peer").labels(&[PEER, ROLE]);
static CONNECTIONS: Described =
    Described::counter("spegel_peer_connections", "Connections with a peer that were established")
        .labels(&[PEER, ROLE]);
static FAILED: Described = Described::counter(
    "spegel_peer_failed_connections",
    "Connections to a peer that could not be established; without eBPF those to fetch from it only",
)
.labels(&[PEER, ROLE]);
static RESETS: Described =
    Described::counter("spegel_peer_resets", "Connections with a peer that had no orderly end; with eBPF only")
        .labels(&[PEER, ROLE]);
static SEGMENTS: Described =
    Described::counter("spegel_peer_segments", "Segments with data that were sent to a peer").labels(&[PEER, ROLE]);
static RETRANSMITS: Described = Described::counter(
    "spegel_peer_retransmits",
    "Segments that were sent to a peer again; what the peer sends again is not seen here",
)
.labels(&[PEER, ROLE]);
static ROUND_TRIP: Described =
    Described::gauge("spegel_peer_round_trip_seconds", "Smoothed round trip to a peer").labels(&[PEER, ROLE]);
static RATE: Described =
    Described::gauge("spegel_peer_delivery_rate", "Bytes a second that the path to a peer delivers")
        .labels(&[PEER, ROLE])
        .measured_in("bytes a second");
static PULLED: Described = Described::counter(
    "spegel_pull_bytes",
    "Bytes that this node's containerd got, or a client that names no node (as with a hosts.toml of the Go program), by where from; upstream's as the kernel counts them, with their TLS and HTTP, and with eBPF only",
)
.labels(&[Label::of("source", &["local", "peer", "upstream"])]);
static OFFLOAD: Described = Described::gauge(
    "spegel_pull_offload_ratio",
    "The share of what this node's containerd got that did not come from upstream, of all that it got while its control group was watched; with eBPF only",
)
.measured_in("0 to 1");
static STATE: Described =
    Described::gauge("spegel_ebpf_state", "1, with where the figures of peers come from, and why from nowhere better")
        .labels(&[Label::of("source", &["ebpf", "tcp_info"]), Label::of("reason", &REASONS)]);
static ATTACHED: Described = Described::gauge(
    "spegel_ebpf_containerd_attached",
    "1 while containerd's control group is watched, without which what it gets from upstream is not counted; with eBPF only",
);
static LOST: Described = Described::counter(
    "spegel_ebpf_lost_events",
    "Events that could be told to no connection, since the map of these was full; with eBPF only",
);

const PEER: Label = Label::at_most(
    "peer",
    SHOWN + 1,
    "those of the 20 pairs of address and role with which most was moved of late (half of it is forgotten in ten minutes), and of those that were among them last, 60 pairs in all; all others are `other`",
);
const ROLE: Label = Label::of("role", &["served", "fetched", "containerd", "router", "upstream", "other"]);

/// Bytes of content that this node gave its own containerd.
#[derive(Debug, Default)]
pub struct Pulled {
    local: AtomicU64,
    peer: AtomicU64,
}

// === impl Pulled ===

impl Pulled {
    /// From what this node has.
    pub fn add_local(&self, bytes: u64) {
        self.local.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that were here, and those that came from peers.
    pub fn bytes(&self) -> (u64, u64) {
        (self.local.load(Ordering::Relaxed), self.peer.load(Ordering::Relaxed))
    }

    /// What did not come from upstream.
    pub(super) fn saved(&self) -> u64 {
        let (local, peer) = self.bytes();
        local.saturating_add(peer)
    }

    /// From a peer.
    pub fn add_peer(&self, bytes: u64) {
        self.peer.fetch_add(bytes, Ordering::Relaxed);
    }
}

pub(super) fn register(figures: &mut Figures, watch: Watch, pulled: Arc<Pulled>) {
    let peers = COUNTERS.iter().map(|(what, ..)| *what).chain(GAUGES.iter().map(|(what, _)| *what));
    figures.collect(peers.chain([&PULLED, &OFFLOAD, &STATE, &ATTACHED, &LOST]), PeersCollector { watch, pulled });
}

#[derive(Debug)]
struct PeersCollector {
    watch: Watch,
    pulled: Arc<Pulled>,
}

type Counter = (&'static Described, fn(&Counts) -> u64, Known);
type Gauge = (&'static Described, fn(&Row) -> Option<f64>);

/// Who knows a figure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Sockets,
    /// And to who connects.
    Connecting,
    KernelOnly,
}

const COUNTERS: [Counter; 7] = [
    (&SENT, |counts| counts.sent, Known::Sockets),
    (&RECEIVED, |counts| counts.received, Known::Sockets),
    (&CONNECTIONS, |counts| counts.opened, Known::Sockets),
    (&FAILED, |counts| counts.failed, Known::Connecting),
    (&RESETS, |counts| counts.reset, Known::KernelOnly),
    (&SEGMENTS, |counts| counts.segments, Known::Sockets),
    (&RETRANSMITS, |counts| counts.retransmits, Known::Sockets),
];

const GAUGES: [Gauge; 2] = [
    (&ROUND_TRIP, |row| row.newest.srtt.map(|us| f64::from(us) / 1e6)),
    (&RATE, |row| row.newest.rate.map(|rate| rate as f64)),
];

// === impl PeersCollector ===

impl Collector for PeersCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        self.encode_peers(encoder)?;
        self.encode_pulls(encoder)?;
        self.encode_state(encoder)
    }
}

impl PeersCollector {
    fn encode_peers(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let upstream = self.watch.shared.upstream();
        let sees = |role: &Role| self.watch.shared.source.sees(*role, &upstream);
        let table = self.watch.table();
        let kernels = table.is_kernels();
        let mut named: Vec<_> = table.rows().filter(|(.., row)| row.has_series).collect();
        named.sort_unstable_by_key(|(address, role, _)| (*role, *address));
        for (what, figure, known) in COUNTERS {
            if known == Known::KernelOnly && !kernels {
                continue;
            }
            let is_known = |role: &Role| known != Known::Connecting || knows_failures(kernels, *role);
            let mut family = what.begin(encoder)?;
            for (address, role, row) in named.iter().filter(|(_, role, _)| is_known(role)) {
                let labels = [("peer", address.to_string()), ("role", role.name().to_owned())];
                ConstCounter::new(figure(&row.named)).encode(family.encode_family(&labels)?)?;
            }
            for role in Role::ALL.into_iter().filter(|role| sees(role) && is_known(role)) {
                let labels = [("peer", "other".to_owned()), ("role", role.name().to_owned())];
                ConstCounter::new(figure(table.others(role))).encode(family.encode_family(&labels)?)?;
            }
        }
        for (what, figure) in GAUGES {
            let mut family = what.begin(encoder)?;
            for (address, role, row) in named.iter().filter(|(.., row)| row.is_named) {
                let labels = [("peer", address.to_string()), ("role", role.name().to_owned())];
                if let Some(value) = figure(row) {
                    ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }

    fn encode_pulls(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = PULLED.begin(encoder)?;
        let upstream = self.watch.shared.sees(Role::Upstream);
        let upstream = upstream.then(|| self.watch.table().total(Role::Upstream).received);
        let (local, peer) = (self.pulled.local.load(Ordering::Relaxed), self.pulled.peer.load(Ordering::Relaxed));
        for (source, bytes) in [("local", Some(local)), ("peer", Some(peer)), ("upstream", upstream)] {
            if let Some(bytes) = bytes {
                ConstCounter::new(bytes).encode(family.encode_family(&[("source", source)])?)?;
            }
        }
        // While upstream is not looked at, the ratio would rise with everything else that is counted.
        let saved = self.watch.shared.upstream().matched(local.saturating_add(peer));
        if let Some(ratio) = saved.zip(upstream).and_then(|(saved, upstream)| offload(saved, upstream)) {
            OFFLOAD.encode(encoder, &ConstGauge::new(ratio))?;
        }
        Ok(())
    }

    fn encode_state(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = STATE.begin(encoder)?;
        let (source, reason) = match &self.watch.shared.source {
            Source::Kernel(_) => ("ebpf", ""),
            Source::Sockets(refusal) => ("tcp_info", refusal.name()),
        };
        ConstGauge::new(1i64).encode(family.encode_family(&[("source", source), ("reason", reason)])?)?;
        if self.watch.table().is_kernels() {
            let is_attached = i64::from(self.watch.shared.upstream().group.is_ok());
            ATTACHED.encode(encoder, &ConstGauge::new(is_attached))?;
            LOST.encode(encoder, &ConstCounter::new(self.watch.table().lost()))?;
        }
        Ok(())
    }
}

/// The share of all bytes that were `saved`; none of nothing.
fn offload(saved: u64, upstream: u64) -> Option<f64> {
    let all = saved as f64 + upstream as f64;
    (all > 0.0).then(|| saved as f64 / all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::kernel::Reading;
    use super::super::table::Table;
    use super::*;
    use crate::zerocopy::TcpInfo;
    use std::net::IpAddr;
    use std::time::{Duration, Instant};

    #[test]
    fn events_that_were_lost_are_told() {
        let (mut table, mut reading) = (Table::new(true), Reading::default());
        reading.totals[Role::Served as usize].lost = 2;
        reading.totals[Role::Other as usize].lost = 1;
        table.apply(&reading, Instant::now());
        assert_eq!(table.lost(), 3);
    }

    #[test]
    fn peers_that_come_and_go_do_not_add_up() {
        let watch = Watch::without_kernel();
        for n in 0..10 * SHOWN as u32 {
            // Each moves more than all before.
            let mut probe = watch.probe(IpAddr::from(n.to_be_bytes()), Role::Served).unwrap();
            let info = |bytes| TcpInfo { bytes_acked: bytes, ..TcpInfo::default() };
            probe.take(&info(1 << (n / 16).min(40)));
            watch.table().rank(Instant::now());
            probe.take(&info((1 << (n / 16).min(40)) + u64::from(n)));
            watch.table().rank(Instant::now());
        }
        let mut figures = Figures::default();
        watch.register(&mut figures, Arc::default());
        let text = crate::metrics::encode(&figures, crate::metrics::Format::OpenMetrics).unwrap();
        let series = text
            .lines()
            .filter(|line| line.starts_with("spegel_peer_sent_bytes_total{peer=") && !line.contains("other"))
            .count();
        assert!((20..=SHOWN).contains(&series), "{series}");
    }

    #[test]
    fn a_socket_is_not_asked_after_each_of_many_small_answers() {
        let watch = Watch::without_kernel();
        let mut probe = watch.probe(IpAddr::from([10, 0, 0, 1]), Role::Served).unwrap();
        let began = Instant::now();
        assert!(probe.is_due(began), "it never was");
        probe.take(&TcpInfo { bytes_acked: 5, ..TcpInfo::default() });
        assert!(!probe.is_due(began));
        assert!(probe.is_due(Instant::now() + Duration::from_secs(1)));
    }

    #[test]
    fn the_ratio_is_that_of_bytes() {
        assert_eq!((offload(0, 0), offload(0, 5), offload(30, 10)), (None, Some(0.0), Some(0.75)));
    }

    /// What is saved while nobody sees what comes from upstream has nothing to be compared with.
    #[test]
    fn the_ratio_is_of_the_time_in_which_upstream_is_seen() {
        let (here, gone) = (|| Ok("/a".into()), || Err("gone".to_owned()));
        let mut upstream = super::super::Upstream::of(gone());
        assert_eq!(upstream.matched(70), None);
        upstream.turn(here(), 100);
        assert_eq!(upstream.matched(130), Some(30));
        upstream.turn(gone(), 150);
        assert_eq!(upstream.matched(150), None);
        upstream.turn(here(), 1150);
        assert_eq!(upstream.matched(1160), Some(60));
        upstream.turn(here(), 1170);
        assert_eq!(upstream.matched(1180), Some(80), "another group is seen as well");
    }

    #[test]
    fn cardinality_is_bounded_and_unknown_figures_are_absent() {
        let watch = Watch::without_kernel();
        for n in 0..100u32 {
            let mut probe = watch.probe(IpAddr::from(n.to_be_bytes()), Role::Served).unwrap();
            probe.take(&TcpInfo { bytes_acked: u64::from(n) * 10, ..TcpInfo::default() });
        }
        watch.failed(IpAddr::from([10, 0, 0, 1]), Role::Fetched);
        let (mut figures, pulled) = (Figures::default(), Arc::<Pulled>::default());
        pulled.add_peer(7);
        watch.register(&mut figures, Arc::clone(&pulled));
        let text = crate::metrics::encode(&figures, crate::metrics::Format::OpenMetrics).unwrap();
        let series = text.lines().filter(|line| line.starts_with("spegel_peer_sent_bytes_total{")).count();
        assert!(series <= SHOWN + 3, "{text}");
        // Only who connects knows what fails.
        let failed: Vec<_> =
            text.lines().filter(|line| line.starts_with("spegel_peer_failed_connections_total{")).collect();
        assert!(failed.iter().all(|line| line.contains("role=\"fetched\"")), "{failed:?}");
        assert_eq!(failed.iter().filter(|line| line.ends_with(" 1")).count(), 1, "{failed:?}");
        assert!(text.contains("spegel_pull_bytes_total{source=\"peer\"} 7"), "{text}");
        assert!(text.contains("spegel_ebpf_state{source=\"tcp_info\",reason=\"off\"} 1"), "{text}");
        for unknown in ["upstream", "spegel_peer_resets", "spegel_ebpf_lost_events", "spegel_ebpf_containerd"] {
            assert!(!text.lines().any(|line| !line.starts_with('#') && line.contains(unknown)), "{unknown} in {text}");
        }
    }
}
