//! Which connections have answered a ping lately. One that is silent is closed, which nothing else does: a machine that is lost says no word,
//! and a process that is stopped has a kernel that goes on acknowledging what it is sent.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::swarm::ConnectionId;

use super::behaviour::{PING_INTERVAL, PING_TIMEOUT};

/// How long a connection may be silent: one ping that is not answered in time.
pub(super) const SILENCE: Duration = PING_INTERVAL.saturating_add(PING_TIMEOUT);

/// If so long nobody looked, it was this process that stood still, and nothing is concluded from what it did not hear.
const STOOD_STILL: Duration = Duration::from_secs(3);

/// When each was heard of last.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    heard: HashMap<ConnectionId, Instant>,
    looked: Option<Instant>,
}

// === impl Pulse ===

impl Pulse {
    /// The connection has been made, or its peer has answered.
    pub(super) fn heard(&mut self, connection: ConnectionId, now: Instant) {
        self.heard.insert(connection, now);
    }

    /// It has ended, or its peer does not know what a ping is.
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        self.heard.remove(&connection);
    }

    /// Those that are silent; they are named once. To be called some times a second.
    pub(super) fn silent(&mut self, now: Instant) -> Vec<ConnectionId> {
        let stood = self.looked.replace(now).is_some_and(|before| now.duration_since(before) >= STOOD_STILL);
        if stood {
            self.heard.values_mut().for_each(|heard| *heard = now);
        }
        let silent = |_: &ConnectionId, heard: &mut Instant| now.duration_since(*heard) > SILENCE;
        self.heard.extract_if(silent).map(|(connection, _)| connection).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_for_long_is_named_once_and_nobody_if_we_stood_still() {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let (one, two) = (ConnectionId::new_unchecked(1), ConnectionId::new_unchecked(2));
        let mut pulse = Pulse::default();
        pulse.heard(one, start);
        pulse.heard(two, start);
        let mut silent = Vec::new();
        for tick in 1..=40 {
            if tick == 20 {
                pulse.heard(two, at(10_000));
            }
            silent.extend(pulse.silent(at(tick * 500)).into_iter().map(|connection| (connection, tick * 500)));
        }
        assert_eq!(silent, [(one, 15_500)]);
        assert_eq!(pulse.silent(at(60_000)), [], "we stood still");
        pulse.forget(two);
        let later: Vec<_> = (1..100).flat_map(|tick| pulse.silent(at(60_000 + tick * 500))).collect();
        assert_eq!(later, [], "it has ended");
    }
}
