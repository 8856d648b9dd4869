//! How long the requests of one image pull may be held in all.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How long after it was last held, or got anything, what a pull asks for counts as another pull's.
pub const GAP: Duration = Duration::from_secs(10);
/// How many pulls are remembered.
const PULLS: usize = 1024;
/// How many past holds of one busy time are told apart.
const INTERVALS: usize = 64;
/// How many times as long a pull may be held in all as long as other parts of it arrive.
const WHILE_IT_ARRIVES: u32 = 5;
/// News of such a part speaks for so much time before it.
const NEWS: Duration = Duration::from_secs(1);
/// With less than this left nothing is held: it would end before it can be of use.
const LEAST: Duration = Duration::from_millis(50);

/// The time for which requests of one pull may be held.
///
/// Time in which several are held counts once. A hold that ended with bytes costs only what it took beyond upstream's usual first byte,
/// which upstream would have taken as well; one that was in vain costs all of it. While requests are held their deadline is such that
/// all may turn out to have been in vain. While other parts of the pull arrive, it is not the pull that is held, and the time is not counted, up to
/// a bound: upstream, where they come from, would have had to bring all of them at once.
#[derive(Clone, Debug)]
pub struct Budget {
    max: Duration,
    /// What is spent for good.
    spent: Duration,
    /// What is to be charged of holds that ended while others last: they overlap those.
    charged: Vec<(Instant, Instant)>,
    /// Requests that are held, and since when.
    held: Vec<(Hold, Instant)>,
    next: u64,
    used: Instant,
    /// The time in which other parts arrived, and until when it is counted.
    forgiven: Duration,
    arrived: Instant,
}

/// A request that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold(u64);

/// How a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldEnd {
    /// Bytes came; upstream would usually have taken this long for them.
    Fed {
        /// How long upstream usually takes.
        usual: Duration,
    },
    /// It went upstream after all.
    InVain,
}

/// The budgets of the pulls that are under way, by what names a pull.
#[derive(Debug)]
pub struct Budgets<K> {
    max: Duration,
    pulls: HashMap<K, Budget>,
}

// === impl Budget ===

impl Budget {
    /// A pull may be held for `max` in all.
    pub fn new(max: Duration, now: Instant) -> Self {
        Self {
            max,
            spent: Duration::ZERO,
            charged: Vec::new(),
            held: Vec::new(),
            next: 0,
            used: now,
            forgiven: Duration::ZERO,
            arrived: now,
        }
    }

    /// Holds a request, and says until when at most; nothing if too little is left.
    pub fn begin(&mut self, now: Instant) -> Option<(Hold, Instant)> {
        self.used = now;
        if !self.has_left(now) {
            return None;
        }
        let hold = Hold(self.next);
        self.next += 1;
        self.held.push((hold, now));
        self.deadline().map(|deadline| (hold, deadline))
    }

    /// Whether a request could be held now.
    pub fn has_left(&self, now: Instant) -> bool {
        let first = self.held.iter().map(|(_, since)| *since).min().unwrap_or(now);
        self.deadline_of(first) >= now + LEAST
    }

    /// Until when the requests that are held now may be. Never earlier than it was said before.
    pub fn deadline(&self) -> Option<Instant> {
        self.held.iter().map(|(_, since)| *since).min().map(|first| self.deadline_of(first))
    }

    fn deadline_of(&self, first: Instant) -> Instant {
        let before: Duration = union(&self.charged, Some(first));
        first + (self.max + self.forgiven).saturating_sub(self.spent).saturating_sub(before)
    }

    /// The pull has just got bytes: what it asks for from now on is still the same pull.
    pub fn goes_on(&mut self, now: Instant) {
        self.used = now;
    }

    /// Another part of the pull has just got bytes.
    pub fn arrives(&mut self, now: Instant) {
        self.used = now;
        if let Some(first) = self.held.iter().map(|(_, since)| *since).min() {
            let from = self.arrived.max(first).max(now.checked_sub(NEWS).unwrap_or(now));
            let bound = self.max * (WHILE_IT_ARRIVES - 1);
            self.forgiven = (self.forgiven + now.saturating_duration_since(from)).min(bound);
        }
        self.arrived = now;
    }

    /// A hold is over.
    pub fn end(&mut self, hold: Hold, end: HoldEnd, now: Instant) {
        let Some(place) = self.held.iter().position(|(known, _)| *known == hold) else { return };
        let (_, since) = self.held.swap_remove(place);
        self.used = now;
        let from = match end {
            HoldEnd::Fed { usual } => since + usual,
            HoldEnd::InVain => since,
        };
        if from < now {
            self.charged.push((from, now));
        }
        if self.charged.len() > INTERVALS {
            self.charged = hull(&self.charged).into_iter().collect();
        }
        if self.held.is_empty() {
            self.spent += union(&self.charged, None);
            self.charged.clear();
            // What cost nothing is not forgiven: it would be time for later.
            self.forgiven = self.forgiven.min(self.spent);
        }
    }

    /// What is spent for good, of holds that are all over.
    pub fn spent(&self) -> Duration {
        self.spent
    }

    fn is_over(&self, now: Instant) -> bool {
        self.held.is_empty() && now.saturating_duration_since(self.used) >= GAP
    }
}

/// How much time these cover, up to an instant.
fn union(intervals: &[(Instant, Instant)], until: Option<Instant>) -> Duration {
    let mut sorted: Vec<_> = intervals.to_vec();
    sorted.sort_unstable();
    let mut covered = Duration::ZERO;
    let mut reached: Option<Instant> = None;
    for (from, to) in sorted {
        let to = until.map_or(to, |until| to.min(until));
        let from = reached.map_or(from, |reached| from.max(reached));
        covered += to.saturating_duration_since(from);
        reached = Some(reached.map_or(to, |reached| reached.max(to)));
    }
    covered
}

fn hull(intervals: &[(Instant, Instant)]) -> Option<(Instant, Instant)> {
    let from = intervals.iter().map(|(from, _)| *from).min()?;
    let to = intervals.iter().map(|(_, to)| *to).max()?;
    Some((from, to))
}

// === impl Budgets ===

impl<K: Eq + Hash> Budgets<K> {
    /// Each pull may be held for `max` in all.
    pub fn new(max: Duration) -> Self {
        Self { max, pulls: HashMap::new() }
    }

    /// The budget of a pull; none if too many are under way, which are then not held.
    pub fn of(&mut self, pull: K, now: Instant) -> Option<&mut Budget> {
        if self.pulls.len() >= PULLS && !self.pulls.contains_key(&pull) {
            self.pulls.retain(|_, budget| !budget.is_over(now));
            if self.pulls.len() >= PULLS {
                return None;
            }
        }
        let budget = self.pulls.entry(pull).or_insert_with(|| Budget::new(self.max, now));
        if budget.is_over(now) {
            *budget = Budget::new(self.max, now);
        }
        Some(budget)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MAX: Duration = Duration::from_secs(2);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn waits_in_vain_cost_all_and_others_what_upstream_would_not_have_taken() {
        let start = Instant::now();
        let mut budget = Budget::new(MAX, start);
        let (hold, deadline) = budget.begin(start).unwrap();
        assert_eq!(deadline, start + MAX);
        budget.end(hold, HoldEnd::Fed { usual: ms(300) }, start + ms(350));
        assert_eq!(budget.spent(), ms(50));
        let (hold, deadline) = budget.begin(start + ms(1000)).unwrap();
        assert_eq!(deadline, start + ms(1000 + 1950));
        budget.end(hold, HoldEnd::InVain, start + ms(1500));
        assert_eq!(budget.spent(), ms(550));
        budget.end(hold, HoldEnd::InVain, start + ms(9000));
        assert_eq!(budget.spent(), ms(550), "it ends once");
    }

    #[test]
    fn what_is_held_at_the_same_time_costs_once() {
        let start = Instant::now();
        let mut budget = Budget::new(MAX, start);
        let (one, _) = budget.begin(start).unwrap();
        let (two, deadline) = budget.begin(start + ms(500)).unwrap();
        assert_eq!(deadline, start + MAX, "the first may be in vain as well");
        budget.end(one, HoldEnd::Fed { usual: ms(600) }, start + ms(700));
        assert_eq!(budget.deadline(), Some(start + ms(2500)), "and was not");
        budget.end(two, HoldEnd::InVain, start + ms(1000));
        assert_eq!(budget.spent(), ms(500));
    }

    #[test]
    fn time_in_which_other_parts_arrive_counts_up_to_a_bound_only() {
        let start = Instant::now();
        let mut budget = Budget::new(MAX, start);
        let (hold, deadline) = budget.begin(start).unwrap();
        for n in 1..=10 {
            budget.arrives(start + ms(100 * n));
            budget.arrives(start + ms(100 * n));
        }
        assert_eq!(budget.deadline(), Some(deadline + ms(1000)));
        budget.arrives(start + ms(3000));
        assert_eq!(budget.deadline(), Some(deadline + ms(2000)), "nothing came for a second before");
        (31..1000).for_each(|n| budget.arrives(start + ms(100 * n)));
        assert_eq!(budget.deadline(), Some(deadline + 4 * MAX));
        budget.end(hold, HoldEnd::InVain, deadline + 4 * MAX);
        assert_eq!(budget.begin(deadline + 4 * MAX), None);
    }

    #[test]
    fn nothing_is_held_when_it_is_spent() {
        let start = Instant::now();
        let mut budget = Budget::new(MAX, start);
        let (hold, deadline) = budget.begin(start).unwrap();
        assert!(budget.has_left(deadline - ms(50)) && !budget.has_left(deadline - ms(49)));
        budget.end(hold, HoldEnd::InVain, deadline);
        assert!(!budget.has_left(deadline));
        assert_eq!(budget.begin(deadline), None);
        assert_eq!(budget.spent(), MAX);
    }

    #[test]
    fn a_pull_is_another_one_after_a_gap() {
        let start = Instant::now();
        let mut budgets = Budgets::new(MAX);
        let (hold, deadline) = budgets.of("app", start).unwrap().begin(start).unwrap();
        budgets.of("app", start).unwrap().end(hold, HoldEnd::InVain, deadline);
        assert!(budgets.of("app", deadline + GAP / 2).unwrap().begin(deadline + GAP / 2).is_none());
        assert!(budgets.of("other", start).unwrap().begin(start).is_some());
        let later = deadline + GAP / 2 + GAP;
        assert!(budgets.of("app", later).unwrap().begin(later).is_some());
    }

    #[test]
    fn what_cost_nothing_is_no_credit() {
        let start = Instant::now();
        let mut budget = Budget::new(MAX, start);
        let mut now = start;
        for _ in 0..8 {
            let (hold, _) = budget.begin(now).unwrap();
            (1..=10).for_each(|n| budget.arrives(now + ms(100 * n)));
            now += ms(1000);
            budget.end(hold, HoldEnd::Fed { usual: ms(1000) }, now);
        }
        now += ms(3000);
        let (_, deadline) = budget.begin(now).unwrap();
        assert_eq!((budget.spent(), deadline), (ms(0), now + MAX));
    }

    #[test]
    fn a_pull_that_goes_on_for_long_is_one() {
        let start = Instant::now();
        let mut budgets = Budgets::new(MAX);
        let (hold, deadline) = budgets.of("app", start).unwrap().begin(start).unwrap();
        budgets.of("app", start).unwrap().end(hold, HoldEnd::InVain, deadline);
        for n in 1..30 {
            budgets.of("app", start + ms(2000 + n * 1000)).unwrap().goes_on(start + ms(2000 + n * 1000));
        }
        assert!(budgets.of("app", start + ms(32_000)).unwrap().begin(start + ms(32_000)).is_none());
    }

    #[test]
    fn memory_is_bounded() {
        let start = Instant::now();
        let mut budgets = Budgets::new(MAX);
        let known = (0..2 * PULLS).filter(|n| budgets.of(*n, start).is_some()).count();
        assert_eq!((known, budgets.pulls.len()), (PULLS, PULLS));
        assert!(budgets.of(2 * PULLS, start + GAP).is_some());
        let mut budget = Budget::new(Duration::from_secs(600), start);
        let (_lasting, _) = budget.begin(start + ms(400_000)).unwrap();
        for n in 0..1000 {
            let (hold, _) = budget.begin(start + ms(n * 10)).unwrap();
            budget.end(hold, HoldEnd::InVain, start + ms(n * 10 + 5));
        }
        assert!(budget.charged.len() <= INTERVALS);
    }
}
