//! Peers that the administrator listed.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;

use super::{Bootstrap, BootstrapAddress, BootstrapError, BootstrapPeer};

/// How long a name may take to resolve.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a text names no peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no peer ({reason}); write /ip4/ADDRESS/tcp/PORT/p2p/ID, ADDRESS:PORT or a host name")]
pub struct ParsePeerError {
    text: String,
    reason: &'static str,
}

/// A fixed list of peers. Host names in it are resolved anew each time.
#[derive(Clone, Debug)]
pub struct StaticBootstrap {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    id: Option<String>,
    host: Host,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

// === impl StaticBootstrap ===

impl StaticBootstrap {
    /// A source from texts: multiaddrs such as `/ip4/10.0.0.1/tcp/5001/p2p/12D3…`, of which `/tcp/…` and `/p2p/…` may be left
    /// out, and plain `host`, `host:port` or `[v6]:port`.
    pub fn new<I>(peers: I) -> Result<Self, ParsePeerError>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let entries = peers.into_iter().map(|peer| peer.as_ref().parse()).collect::<Result<_, _>>()?;
        Ok(Self { entries })
    }

    /// All names at once: one that cannot be resolved keeps no other back.
    async fn resolve(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        let resolved = futures::future::join_all(self.entries.iter().map(Entry::resolve)).await;
        let mut found = Vec::with_capacity(resolved.len());
        let mut failed = None;
        for result in resolved {
            match result {
                Ok(peers) => found.extend(peers),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            None => Ok(found),
            Some(error) if found.is_empty() => Err(error),
            Some(error) => Err(BootstrapError::Partial { found, reason: error.to_string() }),
        }
    }
}

#[async_trait]
impl Bootstrap for StaticBootstrap {
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        self.resolve().await
    }
}

// === impl Entry ===

impl Entry {
    async fn resolve(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        let Self { id, host, port } = self;
        let address = |ip| BootstrapAddress { ip, port: *port };
        let name = match host {
            Host::Ip(ip) => return Ok(vec![BootstrapPeer { id: id.clone(), addresses: vec![address(*ip)] }]),
            Host::Name(name) => name,
        };
        let found = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((name.as_str(), 0)))
            .await
            .map_err(|_| BootstrapError::Timeout { name: name.clone(), seconds: RESOLVE_TIMEOUT.as_secs() })?
            .map_err(|error| BootstrapError::Resolve { name: name.clone(), reason: error.to_string() })?;
        let found = found.map(|found| address(found.ip()));
        // With an identity all addresses are one peer's; without, the name may stand for many.
        let mut peers: Vec<_> = match id {
            Some(_) => vec![BootstrapPeer { id: id.clone(), addresses: found.collect() }],
            None => found.map(|one| BootstrapPeer { id: None, addresses: vec![one] }).collect(),
        };
        peers.retain(|peer| !peer.addresses.is_empty());
        Ok(peers)
    }
}

impl FromStr for Entry {
    type Err = ParsePeerError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = if text.starts_with('/') { parse_multiaddr(text) } else { parse_plain(text) };
        parsed.map_err(|reason| ParsePeerError { text: text.into(), reason })
    }
}

/// An address and port in the form of a multiaddress; nothing of a name.
pub(super) fn parse_address(text: &str) -> Option<BootstrapAddress> {
    match parse_multiaddr(text).ok()? {
        Entry { host: Host::Ip(ip), port, .. } => Some(BootstrapAddress { ip, port }),
        Entry { host: Host::Name(_), .. } => None,
    }
}

/// Only what our transport can dial: an address or a name, then TCP, then an identity.
fn parse_multiaddr(text: &str) -> Result<Entry, &'static str> {
    let mut parts = text.split('/').skip(1);
    let mut pair = || parts.next().map(|name| (name, parts.next().unwrap_or_default()));
    let host = match pair() {
        Some(("ip4", value)) => Host::Ip(IpAddr::V4(value.parse().map_err(|_| "not an IPv4 address")?)),
        Some(("ip6", value)) => Host::Ip(IpAddr::V6(value.parse().map_err(|_| "not an IPv6 address")?)),
        Some(("dns" | "dns4" | "dns6", value)) => parse_name(value)?,
        _ => return Err("it begins with neither ip4, ip6 nor dns"),
    };
    let (mut port, mut id) = (None, None);
    while let Some(part) = pair() {
        match part {
            ("tcp", value) if port.is_none() && id.is_none() => port = Some(parse_port(value)?),
            ("p2p" | "ipfs", value) if id.is_none() && !value.is_empty() => id = Some(value.to_owned()),
            _ => return Err("only one tcp and one p2p part may follow the host"),
        }
    }
    Ok(Entry { id, host, port })
}

fn parse_plain(text: &str) -> Result<Entry, &'static str> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        let port = parse_port(&address.port().to_string())?;
        return Ok(Entry { id: None, host: Host::Ip(address.ip()), port: Some(port) });
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if let Ok(ip) = bare.parse() {
        return Ok(Entry { id: None, host: Host::Ip(ip), port: None });
    }
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(parse_port(port)?)),
        None => (text, None),
    };
    Ok(Entry { id: None, host: parse_name(name)?, port })
}

fn parse_port(text: &str) -> Result<u16, &'static str> {
    match text.parse() {
        Ok(0) | Err(_) => Err("the port is not a number from 1 to 65535"),
        Ok(port) => Ok(port),
    }
}

fn parse_name(text: &str) -> Result<Host, &'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if text.is_empty() || text.len() > 253 || !text.bytes().all(allowed) {
        return Err("the host name is not valid");
    }
    Ok(Host::Name(text.to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    async fn check(text: &str, id: Option<&str>, ip: &str, port: Option<u16>) {
        let peers = StaticBootstrap::new([text]).unwrap().peers().await.unwrap();
        let addresses = vec![BootstrapAddress { ip: ip.parse().unwrap(), port }];
        assert_eq!(peers, [BootstrapPeer { id: id.map(Into::into), addresses }], "{text}");
    }

    #[tokio::test]
    async fn every_way_to_write_an_address() {
        check("/ip4/10.0.0.1/tcp/5001/p2p/12D3Koo", Some("12D3Koo"), "10.0.0.1", Some(5001)).await;
        check("/ip4/10.0.0.1/tcp/5001", None, "10.0.0.1", Some(5001)).await;
        check("/ip4/10.0.0.1/p2p/12D3Koo", Some("12D3Koo"), "10.0.0.1", None).await;
        check("/ip4/10.0.0.1", None, "10.0.0.1", None).await;
        check("/ip6/fd00::1/tcp/5001", None, "fd00::1", Some(5001)).await;
        check("10.0.0.1:5001", None, "10.0.0.1", Some(5001)).await;
        check("10.0.0.1", None, "10.0.0.1", None).await;
        check("[fd00::1]:5001", None, "fd00::1", Some(5001)).await;
        check("[fd00::1]", None, "fd00::1", None).await;
        check("fd00::1", None, "fd00::1", None).await;
    }

    #[tokio::test]
    async fn a_name_that_cannot_be_resolved_keeps_no_other_back() {
        let source = StaticBootstrap::new(["name.invalid", "10.0.0.1"]).unwrap();
        let error = source.peers().await.unwrap_err();
        let BootstrapError::Partial { found, .. } = error else { panic!("{error}") };
        assert_eq!(found[0].addresses[0].ip.to_string(), "10.0.0.1");
        let alone = StaticBootstrap::new(["name.invalid"]).unwrap().peers().await.unwrap_err();
        assert!(alone.to_string().contains("name.invalid"), "{alone}");
    }

    #[test]
    fn names_are_kept_until_asked_for() {
        let entry: Entry = "node-1.cluster.test:7000".parse().unwrap();
        assert_eq!(entry, Entry { id: None, host: Host::Name("node-1.cluster.test".into()), port: Some(7000) });
        let entry: Entry = "/dns4/node-1/tcp/7000/p2p/12D3Koo".parse().unwrap();
        assert_eq!(entry, Entry { id: Some("12D3Koo".into()), host: Host::Name("node-1".into()), port: Some(7000) });
    }

    #[test]
    fn what_names_no_peer_is_refused_with_its_text() {
        let wrong =
            ["", "/", "/ip4", "/ip4/10.0.0.256/tcp/1", "/ip4/10.0.0.1/udp/5001", "/ip4/10.0.0.1/tcp/0", "a b", "h:0"];
        for text in
            wrong.into_iter().chain(["/ip4/10.0.0.1/tcp/1/tcp/2", "host:port", "/unix/x", "10.0.0.1:0", "h:70000"])
        {
            let error = StaticBootstrap::new([text]).unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(/?[a-z0-9.:\\[\\]]{0,8}){0,6}") {
            let _ = text.parse::<Entry>();
        }
    }
}
