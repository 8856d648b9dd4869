//! The child and the parent by themselves.

use std::time::{Duration, Instant};

use crate::storm::{
    ANSWER, Action, Asker, Child, Failure, Have, Holding, Key, NOTHING, Node, PROBE, Parent, Rank, Refusal, Request,
    Response, STILL, Source, Standing, Want, Why, Wish,
};

const KEY: Key = Key([9; 32]);
const MAX: Duration = Duration::from_secs(2);
const RANK: Rank = Rank(8);
/// One that a coordinator sent.
const LED: Asker = Asker { position: 0, rank: Some(RANK) };

fn child(now: Instant) -> Child {
    let wish = Wish { key: KEY, position: 0, total: Some(64 << 20), usual: None, busy: false, fed: false };
    Child::new(wish, 1, vec![Node(1), Node(2), Node(3)], 100, now + MAX, now)
}

/// One that a parent has begun to feed.
fn fed_child(start: Instant) -> Child {
    let mut child = child(start);
    let (_, want) = question(&actions(&mut child, start));
    child.answered(want.number, fetch(7), start);
    actions(&mut child, start);
    child.fed(start);
    child
}

fn actions(child: &mut Child, now: Instant) -> Vec<Action> {
    std::iter::from_fn(|| child.poll(now)).collect()
}

/// The only question among the actions, and whom it goes to.
#[track_caller]
fn question(actions: &[Action]) -> (u64, Want) {
    let mut found = actions.iter().filter_map(|action| match action {
        Action::Send { to, request: Request::Want(want) } => Some((to.0, want.clone())),
        _ => None,
    });
    let question = found.next().expect("a question");
    assert_eq!(found.next(), None);
    question
}

fn reports(actions: &[Action]) -> Vec<(u64, Holding, u64)> {
    let report = |action: &Action| match action {
        Action::Send { to, request: Request::Have(Have { holding, position, .. }) } => {
            Some((to.0, *holding, *position))
        }
        _ => None,
    };
    actions.iter().filter_map(report).collect()
}

fn fetch(parent: u64) -> Response {
    Response::Fetch { parent: Node(parent), rank: RANK, patience: Duration::from_secs(1) }
}

#[test]
fn coordinators_are_asked_one_after_the_other_and_then_upstream() {
    let start = Instant::now();
    let mut child = child(start);
    for (n, to) in [1, 2, 3].into_iter().enumerate() {
        let now = start + ANSWER * n as u32;
        let (asked, want) = question(&actions(&mut child, now));
        assert_eq!((asked, usize::from(want.skipped), want.why), (to, n, Why::New));
        assert_eq!(child.wake(), Some(now + ANSWER));
    }
    let last = actions(&mut child, start + ANSWER * 3);
    assert_eq!(last[0], Action::GiveUp);
    assert_eq!(reports(&last).len(), 3, "others may have it from here, whoever coordinates");
}

#[test]
fn one_that_cannot_be_reached_is_passed_over_at_once() {
    let now = Instant::now();
    let mut child = child(now);
    let (_, want) = question(&actions(&mut child, now));
    child.not_reached(want.number, now);
    assert_eq!(question(&actions(&mut child, now)).0, 2);
}

#[test]
fn a_held_request_ends_at_its_deadline() {
    let start = Instant::now();
    let mut child = child(start);
    let (_, want) = question(&actions(&mut child, start));
    child.answered(want.number, Response::Wait { pause: Duration::from_secs(60) }, start);
    assert_eq!(child.wake(), Some(start + MAX));
    assert!(actions(&mut child, start + MAX - Duration::from_millis(1)).is_empty());
    assert_eq!(actions(&mut child, start + MAX)[0], Action::GiveUp);
}

/// A body's parent is left for one that gives nothing, and is left in turn; then the body ends, and its request is held from then on.
#[test]
fn who_left_a_parent_before_it_failed_is_held_no_longer_than_it_may_be() {
    for may_be_held in [true, false] {
        let start = Instant::now();
        let mut child = fed_child(start);
        child.grew(1 << 20, start);
        let slow = start + Duration::from_secs(2);
        [start, slow].into_iter().for_each(|now| child.parent_has(40 << 20, now));
        let (_, want) = question(&actions(&mut child, slow));
        child.answered(want.number, fetch(8), slow);
        assert!(actions(&mut child, slow).contains(&Action::Fetch { parent: Node(8), rank: RANK }));
        let left = slow + Duration::from_secs(1);
        let (_, want) = question(&actions(&mut child, left));
        assert_eq!((child.source(), want.why), (Source::Nobody, Why::Refused));
        child.answered(want.number, Response::Wait { pause: Duration::from_secs(60) }, left);
        let deadline = left + if may_be_held { Duration::from_millis(500) } else { Duration::ZERO };
        child.failed(Failure::Broke, may_be_held.then_some(deadline), left);
        if may_be_held {
            assert_eq!((actions(&mut child, left), child.wake()), (vec![], Some(deadline)));
        }
        assert_eq!(actions(&mut child, deadline)[0], Action::GiveUp);
    }
}

#[test]
fn one_that_is_not_held_asks_nobody_and_is_followed_once_it_goes_upstream() {
    let start = Instant::now();
    let wish = Wish { key: KEY, position: 0, total: Some(64 << 20), usual: None, busy: false, fed: false };
    let apart = || Child::apart(wish, 1, vec![Node(1), Node(2), Node(3)], 100, start);
    let mut child = apart();
    assert_eq!(actions(&mut child, start + PROBE), []);
    child.give_up(start + PROBE);
    let upstream = actions(&mut child, start + PROBE);
    assert_eq!((upstream[0].clone(), reports(&upstream).len()), (Action::GiveUp, 3));
    child.give_up(start + PROBE);
    assert_eq!(actions(&mut child, start + PROBE), [], "once only");
    // A peer has given all of it, or the client has left, or nobody says what came of it.
    let mut child = apart();
    child.complete(start + PROBE);
    assert_eq!(reports(&actions(&mut child, start + PROBE)), [(1, Holding::All, 64 << 20)]);
    let mut child = apart();
    child.gone(start + PROBE);
    actions(&mut child, start + PROBE);
    assert!(child.is_finished());
    assert!(actions(&mut apart(), start + NOTHING).contains(&Action::GiveUp));
}

/// A body is not left for a better parent that could not be asked, since no time is left in which the request may be held.
#[test]
fn a_body_is_not_left_where_nothing_could_be_held() {
    let start = Instant::now();
    let lag = |child: &mut Child, from: u64| {
        (from..from + 4)
            .filter_map(|n| {
                let now = start + Duration::from_millis(700 * n);
                child.grew(n << 10, now);
                child.parent_has(40 << 20, now);
                let asked = actions(child, now);
                asked
                    .iter()
                    .any(|action| matches!(action, Action::Send { request: Request::Want(_), .. }))
                    .then_some(asked)
            })
            .next()
    };
    let mut child = fed_child(start);
    child.can_move(false);
    assert_eq!(lag(&mut child, 1), None);
    child.can_move(true);
    let asked = lag(&mut child, 5).expect("it is slow");
    let (_, want) = question(&asked);
    assert_eq!(want.why, Why::Slow);
    // Spent meanwhile.
    child.can_move(false);
    child.answered(want.number, fetch(8), start + Duration::from_secs(6));
    assert_eq!(child.source(), Source::Parent(Node(7)));
    assert!(!actions(&mut child, start + Duration::from_secs(6)).iter().any(|it| matches!(it, Action::Fetch { .. })));
}

#[test]
fn a_root_reports_to_all_until_it_has_everything() {
    let start = Instant::now();
    let mut child = child(start);
    let (_, want) = question(&actions(&mut child, start));
    child.answered(want.number, Response::Pull { within: Duration::from_secs(1) }, start);
    let pulled = actions(&mut child, start);
    assert_eq!(pulled[0], Action::Pull);
    assert_eq!(reports(&pulled), [1, 2, 3].map(|to| (to, Holding::Root, 0)));
    let first = start + Duration::from_millis(30);
    child.grew(1 << 20, first);
    assert_eq!(reports(&actions(&mut child, first)), [1, 2, 3].map(|to| (to, Holding::Root, 1 << 20)), "at once");
    child.complete(first);
    assert_eq!(reports(&actions(&mut child, first)), [1, 2, 3].map(|to| (to, Holding::All, 64 << 20)));
}

#[test]
fn a_parent_that_is_dead_is_noticed_by_asking_it() {
    let start = Instant::now();
    let mut child = child(start);
    let (_, want) = question(&actions(&mut child, start));
    child.answered(want.number, fetch(7), start);
    let fetched = actions(&mut child, start);
    assert_eq!(fetched, [Action::SendAway, Action::Fetch { parent: Node(7), rank: RANK }]);
    let now = start + PROBE / 2;
    assert_eq!(actions(&mut child, now), [Action::Probe { parent: Node(7) }]);
    child.failed(Failure::Broke, Some(start + MAX), now);
    let (_, want) = question(&actions(&mut child, now));
    assert_eq!((want.why, want.avoid), (Why::Broke, vec![Node(7)]));
    child.answered(want.number, fetch(8), now);
    actions(&mut child, now);
    child.fed(now);
    child.grew(1 << 20, now);
    let later = now + PROBE;
    assert_eq!(actions(&mut child, later), [Action::Probe { parent: Node(8) }]);
}

#[test]
fn who_stands_still_asks_sooner_than_one_whose_parent_does_too() {
    let start = Instant::now();
    let asks_after = |excused: bool| {
        let mut child = child(start);
        let (_, want) = question(&actions(&mut child, start));
        child.answered(want.number, fetch(7), start);
        actions(&mut child, start);
        child.fed(start);
        child.grew(1 << 20, start);
        (0..1000_u64).map(|n| start + Duration::from_millis(10 * n)).find(|now| {
            let done = actions(&mut child, *now);
            if done.contains(&Action::Probe { parent: Node(7) }) {
                child.parent_has(if excused { 1 << 20 } else { 2 << 20 }, *now);
            }
            done.iter().any(
                |action| matches!(action, Action::Send { request: Request::Want(want), .. } if want.why == Why::Still),
            )
        })
    };
    let sooner = asks_after(false).expect("a question") - start;
    let later = asks_after(true).expect("a question") - start;
    assert!(sooner >= STILL && sooner < 2 * STILL, "{sooner:?}");
    assert!(later >= Duration::from_secs(6) && later < NOTHING, "{later:?}");
}

#[test]
fn a_body_that_stands_still_ends() {
    let start = Instant::now();
    let mut child = fed_child(start);
    let mut given_up = None;
    for n in 0..1200_u64 {
        let now = start + Duration::from_millis(10 * n);
        for action in actions(&mut child, now) {
            match action {
                Action::Send { request: Request::Want(want), .. } => {
                    child.answered(want.number, Response::Wait { pause: Duration::from_secs(1) }, now);
                }
                Action::GiveUp => given_up = given_up.or(Some(now - start)),
                _ => {}
            }
        }
    }
    assert_eq!(given_up, Some(NOTHING));
}

#[test]
fn refusals_slow_the_questions_down() {
    let start = Instant::now();
    let mut child = child(start);
    let (mut asked, mut now) = (0, start);
    while now < start + MAX {
        for action in actions(&mut child, now) {
            if let Action::Send { request: Request::Want(want), .. } = action {
                asked += 1;
                child.answered(want.number, fetch(asked), now);
                child.failed(Failure::Refused, Some(start + MAX), now);
            }
        }
        now += Duration::from_millis(1);
    }
    assert!((5..12).contains(&asked), "{asked}");
    assert_eq!(child.source(), Source::Nobody);
}

#[test]
fn a_slow_parent_is_told_of_once_in_a_while() {
    let start = Instant::now();
    let mut child = fed_child(start);
    let mut asked = Vec::new();
    for n in 0..100_u64 {
        let now = start + Duration::from_millis(100 * n);
        child.grew((n + 1) * 100_000, now);
        child.parent_has((n + 1) * 1_000_000, now);
        for action in actions(&mut child, now) {
            if let Action::Send { request: Request::Want(want), .. } = action {
                asked.push((now - start).as_millis());
                assert_eq!(want.why, Why::Slow);
                child.answered(want.number, Response::Wait { pause: Duration::from_millis(1) }, now);
            }
        }
    }
    assert!(asked.len() >= 2 && asked[0] >= 1000, "{asked:?}");
}

/// A child whose question about its slow parent was answered with a long pause, and the time.
fn waiting_for_a_better_one() -> (Child, Instant) {
    let mut now = Instant::now();
    let mut child = fed_child(now);
    for n in 1..20_u64 {
        now += Duration::from_millis(100);
        child.grew(n * 100_000, now);
        child.parent_has(64 << 20, now);
        let actions = actions(&mut child, now);
        if actions.iter().any(|action| matches!(action, Action::Send { request: Request::Want(_), .. })) {
            let (_, want) = question(&actions);
            assert_eq!(want.why, Why::Slow);
            child.answered(want.number, Response::Wait { pause: NOTHING / 2 }, now);
            return (child, now);
        }
    }
    panic!("it never asked");
}

fn questions_until(child: &mut Child, end: Instant) -> Vec<Why> {
    let mut asked = Vec::new();
    while let Some(now) = child.wake().filter(|wake| *wake <= end) {
        for action in actions(child, now) {
            if let Action::Send { request: Request::Want(want), .. } = action {
                asked.push(want.why);
                child.answered(want.number, Response::Wait { pause: NOTHING }, now);
            }
        }
    }
    asked
}

#[test]
fn a_slow_parent_that_then_gives_nothing_is_told_of_no_later_than_any() {
    let (mut child, now) = waiting_for_a_better_one();
    assert_eq!(questions_until(&mut child, now + 2 * STILL), [Why::Still]);
}

#[test]
fn a_parent_that_has_caught_up_is_slow_no_more() {
    let (mut child, now) = waiting_for_a_better_one();
    child.parent_has(child.position(), now);
    let later = now + NOTHING / 2;
    child.grew(3 << 20, later - Duration::from_millis(1));
    assert_eq!(questions_until(&mut child, later), []);
}

/// When a child asks for a better parent whose own has all and brings so many bytes a second.
fn asked_behind_a_complete_parent(rate: u64) -> Option<Duration> {
    let start = Instant::now();
    let mut child = fed_child(start);
    (1..60_u64).map(|n| Duration::from_millis(100 * n)).find(|at| {
        let now = start + *at;
        child.grew((at.as_millis() as u64 * rate / 1000).min(60 << 20), now);
        child.parent_has(64 << 20, now);
        let is_slow = |action: &Action| matches!(action, Action::Send { request: Request::Want(want), .. } if want.why == Why::Slow);
        actions(&mut child, now).iter().any(is_slow)
    })
}

#[test]
fn a_parent_that_has_all_is_slow_if_half_of_what_lacks_does_not_come_within_a_second() {
    assert_eq!(asked_behind_a_complete_parent(100_000_000), None, "it catches up");
    assert_eq!(asked_behind_a_complete_parent(8_000_000), Some(Duration::from_millis(1100)));
}

fn standing(position: u64, number: u32) -> Standing {
    Standing { position, complete: false, is_root: false, rank: Some(Rank(number)) }
}

#[test]
fn only_who_is_ahead_gives() {
    let asker = |position, number| Asker { position, rank: Some(Rank(number)) };
    assert!(standing(2, 9).may_feed(&asker(1, 1)));
    assert!(!standing(1, 0).may_feed(&asker(1, 1)), "as much is not more");
    assert!(standing(0, 0).may_feed(&asker(0, 1)));
    assert!(!standing(0, 1).may_feed(&asker(0, 1)));
    assert!(!standing(0, 2).may_feed(&asker(0, 1)));
    assert!(!standing(0, 0).may_feed(&Asker { position: 0, rank: None }));
    let root = Standing { is_root: true, ..standing(0, 3) };
    assert!(root.may_feed(&asker(0, 1)));
}

/// Lets children of one blob get so much of what comes in at 25 MB/s, and returns the parent.
fn fed(children: u64, each: f64, time: Duration) -> (Parent, Instant, Vec<u64>) {
    let start = Instant::now();
    let mut parent = Parent::new(64, start);
    let mut shed = Vec::new();
    let at = |seconds: f64| standing((seconds * 25e6) as u64, 0);
    for number in 0..children {
        parent.begin(number, KEY, &LED, &at(0.0), start);
    }
    let mut now = start;
    while now < start + time {
        now += Duration::from_millis(50);
        let seconds = (now - start).as_secs_f64();
        let own = at(seconds);
        parent.received(own.position);
        (0..children).for_each(|number| parent.sent(number, (seconds * each) as u64, &own));
        shed.extend(parent.look(now).shed);
    }
    (parent, now, shed)
}

#[test]
fn more_are_taken_while_all_keep_up() {
    assert_eq!(fed(1, 25e6, Duration::from_secs(2)).0.slots(Some(64 << 20), false), 2);
    let (parent, now, shed) = fed(4, 25e6, Duration::from_secs(2));
    assert_eq!((parent.slots(Some(64 << 20), false), parent.capacity(now), shed.len()), (6, None, 0));
    let at_first = |length| Parent::new(64, now).slots(Some(length), false);
    assert_eq!(at_first(1000), 16, "what is small comes in one piece");
    assert_eq!((at_first(16 << 20), at_first((16 << 20) + 1)), (2, 1));
}

#[test]
fn a_full_link_sheds_one_after_the_other() {
    let (parent, now, shed) = fed(8, 10e6, Duration::from_secs(4));
    let capacity = parent.capacity(now).expect("it was full");
    assert!((70e6..90e6).contains(&capacity), "{capacity}");
    assert_eq!(parent.slots(Some(64 << 20), false), 3);
    assert_eq!(shed.first(), Some(&7), "the latest");
    // One is slow by itself: that says nothing of our link.
    let start = Instant::now();
    let mut parent = Parent::new(64, start);
    (0..4).for_each(|number| parent.begin(number, KEY, &LED, &standing(0, 0), start));
    for n in 1..40_u64 {
        let own = standing(n * 2_500_000, 0);
        parent.received(own.position);
        (0..4).for_each(|number| parent.sent(number, if number == 0 { n * 100_000 } else { own.position }, &own));
        assert_eq!(parent.look(start + Duration::from_millis(100 * n)).shed, None);
    }
    assert_eq!(parent.capacity(start + Duration::from_secs(4)), None);
}

#[test]
fn no_more_than_its_bound_are_taken() {
    let now = Instant::now();
    let mut parent = Parent::new(2, now);
    let (own, asker) = (standing(5 << 20, 0), Asker { position: 0, rank: None });
    for number in 0..2 {
        assert_eq!(parent.admit(&KEY, &own, &asker), Ok(()));
        parent.begin(number, KEY, &LED, &own, now);
    }
    assert_eq!(parent.admit(&KEY, &own, &asker), Err(Refusal::Busy));
    assert_eq!(parent.admit(&KEY, &standing(0, 0), &Asker { position: 1, rank: None }), Err(Refusal::NotAhead));
    parent.end(1);
    assert_eq!(parent.admit(&KEY, &own, &asker), Ok(()));
}

#[test]
fn what_is_coming_in_goes_before_what_is_complete() {
    const DONE: Key = Key([8; 32]);
    let start = Instant::now();
    let mut parent = Parent::new(64, start);
    let complete = Standing { complete: true, ..standing(64 << 20, 0) };
    let newcomer = Asker { position: 0, rank: None };
    parent.begin(0, KEY, &LED, &standing(0, 0), start);
    parent.begin(1, DONE, &newcomer, &complete, start);
    (2..4).for_each(|number| parent.begin(number, DONE, &LED, &complete, start));
    assert_eq!(parent.admit(&DONE, &complete, &newcomer), Ok(()));
    let mut shed = Vec::new();
    for n in 1..40_u64 {
        let own = standing(n * 2_500_000, 0);
        parent.received((64 << 20) + own.position);
        // All get as much, which is too little for the one that should keep up.
        parent.sent(0, n * 1_000_000, &own);
        (1..4).for_each(|number| parent.sent(number, n * 1_000_000, &complete));
        shed.extend(parent.look(start + Duration::from_millis(100 * n)).shed.inspect(|number| parent.end(*number)));
    }
    assert_eq!(
        shed,
        [3, 2],
        "the latest first, and never who gets what is coming in, nor who knows nowhere else to go"
    );
    let (parent, ..) = fed(1, 25e6, Duration::from_secs(1));
    assert_eq!(parent.admit(&DONE, &complete, &newcomer), Ok(()), "there is room");
    let (parent, ..) = fed(8, 10e6, Duration::from_secs(4));
    assert_eq!(parent.admit(&DONE, &complete, &newcomer), Err(Refusal::Busy));
}
