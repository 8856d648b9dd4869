//! Answers at once from memory, and how they take turns with hyper's.

use std::panic::panic_any;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use spegel::serve::{Handler, Head as Asked, Limits, Quick};

use super::*;

/// Answers `/N...` at once with the first N bytes of the truth, and `/file/N...` from a file.
struct Both {
    truth: Vec<u8>,
    file: Arc<File>,
    /// Answers made at once, and how many of them were sent whole, or broke off.
    quick: AtomicU64,
    whole: Arc<AtomicU64>,
    broken: Arc<AtomicU64>,
    /// Requests that came through hyper.
    slow: AtomicU64,
}

impl Both {
    fn new() -> Arc<Self> {
        let truth = noise(200_000);
        let file = file_of(&truth);
        let zero = AtomicU64::default;
        Arc::new(Self { truth, file, quick: zero(), whole: Arc::default(), broken: Arc::default(), slow: zero() })
    }

    fn serve(self: &Arc<Self>, options: Options) -> Server {
        Server::bind(&[loopback()], options, Arc::new(Shared(self.clone()))).unwrap()
    }
}

struct Shared(Arc<Both>);

fn number(path: &str) -> usize {
    path.trim_start_matches("/file").trim_start_matches('/').parse().unwrap()
}

impl Handler for Shared {
    fn handle(&self, request: Request<Incoming>) -> BoxFuture<'static, Response<Body>> {
        self.0.slow.fetch_add(1, Ordering::Relaxed);
        let path = request.uri().path();
        let length = if path == "/panic" { 3 } else { number(path) };
        let response = Response::new(Body::file(self.0.file.clone(), 0, length as u64));
        async move {
            // As real handlers do, it goes away once.
            tokio::task::yield_now().await;
            response
        }
        .boxed()
    }

    fn quick(&self, asked: &Asked<'_>, _: SocketAddr) -> Option<Quick> {
        if asked.target == "/panic" {
            panic_any("told to");
        }
        if asked.target.starts_with("/file") {
            return None;
        }
        let length = number(asked.target);
        self.0.quick.fetch_add(1, Ordering::Relaxed);
        let (whole, broken) = (self.0.whole.clone(), self.0.broken.clone());
        let end = move |end: spegel::zerocopy::BodyEnd| {
            (if end.complete { &whole } else { &broken }).fetch_add(1, Ordering::Relaxed);
        };
        let body = if asked.is_head { Bytes::new() } else { Bytes::copy_from_slice(&self.0.truth[..length]) };
        Some(Quick {
            head: format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n").into(),
            body,
            end: Box::new(end),
        })
    }
}

async fn connect(server: &Server) -> Client {
    Client { stream: TcpStream::connect(server.addrs()[0]).await.unwrap(), buf: Vec::new() }
}

async fn quiet(server: &Server) {
    until("every connection is closed", || server.metrics().open() == 0).await;
}

/// A request: at once or from a file, GET or HEAD, how many bytes, and how long its head is beside what it needs.
#[derive(Clone, Debug)]
struct Step {
    quick: bool,
    head: bool,
    length: usize,
    filler: usize,
}

impl Step {
    fn text(&self) -> String {
        let (method, folder) = (if self.head { "HEAD" } else { "GET" }, if self.quick { "" } else { "/file" });
        let (length, filler) = (self.length, "x".repeat(self.filler));
        format!("{method} {folder}/{length} HTTP/1.1\r\nhost: h\r\nx: {filler}\r\n\r\n")
    }
}

fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![1_usize..10, 10_usize..3000, 3000_usize..200_000];
    // Together they are more than is read at once.
    let filler = prop_oneof![Just(0_usize), 0_usize..2000];
    let parts = (prop::bool::weighted(0.7), prop::bool::weighted(0.2), length, filler);
    parts.prop_map(|(quick, head, length, filler)| Step { quick, head, length, filler })
}

async fn check(both: &Both, server: &Server, steps: &[Step], cuts: &[prop::sample::Index]) {
    let text: String = steps.iter().map(Step::text).collect();
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len())).chain([0, text.len()]).collect();
    cuts.sort_unstable();
    let Client { stream, buf } = connect(server).await;
    let (read, mut write) = stream.into_split();
    let sending = tokio::spawn(async move {
        for part in cuts.windows(2) {
            write.write_all(&text.as_bytes()[part[0]..part[1]]).await.unwrap();
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        write
    });
    let mut reader = Reader { read, buf };
    for step in steps {
        let head = reader.head().await;
        assert!(head.starts_with("http/1.1 200 ok\r\n") && head.contains("\r\ndate: "), "{head}");
        assert!(head.contains(&format!("content-length: {}\r\n", step.length)), "{step:?}: {head}");
        same(
            &reader.exactly(if step.head { 0 } else { step.length }).await,
            &both.truth[..if step.head { 0 } else { step.length }],
        );
    }
    drop(sending.await.unwrap());
    assert_eq!(reader.read.read(&mut [0]).await.unwrap(), 0, "more than was asked for");
}

/// As [`Client`], while another task sends.
struct Reader {
    read: tokio::net::tcp::OwnedReadHalf,
    buf: Vec<u8>,
}

impl Reader {
    async fn more(&mut self) {
        let read = tokio::time::timeout(PATIENCE, self.read.read_buf(&mut self.buf)).await;
        assert!(read.expect("silence").unwrap() > 0, "closed early");
    }

    async fn head(&mut self) -> String {
        loop {
            if let Some(at) = self.buf.windows(4).position(|window| window == b"\r\n\r\n") {
                let rest = self.buf.split_off(at + 4);
                return String::from_utf8(std::mem::replace(&mut self.buf, rest)).unwrap().to_lowercase();
            }
            self.more().await;
        }
    }

    async fn exactly(&mut self, length: usize) -> Vec<u8> {
        while self.buf.len() < length {
            self.more().await;
        }
        let rest = self.buf.split_off(length);
        std::mem::replace(&mut self.buf, rest)
    }
}

#[test]
fn both_kinds_take_turns_wherever_the_requests_are_cut() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for mode in modes() {
        let both = Both::new();
        let server = runtime.block_on(async { both.serve(mode.options()) });
        let requests =
            (prop::collection::vec(step(), 1..24), prop::collection::vec(any::<prop::sample::Index>(), 0..6));
        // Each is many requests.
        let cases = ProptestConfig::default().cases / 4;
        let result = TestRunner::new(ProptestConfig { cases, max_shrink_iters: 100, ..ProptestConfig::default() }).run(
            &requests,
            |(steps, cuts)| {
                runtime.block_on(check(&both, &server, &steps, &cuts));
                Ok(())
            },
        );
        result.unwrap();
        runtime.block_on(quiet(&server));
        let (quick, slow) = (both.quick.load(Ordering::Relaxed), both.slow.load(Ordering::Relaxed));
        assert!(quick > 10 && slow > 10, "{quick} at once, {slow} by hyper");
        assert_eq!(both.whole.load(Ordering::Relaxed), quick, "each is told of once");
    }
}

/// More than both of them read at once, and more than hyper answers in a turn.
#[tokio::test]
async fn none_of_many_requests_at_once_is_lost() {
    for mode in modes() {
        let both = Both::new();
        let server = both.serve(mode.options());
        for first_by_hyper in [0, 1, 7, 29, 30] {
            let step = |n: usize| Step { quick: n > first_by_hyper, head: false, length: 10 + n, filler: 240 };
            let steps: Vec<Step> = (0..200).map(step).collect();
            check(&both, &server, &steps, &[]).await;
            let mixed: Vec<Step> = (0..200).map(|n| Step { quick: n % 40 != first_by_hyper, ..step(n) }).collect();
            check(&both, &server, &mixed, &[]).await;
        }
    }
}

#[tokio::test]
async fn a_request_is_answered_at_once_in_one_part_or_two() {
    let both = Both::new();
    let server = both.serve(Mode::default().options());
    let mut client = connect(&server).await;
    let counts = || (both.quick.load(Ordering::Relaxed), both.slow.load(Ordering::Relaxed));
    for round in 1..=3 {
        client.send(b"GET /2000 HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert_eq!(client.head().await.length(), 2000);
        same(&client.exactly(2000).await, &both.truth[..2000]);
        assert_eq!(counts(), (3 * round - 2, 0));
        client.send(b"GET /1000 HTTP/1.1\r\nho").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        client.send(b"st: h\r\n\r\nGET /10 HTTP/1.1\r\n\r\n").await;
        assert_eq!(client.head().await.length(), 1000);
        same(&client.exactly(1000).await, &both.truth[..1000]);
        assert_eq!(client.head().await.length(), 10);
        client.exactly(10).await;
        assert_eq!(counts(), (3 * round, 0));
    }
}

#[tokio::test]
async fn a_requests_body_is_never_taken_for_a_request() {
    for mode in modes() {
        let both = Both::new();
        let server = both.serve(mode.options());
        let smuggled = "GET /7 HTTP/1.1\r\nhost: h\r\n\r\n";
        for framing in [
            format!("content-length: {}\r\n\r\n{smuggled}", smuggled.len()),
            format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n{smuggled}\r\n0\r\n\r\n", smuggled.len()),
        ] {
            for apart in [false, true] {
                let mut client = connect(&server).await;
                let request = format!("GET /file/5 HTTP/1.1\r\nhost: h\r\n{framing}");
                let (first, second) = request.split_at(request.find("\r\n\r\n").unwrap() + 4);
                client.send(first.as_bytes()).await;
                if apart {
                    assert_eq!(client.head().await.length(), 5);
                    client.exactly(5).await;
                }
                // Fails where the connection is closed on the body.
                let _ = client.stream.write_all(second.as_bytes()).await;
                let _ = client.stream.shutdown().await;
                let (rest, _) = client.rest().await;
                assert!(!String::from_utf8_lossy(&rest).contains("content-length: 7"), "{framing}");
            }
        }
        assert_eq!(both.quick.load(Ordering::Relaxed), 0);
    }
}

#[tokio::test]
async fn who_asks_much_and_reads_nothing_is_waited_for_and_then_dropped() {
    let both = Both::new();
    let limits =
        Limits { write_stall: Duration::from_millis(300), linger: Duration::from_millis(50), ..Limits::default() };
    let server = both.serve(Options { limits, ..Mode::default().options() });
    // One that reads late gets everything.
    let mut late = connect(&server).await;
    late.send("GET /100000 HTTP/1.1\r\n\r\n".repeat(100).as_bytes()).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..100 {
        assert_eq!(late.head().await.length(), 100_000);
        same(&late.exactly(100_000).await, &both.truth[..100_000]);
    }
    drop(late);
    quiet(&server).await;
    assert_eq!(both.whole.load(Ordering::Relaxed), 100);
    let mut never = connect(&server).await;
    never.send("GET /100000 HTTP/1.1\r\n\r\n".repeat(100).as_bytes()).await;
    until("it is there", || server.metrics().open() == 1).await;
    until("it is dropped", || server.metrics().open() == 0).await;
    assert_eq!(both.broken.load(Ordering::Relaxed), 1, "the one that was on its way");
    drop(never);
}

#[tokio::test]
async fn one_who_does_not_wait_for_answers_does_not_keep_others_waiting() {
    let both = Both::new();
    let server = both.serve(Mode::default().options());
    let (mut greedy, mut modest) = (connect(&server).await, connect(&server).await);
    let flood = "GET /3 HTTP/1.1\r\n\r\n".repeat(100_000);
    let (mut read, mut write) = greedy.stream.split();
    let flooding = async { write.write_all(flood.as_bytes()).await.unwrap() };
    let reading = async {
        let (mut total, mut buffer) = (0, vec![0; 1 << 16]);
        while total < 100_000 * 60 {
            total += read.read(&mut buffer).await.unwrap();
        }
    };
    let asking = async {
        for _ in 0..100 {
            modest.send(b"GET /5 HTTP/1.1\r\n\r\n").await;
            assert_eq!(modest.head().await.length(), 5);
            modest.exactly(5).await;
        }
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(flooding, reading) } => panic!("the modest one had to wait for all of it"),
        () = asking => {}
    }
}

#[tokio::test]
async fn a_panic_leaves_the_request_to_the_handler() {
    let both = Both::new();
    let server = both.serve(Mode::default().options());
    let mut client = connect(&server).await;
    client.send(b"GET /panic HTTP/1.1\r\nhost: h\r\n\r\nGET /4 HTTP/1.1\r\n\r\n").await;
    for length in [3, 4] {
        assert_eq!(client.head().await.length(), length);
        client.exactly(usize::try_from(length).unwrap()).await;
    }
}

#[tokio::test]
async fn the_end_closes_who_waits_and_answers_who_has_asked() {
    let both = Both::new();
    let server = both.serve(Mode::default().options());
    let (mut idle, mut fresh, mut busy) = (connect(&server).await, connect(&server).await, connect(&server).await);
    idle.send(b"GET /4 HTTP/1.1\r\n\r\n").await;
    idle.head().await;
    idle.exactly(4).await;
    busy.send("GET /100000 HTTP/1.1\r\n\r\n".repeat(60).as_bytes()).await;
    until("all are there, and one waits", || server.metrics().open() == 3 && both.quick.load(Ordering::Relaxed) > 20)
        .await;
    let ended = tokio::spawn(server.shutdown(PATIENCE));
    assert_eq!(idle.rest().await, (Vec::new(), Ended::Fin));
    assert_eq!(fresh.rest().await, (Vec::new(), Ended::Fin));
    // The answer under way is finished, and one more is given with the word that it is the last.
    let mut answers = 0;
    loop {
        let head = busy.head().await;
        same(&busy.exactly(100_000).await, &both.truth[..100_000]);
        answers += 1;
        if head.text.contains("connection: close") {
            break;
        }
    }
    assert!((20..60).contains(&answers), "{answers}");
    assert_eq!(busy.rest().await, (Vec::new(), Ended::Fin));
    drop((idle, fresh, busy));
    assert_eq!(ended.await.unwrap(), 0);
}
