//! An upstream: Debian's `docker-registry` (CNCF distribution), plain HTTP, content in a temporary folder.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::daemon::{Daemon, find_program};
use crate::http::Client;
use crate::netns::Node;

/// A registry that accepts pushes and logs every request.
#[derive(Debug)]
pub struct Registry {
    daemon: Option<Daemon>,
    node: Node,
    address: SocketAddr,
    folder: TempDir,
}

// === impl Registry ===

impl Registry {
    /// Whether the program is there.
    ///
    /// # Errors
    /// What to install.
    pub fn available() -> Result<(), String> {
        program().map(|_| ()).map_err(|error| error.to_string())
    }

    /// Starts a registry on port 5000 of a node.
    ///
    /// # Errors
    /// The program is missing or does not answer within 20 seconds.
    pub fn start(node: &Node) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let address = SocketAddr::new(node.address().into(), 5000);
        let config = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp: {{addr: \"{address}\"}}\n",
            folder.path().join("data").display()
        );
        fs::write(folder.path().join("config.yml"), config)?;
        let mut registry = Self { daemon: None, node: node.clone(), address, folder };
        registry.restart()?;
        Ok(registry)
    }

    /// Starts it again after [`Registry::stop`], with the same content.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let config = self.folder.path().join("config.yml");
        let command = [&program()?, &config].map(|path| path.display().to_string());
        let mut daemon =
            Daemon::start("docker-registry", Some(&self.node), &[&command[0], "serve", &command[1]], &self.log_path())?;
        let (client, url) = (Client::new(Duration::from_secs(1)), format!("{}/v2/", self.url()));
        daemon.wait_until(Duration::from_secs(20), "answer to /v2/", || {
            client.get(&url, &[]).is_ok_and(|answer| answer.head.status == 200)
        })?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Ends it; its port then refuses connections.
    pub fn stop(&mut self) {
        self.daemon = None;
    }

    /// The node that it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Where it keeps a blob's bytes, which it sends as they are.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        let folder = self.folder.path().join("data/docker/registry/v2/blobs/sha256");
        folder.join(&hex[..2]).join(hex).join("data")
    }

    /// How many bytes of answers to GETs for a path that contains `part` were sent to a node since the registry first started; an answer
    /// counts when it has ended, with what the kernel took of it.
    pub fn sent(&self, to: &Node, part: &str) -> u64 {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let start = format!("{} ", to.address());
        let answers = log.lines().filter(|line| line.starts_with(&start)).filter_map(|line| {
            let (target, rest) = line.split_once("\"GET ")?.1.split_once("\" ")?;
            target.contains(part).then(|| rest.split(' ').nth(1)?.parse::<u64>().ok())?
        });
        answers.sum()
    }

    /// `host:port`, which is also the registry part of the names of images in it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// `http://host:port`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many requests of `method` for a path that contains `part` were answered with 200 or 206 since the registry first started.
    pub fn requests(&self, method: &str, part: &str) -> usize {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let start = format!("\"{method} ");
        // The access log's lines are in Apache's combined format: ... "GET /v2/... HTTP/1.1" 200 ...
        log.lines()
            .filter(|line| {
                line.split_once(&start).and_then(|(_, rest)| rest.split_once("\" ")).is_some_and(|(target, status)| {
                    target.contains(part) && (status.starts_with("200") || status.starts_with("206"))
                })
            })
            .count()
    }

    /// How many bytes of bodies it has sent for GETs of a path that contains `part` since it first started.
    pub fn bytes_sent(&self, part: &str) -> u64 {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines = log.lines().filter_map(|line| line.split_once("\"GET ")?.1.split_once("\" "));
        lines
            .filter(|(target, status)| {
                target.contains(part) && (status.starts_with("200") || status.starts_with("206"))
            })
            .filter_map(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum()
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }
}

fn program() -> Result<PathBuf> {
    find_program("docker-registry").context("docker-registry is not installed (Debian package docker-registry)")
}
