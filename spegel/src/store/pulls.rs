//! What this node's own containerd says that it pulls, by asking its mirror for it: before the image is recorded, which is when its pull ends,
//! nothing else tells from which repository content is that arrives.
//!
//! An ingest names a namespace and a digest, and no repository; the labels that containerd gives content name one, but only once it is there.
//! So where there are filters, content that no image reaches is offered early only if it was asked for in the name of a repository that they
//! let pass. A request by digest does not name the tag that the filters may keep back: a repository of which such a tag was asked for lately
//! is taken for kept back as a whole. What containerd gets without asking its mirror is not offered before its image is recorded.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::oci::{Digest, Filters, Repository, TagOrDigest};

/// How long the pull of an image may take whose tag is kept back.
const PULL: Duration = Duration::from_secs(3600);

/// How many digests are remembered, and how many repositories.
const CAPACITY: usize = 4096;

/// What was asked for. The clock is the caller's.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    allowed: Recent<Digest>,
    /// Repositories of which a tag was asked for that the filters keep back.
    kept_back: Recent<Repository>,
}

/// The latest of many, and when each came.
#[derive(Debug)]
struct Recent<T> {
    known: HashSet<T>,
    order: VecDeque<(T, Instant)>,
}

// === impl Pulls ===

impl Pulls {
    /// Our containerd asks for something of a repository. Says which digest may be offered early for that reason.
    pub(super) fn asked<'a>(
        &mut self,
        repository: &Repository,
        reference: &'a TagOrDigest,
        filters: &Filters,
        now: Instant,
    ) -> Option<&'a Digest> {
        self.kept_back.forget_before(now.checked_sub(PULL));
        match reference {
            TagOrDigest::Tag(tag) => {
                if filters.excludes_tag(tag) {
                    self.kept_back.add(tag.repository(), now);
                }
                None
            }
            TagOrDigest::Digest(_) if filters.excludes_repository(repository) => None,
            TagOrDigest::Digest(_) if self.kept_back.known.contains(repository) => None,
            TagOrDigest::Digest(digest) => {
                self.allowed.add(digest, now);
                Some(digest)
            }
        }
    }

    /// Whether the digest was asked for in the name of a repository that the filters let pass.
    pub(super) fn allow(&self, digest: &Digest) -> bool {
        self.allowed.known.contains(digest)
    }
}

// === impl Recent ===

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), order: VecDeque::new() }
    }
}

impl<T: Clone + Eq + Hash> Recent<T> {
    fn add(&mut self, item: &T, now: Instant) {
        if !self.known.insert(item.clone()) {
            self.order.retain(|(known, _)| known != item);
        }
        self.order.push_back((item.clone(), now));
        if self.order.len() > CAPACITY {
            self.pop();
        }
    }

    fn forget_before(&mut self, time: Option<Instant>) {
        while self.order.front().is_some_and(|(_, at)| time.is_some_and(|time| *at <= time)) {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some((oldest, _)) = self.order.pop_front() {
            self.known.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::LazyLock;

    use super::*;

    fn digest(n: usize) -> Digest {
        format!("sha256:{n:064x}").parse().unwrap()
    }

    fn repository(name: &str) -> Repository {
        Repository::new("registry.test", name).unwrap()
    }

    static FILTERS: LazyLock<Filters> = LazyLock::new(|| {
        Filters::new(&["https://registry.test".into()], &["/secret".into(), ":latest$".into()]).unwrap()
    });

    fn asks(pulls: &mut Pulls, repository: &Repository, n: usize, now: Instant) -> bool {
        let reference = TagOrDigest::Digest(digest(n));
        let is_allowed = pulls.asked(repository, &reference, &FILTERS, now).is_some();
        assert!(!is_allowed || pulls.allow(&digest(n)));
        is_allowed
    }

    #[test]
    fn what_is_asked_for_in_the_name_of_an_open_repository_may_be_offered() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        assert!(!pulls.allow(&digest(1)), "nobody asked");
        assert!(!asks(&mut pulls, &repository("secret"), 1, now));
        assert!(!asks(&mut pulls, &Repository::new("other.test", "app").unwrap(), 1, now));
        assert!(!pulls.allow(&digest(1)));
        assert!(asks(&mut pulls, &repository("app"), 1, now));
        asks(&mut pulls, &repository("secret"), 1, now);
        assert!(pulls.allow(&digest(1)), "one repository that is open is enough");
    }

    #[test]
    fn a_tag_that_is_kept_back_keeps_its_repository_back_for_as_long_as_its_pull_may_take() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        let tag = |name: &str| TagOrDigest::Tag(format!("registry.test/app:{name}").parse().unwrap());
        pulls.asked(&repository("app"), &tag("v1"), &FILTERS, now);
        assert!(asks(&mut pulls, &repository("app"), 1, now));
        pulls.asked(&repository("app"), &tag("latest"), &FILTERS, now);
        assert!(!asks(&mut pulls, &repository("app"), 2, now));
        assert!(asks(&mut pulls, &repository("other"), 3, now));
        assert!(asks(&mut pulls, &repository("app"), 2, now + PULL));
    }

    #[test]
    fn memory_is_bounded() {
        let (mut pulls, now) = (Pulls::default(), Instant::now());
        for n in 0..2 * CAPACITY {
            asks(&mut pulls, &repository("app"), n, now);
            let tag = TagOrDigest::Tag(format!("registry.test/r{n}:latest").parse().unwrap());
            pulls.asked(&repository("app"), &tag, &FILTERS, now);
        }
        assert_eq!((pulls.allowed.order.len(), pulls.allowed.known.len()), (CAPACITY, CAPACITY));
        assert_eq!((pulls.kept_back.order.len(), pulls.kept_back.known.len()), (CAPACITY, CAPACITY));
        assert!(!pulls.allow(&digest(0)) && pulls.allow(&digest(2 * CAPACITY - 1)));
    }
}
