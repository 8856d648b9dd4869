//! `cargo xtask bench`: figures of the whole process.

mod hop;
mod idle;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

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
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Name {
    /// A layer that is still arriving: the latency of a hop, and CPU beside a complete one
    Hop,
    /// Three idle nodes: time until they are ready, memory, time to a 404, size of the program
    Idle,
}

/// What a bench found.
struct Figures {
    name: &'static str,
    method: &'static str,
    /// What was measured, and the figure with its unit.
    rows: Vec<(String, String)>,
    json: serde_json::Value,
}

impl Bench {
    pub(crate) fn run(&self) -> Result<bool> {
        let program = match &self.binary {
            Some(program) => std::path::absolute(program)?,
            None => crate::build::spegel("release")?,
        };
        let figures = match self.name {
            Name::Hop => hop::run(&program)?,
            Name::Idle => idle::run(&program)?,
        };
        let table = figures.table();
        println!("{table}");
        crate::write_json(self.json.as_ref(), &figures.json)?;
        if self.record {
            let file = crate::root().join("benches/results").join(format!("{}.md", figures.name));
            std::fs::create_dir_all(crate::root().join("benches/results"))?;
            let (date, kernel) = (output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?, output("uname", &["-r"])?);
            let cores = std::thread::available_parallelism()?;
            let text = format!(
                "# {}\n\n{date}, Linux {kernel}, {cores} cores. {}\n\n{table}\nMake it anew: `cargo xtask bench {} --record`.\n",
                figures.name, figures.method, figures.name
            );
            std::fs::write(&file, text)?;
            println!("written to {}", file.display());
        }
        Ok(true)
    }
}

impl Figures {
    fn table(&self) -> String {
        let mut text = "| what | figure |\n|---|---|\n".to_owned();
        for (what, figure) in &self.rows {
            text.push_str(&format!("| {what} | {figure} |\n"));
        }
        text
    }
}

fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("run {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
