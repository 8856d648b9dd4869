//! The list of members, and of those that are gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;

use super::message::{Believed, NewsId, Rumour, Sum, Tag};

/// How long it is remembered that a member is gone, so that nobody's old card brings it back.
const GONE_KEPT: Duration = Duration::from_secs(600);

/// How long news may take to reach everyone: what is younger is no reason to compare lists.
pub(super) const ON_ITS_WAY: Duration = Duration::from_secs(30);

/// For how long after the moment that a sum names cards do not count in it. Longer than [`ON_ITS_WAY`], since clocks differ, and not
/// for ever, since a clock may be wrong.
const SPARED_MS: u64 = 60_000;

/// Bounds on what a peer can make grow.
pub(super) const MAX_MEMBERS: usize = 20_000;
pub(super) const MAX_GONE: usize = 20_000;

/// The number of parts of a list.
pub(super) const PARTS: usize = 256;

/// The list.
#[derive(Default)]
pub(super) struct List {
    members: BTreeMap<Tag, Known>,
    gone: BTreeMap<Tag, Gone>,
    /// The names of the news that all this was once.
    names: BTreeMap<NewsId, Tag>,
    changes: BTreeMap<PeerId, Option<Arc<Believed>>>,
}

pub(super) struct Known {
    pub(super) card: Arc<Believed>,
    pub(super) failures: u8,
}

#[derive(Clone, Copy)]
struct Gone {
    stamp: u64,
    at: Instant,
    /// Whether it was a member of this list.
    left: bool,
}

// === impl List ===

impl List {
    pub(super) fn members(&self) -> impl Iterator<Item = &Arc<Believed>> {
        self.members.values().map(|known| &known.card)
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn get(&self, tag: Tag) -> Option<&Arc<Believed>> {
        self.members.get(&tag).map(|known| &known.card)
    }

    pub(super) fn get_mut(&mut self, tag: Tag) -> Option<&mut Known> {
        self.members.get_mut(&tag)
    }

    /// The time of the member's card.
    pub(super) fn stamp(&self, tag: Tag) -> Option<u64> {
        self.get(tag).map(|known| known.card.stamp)
    }

    /// The time of the card of which it was said that its member is gone.
    pub(super) fn gone(&self, tag: Tag) -> Option<u64> {
        self.gone.get(&tag).map(|gone| gone.stamp)
    }

    /// Whom the news of this name is about, if the list has it.
    pub(super) fn named(&self, name: NewsId) -> Option<Tag> {
        self.names.get(&name).copied()
    }

    /// Whether a card of that time would change the list.
    pub(super) fn lacks(&self, tag: Tag, stamp: u64) -> bool {
        let older = |known: Option<u64>| known.is_none_or(|known| known < stamp);
        older(self.stamp(tag)) && older(self.gone(tag)) && (self.len() < MAX_MEMBERS || self.members.contains_key(&tag))
    }

    pub(super) fn put(&mut self, card: Arc<Believed>) {
        let tag = card.tag;
        self.names.insert(card.news(), tag);
        self.changes.insert(card.card.peer, Some(Arc::clone(&card)));
        if let Some(old) = self.members.insert(tag, Known { card, failures: 0 }) {
            self.names.remove(&old.card.news());
        }
        if let Some(gone) = self.gone.remove(&tag) {
            self.names.remove(&tag.news(gone.stamp, true));
        }
    }

    /// A member is gone, or is never to be one with a card of that time. True if it was there.
    pub(super) fn bury(&mut self, now: Instant, tag: Tag, stamp: u64) -> bool {
        let old = self.members.remove(&tag);
        if let Some(old) = &old {
            self.names.remove(&old.card.news());
            self.changes.insert(old.card.card.peer, None);
        }
        if self.gone.len() < MAX_GONE || self.gone.contains_key(&tag) {
            self.names.insert(tag.news(stamp, true), tag);
            if let Some(before) = self.gone.insert(tag, Gone { stamp, at: now, left: old.is_some() })
                && before.stamp != stamp
            {
                self.names.remove(&tag.news(before.stamp, true));
            }
        }
        old.is_some()
    }

    /// Forgets who has been gone for long.
    pub(super) fn sweep(&mut self, now: Instant) {
        let names = &mut self.names;
        self.gone.retain(|tag, gone| {
            let kept = now.saturating_duration_since(gone.at) < GONE_KEPT;
            if !kept {
                names.remove(&tag.news(gone.stamp, true));
            }
            kept
        });
    }

    /// What has changed since this was last asked: each member with its newest card, or nothing if it is gone.
    pub(super) fn take_changes(&mut self) -> BTreeMap<PeerId, Option<Arc<Believed>>> {
        std::mem::take(&mut self.changes)
    }

    /// The sum of the whole, but for what is on its way.
    pub(super) fn sum(&self, now: Instant, from: u64) -> Sum {
        Sum { value: self.counted(now, from).fold(0, |sum, (_, mixed)| sum ^ mixed), from }
    }

    /// The sums of its parts, in the same way.
    pub(super) fn parts(&self, now: Instant, from: u64) -> Vec<u32> {
        let mut parts = vec![0; PARTS];
        for (tag, mixed) in self.counted(now, from) {
            // The upper half: the lower one names news.
            parts[tag.part()] ^= u32::try_from(mixed >> 32).unwrap_or_default();
        }
        parts
    }

    /// All that is in these parts.
    pub(super) fn rumours_of(&self, parts: &[u32]) -> Vec<Rumour> {
        let parts = parts_of(parts);
        let inside = self.members.iter().filter(|(tag, _)| parts[tag.part()]);
        inside.map(|(tag, known)| Rumour { tag: tag.0, stamp: known.card.card.stamp, gone: false }).collect()
    }

    /// The cards in these parts of those who are not in a list of these parts, or are there with an older one.
    pub(super) fn missing_in(&self, parts: &[u32], theirs: &[Rumour]) -> Vec<Arc<Believed>> {
        let parts = parts_of(parts);
        let told: BTreeMap<u64, u64> = theirs.iter().map(|rumour| (rumour.tag, rumour.stamp)).collect();
        let inside = self.members().filter(|card| parts[card.tag.part()]);
        let newer = |card: &&Arc<Believed>| told.get(&card.tag.0).is_none_or(|stamp| *stamp < card.card.stamp);
        inside.filter(newer).cloned().collect()
    }

    fn counted(&self, now: Instant, from: u64) -> impl Iterator<Item = (Tag, u64)> + '_ {
        let spared = move |stamp: u64| from > 0 && (from..from + SPARED_MS).contains(&stamp);
        let members = self.members.iter().map(|(tag, known)| (*tag, known.card.card.stamp));
        // Who has just left is still in the lists of others.
        let leaving = move |gone: &Gone| from > 0 && gone.left && now.saturating_duration_since(gone.at) < ON_ITS_WAY;
        let left = self.gone.iter().filter(move |(_, gone)| leaving(gone)).map(|(tag, gone)| (*tag, gone.stamp));
        members.chain(left).filter(move |(_, stamp)| !spared(*stamp)).map(|(tag, stamp)| (tag, tag.mixed(stamp)))
    }
}

fn parts_of(numbers: &[u32]) -> [bool; PARTS] {
    let mut parts = [false; PARTS];
    for part in numbers.iter().filter_map(|part| usize::try_from(*part).ok()) {
        if let Some(part) = parts.get_mut(part) {
            *part = true;
        }
    }
    parts
}
