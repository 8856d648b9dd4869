//! The task that owns the swarm: who enters and leaves the table, which records are kept, and how this node stands.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::kad::{self, InboundRequest, RoutingUpdate};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, identify, mdns, ping};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::addresses::{Scope, multiaddr, registries, socket_address};
use super::advertise::Advertiser;
use super::behaviour::{Behaviour, BehaviourEvent, MEMBERS, PROTOCOL};
use super::joining::{Answer, Joining, Target};
use super::keys::ContentId;
use super::links::{Arrival, Links};
use super::members::{self, Action, Believed, Membership, Message};
use super::memory::Memory;
use super::metrics::{Direction, Reason, RouterMetrics};
use super::opener::{Inbound, Purpose};
use super::pulse::Pulse;
use super::records::SharedRecords;
use super::storms::Storms;
use super::table::{Contact, SharedTable};
use crate::router::{Member, Members, Peer, Readiness};

/// How often expired records are dropped.
const SWEEP: Duration = Duration::from_secs(2);

/// A peer that left is dialled once, unless it was already so recently: then it does not want us.
const REDIAL_PAUSE: Duration = Duration::from_secs(10);

/// Multicast DNS is asked every half second at first: whoever is there has answered by then.
const MDNS_SETTLES: Duration = Duration::from_secs(3);

/// The swarm and what it keeps up to date.
pub(super) struct Driver {
    pub(super) swarm: Swarm<Behaviour>,
    pub(super) listen: Vec<SocketAddr>,
    /// Where others reach us, if that was told.
    pub(super) advertise: Vec<SocketAddr>,
    pub(super) scope: Scope,
    pub(super) records: SharedRecords,
    pub(super) table: SharedTable,
    pub(super) advertiser: Advertiser,
    pub(super) joining: Joining,
    pub(super) answers: mpsc::Receiver<Answer>,
    pub(super) readiness: watch::Sender<Readiness>,
    pub(super) membership: Membership,
    pub(super) links: Links,
    pub(super) arrived: mpsc::Receiver<Arrival>,
    /// How busy the registry is said to be.
    pub(super) loads: watch::Receiver<Option<u8>>,
    pub(super) members: watch::Sender<Members>,
    /// The last list that was shown.
    pub(super) shown: BTreeMap<PeerId, Member>,
    /// The connected peers that speak the member protocol.
    pub(super) speakers: HashSet<PeerId>,
    pub(super) registry_port: u16,
    pub(super) metrics: RouterMetrics,
    /// If this node takes part in storms.
    pub(super) storms: Option<Storms>,
    pub(super) remembered: Option<Memory>,
    /// The number of multicast DNS among the sources.
    pub(super) mdns: Option<usize>,
    /// Bootstrap peers of unknown identity that are being dialled or connected: they need no second call.
    pub(super) called: HashMap<ConnectionId, SocketAddr>,
    pub(super) redialled: HashMap<PeerId, Instant>,
    /// Which connections have answered lately.
    pub(super) pulse: Pulse,
    /// How long the search for a first peer may keep this node from being ready, and since when it does.
    pub(super) join_timeout: Duration,
    pub(super) joining_since: tokio::time::Instant,
}

// === impl Driver ===

impl Driver {
    pub(super) async fn run(mut self, cancelled: CancellationToken) {
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut often = tokio::time::interval(members::TICK);
        often.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let multicast = tokio::time::sleep(MDNS_SETTLES);
        tokio::pin!(multicast);
        let mut waited = false;
        self.settle();
        loop {
            tokio::select! {
                () = &mut multicast, if !waited => {
                    waited = true;
                    self.mdns.into_iter().for_each(|source| self.joining.waited(source));
                }
                () = cancelled.cancelled() => return,
                () = tokio::time::sleep_until(self.joining_since + self.join_timeout), if *self.readiness.borrow() == Readiness::Joining => {}
                event = self.swarm.select_next_some() => self.on_event(event),
                Some(answer) = self.answers.recv() => {
                    self.joining.answered(answer);
                    self.dial_named();
                }
                Some(arrival) = self.arrived.recv() => self.on_arrival(arrival),
                _ = often.tick() => {
                    let now = Instant::now();
                    for silent in self.pulse.silent(now) {
                        tracing::debug!(connection = %silent, "has not answered for long, and is closed");
                        self.swarm.close_connection(silent);
                    }
                    self.membership.tick(now);
                }
                Ok(()) = self.loads.changed() => {
                    let load = *self.loads.borrow_and_update();
                    load.into_iter().for_each(|load| self.membership.set_load(load));
                }
                _ = sweep.tick() => {
                    let now = Instant::now();
                    if let Some(memory) = &mut self.remembered {
                        memory.keep(now, &self.table.read());
                    }
                    self.records.lock().sweep(now);
                    self.storms.iter().for_each(|storms| storms.sweep(now));
                    self.redialled.retain(|_, at| now.duration_since(*at) < REDIAL_PAUSE);
                    self.advertiser.grown(self.shown.len());
                    self.measure();
                }
            }
            self.follow_membership();
            self.settle();
        }
    }

    /// Offers the addresses that the interfaces have now.
    pub(super) fn refresh_addresses(&mut self) {
        let reachable =
            || if self.advertise.is_empty() { self.scope.reachable(&self.listen) } else { Ok(self.advertise.clone()) };
        let own = match reachable() {
            Ok(own) => own,
            Err(error) => {
                return tracing::warn!(%error, "cannot read the node's addresses; peers keep those told before");
            }
        };
        let before = self.records.lock().own_addresses().to_vec();
        if own == before {
            return;
        }
        tracing::info!(addresses = ?own, "peers reach this node's router at");
        for gone in before.iter().filter(|address| !own.contains(address)) {
            self.swarm.remove_external_address(&multiaddr(*gone));
        }
        own.iter().for_each(|address| self.swarm.add_external_address(multiaddr(*address)));
        self.joining.we_are_at(&own);
        if own.is_empty() {
            tracing::warn!(
                "this node has no address that peers could reach: look at --router-addr, --peer-cidrs and the interfaces"
            );
        }
        self.membership.set_addresses(Instant::now(), own.clone());
        self.records.lock().set_own_addresses(own);
        self.advertiser.tell_all();
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }))
                if info.protocols.contains(&PROTOCOL) =>
            {
                if info.protocols.contains(&MEMBERS) && self.swarm.is_connected(&peer_id) {
                    self.speakers.insert(peer_id);
                }
                self.introduced(peer_id, &info.listen_addrs);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Opener(Inbound { peer, purpose, stream })) => {
                match (&self.storms, purpose) {
                    (Some(storms), Purpose::Storms) => storms.accept(peer, stream),
                    _ => self.links.accept(peer, stream),
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Kad(event)) => self.on_kad_event(event),
            SwarmEvent::Behaviour(BehaviourEvent::Mdns(event) | BehaviourEvent::MdnsIpv6(event)) => {
                self.on_mdns_event(event);
            }
            SwarmEvent::Behaviour(BehaviourEvent::Ping(ping::Event { connection, result, .. })) => match result {
                Ok(_) => self.pulse.heard(connection, Instant::now()),
                Err(ping::Failure::Unsupported) => self.pulse.forget(connection),
                // What it has not answered for long is seen by that.
                Err(_) => {}
            },
            SwarmEvent::ConnectionEstablished { connection_id, .. } => self.pulse.heard(connection_id, Instant::now()),
            SwarmEvent::ConnectionClosed { connection_id, peer_id, num_established, .. } => {
                self.called.remove(&connection_id);
                self.pulse.forget(connection_id);
                self.closed(peer_id, num_established);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.called.remove(&connection_id);
                self.not_reached(peer_id, &error);
            }
            SwarmEvent::NewListenAddr { .. } | SwarmEvent::ExpiredListenAddr { .. } => self.refresh_addresses(),
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                tracing::error!(?addresses, ?reason, "the router's listener ended");
            }
            _ => {}
        }
    }

    fn on_kad_event(&mut self, event: kad::Event) {
        let figures = &self.metrics.0;
        match event {
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(record) } } => {
                figures.message(Direction::Received, "add_provider", 1);
                // Who names another than itself does not come so far.
                let addresses = self.scope.filter(&record.addresses);
                match ContentId::from_multihash(record.key.as_ref()) {
                    None => figures.refuse(Reason::Key),
                    Some(_) if addresses.is_empty() => figures.refuse(Reason::Address),
                    Some(id) => {
                        self.records.lock().add(Instant::now(), [id], record.provider, &addresses);
                    }
                }
            }
            kad::Event::InboundRequest { request } => {
                let kind = match request {
                    InboundRequest::FindNode { .. } => "find_node",
                    InboundRequest::GetProvider { .. } => "get_providers",
                    InboundRequest::AddProvider { .. } => "add_provider",
                    InboundRequest::GetRecord { .. } | InboundRequest::PutRecord { .. } => "value",
                };
                figures.message(Direction::Received, kind, 1);
            }
            kad::Event::RoutingUpdated { peer, is_new_peer, addresses, old_peer, .. } => {
                if let Some(old) = old_peer {
                    self.leave_table(&old);
                    self.membership.parted(&old);
                    self.links.forget(&old);
                }
                // One that waited for a place in its bucket; who gets one at once has been entered already, and with all its addresses.
                let is_known = self.table.read().contains(&peer);
                if is_new_peer && !is_known && self.swarm.is_connected(&peer) {
                    let addresses = self.scope.filter(addresses.iter());
                    self.enter_table(peer, addresses);
                }
            }
            kad::Event::OutboundQueryProgressed { stats, step, .. } if step.last => {
                figures.message(Direction::Sent, "find_node", stats.num_requests().into());
            }
            _ => {}
        }
    }

    /// Somebody on the same link says that it is there, or has not for long.
    fn on_mdns_event(&mut self, event: mdns::Event) {
        let Some(source) = self.mdns else { return };
        match event {
            mdns::Event::Discovered(found) => {
                let mut by_peer: HashMap<PeerId, Vec<Multiaddr>> = HashMap::new();
                for (peer, address) in found {
                    by_peer.entry(peer).or_default().push(address);
                }
                for (peer, addresses) in by_peer {
                    let addresses = self.scope.filter(&addresses);
                    if !addresses.is_empty() {
                        self.joining.appeared(source, peer, addresses);
                    }
                }
                self.dial_named();
            }
            mdns::Event::Expired(gone) => {
                let gone = gone.iter().filter_map(|(peer, address)| Some((peer, socket_address(address)?)));
                gone.for_each(|(peer, address)| self.joining.vanished(source, peer, address));
            }
        }
    }

    /// A peer that speaks our protocol said where it listens.
    fn introduced(&mut self, peer: PeerId, listens: &[Multiaddr]) {
        let addresses = self.scope.filter(listens);
        if addresses.is_empty() {
            return tracing::debug!(%peer, ?listens, "names no address where we could reach it");
        }
        let kad = &mut self.swarm.behaviour_mut().kad;
        let results: Vec<_> = addresses.iter().map(|address| kad.add_address(&peer, multiaddr(*address))).collect();
        let stale = kad.kbucket(peer).and_then(|bucket| {
            let entry = bucket.iter().find(|entry| *entry.node.key.preimage() == peer)?;
            let stale = |old: &&Multiaddr| socket_address(old).is_none_or(|old| !addresses.contains(&old));
            Some(entry.node.value.iter().filter(stale).cloned().collect::<Vec<_>>())
        });
        for address in stale.unwrap_or_default() {
            kad.remove_address(&peer, &address);
        }
        if results.contains(&RoutingUpdate::Success) {
            self.enter_table(peer, addresses);
        }
    }

    fn enter_table(&mut self, peer: PeerId, addresses: Vec<SocketAddr>) {
        if addresses.is_empty() {
            return;
        }
        if self.table.write().insert(Contact::new(peer, &addresses)) {
            tracing::debug!(%peer, "joined");
            self.swarm.behaviour_mut().opener.pin(peer, true);
            self.advertiser.newcomer(peer);
            // Others are answered, and not kept connected for the sake of the member list.
            if self.speakers.contains(&peer) {
                self.membership.connected(Instant::now(), peer);
            }
        }
    }

    fn leave_table(&mut self, peer: &PeerId) -> Option<Contact> {
        let left = self.table.write().remove(peer)?;
        self.swarm.behaviour_mut().opener.pin(*peer, false);
        if self.table.read().is_empty() {
            self.joining.start_over();
        }
        Some(left)
    }

    /// A connection ended. If it was the last, whether the peer did too is found out by dialling it.
    fn closed(&mut self, peer: PeerId, left: u32) {
        if left > 0 {
            // The others may be to a process that was started since and has heard nothing of what the one before was told.
            return self.advertiser.newcomer(peer);
        }
        self.links.forget(&peer);
        self.speakers.remove(&peer);
        let now = Instant::now();
        let Some(contact) = self.leave_table(&peer) else { return self.membership.parted(&peer) };
        tracing::debug!(%peer, "connection ended");
        self.membership.disconnected(now, &peer);
        let recently = self.redialled.get(&peer).is_some_and(|at| now.duration_since(*at) < REDIAL_PAUSE);
        if recently {
            self.swarm.behaviour_mut().kad.remove_peer(&peer);
            return;
        }
        self.redialled.insert(peer, now);
        self.dial(Target { peer: Some(peer), addresses: contact.addresses().to_vec() });
    }

    fn not_reached(&mut self, peer: Option<PeerId>, error: &DialError) {
        match error {
            DialError::LocalPeerId { address } => {
                if let Some(address) = socket_address(address).filter(|address| self.joining.is_us(*address)) {
                    tracing::warn!(
                        %address,
                        "answers with this node's identity: it is this node by another address, or a copy of its --data-dir, which must not be"
                    );
                }
            }
            DialError::Transport(_) | DialError::WrongPeerId { .. } | DialError::NoAddresses => {
                let Some(peer) = peer.filter(|peer| !self.swarm.is_connected(peer)) else { return };
                tracing::debug!(%peer, %error, "not reachable, and so not told to others");
                self.leave_table(&peer);
                self.swarm.behaviour_mut().kad.remove_peer(&peer);
                self.records.lock().forget(&peer);
                self.membership.failed(Instant::now(), &peer);
            }
            DialError::DialPeerConditionFalse(_) | DialError::Aborted | DialError::Denied { .. } => {}
        }
    }

    fn dial_named(&mut self) {
        let targets = self.joining.to_dial(&self.table.read());
        for target in targets {
            let under_way = target.addresses.iter().any(|address| self.called.values().any(|called| called == address));
            if !under_way {
                self.dial(target);
            }
        }
    }

    /// From a port of its own: from the listening port, two nodes that dial each other at once would meet in one connection
    /// in which both are the dialler.
    fn dial(&mut self, Target { peer, addresses }: Target) {
        match peer {
            Some(peer) => {
                let opts = DialOpts::peer_id(peer)
                    .condition(PeerCondition::DisconnectedAndNotDialing)
                    .addresses(addresses.into_iter().map(multiaddr).collect())
                    .allocate_new_port();
                // The only errors at this point: connected or being dialled already, or too many connections.
                let _ = self.swarm.dial(opts.build());
            }
            None => {
                for address in addresses {
                    let opts = DialOpts::unknown_peer_id().address(multiaddr(address)).allocate_new_port().build();
                    let id = opts.connection_id();
                    if self.swarm.dial(opts).is_ok() {
                        self.called.insert(id, address);
                    }
                }
            }
        }
    }

    /// A neighbour's message, or the end of one of its streams.
    fn on_arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Ended(peer, garbage) => {
                self.links.ended(&peer);
                if garbage {
                    self.metrics.0.refuse(Reason::Undecodable);
                }
            }
            Arrival::Message(peer, message) => {
                self.metrics.0.message(Direction::Received, message.kind(), 1);
                let now = Instant::now();
                self.on_offer(now, peer, &message);
                // What was read after the connection's end makes nobody a neighbour.
                if self.swarm.is_connected(&peer) {
                    self.membership.receive(now, peer, message);
                }
            }
        }
    }

    /// The sender is who the connection's encryption says, and speaks of itself only.
    fn on_offer(&self, now: Instant, peer: PeerId, message: &Message) {
        let mut records = self.records.lock();
        if let Some(offer) = &message.offer {
            let addresses = offer.addresses(&self.scope);
            if addresses.is_empty() {
                self.metrics.0.refuse(Reason::Address);
            }
            records.add(now, members::ids(&offer.keys), peer, &addresses);
        }
        members::ids(&message.withdrawn).for_each(|id| records.withdrawn(&id, &peer));
    }

    /// Does what the member list asks for, and shows it to others.
    fn follow_membership(&mut self) {
        while let Some(action) = self.membership.next_action() {
            match action {
                Action::Send(peer, message) => {
                    self.metrics.0.message(Direction::Sent, message.kind(), 1);
                    let table = self.table.read();
                    // One that is connected and not in the table has no address of interest.
                    let contact = table.find(&peer).cloned().unwrap_or_else(|| Contact::new(peer, &[]));
                    self.links.send(&contact, message, table.contains(&peer));
                }
                Action::Probe(peer) => {
                    let addresses = self.membership.card(&peer).map(|card| card.addresses.clone());
                    self.dial(Target { peer: Some(peer), addresses: addresses.unwrap_or_default() });
                }
            }
        }
        let changes = self.membership.take_changes();
        if !changes.is_empty() {
            self.show_members(changes);
        }
    }

    fn show_members(&mut self, changes: BTreeMap<PeerId, Option<Arc<Believed>>>) {
        let mut table = self.table.write();
        let mut records = self.records.lock();
        for (peer, change) in changes {
            if let Some(card) = change {
                table.set_member(card.contact.clone(), Arc::clone(&card.traits));
                let member = self.show(&card, records.own_addresses());
                if self.shown.insert(peer, member).is_none() {
                    records.recall(&peer);
                }
            } else {
                table.remove_member(&peer);
                self.shown.remove(&peer);
                self.storms.iter().for_each(|storms| storms.lost(&peer));
                records.forget(&peer);
            }
        }
        drop((table, records));
        self.members.send_replace(self.shown.values().cloned().collect());
    }

    fn show(&self, Believed { card, traits, .. }: &Believed, own: &[SocketAddr]) -> Member {
        let addresses = registries(&card.addresses, own, self.registry_port);
        let peer = Peer { id: card.peer.to_base58().into(), addresses, zone: traits.zone.clone(), load: card.load };
        Member { peer, version: card.version }
    }

    fn measure(&mut self) {
        let figures = &self.metrics.0;
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        figures.members.set(count(self.shown.len()));
        figures.peers.set(count(self.table.read().connected()));
        figures.records.set(count(self.records.lock().foreign_count()));
        (0..self.membership.take_refused()).for_each(|_| figures.refuse(Reason::Card));
        self.advertiser.measure(Instant::now());
    }

    /// Whether the search has been without success for so long that it is no reason any more to serve nothing.
    fn joins_in_vain(&self) -> bool {
        match *self.readiness.borrow() {
            Readiness::Isolated => true,
            Readiness::Joining => self.joining_since.elapsed() >= self.join_timeout,
            Readiness::Alone | Readiness::Connected => false,
        }
    }

    fn settle(&mut self) {
        let readiness = if !self.table.read().is_empty() {
            Readiness::Connected
        } else if self.joining.is_alone() || *self.readiness.borrow() == Readiness::Alone {
            // Who was settled to be alone stays ready until somebody has come, named or not.
            Readiness::Alone
        } else if self.joins_in_vain() {
            Readiness::Isolated
        } else {
            Readiness::Joining
        };
        if readiness == Readiness::Joining && *self.readiness.borrow() != Readiness::Joining {
            self.joining_since = tokio::time::Instant::now();
        }
        let changed = |current: &mut Readiness| std::mem::replace(current, readiness) != readiness;
        if self.readiness.send_if_modified(changed) {
            tracing::info!(?readiness, "the router");
        }
    }
}
