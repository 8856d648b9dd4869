//! Who is connected to whom, and who may not be.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::Victim;
use crate::daemon::output;
use crate::netns::Node;

/// The first four bytes of a request for content.
const GET: u32 = u32::from_be_bytes(*b"GET ");

/// The node to be killed, by its number.
pub(super) fn find(victim: Victim, nodes: &[Node], upstream: &Node) -> Option<usize> {
    let from_upstream = |node: &Node| received(node, upstream.address());
    let root = nodes.iter().enumerate().max_by_key(|(_, node)| from_upstream(node)).map(|(number, _)| number)?;
    if victim == Victim::Root {
        return Some(root);
    }
    let given = |number: usize| -> u64 {
        let others = nodes.iter().enumerate().filter(|(other, _)| *other != number);
        others.map(|(_, node)| received(node, nodes[number].address())).sum()
    };
    (0..nodes.len()).filter(|number| *number != root && given(*number) > 0).max_by_key(|number| given(*number))
}

/// Bytes that a node has received on its open connections to port 5000 of an address, where registries and mirrors are.
fn received(node: &Node, from: Ipv4Addr) -> u64 {
    let filter = format!("dst {from} and dport = :5000");
    let told = output(node.command("ss").args(["-tinH", &filter])).unwrap_or_default();
    let counts = told.split_whitespace().filter_map(|word| word.strip_prefix("bytes_received:"));
    counts.filter_map(|count| count.parse::<u64>().ok()).sum()
}

/// Upstream answers a GET of these nodes with a reset, and a HEAD as ever: as a registry that limits how much a node pulls, which counts
/// no HEADs, or does not give it content.
pub(super) fn refuse(upstream: &Node, nodes: &[&Node]) -> Result<()> {
    let list = nodes.iter().map(|node| node.address().to_string()).collect::<Vec<_>>().join(", ");
    let rules = format!(
        "add table ip storm; add chain ip storm in {{ type filter hook input priority 0; }}; \
         add rule ip storm in ip saddr {{ {list} }} tcp dport 5000 @ih,0,32 0x{GET:x} reject with tcp reset"
    );
    upstream.nft(&rules)
}
