//! Comparing lists with a neighbour, which finds what was missed.

use std::time::{Duration, Instant};

use libp2p::PeerId;

use super::list::{MAX_MEMBERS, ON_ITS_WAY};
use super::message::{Compare, Message, Rumour, Sum, Tag};
use super::{MAX_ASKED, Membership, NEWS_SIZE};

/// How often lists are compared: soon after a difference was found, then ever more seldom, varied by a quarter.
const FIRST_COMPARISON: Duration = Duration::from_secs(10);
const LAST_COMPARISON: Duration = Duration::from_secs(120);

/// How long a comparison may take before another is begun.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(5);

/// When lists are compared, and with whom that is under way.
pub(super) struct Comparison {
    pub(super) next: Option<Instant>,
    pause: Duration,
    with: Option<(PeerId, Instant, u64)>,
}

// === impl Comparison ===

impl Comparison {
    /// The next are to come soon.
    pub(super) fn found_something(&mut self) {
        self.pause = FIRST_COMPARISON;
    }
}

impl Default for Comparison {
    fn default() -> Self {
        Self { next: None, pause: FIRST_COMPARISON, with: None }
    }
}

// === impl Membership ===

impl Membership {
    pub(super) fn compare_in_time(&mut self, now: Instant) {
        if self.comparison.next.is_some_and(|next| now < next) {
            return;
        }
        let Some(peer) = self.any_neighbour() else { return };
        let on_its_way = u64::try_from(ON_ITS_WAY.as_millis()).unwrap_or(0);
        let sum = self.begin_comparing(now, peer, self.unix(now).saturating_sub(on_its_way));
        self.send(peer, Message { sum, ..Message::default() });
    }

    pub(super) fn begin_comparing(&mut self, now: Instant, peer: PeerId, from: u64) -> Option<Sum> {
        let pause = self.vary(self.comparison.pause);
        self.comparison.pause = (self.comparison.pause * 2).min(LAST_COMPARISON);
        self.comparison.next = Some(now + pause);
        self.comparison.with = Some((peer, now, from));
        Some(self.list.sum(now, from))
    }

    /// Only with the one that was asked: anybody else would make us tell our whole list.
    pub(super) fn compare(&mut self, now: Instant, from: PeerId, theirs: &[u32]) -> Option<Compare> {
        let (_, _, since) =
            self.comparison.with.take_if(|(peer, at, _)| *peer == from && now.duration_since(*at) < COMPARE_TIMEOUT)?;
        let ours = self.list.parts(now, since);
        let differing = ours.iter().zip(theirs).enumerate().filter(|(_, (ours, theirs))| ours != theirs);
        let parts: Vec<u32> = differing.filter_map(|(part, _)| u32::try_from(part).ok()).collect();
        let rumours = self.list.rumours_of(&parts);
        (!parts.is_empty()).then_some(Compare { parts, rumours })
    }

    pub(super) fn answer_comparison(&mut self, now: Instant, from: PeerId, theirs: &Compare) {
        let mut answer = Message { old_news: true, answer: true, ..Message::default() };
        for rumour in theirs.rumours.iter().take(MAX_MEMBERS) {
            let (tag, name) = (Tag(rumour.tag), Tag(rumour.tag).news(rumour.stamp, false));
            if let Some(stamp) = self.list.gone(tag).filter(|stamp| *stamp >= rumour.stamp) {
                answer.rumours.push(Rumour { stamp, gone: true, ..*rumour });
            } else if self.list.lacks(tag, rumour.stamp)
                && self.asked.len() < MAX_ASKED
                && self.asked.insert(name, now).is_none()
            {
                answer.wanted.push(name.0);
            }
        }
        // Whoever has had all that it gets for now is not worth a look through the list.
        let missing = if self.neighbour(now, from).budget.has(now, NEWS_SIZE) {
            self.list.missing_in(&theirs.parts, &theirs.rumours)
        } else {
            Vec::new()
        };
        self.answer(now, from, answer, missing.iter().map(|card| card.signed.clone()).collect());
    }
}
