//! Small requests while a blob is read from the disk.

use std::fs::File;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::Advice;
use serde_json::{Value, json};
use spegel_benches::load::{Bulk, Waits};

use super::{GROUND, Plane, Rival, Running, Settings, median};
use crate::bench::Figures;

/// A request for 2 KiB at a time while one other connection takes a blob that is on disk only, and while it is warm.
pub(in crate::bench) fn cold(settings: &Settings) -> Result<Figures> {
    let plane = Plane::new(settings)?;
    let mut servers = Vec::new();
    for (number, rival) in (0..).zip([Rival::IO_URING, Rival::TOKIO, Rival::Nginx]) {
        servers.push(rival.serve(&plane, number)?);
    }
    let mut found: Vec<[Vec<f64>; 4]> = servers.iter().map(|_| <[Vec<f64>; 4]>::default()).collect();
    for _ in 0..plane.settings.rounds {
        for (server, found) in servers.iter().zip(&mut found) {
            drop_pages(&plane)?;
            let (cold, speed) = beside_one(&plane, server)?;
            let (warm, _) = beside_one(&plane, server)?;
            for (all, one) in found.iter_mut().zip([cold.p99 / 1e3, cold.worst / 1e3, warm.p99 / 1e3, speed]) {
                all.push(one);
            }
        }
    }
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for (server, found) in servers.iter().zip(found) {
        let [cold, worst, warm, speed] = found.map(median);
        let name = server.rival.name();
        told.push(json!({"server": name, "cold_p99_ms": cold, "cold_worst_ms": worst, "warm_p99_ms": warm,
            "cold_gib_per_second": speed}));
        let ms = |value: f64| format!("{value:.2} ms");
        rows.push(vec![name, ms(cold), ms(worst), ms(warm), format!("{speed:.2}")]);
    }
    Ok(Figures {
        name: "cold",
        method: format!(
            "A manifest of 2 KiB asked for again and again on one connection, while another takes a blob of {} MiB once, whose pages \
             were dropped before (POSIX_FADV_DONTNEED), and then once more, warm. {GROUND}{} rounds.",
            plane.settings.mib, plane.settings.rounds
        ),
        columns: ["server", "2 KiB beside cold, p99", "beside cold, worst", "beside warm, p99", "cold, GiB per second"]
            .map(str::to_owned)
            .to_vec(),
        rows,
        json: Value::Array(told),
    })
}

/// Has the kernel forget the blob.
///
/// # Errors
/// The kernel's.
pub(super) fn drop_pages(plane: &Plane) -> Result<()> {
    let file = File::open(plane.blob_file())?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).context("drop the blob's pages")
}

/// The waits of small requests during one transfer of the blob, and its speed.
fn beside_one(plane: &Plane, server: &Running) -> Result<(Waits, f64)> {
    let address = server.address.to_string();
    let (small, large) = match server.rival {
        Rival::Spegel { .. } => (plane.manifest_path(), plane.blob_path()),
        _ => (plane.file_path(false), plane.file_path(true)),
    };
    let stop = plane.folder.path().join("bulk-is-over");
    let stop_path = stop.to_string_lossy();
    thread::scope(|scope| {
        let small = scope.spawn(|| plane.client::<Waits>(&["while", &address, &small, &stop_path]));
        thread::sleep(Duration::from_millis(100));
        let bulk: Result<Bulk> = plane.client(&["bulk", &address, &large, "1", "1", "discard"]);
        std::fs::write(&stop, "")?;
        let waits = small.join().ok().context("the small client panicked")?;
        std::fs::remove_file(&stop)?;
        let bulk = bulk?;
        Ok((waits?, bulk.bytes as f64 / f64::from(1 << 30) / bulk.seconds))
    })
}
