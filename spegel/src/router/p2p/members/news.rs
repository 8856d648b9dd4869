//! What a node has heard lately, and how often it still passes it on: until a few of those whom it told knew it before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::message::{NewsId, Tag};

/// To how many who knew it already a piece of news is told in vain before it is passed on no more. With five, one in four hundred is
/// left out.
const PATIENCE: u8 = 5;

/// How long a name is known after it was heard: what took longer to come round is found by comparing lists.
const KEPT: Duration = Duration::from_secs(120);

/// How many names are known, and how many of them one message has.
const MAX_NEWS: usize = 4_096;
const MAX_TOLD: usize = 128;

#[derive(Debug, Clone, Copy)]
struct Item {
    tag: Tag,
    left: u8,
    at: Instant,
}

/// The news.
#[derive(Debug, Default)]
pub(super) struct News {
    items: BTreeMap<NewsId, Item>,
    /// The same by whom they are about.
    by_tag: BTreeSet<(Tag, NewsId)>,
    /// How many are still passed on.
    hot: usize,
}

// === impl News ===

impl News {
    /// Passes this on from now, and nothing older about the same member. What was heard before stays as it is.
    pub(super) fn spread(&mut self, now: Instant, name: NewsId, tag: Tag) {
        for (_, older) in self.by_tag.range((tag, NewsId(0))..=(tag, NewsId(u32::MAX))) {
            if let Some(older) = self.items.get_mut(older).filter(|older| older.left > 0) {
                older.left = 0;
                self.hot -= 1;
            }
        }
        if self.items.len() < MAX_NEWS && !self.items.contains_key(&name) {
            self.items.insert(name, Item { tag, left: PATIENCE, at: now });
            self.by_tag.insert((tag, name));
            self.hot += 1;
        }
    }

    /// Whom the news of this name is about, if it has been heard.
    pub(super) fn about(&self, name: NewsId) -> Option<Tag> {
        self.items.get(&name).map(|item| item.tag)
    }

    /// Whether there is something to be passed on.
    pub(super) fn is_hot(&self) -> bool {
        self.hot > 0
    }

    /// What is to be passed on to one who is known to know `theirs`; the newest first if it is too much. Each is counted as told in
    /// vain, until it is asked for.
    pub(super) fn tell(&mut self, theirs: &BTreeSet<NewsId>) -> Vec<NewsId> {
        let mut told: Vec<(u8, NewsId)> =
            self.items.iter().filter(|(_, item)| item.left > 0).map(|(name, item)| (item.left, *name)).collect();
        told.retain(|(_, name)| !theirs.contains(name));
        told.sort_by_key(|(left, _)| std::cmp::Reverse(*left));
        told.truncate(MAX_TOLD);
        let told: Vec<NewsId> = told.into_iter().map(|(_, name)| name).collect();
        for name in &told {
            if let Some(item) = self.items.get_mut(name) {
                item.left -= 1;
                self.hot -= usize::from(item.left == 0);
            }
        }
        told
    }

    /// One who was told did not know it.
    pub(super) fn was_new(&mut self, name: NewsId) {
        if let Some(item) = self.items.get_mut(&name).filter(|item| item.left < PATIENCE) {
            self.hot += usize::from(item.left == 0);
            item.left += 1;
        }
    }

    pub(super) fn sweep(&mut self, now: Instant) {
        let (hot, by_tag) = (&mut self.hot, &mut self.by_tag);
        self.items.retain(|name, item| {
            let kept = now.saturating_duration_since(item.at) < KEPT;
            *hot -= usize::from(!kept && item.left > 0);
            if !kept {
                by_tag.remove(&(item.tag, *name));
            }
            kept
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_passed_on_until_it_is_in_vain() {
        let now = Instant::now();
        let (mut news, name) = (News::default(), NewsId(1));
        news.spread(now, name, Tag(7));
        for _ in 0..20 {
            assert_eq!(news.tell(&BTreeSet::new()), [name]);
            news.was_new(name);
        }
        assert_eq!(news.tell(&BTreeSet::from([name])), [], "who has told us knows it");
        for _ in 0..PATIENCE {
            assert!(news.is_hot());
            assert_eq!(news.tell(&BTreeSet::new()), [name]);
        }
        assert!(!news.is_hot());
        assert_eq!(news.tell(&BTreeSet::new()), []);
        news.spread(now, name, Tag(7));
        assert_eq!((news.is_hot(), news.about(name)), (false, Some(Tag(7))), "heard again it is no news");
        news.spread(now, NewsId(2), Tag(8));
        news.spread(now, NewsId(3), Tag(8));
        assert_eq!(news.tell(&BTreeSet::new()), [NewsId(3)], "only the newest about one member");
        news.sweep(now + KEPT);
        assert_eq!((news.about(name), news.is_hot(), news.by_tag.len()), (None, false, 0));
    }
}
