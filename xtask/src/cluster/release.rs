//! A Helm release of the chart in the cluster.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use spegel_benches::http::Client;

use super::machine::{Machine, NODES};

/// The image that the test imports into every node: its repository, its tag, and a second tag to upgrade to.
pub(super) const REPOSITORY: &str = "localhost/spegel";
pub(super) const TAG: &str = "test";
pub(super) const NEXT_TAG: &str = "next";

/// The registry of the cluster's upstream.
pub(super) const UPSTREAM: &str = "registry.test";

/// What is installed, where, and by which Helm.
#[derive(Clone, Debug)]
pub(super) struct Release<'a> {
    pub(super) machine: &'a Machine,
    pub(super) helm: &'a Path,
    pub(super) name: &'a str,
    pub(super) namespace: &'a str,
}

/// A node's mirror, as its figures tell of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// Requests that were answered with content.
    pub(super) hits: u64,
    /// Requests that were not.
    pub(super) misses: u64,
}

// === impl Release ===

impl Release<'_> {
    /// Our chart.
    pub(super) fn chart() -> PathBuf {
        crate::root().join("charts/spegel")
    }

    /// The values that every release here needs.
    fn values(tag: &str) -> Vec<String> {
        [
            format!("image.repository={REPOSITORY}"),
            format!("image.tag={tag}"),
            "image.pullPolicy=Never".to_owned(),
            format!("spegel.mirroredRegistries={{http://{UPSTREAM}}}"),
        ]
        .into_iter()
        .flat_map(|value| ["--set".to_owned(), value])
        .collect()
    }

    fn run(&self, verb: &[&str], arguments: &[String]) -> Result<Output> {
        let mut command = self.machine.client(self.helm);
        command.args(verb).arg(self.name).args(arguments).args(["--namespace", self.namespace]);
        command.output().with_context(|| format!("run {command:?}"))
    }

    fn succeed(&self, verb: &[&str], arguments: &[String]) -> Result<String> {
        let done = self.run(verb, arguments)?;
        let said = said(&done);
        ensure!(done.status.success(), "helm {} failed: {said}", verb.join(" "));
        Ok(said)
    }

    /// Installs a chart and waits until every pod is ready.
    ///
    /// # Errors
    /// What Helm says.
    pub(super) fn install(&self, chart: &Path, more: &[&str]) -> Result<String> {
        let mut arguments = vec![chart.display().to_string(), "--create-namespace".to_owned()];
        arguments.extend(["--wait", "--timeout", "2m"].map(str::to_owned));
        arguments.extend(Self::values(TAG));
        arguments.extend(more.iter().map(|&value| value.to_owned()));
        self.succeed(&["install"], &arguments)
    }

    /// Upgrades to our chart with an image, and waits until every pod has been replaced.
    ///
    /// # Errors
    /// What Helm says.
    pub(super) fn upgrade(&self, tag: &str, more: &[&str]) -> Result<String> {
        let mut arguments = vec![Self::chart().display().to_string()];
        arguments.extend(["--wait", "--timeout", "3m"].map(str::to_owned));
        arguments.extend(Self::values(tag));
        arguments.extend(more.iter().map(|&value| value.to_owned()));
        let said = self.succeed(&["upgrade"], &arguments)?;
        let set = format!("daemonset/{}", self.name);
        self.machine.kubectl(&["rollout", "status", &set, "--namespace", self.namespace, "--timeout", "2m"])?;
        Ok(said)
    }

    /// Uninstalls it. Whether that succeeded is in the output.
    ///
    /// # Errors
    /// Helm does not run.
    pub(super) fn uninstall(&self) -> Result<Output> {
        self.run(&["uninstall"], &["--timeout", "5m"].map(str::to_owned))
    }

    /// The mirror's pods, as node and address, ordered by node.
    ///
    /// # Errors
    /// There is not one on each node.
    pub(super) fn pods(&self) -> Result<Vec<(String, String)>> {
        let selector = format!("app.kubernetes.io/component=spegel,app.kubernetes.io/instance={}", self.name);
        let list = self.machine.get(&["pods", "--namespace", self.namespace, "--selector", &selector])?;
        let mut pods: Vec<_> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|pod| {
                Some((pod["spec"]["nodeName"].as_str()?.to_owned(), pod["status"]["podIP"].as_str()?.to_owned()))
            })
            .collect();
        pods.sort();
        ensure!(pods.len() == NODES, "{} pods have an address", pods.len());
        Ok(pods)
    }

    /// The metrics of the mirror at an address.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) fn figures(&self, address: &str) -> Result<String> {
        let client = Client::new(Duration::from_secs(10));
        Ok(client.get(&format!("http://{address}:9090/metrics"), &[])?.text())
    }

    /// How often each node's mirror was asked so far, ordered by node.
    ///
    /// # Errors
    /// A mirror that does not answer.
    pub(super) fn asked(&self) -> Result<Vec<Asked>> {
        let asked = self.pods()?.into_iter().map(|(_, address)| {
            let text = self.figures(&address)?;
            let count = |cache: &str| -> u64 {
                let label = format!("cache=\"{cache}\"");
                text.lines()
                    .filter(|line| line.starts_with("spegel_mirror_requests_total{") && line.contains(&label))
                    .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
                    .sum()
            };
            Ok(Asked { hits: count("hit"), misses: count("miss") })
        });
        asked.collect()
    }
}

/// Everything that a command wrote.
pub(super) fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text)).join("")
}
