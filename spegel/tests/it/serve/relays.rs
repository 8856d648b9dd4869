//! Bodies from a peer's socket.

use rustix::net::{RecvFlags, recv};
use spegel::zerocopy::{Relay, RelayEnd, Way};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::*;

const MIB: usize = 1 << 20;

/// Two ends of a connection: ours to the peer, and the peer's.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (ours, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (ours.unwrap(), accepted.unwrap().0)
}

fn relay(ours: TcpStream, prefetched: &[u8], len: usize) -> (Relay, oneshot::Receiver<RelayEnd>) {
    let (sender, receiver) = oneshot::channel();
    let on_end = Box::new(move |end| {
        let _ = sender.send(end);
    });
    (Relay::new(ours, Bytes::copy_from_slice(prefetched), len as u64, on_end), receiver)
}

async fn end(receiver: oneshot::Receiver<RelayEnd>) -> RelayEnd {
    tokio::time::timeout(PATIENCE, receiver).await.expect("the relay does not end").unwrap()
}

fn send_in_background(mut peer: TcpStream, bytes: Vec<u8>) -> tokio::task::JoinHandle<TcpStream> {
    tokio::spawn(async move {
        // Fails where the test lets the client leave.
        let _ = peer.write_all(&bytes).await;
        peer
    })
}

#[tokio::test]
async fn a_peers_bytes_arrive_and_its_connection_comes_back() {
    let bytes = noise(9 * MIB + 3);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let mut client = fixture.connect().await;
        let (mut ours, mut peer) = pair().await;
        // The same two connections, again and again.
        for prefetched in [0, 1, 70_000, bytes.len()] {
            let (body, ended) = relay(ours, &bytes[..prefetched], bytes.len());
            fixture.then(Body::relay(body));
            let sending = send_in_background(peer, bytes[prefetched..].to_vec());
            same(&client.fetch().await.1, &bytes);
            peer = sending.await.unwrap();
            let RelayEnd::Complete(back) = end(ended).await else { panic!("not complete") };
            ours = back;
        }
        let (spliced, copied) = (fixture.traffic().sent(Way::Splice), fixture.traffic().sent(Way::RelayCopy));
        assert_eq!(spliced + copied, 4 * bytes.len() as u64);
        match mode.transfer {
            Transfer::Zerocopy => assert_eq!(copied, (bytes.len() + 70_001) as u64, "the prefetched bytes only"),
            Transfer::Copy => assert_eq!(spliced, 0),
        }
    }
}

/// More than 32 bits can count, thrown away in the kernel: every byte is accounted for, and the next answer is where it should be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_of_more_than_4_gib_arrives_whole() {
    const LENGTH: u64 = (4 << 30) + 12_345;
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, peer) = pair().await;
        let (sender, ended) = oneshot::channel();
        let on_end = Box::new(move |end| drop(sender.send(end)));
        fixture.then(Body::relay(Relay::new(ours, Bytes::new(), LENGTH, on_end)));
        fixture.then(text("next"));
        let peer = blocking(peer);
        let sending = tokio::task::spawn_blocking(move || {
            let (chunk, mut left) = (vec![7; MIB], LENGTH);
            while left > 0 {
                let n = usize::try_from(left).unwrap().min(MIB);
                std::io::Write::write_all(&mut &peer, &chunk[..n]).unwrap();
                left -= n as u64;
            }
            peer
        });
        let mut client = fixture.connect().await;
        client.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n".repeat(2).as_bytes()).await;
        assert_eq!(client.head().await.length(), LENGTH);
        let mut left = LENGTH - client.buf.len() as u64;
        let stream = blocking(client.stream);
        let stream = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; MIB];
            while left > 0 {
                let room = usize::try_from(left).unwrap().min(MIB);
                let n = recv(&stream, &mut buffer[..room], RecvFlags::TRUNC).unwrap().1;
                assert!(n > 0, "closed with {left} missing");
                left -= n as u64;
            }
            stream.set_nonblocking(true).unwrap();
            stream
        });
        let mut client = Client { stream: TcpStream::from_std(stream.await.unwrap()).unwrap(), buf: Vec::new() };
        assert_eq!(client.head().await.length(), 4);
        assert_eq!(client.exactly(4).await, b"next");
        assert!(matches!(end(ended).await, RelayEnd::Complete(_)));
        drop(sending.await.unwrap());
    }
}

/// Its peer is read now and then although there is still something to send, which must not lose what the peer has sent meanwhile.
#[tokio::test]
async fn a_client_that_is_slow_for_seconds_and_then_fast_gets_everything() {
    let bytes = noise(12 * MIB);
    let slow = modes().into_iter().filter(|mode| mode.transfer == Transfer::Zerocopy).map(async |mode| {
        let fixture = Fixture::new(mode);
        let mut client = fixture.connect_narrow().await;
        let (ours, peer) = pair().await;
        let (body, ended) = relay(ours, b"", bytes.len());
        fixture.then(Body::relay(body.stall_timeout(Duration::from_secs(1))));
        let sending = send_in_background(peer, bytes.clone());
        client.send(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert_eq!(client.head().await.length(), bytes.len() as u64);
        let mut taken = Vec::new();
        for _ in 0..60 {
            tokio::time::sleep(Duration::from_millis(75)).await;
            taken.extend(client.exactly(20_000).await);
        }
        taken.extend(client.exactly(bytes.len() - taken.len()).await);
        same(&taken, &bytes);
        assert!(matches!(end(ended).await, RelayEnd::Complete(_)));
        drop(sending.await.unwrap());
    });
    futures::future::join_all(slow).await;
}

fn blocking(stream: TcpStream) -> std::net::TcpStream {
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

#[tokio::test]
async fn nothing_beyond_the_length_is_taken_from_the_peer() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, mut peer) = pair().await;
        peer.write_all(b"bodynext response").await.unwrap();
        let (body, ended) = relay(ours, b"", 4);
        fixture.then(Body::relay(body));
        assert_eq!(fixture.connect().await.fetch().await.1, b"body");
        let RelayEnd::Complete(mut back) = end(ended).await else { panic!("not complete") };
        let mut rest = [0; 13];
        back.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"next response");
    }
}

#[tokio::test]
async fn relays_without_a_pipe_copy() {
    let bytes = noise(3 * MIB);
    let fixture = Fixture::with(Options { pipes: 0, ..Options::default() });
    let (ours, peer) = pair().await;
    let (body, ended) = relay(ours, b"", bytes.len());
    fixture.then(Body::relay(body));
    let _peer = send_in_background(peer, bytes.clone());
    same(&fixture.connect().await.fetch().await.1, &bytes);
    assert!(matches!(end(ended).await, RelayEnd::Complete(_)));
    assert_eq!(fixture.traffic().sent(Way::RelayCopy), bytes.len() as u64);
}

#[tokio::test]
async fn a_narrow_slow_client_gets_every_relayed_byte() {
    let bytes = noise(8 * MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, peer) = pair().await;
        let (body, ended) = relay(ours, &bytes[..1000], bytes.len());
        fixture.then(Body::relay(body));
        let _peer = send_in_background(peer, bytes[1000..].to_vec());
        same(&fixture.connect_narrow().await.fetch().await.1, &bytes);
        assert!(matches!(end(ended).await, RelayEnd::Complete(_)));
    }
}

#[tokio::test]
async fn a_trickling_peer_is_passed_on_as_it_comes() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, mut peer) = pair().await;
        let (body, ended) = relay(ours, b"", 50);
        fixture.then(Body::relay(body));
        let mut client = fixture.connect().await;
        client.get().await;
        // The head does not wait for the body.
        assert_eq!(client.head().await.length(), 50);
        for n in 0..50_u8 {
            peer.write_all(&[n]).await.unwrap();
            assert_eq!(client.exactly(1).await, [n]);
        }
        assert!(matches!(end(ended).await, RelayEnd::Complete(_)));
    }
}

#[tokio::test]
async fn a_peer_that_closes_early_ends_the_body_in_order() {
    let bytes = noise(MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, peer) = pair().await;
        let (body, ended) = relay(ours, b"", 2 * MIB);
        fixture.then(Body::relay(body));
        let mut client = fixture.connect().await;
        client.get().await;
        assert_eq!(client.head().await.length(), 2 * MIB as u64);
        drop(send_in_background(peer, bytes.clone()).await.unwrap());
        let (body, how) = client.rest().await;
        same(&body, &bytes);
        assert_eq!(how, Ended::Fin);
        match end(ended).await {
            RelayEnd::Broken { sent, error } => {
                assert_eq!(sent, MIB as u64);
                assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_peer_that_resets_does_not_reset_the_client() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, mut peer) = pair().await;
        let (body, ended) = relay(ours, b"", 100);
        fixture.then(Body::relay(body));
        let mut client = fixture.connect().await;
        client.get().await;
        client.head().await;
        peer.write_all(b"some").await.unwrap();
        assert_eq!(client.exactly(4).await, b"some");
        socket2::SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
        match end(ended).await {
            RelayEnd::Broken { sent: 4, error } => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_peer_that_sends_more_than_it_said_is_not_passed_on() {
    let fixture = Fixture::new(Mode::default());
    for (prefetched, len) in [(&b"too much"[..], 3), (b"any", 0)] {
        let (ours, _peer) = pair().await;
        let (body, ended) = relay(ours, prefetched, len);
        fixture.then(Body::relay(body));
        let mut client = fixture.connect().await;
        client.get().await;
        assert_eq!(client.head().await.length(), len as u64);
        assert!(matches!(end(ended).await, RelayEnd::Broken { sent: 0, .. }));
        client.stream.shutdown().await.unwrap();
        assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
    }
}

#[tokio::test]
async fn a_peer_that_stalls_is_given_up() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, mut peer) = pair().await;
        let (body, ended) = relay(ours, b"pre", 100);
        fixture.then(Body::relay(body.stall_timeout(Duration::from_millis(200))));
        let mut client = fixture.connect().await;
        client.get().await;
        client.head().await;
        peer.write_all(b"fetched").await.unwrap();
        assert_eq!(client.rest().await, (b"prefetched".to_vec(), Ended::Fin));
        match end(ended).await {
            RelayEnd::Broken { sent: 10, error } => assert_eq!(error.kind(), std::io::ErrorKind::TimedOut),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_not_the_peers_fault() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, peer) = pair().await;
        let (body, ended) = relay(ours, b"", 64 * MIB);
        fixture.then(Body::relay(body));
        let _peer = send_in_background(peer, vec![1; 64 * MIB]);
        let mut client = fixture.connect().await;
        client.get().await;
        client.head().await;
        client.exactly(1000).await;
        drop(client);
        assert!(matches!(end(ended).await, RelayEnd::Dropped { sent: 1000.. }));
        fixture.quiet().await;
    }
}

#[tokio::test]
async fn a_body_that_is_not_wanted_gives_the_peer_up() {
    let fixture = Fixture::new(Mode::default());
    let (ours, _peer) = pair().await;
    let (body, ended) = relay(ours, b"", 10);
    fixture.then(Body::relay(body));
    let mut client = fixture.connect().await;
    client.send(b"HEAD / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    assert_eq!(client.head().await.length(), 10);
    assert!(matches!(end(ended).await, RelayEnd::Dropped { sent: 0 }));
}

#[tokio::test]
async fn another_peer_goes_on_where_the_first_failed() {
    let bytes = noise(5 * MIB);
    let first = 2 * MIB + 77;
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let (ours, peer) = pair().await;
        let (next, next_peer) = pair().await;
        let (body, ended) = relay(ours, &bytes[..10], bytes.len());
        let mut next = Some((next, Bytes::copy_from_slice(&bytes[first..first + 5])));
        let body = body.resume(Box::new(move |at, cause| {
            assert_eq!((at, cause.kind()), (first as u64, std::io::ErrorKind::UnexpectedEof));
            let next = next.take();
            Box::pin(async move { next })
        }));
        fixture.then(Body::relay(body));
        let sending = send_in_background(peer, bytes[10..first].to_vec());
        let _next = send_in_background(next_peer, bytes[first + 5..].to_vec());
        let mut client = fixture.connect().await;
        client.get().await;
        client.head().await;
        drop(sending.await.unwrap());
        same(&client.exactly(bytes.len()).await, &bytes);
        assert!(matches!(end(ended).await, RelayEnd::Complete(_)));
    }
}

#[tokio::test]
async fn a_resume_that_never_answers_is_bounded() {
    let fixture = Fixture::new(Mode::default());
    let (ours, peer) = pair().await;
    let (body, ended) = relay(ours, b"", 10);
    let body = body.stall_timeout(Duration::from_millis(200)).resume(Box::new(|_, _| Box::pin(std::future::pending())));
    fixture.then(Body::relay(body));
    drop(peer);
    let mut client = fixture.connect().await;
    client.get().await;
    client.head().await;
    assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
    assert!(matches!(end(ended).await, RelayEnd::Broken { sent: 0, .. }));
}

#[tokio::test]
async fn successors_that_bring_no_byte_are_not_asked_for_ever() {
    let fixture = Fixture::new(Mode::default());
    let (ours, peer) = pair().await;
    drop(peer);
    let asked = Arc::new(Mutex::new(0));
    let (body, ended) = relay(ours, b"", 10);
    let count = asked.clone();
    let body = body.resume(Box::new(move |_, _| {
        *count.lock().unwrap() += 1;
        Box::pin(async {
            let (ours, peer) = pair().await;
            drop(peer);
            Some((ours, Bytes::new()))
        })
    }));
    fixture.then(Body::relay(body));
    let mut client = fixture.connect().await;
    client.get().await;
    client.head().await;
    assert_eq!(client.rest().await.1, Ended::Fin);
    assert!(matches!(end(ended).await, RelayEnd::Broken { sent: 0, .. }));
    assert_eq!(*asked.lock().unwrap(), 1);
}
