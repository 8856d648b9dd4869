//! The table of faults.

use super::{Ending, Fault, Place, disk, limits, upsets};

/// One fault.
#[derive(Clone, Debug)]
pub struct Row {
    /// Which part of the table.
    pub group: &'static str,
    /// What fails.
    pub name: String,
    /// Further arguments for the mirror that pulls.
    pub arguments: Vec<String>,
    /// What is done.
    pub action: Action,
}

/// How a fault is made.
#[derive(Clone, Debug)]
pub enum Action {
    /// A peer answers badly.
    Answer(Fault),
    /// Something is broken before the pull, and mended after it.
    Upset(Upset),
    /// Something happens while a body is under way.
    Midway(Midway),
}

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upset {
    /// The client has no route to the peer.
    NoRoute,
    /// The peer's node drops what comes to its registry.
    SynDropped,
    /// Nobody listens on the peer's port.
    Refused,
    /// The peer says that it is reached at the client's own address.
    OwnAddress,
    /// Fifty peers with the same content have died a moment ago.
    FiftyDead,
    /// The peer's link loses three of ten packets.
    Loss,
    /// The peer's link swallows every packet above 1000 bytes.
    MtuBlackHole,
    /// The two peers and the client cannot reach each other; upstream can be reached.
    Split,
    /// The client's containerd was restarted under its mirror.
    ContainerdRestarted,
    /// The socket by which the mirror reaches its containerd is gone, and so is its connection.
    SocketGone,
    /// No name server answers, and names are a source of peers.
    DnsDown,
    /// Who named the first peers is gone.
    BootstrapGone,
    /// Who names the first peers has been gone since before the mirror started.
    BootstrapNeverThere,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Midway {
    /// SIGKILL of the peer.
    PeerKilled,
    /// SIGSTOP of the peer.
    PeerStopped,
    /// SIGTERM of the peer.
    PeerTerminated,
    /// The peer's cable is cut.
    PeerUnplugged,
    /// The peer's cable is cut for two seconds.
    PeerUnpluggedAndBack,
    /// The peer's content files get shorter.
    ContentTruncated,
    /// The peer's content files are removed.
    ContentUnlinked,
    /// The peer may not read its content files any more.
    ContentForbidden,
    /// What the peer's disk does from now on.
    Disk(DiskFault),
    /// SIGTERM of the mirror itself.
    OwnTerminated,
    /// SIGKILL of the mirror itself.
    OwnKilled,
    /// SIGSTOP of the mirror itself, which a supervisor that asks after it notices.
    OwnStopped,
    /// SIGSTOP of the mirror itself, and SIGCONT six seconds later.
    OwnStoppedForAWhile,
    /// The mirror's serving threads stand still.
    OwnWedged,
    /// The mirror's wall clock is set by so many days.
    Clock(i32),
    /// Connections take all descriptors of the mirror.
    Descriptors,
    /// The mirror's memory limit is nearly reached.
    Memory,
    /// Ten thousand clients come.
    Crowd,
    /// The peers and the client cannot reach each other for three seconds.
    SplitAndHealed,
}

/// What a disk does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFault {
    /// Nothing.
    None,
    /// Reads fail with EIO.
    Error,
    /// Reads do not return.
    Hangs,
    /// So many bytes a second.
    Slow(u64),
}

/// Every row.
pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |group, name: &str, action| {
        rows.push(Row { group, name: name.to_owned(), arguments: Vec::new(), action });
    };
    add("none", "no fault", Action::Answer(Fault::None));
    add("connecting", "no route", Action::Upset(Upset::NoRoute));
    add("connecting", "SYN dropped", Action::Upset(Upset::SynDropped));
    add("connecting", "refused", Action::Upset(Upset::Refused));
    add("connecting", "accepted, then silent", Action::Answer(Fault::Deaf));
    add("connecting", "TLS", Action::Answer(Fault::Tls));
    add("connecting", "a stranger's address", Action::Answer(Fault::Stranger));
    add("connecting", "our own address", Action::Upset(Upset::OwnAddress));
    add("connecting", "50 dead peers", Action::Upset(Upset::FiftyDead));
    for (name, fault) in head_faults() {
        add("head", name, Action::Answer(fault));
    }
    for (name, action) in body_faults() {
        add("body", &name, action);
    }
    for (name, action) in own_faults() {
        add("here", name, action);
    }
    add("network", "30 % of the packets lost", Action::Upset(Upset::Loss));
    add("network", "MTU black hole", Action::Upset(Upset::MtuBlackHole));
    add("network", "peers split", Action::Upset(Upset::Split));
    add("network", "peers split and healed", Action::Midway(Midway::SplitAndHealed));
    for row in &mut rows {
        row.arguments = row.action.arguments();
    }
    rows
}

fn head_faults() -> Vec<(&'static str, Fault)> {
    vec![
        ("silent", Fault::Silent),
        ("one byte a second", Fault::Trickle),
        ("64 KiB of headers", Fault::LongHead),
        ("malformed", Fault::Malformed),
        ("200 without a length", Fault::NoLength),
        ("length too large", Fault::WrongLength(1000)),
        ("length too small", Fault::WrongLength(-1000)),
        ("206 with another range", Fault::OtherRange),
        ("404 though advertised", Fault::Status(404)),
        ("401", Fault::Status(401)),
        ("429", Fault::Status(429)),
        ("500", Fault::Status(500)),
        ("503 with hints", Fault::Busy("X-Spegel-Holders: 192.0.2.1:5000".into())),
        ("redirect loop", Fault::RedirectLoop),
        ("HEAD 200, GET 404", Fault::GetNotFound),
    ]
}

fn body_faults() -> Vec<(String, Action)> {
    let mut faults = Vec::new();
    for (at, place) in [("0", Place::Start), ("1", Place::First), ("half", Place::Half), ("last byte", Place::Last)] {
        for (how, ending) in [("RST", Ending::Reset), ("FIN", Ending::Close), ("silence", Ending::Silence)] {
            faults.push((format!("stops at {at}, {how}"), Action::Answer(Fault::Stops(place, ending))));
        }
    }
    faults.push(("1 KiB/s".into(), Action::Answer(Fault::Slow(1024))));
    faults.push(("too long".into(), Action::Answer(Fault::TooLong)));
    faults.push(("wrong bytes".into(), Action::Answer(Fault::WrongBytes)));
    for (name, midway) in [
        ("peer killed", Midway::PeerKilled),
        ("peer stopped", Midway::PeerStopped),
        ("peer terminated", Midway::PeerTerminated),
        ("cable cut", Midway::PeerUnplugged),
        ("cable cut and back", Midway::PeerUnpluggedAndBack),
    ] {
        faults.push((name.into(), Action::Midway(midway)));
    }
    faults
}

fn own_faults() -> Vec<(&'static str, Action)> {
    vec![
        ("SIGTERM of our own", Action::Midway(Midway::OwnTerminated)),
        ("SIGKILL of our own", Action::Midway(Midway::OwnKilled)),
        ("SIGSTOP of our own, probed", Action::Midway(Midway::OwnStopped)),
        ("SIGSTOP of our own for 6 s", Action::Midway(Midway::OwnStoppedForAWhile)),
        ("our own wedged", Action::Midway(Midway::OwnWedged)),
        ("containerd restarted", Action::Upset(Upset::ContainerdRestarted)),
        ("socket gone", Action::Upset(Upset::SocketGone)),
        ("content truncated", Action::Midway(Midway::ContentTruncated)),
        ("content unlinked", Action::Midway(Midway::ContentUnlinked)),
        ("content unreadable", Action::Midway(Midway::ContentForbidden)),
        ("disk fails", Action::Midway(Midway::Disk(DiskFault::Error))),
        ("disk hangs", Action::Midway(Midway::Disk(DiskFault::Hangs))),
        ("disk slow", Action::Midway(Midway::Disk(DiskFault::Slow(20_000)))),
        ("clock a day ahead", Action::Midway(Midway::Clock(1))),
        ("clock a day back", Action::Midway(Midway::Clock(-1))),
        ("descriptor limit", Action::Midway(Midway::Descriptors)),
        ("memory limit", Action::Midway(Midway::Memory)),
        ("10,000 clients", Action::Midway(Midway::Crowd)),
        ("DNS down", Action::Upset(Upset::DnsDown)),
        ("bootstrap target gone", Action::Upset(Upset::BootstrapGone)),
        ("bootstrap target never there", Action::Upset(Upset::BootstrapNeverThere)),
    ]
}

// === impl Row ===

impl Row {
    /// What this machine lacks for it, as a sentence to print beside a row that is skipped.
    pub fn lacks(&self) -> Option<String> {
        let found = match self.action {
            Action::Midway(Midway::Disk(_)) => disk::available(),
            Action::Midway(Midway::Clock(_)) => limits::faketime().map(|_| ()),
            Action::Midway(Midway::Memory) => crate::memory_group::MemoryGroup::available(),
            Action::Upset(_) | Action::Midway(Midway::SplitAndHealed) => upsets::available(),
            _ => Ok(()),
        };
        found.err()
    }
}

// === impl Action ===

impl Action {
    fn arguments(&self) -> Vec<String> {
        let arguments: &[&str] = match self {
            Self::Upset(Upset::DnsDown) => &["--bootstrap-kind", "dns", "--dns-bootstrap-domain", "peers.test"],
            Self::Midway(Midway::Descriptors) => &["--max-open-files", "256"],
            _ => &[],
        };
        arguments.iter().map(|text| (*text).to_owned()).collect()
    }
}
