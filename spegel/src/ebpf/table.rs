//! The figures by peer and role as user space keeps them: they only grow, whatever becomes of the kernel's rows, and there is a bound to them.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use spegel_common::{Congestion, Counts, PeerKey, PeerStats, Role};

use super::counts::{difference, difference_of_part, each, sum};
use super::kernel::Reading;
use crate::zerocopy::TcpInfo;

/// Rows that are kept, beside those that the kernel has. What those were that went is in the totals of their roles.
const MOST_ROWS: usize = 8192;
/// Rows whose growth metrics tell by name; that of the others is told as one.
pub(super) const NAMED: usize = 20;
/// Rows that metrics have series of: those with a name, and those that had one and whose place no other needed yet.
pub(super) const SHOWN: usize = 60;
/// How often it is looked who has the names.
const RANKING: Duration = Duration::from_secs(1);
/// For how long what was lost on a path counts half.
const HALF_LIFE: Duration = Duration::from_secs(30);
/// For how long what was moved counts half for a name.
const NAME_HALF_LIFE: Duration = Duration::from_secs(600);

const ROLES: usize = Role::ALL.len();

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    rows: HashMap<(IpAddr, Role), Row>,
    /// What was counted in each role, of all peers.
    totals: [Counts; ROLES],
    /// Of that, what was told by a peer's name, whether or not the peer still has it.
    named_totals: [Counts; ROLES],
    /// The rest, as metrics have it.
    others: [Counts; ROLES],
    ranked_at: Option<Instant>,
    lost: u64,
    /// The kernel counts: it knows all columns.
    is_kernels: bool,
}

/// One peer in one role.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) counts: Counts,
    /// What of the counts metrics tell under the peer's name: what happened while it was named.
    pub(super) named: Counts,
    pub(super) is_named: bool,
    /// Whether metrics have series of it.
    pub(super) has_series: bool,
    /// What the kernel's row said last.
    last: PeerStats,
    pub(super) newest: Newest,
    pub(super) seen: Instant,
    path: Path,
    /// Bytes of late, which a name is given for.
    recent: Decaying,
}

/// What does not count up; nothing where it was never measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Newest {
    /// Bytes a second.
    pub(super) rate: Option<u64>,
    /// Microseconds.
    pub(super) srtt: Option<u32>,
    /// Microseconds.
    pub(super) min_rtt: Option<u32>,
    /// Segments.
    pub(super) window: Option<u32>,
    pub(super) congestion: Option<Congestion>,
}

/// An amount of which what is older counts less.
#[derive(Clone, Copy, Debug)]
struct Decaying {
    amount: f64,
    at: Instant,
}

/// Segments sent and sent again, of late.
#[derive(Clone, Copy, Debug)]
struct Path {
    segments: f64,
    retransmits: f64,
    at: Instant,
}

/// What one of our own sockets has moved: the content of the connection, without what SYN and FIN count as.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    sent: u64,
    received: u64,
    segments: u32,
    retransmits: u32,
}

// === impl Table ===

impl Table {
    pub(super) fn new(is_kernels: bool) -> Self {
        Self {
            rows: HashMap::new(),
            totals: [Counts::default(); ROLES],
            named_totals: [Counts::default(); ROLES],
            others: [Counts::default(); ROLES],
            ranked_at: None,
            lost: 0,
            is_kernels,
        }
    }

    /// Takes over what the kernel has counted.
    pub(super) fn apply(&mut self, reading: &Reading, now: Instant) {
        self.is_kernels = true;
        let mut grown = Vec::with_capacity(reading.peers.len());
        for (key, stats) in &reading.peers {
            let Some(role) = Role::from_number(key.role) else { continue };
            let key = (address(key), role);
            let row = self.rows.entry(key).or_insert_with(|| Row::new(now));
            let more = difference(&stats.counts, &row.last.counts);
            row.last = *stats;
            if more != Counts::default() {
                (row.newest, row.seen) = (Newest::of(stats), now);
                row.add(&more, now);
                grown.push((key, more));
            }
        }
        self.totals = reading.totals.map(|total| total.counts);
        self.lost = reading.totals.iter().map(|total| total.lost).sum();
        self.rank(now);
        for (key, more) in grown {
            self.tell(key, &more);
        }
        // The rows were read after these totals, so what is in no row by now is nobody's of those with a name; what has come since is looked at
        // the next time. Of what two processors do at the same moment a little may be early, so it is seen to that nothing falls.
        for ((others, total), named) in self.others.iter_mut().zip(&reading.settled).zip(&self.named_totals) {
            *others = each(others, &difference_of_part(&total.counts, named), u64::max);
        }
        if self.rows.len() > MOST_ROWS {
            // A row that the kernel has would come back with all that it has counted.
            let kept = reading.peers.iter().filter_map(|(key, _)| Some((address(key), Role::from_number(key.role)?)));
            match reading.is_whole {
                true => self.shrink(MOST_ROWS, &kept.collect()),
                // What was not met may be there.
                false => self.shrink(4 * MOST_ROWS, &HashSet::new()),
            }
        }
    }

    /// One of our own connections stands.
    pub(super) fn opened(&mut self, remote: IpAddr, role: Role, now: Instant) {
        self.add(remote, role, &Counts { opened: 1, ..Counts::default() }, None, now);
    }

    /// It is over.
    pub(super) fn closed(&mut self, remote: IpAddr, role: Role, now: Instant) {
        self.add(remote, role, &Counts { closed: 1, ..Counts::default() }, None, now);
    }

    /// One could not be had.
    pub(super) fn failed(&mut self, remote: IpAddr, role: Role, now: Instant) {
        self.add(remote, role, &Counts { failed: 1, ..Counts::default() }, None, now);
    }

    /// Takes over what one of our own sockets has moved since it was asked before, and what it says of its path.
    pub(super) fn sampled(
        &mut self,
        remote: IpAddr,
        role: Role,
        info: &TcpInfo,
        before: &Moved,
        now: Instant,
    ) -> Moved {
        let moved = Moved::of(info, role);
        let more = Counts {
            sent: moved.sent.saturating_sub(before.sent),
            received: moved.received.saturating_sub(before.received),
            segments: u64::from(moved.segments.saturating_sub(before.segments)),
            retransmits: u64::from(moved.retransmits.saturating_sub(before.retransmits)),
            ..Counts::default()
        };
        let newest = Newest {
            rate: (info.delivery_rate != 0).then_some(info.delivery_rate),
            srtt: (info.rtt != 0).then_some(info.rtt),
            min_rtt: (info.min_rtt != 0 && info.min_rtt != u32::MAX).then_some(info.min_rtt),
            window: Some(info.snd_cwnd),
            congestion: None,
        };
        self.add(remote, role, &more, Some(newest), now);
        moved
    }

    fn add(&mut self, remote: IpAddr, role: Role, more: &Counts, newest: Option<Newest>, now: Instant) {
        let key = (remote, role);
        let row = self.rows.entry(key).or_insert_with(|| Row::new(now));
        row.add(more, now);
        row.seen = now;
        row.newest = newest.unwrap_or(row.newest);
        sum(&mut self.totals[role as usize], more);
        // Each row of a few has its name at once; of many it is looked now and then, since that costs.
        if self.rows.len() <= NAMED || self.ranked_at.is_none_or(|at| now.saturating_duration_since(at) >= RANKING) {
            self.rank(now);
        }
        self.tell(key, more);
        self.others[role as usize] = difference_of_part(&self.totals[role as usize], &self.named_totals[role as usize]);
        self.shrink(MOST_ROWS, &HashSet::new());
    }

    /// Counts under the peer's name, if it has one.
    fn tell(&mut self, key: (IpAddr, Role), more: &Counts) {
        if let Some(row) = self.rows.get_mut(&key).filter(|row| row.is_named) {
            sum(&mut row.named, more);
            sum(&mut self.named_totals[key.1 as usize], more);
        }
    }

    /// Gives names to those that moved the most bytes of late. Who loses its name keeps its series, which stands still, as long as there is room: then the
    /// one goes of which nothing was heard for longest. Should it get a name again, it goes on where it stood.
    pub(super) fn rank(&mut self, now: Instant) {
        self.ranked_at = Some(now);
        let mut sizes: Vec<_> = self.rows.iter().map(|(key, row)| (row.recent.at(now), *key)).collect();
        if sizes.len() > NAMED {
            sizes.select_nth_unstable_by(NAMED - 1, |a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
            sizes.truncate(NAMED);
        }
        self.rows.values_mut().for_each(|row| row.is_named = false);
        for (_, key) in sizes {
            if let Some(row) = self.rows.get_mut(&key) {
                (row.is_named, row.has_series) = (true, true);
            }
        }
        let with_series = self.rows.values().filter(|row| row.has_series).count();
        if with_series > SHOWN {
            let nameless = self.rows.iter().filter(|(_, row)| row.has_series && !row.is_named);
            let mut ages: Vec<_> = nameless.map(|(key, row)| (row.seen, *key)).collect();
            ages.sort_unstable();
            for (_, key) in ages.iter().take(with_series - SHOWN) {
                self.rows.entry(*key).and_modify(|row| row.has_series = false);
            }
        }
    }

    /// Lets those go that were silent for longest, a quarter at once, so that it is not looked for with each new one. Those with series stay, and
    /// those that are `kept`; who once had a name goes last, for its series must not start anew.
    fn shrink(&mut self, most: usize, kept: &HashSet<(IpAddr, Role)>) {
        if self.rows.len() <= most {
            return;
        }
        let can_go = self.rows.iter().filter(|(key, row)| !row.has_series && !kept.contains(*key));
        let mut ages: Vec<_> = can_go.map(|(key, row)| (row.named != Counts::default(), row.seen, *key)).collect();
        ages.sort_unstable();
        for (.., key) in ages.iter().take(self.rows.len() - most + most / 4) {
            self.rows.remove(key);
        }
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = (IpAddr, Role, &Row)> {
        self.rows.iter().map(|((address, role), row)| (*address, *role, row))
    }

    pub(super) fn total(&self, role: Role) -> &Counts {
        &self.totals[role as usize]
    }

    /// What metrics tell of peers without a name.
    pub(super) fn others(&self, role: Role) -> &Counts {
        &self.others[role as usize]
    }

    /// What no row has.
    pub(super) fn unlisted(&self, role: Role) -> Counts {
        let mut listed = Counts::default();
        self.rows.iter().filter(|((_, own), _)| *own == role).for_each(|(_, row)| sum(&mut listed, &row.counts));
        difference_of_part(self.total(role), &listed)
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether resets, and connections of roles that are not ours, are known.
    pub(super) fn is_kernels(&self) -> bool {
        self.is_kernels
    }

    /// The share of the segments to this address that had to be sent again of late, from 0 to 1. Few segments say little.
    pub(super) fn loss(&self, address: IpAddr, now: Instant) -> f64 {
        /// So many good segments are taken for granted.
        const GRANTED: f64 = 50.0;
        let (mut segments, mut retransmits) = (GRANTED, 0.0);
        for role in [Role::Served, Role::Fetched, Role::Router] {
            if let Some(row) = self.rows.get(&(address, role)) {
                let path = row.path.at(now);
                segments += path.segments;
                retransmits += path.retransmits;
            }
        }
        (retransmits / segments).clamp(0.0, 1.0)
    }
}

// === impl Row ===

impl Row {
    fn new(now: Instant) -> Self {
        Self {
            counts: Counts::default(),
            named: Counts::default(),
            is_named: false,
            has_series: false,
            last: PeerStats::default(),
            newest: Newest::default(),
            seen: now,
            path: Path { segments: 0.0, retransmits: 0.0, at: now },
            recent: Decaying { amount: 0.0, at: now },
        }
    }

    fn add(&mut self, more: &Counts, now: Instant) {
        sum(&mut self.counts, more);
        self.path = self.path.at(now);
        self.path.segments += more.segments as f64;
        self.path.retransmits += more.retransmits as f64;
        self.recent =
            Decaying { amount: self.recent.at(now) + more.sent.saturating_add(more.received) as f64, at: now };
    }

    pub(super) fn bytes(&self) -> u64 {
        self.counts.sent.saturating_add(self.counts.received)
    }
}

impl Moved {
    fn of(info: &TcpInfo, role: Role) -> Self {
        Self {
            // Of our own sockets those that fetch are those that we open.
            sent: info.content_acked(role == Role::Fetched),
            received: info.content_received(role == Role::Fetched),
            segments: info.data_segs_out,
            retransmits: info.total_retrans,
        }
    }
}

impl Decaying {
    /// What of it counts at another time.
    fn at(self, now: Instant) -> f64 {
        self.amount * remaining(self.at, now, NAME_HALF_LIFE)
    }
}

impl Path {
    /// The same, as it counts at another time.
    fn at(self, now: Instant) -> Self {
        let share = remaining(self.at, now, HALF_LIFE);
        Self { segments: self.segments * share, retransmits: self.retransmits * share, at: now }
    }
}

impl Newest {
    fn of(stats: &PeerStats) -> Self {
        Self {
            rate: (stats.rate != 0).then_some(stats.rate),
            srtt: (stats.srtt != 0).then_some(stats.srtt),
            min_rtt: (stats.min_rtt != 0).then_some(stats.min_rtt),
            window: (stats.window != 0).then_some(stats.window),
            congestion: Congestion::from_number(stats.congestion),
        }
    }
}

/// Which part of what was so much at one time counts at another one.
fn remaining(at: Instant, now: Instant, half_life: Duration) -> f64 {
    0.5f64.powf(now.saturating_duration_since(at).as_secs_f64() / half_life.as_secs_f64())
}

fn address(key: &PeerKey) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(key.address)).to_canonical()
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
