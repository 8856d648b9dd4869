//! The streams of the member protocol: one to each neighbour, and those that neighbours opened to us.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use futures::AsyncWriteExt as _;
use libp2p::PeerId;
use libp2p::swarm::Stream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::client::{Client, frame};
use super::members::Message;
use super::opener::Purpose;
use super::table::Contact;
use super::wire::{read_bytes, read_length};

/// Larger messages are refused. A comparison of 20,000 members has 400 KB.
pub(super) const MAX_MESSAGE: usize = 1024 * 1024;

/// How many messages wait to be written to one neighbour. More are dropped, which comparing lists makes up for.
const MAX_QUEUE: usize = 64;

/// How long writing one message may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the rest of a message may take that has begun to come.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// How many bytes of messages that are coming are held at once, of all peers together: what is more waits for its turn, and not for long.
const MAX_READING: usize = 16 * 1024 * 1024;

/// How long a stream is kept open to a peer that is no neighbour and is only answered: an open one keeps its connection.
const STREAM_IDLE: Duration = Duration::from_secs(30);

/// How many streams one peer may have open to us: one for the list, others for offers.
const MAX_INBOUND: usize = 8;

/// A message that came, or that a stream ended.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "nearly all are of the larger kind")]
pub(super) enum Arrival {
    Message(PeerId, Message),
    /// With whether the peer sent what is no message.
    Ended(PeerId, bool),
}

/// All streams.
pub(super) struct Links {
    client: Client,
    outbound: HashMap<PeerId, Outbound>,
    inbound: HashMap<PeerId, usize>,
    arrivals: mpsc::Sender<Arrival>,
    reading: Arc<Semaphore>,
}

/// The stream that we write to one peer.
struct Outbound {
    messages: mpsc::Sender<Message>,
    /// Whether it stays open unused.
    kept: bool,
}

// === impl Links ===

impl Links {
    pub(super) fn new(client: Client, arrivals: mpsc::Sender<Arrival>) -> Self {
        let reading = Arc::new(Semaphore::new(MAX_READING));
        Self { client, outbound: HashMap::new(), inbound: HashMap::new(), arrivals, reading }
    }

    /// Queues a message for a peer. The stream to a neighbour is kept open, and the connection with it.
    pub(super) fn send(&mut self, to: &Contact, message: Message, keep: bool) {
        let message = match self.outbound.get(&to.peer()).filter(|link| link.kept || !keep) {
            Some(link) => match link.messages.try_send(message) {
                Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => return,
                Err(mpsc::error::TrySendError::Closed(message)) => message,
            },
            None => message,
        };
        let (link, messages) = mpsc::channel(MAX_QUEUE);
        // It is empty.
        let _ = link.try_send(message);
        self.outbound.insert(to.peer(), Outbound { messages: link, kept: keep });
        let (client, to) = (self.client.clone(), to.clone());
        tokio::spawn(async move {
            if let Err(error) = write(&client, &to, messages, keep).await {
                tracing::debug!(peer = %to.peer(), %error, "the member stream ended");
            }
        });
    }

    /// A peer is no neighbour any more, or the last connection to it ended.
    pub(super) fn forget(&mut self, peer: &PeerId) {
        self.outbound.remove(peer);
    }

    /// Reads a stream that a peer opened, unless it has too many already.
    pub(super) fn accept(&mut self, peer: PeerId, stream: Stream) {
        let open = self.inbound.entry(peer).or_default();
        if *open >= MAX_INBOUND {
            return tracing::debug!(%peer, "has too many member streams");
        }
        *open += 1;
        let (arrivals, reading) = (self.arrivals.clone(), Arc::clone(&self.reading));
        tokio::spawn(async move {
            let garbage = match read(peer, stream, &arrivals, &reading).await {
                Err(error) if error.kind() == ErrorKind::InvalidData => {
                    tracing::debug!(%peer, %error, "sent no message");
                    true
                }
                _ => false,
            };
            let _ = arrivals.send(Arrival::Ended(peer, garbage)).await;
        });
    }

    /// A stream that was accepted has ended.
    pub(super) fn ended(&mut self, peer: &PeerId) {
        if let Some(open) = self.inbound.get_mut(peer) {
            *open -= 1;
            if *open == 0 {
                self.inbound.remove(peer);
            }
        }
    }
}

async fn write(client: &Client, to: &Contact, mut messages: mpsc::Receiver<Message>, keep: bool) -> io::Result<()> {
    let mut stream = timeout(WRITE_TIMEOUT, client.open_stream(to, Purpose::Members)).await??;
    let mut buffer = Vec::new();
    loop {
        let message = if keep {
            messages.recv().await
        } else {
            timeout(STREAM_IDLE, messages.recv()).await.unwrap_or_else(|_| {
                // What came meanwhile is sent all the same.
                messages.close();
                messages.try_recv().ok()
            })
        };
        let Some(message) = message else { break };
        buffer.clear();
        frame(&message, &mut buffer);
        let written = async {
            stream.write_all(&buffer).await?;
            stream.flush().await
        };
        timeout(WRITE_TIMEOUT, written).await??;
    }
    stream.close().await
}

/// Until its end. A peer from which more comes than is read waits.
async fn read(
    peer: PeerId,
    mut stream: Stream,
    arrivals: &mpsc::Sender<Arrival>,
    reading: &Semaphore,
) -> io::Result<()> {
    loop {
        let length = read_length(&mut stream, MAX_MESSAGE).await?;
        let rest = async {
            let permits = u32::try_from(length).unwrap_or(u32::MAX);
            let _turn = reading.acquire_many(permits).await.map_err(|_| io::Error::from(ErrorKind::BrokenPipe))?;
            let bytes = read_bytes(&mut stream, length).await?;
            Message::read(&bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
        };
        let message = timeout(READ_TIMEOUT, rest).await??;
        if arrivals.send(Arrival::Message(peer, message)).await.is_err() {
            return Ok(());
        }
    }
}
