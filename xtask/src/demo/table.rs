//! Who got what from whom, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use spegel_benches::image::Image;

/// What one node pulled in one round.
#[derive(Debug)]
pub(super) struct Pulled {
    pub(super) node: String,
    pub(super) bytes: u64,
    pub(super) time: Duration,
    /// Bytes by who served them.
    pub(super) sources: BTreeMap<String, u64>,
}

/// One round by its title.
pub(super) type Round = (&'static str, Vec<Pulled>);

pub(super) fn text(pulled: &[Pulled]) -> String {
    let mut text = format!("{:<12} {:>10} {:>8} {:>11}   served by", "node", "pulled", "time", "speed");
    for one in pulled {
        let served: Vec<String> = one.sources.iter().map(|(who, bytes)| format!("{who} {}", amount(*bytes))).collect();
        let seconds = one.time.as_secs_f64();
        let _ = write!(
            text,
            "\n{:<12} {:>6.1} MiB {seconds:>6.2} s {:>5.0} MiB/s   {}",
            one.node,
            mib(one.bytes),
            mib(one.bytes) / seconds,
            served.join(", ")
        );
    }
    text
}

pub(super) fn to_json(image: &Image, rounds: &[Round]) -> Value {
    let rounds: Vec<Value> = rounds
        .iter()
        .map(|(title, pulled)| {
            let nodes: Vec<Value> = pulled.iter().map(node_json).collect();
            json!({ "round": title, "nodes": nodes })
        })
        .collect();
    json!({ "image": image.reference(), "bytes": image.size(), "rounds": rounds })
}

fn node_json(one: &Pulled) -> Value {
    json!({ "node": one.node, "bytes": one.bytes, "seconds": one.time.as_secs_f64(), "bytes_by_source": one.sources })
}

fn amount(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{:.1} KiB", bytes as f64 / 1024.0) } else { format!("{:.1} MiB", mib(bytes)) }
}

pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
