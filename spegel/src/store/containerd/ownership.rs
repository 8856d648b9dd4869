//! Which content that no image reaches is our namespace's: asked of containerd once, and remembered for a while.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use tokio::time::Instant;

use crate::oci::Digest;

/// How long content of our namespace is believed to stay so. Only garbage collection takes it away, and not all versions
/// of containerd tell of that.
const OURS_FOR: Duration = Duration::from_secs(60);

/// How long content is believed not to be ours. Short, because containerd puts the file in place just before it records
/// whose it is, and before 2.1 tells nobody.
const NOT_OURS_FOR: Duration = Duration::from_secs(5);

/// How many digests are remembered.
const MAX_ENTRIES: usize = 4096;

type Answer = Shared<BoxFuture<'static, Option<bool>>>;

#[derive(Debug)]
enum Entry {
    Known {
        is_ours: bool,
        until: Instant,
    },
    /// On its way, for all who wait for it.
    Asked(Answer),
}

/// What containerd said of digests that no image reaches.
#[derive(Debug, Default)]
pub(super) struct Ownership {
    entries: Mutex<HashMap<Digest, Entry>>,
}

// === impl Ownership ===

impl Ownership {
    /// Whether the content is ours. `ask` is called once, however many want to know at the same time; its answer is nothing
    /// when it could not find out, which is not remembered.
    pub(super) async fn is_ours<F>(&self, digest: &Digest, ask: impl FnOnce() -> F) -> bool
    where
        F: Future<Output = Option<bool>> + Send + 'static,
    {
        let answer = {
            let mut entries = self.entries();
            match entries.get(digest) {
                Some(&Entry::Known { is_ours, until }) if Instant::now() < until => return is_ours,
                Some(Entry::Asked(answer)) => answer.clone(),
                _ => {
                    let answer = ask().boxed().shared();
                    make_room(&mut entries);
                    entries.insert(digest.clone(), Entry::Asked(answer.clone()));
                    answer
                }
            }
        };
        let is_ours = answer.await;
        let mut entries = self.entries();
        // An event that came meanwhile knows better.
        if matches!(entries.get(digest), Some(Entry::Asked(_))) {
            entries.remove(digest);
            entries.extend(is_ours.map(|is_ours| (digest.clone(), Entry::known(is_ours))));
        }
        is_ours.unwrap_or(false)
    }

    /// containerd told so by itself.
    pub(super) fn learn(&self, digest: &Digest, is_ours: bool) {
        let mut entries = self.entries();
        make_room(&mut entries);
        entries.insert(digest.clone(), Entry::known(is_ours));
    }

    /// Whatever was known may be different now.
    pub(super) fn forget_all(&self) {
        self.entries().clear();
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Digest, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn known(is_ours: bool) -> Self {
        let until = Instant::now() + if is_ours { OURS_FOR } else { NOT_OURS_FOR };
        Self::Known { is_ours, until }
    }
}

/// What has run out goes first; where that is not enough, everything, which costs a question each.
fn make_room(entries: &mut HashMap<Digest, Entry>) {
    if entries.len() < MAX_ENTRIES {
        return;
    }
    let now = Instant::now();
    entries.retain(|_, entry| matches!(entry, Entry::Known { until, .. } if now < *until));
    if entries.len() >= MAX_ENTRIES {
        entries.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Clone, Default)]
    struct Asked(Arc<AtomicUsize>);

    impl Asked {
        fn answer(&self, answer: Option<bool>) -> impl FnOnce() -> futures::future::Ready<Option<bool>> {
            let counter = self.0.clone();
            move || {
                counter.fetch_add(1, Ordering::Relaxed);
                futures::future::ready(answer)
            }
        }

        fn times(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn digest(n: usize) -> Digest {
        format!("sha256:{n:064x}").parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn asked_once_until_it_may_be_different() {
        let (ownership, asked) = (Ownership::default(), Asked::default());
        for (is_ours, lasts) in [(true, OURS_FOR), (false, NOT_OURS_FOR)] {
            let digest = digest(lasts.as_secs() as usize);
            let before = asked.times();
            for _ in 0..3 {
                assert_eq!(ownership.is_ours(&digest, asked.answer(Some(is_ours))).await, is_ours);
            }
            assert_eq!(asked.times() - before, 1);
            tokio::time::advance(lasts).await;
            ownership.is_ours(&digest, asked.answer(Some(is_ours))).await;
            assert_eq!(asked.times() - before, 2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_at_the_same_time_shares_the_answer() {
        let (ownership, asked) = (Ownership::default(), AtomicUsize::new(0));
        let ask = || {
            asked.fetch_add(1, Ordering::Relaxed);
            async {
                tokio::time::sleep(Duration::from_millis(1)).await;
                Some(true)
            }
        };
        let digest = digest(1);
        let all = futures::future::join_all((0..32).map(|_| ownership.is_ours(&digest, ask))).await;
        assert_eq!((all, asked.load(Ordering::Relaxed)), (vec![true; 32], 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_not_remembered() {
        let (ownership, asked) = (Ownership::default(), Asked::default());
        assert!(!ownership.is_ours(&digest(1), asked.answer(None)).await);
        assert!(ownership.is_ours(&digest(1), asked.answer(Some(true))).await);
        assert_eq!(asked.times(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_knows_better() {
        let (ownership, asked) = (Ownership::default(), Asked::default());
        assert!(!ownership.is_ours(&digest(1), asked.answer(Some(false))).await);
        ownership.learn(&digest(1), true);
        assert!(ownership.is_ours(&digest(1), asked.answer(Some(false))).await);
        ownership.forget_all();
        assert!(!ownership.is_ours(&digest(1), asked.answer(Some(false))).await);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_bounded() {
        let ownership = Ownership::default();
        for n in 0..2 * MAX_ENTRIES {
            ownership.learn(&digest(n), false);
        }
        assert!(ownership.entries().len() <= MAX_ENTRIES);
    }
}
