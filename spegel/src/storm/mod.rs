//! Cold storms: what nodes agree by when many want the same content at once and none has it.
//!
//! State machines with events and a clock in, and messages out. There is no socket in here, no sleeping, and no chance but from a seed, so
//! that the simulator of `cargo xtask storm` runs the same code as the daemon; it includes this folder, which is why nothing in it
//! imports any other room. See "Cold storms" in ARCHITECTURE.md.

mod budget;
mod child;
mod coordinator;
mod message;
mod parent;
mod rate;
mod tree;
mod view;

use std::time::Duration;

pub use budget::{Budget, Budgets, GAP, Hold, HoldEnd};
pub use child::{Action, Child, Failure, Source, Wish};
pub use coordinator::{Coordinator, Limits};
pub use message::{
    Have, Holding, MAX_AVOIDED, MAX_BLOB, MAX_MESSAGE, MAX_SLOTS, MessageError, Request, Response, VERSION, Want, Why,
};
pub use parent::{Asker, Look, Parent, Refusal, Standing};
pub use view::{PlaceView, Stand, TreeView};

/// How many coordinators a blob has: a child asks the nearest that answers, and a root reports to all.
pub const COORDINATORS: usize = 3;

/// How long a coordinator may take to answer.
pub const ANSWER: Duration = Duration::from_millis(500);

/// How often a node that pulls from upstream says how far it is.
pub const REPORT: Duration = Duration::from_millis(250);

/// What a first byte is given beyond some times what it usually takes.
pub const BEYOND_USUAL: Duration = Duration::from_millis(250);

/// How long who was told to pull is given for its first byte as long as it says that upstream has not refused it, or is getting other parts of
/// the image: containerd shows nothing before it has a whole MiB, and links that others have filled let a new connection come up in seconds
/// only. How long each waits is bounded by its budget.
pub const FED_FIRST_BYTE: Duration = Duration::from_millis(4500);

/// How long a root that was heard to grow is taken to grow without being heard of.
pub const LEASE: Duration = Duration::from_secs(3);

/// How long, if a child says that it broke off: three of its reports.
pub const SUSPECT: Duration = Duration::from_millis(900);

/// How long a root that reports may stand still.
pub const STUCK: Duration = Duration::from_secs(10);

/// How long a coordinator whom somebody asks in the place of a nearer one waits for news of a root before it gives a lease.
pub const GRACE: Duration = Duration::from_secs(1);

/// How long a child that is fed may stand still until it asks its parent how much that has, and how often it does.
pub const PROBE: Duration = Duration::from_secs(1);

/// How long it may stand still until it asks a coordinator whether that is so for all, and up to as long again by chance.
pub const STILL: Duration = Duration::from_secs(2);

/// How long it may if its parent says that it has no more itself: whoever is above has to see to it first.
pub const EXCUSED: Duration = Duration::from_secs(6);

/// How long a child may stand still at all.
pub const NOTHING: Duration = Duration::from_secs(10);

/// A node, by the first eight bytes of its position in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node(pub u64);

/// What is wanted: the hash by which the network knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub [u8; 32]);

/// A zone, by a hash of its name; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Zone(pub u32);

/// Where a coordinator counted a node that waits for first bytes: it waits only for nodes of lower ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rank(pub u32);

/// The finalizer of splitmix64, to spread what should not come at once.
fn mix(mut n: u64) -> u64 {
    n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}
