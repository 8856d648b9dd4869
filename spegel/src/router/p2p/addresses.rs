//! Which addresses are offered to peers, and which of theirs are believed.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

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
            if_addrs::get_if_addrs()?.iter().map(if_addrs::Interface::ip).collect()
        } else {
            Vec::new()
        };
        let mut found: Vec<SocketAddr> = listen.iter().flat_map(|address| expand(*address, &interfaces)).collect();
        found.retain(|address| self.accepts(*address));
        found.sort_by_key(|address| (address.is_ipv6(), *address));
        found.dedup();
        found.truncate(MAX_ADDRESSES);
        Ok(found)
    }
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
