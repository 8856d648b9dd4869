//! Large bodies: from a file, and relayed.

use anyhow::Result;
use serde_json::{Value, json};

use super::{GROUND, Plane, Rival, Running, Settings, median, rivals};
use crate::bench::Figures;

/// What one client saw of a server, and what that cost the server.
struct Round {
    cpu_per_gib: f64,
    gib_per_second: f64,
}

/// One bulk stream and eight, each by a client that copies and one that discards.
const LOADS: [(usize, &str); 4] = [(1, "copy"), (8, "copy"), (1, "discard"), (8, "discard")];

/// A large blob from the page cache.
pub(in crate::bench) fn serve(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let mut servers = Vec::new();
    for (number, rival) in (0..).zip([Rival::IO_URING, Rival::TOKIO, Rival::COPY, Rival::Nginx, Rival::Sendfile]) {
        servers.push(rival.serve(&plane, number)?);
    }
    let path = |rival: Rival| match rival {
        Rival::Spegel { .. } => plane.blob_path(),
        _ => plane.file_path(true),
    };
    measure(&plane, &servers, path, "serve", "A blob from the page cache, by GET on keep-alive connections.")
}

/// The same blob, fetched from a peer for each request.
pub(in crate::bench) fn relay(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let upstream = rivals::upstream(&plane)?;
    let mut servers = Vec::new();
    for (number, rival) in (0..).zip([Rival::IO_URING, Rival::TOKIO, Rival::COPY, Rival::NginxProxy, Rival::Splice]) {
        servers.push(rival.relay(&plane, number, upstream.address)?);
    }
    let method = "A blob relayed from a peer (a spegel that has it in its page cache), by GET on keep-alive connections; the relay's CPU alone.";
    measure(&plane, &servers, |_| plane.blob_path(), "relay", method)
}

fn measure(
    plane: &Plane,
    servers: &[Running],
    path: impl Fn(Rival) -> String,
    name: &'static str,
    method: &str,
) -> Result<Figures> {
    // Once each, unmeasured: the page cache, the peers' records, the first connections.
    for server in servers {
        one(plane, server, &path(server.rival), 1, "copy")?;
    }
    let mut rounds: Vec<Vec<Vec<Round>>> = servers.iter().map(|_| LOADS.iter().map(|_| Vec::new()).collect()).collect();
    for _ in 0..plane.settings.rounds {
        for (server, rounds) in servers.iter().zip(&mut rounds) {
            for ((connections, take), rounds) in LOADS.into_iter().zip(rounds) {
                rounds.push(one(plane, server, &path(server.rival), connections, take)?);
            }
        }
    }
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for (server, rounds) in servers.iter().zip(&rounds) {
        let mut row = vec![server.rival.name()];
        for ((connections, take), rounds) in LOADS.into_iter().zip(rounds) {
            let cpu = median(rounds.iter().map(|round| round.cpu_per_gib).collect());
            let speed = median(rounds.iter().map(|round| round.gib_per_second).collect());
            row.push(format!("{cpu:.3} / {speed:.1}"));
            told.push(json!({"server": server.rival.name(), "connections": connections, "client": take,
                "cpu_seconds_per_gib": cpu, "gib_per_second": speed}));
        }
        rows.push(row);
    }
    let heads = LOADS.map(|(connections, take)| format!("{connections} × {take}"));
    let (mib, rounds) = (plane.settings.mib, plane.settings.rounds);
    Ok(Figures {
        name,
        method: format!(
            "{method} {GROUND}The blob has {mib} MiB; {rounds} rounds. Each field: CPU seconds per GiB / GiB per second, for so many \
             connections of a client that copies to user space or discards in the kernel."
        ),
        columns: std::iter::once("server".to_owned()).chain(heads).collect(),
        rows,
        json: Value::Array(told),
    })
}

fn one(plane: &Plane, server: &Running, path: &str, connections: usize, take: &str) -> Result<Round> {
    // At least a GiB, so that what is counted is not the start.
    let count = 1024_u64.div_ceil(plane.settings.mib * connections as u64).max(1);
    let before = server.cpu()?;
    let address = server.address.to_string();
    let done: spegel_benches::load::Bulk =
        plane.client(&["bulk", &address, path, &connections.to_string(), &count.to_string(), take])?;
    let gib = done.bytes as f64 / f64::from(1 << 30);
    Ok(Round { cpu_per_gib: (server.cpu()? - before) / gib, gib_per_second: gib / done.seconds })
}
