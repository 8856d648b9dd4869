//! What a client may cost, and what hyper may do.

use std::sync::atomic::Ordering;
use std::time::Instant;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use spegel::serve::{Limits, RemoteAddr};
use spegel::zerocopy::{BodyError, Io, Ops, Settings, Way};

use super::*;

fn limited(limits: Limits) -> Fixture {
    Fixture::with(Options { limits, runtimes: 1, ..Options::default() })
}

#[tokio::test]
async fn a_64_kib_header_is_answered_431() {
    let fixture = Fixture::new(Mode::default());
    let mut client = fixture.connect().await;
    client.send(format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(64 << 10)).as_bytes()).await;
    assert_eq!(client.head().await.status(), 431);
    assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
    drop(client);
    fixture.quiet().await;
}

#[tokio::test]
async fn half_open_connections_are_closed_after_the_head_timeout() {
    let fixture = limited(Limits { header_read: Duration::from_millis(300), ..Limits::default() });
    let mut clients = Vec::new();
    for n in 0..1000 {
        let mut client = fixture.connect().await;
        if n % 2 == 0 {
            client.send(b"GET / HTTP/1.1\r\nhost: ").await;
        }
        clients.push(client);
    }
    for mut client in clients {
        assert_eq!(client.rest().await, (Vec::new(), Ended::Fin), "closed in order, and never answered 408");
    }
    fixture.quiet().await;
    // Others are served as ever.
    fixture.then(text("fine"));
    assert_eq!(fixture.connect().await.fetch().await.1, b"fine");
}

#[tokio::test]
async fn an_idle_connection_is_kept_for_the_idle_timeout_only() {
    let limits =
        Limits { idle: Duration::from_millis(200), header_read: Duration::from_millis(50), ..Limits::default() };
    let fixture = limited(limits);
    fixture.then(text("one"));
    let mut client = fixture.connect().await;
    client.fetch().await;
    let begin = Instant::now();
    assert_eq!(client.rest().await, (Vec::new(), Ended::Fin));
    assert!(begin.elapsed() >= Duration::from_millis(190), "the head's time is another matter");
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_dropped() {
    let limits =
        Limits { write_stall: Duration::from_millis(200), linger: Duration::from_millis(50), ..Limits::default() };
    let fixture = limited(limits);
    let file = file_of(&noise(16 << 20));
    fixture.then(Body::file(file.clone(), 0, 16 << 20));
    let mut client = fixture.connect_narrow().await;
    client.get().await;
    client.head().await;
    fixture.quiet().await;
    assert_eq!(Arc::strong_count(&file), 1);
    // What was sent before is still there for it, then an orderly end.
    assert_eq!(client.rest().await.1, Ended::Fin);
}

#[tokio::test]
async fn one_connection_too_many_is_refused() {
    let fixture = limited(Limits { connections: 2, ..Limits::default() });
    fixture.then(text("one"));
    fixture.then(text("two"));
    let (mut one, mut two) = (fixture.connect().await, fixture.connect().await);
    assert_eq!(one.fetch().await.1, b"one");
    assert_eq!(two.fetch().await.1, b"two");
    let mut three = fixture.connect().await;
    three.get().await;
    assert_eq!(three.head().await.status(), 503);
    assert_eq!(three.rest().await, (Vec::new(), Ended::Fin));
    assert_eq!(fixture.server.metrics().refused(), 1);
    drop(one);
    until("a place is free", || fixture.server.metrics().open() == 1).await;
    fixture.then(text("four"));
    assert_eq!(fixture.connect().await.fetch().await.1, b"four");
}

#[tokio::test]
async fn a_panic_costs_its_own_request_only() {
    let handler = |request: Request<Incoming>| async move {
        assert_ne!(request.uri().path(), "/panic", "told to");
        let remote = request.extensions().get::<RemoteAddr>().copied().unwrap();
        Response::new(Body::bytes(remote.0.to_string()))
    };
    let server = Server::bind(&[loopback()], Options::default(), Arc::new(handler)).unwrap();
    let connect = || async { Client { stream: TcpStream::connect(server.addrs()[0]).await.unwrap(), buf: Vec::new() } };
    let (mut bad, mut good) = (connect().await, connect().await);
    bad.send(b"GET /panic HTTP/1.1\r\nhost: h\r\n\r\n").await;
    assert_eq!(bad.head().await.status(), 500);
    assert_eq!(bad.rest().await, (Vec::new(), Ended::Fin));
    let (_, body) = good.fetch().await;
    assert_eq!(String::from_utf8(body).unwrap(), good.stream.local_addr().unwrap().to_string());
}

/// hyper told to copy bodies must end in an error: the region's zeros are not what was promised.
#[tokio::test]
async fn copied_bodies_are_noticed_before_a_byte_leaves() {
    for (writev, pipeline) in [(false, false), (true, true)] {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let served = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let ops = Ops::new(&Arc::new(Settings::default())).unwrap();
            let file = file_of(&noise(100_000));
            let bodies = ops.clone();
            let service = service_fn(move |_: Request<Incoming>| {
                let body = Body::file(file.clone(), 0, 100_000).bind(&bodies);
                async move { Ok::<_, std::convert::Infallible>(Response::new(body)) }
            });
            let mut http = http1::Builder::new();
            http.writev(writev).pipeline_flush(pipeline);
            http.serve_connection(TokioIo::new(Io::new(stream, ops)), service).await
        });
        let mut client = Client { stream: TcpStream::connect(addr).await.unwrap(), buf: Vec::new() };
        client.get().await;
        let (got, _) = client.rest().await;
        assert!(!got.contains(&0), "zeros of the region were sent");
        let error = served.await.unwrap().unwrap_err();
        assert!(matches!(BodyError::find(&error), Some(BodyError::OutOfStep)), "{error:?}");
    }
}

/// Alone a connection may send all of a round, beside others its part, and never less than its budget.
#[tokio::test]
async fn a_turn_sends_its_part_of_a_round_at_most() {
    const KIB: usize = 1 << 10;
    for (budget, round, busy, most) in
        [(64, 0, 0, 64), (16, 128, 0, 128), (16, 128, 1, 64), (16, 128, 3, 32), (16, 128, 100, 16)]
    {
        check_turns(Settings { budget: budget * KIB, round: round * KIB, ..Settings::default() }, busy, most * KIB)
            .await;
    }
}

/// With so many other busy connections a turn sends `most` bytes at most.
async fn check_turns(settings: Settings, others: usize, most: usize) {
    let bytes = noise(1 << 20);
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mut client =
        Client { stream: TcpStream::connect(listener.local_addr().unwrap()).await.unwrap(), buf: Vec::new() };
    settings.busy.fetch_add(others, Ordering::Relaxed);
    let settings = Arc::new(settings);
    let ops = Ops::new(&settings).unwrap();
    let (file, bodies) = (file_of(&bytes), ops.clone());
    let service = service_fn(move |_: Request<Incoming>| {
        let body = Body::file(file.clone(), 0, 1 << 20).bind(&bodies);
        async move { Ok::<_, std::convert::Infallible>(Response::new(body)) }
    });
    let io = TokioIo::new(Io::new(listener.accept().await.unwrap().0, ops.clone()));
    let mut connection = std::pin::pin!(http1::Builder::new().serve_connection(io, service));
    let (mut sent, mut turns) = (0, 0);
    let served = std::future::poll_fn(|cx| {
        ops.begin_turn();
        let polled = connection.as_mut().poll(cx);
        let now = settings.traffic.sent(Way::Sendfile);
        assert!(now - sent <= most as u64, "one turn sent {} bytes, and may send {most}", now - sent);
        turns += usize::from(now > sent);
        sent = now;
        polled
    });
    let read = async {
        let (_, body) = client.fetch().await;
        same(&body, &bytes);
        drop(client);
    };
    let (served, ()) = tokio::join!(served, read);
    served.unwrap();
    assert!(turns >= (1 << 20) / most);
    assert_eq!(settings.busy.load(Ordering::Relaxed), others);
}

#[tokio::test]
async fn figures_appear_under_their_names() {
    let mut registry = spegel::metrics::Figures::default();
    let metrics = spegel::serve::ServeMetrics::register(&mut registry);
    let fixture = Fixture::with(Options { metrics, ..Options::default() });
    fixture.then(Body::file(file_of(b"four"), 0, 4));
    let mut client = fixture.connect().await;
    client.fetch().await;
    let figures = || spegel::metrics::encode(&registry, spegel::metrics::Format::OpenMetrics).unwrap();
    // The bytes are counted when the server has heard that they are sent, which the client may see sooner.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !figures().contains("way=\"sendfile\"} 4") && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let shown = figures();
    for line in [
        "spegel_serve_connections 1",
        "spegel_serve_connections_limit 4096",
        "spegel_serve_connections_refused_total 0",
        "spegel_serve_bytes_total{kind=\"file\",way=\"sendfile\"} 4",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "no {line} in\n{shown}");
    }
}
