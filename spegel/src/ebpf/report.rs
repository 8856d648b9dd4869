//! The table as it is given to people and programs.

use std::net::IpAddr;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use spegel_common::{Congestion, Role};

use super::table::Table;
use super::{Source, Upstream};

/// The most rows that are given, those with the most bytes.
const MOST_ROWS: usize = 1024;

/// All that is known of this node's connections. What cannot be known is left empty, never zero.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// `ebpf`, or `tcp_info`: only our own sockets were asked.
    pub source: String,
    /// Why it is not `ebpf`.
    pub reason: Option<String>,
    /// containerd's control group, whose traffic with upstream registries is seen.
    pub containerd: Option<String>,
    /// Why that is not seen.
    pub containerd_unseen: Option<String>,
    /// Events that could be told to no connection; their bytes are missing.
    pub lost_events: Option<u64>,
    /// Peers by role, those with the most bytes first.
    pub peers: Vec<PeerRow>,
    /// Rows that are not in `peers`, since there are too many.
    #[serde(default)]
    pub more_peers: u64,
    /// All peers of a role together.
    pub roles: Vec<RoleRow>,
}

/// One peer in one role.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PeerRow {
    /// The other end's address.
    pub address: IpAddr,
    /// What for: `served`, `fetched`, `containerd`, `router`, `upstream`, `other`.
    pub role: String,
    /// Connections that are open.
    pub open: u64,
    /// Connections that were established.
    pub opened: u64,
    /// Connections that could not be established.
    pub failed: Option<u64>,
    /// Connections that had no orderly end.
    pub reset: Option<u64>,
    /// Bytes that the other end acknowledged.
    pub sent: u64,
    /// Bytes that came.
    pub received: u64,
    /// Segments with data that were sent.
    pub segments: u64,
    /// Of these, those that were sent again.
    pub retransmits: u64,
    /// Smoothed round trip in microseconds.
    pub round_trip_us: Option<u32>,
    /// Shortest round trip in microseconds.
    pub min_round_trip_us: Option<u32>,
    /// What the path delivers, bytes a second.
    pub rate: Option<u64>,
    /// Congestion window, segments.
    pub window: Option<u32>,
    /// `slow start`, `avoidance`, `recovery`.
    pub congestion: Option<String>,
    /// Seconds since something was last counted.
    pub idle_seconds: f64,
}

/// All peers of a role.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct RoleRow {
    /// As [`PeerRow::role`].
    pub role: String,
    /// Connections that were established.
    pub opened: u64,
    /// Connections that could not be established.
    pub failed: Option<u64>,
    /// Connections that had no orderly end.
    pub reset: Option<u64>,
    /// Bytes that the other ends acknowledged.
    pub sent: u64,
    /// Bytes that came.
    pub received: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Bytes, both ways, of peers that have no row any more.
    pub unlisted_bytes: u64,
}

// === impl Report ===

impl Report {
    pub(super) fn new(table: &Table, source: &Source, upstream: &Upstream, now: Instant) -> Self {
        let is_kernels = table.is_kernels();
        let mut peers: Vec<_> = table.rows().collect();
        peers.sort_unstable_by_key(|(address, role, row)| (std::cmp::Reverse(row.bytes()), *role, *address));
        let more_peers = peers.len().saturating_sub(MOST_ROWS) as u64;
        peers.truncate(MOST_ROWS);
        let peers = peers.into_iter().map(|(address, role, row)| {
            let (counts, newest) = (&row.counts, &row.newest);
            PeerRow {
                address,
                role: role.name().to_owned(),
                open: counts.opened.saturating_sub(counts.closed),
                opened: counts.opened,
                failed: knows_failures(is_kernels, role).then_some(counts.failed),
                reset: is_kernels.then_some(counts.reset),
                sent: counts.sent,
                received: counts.received,
                segments: counts.segments,
                retransmits: counts.retransmits,
                round_trip_us: newest.srtt,
                min_round_trip_us: newest.min_rtt,
                rate: newest.rate,
                window: newest.window,
                congestion: newest.congestion.map(Congestion::name).map(str::to_owned),
                idle_seconds: now.saturating_duration_since(row.seen).as_secs_f64(),
            }
        });
        let peers = peers.collect();
        let roles = Role::ALL.into_iter().filter(|role| source.sees(*role, upstream)).map(|role| {
            let (counts, unlisted) = (table.total(role), table.unlisted(role));
            RoleRow {
                role: role.name().to_owned(),
                opened: counts.opened,
                failed: knows_failures(is_kernels, role).then_some(counts.failed),
                reset: is_kernels.then_some(counts.reset),
                sent: counts.sent,
                received: counts.received,
                retransmits: counts.retransmits,
                unlisted_bytes: unlisted.sent.saturating_add(unlisted.received),
            }
        });
        let (name, reason, containerd, unseen) = match source {
            Source::Kernel(_) => {
                let (group, why) = match &upstream.group {
                    Ok(group) => (Some(group.display().to_string()), None),
                    Err(why) => (None, Some(why.clone())),
                };
                ("ebpf", None, group, why)
            }
            Source::Sockets(refusal) => ("tcp_info", Some(refusal.to_string()), None, None),
        };
        Self {
            source: name.to_owned(),
            reason,
            containerd,
            containerd_unseen: unseen,
            lost_events: is_kernels.then(|| table.lost()),
            roles: roles.collect(),
            peers,
            more_peers,
        }
    }
}

// === impl Source ===

impl Source {
    /// Whether connections of this role are counted, or were: what was told once is not taken back when containerd's group goes.
    pub(super) fn sees(&self, role: Role, upstream: &Upstream) -> bool {
        match (self, role) {
            (Self::Kernel(_), Role::Upstream | Role::Other) => upstream.was_seen,
            (Self::Kernel(_), _) => true,
            // libp2p keeps its sockets to itself.
            (Self::Sockets(_), role) => matches!(role, Role::Served | Role::Fetched | Role::Containerd),
        }
    }
}

/// Without the kernel only those who connect know when that fails.
pub(super) fn knows_failures(is_kernels: bool, role: Role) -> bool {
    is_kernels || role == Role::Fetched
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ebpf::Refusal;
    use crate::ebpf::table::Moved;
    use crate::zerocopy::TcpInfo;

    #[test]
    fn what_sockets_do_not_tell_is_empty_and_not_zero() {
        let (mut table, now) = (Table::new(false), Instant::now());
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let info = TcpInfo { bytes_acked: 5, ..TcpInfo::default() };
        table.opened(address, Role::Served, now);
        table.sampled(address, Role::Served, &info, &Moved::default(), now);
        let report = Report::new(&table, &Source::Sockets(Refusal::Off), &Upstream::unseen(), now);
        let json = serde_json::to_value(&report).unwrap();
        let row = &json["peers"][0];
        assert_eq!((&row["sent"], &row["open"]), (&5.into(), &1.into()));
        for unknown in ["failed", "reset", "round_trip_us", "rate", "congestion"] {
            assert!(row[unknown].is_null(), "{unknown}: {row}");
        }
        assert!(json["lost_events"].is_null() && json["containerd"].is_null());
        let roles: Vec<_> = report.roles.iter().map(|row| row.role.as_str()).collect();
        assert_eq!(roles, ["served", "fetched", "containerd"], "of others nothing is known");
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
    }

    #[test]
    fn who_is_left_out_is_counted() {
        let (mut table, now) = (Table::new(false), Instant::now());
        for n in 0..MOST_ROWS as u32 + 7 {
            table.opened(IpAddr::from(n.to_be_bytes()), Role::Served, now);
        }
        let report = Report::new(&table, &Source::Sockets(Refusal::Off), &Upstream::unseen(), now);
        assert_eq!((report.peers.len(), report.more_peers), (MOST_ROWS, 7));
    }
}
