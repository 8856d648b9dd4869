//! What small things cost by themselves. `cargo xtask bench micro` makes a table of it.
#![allow(clippy::unwrap_used)]
// A file can only be mapped by a promise that nobody shortens it. The program itself makes none.
#![allow(unsafe_code)]

use std::fs::File;
use std::hint::black_box;
use std::io::{IoSlice, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use memmap2::Mmap;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use sha2::{Digest as _, Sha256};
use spegel::mirror::{Mirror, MirrorMetrics, Settings as MirrorSettings};
use spegel::oci::{Filters, Request};
use spegel::registry::{Registry, RegistryMetrics, Settings, UploadLimits};
use spegel::router::{MemoryNetwork, Router as _};
use spegel::store::OciLayout;
use spegel::zerocopy::BodyEnd;

/// A response's head, about as long as ours.
const HEAD: [u8; 320] = [b'h'; 320];

/// Two ends of a connection whose buffers take more than is sent at once.
fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nodelay(true).unwrap();
    (ours, theirs)
}

/// Head and body in one call, as far as the socket takes it.
fn send(to: &TcpStream, body: &[u8]) -> usize {
    let parts = [IoSlice::new(&HEAD), IoSlice::new(body)];
    sendmsg(to, &parts, &mut SendAncillaryBuffer::new(&mut []), SendFlags::NOSIGNAL).unwrap()
}

/// Throws away what has come, without copying it.
fn discard(from: &TcpStream, mut length: usize) {
    let mut nothing = [0_u8; 1 << 16];
    while length > 0 {
        let room = length.min(nothing.len());
        length -= recv(from, &mut nothing[..room], RecvFlags::TRUNC).unwrap().1;
    }
}

/// The ways in which a small body can get from a file that is in the page cache to a socket.
fn bodies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("body");
    for length in [2 << 10, 32 << 10, 256 << 10] {
        let mut file = tempfile::tempfile().unwrap();
        let bytes = vec![7_u8; length];
        file.write_all(&bytes).unwrap();
        let (to, from) = pair();
        let size = format!("{} KiB", length >> 10);
        let mut bench = |way: &str, send: &mut dyn FnMut() -> usize| {
            group.bench_function(BenchmarkId::new(way, &size), |bencher| {
                bencher.iter(|| discard(&from, send()));
            });
        };
        bench("memory", &mut || send(&to, &bytes));
        let kept = map(&file);
        bench("mapping, kept", &mut || send(&to, &kept));
        bench("mapping, made for each", &mut || send(&to, &map(&file)));
        let mut buffer = vec![0; length];
        bench("read into a kept buffer", &mut || {
            file.read_exact_at(&mut buffer, 0).unwrap();
            send(&to, &buffer)
        });
        bench("sendfile", &mut || {
            let head = rustix::net::send(&to, &HEAD, SendFlags::NOSIGNAL | SendFlags::MORE).unwrap();
            head + rustix::fs::sendfile(&to, &file, Some(&mut 0), length).unwrap()
        });
    }
    group.finish();
}

fn map(file: &File) -> Mmap {
    // SAFETY: the file is a temporary one without a name, which nobody else can shorten.
    unsafe { Mmap::map(file) }.unwrap()
}

/// A registry over a layout with one manifest of 2 KiB, and the request for it.
fn registry(folder: &tempfile::TempDir) -> (Registry, String) {
    let blobs = folder.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let empty = format!("sha256:{}", hex::encode(Sha256::digest(b"{}")));
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": media_type, "layers": [],
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": empty, "size": 2},
        "annotations": {"filler": "x".repeat(1700)}})
    .to_string();
    let hex = hex::encode(Sha256::digest(&manifest));
    std::fs::write(blobs.join(&hex), &manifest).unwrap();
    std::fs::write(blobs.join(&empty[7..]), "{}").unwrap();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{"mediaType": media_type,
        "digest": format!("sha256:{hex}"), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "registry.test/bench/app:latest"}}]});
    std::fs::write(folder.path().join("index.json"), index.to_string()).unwrap();
    let filters = || Filters::new(&[], &[]).unwrap();
    let router = MemoryNetwork::new().join("a", (Ipv4Addr::LOCALHOST, 1).into());
    let mut figures = spegel::metrics::Figures::default();
    let registry = Registry::new(Settings {
        store: OciLayout::open(vec![folder.path().to_owned()], filters()).unwrap(),
        mirror: Mirror::new(router.clone(), MirrorSettings::default(), MirrorMetrics::register(&mut figures)),
        readiness: router.readiness(),
        filters: filters(),
        basic_auth: None,
        node_name: Some("a".into()),
        uploads: UploadLimits::default(),
        metrics: RegistryMetrics::register(&mut figures),
    });
    (registry, format!("/v2/bench/app/manifests/sha256:{hex}?ns=registry.test"))
}

/// What our own code adds to a small request.
fn requests(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let _within = runtime.enter();
    let (registry, target) = registry(&folder);
    let (path, query) = target.split_once('?').unwrap();
    let mut group = criterion.benchmark_group("request");
    group.bench_function("parsed", |bencher| {
        bencher.iter(|| Request::parse(&http::Method::GET, black_box(path), Some(query)).unwrap());
    });
    let (parts, ()) = http::Request::get(&target).body(()).unwrap().into_parts();
    let remote = Ipv4Addr::LOCALHOST.into();
    group.bench_function("answered by the handler", |bencher| {
        bencher.iter(|| drop(runtime.block_on(registry.handle(&parts, remote))));
    });
    let headers = [("Host", &b"node"[..]), ("User-Agent", b"containerd/v2.2.7"), ("Accept", b"*/*")];
    group.bench_function("answered at once", |bencher| {
        bencher.iter(|| {
            let prompt = match registry.prompt(false, &target, headers.into_iter(), remote) {
                Some(prompt) => prompt,
                // Once a second it is looked for anew.
                None => {
                    drop(runtime.block_on(registry.handle(&parts, remote)));
                    registry.prompt(false, &target, headers.into_iter(), remote).unwrap()
                }
            };
            (prompt.end)(BodyEnd { sent: prompt.body.len() as u64, complete: true, cut: false });
        });
    });
    group.finish();
}

criterion_group!(micro, bodies, requests);
criterion_main!(micro);
