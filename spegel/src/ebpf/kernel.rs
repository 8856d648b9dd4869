//! The programs in the kernel, and their maps.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::maps::{Array, HashMap, MapData, MapError};
use aya::programs::{CgroupAttachMode, ProgramError, SockOps};
use aya::{Ebpf, EbpfError, EbpfLoader};
use spegel_common::{Address, PORT_MIRROR, PORT_UPSTREAM, PeerKey, PeerStats, Role, Totals};

use super::{Refusal, Settings, cgroup, privilege};
use crate::zerocopy;

/// Built by `cargo xtask ebpf` from `spegel-ebpf`, and checked to be that by `cargo xtask ebpf --check`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../spegel-ebpf/spegel-ebpf.o");

/// The oldest kernel that lets a program of this kind ask for its network namespace.
const OLDEST: (u32, u32) = (5, 15);

/// The programs, attached as long as this is there: nothing is pinned, so they go with the process however it ends.
pub(super) struct Kernel {
    /// The programs' links are in it.
    _programs: Ebpf,
    peers: HashMap<MapData, PeerKey, PeerStats>,
    totals: Array<MapData, Totals>,
    last: Option<[Totals; Role::ALL.len()]>,
    pub(super) own: PathBuf,
    pub(super) containerd: Result<PathBuf, String>,
}

/// What the maps say at one moment. The totals are never less than what the rows sum up to, for they were read later.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) peers: Vec<(PeerKey, PeerStats)>,
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
        attach(&mut programs, "own_sockets", &own)?;
        let containerd = cgroup::containerd(settings.containerd_cgroup.as_deref()).and_then(|group| {
            attach(&mut programs, "containerd_sockets", &group).map_err(|refusal| refusal.to_string())?;
            Ok(group)
        });
        let peers = HashMap::try_from(take(&mut programs, "PEERS")?).map_err(|error| refused_map(&error))?;
        let totals = Array::try_from(take(&mut programs, "TOTALS")?).map_err(|error| refused_map(&error))?;
        Ok(Self { _programs: programs, peers, totals, last: None, own, containerd })
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
        if self.last.is_some() && self.last == Some(self.totals()?) {
            return Ok(None);
        }
        // A row that is pushed out while the map is walked ends the walk, or is an error of its own: what is missed is in the totals.
        let peers = self.peers.iter().take(2 * MOST_ROWS).filter_map(Result::ok).collect();
        let totals = self.totals()?;
        self.last = Some(totals);
        Ok(Some(Reading { peers, totals }))
    }
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
    for address in own_addresses().iter().take(64) {
        let _ = local.insert(mapped(*address), 0, 0);
    }
    Ok(())
}

fn attach(programs: &mut Ebpf, name: &str, group: &Path) -> Result<(), Refusal> {
    let program = programs.program_mut(name).ok_or_else(|| missing(name))?;
    let program: &mut SockOps = program.try_into().map_err(|error| refused_program(&error))?;
    program.load().map_err(|error| refused_program(&error))?;
    let folder = File::open(group).map_err(|error| Refusal::NotAttached(format!("{}: {error}", group.display())))?;
    // By a link, which never takes another program's place whatever the mode says, and which the kernel takes with no flag of it.
    match program.attach(folder, CgroupAttachMode::Single) {
        Ok(_) => Ok(()),
        Err(error) => Err(Refusal::NotAttached(format!("{}: {}", group.display(), whole(&error)))),
    }
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

/// The addresses of this node itself, as its containerd may have in the registry's sight: those of our interfaces, and the gateways, by which a
/// node reaches its pods.
pub(super) fn own_addresses() -> Vec<IpAddr> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let mut addresses: Vec<IpAddr> = interfaces.iter().map(if_addrs::Interface::ip).collect();
    addresses.extend(gateways(&fs::read_to_string("/proc/self/net/route").unwrap_or_default()));
    addresses
}

/// The gateways in the kernel's table of IPv4 routes, whose numbers are in hexadecimal, the first byte last.
fn gateways(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok();
    let gateways = table.lines().skip(1).filter_map(gateway).filter(|gateway| *gateway != 0);
    gateways.map(|gateway| IpAddr::from(gateway.to_le_bytes())).collect()
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
    fn gateways_are_read_from_the_kernels_table() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\n\
            eth0\t00000000\t0105F40A\t0003\t0\neth0\t0005F40A\t00000000\t0001\t0\n";
        assert_eq!(gateways(table), ["10.244.5.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn of_a_long_log_the_end_is_kept() {
        let text = format!("refused{}for this", " step".repeat(10_000));
        let short = shorten(&text);
        assert!(short.len() < 2500 && short.starts_with("refused step") && short.ends_with("for this"), "{short}");
        assert_eq!(shorten("short"), "short");
    }

    #[test]
    fn the_object_holds_both_programs() {
        let names = ["own_sockets", "containerd_sockets", "PEERS", "TOTALS", "REGISTRY_PORT"];
        let has = |name: &str| OBJECT.windows(name.len()).any(|window| window == name.as_bytes());
        assert!(names.into_iter().all(has));
    }
}
