//! The responses themselves: status, headers, body.

use std::net::SocketAddr;

use http::header::{ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, WWW_AUTHENTICATE};
use http::request::Parts;
use http::response::Builder;
use http::{HeaderValue, Method, Response, StatusCode};

use crate::mirror::{CHAIN_HEADER, Chain, INGEST_HEADER, RECEIVING_HEADER};
use crate::oci::{ALLOWED_METHODS, ContentRange, Digest, ERROR_CONTENT_TYPE, ErrorCode, OciError};
use crate::store::Receiving;
use crate::zerocopy::Body;

const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// The header of [`crate::mirror::LOAD_HEADER`].
pub(super) const LOAD: HeaderName = HeaderName::from_static("x-spegel-load");
/// The header of [`crate::mirror::HOLDERS_HEADER`].
const HOLDERS: HeaderName = HeaderName::from_static("x-spegel-holders");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// The one place where an error becomes a response.
pub(super) fn error(error: &OciError) -> Response<Body> {
    let mut response = with_body(
        Response::builder().status(error.status).header(CONTENT_TYPE, ERROR_CONTENT_TYPE),
        Body::bytes(error.body()),
    );
    let headers = response.headers_mut();
    match error.status {
        StatusCode::METHOD_NOT_ALLOWED => {
            headers.insert(ALLOW, HeaderValue::from_static(ALLOWED_METHODS));
        }
        StatusCode::UNAUTHORIZED => {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"spegel\""));
        }
        _ => {}
    }
    response
}

/// The answer to a peer for which there is no place: it finds the same at `holders`.
pub(super) fn busy(holders: &[SocketAddr]) -> Response<Body> {
    let message = "this node gives its peers as much as it may: ask another";
    let mut response = error(&OciError::new(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unknown, message));
    let addresses: Vec<String> = holders.iter().map(ToString::to_string).collect();
    if let Ok(value) = HeaderValue::from_str(&addresses.join(", "))
        && !holders.is_empty()
    {
        response.headers_mut().insert(HOLDERS, value);
    }
    response
}

pub(super) fn text(status: StatusCode, text: &str) -> Response<Body> {
    let builder = Response::builder().status(status).header(CONTENT_TYPE, "text/plain; charset=utf-8");
    with_body(builder, Body::bytes(text.to_owned()))
}

/// The answer to `/v2/`: this is a registry.
pub(super) fn base() -> Response<Body> {
    let builder = Response::builder().header(API_VERSION, "registry/2.0").header(CONTENT_TYPE, "application/json");
    with_body(builder, Body::bytes("{}"))
}

pub(super) fn json(media_type: &str, bytes: Vec<u8>) -> Response<Body> {
    with_body(Response::builder().header(CONTENT_TYPE, media_type), Body::bytes(bytes))
}

pub(super) fn manifest(digest: &Digest, media_type: &str, body: Body) -> Response<Body> {
    with_body(Response::builder().header(CONTENT_TYPE, media_type).header(DIGEST, digest.as_str()), body)
}

/// A blob of `total` bytes, or the part of it that `range` says.
pub(super) fn blob(digest: &Digest, body: Body, range: Option<(u64, u64)>) -> Response<Body> {
    let builder = Response::builder()
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(DIGEST, digest.as_str())
        .header(ACCEPT_RANGES, "bytes");
    match range {
        None => with_body(builder, body),
        Some((start, total)) => {
            let range = ContentRange::Part { start, end_exclusive: start + body.len(), total: Some(total) };
            with_body(builder.status(StatusCode::PARTIAL_CONTENT).header(CONTENT_RANGE, range.to_string()), body)
        }
    }
}

/// The head of a blob's response, for HEAD.
pub(super) fn blob_head(digest: &Digest, length: u64) -> Response<Body> {
    let mut response = blob(digest, Body::empty(), None);
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

pub(super) fn unsatisfiable(length: u64) -> Response<Body> {
    let message = format!("the range lies outside of the blob, which has {length} bytes");
    let mut response = error(&OciError::new(StatusCode::RANGE_NOT_SATISFIABLE, ErrorCode::RangeInvalid, message));
    let range = ContentRange::Unsatisfied { total: length }.to_string();
    if let Ok(value) = HeaderValue::from_str(&range) {
        response.headers_mut().insert(CONTENT_RANGE, value);
    }
    response
}

/// Says that a blob is still being received, how much of it is there, into which file it goes, and which nodes it comes through.
pub(super) fn mark_receiving(response: &mut Response<Body>, receiving: &Receiving, chain: &Chain) {
    let position = receiving.growing.progress().position;
    let marks = [
        (RECEIVING_HEADER, format!("{position}/{}", receiving.total)),
        (CHAIN_HEADER, chain.to_string()),
        (INGEST_HEADER, format!("{:016x}", receiving.ingest)),
    ];
    for (name, value) in marks {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(&value)) {
            response.headers_mut().insert(name, value);
        }
    }
}

/// Tells a peer how busy this node is, in percent.
pub(super) fn tell_load(response: &mut Response<Body>, percent: u8) {
    response.headers_mut().insert(LOAD, u16::from(percent).into());
}

/// The same head without the body, keeping the length that the body would have had.
pub(super) fn bodiless(response: Response<Body>) -> Response<Body> {
    response.map(|_| Body::empty())
}

pub(super) fn without_body_for_head(request: &Parts, response: Response<Body>) -> Response<Body> {
    if request.method == Method::HEAD { bodiless(response) } else { response }
}

fn with_body(builder: Builder, body: Body) -> Response<Body> {
    let length = body.len();
    match builder.header(CONTENT_LENGTH, length).body(body) {
        Ok(response) => response,
        // Only a header value of ours can fail, and the ones that are not constant were parsed before.
        Err(_) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
    }
}
