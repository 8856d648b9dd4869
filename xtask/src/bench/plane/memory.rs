//! Whom the pages of served blobs are charged to, and what a limit on memory does to serving.

use std::fs::File;
use std::io;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use spegel_benches::load::Bulk;
use spegel_benches::memory_group::{MemoryGroup, wrapper};

use super::cold::drop_pages;
use super::{GROUND, Plane, Rival, Running, Settings, median};
use crate::bench::Figures;

/// What a pod of the chart may have.
const LIMIT: u64 = 128 << 20;
const MIB: f64 = (1 << 20) as f64;

/// What a blob was before it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    /// Read by a process of another control group, as containerd does.
    Read,
    /// On the disk only.
    Cold,
}

/// One blob after the other, with and without a limit.
pub(in crate::bench) fn memory(settings: &Settings) -> Result<Figures> {
    MemoryGroup::available().map_err(anyhow::Error::msg)?;
    let mut plane = Plane::new(settings)?;
    let program = plane.settings.program.clone();
    let (mut rows, mut told) = (Vec::new(), Vec::new());
    for (number, limit) in [(0, None), (1, Some(LIMIT))] {
        let group = MemoryGroup::new(&format!("bench-{number}"))?;
        if let Some(limit) = limit {
            group.set_limit(limit)?;
        }
        let wrapped = plane.folder.path().join(format!("in-group-{number}"));
        plane.settings.program = wrapper(&wrapped, &group.words(), &program)?;
        let server = Rival::IO_URING.serve(&plane, number)?;
        for before in [Before::Read, Before::Cold] {
            let (mut cpu, mut speed) = (Vec::new(), Vec::new());
            let mut charged = (0, 0);
            for _ in 0..plane.settings.rounds {
                let (used, bulk) = one(&plane, &server, before)?;
                let gib = bulk.bytes as f64 / f64::from(1 << 30);
                cpu.push(used / gib);
                speed.push(gib / bulk.seconds);
                let (own, cache) = group.charged()?;
                charged = (charged.0.max(own), charged.1.max(cache));
            }
            let [cpu, speed] = [cpu, speed].map(median);
            let (own, cache, kills) = (charged.0 as f64 / MIB, charged.1 as f64 / MIB, group.kills()?);
            let limit = limit.map_or_else(|| "none".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
            let what = if before == Before::Read { "read by another before" } else { "on disk only" };
            told.push(json!({"limit": limit, "blob": what, "cpu_seconds_per_gib": cpu, "gib_per_second": speed,
                "own_mib": own, "page_cache_mib": cache, "kills": kills}));
            let figures = format!("{cpu:.3} / {speed:.2}");
            rows.push(vec![
                limit,
                what.into(),
                figures,
                format!("{own:.0} MiB"),
                format!("{cache:.0} MiB"),
                kills.to_string(),
            ]);
        }
    }
    let mib = plane.settings.mib;
    Ok(Figures {
        name: "memory",
        method: format!(
            "A blob of {mib} MiB taken by one client that discards it in the kernel, from a spegel in a control group of its own. {GROUND}\
             {} rounds; CPU seconds per GiB and GiB per second are medians, what is charged to the group the largest after any of them.",
            plane.settings.rounds
        ),
        columns: ["limit", "the blob", "CPU s a GiB / GiB/s", "own memory", "page cache charged", "killed"]
            .map(str::to_owned)
            .to_vec(),
        rows,
        json: Value::Array(told),
    })
}

/// The CPU seconds that the server used, and what the client had.
fn one(plane: &Plane, server: &Running, before: Before) -> Result<(f64, Bulk)> {
    drop_pages(plane)?;
    if before == Before::Read {
        io::copy(&mut File::open(plane.blob_file())?, &mut io::sink()).context("read the blob")?;
    }
    let used = server.cpu()?;
    let bulk = plane.client(&["bulk", &server.address.to_string(), &plane.blob_path(), "1", "1", "discard"])?;
    Ok((server.cpu()? - used, bulk))
}
