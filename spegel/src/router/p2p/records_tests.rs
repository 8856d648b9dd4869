#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn id(n: u16) -> ContentId {
    ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
}

fn address(n: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], n + 1))
}

fn store(foreign: usize, now: Instant) -> Records {
    Records::new(PeerId::random(), RecordLimits { foreign, validity: Duration::from_secs(100) }, now)
}

fn peers(records: &Records, now: Instant, n: u16) -> HashSet<PeerId> {
    records.others(now, &id(n), &mut rand::rng()).into_iter().map(|(peer, _)| peer).collect()
}

#[test]
fn records_expire_without_being_read() {
    let start = Instant::now();
    let mut records = store(10, start);
    let peer = PeerId::random();
    assert_eq!(records.add(start, [id(1)], peer, &[address(1)]), 1);
    assert_eq!(records.add(start + Duration::from_secs(60), [id(2)], peer, &[address(1)]), 1);
    let later = start + Duration::from_secs(101);
    assert!(peers(&records, later, 1).is_empty(), "not told when expired, even before the sweep");
    records.sweep(later);
    assert_eq!(records.foreign_count(), 1);
    assert_eq!(peers(&records, later, 2), HashSet::from([peer]));
    records.sweep(start + Duration::from_secs(161));
    assert_eq!((records.foreign_count(), records.by_peer.len()), (0, 0));
}

#[test]
fn telling_again_renews() {
    let start = Instant::now();
    let mut records = store(10, start);
    let peer = PeerId::random();
    records.add(start, [id(1)], peer, &[address(1)]);
    records.add(start + Duration::from_secs(90), [id(1)], peer, &[address(2)]);
    let later = start + Duration::from_secs(150);
    records.sweep(later);
    assert_eq!(records.others(later, &id(1), &mut rand::rng())[0].1[..], [address(2)]);
}

#[test]
fn the_oldest_of_others_go_first_and_our_own_never() {
    let start = Instant::now();
    let mut records = store(4, start);
    (0..100).for_each(|n| records.offer(id(1000 + n)));
    for n in 0..8 {
        let now = start + Duration::from_secs(n.into());
        assert_eq!(records.add(now, [id(n)], PeerId::random(), &[address(n)]), 1);
    }
    let now = start + Duration::from_secs(8);
    let held: Vec<u16> = (0..8).filter(|n| !peers(&records, now, *n).is_empty()).collect();
    assert_eq!(held, [4, 5, 6, 7]);
    assert!((0..100).all(|n| records.offers(&id(1000 + n))));
}

#[test]
fn one_peer_cannot_push_out_all_others() {
    let now = Instant::now();
    let mut records = store(10, now);
    let good = PeerId::random();
    (0..4).for_each(|n| assert_eq!(records.add(now, [id(n)], good, &[address(0)]), 1));
    let hostile = PeerId::random();
    let taken = records.add(now, (100..300).map(id), hostile, &[address(1)]);
    assert_eq!(taken, 5);
    assert!((0..4).all(|n| peers(&records, now, n).contains(&good)));
}

#[test]
fn the_dead_are_not_told_until_they_speak_again() {
    let now = Instant::now();
    let mut records = store(10, now);
    let peer = PeerId::random();
    records.add(now, [id(1)], peer, &[address(1)]);
    records.forget(&peer);
    assert!(peers(&records, now, 1).is_empty());
    records.add(now, [id(2)], peer, &[address(1)]);
    assert_eq!(peers(&records, now, 1), HashSet::from([peer]));
    records.forget(&PeerId::random());
}

#[test]
fn all_of_many_providers_are_reached_over_several_answers() {
    let now = Instant::now();
    let mut records = store(1000, now);
    (0..100).for_each(|n| assert_eq!(records.add(now, [id(1)], PeerId::random(), &[address(n)]), 1));
    let reached: HashSet<PeerId> = (0..60).flat_map(|_| peers(&records, now, 1)).collect();
    assert_eq!(reached.len(), 100);
}

#[test]
fn what_a_peer_takes_back_is_gone_at_once_and_nothing_else() {
    let now = Instant::now();
    let mut records = store(10, now);
    let (a, b) = (PeerId::random(), PeerId::random());
    for peer in [a, b] {
        records.add(now, [id(1)], peer, &[address(1)]);
    }
    records.withdrawn(&id(1), &a);
    records.withdrawn(&id(2), &b);
    assert_eq!(peers(&records, now, 1), HashSet::from([b]));
}

#[test]
fn an_answer_is_bounded_and_changes() {
    let now = Instant::now();
    let mut records = store(1000, now);
    (0..200).for_each(|n| assert_eq!(records.add(now, [id(1)], PeerId::random(), &[address(n)]), 1));
    let answers: HashSet<Vec<PeerId>> = (0..10)
        .map(|_| records.others(now, &id(1), &mut rand::rng()).into_iter().map(|(peer, _)| peer).collect())
        .collect();
    assert!(answers.iter().all(|answer| answer.len() == MAX_TOLD));
    assert!(answers.len() > 1, "shuffled");
}

#[test]
fn kad_is_told_our_own_with_our_addresses_and_stores_nothing_itself() {
    let mut records = store(10, Instant::now());
    records.offer(id(1));
    let local = records.local;
    let mut shared = SharedRecords::new(records);
    let key = RecordKey::new(&id(1).multihash());
    assert!(shared.providers(&key).is_empty(), "not without an address");
    shared.lock().set_own_addresses(vec![address(1)]);
    let told = shared.providers(&key);
    assert_eq!((told.len(), told[0].provider), (1, local));
    assert_eq!(told[0].addresses, [multiaddr(address(1))]);
    shared.lock().withdraw(&id(1));
    assert!(shared.providers(&key).is_empty());
    assert!(shared.put(Record::new(key.clone(), vec![1])).is_err());
    assert!(shared.get(&key).is_none());
    assert!(shared.providers(&RecordKey::new(b"short")).is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Add { key: u16, peer: usize },
    Wait(u64),
    Sweep,
    Forget(usize),
    Offer(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..40u16, 0..6usize).prop_map(|(key, peer)| Step::Add { key, peer }),
        2 => (0..40u64).prop_map(Step::Wait),
        1 => Just(Step::Sweep),
        1 => (0..6usize).prop_map(Step::Forget),
        1 => (0..40u16).prop_map(Step::Offer),
    ]
}

proptest! {
    #[test]
    fn bounds_hold_whatever_is_told(limit in 0..30usize, steps in proptest::collection::vec(step(), 0..300)) {
        let start = Instant::now();
        let mut now = start;
        let mut records = store(limit, start);
        let peers: Vec<PeerId> = (0..6).map(|_| PeerId::random()).collect();
        let mut offered = HashSet::new();
        let mut told = HashMap::new();
        for step in steps {
            match step {
                Step::Add { key, peer } => {
                    if records.add(now, [id(key)], peers[peer], &[address(0)]) == 1 {
                        told.insert((key, peers[peer]), now);
                    }
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
                Step::Sweep => records.sweep(now),
                Step::Forget(peer) => records.forget(&peers[peer]),
                Step::Offer(key) => {
                    offered.insert(key);
                    records.offer(id(key));
                }
            }
            prop_assert!(records.foreign_count() <= limit);
            let held: usize = (0..40).map(|key| records.foreign.of(&id(key)).count()).sum();
            prop_assert_eq!(records.foreign_count(), held);
            prop_assert_eq!(records.by_peer.len() + records.free.len(), records.providers.len());
        }
        prop_assert!(offered.iter().all(|key| records.offers(&id(*key))));
        for key in 0..40 {
            for (peer, _) in records.others(now, &id(key), &mut rand::rng()) {
                let told = told.get(&(key, peer)).copied();
                prop_assert!(told.is_some_and(|told| now.duration_since(told) <= Duration::from_secs(101)));
            }
        }
    }
}
