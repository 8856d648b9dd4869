//! Clients that load a server from one core and tell what they saw. Bare sockets: a client library would be what is measured.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::event::epoll;
use rustix::net::{RecvFlags, recv};

/// Bytes taken at once from a socket. A real client, containerd, takes up to 32 KiB; more of them make the client less of a limit.
const TAKE: usize = 256 << 10;

/// How long a server may be silent.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a thread lies down before it is asked what it took.
const CALM: Duration = Duration::from_millis(1);

/// Longest head that is understood.
const HEAD: usize = 16 << 10;

/// What a client does with a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// Copies it to user space, as a real client does.
    Copy,
    /// Lets the kernel throw it away (MSG_TRUNC, tcp(7)), so that as little as can be is the client's.
    Discard,
}

/// Whom to ask for what.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where.
    pub address: SocketAddr,
    /// `GET` or `HEAD`.
    pub method: String,
    /// The path, with its query.
    pub path: String,
}

/// What a stream of large bodies came to.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
pub struct Bulk {
    /// Bytes of all bodies.
    pub bytes: u64,
    /// From the first request to the last byte.
    pub seconds: f64,
    /// Bytes of each connection.
    pub each: Vec<u64>,
    /// What the client itself took of a CPU, where that was measured.
    #[serde(default)]
    pub cpu_seconds: f64,
}

/// How long single requests took.
#[derive(Clone, Debug, serde::Deserialize, serde::Serialize)]
pub struct Waits {
    /// Answers.
    pub count: usize,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Median, in microseconds.
    pub p50: f64,
    /// In microseconds.
    pub p99: f64,
    /// The longest, in microseconds.
    pub worst: f64,
    /// What the client itself took of a CPU, where that was measured.
    #[serde(default)]
    pub cpu_seconds: f64,
}

// === impl Target ===

impl Target {
    fn request(&self) -> Vec<u8> {
        format!("{} {} HTTP/1.1\r\nhost: bench\r\n\r\n", self.method, self.path).into_bytes()
    }

    fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect(self.address).with_context(|| format!("connect to {}", self.address))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Asks `count` times on each of so many connections, one thread for each, and takes the bodies.
    ///
    /// # Errors
    /// A connection that fails, or an answer other than 200.
    pub fn bulk(&self, connections: usize, count: usize, take: Take) -> Result<Bulk> {
        let start = Instant::now();
        let each: Vec<(u64, f64)> = thread::scope(|scope| {
            let one = || Ok((self.stream(|done| done < count, take)?, thread_cpu()));
            let all: Vec<_> = (0..connections).map(|_| scope.spawn(one)).collect();
            all.into_iter().map(joined).collect::<Result<_>>()
        })?;
        let seconds = start.elapsed().as_secs_f64() - CALM.as_secs_f64();
        let cpu_seconds = each.iter().map(|(_, cpu)| cpu).sum();
        let each: Vec<u64> = each.into_iter().map(|(bytes, _)| bytes).collect();
        Ok(Bulk { bytes: each.iter().sum(), seconds, each, cpu_seconds })
    }

    /// Takes bodies on so many connections for a while, whatever of them comes.
    ///
    /// # Errors
    /// As [`Target::bulk`].
    pub fn bulk_for(&self, connections: usize, time: Duration, take: Take) -> Result<Bulk> {
        let start = Instant::now();
        let each: Vec<u64> = thread::scope(|scope| {
            let all: Vec<_> = (0..connections)
                .map(|_| {
                    scope.spawn(|| {
                        let mut stream = self.connect()?;
                        let mut bytes = 0;
                        while start.elapsed() < time {
                            stream.write_all(&self.request())?;
                            let left = body_length(&mut stream)?;
                            bytes += drain(&mut stream, left, take, || start.elapsed() < time)?;
                        }
                        Ok(bytes)
                    })
                })
                .collect();
            all.into_iter().map(joined).collect::<Result<_>>()
        })?;
        Ok(Bulk { bytes: each.iter().sum(), seconds: start.elapsed().as_secs_f64(), each, cpu_seconds: 0.0 })
    }

    fn stream(&self, mut more: impl FnMut(usize) -> bool, take: Take) -> Result<u64> {
        let mut stream = self.connect()?;
        let (mut done, mut bytes) = (0, 0);
        while more(done) {
            stream.write_all(&self.request())?;
            let length = body_length(&mut stream)?;
            bytes += drain(&mut stream, length, take, || true)?;
            done += 1;
        }
        Ok(bytes)
    }

    /// Asks on so many connections, on each anew as soon as an answer is there, until told otherwise. One thread.
    ///
    /// # Errors
    /// As [`Target::bulk`].
    pub fn small(&self, connections: usize, go_on: impl Fn(Duration) -> bool) -> Result<Waits> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let request = self.request();
        let mut lanes = Vec::new();
        for index in 0..connections {
            let stream = self.connect()?;
            epoll::add(&poll, &stream, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)?;
            lanes.push(Lane { stream, got: Vec::new(), since: Instant::now() });
        }
        let start = Instant::now();
        for lane in &mut lanes {
            lane.ask(&request)?;
            lane.stream.set_nonblocking(true)?;
        }
        let mut waits = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        let mut events = Vec::with_capacity(connections);
        while go_on(start.elapsed()) {
            events.clear();
            let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
            let ready = epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), Some(&limit))?;
            ensure!(ready > 0, "no answer within 30 s");
            for event in &events {
                let index = usize::try_from(event.data.u64())?;
                if lanes[index].hear(&mut buffer, self.method == "HEAD")? {
                    waits.push(lanes[index].since.elapsed());
                    lanes[index].ask(&request)?;
                }
            }
        }
        Waits::of(waits, start.elapsed())
    }

    /// Connects, asks, waits for the first byte, and closes; one connection after the other, for a while.
    ///
    /// # Errors
    /// As [`Target::bulk`].
    pub fn connects(&self, time: Duration) -> Result<Waits> {
        let start = Instant::now();
        let mut waits = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        while start.elapsed() < time {
            let since = Instant::now();
            let mut stream = self.connect()?;
            stream.write_all(&self.request())?;
            ensure!(stream.read(&mut buffer)? > 0, "closed without an answer");
            waits.push(since.elapsed());
        }
        Waits::of(waits, start.elapsed())
    }

    /// So many connections on which one answer was had, open until dropped.
    ///
    /// # Errors
    /// As [`Target::bulk`].
    pub fn idle(&self, connections: usize) -> Result<Vec<TcpStream>> {
        (0..connections)
            .map(|_| {
                let mut stream = self.connect()?;
                stream.write_all(&self.request())?;
                let length = body_length(&mut stream)?;
                drain(&mut stream, length, Take::Copy, || true)?;
                Ok(stream)
            })
            .collect()
    }
}

/// One connection of many that one thread looks after.
struct Lane {
    stream: TcpStream,
    got: Vec<u8>,
    since: Instant,
}

impl Lane {
    fn ask(&mut self, request: &[u8]) -> Result<()> {
        self.got.clear();
        self.since = Instant::now();
        Ok(self.stream.write_all(request)?)
    }

    /// Reads what is there; whether the answer is whole.
    fn hear(&mut self, buffer: &mut [u8], head_only: bool) -> Result<bool> {
        match self.stream.read(buffer) {
            Ok(0) => bail!("closed in the middle of an answer"),
            Ok(n) => self.got.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let Some(head) = head_length(&self.got) else { return Ok(false) };
        let body = if head_only { 0 } else { content_length(&self.got[..head])? };
        Ok(self.got.len() as u64 >= head as u64 + body)
    }
}

// === impl Waits ===

impl Waits {
    fn of(mut waits: Vec<Duration>, time: Duration) -> Result<Self> {
        ensure!(!waits.is_empty(), "no answer at all");
        waits.sort();
        let at = |part: usize| waits[(waits.len() * part / 100).min(waits.len() - 1)].as_secs_f64() * 1e6;
        Ok(Self {
            count: waits.len(),
            seconds: time.as_secs_f64(),
            p50: at(50),
            p99: at(99),
            worst: at(100),
            cpu_seconds: 0.0,
        })
    }
}

/// What this thread has taken of a CPU, in seconds. It lies down for a millisecond before, since the kernel adds up when it does.
pub fn thread_cpu() -> f64 {
    thread::sleep(CALM);
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|field| field.parse::<f64>().ok()).unwrap_or_default() / 1e9
}

/// Lets this process have as many open files as the administrator allows.
///
/// # Errors
/// The kernel refuses.
pub fn allow_many_files() -> Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit })?)
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a client panicked")))
}

fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fn content_length(head: &[u8]) -> Result<u64> {
    let head = std::str::from_utf8(head)?;
    ensure!(head.starts_with("HTTP/1.1 20"), "not served: {}", head.lines().next().unwrap_or_default());
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    };
    head.lines().find_map(field).context("no length in the head")
}

/// Reads a head to its last byte and no further, so that the body is all that is left. One system call for most.
pub(crate) fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut buffer = vec![0; HEAD];
    loop {
        let (_, seen) = recv(&*stream, buffer.as_mut_slice(), RecvFlags::PEEK)?;
        ensure!(seen > 0, "closed before an answer");
        if let Some(head) = head_length(&buffer[..seen]) {
            stream.read_exact(&mut buffer[..head])?;
            buffer.truncate(head);
            return Ok(buffer);
        }
        ensure!(seen < HEAD, "a head without end");
        thread::yield_now();
    }
}

/// Reads a head and returns the length of the body behind it.
pub(crate) fn body_length(stream: &mut TcpStream) -> Result<u64> {
    content_length(&read_head(stream)?)
}

/// Takes `left` bytes, or less when told to stop.
fn drain(stream: &mut TcpStream, mut left: u64, take: Take, go_on: impl Fn() -> bool) -> Result<u64> {
    let flags = if take == Take::Discard { RecvFlags::TRUNC } else { RecvFlags::empty() };
    let mut buffer = vec![0; TAKE];
    let mut taken = 0;
    while left > 0 && go_on() {
        let room = usize::try_from(left).unwrap_or(TAKE).min(TAKE);
        let (_, n) = recv(&*stream, &mut buffer[..room], flags)?;
        ensure!(n > 0, "closed with {left} bytes missing");
        left -= n as u64;
        taken += n as u64;
    }
    Ok(taken)
}
