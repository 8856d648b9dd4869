//! The reference peer on go-libp2p, whose source is `spegel/tests/interop`.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::daemon::{find_program, output};

/// How long one command may take; the peer itself gives up a little earlier.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(40);

/// What encrypts the connections that it makes and takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// Noise only.
    Noise,
    /// TLS only.
    Tls,
}

/// How a peer is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens for peers.
    pub listen: SocketAddr,
    /// What it speaks.
    pub security: Security,
    /// What its identity is made of; the same text makes the same identity.
    pub seed: String,
    /// How long it keeps records of others.
    pub max_age: Duration,
    /// The key of a private network.
    pub network_key: Option<PathBuf>,
}

/// A provider that it found: the identity, and its multiaddresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The identity.
    pub id: String,
    /// Where it says that the provider is.
    pub addresses: Vec<String>,
}

/// A running peer. It ends when this is dropped, or with the thread that started it.
#[derive(Debug)]
pub struct GoPeer {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    id: String,
    listen: SocketAddr,
}

/// The built program.
///
/// # Errors
/// What is missing, as a sentence to print beside a skipped test.
pub fn find() -> Result<PathBuf, String> {
    let file = built().map_err(|error| format!("{error:#}"))?;
    if file.is_file() {
        return Ok(file);
    }
    Err("the reference peer is not built: `cargo xtask test` does it where Go is installed".into())
}

/// Builds it with Go into the cache folder, once for each state of its source.
///
/// # Errors
/// No Go, no module proxy, or a build that fails.
pub fn build() -> Result<PathBuf> {
    let file = built()?;
    if file.is_file() {
        return Ok(file);
    }
    let go = find_program("go").context("Go is not installed")?;
    let folder = file.parent().context("the cache folder has a name")?;
    // Built beside and moved, so that a build that is cut short leaves nothing that looks complete.
    fs::create_dir_all(folder)?;
    let part = tempfile::tempdir_in(folder)?;
    let built = part.path().join("peer");
    output(
        Command::new(go)
            .args(["build", "-trimpath", "-ldflags", "-s -w", "-o"])
            .arg(&built)
            .arg(".")
            .env("GOFLAGS", "-buildvcs=false -mod=readonly")
            .current_dir(source()),
    )
    .context("build the reference peer")?;
    fs::rename(&built, &file)?;
    Ok(file)
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../spegel/tests/interop")
}

fn built() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME")
        .or_else(|| Some(set("HOME")?.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    let mut hash = Sha256::new();
    for file in ["main.go", "go.mod", "go.sum"] {
        hash.update(fs::read(source().join(file)).with_context(|| format!("read {file} of the reference peer"))?);
    }
    let state = hex::encode(&hash.finalize()[..6]);
    Ok(cache.join("spegel-tests").join(format!("go-peer-{state}")).join("peer"))
}

// === impl GoPeer ===

impl GoPeer {
    /// Starts one and waits until it listens.
    ///
    /// # Errors
    /// It is not built, or does not start.
    pub fn start(options: &Options) -> Result<Self> {
        let program = find().map_err(anyhow::Error::msg)?;
        let security = match options.security {
            Security::Noise => "noise",
            Security::Tls => "tls",
        };
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program);
        command.arg(format!("--listen={}", multiaddress(options.listen))).arg(format!("--security={security}"));
        command.arg(format!("--seed={}", options.seed)).arg(format!("--max-age={}ms", options.max_age.as_millis()));
        if let Some(key) = &options.network_key {
            command.arg("--network-key-file").arg(key);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start setpriv")?;
        let input = child.stdin.take().context("the peer has no input")?;
        let output = BufReader::new(child.stdout.take().context("the peer has no output")?);
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut peer = Self { child, input, lines, id: String::new(), listen: options.listen };
        let ready = peer.line()?;
        peer.id = ready.strip_prefix("ready ").with_context(|| format!("not ready but: {ready}"))?.to_owned();
        Ok(peer)
    }

    /// Its identity.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it listens.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Connects to a peer.
    ///
    /// # Errors
    /// It cannot.
    pub fn connect(&mut self, to: SocketAddr, id: &str) -> Result<()> {
        self.command(&format!("connect {}/p2p/{id}", multiaddress(to)))?;
        self.expect("connected")
    }

    /// Tells the network that it has the keys, with a walk for each.
    ///
    /// # Errors
    /// It cannot.
    pub fn provide(&mut self, keys: &[String]) -> Result<()> {
        self.command(&format!("provide {}", keys.join(" ")))?;
        self.expect(&format!("provided {}", keys.len()))
    }

    /// Begins to tell the network that it has the keys `sha256:%064x` from `first` on, by region.
    ///
    /// # Errors
    /// It cannot.
    pub fn sweep(&mut self, first: u64, count: u64) -> Result<()> {
        self.command(&format!("sweep {first} {count}"))?;
        self.expect(&format!("swept {count}"))
    }

    /// Looks for all providers of a key.
    ///
    /// # Errors
    /// It does not answer.
    pub fn find(&mut self, key: &str) -> Result<Vec<Found>> {
        self.command(&format!("find {key}"))?;
        self.list()
    }

    /// The providers of a key that it was told.
    ///
    /// # Errors
    /// It does not answer.
    pub fn stored(&mut self, key: &str) -> Result<Vec<Found>> {
        self.command(&format!("stored {key}"))?;
        self.list()
    }

    /// How many peers its routing table has.
    ///
    /// # Errors
    /// It does not answer.
    pub fn peers(&mut self) -> Result<usize> {
        self.command("peers")?;
        let line = self.line()?;
        line.strip_prefix("peers ").and_then(|count| count.parse().ok()).with_context(|| line.clone())
    }

    fn command(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}").context("the reference peer has ended")
    }

    fn expect(&mut self, wanted: &str) -> Result<()> {
        let line = self.line()?;
        anyhow::ensure!(line == wanted, "the reference peer says {line:?} instead of {wanted:?}");
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        loop {
            let line = self.line()?;
            let mut words = line.split(' ');
            match (words.next(), words.next(), words.next()) {
                (Some("found"), Some(id), addresses) => {
                    let addresses = addresses.unwrap_or_default().split(',').filter(|address| !address.is_empty());
                    all.push(Found { id: id.to_owned(), addresses: addresses.map(str::to_owned).collect() });
                }
                (Some("end"), ..) => return Ok(all),
                _ => bail!("the reference peer says {line:?} instead of a provider"),
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        self.lines.recv_timeout(COMMAND_TIMEOUT).map_err(|error| match error {
            RecvTimeoutError::Timeout => anyhow::anyhow!("the reference peer says nothing for {COMMAND_TIMEOUT:?}"),
            RecvTimeoutError::Disconnected => anyhow::anyhow!("the reference peer has ended"),
        })
    }
}

impl Drop for GoPeer {
    fn drop(&mut self) {
        // Failing means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn multiaddress(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) => format!("/ip4/{ip}/tcp/{}", address.port()),
        IpAddr::V6(ip) => format!("/ip6/{ip}/tcp/{}", address.port()),
    }
}
