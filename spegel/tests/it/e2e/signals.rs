//! What the process does when it is told to end.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use spegel_benches::image::{Compression, ImageBuilder, host_platform};
use spegel_benches::spegel::{Ports, Settings, Source};

use super::cluster::PROGRAM;

/// Larger than what sockets hold, so that a client that takes nothing keeps its response under way.
const LAYER: u64 = 64 << 20;

#[test]
fn the_first_signal_lets_responses_finish_and_the_second_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let image =
        ImageBuilder::new("registry.test/end:1").layers(1, LAYER, Compression::None, 1).build(folder.path()).unwrap();
    let layout = folder.path().join("layout");
    image.write_layout(&layout).unwrap();
    let settings = Settings {
        program: PROGRAM.into(),
        node: None,
        address: Ipv4Addr::LOCALHOST.into(),
        ports: Ports::free().unwrap(),
        source: Source::Layout(layout),
        peers: Vec::new(),
        arguments: vec!["--drain-timeout".into(), "10m".into()],
        log: folder.path().join("log"),
    };
    let mut spegel = settings.start().unwrap();
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), spegel.settings().ports.registry);
    let layer = image.layers_for(host_platform()).next().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    write!(client, "GET /v2/end/blobs/{}?ns=registry.test HTTP/1.1\r\nhost: h\r\n\r\n", layer.digest).unwrap();
    client.read_exact(&mut [0; 1000]).unwrap();

    spegel.daemon.signal(Signal::TERM).unwrap();
    // New requests are sent elsewhere, and the response under way goes on for as long as the drain may last.
    let refused = || {
        let mut other = TcpStream::connect(address).ok()?;
        write!(
            other,
            "GET /v2/end/blobs/{}?ns=registry.test HTTP/1.1\r\nhost: h\r\nx-spegel-node: other\r\n\r\n",
            layer.digest
        )
        .ok()?;
        let mut status = [0; 12];
        other.read_exact(&mut status).ok()?;
        Some(&status == b"HTTP/1.1 503")
    };
    spegel.daemon.wait_until(Duration::from_secs(10), "a refusal", || refused() == Some(true)).unwrap();
    client.read_exact(&mut vec![0; 8 << 20]).unwrap();

    let start = Instant::now();
    spegel.daemon.signal(Signal::TERM).unwrap();
    let status = spegel.daemon.wait_exit(Duration::from_secs(10)).unwrap();
    println!("gone {:.1?} after the second signal: {status}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(spegel.daemon.log().contains("a second signal: stopping at once"), "{}", spegel.daemon.log());
}
