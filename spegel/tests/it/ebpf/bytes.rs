//! Bytes, to the byte.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::pipe::SpliceFlags;
use socket2::{Domain, Socket, Type};

use super::{figure, report_when, row, settings, watch};

/// The largest body.
const LARGEST: u64 = 256 << 10;
/// Connections of each way to send, to each address.
const CONNECTIONS: usize = 125;

/// How the server's bytes get into the socket.
#[derive(Clone, Copy)]
enum Way {
    Write,
    Sendfile,
    Splice,
    /// Several answers on one connection.
    KeepAlive,
}

const WAYS: [Way; 4] = [Way::Write, Way::Sendfile, Way::Splice, Way::KeepAlive];

/// A listener that takes both families, as the registry's.
fn listen() -> TcpListener {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into()).unwrap();
    socket.listen(1024).unwrap();
    socket.into()
}

/// A connection from an address of our choice.
fn connect(from: IpAddr, port: u16) -> TcpStream {
    let to: IpAddr = if from.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let socket = Socket::new(Domain::for_address((to, port).into()), Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(from, 0).into()).unwrap();
    socket.connect(&SocketAddr::new(to, port).into()).unwrap();
    socket.into()
}

fn send(stream: &mut TcpStream, file: &File, length: u64, way: Way) {
    let mut left = length as usize;
    let mut offset = 0;
    match way {
        Way::Write => stream.write_all(&vec![7; left]).unwrap(),
        Way::KeepAlive => {
            for part in [left / 3, left / 3, left - 2 * (left / 3)] {
                stream.write_all(&vec![7; part]).unwrap();
            }
        }
        Way::Sendfile => {
            while left > 0 {
                left -= rustix::fs::sendfile(&*stream, file, Some(&mut offset), left).unwrap();
            }
        }
        Way::Splice => {
            let (out, into) = rustix::pipe::pipe().unwrap();
            while left > 0 {
                let at = Some(&mut offset);
                let mut there = rustix::pipe::splice(file, at, &into, None, left, SpliceFlags::empty()).unwrap();
                left -= there;
                while there > 0 {
                    there -= rustix::pipe::splice(&out, None, &*stream, None, there, SpliceFlags::empty()).unwrap();
                }
            }
        }
    }
}

/// A thousand connections of random sizes, by write(2), sendfile(2) and splice(2), with IPv4 and IPv6: what the kernel's rows say is what the
/// sender counted, not only within a thousandth but to the byte.
#[test]
fn bytes_by_peer_are_those_that_were_sent() {
    let listener = listen();
    let port = listener.local_addr().unwrap().port();
    let Some(watch) = watch(&settings(port)) else { return };
    let file = tempfile::tempfile().unwrap();
    file.set_len(LARGEST).unwrap();
    let peers: [IpAddr; 2] = ["127.0.7.1".parse().unwrap(), "::1".parse().unwrap()];
    let requests = 100;
    let mut random = StdRng::seed_from_u64(7);
    let jobs: Vec<_> = peers
        .iter()
        .flat_map(|peer| WAYS.map(|way| (*peer, way)))
        .flat_map(|job| std::iter::repeat_n(job, CONNECTIONS))
        .map(|(peer, way)| (peer, way, random.random_range(1..=LARGEST)))
        .collect();
    let expected = jobs.clone();
    let clients = thread::spawn(move || {
        for (peer, _, length) in jobs {
            let mut client = connect(peer, port);
            client.write_all(&[1; 100]).unwrap();
            let mut received = 0;
            let mut buffer = vec![0; 64 << 10];
            loop {
                match client.read(&mut buffer).unwrap() {
                    0 => break,
                    n => received += n as u64,
                }
            }
            assert_eq!(received, length);
        }
    });
    for (_, way, length) in &expected {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 100]).unwrap();
        send(&mut stream, &file, *length, *way);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // Until the client's own end, as the registry does.
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    clients.join().unwrap();
    let connections = (WAYS.len() * CONNECTIONS) as u64;
    let report = report_when(&watch, "all connections in the table", |report| {
        peers
            .iter()
            .all(|peer| row(report, *peer, "served").is_some_and(|row| row.opened == connections && row.open == 0))
    });
    for peer in peers {
        let sent: u64 = expected.iter().filter(|(own, ..)| *own == peer).map(|(.., length)| length).sum();
        let row = row(&report, peer, "served").unwrap();
        println!(
            "{peer}: sent {sent}, counted {}; {} requests of {requests} bytes, counted {}",
            row.sent, connections, row.received
        );
        assert_eq!((row.sent, row.received), (sent, connections * requests));
        assert_eq!((row.failed, row.reset), (Some(0), Some(0)));
        assert!(row.round_trip_us.is_some() && row.segments > 0);
    }
    let served = report.roles.iter().find(|role| role.role == "served").unwrap();
    assert_eq!((served.opened, served.unlisted_bytes, report.lost_events), (2 * connections, 0, Some(0)));
}

/// What was acknowledged before a client went away lies between what it read and what was written.
#[test]
fn an_aborted_transfer_is_a_reset_with_what_had_arrived() {
    let listener = listen();
    let port = listener.local_addr().unwrap().port();
    let Some(watch) = watch(&settings(port)) else { return };
    let peer: IpAddr = "127.0.7.2".parse().unwrap();
    let read = AtomicU64::new(0);
    let mut written = 0;
    for _ in 0..50 {
        let mut client = connect(peer, port);
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut some = [0; 4096];
        while let Ok(n) = stream.write(&[7; 16 << 10]) {
            written += n as u64;
        }
        client.read_exact(&mut some).unwrap();
        read.fetch_add(4096, Ordering::Relaxed);
        // With bytes unread this is a reset.
        drop(client);
    }
    let report = report_when(&watch, "the resets", |report| {
        row(report, peer, "served").is_some_and(|row| row.reset == Some(50) && row.open == 0)
    });
    let row = row(&report, peer, "served").unwrap();
    assert!((read.into_inner()..=written).contains(&row.sent), "{} of {written}", row.sent);
    assert_eq!(figure(&watch, "spegel_peer_resets_total{", "127.0.7.2"), 50.0);
}

#[test]
fn a_peer_that_refuses_is_a_failure() {
    // A port that nobody listens on: it was free a moment ago.
    let port = TcpListener::bind("127.0.7.3:0").unwrap().local_addr().unwrap().port();
    let Some(watch) = watch(&settings(port)) else { return };
    for _ in 0..3 {
        TcpStream::connect(("127.0.7.3", port)).unwrap_err();
    }
    let peer: IpAddr = "127.0.7.3".parse().unwrap();
    let report = report_when(&watch, "the failures", |report| row(report, peer, "fetched").is_some());
    let row = row(&report, peer, "fetched").unwrap();
    assert_eq!((row.failed, row.opened, row.open, row.reset), (Some(3), 0, 0, Some(0)));
    assert_eq!(figure(&watch, "spegel_peer_failed_connections_total{", "127.0.7.3"), 3.0);
}
