//! Whether this node's pulls go through the mirror, in plain words, and what to change if not.
//!
//! Facts are gathered first, each within a bounded time; then pure functions judge them. What cannot be seen from here (a process of another
//! process namespace, say) is said to be unknown, which is no failure.

mod certs;
mod config;
mod containerd;
mod files;
mod finding;
mod http;
mod kernel;
mod network;
mod probe;
mod process;
mod proxy;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::bootstrap::Bootstrap;

pub use finding::{DoctorMetrics, Finding, Report, State};
pub use kernel::Ebpf;

/// What is examined.
#[derive(Clone, Debug)]
pub struct Settings {
    /// containerd's socket; none: OCI layouts are served, and containerd is not looked at.
    pub containerd: Option<Containerd>,
    /// containerd's `config_path`, as it should be.
    pub config_path: PathBuf,
    /// This node's name, as the mirror knows it.
    pub node_name: String,
    /// Where the figures of connections come from.
    pub ebpf: Ebpf,
    /// What is looked at beyond this node's own files and containerd; not while the mirror itself starts.
    pub outside: Option<Outside>,
}

/// A containerd and what of it is served.
#[derive(Clone, Debug)]
pub struct Containerd {
    /// Its socket.
    pub socket: PathBuf,
    /// The namespace.
    pub namespace: String,
    /// Its content directory; asked of it if not told.
    pub content_path: Option<PathBuf>,
    /// Its configuration file; as its process was told, or its default, if not told.
    pub config: Option<PathBuf>,
}

/// The mirror's process and its peers.
#[derive(Clone, Debug)]
pub struct Outside {
    /// Where the registry listens.
    pub registry: Port,
    /// Where the router listens.
    pub router: Port,
    /// Where metrics are served.
    pub metrics: Port,
    /// Where this node's addresses are served, if they are.
    pub bootstrap: Option<Port>,
    /// Who names peers.
    pub sources: Vec<Arc<dyn Bootstrap>>,
    /// An image that containerd is made to pull.
    pub pull: Option<String>,
}

/// A port that the mirror listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The address that it listens on; unspecified: on all.
    pub listen: SocketAddr,
}

/// Examines the node.
pub async fn examine(settings: &Settings) -> Report {
    let mut findings = Vec::new();
    let seen = containerd::look(settings).await;
    findings.extend(seen.findings());
    let certs = certs::look(settings, seen.root()).await;
    findings.extend(certs.judge(settings, &seen));
    findings.push(proxy::judge(seen.environment(), &certs.targets()));
    let running = match &settings.outside {
        Some(outside) => Some(network::look(outside).await),
        None => None,
    };
    findings.extend(kernel::judge(running.as_ref(), &settings.ebpf));
    if let (Some(outside), Some(running)) = (&settings.outside, &running) {
        findings.extend(running.judge());
        findings.extend(network::peers(outside).await);
        findings.extend(probe::mirrors(&certs, seen.version()).await);
        findings.push(probe::blob(&certs, outside, &seen).await);
        if let Some(image) = &outside.pull {
            findings.push(probe::containerd(settings, outside, image).await);
        }
    }
    Report::new(findings)
}
