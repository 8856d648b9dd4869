//! What becomes of a connection, told to the maps. The kernel holds the socket's lock meanwhile, so a connection's own row has one writer;
//! all other rows have many, and are added to atomically.

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::programs::SockOpsContext;
use spegel_common::{Congestion, Connection, Counts, PeerKey, PeerStats, Totals};

use crate::maps::{CONNECTIONS, PEERS, TOTALS};
use crate::sockets::{Site, field, key};

/// What to be called for: timeouts, changes of state, once a round trip.
const WANTED: i32 = 1 | (1 << 2) | (1 << 3);
/// A connection is not looked at again within this time, in nanoseconds, for a round trip alone: on a fast link there are thousands a second.
const PAUSE: u64 = 50_000_000;
/// So many connections are looked at in a tick of the kernel's clock (1 to 10 ms) for a round trip alone: with small requests each is a round trip,
/// and what is passed over is counted the next time.
const LOOKS: u32 = 8;
/// The kernel's flag: make no row where there is one.
const NO_EXIST: u64 = 1;
/// The kernel's word for a round trip that was never measured.
const NEVER: u32 = u32::MAX;

// The kernel's numbers of the states of a socket.
const ESTABLISHED: u32 = 1;
const SYN_SENT: u32 = 2;
const FIN_WAIT1: u32 = 4;
const FIN_WAIT2: u32 = 5;
const TIME_WAIT: u32 = 6;
const CLOSE_WAIT: u32 = 8;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;

/// Adds to a number that several processors may add to.
macro_rules! add {
    ($to:expr, $field:ident, $amount:expr) => {{
        let amount: u64 = $amount;
        if amount != 0 {
            atomic_add(&raw mut (*$to).$field, amount);
        }
    }};
}

#[inline(always)]
unsafe fn atomic_add(to: *mut u64, amount: u64) {
    // The target has no compare-and-swap in its first version, for which the library leaves out all that reads and writes at once; an addition
    // whose result nobody wants is there since the first.
    // SAFETY: the caller's pointer is into a map's row, which the verifier has checked.
    unsafe { core::intrinsics::atomic_xadd::<u64, u64, { core::intrinsics::AtomicOrdering::Relaxed }>(to, amount) };
}

/// The tick in which connections were last looked at, and at how many. Several processors may change them at once, which makes it one more or less.
#[unsafe(no_mangle)]
static mut TICK: u64 = 0;
#[unsafe(no_mangle)]
static mut LOOKED: u32 = 0;

/// Whether this tick's looks are used up. This is all that happens in most calls: it must cost next to nothing.
#[inline(always)]
pub fn has_looked_enough() -> bool {
    // SAFETY: statics of this program, and a helper that only reads a clock.
    unsafe {
        let tick = bpf_jiffies64();
        if core::ptr::read_volatile(&raw const TICK) != tick {
            core::ptr::write_volatile(&raw mut TICK, tick);
            core::ptr::write_volatile(&raw mut LOOKED, 1);
            return false;
        }
        let looked = core::ptr::read_volatile(&raw const LOOKED);
        if looked >= LOOKS {
            return true;
        }
        core::ptr::write_volatile(&raw mut LOOKED, looked + 1);
        false
    }
}

/// A connection is being opened, or was.
#[inline(always)]
pub fn begin(context: &SockOpsContext, id: u64, key: PeerKey, active: bool) {
    let looked_at = now();
    let connection =
        Connection { key, active: active as u32, sent: 0, received: 0, looked_at, segments: 0, retransmits: 0 };
    if CONNECTIONS.insert(id, connection, 0).is_err() {
        lost(&key);
        return;
    }
    // Fails for none that was just made.
    let _ = context.set_cb_flags(field!(context, bpf_sock_ops_cb_flags) as i32 | WANTED);
}

/// It stands.
#[inline(always)]
pub fn established(id: u64) {
    let Some(connection) = CONNECTIONS.get_ptr_mut(id) else { return };
    // SAFETY: a row that the verifier has checked.
    let key = unsafe { (*connection).key };
    count(&key, &Counts { opened: 1, ..NOTHING });
}

/// A round trip or a timeout has passed.
#[inline(always)]
pub fn look(context: &SockOpsContext, id: u64, site: Site, spare: bool) {
    let Some(connection) = CONNECTIONS.get_ptr_mut(id) else {
        return missed(context, site);
    };
    let now = now();
    // SAFETY: a row that the verifier has checked.
    unsafe {
        if spare && now.wrapping_sub((*connection).looked_at) < PAUSE {
            return;
        }
        (*connection).looked_at = now;
        advance(context, connection, false, NOTHING, now);
    }
}

/// It has ended.
#[inline(always)]
pub fn end(context: &SockOpsContext, id: u64, site: Site) {
    let Some(connection) = CONNECTIONS.get_ptr_mut(id) else {
        return missed(context, site);
    };
    let state = field!(context, state);
    let is_failed = state == SYN_SENT;
    let is_reset = state == ESTABLISHED || state == FIN_WAIT1 || state == CLOSE_WAIT;
    let counts =
        Counts { closed: !is_failed as u64, failed: is_failed as u64, reset: is_reset as u64, ..NOTHING };
    // SAFETY: a row that the verifier has checked.
    unsafe { advance(context, connection, true, counts, now()) };
    // Another may have pushed it out.
    let _ = CONNECTIONS.remove(id);
}

const NOTHING: Counts =
    Counts { opened: 0, closed: 0, failed: 0, reset: 0, sent: 0, received: 0, segments: 0, retransmits: 0 };

/// Counts what a connection has moved since it was last looked at.
#[inline(always)]
unsafe fn advance(context: &SockOpsContext, connection: *mut Connection, ends: bool, mut counts: Counts, now: u64) {
    let state = field!(context, state);
    // The kernel counts the bytes of the sequence numbers, of which SYN and FIN have one each.
    // As long as one is on its way it is held back, for the kernel calls at a round trip when it has taken the acknowledgement and not yet the next state.
    let fin_under_way = state == FIN_WAIT1 || state == CLOSING || state == LAST_ACK;
    let fin_acknowledged =
        state == FIN_WAIT2 || state == TIME_WAIT || (fin_under_way && (!ends || state != FIN_WAIT1));
    // Whoever has closed and read on gets the other's FIN last; one who has closed and let go gets it when the socket is gone, and is a byte short.
    let fin_received =
        state == CLOSE_WAIT || state == LAST_ACK || state == CLOSING || state == TIME_WAIT || (ends && state == FIN_WAIT2);
    let received = field!(context, bytes_received).saturating_sub(fin_received as u64);
    let acknowledged = field!(context, bytes_acked).saturating_sub(fin_acknowledged as u64);
    let (segments, retransmits) = (field!(context, data_segs_out), field!(context, total_retrans));
    // SAFETY: the caller's row is one that the verifier has checked.
    unsafe {
        let key = (*connection).key;
        // What is held back may have been there before the FIN, and has been counted then.
        let sent = acknowledged.saturating_sub((*connection).active as u64).max((*connection).sent);
        counts.sent = sent - (*connection).sent;
        counts.received = received.saturating_sub((*connection).received);
        counts.segments = segments.wrapping_sub((*connection).segments) as u64;
        counts.retransmits = retransmits.wrapping_sub((*connection).retransmits) as u64;
        (*connection).sent = sent;
        (*connection).received = received;
        (*connection).segments = segments;
        (*connection).retransmits = retransmits;
        if let Some(row) = count(&key, &counts) {
            describe(context, row, now);
        }
    }
}

/// The newest of what does not count up.
#[inline(always)]
unsafe fn describe(context: &SockOpsContext, row: *mut PeerStats, now: u64) {
    let (srtt, min_rtt) = (field!(context, srtt_us) >> 3, field!(context, rtt_min));
    let (delivered, interval) = (field!(context, rate_delivered) as u64, field!(context, rate_interval_us) as u64);
    let (window, mss) = (field!(context, snd_cwnd), field!(context, mss_cache) as u64);
    let in_recovery = field!(context, lost_out) != 0 || field!(context, retrans_out) != 0;
    let congestion = if in_recovery {
        Congestion::Recovery
    } else if window < field!(context, snd_ssthresh) {
        Congestion::SlowStart
    } else {
        Congestion::Avoidance
    };
    // SAFETY: the caller's row is one that the verifier has checked. Of several writers any may be the last.
    unsafe {
        (*row).seen = now;
        (*row).window = window;
        (*row).congestion = congestion as u32;
        if srtt != 0 {
            (*row).srtt = srtt;
        }
        if min_rtt != 0 && min_rtt != NEVER {
            (*row).min_rtt = min_rtt;
        }
        if interval != 0 {
            (*row).rate = delivered * mss * 1_000_000 / interval;
        }
    }
}

/// Counts for the role, and for the peer, whose row is returned.
#[inline(always)]
fn count(key: &PeerKey, counts: &Counts) -> Option<*mut PeerStats> {
    let totals = TOTALS.get_ptr_mut(key.role)?;
    // SAFETY: a row that the verifier has checked.
    unsafe { add_all(&raw mut (*totals).counts, counts) };
    let row = match PEERS.get_ptr_mut(key) {
        Some(row) => row,
        None => {
            // Another processor may have been faster. Without room for a row the totals have it all the same.
            let _ = PEERS.insert(key, EMPTY, NO_EXIST);
            PEERS.get_ptr_mut(key)?
        }
    };
    // SAFETY: as above.
    unsafe { add_all(&raw mut (*row).counts, counts) };
    Some(row)
}

const EMPTY: PeerStats =
    PeerStats { counts: NOTHING, rate: 0, seen: 0, srtt: 0, min_rtt: 0, window: 0, congestion: 0 };

#[inline(always)]
unsafe fn add_all(to: *mut Counts, counts: &Counts) {
    // SAFETY: the caller's.
    unsafe {
        add!(to, opened, counts.opened);
        add!(to, closed, counts.closed);
        add!(to, failed, counts.failed);
        add!(to, reset, counts.reset);
        add!(to, sent, counts.sent);
        add!(to, received, counts.received);
        add!(to, segments, counts.segments);
        add!(to, retransmits, counts.retransmits);
    }
}

/// An event of a connection that is not known: it was pushed out, or the other program knows it.
#[inline(always)]
fn missed(context: &SockOpsContext, site: Site) {
    if let Some(key) = key(context, site, None)
        && key.role != spegel_common::Role::Other as u32
    {
        lost(&key);
    }
}

#[inline(always)]
fn lost(key: &PeerKey) {
    if let Some(totals) = TOTALS.get_ptr_mut(key.role) {
        let totals: *mut Totals = totals;
        // SAFETY: a row that the verifier has checked.
        unsafe { add!(totals, lost, 1) };
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: it only reads a clock.
    unsafe { bpf_ktime_get_ns() }
}
