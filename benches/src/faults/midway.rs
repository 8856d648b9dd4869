//! What happens while a body is under way.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::process::Signal;

use super::disk::Disk;
use super::limits::{self, Crowd, Wedge};
use super::observe::{ready, wait_for};
use super::{BAD_LAYOUT, DiskFault, LIMIT, Midway, Nodes, Scene, upsets};
use crate::containerd::Containerd;
use crate::http::Client;
use crate::image::{Image, host_platform};
use crate::memory_group::{MemoryGroup, wrapper};
use crate::netns::Lab;
use crate::spegel::Spegel;

/// How often a supervisor asks whether the mirror lives, for how long it waits, and after how many failures it ends it.
const PROBE: Duration = Duration::from_secs(1);
const FAILURES: usize = 3;
/// How long the mirror is stopped and then goes on.
const STOPPED: Duration = Duration::from_secs(6);
/// How long a network is in two parts.
const PARTED: Duration = Duration::from_secs(3);
/// How many connections take all descriptors of a mirror that may have few, and how many clients are many.
const HOLDERS: usize = 400;
const MANY: usize = 10_000;
/// How long `/readyz` may be without an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many days the clock is off for the rest of the row.
const CLOCK: &str = "clock";

/// What a row has made for itself, beside the scene.
#[derive(Debug, Default)]
pub(super) struct Tools {
    disk: Option<Disk>,
    memory: Option<MemoryGroup>,
    crowd: Option<Crowd>,
    wedge: Option<Wedge>,
    /// The length of the failing peer's log before.
    logged: usize,
    /// What was seen that no other column tells.
    pub(super) notes: Vec<String>,
    /// What should have healed and did not.
    pub(super) unhealed: Option<String>,
}

/// What a fault can lay hands on while the pull is under way.
struct Stage<'a> {
    client: &'a Spegel,
    bad: Option<&'a Spegel>,
    lab: &'a Lab,
    nodes: &'a Nodes,
    layers: &'a [PathBuf],
    clock: PathBuf,
    tools: &'a mut Tools,
}

// === impl Scene ===

impl Scene {
    /// Makes what a row needs before its pull: the failing peer's own registry in place of the injector, and a slow link of the client.
    pub(super) fn prepare(&mut self, what: Midway) -> Result<Tools> {
        let mut tools = Tools::default();
        let program = self.setup.program.clone();
        let wrapped = self.folder.path().join("wrapped");
        let clock = self.folder.path().join(CLOCK);
        let before = match what {
            Midway::Clock(_) => {
                std::fs::write(&clock, "+0\n")?;
                let library = limits::faketime().map_err(|reason| anyhow!(reason))?;
                Some(limits::with_clock(&library, &clock))
            }
            Midway::Memory => {
                let group = MemoryGroup::new("client")?;
                let words = group.words();
                tools.memory = Some(group);
                Some(words)
            }
            _ => None,
        };
        if let Some(before) = before {
            let program = wrapper(&wrapped, &before, &program)?;
            self.restart_client_as(|settings| settings.program = program)?;
            self.wait_found()?;
        }
        let bad_program = match what {
            Midway::ContentForbidden => wrapper(&wrapped, limits::without_override(), &program)?,
            _ => program,
        };
        if let Midway::Disk(_) = what {
            let blobs = |layout: &str| self.folder.path().join(layout).join("blobs/sha256");
            tools.disk = Some(Disk::mount(&blobs("layout"), &blobs(BAD_LAYOUT))?);
        }
        self.swap_bad(Some(bad_program))?;
        self.wait_found()?;
        tools.logged = self.bad_log().len();
        if what == Midway::ContentForbidden {
            // What is open already stays readable.
            let nobody: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o000);
            self.bad_layers().iter().try_for_each(|path| std::fs::set_permissions(path, nobody.clone()))?;
        }
        Ok(tools)
    }

    /// Pulls, and does something as soon as the mirror has relayed a part of it; false if it never came to that.
    pub(super) fn pull_with(&mut self, what: Midway, tools: &mut Tools) -> Result<(Result<()>, bool)> {
        let layers = self.bad_layers();
        let (containerd, image) = (&self.containerd, &self.image);
        let client = self.client.as_ref().context("no mirror runs")?;
        let (bad, lab, nodes) = (self.bad.as_ref(), &self.lab, &self.nodes);
        let clock = self.folder.path().join(CLOCK);
        let stage = Stage { client, bad, lab, nodes, layers: &layers, clock, tools };
        pull_and(containerd, image, self.setup.layer, stage, what)
    }

    /// Takes back what can be, and looks whether the mirror is well again.
    pub(super) fn heal(&mut self, what: Midway, tools: &mut Tools) -> Result<()> {
        tools.crowd = None;
        tools.wedge = None;
        if let Some(memory) = &tools.memory {
            memory.widen()?;
        }
        if let Midway::Disk(_) | Midway::ContentTruncated | Midway::ContentForbidden = what {
            let log = self.bad_log();
            let since = log.get(tools.logged..).unwrap_or_default();
            let count = |words: &str| since.lines().filter(|line| line.contains(words)).count();
            let (withdrawn, unopened) = (count("content of this node is damaged"), count("cannot open content"));
            tools.notes.push(format!("the peer withdrew {withdrawn}, could not open {unopened} times"));
        }
        let Some(client) = &self.client else { return Ok(()) };
        if let Midway::Clock(_) = what {
            let log = client.daemon.log();
            let days =
                log.lines().filter_map(|line| line.split_once("\"timestamp\":\"")?.1.get(..10)).collect::<Vec<_>>();
            tools.notes.push(format!("its log goes from {:?} to {:?}", days.first(), days.last()));
        }
        match what {
            Midway::Memory | Midway::Descriptors | Midway::Crowd => match wait_for(client, 200) {
                Some(took) => tools.notes.push(format!("ready again {:.1} s after it passed", took.as_secs_f64())),
                None => tools.unhealed = Some(format!("/readyz: {:?}", ready(client))),
            },
            Midway::SplitAndHealed => {
                let start = Instant::now();
                self.wait_found()?;
                tools.notes.push(format!("all found again after {:.1} s", start.elapsed().as_secs_f64()));
            }
            _ => {}
        }
        Ok(())
    }

    /// Undoes [`Scene::prepare`].
    pub(super) fn clear(&mut self, tools: Tools) -> Result<()> {
        self.lab.set_connected(&self.nodes.bad, true)?;
        if let Some(disk) = &tools.disk {
            // A read that hangs would keep its process from ending.
            disk.set(DiskFault::None);
        }
        if let Some(bad) = &self.bad {
            bad.daemon.signal(Signal::KILL).ok();
        }
        drop(tools);
        for (layer, path) in self.image.layers_for(host_platform()).zip(self.bad_layers()) {
            std::fs::remove_file(&path).ok();
            std::fs::copy(self.image.blob_path(&layer.digest), path)?;
        }
        self.swap_bad(None)
    }

    fn bad_log(&self) -> String {
        self.bad.as_ref().map(|bad| bad.daemon.log()).unwrap_or_default()
    }

    /// The layers as the failing peer has them.
    fn bad_layers(&self) -> Vec<PathBuf> {
        let blobs = self.folder.path().join(BAD_LAYOUT).join("blobs");
        self.image.layers_for(host_platform()).map(|layer| blobs.join(layer.digest.replacen(':', "/", 1))).collect()
    }
}

fn pull_and(
    containerd: &Containerd,
    image: &Image,
    layer: u64,
    mut stage: Stage<'_>,
    what: Midway,
) -> Result<(Result<()>, bool)> {
    let enough = layer as f64 / 4.0;
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| containerd.pull_within(image.reference(), LIMIT));
        let relayed = |client: &Spegel| client.metric("spegel_serve_bytes_total", &["kind=\"relay\""]).unwrap_or(0.0);
        while relayed(stage.client) < enough && !pull.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let met = !pull.is_finished();
        stage.strike(what)?;
        let pulled = pull.join().unwrap_or_else(|_| Err(anyhow!("the pull panicked")));
        Ok((pulled, met))
    })
}

// === impl Stage ===

impl Stage<'_> {
    fn strike(&mut self, what: Midway) -> Result<()> {
        let (own, bad, bad_node) = (&self.client.daemon, self.bad, &self.nodes.bad);
        let to_bad = |signal| bad.map_or(Ok(()), |peer| peer.daemon.signal(signal));
        match what {
            Midway::PeerKilled => to_bad(Signal::KILL),
            Midway::PeerStopped => to_bad(Signal::STOP),
            Midway::PeerTerminated => to_bad(Signal::TERM),
            Midway::PeerUnplugged => self.lab.set_connected(bad_node, false),
            Midway::PeerUnpluggedAndBack => {
                self.lab.set_connected(bad_node, false)?;
                std::thread::sleep(Duration::from_secs(2));
                self.lab.set_connected(bad_node, true)
            }
            Midway::ContentTruncated => {
                let shorten = |file: std::fs::File| file.set_len(file.metadata()?.len() / 8);
                let open = |path| std::fs::File::options().write(true).open(path);
                Ok(self.layers.iter().try_for_each(|path| open(path).and_then(shorten))?)
            }
            Midway::ContentUnlinked => Ok(self.layers.iter().try_for_each(std::fs::remove_file)?),
            Midway::Disk(fault) => {
                self.tools.disk.as_ref().context("no disk")?.set(fault);
                Ok(())
            }
            Midway::ContentForbidden => Ok(()),
            Midway::OwnTerminated => own.signal(Signal::TERM),
            Midway::OwnKilled => own.signal(Signal::KILL),
            Midway::OwnStopped => self.stop_and_supervise(),
            Midway::OwnStoppedForAWhile => {
                own.signal(Signal::STOP)?;
                std::thread::sleep(STOPPED);
                own.signal(Signal::CONT)
            }
            Midway::OwnWedged => self.wedge(),
            Midway::Clock(days) => Ok(std::fs::write(&self.clock, format!("{days:+}d\n"))?),
            Midway::Descriptors => self.crowd(HOLDERS),
            Midway::Crowd => self.crowd(MANY),
            Midway::Memory => self.tighten(),
            Midway::SplitAndHealed => {
                upsets::part(&self.nodes.client, &[&self.nodes.bad, &self.nodes.good])?;
                std::thread::sleep(PARTED);
                upsets::heal(&self.nodes.client)
            }
        }
    }

    /// Stops the mirror, and ends it as a supervisor does that asks after it. No code of ours runs meanwhile.
    fn stop_and_supervise(&mut self) -> Result<()> {
        let start = Instant::now();
        self.client.daemon.signal(Signal::STOP)?;
        let (probe, url) = (Client::new(PROBE), format!("{}/livez", self.client.url()));
        let mut failures = 0;
        while failures < FAILURES {
            let began = Instant::now();
            failures = if probe.get(&url, &[]).is_ok() { 0 } else { failures + 1 };
            std::thread::sleep(PROBE.saturating_sub(began.elapsed()));
        }
        self.client.daemon.signal(Signal::KILL)?;
        let took = start.elapsed().as_secs_f64();
        self.tools.notes.push(format!("a supervisor ended it after {FAILURES} failed probes, {took:.1} s"));
        Ok(())
    }

    /// The serving threads stand still; the others, the watchdog among them, go on.
    fn wedge(&mut self) -> Result<()> {
        let start = Instant::now();
        let wedge = Wedge::threads(self.client.daemon.pid(), "data-")?;
        let told = || self.client.daemon.log().contains("ending the process");
        while !told() && start.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let took = start.elapsed().as_secs_f64();
        self.tools.notes.push(match told() {
            true => format!("the watchdog ended it after {took:.1} s"),
            false => "the watchdog did not end it".to_owned(),
        });
        self.tools.wedge = Some(wedge);
        Ok(())
    }

    fn crowd(&mut self, count: usize) -> Result<()> {
        let address: SocketAddr = self.client.url().trim_start_matches("http://").parse()?;
        let crowd = Crowd::come(address, count)?;
        let ([served, refused, closed, waiting], took) = (crowd.answers, crowd.took.as_secs_f64());
        self.tools.notes.push(format!(
            "of {count} clients {served} got 200, {refused} 503, {closed} a close, {waiting} nothing, in {took:.1} s"
        ));
        self.tools.crowd = Some(crowd);
        self.say_ready();
        Ok(())
    }

    fn tighten(&mut self) -> Result<()> {
        let limit = self.tools.memory.as_ref().context("no control group")?.tighten()?;
        let took = wait_for(self.client, 503).context("/readyz does not say that memory is short")?;
        let (mib, took) = (limit >> 20, took.as_secs_f64());
        self.tools.notes.push(format!("a limit of {mib} MiB, /readyz says so after {took:.1} s"));
        self.say_ready();
        Ok(())
    }

    /// What `/readyz` says; it may take a moment to have a place for the question.
    fn say_ready(&mut self) {
        let start = Instant::now();
        let mut said = ready(self.client);
        while said.0 == 0 && start.elapsed() < PATIENCE {
            said = ready(self.client);
        }
        let ((status, text), took) = (said, start.elapsed().as_secs_f64());
        self.tools.notes.push(format!("/readyz {status} {text:?} after {took:.1} s"));
    }
}
