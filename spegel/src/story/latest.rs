//! The latest stories.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Story;

/// How many stories are kept.
pub const KEPT: usize = 256;
/// Of answers that stand ready, one is kept in this time: there may be a hundred thousand a second, which would leave no others.
const PERIOD: Duration = Duration::from_millis(250);

/// The latest stories, [`KEPT`] at the most.
#[derive(Debug)]
pub struct Stories {
    latest: Mutex<VecDeque<Story>>,
    start: Instant,
    /// From which millisecond on the next answer that stands ready is kept.
    next: AtomicU64,
}

impl Default for Stories {
    fn default() -> Self {
        Self { latest: Mutex::default(), start: Instant::now(), next: AtomicU64::new(0) }
    }
}

impl Stories {
    /// Keeps a story, and forgets the oldest if there are too many.
    pub fn keep(&self, story: Story) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if latest.len() >= KEPT { latest.pop_front() } else { None };
        latest.push_back(story);
        drop(latest);
        // Freed without the lock.
        drop(oldest);
    }

    /// Whether a story should be kept of an answer that stood ready `now`; after a yes the next ones are refused for a while. Takes no lock.
    pub fn wants_one_of_many(&self, now: Instant) -> bool {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let now = millis(now.saturating_duration_since(self.start));
        let next = self.next.load(Ordering::Relaxed);
        let after = now.saturating_add(millis(PERIOD));
        now >= next && self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The `count` stories that ended last, the latest first.
    pub fn latest(&self, count: usize) -> Vec<Story> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().take(count).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::story::{Met, Source};

    fn story(number: usize) -> Story {
        Story {
            began: SystemTime::UNIX_EPOCH,
            trace_id: number.to_string(),
            method: "GET",
            path: String::new(),
            range: None,
            registry: None,
            client: String::new(),
            source: Source::Local,
            met: Met::default(),
            status: None,
            bytes: 0,
            whole: false,
            head: None,
            total: Duration::ZERO,
        }
    }

    #[test]
    fn the_latest_come_first_and_the_oldest_go() {
        let stories = Stories::default();
        assert!(stories.latest(10).is_empty());
        (0..KEPT + 5).for_each(|number| stories.keep(story(number)));
        let ids: Vec<_> = stories.latest(3).into_iter().map(|story| story.trace_id).collect();
        assert_eq!(ids, ["260", "259", "258"]);
        assert_eq!(stories.latest(usize::MAX).len(), KEPT);
    }

    #[test]
    fn of_many_answers_at_once_one_is_kept() {
        let stories = Stories::default();
        let now = Instant::now();
        let kept = |at: Duration| (0..1000).filter(|_| stories.wants_one_of_many(now + at)).count();
        assert_eq!([kept(Duration::ZERO), kept(PERIOD / 2), kept(PERIOD * 2)], [1, 0, 1]);
    }
}
