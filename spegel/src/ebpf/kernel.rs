//! The programs in the kernel, and their maps.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, MapData, MapError};
use aya::programs::sock_ops::SockOpsLinkId;
use aya::programs::{CgroupAttachMode, ProgramError, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};
use spegel_common::{Address, PORT_MIRROR, PORT_UPSTREAM, PeerKey, PeerStats, Role, Totals};

use super::{Mode, Refusal, Settings, cgroup, own, privilege};
use crate::zerocopy;

/// Built by `cargo xtask ebpf` from `spegel-ebpf`, and checked to be that by `cargo xtask ebpf --check`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../spegel-ebpf/spegel-ebpf.o");

/// The program of spegel's own control group, and that of containerd's.
const OWN: &str = "own_sockets";
const CONTAINERD: &str = "containerd_sockets";

/// How often containerd's group is searched for.
const SEARCH: Duration = Duration::from_secs(30);

/// The oldest kernel that lets a program of this kind ask for its network namespace.
const OLDEST: (u32, u32) = (5, 15);

/// The programs, attached as long as this is there: nothing is pinned, so they go with the process however it ends.
pub(super) struct Kernel {
    programs: Ebpf,
    peers: HashMap<MapData, PeerKey, PeerStats>,
    totals: Array<MapData, Totals>,
    last: Option<[Totals; Role::ALL.len()]>,
    pub(super) own: PathBuf,
    containerd: Containerd,
}

/// containerd's control group, which may come later than this process, and goes when its unit is stopped and nothing runs in it.
struct Containerd {
    told: Option<PathBuf>,
    /// Where it listens, if it is one that this process has to do with.
    socket: Option<PathBuf>,
    /// The group was taken by its name while nobody listened there.
    is_guess: bool,
    /// The kernel has taken the program.
    is_loaded: bool,
    /// Where it is, or was.
    group: Option<PathBuf>,
    attached: Result<Attachment, String>,
    /// When the next search is due, where nobody told, or who listens is asked again.
    search_at: Instant,
}

/// A program that is attached to a group.
struct Attachment {
    link: SockOpsLinkId,
    folder: Identity,
}

/// A folder's device and inode: a group that is made anew at the same place is another one.
type Identity = (u64, u64);

/// What the maps say at one moment.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) peers: Vec<(PeerKey, PeerStats)>,
    /// Whether all rows are in it that were there from the beginning of the reading to its end.
    pub(super) is_whole: bool,
    /// The totals before the rows were read: what is in no row then was in none.
    pub(super) settled: [Totals; Role::ALL.len()],
    /// The totals afterwards, which are never less than what the rows sum up to.
    pub(super) totals: [Totals; Role::ALL.len()],
}

// === impl Kernel ===

impl Kernel {
    pub(super) fn load(settings: &Settings) -> Result<Self, Refusal> {
        check_version()?;
        let own = cgroup::own()?;
        if !privilege::suffices() {
            return Err(Refusal::no_privilege());
        }
        let network =
            zerocopy::network_cookie().map_err(|error| Refusal::Other(format!("network namespace: {error}")))?;
        let (registry, router) = (u32::from(settings.registry_port), u32::from(settings.router_port));
        let on_loopback = u32::from(settings.peers_on_loopback);
        let mut loader = EbpfLoader::new();
        // No structure of the kernel's own is read, so its type information is not needed.
        loader.btf(None);
        loader.override_global("REGISTRY_PORT", &registry, true).override_global("ROUTER_PORT", &router, true);
        loader.override_global("NETWORK", &network, true).override_global("PEERS_ON_LOOPBACK", &on_loopback, true);
        let mut programs = loader.load(OBJECT).map_err(|error| refused_object(&error))?;
        fill(&mut programs, settings)?;
        load(&mut programs, OWN)?;
        attach(&mut programs, OWN, &own)?;
        let containerd = Containerd::find(settings, &mut programs);
        if let (Mode::On, Some(_), Err(why)) = (settings.mode, &settings.containerd_cgroup, &containerd.attached) {
            return Err(Refusal::NotAttached(format!("containerd's control group: {why}")));
        }
        let peers = HashMap::try_from(take(&mut programs, "PEERS")?).map_err(|error| refused_map(&error))?;
        let totals = Array::try_from(take(&mut programs, "TOTALS")?).map_err(|error| refused_map(&error))?;
        Ok(Self { programs, peers, totals, last: None, own, containerd })
    }

    /// containerd's control group, or why its traffic is not seen.
    pub(super) fn containerd(&self) -> Result<PathBuf, String> {
        self.containerd.seen()
    }

    /// Looks whether containerd's group is still there, and attaches to the new one if not. Costs a stat(2), and a walk through the groups twice a minute
    /// as long as none is known. Returns what has become of it, if something has.
    pub(super) fn attend(&mut self, now: Instant) -> Option<Result<PathBuf, String>> {
        self.containerd.attend(&mut self.programs, now)
    }

    /// What was counted, by role.
    pub(super) fn totals(&self) -> Result<[Totals; Role::ALL.len()], MapError> {
        let mut totals = [Totals::default(); Role::ALL.len()];
        for (number, total) in (0..).zip(&mut totals) {
            *total = self.totals.get(&number, 0)?;
        }
        Ok(totals)
    }

    /// All rows; none if nothing has happened since they were last read.
    pub(super) fn read(&mut self) -> Result<Option<Reading>, MapError> {
        let settled = self.totals()?;
        if self.last == Some(settled) {
            return Ok(None);
        }
        // Where a row is pushed out just as the walk stands at it, the walk begins anew: rows come twice then, and where that goes on some do not
        // come at all. What is missed is in the totals.
        let mut walk = self.peers.iter();
        let found: Vec<_> = walk.by_ref().take(4 * MOST_ROWS).collect();
        let is_whole = found.len() < 4 * MOST_ROWS && found.iter().all(Result::is_ok);
        let peers = found.into_iter().filter_map(Result::ok).collect();
        let totals = self.totals()?;
        // What has come since is read the next time.
        self.last = Some(settled);
        Ok(Some(Reading { peers, is_whole, settled, totals }))
    }
}

// === impl Containerd ===

impl Containerd {
    fn find(settings: &Settings, programs: &mut Ebpf) -> Self {
        let (told, socket) = (settings.containerd_cgroup.clone(), settings.containerd_socket.clone());
        let found = cgroup::containerd(told.as_deref(), socket.as_deref());
        let is_guess = found.as_ref().is_ok_and(|found| found.is_guess);
        let group = found.map(|found| found.group);
        let loaded = load(programs, CONTAINERD).map_err(|refusal| refusal.to_string());
        let is_loaded = loaded.is_ok();
        let attached = loaded.and_then(|()| attach_to_found(programs, group.as_ref()));
        let search_at = Instant::now() + SEARCH;
        Self { told, socket, is_guess, is_loaded, group: group.ok(), attached, search_at }
    }

    /// The group, and whether it is a guess from now on.
    fn search(&mut self) -> Result<PathBuf, String> {
        let found = cgroup::containerd(self.told.as_deref(), self.socket.as_deref())?;
        self.is_guess = found.is_guess;
        Ok(found.group)
    }

    /// Whether who listens at the socket by now is in another group than the one that was taken by its name.
    fn is_elsewhere(&mut self, now: Instant) -> bool {
        let Some(socket) = self.socket.as_deref().filter(|_| self.is_guess && now >= self.search_at) else {
            return false;
        };
        self.search_at = now + SEARCH;
        let listener = cgroup::listener(socket);
        self.is_guess = listener == cgroup::Listener::Nobody;
        matches!(&listener, cgroup::Listener::In(group) if self.group.as_ref() != Some(group))
    }

    fn seen(&self) -> Result<PathBuf, String> {
        match (&self.attached, &self.group) {
            (Ok(_), Some(group)) => Ok(group.clone()),
            (Ok(_), None) => Err(String::new()),
            (Err(why), _) => Err(why.clone()),
        }
    }

    fn attend(&mut self, programs: &mut Ebpf, now: Instant) -> Option<Result<PathBuf, String>> {
        if !self.is_loaded {
            return None;
        }
        let mut gone = None;
        let is_elsewhere = self.is_elsewhere(now);
        if let (Ok(attachment), Some(group)) = (&self.attached, &self.group) {
            let why = match identity(group) == Some(attachment.folder) {
                true if is_elsewhere => format!("containerd is not in the control group {}", group.display()),
                true => return None,
                false => format!("the control group {} is gone", group.display()),
            };
            if let Ok(attachment) = std::mem::replace(&mut self.attached, Err(why.clone())) {
                // The kernel has let go of it with the group.
                let _ = detach(programs, attachment.link);
            }
            gone = Some(Err(why));
        }
        let group = match (&self.told, &self.group) {
            (Some(_), _) => self.search(),
            _ if is_elsewhere => self.search(),
            // It comes back where it was, if its unit is started again.
            (None, Some(group)) if identity(group).is_some() => Ok(group.clone()),
            (None, _) if now >= self.search_at => {
                self.search_at = now + SEARCH;
                self.search()
            }
            (None, _) => return gone,
        };
        if group.is_err() && gone.is_some() {
            return gone;
        }
        match attach_to_found(programs, group.as_ref()) {
            Ok(attachment) => {
                (self.attached, self.group) = (Ok(attachment), group.ok());
                Some(self.seen())
            }
            // The kernel's word is news once; that there is still no group is none.
            Err(why) if group.is_ok() && self.attached.as_ref().err() != Some(&why) => {
                self.attached = Err(why);
                Some(self.seen())
            }
            Err(_) => gone,
        }
    }
}

fn attach_to_found(programs: &mut Ebpf, group: Result<&PathBuf, &String>) -> Result<Attachment, String> {
    let group = group.map_err(String::clone)?;
    let folder = identity(group).ok_or_else(|| format!("the control group {} is gone", group.display()))?;
    let link = attach(programs, CONTAINERD, group).map_err(|refusal| refusal.to_string())?;
    Ok(Attachment { link, folder })
}

fn identity(folder: &Path) -> Option<Identity> {
    fs::metadata(folder).ok().map(|found| (found.dev(), found.ino()))
}

/// Rows of the map.
const MOST_ROWS: usize = 8192;

fn check_version() -> Result<(), Refusal> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST { Err(Refusal::OldKernel(release)) } else { Ok(()) }
}

fn fill(programs: &mut Ebpf, settings: &Settings) -> Result<(), Refusal> {
    let ports = programs.map_mut("PORTS").ok_or_else(|| missing("PORTS"))?;
    let mut ports: HashMap<_, u32, u32> = HashMap::try_from(ports).map_err(|error| refused_map(&error))?;
    ports.insert(u32::from(settings.registry_port), PORT_MIRROR, 0).map_err(|error| refused_map(&error))?;
    for port in &settings.upstream_ports {
        ports.insert(u32::from(*port), PORT_UPSTREAM, 0).map_err(|error| refused_map(&error))?;
    }
    let local = programs.map_mut("LOCAL").ok_or_else(|| missing("LOCAL"))?;
    let mut local: HashMap<_, Address, u32> = HashMap::try_from(local).map_err(|error| refused_map(&error))?;
    // More than there is room for are no disaster: their connections count as a peer's.
    for address in own::addresses(&settings.node_addresses).iter().take(64) {
        let _ = local.insert(mapped(*address), 0, 0);
    }
    Ok(())
}

fn program<'a>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut SockOps, Refusal> {
    let program = programs.program_mut(name).ok_or_else(|| missing(name))?;
    program.try_into().map_err(|error| refused_program(&error))
}

fn load(programs: &mut Ebpf, name: &str) -> Result<(), Refusal> {
    program(programs, name)?.load().map_err(|error| refused_program(&error))
}

fn attach(programs: &mut Ebpf, name: &str, group: &Path) -> Result<SockOpsLinkId, Refusal> {
    let program = program(programs, name)?;
    let folder = File::open(group).map_err(|error| Refusal::NotAttached(format!("{}: {error}", group.display())))?;
    // By a link, which never takes another program's place whatever the mode says, and which the kernel takes with no flag of it.
    program
        .attach(folder, CgroupAttachMode::Single)
        .map_err(|error| Refusal::NotAttached(format!("{}: {}", group.display(), whole(&error))))
}

fn detach(programs: &mut Ebpf, link: SockOpsLinkId) -> Result<(), Refusal> {
    program(programs, CONTAINERD)?.detach(link).map_err(|error| refused_program(&error))
}

fn take(programs: &mut Ebpf, name: &str) -> Result<aya::maps::Map, Refusal> {
    programs.take_map(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Refusal {
    Refusal::Other(format!("the object has no {name}"))
}

fn refused_object(error: &EbpfError) -> Refusal {
    match error {
        EbpfError::MapError(error) => refused_map(error),
        EbpfError::ProgramError(error) => refused_program(error),
        other => Refusal::Other(whole(other)),
    }
}

fn refused_map(error: &MapError) -> Refusal {
    let cause = match error {
        MapError::CreateError { io_error, .. } => Some(io_error),
        MapError::SyscallError(error) => Some(&error.io_error),
        _ => None,
    };
    Refusal::of(cause, whole(error))
}

fn refused_program(error: &ProgramError) -> Refusal {
    let cause = match error {
        ProgramError::LoadError { io_error, .. } => Some(io_error),
        ProgramError::SyscallError(error) => Some(&error.io_error),
        _ => None,
    };
    Refusal::of(cause, whole(error))
}

/// An error with its causes, in one line: the verifier's log has many.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        if !text.contains(&inner.to_string()) {
            text.push_str(": ");
            text.push_str(&inner.to_string());
        }
        cause = inner.source();
    }
    shorten(&text.split('\n').map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" | "))
}

/// The verifier's log tells each step of some ten thousand; what it did not like is at its end.
fn shorten(text: &str) -> String {
    const BEGIN: usize = 200;
    const END: usize = 2000;
    let length = text.chars().count();
    if length <= BEGIN + END {
        return text.to_owned();
    }
    let begin: String = text.chars().take(BEGIN).collect();
    let end: String = text.chars().skip(length - END).collect();
    format!("{begin} [...] {end}")
}

fn mapped(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn of_a_long_log_the_end_is_kept() {
        let text = format!("refused{}for this", " step".repeat(10_000));
        let short = shorten(&text);
        assert!(short.len() < 2500 && short.starts_with("refused step") && short.ends_with("for this"), "{short}");
        assert_eq!(shorten("short"), "short");
    }

    #[test]
    fn the_object_holds_both_programs() {
        let names = [OWN, CONTAINERD, "PEERS", "TOTALS", "REGISTRY_PORT"];
        let has = |name: &str| OBJECT.windows(name.len()).any(|window| window == name.as_bytes());
        assert!(names.into_iter().all(has));
    }
}
