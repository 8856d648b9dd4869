//! Which ingests the kernel watches for us, and which are looked at instead.
//!
//! Watches are few: the kernel's bound is shared with the other processes of the same user. So one that tells nothing for a while gives way to
//! a new one: a crash leaves ingests that nobody ever takes away. Whatever is not watched is looked at, often where it has grown lately. That is
//! late, and says of no file that its writer closed it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, WatchFlags};
use rustix::io::Errno;

/// How many are watched, and how many of those that stand still may be while others come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) watches: usize,
    pub(super) idle: usize,
    /// How many are looked at.
    pub(super) looks: usize,
}

/// For so long nothing has happened to an ingest that stands still.
pub(super) const IDLE: Duration = Duration::from_secs(60);
/// How often those are looked at that are not watched.
pub(super) const LOOK: Duration = Duration::from_millis(250);
/// And those that stand still.
const LOOK_IDLE: Duration = Duration::from_secs(5);
/// How long the kernel is not asked again after it had no watch left.
const REFUSED: Duration = Duration::from_secs(5);

/// The ingests that are watched or looked at, by their folders' names.
#[derive(Debug)]
pub(super) struct Watches {
    /// None where the kernel has no instance left for us.
    inotify: Option<OwnedFd>,
    limits: Limits,
    names: HashMap<i32, Box<str>>,
    watched: HashMap<Box<str>, Watched>,
    looked_at: HashMap<Box<str>, LookedAt>,
    refused_until: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    wd: i32,
    /// When something happened to it.
    used: Instant,
}

#[derive(Clone, Copy, Debug)]
struct LookedAt {
    used: Instant,
    looked: Instant,
}

/// Whether a folder could be watched.
enum Added {
    Yes(i32),
    No,
    /// It is not there.
    Gone,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self { watches: 1024, idle: 256, looks: 4096 }
    }
}

// === impl Watches ===

impl Watches {
    pub(super) fn new(inotify: Option<OwnedFd>, limits: Limits) -> Self {
        let (names, watched, looked_at) = Default::default();
        Self { inotify, limits, names, watched, looked_at, refused_until: None }
    }

    /// The kernel's instance; none where everything has to be looked at.
    pub(super) fn inotify(&self) -> Option<&OwnedFd> {
        self.inotify.as_ref()
    }

    /// The kernel has an instance for us after all.
    pub(super) fn set_inotify(&mut self, inotify: OwnedFd) {
        self.inotify = Some(inotify);
    }

    /// Watches a folder from now on, or has it looked at. False if there is no room for either.
    pub(super) fn hold(&mut self, folder: &str, path: &Path, now: Instant) -> bool {
        if self.watched.contains_key(folder) {
            return true;
        }
        let known = self.looked_at.get(folder).copied();
        if known.is_some_and(|known| is_idle(known.used, now)) {
            return true;
        }
        let used = known.map_or(now, |known| known.used);
        match self.add(path, now) {
            Added::Yes(wd) => {
                self.looked_at.remove(folder);
                self.names.insert(wd, folder.into());
                self.watched.insert(folder.into(), Watched { wd, used });
                true
            }
            Added::Gone => {
                self.looked_at.remove(folder);
                true
            }
            Added::No => {
                let has_room = known.is_some() || self.looked_at.len() < self.limits.looks;
                if has_room {
                    self.looked_at.entry(folder.into()).or_insert(LookedAt { used, looked: now });
                }
                has_room
            }
        }
    }

    /// Something happened to it.
    pub(super) fn used(&mut self, folder: &str, now: Instant) {
        if let Some(watched) = self.watched.get_mut(folder) {
            watched.used = now;
        } else if let Some(looked_at) = self.looked_at.get_mut(folder) {
            looked_at.used = now;
        }
    }

    /// Lets go of a folder.
    pub(super) fn forget(&mut self, folder: &str) {
        self.looked_at.remove(folder);
        if let Some(Watched { wd, .. }) = self.watched.remove(folder) {
            self.unwatch(wd);
        }
    }

    /// The folder of a watch.
    pub(super) fn folder(&self, wd: i32) -> Option<&str> {
        self.names.get(&wd).map(|name| &**name)
    }

    /// The kernel let go of a watch.
    pub(super) fn lost(&mut self, wd: i32) {
        if let Some(folder) = self.names.remove(&wd) {
            self.watched.remove(&folder);
        }
    }

    /// Whether it is looked at, so that no event tells of its writer.
    pub(super) fn is_looked_at(&self, folder: &str) -> bool {
        self.looked_at.contains_key(folder)
    }

    /// Those whose time has come to be looked at.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Box<str>> {
        let due = self.looked_at.iter_mut().filter(|(_, known)| known.next_look(now) <= now);
        let names = due.map(|(folder, known)| {
            known.looked = now;
            folder.clone()
        });
        names.collect()
    }

    /// When that is.
    pub(super) fn next_look(&self, now: Instant) -> Option<Instant> {
        self.looked_at.values().map(|known| known.next_look(now)).min()
    }

    /// How many are watched, how many are looked at, and how many of the latter have changed lately.
    pub(super) fn counts(&self, now: Instant) -> [usize; 3] {
        let active = self.looked_at.values().filter(|known| !is_idle(known.used, now)).count();
        [self.watched.len(), self.looked_at.len(), active]
    }

    fn add(&mut self, path: &Path, now: Instant) -> Added {
        if self.inotify.is_none() || self.refused_until.is_some_and(|until| now < until) {
            return Added::No;
        }
        self.expire(now);
        if self.watched.len() >= self.limits.watches && !self.give_way(now) {
            return Added::No;
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR;
        loop {
            let Some(inotify) = &self.inotify else { return Added::No };
            match inotify::add_watch(inotify, path, flags) {
                Ok(wd) => return Added::Yes(wd),
                Err(Errno::NOENT | Errno::NOTDIR) => return Added::Gone,
                // The kernel's own bound.
                Err(Errno::NOSPC) if self.give_way(now) => {}
                Err(_) => {
                    self.refused_until = Some(now + REFUSED);
                    return Added::No;
                }
            }
        }
    }

    /// Gives up the watches of those that stand still, but for the latest. Not done while nothing comes: a watch costs nothing then, and looks
    /// do.
    fn expire(&mut self, now: Instant) {
        let idle = self.watched.values().filter(|watched| is_idle(watched.used, now)).count();
        for _ in self.limits.idle..idle {
            self.give_way(now);
        }
    }

    /// Looks from now on at the one that has stood still the longest. False if none stands still.
    fn give_way(&mut self, now: Instant) -> bool {
        let oldest = self.watched.iter().min_by_key(|(_, watched)| watched.used);
        let oldest = oldest.filter(|(_, watched)| is_idle(watched.used, now));
        let Some((folder, watched)) = oldest.map(|(folder, watched)| (folder.clone(), *watched)) else { return false };
        self.watched.remove(&folder);
        self.unwatch(watched.wd);
        if self.looked_at.len() < self.limits.looks {
            self.looked_at.insert(folder, LookedAt { used: watched.used, looked: now });
        }
        true
    }

    fn unwatch(&mut self, wd: i32) {
        self.names.remove(&wd);
        if let Some(inotify) = &self.inotify {
            // Fails if the folder went by itself.
            let _ = inotify::remove_watch(inotify, wd);
        }
    }
}

// === impl LookedAt ===

impl LookedAt {
    fn next_look(&self, now: Instant) -> Instant {
        self.looked + if is_idle(self.used, now) { LOOK_IDLE } else { LOOK }
    }
}

fn is_idle(used: Instant, now: Instant) -> bool {
    now.saturating_duration_since(used) >= IDLE
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::fs::inotify::CreateFlags;

    use super::*;

    const LIMITS: Limits = Limits { watches: 4, idle: 2, looks: 8 };

    struct Fixture {
        folder: tempfile::TempDir,
        watches: Watches,
        now: Instant,
    }

    impl Fixture {
        fn new() -> Self {
            let inotify = inotify::init(CreateFlags::NONBLOCK).unwrap();
            let folder = tempfile::tempdir().unwrap();
            Self { folder, watches: Watches::new(Some(inotify), LIMITS), now: Instant::now() }
        }

        /// A folder that is there; one that was looked at is taken for changed.
        fn hold(&mut self, n: usize) -> bool {
            let path = self.folder.path().join(n.to_string());
            std::fs::create_dir_all(&path).unwrap();
            self.watches.hold(&n.to_string(), &path, self.now)
        }

        fn watched(&self) -> Vec<usize> {
            let mut watched: Vec<_> = self.watches.watched.keys().map(|name| name.parse().unwrap()).collect();
            watched.sort_unstable();
            assert_eq!(self.watches.names.len(), watched.len());
            watched
        }
    }

    #[test]
    fn who_stands_still_gives_way_to_who_comes() {
        let mut fixture = Fixture::new();
        for n in 0..6 {
            assert!(fixture.hold(n));
            fixture.now += Duration::from_millis(1);
        }
        assert_eq!(fixture.watched(), [0, 1, 2, 3], "nobody stands still yet");
        assert_eq!(fixture.watches.counts(fixture.now), [4, 2, 2]);
        assert_eq!(fixture.watches.next_look(fixture.now), Some(fixture.now - Duration::from_millis(2) + LOOK));
        fixture.now += IDLE;
        fixture.watches.used("0", fixture.now);
        fixture.hold(6);
        assert_eq!(fixture.watched(), [0, 2, 3, 6], "the oldest of those that stand still, and only two of these stay");
        assert!(fixture.watches.is_looked_at("1"));
        assert_eq!(fixture.watches.counts(fixture.now), [4, 3, 0]);

        // It goes on, and is watched again; who stands still is not.
        fixture.watches.used("1", fixture.now);
        assert!(fixture.hold(1) && fixture.hold(4));
        assert_eq!(fixture.watched(), [0, 1, 3, 6]);
    }

    #[test]
    fn what_is_not_watched_is_looked_at_the_less_often_the_longer_it_stands_still() {
        let mut fixture = Fixture::new();
        (0..5).for_each(|n| assert!(fixture.hold(n)));
        let mut looks = 0;
        for _ in 0..40 {
            fixture.now += LOOK;
            looks += fixture.watches.due(fixture.now).len();
        }
        assert_eq!(looks, 40);
        fixture.now += IDLE;
        assert_eq!(fixture.watches.due(fixture.now).len(), 1);
        let looks: usize = (0..40).map(|n| fixture.watches.due(fixture.now + LOOK * n).len()).sum();
        assert_eq!(looks, 1);
    }

    #[test]
    fn the_number_of_those_that_are_looked_at_is_bounded() {
        let mut fixture = Fixture::new();
        let held = (0..20).filter(|n| fixture.hold(*n)).count();
        assert_eq!(held, LIMITS.watches + LIMITS.looks);
        for n in 0..20 {
            fixture.watches.forget(&n.to_string());
        }
        assert_eq!(fixture.watches.counts(fixture.now), [0, 0, 0]);
        assert_eq!(fixture.watches.next_look(fixture.now), None);
    }

    #[test]
    fn a_kernel_that_refuses_is_not_asked_all_the_time_and_is_asked_again() {
        let mut fixture = Fixture::new();
        let good =
            fixture.watches.inotify.replace(rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap());
        assert!(fixture.hold(1));
        assert!(fixture.watched().is_empty() && fixture.watches.is_looked_at("1"));
        fixture.watches.inotify = good;
        fixture.hold(1);
        assert!(fixture.watched().is_empty());
        fixture.now += REFUSED;
        fixture.hold(1);
        assert_eq!(fixture.watched(), [1]);
    }

    #[test]
    fn a_folder_that_is_gone_is_let_go() {
        let mut fixture = Fixture::new();
        assert!(fixture.watches.hold("gone", &fixture.folder.path().join("gone"), fixture.now));
        fixture.hold(1);
        let wd = fixture.watches.watched["1"].wd;
        assert_eq!(fixture.watches.folder(wd), Some("1"));
        fixture.watches.lost(wd);
        assert_eq!(fixture.watches.counts(fixture.now), [0, 0, 0]);
    }
}
