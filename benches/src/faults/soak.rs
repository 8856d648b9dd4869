//! Pulls of random images by three nodes while faults come and go at random.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::process::Signal;
use serde::Serialize;

use super::upsets::{TABLE, heal};
use super::{Action, Fault, Injector, make_empty_layout, rows};
use crate::containerd::{Containerd, Options, Version, check_content};
use crate::image::{Compression, Image, ImageBuilder, host_platform};
use crate::netns::{Lab, Node};
use crate::registry::Registry;
use crate::spegel::{Ports, Settings, Source, Spegel, configure};

/// Nodes that pull.
const NODES: usize = 3;
/// Images that they pull.
const IMAGES: u64 = 8;
/// How long a pull may take before it counts as one that hangs.
const LIMIT: Duration = Duration::from_secs(120);
/// How often memory is looked at.
const SAMPLE: Duration = Duration::from_secs(5);

/// How a soak is made.
#[derive(Clone, Debug)]
pub struct Soak {
    /// The program under test.
    pub program: PathBuf,
    /// Which containerd pulls.
    pub version: Version,
    /// Its options.
    pub options: Options,
    /// What decides all that is random.
    pub seed: u64,
    /// For how long.
    pub time: Duration,
    /// Further arguments for every spegel.
    pub arguments: Vec<String>,
}

/// What became of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Soaked {
    /// Pulls that succeeded, with every digest checked.
    pub pulls: usize,
    /// Why others failed.
    pub failures: Vec<String>,
    /// The longest pull, in seconds.
    pub longest_seconds: f64,
    /// Faults that were set, one after the other.
    pub faults: Vec<String>,
    /// Requests that met one at the peer that speaks badly.
    pub met: usize,
    /// Bytes of layers that upstream sent.
    pub upstream_bytes: u64,
    /// Resident memory of the first node's mirror in KiB, and its descriptors, every few seconds.
    pub samples: Vec<(u64, usize)>,
}

/// One node that pulls.
struct Member {
    containerd: Containerd,
    spegel: Spegel,
}

/// Numbers that a seed decides ([SplitMix64](https://prng.di.unimi.it/splitmix64.c)).
struct Random(u64);

// === impl Random ===

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

// === impl Soak ===

impl Soak {
    /// Pulls until the time is over.
    ///
    /// # Errors
    /// What this machine lacks, or does not start.
    pub fn run(&self) -> Result<Soaked> {
        Lab::available().and(Registry::available()).map_err(|reason| anyhow!(reason))?;
        let binaries = self.version.find().map_err(|reason| anyhow!(reason))?;
        let folder = tempfile::Builder::new().prefix("spegel-soak-").tempdir()?;
        let mut lab = Lab::new()?;
        let upstream = Registry::start(&lab.add_node()?)?;
        let images = self.images(&upstream, &folder.path().join("images"))?;
        let bad_node = lab.add_node()?;
        let nodes: Vec<Node> = (0..NODES).map(|_| lab.add_node()).collect::<Result<_>>()?;
        let peers: Vec<_> = nodes.iter().chain([&bad_node]).map(|node| node.address().into()).collect();
        let layout = folder.path().join("layout");
        make_empty_layout(&layout)?;
        for image in &images {
            image.write_layout(&layout)?;
        }
        let bad = Settings {
            program: self.program.clone(),
            node: Some(bad_node.clone()),
            address: bad_node.address().into(),
            ports: Ports { registry: super::ASIDE, ..Ports::default() },
            source: Source::Layout(layout),
            peers: peers.clone(),
            arguments: self.arguments.clone(),
            log: folder.path().join("bad.log"),
        };
        let bad = bad.spawn()?;
        let injector = Injector::start(&bad_node, 5000, &images)?;
        let mut members = Vec::new();
        for (number, node) in nodes.iter().enumerate() {
            let containerd = Containerd::start(&binaries, node, &self.options)?;
            let log = folder.path().join(format!("node{number}.log"));
            let mut settings = Settings::on_node(&self.program, &containerd, &peers, &log);
            settings.arguments = self.arguments.clone();
            let mut spegel = settings.spawn()?;
            spegel.wait_ready(Duration::from_secs(30))?;
            let name = node.address().to_string();
            configure(&self.program, &containerd.certs_dir(), &spegel.url(), &[&upstream.url()], &name)?;
            members.push(Member { containerd, spegel });
        }
        let mut soaked = self.pull_all(&members, &images, &injector, &bad, &bad_node)?;
        soaked.upstream_bytes = upstream.bytes_sent("/blobs/");
        Ok(soaked)
    }

    /// Images of one to four layers of half a MiB to eight MiB, some of which share layers.
    fn images(&self, upstream: &Registry, folder: &std::path::Path) -> Result<Vec<Image>> {
        let mut random = Random(self.seed);
        let mut images = Vec::new();
        for number in 0..IMAGES {
            let mut builder = ImageBuilder::new(format!("{}/soak{number}:1", upstream.host()));
            for _ in 0..=random.below(4) {
                let size = (512 << 10) + random.below(15) * (512 << 10);
                builder = builder.layers(1, size, Compression::None, 100 + random.below(6));
            }
            let image = builder.build(folder)?;
            image.push(&upstream.url())?;
            images.push(image);
        }
        Ok(images)
    }

    fn pull_all(
        &self,
        members: &[Member],
        images: &[Image],
        injector: &Injector,
        bad: &Spegel,
        bad_node: &Node,
    ) -> Result<Soaked> {
        let soaked = Mutex::new(Soaked::default());
        let end = Instant::now() + self.time;
        std::thread::scope(|scope| {
            for (number, member) in members.iter().enumerate() {
                let (soaked, mut random) = (&soaked, Random(self.seed.wrapping_add(1 + number as u64)));
                scope.spawn(move || {
                    while Instant::now() < end {
                        let chosen = random.below(images.len() as u64);
                        member.pull(&images[usize::try_from(chosen).unwrap_or_default()], soaked);
                    }
                });
            }
            let mut weather =
                Weather { injector, bad, bad_node, random: Random(self.seed ^ 0xfa01), names: Vec::new(), met: 0 };
            let faults = scope.spawn(move || weather.change_until(end).map(|()| (weather.names, weather.met)));
            while Instant::now() < end {
                std::thread::sleep(SAMPLE.min(end.saturating_duration_since(Instant::now())));
                let sample = sample(members[0].spegel.daemon.pid())?;
                lock(&soaked).samples.push(sample);
            }
            let (names, met) = faults.join().map_err(|_| anyhow!("the faults' thread panicked"))??;
            let mut soaked = lock(&soaked);
            (soaked.faults, soaked.met) = (names, met);
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(soaked.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

fn lock(soaked: &Mutex<Soaked>) -> std::sync::MutexGuard<'_, Soaked> {
    soaked.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Resident memory in KiB, and open descriptors.
fn sample(pid: u32) -> Result<(u64, usize)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the first node's mirror has ended")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    let kib = line.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
    Ok((kib, std::fs::read_dir(format!("/proc/{pid}/fd"))?.count()))
}

// === impl Member ===

impl Member {
    /// Pulls, checks every digest, and removes it again, so that it must be pulled anew.
    fn pull(&self, image: &Image, soaked: &Mutex<Soaked>) {
        let start = Instant::now();
        let pulled = self.containerd.pull_within(image.reference(), LIMIT).and_then(|()| {
            let needed = image.contents_for(host_platform()).map(|content| content.digest.as_str());
            check_content(&self.containerd, needed)
        });
        let took = start.elapsed().as_secs_f64();
        let removed = self.containerd.remove_with_aliases(image.reference());
        let mut soaked = lock(soaked);
        soaked.longest_seconds = soaked.longest_seconds.max(took);
        match pulled.and(removed) {
            Ok(()) => soaked.pulls += 1,
            Err(error) => {
                let node = self.containerd.node().address();
                soaked.failures.push(format!("{} on {node} after {took:.1} s: {error:#}", image.reference()));
            }
        }
    }
}

/// What goes wrong at the fourth node, one thing after the other.
struct Weather<'a> {
    injector: &'a Injector,
    bad: &'a Spegel,
    bad_node: &'a Node,
    random: Random,
    names: Vec<String>,
    met: usize,
}

// === impl Weather ===

impl Weather<'_> {
    fn change_until(&mut self, end: Instant) -> Result<()> {
        // Wrong bytes may fail a pull, which is another matter.
        let answers: Vec<(String, Fault)> = rows()
            .into_iter()
            .filter_map(|row| match row.action {
                Action::Answer(fault) if fault != Fault::WrongBytes => Some((row.name, fault)),
                _ => None,
            })
            .collect();
        while Instant::now() < end {
            let time = Duration::from_millis(500 + self.random.below(4000));
            match self.random.below(12) {
                0 => self.without_packets("deaf node", "in drop", time)?,
                1 => self.without_packets("30 % of the packets lost", "in numgen random mod 100 < 30 drop", time)?,
                2 => self.without_packets("MTU black hole", "out ip length > 1000 drop", time)?,
                3 => self.stopped(time)?,
                _ => {
                    let chosen = usize::try_from(self.random.below(answers.len() as u64)).unwrap_or_default();
                    let (name, fault) = &answers[chosen];
                    self.names.push(name.clone());
                    self.injector.set(fault.clone());
                    std::thread::sleep(time);
                    self.met += self.injector.hits();
                }
            }
        }
        self.injector.set(Fault::None);
        Ok(())
    }

    /// The node's network loses what the rule says for a while.
    fn without_packets(&mut self, name: &str, rule: &str, time: Duration) -> Result<()> {
        self.names.push(name.into());
        self.bad_node.nft(&format!("{TABLE} add rule inet fault {rule}"))?;
        std::thread::sleep(time);
        heal(self.bad_node)
    }

    /// The node's router is stopped for a while.
    fn stopped(&mut self, time: Duration) -> Result<()> {
        self.names.push("router stopped".into());
        self.bad.daemon.signal(Signal::STOP)?;
        std::thread::sleep(time);
        self.bad.daemon.signal(Signal::CONT)
    }
}
