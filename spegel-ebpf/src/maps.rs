//! The maps and settings that user space shares with the programs. All are bounded, and those that peers can fill drop what was used
//! longest ago.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap};
use spegel_common::{Address, Connection, PeerKey, PeerStats, Role, Totals};

/// Peers by address and role.
#[map]
pub static PEERS: LruHashMap<PeerKey, PeerStats> = LruHashMap::with_max_entries(8192, 0);

/// Connections that are open, by the socket's cookie and which program looks after it.
#[map]
pub static CONNECTIONS: LruHashMap<u64, Connection> = LruHashMap::with_max_entries(16384, 0);

/// What was counted by role, of all peers.
#[map]
pub static TOTALS: Array<Totals> = Array::with_max_entries(Role::ALL.len() as u32, 0);

/// Remote ports of containerd's connections, and what they are.
#[map]
pub static PORTS: HashMap<u32, u32> = HashMap::with_max_entries(64, 0);

/// Addresses of this node itself, beside loopback: what comes from there is its own containerd's.
#[map]
pub static LOCAL: HashMap<Address, u32> = HashMap::with_max_entries(64, 0);

/// What user space sets before the programs are loaded.
macro_rules! setting {
    ($(#[$doc:meta])* $name:ident, $get:ident: $type:ty) => {
        #[unsafe(no_mangle)]
        static $name: $type = 0;

        $(#[$doc])*
        pub fn $get() -> $type {
            // SAFETY: a static. Volatile, since the compiler would take the value that stands here for the one that it has.
            unsafe { core::ptr::read_volatile(&raw const $name) }
        }
    };
}

setting! {
    /// The registry's port, on all nodes.
    REGISTRY_PORT, registry_port: u32
}
setting! {
    /// The router's port.
    ROUTER_PORT, router_port: u32
}
setting! {
    /// The network namespace of the process, by its cookie: others may share its control group.
    NETWORK, network: u64
}
setting! {
    /// 1 where nodes are told apart by loopback addresses, as on a developer's machine.
    PEERS_ON_LOOPBACK, peers_on_loopback: u32
}
