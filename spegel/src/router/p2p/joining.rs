//! Finding the first peers: asks the bootstrap sources until there is somebody, or it is settled that there is nobody.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId;
use rand::seq::IteratorRandom;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::addresses::Scope;
use super::table::Table;
use crate::bootstrap::{Bootstrap, BootstrapError, BootstrapPeer};
use crate::router::Readiness;

/// The pause after the first question while nobody is found, and the longest. It grows by half each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The pause while connected: two halves of a network that lost each other find together again by this.
const CONNECTED_PAUSE: Duration = Duration::from_secs(300);

/// What a source may take, should it not bound itself.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(15);

/// How many peers are dialled from one answer; they know the others.
const MAX_DIALS: usize = 16;

/// How many addresses of one peer are dialled, whoever named them.
const MAX_ADDRESSES: usize = 16;

/// How many peers that announced themselves are remembered.
const MAX_APPEARED: usize = 256;

/// What a source said.
#[derive(Debug)]
pub(super) struct Answer {
    /// Which source, by its number.
    pub(super) source: usize,
    /// Those that it named.
    pub(super) peers: Vec<BootstrapPeer>,
    /// Whether it said all that it knows.
    pub(super) complete: bool,
}

/// A peer to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) peer: Option<PeerId>,
    pub(super) addresses: Vec<SocketAddr>,
}

/// What is known of one source.
#[derive(Clone, Debug, Default)]
struct Said {
    targets: Vec<Target>,
    complete: bool,
    /// It named somebody, of whom no address may be used.
    unusable: bool,
    /// It knows who was there once, which says nothing about whether somebody is there now.
    memory: bool,
}

/// What the sources said.
#[derive(Debug)]
pub(super) struct Joining {
    local: PeerId,
    scope: Scope,
    port: u16,
    /// Addresses at which we are ourselves: those of our interfaces, and others that turned out to be.
    own: Vec<SocketAddr>,
    found: HashSet<SocketAddr>,
    sources: Vec<Said>,
}

// === impl Joining ===

impl Joining {
    /// Nothing said yet by `sources` sources. Peers without a port have `port`.
    pub(super) fn new(local: PeerId, scope: Scope, port: u16, sources: usize) -> Self {
        Self { local, scope, port, own: Vec::new(), found: HashSet::new(), sources: vec![Said::default(); sources] }
    }

    /// Whatever this source names or fails to name, it does not keep us from being alone.
    pub(super) fn is_memory(&mut self, source: usize) {
        if let Some(said) = self.sources.get_mut(source) {
            said.memory = true;
        }
    }

    /// We can be reached there, and nowhere else as far as is known: where we were before somebody else may be by now.
    pub(super) fn we_are_at(&mut self, own: &[SocketAddr]) {
        self.own = own.to_vec();
        self.found.clear();
    }

    /// It turned out that we are there too. True if that was not known.
    pub(super) fn is_us(&mut self, address: SocketAddr) -> bool {
        !self.own.contains(&address) && self.found.insert(address)
    }

    /// Every source has to answer again. Those that were named before are called meanwhile.
    pub(super) fn start_over(&mut self) {
        self.sources.iter_mut().for_each(|said| said.complete = false);
    }

    pub(super) fn answered(&mut self, Answer { source, peers, complete }: Answer) {
        let named = peers.len();
        let targets: Vec<Target> = peers.into_iter().filter_map(|peer| self.target(peer)).collect();
        let Some(said) = self.sources.get_mut(source) else { return };
        if complete && named > targets.len() && !said.unusable {
            tracing::warn!("a bootstrap source names peers at addresses that may not be used: look at --peer-cidrs");
        }
        (said.complete, said.unusable) = (complete, named > targets.len());
        // A source that fails has not taken back what it named before.
        if complete || !targets.is_empty() {
            said.targets = targets;
        }
    }

    /// A peer announced itself on a source that never says all that it knows.
    pub(super) fn appeared(&mut self, source: usize, peer: PeerId, addresses: Vec<SocketAddr>) {
        let Some(said) = self.sources.get_mut(source) else { return };
        if let Some(known) = said.targets.iter_mut().find(|target| target.peer == Some(peer)) {
            known.also_at(&addresses);
        } else if said.targets.len() < MAX_APPEARED {
            said.targets.push(Target { peer: Some(peer), addresses });
        }
    }

    /// A peer that had announced itself is silent at that address.
    pub(super) fn vanished(&mut self, source: usize, peer: &PeerId, address: SocketAddr) {
        let Some(said) = self.sources.get_mut(source) else { return };
        for target in said.targets.iter_mut().filter(|target| target.peer.as_ref() == Some(peer)) {
            target.addresses.retain(|known| *known != address);
        }
        said.targets.retain(|target| !target.addresses.is_empty());
    }

    /// Such a source has had its time to say who is there.
    pub(super) fn waited(&mut self, source: usize) {
        if let Some(said) = self.sources.get_mut(source) {
            said.complete = true;
        }
    }

    /// Whether all sources answered and named nobody but us.
    pub(super) fn is_alone(&self) -> bool {
        let mut present = self.sources.iter().filter(|said| !said.memory);
        present.all(|said| said.complete && !said.unusable && said.targets.iter().all(|one| self.names_us(one)))
    }

    /// Some of those who were named and are neither us nor connected, each at all addresses under which it was named: a peer is dialled once at a
    /// time, and what is remembered of it may be old.
    pub(super) fn to_dial(&self, table: &Table) -> Vec<Target> {
        let known = |target: &Target| match target.peer {
            Some(peer) => table.contains(&peer),
            None => target.addresses.iter().any(|address| table.has_address(address)),
        };
        let present = self.sources.iter().filter(|said| !said.memory);
        let named = present.chain(self.sources.iter().filter(|said| said.memory)).flat_map(|said| &said.targets);
        let mut wanted: Vec<Target> = Vec::new();
        let mut places: HashMap<PeerId, usize> = HashMap::new();
        for target in named.filter(|target| !self.names_us(target) && !known(target)) {
            let before = target.peer.and_then(|peer| places.get(&peer).copied());
            if let Some(before) = before.and_then(|place| wanted.get_mut(place)) {
                before.also_at(&target.addresses);
                continue;
            }
            places.extend(target.peer.map(|peer| (peer, wanted.len())));
            wanted.push(target.clone());
        }
        wanted.into_iter().choose_multiple(&mut rand::rng(), MAX_DIALS)
    }

    /// Another identity at an address of ours is one that has the address as well, as all hosts have that of their container bridge.
    fn names_us(&self, target: &Target) -> bool {
        let is_ours = |address: &SocketAddr| self.own.contains(address) || self.found.contains(address);
        target.peer.map_or_else(|| target.addresses.iter().all(is_ours), |peer| peer == self.local)
    }

    fn target(&self, peer: BootstrapPeer) -> Option<Target> {
        let id = peer.id.and_then(|text| match text.parse() {
            Ok(id) => Some(id),
            Err(_) => {
                tracing::warn!(id = %text, "a bootstrap source gives a peer an identity that is none; it is dialled without");
                None
            }
        });
        let address = |ip, port: Option<u16>| SocketAddr::new(ip, port.unwrap_or(self.port));
        let mut addresses: Vec<_> = peer.addresses.iter().map(|at| address(at.ip, at.port)).collect();
        addresses.retain(|address| self.scope.accepts(*address) || self.own.contains(address));
        (!addresses.is_empty()).then_some(Target { peer: id, addresses })
    }
}

// === impl Target ===

impl Target {
    /// It may be there as well.
    fn also_at(&mut self, addresses: &[SocketAddr]) {
        for address in addresses {
            if self.addresses.len() < MAX_ADDRESSES && !self.addresses.contains(address) {
                self.addresses.push(*address);
            }
        }
    }
}

/// Asks one source again and again: often while there is nobody, seldom while connected.
pub(super) async fn follow(
    index: usize,
    source: Arc<dyn Bootstrap>,
    mut readiness: watch::Receiver<Readiness>,
    answers: mpsc::Sender<Answer>,
    cancelled: CancellationToken,
) {
    let mut pause = FIRST_PAUSE;
    let mut failing = false;
    loop {
        let answer = tokio::select! {
            () = cancelled.cancelled() => return,
            answer = tokio::time::timeout(SOURCE_TIMEOUT, source.peers()) => answer,
        };
        let (peers, complete) = match answer {
            Ok(Ok(peers)) => (peers, true),
            Ok(Err(error)) => {
                failed(&mut failing, &source, &error);
                match error {
                    BootstrapError::Partial { found, .. } => (found, false),
                    _ => (Vec::new(), false),
                }
            }
            Err(elapsed) => {
                failed(&mut failing, &source, &elapsed);
                (Vec::new(), false)
            }
        };
        failing &= !complete;
        if answers.send(Answer { source: index, peers, complete }).await.is_err() {
            return;
        }
        let connected = *readiness.borrow_and_update() == Readiness::Connected;
        let wait = if connected { CONNECTED_PAUSE } else { pause };
        pause = if connected { FIRST_PAUSE } else { (pause * 3 / 2).min(LONGEST_PAUSE) };
        tokio::select! {
            () = cancelled.cancelled() => return,
            () = tokio::time::sleep(wait.mul_f64(rand::random_range(0.75..1.25))) => {}
            _ = readiness.wait_for(|now| connected && *now != Readiness::Connected) => {}
        }
    }
}

/// Said once, until it answers again.
fn failed(failing: &mut bool, source: &dyn std::fmt::Debug, error: &dyn std::fmt::Display) {
    if *failing {
        tracing::debug!(?source, %error, "bootstrap source still does not answer");
    } else {
        *failing = true;
        tracing::info!(?source, %error, "bootstrap source does not answer; asking again");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::table::Contact;
    use super::*;
    use crate::bootstrap::BootstrapAddress;

    fn joining(sources: usize) -> Joining {
        let scope = Scope::of_listeners(&["0.0.0.0:5001".parse().unwrap()]);
        let mut joining = Joining::new(PeerId::random(), scope, 5001, sources);
        joining.we_are_at(&["10.0.0.1:5001".parse().unwrap()]);
        joining
    }

    fn named(id: Option<String>, ip: &str, port: Option<u16>) -> BootstrapPeer {
        BootstrapPeer { id, addresses: vec![BootstrapAddress { ip: ip.parse().unwrap(), port }] }
    }

    fn all(source: usize, peers: Vec<BootstrapPeer>) -> Answer {
        Answer { source, peers, complete: true }
    }

    #[test]
    fn a_source_that_fails_takes_nothing_back() {
        let mut joining = joining(1);
        joining.answered(all(0, vec![named(None, "10.0.0.2", None)]));
        joining.answered(Answer { source: 0, peers: vec![], complete: false });
        assert_eq!(joining.to_dial(&Table::default()).len(), 1);
        joining.answered(Answer { source: 0, peers: vec![named(None, "10.0.0.3", None)], complete: false });
        assert_eq!(joining.to_dial(&Table::default())[0].addresses[0].ip().to_string(), "10.0.0.3");
        assert!(!joining.is_alone());
    }

    #[test]
    fn the_remembered_are_called_and_do_not_keep_us_from_being_alone() {
        let mut joining = joining(2);
        joining.is_memory(1);
        joining.answered(all(1, vec![named(None, "10.0.0.2", None)]));
        assert_eq!(joining.to_dial(&Table::default()).len(), 1);
        assert!(!joining.is_alone());
        joining.answered(all(0, vec![]));
        assert!(joining.is_alone());
    }

    #[test]
    fn peers_that_appear_are_called_until_they_vanish() {
        let mut joining = joining(1);
        let peers: Vec<PeerId> = (0..MAX_APPEARED + 10).map(|_| PeerId::random()).collect();
        for peer in &peers {
            joining.appeared(0, *peer, vec!["10.0.0.9:5001".parse().unwrap()]);
        }
        joining.waited(0);
        assert!(!joining.is_alone());
        assert_eq!(joining.sources[0].targets.len(), MAX_APPEARED);
        let at = "10.0.0.9:5001".parse().unwrap();
        joining.appeared(0, peers[0], vec!["[fd00::9]:5001".parse().unwrap()]);
        peers.iter().for_each(|peer| joining.vanished(0, peer, at));
        assert_eq!(joining.to_dial(&Table::default())[0].addresses.len(), 1, "it is still there by the other family");
        joining.vanished(0, &peers[0], "[fd00::9]:5001".parse().unwrap());
        assert!(joining.is_alone());
    }

    #[test]
    fn alone_is_settled_when_every_source_named_only_us() {
        let mut joining = joining(2);
        assert!(!joining.is_alone());
        joining.answered(all(0, vec![named(None, "10.0.0.1", None)]));
        assert!(!joining.is_alone(), "the other has not answered");
        joining.answered(Answer { source: 1, peers: vec![], complete: false });
        assert!(!joining.is_alone(), "the other failed");
        joining.answered(all(1, vec![]));
        assert!(joining.is_alone());
        joining.start_over();
        assert!(!joining.is_alone());
    }

    #[test]
    fn somebody_else_is_dialled_until_connected_or_found_to_be_us() {
        let mut joining = joining(1);
        let id = PeerId::random();
        let peers = vec![named(None, "10.0.0.2", None), named(Some(id.to_base58()), "10.0.0.3", Some(7))];
        joining.answered(all(0, peers));
        assert!(!joining.is_alone());
        let mut table = Table::default();
        let second = Target { peer: None, addresses: vec!["10.0.0.2:5001".parse().unwrap()] };
        let third = Target { peer: Some(id), addresses: vec!["10.0.0.3:7".parse().unwrap()] };
        let dials = joining.to_dial(&table);
        assert!(dials.len() == 2 && dials.contains(&second) && dials.contains(&third), "{dials:?}");
        table.insert(Contact::new(id, &[]));
        assert_eq!(joining.to_dial(&table), [second]);
        joining.is_us("10.0.0.2:5001".parse().unwrap());
        assert_eq!(joining.to_dial(&table), []);
    }

    #[test]
    fn our_own_identity_is_us_wherever_it_is() {
        let mut joining = joining(1);
        let id = joining.local.to_base58();
        joining.answered(all(0, vec![named(Some(id), "10.0.0.77", None)]));
        assert!(joining.is_alone());
    }

    #[test]
    fn who_is_remembered_and_named_is_dialled_once_at_all_its_addresses() {
        let mut joining = joining(2);
        joining.is_memory(0);
        let id = PeerId::random();
        let one = |ip: &str| vec![named(Some(id.to_base58()), ip, None)];
        joining.answered(all(0, one("10.0.0.2")));
        joining.answered(all(1, one("10.0.0.102")));
        let addresses = ["10.0.0.102:5001", "10.0.0.2:5001"].map(|text| text.parse().unwrap());
        let both = Target { peer: Some(id), addresses: addresses.to_vec() };
        assert_eq!(joining.to_dial(&Table::default()), [both], "where it is said to be now comes first");
    }

    #[test]
    fn an_address_that_all_hosts_have_makes_nobody_us() {
        let mut joining = joining(1);
        let bridge = "172.17.0.1:5001".parse().unwrap();
        joining.we_are_at(&["10.0.0.1:5001".parse().unwrap(), bridge]);
        let mut other = named(Some(PeerId::random().to_base58()), "172.17.0.1", None);
        other.addresses.push(BootstrapAddress { ip: "10.0.0.2".parse().unwrap(), port: None });
        joining.answered(all(0, vec![other]));
        assert!(!joining.is_alone());
        assert_eq!(joining.to_dial(&Table::default()).len(), 1);
    }

    #[test]
    fn where_we_were_before_somebody_else_may_be() {
        let mut joining = joining(1);
        joining.answered(all(0, vec![named(None, "10.0.0.1", None)]));
        assert!(joining.is_alone());
        joining.we_are_at(&["10.0.0.11:5001".parse().unwrap()]);
        assert!(!joining.is_alone());
        assert_eq!(joining.to_dial(&Table::default()).len(), 1);
    }

    #[test]
    fn whom_no_network_may_reach_is_somebody_all_the_same() {
        let scope =
            Scope::of_listeners(&["0.0.0.0:5001".parse().unwrap()]).within(&["192.168.0.0/16".parse().unwrap()]);
        let mut joining = Joining::new(PeerId::random(), scope, 5001, 1);
        joining.answered(all(0, vec![named(None, "10.0.0.2", None)]));
        assert!(!joining.is_alone());
        assert_eq!(joining.to_dial(&Table::default()), []);
    }

    #[test]
    fn dials_are_bounded() {
        let mut joining = joining(1);
        joining.answered(all(0, (2..200).map(|n| named(None, &format!("10.0.0.{n}"), None)).collect()));
        assert_eq!(joining.to_dial(&Table::default()).len(), MAX_DIALS);
    }

    #[test]
    fn no_sources_is_alone() {
        assert!(joining(0).is_alone());
    }
}
