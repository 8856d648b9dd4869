//! One client's connection, from accept to close.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;

use futures::FutureExt;
use http::{HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::engine::Accepted;
use super::watch::{Expired, Handled, Verdict, Watch};
use super::{RemoteAddr, Shared, linger};
use crate::zerocopy::{Body, BodyError, BoundBody, Io, Ops, Settings};

/// How a connection ended.
#[derive(Debug)]
enum End {
    /// Either side closed it, or it broke.
    Http(hyper::Result<()>),
    Expired(Expired),
    /// The server ends.
    Aborted,
}

pub(super) async fn serve(mut accepted: Accepted, shared: Arc<Shared>, settings: Arc<Settings>) {
    let remote = accepted.remote;
    // The accepted connection stays counted until its socket is closed.
    let stream = match accepted.take_stream().and_then(prepare) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%remote, %error, "a connection failed at its start");
            return;
        }
    };
    let (stream, end) = match drive(stream, &accepted, &shared, &settings).await {
        Ok(ended) => ended,
        Err(error) => {
            tracing::warn!(%error, "cannot serve a connection");
            return;
        }
    };
    report(remote, &end);
    linger::close(stream, shared.limits.linger).await;
    drop(accepted);
}

fn prepare(stream: std::net::TcpStream) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(stream)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Runs HTTP until the connection's end, and gives its socket back.
async fn drive(
    stream: TcpStream,
    accepted: &Accepted,
    shared: &Arc<Shared>,
    settings: &Arc<Settings>,
) -> io::Result<(TcpStream, End)> {
    let ops = Ops::new(settings)?;
    let handling = Arc::new(Handling::default());
    let (remote, is_refused) = (RemoteAddr(accepted.remote), accepted.is_refused());
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(remote);
        let turn = Handling::begin(&handling);
        let (shared, ops) = (shared.clone(), ops.clone());
        async move {
            let _turn = turn;
            Ok::<_, Infallible>(answer(&shared, &ops, request, is_refused).await)
        }
    });
    let mut http = http1::Builder::new();
    // The watch bounds the waits: hyper has no bound on a stalled client, and one for a head and an idle time together.
    http.half_close(true).max_header_size(shared.limits.header_bytes).header_read_timeout(None).writev(true);
    http.keep_alive(!is_refused);
    let mut connection = http.serve_connection(TokioIo::new(Io::new(stream, ops.clone())), service);

    let mut watch = Watch::new(shared.limits);
    let mut drain = pin!(shared.stop.drain.cancelled());
    let mut abort = pin!(shared.stop.abort.cancelled());
    let mut draining = false;
    let end = poll_fn(|cx| {
        loop {
            ops.begin_turn();
            if let Poll::Ready(result) = connection.poll_unpin(cx) {
                return Poll::Ready(End::Http(result));
            }
            if abort.as_mut().poll(cx).is_ready() {
                return Poll::Ready(End::Aborted);
            }
            if !draining && drain.as_mut().poll(cx).is_ready() {
                draining = true;
                std::pin::Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
            match watch.poll(cx, ops.activity(), handling.get()) {
                Verdict::Wait => return Poll::Pending,
                Verdict::TryWrite => ops.force_write(),
                Verdict::End(expired) => return Poll::Ready(End::Expired(expired)),
            }
        }
    })
    .await;
    Ok((connection.into_parts().io.into_inner().into_stream(), end))
}

async fn answer(shared: &Shared, ops: &Ops, request: Request<Incoming>, is_refused: bool) -> Response<BoundBody> {
    let handle = || if is_refused { shared.handler.refuse(request) } else { shared.handler.handle(request) };
    let answered = AssertUnwindSafe(async { handle().await }).catch_unwind().await;
    let response = answered.unwrap_or_else(|_| {
        // The panic hook has said where.
        tracing::error!("a request's handler panicked; it was answered 500");
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    });
    response.map(|body| body.bind(ops))
}

/// None of these is an error of ours but a body out of step: clients leave early, peers fail, files vanish.
fn report(remote: std::net::SocketAddr, end: &End) {
    match end {
        End::Http(Ok(())) => {}
        End::Http(Err(error)) => match BodyError::find(error) {
            Some(BodyError::OutOfStep) => tracing::error!(%remote, error = %BodyError::OutOfStep, "response ended"),
            Some(error) => tracing::debug!(%remote, %error, "response ended early"),
            None => tracing::debug!(%remote, %error, "connection ended early"),
        },
        End::Expired(expired) => tracing::debug!(%remote, ?expired, "connection given up"),
        End::Aborted => tracing::debug!(%remote, "connection ended with the server"),
    }
}

/// What the handler is doing for a connection.
#[derive(Default)]
struct Handling {
    requests: AtomicU64,
    now: AtomicBool,
}

/// One request at the handler, until dropped.
struct Turn(Arc<Handling>);

// === impl Handling ===

impl Handling {
    fn begin(handling: &Arc<Self>) -> Turn {
        handling.requests.fetch_add(1, Ordering::Relaxed);
        handling.now.store(true, Ordering::Relaxed);
        Turn(handling.clone())
    }

    fn get(&self) -> Handled {
        Handled { requests: self.requests.load(Ordering::Relaxed), now: self.now.load(Ordering::Relaxed) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.now.store(false, Ordering::Relaxed);
    }
}
