//! The flags of `log-level`.

use clap::Args;

use super::LogLevel;
use super::peers::side_port;

#[derive(Debug, Args)]
pub(super) struct LevelArgs {
    /// The least level that is logged from now on; without it the present one is shown
    #[arg(value_enum, ignore_case = true)]
    pub(super) level: Option<LogLevel>,
    /// The metrics address of the process to ask, on this node
    #[arg(long, env = "METRICS_ADDR", default_value = ":9090", value_name = "ADDRESS")]
    pub(super) metrics_addr: String,
}

/// What `log-level` needs.
#[derive(Clone, Copy, Debug)]
pub struct LevelSettings {
    /// Whom to ask.
    pub addr: std::net::SocketAddr,
    /// What to change it to.
    pub level: Option<LogLevel>,
}

pub(super) fn level(args: &LevelArgs) -> Result<LevelSettings, clap::Error> {
    Ok(LevelSettings { addr: side_port(&args.metrics_addr)?, level: args.level })
}
