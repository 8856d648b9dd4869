//! The latest stories, and how many of a flood are told.

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};

use super::{Source, Story};

/// How many stories are kept.
pub const KEPT: usize = 256;
/// Stories of content that was here, which are kept a second, and at once: there may be a hundred thousand of them, which would leave no others.
const KEPT_OF_LOCAL: Pace = (NonZeroU32::new(4).unwrap(), NonZeroU32::new(64).unwrap());
/// Lines of the log a second, and at once, of content that was here and of all other. A node that starts a hundred pods has a line for each pull of theirs.
const LINES: Pace = (NonZeroU32::new(100).unwrap(), NonZeroU32::new(1000).unwrap());

/// How many a second in the long run, and at once.
type Pace = (NonZeroU32, NonZeroU32);

type Limiter<C> = RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// The latest stories, [`KEPT`] at the most, and the pace at which stories are told. Asking for that takes no lock.
#[derive(Debug)]
pub struct Stories<C: Clock = MonotonicClock> {
    latest: Mutex<VecDeque<Story>>,
    /// Of content that was here.
    kept: Limiter<C>,
    local: Lines<C>,
    others: Lines<C>,
}

#[derive(Debug)]
struct Lines<C: Clock> {
    limiter: Limiter<C>,
    /// Not written since the last one that was.
    left_out: AtomicU64,
}

/// What becomes of a story.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// It is kept among the latest.
    pub is_kept: bool,
    /// It has a line in the log, which says how many of its like before it had none.
    pub line: Option<u64>,
}

// === impl Stories ===

impl Default for Stories {
    fn default() -> Self {
        Self::new(&MonotonicClock)
    }
}

impl<C: Clock + Clone> Stories<C> {
    /// None yet.
    pub fn new(clock: &C) -> Self {
        let lines = || Lines { limiter: limiter(LINES, clock), left_out: AtomicU64::new(0) };
        Self { latest: Mutex::default(), kept: limiter(KEPT_OF_LOCAL, clock), local: lines(), others: lines() }
    }

    /// What becomes of one more story of content from there, if lines are written at all (`is_logged`).
    pub fn tells(&self, source: Source, is_logged: bool) -> Told {
        let is_local = matches!(source, Source::Local | Source::Ready);
        let lines = if is_local { &self.local } else { &self.others };
        Told { is_kept: !is_local || self.kept.check().is_ok(), line: if is_logged { lines.next() } else { None } }
    }

    /// Keeps a story, and forgets the oldest if there are too many.
    pub fn keep(&self, story: Story) {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = if latest.len() >= KEPT { latest.pop_front() } else { None };
        latest.push_back(story);
        drop(latest);
        // Freed without the lock.
        drop(oldest);
    }

    /// The `count` stories that ended last, the latest first.
    pub fn latest(&self, count: usize) -> Vec<Story> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().take(count).cloned().collect()
    }
}

// === impl Lines ===

impl<C: Clock> Lines<C> {
    /// How many were left out before this one, if it may be written.
    fn next(&self) -> Option<u64> {
        if self.limiter.check().is_ok() {
            return Some(self.left_out.swap(0, Ordering::Relaxed));
        }
        self.left_out.fetch_add(1, Ordering::Relaxed);
        None
    }
}

// === impl Told ===

impl Told {
    /// Nobody will hear of it.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

fn limiter<C: Clock + Clone>((a_second, at_once): Pace, clock: &C) -> Limiter<C> {
    RateLimiter::direct_with_clock(Quota::per_second(a_second).allow_burst(at_once), clock.clone())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use governor::clock::FakeRelativeClock;

    use super::*;
    use crate::story::Met;

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
    fn a_flood_leaves_room_for_others_and_is_counted() {
        let clock = FakeRelativeClock::default();
        let stories = Stories::new(&clock);
        let told = |source: Source| (0..5000).map(|_| stories.tells(source, true)).collect::<Vec<_>>();
        let of = |told: &[Told]| {
            (told.iter().filter(|one| one.is_kept).count(), told.iter().filter(|one| one.line.is_some()).count())
        };
        assert_eq!(of(&told(Source::Local)), (64, 1000));
        assert_eq!(of(&told(Source::Peer)), (5000, 1000));
        clock.advance(Duration::from_secs(1));
        let later = told(Source::Local);
        assert_eq!(of(&later), (4, 100));
        assert_eq!(later[0].line, Some(4000));
        assert_eq!(later[1].line, Some(0));
    }

    #[test]
    fn without_a_log_nothing_is_left_out_of_it() {
        let clock = FakeRelativeClock::default();
        let stories = Stories::new(&clock);
        (0..5000).for_each(|_| assert_eq!(stories.tells(Source::Upstream, false).line, None));
        assert_eq!(stories.tells(Source::Upstream, true).line, Some(0));
        clock.advance(Duration::from_secs(3600));
        (0..64).for_each(|_| assert!(stories.tells(Source::Ready, false).is_kept));
        assert!(stories.tells(Source::Ready, false).is_nothing());
    }
}
