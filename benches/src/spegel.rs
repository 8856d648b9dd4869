//! The program under test, or another with the same flags.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::containerd::Containerd;
use crate::daemon::{Daemon, output};
use crate::http::Client;
use crate::netns::Node;

/// The ports of one process; the registry's must be the same on all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// `--registry-addr`.
    pub registry: u16,
    /// `--router-addr`.
    pub router: u16,
    /// `--metrics-addr`.
    pub metrics: u16,
}

impl Ports {
    /// Three ports in a row that nothing of this machine listens on, and that no other call of this process was given.
    ///
    /// They lie below the range that Linux gives to clients and to those who bind port 0
    /// (`net.ipv4.ip_local_port_range`), so that nobody is given them before their process binds them.
    ///
    /// # Errors
    /// All of them are taken.
    pub fn free() -> Result<Self> {
        static GIVEN: AtomicU16 = AtomicU16::new(0);
        const THREES: u16 = 3333;
        let is_free = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
        // Another process of tests begins elsewhere, and not at the next three.
        let begin = u16::try_from(std::process::id() % u32::from(THREES) * 97 % u32::from(THREES))?;
        (0..THREES)
            .map(|_| 20_000 + 3 * ((begin + GIVEN.fetch_add(1, Ordering::Relaxed) % THREES) % THREES))
            .find(|&port| (port..port + 3).all(is_free))
            .map(|port| Self { registry: port, router: port + 1, metrics: port + 2 })
            .context("no free ports between 20000 and 29998")
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self { registry: 5000, router: 5001, metrics: 9090 }
    }
}

/// What a process serves.
#[derive(Clone, Debug)]
pub enum Source {
    /// An OCI image layout.
    Layout(PathBuf),
    /// A containerd.
    Containerd {
        /// Its socket.
        socket: PathBuf,
        /// Its content directory; none: let the process ask containerd.
        content: Option<PathBuf>,
    },
}

/// How a process is started.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The binary.
    pub program: PathBuf,
    /// The namespace that it runs in; none: the machine's own.
    pub node: Option<Node>,
    /// The address of its listeners.
    pub address: IpAddr,
    /// Their ports.
    pub ports: Ports,
    /// What it serves.
    pub source: Source,
    /// Addresses for `--static-bootstrap-peers`.
    pub peers: Vec<IpAddr>,
    /// Further arguments.
    pub arguments: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
}

/// A running `spegel registry`.
#[derive(Debug)]
pub struct Spegel {
    /// The process.
    pub daemon: Daemon,
    settings: Settings,
}

// === impl Settings ===

impl Settings {
    /// A process on a node of a lab, on the default ports, that serves a containerd.
    pub fn on_node(program: &Path, containerd: &Containerd, peers: &[IpAddr], log: &Path) -> Self {
        let node = containerd.node().clone();
        let source = Source::Containerd { socket: containerd.socket(), content: Some(containerd.content_path()) };
        Self {
            program: program.to_path_buf(),
            address: node.address().into(),
            node: Some(node),
            ports: Ports::default(),
            source,
            peers: peers.to_vec(),
            arguments: Vec::new(),
            log: log.to_path_buf(),
        }
    }

    /// Starts the process and waits until `/readyz` says 200.
    ///
    /// # Errors
    /// It ends first, or is not ready within 30 seconds.
    pub fn start(self) -> Result<Spegel> {
        let mut spegel = self.spawn()?;
        spegel.wait_ready(Duration::from_secs(30))?;
        Ok(spegel)
    }

    /// Starts the process without waiting.
    ///
    /// # Errors
    /// A program that cannot be started.
    pub fn spawn(self) -> Result<Spegel> {
        let command = self.command();
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let daemon = Daemon::start(&format!("spegel on {}", self.address), self.node.as_ref(), &command, &self.log)?;
        Ok(Spegel { daemon, settings: self })
    }

    /// The program and its arguments.
    pub fn command(&self) -> Vec<String> {
        let at = |port| SocketAddr::new(self.address, port).to_string();
        let mut command = vec![self.program.display().to_string(), "registry".into()];
        let mut flag = |name: &str, value: String| command.extend([format!("--{name}"), value]);
        flag("registry-addr", at(self.ports.registry));
        flag("router-addr", at(self.ports.router));
        flag("metrics-addr", at(self.ports.metrics));
        flag("bootstrap-kind", "static".into());
        flag("node-name", self.address.to_string());
        match &self.source {
            Source::Layout(folder) => flag("oci-layout", folder.display().to_string()),
            Source::Containerd { socket, content } => {
                flag("containerd-sock", socket.display().to_string());
                let content = content.as_ref().map(|path| path.display().to_string());
                flag("containerd-content-path", content.unwrap_or_default());
            }
        }
        if !self.peers.is_empty() {
            command.push("--static-bootstrap-peers".into());
            command.extend(self.peers.iter().map(|peer| SocketAddr::new(*peer, self.ports.router).to_string()));
        }
        command.extend(self.arguments.iter().cloned());
        command
    }
}

// === impl Spegel ===

impl Spegel {
    /// Waits until `/readyz` says 200.
    ///
    /// # Errors
    /// The process ends first, or the time is over.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let (client, url) = (Client::new(Duration::from_secs(1)), format!("{}/readyz", self.url()));
        self.daemon.wait_until(limit, "200 from /readyz", || {
            client.get(&url, &[]).is_ok_and(|answer| answer.head.status == 200)
        })
    }

    /// `http://address:port` of the registry, where containerd's mirror points to.
    pub fn url(&self) -> String {
        format!("http://{}", SocketAddr::new(self.settings.address, self.settings.ports.registry))
    }

    /// `http://address:port` of the metrics.
    pub fn metrics_url(&self) -> String {
        format!("http://{}", SocketAddr::new(self.settings.address, self.settings.ports.metrics))
    }

    /// What it was started with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The sum of a metric's samples whose label text contains all of `labels` (`cache="hit"`); 0 if it has none.
    ///
    /// # Errors
    /// The metrics port does not answer.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let answer = Client::new(Duration::from_secs(5)).get(&format!("{}/metrics", self.metrics_url()), &[])?;
        Ok(sum_of(&answer.text(), name, labels))
    }

    /// Ends it in good order and starts it again with the same settings.
    ///
    /// # Errors
    /// As [`Settings::start`].
    pub fn restart(self) -> Result<Self> {
        self.daemon.stop()?;
        self.settings.start()
    }
}

/// Writes `hosts.toml` files with `spegel configuration`: one mirror for the given registries (none: all).
///
/// # Errors
/// What the program says.
pub fn configure(program: &Path, certs_dir: &Path, mirror: &str, registries: &[&str], node_name: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.arg("configuration").arg("--containerd-registry-config-path").arg(certs_dir);
    command.args(["--node-name", node_name, "--mirror-targets", mirror]);
    if !registries.is_empty() {
        command.arg("--mirrored-registries").args(registries);
    }
    output(&mut command).context("write the mirror configuration").map(|_| ())
}

fn sum_of(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label)))
        .filter_map(|rest| rest.rsplit_once(['}', ' '])?.1.trim().parse::<f64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_label() {
        let text = "# TYPE hits counter\nhits{a=\"1\",cache=\"hit\"} 3\nhits{a=\"2\",cache=\"hit\"} 4\nhits{a=\"1\",cache=\"miss\"} 5\nhits_created 9\nup 1\n";
        let check =
            |name: &str, labels: &[&str], sum: f64| assert!((sum_of(text, name, labels) - sum).abs() < 1e-9, "{name}");
        check("hits", &["cache=\"hit\""], 7.0);
        check("hits", &[], 12.0);
        check("up", &[], 1.0);
        check("absent", &[], 0.0);
    }
}
