//! What the kernel knows of this node's connections: by peer and by what they are for, how many bytes went which way, how long a round trip
//! takes, what had to be sent again.
//!
//! Two small programs, attached to spegel's own control group and to containerd's, count it in the kernel. Where they cannot be had, what the
//! kernel tells of our own sockets fills the same table, with the columns empty that it does not tell; that is what [`Probe`] is for.
//! Nothing here is needed to serve: it only watches.

mod cgroup;
mod counts;
mod kernel;
mod metrics;
mod own;
mod privilege;
mod quality;
mod refusal;
mod report;
mod table;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::zerocopy::TcpInfo;
use kernel::Kernel;
use table::{Moved, Table};

pub use metrics::Pulled;
pub use quality::Quality;
pub use refusal::Refusal;
pub use report::{PeerRow, Report, RoleRow};
pub use spegel_common::Role;

/// How often the kernel's maps are read while something happens.
const PERIOD: Duration = Duration::from_secs(1);
/// So many times as long as it takes is the least time between two readings, so that many peers cost no more than 2 % of a core.
const REST: u32 = 50;
/// How long loading may take: the verifier looks at every path of the programs, which is milliseconds.
const LOADING: Duration = Duration::from_secs(10);
/// How long after a look at one of our own sockets the next one is worth its cost.
const PROBE_PAUSE: Duration = Duration::from_millis(20);

/// Whether the kernel is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Where it can be had.
    Auto,
    /// The process does not start without.
    On,
    /// No.
    Off,
}

/// What is to be watched.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether the kernel is asked.
    pub mode: Mode,
    /// The registry's port, on all nodes.
    pub registry_port: u16,
    /// The router's.
    pub router_port: u16,
    /// containerd's control group; to be looked for if not told.
    pub containerd_cgroup: Option<PathBuf>,
    /// containerd's socket: who listens there is looked for first.
    pub containerd_socket: Option<PathBuf>,
    /// Addresses of the node that it has outside of this process's network namespace, which its containerd may come from.
    pub node_addresses: Vec<IpAddr>,
    /// The ports of upstream registries.
    pub upstream_ports: Vec<u16>,
    /// Nodes differ by their loopback addresses.
    pub peers_on_loopback: bool,
}

/// A view of this node's connections, for as long as it is held.
#[derive(Clone)]
pub struct Watch {
    shared: Arc<Shared>,
}

struct Shared {
    table: Mutex<Table>,
    source: Source,
    upstream: Mutex<Upstream>,
    /// This node's own addresses, which its containerd may come from.
    own: Vec<IpAddr>,
    peers_on_loopback: bool,
    /// What this node's containerd got through us, once that is counted.
    pulled: OnceLock<Arc<Pulled>>,
    /// Its end ends the thread that reads the maps, which takes the programs along.
    _thread: Option<mpsc::SyncSender<()>>,
}

/// Where the table's figures come from.
#[derive(Clone, Debug)]
enum Source {
    Kernel(Attached),
    Sockets(Refusal),
}

/// What stands in the kernel.
#[derive(Clone, Debug)]
struct Attached {
    /// The control group of spegel itself.
    own: PathBuf,
    /// What this process has kept of its privileges to read the maps; usually none.
    kept: &'static str,
}

/// Whether what containerd has with upstream registries is seen, which may change while it is watched.
#[derive(Clone, Debug)]
struct Upstream {
    /// containerd's control group, or why its traffic is not seen at the moment.
    group: Result<PathBuf, String>,
    /// There are figures, be they old.
    was_seen: bool,
    /// What was saved (from here, or from peers) while upstream was not seen: before the last time, and in all when it began to be unseen.
    unmatched: u64,
    unseen_from: u64,
}

// === impl Watch ===

impl Watch {
    /// Loads and attaches the programs, and gives up what privileges that needed. To be called while this is the process's only thread: others
    /// that are started later have none of these from the beginning.
    ///
    /// # Errors
    /// With [`Mode::On`], why the kernel cannot be asked. Otherwise that is only told by [`Watch::tell`].
    pub fn start(settings: &Settings) -> Result<Self, Refusal> {
        if settings.mode == Mode::Off {
            privilege::drop_all();
            return Ok(Self::of(Some(settings), Source::Sockets(Refusal::Off), Upstream::unseen(), None));
        }
        let (told, outcome) = mpsc::sync_channel(1);
        let (alive, end) = mpsc::sync_channel(0);
        let asked = settings.clone();
        let spawned = thread::Builder::new().name("ebpf".into()).spawn(move || watch(&asked, &told, &end));
        privilege::drop_all();
        let outcome = match spawned {
            Ok(_) => outcome.recv_timeout(LOADING).unwrap_or(Err(Refusal::TooSlow)),
            Err(error) => Err(Refusal::Other(format!("no thread for it: {error}"))),
        };
        match outcome {
            Ok((attached, group, reader)) => {
                let upstream = Upstream::of(group);
                let watch = Self::of(Some(settings), Source::Kernel(attached), upstream, Some(alive));
                // The thread reads for as long as somebody looks.
                let _ = reader.send(Arc::downgrade(&watch.shared));
                Ok(watch)
            }
            Err(refusal) if settings.mode == Mode::On => Err(refusal),
            Err(refusal) => Ok(Self::of(Some(settings), Source::Sockets(refusal), Upstream::unseen(), None)),
        }
    }

    /// A view that the kernel has no part in.
    pub fn without_kernel() -> Self {
        Self::of(None, Source::Sockets(Refusal::Off), Upstream::unseen(), None)
    }

    fn of(
        settings: Option<&Settings>,
        source: Source,
        upstream: Upstream,
        thread: Option<mpsc::SyncSender<()>>,
    ) -> Self {
        let own = settings.map(|settings| own::addresses(&settings.node_addresses)).unwrap_or_default();
        let peers_on_loopback = settings.is_none_or(|settings| settings.peers_on_loopback);
        let table = Mutex::new(Table::new(matches!(source, Source::Kernel(_))));
        let upstream = Mutex::new(upstream);
        Self {
            shared: Arc::new(Shared {
                table,
                source,
                upstream,
                own,
                peers_on_loopback,
                pulled: OnceLock::new(),
                _thread: thread,
            }),
        }
    }

    /// Says in the log, in one line, where the figures come from.
    pub fn tell(&self) {
        match &self.shared.source {
            Source::Kernel(Attached { own, kept }) => {
                let (upstream, why) = match self.shared.upstream().group {
                    Ok(group) => (Some(group.display().to_string()), None),
                    Err(why) => (None, Some(why)),
                };
                let (own, kept) = (own.display(), (!kept.is_empty()).then_some(kept));
                tracing::info!(%own, containerd = upstream, upstream_unseen = why, kept, "eBPF is attached");
            }
            Source::Sockets(Refusal::Off) => tracing::info!("eBPF is off: only our own sockets are seen"),
            Source::Sockets(refusal) => {
                tracing::info!(reason = refusal.name(), %refusal, "no eBPF: only our own sockets are seen");
            }
        }
    }

    /// Whether our own sockets have to be looked at, since the kernel's programs do not.
    pub fn wants_probes(&self) -> bool {
        matches!(self.shared.source, Source::Sockets(_))
    }

    /// A probe for a connection of ours with `remote`, where these are wanted.
    pub fn probe(&self, remote: IpAddr, role: Role) -> Option<Probe> {
        self.wants_probes().then(|| {
            let remote = remote.to_canonical();
            self.table().opened(remote, role, Instant::now());
            Probe(Box::new(Probed { watch: self.clone(), remote, role, before: Moved::default(), taken: None }))
        })
    }

    /// The same for a client of our registry: its own containerd, or another node.
    pub fn probe_client(&self, remote: IpAddr) -> Option<Probe> {
        let remote = remote.to_canonical();
        let is_own = !self.shared.peers_on_loopback && (remote.is_loopback() || self.shared.own.contains(&remote));
        self.probe(remote, if is_own { Role::Containerd } else { Role::Served })
    }

    /// A connection that was not established.
    pub fn failed(&self, remote: IpAddr, role: Role) {
        if self.wants_probes() {
            self.table().failed(remote.to_canonical(), role, Instant::now());
        }
    }

    /// How well peers are reached.
    pub fn quality(&self) -> Quality {
        Quality::new(self.clone())
    }

    /// All that is known at the moment.
    pub fn report(&self) -> Report {
        let upstream = self.shared.upstream();
        Report::new(&self.table(), &self.shared.source, &upstream, Instant::now())
    }

    /// Adds the figures by peer, and what this node pulled from where, to `figures`.
    pub fn register(&self, figures: &mut crate::metrics::Figures, pulled: Arc<Pulled>) {
        // There is one of it; a test may register again.
        let _ = self.shared.pulled.set(Arc::clone(&pulled));
        metrics::register(figures, self.clone(), pulled);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("source", &self.shared.source).finish_non_exhaustive()
    }
}

/// One connection of ours, as its socket tells of it. It is over when this is dropped.
#[derive(Debug)]
pub struct Probe(Box<Probed>);

#[derive(Debug)]
struct Probed {
    watch: Watch,
    remote: IpAddr,
    role: Role,
    /// What it had moved when it was asked last, and when that was.
    before: Moved,
    taken: Option<Instant>,
}

// === impl Probe ===

impl Probe {
    /// Whether it is worth while to ask again: of many small answers in a row every one would cost a tenth more.
    /// What is not asked for is there the next time, and at the end.
    pub fn is_due(&self, now: Instant) -> bool {
        self.0.taken.is_none_or(|taken| now.saturating_duration_since(taken) >= PROBE_PAUSE)
    }

    /// Takes down what has changed since it was last asked.
    pub fn take(&mut self, info: &TcpInfo) {
        let Probed { watch, remote, role, before, taken } = &mut *self.0;
        let now = Instant::now();
        *before = watch.table().sampled(*remote, *role, info, before, now);
        *taken = Some(now);
    }
}

impl Drop for Probed {
    fn drop(&mut self) {
        self.watch.table().closed(self.remote, self.role, Instant::now());
    }
}

// === impl Shared ===

impl Shared {
    fn upstream(&self) -> Upstream {
        self.upstream.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether connections of this role are counted, or were.
    fn sees(&self, role: Role) -> bool {
        self.source.sees(role, &self.upstream())
    }

    /// Something has become of containerd's control group.
    fn turn(&self, group: Result<PathBuf, String>) {
        match &group {
            Ok(group) => {
                tracing::info!(containerd = %group.display(), "eBPF is attached to containerd's control group");
            }
            Err(why) => tracing::warn!(why, "what containerd gets from upstream is not seen"),
        }
        let saved = self.pulled.get().map_or(0, |pulled| pulled.saved());
        self.upstream.lock().unwrap_or_else(PoisonError::into_inner).turn(group, saved);
    }
}

// === impl Upstream ===

impl Upstream {
    /// At the start, before anything was pulled.
    fn of(group: Result<PathBuf, String>) -> Self {
        Self { was_seen: group.is_ok(), group, unmatched: 0, unseen_from: 0 }
    }

    /// Another group, or none, when so much was saved in all.
    fn turn(&mut self, group: Result<PathBuf, String>, saved: u64) {
        match (&self.group, &group) {
            (Err(_), Ok(_)) => self.unmatched += saved.saturating_sub(self.unseen_from),
            (Ok(_), Err(_)) => self.unseen_from = saved,
            _ => {}
        }
        self.was_seen |= group.is_ok();
        self.group = group;
    }

    /// What of all that was saved was so while upstream was seen; nothing if it is not seen now.
    fn matched(&self, saved: u64) -> Option<u64> {
        self.group.is_ok().then(|| saved.saturating_sub(self.unmatched))
    }

    /// Nobody looks.
    fn unseen() -> Self {
        Self::of(Err(String::new()))
    }
}

type Outcome = Result<(Attached, Result<PathBuf, String>, mpsc::SyncSender<std::sync::Weak<Shared>>), Refusal>;

/// The thread that has the programs: loads them, tells what came of it, and reads until `end`.
fn watch(settings: &Settings, told: &mpsc::SyncSender<Outcome>, end: &mpsc::Receiver<()>) {
    let mut kernel = match Kernel::load(settings) {
        Ok(kernel) => kernel,
        Err(refusal) => {
            privilege::drop_all();
            let _ = told.send(Err(refusal));
            return;
        }
    };
    let attached =
        Attached { own: kernel.own.clone(), kept: privilege::drop_but_for_reading(|| kernel.totals().is_ok()) };
    let (reader, shared) = mpsc::sync_channel(1);
    if told.send(Ok((attached, kernel.containerd(), reader))).is_err() {
        return;
    }
    let Ok(shared) = shared.recv() else { return };
    let mut pause = PERIOD;
    // Whoever holds the view lets go of the other end when it goes.
    while end.recv_timeout(pause) == Err(mpsc::RecvTimeoutError::Timeout) {
        let Some(shared) = shared.upgrade() else { return };
        let start = Instant::now();
        match kernel.read() {
            Ok(Some(reading)) => {
                shared.table.lock().unwrap_or_else(PoisonError::into_inner).apply(&reading, start);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "cannot read what the kernel has counted"),
        }
        if let Some(group) = kernel.attend(start) {
            shared.turn(group);
        }
        pause = (start.elapsed() * REST).max(PERIOD);
    }
}
