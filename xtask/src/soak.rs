//! `cargo xtask soak`: pulls under random faults.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::Args;
use serde_json::json;
use spegel_benches::containerd::{Options, Version};
use spegel_benches::faults;

/// How much more memory, in KiB, and how many more descriptors the end may have than the middle.
const MORE_MEMORY: u64 = 16 << 10;
const MORE_DESCRIPTORS: usize = 64;

#[derive(Debug, Args)]
pub(crate) struct Soak {
    /// For how long
    #[arg(long, default_value_t = 15)]
    minutes: u64,
    /// What decides all that is random; the clock if not told
    #[arg(long)]
    seed: Option<u64>,
    /// Use containerd 1.6 instead of 2.2
    #[arg(long)]
    old: bool,
    /// Fetch layers in parallel chunks
    #[arg(long, conflicts_with = "old")]
    parallel: bool,
    /// Arguments for every spegel
    #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "ARGUMENT")]
    with: Vec<String>,
    /// Write the outcome there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run this program instead of building spegel
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

impl Soak {
    pub(crate) fn run(&self) -> Result<bool> {
        let program = match &self.binary {
            Some(program) => std::path::absolute(program)?,
            None => crate::build::spegel("fast")?,
        };
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let seed = self.seed.unwrap_or(clock);
        println!("seed {seed}, {} minutes", self.minutes);
        let soak = faults::Soak {
            program,
            version: if self.old { Version::V1_6 } else { Version::V2_2 },
            options: Options { layer_fetch_buffer: self.parallel.then_some(1 << 20), ..Options::default() },
            seed,
            time: Duration::from_secs(60 * self.minutes),
            arguments: self.with.clone(),
        };
        let soaked = soak.run()?;
        crate::write_json(self.json.as_ref(), &json!({ "seed": seed, "outcome": soaked }))?;
        println!(
            "{} pulls, {} failed, the longest {:.1} s; {} faults met {} requests; upstream sent {} MiB of layers",
            soaked.pulls,
            soaked.failures.len(),
            soaked.longest_seconds,
            soaked.faults.len(),
            soaked.met,
            soaked.upstream_bytes >> 20
        );
        soaked.failures.iter().for_each(|failure| println!("  {failure}"));
        let middle = soaked.samples.get(soaked.samples.len() / 2).copied().unwrap_or_default();
        let last = soaked.samples.last().copied().unwrap_or_default();
        println!(
            "the first node's mirror: {} KiB and {} descriptors half way, {} KiB and {} at the end",
            middle.0, middle.1, last.0, last.1
        );
        let flat = last.0 <= middle.0 + MORE_MEMORY && last.1 <= middle.1 + MORE_DESCRIPTORS;
        Ok(soaked.failures.is_empty() && soaked.pulls > 0 && flat)
    }
}
