//! The two programs, of the kind `sock_ops`: one is attached to the control group of spegel itself, the other to containerd's. The kernel calls
//! them when a connection is established and, where they ask for it, once a round trip, at a timeout and at a change of state, not for packets.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTT_CB,
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use spegel_common::{Address, PORT_MIRROR, PORT_UPSTREAM, PeerKey, Role};

use crate::maps::{LOCAL, PORTS, network, peers_on_loopback, registry_port, router_port};
use crate::track;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// The kernel's number of the state of a socket that has ended.
const TCP_CLOSE: u32 = 7;
/// To the kernel: the answer is good, go on.
const GO_ON: u32 = 1;

/// Whose control group a program is attached to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Site {
    Own,
    Containerd,
}

/// Reads a field of the context with exactly one load of its own width, which is what the verifier allows.
macro_rules! field {
    ($context:expr, $($path:tt)+) => {
        // SAFETY: the kernel hands a valid context to the program, and lets it read these fields.
        unsafe { core::ptr::read_volatile(&raw const (*$context.ops).$($path)+) }
    };
}
pub(crate) use field;

#[sock_ops]
pub fn own_sockets(context: SockOpsContext) -> u32 {
    handle(&context, Site::Own);
    GO_ON
}

#[sock_ops]
pub fn containerd_sockets(context: SockOpsContext) -> u32 {
    handle(&context, Site::Containerd);
    GO_ON
}

#[inline(always)]
fn handle(context: &SockOpsContext, site: Site) {
    match field!(context, op) {
        // Here already, so that one that is never answered is seen.
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            if let Some(key) = key(context, site, Some(true)) {
                track::begin(context, id(context, site), key, true);
            }
        }
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => track::established(id(context, site)),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB if site == Site::Own => {
            if let Some(key) = key(context, site, Some(false)) {
                let id = id(context, site);
                track::begin(context, id, key, false);
                track::established(id);
            }
        }
        BPF_SOCK_OPS_RTT_CB if track::has_looked_enough() => {}
        BPF_SOCK_OPS_RTT_CB => track::look(context, id(context, site), site, true),
        BPF_SOCK_OPS_RTO_CB => track::look(context, id(context, site), site, false),
        BPF_SOCK_OPS_STATE_CB if field!(context, __bindgen_anon_1.args[1]) == TCP_CLOSE => {
            track::end(context, id(context, site), site);
        }
        _ => {}
    }
}

/// Names a connection to one program: where control groups lie in each other both may be called for it.
#[inline(always)]
fn id(context: &SockOpsContext, site: Site) -> u64 {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(context.as_ptr()) };
    (cookie << 1) | (site == Site::Containerd) as u64
}

/// Whom a connection is with, and what for; none if it is none of ours to look at. `active` is whether this side opened it, if that is known: whoever
/// opens one may be given the registry's port by chance.
#[inline(always)]
pub fn key(context: &SockOpsContext, site: Site, active: Option<bool>) -> Option<PeerKey> {
    let (local_port, remote_port) = (field!(context, local_port), u32::from_be(field!(context, remote_port)));
    let ours = local_port == registry_port() && active != Some(true);
    if site == Site::Own && !ours {
        let router = router_port();
        if remote_port != registry_port() && local_port != router && remote_port != router {
            return None;
        }
    }
    let (remote, local) = addresses(context)?;
    let role = match site {
        Site::Own if !is_in_our_network(context) => return None,
        Site::Own if ours && is_local(&remote, &local) => Role::Containerd,
        Site::Own if ours => Role::Served,
        // Somebody else of this control group at our registry: that is seen from there.
        Site::Own if remote_port == registry_port() && remote == local => return None,
        Site::Own if remote_port == registry_port() => Role::Fetched,
        Site::Own => Role::Router,
        // This node itself, the mirror's port at its own address included, is never upstream.
        Site::Containerd if is_loopback(&remote) || remote == local => return None,
        // SAFETY: the value is a number, whichever it is.
        Site::Containerd => match unsafe { PORTS.get(remote_port) }.copied() {
            Some(PORT_UPSTREAM) => Role::Upstream,
            Some(PORT_MIRROR) => return None,
            _ => Role::Other,
        },
    };
    Some(PeerKey { address: remote, role: role as u32 })
}

#[inline(always)]
fn is_in_our_network(context: &SockOpsContext) -> bool {
    // SAFETY: the context is valid.
    unsafe { bpf_get_netns_cookie(context.as_ptr()) == network() }
}

/// The remote and the local address.
#[inline(always)]
fn addresses(context: &SockOpsContext) -> Option<(Address, Address)> {
    // All are read in any case: of two reads of which one is made the compiler makes one of a computed place, which the verifier refuses.
    let family = field!(context, family);
    let v4 = (mapped(field!(context, remote_ip4)), mapped(field!(context, local_ip4)));
    let remote = whole([
        field!(context, remote_ip6[0]),
        field!(context, remote_ip6[1]),
        field!(context, remote_ip6[2]),
        field!(context, remote_ip6[3]),
    ]);
    let local = whole([
        field!(context, local_ip6[0]),
        field!(context, local_ip6[1]),
        field!(context, local_ip6[2]),
        field!(context, local_ip6[3]),
    ]);
    match family {
        AF_INET => Some(v4),
        AF_INET6 => Some((remote, local)),
        _ => None,
    }
}

/// An IPv4 address, which the kernel gives in the network's order, as an IPv4-mapped one.
#[inline(always)]
fn mapped(address: u32) -> Address {
    whole([0, 0, u32::to_be(0xffff), address])
}

#[inline(always)]
fn whole(words: [u32; 4]) -> Address {
    // SAFETY: sixteen bytes either way.
    unsafe { core::mem::transmute(words) }
}

#[inline(always)]
fn is_loopback(address: &Address) -> bool {
    let v4 = is_mapped(address) && address[12] == 127;
    v4 || *address == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
}

#[inline(always)]
fn is_mapped(address: &Address) -> bool {
    let mut zeros = 0;
    let mut at = 0;
    while at < 10 {
        zeros |= address[at];
        at += 1;
    }
    zeros == 0 && address[10] == 0xff && address[11] == 0xff
}

/// Whether the other end is this node itself.
#[inline(always)]
fn is_local(remote: &Address, local: &Address) -> bool {
    if peers_on_loopback() != 0 {
        return false;
    }
    // SAFETY: what the value is does not matter.
    remote == local || is_loopback(remote) || unsafe { LOCAL.get(remote) }.is_some()
}

