//! Which addresses are offered to peers, and which of theirs are believed.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

/// Addresses for documentation ([RFC 5737](https://www.rfc-editor.org/rfc/rfc5737), [RFC 3849](https://www.rfc-editor.org/rfc/rfc3849)): they are
/// reached by the default route, if by any.
const ELSEWHERE: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// How many addresses of one peer are kept.
pub(super) const MAX_ADDRESSES: usize = 8;

/// What addresses belong to this network: loopback if this process listens on nothing else, else everything but loopback; and
/// of these only what is in the given networks, if any are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Scope {
    loopback: bool,
    networks: Arc<[IpNet]>,
}

// === impl Scope ===

impl Scope {
    pub(super) fn of_listeners(listen: &[SocketAddr]) -> Self {
        Self { loopback: listen.iter().all(|address| address.ip().is_loopback()), networks: Arc::default() }
    }

    /// The same within these networks only; within any if there are none.
    pub(super) fn within(self, networks: &[IpNet]) -> Self {
        Self { networks: networks.into(), ..self }
    }

    /// Whether a peer can be reached there. Link-local addresses mean nothing without the interface that they belong to.
    pub(super) fn accepts(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        let usable = match ip {
            IpAddr::V4(ip) => !ip.is_broadcast() && !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_unicast_link_local(),
        };
        let named = self.networks.is_empty() || self.networks.iter().any(|network| network.contains(&ip));
        named
            && usable
            && address.port() != 0
            && !ip.is_unspecified()
            && !ip.is_multicast()
            && ip.is_loopback() == self.loopback
    }

    /// The believable ones of a peer's addresses, each once.
    pub(super) fn filter<'a>(&self, addresses: impl IntoIterator<Item = &'a Multiaddr>) -> Vec<SocketAddr> {
        let mut kept = Vec::new();
        for address in addresses.into_iter().filter_map(socket_address) {
            if kept.len() < MAX_ADDRESSES && self.accepts(address) && !kept.contains(&address) {
                kept.push(address);
            }
        }
        kept
    }

    /// The addresses under which peers reach what listens on `listen`: wildcards stand for every address of the node.
    pub(super) fn reachable(&self, listen: &[SocketAddr]) -> io::Result<Vec<SocketAddr>> {
        let interfaces = if listen.iter().any(|address| address.ip().is_unspecified()) {
            by_worth(&if_addrs::get_if_addrs()?)
        } else {
            Vec::new()
        };
        let mut found: Vec<SocketAddr> = listen.iter().flat_map(|address| expand(*address, &interfaces)).collect();
        found.retain(|address| self.accepts(*address));
        // In the order of the interfaces' worth, not of the listeners.
        let worth =
            |address: &SocketAddr| interfaces.iter().position(|ip| *ip == address.ip()).map_or(0, |place| place + 1);
        found.sort_by_key(|address| (worth(address), *address));
        found.dedup();
        found.truncate(MAX_ADDRESSES);
        Ok(found)
    }
}

/// The addresses of the interfaces, those first by which peers are most likely to reach us: from which the node speaks to others; then the
/// others; then what other hosts may have as well, or is no network of its own: a bridge of containers, a service's address on a dummy.
fn by_worth(interfaces: &[if_addrs::Interface]) -> Vec<IpAddr> {
    let speaks = [
        speaks_from((Ipv4Addr::UNSPECIFIED, 0), (ELSEWHERE.0, 9)),
        speaks_from((Ipv6Addr::UNSPECIFIED, 0), (ELSEWHERE.1, 9)),
    ];
    let is_bridge = |name: &str| Path::new("/sys/class/net").join(name).join("bridge").exists();
    let worth = |interface: &if_addrs::Interface| {
        let alone = match &interface.addr {
            if_addrs::IfAddr::V4(address) => address.prefixlen == 32,
            if_addrs::IfAddr::V6(address) => address.prefixlen == 128,
        };
        match interface.ip() {
            ip if speaks.contains(&Some(ip)) => 0,
            _ if alone || is_bridge(&interface.name) => 2,
            _ => 1,
        }
    };
    let mut sorted: Vec<(u8, IpAddr)> = interfaces.iter().map(|interface| (worth(interface), interface.ip())).collect();
    sorted.sort_unstable_by_key(|(worth, ip)| (*worth, ip.is_ipv6(), *ip));
    sorted.into_iter().map(|(_, ip)| ip).collect()
}

/// The address from which this node would speak to another one, by its routes. Nothing is sent.
fn speaks_from(own: impl ToSocketAddrs, other: impl ToSocketAddrs) -> Option<IpAddr> {
    let socket = UdpSocket::bind(own).ok()?;
    socket.connect(other).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// Where a peer's registry is, by where its router is: the port is the same on all nodes, so at an address that this node (`own`) has as well, as
/// all hosts may have one for their containers, it would ask itself.
pub(super) fn registries(router: &[SocketAddr], own: &[SocketAddr], port: u16) -> Vec<SocketAddr> {
    let mut found = Vec::with_capacity(router.len());
    // On loopback all are on this host anyway, and there is one address of the sixth version only.
    let is_ours = |ip: IpAddr| !ip.is_loopback() && own.iter().any(|own| own.ip() == ip);
    for address in router.iter().filter(|address| !is_ours(address.ip())) {
        let registry = SocketAddr::new(address.ip(), port);
        if !found.contains(&registry) {
            found.push(registry);
        }
    }
    found
}

fn expand(address: SocketAddr, interfaces: &[IpAddr]) -> Vec<SocketAddr> {
    if !address.ip().is_unspecified() {
        return vec![address];
    }
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == address.is_ipv4();
    interfaces.iter().filter(same_family).map(|ip| SocketAddr::new(*ip, address.port())).collect()
}

/// An IP address and TCP port, with at most an identity behind it: all that our transport dials.
pub(super) fn socket_address(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::V4(ip),
        Protocol::Ip6(ip) => IpAddr::V6(ip),
        _ => return None,
    };
    let Protocol::Tcp(port) = parts.next()? else { return None };
    match (parts.next(), parts.next()) {
        (None | Some(Protocol::P2p(_)), None) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

pub(super) fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::empty().with(address.ip().into()).with(Protocol::Tcp(address.port()))
}

/// Both families on every interface if only a port is told.
pub(super) fn is_ipv6_wildcard(address: &SocketAddr) -> bool {
    address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn scope(listen: &str) -> Scope {
        Scope::of_listeners(&[listen.parse().unwrap()])
    }

    fn accepted(scope: &Scope, addresses: &[&str]) -> Vec<String> {
        let parsed: Vec<Multiaddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        scope.filter(&parsed).iter().map(ToString::to_string).collect()
    }

    const OFFERED: &[&str] = &[
        "/ip4/127.0.0.1/tcp/5001",
        "/ip4/10.0.0.1/tcp/5001",
        "/ip4/10.0.0.1/tcp/5001/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp",
        "/ip6/fd00::1/tcp/5001",
        "/ip6/::1/tcp/5001",
        "/ip6/fe80::1/tcp/5001",
        "/ip6/::ffff:127.0.0.1/tcp/5001",
        "/ip4/0.0.0.0/tcp/5001",
        "/ip4/224.0.0.1/tcp/5001",
        "/ip4/10.0.0.2/tcp/0",
        "/ip4/10.0.0.2/udp/5001",
        "/ip4/10.0.0.2/tcp/5001/ws",
        "/dns4/node/tcp/5001",
    ];

    #[test]
    fn on_a_network_loopback_and_nonsense_are_not_believed() {
        assert_eq!(accepted(&scope("0.0.0.0:5001"), OFFERED), ["10.0.0.1:5001", "[fd00::1]:5001"]);
    }

    #[test]
    fn on_loopback_only_loopback_is_believed() {
        let expected = ["127.0.0.1:5001", "[::1]:5001", "[::ffff:127.0.0.1]:5001"];
        assert_eq!(accepted(&scope("127.0.0.3:5001"), OFFERED), expected);
    }

    #[test]
    fn networks_leave_out_all_others() {
        let networks = ["10.0.0.0/24", "fd00::/8"].map(|text| text.parse().unwrap());
        let scope = scope("0.0.0.0:5001").within(&networks);
        let offered = ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.1.1/tcp/1", "/ip6/fd01::1/tcp/1", "/ip6/fe01::1/tcp/1"];
        assert_eq!(accepted(&scope, &offered), ["10.0.0.1:1", "[fd01::1]:1"]);
        assert_eq!(accepted(&scope, &["/ip6/::ffff:10.0.0.7/tcp/1"]), ["[::ffff:10.0.0.7]:1"]);
    }

    #[test]
    fn one_peer_has_a_bounded_number_of_addresses() {
        let many: Vec<Multiaddr> = (1..=200).map(|n| format!("/ip4/10.0.0.{n}/tcp/1").parse().unwrap()).collect();
        assert_eq!(scope("0.0.0.0:1").filter(&many).len(), MAX_ADDRESSES);
    }

    #[test]
    fn a_peer_is_not_asked_at_an_address_that_is_ours_too() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let router = ["172.17.0.1:5001", "10.0.0.2:5001", "10.0.0.2:5002"].map(at);
        let own = ["10.0.0.1:5001", "172.17.0.1:5001"].map(at);
        assert_eq!(registries(&router, &own, 5000), [at("10.0.0.2:5000")]);
        assert_eq!(registries(&router[..1], &own, 5000), []);
    }

    #[test]
    fn wildcard_stands_for_the_interfaces_of_its_family() {
        let interfaces = ["10.0.0.9", "fd00::9"].map(|ip| ip.parse().unwrap());
        assert_eq!(expand("0.0.0.0:7".parse().unwrap(), &interfaces), ["10.0.0.9:7".parse().unwrap()]);
        assert_eq!(expand("[::]:7".parse().unwrap(), &interfaces), ["[fd00::9]:7".parse().unwrap()]);
        let plain = "127.0.0.2:7".parse().unwrap();
        assert_eq!(expand(plain, &interfaces), [plain]);
        assert_eq!(scope("127.0.0.2:7").reachable(&[plain]).unwrap(), [plain]);
    }

    #[test]
    fn socket_addresses_survive_the_way_through_multiaddrs() {
        for text in ["10.0.0.1:5001", "[fd00::1]:1"] {
            let address = text.parse().unwrap();
            assert_eq!(socket_address(&multiaddr(address)), Some(address));
        }
    }
}
