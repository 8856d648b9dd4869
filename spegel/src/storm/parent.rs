//! How many others this node gives blobs to: as many as get them as fast as it does itself.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::{Key, MAX_SLOTS, Rank};

/// How many children a blob may have as long as nothing was measured. What is so small that it comes in one piece has many; and what has so few
/// MiB, in which it is passed on, that each level is felt, two.
const AT_FIRST: u16 = 1;
const OF_MEDIUM: u16 = 2;
const MEDIUM: u64 = 16 << 20;
const OF_SMALL: u16 = 16;
const SMALL: u64 = 1 << 20;
/// How often children are looked at, and for how long after a change nothing is concluded.
const LOOK: Duration = Duration::from_millis(250);
const SETTLE: Duration = Duration::from_millis(500);
/// A child keeps up that lacks no more than this, and what comes in a quarter of a second.
const SLACK: u64 = 2 << 20;
const SLACK_SECONDS: f64 = 0.25;
/// Another child of something complete must have brought this part of what one child got before.
const WORTH: f64 = 0.5;
/// How many times as much as was tried may be tried next.
const BEYOND_PROVED: f64 = 1.5;
/// Which part of the largest intake is kept from look to look: half of it for three seconds.
const INTAKE_KEPT: f64 = 0.95;
/// How long it is remembered what this node could send.
const REMEMBERED: Duration = Duration::from_secs(600);

/// What this node has of a blob, when somebody asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// How many bytes are here.
    pub position: u64,
    /// Whether all are.
    pub complete: bool,
    /// Whether they come from upstream.
    pub is_root: bool,
    /// Where this node was counted.
    pub rank: Option<Rank>,
}

/// Who asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// How many bytes it has.
    pub position: u64,
    /// Where it was counted.
    pub rank: Option<Rank>,
}

/// Why somebody is not given a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There are too many already.
    #[error("it gives to as many as it can")]
    Busy,
    /// The asker has as much, or may be above us.
    #[error("it is not ahead of the asker")]
    NotAhead,
}

#[derive(Clone, Copy, Debug)]
struct Feed {
    key: Key,
    /// It was sent here by a coordinator, which names another one.
    is_led: bool,
    is_complete: bool,
    since: Instant,
    sent: u64,
    lacks: u64,
    /// Bytes a second, sent to it and come in for it, since the last look.
    rate: f64,
    coming: f64,
    /// At the last look: sent and available.
    before: (u64, u64),
    available: u64,
}

/// What came of a look at the children.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// [`Parent::slots`] may have another answer.
    pub changed: bool,
    /// This child should be let go: our link is full, and all others are slow for it.
    pub shed: Option<u64>,
}

/// What this node gives to others, all blobs together.
#[derive(Debug)]
pub struct Parent {
    feeds: HashMap<u64, Feed>,
    /// Children for each blob that is coming in, and for each that is here.
    fan_out: u16,
    fan_out_complete: u16,
    most: u16,
    /// How many bytes a second it sent at most while all children kept up.
    proved: f64,
    /// How many bytes this node has got of all blobs, now and at the last look, and the most of them in a second lately.
    received: (u64, u64),
    intake: f64,
    /// How many bytes a second it could send when its link was full, and when that was.
    capacity: Option<(f64, Instant)>,
    /// With how many children of complete blobs how much was sent: more have to bring more.
    mark: Option<(u16, f64)>,
    /// Whether our link was full at the last look, by those who get what is coming in.
    is_full: bool,
    looked: Instant,
}

// === impl Standing ===

impl Standing {
    /// Whether the asker may get it from here: never if it could be above this node. What a child has its parent has, so that in a circle
    /// nobody could have had more than the one below when that one came; and among those without a byte, ranks only rise on the way down.
    pub fn may_feed(&self, asker: &Asker) -> bool {
        if self.complete || self.position > asker.position {
            return true;
        }
        if self.is_root {
            return self.position == asker.position;
        }
        let (Some(own), Some(theirs)) = (self.rank, asker.rank) else { return false };
        (self.position, asker.position) == (0, 0) && own < theirs
    }
}

// === impl Parent ===

impl Parent {
    /// One that gives to nobody, and never to more than `most` at a time.
    pub fn new(most: u16, now: Instant) -> Self {
        Self {
            feeds: HashMap::new(),
            fan_out: AT_FIRST,
            fan_out_complete: AT_FIRST,
            most: most.clamp(1, MAX_SLOTS),
            proved: 0.0,
            received: (0, 0),
            intake: 0.0,
            capacity: None,
            mark: None,
            is_full: false,
            looked: now,
        }
    }

    /// Whether this one may be given a blob as well.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&self, key: &Key, own: &Standing, asker: &Asker) -> Result<(), Refusal> {
        if !own.may_feed(asker) {
            return Err(Refusal::NotAhead);
        }
        let children = self.children_of(key);
        // Coordinators send one more than there are slots where there is no better place; not where all lag already.
        let lags = |feed: &Feed| feed.key == *key && !feed.keeps_up();
        let has_too_many = children > self.fan_out.max(self.fan_out_complete) && self.feeds.values().any(lags);
        // What is complete here is so elsewhere as well, or will be; what is coming in goes before it.
        let is_full = if own.complete { self.is_full } else { has_too_many };
        if self.feeds.len() >= usize::from(self.most) || is_full {
            return Err(Refusal::Busy);
        }
        Ok(())
    }

    /// A child is given a blob from now on, under this number.
    pub fn begin(&mut self, number: u64, key: Key, asker: &Asker, own: &Standing, now: Instant) {
        let from = asker.position;
        let feed = Feed {
            key,
            is_led: asker.rank.is_some(),
            is_complete: own.complete,
            since: now,
            sent: from,
            lacks: own.position.saturating_sub(from),
            rate: 0.0,
            coming: 0.0,
            before: (from, own.position),
            available: own.position,
        };
        self.feeds.insert(number, feed);
    }

    /// A child has been sent so much of what is here.
    pub fn sent(&mut self, number: u64, sent: u64, own: &Standing) {
        if let Some(feed) = self.feeds.get_mut(&number) {
            (feed.sent, feed.available, feed.is_complete) = (sent, own.position, own.complete);
            feed.lacks = own.position.saturating_sub(sent);
        }
    }

    /// This node has got so many bytes of all blobs so far, those that are complete included.
    pub fn received(&mut self, bytes: u64) {
        self.received.0 = bytes;
    }

    /// A child is gone, or has all.
    pub fn end(&mut self, number: u64) {
        self.feeds.remove(&number);
    }

    /// How many children there are, of all blobs.
    pub fn children(&self) -> usize {
        self.feeds.len()
    }

    /// How many children a blob of this length may have here.
    pub fn slots(&self, total: Option<u64>, complete: bool) -> u16 {
        let measured = if complete { self.fan_out.max(self.fan_out_complete) } else { self.fan_out };
        measured.max(Self::slots_at_first(total)).min(self.most)
    }

    /// The same where nothing was measured.
    pub fn slots_at_first(total: Option<u64>) -> u16 {
        match total {
            Some(..=SMALL) => OF_SMALL,
            Some(..=MEDIUM) => OF_MEDIUM,
            _ => AT_FIRST,
        }
    }

    /// How many bytes a second this node can send, if that has shown lately.
    pub fn capacity(&self, now: Instant) -> Option<f64> {
        self.capacity
            .filter(|(_, since)| now.saturating_duration_since(*since) < REMEMBERED)
            .map(|(capacity, _)| capacity)
    }

    /// Looks at how the children do. To be called some times a second.
    pub fn look(&mut self, now: Instant) -> Look {
        let passed = now.saturating_duration_since(self.looked);
        if passed < LOOK {
            return Look::default();
        }
        self.looked = now;
        let seconds = passed.as_secs_f64();
        let intake = self.received.0.saturating_sub(self.received.1) as f64 / seconds;
        self.received.1 = self.received.0;
        self.intake = intake.max(self.intake * INTAKE_KEPT);
        for feed in self.feeds.values_mut() {
            let (sent, available) = feed.before;
            feed.rate = feed.sent.saturating_sub(sent) as f64 / seconds;
            feed.coming = feed.available.saturating_sub(available) as f64 / seconds;
            feed.before = (feed.sent, feed.available);
        }
        let before = (self.fan_out, self.fan_out_complete);
        self.is_full = self.judge_coming(now);
        self.judge_complete(now);
        Look {
            changed: (self.fan_out, self.fan_out_complete) != before,
            shed: self.is_full.then(|| self.one_too_many()).flatten(),
        }
    }

    /// Judges by the blobs that are coming in; true if our link is full.
    fn judge_coming(&mut self, now: Instant) -> bool {
        let is_settled = |feed: &&Feed| now.saturating_duration_since(feed.since) >= SETTLE;
        let coming = || self.feeds.values().filter(|feed| !feed.is_complete).filter(is_settled);
        let (count, lagging) = (coming().count(), coming().filter(|feed| !feed.keeps_up()).count());
        let out: f64 = self.feeds.values().map(|feed| feed.rate).sum();
        let is_full = 2 * lagging > count && self.feeds.len() > 1;
        let limit = if count == 0 {
            return false;
        } else if lagging == 0 {
            self.proved = self.proved.max(out);
            if self.capacity(now).is_none_or(|capacity| out > capacity) {
                self.capacity = None;
            }
            // Only what was tried is known to work; half as much again may, or one child more.
            let more = (BEYOND_PROVED * self.proved).max(self.proved + self.intake);
            self.capacity(now).unwrap_or(more)
        } else if is_full {
            // More than a slow one or two: it is our own link.
            self.capacity = Some((out, now));
            out
        } else {
            return false;
        };
        if self.intake > 0.0 {
            // Casting saturates, and no fan-out is larger than the most.
            self.fan_out = ((limit / self.intake) as u16).clamp(AT_FIRST, self.most);
        }
        is_full
    }

    /// The child that came last of those who get something complete, as long as another one gets it, or for a blob that has more children than there should be. One more
    /// may be there for want of a better place. Whoever has no coordinator to turn to stays.
    fn one_too_many(&self) -> Option<u64> {
        let is_over = |feed: &Feed| {
            let children = self.children_of(&feed.key);
            (feed.is_complete && children > 1) || children > self.fan_out + 1
        };
        let over = self.feeds.iter().filter(|(_, feed)| feed.is_led && is_over(feed));
        over.max_by_key(|(number, feed)| (feed.is_complete, feed.since, **number)).map(|(number, _)| *number)
    }

    fn judge_complete(&mut self, now: Instant) {
        let complete = || self.feeds.values().filter(|feed| feed.is_complete);
        let count = u16::try_from(complete().count()).unwrap_or(u16::MAX);
        if count == 0 {
            self.mark = None;
            return;
        }
        let out: f64 = self.feeds.values().map(|feed| feed.rate).sum();
        match self.mark {
            Some((fewer, less)) if fewer < count => {
                let brought = out - less;
                let each = less / f64::from(fewer);
                if brought >= WORTH * each * f64::from(count - fewer) {
                    self.fan_out_complete = self.fan_out_complete.max(count.saturating_add(1).min(self.most));
                    self.mark = Some((count, out));
                } else {
                    self.fan_out_complete = fewer;
                    self.capacity = Some((out, now));
                }
            }
            _ => {
                self.mark = Some((count, out));
                if count >= self.fan_out_complete && self.capacity(now).is_none_or(|capacity| out < 0.8 * capacity) {
                    self.fan_out_complete = count.saturating_add(1).min(self.most);
                }
            }
        }
    }

    fn children_of(&self, key: &Key) -> u16 {
        u16::try_from(self.feeds.values().filter(|feed| feed.key == *key).count()).unwrap_or(u16::MAX)
    }
}

// === impl Feed ===

impl Feed {
    fn keeps_up(&self) -> bool {
        self.lacks as f64 <= SLACK as f64 + self.coming * SLACK_SECONDS
    }
}
