//! What is read is checked.

use std::time::Duration;

use proptest::prelude::*;

use crate::storm::{
    Have, Holding, Key, MAX_AVOIDED, MAX_BLOB, MAX_MESSAGE, MAX_SLOTS, MessageError, Node, Rank, Request, Response,
    Want, Why,
};

fn request() -> impl Strategy<Value = Request> {
    let what = (any::<[u8; 32]>(), any::<u64>(), 0..=MAX_BLOB, 0..=MAX_BLOB, 0..=MAX_SLOTS);
    let avoid = proptest::collection::vec(any::<u64>(), 0..=MAX_AVOIDED);
    (what, 0..9_usize, avoid, any::<u8>(), 0_u64..60_000).prop_map(
        |((key, number, one, other, slots), kind, avoid, skipped, usual)| {
            let (position, total) = (one.min(other), Some(one.max(other)).filter(|total| *total > 0));
            let whys = [Why::New, Why::Refused, Why::Broke, Why::Slow, Why::Still];
            let holdings = [Holding::Root, Holding::Child, Holding::All, Holding::Nothing];
            let key = Key(key);
            match whys.get(kind) {
                Some(why) => Request::Want(Want {
                    key,
                    number,
                    position,
                    total,
                    slots,
                    usual: Some(Duration::from_millis(usual)).filter(|usual| !usual.is_zero()),
                    why: *why,
                    avoid: avoid.into_iter().map(Node).collect(),
                    skipped,
                    busy: skipped % 2 == 1,
                    fed: skipped % 3 == 1,
                }),
                None => {
                    Request::Have(Have { key, number, position, total, slots, holding: holdings[kind - whys.len()] })
                }
            }
        },
    )
}

fn response() -> impl Strategy<Value = Response> {
    (0..5, any::<u64>(), any::<u32>(), 0_u64..=60_000, 0..=MAX_BLOB).prop_map(
        |(kind, parent, rank, millis, furthest)| {
            let time = Duration::from_millis(millis);
            match kind {
                0 => Response::Fetch { parent: Node(parent), rank: Rank(rank), patience: time },
                1 => Response::Pull { within: time },
                2 => Response::Wait { pause: time },
                3 => Response::Refuse,
                _ => Response::Ack { again: time, furthest },
            }
        },
    )
}

/// What is read from any bytes is within its bounds, and is written and read again as it was.
fn check(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(request) = Request::decode(bytes) {
        let (position, total, slots) = match &request {
            Request::Want(want) => (want.position, want.total, want.slots),
            Request::Have(have) => (have.position, have.total, have.slots),
        };
        prop_assert!(position <= total.unwrap_or(MAX_BLOB) && total.is_none_or(|total| total <= MAX_BLOB));
        prop_assert!(slots <= MAX_SLOTS);
        if let Request::Want(want) = &request {
            prop_assert!(want.avoid.len() <= MAX_AVOIDED);
            prop_assert!(want.usual.is_none_or(|usual| usual <= Duration::from_secs(60)));
        }
        prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
    }
    if let Ok(response) = Response::decode(bytes) {
        prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
    }
    Ok(())
}

proptest! {
    #[test]
    fn requests_survive_the_wire(request in request()) {
        let bytes = request.encode();
        prop_assert!(bytes.len() <= MAX_MESSAGE);
        prop_assert_eq!(Request::decode(&bytes), Ok(request));
    }

    #[test]
    fn responses_survive_the_wire(response in response()) {
        let bytes = response.encode();
        prop_assert!(bytes.len() <= MAX_MESSAGE);
        prop_assert_eq!(Response::decode(&bytes), Ok(response));
    }

    #[test]
    fn any_bytes_are_an_error_or_within_the_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check(&bytes)?;
    }

    #[test]
    fn damaged_messages_are_an_error_or_within_the_bounds(
        request in request(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
    ) {
        let mut bytes = request.encode();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        check(&bytes)?;
    }
}

#[test]
fn what_a_later_version_adds_is_skipped() {
    let have = Have { key: Key([1; 32]), number: 2, position: 3, total: Some(4), slots: 5, holding: Holding::All };
    let mut bytes = Request::Have(have).encode();
    // Field 100, four bytes.
    bytes.extend([0xa5, 0x06, 1, 2, 3, 4]);
    assert_eq!(Request::decode(&bytes), Ok(Request::Have(have)));
}

#[test]
fn what_cannot_be_is_refused() {
    let have = Have { key: Key([1; 32]), number: 2, position: 5, total: Some(4), slots: 5, holding: Holding::All };
    assert_eq!(Request::decode(&Request::Have(have).encode()), Err(MessageError::Invalid("position")));
    assert_eq!(Request::decode(&[0; MAX_MESSAGE + 1]), Err(MessageError::TooLong));
    assert_eq!(Request::decode(&[0xff; 8]), Err(MessageError::Undecodable));
    assert_eq!(Request::decode(&[]), Err(MessageError::Invalid("key")));
    assert_eq!(Response::decode(&[]), Err(MessageError::Invalid("kind")));
}
