//! `spegel peers`: what a running process knows of its connections, as a table that is drawn anew, once, or as JSON.

mod live;

use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::{Context as _, Result};

use super::ask::ask;
use crate::cli::{PeersOrder, PeersSettings, PeersShow};
use crate::ebpf::{PeerRow, Report};
use crate::web::PEERS_PATH;

/// The table's heads, and how wide its columns are.
const COLUMNS: [(&str, usize); 13] = [
    ("peer", 24),
    ("role", 10),
    ("open", 5),
    ("conns", 8),
    ("failed", 6),
    ("reset", 6),
    ("sent", 9),
    ("received", 9),
    ("per s", 9),
    ("rtt", 8),
    ("resent to", 9),
    ("path/s", 9),
    ("idle", 6),
];

/// Shows what the process at the settings' address knows.
///
/// # Errors
/// Nobody answers there, or not as spegel does.
pub(super) fn show(settings: &PeersSettings) -> Result<()> {
    match settings.show {
        PeersShow::Json => println!("{}", serde_json::to_string_pretty(&fetch(settings.addr)?)?),
        PeersShow::Once => {
            let mut report = fetch(settings.addr)?;
            sort(&mut report.peers, settings.order, None);
            print!("{}", text(&report));
        }
        PeersShow::Live(interval) => live::run(settings.addr, settings.order, interval)?,
    }
    Ok(())
}

fn fetch(addr: SocketAddr) -> Result<Report> {
    let body = ask(addr, "GET", PEERS_PATH, "")?;
    serde_json::from_slice(&body).with_context(|| format!("{addr} does not answer as spegel does"))
}

/// A report before the present one, and how many seconds lie between.
type Before<'a> = Option<(&'a Report, f64)>;

/// Bytes a second since the report before, if the peer is in both.
fn speed(row: &PeerRow, before: Before<'_>) -> Option<f64> {
    let (before, seconds) = before?;
    let is_same = |other: &&PeerRow| other.address == row.address && other.role == row.role;
    let last = match before.peers.iter().find(is_same) {
        Some(row) => row.sent + row.received,
        // It may have been there, and not among those that were told.
        None if before.more_peers > 0 => return None,
        None => 0,
    };
    Some((row.sent + row.received).saturating_sub(last) as f64 / seconds.max(0.001))
}

/// The largest first, but for addresses; what is not known comes last.
fn sort(rows: &mut [PeerRow], order: PeersOrder, before: Before<'_>) {
    let descending = |a: f64, b: f64| b.total_cmp(&a);
    rows.sort_by(|a, b| {
        let by = |of: &dyn Fn(&PeerRow) -> f64| descending(of(a), of(b));
        let first = match order {
            PeersOrder::Bytes => by(&|row| (row.sent + row.received) as f64),
            PeersOrder::Rate => by(&|row| speed(row, before).unwrap_or(-1.0)),
            PeersOrder::Rtt => by(&|row| row.round_trip_us.map_or(-1.0, f64::from)),
            PeersOrder::Retransmits => by(&|row| row.retransmits as f64),
            PeersOrder::Errors => by(&|row| (row.failed.unwrap_or(0) + row.reset.unwrap_or(0)) as f64),
            PeersOrder::Address => std::cmp::Ordering::Equal,
        };
        first.then_with(|| (a.address, &a.role).cmp(&(b.address, &b.role)))
    });
}

/// A row's fields; a dash for what is not known.
fn fields(row: &PeerRow, before: Before<'_>) -> [String; COLUMNS.len()] {
    let dash = || "-".to_owned();
    let number = |number: Option<u64>| number.map_or_else(dash, |number| number.to_string());
    let share = if row.segments == 0 { 0.0 } else { 100.0 * row.retransmits as f64 / row.segments as f64 };
    [
        row.address.to_string(),
        row.role.clone(),
        row.open.to_string(),
        row.opened.to_string(),
        number(row.failed),
        number(row.reset),
        bytes(row.sent as f64),
        bytes(row.received as f64),
        speed(row, before).map_or_else(dash, bytes),
        row.round_trip_us.map_or_else(dash, |us| format!("{:.2} ms", f64::from(us) / 1e3)),
        format!("{share:.2} %"),
        row.rate.map_or_else(dash, |rate| bytes(rate as f64)),
        format!("{:.0} s", row.idle_seconds),
    ]
}

/// Where the figures come from, and what is not seen.
fn origin(report: &Report) -> String {
    let mut text = match (report.source.as_str(), &report.reason) {
        ("ebpf", _) => "counted by the kernel".to_owned(),
        (_, Some(reason)) => format!("only what our own sockets tell: {reason}"),
        (_, None) => "only what our own sockets tell".to_owned(),
    };
    match (&report.containerd, &report.containerd_unseen) {
        (Some(group), _) => text.push_str(&format!("; containerd's group is {group}")),
        (None, Some(why)) => text.push_str(&format!("; upstream is not seen: {why}")),
        (None, None) => {}
    }
    if let Some(lost) = report.lost_events.filter(|lost| *lost > 0) {
        text.push_str(&format!("; {lost} events are missing"));
    }
    text
}

/// How many rows are not shown: they are those with the fewest bytes, whatever the others are sorted by.
fn left_out(more: u64, shown: usize) -> String {
    format!("{more} more: only the {shown} with the most bytes are told")
}

/// All of it as text.
fn text(report: &Report) -> String {
    let mut text = origin(report) + "\n";
    let mut line = |fields: [String; COLUMNS.len()]| {
        let mut row = String::new();
        for (number, (field, (_, width))) in fields.iter().zip(COLUMNS).enumerate() {
            let _ = if number < 2 { write!(row, "{field:<width$} ") } else { write!(row, "{field:>width$} ") };
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(COLUMNS.map(|(name, _)| name.to_owned()));
    report.peers.iter().for_each(|row| line(fields(row, None)));
    for role in report.roles.iter().filter(|role| role.unlisted_bytes > 0) {
        let _ = writeln!(text, "{} of peers without a row ({})", bytes(role.unlisted_bytes as f64), role.role);
    }
    if report.more_peers > 0 {
        let _ = writeln!(text, "{}", left_out(report.more_peers, report.peers.len()));
    }
    text
}

fn bytes(bytes: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len() - 1).find(|unit| bytes < 1000.0 * 1024f64.powi(*unit as i32)).unwrap_or(UNITS.len() - 1);
    let amount = bytes / 1024f64.powi(unit as i32);
    let digits = usize::from(unit > 0 && amount < 99.5);
    format!("{amount:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(in crate::app::peers) fn row(n: u8, sent: u64) -> PeerRow {
        PeerRow {
            address: [10, 0, 0, n].into(),
            role: "served".into(),
            open: 1,
            opened: 2,
            failed: None,
            reset: Some(u64::from(n)),
            sent,
            received: 0,
            segments: 200,
            retransmits: 3,
            round_trip_us: (n > 1).then_some(1000 * u32::from(n)),
            min_round_trip_us: None,
            rate: None,
            window: None,
            congestion: None,
            idle_seconds: 4.0,
        }
    }

    pub(in crate::app::peers) fn report(peers: Vec<PeerRow>) -> Report {
        Report {
            source: "ebpf".into(),
            reason: None,
            containerd: None,
            containerd_unseen: Some("nobody knows where it is".into()),
            lost_events: Some(3),
            peers,
            more_peers: 0,
            roles: vec![],
        }
    }

    #[test]
    fn rows_are_sorted_by_what_is_asked_for() {
        let before = report(vec![row(1, 0), row(2, 0), row(3, 2900)]);
        let sorted = |order| {
            let mut rows = vec![row(1, 100), row(2, 2000), row(3, 3000)];
            sort(&mut rows, order, Some((&before, 1.0)));
            rows.iter().map(|row| row.reset.unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(sorted(PeersOrder::Bytes), [3, 2, 1]);
        assert_eq!(sorted(PeersOrder::Rate), [2, 1, 3]);
        assert_eq!(sorted(PeersOrder::Rtt), [3, 2, 1], "what is not known comes last");
        assert_eq!(sorted(PeersOrder::Address), [1, 2, 3]);
        assert_eq!(sorted(PeersOrder::Errors), [3, 2, 1]);
    }

    #[test]
    fn what_is_not_known_is_a_dash() {
        let text = text(&Report { more_peers: 276, ..report(vec![row(1, 1536 << 20)]) });
        let (text, last) = text.trim_end().rsplit_once('\n').unwrap();
        assert_eq!(last, "276 more: only the 1 with the most bytes are told");
        assert!(text.contains("upstream is not seen: nobody knows where it is; 3 events are missing\n"), "{text}");
        let line = text.lines().last().unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(line, "10.0.0.1 served 1 2 - 1 1.5 GiB 0 B - - 1.50 % - 4 s");
    }

    #[test]
    fn bytes_are_short() {
        let texts: Vec<_> = [0.0, 999.0, 1023.0, 1e5, 1e9, 5e15].map(bytes).into();
        assert_eq!(texts, ["0 B", "999 B", "1.0 KiB", "97.7 KiB", "954 MiB", "4547 TiB"]);
    }
}
