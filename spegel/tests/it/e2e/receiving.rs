//! A layer is shared while it is still arriving: A pulls from a slow upstream, B and C start a second later.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use spegel_benches::containerd::{NAMESPACE, Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image, ImageBuilder, host_platform};
use tokio::sync::oneshot;

use super::cluster::{Cluster, Member};
use super::{cri, for_each_containerd};

/// What the upstream's link carries, in Mbit/s.
const UPSTREAM: u32 = 20;

/// How long B and C start after A.
const LATER: Duration = Duration::from_secs(1);

/// Longer than anything here takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes in a large layer.
const LAYER: u64 = 6 << 20;

/// What may be fetched twice when B has to look for another source.
const TWICE: u64 = 1 << 20;

for_each_containerd!(layers_come_once, wrong_bytes);

#[test]
fn a_layer_comes_once_in_parallel_chunks() {
    let Some(cluster) = Cluster::start(Version::V2_2, 3, &parallel()) else { return };
    comes_once(&cluster, "chunks:1", |image| image.layers(1, LAYER, Compression::None, 30));
}

fn parallel() -> Options {
    Options { layer_fetch_buffer: Some(1 << 20), ..Options::default() }
}

// === upstream sends it once ===

/// Without storms, whoever comes later follows A.
#[test]
fn layers_come_once_without_storms() {
    layers_come_once_with(Version::V2_2, &["--storm", "off"]);
}

fn layers_come_once(version: Version) {
    layers_come_once_with(version, &[]);
}

/// One large layer; then more than are fetched at a time, some of which are small.
fn layers_come_once_with(version: Version, arguments: &[&str]) {
    let Some(cluster) = Cluster::start_with(version, 3, &Options::default(), arguments) else { return };
    comes_once(&cluster, "one:1", |image| image.layers(1, LAYER, Compression::None, 31));
    comes_once(&cluster, "many:1", |image| {
        image.layers(12, 500_000, Compression::None, 32).layers(6, 2048, Compression::None, 33)
    });
}

/// All finish at about the same time, and the upstream sends each layer to one of them: to A, but for those that it leaves to B and C.
fn comes_once(cluster: &Cluster, name: &str, describe: impl FnOnce(ImageBuilder) -> ImageBuilder) {
    let image = cluster.push(name, describe);
    cluster.lab.limit(cluster.upstream.node(), UPSTREAM).unwrap();
    let start = Instant::now();
    let mut pulls = vec![Pull::start(&cluster.nodes[0], &image)];
    thread::sleep(LATER);
    pulls.extend(cluster.nodes[1..].iter().map(|node| Pull::start(node, &image)));
    let took: Vec<f64> = pulls
        .into_iter()
        .zip(&cluster.nodes)
        .map(|(pull, node)| {
            pull.succeeds(cluster, node);
            start.elapsed().as_secs_f64()
        })
        .collect();
    cluster.nodes.iter().for_each(|node| node.check(&image, image.reference()));
    let layers: u64 = image.layers_for(host_platform()).map(|layer| layer.size).sum();
    let sent = |node: &Member| -> u64 {
        image
            .layers_for(host_platform())
            .map(|layer| cluster.upstream.sent(node.containerd.node(), &layer.digest))
            .sum()
    };
    // Of parallel chunks, A itself asks for more than it takes.
    let (to_a, to_others): (u64, u64) = (sent(&cluster.nodes[0]), cluster.nodes[1..].iter().map(sent).sum());
    let last = took[1].max(took[2]);
    println!(
        "containerd {}, {name}, {} layers of {layers} bytes: A took {:.2} s, the last of B and C finished at {last:.2} s ({:.2} x), upstream sent A {:.2} x and the others {:.2} x",
        cluster.nodes[0].containerd.version(),
        image.layers_for(host_platform()).count(),
        took[0],
        last / took[0],
        to_a as f64 / layers as f64,
        to_others as f64 / layers as f64,
    );
    assert!(to_a + to_others >= layers, "the registry's log is not read right: {to_a} and {to_others}");
    let twice = (to_a.min(layers) + to_others).saturating_sub(layers);
    assert!(twice <= layers / 10, "upstream sent {twice} bytes of {layers} twice\n{}", logs(cluster));
    assert!(last < took[0] * 1.1 + 1.0, "B and C finished {:.2} s after A", last - took[0]);
}

// === many, and writers that change their minds ===

/// An ingest as containerd makes one, in the content directory of a node.
struct Ingest {
    folder: PathBuf,
    data: File,
    digest: String,
}

impl Ingest {
    fn begin(node: &Member, n: u64) -> Self {
        let digest = format!("sha256:{n:064x}");
        let folder = node.containerd.content_path().join("ingest").join(format!("{n:064x}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("ref"), format!("{NAMESPACE}/1/layer-{digest}")).unwrap();
        std::fs::write(folder.join("total"), "1000000").unwrap();
        let data = File::create(folder.join("data")).unwrap();
        Self { folder, data, digest }
    }

    fn is_offered(&self, node: &Member) -> bool {
        let url = format!("{}/v2/app/blobs/{}?ns=registry.test", node.spegel().url(), self.digest);
        let head = Client::new(Duration::from_secs(10)).head(&url, &[("X-Spegel-Mirrored", "true")]).unwrap();
        head.header("x-spegel-receiving").is_some()
    }

    /// Asks as a peer, and reads what comes until the connection ends, which it has to in an orderly way.
    fn follow(&self, node: &Member) -> JoinHandle<Vec<u8>> {
        let settings = node.spegel().settings();
        let mut stream = TcpStream::connect((settings.address, settings.ports.registry)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let target = format!("/v2/app/blobs/{}?ns=registry.test", self.digest);
        write!(stream, "GET {target} HTTP/1.1\r\nHost: a\r\nX-Spegel-Mirrored: true\r\n\r\n").unwrap();
        thread::spawn(move || {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            let head = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
            all.split_off(head + 4)
        })
    }
}

/// 500 pulls at once cost no descriptors and a watch each; a file that starts over, one that goes and one that stands still end what follows
/// them; and what is left behind is left alone.
#[test]
fn many_at_once_and_writers_that_give_up() {
    let Some(cluster) = Cluster::start(Version::V2_2, 2, &Options::default()) else { return };
    let node = &cluster.nodes[0];
    let watched = || node.spegel().metric("spegel_ingests", &["state=\"watched\""]).unwrap();
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", node.spegel().daemon.pid())).unwrap().count();
    let before = descriptors();
    let mut ingests: Vec<Ingest> = (1..=500).map(|n| Ingest::begin(node, n)).collect();
    wait_until(PATIENCE, "500 that are watched", || watched() >= 500.0).unwrap();
    assert!(!ingests.iter().any(|ingest| ingest.is_offered(node)), "none of them has grown");
    ingests.iter_mut().for_each(|ingest| ingest.data.write_all(&[7; 1000]).unwrap());
    wait_until(PATIENCE, "the last one", || ingests[499].is_offered(node)).unwrap();
    let offered = ingests.iter().filter(|ingest| ingest.is_offered(node)).count();
    println!("{offered} of 500 are offered, {} descriptors and then {}", before, descriptors());
    assert!(offered == 500 && descriptors() < before + 20, "{offered}, {before}, {}", descriptors());

    let followers: Vec<_> = ingests[..3].iter().map(|ingest| ingest.follow(node)).collect();
    thread::sleep(Duration::from_millis(200));
    ingests[0].data.set_len(0).unwrap();
    std::fs::remove_dir_all(&ingests[1].folder).unwrap();
    // The third stands still.
    let start = Instant::now();
    for follower in followers {
        assert_eq!(follower.join().unwrap(), [7; 1000]);
    }
    println!("all three followers ended after {:.2?}", start.elapsed());
    assert!(!ingests[..3].iter().any(|ingest| ingest.is_offered(node)));
    ingests[2].data.write_all(&[7; 1000]).unwrap();
    wait_until(PATIENCE, "the third goes on", || ingests[2].is_offered(node)).unwrap();
    for ingest in ingests.iter().filter(|ingest| ingest.folder.exists()) {
        std::fs::remove_dir_all(&ingest.folder).unwrap();
    }
    drop(ingests);
    wait_until(PATIENCE, "no watch", || watched() < 1.0).unwrap();
}

// === filters ===

/// What is known before an image is recorded is what containerd asked its mirror for: with filters, the one image is shared while it
/// arrives, and the other is not even offered.
#[test]
fn filters_hold_while_a_layer_arrives() {
    let arguments = ["--registry-filters", "/secret"];
    let Some(cluster) = Cluster::start_with(Version::V2_2, 3, &Options::default(), &arguments) else { return };
    let open = cluster.make("open:0", |image| image.layers(1, 100, Compression::None, 38));
    let secret = cluster.push("secret:1", |image| image.layers(1, LAYER, Compression::None, 36));
    let layer = secret.layers_for(host_platform()).next().unwrap().clone();
    cluster.lab.limit(cluster.upstream.node(), UPSTREAM).unwrap();
    let first = Pull::start(&cluster.nodes[0], &secret);
    let received = || cluster.upstream.sent(cluster.nodes[0].containerd.node(), &layer.digest);
    let folder = cluster.nodes[0].containerd.content_path().join("ingest");
    let grows = || {
        let folders = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.filter_map(|entry| entry.path().join("data").metadata().ok()).any(|data| data.len() >= 2 << 20)
    };
    wait_until(PATIENCE, "two MiB of the layer at A", grows).unwrap();
    let second = Pull::start(&cluster.nodes[1], &secret);
    assert!(offered(&cluster.nodes[0], &secret, &layer.digest).is_none(), "A gives it away");
    // Somebody who knows the digest and asks in another name: A would give it, so nobody may know of A.
    let client = Client::new(Duration::from_secs(10));
    let by_another_name = client.head(&cluster.nodes[2].url(&open, "blobs", &layer.digest), &[]).unwrap();
    assert_eq!(by_another_name.status, 404, "it is offered");
    first.succeeds(&cluster, &cluster.nodes[0]);
    second.succeeds(&cluster, &cluster.nodes[1]);
    let by_b = cluster.upstream.sent(cluster.nodes[1].containerd.node(), &layer.digest);
    println!("kept back: upstream sent A {} bytes and B {by_b}", received());
    assert!(by_b >= layer.size);
    comes_once(&cluster, "open:1", |image| image.layers(3, LAYER / 3, Compression::None, 37));
}

// === A is lost ===

/// What becomes of A while B has the layer from it.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// Its spegel is killed.
    Killed,
    /// Its spegel stands still.
    Stopped,
    /// Its network is.
    CutOff,
    /// Its pull is given up.
    Cancelled,
    /// Its containerd restarts.
    Restarted,
}

const LOSSES: [Loss; 5] = [Loss::Killed, Loss::Stopped, Loss::CutOff, Loss::Cancelled, Loss::Restarted];

#[test]
fn a_is_killed() {
    lose(Version::V1_6, &Options::default(), Loss::Killed, 50);
}

#[test]
fn a_is_killed_in_the_middle_of_parallel_chunks() {
    lose(Version::V2_2, &parallel(), Loss::Killed, 50);
}

#[test]
fn a_is_stopped() {
    lose(Version::V1_6, &Options::default(), Loss::Stopped, 50);
}

#[test]
fn a_is_cut_off() {
    lose(Version::V2_2, &Options::default(), Loss::CutOff, 10);
}

#[test]
fn a_is_cancelled() {
    lose(Version::V2_2, &Options::default(), Loss::Cancelled, 50);
}

#[test]
fn a_restarts() {
    lose(Version::V1_6, &Options::default(), Loss::Restarted, 50);
}

#[test]
#[ignore = "takes some four minutes"]
fn every_loss_at_every_point_1_6() {
    lose_at_every_point(Version::V1_6, &Options::default());
}

#[test]
#[ignore = "takes some four minutes"]
fn every_loss_at_every_point_2_2() {
    lose_at_every_point(Version::V2_2, &Options::default());
}

#[test]
#[ignore = "takes some four minutes"]
fn every_loss_at_every_point_of_parallel_chunks() {
    lose_at_every_point(Version::V2_2, &parallel());
}

fn lose_at_every_point(version: Version, options: &Options) {
    for loss in LOSSES {
        for percent in [10, 50, 99] {
            lose(version, options, loss, percent);
        }
    }
}

/// B's pull succeeds all the same, and goes on where it was. What becomes of A's pull is A's matter.
fn lose(version: Version, options: &Options, loss: Loss, percent: u64) {
    let Some(mut cluster) = Cluster::start(version, 2, options) else { return };
    let image = cluster.push("lost:1", |image| image.layers(1, LAYER, Compression::None, 34));
    let layer = image.layers_for(host_platform()).next().unwrap().clone();
    cluster.lab.limit(cluster.upstream.node(), UPSTREAM).unwrap();
    let mut first = Pull::start(&cluster.nodes[0], &image);
    let at_a = || offered(&cluster.nodes[0], &image, &layer.digest);
    wait_until(PATIENCE, "the layer offered by A", || at_a().is_some()).unwrap();
    let start = Instant::now();
    let second = Pull::start(&cluster.nodes[1], &image);
    let relayed = || cluster.nodes[1].spegel().metric("spegel_serve_bytes_total", &["kind=\"relay\""]).unwrap();
    wait_until(PATIENCE, "that part of the layer", || relayed() >= (layer.size * percent / 100) as f64).unwrap();
    let had = relayed() as u64;
    inflict(&mut cluster, loss, &mut first);
    second.succeeds(&cluster, &cluster.nodes[1]);
    let took = start.elapsed();
    cluster.nodes[1].check(&image, image.reference());
    let rest = cluster.upstream.sent(cluster.nodes[1].containerd.node(), &layer.digest);
    println!(
        "containerd {version} {options:?}, {loss:?} at {percent} %: B had {had} bytes and took {took:.2?}, upstream sent it {rest}"
    );
    // Of parallel chunks, it asks for more than it takes.
    if options.layer_fetch_buffer.is_none() {
        assert!(rest <= layer.size - had + TWICE, "upstream sent B {rest} bytes of {}, and it had {had}", layer.size);
    }
    undo(&cluster, loss);
}

/// The position and the total that A tells its peers.
fn offered(node: &Member, image: &Image, digest: &str) -> Option<String> {
    let client = Client::new(Duration::from_secs(10));
    let head = client.head(&node.url(image, "blobs", digest), &[("X-Spegel-Mirrored", "true")]).ok()?;
    head.header("x-spegel-receiving").map(str::to_owned)
}

fn inflict(cluster: &mut Cluster, loss: Loss, pull: &mut Pull) {
    let a = cluster.nodes[0].containerd.node().clone();
    match loss {
        Loss::Killed => cluster.nodes[0].spegel().daemon.signal(Signal::KILL).unwrap(),
        Loss::Stopped => cluster.nodes[0].spegel().daemon.signal(Signal::STOP).unwrap(),
        Loss::CutOff => cluster.lab.set_connected(&a, false).unwrap(),
        Loss::Cancelled => pull.cancel(),
        Loss::Restarted => cluster.nodes[0].containerd.restart().unwrap(),
    }
}

fn undo(cluster: &Cluster, loss: Loss) {
    if matches!(loss, Loss::Stopped) {
        // A stopped process would not hear that it is to end.
        cluster.nodes[0].spegel().daemon.signal(Signal::CONT).ok();
    }
}

// === A's bytes are wrong ===

/// The upstream sends a wrong byte once. The pulls that were under way fail at their own containerds' check; nobody gives the file to
/// others after that, and once the upstream is well again all succeed.
fn wrong_bytes(version: Version) {
    let Some(cluster) = Cluster::start(version, 2, &Options::default()) else { return };
    let image = cluster.push("poisoned:1", |image| image.layers(1, LAYER, Compression::None, 35));
    let layer = image.layers_for(host_platform()).next().unwrap().clone();
    cluster.lab.limit(cluster.upstream.node(), UPSTREAM).unwrap();
    let file = cluster.upstream.blob_path(&layer.digest);
    let right = std::fs::read(&file).unwrap();
    let mut wrong = right.clone();
    wrong[3 << 20] ^= 1;
    std::fs::write(&file, wrong).unwrap();

    let first = Pull::start(&cluster.nodes[0], &image);
    let at = |node: usize| offered(&cluster.nodes[node], &image, &layer.digest);
    wait_until(PATIENCE, "the layer offered by A", || at(0).is_some()).unwrap();
    let second = Pull::start(&cluster.nodes[1], &image);
    for pull in [first, second] {
        let error = pull.result().expect_err("the bytes are wrong");
        assert!(error.contains("digest"), "{error}");
    }
    // What a commit that fails leaves behind is given up a moment after its writer closed it.
    wait_until(Duration::from_secs(5), "the end of the offers", || at(0).is_none() && at(1).is_none()).unwrap();
    std::fs::write(&file, right).unwrap();

    for node in &cluster.nodes {
        // containerd 2.2 may try to commit what it has a few times more.
        let mut tries = 0;
        wait_until(PATIENCE, "a pull that succeeds", || {
            tries += 1;
            assert!(at(0).is_none() && at(1).is_none() || tries > 1, "the wrong bytes are offered");
            let result = Pull::start(node, &image).result();
            result.inspect_err(|error| println!("try {tries}: {error}")).is_ok()
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", logs(&cluster)));
        node.check(&image, image.reference());
        println!("containerd {version}: right after {tries} further tries");
    }
}

// === pulls ===

/// A pull through the CRI that is under way.
struct Pull {
    thread: JoinHandle<Result<(), String>>,
    cancel: Option<oneshot::Sender<()>>,
}

impl Pull {
    fn start(node: &Member, image: &Image) -> Self {
        let (socket, reference) = (node.containerd.socket(), image.reference().to_owned());
        let (cancel, cancelled) = oneshot::channel();
        let thread = thread::spawn(move || {
            let cancelled = async {
                // Who drops the sender wants the pull to go on.
                if cancelled.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            cri::pull_unless(&socket, &reference, cancelled)
        });
        Self { thread, cancel: Some(cancel) }
    }

    fn cancel(&mut self) {
        self.cancel.take().unwrap().send(()).unwrap();
    }

    fn result(self) -> Result<(), String> {
        self.thread.join().unwrap()
    }

    #[track_caller]
    fn succeeds(self, cluster: &Cluster, node: &Member) {
        if let Err(error) = self.result() {
            panic!("{error}\n{}\ncontainerd:\n{}", logs(cluster), node.containerd.log());
        }
    }
}

fn logs(cluster: &Cluster) -> String {
    let logs = cluster.nodes.iter().enumerate().map(|(n, node)| format!("spegel {n}:\n{}", node.spegel().daemon.log()));
    logs.collect::<Vec<_>>().join("\n")
}
