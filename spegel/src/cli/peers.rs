//! The flags of `peers`.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::args::duration;
use super::settings::{listen, usage};
use crate::serve::ListenAddr;

/// By what the table is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PeersOrder {
    /// Bytes, both ways.
    Bytes,
    /// Bytes a second since the table was last drawn.
    Rate,
    /// Round trip.
    Rtt,
    /// Segments sent again.
    Retransmits,
    /// Connections that failed or were reset.
    Errors,
    /// Address.
    Address,
}

#[derive(Debug, Args)]
pub(super) struct PeersArgs {
    /// The metrics address of the process to ask, on this node
    #[arg(long, env = "METRICS_ADDR", default_value = ":9090", value_name = "ADDRESS")]
    pub(super) metrics_addr: String,
    /// Print what is known as JSON, and end
    #[arg(long, env)]
    pub(super) json: bool,
    /// Print the table once, and end
    #[arg(long, env)]
    pub(super) once: bool,
    /// By what the table is sorted
    #[arg(long, env, default_value = "bytes")]
    pub(super) sort: PeersOrder,
    /// How often the table is drawn
    #[arg(long, env, default_value = "1s", value_parser = duration, value_name = "DURATION")]
    pub(super) interval: Duration,
}

/// What `peers` needs.
#[derive(Clone, Copy, Debug)]
pub struct PeersSettings {
    /// Whom to ask.
    pub addr: std::net::SocketAddr,
    /// How to show it.
    pub show: PeersShow,
    /// By what the table is sorted.
    pub order: PeersOrder,
}

/// How the table is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeersShow {
    /// As JSON.
    Json,
    /// Once, as text.
    Once,
    /// As long as somebody looks, drawn so often.
    Live(Duration),
}

/// Where a process on this node that was given `metrics_addr` is asked.
pub(super) fn side_port(metrics_addr: &str) -> Result<std::net::SocketAddr, clap::Error> {
    Ok(match listen("--metrics-addr", metrics_addr)? {
        ListenAddr::One(addr) if !addr.ip().is_unspecified() => addr,
        addr => (std::net::Ipv4Addr::LOCALHOST, addr.port()).into(),
    })
}

pub(super) fn peers(args: &PeersArgs) -> Result<PeersSettings, clap::Error> {
    if args.json && args.once {
        return Err(usage("--json or --once"));
    }
    let addr = side_port(&args.metrics_addr)?;
    let show = match (args.json, args.once) {
        (true, _) => PeersShow::Json,
        (_, true) => PeersShow::Once,
        _ => PeersShow::Live(args.interval),
    };
    Ok(PeersSettings { addr, show, order: args.sort })
}
