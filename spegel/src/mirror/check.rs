//! What must hold for anything that a peer can say; for the fuzz targets.

use std::net::SocketAddr;

use super::attempt::{checked_part, unsatisfiable};
use super::client::{self, MAX_HOLDERS, is_plausible, parse_holders};
use super::{Chain, Content, NodeId};

/// What must hold for any text of a peer's hints: other holders, and the chain of nodes that a blob comes through. Panics where it does not.
pub(crate) fn check_hints(text: &str) {
    let holders = parse_holders(text);
    assert!(holders.len() <= MAX_HOLDERS);
    let by = SocketAddr::from(([10, 0, 0, 9], 5000));
    for address in holders.into_iter().filter(|address| is_plausible(*address, by)) {
        assert!(address.port() == 5000 && !address.ip().is_loopback() && !address.ip().is_multicast(), "{address}");
    }
    if let Ok(chain) = text.parse::<Chain>() {
        assert_eq!(chain.to_string().parse(), Ok(chain.clone()));
        let below = chain.below(NodeId::of("node"));
        assert!(below.is_none_or(|below| below.to_string().parse() == Ok(below)));
    }
}

/// What must hold for any head that a peer can send; panics where it does not.
pub(crate) fn check_peer_head(bytes: &[u8]) {
    const ASKED: &str = "bytes=5-";
    for bodiless in [false, true] {
        let Ok(Some((head, length))) = client::parse_head(bytes, bodiless) else { continue };
        assert!(length <= bytes.len());
        let again = client::parse_head(&bytes[..length], bodiless);
        assert!(matches!(&again, Ok(Some((same, end))) if *same == head && *end == length), "{again:?}");
        if let Ok((start, total)) = checked_part(ASKED, &head) {
            assert!(start == 5 && start + head.content_length == total, "{head:?}");
        }
        if let Ok(content) = unsatisfiable(&head) {
            assert!(matches!(content, Content::Unsatisfiable { .. }));
        }
    }
}
