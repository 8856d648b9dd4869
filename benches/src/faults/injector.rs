//! A peer that speaks HTTP badly on command.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::image::{Descriptor, Image, host_platform};
use crate::netns::Node;

/// The longest that a silent peer holds a connection; longer than any pull of a test may take.
const HELD: Duration = Duration::from_secs(150);

/// How long a connection may be idle between two requests.
const IDLE: Duration = Duration::from_secs(30);

/// What a peer does wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Takes the connection, and reads nothing of it.
    Deaf,
    /// Answers as a TLS server does that is spoken to in plain HTTP.
    Tls,
    /// Is another kind of web server, which has a page for every path.
    Stranger,
    /// Never answers a request.
    Silent,
    /// Sends the head one byte a second.
    Trickle,
    /// Sends 64 KiB of headers.
    LongHead,
    /// Sends what is no HTTP.
    Malformed,
    /// Says 200 and no length; the body ends with the connection.
    NoLength,
    /// Claims so many bytes more than there are (fewer, if negative).
    WrongLength(i64),
    /// Answers with another range than was asked for.
    OtherRange,
    /// Answers with this status.
    Status(u16),
    /// Answers 503 and names others in a header.
    Busy(String),
    /// Redirects to itself.
    RedirectLoop,
    /// Says 200 to HEAD and 404 to GET.
    GetNotFound,
    /// A layer's body stops.
    Stops(Place, Ending),
    /// A layer's body comes at so many bytes a second.
    Slow(u64),
    /// More bytes than were announced.
    TooLong,
    /// One bit of the first layer is wrong.
    WrongBytes,
}

/// Where in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before its first byte.
    Start,
    /// Behind its first byte.
    First,
    /// In its middle.
    Half,
    /// Before its last byte.
    Last,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// TCP RST.
    Reset,
    /// TCP FIN.
    Close,
    /// Not at all.
    Silence,
}

/// A peer's registry on a node of a lab, with the content of some images.
#[derive(Debug)]
pub struct Injector {
    shared: Arc<Shared>,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    contents: HashMap<String, (Descriptor, PathBuf)>,
    /// Manifests by `repository/manifests/tag`.
    tags: HashMap<String, String>,
    /// The one that wrong bytes are sent for: a second pull may resume the others where the first was broken off.
    first_layer: String,
    fault: Mutex<Fault>,
    hits: AtomicUsize,
    stopped: AtomicBool,
}

/// A request line and what matters of its headers.
struct Request {
    method: String,
    path: String,
    first: Option<u64>,
    last: Option<u64>,
}

// === impl Injector ===

impl Injector {
    /// Listens on `port` of a node, and does nothing wrong at first.
    ///
    /// # Errors
    /// A namespace that cannot be entered, or a port that is taken.
    pub fn start(node: &Node, port: u16, images: &[Image]) -> Result<Self> {
        let contents = images.iter().flat_map(|image| {
            let with_path = |content: &Descriptor| (content.clone(), image.blob_path(&content.digest));
            image.contents().iter().map(move |content| (content.digest.clone(), with_path(content)))
        });
        let tag =
            |image: &Image| (format!("{}/manifests/{}", image.repository(), image.tag()), image.root().digest.clone());
        let first_layer = images.first().and_then(|image| image.layers_for(host_platform()).next());
        let shared = Arc::new(Shared {
            contents: contents.collect(),
            tags: images.iter().map(tag).collect(),
            first_layer: first_layer.map(|layer| layer.digest.clone()).unwrap_or_default(),
            fault: Mutex::new(Fault::None),
            hits: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let address = SocketAddr::new(node.address().into(), port);
        let (sender, bound) = mpsc::channel();
        let (namespace, serving) = (node.namespace().to_owned(), shared.clone());
        thread::spawn(move || {
            // A network namespace belongs to a thread, and to the threads that it starts.
            match enter(&namespace).and_then(|()| Ok(TcpListener::bind(address)?)) {
                Ok(listener) => {
                    let _ = sender.send(Ok(()));
                    serving.accept(&listener);
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        });
        bound.recv().context("the injector ended")?.with_context(|| format!("listen on {address}"))?;
        Ok(Self { shared, address })
    }

    /// Does this from now on.
    pub fn set(&self, fault: Fault) {
        *self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
        self.shared.hits.store(0, Ordering::Relaxed);
    }

    /// Requests, or connections where it comes to none, that the present fault met.
    pub fn hits(&self) -> usize {
        self.shared.hits.load(Ordering::Relaxed)
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        // The listener looks up at the next connection, which may be refused because it is gone already.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn enter(namespace: &str) -> Result<()> {
    let file = File::open(Path::new("/run/netns").join(namespace))?;
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), kind).context("enter the namespace")
}

// === impl Shared ===

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.stopped.load(Ordering::Relaxed) {
                return;
            }
            let (Ok(stream), shared) = (stream, self.clone()) else { continue };
            // A client that leaves is what most faults come to.
            thread::spawn(move || shared.serve(stream).ok());
        }
    }

    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        if self.fault() == Fault::Deaf {
            self.hits.fetch_add(1, Ordering::Relaxed);
            thread::sleep(HELD);
            return Ok(());
        }
        stream.set_read_timeout(Some(IDLE))?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = Request::read(&mut reader)? {
            // Whoever kept a connection finds it closed, as when the process has ended.
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            let Some((content, path)) = self.find(&request.path) else {
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
                continue;
            };
            let fault = self.fault();
            let spared = fault == Fault::WrongBytes && content.digest != self.first_layer;
            if !spared && fault.meets(&request, content) {
                self.hits.fetch_add(1, Ordering::Relaxed);
                return fault.answer(&mut stream, &request, content, path);
            }
            let body = Part::of(&request, content.size);
            stream.write_all(body.head(content, body.length()).as_bytes())?;
            if request.method == "GET" {
                body.copy(path, body.length(), &mut stream)?;
            }
        }
        Ok(())
    }

    fn fault(&self) -> Fault {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn find(&self, path: &str) -> Option<&(Descriptor, PathBuf)> {
        let path = path.split('?').next()?.strip_prefix("/v2/")?;
        let name = path.rsplit('/').next()?;
        self.contents.get(self.tags.get(path).map_or(name, String::as_str))
    }
}

// === impl Request ===

impl Request {
    fn read(reader: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut request = Self { method: method.to_owned(), path: path.to_owned(), first: None, last: None };
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
                return Ok(Some(request));
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("range")
                && let Some((first, last)) = value.trim().strip_prefix("bytes=").and_then(|range| range.split_once('-'))
            {
                (request.first, request.last) = (first.parse().ok(), last.parse().ok());
            }
        }
    }
}

/// The bytes that an answer carries.
struct Part {
    start: u64,
    end: u64,
    size: u64,
    whole: bool,
}

// === impl Part ===

impl Part {
    fn of(request: &Request, size: u64) -> Self {
        let start = request.first.unwrap_or(0).min(size);
        let end = request.last.map_or(size, |last| (last + 1).min(size));
        Self { start, end, size, whole: request.first.is_none() }
    }

    fn length(&self) -> u64 {
        self.end - self.start
    }

    fn head(&self, content: &Descriptor, length: u64) -> String {
        let status = if self.whole { "200 OK" } else { "206 Partial Content" };
        let range = match self.whole {
            true => String::new(),
            false => format!("Content-Range: bytes {}-{}/{}\r\n", self.start, self.end - 1, self.size),
        };
        format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nContent-Type: {}\r\nDocker-Content-Digest: {}\r\n{range}\r\n",
            content.media_type, content.digest
        )
    }

    /// Writes the first `length` bytes of it.
    fn copy(&self, path: &Path, length: u64, to: &mut impl Write) -> io::Result<()> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(self.start))?;
        io::copy(&mut file.take(length), to).map(|_| ())
    }
}

// === impl Fault ===

impl Fault {
    /// What concerns bodies is done to layers only: what is smaller is read whole, and is another row's matter.
    fn meets(&self, request: &Request, content: &Descriptor) -> bool {
        let is_layer = content.media_type.contains(".layer.") && request.method == "GET";
        match self {
            Self::None => false,
            Self::Stops(..) | Self::Slow(_) | Self::TooLong | Self::WrongBytes | Self::WrongLength(_) => is_layer,
            Self::OtherRange => request.method == "GET",
            Self::GetNotFound => request.method == "GET",
            _ => true,
        }
    }

    /// Answers, and ends the connection with it.
    fn answer(self, stream: &mut TcpStream, request: &Request, content: &Descriptor, path: &Path) -> io::Result<()> {
        let part = Part::of(request, content.size);
        let (length, bodiless) = (part.length(), "Content-Length: 0\r\nConnection: close\r\n\r\n");
        let status = |code: u16| format!("HTTP/1.1 {code} Fault\r\n{bodiless}");
        match self {
            Self::None | Self::Deaf => Ok(()),
            Self::Silent => hold(stream),
            // A fatal alert, "unexpected message".
            Self::Tls => stream.write_all(&[0x15, 3, 1, 0, 2, 2, 10]),
            Self::Stranger => {
                let page = "<html><body>It works!</body></html>";
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\n\r\n", page.len());
                stream.write_all((head + page).as_bytes())
            }
            Self::Trickle => trickle(stream, part.head(content, length).as_bytes(), 1),
            Self::LongHead => {
                let line = format!("X-Filler: {}\r\n", "x".repeat(1000));
                stream.write_all(format!("HTTP/1.1 200 OK\r\n{}{bodiless}", line.repeat(65)).as_bytes())
            }
            Self::Malformed => stream.write_all(b"HTTP/1.1 two hundred\r\n: \r\n\0\0\r\n\r\n"),
            Self::NoLength => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
                part.copy(path, length, stream)
            }
            Self::WrongLength(more) => {
                let claimed = length.saturating_add_signed(more);
                stream.write_all(part.head(content, claimed).as_bytes())?;
                part.copy(path, length.min(claimed), stream)
            }
            Self::OtherRange => {
                let other = Part { start: 1, end: content.size, size: content.size, whole: false };
                stream.write_all(other.head(content, other.length()).as_bytes())?;
                other.copy(path, other.length(), stream)
            }
            Self::Status(code) => stream.write_all(status(code).as_bytes()),
            Self::Busy(header) => stream.write_all(format!("HTTP/1.1 503 Busy\r\n{header}\r\n{bodiless}").as_bytes()),
            Self::RedirectLoop => {
                let head = format!("HTTP/1.1 307 Fault\r\nLocation: {}\r\n{bodiless}", request.path);
                stream.write_all(head.as_bytes())
            }
            Self::GetNotFound => stream.write_all(status(404).as_bytes()),
            Self::Stops(place, ending) => {
                let sent = match place {
                    Place::Start => 0,
                    Place::First => 1,
                    Place::Half => length / 2,
                    Place::Last => length - 1,
                };
                stream.write_all(part.head(content, length).as_bytes())?;
                part.copy(path, sent, stream)?;
                end(stream, ending)
            }
            Self::Slow(rate) => {
                stream.write_all(part.head(content, length).as_bytes())?;
                let mut bytes = Vec::new();
                part.copy(path, length.min(rate * HELD.as_secs()), &mut bytes)?;
                trickle(stream, &bytes, usize::try_from(rate).unwrap_or(usize::MAX))
            }
            Self::TooLong => {
                stream.write_all(part.head(content, length).as_bytes())?;
                part.copy(path, length, stream)?;
                stream.write_all(&[7; 100_000])
            }
            Self::WrongBytes => {
                stream.write_all(part.head(content, length).as_bytes())?;
                let mut bytes = Vec::new();
                part.copy(path, length, &mut bytes)?;
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                stream.write_all(&bytes)
            }
        }
    }
}

/// Sends nothing until the other side leaves.
fn hold(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(HELD))?;
    stream.read(&mut [0]).map(|_| ())
}

fn trickle(stream: &mut TcpStream, bytes: &[u8], rate: usize) -> io::Result<()> {
    for chunk in bytes.chunks(rate.max(1)) {
        stream.write_all(chunk)?;
        thread::sleep(Duration::from_secs(1));
    }
    Ok(())
}

fn end(stream: &mut TcpStream, ending: Ending) -> io::Result<()> {
    match ending {
        // Closing with SO_LINGER of zero sends a reset. What was written before must have left first.
        Ending::Reset => {
            thread::sleep(Duration::from_millis(200));
            rustix::net::sockopt::set_socket_linger(&*stream, Some(Duration::ZERO))?;
            Ok(())
        }
        Ending::Close => stream.shutdown(Shutdown::Write),
        Ending::Silence => hold(stream),
    }
}
