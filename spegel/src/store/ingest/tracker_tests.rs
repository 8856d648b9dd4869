#![allow(clippy::unwrap_used)]

use super::*;

const MIB: u64 = 1 << 20;
const STALL: Duration = Duration::from_secs(5);

struct Fixture {
    tracker: Tracker,
    now: Instant,
}

impl Fixture {
    fn new() -> Self {
        Self { tracker: Tracker::new(STALL, MAX_KNOWN), now: Instant::now() }
    }

    /// An ingest of 10 MiB of which nothing is there yet.
    fn with_layer(folder: &str) -> Self {
        let mut fixture = Self::new();
        fixture.begin(folder, Kind::Blob, Some(10 * MIB));
        assert_eq!(fixture.saw(folder, 0), None);
        fixture
    }

    fn begin(&mut self, folder: &str, kind: Kind, total: Option<u64>) {
        assert!(self.tracker.begin(folder, Reference { kind, digest: digest() }, total, false));
    }

    fn saw(&mut self, folder: &str, position: u64) -> Option<Digest> {
        self.tracker.saw(folder, Sight { position, inode: (1, 1), born: 0 }, self.now)
    }

    fn wait(&mut self, time: Duration) -> Vec<Digest> {
        self.now += time;
        self.tracker.tick(self.now)
    }

    fn growth(&self) -> Growth {
        self.tracker.growth(&digest()).unwrap()
    }

    fn is_offered(&self) -> bool {
        let is_offered = self.tracker.is_offered(&digest());
        assert_eq!(is_offered, self.tracker.growth(&digest()).is_some(), "what is offered can be had");
        is_offered
    }
}

fn digest() -> Digest {
    format!("sha256:{:064x}", 7).parse().unwrap()
}

fn now_at(growth: &Growth) -> (u64, bool) {
    let progress = *growth.progress.borrow();
    (progress.position, progress.ended)
}

#[test]
fn it_is_offered_from_its_first_bytes_to_its_commit() {
    let mut fixture = Fixture::with_layer("a");
    assert!(!fixture.is_offered());
    assert_eq!(fixture.saw("a", MIB), Some(digest()));
    assert_eq!(fixture.saw("a", 2 * MIB), None, "nothing new is offered");
    let growth = fixture.growth();
    assert_eq!((growth.total, now_at(&growth)), (10 * MIB, (2 * MIB, false)));
    fixture.saw("a", 10 * MIB);
    assert_eq!(now_at(&growth), (10 * MIB, true));
    assert!(fixture.is_offered(), "until it is the blob");
    assert_eq!(fixture.tracker.committed("a"), Some(digest()));
    assert!(!fixture.is_offered());
    assert_eq!(now_at(&growth), (10 * MIB, true));
}

#[test]
fn who_follows_a_commit_that_came_early_has_all_of_it() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", MIB);
    let growth = fixture.growth();
    fixture.tracker.committed("a");
    assert_eq!(now_at(&growth), (10 * MIB, true));
}

#[test]
fn what_was_there_already_is_offered_only_once_it_grows() {
    let mut fixture = Fixture::new();
    fixture.begin("a", Kind::Blob, Some(10 * MIB));
    assert_eq!(fixture.saw("a", 3 * MIB), None);
    assert!(!fixture.is_offered(), "a crash leaves it behind");
    assert_eq!(fixture.saw("a", 4 * MIB), Some(digest()), "a later pull resumes it");
}

#[test]
fn what_was_seen_to_be_made_has_grown_by_its_first_bytes() {
    let mut fixture = Fixture::new();
    let reference = Reference { kind: Kind::Blob, digest: digest() };
    assert!(fixture.tracker.begin("a", reference, Some(10 * MIB), true));
    assert!(!fixture.is_offered() && fixture.tracker.expects(&digest()));
    assert_eq!(fixture.saw("a", 3 * MIB), Some(digest()));
    assert!(!fixture.tracker.expects(&digest()), "it came");
}

#[test]
fn what_stands_still_is_withdrawn_and_offered_again_when_it_goes_on() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", MIB);
    let growth = fixture.growth();
    assert_eq!(fixture.wait(STALL - Duration::from_millis(1)), []);
    assert_eq!(fixture.tracker.deadline(), Some(fixture.now + Duration::from_millis(1)));
    assert_eq!(fixture.wait(Duration::from_millis(1)), [digest()]);
    assert!(!fixture.is_offered());
    assert_eq!(now_at(&growth), (MIB, true));
    assert_eq!((fixture.wait(STALL), fixture.tracker.deadline()), (vec![], None), "once");
    assert_eq!(fixture.saw("a", 2 * MIB), Some(digest()));
    assert_eq!(now_at(&fixture.growth()), (2 * MIB, false));
    assert_eq!(now_at(&growth), (MIB, true), "who was sent away stays so");
}

/// At 100 KB/s a step of 1 MiB takes ten seconds: that is slow, and no stall.
#[test]
fn who_has_grown_slowly_may_go_on_so() {
    let mut fixture = Fixture::with_layer("a");
    let step = 2 * STALL;
    for n in 1..5 {
        assert_eq!(fixture.wait(step), [], "{n}");
        fixture.saw("a", n * MIB);
    }
    assert_eq!(fixture.wait(2 * step - Duration::from_millis(1)), []);
    assert_eq!(fixture.wait(Duration::from_millis(1)), [digest()], "twice as long is too long");
    // Soon forgotten once it is fast.
    for n in 5..10 {
        fixture.saw("a", n * MIB);
    }
    assert_eq!(fixture.wait(STALL).len(), 1);
}

#[test]
fn no_step_may_take_longer_than_the_slowest() {
    let mut fixture = Fixture::with_layer("a");
    fixture.now += 100 * STALL;
    fixture.saw("a", MIB);
    assert_eq!(fixture.wait(SLOWEST * STALL - Duration::from_millis(1)), []);
    assert_eq!(fixture.wait(Duration::from_millis(1)), [digest()]);
}

#[test]
fn a_writer_that_closes_without_a_commit_has_given_up() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", 10 * MIB);
    fixture.tracker.closed("a", fixture.now);
    assert_eq!(fixture.wait(COMMIT - Duration::from_millis(1)), []);
    assert!(fixture.is_offered());
    assert_eq!(fixture.wait(Duration::from_millis(1)), [digest()], "such as one whose bytes were wrong");
    assert_eq!(fixture.saw("a", 10 * MIB), None);
    assert!(!fixture.is_offered());
}

#[test]
fn a_whole_file_whose_end_nobody_hears_of_is_given_up_a_little_later() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", 9 * MIB);
    fixture.tracker.unheard("a", fixture.now);
    assert_eq!(fixture.wait(COMMIT_UNHEARD), [], "it may grow on");
    fixture.saw("a", 10 * MIB);
    fixture.tracker.unheard("a", fixture.now);
    assert_eq!(fixture.wait(COMMIT_UNHEARD / 2), []);
    fixture.tracker.unheard("a", fixture.now);
    assert_eq!(fixture.wait(COMMIT_UNHEARD / 2), [digest()]);
}

#[test]
fn the_one_that_has_stood_still_the_longest_makes_room() {
    let mut fixture = Fixture { tracker: Tracker::new(STALL, 3), now: Instant::now() };
    let second = Duration::from_secs(1);
    for folder in ["old", "older", "grows"] {
        fixture.begin(folder, Kind::Blob, Some(10 * MIB));
    }
    for (folder, position) in [("grows", 0), ("older", 5), ("old", 5), ("grows", 1)] {
        fixture.now += second;
        fixture.saw(folder, position);
        fixture.saw(folder, position);
    }
    assert!(!fixture.tracker.has_room());
    let mut room = |ago: u32| fixture.tracker.make_room(fixture.now - second * ago);
    assert_eq!(room(3), None, "nobody for so long");
    assert_eq!(room(1).as_deref(), Some("older"));
    assert_eq!(room(1).as_deref(), Some("old"));
    assert_eq!(room(0), None, "what grows stays");
    assert!(fixture.tracker.has_room());
}

#[test]
fn a_writer_that_goes_on_after_a_close_has_not_given_up() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", MIB);
    fixture.tracker.closed("a", fixture.now);
    fixture.saw("a", 2 * MIB);
    assert_eq!(fixture.wait(COMMIT), []);
    assert!(fixture.is_offered());
}

#[test]
fn a_file_that_starts_over_ends_for_those_who_follow_it() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", 5 * MIB);
    let growth = fixture.growth();
    assert_eq!(fixture.saw("a", 0), Some(digest()));
    assert_eq!(now_at(&growth), (5 * MIB, true));
    assert!(!fixture.is_offered());
    assert_eq!(fixture.saw("a", MIB), Some(digest()));
    assert_eq!(now_at(&fixture.growth()), (MIB, false));

    let growth = fixture.growth();
    let other = Sight { position: 2 * MIB, inode: (1, 2), born: 0 };
    assert_eq!(fixture.tracker.saw("a", other, fixture.now), Some(digest()), "another file in its place");
    assert_eq!(now_at(&growth), (MIB, true));
}

#[test]
fn a_file_has_a_name_until_it_starts_over() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", MIB);
    let name = fixture.growth().file;
    fixture.wait(STALL);
    fixture.saw("a", 2 * MIB);
    assert_eq!(fixture.growth().file, name, "it goes on where it was");
    fixture.saw("a", 0);
    fixture.saw("a", MIB);
    let anew = fixture.growth().file;
    assert_ne!(anew, name);
    let other = Sight { position: 2 * MIB, inode: (1, 1), born: 5 };
    fixture.tracker.saw("a", other, fixture.now);
    assert_ne!(fixture.growth().file, anew, "an inode that is used again");
}

#[test]
fn a_folder_that_goes_ends_for_those_who_follow_it() {
    let mut fixture = Fixture::with_layer("a");
    fixture.saw("a", 5 * MIB);
    let growth = fixture.growth();
    assert_eq!(fixture.tracker.gone("a"), Some(digest()));
    assert_eq!(now_at(&growth), (5 * MIB, true));
    assert_eq!((fixture.tracker.knows("a"), fixture.is_offered()), (false, false));
}

#[test]
fn what_has_no_length_or_too_many_bytes_or_is_a_manifest_is_not_offered() {
    for (kind, total) in [(Kind::Blob, None), (Kind::Blob, Some(MIB)), (Kind::Manifest, Some(10 * MIB))] {
        let mut fixture = Fixture::new();
        fixture.begin("a", kind, total);
        fixture.saw("a", 0);
        assert_eq!(fixture.saw("a", 2 * MIB), None);
        assert!(!fixture.is_offered());
        assert_eq!(fixture.tracker.committed("a"), Some(digest()), "then it is as good as any");
    }
}

#[test]
fn one_of_two_ingests_of_a_digest_is_enough() {
    let mut fixture = Fixture::with_layer("a");
    fixture.begin("b", Kind::Blob, Some(10 * MIB));
    fixture.saw("b", 0);
    fixture.saw("a", MIB);
    fixture.saw("b", MIB);
    fixture.tracker.gone("a");
    assert!(fixture.is_offered());
    fixture.tracker.gone("b");
    assert!(!fixture.is_offered());
}

#[test]
fn the_number_of_ingests_is_bounded() {
    let mut fixture = Fixture::new();
    let reference = || Reference { kind: Kind::Blob, digest: digest() };
    let begun = (0..MAX_KNOWN + 9).filter(|n| fixture.tracker.begin(&n.to_string(), reference(), None, true)).count();
    assert_eq!(begun, MAX_KNOWN);
}

#[test]
fn what_came_whole_and_was_not_kept_is_told_once() {
    let mut kept = Fixture::with_layer("a");
    kept.saw("a", 10 * MIB);
    kept.tracker.closed("a", kept.now);
    kept.tracker.committed("a");
    kept.wait(2 * STALL);
    assert_eq!(kept.tracker.take_discarded(), []);

    let mut closed = Fixture::with_layer("a");
    closed.saw("a", 10 * MIB);
    closed.tracker.closed("a", closed.now);
    assert_eq!(closed.tracker.take_discarded(), [], "containerd may still rename it");
    closed.wait(COMMIT);
    assert_eq!(closed.tracker.take_discarded(), [digest()]);
    closed.wait(STALL);
    closed.tracker.gone("a");
    assert_eq!(closed.tracker.take_discarded(), []);

    let mut removed = Fixture::with_layer("a");
    removed.saw("a", 10 * MIB);
    removed.tracker.gone("a");
    assert_eq!(removed.tracker.take_discarded(), [digest()]);
}

#[test]
fn what_did_not_come_whole_was_not_discarded() {
    for is_closed in [false, true] {
        let mut cut = Fixture::with_layer("a");
        cut.saw("a", 9 * MIB);
        if is_closed {
            cut.tracker.closed("a", cut.now);
        }
        cut.wait(6 * STALL);
        cut.tracker.gone("a");
        assert_eq!(cut.tracker.take_discarded(), []);
    }
}

#[test]
fn what_arrives_is_told_and_what_was_left_behind_is_not() {
    let mut fixture = Fixture::with_layer("a");
    assert_eq!(fixture.tracker.arriving(), [], "nothing has grown");
    fixture.saw("a", 3 * MIB);
    let told = Arriving { digest: digest(), position: 3 * MIB, total: Some(10 * MIB), is_offered: true };
    assert_eq!(fixture.tracker.arriving(), [told]);
    fixture.wait(2 * STALL);
    assert_eq!(fixture.tracker.arriving(), []);
}
