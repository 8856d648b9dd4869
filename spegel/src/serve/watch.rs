//! The bounds on a connection's waits.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::Limits;
use crate::zerocopy::Activity;

/// Bytes that a client has to take for each second in which it kept us waiting, over the write stall's bound. Slower ones do not
/// wait for content, they hold a connection: a layer of 64 MiB would take five hours.
const WRITE_FLOOR: u64 = 4 << 10;

/// How often the socket of a client that seems to take nothing is tried until it is given up. Whoever we relay from has the same patience with us:
/// what a slow client takes has to be told there sooner.
const TRIES: u32 = 3;

/// What a connection waits for.
#[derive(Clone, Copy, Debug)]
enum Phase {
    /// The rest of a request's head.
    Head(Instant),
    /// The next request.
    Idle(Instant),
    /// An answer, from the handler or on its way.
    Busy,
}

/// Why a connection was given up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Expired {
    Head,
    Idle,
    WriteStall,
}

/// What to do about a connection that is waiting.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    /// Let it wait; the task is woken when a bound is reached.
    Wait,
    /// See whether the client takes a byte after all.
    TryWrite,
    /// End it.
    End(Expired),
}

/// What the handler had to do with a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Handled {
    /// Requests given to it so far.
    pub(super) requests: u64,
    /// It has not answered the last one yet.
    pub(super) now: bool,
}

/// Watches one connection.
pub(super) struct Watch {
    limits: Limits,
    phase: Phase,
    requests: u64,
    /// The wait in which the client's socket was tried, and how often.
    tried: Option<(Instant, u32)>,
    pace: Pace,
    timer: Option<Pin<Box<Sleep>>>,
    /// The timer will wake the task.
    armed: bool,
}

// === impl Watch ===

impl Watch {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            phase: Phase::Head(Instant::now()),
            requests: 0,
            tried: None,
            pace: Pace::default(),
            timer: None,
            armed: false,
        }
    }

    /// To be asked whenever the connection was polled and waits, always by the same task: it is the one that the timer wakes.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, activity: Activity, handled: Handled) -> Verdict {
        let mut now = Instant::now();
        // A request may have come and been answered within one poll.
        let answered = std::mem::replace(&mut self.requests, handled.requests) != handled.requests;
        self.phase = match self.phase {
            _ if handled.now || activity.body || activity.blocked_since.is_some() => Phase::Busy,
            Phase::Busy => Phase::Idle(now),
            _ if answered => Phase::Idle(now),
            Phase::Idle(_) if activity.received => Phase::Head(now),
            same => same,
        };
        if self.pace.is_crawling(now, activity, self.limits.write_stall) {
            return Verdict::End(Expired::WriteStall);
        }
        loop {
            let (deadline, expired) = match (self.phase, activity.blocked_since) {
                (Phase::Head(since), _) => (since + self.limits.header_read, Expired::Head),
                (Phase::Idle(since), _) => (since + self.limits.idle, Expired::Idle),
                (Phase::Busy, Some(since)) => {
                    let tries = self.tries(since);
                    (since + self.limits.write_stall * (tries + 1).min(TRIES) / TRIES, Expired::WriteStall)
                }
                (Phase::Busy, None) => return Verdict::Wait,
            };
            if now >= deadline {
                if let (Expired::WriteStall, Some(since)) = (expired, activity.blocked_since) {
                    let tries = self.tries(since);
                    if tries < TRIES {
                        self.tried = Some((since, tries + 1));
                        return Verdict::TryWrite;
                    }
                }
                return Verdict::End(expired);
            }
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
            // A timer that is due earlier costs one wake-up; moving it with every request would cost more.
            if timer.deadline() > deadline || now >= timer.deadline() {
                timer.as_mut().reset(deadline);
                self.armed = false;
            }
            if self.armed {
                return Verdict::Wait;
            }
            match timer.as_mut().poll(cx) {
                Poll::Pending => {
                    self.armed = true;
                    return Verdict::Wait;
                }
                // Due while this was looked at.
                Poll::Ready(()) => now = Instant::now(),
            }
        }
    }
}

impl Watch {
    /// How often the client's socket was tried in the wait that began then.
    fn tries(&self, since: Instant) -> u32 {
        self.tried.filter(|(of, _)| *of == since).map_or(0, |(_, tries)| tries)
    }
}

/// How fast a client takes bytes while it keeps us waiting.
#[derive(Debug, Default)]
struct Pace {
    /// Since when it had been waited for when last looked at.
    blocked_since: Option<Instant>,
    /// The sum of the waits that ended, since the count began.
    waited: Duration,
    /// Bytes taken since then.
    taken: u64,
    /// All that the connection had sent when last looked at.
    sent: u64,
}

// === impl Pace ===

impl Pace {
    /// Whether the client took less than the floor allows, in waits that add up to `window`.
    fn is_crawling(&mut self, now: Instant, activity: Activity, window: Duration) -> bool {
        let before = std::mem::replace(&mut self.blocked_since, activity.blocked_since);
        // A connection that changes between its two kinds counts from zero.
        self.taken += activity.sent.checked_sub(self.sent).unwrap_or(activity.sent);
        self.sent = activity.sent;
        let Some(since) = before.filter(|_| before != activity.blocked_since) else { return false };
        self.waited += activity.blocked_since.unwrap_or(now).saturating_duration_since(since);
        if self.waited < window {
            return false;
        }
        let least = WRITE_FLOOR.saturating_mul(self.waited.as_secs());
        let is_crawling = self.taken < least;
        (self.waited, self.taken) = (Duration::ZERO, 0);
        is_crawling
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activity(received: bool, blocked_since: Option<Instant>, body: bool) -> Activity {
        Activity { received, blocked_since, body, sent: 0 }
    }

    const DONE: Handled = Handled { requests: 1, now: false };

    async fn ask(watch: &mut Watch, activity: Activity, handled: Handled) -> Verdict {
        std::future::poll_fn(|cx| Poll::Ready(watch.poll(cx, activity, handled))).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_from_the_start_on() {
        let mut watch = Watch::new(Limits::default());
        let quiet = activity(false, None, false);
        assert_eq!(ask(&mut watch, quiet, Handled::default()).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(9)).await;
        // A trickle of header bytes gains no time.
        assert_eq!(ask(&mut watch, activity(true, None, false), Handled::default()).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(ask(&mut watch, quiet, Handled::default()).await, Verdict::End(Expired::Head));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_is_counted_from_the_last_answer() {
        let mut watch = Watch::new(Limits::default());
        let quiet = activity(false, None, false);
        assert_eq!(ask(&mut watch, quiet, Handled { requests: 1, now: true }).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert_eq!(ask(&mut watch, activity(false, None, true), DONE).await, Verdict::Wait);
        assert_eq!(ask(&mut watch, quiet, DONE).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(119)).await;
        assert_eq!(ask(&mut watch, quiet, DONE).await, Verdict::Wait);
        // The next request's first byte starts the head's time.
        assert_eq!(ask(&mut watch, activity(true, None, false), DONE).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(ask(&mut watch, quiet, DONE).await, Verdict::End(Expired::Head));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_answered_at_once_makes_a_connection_idle_too() {
        let mut watch = Watch::new(Limits::default());
        assert_eq!(ask(&mut watch, activity(true, None, false), DONE).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(119)).await;
        assert_eq!(ask(&mut watch, activity(false, None, false), DONE).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(ask(&mut watch, activity(false, None, false), DONE).await, Verdict::End(Expired::Idle));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_client_is_tried_until_its_time_is_over() {
        let mut watch = Watch::new(Limits::default());
        let stalled = activity(false, Some(Instant::now()), true);
        for _ in 0..3 {
            assert_eq!(ask(&mut watch, stalled, Handled::default()).await, Verdict::Wait);
            tokio::time::advance(Duration::from_secs(10)).await;
            assert_eq!(ask(&mut watch, stalled, Handled::default()).await, Verdict::TryWrite);
        }
        assert_eq!(ask(&mut watch, stalled, Handled::default()).await, Verdict::End(Expired::WriteStall));
    }

    /// Asks as a connection does whose client takes `bytes` every ten seconds, for five minutes.
    async fn trickle(bytes: u64) -> Verdict {
        let mut watch = Watch::new(Limits::default());
        let (mut sent, mut last) = (1 << 20, Verdict::Wait);
        for _ in 0..30 {
            let blocked = Activity { received: false, blocked_since: Some(Instant::now()), body: true, sent };
            last = ask(&mut watch, blocked, Handled { requests: 1, now: false }).await;
            if matches!(last, Verdict::End(_)) {
                break;
            }
            tokio::time::advance(Duration::from_secs(10)).await;
            sent += bytes;
        }
        last
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_crawls_is_given_up() {
        assert_eq!(trickle(1).await, Verdict::End(Expired::WriteStall));
        assert_eq!(trickle((4 << 10) * 9).await, Verdict::End(Expired::WriteStall));
        assert_eq!(trickle((4 << 10) * 10).await, Verdict::Wait);
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_there_is_nothing_to_send_is_not_the_clients() {
        let mut watch = Watch::new(Limits::default());
        let busy = Handled { requests: 1, now: false };
        for sent in 0..100 {
            let waiting = Activity { received: false, blocked_since: None, body: true, sent };
            assert_eq!(ask(&mut watch, waiting, busy).await, Verdict::Wait);
            tokio::time::advance(Duration::from_secs(29)).await;
        }
    }
}
