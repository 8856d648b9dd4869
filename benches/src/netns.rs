//! Nodes as network namespaces: a switch, which is a bridge in a namespace of its own, and a namespace for each node.
//!
//! The machine's own namespace gets one interface into the switch, so that a test reaches every node's addresses. Nothing
//! leads out of the lab: an address that nobody has there is unreachable at once. Names carry the process's number, and what a
//! process left behind that no longer lives is removed by the next lab.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result, bail};

use crate::daemon::{find_program, output};

/// The names of namespaces and interfaces start so, then come the process's number and a letter for the lab.
const PREFIX: &str = "sp";

/// Labs take a /24 each of this /16.
const NETWORK: [u8; 2] = [10, 77];

static NEXT: AtomicU8 = AtomicU8::new(0);

/// Labs of one process are set up one after the other, so that two do not choose the same network.
static SETUP: Mutex<()> = Mutex::new(());

/// A switch with nodes on it, removed when dropped.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    network: u8,
    nodes: Vec<Node>,
}

/// One node: a network namespace with an address.
#[derive(Clone, Debug)]
pub struct Node {
    namespace: String,
    port: String,
    address: Ipv4Addr,
}

// === impl Lab ===

impl Lab {
    /// Whether this machine can have labs.
    ///
    /// # Errors
    /// The reason why not, as a sentence to print beside a skipped test.
    pub fn available() -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err("network namespaces need root".into());
        }
        for program in ["ip", "setpriv"] {
            if find_program(program).is_none() {
                return Err(format!("the program '{program}' is not installed"));
            }
        }
        let probe = format!("{PREFIX}{}-probe", std::process::id());
        let _serial = SETUP.lock();
        let made = ip(&["netns", "add", &probe]).and_then(|()| ip(&["-n", &probe, "link", "set", "lo", "up"]));
        let _ = ip(&["netns", "del", &probe]);
        made.map_err(|error| format!("this machine cannot make network namespaces: {error:#}"))
    }

    /// Makes a switch without nodes.
    ///
    /// # Errors
    /// What `ip` says, or no /24 of 10.77.0.0/16 is free.
    pub fn new() -> Result<Self> {
        let _serial = SETUP.lock();
        remove_stale()?;
        let letter = char::from(b'a' + NEXT.fetch_add(1, Ordering::Relaxed) % 26);
        let prefix = format!("{PREFIX}{}{letter}", std::process::id());
        let lab = Self { network: free_network()?, prefix, nodes: Vec::new() };
        let switch = lab.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "bridge", "up"])?;
        let own = std::process::id().to_string();
        ip(&["-n", &switch, "link", "add", "host", "type", "veth", "peer", "name", &lab.prefix, "netns", &own])?;
        ip(&["-n", &switch, "link", "set", "host", "master", "bridge", "up"])?;
        ip(&["address", "add", &format!("{}/24", lab.address(1)), "dev", &lab.prefix])?;
        ip(&["link", "set", &lab.prefix, "up"])?;
        Ok(lab)
    }

    /// Adds a node. Addresses count up from `.2`.
    ///
    /// # Errors
    /// What `ip` says, or the network is full.
    pub fn add_node(&mut self) -> Result<Node> {
        let number =
            u8::try_from(self.nodes.len() + 1).ok().filter(|n| *n < 250).context("a lab has at most 249 nodes")?;
        let node = Node {
            namespace: format!("{}-n{number}", self.prefix),
            port: format!("n{number}"),
            address: self.address(number + 1),
        };
        // Known before it is made, so that half a node is removed too.
        self.nodes.push(node.clone());
        let switch = self.switch();
        let namespace = node.namespace.as_str();
        ip(&["netns", "add", namespace])?;
        ip(&["-n", namespace, "link", "set", "lo", "up"])?;
        ip(&["-n", &switch, "link", "add", &node.port, "type", "veth", "peer", "name", "eth0", "netns", namespace])?;
        ip(&["-n", &switch, "link", "set", &node.port, "master", "bridge", "up"])?;
        ip(&["-n", namespace, "address", "add", &format!("{}/24", node.address), "dev", "eth0"])?;
        ip(&["-n", namespace, "link", "set", "eth0", "up"])?;
        Ok(node)
    }

    /// Limits what a node sends and receives, in Mbit/s, with a token bucket on both ends of its link.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn limit(&self, node: &Node, mbit: u32) -> Result<()> {
        self.limit_upload(node, mbit)?;
        bucket(&self.switch(), &node.port, mbit)
    }

    /// Limits what a node sends only.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn limit_upload(&self, node: &Node, mbit: u32) -> Result<()> {
        bucket(&node.namespace, "eth0", mbit)
    }

    /// Takes the limits of [`Lab::limit`] back.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn unlimit(&self, node: &Node) -> Result<()> {
        for (namespace, device) in [(node.namespace.as_str(), "eth0"), (self.switch().as_str(), node.port.as_str())] {
            output(Command::new("tc").args(["-n", namespace, "qdisc", "del", "dev", device, "root"]))?;
        }
        Ok(())
    }

    /// Takes a node off the switch, or puts it back: its link stays up at the node, as when a cable fails beyond it.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn set_connected(&self, node: &Node, connected: bool) -> Result<()> {
        ip(&["-n", &self.switch(), "link", "set", &node.port, if connected { "up" } else { "down" }])
    }

    /// The address of the machine's own namespace in the lab.
    pub fn host_address(&self) -> Ipv4Addr {
        self.address(1)
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.prefix)
    }

    fn address(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(NETWORK[0], NETWORK[1], self.network, host)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = ip(&["netns", "del", &node.namespace]);
        }
        let _ = ip(&["link", "del", &self.prefix]);
        let _ = ip(&["netns", "del", &self.switch()]);
    }
}

/// A token bucket on what leaves by a device.
fn bucket(namespace: &str, device: &str, mbit: u32) -> Result<()> {
    let rate = format!("{mbit}mbit");
    let arguments = ["-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", &rate];
    output(Command::new("tc").args(arguments).args(["burst", "256kb", "latency", "50ms"])).map(|_| ())
}

// === impl Node ===

impl Node {
    /// The node's only address but loopback.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The namespace's name, for `ip netns exec`.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Runs `ip` in the node.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        let mut full = vec!["-n", self.namespace.as_str()];
        full.extend(arguments);
        ip(&full)
    }

    /// Changes the node's firewall.
    ///
    /// # Errors
    /// nft is not installed, or what it says.
    pub fn nft(&self, rules: &str) -> Result<()> {
        let program = find_program("nft").context("nft is not installed (Debian package nftables)")?;
        output(self.command(&program.display().to_string()).arg(rules)).map(|_| ())
    }

    /// A command that runs in the node.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    output(Command::new("ip").args(arguments)).map(|_| ())
}

fn free_network() -> Result<u8> {
    let taken = output(Command::new("ip").args(["-4", "-o", "address", "show"]))?;
    let routes = output(Command::new("ip").args(["-4", "route", "show"]))?;
    let start = std::process::id().to_le_bytes()[0];
    for offset in 0..=u8::MAX {
        let network = start.wrapping_add(offset);
        let text = format!("{}.{}.{network}.", NETWORK[0], NETWORK[1]);
        if !taken.contains(&text) && !routes.contains(&text) {
            return Ok(network);
        }
    }
    bail!("every /24 of {}.{}.0.0/16 is in use", NETWORK[0], NETWORK[1]);
}

/// Removes the namespaces of labs whose process is gone; their interfaces go with them.
fn remove_stale() -> Result<()> {
    for line in output(Command::new("ip").args(["netns", "list"]))?.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        if let Some(pid) = owner(name)
            && !Path::new("/proc").join(pid.to_string()).exists()
        {
            // Another process may be removing it too.
            let _ = ip(&["netns", "del", name]);
        }
    }
    Ok(())
}

/// The process that made a namespace, if the name is one of ours: `sp`, digits, perhaps a letter, a dash.
fn owner(namespace: &str) -> Option<u32> {
    let (lab, _) = namespace.strip_prefix(PREFIX)?.split_once('-')?;
    lab.trim_end_matches(|c: char| c.is_ascii_lowercase()).parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_our_names_have_an_owner() {
        assert_eq!(owner("sp4194304a-n12"), Some(4_194_304));
        assert_eq!(owner("sp17-probe"), Some(17));
        for other in ["kc-node1", "sp-n1", "spegel-1", "sp12a", "special-5"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn nodes_reach_each_other_and_are_removed() {
        if let Err(reason) = Lab::available() {
            println!("skipped: {reason}");
            return;
        }
        let mut lab = Lab::new().unwrap();
        let (a, b) = (lab.add_node().unwrap(), lab.add_node().unwrap());
        let listener = std::net::TcpListener::bind((lab.address(1), 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let script = format!("exec 3<>/dev/tcp/{}/{port}; echo from-b >&3", lab.address(1));
        output(b.command("bash").args(["-c", &script])).unwrap();
        let (_, from) = listener.accept().unwrap();
        assert_eq!(from.ip(), b.address());
        lab.limit(&a, 100).unwrap();
        let names = [a.namespace().to_owned(), b.namespace().to_owned(), lab.switch()];
        drop(lab);
        let left = output(Command::new("ip").args(["netns", "list"])).unwrap();
        assert!(names.iter().all(|name| !left.contains(name)), "{left}");
    }
}
