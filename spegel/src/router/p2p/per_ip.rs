//! A bound on the connections that one address may make to us.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::task::{Context, Poll};

use libp2p::PeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint, Multiaddr};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::behaviour::ConnectionEstablished;
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, ListenFailure, NetworkBehaviour, THandlerInEvent,
    ToSwarm, dummy,
};

/// How many connections from one address are open at once. A node makes one or two; a few nodes may share an address behind
/// network address translation. Loopback addresses are those of tests and demos, where all nodes share one.
const MAX_PER_IP: usize = 32;

/// How many of them may be under way: whoever only begins connections must not keep out others, of whom all together may begin 256.
const MAX_BEGUN: usize = 16;

/// Counts incoming connections by address, and refuses what is too many.
#[derive(Debug, Default)]
pub(super) struct PerIp {
    open: HashMap<IpAddr, usize>,
    begun: HashMap<ConnectionId, IpAddr>,
    begun_by: HashMap<IpAddr, usize>,
}

/// Why a connection was refused.
#[derive(Debug, thiserror::Error)]
#[error("{0} has too many connections to us already")]
struct TooMany(IpAddr);

// === impl PerIp ===

impl PerIp {
    fn check(&self, remote: &Multiaddr) -> Result<(), ConnectionDenied> {
        match ip(remote) {
            Some(ip) if !ip.is_loopback() && self.open.get(&ip).is_some_and(|open| *open >= MAX_PER_IP) => {
                Err(ConnectionDenied::new(TooMany(ip)))
            }
            _ => Ok(()),
        }
    }

    /// A connection is under way.
    fn begins(&mut self, connection: ConnectionId, remote: &Multiaddr) -> Result<(), ConnectionDenied> {
        self.check(remote)?;
        let Some(ip) = ip(remote).filter(|ip| !ip.is_loopback()) else { return Ok(()) };
        let begun = self.begun_by.entry(ip).or_default();
        if *begun >= MAX_BEGUN {
            return Err(ConnectionDenied::new(TooMany(ip)));
        }
        *begun += 1;
        self.begun.insert(connection, ip);
        Ok(())
    }

    /// It is made, or came to nothing.
    fn began(&mut self, connection: ConnectionId) {
        let Some(ip) = self.begun.remove(&connection) else { return };
        if let Some(begun) = self.begun_by.get_mut(&ip) {
            *begun -= 1;
            if *begun == 0 {
                self.begun_by.remove(&ip);
            }
        }
    }

    fn opened(&mut self, endpoint: &ConnectedPoint) {
        if let ConnectedPoint::Listener { send_back_addr, .. } = endpoint
            && let Some(ip) = ip(send_back_addr)
        {
            *self.open.entry(ip).or_default() += 1;
        }
    }

    fn closed(&mut self, endpoint: &ConnectedPoint) {
        if let ConnectedPoint::Listener { send_back_addr, .. } = endpoint
            && let Some(ip) = ip(send_back_addr)
            && let Some(open) = self.open.get_mut(&ip)
        {
            *open -= 1;
            if *open == 0 {
                self.open.remove(&ip);
            }
        }
    }
}

fn ip(address: &Multiaddr) -> Option<IpAddr> {
    address.iter().find_map(|part| match part {
        Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
        Protocol::Ip6(ip) => Some(IpAddr::V6(ip).to_canonical()),
        _ => None,
    })
}

impl NetworkBehaviour for PerIp {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.begins(connection, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        self.check(remote).map(|()| dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { connection_id, endpoint, .. }) => {
                self.began(connection_id);
                self.opened(endpoint);
            }
            FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => self.began(connection_id),
            FromSwarm::ConnectionClosed(ConnectionClosed { endpoint, .. }) => self.closed(endpoint),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn from(ip: &str) -> ConnectedPoint {
        let address: Multiaddr = format!("/ip4/{ip}/tcp/40000").parse().unwrap();
        ConnectedPoint::Listener { local_addr: address.clone(), send_back_addr: address }
    }

    fn admits(per_ip: &PerIp, ip: &str) -> bool {
        per_ip.check(from(ip).get_remote_address()).is_ok()
    }

    #[test]
    fn one_address_has_a_bounded_number_of_connections() {
        let mut per_ip = PerIp::default();
        for _ in 0..MAX_PER_IP {
            assert!(admits(&per_ip, "10.0.0.1"));
            per_ip.opened(&from("10.0.0.1"));
        }
        assert!(!admits(&per_ip, "10.0.0.1"));
        assert!(admits(&per_ip, "10.0.0.2"), "others are not affected");
        per_ip.closed(&from("10.0.0.1"));
        assert!(admits(&per_ip, "10.0.0.1"));
        (1..MAX_PER_IP).for_each(|_| per_ip.closed(&from("10.0.0.1")));
        assert!(per_ip.open.is_empty(), "nothing is kept of who is gone");
    }

    #[test]
    fn one_address_has_a_bounded_number_of_connections_under_way() {
        let mut per_ip = PerIp::default();
        let remote = |ip| from(ip).get_remote_address().clone();
        let ids: Vec<_> = (0..=MAX_BEGUN).map(ConnectionId::new_unchecked).collect();
        ids[..MAX_BEGUN].iter().for_each(|id| per_ip.begins(*id, &remote("10.0.0.1")).unwrap());
        assert!(per_ip.begins(ids[MAX_BEGUN], &remote("10.0.0.1")).is_err());
        assert!(per_ip.begins(ids[MAX_BEGUN], &remote("10.0.0.2")).is_ok(), "others are not affected");
        ids.iter().for_each(|id| per_ip.began(*id));
        assert!(per_ip.begun.is_empty() && per_ip.begun_by.is_empty());
    }
}
