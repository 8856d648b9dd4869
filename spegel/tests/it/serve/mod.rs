//! Conformance of `serve` and `zerocopy`, the same on each engine, for bytes moved by the kernel and bytes copied. The client is a bare
//! socket, since how a connection ends is part of what is tested.
#![allow(clippy::unwrap_used)]

mod conformance;
mod engines;
mod files;
mod growing;
mod limits;
mod quick;
mod relays;
mod stop;

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use spegel::serve::{EngineChoice, ListenAddr, Options, Server};
use spegel::zerocopy::{Body, Traffic, Transfer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// How long any one step of a test may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An engine, and a way to move bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    engine: EngineChoice,
    transfer: Transfer,
}

impl Mode {
    /// A server with one data runtime, so that its connections meet.
    fn options(self) -> Options {
        Options { engine: self.engine, transfer: self.transfer, runtimes: 1, ..Options::default() }
    }
}

/// Every combination that this machine has.
fn modes() -> Vec<Mode> {
    static ENGINES: LazyLock<Vec<EngineChoice>> = LazyLock::new(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let within = runtime.enter();
        let handler = |_: Request<Incoming>| async { Response::new(Body::empty()) };
        let options = Options { engine: EngineChoice::IoUring, runtimes: 1, ..Options::default() };
        let tried = Server::bind(&[loopback()], options, Arc::new(handler)).map(drop);
        // It may be that this is within a runtime already.
        drop(within);
        runtime.shutdown_background();
        match tried {
            Ok(()) => vec![EngineChoice::IoUring, EngineChoice::Tokio],
            Err(error) => {
                println!("skipped for io-uring: {error}");
                vec![EngineChoice::Tokio]
            }
        }
    });
    let with = |engine| [Transfer::Zerocopy, Transfer::Copy].map(|transfer| Mode { engine, transfer });
    ENGINES.iter().flat_map(|engine| with(*engine)).collect()
}

/// A server that answers each request with the next response of a list.
struct Fixture {
    server: Server,
    script: Arc<Mutex<VecDeque<Response<Body>>>>,
}

impl Fixture {
    fn new(mode: Mode) -> Self {
        Self::with(mode.options())
    }

    fn with(options: Options) -> Self {
        let script = Arc::new(Mutex::new(VecDeque::<Response<Body>>::new()));
        let answers = script.clone();
        let handler = move |_: Request<Incoming>| {
            let next = answers.lock().unwrap().pop_front();
            async move {
                next.unwrap_or_else(|| Response::builder().status(StatusCode::NOT_FOUND).body(Body::empty()).unwrap())
            }
        };
        Self { server: Server::bind(&[loopback()], options, Arc::new(handler)).unwrap(), script }
    }

    fn addr(&self) -> SocketAddr {
        self.server.addrs()[0]
    }

    fn traffic(&self) -> &Traffic {
        self.server.metrics().traffic()
    }

    fn then(&self, body: Body) {
        self.script.lock().unwrap().push_back(Response::new(body));
    }

    async fn connect(&self) -> Client {
        Client { stream: TcpStream::connect(self.addr()).await.unwrap(), buf: Vec::new() }
    }

    /// A client whose receive buffer is as small as the kernel lets it be.
    async fn connect_narrow(&self) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        Client { stream: socket.connect(self.addr()).await.unwrap(), buf: Vec::new() }
    }

    /// Waits until no connection is open.
    async fn quiet(&self) {
        until("every connection is closed", || self.server.metrics().open() == 0).await;
    }
}

fn loopback() -> ListenAddr {
    ListenAddr::One(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
}

/// Polls for `condition`, and fails with `what` when it does not come true in time.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let polled = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, polled).await.is_ok(), "not in time: {what}");
}

/// How the server ended a connection.
#[derive(Debug, Eq, PartialEq)]
enum Ended {
    Fin,
    Reset,
}

struct Client {
    stream: TcpStream,
    buf: Vec<u8>,
}

struct Head {
    text: String,
}

impl Head {
    fn status(&self) -> u16 {
        self.text.split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn length(&self) -> u64 {
        let line = self.text.lines().find_map(|line| line.strip_prefix("content-length: "));
        line.unwrap_or_else(|| panic!("no length in {}", self.text)).parse().unwrap()
    }
}

impl Client {
    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn get(&mut self) {
        self.send(b"GET /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
    }

    /// Reads more into the buffer; `None` when the server has ended the connection.
    async fn more(&mut self) -> Result<(), Ended> {
        let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buf)).await;
        match read.expect("the server sends nothing, and does not close") {
            Ok(0) => Err(Ended::Fin),
            Ok(_) => Ok(()),
            Err(_) => Err(Ended::Reset),
        }
    }

    async fn head(&mut self) -> Head {
        loop {
            if let Some(at) = self.buf.windows(4).position(|window| window == b"\r\n\r\n") {
                let rest = self.buf.split_off(at + 4);
                let text = String::from_utf8(std::mem::replace(&mut self.buf, rest)).unwrap();
                return Head { text: text.to_lowercase() };
            }
            self.more().await.unwrap();
        }
    }

    async fn exactly(&mut self, len: usize) -> Vec<u8> {
        while self.buf.len() < len {
            self.more().await.unwrap();
        }
        let rest = self.buf.split_off(len);
        std::mem::replace(&mut self.buf, rest)
    }

    /// Asks, and reads a whole answer.
    async fn fetch(&mut self) -> (Head, Vec<u8>) {
        self.get().await;
        let head = self.head().await;
        let body = self.exactly(usize::try_from(head.length()).unwrap()).await;
        (head, body)
    }

    /// Reads `len` bytes, or until the server ends the connection.
    async fn rest_of(&mut self, len: usize) -> (Vec<u8>, Option<Ended>) {
        while self.buf.len() < len {
            if let Err(ended) = self.more().await {
                return (std::mem::take(&mut self.buf), Some(ended));
            }
        }
        (self.exactly(len).await, None)
    }

    /// Reads until the server ends the connection.
    async fn rest(&mut self) -> (Vec<u8>, Ended) {
        loop {
            if let Err(ended) = self.more().await {
                return (std::mem::take(&mut self.buf), ended);
            }
        }
    }
}

/// Bytes in which no stretch repeats, so that a shifted or doubled one shows.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn file_of(bytes: &[u8]) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Arc::new(file)
}

/// Compares without printing megabytes.
#[track_caller]
fn same(got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "length");
    let differs = got.iter().zip(want).position(|(a, b)| a != b);
    assert!(differs.is_none(), "the bytes differ from {differs:?} on");
}

fn text(text: &'static str) -> Body {
    Body::bytes(Bytes::from_static(text.as_bytes()))
}
