//! What a service manager is told: that the process is up, what it waits for, that it still answers, that it stops.
//!
//! Without one (`NOTIFY_SOCKET`, `sd_notify(3)`) nothing is told. The process is up once its ports are open: a node that waits for peers
//! answers its containerd all the same, and must not be ended for being late.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::registry::Registry;

/// How often it is looked what the process waits for.
const PERIOD: Duration = Duration::from_secs(2);
/// What any answer begins with.
const ANSWER: &[u8] = b"HTTP/1.1 ";

/// What is told.
enum News {
    Ready,
    Status(String),
    Alive,
    Stopping,
}

/// On a thread that may wait: a service manager that does not read must not hold up the control runtime.
fn tell(news: News) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let state = match &news {
            News::Ready => NotifyState::Ready,
            News::Status(text) => NotifyState::Status(text),
            News::Alive => NotifyState::Watchdog,
            News::Stopping => NotifyState::Stopping,
        };
        if let Err(error) = sd_notify::notify(false, &[state]) {
            warn!(%error, "the service manager cannot be told");
        }
    })
}

/// Tells that the process is up, and from then on what becomes of it. `at` is where the registry answers.
pub(super) async fn attend(registry: Arc<Registry>, at: SocketAddr) {
    let mut bound = 0;
    let watchdog = sd_notify::watchdog_enabled(false, &mut bound).then(|| Duration::from_micros(bound));
    let period = watchdog.map_or(PERIOD, |bound| PERIOD.min(bound / 3));
    // Each is waited for, so that no more than one thread waits.
    let _ = tell(News::Ready).await;
    let mut told = String::new();
    let mut timer = tokio::time::interval(period);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let status = registry.ready().map_or_else(|why| format!("waiting: {why}"), |()| "ready".to_owned());
        if status != told {
            told.clone_from(&status);
            let _ = tell(News::Status(status)).await;
        }
        // A data runtime that hangs takes no connection; a process that is stopped does not come here.
        if watchdog.is_some() && matches!(tokio::time::timeout(period, answers(at)).await, Ok(Ok(true))) {
            let _ = tell(News::Alive).await;
        }
    }
}

/// Tells that the process is on its way out.
pub(super) fn stopping() {
    tell(News::Stopping);
}

/// Where this process reaches its own listener.
pub(super) fn reachable(at: SocketAddr) -> SocketAddr {
    let ip = if at.ip().is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { at.ip() };
    SocketAddr::new(ip, at.port())
}

/// Whether the registry answers a request.
async fn answers(at: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(at).await?;
    stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut head = [0; ANSWER.len()];
    stream.read_exact(&mut head).await?;
    Ok(head == ANSWER)
}
