//! Types that spegel's kernel programs share with user space.
//!
//! Both sides are built from this file, by different compilers: all layouts are C's, without padding.
#![no_std]

/// An IPv6 address, or an IPv4 one in its IPv4-mapped form.
pub type Address = [u8; 16];

/// What a connection is for, as seen from this node. The numbers are those of [`PeerKey::role`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Role {
    /// Another node fetches from this one's registry.
    Served = 0,
    /// This node fetches from another one's registry.
    Fetched = 1,
    /// This node's own containerd at this node's registry.
    Containerd = 2,
    /// libp2p, either way.
    Router = 3,
    /// containerd at an upstream registry.
    Upstream = 4,
    /// What else containerd's control group opens, which is no pull: the API server, the node's ports.
    Other = 5,
}

impl Role {
    /// All of them, by number.
    pub const ALL: [Self; 6] =
        [Self::Served, Self::Fetched, Self::Containerd, Self::Router, Self::Upstream, Self::Other];

    /// The role with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Its name in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::Fetched => "fetched",
            Self::Containerd => "containerd",
            Self::Router => "router",
            Self::Upstream => "upstream",
            Self::Other => "other",
        }
    }
}

/// Whom a row of the map of peers is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct PeerKey {
    /// The other end's address.
    pub address: Address,
    /// A [`Role`]'s number.
    pub role: u32,
}

/// What counts up, of a peer in a role, or of all peers in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Connections that were established.
    pub opened: u64,
    /// Of these, those that have ended.
    pub closed: u64,
    /// Connections that this side tried to open and that were refused or not answered.
    pub failed: u64,
    /// Of those that ended, those that had no orderly end: a reset of either side, or nothing was heard for too long.
    pub reset: u64,
    /// Bytes that the other end has acknowledged.
    pub sent: u64,
    /// Bytes that came, in order.
    pub received: u64,
    /// Segments with data that were sent, those sent again among them.
    pub segments: u64,
    /// Segments that were sent again.
    pub retransmits: u64,
}

/// A row of the map of peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PeerStats {
    /// What counts up.
    pub counts: Counts,
    /// The kernel's newest estimate of what the path delivers, in bytes a second; 0: none yet.
    pub rate: u64,
    /// When something was last heard or sent, by the monotonic clock, in nanoseconds.
    pub seen: u64,
    /// The newest smoothed round trip, in microseconds; 0: none yet.
    pub srtt: u32,
    /// The newest connection's shortest round trip, in microseconds; 0: none yet.
    pub min_rtt: u32,
    /// The newest congestion window, in segments.
    pub window: u32,
    /// A [`Congestion`]'s number.
    pub congestion: u32,
}

/// How a sender's window develops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Congestion {
    /// It grows fast.
    SlowStart = 1,
    /// It grows by a segment a round trip.
    Avoidance = 2,
    /// Segments are taken for lost.
    Recovery = 3,
}

impl Congestion {
    /// The state with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::SlowStart, Self::Avoidance, Self::Recovery].into_iter().find(|state| *state as u32 == number)
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::SlowStart => "slow start",
            Self::Avoidance => "avoidance",
            Self::Recovery => "recovery",
        }
    }
}

/// All that was counted in a role, whether or not the map of peers had, or still has, a row for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Totals {
    /// What counts up.
    pub counts: Counts,
    /// Events that could not be told to a connection, since the map of these had no room: their bytes are not counted.
    pub lost: u64,
}

/// What is known of a connection that is open. Only the kernel side reads it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Connection {
    /// Whom it is with.
    pub key: PeerKey,
    /// 1 if this side opened it: its SYN counts as a byte with the kernel.
    pub active: u32,
    /// What of [`Counts::sent`] has been counted.
    pub sent: u64,
    /// What of [`Counts::received`] has been counted.
    pub received: u64,
    /// When it was last looked at, in nanoseconds.
    pub looked_at: u64,
    /// What of [`Counts::segments`] has been counted.
    pub segments: u32,
    /// What of [`Counts::retransmits`] has been counted.
    pub retransmits: u32,
}

/// The value of a port of containerd's connections: to an upstream registry.
pub const PORT_UPSTREAM: u32 = 1;
/// The value of a port of containerd's connections: to this node's mirror.
pub const PORT_MIRROR: u32 = 2;

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya wants the promise that any bytes are a value")]

    use super::{PeerKey, PeerStats, Totals};

    // SAFETY: integers and arrays of integers only, laid out as in C, without padding: 20, 96 and 72 bytes.
    unsafe impl aya::Pod for PeerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PeerStats {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Totals {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_padding() {
        assert_eq!((size_of::<PeerKey>(), align_of::<PeerKey>()), (20, 4));
        assert_eq!(size_of::<Counts>(), 8 * 8);
        assert_eq!(size_of::<PeerStats>(), 64 + 16 + 16);
        assert_eq!(size_of::<Totals>(), 64 + 8);
        assert_eq!(size_of::<Connection>(), 20 + 4 + 24 + 8);
    }

    #[test]
    fn numbers_and_roles_agree() {
        for (number, role) in (0..).zip(Role::ALL) {
            assert_eq!((role as u32, Role::from_number(number)), (number, Some(role)));
        }
        assert_eq!(Role::from_number(6), None);
    }
}
