//! Log lines that nobody reads.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use spegel_benches::daemon::wait_until;

use crate::ebpf::daemon::{metrics, ports, start};

/// Standard error is a pipe that is full: each refused request is a line at DEBUG, and those that find no place are counted.
#[test]
fn lines_that_nobody_reads_are_counted() {
    let (folder, port) = (tempfile::tempdir().unwrap(), ports());
    let script = "mkfifo \"$0/pipe\"; exec 3<>\"$0/pipe\"; exec \"$@\" 2>&3";
    let before = ["sh", "-c", script, &folder.path().display().to_string()];
    let _daemon = start(folder.path(), port, &before, &["--log-level", "DEBUG", "--ebpf", "off"]);
    let text = || metrics(port);
    wait_until(Duration::from_secs(30), "figures", || text().contains("spegel_ready 1\n")).unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut answers = stream.try_clone().unwrap();
    std::thread::spawn(move || std::io::copy(&mut answers, &mut std::io::sink()));
    // More than wait for the writer, and than the pipe holds.
    let request = b"GET /v2/app/blobs/sha256:nothing HTTP/1.1\r\nHost: node\r\n\r\n";
    for _ in 0..20 {
        stream.write_all(&request.repeat(1000)).unwrap();
    }
    let dropped = || {
        text()
            .lines()
            .any(|line| line.strip_prefix("spegel_log_dropped_lines_total ").is_some_and(|count| count != "0"))
    };
    wait_until(Duration::from_secs(60), "lines to be dropped", dropped).unwrap();
}
