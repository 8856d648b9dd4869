//! `cargo xtask bench-cluster`: the existing project's published scenarios in whatever cluster kubectl points to, with any mirror or none.
//!
//! *create*: a DaemonSet with an image that no node has, so that all nodes pull at once. *update*: a second image of the same size, node by
//! node, the next one once the one before has it. Times are what kubelets say in their events, waits for other pulls included.

mod cluster;
mod images;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use cluster::Cluster;
use images::Size;

#[derive(Debug, Args)]
pub(crate) struct BenchCluster {
    /// Where the images are, as nodes name it: REGISTRY/REPOSITORY. Its tags are v1-10MB-1, v2-10MB-1, v1-10MB-4 and so on, as in the existing project's benchmark
    #[arg(long, value_name = "NAME")]
    repository: String,
    /// Make such images of random bytes, and push them to this URL first; their tags then have a suffix of this run's, so that no node has them
    #[arg(long, value_name = "URL")]
    push: Option<String>,
    /// The sizes of the images
    #[arg(long, value_name = "SIZE", num_args = 1.., value_delimiter = ',', default_value = "10MB,100MB,1GB")]
    sizes: Vec<Size>,
    /// Over how many layers they are spread
    #[arg(long, value_name = "NUMBER", num_args = 1.., value_delimiter = ',', default_value = "1,4")]
    layers: Vec<usize>,
    /// How many nodes pull [default: all that take pods; the published figures are of 10]
    #[arg(long, value_name = "NUMBER")]
    nodes: Option<usize>,
    /// What the table says the mirror is
    #[arg(long, default_value = "as it is", value_name = "TEXT")]
    mirror: String,
    /// The namespace that is made for it, and removed afterwards
    #[arg(long, default_value = "image-pull-bench", value_name = "NAME")]
    namespace: String,
    /// The kubectl that is run
    #[arg(long, default_value = "kubectl", value_name = "FILE")]
    kubectl: PathBuf,
    /// How long one step may take, in seconds
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    patience: u64,
    /// Write the figures there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One scenario's pulls.
struct Row {
    size: Size,
    layers: usize,
    kind: &'static str,
    /// Each node's, shortest first.
    pulls: Vec<Duration>,
}

// === impl BenchCluster ===

impl BenchCluster {
    pub(crate) fn run(&self) -> Result<bool> {
        ensure!(self.layers.iter().all(|layers| *layers > 0), "an image has a layer at least");
        let cluster = Cluster::prepare(&self.kubectl, &self.namespace, self.nodes, Duration::from_secs(self.patience))?;
        println!("{} nodes, mirror: {}", cluster.nodes().len(), self.mirror);
        let mut rows = Vec::new();
        for size in &self.sizes {
            for &layers in &self.layers {
                let first = self.image(1, *size, layers)?;
                let second = self.image(2, *size, layers)?;
                let pulls = cluster.create(&first)?;
                rows.push(Row { size: *size, layers, kind: "create", pulls });
                let pulls = cluster.update(&second)?;
                rows.push(Row { size: *size, layers, kind: "update", pulls });
                cluster.clear()?;
                for row in &rows[rows.len() - 2..] {
                    println!("{}", row.line());
                }
            }
        }
        drop(cluster);
        println!("\n{}", table(&rows, &self.mirror));
        crate::write_json(
            self.json.as_ref(),
            &json!({ "mirror": self.mirror, "rows": rows.iter().map(Row::value).collect::<Vec<_>>() }),
        )?;
        Ok(true)
    }

    /// The image's name; made and pushed, where that was asked for.
    fn image(&self, version: u32, size: Size, layers: usize) -> Result<String> {
        let tag = format!("v{version}-{size}-{layers}");
        match &self.push {
            None => Ok(format!("{}:{tag}", self.repository)),
            Some(url) => images::push(&self.repository, &tag, size, layers, url),
        }
    }
}

// === impl Row ===

impl Row {
    fn at(&self, share: f64) -> f64 {
        let last = self.pulls.len().saturating_sub(1);
        let place = (last as f64 * share).round() as usize;
        self.pulls.get(place).map_or(f64::NAN, Duration::as_secs_f64)
    }

    fn line(&self) -> String {
        let name = format!("{} in {} layer{}", self.size, self.layers, if self.layers == 1 { "" } else { "s" });
        format!(
            "| {name} | {} | {} | {:.2} s | {:.2} s | {:.2} s |",
            self.kind,
            self.pulls.len(),
            self.at(0.0),
            self.at(0.5),
            self.at(1.0)
        )
    }

    fn value(&self) -> Value {
        let seconds: Vec<f64> = self.pulls.iter().map(Duration::as_secs_f64).collect();
        json!({ "size": self.size.to_string(), "layers": self.layers, "kind": self.kind, "seconds": seconds })
    }
}

fn table(rows: &[Row], mirror: &str) -> String {
    let lines: Vec<String> = rows.iter().map(Row::line).collect();
    format!(
        "| image ({mirror}) | scenario | pulls | fastest | median | slowest |\n|---|---|---|---|---|---|\n{}",
        lines.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_its_fastest_median_and_slowest() {
        let pulls = [1, 2, 9].map(Duration::from_secs).to_vec();
        let row = Row { size: Size(10_000_000), layers: 1, kind: "create", pulls };
        assert_eq!(row.line(), "| 10MB in 1 layer | create | 3 | 1.00 s | 2.00 s | 9.00 s |");
        assert!(table(&[row], "none").contains("image (none)"));
    }
}
