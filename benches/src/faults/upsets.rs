//! What is broken before a pull, and mended after it.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::{BOOTSTRAP_PORT, Injector, Scene, Upset};
use crate::daemon::find_program;
use crate::netns::Node;
use crate::spegel::{Source, Spegel};

/// How many peers die.
const DEAD: u8 = 50;
/// The last number of the first one's address.
const FIRST_DEAD: u8 = 100;
/// How long their offers may take to be known.
const KNOWN: Duration = Duration::from_secs(3);

/// An address that nobody has, of a network for documentation.
const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// A table of rules with a chain for each way.
pub(super) const TABLE: &str = "add table inet fault; add chain inet fault in { type filter hook input priority 0; }; \
                     add chain inet fault out { type filter hook output priority 0; }; ";

/// Whether packets can be dropped.
///
/// # Errors
/// What to install.
pub(super) fn available() -> Result<(), String> {
    find_program("nft").map(|_| ()).ok_or_else(|| "nft is not installed (Debian package nftables)".to_owned())
}

/// Takes every rule of a node back.
pub(super) fn heal(node: &Node) -> Result<()> {
    node.nft("delete table inet fault")
}

/// The node neither hears the others nor is heard by them.
pub(super) fn part(node: &Node, others: &[&Node]) -> Result<()> {
    let rules = others.iter().map(|other| {
        let ip = other.address();
        format!("add rule inet fault in ip saddr {ip} drop; add rule inet fault out ip daddr {ip} drop; ")
    });
    node.nft(&format!("{TABLE}{}", rules.collect::<String>()))
}

// === impl Upset ===

impl Upset {
    pub(super) fn set(self, scene: &mut Scene) -> Result<()> {
        let (client, bad, good) = (&scene.nodes.client, &scene.nodes.bad, &scene.nodes.good);
        match self {
            Self::NoRoute => client.ip(&["route", "add", "unreachable", &format!("{}/32", bad.address())]),
            Self::SynDropped => bad.nft(&format!("{TABLE} add rule inet fault in tcp dport 5000 drop")),
            Self::Refused => {
                scene.injector = None;
                Ok(())
            }
            Self::OwnAddress => {
                let own = client.address().to_string();
                scene.restart_bad(&["--advertise-addr", &own])?;
                scene.wait_found()
            }
            Self::FiftyDead => fifty_die(scene),
            Self::Loss => bad.nft(&format!("{TABLE} add rule inet fault in numgen random mod 100 < 30 drop")),
            Self::MtuBlackHole => bad.nft(&format!("{TABLE} add rule inet fault out ip length > 1000 drop")),
            Self::Split => part(client, &[bad, good]),
            Self::ContainerdRestarted => scene.containerd.restart(),
            Self::SocketGone => {
                let alias = scene.folder.path().join("alias.sock");
                std::fs::remove_file(&alias).ok();
                std::fs::hard_link(scene.containerd.socket(), &alias)?;
                let source =
                    Source::Containerd { socket: alias.clone(), content: Some(scene.containerd.content_path()) };
                scene.restart_client_as(|settings| settings.source = source)?;
                scene.wait_found()?;
                std::fs::remove_file(&alias)?;
                scene.containerd.restart()
            }
            Self::DnsDown => Ok(()),
            Self::BootstrapGone => {
                scene.bootstrap_by_http()?;
                scene.wait_found()?;
                drop_bootstrap(scene)
            }
            Self::BootstrapNeverThere => {
                drop_bootstrap(scene)?;
                scene.bootstrap_by_http()
            }
        }
    }

    pub(super) fn unset(self, scene: &mut Scene) -> Result<()> {
        let (client, bad) = (&scene.nodes.client, &scene.nodes.bad);
        match self {
            Self::NoRoute => client.ip(&["route", "del", "unreachable", &format!("{}/32", bad.address())]),
            Self::SynDropped | Self::Loss | Self::MtuBlackHole => heal(bad),
            Self::Split => heal(client),
            Self::Refused => {
                scene.injector =
                    Some(Injector::start(bad, 5000, std::slice::from_ref(&scene.image)).context("back again")?);
                Ok(())
            }
            Self::OwnAddress => scene.restart_bad(&[]),
            Self::FiftyDead => {
                let addresses: Vec<_> = (0..DEAD).map(|n| dead_address(bad, n)).collect();
                addresses.iter().try_for_each(|ip| bad.ip(&["address", "del", &format!("{ip}/24"), "dev", "eth0"]))
            }
            Self::BootstrapGone | Self::BootstrapNeverThere => heal(&scene.nodes.good),
            Self::ContainerdRestarted | Self::SocketGone | Self::DnsDown => Ok(()),
        }
    }

    /// Whether the peers can be of no use to the pull, so that there is nothing for the fault to meet at them.
    pub(super) fn is_met(self, scene: &Scene) -> bool {
        let asked = |outcome: &str| {
            let labels = format!("outcome=\"{outcome}\"");
            let figure = |client: &Spegel| client.metric("spegel_peer_requests_total", &[&labels]).unwrap_or_default();
            scene.client.as_ref().map_or(0.0, figure)
        };
        match self {
            Self::OwnAddress => asked("refused") > 0.0,
            Self::FiftyDead => asked("unreachable") > 0.0,
            _ => true,
        }
    }
}

fn dead_address(node: &Node, number: u8) -> Ipv4Addr {
    let [a, b, c, _] = node.address().octets();
    Ipv4Addr::new(a, b, c, FIRST_DEAD + number)
}

/// Fifty more peers on the bad one's node say that they have the image, and die.
fn fifty_die(scene: &Scene) -> Result<()> {
    let bad = scene.bad.as_ref().context("the failing peer does not run")?.settings();
    let mut peers = Vec::new();
    for number in 0..DEAD {
        let ip = dead_address(&scene.nodes.bad, number);
        scene.nodes.bad.ip(&["address", "add", &format!("{ip}/24"), "dev", "eth0"])?;
        let mut settings = bad.clone();
        (settings.address, settings.ports.registry) = (ip.into(), 5000);
        settings.log = scene.folder.path().join("dead.log");
        settings.arguments.extend(["--advertise-addr".to_owned(), ip.to_string()]);
        peers.push(settings.spawn()?);
    }
    for peer in &mut peers {
        peer.wait_ready(Duration::from_secs(60))?;
    }
    std::thread::sleep(KNOWN);
    peers.iter().try_for_each(|peer| peer.daemon.signal(Signal::KILL))
}

/// What the good peer says of others is not heard any more.
fn drop_bootstrap(scene: &Scene) -> Result<()> {
    scene.nodes.good.nft(&format!("{TABLE} add rule inet fault in tcp dport {BOOTSTRAP_PORT} drop"))
}

// === impl Scene ===

impl Scene {
    /// Starts the client anew, with the good peer's list of peers as its only source.
    fn bootstrap_by_http(&mut self) -> Result<()> {
        let url = format!("http://{}:{BOOTSTRAP_PORT}/id", self.nodes.good.address());
        self.restart_client_as(|settings| {
            settings.peers = vec![NOBODY];
            let arguments = ["--bootstrap-kind", "http", "--http-bootstrap-url", &url];
            settings.arguments.extend(arguments.map(str::to_owned));
        })
    }

    fn restart_bad(&mut self, arguments: &[&str]) -> Result<()> {
        let Some(bad) = self.bad.take() else { return Ok(()) };
        let mut settings = bad.settings().clone();
        bad.daemon.signal(Signal::KILL).ok();
        drop(bad);
        settings.arguments = self.setup.arguments.clone();
        settings.arguments.extend(arguments.iter().map(|text| (*text).to_owned()));
        let mut bad = settings.spawn()?;
        bad.wait_ready(Duration::from_secs(30))?;
        self.bad = Some(bad);
        Ok(())
    }
}
