//! The same properties on every engine and every way to move bytes, for cases that nobody thought of. `PROPTEST_CASES` makes
//! the runs longer.

use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use spegel::zerocopy::{Relay, Way};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::*;

/// Bytes that every body is a part of.
const LEN: usize = 3 << 20;

fn truth() -> &'static [u8] {
    static TRUTH: LazyLock<Vec<u8>> = LazyLock::new(|| noise(LEN));
    &TRUTH
}

/// What a response's body is made of.
#[derive(Clone, Debug)]
enum Kind {
    Memory,
    File,
    /// Bytes that came with the peer's head, and the lengths of the peer's writes.
    Relay {
        prefetched: usize,
        writes: Vec<usize>,
    },
}

/// A request, and what it is answered with.
#[derive(Clone, Debug)]
struct Step {
    head: bool,
    from: usize,
    len: usize,
    kind: Kind,
}

/// What happens under way.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The client leaves after so many bytes.
    ClientLeaves(usize),
    /// The file has so many bytes from now on.
    FileShrinks(usize),
    /// The peer closes after so many bytes.
    PeerCloses(usize),
    /// The peer sends more than it said.
    PeerGoesOn,
}

fn kind() -> impl Strategy<Value = Kind> {
    let relay = (0_usize..5000, prop::collection::vec(1_usize..200_000, 1..4));
    prop_oneof![
        1 => Just(Kind::Memory),
        3 => Just(Kind::File),
        2 => relay.prop_map(|(prefetched, writes)| Kind::Relay { prefetched, writes }),
    ]
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => Just(0),
        2 => 1_usize..10,
        3 => 10_usize..70_000,
        2 => 70_000_usize..600_000,
        1 => 600_000_usize..LEN,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let parts = (prop::bool::weighted(0.1), 0..LEN, len(), kind());
    // Of the head of an empty body hyper does not say that it is empty.
    parts.prop_map(|(head, from, len, kind)| Step { head, from, len: len.max(head.into()).min(LEN - from), kind })
}

/// Two ends of a connection: ours to the peer, and the peer's.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (ours, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (ours.unwrap(), accepted.unwrap().0)
}

impl Step {
    fn want(&self) -> &'static [u8] {
        if self.head { &[] } else { &truth()[self.from..self.from + self.len] }
    }

    /// The body, and how many of its bytes pass through our memory by design.
    async fn body(&self, file: &Arc<File>) -> (Body, u64) {
        let bytes = &truth()[self.from..self.from + self.len];
        match &self.kind {
            Kind::Memory => (Body::bytes(bytes), 0),
            Kind::File => (Body::file(file.clone(), self.from as u64, self.len as u64), 0),
            Kind::Relay { prefetched, writes } => {
                let (early, late) = bytes.split_at((*prefetched).min(self.len));
                let (ours, mut peer) = pair().await;
                let (late, writes) = (late.to_vec(), writes.clone());
                tokio::spawn(async move {
                    let (mut rest, mut writes) = (late.as_slice(), writes.iter().cycle());
                    while !rest.is_empty() {
                        let (now, then) = rest.split_at((*writes.next().unwrap()).min(rest.len()));
                        // Fails where the body is not wanted.
                        if peer.write_all(now).await.is_err() {
                            return;
                        }
                        tokio::task::yield_now().await;
                        rest = then;
                    }
                    // Until the other side is done with it.
                    let _ = peer.read(&mut [0]).await;
                });
                let relay = Relay::new(ours, Bytes::copy_from_slice(early), self.len as u64, Box::new(|_| ()));
                (Body::relay(relay), if self.head { 0 } else { early.len() as u64 })
            }
        }
    }
}

/// What a run of steps sent, by the way that it should take.
#[derive(Default)]
struct Expected {
    file: u64,
    relay: u64,
    prefetched: u64,
}

async fn run(fixture: &Fixture, file: &Arc<File>, steps: &[Step], narrow: bool, pieces: usize) -> Expected {
    let mut expected = Expected::default();
    let mut requests = Vec::new();
    for step in steps {
        let (body, prefetched) = step.body(file).await;
        fixture.then(body);
        let sent = step.want().len() as u64;
        match step.kind {
            Kind::Memory => {}
            Kind::File => expected.file += sent,
            Kind::Relay { .. } => {
                (expected.relay, expected.prefetched) = (expected.relay + sent, expected.prefetched + prefetched);
            }
        }
        requests.push(if step.head {
            "HEAD /x HTTP/1.1\r\nhost: h\r\n\r\n"
        } else {
            "GET /x HTTP/1.1\r\nhost: h\r\n\r\n"
        });
    }
    let mut client = if narrow { fixture.connect_narrow().await } else { fixture.connect().await };
    // Some at once, pipelined; the rest as the answers come.
    let mut waiting = requests.chunks(pieces);
    let mut sent = 0;
    for (index, step) in steps.iter().enumerate() {
        if index >= sent {
            let chunk = waiting.next().unwrap();
            client.send(chunk.concat().as_bytes()).await;
            sent += chunk.len();
        }
        let head = client.head().await;
        assert_eq!((head.status(), head.length()), (200, step.len as u64));
        same(&client.exactly(step.want().len()).await, step.want());
    }
    expected
}

#[test]
fn any_responses_in_any_order_are_exact_and_their_bytes_take_the_way_they_should() {
    let file = file_of(truth());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for mode in modes() {
        let fixture = runtime.block_on(async { Fixture::new(mode) });
        let total = Mutex::new(Expected::default());
        let steps = (prop::collection::vec(step(), 1..8), prop::bool::weighted(0.2), 1_usize..5);
        let result = TestRunner::new(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::default() }).run(
            &steps,
            |(steps, narrow, pieces)| {
                let sent = runtime.block_on(run(&fixture, &file, &steps, narrow, pieces));
                let mut total = total.lock().unwrap();
                total.file += sent.file;
                total.relay += sent.relay;
                total.prefetched += sent.prefetched;
                Ok(())
            },
        );
        result.unwrap();
        runtime.block_on(fixture.quiet());
        let total = total.into_inner().unwrap();
        let sent = |way| fixture.traffic().sent(way);
        let ways = [Way::Sendfile, Way::FileCopy, Way::Splice, Way::RelayCopy].map(sent);
        match mode.transfer {
            Transfer::Zerocopy => {
                assert_eq!(ways, [total.file, 0, total.relay - total.prefetched, total.prefetched], "{mode:?}");
            }
            Transfer::Copy => assert_eq!(ways, [0, total.file, 0, total.relay], "{mode:?}"),
        }
    }
}

/// Whatever goes wrong under way: the client has a prefix of the body, then an orderly end, and nothing is left behind.
async fn run_fault(fixture: &Fixture, fault: Fault, narrow: bool) {
    let bytes = truth();
    let mut file = None;
    let mut client = if narrow { fixture.connect_narrow().await } else { fixture.connect().await };
    match fault {
        Fault::ClientLeaves(_) | Fault::FileShrinks(_) => {
            let opened = file_of(bytes);
            fixture.then(Body::file(opened.clone(), 0, LEN as u64));
            file = Some(opened);
        }
        Fault::PeerCloses(_) | Fault::PeerGoesOn => {
            let (ours, mut peer) = pair().await;
            let sent = if let Fault::PeerCloses(after) = fault { &bytes[..after] } else { bytes };
            let goes_on = matches!(fault, Fault::PeerGoesOn);
            tokio::spawn(async move {
                let _ = peer.write_all(sent).await;
                if goes_on {
                    let _ = peer.write_all(b"and more").await;
                }
            });
            fixture.then(Body::relay(Relay::new(ours, Bytes::new(), LEN as u64, Box::new(|_| ()))));
        }
    }
    client.get().await;
    client.head().await;
    match fault {
        Fault::ClientLeaves(after) => {
            same(&client.exactly(after).await, &bytes[..after]);
            drop(client);
        }
        Fault::FileShrinks(to) => {
            file.as_ref().unwrap().set_len(to as u64).unwrap();
            let (got, ended) = client.rest_of(LEN).await;
            assert!(got.len() == LEN || ended == Some(Ended::Fin), "{} bytes, {ended:?}", got.len());
            assert!(got.len() >= to.min(LEN));
            // What the kernel took up before the file shrank is as it was, or zeros within a page: sendfile(2) refers to pages.
            same(&got[..to.min(got.len())], &bytes[..to.min(got.len())]);
            drop(client);
        }
        Fault::PeerCloses(after) => {
            let (got, ended) = client.rest_of(LEN).await;
            same(&got, &bytes[..after]);
            assert_eq!(ended, (after < LEN).then_some(Ended::Fin));
            drop(client);
        }
        Fault::PeerGoesOn => {
            same(&client.exactly(LEN).await, bytes);
            // The next answer is not disturbed by what the peer sent beyond its length.
            fixture.then(text("next"));
            assert_eq!(client.fetch().await.1, b"next");
            drop(client);
        }
    }
    fixture.quiet().await;
    if let Some(file) = file {
        assert_eq!(Arc::strong_count(&file), 1, "the file is still open");
    }
}

#[test]
fn whatever_goes_wrong_the_client_has_a_prefix_and_an_orderly_end() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cases = ProptestConfig::default().cases / 4;
    for mode in modes() {
        let fixture = runtime.block_on(async { Fixture::new(mode) });
        let fault = prop_oneof![
            (0..LEN).prop_map(Fault::ClientLeaves),
            (0..LEN).prop_map(Fault::FileShrinks),
            (0..=LEN).prop_map(Fault::PeerCloses),
            Just(Fault::PeerGoesOn),
        ];
        let config = ProptestConfig { cases, max_shrink_iters: 50, ..ProptestConfig::default() };
        let result = TestRunner::new(config).run(&(fault, any::<bool>()), |(fault, narrow)| {
            runtime.block_on(run_fault(&fixture, fault, narrow));
            Ok(())
        });
        result.unwrap();
    }
}

/// A file of which nothing is in memory is read first and sent then, exactly, whole and in part.
#[tokio::test]
async fn cold_files_are_exact() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("cold");
    std::fs::write(&path, truth()).unwrap();
    let file = Arc::new(File::open(&path).unwrap());
    file.sync_all().unwrap();
    for mode in modes() {
        let fixture = Fixture::new(mode);
        for (from, to) in [(0, LEN), (777, 1_600_000), (LEN - 1, LEN), (600_000, 600_000)] {
            rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            fixture.then(Body::file(file.clone(), from as u64, (to - from) as u64));
            same(&fixture.connect().await.fetch().await.1, &truth()[from..to]);
        }
    }
}

/// Across 4 GiB, where an offset of 32 bits would wrap.
#[tokio::test]
async fn parts_across_4_gib_are_exact() {
    let file = tempfile::tempfile().unwrap();
    let (at, mark) = ((4_u64 << 30) - 1000, noise(2000));
    file.write_all_at(&mark, at).unwrap();
    let file = Arc::new(file);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let mut client = fixture.connect().await;
        fixture.then(Body::file(file.clone(), at - 1000, 3000));
        same(&client.fetch().await.1, &[&vec![0; 1000], &mark[..]].concat());
    }
}
