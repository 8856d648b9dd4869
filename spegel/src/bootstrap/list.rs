//! Lists of peers in the JSON form that the HTTP endpoint serves and the data directory keeps:
//! `[{"ID": "12D3…", "Addrs": ["/ip4/10.0.0.1/tcp/5001"]}]`, which is go-libp2p's form of a peer's address information.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::fixed::parse_address;
use super::{BootstrapAddress, BootstrapPeer};

/// How many peers, and how many addresses of one, are read from a list.
const MAX_PEERS: usize = 256;
const MAX_ADDRESSES: usize = 16;

#[derive(Debug, Deserialize, Serialize)]
struct Entry {
    #[serde(rename = "ID", default)]
    id: Option<String>,
    /// Go writes an empty list as `null`.
    #[serde(rename = "Addrs", default)]
    addrs: Option<Vec<String>>,
}

/// The list as JSON.
pub(super) fn encode(peers: &[BootstrapPeer]) -> Vec<u8> {
    let address = |at: &BootstrapAddress| {
        let ip = match at.ip {
            IpAddr::V4(ip) => format!("/ip4/{ip}"),
            IpAddr::V6(ip) => format!("/ip6/{ip}"),
        };
        at.port.map_or_else(|| ip.clone(), |port| format!("{ip}/tcp/{port}"))
    };
    let entry =
        |peer: &BootstrapPeer| Entry { id: peer.id.clone(), addrs: Some(peer.addresses.iter().map(address).collect()) };
    // Texts and lists of texts always have a JSON form.
    serde_json::to_vec(&peers.iter().map(entry).collect::<Vec<_>>()).unwrap_or_default()
}

/// The usable peers of a list. Addresses of other transports and names are left out, and so are peers that have no others.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<BootstrapPeer>, serde_json::Error> {
    let entries: Vec<Entry> = serde_json::from_slice(bytes)?;
    let peer = |entry: Entry| {
        let addresses = entry.addrs.unwrap_or_default();
        let addresses: Vec<_> = addresses.iter().filter_map(|text| parse_address(text)).take(MAX_ADDRESSES).collect();
        (!addresses.is_empty()).then(|| BootstrapPeer { id: entry.id.filter(|id| !id.is_empty()), addresses })
    };
    Ok(entries.into_iter().filter_map(peer).take(MAX_PEERS).collect())
}

/// What must hold for any list of peers; panics where it does not.
pub(super) fn check(bytes: &[u8]) {
    let Ok(peers) = decode(bytes) else { return };
    assert!(peers.len() <= MAX_PEERS);
    for peer in &peers {
        assert!(!peer.addresses.is_empty() && peer.addresses.len() <= MAX_ADDRESSES);
    }
    assert_eq!(decode(&encode(&peers)).ok(), Some(peers));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_form_is_that_of_go_libp2p() {
        let text = br#"[{"ID":"12D3Koo","Addrs":["/ip4/10.0.0.1/tcp/5001","/ip6/fd00::1/tcp/7"]},{"ID":"12D3Kaa","Addrs":["/ip4/10.0.0.2"]}]"#;
        let address = |ip: &str, port| BootstrapAddress { ip: ip.parse().unwrap(), port };
        let first = BootstrapPeer {
            id: Some("12D3Koo".into()),
            addresses: vec![address("10.0.0.1", Some(5001)), address("fd00::1", Some(7))],
        };
        let second = BootstrapPeer { id: Some("12D3Kaa".into()), addresses: vec![address("10.0.0.2", None)] };
        let peers = [first, second];
        assert_eq!(decode(text).unwrap(), peers);
        assert_eq!(encode(&peers), text);
    }

    #[test]
    fn what_cannot_be_dialled_is_left_out() {
        let text = br#"[{"ID":"a","Addrs":null},{"Addrs":["/ip4/10.0.0.3/udp/1/quic-v1","/dns4/a/tcp/1","/ip4/10.0.0.3/tcp/1"]},{"ID":"b"}]"#;
        let peers = decode(text).unwrap();
        assert_eq!(peers.len(), 1);
        assert_eq!((peers[0].id.as_deref(), peers[0].addresses.len()), (None, 1));
        assert!(decode(b"{}").is_err());
    }

    #[test]
    fn a_list_is_read_to_a_bound() {
        let many = vec![r#"{"Addrs":["/ip4/10.0.0.1/tcp/1"]}"#; 2 * MAX_PEERS].join(",");
        assert_eq!(decode(format!("[{many}]").as_bytes()).unwrap().len(), MAX_PEERS);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }
}
