//! The flags of what is asked of the kernel.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::settings::usage;
use crate::ebpf::{Mode, Settings};
use crate::serve::ListenAddr;

/// Whether the kernel is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum EbpfMode {
    /// Where it can be had
    Auto,
    /// Or do not start
    On,
    /// Never
    Off,
}

#[derive(Debug, Args)]
pub(super) struct EbpfArgs {
    /// Whether the kernel counts what goes to which peer, and what containerd gets from upstream. Needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, which are
    /// given up once that is set up; without, only our own sockets are seen. `on` does not start without, nor where --containerd-cgroup is not there
    #[arg(long, env, default_value = "auto")]
    pub(super) ebpf: EbpfMode,
    /// containerd's control group (version 2), as a folder or as a path in it [default: that of who listens at --containerd-sock, where its process is
    /// to be seen; else looked for by name]
    #[arg(long, env, value_name = "PATH")]
    pub(super) containerd_cgroup: Option<PathBuf>,
    /// This node's own addresses outside of this process's network namespace: who comes from there, as through a host port, is its own containerd
    #[arg(long, env, num_args = 1.., value_delimiter = ',', value_name = "ADDRESS")]
    pub(super) node_ip: Vec<String>,
    /// The ports of upstream registries, one at the least; those of --mirrored-registries are added. What containerd's group has with other ports is no pull
    #[arg(long, env, num_args = 1.., default_values = ["80", "443"], value_name = "PORT")]
    pub(super) upstream_ports: Vec<String>,
}

// === impl EbpfArgs ===

impl EbpfArgs {
    pub(super) fn settings(
        &self,
        mirrored_registries: &[String],
        containerd_sock: Option<&Path>,
        registry: ListenAddr,
        router_port: u16,
    ) -> Result<Settings, clap::Error> {
        // With none everything that containerd gets would count as no pull, and nothing say so.
        if self.upstream_ports.is_empty() {
            return Err(usage("--upstream-ports names no port: leave it out for 80 and 443"));
        }
        let told = self.upstream_ports.iter().map(|text| {
            text.parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| usage(format!("--upstream-ports {text}: a port is a number")))
        });
        let mut upstream_ports = told.collect::<Result<Vec<u16>, _>>()?;
        upstream_ports.extend(mirrored_registries.iter().filter_map(|url| port_of(url)));
        upstream_ports.sort_unstable();
        upstream_ports.dedup();
        if upstream_ports.len() > MOST_PORTS {
            return Err(usage(format!(
                "--upstream-ports: with those of the mirrored registries more than {MOST_PORTS}"
            )));
        }
        // An empty variable is none.
        let addresses = self.node_ip.iter().map(|text| text.trim()).filter(|text| !text.is_empty());
        let parsed = addresses.map(|text| text.parse().map_err(|_| usage(format!("--node-ip {text}: not an address"))));
        let node_addresses = parsed.collect::<Result<Vec<IpAddr>, _>>()?;
        Ok(Settings {
            mode: match self.ebpf {
                EbpfMode::Auto => Mode::Auto,
                EbpfMode::On => Mode::On,
                EbpfMode::Off => Mode::Off,
            },
            registry_port: registry.port(),
            router_port,
            containerd_cgroup: self.containerd_cgroup.clone().filter(|path| !path.as_os_str().is_empty()),
            containerd_socket: containerd_sock.map(Path::to_path_buf),
            node_addresses,
            upstream_ports,
            peers_on_loopback: matches!(registry, ListenAddr::One(addr) if addr.ip().is_loopback()),
        })
    }
}

/// Room in the kernel's map, with one for the registry itself.
const MOST_PORTS: usize = 63;

/// The port in `scheme://host[:port]`, if it has one.
fn port_of(url: &str) -> Option<u16> {
    let host = url.split_once("://").map_or(url, |(_, host)| host);
    host.rsplit_once(':').filter(|(host, _)| !host.ends_with(':')).and_then(|(_, port)| port.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_port_is_its_last_part() {
        assert_eq!(port_of("https://registry.test:5443"), Some(5443));
        assert_eq!(port_of("https://[fd00::1]:5443"), Some(5443));
        for none in ["https://registry.test", "https://[fd00::1]", "*", "_default"] {
            assert_eq!(port_of(none), None, "{none}");
        }
    }

    #[test]
    fn the_nodes_addresses_are_addresses_and_an_empty_variable_is_none() {
        let args = |texts: &[&str]| EbpfArgs {
            ebpf: EbpfMode::Auto,
            containerd_cgroup: None,
            node_ip: texts.iter().map(|text| (*text).to_owned()).collect(),
            upstream_ports: vec!["443".to_owned()],
        };
        let addresses = |texts: &[&str]| {
            let settings = args(texts).settings(&[], None, ListenAddr::Any(5000), 5001);
            settings.map(|settings| settings.node_addresses.iter().map(ToString::to_string).collect::<Vec<_>>()).ok()
        };
        assert_eq!(addresses(&["10.0.0.1", " fd00::1"]), Some(vec!["10.0.0.1".to_owned(), "fd00::1".to_owned()]));
        assert_eq!(addresses(&[""]), Some(vec![]));
        assert_eq!(addresses(&["node-1"]), None);
    }
}
