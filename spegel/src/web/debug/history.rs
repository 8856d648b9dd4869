//! How much moved lately, by peer. Nothing is kept while nobody looks: the samples are taken when a page is made.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many samples are kept, and how far they are apart at the least and the most.
const SAMPLES: usize = 60;
const CLOSEST: Duration = Duration::from_millis(900);
const FURTHEST: Duration = Duration::from_secs(60);

/// Bytes by peer, at some moments.
#[derive(Debug, Default)]
pub(super) struct History(Mutex<VecDeque<Sample>>);

#[derive(Debug)]
struct Sample {
    at: Instant,
    bytes: HashMap<IpAddr, u64>,
}

// === impl History ===

impl History {
    /// Takes down what each peer has moved in all, unless that was done a moment ago.
    pub(super) fn add(&self, bytes: impl Iterator<Item = (IpAddr, u64)>, now: Instant) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = samples.back().map(|last| now.saturating_duration_since(last.at));
        match since {
            Some(since) if since < CLOSEST => return,
            Some(since) if since > FURTHEST => samples.clear(),
            _ => {}
        }
        if samples.len() >= SAMPLES {
            samples.pop_front();
        }
        let mut sums: HashMap<IpAddr, u64> = HashMap::new();
        bytes.for_each(|(peer, bytes)| *sums.entry(peer).or_default() += bytes);
        samples.push_back(Sample { at: now, bytes: sums });
    }

    /// Bytes a second between the samples, the oldest first; nothing of a peer that moved none.
    pub(super) fn rates(&self, peer: IpAddr) -> Vec<f64> {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = |(before, after): (&Sample, &Sample)| {
            let moved = |sample: &Sample| sample.bytes.get(&peer).copied().unwrap_or_default();
            let seconds = after.at.duration_since(before.at).as_secs_f64().max(0.001);
            moved(after).saturating_sub(moved(before)) as f64 / seconds
        };
        let rates: Vec<f64> = samples.iter().zip(samples.iter().skip(1)).map(rate).collect();
        if rates.iter().any(|rate| *rate > 0.0) { rates } else { Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_apart_bounded_and_forgotten() {
        let (history, start) = (History::default(), Instant::now());
        let (peer, idle) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let second = Duration::from_secs(1);
        for n in 0..200_u32 {
            history.add([(peer, 100 * u64::from(n)), (idle, 7)].into_iter(), start + n * second);
            history.add([(peer, u64::MAX)].into_iter(), start + n * second + second / 2);
        }
        assert_eq!(history.rates(peer), vec![100.0; SAMPLES - 1]);
        assert!(history.rates(idle).is_empty());
        history.add([(peer, 0)].into_iter(), start + 199 * second + 2 * FURTHEST);
        assert!(history.rates(peer).is_empty());
    }
}
