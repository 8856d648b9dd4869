//! Listeners and the runtimes that serve their connections. Knows no OCI.
//!
//! One acceptor, on the first of a few current-thread runtimes, hands each connection to the least loaded of them, since few long
//! connections hash badly. There it is driven by hyper's HTTP/1 over
//! [`zerocopy::Io`](crate::zerocopy::Io). Every wait has a bound in [`Limits`], and every connection ends with a FIN and a
//! read of what the client still sent: a reset would make containerd fail a pull that an early FIN lets it resume.

mod acceptor;
mod connection;
mod engine;
mod linger;
mod listener;
mod metrics;
mod quick;
mod runtime;
mod session;
mod watch;
mod watchdog;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::ebpf::Watch;
use crate::zerocopy::{Body, PipePool, Settings, Transfer};
use engine::Engine;
use watchdog::Watchdog;

pub use listener::{ListenAddr, listen};
pub use metrics::ServeMetrics;
pub use quick::{Head, Quick};
pub use runtime::{Chosen, EngineChoice, EngineKind};

/// Answers requests. A panic in it costs that request a 500 and the connection, and nothing else.
pub trait Handler: Send + Sync + 'static {
    /// Answers `request`, whose extensions hold the client's [`RemoteAddr`]. Runs on a data runtime: it must not block.
    fn handle(&self, request: Request<Incoming>) -> BoxFuture<'static, Response<Body>>;

    /// Answers a request at once, from memory, or leaves it to [`Handler::handle`], as it does where nothing else is said. Runs on a data
    /// runtime: it must not block. A panic in it means the latter.
    fn quick(&self, _request: &Head<'_>, _remote: SocketAddr) -> Option<Quick> {
        None
    }

    /// Tells the client of a connection that is one too many to look elsewhere; the connection is closed after it. 503 if not told
    /// otherwise: containerd goes upstream on one at once.
    fn refuse(&self, _request: Request<Incoming>) -> BoxFuture<'static, Response<Body>> {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        std::future::ready(response).boxed()
    }
}

impl<F, Fut> Handler for F
where
    F: Fn(Request<Incoming>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    fn handle(&self, request: Request<Incoming>) -> BoxFuture<'static, Response<Body>> {
        self(request).boxed()
    }
}

/// The client's address, an extension of every request. An IPv4 client of a dual-stack socket has an IPv4 address here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RemoteAddr(pub SocketAddr);

/// What a client may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections open at once; one more is told to go elsewhere and closed.
    pub connections: usize,
    /// Bytes of a request's line and headers; more is answered 431.
    pub header_bytes: usize,
    /// Time for a request's head to arrive, from the connection's start or the head's first byte.
    pub header_read: Duration,
    /// Time between two requests.
    pub idle: Duration,
    /// Time for which a client may take no byte of what is ready for it.
    pub write_stall: Duration,
    /// Time for which a connection that has ended is read on, so that its close is no reset.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            header_bytes: 32 << 10,
            header_read: Duration::from_secs(10),
            // Go's client lets go of an idle connection after 90 s: who closes second never closes on a request.
            idle: Duration::from_secs(120),
            write_stall: Duration::from_secs(30),
            linger: Duration::from_secs(1),
        }
    }
}

/// How a server works.
#[derive(Clone, Debug)]
pub struct Options {
    /// What a client may cost.
    pub limits: Limits,
    /// Data runtimes, each a thread.
    pub runtimes: usize,
    /// What the data runtimes run on.
    pub engine: EngineChoice,
    /// How long a data runtime may make no turn before the process is ended; without it none is.
    pub watchdog: Option<Duration>,
    /// How bytes of files and peers are moved.
    pub transfer: Transfer,
    /// Pipes for relays; relays beyond these copy.
    pub pipes: usize,
    /// Where the server counts.
    pub metrics: ServeMetrics,
    /// Who is told what sockets say of their connections, if that is wanted.
    pub watch: Option<Watch>,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            limits: Limits::default(),
            runtimes: cores.min(4),
            engine: EngineChoice::Auto,
            watchdog: Some(Duration::from_secs(5)),
            transfer: Transfer::default(),
            pipes: 256,
            metrics: ServeMetrics::default(),
            watch: None,
        }
    }
}

/// Why a server could not start. Always a matter of this node's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is not of a form that is known.
    #[error("{given:?} is not an address to listen on: give :PORT, IPV4:PORT or [IPV6]:PORT")]
    Address {
        /// What was given.
        given: String,
    },
    /// Another process, or another server of this one, has the address.
    #[error("{addr} is in use by another process: stop it, or choose another address")]
    InUse {
        /// The address.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The engine that was asked for cannot be had.
    #[error(
        "the kernel refuses io_uring ({0}): choose another engine, or allow it (kernel.io_uring_disabled, seccomp)"
    )]
    Engine(io::Error),
    /// The kernel refused a thread or a descriptor that the server needs.
    #[error("cannot start the server's threads: {0}")]
    Runtime(io::Error),
}

/// A running server. Dropping it ends every connection.
#[derive(Debug)]
pub struct Server {
    addrs: Vec<SocketAddr>,
    engines: Engines,
    /// Each ends with its acceptor.
    acceptors: Vec<oneshot::Receiver<()>>,
    stop: Stop,
    linger: Duration,
    metrics: ServeMetrics,
    engine: Chosen,
    _watchdog: Option<Watchdog>,
}

/// A server's data runtimes.
type Engines = Arc<[Arc<Engine>]>;

/// The steps of an end.
#[derive(Clone, Debug, Default)]
struct Stop {
    accepting: CancellationToken,
    drain: CancellationToken,
    abort: CancellationToken,
    /// How far it has come, for a look that costs nothing. Set before the tokens are.
    step: Arc<AtomicU8>,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq, PartialOrd)]
enum Step {
    Serving,
    Draining,
    Aborting,
}

/// What connections share.
struct Shared {
    limits: Limits,
    settings: Settings,
    handler: Arc<dyn Handler>,
    stop: Stop,
    metrics: ServeMetrics,
    watch: Option<Watch>,
    /// Bytes of heads that are not whole yet.
    unfinished: Arc<AtomicUsize>,
}

// === impl Stop ===

impl Stop {
    fn drain(&self) {
        self.step.fetch_max(Step::Draining as u8, Ordering::Release);
        self.drain.cancel();
    }

    fn abort(&self) {
        self.step.fetch_max(Step::Aborting as u8, Ordering::Release);
        self.abort.cancel();
    }

    fn step(&self) -> Step {
        match self.step.load(Ordering::Acquire) {
            0 => Step::Serving,
            1 => Step::Draining,
            _ => Step::Aborting,
        }
    }
}

// === impl Server ===

impl Server {
    /// Listens on `addrs` and answers with `handler`.
    ///
    /// # Errors
    /// An address that is taken or cannot be had, or no threads for the data runtimes.
    pub fn bind(addrs: &[ListenAddr], options: Options, handler: Arc<dyn Handler>) -> Result<Self, ServeError> {
        let Options { limits, runtimes, engine, watchdog, transfer, pipes, metrics, watch } = options;
        let listeners = addrs.iter().map(|addr| listen(*addr)).collect::<Result<Vec<_>, _>>()?;
        let stop = Stop::default();
        metrics.set_limits(&limits, pipes);
        let settings = Settings {
            transfer,
            pipes: PipePool::counted(pipes, metrics.pipes()),
            traffic: metrics.traffic().clone(),
            ..Settings::default()
        };
        let shared = Arc::new(Shared {
            limits,
            settings,
            handler,
            stop: stop.clone(),
            metrics: metrics.clone(),
            watch: watch.filter(Watch::wants_probes),
            unfinished: Arc::default(),
        });
        let (engines, engine) = start_engines(runtimes.max(1), engine, watchdog, &shared)?;
        metrics.set_engine(&engine);
        let watchdog =
            watchdog.map(|bound| Watchdog::start(bound, engines.iter().map(|engine| engine.pulse()).collect()));
        let watchdog = watchdog.transpose().map_err(ServeError::Runtime)?;
        let mut bound = Vec::new();
        let mut acceptors = Vec::new();
        for listener in listeners {
            bound.push(listener.local_addr().map_err(ServeError::Runtime)?);
            acceptors.push(engines[0].accept(listener, engines.clone()).map_err(ServeError::Runtime)?);
        }
        Ok(Self { addrs: bound, engines, acceptors, stop, linger: limits.linger, metrics, engine, _watchdog: watchdog })
    }

    /// The addresses in use, in the order given; a port of 0 is the kernel's choice here.
    #[must_use]
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// What the data runtimes run on, and why.
    #[must_use]
    pub fn engine(&self) -> &Chosen {
        &self.engine
    }

    /// What the server counts.
    #[must_use]
    pub fn metrics(&self) -> &ServeMetrics {
        &self.metrics
    }

    /// Stops accepting, lets responses finish for up to `deadline`, then ends the rest with an orderly close. Returns how
    /// many connections had to be ended.
    pub async fn shutdown(mut self, deadline: Duration) -> usize {
        self.stop.accepting.cancel();
        // A handler that blocks the acceptor's runtime must not hold the process's end.
        let all_closed = futures::future::join_all(self.acceptors.drain(..));
        let _ = tokio::time::timeout(Duration::from_secs(1), all_closed).await;
        self.stop.drain();
        for engine in self.engines.iter() {
            engine.close();
        }
        let engines = self.engines.clone();
        let all_done = async move {
            for engine in engines.iter() {
                engine.done().await;
            }
        };
        tokio::pin!(all_done);
        if tokio::time::timeout(deadline, &mut all_done).await.is_ok() {
            return 0;
        }
        let cut = self.engines.iter().map(|engine| engine.load()).sum();
        self.stop.abort();
        // A handler that blocks its runtime must not hold the process's end.
        let bound = self.linger + Duration::from_secs(1);
        if tokio::time::timeout(bound, all_done).await.is_err() {
            tracing::warn!("a data runtime did not end in time: its connections end with the process");
        }
        cut
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.accepting.cancel();
        self.stop.abort();
        for engine in self.engines.iter() {
            engine.close();
        }
    }
}

/// The data runtimes, and what they run on; if they differ, what the one runs on that was refused io_uring.
fn start_engines(
    count: usize,
    choice: EngineChoice,
    watchdog: Option<Duration>,
    shared: &Arc<Shared>,
) -> Result<(Engines, Chosen), ServeError> {
    let wrap =
        |error| if choice == EngineChoice::IoUring { ServeError::Engine(error) } else { ServeError::Runtime(error) };
    let (first, mut chosen) = Engine::start(0, choice, watchdog, shared.clone()).map_err(wrap)?;
    let mut engines = vec![Arc::new(first)];
    for index in 1..count {
        let (engine, own) = Engine::start(index, choice, watchdog, shared.clone()).map_err(wrap)?;
        engines.push(Arc::new(engine));
        if own.refusal.is_some() {
            chosen = own;
        }
    }
    match &chosen.refusal {
        Some(refusal) => tracing::info!(engine = %chosen.engine, reason = chosen.reason, %refusal, "serve engine"),
        None => tracing::info!(engine = %chosen.engine, reason = chosen.reason, "serve engine"),
    }
    Ok((engines.into(), chosen))
}
