//! The bounds on a connection's waits.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep};

use super::Limits;
use crate::zerocopy::Activity;

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
    tried: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    /// The timer will wake the task.
    armed: bool,
}

// === impl Watch ===

impl Watch {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, phase: Phase::Head(Instant::now()), requests: 0, tried: None, timer: None, armed: false }
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
        loop {
            let (deadline, expired) = match (self.phase, activity.blocked_since) {
                (Phase::Head(since), _) => (since + self.limits.header_read, Expired::Head),
                (Phase::Idle(since), _) => (since + self.limits.idle, Expired::Idle),
                (Phase::Busy, Some(since)) => (since + self.limits.write_stall, Expired::WriteStall),
                (Phase::Busy, None) => return Verdict::Wait,
            };
            if now >= deadline {
                if expired == Expired::WriteStall && self.tried != activity.blocked_since {
                    self.tried = activity.blocked_since;
                    return Verdict::TryWrite;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn activity(received: bool, blocked_since: Option<Instant>, body: bool) -> Activity {
        Activity { received, blocked_since, body }
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
    async fn a_stalled_client_is_tried_once_more() {
        let mut watch = Watch::new(Limits::default());
        let stalled = activity(false, Some(Instant::now()), true);
        assert_eq!(ask(&mut watch, stalled, Handled::default()).await, Verdict::Wait);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(ask(&mut watch, stalled, Handled::default()).await, Verdict::TryWrite);
        assert_eq!(ask(&mut watch, stalled, Handled::default()).await, Verdict::End(Expired::WriteStall));
    }
}
