//! Real containerds, each with a root, a socket and a `certs.d` of its own.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::daemon::{Daemon, find_program, output};
use crate::netns::Node;

/// The version that is built with Go where Debian has 1.6 only.
const BUILT: &str = "2.2.7";

/// The namespace of the CRI, and of every test.
pub const NAMESPACE: &str = "k8s.io";

/// Which containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Debian 12's package: client-side pulls, configuration version 2.
    V1_6,
    /// Built by `go install`: the transfer service, configuration version 3.
    V2_2,
}

/// A version's programs.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// Which version they are.
    pub version: Version,
    /// The daemon.
    pub containerd: PathBuf,
    /// Its client of the same version.
    pub ctr: PathBuf,
}

/// What a containerd is started with.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Parallel fetch of one layer, in bytes a chunk: `concurrent_layer_fetch_buffer`, which only 2.1 and later know.
    pub layer_fetch_buffer: Option<u32>,
    /// The `config_path` of the CRI, if it is another than [`Containerd::certs_dir`].
    pub config_path: Option<String>,
    /// `discard_unpacked_layers`.
    pub discard_unpacked_layers: bool,
    /// Further variables of its environment, `NAME=VALUE`.
    pub environment: Vec<String>,
}

/// A running containerd on a node.
#[derive(Debug)]
pub struct Containerd {
    daemon: Option<Daemon>,
    binaries: Binaries,
    node: Node,
    folder: TempDir,
    snapshotter: &'static str,
    environment: Vec<String>,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1_6 => "1.6",
            Self::V2_2 => "2.2",
        })
    }
}

// === impl Version ===

impl Version {
    /// Both, the older first.
    pub const ALL: [Self; 2] = [Self::V1_6, Self::V2_2];

    /// The version's programs on this machine.
    ///
    /// # Errors
    /// What is missing, as a sentence to print beside a skipped test.
    pub fn find(self) -> Result<Binaries, String> {
        match self {
            Self::V1_6 => {
                let (Some(containerd), Some(ctr)) = (find_program("containerd"), find_program("ctr")) else {
                    return Err("containerd 1.6 is not installed (Debian package containerd)".into());
                };
                let said = output(Command::new(&containerd).arg("--version")).unwrap_or_default();
                if !said.contains(" 1.6.") {
                    return Err(format!("the containerd of this machine is not a 1.6: {}", said.trim()));
                }
                Ok(Binaries { version: self, containerd, ctr })
            }
            Self::V2_2 => {
                let folder = built_folder().ok_or("neither XDG_CACHE_HOME nor HOME is set")?;
                let (containerd, ctr) = (folder.join("containerd"), folder.join("ctr"));
                if !containerd.is_file() || !ctr.is_file() {
                    return Err(format!(
                        "containerd {BUILT} is not built: `cargo xtask test` does it where Go is installed"
                    ));
                }
                Ok(Binaries { version: self, containerd, ctr })
            }
        }
    }
}

/// Builds containerd 2.2 with Go into the cache folder; `Ok(false)` if it is there already.
///
/// # Errors
/// No Go, no module proxy, or a build that fails.
pub fn build() -> Result<bool> {
    if Version::V2_2.find().is_ok() {
        return Ok(false);
    }
    let go = find_program("go").context("Go is not installed")?;
    let folder = built_folder().context("neither XDG_CACHE_HOME nor HOME is set")?;
    // Built beside and moved, so that a build that is cut short leaves nothing that looks complete.
    fs::create_dir_all(&folder)?;
    let part = tempfile::tempdir_in(&folder)?;
    let module = "github.com/containerd/containerd/v2";
    for program in ["ctr", "containerd"] {
        let built = output(
            Command::new(&go)
                .args(["install", "-trimpath", "-ldflags", &format!("-s -w -X {module}/version.Version=v{BUILT}")])
                .arg(format!("{module}/cmd/{program}@v{BUILT}"))
                .env("GOBIN", part.path())
                .env("GOFLAGS", "-buildvcs=false")
                .env("CGO_ENABLED", "0"),
        );
        built.with_context(|| format!("build {program} {BUILT}"))?;
        fs::rename(part.path().join(program), folder.join(program))?;
    }
    Ok(true)
}

fn built_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("spegel-tests").join(format!("containerd-{BUILT}")))
}

// === impl Containerd ===

impl Containerd {
    /// Starts a containerd with an empty store.
    ///
    /// # Errors
    /// It does not answer within 30 seconds.
    pub fn start(binaries: &Binaries, node: &Node, options: &Options) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("spegel-ctd-").tempdir()?;
        let snapshotter = if overlay_works(folder.path()) { "overlayfs" } else { "native" };
        let environment = options.environment.clone();
        let (binaries, node) = (binaries.clone(), node.clone());
        let mut containerd = Self { daemon: None, binaries, node, folder, snapshotter, environment };
        fs::create_dir_all(containerd.certs_dir())?;
        fs::write(containerd.config_path(), containerd.config(options))?;
        containerd.restart()?;
        Ok(containerd)
    }

    /// Ends it, if it runs, and starts it on the same store.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        let program = self.binaries.containerd.display().to_string();
        let config = self.config_path().display().to_string();
        let mut command = vec!["env"];
        command.extend(self.environment.iter().map(String::as_str));
        command.extend([program.as_str(), "--config", &config, "--log-level", "info"]);
        let mut daemon = Daemon::start("containerd", Some(&self.node), &command, &self.folder.path().join("log"))?;
        daemon.wait_until(Duration::from_secs(30), "answer to `ctr version`", || self.ctr(&["version"]).is_ok())?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Ends it in good order.
    ///
    /// # Errors
    /// A process that does not end.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |daemon| daemon.stop().map(|_| ()))
    }

    /// Runs `ctr` in the CRI's namespace and returns what it prints.
    ///
    /// # Errors
    /// What `ctr` says.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        output(self.ctr_command().args(arguments))
    }

    /// Pulls for this machine's platform with `ctr`, by way of the mirrors in [`Containerd::certs_dir`].
    ///
    /// # Errors
    /// What `ctr` says.
    pub fn pull(&self, reference: &str) -> Result<()> {
        let hosts = self.certs_dir().display().to_string();
        self.ctr(&["images", "pull", "--hosts-dir", &hosts, "--snapshotter", self.snapshotter, reference]).map(|_| ())
    }

    /// [`Containerd::pull`] that is ended when it takes longer than `limit`.
    ///
    /// # Errors
    /// What `ctr` says, or the time is over.
    pub fn pull_within(&self, reference: &str, limit: Duration) -> Result<()> {
        let hosts = self.certs_dir().display().to_string();
        let mut command = self.node.command("timeout");
        command.arg(limit.as_secs().to_string()).arg(&self.binaries.ctr).arg("--address").arg(self.socket());
        command.args(["--namespace", NAMESPACE, "images", "pull", "--hosts-dir", &hosts]);
        output(command.args(["--snapshotter", self.snapshotter, reference])).map(|_| ())
    }

    /// Fetches an image's content for this machine's platform as a pull does, all layers at once, and does not unpack it.
    ///
    /// # Errors
    /// What `ctr` says, or the time is over.
    pub fn fetch_within(&self, reference: &str, limit: Duration) -> Result<()> {
        let hosts = self.certs_dir().display().to_string();
        let mut command = self.node.command("timeout");
        command.arg(limit.as_secs().to_string()).arg(&self.binaries.ctr).arg("--address").arg(self.socket());
        command.args(["--namespace", NAMESPACE, "content", "fetch", "--hosts-dir", &hosts]);
        output(command.arg(reference)).map(|_| ())
    }

    /// Puts the daemon's process into a control group, whose folder is given: connections that it opens from now on belong there.
    ///
    /// # Errors
    /// It does not run, or what the kernel says.
    pub fn enter_group(&self, group: &Path) -> Result<()> {
        let daemon = self.daemon.as_ref().context("containerd does not run")?;
        fs::write(group.join("cgroup.procs"), daemon.pid().to_string())
            .with_context(|| format!("move containerd to {}", group.display()))
    }

    /// Signals the daemon.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.daemon.as_ref().context("containerd does not run")?.signal(signal)
    }

    /// Imports an archive, without unpacking it, for every platform.
    ///
    /// # Errors
    /// What `ctr` says.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.ctr(&["images", "import", "--no-unpack", "--all-platforms", &archive.display().to_string()]).map(|_| ())
    }

    /// Removes a name and waits until what only that kept is collected.
    ///
    /// # Errors
    /// What `ctr` says.
    pub fn remove(&self, reference: &str) -> Result<()> {
        self.ctr(&["images", "remove", "--sync", reference]).map(|_| ())
    }

    /// Removes an image by every name that it has, and waits until its content is collected.
    ///
    /// The CRI notices what others pull and names it twice more, by `repository@digest` and by the digest of its configuration, a moment
    /// later: one name alone would keep the content.
    ///
    /// # Errors
    /// What `ctr` says, or a name that comes back for ten seconds.
    pub fn remove_with_aliases(&self, reference: &str) -> Result<()> {
        let digest = self.image_digest(reference)?.with_context(|| format!("the store has no image {reference}"))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let images = self.images()?;
            let names = images.iter().filter(|(_, target)| *target == digest).map(|(name, _)| name.as_str());
            let mut command = vec!["images", "remove", "--sync"];
            command.extend(names);
            if command.len() == 3 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the images {:?} come back when they are removed", &command[3..]);
            }
            self.ctr(&command)?;
        }
    }

    /// The digest that the store has for a name, if it has one.
    ///
    /// # Errors
    /// What `ctr` says.
    pub fn image_digest(&self, reference: &str) -> Result<Option<String>> {
        Ok(self.images()?.into_iter().find(|(name, _)| name == reference).map(|(_, digest)| digest))
    }

    /// Every name with the digest that it stands for.
    fn images(&self) -> Result<Vec<(String, String)>> {
        let list = self.ctr(&["images", "ls"])?;
        // Name, media type, digest; the first line says so.
        let images = list.lines().skip(1).filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            Some((name.to_owned(), words.find(|word| word.starts_with("sha256:"))?.to_owned()))
        });
        Ok(images.collect())
    }

    /// The digests of all complete blobs of the namespace.
    ///
    /// # Errors
    /// What `ctr` says.
    pub fn content(&self) -> Result<Vec<String>> {
        Ok(self.ctr(&["content", "ls", "--quiet"])?.split_whitespace().map(str::to_owned).collect())
    }

    /// Where a complete blob lies.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.content_path().join("blobs").join(digest.replacen(':', "/", 1))
    }

    /// The content directory, for `--containerd-content-path`.
    pub fn content_path(&self) -> PathBuf {
        self.folder.path().join("root/io.containerd.content.v1.content")
    }

    /// The gRPC socket, of `ctr`, spegel and the CRI.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// The one directory with `hosts.toml` files, for `ctr` and the CRI.
    pub fn certs_dir(&self) -> PathBuf {
        self.folder.path().join("certs.d")
    }

    /// Has it ask a registry itself, at `url`, for what the registry part `host` of a name stands for: without a mirror.
    ///
    /// # Errors
    /// The disk's.
    pub fn use_registry(&self, host: &str, url: &str) -> Result<()> {
        let folder = self.certs_dir().join(host);
        fs::create_dir_all(&folder)?;
        let text = format!("[host.'{url}']\ncapabilities = ['pull', 'resolve']\n");
        fs::write(folder.join("hosts.toml"), text).context("write hosts.toml")
    }

    /// The node that it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Which version it is.
    pub fn version(&self) -> Version {
        self.binaries.version
    }

    /// Everything that it has logged so far.
    pub fn log(&self) -> String {
        fs::read(self.folder.path().join("log"))
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    fn ctr_command(&self) -> Command {
        // 1.6's `ctr images pull` dials the registry itself, so it runs in the node too.
        let mut command = self.node.command(&self.binaries.ctr.display().to_string());
        command.arg("--address").arg(self.socket()).args(["--namespace", NAMESPACE]);
        command
    }

    /// Its configuration file, which it reads when it is started.
    pub fn config_path(&self) -> PathBuf {
        self.folder.path().join("config.toml")
    }

    fn config(&self, options: &Options) -> String {
        let folder = self.folder.path().display();
        let snapshotter = self.snapshotter;
        let discard = options.discard_unpacked_layers;
        let cri_path = options.config_path.clone().unwrap_or_else(|| self.certs_dir().display().to_string());
        let common = format!(
            "root = '{folder}/root'\nstate = '{folder}/state'\n\
             disabled_plugins = ['io.containerd.internal.v1.opt', 'io.containerd.nri.v1.nri',\n  \
             'io.containerd.snapshotter.v1.aufs', 'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.btrfs',\n  \
             'io.containerd.snapshotter.v1.devmapper', 'io.containerd.snapshotter.v1.erofs', 'io.containerd.snapshotter.v1.zfs']\n\
             [grpc]\naddress = '{folder}/containerd.sock'\n[ttrpc]\naddress = '{folder}/containerd.sock.ttrpc'\n"
        );
        let cni = format!("bin_dir = '{folder}/cni'\nconf_dir = '{folder}/cni'\n");
        match self.binaries.version {
            Version::V1_6 => format!(
                "version = 2\n{common}\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = '{snapshotter}'\ndiscard_unpacked_layers = {discard}\n\
                 [plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{cri_path}'\n\
                 [plugins.'io.containerd.grpc.v1.cri'.cni]\n{cni}"
            ),
            Version::V2_2 => {
                let buffer = options
                    .layer_fetch_buffer
                    .map_or(String::new(), |n| format!("concurrent_layer_fetch_buffer = {n}\n"));
                format!(
                    "version = 3\n{common}\
                     [plugins.'io.containerd.cri.v1.images']\nsnapshotter = '{snapshotter}'\ndiscard_unpacked_layers = {discard}\n\
                     [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{cri_path}'\n\
                     [plugins.'io.containerd.transfer.v1.local']\nconfig_path = '{folder}/certs.d'\n{buffer}\
                     [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\n\
                     platform = 'linux'\nsnapshotter = '{snapshotter}'\n\
                     [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['{folder}/cni']\nconf_dir = '{folder}/cni'\n"
                )
            }
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // In good order, so that no mount is left in the folder that goes next.
        let _ = self.stop();
    }
}

/// Whether overlayfs can be mounted over this folder's file system.
fn overlay_works(folder: &Path) -> bool {
    let script = "cd \"$0\" && mkdir -p o/l o/u o/w o/m && mount -t overlay overlay -o lowerdir=o/l,upperdir=o/u,workdir=o/w o/m";
    output(Command::new("unshare").args(["--mount", "sh", "-c", script]).arg(folder)).is_ok()
}

/// Fails unless a store has the named blobs with the content that their digests say.
///
/// # Errors
/// The first blob that is missing or wrong.
pub fn check_content<'a>(containerd: &Containerd, digests: impl IntoIterator<Item = &'a str>) -> Result<()> {
    let listed = containerd.content()?;
    for digest in digests {
        if !listed.iter().any(|have| have == digest) {
            bail!("the store lacks {digest}");
        }
        let found = crate::image::digest_of_file(&containerd.blob_path(digest))?;
        if found != digest {
            bail!("the store's {digest} has the content of {found}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::image::{Compression, ImageBuilder};
    use crate::netns::Lab;
    use crate::registry::Registry;

    /// What the end-to-end tests rely on, without a mirror: pulls, imports and removals by each containerd.
    #[test]
    fn each_version_pulls_from_a_registry() {
        if let Err(reason) = Lab::available().and(Registry::available()) {
            println!("skipped: {reason}");
            return;
        }
        let mut lab = Lab::new().unwrap();
        let registry = Registry::start(&lab.add_node().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let image = ImageBuilder::new(format!("{}/app:1", registry.host()))
            .platforms(&["linux/amd64", "linux/arm64"])
            .layers(2, 100_000, Compression::Gzip, 1)
            .layers(1, 100_000, Compression::Zstd, 1)
            .build(dir.path())
            .unwrap();
        image.push(&registry.url()).unwrap();
        for version in Version::ALL {
            let binaries = match version.find() {
                Ok(binaries) => binaries,
                Err(reason) => {
                    println!("skipped for containerd {version}: {reason}");
                    continue;
                }
            };
            let containerd = Containerd::start(&binaries, &lab.add_node().unwrap(), &Options::default()).unwrap();
            containerd.use_registry(&registry.host(), &registry.url()).unwrap();
            let before = registry.requests("GET", "/blobs/");
            containerd.pull(image.reference()).unwrap();
            assert!(registry.requests("GET", "/blobs/") >= before + 3);
            assert_eq!(
                containerd.image_digest(image.reference()).unwrap().as_deref(),
                Some(image.root().digest.as_str())
            );
            let platform = crate::image::host_platform();
            check_content(&containerd, image.contents_for(platform).map(|content| content.digest.as_str())).unwrap();
            containerd.remove_with_aliases(image.reference()).unwrap();
            assert_eq!(containerd.image_digest(image.reference()).unwrap(), None);
            assert_eq!(containerd.content().unwrap(), [""; 0], "garbage is collected");

            let archive = dir.path().join("image.tar");
            image.write_archive(&archive).unwrap();
            containerd.import(&archive).unwrap();
            check_content(&containerd, image.contents().iter().map(|content| content.digest.as_str())).unwrap();
        }
    }
}
