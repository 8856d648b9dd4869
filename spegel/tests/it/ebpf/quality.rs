//! A peer on whose path much is lost is asked less often, since the kernel tells.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spegel::ebpf::Watch;
use spegel::metrics::Figures;
use spegel::mirror::{Kind, Mirror, MirrorMetrics, Settings as MirrorSettings, Wanted};
use spegel::oci::{Digest, Key};
use spegel::router::{MemoryNetwork, Router as _};
use spegel::store::Change;
use spegel_benches::daemon::wait_until;
use spegel_benches::image::digest_of;
use spegel_benches::netns::{Lab, Node};
use spegel_benches::spegel::{Ports, Settings, Source, Spegel};

use super::{SOON, settings, watch};

/// Blobs that both peers have, and the length of each: some forty segments.
const BLOBS: u32 = 120;
const LENGTH: usize = 60_000;

#[test]
fn a_peer_that_loses_segments_is_asked_less_often() {
    if let Err(reason) = Lab::available() {
        return println!("skipped: {reason}");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut lab = Lab::new().unwrap();
    let (lossy, good) = (lab.add_node().unwrap(), lab.add_node().unwrap());
    if let Err(reason) = drop_some(&lossy) {
        return println!("skipped: no segments can be dropped here: {reason:#}");
    }
    let mut kernels = settings(Ports::default().registry);
    kernels.peers_on_loopback = false;
    let Some(watch) = watch(&kernels) else { return };
    let digests = write_layout(&folder.path().join("layout"));
    let _servers = [&lossy, &good].map(|node| start(node, folder.path()));

    let at = |node: &Node| SocketAddr::new(node.address().into(), Ports::default().registry);
    let offered = |network: &MemoryNetwork, id: &str, node: &Node| {
        let router = network.join(id, at(node));
        router.announce(Change::Added(digests.iter().cloned().map(Key::Digest).collect()));
        router
    };
    let loss = |node: &Node| watch.quality().loss(IpAddr::from(node.address()), Instant::now());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // What the kernel needs to have seen before: connections with it for whatever purpose.
    let alone = MemoryNetwork::new();
    let _alone = offered(&alone, "lossy", &lossy);
    let asker = mirror(&alone, "before", None);
    wait_until(20 * SOON, "the loss", || {
        runtime.block_on(async {
            for digest in &digests[..20] {
                let _ = asker.fetch(&wanted(digest)).await;
            }
        });
        loss(&lossy) > 0.12
    })
    .unwrap();

    let network = MemoryNetwork::new();
    let _both = [("1-lossy", &lossy), ("2-good", &good)].map(|(id, node)| offered(&network, id, node));
    let mut shares = BTreeMap::new();
    for (name, watch) in [("without", None), ("with", Some(watch.clone()))] {
        let mirror = mirror(&network, name, watch);
        let start = Instant::now();
        let from_lossy = runtime.block_on(async {
            let mut count = 0;
            for digest in &digests {
                let found = mirror.fetch(&wanted(digest)).await.unwrap();
                count += u32::from(found.peer.unwrap().addresses.contains(&at(&lossy)));
            }
            count
        });
        println!(
            "{name} the kernel's word: {from_lossy} of {BLOBS} from the peer that loses, {:.2} s",
            start.elapsed().as_secs_f64()
        );
        shares.insert(name, from_lossy);
    }
    println!("seen: {:.3} at the one, {:.3} at the other", loss(&lossy), loss(&good));
    assert!(loss(&lossy) > 5.0 * loss(&good));
    assert!(2 * shares["with"] <= shares["without"].max(1), "{shares:?}");
}

/// A fifth of what goes to and comes from a node's registry is lost.
fn drop_some(node: &Node) -> anyhow::Result<()> {
    node.nft("add table ip spegel")?;
    for (chain, port) in [("input", "dport"), ("output", "sport")] {
        node.nft(&format!("add chain ip spegel {chain} {{ type filter hook {chain} priority 0; }}"))?;
        node.nft(&format!("add rule ip spegel {chain} tcp {port} 5000 numgen random mod 100 < 20 drop"))?;
    }
    Ok(())
}

/// A layout whose one image has all blobs; returns their digests.
fn write_layout(folder: &Path) -> Vec<Digest> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    let put = |bytes: &[u8]| {
        let digest = digest_of(bytes);
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes).unwrap();
        digest
    };
    let digests: Vec<String> = (0..BLOBS).map(|n| put(&n.to_le_bytes().repeat(LENGTH / 4))).collect();
    let layer = |digest| serde_json::json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": LENGTH});
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": put(b"{}"), "size": 2},
        "layers": digests.iter().map(layer).collect::<Vec<_>>(),
    })
    .to_string();
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": put(manifest.as_bytes()), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "registry.test/app:1"},
    }]});
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    digests.iter().map(|digest| digest.parse().unwrap()).collect()
}

fn start(node: &Node, folder: &Path) -> Spegel {
    let settings = Settings {
        program: env!("CARGO_BIN_EXE_spegel").into(),
        node: Some(node.clone()),
        address: node.address().into(),
        ports: Ports::default(),
        source: Source::Layout(folder.join("layout")),
        peers: vec![],
        arguments: vec![],
        log: folder.join(format!("{}.log", node.address())),
    };
    settings.start().unwrap()
}

fn mirror(network: &MemoryNetwork, name: &str, watch: Option<Watch>) -> Mirror {
    let router = network.join(&format!("asker-{name}"), SocketAddr::from(([10, 0, 0, 1], 5000)));
    let timeout = Duration::from_millis(500);
    let patient = MirrorSettings { resolve_timeout: timeout, watch, ..MirrorSettings::default() };
    Mirror::new(router, patient, MirrorMetrics::register(&mut Figures::default()))
}

fn wanted(digest: &Digest) -> Wanted {
    Wanted {
        key: Key::Digest(digest.clone()),
        target: format!("/v2/app/blobs/{digest}?ns=registry.test"),
        kind: Kind::Blob,
        head_only: false,
        range: None,
        total: None,
        repository: None,
        resumes: false,
        gate: None,
        node: Some(Arc::from("asker")),
        feeds_us: false,
        is_own: false,
        pull: None,
        wait: None,
        rank: None,
        tale: spegel::story::Tale::unheard(spegel::story::Trace::of(None)),
    }
}
