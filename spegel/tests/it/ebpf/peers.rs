//! Many peers: more than there are rows.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use socket2::{Domain, Socket, Type};

use super::{report_when, row, settings, watch};

const PEERS: u32 = 5_000;
const CONNECTIONS: u32 = 100_000;
/// A few peers are larger than the others.
const LARGE: u32 = 10;

fn peer(number: u32) -> IpAddr {
    IpAddr::from((0x7f08_0000 + 1 + number).to_be_bytes())
}

/// What a connection of a peer asks for.
fn size(number: u32) -> usize {
    if number < LARGE { 4000 + 100 * number as usize } else { 100 }
}

#[test]
fn a_hundred_thousand_connections_of_five_thousand_peers_are_all_counted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let Some(watch) = watch(&settings(port)) else { return };
    let start = Instant::now();
    let server = thread::spawn(move || {
        let body = vec![7; 8 << 10];
        for stream in listener.incoming().take(CONNECTIONS as usize) {
            let mut stream = stream.unwrap();
            let mut number = [0; 4];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&body[..size(u32::from_be_bytes(number))]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = stream.read(&mut [0; 1]);
        }
    });
    let mut buffer = vec![0; 8 << 10];
    for connection in 0..CONNECTIONS {
        let number = connection % PEERS;
        let mut client = from(peer(number), port);
        client.write_all(&number.to_be_bytes()).unwrap();
        let mut received = 0;
        while let n @ 1.. = client.read(&mut buffer).unwrap() {
            received += n;
        }
        assert_eq!(received, size(number));
    }
    server.join().unwrap();
    println!("{CONNECTIONS} connections in {:.1} s", start.elapsed().as_secs_f64());
    let each = u64::from(CONNECTIONS / PEERS);
    let all: u64 = (0..PEERS).map(|number| size(number) as u64 * each).sum();
    let report = report_when(&watch, "all of them in the table", |report| {
        report
            .roles
            .iter()
            .any(|role| role.role == "served" && role.opened == u64::from(CONNECTIONS) && role.sent == all)
    });
    // The largest are right, and first; all others are counted, with or without a row.
    // The other ends of the connections, which are here too, are a row of another role.
    let served_rows = report.peers.iter().filter(|row| row.role == "served");
    let tops: HashMap<IpAddr, u64> = served_rows.take(LARGE as usize).map(|row| (row.address, row.sent)).collect();
    for number in 0..LARGE {
        assert_eq!(tops.get(&peer(number)), Some(&(size(number) as u64 * each)), "peer {number}");
    }
    let served = report.roles.iter().find(|role| role.role == "served").unwrap();
    println!("without a row: {} bytes; lost events: {:?}", served.unlisted_bytes, report.lost_events);
    assert_eq!(report.lost_events, Some(0));
    assert!(row(&report, peer(0), "served").is_some_and(|row| row.opened == each && row.open == 0));
    assert!(report.peers.len() <= 1024);
}

fn from(address: IpAddr, port: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    // Ports are chosen at connect(2), when the whole of the connection's name is known.
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::new(address, 0).into()).unwrap();
    socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
    socket.into()
}
