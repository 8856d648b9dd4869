//! Sockets to listen on.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::str::FromStr;

use socket2::{Domain, Protocol, Socket, Type};

use super::ServeError;

/// Connections that the kernel holds until they are accepted. It cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// An address to listen on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ListenAddr {
    /// `:PORT`: every address of this host, IPv6 and IPv4, or IPv4 alone where there is no IPv6.
    Any(u16),
    /// One address.
    One(SocketAddr),
}

// === impl ListenAddr ===

impl ListenAddr {
    /// The port, 0 for the kernel's choice.
    #[must_use]
    pub fn port(&self) -> u16 {
        match self {
            Self::Any(port) => *port,
            Self::One(addr) => addr.port(),
        }
    }
}

impl FromStr for ListenAddr {
    type Err = ServeError;

    fn from_str(given: &str) -> Result<Self, ServeError> {
        let parsed = match given.strip_prefix(':') {
            Some(port) => port.parse().ok().map(Self::Any),
            None => given.parse().ok().map(Self::One),
        };
        parsed.ok_or_else(|| ServeError::Address { given: given.to_owned() })
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any(port) => write!(f, ":{port}"),
            Self::One(addr) => addr.fmt(f),
        }
    }
}

/// A non-blocking listener on `addr` that no other process shares: without SO_REUSEPORT a second one is refused instead of
/// taking half of the connections.
///
/// # Errors
/// The address is taken, not this host's, or not permitted.
pub fn listen(addr: ListenAddr) -> Result<TcpListener, ServeError> {
    let (first, second) = match addr {
        ListenAddr::One(addr) => (addr, None),
        ListenAddr::Any(port) => {
            (SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)), Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))
        }
    };
    match (open(first, second.is_some()), second) {
        (Err(error), Some(v4)) if error.kind() != io::ErrorKind::AddrInUse => {
            open(v4, false).map_err(|error| refused(v4, error))
        }
        (result, _) => result.map_err(|error| refused(first, error)),
    }
}

fn open(addr: SocketAddr, dual_stack: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the old connections' TIME_WAIT; it does not let two listeners share a port.
    socket.set_reuse_address(true)?;
    // What is accepted inherits it.
    socket.set_tcp_nodelay(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(!dual_stack)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn refused(addr: SocketAddr, source: io::Error) -> ServeError {
    if source.kind() == io::ErrorKind::AddrInUse {
        ServeError::InUse { addr }
    } else {
        ServeError::Listen { addr, source }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_may_leave_out_the_host() {
        assert_eq!(":5000".parse::<ListenAddr>().unwrap(), ListenAddr::Any(5000));
        assert_eq!("127.0.0.1:1".parse::<ListenAddr>().unwrap().to_string(), "127.0.0.1:1");
        assert_eq!("[::1]:1".parse::<ListenAddr>().unwrap().port(), 1);
        for bad in ["", ":", "5000", ":70000", "host:1", "127.0.0.1", "::1"] {
            let error = bad.parse::<ListenAddr>().unwrap_err().to_string();
            assert!(error.contains("is not an address to listen on"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_taken_address_is_named() {
        let first = listen(ListenAddr::One(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))).unwrap();
        let addr = first.local_addr().unwrap();
        let error = listen(ListenAddr::One(addr)).unwrap_err();
        assert!(matches!(error, ServeError::InUse { addr: named } if named == addr));
        assert!(error.to_string().contains(&addr.to_string()));
        // Taken for one address means taken for all.
        assert!(matches!(listen(ListenAddr::Any(addr.port())), Err(ServeError::InUse { .. })));
    }

    #[test]
    fn any_host_takes_ipv4() {
        let listener = listen(ListenAddr::Any(0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }
}
