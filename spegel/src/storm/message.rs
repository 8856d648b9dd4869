//! The messages: requests to a coordinator and its answers, as protobuf. What is read is checked, whoever sent it.

use std::time::Duration;

use prost::Message as _;

use super::{Key, Node, Rank};

/// What this program speaks. A later one adds fields, which this one skips.
pub const VERSION: u32 = 1;

/// The largest message, in bytes.
pub const MAX_MESSAGE: usize = 1024;

/// The largest blob, in bytes: positions beyond it are not believed.
pub const MAX_BLOB: u64 = 1 << 50;

/// The most children that a parent may say it takes.
pub const MAX_SLOTS: u16 = 64;

/// How many parents a *want* may name that it does not want.
pub const MAX_AVOIDED: usize = 8;

/// The longest time that a message may name.
const MAX_DURATION: Duration = Duration::from_secs(60);

/// What a node says to a coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// It looks for a source.
    Want(Want),
    /// It says what it has.
    Have(Have),
}

/// A node looks for a source of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// The blob.
    pub key: Key,
    /// Larger than that of any other message of this node about this blob before; the same in a repetition.
    pub number: u64,
    /// How many bytes of it the node has.
    pub position: u64,
    /// Its length in bytes, if known.
    pub total: Option<u64>,
    /// How many children the node would take in all for this blob.
    pub slots: u16,
    /// How long upstream's first byte usually takes for this node, if known.
    pub usual: Option<Duration>,
    /// What became of the source before.
    pub why: Why,
    /// Parents that it should not be given.
    pub avoid: Vec<Node>,
    /// How many coordinators that are nearer to the key gave no answer.
    pub skipped: u8,
    /// It pulls something else from upstream already: others had better pull this.
    pub busy: bool,
    /// It is getting other parts of the same image: it can wait longer, and upstream's first byte takes longer.
    pub fed: bool,
}

/// Why a node looks for a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It had none.
    New,
    /// Its parent did not take it, or gave no first byte.
    Refused,
    /// Its parent broke off.
    Broke,
    /// Its parent has bytes that it does not deliver.
    Slow,
    /// Nothing has come for a while.
    Still,
}

/// A node says what it has of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Have {
    /// The blob.
    pub key: Key,
    /// As [`Want::number`].
    pub number: u64,
    /// How many bytes of it the node has.
    pub position: u64,
    /// Its length in bytes, if known.
    pub total: Option<u64>,
    /// As [`Want::slots`].
    pub slots: u16,
    /// Where it comes from.
    pub holding: Holding,
}

/// What a node has, and whence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// It gets the blob from upstream.
    Root,
    /// It gets the blob from another node.
    Child,
    /// It has all of it.
    All,
    /// It has nothing, and will not have: the pull was given up, or upstream refused it.
    Nothing,
}

/// What a coordinator answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Take it from there.
    Fetch {
        /// The node to take it from.
        parent: Node,
        /// Where the asker was counted.
        rank: Rank,
        /// How long to wait there for a first byte.
        patience: Duration,
    },
    /// Get it from upstream, and say so as soon as something has come, within this time.
    Pull {
        /// After this the next one is told the same.
        within: Duration,
    },
    /// Ask again after this time, and stay where you are until then.
    Wait {
        /// How long.
        pause: Duration,
    },
    /// This coordinator is of no help.
    Refuse,
    /// Noted.
    Ack {
        /// When to say again, if there is something to say.
        again: Duration,
        /// The furthest position that is known.
        furthest: u64,
    },
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("the message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// Not protobuf, or a field of another type.
    #[error("the message is not protobuf of this protocol")]
    Undecodable,
    /// A field has a value that it cannot have.
    #[error("the message's {0} cannot be")]
    Invalid(&'static str),
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireRequest {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(uint64, tag = "3")]
    number: u64,
    #[prost(uint64, tag = "4")]
    position: u64,
    /// 0 where it is not known.
    #[prost(uint64, tag = "5")]
    total: u64,
    #[prost(uint32, tag = "6")]
    slots: u32,
    /// Only in a *want*; 1 to 5.
    #[prost(uint32, tag = "7")]
    why: u32,
    /// Milliseconds; 0 where it is not known.
    #[prost(uint32, tag = "8")]
    usual: u32,
    #[prost(fixed64, repeated, tag = "9")]
    avoid: Vec<u64>,
    #[prost(uint32, tag = "10")]
    skipped: u32,
    /// Only in a *have*; 1 to 4.
    #[prost(uint32, tag = "11")]
    holding: u32,
    #[prost(bool, tag = "12")]
    busy: bool,
    #[prost(bool, tag = "13")]
    fed: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireResponse {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// 1 to 5, in the order of [`Response`].
    #[prost(uint32, tag = "2")]
    kind: u32,
    #[prost(fixed64, tag = "3")]
    parent: u64,
    #[prost(uint32, tag = "4")]
    rank: u32,
    /// Milliseconds.
    #[prost(uint32, tag = "5")]
    time: u32,
    #[prost(uint64, tag = "6")]
    furthest: u64,
}

const WHYS: [Why; 5] = [Why::New, Why::Refused, Why::Broke, Why::Slow, Why::Still];
const HOLDINGS: [Holding; 4] = [Holding::Root, Holding::Child, Holding::All, Holding::Nothing];

// === impl Request ===

impl Request {
    /// What it is about.
    pub fn key(&self) -> &Key {
        match self {
            Self::Want(want) => &want.key,
            Self::Have(have) => &have.key,
        }
    }

    /// As [`Want::number`].
    pub fn number(&self) -> u64 {
        match self {
            Self::Want(want) => want.number,
            Self::Have(have) => have.number,
        }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let wire = match self {
            Self::Want(want) => WireRequest {
                version: VERSION,
                key: want.key.0.to_vec(),
                number: want.number,
                position: want.position,
                total: want.total.unwrap_or(0),
                slots: want.slots.into(),
                why: place(&WHYS, &want.why),
                usual: want.usual.map_or(0, millis),
                avoid: want.avoid.iter().take(MAX_AVOIDED).map(|node| node.0).collect(),
                skipped: want.skipped.into(),
                busy: want.busy,
                fed: want.fed,
                holding: 0,
            },
            Self::Have(have) => WireRequest {
                version: VERSION,
                key: have.key.0.to_vec(),
                number: have.number,
                position: have.position,
                total: have.total.unwrap_or(0),
                slots: have.slots.into(),
                holding: place(&HOLDINGS, &have.holding),
                ..WireRequest::default()
            },
        };
        wire.encode_to_vec()
    }

    /// The request in these bytes.
    ///
    /// # Errors
    /// They are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let wire: WireRequest = decode(bytes)?;
        let key = Key(wire.key.try_into().map_err(|_| MessageError::Invalid("key"))?);
        let total = Some(wire.total).filter(|total| *total > 0);
        if wire.position > total.unwrap_or(MAX_BLOB) || wire.total > MAX_BLOB {
            return Err(MessageError::Invalid("position"));
        }
        let slots = u16::try_from(wire.slots).unwrap_or(MAX_SLOTS).min(MAX_SLOTS);
        match (at(&WHYS, wire.why), at(&HOLDINGS, wire.holding)) {
            (Some(why), None) if wire.avoid.len() <= MAX_AVOIDED => Ok(Self::Want(Want {
                key,
                number: wire.number,
                position: wire.position,
                total,
                slots,
                usual: Some(duration(wire.usual)).filter(|usual| !usual.is_zero()),
                why,
                avoid: wire.avoid.into_iter().map(Node).collect(),
                skipped: u8::try_from(wire.skipped).unwrap_or(u8::MAX),
                busy: wire.busy,
                fed: wire.fed,
            })),
            (Some(_), None) => Err(MessageError::Invalid("list of nodes to avoid")),
            (None, Some(holding)) => {
                Ok(Self::Have(Have { key, number: wire.number, position: wire.position, total, slots, holding }))
            }
            _ => Err(MessageError::Invalid("kind")),
        }
    }
}

// === impl Response ===

impl Response {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut wire = WireResponse { version: VERSION, ..WireResponse::default() };
        match self {
            Self::Fetch { parent, rank, patience } => {
                (wire.kind, wire.parent, wire.rank, wire.time) = (1, parent.0, rank.0, millis(*patience));
            }
            Self::Pull { within } => (wire.kind, wire.time) = (2, millis(*within)),
            Self::Wait { pause } => (wire.kind, wire.time) = (3, millis(*pause)),
            Self::Refuse => wire.kind = 4,
            Self::Ack { again, furthest } => (wire.kind, wire.time, wire.furthest) = (5, millis(*again), *furthest),
        }
        wire.encode_to_vec()
    }

    /// The response in these bytes.
    ///
    /// # Errors
    /// They are none.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let wire: WireResponse = decode(bytes)?;
        let time = duration(wire.time);
        Ok(match wire.kind {
            1 => Self::Fetch { parent: Node(wire.parent), rank: Rank(wire.rank), patience: time },
            2 => Self::Pull { within: time },
            3 => Self::Wait { pause: time },
            4 => Self::Refuse,
            5 if wire.furthest <= MAX_BLOB => Self::Ack { again: time, furthest: wire.furthest },
            5 => return Err(MessageError::Invalid("position")),
            _ => return Err(MessageError::Invalid("kind")),
        })
    }
}

fn decode<M: prost::Message + Default>(bytes: &[u8]) -> Result<M, MessageError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(MessageError::TooLong);
    }
    M::decode(bytes).map_err(|_| MessageError::Undecodable)
}

/// The number of a value on the wire: 0 is for those that are absent.
fn place<T: PartialEq>(values: &[T], value: &T) -> u32 {
    let place = values.iter().position(|known| known == value).map_or(0, |place| place + 1);
    u32::try_from(place).unwrap_or(0)
}

fn at<T: Copy>(values: &[T], place: u32) -> Option<T> {
    values.get(usize::try_from(place).ok()?.checked_sub(1)?).copied()
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.min(MAX_DURATION).as_millis()).unwrap_or(u32::MAX)
}

fn duration(millis: u32) -> Duration {
    Duration::from_millis(millis.into()).min(MAX_DURATION)
}
