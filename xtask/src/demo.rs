//! `cargo xtask demo`.

pub(crate) mod layouts;
mod pull;
mod real;
mod table;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use spegel_benches::image::{Compression, Image, ImageBuilder};
use spegel_benches::spegel::Spegel;

use table::Pulled;

/// The registry that the demo's image is named after. Nobody needs to reach it.
const REGISTRY: &str = "demo.test";

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Real containerds in network namespaces instead of OCI layouts on loopback; needs root
    #[arg(long)]
    containerd: bool,
    /// Leave the nodes running, and print their URLs, until Ctrl-C
    #[arg(long)]
    keep: bool,
    /// The image's size in MiB, both platforms together
    #[arg(long, env = "SPEGEL_DEMO_MIB", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
    /// Write the figures there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run this program instead of building spegel; it needs the same flags
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

impl Demo {
    pub(crate) fn run(&self) -> Result<bool> {
        let program = match &self.binary {
            Some(program) => std::path::absolute(program)?,
            None => crate::build::spegel("fast")?,
        };
        let folder = tempfile::Builder::new().prefix("spegel-demo-").tempdir()?;
        let image = self.make_image(&folder.path().join("image"))?;
        let rounds = if self.containerd {
            real::run(&program, folder.path(), &image, self)?
        } else {
            layouts::run(&program, folder.path(), &image, self)?
        };
        crate::write_json(self.json.as_ref(), &table::to_json(&image, &rounds))?;
        Ok(true)
    }

    /// Two platforms with six layers each: large and small, in each compression.
    fn make_image(&self, folder: &Path) -> Result<Image> {
        let start = Instant::now();
        // A platform has half of it, in 32 shares.
        let share = (self.mib << 20) / 64;
        let image = ImageBuilder::new(format!("{REGISTRY}/team/app:1.0"))
            .platforms(&["linux/amd64", "linux/arm64"])
            .layers(1, 16 * share, Compression::None, 1)
            .layers(1, 8 * share, Compression::Zstd, 1)
            .layers(1, 4 * share, Compression::Gzip, 1)
            .layers(2, 2 * share - share / 2, Compression::Gzip, 1)
            .layers(1, share, Compression::Zstd, 1)
            .build(folder)
            .context("make the demo's image")?;
        let mib = table::mib(image.size());
        println!(
            "{}: {mib:.0} MiB in {} blobs, made in {:.1} s",
            image.reference(),
            image.contents().len(),
            start.elapsed().as_secs_f64()
        );
        Ok(image)
    }
}

/// There is no upstream to fall back to, so a lookup may take longer than the 20 ms of the default: on a busy machine a pull would fail here
/// that goes on at the registry elsewhere.
fn patience() -> Vec<String> {
    ["--mirror-resolve-timeout", "1s"].map(str::to_owned).to_vec()
}

/// Prints a round's table.
fn print_round(title: &str, pulled: &[Pulled]) {
    println!("\n{title}\n{}", table::text(pulled));
}

/// Prints where the nodes answer, and waits for Ctrl-C or SIGTERM.
fn keep_running(nodes: &[Spegel], image: &Image) -> Result<()> {
    println!("\nrunning until Ctrl-C:");
    for node in nodes {
        println!("  {}/v2/{}/manifests/{}?ns={}", node.url(), image.repository(), image.tag(), image.registry());
        println!("  {}/metrics", node.metrics_url());
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    ctrlc::set_handler(move || {
        // Nobody listens any more after the first.
        let _ = sender.send(());
    })?;
    Ok(receiver.recv()?)
}

/// A limit that a run on a slow machine does not meet, and a hang does.
const LIMIT: Duration = Duration::from_secs(600);
