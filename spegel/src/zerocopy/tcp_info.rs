//! What the kernel tells of one of our own sockets.

#![expect(unsafe_code, reason = "no library has these two options of getsockopt(2)")]

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

/// A part of the kernel's [`struct tcp_info`](https://man7.org/linux/man-pages/man7/tcp.7.html), by the names there. All is zero that the kernel is too old to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// The connection's state, by the kernel's number.
    pub state: u8,
    /// Smoothed round trip in microseconds.
    pub rtt: u32,
    /// Congestion window in segments.
    pub snd_cwnd: u32,
    /// Segments sent again.
    pub total_retrans: u32,
    /// Bytes that were acknowledged.
    pub bytes_acked: u64,
    /// Bytes that came.
    pub bytes_received: u64,
    /// Shortest round trip in microseconds.
    pub min_rtt: u32,
    /// Segments with data that were sent.
    pub data_segs_out: u32,
    /// Bytes a second that the path delivers.
    pub delivery_rate: u64,
    /// Bytes of content that were sent, those sent again among them.
    pub bytes_sent: u64,
    /// Bytes of content that were sent again.
    pub bytes_retrans: u64,
}

/// As long as the fields that are read; the kernel fills in as much as it has.
const LENGTH: usize = 216;
/// From the kernel's `asm-generic/socket.h`.
const SO_NETNS_COOKIE: i32 = 71;

impl TcpInfo {
    /// Asks the kernel.
    ///
    /// # Errors
    /// The socket is not TCP's.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let mut bytes = [0; LENGTH];
        option(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, &mut bytes)?;
        Ok(Self::parse(&bytes))
    }

    /// Offsets from the kernel's `uapi/linux/tcp.h`, whose fields never move.
    fn parse(bytes: &[u8; LENGTH]) -> Self {
        let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let whole = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        Self {
            state: bytes[0],
            rtt: half(68),
            snd_cwnd: half(80),
            total_retrans: half(100),
            bytes_acked: whole(120),
            bytes_received: whole(128),
            min_rtt: half(148),
            data_segs_out: half(156),
            delivery_rate: whole(160),
            bytes_sent: whole(200),
            bytes_retrans: whole(208),
        }
    }

    /// Bytes of content that the other end acknowledged: the kernel counts numbers of the sequence, of which a SYN of this end's, if it `opened` the
    /// connection, and a FIN have one each.
    pub fn content_acked(&self, opened: bool) -> u64 {
        let numbers = self.bytes_acked.saturating_sub(u64::from(opened));
        // Kernels before 4.19 do not say what was sent.
        if self.bytes_sent == 0 { numbers } else { numbers.min(self.bytes_sent.saturating_sub(self.bytes_retrans)) }
    }

    /// Bytes of content that came, without the FIN of the other end, which counts as one. `opened` is as with [`TcpInfo::content_acked`].
    pub fn content_received(&self, opened: bool) -> u64 {
        // From the kernel's `net/tcp_states.h`.
        const TIME_WAIT: u8 = 6;
        const CLOSE: u8 = 7;
        const CLOSE_WAIT: u8 = 8;
        const LAST_ACK: u8 = 9;
        const CLOSING: u8 = 11;
        let fin_came = match self.state {
            TIME_WAIT | CLOSE_WAIT | LAST_ACK | CLOSING => true,
            // Both sides have ended it, in order, if ours was acknowledged; a reset after that is taken for the same.
            CLOSE => self.bytes_acked.saturating_sub(u64::from(opened)) > self.content_acked(opened),
            _ => false,
        };
        self.bytes_received.saturating_sub(u64::from(fin_came))
    }
}

/// The number by which the kernel knows this thread's network namespace.
///
/// # Errors
/// No socket, or a kernel before 5.14.
pub fn network_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| UdpSocket::bind(("::1", 0)))?;
    let mut bytes = [0; 8];
    option(socket.as_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn option(socket: BorrowedFd<'_>, level: i32, name: i32, bytes: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(bytes.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes no more than `length` bytes to the buffer, which is that long, and any bytes are good there.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, bytes.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_socket_tells_what_it_has_moved() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(&[7; 1000]).unwrap();
        client.read_exact(&mut [0; 1000]).unwrap();
        client.write_all(&[7; 10]).unwrap();
        server.read_exact(&mut [0; 10]).unwrap();
        let info = TcpInfo::of(&server).unwrap();
        assert_eq!((info.bytes_acked, info.bytes_received), (1000, 10));
        assert!(info.rtt > 0 && info.min_rtt > 0 && info.snd_cwnd > 0 && info.data_segs_out > 0, "{info:?}");
        assert_eq!(info.total_retrans, 0);
        assert!(TcpInfo::of(&UdpSocket::bind("127.0.0.1:0").unwrap()).is_err());
    }

    #[test]
    fn a_network_namespace_has_one_number() {
        assert_eq!(network_cookie().unwrap(), network_cookie().unwrap());
    }
}
