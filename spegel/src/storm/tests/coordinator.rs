//! What one coordinator answers.

use std::time::{Duration, Instant};

use crate::storm::{
    Coordinator, GRACE, Have, Holding, Key, LEASE, Limits, Node, Request, Response, SUSPECT, Stand, Want, Why, Zone,
};

const KEY: Key = Key([3; 32]);
const TOTAL: u64 = 256 << 20;

/// A coordinator and those who talk to it.
struct Talk {
    coordinator: Coordinator,
    now: Instant,
    began: Instant,
    number: u64,
}

impl Talk {
    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        let now = Instant::now();
        Self { coordinator: Coordinator::new(limits, now), now, began: now, number: 0 }
    }

    /// One in which 1 pulls, and each up to `last` gets it from the one before.
    fn in_a_chain(last: u64) -> Self {
        let mut talk = Self::new();
        talk.pulls(1);
        let parents: Vec<u64> = (2..=last).map(|node| parent(talk.want(node))).collect();
        assert_eq!(parents, (1..last).collect::<Vec<_>>());
        talk
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn say(&mut self, node: u64, zone: u32, request: &Request) -> Option<Response> {
        self.coordinator.receive(Node(node), Zone(zone), request, self.now)
    }

    fn want(&mut self, node: u64) -> Response {
        self.want_as(node, 0, |_| {})
    }

    fn want_as(&mut self, node: u64, zone: u32, change: impl Fn(&mut Want)) -> Response {
        self.number += 1;
        let mut want = Want {
            key: KEY,
            number: self.number,
            position: 0,
            total: Some(TOTAL),
            slots: 1,
            usual: None,
            why: Why::New,
            avoid: Vec::new(),
            skipped: 0,
            busy: false,
            fed: false,
        };
        change(&mut want);
        self.say(node, zone, &Request::Want(want)).expect("an answer")
    }

    fn have(&mut self, node: u64, position: u64, holding: Holding) {
        self.have_for(node, position, 1, holding);
    }

    fn have_for(&mut self, node: u64, position: u64, slots: u16, holding: Holding) {
        self.number += 1;
        let have = Have { key: KEY, number: self.number, position, total: Some(TOTAL), slots, holding };
        let answer = self.say(node, 0, &Request::Have(have));
        assert!(matches!(answer, Some(Response::Ack { .. })), "{answer:?}");
    }

    /// Whom the node is sent to that has so many bytes and has lost its parent.
    fn after_losing(&mut self, node: u64, parent_before: u64, position: u64) -> u64 {
        parent(self.want_as(node, 0, |want| {
            (want.position, want.why, want.avoid) = (position, Why::Broke, vec![Node(parent_before)]);
        }))
    }

    #[track_caller]
    fn pulls(&mut self, node: u64) {
        let answer = self.want(node);
        assert!(matches!(answer, Response::Pull { .. }), "{answer:?}");
    }
}

#[track_caller]
fn parent(answer: Response) -> u64 {
    match answer {
        Response::Fetch { parent, .. } => parent.0,
        answer => panic!("{answer:?}"),
    }
}

/// How far the furthest of a thousand that ask like this is from the first.
fn deepest_of_a_thousand(change: impl Fn(&mut Want)) -> u32 {
    let mut talk = Talk::new();
    talk.want_as(0, 0, &change);
    let mut level = vec![0; 1000];
    for node in 1..1000_u64 {
        level[node as usize] = level[parent(talk.want_as(node, 0, &change)) as usize] + 1;
    }
    level.into_iter().max().unwrap_or_default()
}

#[test]
fn the_first_pulls_and_the_others_follow_in_a_chain() {
    let talk = Talk::in_a_chain(5);
    assert_eq!(talk.coordinator.leases(), 1);
}

#[test]
fn a_tree_is_no_deeper_than_it_may_be_and_no_parent_has_many_more_than_its_slots() {
    let mut talk = Talk::new();
    talk.pulls(0);
    let mut parents = vec![0; 1000];
    let mut level = vec![0; 1000];
    for node in 1..1000_u64 {
        let of = parent(talk.want(node)) as usize;
        parents[of] += 1;
        level[node as usize] = level[of] + 1;
    }
    assert_eq!(level.iter().max(), Some(&24), "one level for each 4 MiB, up to 24");
    assert_eq!(parents.iter().max(), Some(&2), "one more than there are slots");
    assert_eq!(deepest_of_a_thousand(|want| want.total = Some(64 << 20)), 16);
    // What is small is passed on to many at once.
    assert_eq!(deepest_of_a_thousand(|want| (want.total, want.slots) = (Some(4096), 16)), 3);
}

#[test]
fn own_zones_are_preferred() {
    let mut talk = Talk::new();
    talk.want_as(0, 1, |_| {});
    let (mut crossings, nodes) = (0, 30);
    for node in 1..nodes {
        let zone = node as u32 % 3 + 1;
        let of = parent(talk.want_as(node, zone, |_| {}));
        crossings += u32::from(zone != if of == 0 { 1 } else { of as u32 % 3 + 1 });
    }
    assert_eq!(crossings, 2, "one link into each other zone");
}

#[test]
fn a_lease_goes_to_the_next_if_nothing_comes_in_its_time() {
    let mut talk = Talk::new();
    talk.pulls(1);
    talk.pass(Duration::from_millis(900));
    assert_eq!(parent(talk.want(2)), 1);
    talk.pass(Duration::from_millis(200));
    talk.pulls(3);
    // Whom upstream gave nothing gets it from others, and is not told again.
    assert_ne!(parent(talk.want(1)), 1);
    talk.have(3, 0, Holding::Nothing);
    talk.coordinator.lost(Node(2));
    assert_eq!(talk.want(1), Response::Refuse);
    assert_eq!(talk.want(3), Response::Refuse);
    talk.pulls(4);
}

#[test]
fn a_refusal_that_is_told_passes_the_lease_on_at_once() {
    let mut talk = Talk::new();
    talk.pulls(1);
    talk.have(1, 0, Holding::Nothing);
    talk.pulls(2);
    assert_eq!(talk.coordinator.leases(), 2);
}

#[test]
fn the_bound_of_a_lease_follows_what_upstream_takes() {
    let within = |usual: u64| {
        let usual = Some(Duration::from_millis(usual));
        match Talk::new().want_as(1, 0, |want| want.usual = usual) {
            Response::Pull { within } => within.as_millis(),
            answer => panic!("{answer:?}"),
        }
    };
    assert_eq!([10, 200, 400, 1000, 9000].map(within), [500, 850, 1450, 3250, 4500]);
}

#[test]
fn who_says_that_upstream_has_not_refused_it_is_given_more_time() {
    let mut talk = Talk::new();
    talk.want_as(1, 0, |want| want.usual = Some(Duration::from_millis(50)));
    for _ in 0..16 {
        talk.pass(Duration::from_millis(250));
        talk.have(1, 0, Holding::Root);
    }
    assert_eq!(parent(talk.want(2)), 1, "after 4 s");
    for _ in 0..2 {
        talk.pass(Duration::from_millis(250));
        talk.have(1, 0, Holding::Root);
    }
    talk.pulls(3);
}

#[test]
fn who_gets_other_parts_of_the_image_is_given_as_much() {
    let mut talk = Talk::new();
    let answer = talk.want_as(1, 0, |want| want.fed = true);
    assert_eq!(answer, Response::Pull { within: Duration::from_millis(4500) });
    talk.pass(Duration::from_secs(4));
    assert_eq!(parent(talk.want(2)), 1);
    talk.pass(Duration::from_secs(1));
    talk.pulls(3);
}

#[test]
fn what_comes_in_one_piece_is_left_for_nobody() {
    let mut talk = Talk::new();
    let answer = talk.want_as(1, 0, |want| (want.busy, want.total) = (true, Some(1 << 20)));
    assert!(matches!(answer, Response::Pull { .. }), "{answer:?}");
}

#[test]
fn who_pulls_something_else_lets_others_pull_this() {
    let mut talk = Talk::new();
    let busy = |want: &mut Want| want.busy = true;
    let answer = talk.want_as(1, 0, busy);
    let Response::Wait { pause } = answer else { panic!("{answer:?}") };
    talk.pulls(2);
    talk.pass(pause);
    assert_eq!(parent(talk.want_as(1, 0, busy)), 2);
    let mut talk = Talk::new();
    talk.want_as(1, 0, busy);
    talk.pass(pause);
    assert!(matches!(talk.want_as(1, 0, busy), Response::Pull { .. }), "nobody else came");
}

#[test]
fn a_root_that_grows_keeps_its_lease_and_a_silent_one_loses_it() {
    let mut talk = Talk::new();
    talk.pulls(1);
    for n in 1..40 {
        talk.pass(Duration::from_millis(250));
        talk.have(1, n << 20, Holding::Root);
        assert_eq!(parent(talk.want_as(2, 0, |want| want.why = Why::New)), 1);
    }
    talk.pass(LEASE - Duration::from_millis(1));
    assert_eq!(parent(talk.want(3)), 2);
    talk.pass(Duration::from_millis(1));
    talk.pulls(4);
}

#[test]
fn a_root_that_a_child_has_lost_is_taken_for_dead_sooner_unless_it_is_heard() {
    let mut talk = Talk::new();
    let lost = |want: &mut Want| (want.position, want.why, want.avoid) = (1 << 20, Why::Broke, vec![Node(1)]);
    talk.pulls(1);
    talk.have(1, 2 << 20, Holding::Root);
    assert_eq!(parent(talk.want(2)), 1);
    assert!(matches!(talk.want_as(2, 0, lost), Response::Wait { .. }));
    talk.pass(SUSPECT - Duration::from_millis(1));
    assert!(matches!(talk.want_as(2, 0, lost), Response::Wait { .. }));
    talk.have(1, 3 << 20, Holding::Root);
    talk.pass(SUSPECT);
    assert!(!matches!(talk.want_as(2, 0, lost), Response::Pull { .. }), "it was heard of since");
    let mut talk = Talk::new();
    talk.pulls(1);
    talk.have(1, 2 << 20, Holding::Root);
    talk.want(2);
    talk.want_as(2, 0, lost);
    talk.pass(SUSPECT);
    assert!(matches!(talk.want_as(2, 0, lost), Response::Pull { .. }));
}

#[test]
fn who_stands_still_with_the_root_stays_where_it_is() {
    let mut talk = Talk::new();
    let still = |want: &mut Want| (want.position, want.why) = (1 << 20, Why::Still);
    talk.pulls(1);
    talk.have(1, 2 << 20, Holding::Root);
    talk.want(2);
    talk.want(3);
    talk.pass(Duration::from_millis(2500));
    talk.have(1, 2 << 20, Holding::Root);
    assert!(matches!(talk.want_as(3, 0, still), Response::Wait { .. }), "the root has got nothing either");
    talk.have(1, 32 << 20, Holding::Root);
    assert_eq!(parent(talk.want_as(3, 0, still)), 1, "it has, and the parent does not deliver");
}

#[test]
fn nobody_is_sent_to_a_latecomer_that_has_less() {
    let mut talk = Talk::in_a_chain(3);
    talk.pass(Duration::from_secs(4));
    talk.have_for(1, 100 << 20, 2, Holding::Root);
    assert_eq!(parent(talk.want(4)), 1, "nearer to the root than 3 is, and free");
    talk.have(4, 30 << 20, Holding::Child);
    talk.have(2, 99 << 20, Holding::Child);
    let slow = talk.want_as(3, 0, |want| (want.position, want.why) = (95 << 20, Why::Slow));
    assert!(matches!(slow, Response::Wait { .. }), "{slow:?}");
    assert_eq!(talk.after_losing(3, 2, 95 << 20), 1);
}

#[test]
fn who_lost_its_parent_goes_to_one_that_has_said_that_it_has_more() {
    let mut talk = Talk::in_a_chain(5);
    // Nearer to the root, and likely to have as much as it by now.
    talk.have_for(2, 0, 2, Holding::Child);
    talk.have(1, 100 << 20, Holding::Root);
    talk.have_for(3, 97 << 20, 2, Holding::Child);
    assert_eq!(talk.after_losing(5, 4, 95 << 20), 3);
}

#[test]
fn in_the_place_of_a_nearer_one_it_waits_for_news_of_a_root() {
    let mut talk = Talk::new();
    let skipped = |want: &mut Want| want.skipped = 1;
    assert!(matches!(talk.want_as(1, 0, skipped), Response::Wait { .. }));
    talk.pass(GRACE / 2);
    talk.have(9, 5 << 20, Holding::Root);
    assert_eq!(parent(talk.want_as(1, 0, skipped)), 9);
    let mut talk = Talk::new();
    talk.want_as(1, 0, skipped);
    talk.pass(GRACE);
    assert!(matches!(talk.want_as(1, 0, skipped), Response::Pull { .. }));
}

#[test]
fn repetitions_are_answered_as_before_and_what_was_overtaken_is_not() {
    let mut talk = Talk::new();
    let want = |number, why| {
        Request::Want(Want {
            key: KEY,
            number,
            position: 0,
            total: Some(TOTAL),
            slots: 1,
            usual: None,
            why,
            avoid: Vec::new(),
            skipped: 0,
            busy: false,
            fed: false,
        })
    };
    let first = talk.say(1, 0, &want(5, Why::New));
    assert!(matches!(first, Some(Response::Pull { .. })));
    assert_eq!(talk.say(1, 0, &want(5, Why::New)), first);
    assert_eq!(talk.say(1, 0, &want(4, Why::New)), None);
    assert_eq!(talk.coordinator.leases(), 1);
}

#[test]
fn who_is_said_to_have_it_is_asked_until_it_does_not() {
    let mut talk = Talk::new();
    talk.coordinator.holders(&KEY, &[Node(7)], talk.now);
    assert_eq!(parent(talk.want(1)), 7);
    let refused = |want: &mut Want| (want.why, want.avoid) = (Why::Refused, vec![Node(7)]);
    assert!(matches!(talk.want_as(1, 0, refused), Response::Pull { .. }));
    assert_eq!(parent(talk.want(2)), 1);
}

#[test]
fn memory_is_bounded() {
    let limits = Limits { blobs: 10, places: 50, ..Limits::default() };
    let mut talk = Talk::with(limits);
    let mut refused = 0;
    for n in 0..1000_u64 {
        let mut key = [0; 32];
        key[0] = (n % 20) as u8;
        let have = Have { key: Key(key), number: n + 1, position: 1, total: None, slots: 1, holding: Holding::Root };
        let answer = talk.say(n, 0, &Request::Have(have));
        refused += u32::from(!matches!(answer, Some(Response::Ack { .. })));
        let (blobs, places) = talk.coordinator.size();
        assert!(blobs <= 10 && places <= 50, "{blobs} {places}");
    }
    assert!(refused >= 500, "{refused}");
    talk.pass(Duration::from_secs(61));
    talk.coordinator.forget(talk.now);
    assert_eq!(talk.coordinator.size(), (0, 0));
}

#[test]
fn floods_are_not_answered() {
    let mut talk = Talk::new();
    let mut flood = |node: u64, count: u64| {
        let want = |number| {
            Request::Have(Have { key: KEY, number, position: 1, total: None, slots: 1, holding: Holding::Root })
        };
        (1..=count).filter(|number| talk.say(node, 0, &want(*number)).is_some()).count()
    };
    assert_eq!(flood(1, 1000), 400);
    assert_eq!(flood(2, 10), 10, "others are");
    assert!(!talk.coordinator.hears(Node(1), talk.now) && talk.coordinator.hears(Node(2), talk.now));
    talk.pass(Duration::from_secs(1));
    talk.number = 10_000;
    let answered = (0..500).filter(|n| {
        let have = Have { key: KEY, number: 20_000 + n, position: 1, total: None, slots: 1, holding: Holding::Root };
        talk.say(1, 0, &Request::Have(have)).is_some()
    });
    assert_eq!(answered.count(), 200);
}

/// A lease that ran out without a byte is not brought back by a report that says no more: nobody else would pull as long as it goes on.
#[test]
fn who_got_nothing_in_its_time_is_no_root_for_saying_so() {
    let mut talk = Talk::new();
    talk.pulls(1);
    assert_eq!(parent(talk.want(2)), 1);
    talk.pass(Duration::from_secs(2));
    let again = |want: &mut Want| (want.why, want.avoid) = (Why::Refused, vec![Node(1)]);
    assert!(matches!(talk.want_as(2, 0, again), Response::Pull { .. }));
    talk.have(1, 0, Holding::Root);
    assert_eq!(parent(talk.want(3)), 2, "not 1, which has nothing");
    talk.have(2, 0, Holding::Nothing);
    talk.have(1, 0, Holding::Root);
    assert!(matches!(talk.want(4), Response::Pull { .. }), "neither of them gets anything");
}

#[test]
fn people_see_the_latest_trees_and_no_more_than_fits() {
    let mut talk = Talk::new();
    talk.pulls(1);
    talk.have(1, 8 << 20, Holding::Root);
    talk.want(2);
    talk.want(3);
    talk.pass(Duration::from_secs(2));
    let view = |trees, places| talk.coordinator.view(trees, places, talk.now);
    let all = view(5, 5);
    assert_eq!(all.len(), 1);
    let tree = &all[0];
    assert_eq!((tree.key, tree.total, tree.more, tree.quiet), (KEY, Some(TOTAL), 0, Duration::from_secs(2)));
    let root = &tree.places[0];
    assert_eq!((root.node, root.parent, root.position, root.stand), (Node(1), None, 8 << 20, Stand::Root));
    let child = tree.places.iter().find(|place| place.parent == Some(Node(1)));
    assert_eq!(child.map(|child| child.stand), Some(Stand::Child), "{tree:?}");
    let few = view(5, 1);
    assert_eq!((few[0].places.as_slice(), few[0].more), (&tree.places[..1], 2));
    assert_eq!(view(0, 5), []);
}

/// A root that reports and grows, and that nobody can fetch from: it is asked once more, and then another one pulls, in much less than a pull may be
/// held.
#[test]
fn a_root_that_gives_nothing_to_anybody_is_not_waited_for() {
    let mut talk = Talk::new();
    talk.pulls(1);
    let grow = |talk: &mut Talk, time| {
        talk.pass(Duration::from_millis(time));
        let at = talk.now;
        talk.have(1, (at - talk.began).as_millis() as u64 * 10_000, Holding::Root);
    };
    grow(&mut talk, 100);
    assert_eq!(parent(talk.want(2)), 1);
    grow(&mut talk, 250);
    let failed =
        |talk: &mut Talk, node| talk.want_as(node, 0, |want| (want.why, want.avoid) = (Why::Broke, vec![Node(1)]));
    let answer = failed(&mut talk, 2);
    assert!(matches!(answer, Response::Fetch { parent: Node(1), patience, .. } if patience < GRACE), "{answer:?}");
    // It may be about to give something.
    grow(&mut talk, 250);
    assert!(matches!(failed(&mut talk, 2), Response::Wait { .. }));
    (0..3).for_each(|_| grow(&mut talk, 250));
    let answer = failed(&mut talk, 2);
    assert!(matches!(answer, Response::Pull { .. }), "{answer:?}");
    // The others follow that one, also those that were at the first.
    talk.have(2, 1 << 20, Holding::Root);
    assert_eq!(parent(failed(&mut talk, 3)), 2);
}

/// A root to which others are attached, and that fails one: it is well.
#[test]
fn a_root_that_somebody_gets_it_from_stays_the_only_one() {
    let mut talk = Talk::new();
    talk.pulls(1);
    talk.have(1, 1 << 20, Holding::Root);
    assert_eq!(parent(talk.want(2)), 1);
    for _ in 0..4 {
        talk.pass(Duration::from_millis(400));
        talk.number += 1;
        let position = (4 * talk.number) << 20;
        talk.have(1, position, Holding::Root);
        let answer = talk.want_as(3, 0, |want| (want.why, want.avoid) = (Why::Broke, vec![Node(1), Node(2)]));
        assert!(!matches!(answer, Response::Pull { .. }), "{answer:?}");
    }
    assert_eq!(talk.coordinator.leases(), 1);
}
