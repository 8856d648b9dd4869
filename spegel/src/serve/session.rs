//! hyper's part of a connection: from a request that is not answered at once until every answer is out.

use std::convert::Infallible;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, CatchUnwind};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::watch::Handled;
use super::{RemoteAddr, Shared};
use crate::zerocopy::{Activity, Body, BoundBody, Io, Ops, Settings};

/// What hyper may read ahead at the least: its own default.
const BUFFER: usize = 408 << 10;

/// What a session came to.
pub(super) enum Polled {
    /// It is over, and with it the connection.
    Ended(hyper::Result<()>),
    /// It will wake the task.
    Waiting(Activity),
    /// Its requests are answered, the answers are out, and none is under way.
    Idle,
}

/// A connection while hyper has it.
pub(super) struct Session {
    connection: http1::Connection<TokioIo<Io>, Service>,
    ops: Ops,
    handling: Arc<Handling>,
    /// Requests of the connection before this session.
    before: u64,
}

// === impl Session ===

impl Session {
    /// Goes on with `stream`, of which `unread` was read already, for one more request where that `is_last`.
    ///
    /// # Errors
    /// The kernel refuses the few MiB of address space that stand for bodies.
    pub(super) fn new(
        stream: TcpStream,
        unread: Bytes,
        is_last: bool,
        client: &Client,
        settings: &Arc<Settings>,
    ) -> io::Result<Self> {
        let ops = Ops::new(settings)?;
        let Client { shared, handling, .. } = client;
        let mut http = http1::Builder::new();
        // The watch bounds the waits: hyper has no bound on a stalled client, and one for a head and an idle time together.
        http.half_close(true)
            .max_buf_size(shared.limits.header_bytes.max(BUFFER))
            .max_header_size(shared.limits.header_bytes)
            .header_read_timeout(None)
            .writev(true);
        http.keep_alive(!is_last);
        let service = Service { client: client.clone(), ops: ops.clone() };
        let connection = http.serve_connection(TokioIo::new(Io::after(stream, unread, ops.clone())), service);
        Ok(Self { connection, ops, handling: handling.clone(), before: handling.get().requests })
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Polled {
        self.ops.begin_turn();
        if let Poll::Ready(result) = self.connection.poll_unpin(cx) {
            return Polled::Ended(result);
        }
        let activity = self.ops.activity();
        let Handled { requests, now } = self.handling.get();
        let has_answered = requests > self.before && !now && !activity.body && self.ops.is_flushed();
        // What is left of a request's body must not be taken for the next request.
        if has_answered && !self.handling.had_body.load(Ordering::Relaxed) {
            Polled::Idle
        } else {
            Polled::Waiting(activity)
        }
    }

    /// No request is taken after the one under way.
    pub(super) fn drain(&mut self) {
        Pin::new(&mut self.connection).graceful_shutdown();
    }

    /// Makes the next write try the socket, see [`Ops::force_write`].
    pub(super) fn force_write(&self) {
        self.ops.force_write();
    }

    /// The socket, and what was read of it and not used.
    pub(super) fn into_parts(self) -> (TcpStream, Bytes) {
        let parts = self.connection.into_parts();
        let (stream, unread) = parts.io.into_inner().into_parts();
        // What hyper has read came before what it has not.
        let unread = match (parts.read_buf.is_empty(), unread.is_empty()) {
            (_, true) => parts.read_buf,
            (true, _) => unread,
            _ => [parts.read_buf, unread].concat().into(),
        };
        (stream, unread)
    }
}

/// What a connection's requests have in common.
#[derive(Clone)]
pub(super) struct Client {
    pub(super) shared: Arc<Shared>,
    pub(super) handling: Arc<Handling>,
    pub(super) remote: RemoteAddr,
    /// It is one too many, and only told so.
    pub(super) is_refused: bool,
}

/// Gives hyper's requests to the handler.
struct Service {
    client: Client,
    ops: Ops,
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response<BoundBody>;
    type Error = Infallible;
    type Future = Answering;

    fn call(&self, mut request: Request<Incoming>) -> Answering {
        let Client { shared, handling, remote, is_refused } = &self.client;
        let turn = Handling::begin(handling);
        if !request.body().is_end_stream() {
            handling.had_body.store(true, Ordering::Relaxed);
        }
        request.extensions_mut().insert(*remote);
        let handle = || if *is_refused { shared.handler.refuse(request) } else { shared.handler.handle(request) };
        let answer = catch_unwind(AssertUnwindSafe(handle)).ok();
        Answering {
            answer: answer.map(|answer| AssertUnwindSafe(answer).catch_unwind()),
            ops: self.ops.clone(),
            _turn: turn,
        }
    }
}

/// An answer of the handler's that is to come; none where the handler panicked.
struct Answering {
    answer: Option<CatchUnwind<AssertUnwindSafe<BoxFuture<'static, Response<Body>>>>>,
    ops: Ops,
    _turn: Turn,
}

impl Future for Answering {
    type Output = Result<Response<BoundBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answered = match &mut self.answer {
            Some(answer) => ready!(answer.poll_unpin(cx)).ok(),
            None => None,
        };
        let response = answered.unwrap_or_else(|| {
            // The panic hook has said where.
            tracing::error!("a request's handler panicked; it was answered 500");
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            response
        });
        Poll::Ready(Ok(response.map(|body| body.bind(&self.ops))))
    }
}

/// What the handler is doing for a connection.
#[derive(Default)]
pub(super) struct Handling {
    requests: AtomicU64,
    now: AtomicBool,
    had_body: AtomicBool,
}

/// One request at the handler, until dropped.
pub(super) struct Turn(Arc<Handling>);

// === impl Handling ===

impl Handling {
    fn begin(handling: &Arc<Self>) -> Turn {
        handling.requests.fetch_add(1, Ordering::Relaxed);
        handling.now.store(true, Ordering::Relaxed);
        Turn(handling.clone())
    }

    /// A request was answered at once.
    pub(super) fn answered(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Handled {
        Handled { requests: self.requests.load(Ordering::Relaxed), now: self.now.load(Ordering::Relaxed) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.now.store(false, Ordering::Relaxed);
    }
}
