//! A storm with real containerds: nodes that are told at the same moment to pull an image that none has.
//!
//! Layers are not compressed and not unpacked, and links are slow, so that two cores are no limit; a run in which they were is void,
//! and says so.

mod links;
mod sample;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use rustix::process::Signal;
use serde::Serialize;

pub use sample::{Cores, NodeSample, Sample, Told};

use crate::containerd::{Binaries, Containerd, Options, Version, check_content};
use crate::daemon::output;
use crate::image::{Compression, Image, ImageBuilder, host_platform};
use crate::netns::{Lab, Node};
use crate::registry::Registry;
use crate::spegel::{Settings, Spegel, configure};

/// How long a pull may take before it counts as one that hangs.
const LIMIT: Duration = Duration::from_secs(300);
/// How often is looked at what each node has.
const PERIOD: Duration = Duration::from_millis(200);
/// The share of their time above which the cores were the limit.
pub const BUSY: f64 = 0.95;

/// Which node dies in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Victim {
    /// The one that receives most from upstream.
    Root,
    /// One that gives to others, and is no root.
    Inner,
}

/// A storm to be made.
#[derive(Clone, Debug)]
pub struct Storm {
    /// The mirror on each node; none: no mirror.
    pub program: Option<PathBuf>,
    /// Arguments for every mirror.
    pub arguments: Vec<String>,
    /// Other arguments for every second mirror.
    pub second_arguments: Option<Vec<String>>,
    /// Nodes that pull.
    pub nodes: usize,
    /// Layers of the image.
    pub layers: usize,
    /// Their bytes together.
    pub size: u64,
    /// What the upstream registry's link carries, in Mbit/s.
    pub upstream: u32,
    /// What each node's link carries, in Mbit/s.
    pub node: u32,
    /// The time over which the pulls start, evenly.
    pub stagger: Duration,
    /// The first node sends a tenth as fast as the others.
    pub slow_node: bool,
    /// Dies when half of the bytes are there.
    pub kill: Option<Victim>,
    /// So many nodes, the last ones, are refused by upstream.
    pub refuse: usize,
    /// The first node has the image before the others start.
    pub seeded: bool,
}

/// What became of a node's pull.
#[derive(Clone, Debug, Serialize)]
pub struct Pulled {
    /// The node's number.
    pub node: usize,
    /// When it began, in seconds from the storm's start.
    pub began: f64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Why it failed, or its content is wrong.
    pub failed: Option<String>,
    /// It was killed.
    pub killed: bool,
    /// Bytes of layers that upstream sent it.
    pub from_upstream: u64,
    /// Bytes of layers that it was sent by each other node, by that node's number.
    pub from_peers: Vec<(usize, u64)>,
    /// What its mirror's metrics say.
    pub told: Told,
}

/// What a storm came to.
#[derive(Clone, Debug, Serialize)]
pub struct Stormed {
    /// How long one pull takes without a mirror when nobody else pulls, in seconds.
    pub solo: f64,
    /// Each node's pull.
    pub pulls: Vec<Pulled>,
    /// Requests that upstream answered: manifests by GET, and blobs.
    pub upstream_requests: [usize; 2],
    /// Bytes of layers that upstream sent.
    pub upstream_bytes: u64,
    /// The image's bytes.
    pub size: u64,
    /// What each node had over time.
    pub samples: Vec<Sample>,
    /// The share of their time that the cores were busy.
    pub busy: f64,
}

/// One node.
struct Member {
    containerd: Containerd,
    spegel: Option<Spegel>,
}

// === impl Storm ===

impl Storm {
    /// Makes the storm. `tell` hears every fifth of a second what each node has.
    ///
    /// # Errors
    /// What this machine lacks, or does not start. A pull that fails is an outcome.
    pub fn run(&self, tell: &mut dyn FnMut(&Sample)) -> Result<Stormed> {
        Lab::available().and(Registry::available()).map_err(|reason| anyhow!(reason))?;
        let binaries = Version::V2_2.find().map_err(|reason| anyhow!(reason))?;
        let folder = tempfile::Builder::new().prefix("spegel-storm-").tempdir()?;
        let mut lab = Lab::new()?;
        let upstream = Registry::start(&add_node(&mut lab)?)?;
        let image = self.image(&upstream, &folder.path().join("image"))?;
        let nodes: Vec<Node> = (0..self.nodes).map(|_| add_node(&mut lab)).collect::<Result<_>>()?;
        let solo = self.solo(&binaries, &mut lab, &upstream, &image)?;
        let members = self.members(&binaries, &nodes, &upstream, folder.path())?;
        if self.seeded {
            self.fetch(&members[0], &image)?;
        }
        for (number, node) in nodes.iter().enumerate() {
            lab.limit(node, self.node)?;
            if self.slow_node && number == 0 {
                lab.limit_upload(node, (self.node / 10).max(1))?;
            }
        }
        lab.limit(upstream.node(), self.upstream)?;
        if self.refuse > 0 {
            let refused: Vec<_> = nodes.iter().rev().take(self.refuse).collect();
            links::refuse(upstream.node(), &refused)?;
        }
        self.let_loose(members, &nodes, &upstream, &image, solo, tell)
    }

    fn image(&self, upstream: &Registry, folder: &Path) -> Result<Image> {
        let image = ImageBuilder::new(format!("{}/storm/app:1", upstream.host()))
            .layers(self.layers, self.size / self.layers as u64, Compression::None, 9)
            .build(folder)?;
        image.push(&upstream.url())?;
        Ok(image)
    }

    /// One pull with the storm's links, without a mirror.
    fn solo(&self, binaries: &Binaries, lab: &mut Lab, upstream: &Registry, image: &Image) -> Result<f64> {
        let node = add_node(lab)?;
        let member = Member { containerd: Containerd::start(binaries, &node, &Options::default())?, spegel: None };
        member.containerd.use_registry(&upstream.host(), &upstream.url())?;
        lab.limit(&node, self.node)?;
        lab.limit(upstream.node(), self.upstream)?;
        let start = Instant::now();
        self.fetch(&member, image)?;
        let seconds = start.elapsed().as_secs_f64();
        lab.unlimit(upstream.node())?;
        Ok(seconds)
    }

    fn members(&self, binaries: &Binaries, nodes: &[Node], upstream: &Registry, folder: &Path) -> Result<Vec<Member>> {
        let peers: Vec<IpAddr> = nodes.iter().map(|node| node.address().into()).collect();
        let mut members = Vec::new();
        for (number, node) in nodes.iter().enumerate() {
            let containerd = Containerd::start(binaries, node, &Options::default())?;
            let spegel = match &self.program {
                None => containerd.use_registry(&upstream.host(), &upstream.url()).map(|()| None)?,
                Some(program) => {
                    let log = folder.join(format!("node{number}.log"));
                    let mut settings = Settings::on_node(program, &containerd, &peers, &log);
                    let second = self.second_arguments.as_ref().filter(|_| number % 2 == 1);
                    settings.arguments.clone_from(second.unwrap_or(&self.arguments));
                    Some(settings.spawn()?)
                }
            };
            members.push(Member { containerd, spegel });
        }
        for Member { containerd, spegel } in &mut members {
            if let (Some(spegel), Some(program)) = (spegel, &self.program) {
                spegel.wait_ready(Duration::from_secs(60))?;
                let name = spegel.settings().address.to_string();
                configure(program, &containerd.certs_dir(), &spegel.url(), &[&upstream.url()], &name)?;
            }
        }
        Ok(members)
    }

    /// Layers are fetched as a pull fetches them, and not unpacked.
    fn fetch(&self, member: &Member, image: &Image) -> Result<()> {
        member.containerd.fetch_within(image.reference(), LIMIT)
    }

    fn let_loose(
        &self,
        members: Vec<Member>,
        nodes: &[Node],
        upstream: &Registry,
        image: &Image,
        solo: f64,
        tell: &mut dyn FnMut(&Sample),
    ) -> Result<Stormed> {
        let before = (upstream.requests("GET", "/manifests/"), upstream.requests("GET", "/blobs/"));
        let bytes_before: Vec<u64> = nodes.iter().map(|node| upstream.sent(node, "/blobs/")).collect();
        let (cores, start) = (Cores::now()?, Instant::now());
        let first = usize::from(self.seeded);
        let killed = Mutex::new(None);
        let (done, finished) = channel::<()>();
        let mut samples: Vec<Sample> = Vec::new();
        let ended: Vec<(f64, f64, Option<String>)> = thread::scope(|scope| {
            let pulls: Vec<_> = members[first..]
                .iter()
                .enumerate()
                .map(|(number, member)| {
                    let done = done.clone();
                    let pause = self.stagger.mul_f64(number as f64 / (self.nodes - first).max(1) as f64);
                    scope.spawn(move || {
                        let _done = done;
                        thread::sleep(pause.saturating_sub(start.elapsed()));
                        let began = start.elapsed().as_secs_f64();
                        let failed = self.fetch(member, image).err().map(|error| format!("{error:#}"));
                        (began, start.elapsed().as_secs_f64() - began, failed)
                    })
                })
                .collect();
            drop(done);
            // Over when the last pull has let go of its end.
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = finished.recv_timeout(PERIOD) {
                let sample = sample::take(start.elapsed(), members.iter().map(|member| &member.containerd));
                tell(&sample);
                let had: u64 = sample.nodes.iter().map(|node| node.bytes).sum();
                samples.push(sample);
                let mut killed = killed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if let Some(victim) = self.kill.filter(|_| killed.is_none() && had > self.size * self.nodes as u64 / 2)
                {
                    *killed = links::find(victim, nodes, upstream.node());
                    if let Some(number) = *killed {
                        members[number].kill();
                    }
                }
            }
            pulls
                .into_iter()
                .map(|pull| pull.join().unwrap_or((0.0, 0.0, Some("the thread panicked".to_owned()))))
                .collect()
        });
        let busy = cores.busy_since()?;
        // What it logs of a request comes when that has ended.
        thread::sleep(Duration::from_millis(500));
        let killed = killed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        ensure!(self.kill.is_none() || killed.is_some(), "nobody was found to be killed");
        let mut pulls = Vec::new();
        for (number, (began, seconds, failed)) in (first..).zip(ended) {
            let member = &members[number];
            let killed = killed == Some(number);
            let failed = match failed {
                None if !killed => check(&member.containerd, image).err().map(|error| format!("{error:#}")),
                other => other,
            };
            let from_upstream = upstream.sent(&nodes[number], "/blobs/") - bytes_before[number];
            let from_peers = member.spegel.as_ref().map(|spegel| sample::peers(spegel, nodes)).unwrap_or_default();
            let told = member.spegel.as_ref().filter(|_| !killed).map(Told::of).unwrap_or_default();
            pulls.push(Pulled { node: number, began, seconds, failed, killed, from_upstream, from_peers, told });
        }
        Ok(Stormed {
            solo,
            upstream_bytes: pulls.iter().map(|pull| pull.from_upstream).sum(),
            pulls,
            upstream_requests: [
                upstream.requests("GET", "/manifests/") - before.0,
                upstream.requests("GET", "/blobs/") - before.1,
            ],
            size: self.size,
            samples,
            busy,
        })
    }
}

/// A node whose connections share a link fairly: under BBR those that are there first starve others for seconds.
fn add_node(lab: &mut Lab) -> Result<Node> {
    let node = lab.add_node()?;
    output(node.command("sysctl").args(["-q", "-w", "net.ipv4.tcp_congestion_control=reno"]))?;
    Ok(node)
}

impl Member {
    /// As when the machine loses its power.
    fn kill(&self) {
        if let Some(spegel) = &self.spegel {
            spegel.daemon.signal(Signal::KILL).ok();
        }
        self.containerd.signal(Signal::KILL).ok();
    }
}

// === impl Stormed ===

impl Stormed {
    /// Whether the cores, and no link, decided how long it took.
    #[must_use]
    pub fn is_void(&self) -> bool {
        self.busy > BUSY
    }

    /// What upstream sent, as a multiple of the image.
    #[must_use]
    pub fn upstream_share(&self) -> f64 {
        self.upstream_bytes as f64 / self.size as f64
    }

    /// When the last surviving node had it, from the storm's start, in seconds.
    #[must_use]
    pub fn last(&self) -> f64 {
        self.survivors().map(|pull| pull.began + pull.seconds).fold(0.0, f64::max)
    }

    /// The longest pull of a surviving node, in seconds.
    #[must_use]
    pub fn slowest(&self) -> f64 {
        self.survivors().map(|pull| pull.seconds).fold(0.0, f64::max)
    }

    /// How many nodes the bytes came through at the most, from upstream or who had them before on: as the mirrors' metrics say, or else as far as
    /// it can be told from who gave most to whom.
    #[must_use]
    pub fn depth(&self) -> usize {
        if self.pulls.iter().any(|pull| pull.told.is_there()) {
            return self.pulls.iter().map(|pull| pull.told.depth as usize).max().unwrap_or_default();
        }
        // The parent that gave most counts.
        let parent = |number: usize| {
            let pull = self.pulls.iter().find(|pull| pull.node == number)?;
            let (from, bytes) = pull.from_peers.iter().max_by_key(|(_, bytes)| *bytes)?;
            (*bytes > pull.from_upstream).then_some(*from)
        };
        let depth = |pull: &Pulled| {
            let above = std::iter::successors(Some(pull.node), |number| parent(*number));
            above.take(self.pulls.len() + 1).count() - 1
        };
        self.pulls.iter().map(depth).max().unwrap_or_default()
    }

    /// Why pulls failed.
    pub fn failures(&self) -> impl Iterator<Item = &str> {
        self.survivors().filter_map(|pull| pull.failed.as_deref())
    }

    fn survivors(&self) -> impl Iterator<Item = &Pulled> {
        self.pulls.iter().filter(|pull| !pull.killed)
    }
}

fn check(containerd: &Containerd, image: &Image) -> Result<()> {
    check_content(containerd, image.contents_for(host_platform()).map(|content| content.digest.as_str()))
}
