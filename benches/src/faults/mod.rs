//! What a fault does to a pull: a containerd with its mirror, two peers and an upstream, each on a node of its own, and one of the
//! peers, or something else, is made to fail.

mod injector;
mod rows;
mod soak;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::Signal;
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::containerd::{Containerd, Options, Version, check_content};
use crate::daemon::{output, wait_until};
use crate::image::{Compression, Image, ImageBuilder, host_platform};
use crate::netns::{Lab, Node};
use crate::registry::Registry;
use crate::spegel::{Ports, Settings, Source, Spegel, configure};

pub use injector::{Ending, Fault, Injector, Place};
pub use rows::{Action, Midway, Row, Upset, rows};
pub use soak::{Soak, Soaked};

/// How long a pull may take before it counts as one that hangs.
const LIMIT: Duration = Duration::from_secs(100);

/// How long a pull that failed is tried again, as the kubelet does.
const RETRIED: Duration = Duration::from_secs(40);

/// How often a row is tried until its fault was met: which peer is asked first is left to chance.
const TRIES: usize = 6;

/// The content that the failing peer's own process serves: its own copy, which a row may damage.
const BAD_LAYOUT: &str = "layout-of-the-bad-peer";

/// What the client's link carries while something happens in the middle of a body, in Mbit/s.
const SLOW_LINK: u32 = 100;

/// How a run is made.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The program under test.
    pub program: PathBuf,
    /// Which containerd pulls.
    pub version: Version,
    /// Its options.
    pub options: Options,
    /// The size of each of the image's three layers, in bytes.
    pub layer: u64,
    /// Whether a second peer has the image and is well.
    pub company: bool,
    /// What the upstream registry's link carries, in Mbit/s.
    pub upstream_mbit: u32,
    /// Further arguments for every spegel.
    pub arguments: Vec<String>,
}

/// What became of a pull.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Which part of the table.
    pub group: &'static str,
    /// What fails.
    pub name: String,
    /// Whether the fault was met at all.
    pub met: bool,
    /// Why the pull failed, if it did.
    pub failed: Option<String>,
    /// Why it failed to the last, where it was tried again.
    pub failed_again: Option<String>,
    /// How many pulls it took.
    pub pulls: usize,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// How much longer than without a mirror the slower link of this row alone makes it, in seconds.
    pub link_seconds: f64,
    /// Bytes of layers that upstream sent.
    pub upstream_bytes: u64,
    /// Bytes that the mirror sent, by the peer that they are from.
    pub mirror_bytes: BTreeMap<String, u64>,
    /// Lines of the mirror's log above INFO, and those that say who failed.
    pub log: Vec<String>,
    /// The mirror's figures of peers and relays that are not zero.
    pub metrics: BTreeMap<String, f64>,
    /// Open descriptors of the mirror before the pull and a moment after it.
    pub descriptors: (usize, usize),
}

/// The nodes of a run. What is declared first ends first.
pub struct Scene {
    injector: Option<Injector>,
    client: Option<Spegel>,
    /// The peer that fails.
    bad: Option<Spegel>,
    /// The peer that is well.
    good: Spegel,
    containerd: Containerd,
    upstream: Registry,
    image: Image,
    nodes: Nodes,
    setup: Setup,
    lab: Lab,
    folder: TempDir,
}

struct Nodes {
    client: Node,
    bad: Node,
    good: Node,
}

/// The port of a peer's own registry while the injector has the one that others know.
const ASIDE: u16 = 5999;

// === impl Scene ===

impl Scene {
    /// Makes the nodes and the image.
    ///
    /// # Errors
    /// What this machine lacks, or does not start.
    pub fn start(setup: &Setup) -> Result<Self> {
        Lab::available().and(Registry::available()).map_err(|reason| anyhow!(reason))?;
        let binaries = setup.version.find().map_err(|reason| anyhow!(reason))?;
        let folder = tempfile::Builder::new().prefix("spegel-faults-").tempdir()?;
        let mut lab = Lab::new()?;
        let upstream = Registry::start(&lab.add_node()?)?;
        let nodes = Nodes { client: lab.add_node()?, bad: lab.add_node()?, good: lab.add_node()? };
        let containerd = Containerd::start(&binaries, &nodes.client, &setup.options)?;
        let image = ImageBuilder::new(format!("{}/faults:1", upstream.host()))
            .layers(3, setup.layer, Compression::None, 11)
            .build(&folder.path().join("image"))?;
        image.push(&upstream.url())?;
        image.write_layout(&folder.path().join("layout"))?;
        image.write_layout(&folder.path().join(BAD_LAYOUT))?;
        lab.limit(upstream.node(), setup.upstream_mbit)?;
        let settings = |node: &Node, layout: &str, registry: u16| Settings {
            program: setup.program.clone(),
            node: Some(node.clone()),
            address: node.address().into(),
            ports: Ports { registry, ..Ports::default() },
            source: Source::Layout(folder.path().join(layout)),
            peers: nodes.addresses(),
            arguments: setup.arguments.clone(),
            log: folder.path().join(format!("{}.log", node.address())),
        };
        let layout = if setup.company { "layout" } else { "empty" };
        if !setup.company {
            make_empty_layout(&folder.path().join(layout))?;
        }
        let good = settings(&nodes.good, layout, 5000).spawn()?;
        let bad = settings(&nodes.bad, BAD_LAYOUT, ASIDE).spawn()?;
        let injector = Some(Injector::start(&nodes.bad, 5000, std::slice::from_ref(&image))?);
        let setup = setup.clone();
        let mut scene = Self {
            injector,
            client: None,
            bad: Some(bad),
            good,
            containerd,
            upstream,
            image,
            nodes,
            setup,
            lab,
            folder,
        };
        scene.good.wait_ready(Duration::from_secs(30))?;
        if let Some(bad) = &mut scene.bad {
            bad.wait_ready(Duration::from_secs(30))?;
        }
        Ok(scene)
    }

    /// How long a pull takes without a mirror, in seconds: the median of three.
    ///
    /// # Errors
    /// A pull that fails.
    pub fn baseline(&mut self) -> Result<f64> {
        self.client = None;
        let certs = self.containerd.certs_dir();
        std::fs::remove_dir_all(&certs)?;
        std::fs::create_dir_all(&certs)?;
        let plain = certs.join(self.upstream.host());
        std::fs::create_dir_all(&plain)?;
        let url = self.upstream.url();
        std::fs::write(plain.join("hosts.toml"), format!("[host.'{url}']\ncapabilities = ['pull', 'resolve']\n"))?;
        let mut times = Vec::new();
        for _ in 0..3 {
            let start = Instant::now();
            self.containerd.pull_within(self.image.reference(), LIMIT)?;
            times.push(start.elapsed().as_secs_f64());
            self.containerd.remove_with_aliases(self.image.reference())?;
        }
        times.sort_by(f64::total_cmp);
        std::fs::remove_dir_all(&plain)?;
        Ok(times[1])
    }

    /// Pulls once with the row's fault in place; again, while the fault was not met.
    ///
    /// # Errors
    /// A scene that cannot be set; a pull that fails is an outcome.
    pub fn run(&mut self, row: &Row) -> Result<Outcome> {
        let mut outcome = self.run_once(row).with_context(|| row.name.clone())?;
        for _ in 1..TRIES {
            if outcome.met || outcome.failed.is_some() {
                break;
            }
            outcome = self.run_once(row).with_context(|| row.name.clone())?;
        }
        Ok(outcome)
    }

    fn run_once(&mut self, row: &Row) -> Result<Outcome> {
        self.restart_client(&row.arguments)?;
        self.set(row)?;
        let before = self.descriptors();
        let upstream_before = self.upstream.bytes_sent("/blobs/");
        let start = Instant::now();
        let pulled = match &row.action {
            Action::Midway(what) => self.pull_with(*what),
            _ => Ok((self.pull(), true)),
        };
        let seconds = start.elapsed().as_secs_f64();
        let met = match (&row.action, &pulled) {
            (Action::Answer(_), _) => self.injector.as_ref().is_some_and(|injector| injector.hits() > 0),
            (_, Ok((_, met))) => *met,
            (_, Err(_)) => false,
        };
        let (pulled, _) = pulled?;
        let upstream_bytes = self.upstream.bytes_sent("/blobs/") - upstream_before;
        let failed = pulled.and_then(|()| self.check()).err().map(|error| format!("{error:#}"));
        let (mut failed_again, mut pulls) = (failed.clone(), 1);
        let retried = Instant::now();
        while failed_again.is_some() && retried.elapsed() < RETRIED {
            // 2.2 may commit the same wrong bytes again without asking, for some 25 s.
            std::thread::sleep(Duration::from_secs(2));
            failed_again = self.pull().and_then(|()| self.check()).err().map(|error| format!("{error:#}"));
            pulls += 1;
        }
        std::thread::sleep(Duration::from_millis(300));
        let after = self.descriptors();
        self.unset(row)?;
        let (mirror_bytes, log) = self.read_log();
        let outcome = Outcome {
            group: row.group,
            name: row.name.clone(),
            met,
            failed,
            failed_again,
            pulls,
            seconds,
            link_seconds: match row.action {
                Action::Midway(_) => 3.0 * self.setup.layer as f64 * 8.0 / (f64::from(SLOW_LINK) * 1e6),
                _ => 0.0,
            },
            upstream_bytes,
            mirror_bytes,
            log,
            metrics: self.metrics(),
            descriptors: (before, after),
        };
        // A pull that failed has left no image.
        self.containerd.remove_with_aliases(self.image.reference()).ok();
        Ok(outcome)
    }

    fn pull(&self) -> Result<()> {
        self.containerd.pull_within(self.image.reference(), LIMIT)
    }

    /// Pulls, and does something as soon as the mirror has relayed a part of it; false if it never came to that.
    fn pull_with(&mut self, what: Midway) -> Result<(Result<()>, bool)> {
        let layers = self.bad_layers();
        let (containerd, image) = (&self.containerd, &self.image);
        let (client, bad, lab) = (self.client.as_mut(), self.bad.as_ref(), &self.lab);
        let client = client.context("no mirror runs")?;
        let bad_node = &self.nodes.bad;
        let enough = self.setup.layer as f64 / 4.0;
        std::thread::scope(|scope| {
            let pull = scope.spawn(|| containerd.pull_within(image.reference(), LIMIT));
            let relayed =
                |client: &Spegel| client.metric("spegel_serve_bytes_total", &["kind=\"relay\""]).unwrap_or(0.0);
            while relayed(client) < enough && !pull.is_finished() {
                std::thread::sleep(Duration::from_millis(5));
            }
            let met = !pull.is_finished();
            let signal = |peer: Option<&Spegel>, signal| peer.map_or(Ok(()), |peer| peer.daemon.signal(signal));
            match what {
                Midway::PeerKilled => signal(bad, Signal::KILL)?,
                Midway::PeerStopped => signal(bad, Signal::STOP)?,
                Midway::PeerTerminated => signal(bad, Signal::TERM)?,
                Midway::PeerUnplugged => lab.set_connected(bad_node, false)?,
                Midway::PeerUnpluggedAndBack => {
                    lab.set_connected(bad_node, false)?;
                    std::thread::sleep(Duration::from_secs(2));
                    lab.set_connected(bad_node, true)?;
                }
                Midway::ContentTruncated => damage(&layers, |file| file.set_len(file.metadata()?.len() / 8))?,
                Midway::ContentUnlinked => layers.iter().try_for_each(std::fs::remove_file)?,
                Midway::OwnTerminated => client.daemon.signal(Signal::TERM)?,
                Midway::OwnKilled => client.daemon.signal(Signal::KILL)?,
            }
            let pulled = pull.join().unwrap_or_else(|_| Err(anyhow!("the pull panicked")));
            Ok((pulled, met))
        })
    }

    /// The layers as the failing peer has them.
    fn bad_layers(&self) -> Vec<PathBuf> {
        let blobs = self.folder.path().join(BAD_LAYOUT).join("blobs");
        self.image.layers_for(host_platform()).map(|layer| blobs.join(layer.digest.replacen(':', "/", 1))).collect()
    }

    fn check(&self) -> Result<()> {
        let needed = self.image.contents_for(host_platform()).map(|content| content.digest.as_str());
        check_content(&self.containerd, needed)
    }

    /// A mirror that knows nobody's failures, and containerd's configuration for it.
    fn restart_client(&mut self, arguments: &[String]) -> Result<()> {
        if let Some(client) = self.client.take() {
            client.daemon.signal(Signal::KILL).ok();
        }
        let log = self.folder.path().join("client.log");
        std::fs::remove_file(&log).ok();
        let mut settings = Settings::on_node(&self.setup.program, &self.containerd, &self.nodes.addresses(), &log);
        settings.arguments = self.setup.arguments.clone();
        settings.arguments.extend(arguments.iter().cloned());
        let mut client = settings.spawn()?;
        client.wait_ready(Duration::from_secs(30))?;
        let name = client.settings().address.to_string();
        configure(&self.setup.program, &self.containerd.certs_dir(), &client.url(), &[&self.upstream.url()], &name)?;
        self.client = Some(client);
        self.wait_found()
    }

    /// Waits until the mirror finds the image's layers: a HEAD costs it a lookup, and the injector is well meanwhile.
    fn wait_found(&self) -> Result<()> {
        let client = self.client.as_ref().context("no mirror runs")?;
        let http = crate::http::Client::new(Duration::from_secs(3));
        wait_until(Duration::from_secs(30), "answer for each piece of content", || {
            self.image.contents_for(host_platform()).all(|content| {
                let kind = if content.media_type.contains(".manifest.") { "manifests" } else { "blobs" };
                let (url, name, ns) = (client.url(), self.image.repository(), self.image.registry());
                let url = format!("{url}/v2/{name}/{kind}/{}?ns={ns}", content.digest);
                http.head(&url, &[]).is_ok_and(|head| head.status == 200)
            })
        })
    }

    fn set(&mut self, row: &Row) -> Result<()> {
        match &row.action {
            Action::Answer(fault) => {
                if let Some(injector) = &self.injector {
                    injector.set(fault.clone());
                }
            }
            Action::Upset(upset) => upset.set(self)?,
            Action::Midway(_) => {
                self.lab.limit(&self.nodes.client, SLOW_LINK)?;
                self.swap_bad(true)?;
                self.wait_found()?;
            }
        }
        Ok(())
    }

    fn unset(&mut self, row: &Row) -> Result<()> {
        match &row.action {
            Action::Answer(_) => {
                if let Some(injector) = &self.injector {
                    injector.set(Fault::None);
                }
            }
            Action::Upset(upset) => upset.unset(self)?,
            Action::Midway(_) => {
                self.lab.set_connected(&self.nodes.bad, true)?;
                self.lab.unlimit(&self.nodes.client)?;
                for (layer, path) in self.image.layers_for(host_platform()).zip(self.bad_layers()) {
                    std::fs::copy(self.image.blob_path(&layer.digest), path)?;
                }
                self.swap_bad(false)?;
            }
        }
        Ok(())
    }

    /// Puts the failing peer's own registry in the injector's place, or back.
    fn swap_bad(&mut self, real: bool) -> Result<()> {
        let Some(bad) = self.bad.take() else { return Ok(()) };
        let mut settings = bad.settings().clone();
        // Stopped or killed, it must end at once.
        bad.daemon.signal(Signal::KILL).ok();
        drop(bad);
        self.injector = None;
        settings.ports.registry = if real { 5000 } else { ASIDE };
        if !real {
            wait_until(Duration::from_secs(10), "free port", || {
                self.injector = Injector::start(&self.nodes.bad, 5000, std::slice::from_ref(&self.image)).ok();
                self.injector.is_some()
            })?;
        }
        let mut bad = settings.spawn()?;
        bad.wait_ready(Duration::from_secs(30))?;
        self.bad = Some(bad);
        Ok(())
    }

    fn descriptors(&self) -> usize {
        let Some(client) = &self.client else { return 0 };
        std::fs::read_dir(format!("/proc/{}/fd", client.daemon.pid())).map_or(0, Iterator::count)
    }

    /// The bytes that the mirror sent by source, and the lines that matter.
    fn read_log(&self) -> (BTreeMap<String, u64>, Vec<String>) {
        let (mut bytes, mut lines) = (BTreeMap::new(), Vec::new());
        let log = self.client.as_ref().map(|client| client.daemon.log()).unwrap_or_default();
        for line in log.lines() {
            let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
            let text = |name: &str| value["fields"][name].as_str().or_else(|| value[name].as_str()).unwrap_or_default();
            let message = text("message");
            if message == "pull" && text("method") == "GET" {
                let sent = value["fields"]["bytes"].as_u64().or_else(|| value["bytes"].as_u64()).unwrap_or_default();
                *bytes.entry(self.name_of(text("source"))).or_default() += sent;
            } else if text("level") != "INFO" || message.contains("peer") {
                lines.push(format!("{} {message} {}", text("level"), text("error")));
            }
        }
        (bytes, lines)
    }

    fn name_of(&self, source: &str) -> String {
        let at = |node: &Node| source.starts_with(&format!("{}:", node.address()));
        match source {
            _ if at(&self.nodes.bad) => "bad peer".into(),
            _ if at(&self.nodes.good) => "good peer".into(),
            other => other.to_owned(),
        }
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        let Some(client) = &self.client else { return BTreeMap::new() };
        let http = crate::http::Client::new(Duration::from_secs(5));
        let text = http.get(&format!("{}/metrics", client.metrics_url()), &[]).map(|a| a.text()).unwrap_or_default();
        let interesting = ["spegel_peer_requests", "spegel_relay", "spegel_cut", "spegel_mirror_requests"];
        let samples = text.lines().filter(|line| interesting.iter().any(|name| line.starts_with(name)));
        samples
            .filter_map(|line| line.rsplit_once(' '))
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse::<f64>().ok()?)))
            .filter(|(_, value)| *value > 0.0)
            .collect()
    }
}

impl Nodes {
    fn addresses(&self) -> Vec<IpAddr> {
        [&self.client, &self.bad, &self.good].map(|node| node.address().into()).to_vec()
    }
}

fn damage(files: &[PathBuf], how: impl Fn(&std::fs::File) -> std::io::Result<()>) -> Result<()> {
    for file in files {
        how(&std::fs::File::options().write(true).open(file)?)?;
    }
    Ok(())
}

fn make_empty_layout(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder.join("blobs/sha256"))?;
    std::fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    Ok(std::fs::write(folder.join("index.json"), "{\"schemaVersion\":2,\"manifests\":[]}")?)
}

/// Runs nft in a node.
fn nft(node: &Node, rule: &str) -> Result<()> {
    let program = crate::daemon::find_program("nft").context("nft is not installed (Debian package nftables)")?;
    let mut command: Command = node.command(&program.display().to_string());
    output(command.arg(rule)).map(|_| ())
}

/// Fails where a row's tool is missing.
///
/// # Errors
/// What to install.
pub fn available() -> Result<()> {
    ensure!(crate::daemon::find_program("nft").is_some(), "nft is not installed (Debian package nftables)");
    Ok(())
}
