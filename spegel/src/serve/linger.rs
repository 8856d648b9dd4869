//! Closing without a reset.

use std::time::Duration;

use rustix::net::Shutdown;
use tokio::net::TcpStream;

/// Bytes of input read away before a close; who sends more gets the reset.
const BYTES: usize = 1 << 20;

/// Milliseconds for which the kernel keeps unsent bytes of a closed socket whose client takes none.
const ORPHAN: u32 = 60_000;

/// Sends a FIN after what was written, reads on until the client's own FIN for at most `limit`, and closes. Closing with
/// input unread would send a reset, which throws away what the client has not read yet. `look` sees the socket just before it is closed.
pub(super) async fn close(stream: TcpStream, limit: Duration, look: impl FnOnce(&TcpStream)) {
    // Fails where the client is gone, and then there is nothing to wait for.
    if rustix::net::shutdown(&stream, Shutdown::Write).is_err() {
        look(&stream);
        return;
    }
    let drained = async {
        let mut buf = vec![0; 16 << 10];
        let mut left = BYTES;
        while left > 0 {
            if stream.readable().await.is_err() {
                return;
            }
            match stream.try_read(&mut buf) {
                Ok(0) => return,
                Ok(n) => left = left.saturating_sub(n),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    };
    if tokio::time::timeout(limit, drained).await.is_err() {
        // A socket option that an older kernel lacks costs it memory for some minutes, no more.
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, ORPHAN);
    }
    look(&stream);
}
