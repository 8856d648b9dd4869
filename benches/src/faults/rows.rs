//! The table of faults.

use anyhow::{Context, Result};

use super::{Ending, Fault, Place, Scene, nft};

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
    /// The peer's link loses three of ten packets.
    Loss,
    /// The peer's link swallows every packet above 1000 bytes.
    MtuBlackHole,
    /// The two peers and the client cannot reach each other; upstream can be reached.
    Split,
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
    /// SIGTERM of the mirror itself.
    OwnTerminated,
    /// SIGKILL of the mirror itself.
    OwnKilled,
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
    for (name, fault) in head_faults() {
        add("head", name, Action::Answer(fault));
    }
    for (at, place) in [("0", Place::Start), ("1", Place::First), ("half", Place::Half), ("last byte", Place::Last)] {
        for (how, ending) in [("RST", Ending::Reset), ("FIN", Ending::Close), ("silence", Ending::Silence)] {
            add("body", &format!("stops at {at}, {how}"), Action::Answer(Fault::Stops(place, ending)));
        }
    }
    add("body", "1 KiB/s", Action::Answer(Fault::Slow(1024)));
    add("body", "too long", Action::Answer(Fault::TooLong));
    add("body", "wrong bytes", Action::Answer(Fault::WrongBytes));
    for (name, midway) in [
        ("peer killed", Midway::PeerKilled),
        ("peer stopped", Midway::PeerStopped),
        ("peer terminated", Midway::PeerTerminated),
        ("cable cut", Midway::PeerUnplugged),
        ("cable cut and back", Midway::PeerUnpluggedAndBack),
    ] {
        add("body", name, Action::Midway(midway));
    }
    add("here", "content truncated", Action::Midway(Midway::ContentTruncated));
    add("here", "content unlinked", Action::Midway(Midway::ContentUnlinked));
    add("here", "SIGTERM of our own", Action::Midway(Midway::OwnTerminated));
    add("here", "SIGKILL of our own", Action::Midway(Midway::OwnKilled));
    add("network", "30 % of the packets lost", Action::Upset(Upset::Loss));
    add("network", "MTU black hole", Action::Upset(Upset::MtuBlackHole));
    add("network", "peers split", Action::Upset(Upset::Split));
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

// === impl Upset ===

impl Upset {
    pub(super) fn set(self, scene: &mut Scene) -> Result<()> {
        let (client, bad, good) = (&scene.nodes.client, &scene.nodes.bad, &scene.nodes.good);
        let table = "add table inet fault; add chain inet fault in { type filter hook input priority 0; }; \
                     add chain inet fault out { type filter hook output priority 0; }; ";
        match self {
            Self::NoRoute => client.ip(&["route", "add", "unreachable", &format!("{}/32", bad.address())]),
            Self::SynDropped => nft(bad, &format!("{table} add rule inet fault in tcp dport 5000 drop")),
            Self::Refused => {
                scene.injector = None;
                Ok(())
            }
            Self::Loss => {
                let drop = "numgen random mod 100 < 30 drop";
                nft(bad, &format!("{table} add rule inet fault in {drop}"))
            }
            Self::MtuBlackHole => nft(bad, &format!("{table} add rule inet fault out ip length > 1000 drop")),
            Self::Split => {
                for other in [bad, good] {
                    let rule = |way: &str| {
                        format!(
                            "add rule inet fault {way} ip {} {} drop",
                            if way == "in" { "saddr" } else { "daddr" },
                            other.address()
                        )
                    };
                    nft(client, &format!("{table} {}; {}", rule("in"), rule("out")))?;
                }
                Ok(())
            }
        }
    }

    pub(super) fn unset(self, scene: &mut Scene) -> Result<()> {
        let (client, bad) = (&scene.nodes.client, &scene.nodes.bad);
        match self {
            Self::NoRoute => client.ip(&["route", "del", "unreachable", &format!("{}/32", bad.address())]),
            Self::SynDropped | Self::Loss | Self::MtuBlackHole => nft(bad, "delete table inet fault"),
            Self::Split => nft(client, "delete table inet fault"),
            Self::Refused => {
                scene.injector =
                    Some(super::Injector::start(bad, 5000, std::slice::from_ref(&scene.image)).context("back again")?);
                Ok(())
            }
        }
    }
}
