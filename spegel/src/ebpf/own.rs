//! Which addresses are this node's own, as its containerd may have in the registry's sight.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};

/// What was `told`, then the gateways, by which a node reaches its pods, then those of the interfaces: the first are the most certain, since
/// there may be more than the kernel's map has room for.
pub(super) fn addresses(told: &[IpAddr]) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = told.iter().map(IpAddr::to_canonical).collect();
    addresses.extend(gateways(&read("/proc/self/net/route")));
    addresses.extend(gateways_v6(&read("/proc/self/net/ipv6_route")));
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let (local, global): (Vec<_>, Vec<_>) = interfaces.iter().map(if_addrs::Interface::ip).partition(is_link_local);
    // A node with a hundred pods has as many interfaces with nothing but an address for its link.
    for address in global.into_iter().chain(local) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// The gateways in the kernel's table of IPv4 routes, whose numbers are in hexadecimal, the first byte last.
fn gateways(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok();
    let gateways = table.lines().skip(1).filter_map(gateway).filter(|gateway| *gateway != 0);
    gateways.map(|gateway| IpAddr::from(gateway.to_le_bytes())).collect()
}

/// The same for IPv6: the fifth field is the next hop, sixteen bytes in their order; there is no head.
fn gateways_v6(table: &str) -> Vec<IpAddr> {
    let gateway = |line: &str| u128::from_str_radix(line.split_whitespace().nth(4)?, 16).ok();
    let gateways = table.lines().filter_map(gateway).filter(|gateway| *gateway != 0);
    let mut gateways: Vec<_> = gateways.map(|gateway| IpAddr::from(Ipv6Addr::from_bits(gateway))).collect();
    gateways.sort_unstable();
    gateways.dedup();
    gateways
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn gateways_are_read_from_the_kernels_tables() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\n\
            eth0\t00000000\t0105F40A\t0003\t0\neth0\t0005F40A\t00000000\t0001\t0\n";
        assert_eq!(gateways(table), [ip("10.244.5.1")]);
        let (none, one) = ("0".repeat(32), "fd00001000000000000000000000000a");
        let line =
            |to: &str, hop: &str| format!("{to} 00 {none} 00 {hop} 00000400 00000001 00000000 00000003     eth0\n");
        let table = line(&none, one) + &line(&none, one) + &line("fd000010000000000000000000000000", &none);
        assert_eq!(gateways_v6(&table), [ip("fd00:10::a")]);
        assert_eq!((gateways(""), gateways_v6("x\n")), (vec![], vec![]));
    }

    #[test]
    fn what_was_told_comes_first_and_the_nodes_own_are_there() {
        let own = addresses(&[ip("192.0.2.7"), ip("::ffff:192.0.2.8")]);
        assert_eq!(own[..2], [ip("192.0.2.7"), ip("192.0.2.8")]);
        assert!(own.contains(&ip("127.0.0.1")), "{own:?}");
    }
}
