//! Many connections: idle ones, and bulk streams at once.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use spegel_benches::load::Bulk;

use super::{GROUND, Plane, Rival, Settings, median};
use crate::bench::Figures;

const IDLE: usize = 10_000;
const STREAMS: usize = 256;

/// Memory of 10,000 idle connections, and of 256 bulk streams, with the fairness among these.
pub(in crate::bench) fn connections(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for (number, rival) in (0..).zip([Rival::IO_URING, Rival::TOKIO, Rival::Nginx]) {
        let (small, large) = match rival {
            Rival::Spegel { .. } => (plane.manifest_path(), plane.blob_path()),
            _ => (plane.file_path(false), plane.file_path(true)),
        };
        let mut found: [Vec<f64>; 4] = Default::default();
        for _ in 0..plane.settings.rounds {
            let server = rival.serve(&plane, number)?;
            let address = server.address.to_string();
            let before = server.memory()?;
            let mut held = plane.hold(&["idle", &address, &small, &IDLE.to_string()])?;
            // Whatever the server still has to do for the last of them.
            std::thread::sleep(Duration::from_millis(300));
            let with_idle = server.memory()?;
            drop(held.stdin.take());
            held.wait().context("the idle client")?;
            drop(server);

            let server = rival.serve(&plane, number)?;
            let address = server.address.to_string();
            let count = STREAMS.to_string();
            let bulk: Bulk = plane.client(&["bulk-for", &address, &large, &count, "4", "discard"])?;
            let peak = server.peak_memory()?;
            let mean = bulk.bytes as f64 / STREAMS as f64;
            let mut each: Vec<f64> = bulk.each.iter().map(|bytes| *bytes as f64 / mean).collect();
            each.sort_by(f64::total_cmp);
            let spread = each[STREAMS * 95 / 100] - each[STREAMS * 5 / 100];
            let kib = with_idle.saturating_sub(before) as f64 / IDLE as f64 / 1024.0;
            let starved = each.iter().filter(|part| **part == 0.0).count() as f64;
            for (all, one) in found.iter_mut().zip([kib, peak as f64 / f64::from(1 << 20), spread * 50.0, starved]) {
                all.push(one);
            }
        }
        let [kib, peak, spread, starved] = found.map(median);
        told.push(
            json!({"server": rival.name(), "idle_kib_each": kib, "bulk_peak_mib": peak, "bulk_spread_percent": spread,
            "bulk_without_a_byte": starved}),
        );
        rows.push(vec![
            rival.name(),
            format!("{kib:.1} KiB"),
            format!("{peak:.1} MiB"),
            format!("± {spread:.0} %"),
            format!("{starved:.0}"),
        ]);
    }
    Ok(Figures {
        name: "connections",
        method: format!(
            "{IDLE} keep-alive connections on each of which one manifest of 2 KiB was had: resident memory more than before, for each. \
             {STREAMS} connections that take a blob of {} MiB for 4 s: the process's peak resident memory, how far the 5th and the \
             95th percentile of bytes had lie from the mean, and connections without a byte. A fresh server each. {GROUND}{} rounds.",
            plane.settings.mib, plane.settings.rounds
        ),
        columns: ["server", "an idle connection", "256 streams, peak memory", "spread of bytes had", "starved"]
            .map(str::to_owned)
            .to_vec(),
        rows,
        json: Value::Array(told),
    })
}
