//! What is known of peers: how soon they answer, how fast they send, and whether they failed lately.
//!
//! A peer that fails is set aside for a time that grows with each failure (a circuit breaker): meanwhile it is not asked. Then one request
//! is its probe, and its answer decides for all. What a failure cost counts as its latency, so that one slow start does not look like speed,
//! and what is remembered fades with every good answer, so that it does not look like slowness for ever.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng as _;

use crate::ebpf::{Quality, Watch};

/// How long a peer is set aside after its first failure. Each further one doubles it.
const FIRST: Duration = Duration::from_millis(250);
/// The longest that it is set aside: a node that comes back is used again within this time.
const LONGEST: Duration = Duration::from_secs(10);
/// After how long without another failure those before do not count any more.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// How long a probe may be under way until another request may be one.
const PROBE_LOST: Duration = Duration::from_secs(5);
/// How long a peer that said that it is busy is asked after others.
const BUSY: Duration = Duration::from_secs(1);
/// How long what a peer said of its load is better than what the network says of it.
const LOAD_LIFETIME: Duration = Duration::from_secs(10);
/// At this load, in percent, a body of a peer is taken to last twice as long.
const DOUBLED_AT: f64 = 50.0;
/// How many peers are remembered.
const CAPACITY: usize = 4096;
/// How much a new figure counts against what was known.
const WEIGHT: f64 = 0.25;
/// What a peer of which nothing is known is taken to send, in bytes a second.
const UNKNOWN_RATE: f64 = 50e6;
/// The bytes for which peers are compared.
const TYPICAL: f64 = 4e6;
/// Bodies below this say nothing about throughput.
const TELLING: u64 = 256 << 10;
/// A body is taken to last twice as long where this share of what was sent to the peer had to be sent again: throughput falls with the root of
/// the loss ([Mathis et al.](https://doi.org/10.1145/263932.264023)), and requests that are lost wait for a timeout beside.
const DOUBLED_AT_LOSS: f64 = 0.02;
/// From this loss on a peer is asked after all others, as one that is busy: nearly every body then waits for a timeout of TCP's.
const LOSSY: f64 = 0.08;

/// How a peer may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// As any.
    Ask,
    /// Once, to see whether it is well again.
    Probe,
    /// Not now.
    SetAside,
}

/// The memory of peers, by the address of their registry.
#[derive(Debug, Default)]
pub(super) struct Peers {
    known: Mutex<HashMap<SocketAddr, Known>>,
    quality: Option<Quality>,
}

#[derive(Clone, Debug)]
struct Known {
    /// Seconds from a request to its head, and how far they stray from it.
    latency: Option<(f64, f64)>,
    /// Bytes a second of a body.
    rate: Option<f64>,
    /// Requests and bodies of ours that are under way.
    under_way: u32,
    failures: u32,
    failed_at: Option<Instant>,
    set_aside_until: Option<Instant>,
    probe_since: Option<Instant>,
    busy_until: Option<Instant>,
    /// How busy it said it was, in percent, and when.
    load: Option<(u8, Instant)>,
    used: Instant,
}

// === impl Peers ===

impl Peers {
    /// Nothing is known but what the kernel tells.
    pub(super) fn new(watch: Option<&Watch>) -> Self {
        Self { known: Mutex::default(), quality: watch.map(Watch::quality) }
    }

    /// Whether the peer may be asked now; a probe is then the caller's to make.
    pub(super) fn may_ask(&self, peer: SocketAddr, now: Instant) -> Leave {
        let mut known = self.lock();
        let Some(peer) = known.get_mut(&peer) else { return Leave::Ask };
        let Some(until) = peer.set_aside_until else { return Leave::Ask };
        let probed = peer.probe_since.is_some_and(|since| now.duration_since(since) < PROBE_LOST);
        if now < until || probed {
            return Leave::SetAside;
        }
        peer.probe_since = Some(now);
        Leave::Probe
    }

    /// Whether the peer is not to be asked now, probe or not.
    pub(super) fn is_set_aside(&self, peer: SocketAddr, now: Instant) -> bool {
        self.lock().get(&peer).and_then(|known| known.set_aside_until).is_some_and(|until| now < until)
    }

    /// A request to the peer begins.
    pub(super) fn begins(&self, peer: SocketAddr, now: Instant) {
        self.change(peer, now, |known| known.under_way += 1);
    }

    /// A request to the peer, or its body, is over.
    pub(super) fn ends(&self, peer: SocketAddr) {
        if let Some(known) = self.lock().get_mut(&peer) {
            known.under_way = known.under_way.saturating_sub(1);
        }
    }

    /// It answered after this time: it may be asked. How often it failed is forgotten only for what it has [`delivered`](Self::delivered): heads
    /// without bodies are what a network gives that loses large packets.
    pub(super) fn answered(&self, peer: SocketAddr, after: Duration, now: Instant) {
        self.change(peer, now, |known| {
            known.learn_latency(after);
            (known.set_aside_until, known.probe_since, known.busy_until) = (None, None, None);
        });
    }

    /// It gave what it had promised: whatever was held against it is forgotten.
    pub(super) fn delivered(&self, peer: SocketAddr, now: Instant) {
        self.change(peer, now, |known| known.failures = 0);
    }

    /// It refused, for it has enough to do.
    pub(super) fn busy(&self, peer: SocketAddr, now: Instant) {
        self.change(peer, now, |known| {
            (known.set_aside_until, known.probe_since) = (None, None);
            known.busy_until = Some(now + BUSY);
        });
    }

    /// It said how busy it is, in percent, or did not say.
    pub(super) fn told_load(&self, peer: SocketAddr, percent: Option<u8>, now: Instant) {
        if let Some(percent) = percent {
            self.change(peer, now, |known| known.load = Some((percent, now)));
        }
    }

    /// A request to the peer failed by its fault after this time. `jitter` is from 0 to 1, so that not all nodes come back at once.
    pub(super) fn failed(&self, peer: SocketAddr, after: Duration, now: Instant, jitter: f64) {
        self.change(peer, now, |known| {
            known.learn_latency(after);
            // Requests that were under way together fail together, and are one failure.
            if known.set_aside_until.is_some_and(|until| now < until) {
                return;
            }
            if known.failed_at.replace(now).is_some_and(|at| now.duration_since(at) >= FORGOTTEN) {
                known.failures = 0;
            }
            let pause = FIRST.saturating_mul(1 << known.failures.min(16)).min(LONGEST);
            known.failures = known.failures.saturating_add(1);
            known.set_aside_until = Some(now + pause.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0));
            known.probe_since = None;
        });
    }

    /// It sent so many bytes of a body in this time.
    pub(super) fn sent(&self, peer: SocketAddr, bytes: u64, took: Duration, now: Instant) {
        if bytes >= TELLING && !took.is_zero() {
            let rate = bytes as f64 / took.as_secs_f64();
            self.change(peer, now, |known| known.rate = Some(known.rate.map_or(rate, |old| mix(old, rate))));
        }
    }

    /// After how long without an answer of the peer the next one should be asked as well: nineteen of twenty of its answers come sooner.
    pub(super) fn patience(&self, peer: SocketAddr, longest: Duration) -> Duration {
        const SHORTEST: Duration = Duration::from_millis(20);
        let known = self.lock();
        let Some((mean, deviation)) = known.get(&peer).and_then(|known| known.latency) else { return longest };
        let late = Duration::try_from_secs_f64(mean + 4.0 * deviation).unwrap_or(longest);
        late.clamp(SHORTEST.min(longest), longest)
    }

    /// Whether it said that it is busy, or is hard to reach, and the seconds that a typical body is expected to take: the more, the busier the peer said it is in
    /// its last answer, or where that is long ago, is said to be in the network, and the more, the more was lost on the way to it of late.
    pub(super) fn cost(&self, peer: SocketAddr, said: Option<u8>, now: Instant) -> (bool, f64) {
        let loss = self.quality.as_ref().map_or(0.0, |quality| quality.loss(peer.ip(), now));
        let lossy = 1.0 + loss / DOUBLED_AT_LOSS;
        let more = |load: Option<u8>| (1.0 + f64::from(load.unwrap_or_default()) / DOUBLED_AT) * lossy;
        let known = self.lock();
        let Some(known) = known.get(&peer) else { return (loss >= LOSSY, TYPICAL / UNKNOWN_RATE * more(said)) };
        let told = known.load.filter(|(_, at)| now.duration_since(*at) < LOAD_LIFETIME).map(|(load, _)| load);
        let is_busy = loss >= LOSSY || known.busy_until.is_some_and(|until| now < until);
        let latency = known.latency.map_or(0.0, |(mean, _)| mean);
        let rate = known.rate.unwrap_or(UNKNOWN_RATE).max(1.0);
        (is_busy, (latency + TYPICAL * f64::from(known.under_way + 1) / rate) * more(told.or(said)))
    }

    fn change(&self, peer: SocketAddr, now: Instant, change: impl FnOnce(&mut Known)) {
        let mut known = self.lock();
        if known.len() >= CAPACITY && !known.contains_key(&peer) {
            let oldest = known.iter().filter(|(_, known)| known.under_way == 0).min_by_key(|(_, known)| known.used);
            let Some(oldest) = oldest.map(|(address, _)| *address) else { return };
            known.remove(&oldest);
        }
        let known = known.entry(peer).or_insert_with(|| Known::new(now));
        known.used = now;
        change(known);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Known ===

impl Known {
    fn new(now: Instant) -> Self {
        Self {
            latency: None,
            rate: None,
            under_way: 0,
            failures: 0,
            failed_at: None,
            set_aside_until: None,
            probe_since: None,
            busy_until: None,
            load: None,
            used: now,
        }
    }

    /// As TCP smooths its round trips ([RFC 6298](https://www.rfc-editor.org/rfc/rfc6298)).
    fn learn_latency(&mut self, after: Duration) {
        let after = after.as_secs_f64();
        self.latency = Some(match self.latency {
            None => (after, after / 2.0),
            Some((mean, deviation)) => (mix(mean, after), mix(deviation, (mean - after).abs())),
        });
    }
}

fn mix(old: f64, new: f64) -> f64 {
    old + WEIGHT * (new - old)
}

/// Randomness for [`Peers::failed`].
pub(super) fn jitter() -> f64 {
    rand::rng().random()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ebpf::Role;
    use crate::zerocopy::TcpInfo;

    const MS: Duration = Duration::from_millis(1);

    fn peer(n: u32) -> SocketAddr {
        SocketAddr::from((n.to_be_bytes(), 5000))
    }

    fn until(peers: &Peers) -> Instant {
        peers.lock()[&peer(1)].set_aside_until.unwrap()
    }

    #[test]
    fn a_peer_that_fails_is_set_aside_for_longer_each_time_but_never_for_good() {
        let peers = Peers::default();
        let mut now = Instant::now();
        let mut before = Duration::ZERO;
        for _ in 0..40 {
            assert_ne!(peers.may_ask(peer(1), now), Leave::SetAside);
            peers.failed(peer(1), MS, now, 1.0);
            let pause = until(&peers) - now;
            assert!(pause >= before && pause <= LONGEST);
            assert_eq!(peers.may_ask(peer(1), now + pause - MS / 2), Leave::SetAside);
            (before, now) = (pause, now + pause);
        }
        assert_eq!(before, LONGEST);
        peers.answered(peer(1), MS, now);
        assert_eq!(peers.may_ask(peer(1), now), Leave::Ask);
    }

    #[test]
    fn one_request_is_the_probe_and_its_answer_decides() {
        let peers = Peers::default();
        let start = Instant::now();
        peers.failed(peer(1), MS, start, 1.0);
        let now = until(&peers);
        assert_eq!(peers.may_ask(peer(1), now), Leave::Probe);
        assert_eq!(peers.may_ask(peer(1), now), Leave::SetAside, "somebody probes already");
        peers.failed(peer(1), MS, now, 1.0);
        assert!(until(&peers) - now > FIRST);
        let now = until(&peers);
        assert_eq!(peers.may_ask(peer(1), now), Leave::Probe);
        assert_eq!(peers.may_ask(peer(1), now + PROBE_LOST), Leave::Probe, "the first was given up");
        peers.answered(peer(1), MS, now);
        assert_eq!(peers.may_ask(peer(1), now), Leave::Ask);
    }

    #[test]
    fn failures_together_are_one() {
        let peers = Peers::default();
        let now = Instant::now();
        for _ in 0..64 {
            peers.failed(peer(1), MS, now, 1.0);
        }
        assert_eq!(until(&peers) - now, FIRST);
    }

    /// The Go program learns how patient to be from successes only, so a node that starts slowly is never used again.
    #[test]
    fn a_cold_slow_node_recovers() {
        let peers = Peers::default();
        let (start, longest) = (Instant::now(), 200 * MS);
        let is_cold = |now: Instant| now.duration_since(start) < Duration::from_secs(30);
        let (mut now, mut probes) = (start, 0);
        let used_at = loop {
            match peers.may_ask(peer(1), now) {
                Leave::SetAside => {}
                _ if is_cold(now) => {
                    peers.failed(peer(1), 1000 * MS, now, 1.0);
                    probes += 1;
                }
                _ => break now,
            }
            now += 50 * MS;
        };
        assert!(used_at - start < Duration::from_secs(30) + LONGEST + Duration::from_secs(1));
        assert!(probes < 12, "a slow node is not pestered: {probes}");
        assert_eq!(peers.patience(peer(1), longest), longest, "what it failed counts against it");
        let fresh = peers.cost(peer(2), None, now).1;
        for _ in 0..30 {
            peers.answered(peer(1), 2 * MS, now);
        }
        assert!(peers.patience(peer(1), longest) < 50 * MS && peers.cost(peer(1), None, now).1 < fresh * 1.2);
    }

    #[test]
    fn patience_follows_the_peer() {
        let peers = Peers::default();
        let now = Instant::now();
        assert_eq!(peers.patience(peer(1), 200 * MS), 200 * MS, "nothing is known");
        for n in 0..200u32 {
            peers.answered(peer(1), MS * (30 + n % 10), now);
        }
        let patience = peers.patience(peer(1), 200 * MS);
        assert!((35 * MS..60 * MS).contains(&patience), "{patience:?}");
    }

    #[test]
    fn busy_slow_and_loaded_peers_cost_more() {
        let peers = Peers::default();
        let now = Instant::now();
        let cost = |n| peers.cost(peer(n), None, now);
        peers.sent(peer(1), 100 << 20, Duration::from_secs(1), now);
        peers.sent(peer(2), 10 << 20, Duration::from_secs(1), now);
        peers.sent(peer(2), 100, MS * 100, now);
        assert!(cost(1).1 < cost(2).1 && !cost(1).0);
        for _ in 0..20 {
            peers.begins(peer(1), now);
        }
        assert!(cost(1).1 > cost(2).1, "it has enough to do for us");
        (0..20).for_each(|_| peers.ends(peer(1)));
        peers.busy(peer(1), now);
        assert!(cost(1).0 && !peers.cost(peer(1), None, now + BUSY).0);
    }

    /// Both are as fast as far as is known, but one loses segments.
    #[test]
    fn a_peer_on_whose_path_much_is_lost_loses_rank() {
        let watch = Watch::without_kernel();
        let (peers, now) = (Peers::new(Some(&watch)), Instant::now());
        let cost = |n| peers.cost(peer(n), None, now).1;
        assert!((cost(1) - cost(2)).abs() < 1e-9);
        let mut probe = watch.probe(peer(1).ip(), Role::Router).unwrap();
        let info = TcpInfo { data_segs_out: 1000, total_retrans: 50, ..TcpInfo::default() };
        probe.take(&info);
        assert!(cost(1) > 2.0 * cost(2), "5 % of loss: {} and {}", cost(1), cost(2));
        assert!(!peers.cost(peer(1), None, now).0);
        let worse = TcpInfo { data_segs_out: 2000, total_retrans: 400, ..TcpInfo::default() };
        probe.take(&worse);
        assert!(peers.cost(peer(1), None, now).0, "20 %: others first");
        probe.take(&TcpInfo { data_segs_out: 1_000_000, ..worse });
        assert!(!peers.cost(peer(1), None, now).0);
        assert!(cost(1) < 1.1 * cost(2), "it is well again: {} and {}", cost(1), cost(2));
    }

    #[test]
    fn what_a_peer_says_of_its_load_counts_before_what_is_said_of_it() {
        let (peers, now) = (Peers::default(), Instant::now());
        let cost = |n, said, now| peers.cost(peer(n), said, now).1;
        assert!(cost(1, Some(80), now) > cost(1, Some(10), now) && cost(1, Some(10), now) > cost(1, None, now));
        peers.told_load(peer(1), Some(90), now);
        assert!(cost(1, Some(0), now) > cost(2, Some(80), now), "it knows better");
        let later = now + LOAD_LIFETIME;
        assert!(cost(1, Some(0), later) < cost(2, Some(80), later), "it is long ago");
    }

    #[test]
    fn memory_is_bounded() {
        let peers = Peers::default();
        let now = Instant::now();
        for n in 0..2 * CAPACITY as u32 {
            peers.failed(peer(n), MS, now + MS * n, 0.0);
        }
        assert_eq!(peers.lock().len(), CAPACITY);
        assert!(peers.lock().contains_key(&peer(2 * CAPACITY as u32 - 1)), "the newest stays");
    }
}
