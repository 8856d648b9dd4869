//! The end of a server.

use super::*;
use spegel::serve::{Limits, ServeError};

#[tokio::test]
async fn a_second_server_on_the_port_is_refused_by_name() {
    let fixture = Fixture::new(Mode::default());
    let again = Server::bind(
        &[ListenAddr::One(fixture.addr())],
        Options::default(),
        Arc::new(|_: Request<Incoming>| async { Response::new(Body::empty()) }),
    );
    let error = again.unwrap_err();
    assert!(matches!(error, ServeError::InUse { .. }));
    assert!(error.to_string().contains(&fixture.addr().to_string()));
}

#[tokio::test]
async fn responses_under_way_are_finished_and_idle_connections_closed() {
    let bytes = noise(20 << 20);
    let fixture = Fixture::new(Mode::default());
    fixture.then(text("idle soon"));
    let mut idle = fixture.connect().await;
    idle.fetch().await;
    fixture.then(Body::file(file_of(&bytes), 0, bytes.len() as u64));
    let mut busy = fixture.connect_narrow().await;
    busy.get().await;
    busy.head().await;
    let addr = fixture.addr();
    let ended = tokio::spawn(fixture.server.shutdown(PATIENCE));
    assert_eq!(idle.rest().await, (Vec::new(), Ended::Fin));
    let (body, how) = busy.rest().await;
    same(&body, &bytes);
    assert_eq!(how, Ended::Fin);
    drop((idle, busy));
    assert_eq!(ended.await.unwrap(), 0);
    assert!(TcpStream::connect(addr).await.is_err());
}

#[tokio::test]
async fn responses_past_the_deadline_end_in_an_orderly_close() {
    let bytes = noise(20 << 20);
    let limits = Limits { linger: Duration::from_millis(50), ..Limits::default() };
    let fixture = Fixture::with(Options { limits, runtimes: 1, ..Options::default() });
    fixture.then(Body::file(file_of(&bytes), 0, bytes.len() as u64));
    let mut busy = fixture.connect_narrow().await;
    busy.get().await;
    busy.head().await;
    busy.exactly(1000).await;
    assert_eq!(fixture.server.shutdown(Duration::from_millis(50)).await, 1);
    let (body, how) = busy.rest().await;
    assert_eq!(how, Ended::Fin);
    assert!(body.len() < bytes.len() - 1000);
    same(&body, &bytes[1000..1000 + body.len()]);
}
