//! What became of a client's request for content, from its head to its body's last byte, and under which id other nodes know it.
//!
//! Whoever has a part in an answer notes it in the request's [`Tale`], which costs nothing that a request would notice; at the end there is one
//! [`Story`], for the log and for who asks for the latest.

mod latest;
mod tale;
mod trace;

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

pub use latest::{KEPT, Stories, Told};
pub use tale::{Holding, Tale};
pub use trace::{TRACE_HEADER, Trace};

/// One request of a client for a manifest or a blob. What does not apply is `None`, 0 or empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    /// When the request's head was read.
    pub began: SystemTime,
    /// The id that the request has on all nodes: 32 hexadecimal digits, see [`Trace`].
    pub trace_id: String,
    /// `GET` or `HEAD`.
    pub method: &'static str,
    /// The request's path, which ends with a digest or a tag.
    pub path: String,
    /// The part of a blob that was asked for, as in a `Range` header.
    pub range: Option<String>,
    /// The registry that it was asked for in the name of.
    pub registry: Option<String>,
    /// The node that asked, or the address if it did not say.
    pub client: String,
    /// Where the content came from.
    pub source: Source,
    /// What was met on the way, if it was not here.
    pub met: Met,
    /// The answer's status; `None` if the client left before there was one.
    pub status: Option<u16>,
    /// Bytes of the body that were handed to the client's socket.
    pub bytes: u64,
    /// Whether these were all that the head promised.
    pub whole: bool,
    /// From the request's head to the answer's.
    pub head: Option<Duration>,
    /// From the request's head to the body's end.
    pub total: Duration,
}

/// What a request met at other nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Met {
    /// The peer that gave it, or its first bytes.
    pub peer: Option<SocketAddr>,
    /// How that one was found.
    pub found: Option<Origin>,
    /// Peers that were said to have it.
    pub known: u32,
    /// Requests to peers for it, those that went on with it included.
    pub asked: u32,
    /// Whether two or more were asked at the same time.
    pub raced: bool,
    /// How the bytes came through this node.
    pub carried: Option<Carriage>,
    /// How often another peer went on where one broke off.
    pub resumed: u32,
    /// Where and why peers broke off: the first ones and the last, [`Met::MOST_BREAKS`] at the most.
    pub breaks: Vec<Break>,
    /// For how long it was held because somebody else was about to get it.
    pub held: Duration,
    /// What the last peer that gave nothing said, or did.
    pub failure: Option<String>,
}

impl Met {
    /// How many breaks a story keeps.
    pub const MOST_BREAKS: usize = 8;
}

/// A peer that gave less than it had promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Break {
    /// The first byte of the body that it did not give.
    pub offset: u64,
    /// Who.
    pub from: SocketAddr,
    /// Who went on at that byte; `None` if nobody could.
    pub to: Option<SocketAddr>,
    /// Why it was left.
    pub why: String,
}

/// Where content came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// This node's own store.
    Local,
    /// This node has some of it, and is receiving the rest.
    Receiving,
    /// It was fetched from a peer and verified a moment ago.
    Ready,
    /// A peer.
    Peer,
    /// The client was sent upstream.
    Upstream,
}

/// How the peer was found that gave content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The network was asked who has it.
    Lookup,
    /// It was found for this, or for the manifest above it, a moment ago.
    Remembered,
    /// A busy peer named it.
    Named,
    /// It gave other blobs of the same image, and was asked to wait for its own first bytes.
    Sibling,
    /// A coordinator named it, in a storm.
    Coordinator,
    /// Another request for the same got it at this moment.
    Shared,
}

/// How bytes of a peer came through this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carriage {
    /// From socket to socket, by splice(2).
    Relayed,
    /// Read, and verified before they were passed on.
    Verified,
}

impl Source {
    /// As the log has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Receiving => "receiving",
            Self::Ready => "ready",
            Self::Peer => "peer",
            Self::Upstream => "upstream",
        }
    }
}

impl Origin {
    /// As the log has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Remembered => "remembered",
            Self::Named => "named",
            Self::Sibling => "sibling",
            Self::Coordinator => "coordinator",
            Self::Shared => "shared",
        }
    }
}

impl Carriage {
    /// As the log has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relayed => "relayed",
            Self::Verified => "verified",
        }
    }
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at byte {} from {}", self.offset, self.from)?;
        match self.to {
            Some(to) => write!(f, " to {to}")?,
            None => f.write_str(" to nobody")?,
        }
        write!(f, ": {}", self.why)
    }
}
