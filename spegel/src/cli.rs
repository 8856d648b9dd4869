//! Flags and environment into validated settings. The only reader of the environment.

mod args;
mod cleanup;
mod settings;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

pub use args::{LogFormat, LogLevel, VersionFormat};
pub use cleanup::{CleanupSettings, CleanupWaitSettings, ClusterSettings};
pub use settings::{Bootstrap, Content, RegistrySettings};

/// What the command line and the environment ask for.
#[derive(Debug)]
pub struct Invocation {
    /// How to log.
    pub log: Log,
    /// What to do.
    pub command: Command,
}

/// How to log.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    /// The least level that is logged.
    pub level: LogLevel,
    /// JSON or text; if not told, text on a terminal.
    pub format: Option<LogFormat>,
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Say which version this is.
    Version(VersionFormat),
    /// Write containerd's mirror configuration.
    Configuration(crate::hosts::Configuration),
    /// Serve.
    Registry(Box<RegistrySettings>),
    /// Take back what was written on this node.
    Cleanup(CleanupSettings),
    /// Wait until all nodes are clean.
    CleanupWait(Box<CleanupWaitSettings>),
    /// Print this script.
    Completions(Vec<u8>),
}

/// Reads the process's arguments and environment.
///
/// # Errors
/// The exit code, after help, or what is wrong, was printed.
pub fn parse() -> Result<Invocation, ExitCode> {
    parse_from(std::env::args_os()).map_err(|error| {
        // Nothing can be done about a terminal that is gone.
        let _ = error.print();
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

fn parse_from(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Invocation, clap::Error> {
    let matches = args::Cli::command().try_get_matches_from(arguments)?;
    let cli = args::Cli::from_arg_matches(&matches)?;
    let command = match (cli.command, matches.subcommand()) {
        (args::Command::Version { format }, _) => Command::Version(format),
        (args::Command::Configuration(mut args), Some((_, matches))) => {
            args.split_lists(matches);
            Command::Configuration(settings::configuration(args)?)
        }
        (args::Command::Registry(mut args), Some((_, matches))) => {
            args.split_lists(matches);
            Command::Registry(Box::new(settings::registry(*args)?))
        }
        (args::Command::Cleanup(args), _) => Command::Cleanup(cleanup::cleanup(args)?),
        (args::Command::CleanupWait(args), _) => Command::CleanupWait(Box::new(cleanup::cleanup_wait(args)?)),
        (args::Command::Completions { shell }, _) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut args::Cli::command(), "spegel", &mut script);
            Command::Completions(script)
        }
        (_, None) => return Err(args::Cli::command().error(clap::error::ErrorKind::MissingSubcommand, "no command")),
    };
    Ok(Invocation { log: Log { level: cli.log_level, format: cli.log_format }, command })
}
