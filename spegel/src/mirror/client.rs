//! A light HTTP/1.1 client for peers: one request, the response's head, and then the bare socket, so that the body can be
//! relayed without passing through user space. Framing follows [RFC 9112](https://www.rfc-editor.org/rfc/rfc9112).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::pool::Pool;
use crate::ebpf::Probe;

use super::{CHAIN_HEADER, INGEST_HEADER, LOAD_HEADER, RECEIVING_HEADER};

/// The longest response head that is accepted of a peer, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// The most header lines that are accepted of a peer.
const MAX_HEADERS: usize = 64;

/// How many addresses of one peer are tried, and how long after each other: all of them within the bound of one
/// ([RFC 8305](https://www.rfc-editor.org/rfc/rfc8305)).
pub(super) const MAX_TRIED: usize = 4;
const STAGGER: Duration = Duration::from_millis(100);

/// The response header of a busy node's 503 that names others: addresses of registries, with commas between.
pub const HOLDERS_HEADER: &str = "X-Spegel-Holders";
/// How many others a busy node names, and how many are believed.
pub const MAX_HOLDERS: usize = 3;

/// Why a peer gave no usable answer. None of these is the client's fault; another peer may do better.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// It took longer than its bound.
    #[error("no {what} within {bound:?}")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        bound: Duration,
    },
    /// The connection broke before the head was complete.
    #[error("connection lost: {0}")]
    Lost(io::Error),
    /// Not HTTP, or HTTP that cannot be relayed.
    #[error("malformed answer: {0}")]
    Malformed(&'static str),
    /// It does not fit what is known of the content, which may be what is wrong. No fault of the peer's that is certain.
    #[error("unfit answer: {0}")]
    Unfit(&'static str),
    /// A status other than the ones asked for.
    #[error("answered {0}")]
    Status(u16),
    /// It gets the blob by way of the node that wants it, or of one that gets it from that.
    #[error("its bytes come through the node that asks")]
    Circle,
    /// What it receives of the blob was found to be wrong before.
    #[error("is receiving what was wrong before")]
    Spoiled,
    /// It was receiving the blob, and ended in an orderly way before its end: its own pull was given up.
    #[error("gave up receiving it")]
    GaveUp,
    /// There is no memory here to verify its body in. No fault of the peer's.
    #[error("no memory for its body within {0:?}")]
    NoMemory(Duration),
    /// It has enough to do. These have it too, it says.
    #[error("is busy, and names {} others", .0.len())]
    Busy(Vec<SocketAddr>),
    /// The bytes are not those of the digest.
    #[error("sent bytes that are not those of the digest")]
    WrongBytes,
    /// Nor are these, which it passed on while it received them, into this file if it said which.
    #[error("passed on bytes that are not those of the digest")]
    PassedOnWrong(Option<u64>),
}

/// What to ask of a peer.
#[derive(Clone, Debug)]
pub(super) struct PeerRequest {
    /// `GET` or `HEAD`.
    pub(super) method: &'static str,
    /// Path and query, ready for the request line.
    pub(super) target: String,
    /// The `Range` header's value.
    pub(super) range: Option<String>,
    /// Further header lines, each ended by CRLF.
    pub(super) extra: String,
}

/// The head of a peer's response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerHead {
    pub(super) status: u16,
    pub(super) content_length: u64,
    pub(super) content_type: Option<String>,
    pub(super) content_range: Option<String>,
    pub(super) digest: Option<String>,
    /// How many bytes the peer has, if it is still receiving what it sends.
    pub(super) receiving: Option<u64>,
    pub(super) chain: Option<String>,
    /// Which file it receives it into.
    pub(super) ingest: Option<u64>,
    pub(super) holders: Vec<SocketAddr>,
    /// How busy it says that it is, in percent.
    pub(super) load: Option<u8>,
    pub(super) keep_alive: bool,
}

/// A response whose body is still in the socket.
#[derive(Debug)]
pub(super) struct PeerResponse {
    pub(super) head: PeerHead,
    pub(super) stream: TcpStream,
    /// Bytes of the body that came along with the head.
    pub(super) leftover: Bytes,
    /// Asks the socket what it has moved, where that is wanted.
    pub(super) probe: Option<Probe>,
}

/// How long to wait for a peer.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Until the connection stands.
    pub connect: Duration,
    /// From the request until the whole response head is there.
    pub head: Duration,
}

impl Timeouts {
    /// The same, but neither longer than `bound`.
    pub(super) fn at_most(self, bound: Duration) -> Self {
        Self { connect: self.connect.min(bound), head: self.head.min(bound) }
    }
}

/// Sends `request` to the first of a peer's `addresses` that can be reached, on an idle connection where there is one. `met` is the one that
/// was reached, whatever came of it. Takes as long as `timeouts` allow for one connection and one head, not more.
pub(super) async fn request(
    pool: &Pool,
    addresses: &[SocketAddr],
    request: &PeerRequest,
    timeouts: Timeouts,
    met: &mut Option<SocketAddr>,
) -> Result<(SocketAddr, PeerResponse), PeerError> {
    let deadline = Instant::now() + timeouts.connect + timeouts.head;
    let tried = &addresses[..addresses.len().min(MAX_TRIED)];
    if let Some((address, (stream, probe))) = tried.iter().find_map(|address| Some((*address, pool.take(*address)?))) {
        *met = Some(address);
        match exchange(stream, probe, address, request, timeouts.head).await {
            Ok(response) => return Ok((address, response)),
            // The peer may have closed an idle connection just now, and then all of them: that says nothing about it.
            Err(PeerError::Lost(_)) => pool.forget(address),
            Err(error) => return Err(error),
        }
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let (address, stream) = connect_any(pool, tried, timeouts.connect.min(left)).await?;
    *met = Some(address);
    let left = deadline.saturating_duration_since(Instant::now());
    let response = exchange(stream, pool.probe(address), address, request, timeouts.head.min(left)).await?;
    Ok((address, response))
}

/// Connects to whichever address answers first, each tried a moment after the one before, or at once when that has failed.
async fn connect_any(
    pool: &Pool,
    addresses: &[SocketAddr],
    bound: Duration,
) -> Result<(SocketAddr, TcpStream), PeerError> {
    let deadline = Instant::now() + bound;
    let (mut rest, mut next_at) = (addresses.iter(), Instant::now());
    let mut connecting = FuturesUnordered::new();
    let mut last = PeerError::Malformed("the peer has no address");
    loop {
        if Instant::now() >= next_at {
            match rest.next() {
                Some(&address) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    connecting.push(async move {
                        let connected = connect(address, left).await;
                        connected.as_ref().inspect_err(|_| pool.failed(address)).ok();
                        (address, connected)
                    });
                }
                None if connecting.is_empty() => return Err(last),
                None => {}
            }
            next_at = Instant::now() + STAGGER;
        }
        tokio::select! {
            Some((address, result)) = connecting.next() => match result {
                Ok(stream) => return Ok((address, stream)),
                Err(error) => (last, next_at) = (error, Instant::now()),
            },
            () = tokio::time::sleep_until(next_at) => {}
        }
    }
}

async fn connect(address: SocketAddr, bound: Duration) -> Result<TcpStream, PeerError> {
    let stream = tokio::time::timeout(bound, TcpStream::connect(address))
        .await
        .map_err(|_| PeerError::Late { what: "connection", bound })?
        .map_err(PeerError::Connect)?;
    stream.set_nodelay(true).map_err(PeerError::Connect)?;
    Ok(stream)
}

async fn exchange(
    mut stream: TcpStream,
    probe: Option<Probe>,
    address: SocketAddr,
    request: &PeerRequest,
    bound: Duration,
) -> Result<PeerResponse, PeerError> {
    let exchange = async {
        stream.write_all(&encode(address, request)).await.map_err(PeerError::Lost)?;
        read_head(&mut stream, request.method == "HEAD").await
    };
    let (head, leftover) =
        tokio::time::timeout(bound, exchange).await.map_err(|_| PeerError::Late { what: "response head", bound })??;
    Ok(PeerResponse { head, stream, leftover, probe })
}

fn encode(address: SocketAddr, request: &PeerRequest) -> Vec<u8> {
    let mut text = format!("{} {} HTTP/1.1\r\nHost: {address}\r\n{}", request.method, request.target, request.extra);
    if let Some(range) = &request.range {
        text.push_str("Range: ");
        text.push_str(range);
        text.push_str("\r\n");
    }
    text.push_str("\r\n");
    text.into_bytes()
}

async fn read_head(stream: &mut TcpStream, bodiless: bool) -> Result<(PeerHead, Bytes), PeerError> {
    let mut buffer = BytesMut::with_capacity(2048);
    loop {
        let read = stream.read_buf(&mut buffer).await.map_err(PeerError::Lost)?;
        if read == 0 {
            return Err(PeerError::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
        if let Some((head, length)) = parse_head(&buffer, bodiless)? {
            let leftover = buffer.split_off(length).freeze();
            if leftover.len() as u64 > if bodiless { 0 } else { head.content_length } {
                return Err(PeerError::Malformed("more bytes than it announced"));
            }
            return Ok((head, leftover));
        }
        if buffer.len() >= MAX_HEAD {
            return Err(PeerError::Malformed("its head is too long"));
        }
    }
}

/// Parses a response head; `None` while it is incomplete. Whatever would make the body's end uncertain is refused.
pub(super) fn parse_head(bytes: &[u8], bodiless: bool) -> Result<Option<(PeerHead, usize)>, PeerError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(PeerError::Malformed("not an HTTP response")),
    };
    let mut head = PeerHead { status: response.code.unwrap_or_default(), ..PeerHead::default() };
    head.keep_alive = response.version == Some(1);
    let mut content_length = None;
    for header in response.headers.iter() {
        let Ok(value) = std::str::from_utf8(header.value).map(str::trim) else { continue };
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let number = value.parse::<u64>().map_err(|_| PeerError::Malformed("its length is not a number"))?;
            if content_length.replace(number).is_some_and(|before| before != number) {
                return Err(PeerError::Malformed("it has two lengths"));
            }
        } else if is("transfer-encoding") || is("content-encoding") {
            return Err(PeerError::Malformed("its body is encoded"));
        } else if is("content-type") {
            head.content_type = Some(value.to_owned());
        } else if is("content-range") {
            head.content_range = Some(value.to_owned());
        } else if is("docker-content-digest") {
            head.digest = Some(value.to_owned());
        } else if is(RECEIVING_HEADER) {
            // What cannot be read is at least no growth.
            head.receiving = Some(value.split('/').next().and_then(|position| position.parse().ok()).unwrap_or(0));
        } else if is(CHAIN_HEADER) {
            head.chain = Some(value.to_owned());
        } else if is(INGEST_HEADER) {
            head.ingest = u64::from_str_radix(value, 16).ok();
        } else if is(LOAD_HEADER) {
            head.load = value.parse().ok().filter(|percent| *percent <= 100);
        } else if is(HOLDERS_HEADER) {
            head.holders = parse_holders(value);
        } else if is("connection") && value.split(',').any(|token| token.trim().eq_ignore_ascii_case("close")) {
            head.keep_alive = false;
        }
    }
    match content_length {
        Some(number) => head.content_length = number,
        None if bodiless || !matches!(head.status, 200 | 206) => {}
        None => return Err(PeerError::Malformed("it tells no length")),
    }
    Ok(Some((head, length)))
}

/// The addresses in a [`HOLDERS_HEADER`], as many as are believed. What is no address is passed over.
pub(super) fn parse_holders(value: &str) -> Vec<SocketAddr> {
    value.split(',').filter_map(|address| address.trim().parse().ok()).take(MAX_HOLDERS).collect()
}

/// Whether an address that `by` names may be asked: a peer must not be able to send us to any port of any host of the network. On loopback,
/// where nodes differ by their ports alone, it may.
pub(super) fn is_plausible(address: SocketAddr, by: SocketAddr) -> bool {
    let ip = address.ip();
    address != by
        && (address.port() == by.port() || by.ip().is_loopback())
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && ip.is_loopback() == by.ip().is_loopback()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_head_is_read_to_its_end() {
        let text = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\ncontent-range: bytes 1-5/10\r\nDocker-Content-Digest: sha256:x\r\n\r\nhello";
        let (head, length) = parse_head(text, false).unwrap().unwrap();
        assert_eq!(&text[length..], b"hello");
        assert_eq!((head.status, head.content_length, head.keep_alive), (206, 5, true));
        assert_eq!(head.content_range.as_deref(), Some("bytes 1-5/10"));
        assert_eq!(parse_head(&text[..40], false).unwrap(), None);
    }

    #[test]
    fn what_makes_the_end_of_a_body_uncertain_is_refused() {
        for head in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n",
            "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        ] {
            assert!(matches!(parse_head(head.as_bytes(), false), Err(PeerError::Malformed(_))), "{head}");
        }
    }

    #[test]
    fn holders_are_addresses_of_peers_and_few() {
        let text = "HTTP/1.1 503 x\r\nX-Spegel-Holders: 10.0.0.1:5000, nonsense, [fd00::1]:5000,10.0.0.2:5000,10.0.0.3:5000\r\n\r\n";
        let (head, _) = parse_head(text.as_bytes(), false).unwrap().unwrap();
        let told: Vec<String> = head.holders.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["10.0.0.1:5000", "[fd00::1]:5000", "10.0.0.2:5000"]);
        let by = "10.0.0.9:5000".parse().unwrap();
        assert!(is_plausible(head.holders[0], by) && is_plausible(head.holders[1], by));
        for other in ["10.0.0.9:5000", "10.0.0.1:22", "127.0.0.1:5000", "0.0.0.0:5000", "224.0.0.1:5000"] {
            assert!(!is_plausible(other.parse().unwrap(), by), "{other}");
        }
    }

    #[test]
    fn a_load_is_a_percentage() {
        let load = |text: &str| {
            let head = format!("HTTP/1.1 503 x\r\nX-Spegel-Load: {text}\r\n\r\n");
            parse_head(head.as_bytes(), true).unwrap().unwrap().0.load
        };
        assert_eq!((load("0"), load("100")), (Some(0), Some(100)));
        for wrong in ["101", "-1", "300", "half", ""] {
            assert_eq!(load(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_connection_is_kept_only_where_the_peer_keeps_it() {
        let keep = |text: &str| parse_head(text.as_bytes(), true).unwrap().unwrap().0.keep_alive;
        assert!(keep("HTTP/1.1 200 OK\r\n\r\n"));
        assert!(!keep("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"));
        assert!(!keep("HTTP/1.0 200 OK\r\n\r\n"));
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse_head(&bytes, false);
        }

        #[test]
        fn a_cut_head_is_incomplete_never_wrong(cut in 0usize..84) {
            let text = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nContent-Type: application/octet-stream\r\n\r\nx";
            prop_assume!(cut < text.len() - 1);
            prop_assert!(parse_head(&text[..cut], false).unwrap().is_none());
        }
    }
}
