//! The servers that are compared.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use spegel_benches::daemon::{Daemon, find_program};
use spegel_benches::spegel::{Ports, Settings, Source};

use super::{CLIENT_CORE, Plane, SERVER_CORE, socket};

/// Ports of the rivals that serve files or relay.
const NGINX: u16 = 8080;
const NGINX_PROXY: u16 = 8081;
const BARE: u16 = 8082;
/// spegel's registry port, and the first of its other ports.
const REGISTRY: u16 = 5000;

/// A server to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rival {
    /// The program under test, on an engine, by the kernel's or our own copying.
    Spegel { engine: &'static str, transfer: &'static str },
    /// nginx from Debian, sendfile on.
    Nginx,
    /// nginx as a proxy with 16 buffers of 256 KiB.
    NginxProxy,
    /// A bare loop of sendfile(2).
    Sendfile,
    /// A bare loop of splice(2) with a pipe of 1 MiB.
    Splice,
    /// A bare loop of epoll(7), recv(2) and send(2), for small answers.
    Answer,
}

/// A server that runs.
pub(crate) struct Running {
    pub(crate) rival: Rival,
    pub(crate) address: SocketAddr,
    pub(crate) daemon: Daemon,
}

// === impl Rival ===

impl Rival {
    pub(crate) const IO_URING: Self = Self::Spegel { engine: "io-uring", transfer: "zerocopy" };
    pub(crate) const TOKIO: Self = Self::Spegel { engine: "tokio", transfer: "zerocopy" };
    pub(crate) const COPY: Self = Self::Spegel { engine: "tokio", transfer: "copy" };

    pub(crate) fn name(self) -> String {
        match self {
            Self::Spegel { engine, transfer: "zerocopy" } => format!("spegel, {engine}"),
            Self::Spegel { .. } => "spegel, copying".to_owned(),
            Self::Nginx => "nginx".to_owned(),
            Self::NginxProxy => "nginx, proxy".to_owned(),
            Self::Sendfile => "sendfile(2) alone".to_owned(),
            Self::Splice => "splice(2) alone".to_owned(),
            Self::Answer => "recv(2) and send(2) alone".to_owned(),
        }
    }

    /// Starts it on the servers' core, to serve the layout.
    ///
    /// # Errors
    /// A program that is missing, or does not answer.
    pub(crate) fn serve(self, plane: &Plane, number: u16) -> Result<Running> {
        match self {
            Self::Spegel { engine, transfer } => start_spegel(
                &plane.settings.program,
                plane,
                self,
                engine,
                transfer,
                number,
                &plane.layout(),
                None,
                SERVER_CORE,
            ),
            Self::Nginx => {
                let server = format!("listen {}; root {};", socket(plane.address(), NGINX), plane.layout().display());
                start_nginx(plane, self, &server, NGINX)
            }
            Self::Sendfile => {
                let file = plane.blob_file();
                start_bare(
                    plane,
                    self,
                    &["sendfile", &socket(plane.address(), BARE).to_string(), &file.to_string_lossy()],
                )
            }
            Self::Answer => start_bare(plane, self, &["answer", &socket(plane.address(), BARE).to_string(), "2048"]),
            Self::NginxProxy | Self::Splice => anyhow::bail!("{} serves no files", self.name()),
        }
    }

    /// Starts spegel on the servers' core by another program, which becomes it, to serve the layout.
    ///
    /// # Errors
    /// It is no spegel, or does not answer.
    pub(crate) fn serve_by(self, plane: &Plane, number: u16, program: &Path) -> Result<Running> {
        let Self::Spegel { engine, transfer } = self else { anyhow::bail!("{} is not spegel", self.name()) };
        start_spegel(program, plane, self, engine, transfer, number, &plane.layout(), None, SERVER_CORE)
    }

    /// Starts it on the servers' core, to relay from `upstream`.
    ///
    /// # Errors
    /// A program that is missing, or does not answer.
    pub(crate) fn relay(self, plane: &Plane, number: u16, upstream: SocketAddr) -> Result<Running> {
        match self {
            Self::Spegel { engine, transfer } => {
                let empty = plane.folder.path().join("empty");
                start_spegel(
                    &plane.settings.program,
                    plane,
                    self,
                    engine,
                    transfer,
                    number,
                    &empty,
                    Some(upstream),
                    SERVER_CORE,
                )
            }
            Self::NginxProxy => {
                let server = format!(
                    "listen {}; location / {{ proxy_pass http://{upstream}; proxy_http_version 1.1; \
                     proxy_set_header Connection \"\"; proxy_buffer_size 256k; proxy_buffers 16 256k; \
                     proxy_busy_buffers_size 512k; proxy_max_temp_file_size 0; }}",
                    socket(plane.address(), NGINX_PROXY)
                );
                start_nginx(plane, self, &server, NGINX_PROXY)
            }
            Self::Splice => {
                let listen = socket(plane.address(), BARE).to_string();
                start_bare(plane, self, &["splice", &listen, &upstream.to_string()])
            }
            Self::Nginx | Self::Sendfile | Self::Answer => anyhow::bail!("{} relays nothing", self.name()),
        }
    }
}

/// The peer that relays fetch from: spegel on the clients' core.
///
/// # Errors
/// It does not come up.
pub(super) fn upstream(plane: &Plane) -> Result<Running> {
    start_spegel(
        &plane.settings.program,
        plane,
        Rival::TOKIO,
        "tokio",
        "zerocopy",
        9,
        &plane.layout(),
        None,
        CLIENT_CORE,
    )
}

/// The port of a spegel's figures.
pub(super) fn metrics_port(number: u16) -> u16 {
    9090 + 10 * number
}

#[allow(clippy::too_many_arguments)]
fn start_spegel(
    program: &Path,
    plane: &Plane,
    rival: Rival,
    engine: &str,
    transfer: &str,
    number: u16,
    layout: &Path,
    upstream: Option<SocketAddr>,
    core: usize,
) -> Result<Running> {
    // Peers have one registry port for all, so each relay has an address of its own.
    let (address, registry) = match upstream {
        Some(_) => (plane.relay_address(number), REGISTRY),
        None if core == CLIENT_CORE => (plane.address(), REGISTRY),
        None => (plane.address(), REGISTRY + 10 * (number + 1)),
    };
    let ports = Ports { registry, router: 5001 + 10 * number, metrics: metrics_port(number) };
    let arguments =
        ["--log-level", "WARN", "--serve-engine", engine, "--serve-transfer", transfer, "--max-connections", "20000"];
    let mut settings = Settings {
        program: program.to_path_buf(),
        node: Some(plane.node.clone()),
        address,
        ports,
        source: Source::Layout(layout.to_path_buf()),
        peers: Vec::new(),
        arguments: arguments.map(str::to_owned).to_vec(),
        log: plane.folder.path().join(format!("spegel-{number}.log")),
    };
    if upstream.is_some() {
        // The upstream's router: see `upstream`.
        let router = SocketAddr::new(plane.address(), 5001 + 90).to_string();
        settings.arguments.extend(["--static-bootstrap-peers".to_owned(), router]);
    }
    let spegel = on_core(core, || settings.start())?;
    Ok(Running { rival, address: socket(address, registry), daemon: spegel.daemon })
}

fn start_nginx(plane: &Plane, rival: Rival, server: &str, port: u16) -> Result<Running> {
    install_nginx()?;
    let folder = plane.folder.path().join(format!("nginx-{port}"));
    fs::create_dir_all(&folder)?;
    let config = format!(
        "daemon off; master_process off; error_log stderr warn; pid {0}/pid;\n\
         worker_rlimit_nofile 40000; events {{ worker_connections 30000; }}\n\
         http {{ access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 600;\n\
         open_file_cache max=1000; default_type application/octet-stream;\n\
         client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e;\n\
         server {{ {server} }} }}\n",
        folder.display()
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, config)?;
    let program = find_program("nginx").context("nginx is not installed")?;
    let prefix = folder.display().to_string();
    let command = [&program.to_string_lossy(), "-p", &prefix, "-c", &path.to_string_lossy()].map(str::to_owned);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let daemon =
        on_core(SERVER_CORE, || Daemon::start(&rival.name(), Some(&plane.node), &command, &folder.join("log")))?;
    up(plane, rival, daemon, port)
}

fn start_bare(plane: &Plane, rival: Rival, arguments: &[&str]) -> Result<Running> {
    let program = std::env::current_exe()?;
    let program = program.to_string_lossy();
    let command: Vec<&str> = [&*program, "bench-helper"].into_iter().chain(arguments.iter().copied()).collect();
    let log = plane.folder.path().join("bare.log");
    let daemon = on_core(SERVER_CORE, || Daemon::start(&rival.name(), Some(&plane.node), &command, &log))?;
    up(plane, rival, daemon, BARE)
}

/// Waits for the port.
fn up(plane: &Plane, rival: Rival, mut daemon: Daemon, port: u16) -> Result<Running> {
    let address = socket(plane.address(), port);
    daemon.wait_until(Duration::from_secs(10), "an open port", || std::net::TcpStream::connect(address).is_ok())?;
    Ok(Running { rival, address, daemon })
}

/// Installs nginx where it is missing. Its service is not started: whether it is, is the machine's matter.
fn install_nginx() -> Result<()> {
    if find_program("nginx").is_none() {
        crate::test::install_packages(&["nginx-light"])?;
    }
    Ok(())
}

/// Starts a process on one core from its first instruction on, so that it finds no more cores than it has.
pub(super) fn on_core<T>(core: usize, start: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = sched_getaffinity(None)?;
    let mut only = CpuSet::new();
    only.set(core);
    sched_setaffinity(None, &only)?;
    let started = start();
    sched_setaffinity(None, &before)?;
    started
}

// === impl Running ===

impl Running {
    /// Seconds on a core so far, of all threads that live.
    ///
    /// # Errors
    /// The process is gone.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let mut nanoseconds = 0_u64;
        for thread in fs::read_dir(format!("/proc/{}/task", self.daemon.pid()))? {
            // A thread may end meanwhile.
            let text = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
            nanoseconds += text.split(' ').next().and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
        }
        ensure!(nanoseconds > 0, "{} is gone:\n{}", self.rival.name(), self.daemon.log());
        Ok(nanoseconds as f64 / 1e9)
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// The process is gone.
    pub(crate) fn memory(&self) -> Result<u64> {
        crate::bench::idle::field_of(self.daemon.pid(), "VmRSS:")
    }

    /// The largest resident set that it has had, in bytes.
    ///
    /// # Errors
    /// The process is gone.
    pub(crate) fn peak_memory(&self) -> Result<u64> {
        crate::bench::idle::field_of(self.daemon.pid(), "VmHWM:")
    }
}
