//! The limit of what a server can do: sendfile(2) and splice(2) in loops with as little HTTP around them as a client needs, a thread
//! a connection, which stays when the connection ends, so that its time can still be read; and for small answers one thread with
//! epoll(7), recv(2) and send(2).

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Result, ensure};
use rustix::event::epoll;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};

use crate::load::{body_length, read_head};

/// The capacity of a pipe: what one process without privileges may have.
const PIPE: usize = 1 << 20;

/// Answers every GET with the file, by sendfile(2).
///
/// # Errors
/// The address or the file cannot be had.
pub fn serve_file(listen: SocketAddr, path: &Path) -> Result<()> {
    let file = Arc::new(File::open(path)?);
    let length = file.metadata()?.len();
    serve(listen, move |mut client| {
        loop {
            read_head(&mut client)?;
            write!(client, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n")?;
            let mut offset = 0;
            while offset < length {
                let left = usize::try_from(length - offset)?;
                ensure!(rustix::fs::sendfile(&client, &*file, Some(&mut offset), left)? > 0, "the file got shorter");
            }
        }
    })
}

/// Answers every GET with what the upstream answers to the same request, by splice(2) through a pipe.
///
/// # Errors
/// The address cannot be had.
pub fn relay(listen: SocketAddr, upstream: SocketAddr) -> Result<()> {
    serve(listen, move |mut client| {
        let mut peer = TcpStream::connect(upstream)?;
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setpipe_size(&write, PIPE)?;
        loop {
            let request = read_head(&mut client)?;
            peer.write_all(&request)?;
            let length = body_length(&mut peer)?;
            write!(client, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n")?;
            let mut left = length;
            while left > 0 {
                let room = usize::try_from(left).unwrap_or(PIPE).min(PIPE);
                let mut held = splice(&peer, None, &write, None, room, SpliceFlags::MOVE)?;
                ensure!(held > 0, "the peer closed early");
                left -= held as u64;
                while held > 0 {
                    held -= splice(&read, None, &client, None, held, SpliceFlags::MOVE)?;
                }
            }
        }
    })
}

/// Answers every read of a client with a body of `length` bytes and a head such as ours, or with the head alone if it begins as HEAD
/// does: an epoll(7) loop of one recv(2) and one send(2) an answer.
///
/// # Errors
/// The address cannot be had.
pub fn answer(listen: SocketAddr, length: usize) -> Result<()> {
    let mut whole = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/vnd.oci.image.manifest.v1+json\r\ndocker-content-digest: sha256:{}\r\n\
         content-length: {length}\r\nx-spegel-source: local\r\noci-namespace: registry.test\r\n\
         date: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n",
        "0".repeat(64)
    )
    .into_bytes();
    let head = whole.len();
    whole.resize(head + length, b'x');
    let listener = TcpListener::bind(listen)?;
    listener.set_nonblocking(true)?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&poll, &listener, epoll::EventData::new_u64(u64::MAX), epoll::EventFlags::IN)?;
    let mut clients = HashMap::new();
    let (mut buffer, mut events) = (vec![0; 16 << 10], Vec::with_capacity(1024));
    loop {
        events.clear();
        epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let number = event.data.u64();
            let Some(client) = clients.get(&number) else {
                while let Ok((client, _)) = listener.accept() {
                    client.set_nodelay(true)?;
                    let number = u64::try_from(client.as_raw_fd())?;
                    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
                    epoll::add(&poll, &client, epoll::EventData::new_u64(number), flags)?;
                    clients.insert(number, client);
                }
                continue;
            };
            let Ok((_, read @ 1..)) = recv(client, buffer.as_mut_slice(), RecvFlags::DONTWAIT) else {
                clients.remove(&number);
                continue;
            };
            let answer = if buffer[..read].starts_with(b"HEAD") { &whole[..head] } else { &whole[..] };
            send(client, answer, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        }
    }
}

fn serve(listen: SocketAddr, answer: impl Fn(TcpStream) -> Result<()> + Send + Sync + 'static) -> Result<()> {
    let listener = TcpListener::bind(listen)?;
    let answer = Arc::new(answer);
    for client in listener.incoming() {
        let (client, answer) = (client?, answer.clone());
        client.set_nodelay(true)?;
        thread::Builder::new().spawn(move || {
            // Ends with the client's connection, as an error.
            let _ = answer(client);
            loop {
                thread::park();
            }
        })?;
    }
    Ok(())
}
