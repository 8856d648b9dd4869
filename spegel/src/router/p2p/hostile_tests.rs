//! What a hostile peer says over a real connection is dropped and counted, and ends nothing.
#![allow(clippy::unwrap_used)]

use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use libp2p::PeerId;
use libp2p::identity::Keypair;
use prost::Message as _;
use tokio::time::{sleep, timeout};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::members::{Card, SignedCard};
use super::opener::Purpose;
use super::table::Contact;
use super::wire::{Kind, Message, WirePeer};
use super::*;

const PORT: u16 = 5_001;
const PATIENCE: Duration = Duration::from_secs(20);

/// A peer that says what it is told to.
struct Hostile {
    keypair: Keypair,
    client: Client,
    own: SocketAddr,
    to: Contact,
    victim: Arc<P2pRouter>,
    metrics: RouterMetrics,
}

fn address(network: u8, number: u8) -> SocketAddr {
    let process = u8::try_from(std::process::id() % 200).unwrap() + 20;
    SocketAddr::from(([127, process, network, number], PORT))
}

fn id(n: u32) -> ContentId {
    ContentId::of(&format!("sha256:{n:064x}").parse().unwrap())
}

fn offer(id: &[u8], provider: &PeerId, address: SocketAddr) -> Vec<u8> {
    let mut message = Message::request(Kind::AddProvider, id);
    message.provider_peers = vec![WirePeer { id: provider.to_bytes(), addrs: vec![multiaddr(address).to_vec()] }];
    let mut bytes = Vec::new();
    message.frame(&mut bytes);
    bytes
}

impl Hostile {
    /// Each test has a network of its own.
    fn start(network: u8) -> Self {
        let metrics = RouterMetrics::default();
        let settings = P2pSettings {
            listen: vec![address(network, 1)],
            registry_port: 5_000,
            identity: Identity::fresh(),
            bootstrap: Vec::new(),
            remembered: None,
            mdns: false,
            advertise: Vec::new(),
            peer_networks: Vec::new(),
            storms: false,
            network_key: None,
            zone: None,
            metrics: metrics.clone(),
            advertise_ttl: P2pSettings::ADVERTISE_TTL,
            join_timeout: P2pSettings::JOIN_TIMEOUT,
            max_records: P2pSettings::MAX_RECORDS,
        };
        let victim = P2pRouter::start(settings, &CancellationToken::new()).unwrap();
        let to = Contact::new(victim.peer_id().parse().unwrap(), &[address(network, 1)]);
        let keypair = Keypair::generate_ed25519();
        let local = keypair.public().to_peer_id();
        let (open, opens) = mpsc::channel(QUEUE);
        let limits = RecordLimits { foreign: 1, validity: PATIENCE };
        let setup = Setup {
            identity: &keypair,
            mdns: false,
            network_key: None,
            records: SharedRecords::new(Records::new(local, limits, Instant::now())),
            opener: Opener::new(local, false, opens),
            metrics: RouterMetrics::default(),
        };
        let mut swarm = behaviour::swarm(setup).unwrap();
        tokio::spawn(async move { while swarm.next().await.is_some() {} });
        let client = Client::new(local, open, RouterMetrics::default());
        Self { keypair, client, own: address(network, 2), to, victim, metrics }
    }

    fn peer(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    /// Says it on a stream of its own, and waits until the other side has read it or has had enough.
    async fn say(&self, purpose: Purpose, bytes: &[u8]) {
        let said = async {
            let mut stream = self.client.open_stream(&self.to, purpose).await.unwrap();
            let _ = stream.write_all(bytes).await;
            let _ = stream.close().await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        timeout(PATIENCE, said).await.expect("the other side reads");
    }

    async fn say_as_member(&self, message: members::Message) {
        self.say(Purpose::Members, &message.encode_length_delimited_to_vec()).await;
    }

    async fn refused(&self, reason: &'static str, count: u64) {
        let start = Instant::now();
        while self.metrics.0.refused(reason) < count {
            assert!(start.elapsed() < PATIENCE, "{} of {count} refused as {reason}", self.metrics.0.refused(reason));
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.metrics.0.refused(reason), count, "{reason}");
    }

    fn holds(&self, n: u32) -> Vec<PeerId> {
        let others = self.victim.records.lock().others(Instant::now(), &id(n), &mut rand::rng());
        others.into_iter().map(|(peer, _)| peer).collect()
    }

    /// All that it says after something else is still taken.
    async fn is_heard(&self, n: u32) {
        self.say(Purpose::Kademlia, &offer(&id(n).multihash(), &self.peer(), self.own)).await;
        let start = Instant::now();
        while self.holds(n) != [self.peer()] {
            assert!(start.elapsed() < PATIENCE, "{:?}", self.holds(n));
            sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_names_a_third_peer_is_dropped_and_counted() {
    let hostile = Hostile::start(220);
    let third = PeerId::random();
    for n in 1..=3 {
        hostile.say(Purpose::Kademlia, &offer(&id(7).multihash(), &third, hostile.own)).await;
        hostile.refused("provider", n).await;
    }
    hostile.is_heard(7).await;
    assert_eq!(hostile.holds(7), [hostile.peer()], "the third is never named");
    assert_eq!(hostile.victim.foreign_records(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_used_is_dropped_and_counted() {
    let hostile = Hostile::start(221);
    let elsewhere = SocketAddr::from(([10, 1, 2, 3], PORT));
    hostile.say(Purpose::Kademlia, &offer(b"no content", &hostile.peer(), hostile.own)).await;
    hostile.refused("key", 1).await;
    hostile.say(Purpose::Kademlia, &offer(&id(1).multihash(), &hostile.peer(), elsewhere)).await;
    hostile.refused("address", 1).await;
    hostile.say_as_member(members::Message::offer(&[elsewhere], &[id(1)])).await;
    hostile.refused("address", 2).await;

    // No message, one that is too long, and a card that another has signed.
    hostile.say(Purpose::Members, &[5, 0xff, 0xff, 0xff, 0xff, 0xff]).await;
    hostile.refused("undecodable", 1).await;
    hostile.say(Purpose::Members, &[0xff, 0xff, 0xff, 0x7f]).await;
    hostile.refused("undecodable", 2).await;
    let victim = Keypair::generate_ed25519().public().to_peer_id();
    let card = Card { peer: victim, stamp: 1, addresses: vec![hostile.own], zone: None, version: 1, load: None };
    let cards: Vec<SignedCard> = vec![card.sign(&hostile.keypair); 100];
    hostile.say_as_member(members::Message::cards(cards)).await;
    hostile.refused("card", 1).await;

    assert_eq!(hostile.victim.foreign_records(), 0);
    hostile.is_heard(1).await;
}

/// The subscriber is this thread's own, so all must run on it.
#[tokio::test]
async fn what_kad_cannot_read_is_dropped_and_counted() {
    static KAD_ERRORS: KadErrors = KadErrors::new();
    let _subscriber = tracing_subscriber::registry().with(KAD_ERRORS.layer()).set_default();
    let hostile = Hostile::start(222);
    KAD_ERRORS.count_in(&hostile.metrics);
    let mut no_request = Vec::new();
    Message { kind: 99, ..Message::default() }.frame(&mut no_request);
    let (no_message, too_long) = ([5, 0xff, 0xff, 0xff, 0xff, 0xff], [0xff, 0xff, 0xff, 0xff, 0x7f]);
    let said = [&no_message[..], &too_long, &no_request];
    for (n, bytes) in said.into_iter().enumerate() {
        hostile.say(Purpose::Kademlia, bytes).await;
        hostile.refused("undecodable", n as u64 + 1).await;
    }
    hostile.say(Purpose::Kademlia, &[]).await;
    assert_eq!(hostile.victim.foreign_records(), 0);
    hostile.is_heard(1).await;
    hostile.refused("undecodable", said.len() as u64).await;
}
