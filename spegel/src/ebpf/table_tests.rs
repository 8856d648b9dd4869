#![allow(clippy::unwrap_used)]
use super::*;
use spegel_common::Totals;

fn ip(n: u32) -> IpAddr {
    IpAddr::from((0x0a00_0000 + n).to_be_bytes())
}

fn key(n: u32, role: Role) -> PeerKey {
    let IpAddr::V4(address) = ip(n) else { unreachable!() };
    PeerKey { address: address.to_ipv6_mapped().octets(), role: role as u32 }
}

fn sent(bytes: u64) -> PeerStats {
    PeerStats { counts: Counts { opened: 1, sent: bytes, ..Counts::default() }, ..PeerStats::default() }
}

fn totals(bytes: u64) -> [Totals; ROLES] {
    let mut totals = [Totals::default(); ROLES];
    totals[Role::Served as usize].counts.sent = bytes;
    totals
}

/// What the kernel says of peers that were sent so many bytes, and of so many bytes in all.
fn reading(rows: &[(u32, u64)], total: u64) -> Reading {
    Reading {
        peers: rows.iter().map(|(n, bytes)| (key(*n, Role::Served), sent(*bytes))).collect(),
        is_whole: true,
        settled: totals(total),
        totals: totals(total),
    }
}

fn bytes(table: &Table, n: u32) -> u64 {
    table.rows[&(ip(n), Role::Served)].counts.sent
}

#[test]
fn a_row_that_the_kernel_made_anew_counts_on() {
    let (mut table, now) = (Table::new(true), Instant::now());
    table.apply(&reading(&[(1, 100)], 100), now);
    table.apply(&reading(&[(1, 150)], 150), now);
    assert_eq!(bytes(&table, 1), 150);
    table.apply(&reading(&[], 170), now);
    table.apply(&reading(&[(1, 30)], 200), now);
    assert_eq!(bytes(&table, 1), 180);
    assert_eq!(table.unlisted(Role::Served).sent, 20, "what nobody read of the old row");
}

/// Metrics must not go backwards, whoever is named when, and must sum up to what was counted.
#[test]
fn what_metrics_tell_grows_and_sums_up() {
    let (mut table, now) = (Table::new(true), Instant::now());
    let mut told: HashMap<u32, u64> = HashMap::new();
    let mut others = 0;
    for round in 1..=40u32 {
        // Who is large changes all the time.
        let rows: Vec<_> = (0..60).map(|n| (n, u64::from(round * 10 + (n * round) % 61 * round))).collect();
        let rows: Vec<_> = rows.iter().map(|(n, bytes)| (*n, bytes + told.get(n).copied().unwrap_or(0))).collect();
        let total = rows.iter().map(|(_, bytes)| bytes).sum::<u64>().max(others);
        table.apply(&reading(&rows, total), now);
        let named: Vec<_> = table.rows().filter(|(.., row)| row.named.sent > 0).collect();
        assert!(table.rows().filter(|(.., row)| row.is_named).count() <= NAMED);
        let sum: u64 = named.iter().map(|(.., row)| row.named.sent).sum::<u64>() + table.others(Role::Served).sent;
        assert_eq!(sum, table.total(Role::Served).sent);
        assert!(table.others(Role::Served).sent >= others);
        others = table.others(Role::Served).sent;
        told.extend(rows);
    }
    assert!(others > 0);
}

/// What comes between the reading of the rows and that of the totals is counted once, under the name that it gets a second later.
#[test]
fn what_lands_during_a_reading_is_counted_once() {
    let (mut table, now) = (Table::new(true), Instant::now());
    for round in 1..=10 {
        let before = reading(&[(1, 100 * round)], 100 * round);
        table.apply(&Reading { totals: totals(100 * round + 70), ..before }, now);
        assert_eq!(table.others(Role::Served).sent, 0, "round {round}");
        assert_eq!(table.total(Role::Served).sent, 100 * round + 70);
    }
    // What no row has is nobody's, and stays that.
    table.apply(&reading(&[(1, 1070)], 1100), now);
    assert_eq!((table.others(Role::Served).sent, table.named_totals[0].sent), (30, 1070));
}

/// Hundreds of peers are the largest, one after the other: few have series, and those that have them never fall.
#[test]
fn series_are_bounded_and_go_on_where_they_stood() {
    let (mut table, start) = (Table::new(true), Instant::now());
    let mut counted: HashMap<u32, u64> = HashMap::new();
    let mut told: HashMap<IpAddr, u64> = HashMap::new();
    let mut others = 0;
    for round in 0..300u32 {
        // The second time around all that were there are larger still.
        for n in 0..5 {
            *counted.entry((5 * round + n) % 1000).or_default() += u64::from(round + 1) * 1000;
        }
        let mut rows: Vec<_> = counted.iter().map(|(n, bytes)| (*n, *bytes)).collect();
        rows.sort_unstable();
        table.apply(&reading(&rows, counted.values().sum()), start + RANKING * round);
        let series: Vec<_> = table.rows().filter(|(.., row)| row.has_series).collect();
        assert!(series.len() <= SHOWN);
        for (address, _, row) in series {
            let before = told.insert(address, row.named.sent).unwrap_or(0);
            assert!(row.named.sent >= before, "{address} fell");
            assert!(row.named.sent <= row.counts.sent);
        }
        assert!(table.others(Role::Served).sent >= others);
        others = table.others(Role::Served).sent;
        assert_eq!(others + table.named_totals[0].sent, table.total(Role::Served).sent);
    }
    assert!(told.len() > 5 * SHOWN);
}

/// Peers that are gone must not keep the names from those that are there, however much they moved.
#[test]
fn who_is_gone_gives_its_name_to_who_is_there() {
    let (mut table, start) = (Table::new(true), Instant::now());
    let gone = 0..NAMED as u32;
    let mut rows: Vec<_> = gone.clone().map(|n| (n, 1 << 40)).collect();
    table.apply(&reading(&rows, rows.iter().map(|(_, bytes)| bytes).sum()), start);
    assert!(table.rows().all(|(.., row)| row.is_named));
    let mut others = 0;
    for round in 1..=24u32 {
        // All others together move a MiB in ten minutes each.
        rows.truncate(NAMED);
        rows.extend((100..110).map(|n| (n, u64::from(round) << 20)));
        let total = rows.iter().map(|(_, bytes)| bytes).sum();
        table.apply(&reading(&rows, total), start + NAME_HALF_LIFE * round);
        let named: u64 = table.rows().map(|(.., row)| row.named.sent).sum();
        assert_eq!(named + table.others(Role::Served).sent, total);
        assert!(table.others(Role::Served).sent >= others, "it fell");
        others = table.others(Role::Served).sent;
    }
    assert!((100..110).all(|n| table.rows[&(ip(n), Role::Served)].is_named), "after four hours");
    for n in gone {
        let row = &table.rows[&(ip(n), Role::Served)];
        assert!(row.has_series && row.named.sent == 1 << 40, "its series stands still");
    }
}

/// Who comes later and is larger gets a name also where nobody reads the kernel's maps.
#[test]
fn without_the_kernel_names_are_given_anew() {
    let (mut table, start) = (Table::new(false), Instant::now());
    let info = |bytes| TcpInfo { bytes_acked: bytes, ..TcpInfo::default() };
    let (mut others, peers) = (0, 5 * NAMED as u32);
    for n in 0..peers {
        let now = start + RANKING * n;
        table.opened(ip(n), Role::Served, now);
        table.sampled(ip(n), Role::Served, &info(1000 * u64::from(n + 1)), &Moved::default(), now);
        table.sampled(ip(n), Role::Served, &info(2000 * u64::from(n + 1)), &Moved::default(), now + RANKING);
        let all = table.others(Role::Served).sent + table.named_totals[0].sent;
        assert_eq!(all, table.total(Role::Served).sent);
        assert!(table.others(Role::Served).sent >= others);
        others = table.others(Role::Served).sent;
    }
    let named: Vec<_> = table.rows().filter(|(.., row)| row.is_named).map(|(address, ..)| address).collect();
    assert_eq!(named.len(), NAMED);
    assert!((peers - NAMED as u32..peers).all(|n| named.contains(&ip(n))), "{named:?}");
    assert!(table.rows().filter(|(.., row)| row.has_series).count() <= SHOWN);
}

/// The kernel has fewer rows than this table; one that it still has must not be forgotten, or all of it would count again.
#[test]
fn a_row_that_the_kernel_has_is_not_counted_again() {
    let (mut table, start) = (Table::new(true), Instant::now());
    let old = 100..1100;
    let mut total = 0;
    for round in 0..20u32 {
        // All those of old are silent, and still there; the others are new each time.
        let fresh = 10_000 * (round + 1)..10_000 * (round + 1) + 4000;
        let rows: Vec<_> = old.clone().chain(fresh).map(|n| (n, 10)).collect();
        total = 10 * (1000 + 4000 * u64::from(round + 1));
        table.apply(&reading(&rows, total), start + RANKING * round);
    }
    assert!(table.rows.len() <= MOST_ROWS + SHOWN, "{}", table.rows.len());
    assert!(old.clone().all(|n| bytes(&table, n) == 10));
    let sum: u64 = table.rows().map(|(.., row)| row.counts.sent).sum();
    assert_eq!(sum + table.unlisted(Role::Served).sent, total);
    // A reading that missed some proves nothing.
    let missed = Reading { is_whole: false, ..reading(&[(1, 10)], total + 10) };
    table.apply(&missed, start + RANKING * 30);
    assert!(old.clone().all(|n| bytes(&table, n) == 10));
}

#[test]
fn rows_are_bounded_and_the_largest_stay() {
    let (mut table, start) = (Table::new(false), Instant::now());
    let info = |bytes| TcpInfo { bytes_acked: bytes, ..TcpInfo::default() };
    for n in 0..3 * MOST_ROWS as u32 {
        let now = start + Duration::from_millis(u64::from(n));
        let bytes = if n < 10 { 1_000_000 } else { 10 };
        table.sampled(ip(n), Role::Served, &info(bytes), &Moved::default(), now);
    }
    assert!(table.rows.len() <= MOST_ROWS);
    assert!((0..10).all(|n| bytes(&table, n) == 1_000_000), "they are named");
    let all = 10_000_000 + 10 * (3 * MOST_ROWS as u64 - 10);
    assert_eq!(table.total(Role::Served).sent, all);
    let listed: u64 = table.rows().map(|(.., row)| row.counts.sent).sum();
    assert_eq!(table.unlisted(Role::Served).sent, all - listed);
}

#[test]
fn loss_is_of_late_and_few_segments_say_little() {
    let (mut table, now) = (Table::new(false), Instant::now());
    let info =
        |segments, retransmits| TcpInfo { data_segs_out: segments, total_retrans: retransmits, ..TcpInfo::default() };
    table.sampled(ip(1), Role::Served, &info(2, 1), &Moved::default(), now);
    assert!(table.loss(ip(1), now) < 0.03);
    table.sampled(ip(1), Role::Router, &info(1000, 100), &Moved::default(), now);
    let loss = table.loss(ip(1), now);
    assert!((0.08..0.1).contains(&loss), "{loss}");
    assert!(table.loss(ip(1), now + 10 * HALF_LIFE) < 0.01, "it may be well again");
    assert!(table.loss(ip(2), now) == 0.0);
}

#[test]
fn a_socket_counts_what_it_has_moved_since_it_was_asked_last() {
    let (mut table, now) = (Table::new(false), Instant::now());
    let first = TcpInfo { bytes_acked: 101, rtt: 7, ..TcpInfo::default() };
    let second = TcpInfo { bytes_acked: 151, bytes_received: 9, ..TcpInfo::default() };
    table.opened(ip(1), Role::Fetched, now);
    let moved = table.sampled(ip(1), Role::Fetched, &first, &Moved::default(), now);
    table.sampled(ip(1), Role::Fetched, &second, &moved, now);
    table.closed(ip(1), Role::Fetched, now);
    let row = &table.rows[&(ip(1), Role::Fetched)];
    let expected = Counts { opened: 1, closed: 1, sent: 150, received: 9, ..Counts::default() };
    assert_eq!((row.counts, row.named), (expected, expected));
    assert_eq!(table.others(Role::Fetched), &Counts::default());
}
