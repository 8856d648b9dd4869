//! Bodies from files and from memory.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rustix::net::{RecvFlags, recv};
use spegel::zerocopy::Way;

use super::*;

const MIB: usize = 1 << 20;

#[tokio::test]
async fn ranges_are_sent_byte_for_byte_on_one_connection() {
    let bytes = noise(9 * MIB + 1);
    let file = file_of(&bytes);
    let len = bytes.len();
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let mut client = fixture.connect().await;
        for (from, to) in
            [(0, len), (0, 0), (0, 1), (len - 1, len), (len, len), (4095, 4097), (1, 4 * MIB + 1), (7, 65_543)]
        {
            fixture.then(Body::file(file.clone(), from as u64, (to - from) as u64));
            let (head, body) = client.fetch().await;
            assert_eq!(head.status(), 200);
            same(&body, &bytes[from..to]);
        }
    }
}

#[tokio::test]
async fn file_bytes_go_through_sendfile_and_the_copy_is_a_copy() {
    let bytes = noise(3 * MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        fixture.then(Body::file(file_of(&bytes), 0, bytes.len() as u64));
        let (_, body) = fixture.connect().await.fetch().await;
        same(&body, &bytes);
        let (by_kernel, copied) = (fixture.traffic().sent(Way::Sendfile), fixture.traffic().sent(Way::FileCopy));
        match mode.transfer {
            Transfer::Zerocopy => assert_eq!((by_kernel, copied), (bytes.len() as u64, 0)),
            Transfer::Copy => assert_eq!((by_kernel, copied), (0, bytes.len() as u64)),
        }
        // The head alone comes from memory.
        assert!(fixture.traffic().sent(Way::Memory) < 200);
    }
}

#[tokio::test]
async fn offsets_beyond_4_gib_are_met() {
    let at = (4_u64 << 30) + 12_345;
    let bytes = noise(70_000);
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, at).unwrap();
    let file = Arc::new(file);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        fixture.then(Body::file(file.clone(), at, bytes.len() as u64));
        let (_, body) = fixture.connect().await.fetch().await;
        same(&body, &bytes);
        // A length beyond 4 GiB is said in full, and a client may leave after its first bytes.
        fixture.then(Body::file(file.clone(), 10, at));
        let mut client = fixture.connect().await;
        client.get().await;
        assert_eq!(client.head().await.length(), at);
        assert_eq!(client.exactly(MIB).await, vec![0; MIB]);
        drop(client);
        fixture.quiet().await;
    }
}

/// All of it, thrown away in the kernel but for what stands around its marks.
#[tokio::test]
async fn a_body_of_more_than_4_gib_arrives_whole() {
    let (length, marks) = ((4_u64 << 30) + 3 * MIB as u64 + 5, [0, (4 << 30) - 7, (4 << 30) + MIB as u64]);
    let (file, mark): (_, Arc<[u8]>) = (tempfile::tempfile().unwrap(), noise(100).into());
    for at in marks {
        file.write_all_at(&mark, at).unwrap();
    }
    file.set_len(length).unwrap();
    let file = Arc::new(file);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        fixture.then(Body::file(file.clone(), 0, length));
        let mut client = fixture.connect().await;
        client.get().await;
        assert_eq!(client.head().await.length(), length);
        same(&client.exactly(mark.len()).await, &mark);
        let mut at = (mark.len() + client.buf.len()) as u64;
        let Client { stream, .. } = client;
        let stream = stream.into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        let mark = mark.clone();
        let received = tokio::task::spawn_blocking(move || {
            let mut buffer = vec![0; MIB];
            while at < length {
                let next = marks.into_iter().find(|mark| at <= *mark).unwrap_or(length);
                // A mark is read, what lies between is not.
                let (room, flags) =
                    if next == at { (mark.len() as u64, RecvFlags::WAITALL) } else { (next - at, RecvFlags::TRUNC) };
                let room = usize::try_from(room).unwrap().min(MIB);
                let n = recv(&stream, &mut buffer[..room], flags).unwrap().1;
                assert!(n > 0, "closed at {at}");
                if next == at {
                    same(&buffer[..n], &mark);
                }
                at += n as u64;
            }
            at
        });
        assert_eq!(received.await.unwrap(), length);
        fixture.quiet().await;
    }
    // So many pages of zeros are of no use to anybody.
    rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[tokio::test]
async fn head_sends_the_length_and_no_body() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let response = Response::builder().header("content-length", 1234).body(Body::empty()).unwrap();
        fixture.script.lock().unwrap().push_back(response);
        fixture.then(Body::file(file_of(b"never sent"), 0, 10));
        fixture.then(text("after"));
        let mut client = fixture.connect().await;
        client.send(b"HEAD /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert_eq!(client.head().await.length(), 1234);
        client.send(b"HEAD /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert_eq!(client.head().await.length(), 10);
        assert_eq!(client.fetch().await.1, b"after");
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let bytes = noise(300_000);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let mut client = fixture.connect().await;
        for _ in 0..10 {
            fixture.then(text("first"));
            fixture.then(Body::file(file_of(&bytes), 0, 300_000));
            fixture.then(Body::empty());
            fixture.then(Body::file(file_of(&bytes), 5, 3));
        }
        client.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n".repeat(40).as_bytes()).await;
        for _ in 0..10 {
            for want in [&b"first"[..], &bytes, b"", &bytes[5..8]] {
                let len = client.head().await.length();
                assert_eq!(len, want.len() as u64);
                same(&client.exactly(want.len()).await, want);
            }
        }
    }
}

#[tokio::test]
async fn http_1_0_is_answered_and_closed() {
    let bytes = noise(MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        fixture.then(Body::file(file_of(&bytes), 0, MIB as u64));
        let mut client = fixture.connect().await;
        client.send(b"GET / HTTP/1.0\r\n\r\n").await;
        assert_eq!(client.head().await.length(), MIB as u64);
        let (body, ended) = client.rest().await;
        same(&body, &bytes);
        assert_eq!(ended, Ended::Fin);
    }
}

#[tokio::test]
async fn a_client_that_shut_its_side_is_answered() {
    let bytes = noise(5 * MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        fixture.then(Body::file(file_of(&bytes), 0, bytes.len() as u64));
        let mut client = fixture.connect().await;
        client.get().await;
        client.stream.shutdown().await.unwrap();
        client.head().await;
        let (body, ended) = client.rest().await;
        same(&body, &bytes);
        assert_eq!(ended, Ended::Fin);
        fixture.quiet().await;
    }
}

#[tokio::test]
async fn a_narrow_slow_client_gets_every_byte() {
    let bytes = noise(3 * MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        fixture.then(Body::file(file_of(&bytes), 0, bytes.len() as u64));
        fixture.then(Body::bytes(bytes.clone()));
        let mut client = fixture.connect_narrow().await;
        for _ in 0..2 {
            let (_, body) = client.fetch().await;
            same(&body, &bytes);
        }
    }
}

#[tokio::test]
async fn a_client_that_vanishes_costs_nothing_further() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let file = file_of(&noise(20 * MIB));
        for _ in 0..8 {
            fixture.then(Body::file(file.clone(), 0, 20 << 20));
            let mut client = fixture.connect().await;
            client.get().await;
            client.head().await;
            client.exactly(1000).await;
        }
        fixture.quiet().await;
        // The files are closed with the connections.
        assert_eq!(Arc::strong_count(&file), 1);
    }
}

#[tokio::test]
async fn a_file_that_gets_shorter_ends_in_an_orderly_close() {
    let bytes = noise(20 * MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let file = file_of(&bytes);
        fixture.then(Body::file(file.clone(), 0, bytes.len() as u64));
        let mut client = fixture.connect_narrow().await;
        client.get().await;
        assert_eq!(client.head().await.length(), bytes.len() as u64);
        let start = client.exactly(100_000).await;
        file.set_len(19 * MIB as u64).unwrap();
        // Input that nobody reads must not turn the close into a reset.
        client.get().await;
        let (rest, ended) = client.rest().await;
        let got = [start, rest].concat();
        assert_eq!(ended, Ended::Fin);
        assert_eq!(got.len(), 19 * MIB);
        same(&got, &bytes[..got.len()]);
    }
}

#[tokio::test]
async fn a_file_unlinked_under_way_is_served_to_its_end() {
    let bytes = noise(20 * MIB);
    for mode in modes() {
        let fixture = Fixture::new(mode);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        std::fs::write(&path, &bytes).unwrap();
        fixture.then(Body::file(Arc::new(File::open(&path).unwrap()), 0, bytes.len() as u64));
        let mut client = fixture.connect_narrow().await;
        client.get().await;
        client.head().await;
        let start = client.exactly(100_000).await;
        std::fs::remove_file(&path).unwrap();
        let rest = client.exactly(bytes.len() - start.len()).await;
        same(&[start, rest].concat(), &bytes);
    }
}

#[tokio::test]
async fn a_cut_body_is_a_head_and_an_orderly_close() {
    for mode in modes() {
        let fixture = Fixture::new(mode);
        for claimed in [1, 5_000_000_000] {
            fixture.then(Body::cut(claimed));
            let mut client = fixture.connect().await;
            client.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n".repeat(2).as_bytes()).await;
            assert_eq!(client.head().await.length(), claimed);
            assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_clients_at_once_get_their_own_bytes() {
    let bytes = Arc::new(noise(MIB));
    for mode in modes() {
        let file = file_of(&bytes);
        let handler = move |request: Request<Incoming>| {
            let from: u64 = request.uri().path()[1..].parse().unwrap();
            let body = Body::file(file.clone(), from, (256 << 10) + from);
            async move { Response::new(body) }
        };
        let options = Options { runtimes: 2, ..mode.options() };
        let server = Server::bind(&[loopback()], options, Arc::new(handler)).unwrap();
        let addr = server.addrs()[0];
        let clients = (0..64_usize).map(|n| {
            let bytes = bytes.clone();
            tokio::spawn(async move {
                let mut client = Client { stream: TcpStream::connect(addr).await.unwrap(), buf: Vec::new() };
                for round in 0..3 {
                    let from = n * 1000 + round;
                    client.send(format!("GET /{from} HTTP/1.1\r\nhost: h\r\n\r\n").as_bytes()).await;
                    let len = usize::try_from(client.head().await.length()).unwrap();
                    same(&client.exactly(len).await, &bytes[from..from + len]);
                }
            })
        });
        for client in clients.collect::<Vec<_>>() {
            client.await.unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_range_is_exact(from in 0_usize..3_000_000, len in 0_usize..2_000_000, narrow: bool, mode in proptest::sample::select(modes())) {
        static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| noise(5_000_000));
        let bytes = &*BYTES;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let fixture = Fixture::new(mode);
            fixture.then(Body::file(file_of(bytes), from as u64, len as u64));
            let mut client = if narrow { fixture.connect_narrow().await } else { fixture.connect().await };
            let (head, body) = client.fetch().await;
            assert_eq!(head.length(), len as u64);
            same(&body, &bytes[from..from + len]);
        });
    }
}
