//! Requests that are answered at once, from memory, without a task, a future or a map of headers: those for small content that
//! was asked for before. All others are hyper's.

use std::cell::RefCell;
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;

use crate::zerocopy::BodyEnd;

/// Headers of a request that is answered at once; containerd sends six.
const HEADERS: usize = 24;

/// Bytes of `date: Sun, 06 Nov 1994 08:49:37 GMT` with its line end and the empty line.
const DATE: usize = 6 + 29 + 4;

/// The head of a GET or HEAD without a body, as it stands in a connection's buffer.
#[derive(Debug)]
pub struct Head<'a> {
    /// HEAD.
    pub is_head: bool,
    /// The request's target, as sent.
    pub target: &'a str,
    /// Names in any case, and values.
    pub headers: &'a [httparse::Header<'a>],
}

/// An answer with status 200 from memory.
pub struct Quick {
    /// The status line and the headers, each with its line end, without the date and the empty line.
    pub head: Bytes,
    /// The body; none for HEAD.
    pub body: Bytes,
    /// Told how much of the body was sent. Runs on the data runtime and must not block.
    pub end: Box<dyn FnOnce(BodyEnd) + Send>,
}

/// What stands in a buffer.
pub(super) enum Parsed<T> {
    /// So many bytes of a request that was answered.
    Answered(usize, T),
    /// Less than a head, and not too much for one.
    Partial,
    /// Something that is not answered at once.
    Other,
}

/// Looks at a buffer's first request, and has it answered if that can be at once.
pub(super) fn parse<T>(buffer: &[u8], longest: usize, answer: impl FnOnce(&Head<'_>) -> Option<T>) -> Parsed<T> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS];
    let mut request = httparse::Request::new(&mut []);
    let length = match request.parse_with_uninit_headers(buffer, &mut headers) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if buffer.len() < longest => return Parsed::Partial,
        _ => return Parsed::Other,
    };
    let (Some(method), Some(target), Some(1)) = (request.method, request.path, request.version) else {
        return Parsed::Other;
    };
    let is_plain = matches!(method, "GET" | "HEAD") && length <= longest && request.headers.iter().all(is_plain);
    if !is_plain {
        return Parsed::Other;
    }
    match answer(&Head { is_head: method == "HEAD", target, headers: request.headers }) {
        Some(answer) => Parsed::Answered(length, answer),
        None => Parsed::Other,
    }
}

/// Whether a header leaves the connection and the request's body out of the matter.
fn is_plain(header: &httparse::Header<'_>) -> bool {
    let is = |name: &str| header.name.eq_ignore_ascii_case(name);
    match header.name.len() {
        6 => !is("expect"),
        7 => !is("upgrade"),
        10 => !is("connection") || header.value.eq_ignore_ascii_case(b"keep-alive"),
        14 => !is("content-length"),
        17 => !is("transfer-encoding"),
        _ => true,
    }
}

impl fmt::Debug for Quick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quick").field("head", &self.head).field("body", &self.body.len()).finish_non_exhaustive()
    }
}

/// The header line that tells the time, which is written once a second and thread, with the empty line.
pub(super) fn date() -> [u8; DATE] {
    thread_local! {
        static LINE: RefCell<(u64, [u8; DATE])> = const { RefCell::new((0, [0; DATE])) };
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    LINE.with_borrow_mut(|(of, line)| {
        if *of != now {
            (*of, *line) = (now, date_at(now));
        }
        *line
    })
}

fn date_at(seconds: u64) -> [u8; DATE] {
    // Later than the year 9999 the line stands for the beginning of time: no clock is that wrong.
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or_default();
    let text = DateTimePrinter::new().timestamp_to_rfc9110_string(&time).unwrap_or_default();
    let mut line = [b' '; DATE];
    line[..6].copy_from_slice(b"date: ");
    line[6..6 + text.len().min(29)].copy_from_slice(&text.as_bytes()[..text.len().min(29)]);
    line[DATE - 4..].copy_from_slice(b"\r\n\r\n");
    line
}

/// What is left of an answer after its first bytes.
pub(super) fn rest_of(parts: &[IoSlice<'_>], mut sent: usize) -> Bytes {
    let mut rest = Vec::with_capacity(parts.iter().map(|part| part.len()).sum::<usize>().saturating_sub(sent));
    for part in parts {
        let skipped = sent.min(part.len());
        rest.extend_from_slice(&part[skipped..]);
        sent -= skipped;
    }
    rest.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The target and the length of what is answered.
    fn taken(text: &str) -> Option<(String, usize)> {
        match parse(text.as_bytes(), 4096, |head| Some(head.target.to_owned())) {
            Parsed::Answered(length, target) => Some((target, length)),
            Parsed::Partial | Parsed::Other => None,
        }
    }

    #[test]
    fn whole_plain_requests_are_taken() {
        let plain = "GET /a?b=c HTTP/1.1\r\nHost: h\r\nConnection: Keep-Alive\r\n\r\n";
        assert_eq!(taken(plain), Some(("/a?b=c".into(), plain.len())));
        assert_eq!(taken(&format!("{plain}GET /next")), Some(("/a?b=c".into(), plain.len())));
        let head = "HEAD / HTTP/1.1\r\n\r\n";
        assert!(matches!(parse(head.as_bytes(), 100, |head| head.is_head.then_some(())), Parsed::Answered(19, ())));
        assert!(matches!(parse(head.as_bytes(), 100, |_| None::<()>), Parsed::Other));
        assert!(matches!(parse(head.as_bytes(), 18, |_| Some(())), Parsed::Other), "longer than heads may be");
        let cut = "GET / HTTP/1.1\r\nhost: h\r\n";
        assert!(matches!(parse(cut.as_bytes(), 100, |_| Some(())), Parsed::Partial));
        assert!(matches!(parse(cut.as_bytes(), cut.len(), |_| Some(())), Parsed::Other), "too long by its next byte");
    }

    #[test]
    fn all_else_is_left() {
        for other in
            ["", "GET / HTTP/1.1\r\nhost: h\r\n", "GET / HTTP/1.0\r\n\r\n", "POST / HTTP/1.1\r\n\r\n", "\0\r\n\r\n"]
        {
            assert_eq!(taken(other), None, "{other:?}");
        }
        for header in [
            "Content-Length: 0",
            "transfer-encoding: chunked",
            "EXPECT: 100-continue",
            "upgrade: x",
            "Connection: close",
        ] {
            assert_eq!(taken(&format!("GET / HTTP/1.1\r\n{header}\r\n\r\n")), None, "{header}");
        }
        let many: String = (0..=HEADERS).map(|n| format!("x-{n}: y\r\n")).collect();
        assert_eq!(taken(&format!("GET / HTTP/1.1\r\n{many}\r\n")), None);
    }

    #[test]
    fn the_date_is_that_of_the_standard() {
        assert_eq!(date_at(784_111_777), *b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n");
        assert_eq!(date_at(u64::MAX).len(), DATE);
        assert!(date().ends_with(b" GMT\r\n\r\n"));
    }

    #[test]
    fn what_is_left_begins_where_the_kernel_stopped() {
        let parts = [IoSlice::new(b"abc"), IoSlice::new(b""), IoSlice::new(b"def")];
        for (sent, rest) in [(0, "abcdef"), (2, "cdef"), (3, "def"), (4, "ef"), (6, "")] {
            assert_eq!(rest_of(&parts, sent), rest);
        }
    }
}
