//! The clients and the bare servers of the data plane's benches, as processes of their own: they run in a namespace, on a core.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use spegel_benches::bare;
use spegel_benches::load::{Take, Target, thread_cpu};

#[derive(Debug, Args)]
pub(crate) struct Helper {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Sendfile {
        listen: SocketAddr,
        file: PathBuf,
    },
    Splice {
        listen: SocketAddr,
        upstream: SocketAddr,
    },
    Answer {
        listen: SocketAddr,
        length: usize,
    },
    Bulk {
        address: SocketAddr,
        path: String,
        connections: usize,
        count: usize,
        take: String,
    },
    BulkFor {
        address: SocketAddr,
        path: String,
        connections: usize,
        seconds: f64,
        take: String,
    },
    Small {
        address: SocketAddr,
        path: String,
        method: String,
        connections: usize,
        seconds: f64,
    },
    /// Until the file is there.
    While {
        address: SocketAddr,
        path: String,
        stop: PathBuf,
    },
    Connects {
        address: SocketAddr,
        path: String,
        seconds: f64,
    },
    Idle {
        address: SocketAddr,
        path: String,
        connections: usize,
    },
}

impl Helper {
    pub(crate) fn run(&self) -> Result<bool> {
        let target = |address: &SocketAddr, method: &str, path: &str| Target {
            address: *address,
            method: method.to_owned(),
            path: path.to_owned(),
        };
        let take = |text: &str| if text == "discard" { Take::Discard } else { Take::Copy };
        let time = Duration::from_secs_f64;
        let told = match &self.what {
            What::Sendfile { listen, file } => return bare::serve_file(*listen, file).map(|()| true),
            What::Splice { listen, upstream } => return bare::relay(*listen, *upstream).map(|()| true),
            What::Answer { listen, length } => return bare::answer(*listen, *length).map(|()| true),
            What::Bulk { address, path, connections, count, take: how } => {
                serde_json::to_string(&target(address, "GET", path).bulk(*connections, *count, take(how))?)?
            }
            What::BulkFor { address, path, connections, seconds, take: how } => serde_json::to_string(
                &target(address, "GET", path).bulk_for(*connections, time(*seconds), take(how))?,
            )?,
            What::Small { address, path, method, connections, seconds } => {
                let before = thread_cpu();
                let mut told = target(address, method, path).small(*connections, |so_far| so_far < time(*seconds))?;
                told.cpu_seconds = thread_cpu() - before;
                serde_json::to_string(&told)?
            }
            What::While { address, path, stop } => {
                serde_json::to_string(&target(address, "GET", path).small(1, |_| !stop.exists())?)?
            }
            What::Connects { address, path, seconds } => {
                let before = thread_cpu();
                let mut told = target(address, "GET", path).connects(time(*seconds))?;
                told.cpu_seconds = thread_cpu() - before;
                serde_json::to_string(&told)?
            }
            What::Idle { address, path, connections } => {
                spegel_benches::load::allow_many_files()?;
                let held = target(address, "GET", path).idle(*connections)?;
                println!("{}", held.len());
                // Until whoever started this closes its end.
                std::io::stdin().read_to_end(&mut Vec::new())?;
                return Ok(true);
            }
        };
        println!("{told}");
        Ok(true)
    }
}
