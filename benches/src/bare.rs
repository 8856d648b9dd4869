//! The limit of what a server can do: sendfile(2) and splice(2) in loops with as little HTTP around them as a client needs. A thread
//! a connection, which stays when the connection ends, so that its time can still be read.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Result, ensure};
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
