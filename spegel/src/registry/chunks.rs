//! containerd's parallel fetch, kept to one request a blob.
//!
//! With `concurrent_layer_fetch_buffer` set, containerd asks for a layer in chunks, all from the host that answered the first, and fails the
//! pull if one of them fails and it is not the one that is being read at that moment. A peer that is lost, or a node that stops, would so fail
//! pulls. An answer of 200 to the first request, `bytes=0-`, makes it take the whole body from that one answer instead, which it resumes at any
//! host when it breaks off (seen with 2.2.7, whose fetcher calls it "content range ignored"). A mirror is near: one stream is fast enough.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::promises::Client;
use crate::oci::RangeSpec;

/// How containerd's requests present themselves.
const USER_AGENT: &str = "containerd/";
/// How long it is remembered that a client fetches in chunks.
const LIFETIME: Duration = Duration::from_secs(3600);
/// How many clients are remembered.
const CAPACITY: usize = 4096;

/// The clients that fetch in chunks. The clock is the caller's.
#[derive(Debug, Default)]
pub(super) struct Chunked {
    seen: Mutex<HashMap<Client, Instant>>,
}

impl Chunked {
    /// Whether the range is one of a parallel fetch, to be answered as if it had not been asked for.
    pub(super) fn is_chunk(
        &self,
        client: &Client,
        user_agent: Option<&str>,
        range: Option<RangeSpec>,
        now: Instant,
    ) -> bool {
        let Some(RangeSpec::From { first, last: None }) = range else { return false };
        if !user_agent.is_some_and(|agent| agent.starts_with(USER_AGENT)) {
            return false;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if first > 0 {
            // A containerd that does not fetch in chunks resumes like this, and one that does must not begin with chunks here.
            return seen.get(client).is_some_and(|at| now.duration_since(*at) < LIFETIME);
        }
        if seen.len() >= CAPACITY && !seen.contains_key(client) {
            seen.retain(|_, at| now.duration_since(*at) < LIFETIME);
        }
        if seen.len() < CAPACITY || seen.contains_key(client) {
            seen.insert(client.clone(), now);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const AGENT: Option<&str> = Some("containerd/v2.2.7");

    fn from(first: u64) -> Option<RangeSpec> {
        Some(RangeSpec::From { first, last: None })
    }

    #[test]
    fn only_a_containerd_that_asks_for_all_from_zero_fetches_in_chunks() {
        let (chunked, now, client) = (Chunked::default(), Instant::now(), Client::Node("n".into()));
        let is_chunk = |agent, range, now| chunked.is_chunk(&client, agent, range, now);
        assert!(!is_chunk(AGENT, None, now) && !is_chunk(AGENT, from(100), now), "one that resumes");
        assert!(!is_chunk(Some("curl/8"), from(0), now) && !is_chunk(None, from(0), now));
        assert!(!is_chunk(AGENT, Some(RangeSpec::From { first: 0, last: Some(9) }), now));
        assert!(is_chunk(AGENT, from(0), now));
        assert!(is_chunk(AGENT, from(100), now));
        assert!(!is_chunk(AGENT, from(100), now + LIFETIME));
        assert!(!chunked.is_chunk(&Client::Node("m".into()), AGENT, from(100), now));
    }

    #[test]
    fn memory_is_bounded() {
        let (chunked, now) = (Chunked::default(), Instant::now());
        for n in 0..2 * CAPACITY {
            assert!(chunked.is_chunk(&Client::Node(n.to_string().into()), AGENT, from(0), now));
        }
        assert_eq!(chunked.seen.lock().unwrap().len(), CAPACITY);
    }
}
