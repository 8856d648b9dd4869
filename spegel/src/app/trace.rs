//! Where log lines go.
//!
//! A thread of its own writes them: who reads standard error may be stuck, and a data runtime must not be with it. What it cannot keep up with
//! is dropped and counted.

use std::io::IsTerminal as _;
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::ConstCounter;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, reload};

use crate::cli::{Log, LogFormat, LogLevel};
use crate::metrics::{Described, Figures};
use crate::router::KadErrors;
use crate::web::LogControl;

static DROPPED_LINES: Described = Described::counter(
    "spegel_log_dropped_lines",
    "Log lines that were dropped, since whoever reads standard error did not keep up",
);

/// Lines that wait to be written; some MiB at the most.
const WAITING: usize = 8192;

/// How long lines may take to be written at the end.
const LAST_LINES: Duration = Duration::from_millis(500);

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// What decides which lines are written, and the level that it is made from.
static FILTER: OnceLock<(reload::Handle<EnvFilter, Registry>, Mutex<LogLevel>)> = OnceLock::new();

/// What kad tells its log only.
pub(super) static KAD_ERRORS: KadErrors = KadErrors::new();

/// Sends log lines to standard error from now on. Those that wait are written when what is returned is dropped.
pub fn trace(log: &Log) -> WorkerGuard {
    let (filter, handle) = reload::Layer::new(filter(log.level));
    let _ = FILTER.set((handle, Mutex::new(log.level)));
    let writer = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(WAITING).thread_name("log");
    let (writer, guard) = writer.finish(std::io::stderr());
    // Only the first call's lines go anywhere.
    let _ = DROPPED.set(writer.error_counter());
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
    let terminal = std::io::stderr().is_terminal();
    let lines = match log.format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json }) {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
        LogFormat::Text => lines.with_ansi(terminal).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(KAD_ERRORS.layer()).init();
    guard
}

/// Which lines are written at a level.
fn filter(level: LogLevel) -> EnvFilter {
    let level = match level {
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    // What libraries have to say is an operator's business only while something is being looked into.
    let libraries = if level == LevelFilter::DEBUG { LevelFilter::INFO } else { LevelFilter::ERROR };
    let filter = EnvFilter::default().add_directive(libraries.into());
    let own = format!("spegel={level}").parse();
    own.into_iter().fold(filter, EnvFilter::add_directive)
}

/// The level of this process's log.
#[derive(Debug)]
pub(super) struct OwnLog;

impl LogControl for OwnLog {
    fn level(&self) -> String {
        FILTER.get().map_or_else(String::new, |(_, level)| {
            level.lock().unwrap_or_else(PoisonError::into_inner).name().to_owned()
        })
    }

    fn set(&self, name: &str) -> Result<(), String> {
        let level = LogLevel::of(name).ok_or_else(LogLevel::names)?;
        let Some((handle, present)) = FILTER.get() else {
            return Err("not to be changed before there is a log".to_owned());
        };
        let mut present = present.lock().unwrap_or_else(PoisonError::into_inner);
        handle.reload(filter(level)).map_err(|error| error.to_string())?;
        *present = level;
        Ok(())
    }
}

/// Writes the lines that wait, for no longer than half a second: standard error may be stuck.
pub fn write_out(guard: WorkerGuard) {
    let (done, is_done) = mpsc::channel::<()>();
    // Its end ends the wait, and so does a thread that cannot be had.
    let writing = thread::Builder::new().name("last-lines".into()).spawn(move || {
        drop(guard);
        drop(done);
    });
    if writing.is_ok() {
        let _ = is_done.recv_timeout(LAST_LINES);
    }
}

/// Tells how many lines were dropped.
#[derive(Debug)]
struct DroppedLines;

/// Adds how many lines were dropped to what is scraped.
pub(super) fn register(figures: &mut Figures) {
    figures.collect([&DROPPED_LINES], DroppedLines);
}

impl Collector for DroppedLines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let dropped = DROPPED.get().map_or(0, ErrorCounter::dropped_lines);
        DROPPED_LINES.encode(&mut encoder, &ConstCounter::new(dropped as u64))
    }
}
