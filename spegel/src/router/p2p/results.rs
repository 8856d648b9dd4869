//! What lookups found just before: the many requests of one pull, and those of many clients for one image, need one search.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::keys::ContentId;
use crate::router::Peer;

/// How long found peers are handed out again.
const FOUND: Duration = Duration::from_secs(2);

/// How long it is believed that nobody offers a key: what is announced now must be found soon.
const NOBODY: Duration = Duration::from_millis(30);

/// How many results are kept.
const MAX_RESULTS: usize = 4_096;

/// The results.
#[derive(Debug, Default)]
pub(super) struct Results {
    by_id: HashMap<ContentId, (Instant, Vec<Peer>)>,
    /// In the order in which they came. Those that were replaced since are also further on.
    order: VecDeque<(Instant, ContentId)>,
}

// === impl Results ===

impl Results {
    /// What was found for a key, if that is not long ago.
    pub(super) fn get(&self, now: Instant, id: &ContentId) -> Option<&[Peer]> {
        let (at, found) = self.by_id.get(id)?;
        let kept = if found.is_empty() { NOBODY } else { FOUND };
        (now.duration_since(*at) < kept).then_some(found)
    }

    pub(super) fn put(&mut self, now: Instant, id: ContentId, found: Vec<Peer>) {
        self.by_id.insert(id, (now, found));
        self.order.push_back((now, id));
        while let Some((at, oldest)) = self.order.front().copied() {
            if self.order.len() <= MAX_RESULTS && now.duration_since(at) < FOUND {
                break;
            }
            self.order.pop_front();
            if self.by_id.get(&oldest).is_some_and(|(current, _)| *current == at) {
                self.by_id.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn id(n: usize) -> ContentId {
        ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
    }

    fn peer() -> Peer {
        Peer::new("peer".into(), vec!["10.0.0.1:5000".parse().unwrap()])
    }

    #[test]
    fn nobody_is_believed_for_less_time_than_somebody() {
        let mut results = Results::default();
        let now = Instant::now();
        results.put(now, id(1), vec![peer()]);
        results.put(now, id(2), vec![]);
        assert_eq!(results.get(now, &id(1)).unwrap(), [peer()]);
        assert_eq!(results.get(now, &id(2)).unwrap(), []);
        assert_eq!(results.get(now, &id(3)), None);
        assert_eq!(results.get(now + NOBODY, &id(2)), None);
        assert!(results.get(now + FOUND - NOBODY, &id(1)).is_some());
        assert_eq!(results.get(now + FOUND, &id(1)), None);
    }

    #[test]
    fn results_are_bounded_and_leave_with_time() {
        let mut results = Results::default();
        let now = Instant::now();
        for n in 0..3 * MAX_RESULTS {
            results.put(now, id(n % (2 * MAX_RESULTS)), vec![]);
        }
        assert!(results.by_id.len() <= MAX_RESULTS && results.order.len() <= MAX_RESULTS);
        results.put(now + FOUND, id(0), vec![]);
        assert_eq!((results.by_id.len(), results.order.len()), (1, 1));
    }
}
