//! What is told of a request once it is over, and under which id its peers know it.

use spegel::story::{Carriage, Origin, Source, Story};

use super::*;

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

impl Node {
    /// The stories from the first on, once there are so many.
    async fn stories(&self, count: usize) -> Vec<Story> {
        let stories = self.registry.stories();
        let all = async {
            loop {
                let mut latest = stories.latest(usize::MAX);
                if latest.len() >= count {
                    latest.reverse();
                    return latest;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let all = tokio::time::timeout(PATIENCE, all).await.expect("all are told");
        assert_eq!(all.len(), count, "one for each request");
        all
    }
}

/// Keeps what a peer is asked, and answers like `answer`.
async fn listening(
    network: &MemoryNetwork,
    id: &str,
    digest: &Digest,
    answer: Vec<u8>,
) -> (Arc<MemoryRouter>, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::<Mutex<Vec<String>>>::default();
    let (keys, into) = ([Key::Digest(digest.clone())], heard.clone());
    let (router, _) = scripted(network, id, &keys, move |head| {
        into.lock().unwrap().push(head.to_owned());
        answer.clone()
    })
    .await;
    (router, heard)
}

#[tokio::test]
async fn where_it_was_is_told_and_how_it_came() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let (small, large) = (a.offer(&noise(1, 1000)), a.offer(&noise(2, 3 << 20)));
    let here = b.shelf.put(&noise(3, 2000));
    let nowhere = digest_of(b"nowhere");
    for digest in [&here, &small, &large, &nowhere] {
        b.get(&target(digest)).await;
    }
    b.ask("HEAD", &target(&large), &[("X-Spegel-Node", "b")]).await;
    b.ask("GET", &target(&large), &[("Range", "bytes=7-16")]).await;
    let told = b.stories(6).await;
    let short: Vec<_> = told.iter().map(|story| (story.source, story.status, story.bytes, story.whole)).collect();
    assert_eq!(
        short,
        [
            (Source::Local, Some(200), 2000, true),
            (Source::Peer, Some(200), 1000, true),
            (Source::Peer, Some(200), 3 << 20, true),
            (Source::Upstream, Some(404), told[3].bytes, true),
            (Source::Peer, Some(200), 0, true),
            (Source::Peer, Some(206), 10, true),
        ]
    );
    let met: Vec<_> = told.iter().map(|Story { met, .. }| (met.found, met.carried, met.known, met.asked)).collect();
    assert_eq!(
        met,
        [
            (None, None, 0, 0),
            (Some(Origin::Lookup), Some(Carriage::Verified), 1, 1),
            (Some(Origin::Lookup), Some(Carriage::Relayed), 1, 1),
            // Who gave the blobs before it is asked whether it is about to get it.
            (None, None, 0, 1),
            (Some(Origin::Remembered), None, 1, 1),
            (Some(Origin::Remembered), Some(Carriage::Relayed), 1, 1),
        ]
    );
    for story in &told {
        assert!(story.head.is_some_and(|head| head <= story.total), "{story:?}");
        assert_eq!((story.registry.as_deref(), story.trace_id.len()), (Some("registry.test"), 32));
        assert_eq!(story.met.peer, story.met.found.map(|_| a.address()));
        assert!(!story.met.raced && story.met.breaks.is_empty(), "{story:?}");
        assert_eq!(story.met.held.is_zero(), story.source != Source::Upstream, "{story:?}");
    }
    assert_eq!((told[4].method, told[4].client.as_str(), told[5].range.as_deref()), ("HEAD", "b", Some("bytes=7-16")));
    assert_eq!(told[0].path, format!("/v2/app/blobs/{here}"));
    assert!(a.registry.stories().latest(1).is_empty(), "what a peer asks is told where it was asked for");
}

#[tokio::test]
async fn who_goes_on_is_told_and_why() {
    let bytes = noise(8, 4 << 20);
    let digest = digest_of(&bytes);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
    let short = [head.as_bytes(), &bytes[..1_234_567]].concat();
    // Which of two is asked first is left to chance.
    for _ in 0..30 {
        let network = MemoryNetwork::new();
        let b = Node::join(&network, "b");
        let (broken, heard) = listening(&network, "1-short", &digest, short.clone()).await;
        let good = Node::join(&network, "2-good");
        good.offer(&bytes);
        assert!(b.get(&target(&digest)).await.body == bytes);
        if heard.lock().unwrap().is_empty() {
            continue;
        }
        let [story] = &b.stories(1).await[..] else { unreachable!("one") };
        let [broke] = &story.met.breaks[..] else { panic!("{story:?}") };
        assert_eq!((story.met.resumed, broke.offset, broke.to), (1, 1_234_567, Some(good.address())));
        assert_eq!((story.met.peer, story.met.asked), (Some(broke.from), 2));
        assert!(broke.why.contains("closed early") && story.whole && story.bytes == 4 << 20, "{story:?}");
        drop(broken);
        return;
    }
    panic!("the one that breaks off was never asked");
}

#[tokio::test]
async fn a_body_with_which_nobody_goes_on_says_so() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let bytes = noise(9, 4 << 20);
    let digest = digest_of(&bytes);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
    let (_short, _) = listening(&network, "short", &digest, [head.as_bytes(), &bytes[..2 << 20]].concat()).await;
    b.get(&target(&digest)).await;
    let [story] = &b.stories(1).await[..] else { unreachable!("one") };
    assert_eq!((story.bytes, story.whole, story.met.resumed), (2 << 20, false, 0));
    assert!(matches!(&story.met.breaks[..], [broke] if broke.offset == 2 << 20 && broke.to.is_none()), "{story:?}");
}

#[tokio::test]
async fn peers_that_are_late_or_refuse_are_told() {
    let digest = digest_of(b"kept back");
    // Which of two is asked first is left to chance.
    for _ in 0..30 {
        let network = MemoryNetwork::new();
        let hedge = Duration::from_millis(20);
        let timeouts = spegel::mirror::Timeouts { connect: Duration::from_secs(1), head: Duration::from_millis(100) };
        let mirror = Some(MirrorSettings { hedge, timeouts, ..MirrorSettings::default() });
        let b = Node::with(&network, "b", Setup { mirror, ..Setup::default() });
        let silent = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let late = network.join("1-silent", silent.local_addr().unwrap());
        late.announce(Change::Added(vec![Key::Digest(digest.clone())]));
        let refusal = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec();
        let (_refuses, _) = listening(&network, "2-refuses", &digest, refusal).await;
        assert_eq!(b.get(&target(&digest)).await.status, 404);
        let [story] = &b.stories(1).await[..] else { unreachable!("one") };
        assert_eq!((story.source, story.met.known, story.met.asked), (Source::Upstream, 2, 2));
        assert!(story.met.failure.as_deref().unwrap().contains("no response head within"), "{story:?}");
        if story.met.raced {
            return;
        }
    }
    panic!("the silent one was never asked first");
}

#[tokio::test]
async fn a_request_that_is_given_up_before_its_answer_has_a_story() {
    let network = MemoryNetwork::new();
    let digest = digest_of(b"late");
    let b = Node::join(&network, "b");
    let silent = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let late = network.join("silent", silent.local_addr().unwrap());
    late.announce(Change::Added(vec![Key::Digest(digest.clone())]));
    let (request, ()) = http::Request::get(target(&digest)).body(()).unwrap().into_parts();
    tokio::select! {
        _ = b.registry.handle(&request, Ipv4Addr::LOCALHOST.into()) => panic!("who is silent has not answered"),
        asked = silent.accept() => drop(asked.unwrap()),
    }
    let [story] = &b.stories(1).await[..] else { unreachable!("one") };
    assert_eq!((story.status, story.head, story.whole, story.met.asked), (None, None, false, 1));
}

#[tokio::test]
async fn the_id_that_a_client_tells_goes_to_peers_and_a_wrong_one_does_not() {
    let network = MemoryNetwork::new();
    let b = Node::join(&network, "b");
    let id_of = |head: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix("traceparent: ")).unwrap_or_default().to_owned();
        line.split('-').nth(1).unwrap_or_default().to_owned()
    };
    let hostile = format!("00-{TRACE_ID}-b7ad6b7169203331-01-{}", "x".repeat(1000));
    let cases: [(&[(&str, &str)], bool); 5] = [
        (&[("traceparent", TRACEPARENT)], true),
        (&[("TraceParent", TRACEPARENT)], true),
        (&[], false),
        (&[("traceparent", &hostile)], false),
        (&[("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)], false),
    ];
    for (number, (headers, is_taken)) in cases.into_iter().enumerate() {
        let bytes = noise(20 + number as u64, 1000);
        let digest = digest_of(&bytes);
        let (_peer, heard) = listening(&network, &format!("peer-{number}"), &digest, ok(&bytes)).await;
        assert_eq!(b.ask("GET", &target(&digest), headers).await.status, 200);
        let id = b.stories(number + 1).await[number].trace_id.clone();
        assert_eq!(id == TRACE_ID, is_taken, "{headers:?}");
        let heard = heard.lock().unwrap().clone();
        assert!(heard.len() == 1 && id_of(&heard[0]) == id, "{id}: {heard:?}");
        assert!(!heard[0].contains("b7ad6b7169203331"), "our own part has an id of its own");
    }
}

/// Who comes at the same time for the same small content shares what the first one gets, and has a story of its own.
#[tokio::test]
async fn what_others_got_at_this_moment_is_told_as_shared() {
    let network = MemoryNetwork::new();
    let (a, b) = (Node::join(&network, "a"), Node::join(&network, "b"));
    let digest = a.offer(&noise(11, 900_000));
    let path = target(&digest);
    futures::future::join_all((0..16).map(|_| b.get(&path))).await;
    let told = b.stories(16).await;
    let shared = told.iter().filter(|story| story.met.found == Some(Origin::Shared)).count();
    assert!((1..16).contains(&shared), "{shared}");
    assert!(told.iter().all(|story| story.met.peer == Some(a.address()) && story.bytes == 900_000));
}

/// A storm holds them, and says for how long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_long_a_request_was_held_is_told() {
    let network = MemoryNetwork::new();
    let storm = || {
        let storm = Some(spegel::mirror::StormSettings { max_wait: Duration::from_millis(300) });
        Setup { mirror: Some(MirrorSettings { storm, ..MirrorSettings::default() }), ..Setup::default() }
    };
    let nodes: Vec<_> = ["node-0", "node-1"].map(|id| (id, Node::with(&network, id, storm()))).into();
    let digest = digest_of(b"never there");
    let path = target(&digest);
    for (id, node) in &nodes {
        assert_eq!(node.ask("GET", &path, &[("X-Spegel-Node", id)]).await.status, 404);
    }
    let told = nodes[1].1.stories(1).await;
    let (held, total) = (told[0].met.held, told[0].total);
    assert!(held > Duration::from_millis(100) && held <= total, "{held:?} of {total:?}");
}
