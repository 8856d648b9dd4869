//! Opens streams of the Kademlia protocol for our own queries, carries those of the protocols of members and storms both ways, and keeps the
//! connections to peers of the routing table.
//!
//! kad's behaviour answers the Kademlia protocol; of that one this is the outbound side only. (libp2p-stream would do the first half, but
//! remembers every connection that there ever was.)

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use libp2p::PeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, ReadyUpgrade, UpgradeInfo};
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::behaviour::ConnectionEstablished;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedOutbound};
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, DialFailure,
    FromSwarm, NetworkBehaviour, NotifyHandler, Stream, StreamProtocol, SubstreamProtocol, THandlerInEvent, ToSwarm,
};
use tokio::sync::{mpsc, oneshot};

use super::addresses::multiaddr;
use super::behaviour::{MEMBERS, PROTOCOL, STORMS};
use super::table::Contact;

/// How long opening a stream on an open connection may take.
const STREAM_TIMEOUT: Duration = Duration::from_secs(2);

/// How many streams may wait for one peer's connection.
const MAX_WAITING: usize = 256;

/// How many streams that one peer opened may wait for us to look at them. More are closed.
const MAX_OPENED: usize = 8;

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Kademlia,
    Members,
    Storms,
}

/// The protocols in which peers may open streams to us, of those that are ours to serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Served {
    storms: bool,
}

/// Asks for a stream. Dropping the sender says that there is none.
#[derive(Debug)]
pub(super) struct Open {
    /// Whom, and where to dial it if it is not connected.
    pub(super) to: Contact,
    pub(super) purpose: Purpose,
    pub(super) reply: oneshot::Sender<Stream>,
}

/// The behaviour.
pub(super) struct Opener {
    local: PeerId,
    served: Served,
    requests: mpsc::Receiver<Open>,
    connected: HashMap<PeerId, Connections>,
    waiting: HashMap<PeerId, Vec<(Purpose, oneshot::Sender<Stream>)>>,
    pinned: HashSet<PeerId>,
    events: VecDeque<ToSwarm<Inbound, Command>>,
    waker: Option<Waker>,
}

/// The connections to one peer. Two nodes that dial each other at once have two, of which one is enough.
#[derive(Debug, Default)]
struct Connections {
    /// With whether the smaller of both identities dialled it: both sides prefer such a one.
    open: Vec<(ConnectionId, bool)>,
    kept: Option<ConnectionId>,
}

/// What a connection is told.
#[derive(Debug)]
pub(super) enum Command {
    Open(Purpose, oneshot::Sender<Stream>),
    Keep(bool),
}

/// A peer opened a stream to us.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) peer: PeerId,
    pub(super) purpose: Purpose,
    pub(super) stream: Stream,
}

/// One connection's part.
pub(super) struct Handler {
    wanted: VecDeque<(Purpose, oneshot::Sender<Stream>)>,
    opened: VecDeque<(Purpose, Stream)>,
    served: Served,
    keep: bool,
}

// === impl Opener ===

impl Opener {
    /// `storms`: whether peers may ask this node about storms.
    pub(super) fn new(local: PeerId, storms: bool, requests: mpsc::Receiver<Open>) -> Self {
        Self {
            local,
            served: Served { storms },
            requests,
            connected: HashMap::new(),
            waiting: HashMap::new(),
            pinned: HashSet::new(),
            events: VecDeque::new(),
            waker: None,
        }
    }

    /// Keeps or releases the connection to a peer, and those to come.
    pub(super) fn pin(&mut self, peer: PeerId, keep: bool) {
        let changed = if keep { self.pinned.insert(peer) } else { self.pinned.remove(&peer) };
        if changed {
            self.choose_kept(peer);
        }
    }

    /// Of several connections one is kept, the others end when they have been idle for a while.
    fn choose_kept(&mut self, peer: PeerId) {
        let Some(connections) = self.connected.get_mut(&peer) else { return };
        let wanted = if self.pinned.contains(&peer) { connections.preferred() } else { None };
        let before = std::mem::replace(&mut connections.kept, wanted);
        if before != wanted {
            for (connection, keep) in [(before, false), (wanted, true)] {
                if let Some(connection) = connection {
                    self.tell(peer, connection, Command::Keep(keep));
                }
            }
        }
    }

    fn tell(&mut self, peer_id: PeerId, connection: ConnectionId, event: Command) {
        self.events.push_back(ToSwarm::NotifyHandler { peer_id, handler: NotifyHandler::One(connection), event });
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn open(&mut self, Open { to, purpose, reply }: Open) {
        let peer = to.peer();
        if let Some(connection) = self.connected.get(&peer).and_then(Connections::preferred) {
            return self.tell(peer, connection, Command::Open(purpose, reply));
        }
        let waiting = self.waiting.entry(peer).or_default();
        if waiting.len() < MAX_WAITING {
            waiting.push((purpose, reply));
        }
        if waiting.len() == 1 {
            let opts = DialOpts::peer_id(peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(to.addresses().iter().copied().map(multiaddr).collect())
                .allocate_new_port()
                .build();
            self.events.push_back(ToSwarm::Dial { opts });
        }
    }

    fn handler(&self) -> Handler {
        Handler { wanted: VecDeque::new(), opened: VecDeque::new(), served: self.served, keep: false }
    }
}

// === impl Connections ===

impl Connections {
    fn preferred(&self) -> Option<ConnectionId> {
        let chosen = self.open.iter().find(|(_, by_smaller)| *by_smaller).or(self.open.first());
        chosen.map(|(connection, _)| *connection)
    }
}

impl NetworkBehaviour for Opener {
    type ConnectionHandler = Handler;
    type ToSwarm = Inbound;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler())
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler())
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                let by_smaller = endpoint.is_dialer() == (self.local < peer_id);
                self.connected.entry(peer_id).or_default().open.push((connection_id, by_smaller));
                self.choose_kept(peer_id);
                for (purpose, reply) in self.waiting.remove(&peer_id).unwrap_or_default() {
                    self.tell(peer_id, connection_id, Command::Open(purpose, reply));
                }
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, remaining_established, .. }) => {
                if remaining_established == 0 {
                    self.connected.remove(&peer_id);
                } else if let Some(connections) = self.connected.get_mut(&peer_id) {
                    connections.open.retain(|(open, _)| *open != connection_id);
                    self.choose_kept(peer_id);
                }
            }
            // Someone else's dial may be under way when ours is refused for it, and its end serves us too.
            FromSwarm::DialFailure(DialFailure { peer_id: Some(peer_id), error, .. }) => {
                let under_way = matches!(error, libp2p::swarm::DialError::DialPeerConditionFalse(_));
                if !under_way && !self.connected.contains_key(&peer_id) {
                    self.waiting.remove(&peer_id);
                }
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, _: ConnectionId, (purpose, stream): (Purpose, Stream)) {
        self.events.push_back(ToSwarm::GenerateEvent(Inbound { peer, purpose, stream }));
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Inbound, THandlerInEvent<Self>>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(event);
            }
            match self.requests.poll_recv(cx) {
                Poll::Ready(Some(open)) => self.open(open),
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        self.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

// === impl Served ===

impl UpgradeInfo for Served {
    type Info = StreamProtocol;
    type InfoIter = Vec<StreamProtocol>;

    fn protocol_info(&self) -> Vec<StreamProtocol> {
        [MEMBERS].into_iter().chain(self.storms.then_some(STORMS)).collect()
    }
}

impl InboundUpgrade<Stream> for Served {
    type Output = (Purpose, Stream);
    type Error = Infallible;
    type Future = Ready<Result<(Purpose, Stream), Infallible>>;

    fn upgrade_inbound(self, stream: Stream, protocol: StreamProtocol) -> Self::Future {
        let purpose = if protocol == STORMS { Purpose::Storms } else { Purpose::Members };
        ready(Ok((purpose, stream)))
    }
}

// === impl Handler ===

impl ConnectionHandler for Handler {
    type FromBehaviour = Command;
    type ToBehaviour = (Purpose, Stream);
    type InboundProtocol = Served;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = oneshot::Sender<Stream>;

    fn listen_protocol(&self) -> SubstreamProtocol<Served> {
        SubstreamProtocol::new(self.served, ())
    }

    fn connection_keep_alive(&self) -> bool {
        self.keep
    }

    fn on_behaviour_event(&mut self, command: Command) {
        match command {
            Command::Open(purpose, reply) => self.wanted.push_back((purpose, reply)),
            Command::Keep(keep) => self.keep = keep,
        }
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, (Purpose, Stream)>> {
        if let Some(stream) = self.opened.pop_front() {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(stream));
        }
        while let Some((purpose, reply)) = self.wanted.pop_front() {
            if reply.is_closed() {
                continue;
            }
            let protocol = match purpose {
                Purpose::Kademlia => PROTOCOL,
                Purpose::Members => MEMBERS,
                Purpose::Storms => STORMS,
            };
            let upgrade = ReadyUpgrade::new(protocol);
            let protocol = SubstreamProtocol::new(upgrade, reply).with_timeout(STREAM_TIMEOUT);
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
        }
        // The swarm polls again after each command: `on_behaviour_event` needs no waker.
        Poll::Pending
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), Self::OutboundOpenInfo>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol, info }) => {
                // Whoever asked may have given up: the stream is then closed by its drop.
                let _ = info.send(protocol);
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => {
                tracing::debug!(%error, "no stream");
            }
            ConnectionEvent::FullyNegotiatedInbound(inbound) if self.opened.len() < MAX_OPENED => {
                self.opened.push_back(inbound.protocol);
            }
            _ => {}
        }
    }
}
