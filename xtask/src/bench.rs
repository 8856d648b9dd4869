//! `cargo xtask bench`: figures of the whole process.

mod helper;
mod hop;
mod idle;
mod micro;
mod plane;
mod router;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

pub(crate) use helper::Helper;

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    name: Name,
    /// Write the figures there
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this program instead of a release build of spegel; it needs the same flags
    #[arg(long, global = true, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Write the table into benches/results, with date, kernel and method
    #[arg(long, global = true)]
    record: bool,
    /// Rounds whose medians are told
    #[arg(long, global = true, default_value_t = 5, value_name = "NUMBER")]
    rounds: usize,
    /// Length of the large blob
    #[arg(long, global = true, default_value_t = 1024, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    mib: u64,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Name {
    /// A layer that is still arriving: the latency of a hop, and CPU beside a complete one
    Hop,
    /// Small things by themselves, by criterion: ways for a small body, our own code for a small request
    Micro,
    /// Three idle nodes: time until they are ready, memory, time to a 404, size of the program
    Idle,
    /// A large blob from the page cache: spegel on each engine, nginx, a bare loop
    Serve,
    /// A large blob relayed from a peer: spegel on each engine, nginx, a bare loop
    Relay,
    /// A manifest of 2 KiB: GET, HEAD, and a connection for each
    Small,
    /// A manifest of 2 KiB beside 32 bulk streams
    Mixed,
    /// A manifest of 2 KiB beside a blob that is read from the disk
    Cold,
    /// What counting in the kernel costs: eBPF on and off, bulk, small requests, connections
    Ebpf,
    /// What it costs to be watched: metrics, log, eBPF and debug pages on and off, small requests
    Everything,
    /// Memory that a control group is charged for, with and without a limit of 128 MiB
    Memory,
    /// The router with up to 3,000 nodes under simulated time: lookups, advertising, deaths, the member list
    Router,
    /// 10,000 idle connections, and 256 bulk streams
    Connections,
}

/// What a bench found.
struct Figures {
    name: &'static str,
    method: String,
    /// The table's heads.
    columns: Vec<String>,
    /// As many fields each.
    rows: Vec<Vec<String>>,
    json: serde_json::Value,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<bool> {
        let program = match &self.binary {
            Some(program) => std::path::absolute(program)?,
            // Tests and benches of their own, which need no program.
            None if matches!(self.name, Name::Router | Name::Micro) => PathBuf::new(),
            None => crate::build::spegel("release")?,
        };
        let settings = plane::Settings { program: program.clone(), rounds: self.rounds.max(1), mib: self.mib };
        let figures = match self.name {
            Name::Hop => hop::run(&program)?,
            Name::Micro => micro::run()?,
            Name::Idle => idle::run(&program)?,
            Name::Serve => plane::serve(&settings)?,
            Name::Relay => plane::relay(&settings)?,
            Name::Small => plane::small(&settings)?,
            Name::Mixed => plane::mixed(&settings)?,
            Name::Cold => plane::cold(&settings)?,
            Name::Ebpf => plane::ebpf(&settings)?,
            Name::Everything => plane::everything(&settings)?,
            Name::Memory => plane::memory(&settings)?,
            Name::Connections => plane::connections(&settings)?,
            Name::Router => {
                let (figures, met) = router::run(self.record)?;
                return Ok(self.show(&figures)? && met);
            }
        };
        self.show(&figures)
    }

    fn show(&self, figures: &Figures) -> Result<bool> {
        let table = figures.table();
        println!("{table}");
        crate::write_json(self.json.as_ref(), &figures.json)?;
        if self.record {
            let command = format!("cargo xtask bench {} --record", figures.name);
            record(figures.name, &figures.method, &table, &command)?;
        }
        Ok(true)
    }
}

/// Writes a table into benches/results, with date, kernel, method and the command that makes it anew.
///
/// # Errors
/// The disk's.
pub(crate) fn record(name: &str, method: &str, table: &str, command: &str) -> Result<()> {
    let folder = crate::root().join("benches/results");
    std::fs::create_dir_all(&folder)?;
    let (date, kernel) = (output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?, output("uname", &["-r"])?);
    let cores = std::thread::available_parallelism()?;
    let text =
        format!("# {name}\n\n{date}, Linux {kernel}, {cores} cores. {method}\n\n{table}\nMake it anew: `{command}`.\n");
    let file = folder.join(format!("{name}.md"));
    std::fs::write(&file, text)?;
    println!("written to {}", file.display());
    Ok(())
}

impl Figures {
    fn table(&self) -> String {
        let line = |fields: &[String]| format!("| {} |\n", fields.join(" | "));
        let rule = format!("|{}\n", "---|".repeat(self.columns.len()));
        self.rows.iter().fold(line(&self.columns) + &rule, |table, row| table + &line(row))
    }
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("run {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
