//! Ends the process when a data runtime makes no turn any more: a wedged mirror would hang pulls without bound, an ended one is
//! started anew, and meanwhile containerd goes upstream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// Looks within a runtime's time. More of them tell a late one more exactly; each wakes every data runtime twice.
const LOOKS: u32 = 5;

/// How long the message may take to be written, by a logger that the wedged thread may hold.
const WRITING: Duration = Duration::from_millis(200);
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One runtime's sign of life.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    turns: AtomicU64,
    ended: AtomicBool,
}

/// Watches until dropped.
#[derive(Debug)]
pub(super) struct Watchdog {
    _stop: Sender<()>,
}

// === impl Pulse ===

impl Pulse {
    /// Beats for as long as it is polled by the runtime, often enough for a watchdog with this bound.
    pub(super) async fn beat(&self, bound: Duration) {
        loop {
            self.turns.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(bound / (2 * LOOKS)).await;
        }
    }

    /// The runtime has ended, as it should.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// How long a runtime has been still, in looks. Looks are counted instead of a clock read, so that a process that was stopped, or
/// a machine that slept, does not look like a wedged runtime: neither looks nor turns happened then.
#[derive(Debug, Default)]
struct Stillness {
    turns: u64,
    looks: u32,
}

impl Stillness {
    /// Whether the runtime has made no turn for the whole of the bound.
    fn is_over(&mut self, pulse: &Pulse) -> bool {
        let turns = pulse.turns.load(Ordering::Relaxed);
        if turns != self.turns || pulse.ended.load(Ordering::Relaxed) {
            *self = Self { turns, looks: 0 };
            return false;
        }
        self.looks += 1;
        // The first look without a turn may have come just after one.
        self.looks > LOOKS
    }
}

// === impl Watchdog ===

impl Watchdog {
    /// Watches `pulses`, one a data runtime in their order. The clock is monotonic: the kernel's for a thread's sleep.
    ///
    /// # Errors
    /// No thread can be had.
    pub(super) fn start(bound: Duration, pulses: Vec<Arc<Pulse>>) -> std::io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        thread::Builder::new().name("watchdog".into()).spawn(move || {
            let mut still: Vec<Stillness> = pulses.iter().map(|_| Stillness::default()).collect();
            while stopped.recv_timeout(bound / LOOKS) == Err(RecvTimeoutError::Timeout) {
                for (index, (still, pulse)) in still.iter_mut().zip(&pulses).enumerate() {
                    if still.is_over(pulse) {
                        end_process(index, bound);
                    }
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

/// Says what is wrong, for no longer than a second, and aborts, which leaves a core dump where those are kept.
fn end_process(index: usize, bound: Duration) -> ! {
    let speaking = thread::Builder::new().name("last-words".into()).spawn(move || {
        let place = place_of(&format!("data-{index}"));
        tracing::error!(runtime = index, ?bound, place, "a data runtime made no turn for too long: ending the process");
    });
    if let Ok(speaking) = speaking {
        let deadline = std::time::Instant::now() + LAST_WORDS;
        while !speaking.is_finished() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        // It is another thread that writes it.
        thread::sleep(WRITING);
    }
    std::process::abort()
}

/// Where in the kernel the thread of that name is, as far as the kernel tells.
fn place_of(name: &str) -> String {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let found = threads.map(|thread| thread.path()).find(|path| read(path.join("comm")) == name);
    found.map_or_else(
        || "unknown".to_owned(),
        |path| {
            let (at, state) = (read(path.join("wchan")), read(path.join("stat")));
            let state = state.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
            format!("state {state}, waiting in {at}")
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bound_without_any_turn_is_too_long() {
        let (pulse, mut still) = (Pulse::default(), Stillness::default());
        for round in 0..3 {
            pulse.turns.fetch_add(1, Ordering::Relaxed);
            for look in 0..=LOOKS {
                assert!(!still.is_over(&pulse), "round {round}, look {look}");
            }
        }
        assert!(still.is_over(&pulse));
    }

    #[test]
    fn a_runtime_that_ended_is_not_still() {
        let (pulse, mut still) = (Pulse::default(), Stillness::default());
        pulse.end();
        assert!((0..=2 * LOOKS).all(|_| !still.is_over(&pulse)));
    }

    #[test]
    fn a_thread_is_found_by_its_name() {
        let (tell, told) = channel::<()>();
        let waiting = thread::Builder::new().name("a-waiter".into()).spawn(move || told.recv());
        let found = |place: &str| place.starts_with("state ");
        while !found(&place_of("a-waiter")) {
            thread::yield_now();
        }
        assert_eq!(place_of("nobody"), "unknown");
        drop((tell, waiting));
    }
}
