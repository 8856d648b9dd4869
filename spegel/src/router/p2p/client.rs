//! Messages to peers: requests over one long-lived stream a peer, and bulk advertising over streams of its own.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::PeerId;
use libp2p::swarm::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::addresses::multiaddr;
use super::keys::ContentId;
use super::members;
use super::metrics::{Direction, Reason, RouterMetrics};
use super::opener::{Open, Purpose};
use super::table::Contact;
use super::wire::{Kind, Message, WirePeer, read_message};

/// How long one request may take, the dial included if there must be one.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// How long telling one peer about all keys may take.
const BULK_TIMEOUT: Duration = Duration::from_secs(30);

/// How many bytes of a bulk are handed to the stream at once.
const BULK_CHUNK: usize = 16 * 1024;

/// How long a request stream is kept open unused: less than the minute after which the Go program closes it.
const STREAM_IDLE: Duration = Duration::from_secs(45);

/// How many requests may wait for one peer, and how many of them are sent before the first is answered.
const MAX_QUEUE: usize = 256;
const MAX_PIPELINE: usize = 32;

/// Sends messages. Cheap to clone.
#[derive(Clone)]
pub(super) struct Client {
    local: PeerId,
    open: mpsc::Sender<Open>,
    metrics: RouterMetrics,
    links: Arc<Mutex<HashMap<PeerId, mpsc::Sender<Request>>>>,
}

struct Request {
    message: Message,
    reply: oneshot::Sender<Message>,
}

// === impl Client ===

impl Client {
    pub(super) fn new(local: PeerId, open: mpsc::Sender<Open>, metrics: RouterMetrics) -> Self {
        Self { local, open, metrics, links: Arc::default() }
    }

    /// Sends a request and waits for its answer. Must run on the control runtime.
    pub(super) async fn request(&self, to: &Contact, message: Message) -> io::Result<Message> {
        self.metrics.0.message(Direction::Sent, "get_providers", 1);
        let (reply, answer) = oneshot::channel();
        self.enqueue(to, Request { message, reply })?;
        match timeout(REQUEST_TIMEOUT, answer).await {
            Ok(answer) => answer.map_err(|_| ErrorKind::ConnectionAborted.into()),
            Err(_) => Err(ErrorKind::TimedOut.into()),
        }
    }

    /// Tells a peer that we, at `own`, offer `ids`: one stream, one message a key, no answers.
    pub(super) async fn advertise(&self, to: &Contact, own: &[SocketAddr], ids: &[ContentId]) -> io::Result<()> {
        timeout(BULK_TIMEOUT, self.send_all(to, own, ids)).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
    }

    /// Tells a member the same, or that it does not hold any more: a message for thousands of keys.
    pub(super) async fn tell_member(&self, to: &Contact, messages: &[members::Message]) -> io::Result<()> {
        let send = async {
            let mut stream = self.open_stream(to, Purpose::Members).await?;
            let mut buffer = Vec::new();
            for message in messages {
                buffer.clear();
                frame(message, &mut buffer);
                stream.write_all(&buffer).await?;
                self.metrics.0.message(Direction::Sent, message.kind(), 1);
            }
            close_and_wait(stream).await
        };
        timeout(BULK_TIMEOUT, send).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
    }

    async fn send_all(&self, to: &Contact, own: &[SocketAddr], ids: &[ContentId]) -> io::Result<()> {
        let mut stream = self.open_stream(to, Purpose::Kademlia).await?;
        self.metrics.0.message(Direction::Sent, "add_provider", ids.len() as u64);
        let addrs = own.iter().map(|address| multiaddr(*address).to_vec()).collect();
        let provider = WirePeer { id: self.local.to_bytes(), addrs };
        let mut message = Message::request(Kind::AddProvider, &[]);
        message.provider_peers = vec![provider];
        let mut buffer = Vec::new();
        for id in ids {
            message.key = id.multihash().to_vec();
            message.frame(&mut buffer);
            if buffer.len() >= BULK_CHUNK {
                stream.write_all(&buffer).await?;
                buffer.clear();
            }
        }
        stream.write_all(&buffer).await?;
        close_and_wait(stream).await
    }

    pub(super) async fn open_stream(&self, to: &Contact, purpose: Purpose) -> io::Result<Stream> {
        let (reply, stream) = oneshot::channel();
        let open = Open { to: to.clone(), purpose, reply };
        self.open.send(open).await.map_err(|_| io::Error::from(ErrorKind::NotConnected))?;
        stream.await.map_err(|_| ErrorKind::NotConnected.into())
    }

    fn enqueue(&self, to: &Contact, request: Request) -> io::Result<()> {
        let mut links = self.links();
        let request = match links.get(&to.peer()) {
            Some(link) => match link.try_send(request) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => return Err(ErrorKind::WouldBlock.into()),
                Err(mpsc::error::TrySendError::Closed(request)) => request,
            },
            None => request,
        };
        let (link, requests) = mpsc::channel(MAX_QUEUE);
        link.try_send(request).map_err(|_| io::Error::from(ErrorKind::WouldBlock))?;
        links.insert(to.peer(), link);
        tokio::spawn(self.clone().serve_link(to.clone(), requests));
        Ok(())
    }

    fn links(&self) -> MutexGuard<'_, HashMap<PeerId, mpsc::Sender<Request>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries the requests to one peer until there have been none for a while, or the peer fails.
    async fn serve_link(self, to: Contact, mut requests: mpsc::Receiver<Request>) {
        let mut stream = None;
        let mut batch = Vec::new();
        loop {
            match timeout(STREAM_IDLE, requests.recv_many(&mut batch, MAX_PIPELINE)).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(_) => {
                    // Closing first and draining then loses no request that came in meanwhile.
                    requests.close();
                    continue;
                }
            }
            batch.retain(|request| !request.reply.is_closed());
            if let Err(error) = self.exchange(&to, &mut stream, &mut batch).await {
                tracing::debug!(peer = %to.peer(), %error, "request failed");
                if error.kind() == ErrorKind::InvalidData {
                    self.metrics.0.refuse(Reason::Undecodable);
                }
                stream = None;
                batch.clear();
            }
        }
        self.links().retain(|_, link| !link.is_closed());
    }

    /// Sends a batch and reads its answers, which come in order. A stream that was idle may have been closed by the peer
    /// meanwhile: then once more on a new one.
    async fn exchange(&self, to: &Contact, stream: &mut Option<Stream>, batch: &mut Vec<Request>) -> io::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        if let Some(old) = stream {
            let before = batch.len();
            match timeout(REQUEST_TIMEOUT, converse(old, batch)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(_)) if batch.len() == before => *stream = None,
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(ErrorKind::TimedOut.into()),
            }
        }
        let fresh = async {
            let opened = stream.insert(self.open_stream(to, Purpose::Kademlia).await?);
            converse(opened, batch).await
        };
        timeout(2 * REQUEST_TIMEOUT, fresh).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
    }
}

/// The peer ends its side when it has read ours to the end: the only sign that it heard everything.
async fn close_and_wait(mut stream: Stream) -> io::Result<()> {
    stream.close().await?;
    match stream.read(&mut [0]).await? {
        0 => Ok(()),
        _ => Err(io::Error::new(ErrorKind::InvalidData, "the peer answered what was no question")),
    }
}

/// Appends a message with its length before it.
pub(super) fn frame(message: &impl prost::Message, buffer: &mut Vec<u8>) {
    // A Vec grows as needed: encoding into it cannot fail.
    let _ = message.encode_length_delimited(buffer);
}

/// Answers leave the batch as they arrive.
async fn converse(stream: &mut Stream, batch: &mut Vec<Request>) -> io::Result<()> {
    let mut bytes = Vec::new();
    batch.iter().for_each(|request| request.message.frame(&mut bytes));
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    while !batch.is_empty() {
        let answer = read_message(stream).await?;
        // Whoever asked may have given up by now.
        let _ = batch.remove(0).reply.send(answer);
    }
    Ok(())
}
