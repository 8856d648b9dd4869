//! The messages of the published [kad-dht protocol](https://github.com/libp2p/specs/blob/master/kad-dht/README.md#rpc-messages),
//! as far as this network uses them, and their framing: an unsigned varint of the length, then protobuf.

use std::io::{self, ErrorKind};

use futures::{AsyncRead, AsyncReadExt};
use prost::Message as _;

/// Larger messages are refused, here and in the Go implementation.
pub(super) const MAX_MESSAGE: usize = 4 * 1024 * 1024;

/// `Message.MessageType`, without the kinds that are not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    AddProvider = 2,
    GetProviders = 3,
}

/// `Message`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Message {
    /// A [`Kind`] as a number: of an enumeration without a zero the derived code would leave the first kind out.
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) key: Vec<u8>,
    #[prost(message, repeated, tag = "8")]
    pub(super) closer_peers: Vec<WirePeer>,
    #[prost(message, repeated, tag = "9")]
    pub(super) provider_peers: Vec<WirePeer>,
}

/// `Message.Peer`, without the hint about its connection.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WirePeer {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) id: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) addrs: Vec<Vec<u8>>,
}

// === impl Message ===

impl Message {
    pub(super) fn request(kind: Kind, key: &[u8]) -> Self {
        Self { kind: kind as i32, key: key.to_vec(), ..Self::default() }
    }

    /// Appends the framed message.
    pub(super) fn frame(&self, buffer: &mut Vec<u8>) {
        buffer.reserve(self.encoded_len() + 4);
        // A Vec grows as needed: encoding into it cannot fail.
        let _ = self.encode_length_delimited(buffer);
    }
}

/// Reads one framed message.
pub(super) async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Message> {
    let bytes = read_frame(stream, MAX_MESSAGE).await?;
    Message::decode(bytes.as_slice()).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// Reads a length and as many bytes. Memory grows with what arrives, not with what a peer claims.
pub(super) async fn read_frame(stream: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let length = read_length(stream, limit).await?;
    read_bytes(stream, length).await
}

/// Reads the length of what follows.
pub(super) async fn read_length(stream: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<usize> {
    let length = read_varint(stream).await?;
    if length > limit {
        return Err(io::Error::new(ErrorKind::InvalidData, format!("the message is larger than {limit} bytes")));
    }
    Ok(length)
}

/// Reads as many bytes.
pub(super) async fn read_bytes(stream: &mut (impl AsyncRead + Unpin), length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if stream.take(length as u64).read_to_end(&mut bytes).await? < length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

async fn read_varint(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
    let mut length = 0;
    for shift in (0..28).step_by(7) {
        let mut byte = [0];
        stream.read_exact(&mut byte).await?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(length);
        }
    }
    Err(io::Error::new(ErrorKind::InvalidData, "the message's length is not a short varint"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use futures::executor::block_on;
    use proptest::prelude::*;

    use super::*;

    fn peer() -> impl Strategy<Value = WirePeer> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
        (bytes(), proptest::collection::vec(bytes(), 0..4)).prop_map(|(id, addrs)| WirePeer { id, addrs })
    }

    fn message() -> impl Strategy<Value = Message> {
        let peers = || proptest::collection::vec(peer(), 0..4);
        let key = proptest::collection::vec(any::<u8>(), 0..40);
        (0..6, key, peers(), peers()).prop_map(|(kind, key, closer_peers, provider_peers)| Message {
            kind,
            key,
            closer_peers,
            provider_peers,
        })
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(messages in proptest::collection::vec(message(), 0..5)) {
            let mut bytes = Vec::new();
            for message in &messages {
                message.frame(&mut bytes);
            }
            let mut stream = bytes.as_slice();
            for message in &messages {
                prop_assert_eq!(&block_on(read_message(&mut stream)).unwrap(), message);
            }
            prop_assert!(stream.is_empty());
        }

        #[test]
        fn garbage_is_an_error_or_a_message(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = block_on(read_message(&mut bytes.as_slice()));
        }

        #[test]
        fn a_damaged_message_never_panics(message in message(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = Vec::new();
            message.frame(&mut bytes);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = block_on(read_message(&mut bytes.as_slice()));
        }
    }

    /// Bytes as the protobuf definition gives them, ADD_PROVIDER being 2 and GET_PROVIDERS 3.
    #[test]
    fn messages_have_the_published_form() {
        let mut bytes = Vec::new();
        Message::request(Kind::GetProviders, &[1, 2]).frame(&mut bytes);
        assert_eq!(bytes, [6, 0x08, 3, 0x12, 2, 1, 2]);
        let mut message = Message::request(Kind::AddProvider, &[1, 2]);
        message.provider_peers = vec![WirePeer { id: vec![7], addrs: vec![vec![8]] }];
        bytes.clear();
        message.frame(&mut bytes);
        assert_eq!(bytes, [14, 0x08, 2, 0x12, 2, 1, 2, 0x4a, 6, 0x0a, 1, 7, 0x12, 1, 8]);
    }

    #[test]
    fn a_claimed_length_is_bounded_and_not_allocated() {
        let too_long = [0x81, 0x80, 0x80, 0x02];
        assert_eq!(block_on(read_message(&mut too_long.as_slice())).unwrap_err().kind(), ErrorKind::InvalidData);
        let endless = [0xff; 16];
        assert_eq!(block_on(read_message(&mut endless.as_slice())).unwrap_err().kind(), ErrorKind::InvalidData);
        let cut = [0x80, 0x80, 0x80, 0x02, 1];
        assert_eq!(block_on(read_message(&mut cut.as_slice())).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
