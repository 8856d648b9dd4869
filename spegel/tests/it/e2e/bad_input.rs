//! Bad input of every kind: a clear error, nothing lost, the process alive.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image, ImageBuilder};
use spegel_benches::spegel::{Ports, Settings, Source, Spegel};
use tempfile::TempDir;

use super::cluster::{Cluster, PROGRAM};
use super::for_each_containerd;

for_each_containerd!(a_content_path_of_another_containerd);

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// One process on loopback; it needs no root.
struct Alone {
    spegel: Spegel,
    image: Image,
    /// Held for its end.
    _folder: TempDir,
}

impl Alone {
    fn start() -> Self {
        Self::start_as(|program, _| program.to_path_buf())
    }

    fn start_as(program: impl FnOnce(&Path, &Path) -> PathBuf) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let layout = folder.path().join("layout");
        let image = ImageBuilder::new("bad.test/team/app:1")
            .layers(1, 100_000, Compression::Gzip, 1)
            .build(folder.path())
            .unwrap();
        image.write_layout(&layout).unwrap();
        let mut settings = settings(&folder, Source::Layout(layout));
        settings.program = program(Path::new(PROGRAM), folder.path());
        let spegel = settings.start().unwrap();
        let alone = Self { spegel, image, _folder: folder };
        wait_until(Duration::from_secs(20), "the image", || alone.serves()).unwrap();
        alone
    }

    /// Whether the layer can be had, whole.
    fn serves(&self) -> bool {
        let layer = &self.image.contents()[0].digest;
        let url = format!("{}/v2/team/app/blobs/{layer}?ns=bad.test", self.spegel.url());
        let client = Client::new(Duration::from_secs(10));
        client.download(&url, |_| Ok(())).is_ok_and(|(head, digest, _)| head.status == 200 && digest == *layer)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(LOOPBACK, self.spegel.settings().ports.registry)
    }

    /// Sends bytes and returns the answer's first line and everything after it.
    fn raw(&self, request: &[u8]) -> String {
        let mut socket = TcpStream::connect(self.address()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // A server may answer and close before it has read everything.
        let _ = socket.write_all(request);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

fn settings(folder: &TempDir, source: Source) -> Settings {
    Settings {
        program: PROGRAM.into(),
        node: None,
        address: LOOPBACK,
        ports: Ports::free().unwrap(),
        source,
        peers: vec![LOOPBACK],
        arguments: Vec::new(),
        log: folder.path().join("spegel.log"),
    }
}

#[test]
fn requests() {
    let mut alone = Alone::start();
    let layer = alone.image.contents()[0].digest.clone();
    let absent = format!("sha256:{}", "0".repeat(64));
    let check = |method: &str, target: &str, headers: &str, status: u16, code: &str| {
        let request = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
        let answer = alone.raw(request.as_bytes());
        let start = format!("HTTP/1.1 {status} ");
        assert!(answer.starts_with(&start) && answer.contains(code), "{method} {target} {headers}: {answer}");
    };
    check("GET", "/v2/team/app/blobs/sha256:abc?ns=bad.test", "", 400, "DIGEST_INVALID");
    check("GET", &format!("/v2/team/app/blobs/{}?ns=bad.test", layer.to_uppercase()), "", 400, "DIGEST_INVALID");
    check("GET", "/v2/team/app/blobs/..%2f..%2fetc%2fpasswd?ns=bad.test", "", 400, "DIGEST_INVALID");
    check("GET", "/v2/Team/app/manifests/1?ns=bad.test", "", 400, "NAME_INVALID");
    check("GET", "/v2/team/app/manifests/1", "", 400, "errors");
    check("GET", "/v2/team/app/manifests/1?ns=", "", 400, "errors");
    check("GET", "/v2/team/app/manifests/1?ns=a%00b", "", 400, "errors");
    check("GET", "/v2/team/app/manifests/2?ns=bad.test", "", 404, "MANIFEST_UNKNOWN");
    check("GET", &format!("/v2/team/app/blobs/{absent}?ns=bad.test"), "", 404, "BLOB_UNKNOWN");
    check("GET", "/nothing", "", 404, "");
    let blob = format!("/v2/team/app/blobs/{layer}?ns=bad.test");
    check("GET", &blob, "Range: bytes=99999999-\r\n", 416, "");
    for ignored in ["bytes=0-1,3-4", "lines=1-2", "bytes=5-2", "bytes=a-b", "nonsense"] {
        check("GET", &blob, &format!("Range: {ignored}\r\n"), 200, "");
    }
    check("PUT", "/v2/team/app/manifests/1?ns=bad.test", "Content-Length: 0\r\n", 405, "UNSUPPORTED");
    check("POST", "/v2/team/app/blobs/uploads/", "Content-Length: 0\r\n", 405, "UNSUPPORTED");
    check("DELETE", "/v2/team/app/manifests/1?ns=bad.test", "", 405, "UNSUPPORTED");

    // What is no HTTP, or too much of it, is refused or closed; no header may grow without bound.
    let long = format!("GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "a".repeat(64 << 10));
    let answer = alone.raw(long.as_bytes());
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    let answer = alone.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");

    assert!(alone.spegel.daemon.is_alive() && alone.serves());
    let log = alone.spegel.daemon.log();
    assert!(!log.contains("panicked") && !log.contains("\"ERROR\""), "what a client sends is not our error:\n{log}");
}

/// A thousand clients that begin a request and never end it do not keep others out.
#[test]
fn half_open_connections() {
    let mut alone = Alone::start();
    let mut held = Vec::new();
    for _ in 0..1000 {
        let mut socket = TcpStream::connect_timeout(&alone.address(), Duration::from_secs(10)).unwrap();
        let _ = socket.write_all(b"GET /v2/ HTTP/1.1\r\nHost: ");
        held.push(socket);
    }
    assert!(alone.serves() && alone.spegel.daemon.is_alive());
    drop(held);
    assert!(alone.serves());
}

/// A process that has no descriptor left refuses, keeps what it has, and heals.
#[test]
fn no_descriptors() {
    let mut alone = Alone::start_as(|program, folder| {
        let wrapper = folder.join("limited");
        fs::write(&wrapper, format!("#!/bin/sh\nexec prlimit --nofile=90:90 {} \"$@\"\n", program.display())).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        wrapper
    });
    let mut held: Vec<TcpStream> = Vec::new();
    for _ in 0..150 {
        held.push(TcpStream::connect_timeout(&alone.address(), Duration::from_secs(10)).unwrap());
    }
    // Whoever was let in is served as before.
    let first = &mut held[0];
    first.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    first.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = [0; 12];
    first.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    drop(held.drain(1..).step_by(2).collect::<Vec<_>>());
    let refusals = (0..150).map(|_| alone.raw(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    let said: Vec<String> = refusals.filter(|answer| !answer.starts_with("HTTP/1.1 200")).collect();
    assert!(said.iter().all(|answer| answer.is_empty() || answer.starts_with("HTTP/1.1 503")), "{said:?}");
    drop(held);
    wait_until(Duration::from_secs(20), "service as before", || alone.serves()).unwrap();
    assert!(alone.spegel.daemon.is_alive() && alone.spegel.daemon.log().contains("cannot accept connections"));
}

/// `configuration` that shall keep what it cannot read says so, names the file, and changes nothing.
#[test]
fn a_hosts_file_that_is_not_toml() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.test/hosts.toml");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "server = [not toml\n").unwrap();
    let configuration = |prepend: &str| {
        let mut command = Command::new(PROGRAM);
        command.arg("configuration").arg("--containerd-registry-config-path").arg(folder.path());
        command.args(["--mirrored-registries", "https://bad.test", "--mirror-targets", "http://127.0.0.1:5000"]);
        command.arg(format!("--prepend-existing={prepend}")).output().unwrap()
    };
    let refused = configuration("true");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("not TOML") && said.contains("bad.test/hosts.toml"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "server = [not toml\n");

    // Where nothing of it is to be kept in use, it is backed up.
    let done = configuration("false");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(fs::read_to_string(&file).unwrap().contains("127.0.0.1:5000"));
    let backup = files(&folder.path().join("_backup.spegel"));
    assert!(backup.iter().any(|path| fs::read_to_string(path).unwrap() == "server = [not toml\n"), "{backup:?}");
}

/// containerd may start after us: we wait, say what for, live, and are not ready.
#[test]
fn a_socket_that_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let source =
        Source::Containerd { socket: folder.path().join("absent.sock"), content: Some(folder.path().join("content")) };
    let mut spegel = settings(&folder, source).spawn().unwrap();
    let client = Client::new(Duration::from_secs(5));
    let (live, ready) = (format!("{}/livez", spegel.url()), format!("{}/readyz", spegel.url()));
    let is_live = || client.get(&live, &[]).is_ok_and(|answer| answer.head.status == 200);
    spegel.daemon.wait_until(Duration::from_secs(20), "200 from /livez", is_live).unwrap();
    let answer = client.get(&ready, &[]).unwrap();
    assert_eq!(answer.head.status, 503, "{}", answer.text());
    wait_until(Duration::from_secs(20), "word of the socket", || spegel.daemon.log().contains("absent.sock")).unwrap();
    assert!(spegel.daemon.is_alive());
    assert_eq!(spegel.daemon.stop().unwrap().code(), Some(0));
}

/// A content path that belongs to another containerd would serve nothing, silently: we refuse to start, and say why.
fn a_content_path_of_another_containerd(version: Version) {
    let Some(cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    let image = cluster.push("app:1", |image| image.layers(1, 100_000, Compression::Gzip, 1));
    cluster.nodes[0].pull(&image, image.reference());
    let second = || {
        let mut settings = cluster.settings(0);
        settings.ports = Ports { registry: 6000, router: 6001, metrics: 6090 };
        settings.peers = vec![settings.address];
        settings
    };
    let mut settings = second();
    settings.log = cluster.folder.path().join("refused.log");
    let wrong = cluster.nodes[1].containerd.content_path();
    fs::create_dir_all(wrong.join("blobs/sha256")).unwrap();
    settings.source = Source::Containerd { socket: cluster.nodes[0].containerd.socket(), content: Some(wrong.clone()) };
    let mut spegel = settings.spawn().unwrap();
    let status = spegel.daemon.wait_exit(Duration::from_secs(30)).unwrap();
    let log = spegel.daemon.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(&wrong.display().to_string()), "{log}");

    // One that is not there is refused even while the namespace has nothing to compare it with.
    let mut settings = second();
    settings.log = cluster.folder.path().join("absent.log");
    settings.arguments.extend(["--containerd-namespace".to_owned(), "empty".to_owned()]);
    let absent = cluster.folder.path().join("absent/content");
    settings.source =
        Source::Containerd { socket: cluster.nodes[0].containerd.socket(), content: Some(absent.clone()) };
    let mut spegel = settings.spawn().unwrap();
    let status = spegel.daemon.wait_exit(Duration::from_secs(30)).unwrap();
    let log = spegel.daemon.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains(&absent.display().to_string()), "{log}");

    // Left empty, containerd is asked, and the right one is found.
    let mut settings = second();
    settings.source = Source::Containerd { socket: cluster.nodes[0].containerd.socket(), content: None };
    let spegel = settings.start().unwrap();
    let url = format!("{}/v2/app/blobs/{}", spegel.url(), image.contents()[0].digest);
    let client = Client::new(Duration::from_secs(10));
    wait_until(Duration::from_secs(20), "the layer", || client.get(&url, &[]).is_ok_and(|a| a.head.status == 200))
        .unwrap();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

/// A pod's value that was left empty is no value.
#[test]
fn empty_environment_variables() {
    let mut command = Command::new(PROGRAM);
    command.args(["registry", "--bootstrap-kind", "static", "--registry-addr", "nowhere"]);
    for name in ["DATA_DIR", "OCI_LAYOUT", "LOG_FORMAT", "LOG_LEVEL", "MIRRORED_REGISTRIES", "MIRROR_RESOLVE_TIMEOUT"] {
        command.env(name, "");
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("--registry-addr nowhere"), "only the address is wrong: {said}");
}
