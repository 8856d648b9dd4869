//! Asking a running process on this node by its side port.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::cli::LevelSettings;
use crate::web::LEVEL_PATH;

/// How long the process may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest answer that is read: a thousand rows of peers are less than half a megabyte.
const LONGEST: u64 = 16 << 20;

/// What the process at `addr` answers, if that is a good answer.
///
/// # Errors
/// Nobody answers there, or not as spegel does, or it refuses.
pub(super) fn ask(addr: SocketAddr, method: &str, path: &str, body: &str) -> Result<Vec<u8>> {
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: {addr}\r\nContent-Length: {length}\r\n\r\n{body}")?;
        let mut answer = Vec::new();
        stream.take(LONGEST).read_to_end(&mut answer)?;
        Ok(answer)
    };
    let mut answer = ask().with_context(|| format!("ask spegel at {addr} (--metrics-addr)"))?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let Some(end) = end else { bail!("{addr} does not answer as spegel does") };
    let status = String::from_utf8_lossy(&answer[..end]).lines().next().unwrap_or_default().to_owned();
    let body = answer.split_off(end + 4);
    ensure!(status.contains(" 200"), "{addr} answers {status:?}: {}", String::from_utf8_lossy(&body).trim());
    Ok(body)
}

/// Shows the level of a process's log, or changes it.
///
/// # Errors
/// Those of [`ask`].
pub(super) fn level(settings: &LevelSettings) -> Result<()> {
    let answer = match settings.level {
        Some(level) => ask(settings.addr, "PUT", LEVEL_PATH, level.name())?,
        None => ask(settings.addr, "GET", LEVEL_PATH, "")?,
    };
    print!("{}", String::from_utf8_lossy(&answer));
    Ok(())
}
