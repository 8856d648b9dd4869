//! Where log lines go.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::cli::{Log, LogFormat, LogLevel};

/// Sends log lines to standard error from now on.
pub fn trace(log: &Log) {
    let level = match log.level {
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    // What libraries have to say is an operator's business only while something is being looked into.
    let libraries = if level == LevelFilter::DEBUG { LevelFilter::INFO } else { LevelFilter::ERROR };
    let filter = EnvFilter::default().add_directive(libraries.into());
    let own = format!("spegel={level}").parse();
    let filter = own.into_iter().fold(filter, EnvFilter::add_directive);
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let terminal = std::io::stderr().is_terminal();
    let format = log.format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    match format {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init(),
        LogFormat::Text => lines.with_ansi(terminal).init(),
    }
}
