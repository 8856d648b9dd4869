//! Nodes with a containerd and a spegel each, beside an upstream registry.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use spegel_benches::containerd::{Containerd, Options, Version, check_content};
use spegel_benches::daemon::wait_until;
use spegel_benches::http::{Client, Head};
use spegel_benches::image::{Image, ImageBuilder, host_platform};
use spegel_benches::netns::{Lab, Node};
use spegel_benches::registry::Registry;
use spegel_benches::spegel::{Settings, Spegel, configure};
use tempfile::TempDir;

/// The program under test.
pub(super) const PROGRAM: &str = env!("CARGO_BIN_EXE_spegel");

/// How long an image may take from a store to a peer's answer; far above what it takes.
pub(super) const NOTICED: Duration = Duration::from_secs(20);

/// The default of 20 ms is for release builds on machines with a core to spare. Where nobody has anything the answer comes as soon as the
/// router knows that, whatever this is.
pub(super) const RESOLVE_TIMEOUT: &str = "1s";

/// Everything; what is declared first ends first.
pub(super) struct Cluster {
    pub(super) nodes: Vec<Member>,
    pub(super) upstream: Registry,
    pub(super) folder: TempDir,
    pub(super) lab: Lab,
    /// Further arguments of each spegel.
    arguments: Vec<String>,
    program: PathBuf,
}

/// One node.
pub(super) struct Member {
    pub(super) spegel: Option<Spegel>,
    pub(super) containerd: Containerd,
}

// === impl Cluster ===

impl Cluster {
    /// Nodes whose containerds ask their own mirror first and then the upstream registry; none, with the reason printed, where this machine
    /// cannot have them.
    pub(super) fn start(version: Version, size: usize, options: &Options) -> Option<Self> {
        Self::start_with(version, size, options, &[])
    }

    /// The same, with further arguments of each spegel.
    pub(super) fn start_with(version: Version, size: usize, options: &Options, arguments: &[&str]) -> Option<Self> {
        Self::start_by(Path::new(PROGRAM), version, size, options, arguments)
    }

    /// The same, by another program, which becomes the one under test.
    pub(super) fn start_by(
        program: &Path,
        version: Version,
        size: usize,
        options: &Options,
        arguments: &[&str],
    ) -> Option<Self> {
        let ready = Lab::available().and(Registry::available()).and(version.find());
        let binaries = match ready {
            Ok(binaries) => binaries,
            Err(reason) => {
                println!("skipped: {reason}");
                return None;
            }
        };
        let mut lab = Lab::new().unwrap();
        let upstream = Registry::start(&lab.add_node().unwrap()).unwrap();
        let nodes: Vec<Node> = (0..size).map(|_| lab.add_node().unwrap()).collect();
        let members = nodes
            .iter()
            .map(|node| Member { spegel: None, containerd: Containerd::start(&binaries, node, options).unwrap() });
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let (nodes, folder) = (members.collect(), tempfile::tempdir().unwrap());
        let mut cluster = Self { nodes, upstream, folder, lab, arguments, program: program.to_path_buf() };
        cluster.start_mirrors();
        Some(cluster)
    }

    fn start_mirrors(&mut self) {
        let settings: Vec<Settings> = (0..self.nodes.len()).map(|n| self.settings(n)).collect();
        // Before they start, as on a node, since they look whether containerd is told of them.
        for (member, settings) in self.nodes.iter().zip(&settings) {
            let (certs, name) = (member.containerd.certs_dir(), settings.address.to_string());
            let url = format!("http://{}", SocketAddr::new(settings.address, settings.ports.registry));
            configure(Path::new(PROGRAM), &certs, &url, &[&self.upstream.url()], &name).unwrap();
        }
        // All at once: each needs another to be ready.
        let mut started: Vec<Spegel> = settings.into_iter().map(|settings| settings.spawn().unwrap()).collect();
        for (member, mut spegel) in self.nodes.iter_mut().zip(started.drain(..)) {
            spegel.wait_ready(Duration::from_secs(30)).unwrap();
            member.spegel = Some(spegel);
        }
    }

    /// What node `n`'s spegel is started with.
    pub(super) fn settings(&self, n: usize) -> Settings {
        let peers: Vec<_> = self.nodes.iter().map(|member| member.containerd.node().address().into()).collect();
        let log = self.folder.path().join(format!("spegel-{n}.log"));
        let mut settings = Settings::on_node(&self.program, &self.nodes[n].containerd, &peers, &log);
        settings.arguments = vec!["--mirror-resolve-timeout".into(), RESOLVE_TIMEOUT.into()];
        let certs = self.nodes[n].containerd.certs_dir().display().to_string();
        settings.arguments.extend(["--containerd-registry-config-path".into(), certs]);
        settings.arguments.extend(self.arguments.iter().cloned());
        settings
    }

    /// Makes an image that is named after the upstream registry, and pushes it there.
    pub(super) fn push(&self, name: &str, describe: impl FnOnce(ImageBuilder) -> ImageBuilder) -> Image {
        let image = self.make(name, describe);
        image.push(&self.upstream.url()).unwrap();
        image
    }

    /// Makes an image that is named after the upstream registry.
    pub(super) fn make(&self, name: &str, describe: impl FnOnce(ImageBuilder) -> ImageBuilder) -> Image {
        let builder = describe(ImageBuilder::new(format!("{}/{name}", self.upstream.host())));
        builder.build(&self.folder.path().join("images")).unwrap()
    }

    /// Waits until node `n`'s mirror can resolve the tag, from itself or by way of a peer.
    pub(super) fn wait_resolved(&self, n: usize, image: &Image) {
        let member = &self.nodes[n];
        wait_until(NOTICED, "answer for the tag", || member.head(image, image.tag()).status == 200)
            .unwrap_or_else(|error| panic!("{}: {error}\n{}", image.reference(), member.spegel().daemon.log()));
    }
}

// === impl Member ===

impl Member {
    pub(super) fn spegel(&self) -> &Spegel {
        self.spegel.as_ref().unwrap()
    }

    /// `manifests` of the node's mirror as its containerd would ask, by tag or digest.
    pub(super) fn head(&self, image: &Image, name: &str) -> Head {
        Client::new(Duration::from_secs(10)).head(&self.url(image, "manifests", name), &[]).unwrap()
    }

    /// A path of the distribution API at the node's mirror.
    pub(super) fn url(&self, image: &Image, kind: &str, name: &str) -> String {
        format!("{}/v2/{}/{kind}/{name}?ns={}", self.spegel().url(), image.repository(), image.registry())
    }

    /// Pulls with `ctr`, and checks what is stored then.
    #[track_caller]
    pub(super) fn pull(&self, image: &Image, reference: &str) {
        if let Err(error) = self.containerd.pull(reference) {
            panic!("{error:#}\nspegel:\n{}\ncontainerd:\n{}", self.spegel().daemon.log(), self.containerd.log());
        }
        self.check(image, reference);
    }

    /// Pulls through the CRI, and checks what is stored then.
    #[track_caller]
    pub(super) fn pull_by_cri(&self, image: &Image, reference: &str) {
        if let Err(error) = super::cri::pull(&self.containerd.socket(), reference) {
            panic!("{error}\nspegel:\n{}\ncontainerd:\n{}", self.spegel().daemon.log(), self.containerd.log());
        }
        self.check(image, reference);
    }

    /// The store has the image under its name, and every blob of this machine's platform with the content that its digest says.
    #[track_caller]
    pub(super) fn check(&self, image: &Image, reference: &str) {
        assert_eq!(self.containerd.image_digest(reference).unwrap().as_deref(), Some(image.root().digest.as_str()));
        let needed = image.contents_for(host_platform()).map(|content| content.digest.as_str());
        check_content(&self.containerd, needed).unwrap();
    }
}

/// `registry/repository@digest`.
pub(super) fn by_digest(image: &Image) -> String {
    format!("{}/{}@{}", image.registry(), image.repository(), image.root().digest)
}
