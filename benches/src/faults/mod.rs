//! What a fault does to a pull: a containerd with its mirror, two peers and an upstream, each on a node of its own, and one of the
//! peers, or something else, is made to fail.

mod disk;
mod injector;
mod limits;
mod midway;
mod observe;
mod rows;
mod soak;
mod upsets;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::containerd::{Containerd, Options, Version, check_content};
use crate::daemon::wait_until;
use crate::image::{Compression, Image, ImageBuilder, host_platform};
use crate::netns::{Lab, Node};
use crate::registry::Registry;
use crate::spegel::{Ports, Settings, Source, Spegel, configure};

pub use injector::{Ending, Fault, Injector, Place};
pub use rows::{Action, DiskFault, Midway, Row, Upset, rows};
pub use soak::{Soak, Soaked};

use midway::Tools;

/// How long a pull may take before it counts as one that hangs.
const LIMIT: Duration = Duration::from_secs(100);

/// How long a pull that failed is tried again, as the kubelet does.
const RETRIED: Duration = Duration::from_secs(40);

/// How often a row is tried until its fault was met: which peer is asked first is left to chance.
const TRIES: usize = 6;

/// The content that the failing peer's own process serves: its own copy, which a row may damage.
const BAD_LAYOUT: &str = "layout-of-the-bad-peer";

/// How long a mirror may take to be ready; one that finds nobody waits for half a minute.
const READY: Duration = Duration::from_secs(45);

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
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Outcome {
    /// Which part of the table.
    pub group: String,
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
    /// What else was seen.
    pub notes: Vec<String>,
    /// What should have healed once the fault had passed, and did not.
    pub unhealed: Option<String>,
}

impl Outcome {
    /// Of a row that could not be run.
    pub fn broken(row: &Row, error: &anyhow::Error) -> Self {
        Self {
            group: row.group.to_owned(),
            name: row.name.clone(),
            failed: Some(format!("{error:#}")),
            failed_again: Some(format!("{error:#}")),
            ..Self::default()
        }
    }
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

/// Where the good peer names its peers.
const BOOTSTRAP_PORT: u16 = 5002;

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
        let mut good = settings(&nodes.good, layout, 5000);
        let list = format!("{}:{BOOTSTRAP_PORT}", nodes.good.address());
        good.arguments.extend(["--http-bootstrap-addr".to_owned(), list]);
        let good = good.spawn()?;
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
        self.containerd.use_registry(&self.upstream.host(), &self.upstream.url())?;
        let mut times = Vec::new();
        for _ in 0..3 {
            let start = Instant::now();
            self.containerd.pull_within(self.image.reference(), LIMIT)?;
            times.push(start.elapsed().as_secs_f64());
            self.containerd.remove_with_aliases(self.image.reference())?;
        }
        times.sort_by(f64::total_cmp);
        std::fs::remove_dir_all(certs.join(self.upstream.host()))?;
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
        let mut tools = self.set(row)?;
        let before = self.descriptors();
        let upstream_before = self.upstream.bytes_sent("/blobs/");
        let start = Instant::now();
        let pulled = match &row.action {
            Action::Midway(what) => self.pull_with(*what, &mut tools),
            _ => Ok((self.pull(), true)),
        };
        let seconds = start.elapsed().as_secs_f64();
        let met = match (&row.action, &pulled) {
            (Action::Answer(_), _) => self.injector.as_ref().is_some_and(|injector| injector.hits() > 0),
            (Action::Upset(upset), _) => upset.is_met(self),
            (_, Ok((_, met))) => *met,
            (_, Err(_)) => false,
        };
        let (pulled, _) = pulled?;
        let upstream_bytes = self.upstream.bytes_sent("/blobs/") - upstream_before;
        let failed = pulled.and_then(|()| self.check()).err().map(|error| format!("{error:#}"));
        let (failed_again, pulls) = self.pull_again(failed.as_ref());
        if let Action::Midway(what) = row.action {
            self.heal(what, &mut tools)?;
        }
        std::thread::sleep(Duration::from_millis(300));
        let (after, (mirror_bytes, log), metrics) = (self.descriptors(), self.read_log(), self.metrics());
        let (notes, unhealed) = (std::mem::take(&mut tools.notes), tools.unhealed.take());
        self.unset(row, tools)?;
        let outcome = Outcome {
            group: row.group.to_owned(),
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
            metrics,
            descriptors: (before, after),
            notes,
            unhealed,
        };
        // A pull that failed has left no image.
        self.containerd.remove_with_aliases(self.image.reference()).ok();
        Ok(outcome)
    }

    /// Pulls until it succeeds or the time is over, where the first has failed: why the last failed too, if it did, and how many it took.
    fn pull_again(&self, failed: Option<&String>) -> (Option<String>, usize) {
        let (mut failed, mut pulls, start) = (failed.cloned(), 1, Instant::now());
        while failed.is_some() && start.elapsed() < RETRIED {
            // 2.2 may commit the same wrong bytes again without asking, for some 25 s.
            std::thread::sleep(Duration::from_secs(2));
            failed = self.pull().and_then(|()| self.check()).err().map(|error| format!("{error:#}"));
            pulls += 1;
        }
        (failed, pulls)
    }

    fn pull(&self) -> Result<()> {
        self.containerd.pull_within(self.image.reference(), LIMIT)
    }

    fn check(&self) -> Result<()> {
        let needed = self.image.contents_for(host_platform()).map(|content| content.digest.as_str());
        check_content(&self.containerd, needed)
    }

    /// A mirror that knows nobody's failures, and containerd's configuration for it.
    fn restart_client(&mut self, arguments: &[String]) -> Result<()> {
        self.restart_client_as(|settings| settings.arguments.extend(arguments.iter().cloned()))?;
        self.wait_found()
    }

    /// A mirror that is started otherwise than others.
    fn restart_client_as(&mut self, change: impl FnOnce(&mut Settings)) -> Result<()> {
        if let Some(client) = self.client.take() {
            client.daemon.signal(Signal::KILL).ok();
        }
        let log = self.folder.path().join("client.log");
        std::fs::remove_file(&log).ok();
        let mut settings = Settings::on_node(&self.setup.program, &self.containerd, &self.nodes.addresses(), &log);
        settings.arguments = self.setup.arguments.clone();
        change(&mut settings);
        let mut client = settings.spawn()?;
        client.wait_ready(READY)?;
        let name = client.settings().address.to_string();
        configure(&self.setup.program, &self.containerd.certs_dir(), &client.url(), &[&self.upstream.url()], &name)?;
        self.client = Some(client);
        Ok(())
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

    fn set(&mut self, row: &Row) -> Result<Tools> {
        match &row.action {
            Action::Answer(fault) => {
                if let Some(injector) = &self.injector {
                    injector.set(fault.clone());
                }
                Ok(Tools::default())
            }
            Action::Upset(upset) => upset.set(self).map(|()| Tools::default()),
            Action::Midway(what) => {
                let tools = self.prepare(*what)?;
                self.lab.limit(&self.nodes.client, SLOW_LINK)?;
                Ok(tools)
            }
        }
    }

    fn unset(&mut self, row: &Row, tools: Tools) -> Result<()> {
        match &row.action {
            Action::Answer(_) => {
                if let Some(injector) = &self.injector {
                    injector.set(Fault::None);
                }
                Ok(())
            }
            Action::Upset(upset) => upset.unset(self),
            Action::Midway(_) => {
                self.lab.unlimit(&self.nodes.client)?;
                self.clear(tools)
            }
        }
    }

    /// Puts the failing peer's own registry, run by this program, in the injector's place; or the injector back.
    fn swap_bad(&mut self, real: Option<PathBuf>) -> Result<()> {
        let Some(bad) = self.bad.take() else { return Ok(()) };
        let mut settings = bad.settings().clone();
        // Stopped or killed, it must end at once.
        bad.daemon.signal(Signal::KILL).ok();
        drop(bad);
        self.injector = None;
        settings.ports.registry = if real.is_some() { 5000 } else { ASIDE };
        if real.is_none() {
            wait_until(Duration::from_secs(10), "free port", || {
                self.injector = Injector::start(&self.nodes.bad, 5000, std::slice::from_ref(&self.image)).ok();
                self.injector.is_some()
            })?;
        }
        settings.program = real.unwrap_or_else(|| self.setup.program.clone());
        let mut bad = settings.spawn()?;
        bad.wait_ready(Duration::from_secs(30))?;
        self.bad = Some(bad);
        Ok(())
    }
}

impl Nodes {
    fn addresses(&self) -> Vec<IpAddr> {
        [&self.client, &self.bad, &self.good].map(|node| node.address().into()).to_vec()
    }
}

fn make_empty_layout(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder.join("blobs/sha256"))?;
    std::fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    Ok(std::fs::write(folder.join("index.json"), "{\"schemaVersion\":2,\"manifests\":[]}")?)
}
