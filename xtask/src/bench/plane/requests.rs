//! Small requests: by themselves, and beside bulk streams.

use std::thread;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use spegel_benches::load::{Bulk, Waits};

use super::{GROUND, Plane, Rival, Running, Settings, median};
use crate::bench::Figures;

/// How long each measurement lasts, in seconds.
const TIME: &str = "1.5";

fn servers(plane: &Plane) -> Result<Vec<Running>> {
    (0..).zip([Rival::IO_URING, Rival::TOKIO, Rival::Nginx]).map(|(number, rival)| rival.serve(plane, number)).collect()
}

/// The same, and the least that answering takes.
fn servers_and_limit(plane: &Plane) -> Result<Vec<Running>> {
    let mut all = servers(plane)?;
    all.push(Rival::Answer.serve(plane, 0)?);
    Ok(all)
}

fn path_of(plane: &Plane, rival: Rival, spegels: String) -> String {
    if matches!(rival, Rival::Spegel { .. }) { spegels } else { plane.file_path(false) }
}

/// A manifest of 2 KiB by digest and its head by tag, on 64 connections; and on a connection for each.
pub(in crate::bench) fn small(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let servers = servers_and_limit(&plane)?;
    let mut found: Vec<[Vec<f64>; 4]> = servers.iter().map(|_| <[Vec<f64>; 4]>::default()).collect();
    // The first round is not counted.
    for round in 0..=plane.settings.rounds {
        for (server, found) in servers.iter().zip(&mut found) {
            let address = server.address.to_string();
            let manifest = path_of(&plane, server.rival, plane.manifest_path());
            let tag = path_of(&plane, server.rival, plane.tag_path());
            let per_cpu = |arguments: &[&str]| -> Result<(Waits, f64)> {
                let before = server.cpu()?;
                let waits: Waits = plane.client(arguments)?;
                let rate = waits.count as f64 / (server.cpu()? - before);
                Ok((waits, rate))
            };
            let (get, get_rate) = per_cpu(&["small", &address, &manifest, "GET", "64", TIME])?;
            let (_, head_rate) = per_cpu(&["small", &address, &tag, "HEAD", "64", TIME])?;
            let (new, _) = per_cpu(&["connects", &address, &manifest, TIME])?;
            if round > 0 {
                for (all, one) in found.iter_mut().zip([get_rate, get.count as f64 / get.seconds, head_rate, new.p50]) {
                    all.push(one);
                }
            }
        }
    }
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for (server, found) in servers.iter().zip(found) {
        let [get, rate, head, new] = found.map(median);
        rows.push(vec![
            server.rival.name(),
            format!("{get:.0}"),
            format!("{rate:.0}"),
            format!("{head:.0}"),
            format!("{new:.0} µs"),
        ]);
        told.push(json!({"server": server.rival.name(), "get_per_cpu_second": get, "get_per_second": rate,
            "head_per_cpu_second": head, "connect_to_first_byte_us": new}));
    }
    let columns = [
        "server",
        "GET, requests per CPU second",
        "GET, requests a second",
        "HEAD, requests per CPU second",
        "connect to first byte, p50",
    ];
    Ok(Figures {
        name: "small",
        method: format!(
            "A manifest of 2 KiB: GET by digest and HEAD by tag on 64 keep-alive connections, each asking anew when its answer is \
             there; and one new connection after the other. nginx serves the same bytes as a file, for HEAD too. {GROUND}{} rounds of \
             {TIME} s.",
            plane.settings.rounds
        ),
        columns: columns.map(str::to_owned).to_vec(),
        rows,
        json: Value::Array(told),
    })
}

/// A request for 2 KiB at a time beside 32 bulk streams.
pub(in crate::bench) fn mixed(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let servers = servers(&plane)?;
    let mut found: Vec<[Vec<f64>; 3]> = servers.iter().map(|_| <[Vec<f64>; 3]>::default()).collect();
    for round in 0..=plane.settings.rounds {
        for (server, found) in servers.iter().zip(&mut found) {
            let (waits, bulk) = beside_bulk(&plane, server)?;
            if round > 0 {
                let speed = bulk.bytes as f64 / f64::from(1 << 30) / bulk.seconds;
                for (all, one) in found.iter_mut().zip([waits.p50 / 1e3, waits.p99 / 1e3, speed]) {
                    all.push(one);
                }
            }
        }
    }
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for (server, found) in servers.iter().zip(found) {
        let [p50, p99, speed] = found.map(median);
        rows.push(vec![server.rival.name(), format!("{p50:.2} ms"), format!("{p99:.2} ms"), format!("{speed:.1}")]);
        told.push(json!({"server": server.rival.name(), "p50_ms": p50, "p99_ms": p99, "bulk_gib_per_second": speed}));
    }
    Ok(Figures {
        name: "mixed",
        method: format!(
            "A manifest of 2 KiB asked for again and again on one connection, while 32 others take a blob of {} MiB from the page \
             cache (discarded in the kernel). Both clients share core 1. {GROUND}{} rounds of some 3 s.",
            plane.settings.mib, plane.settings.rounds
        ),
        columns: ["server", "2 KiB, p50", "2 KiB, p99", "bulk, GiB per second"].map(str::to_owned).to_vec(),
        rows,
        json: Value::Array(told),
    })
}

fn beside_bulk(plane: &Plane, server: &Running) -> Result<(Waits, Bulk)> {
    let address = server.address.to_string();
    let small = path_of(plane, server.rival, plane.manifest_path());
    let large = match server.rival {
        Rival::Spegel { .. } => plane.blob_path(),
        _ => plane.file_path(true),
    };
    thread::scope(|scope| {
        let bulk = scope.spawn(|| plane.client(&["bulk-for", &address, &large, "32", "3", "discard"]));
        // Until the streams are under way.
        thread::sleep(std::time::Duration::from_millis(700));
        let waits = plane.client(&["small", &address, &small, "GET", "1", TIME]);
        let bulk = bulk.join().ok().context("the bulk client panicked")?;
        Ok((waits?, bulk?))
    })
}
