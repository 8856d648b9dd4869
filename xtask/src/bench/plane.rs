//! Where the data plane is measured: one namespace under reno, servers on one core, clients on the other, everything on the
//! namespace's own addresses.

mod bulk;
mod cold;
mod ebpf;
mod everything;
mod many;
mod memory;
mod paired;
mod requests;
mod rivals;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};
use spegel_benches::daemon::output;
use spegel_benches::netns::{Lab, Node};

pub(super) use bulk::{relay, serve};
pub(super) use cold::cold;
pub(super) use ebpf::ebpf;
pub(super) use everything::everything;
pub(super) use many::connections;
pub(super) use memory::memory;
pub(super) use requests::{mixed, small};
pub(super) use rivals::{Rival, Running};

/// The core of the servers; clients and what servers ask have the other.
const SERVER_CORE: usize = 0;
const CLIENT_CORE: usize = 1;

/// What every bench of the data plane has in common, for the text beside the figures.
pub(super) const GROUND: &str = "One network namespace, loopback, congestion control reno; server started on core 0 alone, client (and a \
relay's upstream) to core 1; rivals run one after the other in each round, figures are medians of the rounds. CPU is the server \
process's alone, from schedstat, all threads. spegel logs warnings only, as nginx logs no accesses. ";

/// Addresses for relays.
const RELAYS: u16 = 4;

/// The name of the image that is served.
const REPOSITORY: &str = "bench/app";
const REGISTRY: &str = "registry.test";
/// Its config.
const CONFIG: &[u8] = b"{}";

/// The namespace, the content, and a folder that goes with it.
pub(super) struct Plane {
    pub(super) folder: tempfile::TempDir,
    pub(super) node: Node,
    pub(super) settings: Settings,
    blob: String,
    manifest: String,
    // Removed last.
    _lab: Lab,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// The program under test.
    pub(super) program: PathBuf,
    /// Rounds whose median is told.
    pub(super) rounds: usize,
    /// The large blob, in MiB.
    pub(super) mib: u64,
}

// === impl Plane ===

impl Plane {
    /// # Errors
    /// No namespaces here, or no room on the disk.
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        Lab::available().map_err(anyhow::Error::msg)?;
        let mut lab = Lab::new()?;
        let node = lab.add_node()?;
        for number in 0..RELAYS {
            let address = format!("{}/24", relay_address(&node, number));
            output(node.command("ip").args(["address", "add", &address, "dev", "eth0"]))?;
        }
        output(node.command("sysctl").args(["-q", "-w", "net.ipv4.tcp_congestion_control=reno"]))?;
        // Above the servers' ports: of 10,000 clients one would have nginx's.
        output(node.command("sysctl").args(["-q", "-w", "net.ipv4.ip_local_port_range=10000 65000"]))?;
        let folder = tempfile::Builder::new().prefix("spegel-bench-").tempdir_in(crate::root().join("target"))?;
        let (blob, manifest) = write_layout(&folder.path().join("layout"), settings.mib << 20)?;
        empty_layout(&folder.path().join("empty"))?;
        Ok(Self { folder, node, settings: settings.clone(), blob, manifest, _lab: lab })
    }

    pub(super) fn address(&self) -> IpAddr {
        self.node.address().into()
    }

    /// Another address of the namespace, for a process on the same port.
    pub(super) fn relay_address(&self, number: u16) -> IpAddr {
        relay_address(&self.node, number).into()
    }

    pub(super) fn layout(&self) -> PathBuf {
        self.folder.path().join("layout")
    }

    /// The large blob's file.
    pub(super) fn blob_file(&self) -> PathBuf {
        self.layout().join("blobs/sha256").join(&self.blob)
    }

    pub(super) fn blob_path(&self) -> String {
        format!("/v2/{REPOSITORY}/blobs/sha256:{}?ns={REGISTRY}", self.blob)
    }

    pub(super) fn manifest_path(&self) -> String {
        format!("/v2/{REPOSITORY}/manifests/sha256:{}?ns={REGISTRY}", self.manifest)
    }

    /// The image's config, of two bytes.
    pub(super) fn config_path(&self) -> String {
        format!("/v2/{REPOSITORY}/blobs/sha256:{}?ns={REGISTRY}", hex::encode(Sha256::digest(CONFIG)))
    }

    pub(super) fn tag_path(&self) -> String {
        format!("/v2/{REPOSITORY}/manifests/latest?ns={REGISTRY}")
    }

    /// Where a server that serves files finds one, from the layout's root on.
    pub(super) fn file_path(&self, is_blob: bool) -> String {
        format!("/blobs/sha256/{}", if is_blob { &self.blob } else { &self.manifest })
    }

    /// Runs a client to its end and returns what it tells.
    ///
    /// # Errors
    /// The client's.
    pub(super) fn client<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let text = output(&mut self.helper(CLIENT_CORE, arguments)?)?;
        serde_json::from_str(text.trim()).with_context(|| format!("what the client told: {text}"))
    }

    /// Starts a client that holds what it has until its input is closed, and waits until it has it.
    ///
    /// # Errors
    /// The client's.
    pub(super) fn hold(&self, arguments: &[&str]) -> Result<Child> {
        let mut command = self.helper(CLIENT_CORE, arguments)?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        ensure!(!line.is_empty(), "the client ended early");
        Ok(child)
    }

    /// A helper of ours in the namespace, on a core.
    fn helper(&self, core: usize, arguments: &[&str]) -> Result<Command> {
        let mut command = self.node.command("taskset");
        command.args(["-c", &core.to_string()]).arg(std::env::current_exe()?).arg("bench-helper").args(arguments);
        Ok(command)
    }
}

fn relay_address(node: &Node, number: u16) -> Ipv4Addr {
    let [a, b, c, _] = node.address().octets();
    Ipv4Addr::new(a, b, c, 200 + number.min(RELAYS) as u8)
}

/// A layout with one image: a manifest of 2 KiB and a large blob. The blob's name is not its digest; nothing here looks.
fn write_layout(folder: &Path, length: u64) -> Result<(String, String)> {
    empty_layout(folder)?;
    let blobs = folder.join("blobs/sha256");
    let blob = "5be9e1".repeat(10) + "0b10";
    let mut file = std::fs::File::create(blobs.join(&blob))?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut chunk = vec![0_u8; 1 << 20];
    for _ in 0..length >> 20 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let put = |bytes: &[u8]| -> Result<String> {
        let hex = hex::encode(Sha256::digest(bytes));
        std::fs::write(blobs.join(&hex), bytes)?;
        Ok(hex)
    };
    let config = put(CONFIG)?;
    let text = |filler: &str| {
        serde_json::json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{config}"), "size": 2},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": format!("sha256:{blob}"), "size": length}],
            "annotations": {"filler": filler},
        })
        .to_string()
    };
    let manifest = text(&"x".repeat(2048 - text("").len()));
    let size = manifest.len();
    let manifest = put(manifest.as_bytes())?;
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{manifest}"), "size": size,
        "annotations": {"org.opencontainers.image.ref.name": format!("{REGISTRY}/{REPOSITORY}:latest")},
    }]});
    std::fs::write(folder.join("index.json"), index.to_string())?;
    Ok((blob, manifest))
}

fn empty_layout(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder.join("blobs/sha256"))?;
    std::fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    Ok(std::fs::write(folder.join("index.json"), "{\"schemaVersion\":2,\"manifests\":[]}")?)
}

/// The median of figures that each round gave; 0 without any.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

pub(super) fn socket(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}
