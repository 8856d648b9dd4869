//! The flags of the data plane, and what they come to.

use std::time::Duration;

use clap::Args;

use super::args::duration;
use crate::serve::{EngineChoice, Limits, Options};
use crate::zerocopy::Transfer;

/// What a client may cost, and on what its bytes are served.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// What serves: `io-uring`, `tokio`, or `auto` for io-uring where the kernel allows it
    #[arg(long, env, default_value = "auto", value_name = "ENGINE")]
    serve_engine: EngineChoice,
    /// How bytes of files and peers are sent: `zerocopy` within the kernel, or `copy` where a sandbox or file system spoils that
    #[arg(long, env, default_value = "zerocopy", value_name = "WAY")]
    serve_transfer: Transfer,
    /// How long a serving thread may hang before the process ends itself, to be started anew; 0 is never
    #[arg(long, env, default_value = "5s", value_parser = duration_or_never, value_name = "DURATION")]
    watchdog: Never,
    /// Connections open at once; what comes beyond is sent elsewhere
    #[arg(long, env, default_value_t = 4096, value_parser = at_least_one, value_name = "NUMBER")]
    max_connections: usize,
    /// Bytes of a request's line and headers
    #[arg(long, env, default_value_t = 32 << 10, value_parser = at_least_one, value_name = "BYTES")]
    max_header_bytes: usize,
    /// How long a request's head may take to arrive
    #[arg(long, env, default_value = "10s", value_parser = duration, value_name = "DURATION")]
    header_timeout: Duration,
    /// How long a connection is kept without a request
    #[arg(long, env, default_value = "2m", value_parser = duration, value_name = "DURATION")]
    idle_timeout: Duration,
    /// How long a client may take no byte of what is ready for it
    #[arg(long, env, default_value = "30s", value_parser = duration, value_name = "DURATION")]
    write_stall_timeout: Duration,
    /// Open files of the process [default: as many as the administrator allows]
    #[arg(long, env, value_parser = clap::value_parser!(u64).range(64..), value_name = "NUMBER")]
    max_open_files: Option<u64>,
    /// Pipes for bodies that are relayed from peers; relays beyond are copied. A pipe holds up to 1 MiB of the kernel's memory
    #[arg(long, env, default_value_t = 256, value_name = "NUMBER")]
    max_pipes: usize,
}

/// A duration, or never.
#[derive(Clone, Copy, Debug)]
struct Never(Option<Duration>);

/// What the flags of the data plane come to.
#[derive(Clone, Debug)]
pub struct ServeSettings {
    /// How the server works; its metrics are to be filled in.
    pub options: Options,
    /// How many files the process may have open; without it as many as the hard limit allows.
    pub open_files: Option<u64>,
}

impl ServeArgs {
    pub(super) fn settings(self) -> ServeSettings {
        let limits = Limits {
            connections: self.max_connections,
            header_bytes: self.max_header_bytes,
            header_read: self.header_timeout,
            idle: self.idle_timeout,
            write_stall: self.write_stall_timeout,
            ..Limits::default()
        };
        let options = Options {
            limits,
            engine: self.serve_engine,
            transfer: self.serve_transfer,
            watchdog: self.watchdog.0,
            pipes: self.max_pipes,
            ..Options::default()
        };
        ServeSettings { options, open_files: self.max_open_files }
    }
}

fn duration_or_never(text: &str) -> Result<Never, String> {
    if matches!(text, "0" | "0s") {
        return Ok(Never(None));
    }
    match duration(text)? {
        bound if bound < Duration::from_secs(1) => {
            Err("it must be a second at least: a busy machine is not a hung one".to_owned())
        }
        bound => Ok(Never(Some(bound))),
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}
