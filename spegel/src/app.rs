//! The only composer: builds the rooms, connects them, runs them, and takes them down.

mod ask;
mod cleanup;
mod doctor;
mod figures;
mod handler;
mod node;
mod peers;
mod strain;
mod supervisor;
mod trace;

use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::bootstrap::{Bootstrap, DnsBootstrap, HttpEndpoint, RememberedPeers};
use crate::cli::{self, Command, Content, RegistrySettings, VersionFormat};
use crate::mirror::{self, Mirror};
use crate::registry::{ReadyCollector, Registry};
use crate::router::{Identity, P2pRouter, P2pSettings, Router, RouterMetrics};
use crate::serve::{ListenAddr, Options, Server};
use crate::store::{Containerd, ContainerdSettings, OciLayout, Outcome, Store, StoreError};
use crate::web::{self, Web};
use crate::{ebpf, hosts};
use figures::Shown;

pub use figures::catalogue;
pub use trace::{trace, write_out};

/// How often it is looked whether responses are still under way.
const POLL: Duration = Duration::from_millis(20);
/// How often the network may hear how busy this node is.
const LOAD_PERIOD: Duration = Duration::from_secs(2);
/// How long clients that were just sent away may still come back before the port closes.
const LAST_CALLERS: Duration = Duration::from_millis(300);
/// Threads of the control runtime: the swarm, containerd's events, the side port.
const CONTROL_THREADS: usize = 2;

/// An error with its causes, but for those that it tells itself.
pub fn describe(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |mut text, cause| {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        text
    })
}

/// Does what has to be done before the process has a second thread: privileges belong to threads, and what eBPF needs is given up here.
///
/// # Errors
/// eBPF was asked for, and cannot be had.
pub fn prepare(command: &Command) -> anyhow::Result<ebpf::Watch> {
    match command {
        Command::Registry(settings) => ebpf::Watch::start(&settings.ebpf).context("--ebpf on"),
        _ => Ok(ebpf::Watch::without_kernel()),
    }
}

/// Does what the command line asks for, after [`prepare`]. The exit code is not 0 where what was looked at is not in order.
///
/// # Errors
/// What kept it from being done, with the chain of causes.
pub fn run(command: Command, watch: ebpf::Watch) -> anyhow::Result<ExitCode> {
    match command {
        Command::Doctor(settings) => return block_on(doctor::examine(*settings)),
        Command::Version(format) => version(format),
        Command::Configuration(configuration) => tell(&hosts::write(&configuration)?),
        Command::Registry(settings) => block_on(registry(*settings, watch))?,
        Command::Cleanup(settings) => block_on(cleanup::clean(settings))?,
        Command::CleanupWait(settings) => block_on(cleanup::wait(*settings))?,
        Command::Peers(settings) => peers::show(&settings)?,
        Command::Level(settings) => ask::level(&settings)?,
        Command::Completions(script) => std::io::stdout().write_all(&script)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(CONTROL_THREADS).thread_name("control").enable_all().build()?;
    let result = runtime.block_on(work);
    // A task that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn version(format: VersionFormat) {
    let version = env!("CARGO_PKG_VERSION");
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    match format {
        VersionFormat::Text => println!("spegel {version} {os}/{arch}"),
        VersionFormat::Json => println!("{}", serde_json::json!({ "version": version, "os": os, "arch": arch })),
    }
}

/// A line for each file that a person may look for, and a warning for each that needs one.
fn tell(report: &hosts::Report) {
    let told = [
        ("wrote", &report.written),
        ("already as it should be", &report.unchanged),
        ("took back", &report.removed),
        ("restored", &report.restored),
        ("set aside what somebody else had changed", &report.set_aside),
        ("not mirrored, it has a configuration of its own", &report.not_mirrored),
    ];
    for (what, paths) in told {
        for path in paths {
            info!(path = %path.display(), "{what}");
        }
    }
    let warned = [
        ("could not restore, something else is in its place", &report.left_in_backup),
        ("names a spegel mirror, but is not ours by its first line, and was left: look at it", &report.foreign_mirrors),
    ];
    for (what, paths) in warned {
        for path in paths {
            warn!(path = %path.display(), "{what}");
        }
    }
}

async fn registry(settings: RegistrySettings, watch: ebpf::Watch) -> anyhow::Result<()> {
    watch.tell();
    let stop = CancellationToken::new();
    let _stop_all = stop.clone().drop_guard();
    let mut stop_signal = StopSignal::listen()?;
    let open_files = limit_open_files(settings.serve.open_files);
    let zone = node::zone(&settings.zone, &settings.node_name).await;

    let (store, mut store_task) = open_store(&settings, &stop)?;
    let mut figures = Shown::register(&settings.node_name, zone.as_deref(), &watch, Arc::downgrade(&store));
    let router = start_router(&settings, zone.clone(), figures.router.clone(), &stop)?;
    if let Some(endpoint) = &settings.bootstrap_endpoint {
        serve_bootstrap(endpoint, &router, &stop)?;
    }
    let patience = mirror::Settings {
        zone: zone.as_deref().map(Into::into),
        watch: Some(watch.clone()),
        ..settings.mirror.clone()
    };
    let mirror = Mirror::new(router.clone(), patience, figures.mirror.clone());
    let registry = Arc::new(Registry::new(crate::registry::Settings {
        store: store.clone(),
        mirror: mirror.clone(),
        readiness: router.readiness(),
        filters: settings.filters.clone(),
        basic_auth: settings.basic_auth.clone(),
        node_name: Some(settings.node_name.clone()),
        uploads: settings.uploads,
        metrics: figures.registry.clone(),
    }));
    ReadyCollector::register(&mut figures.all, Arc::downgrade(&registry));
    let (examined, examination) = tokio::sync::watch::channel(None);
    let asked = Arc::new(tokio::sync::Notify::new());
    let (looked_at, findings) = (doctor::settings_of(&settings, &watch), figures.doctor.clone());
    let examine = doctor::at_start(looked_at.clone(), findings.clone(), examined, Arc::clone(&asked));
    figures.serve.set_open_files(open_files);
    if let Some(bytes) = strain::memory_limit() {
        figures.serve.set_memory(bytes);
    }
    let mut options =
        Options { metrics: figures.serve.clone(), watch: Some(watch.clone()), ..settings.serve.options.clone() };
    options.limits.connections = affordable(options.limits.connections, open_files);
    let server = Server::bind(&[settings.registry_addr], options, handler::over(Arc::clone(&registry)))?;
    let registry_at = server.addrs().first().copied();
    let debug = registry_at.filter(|_| settings.debug_web).map(|at| web::Parts {
        node: settings.node_name.clone(),
        zone: zone.clone(),
        identity: Arc::clone(router.peer_id()),
        store: Arc::clone(&store),
        router: router.clone(),
        mirror,
        registry: Arc::clone(&registry),
        watch: watch.clone(),
        pulled: figures.registry.pulled(),
        engine: server.engine().engine.to_string(),
        examination,
        examine: asked,
        registry_at: supervisor::reachable(at),
        authorization: settings.basic_auth.as_ref().map(|auth| auth.header().to_owned()),
        memory_left: strain::memory_left,
    });
    let log = Arc::new(trace::OwnLog);
    let web = Web::new(crate::serve::listen(settings.metrics_addr)?, figures.all, watch, log, debug, stop.clone())?;
    tokio::spawn(web.serve(stop.clone()));
    tokio::spawn(tell_outcomes(store.outcomes(), Arc::clone(&registry)));
    tokio::spawn(announce(store, router.clone()));
    tokio::spawn(tell_load(router.clone(), Arc::clone(&registry)));
    tokio::spawn(strain::watch(Arc::clone(&registry), open_files));
    tokio::spawn(examine);
    if let Some(at) = registry_at {
        tokio::spawn(supervisor::attend(Arc::clone(&registry), supervisor::reachable(at)));
    }
    if let Some(taint) = settings.startup_taint {
        let registry = Arc::clone(&registry);
        tokio::spawn(node::untaint(taint, settings.node_name.clone(), move || registry.ready().is_ok()));
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        registry = ?server.addrs(),
        router = %router.peer_id(),
        node = settings.node_name,
        zone,
        "spegel is up"
    );

    let ended = tokio::select! {
        name = stop_signal.next() => {
            info!(signal = name, "stopping: responses under way may finish");
            Ok(())
        }
        failed = &mut store_task => failed,
    };
    supervisor::stopping();
    let last_look = doctor::at_end(&looked_at, &findings, settings.drain);
    let cut = tokio::select! {
        (cut, ()) = async { tokio::join!(stop_serving(&registry, server, settings.drain), last_look) } => cut,
        _ = stop_signal.next() => {
            warn!("a second signal: stopping at once");
            return ended;
        }
    };
    info!(cut, "stopped");
    ended
}

type StoreTask = futures::future::BoxFuture<'static, anyhow::Result<()>>;

/// The store, and what ends only if it can never serve.
fn open_store(settings: &RegistrySettings, stop: &CancellationToken) -> anyhow::Result<(Arc<dyn Store>, StoreTask)> {
    match &settings.content {
        Content::OciLayouts(dirs) => {
            let store = OciLayout::open(dirs.clone(), settings.filters.clone())?;
            Ok((store, Box::pin(std::future::pending())))
        }
        Content::Containerd { socket, namespace, content_path } => {
            let containerd = ContainerdSettings {
                socket: socket.clone(),
                namespace: namespace.clone(),
                content_path: content_path.clone(),
                filters: settings.filters.clone(),
                stall: settings.mirror.stall,
            };
            let (store, task) = Containerd::start(containerd, stop.clone());
            let ended = async move {
                match task.await {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(error @ StoreError::Mismatch(_))) => Err(error.into()),
                    Ok(Err(error)) => Err(anyhow::Error::from(error).context("the content store ended")),
                    Err(error) => Err(anyhow::Error::from(error).context("the content store's task ended")),
                }
            };
            Ok((store, Box::pin(ended)))
        }
    }
}

fn start_router(
    settings: &RegistrySettings,
    zone: Option<String>,
    metrics: RouterMetrics,
    stop: &CancellationToken,
) -> anyhow::Result<Arc<P2pRouter>> {
    let (identity, remembered) = match &settings.data_dir {
        Some(dir) => (Identity::load_or_create(dir)?, Some(RememberedPeers::new(dir))),
        None => (Identity::fresh(), None),
    };
    trace::KAD_ERRORS.count_in(&metrics);
    let p2p = P2pSettings {
        listen: router_addresses(settings.router_addr),
        registry_port: settings.registry_addr.port(),
        identity,
        bootstrap: sources(&settings.bootstrap),
        remembered,
        mdns: settings.bootstrap.iter().any(|kind| matches!(kind, cli::Bootstrap::Mdns)),
        advertise: settings.peers.advertise.clone(),
        peer_networks: settings.peers.networks.clone(),
        network_key: settings.peers.network_key.clone(),
        zone,
        storms: settings.mirror.storm.is_some(),
        metrics,
        advertise_ttl: P2pSettings::ADVERTISE_TTL,
        join_timeout: P2pSettings::JOIN_TIMEOUT,
        max_records: settings.peers.max_records,
    };
    Ok(P2pRouter::start(p2p, stop)?)
}

/// Who is asked for first peers.
fn sources(kinds: &[cli::Bootstrap]) -> Vec<Arc<dyn Bootstrap>> {
    let mut sources: Vec<Arc<dyn Bootstrap>> = Vec::new();
    for kind in kinds {
        match kind {
            cli::Bootstrap::Dns(name) => sources.push(Arc::new(DnsBootstrap::new(name))),
            cli::Bootstrap::Static(list) => sources.push(Arc::new(list.clone())),
            cli::Bootstrap::Http(url) => sources.push(Arc::new(url.clone())),
            cli::Bootstrap::HttpEndpoint | cli::Bootstrap::Mdns => {}
        }
    }
    sources
}

/// Serves this node's addresses, and some of its peers', to those who bootstrap by HTTP.
fn serve_bootstrap(
    endpoint: &cli::BootstrapEndpoint,
    router: &Arc<P2pRouter>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let listener = crate::serve::listen(endpoint.addr)?;
    let router = Arc::downgrade(router);
    let peers = move || router.upgrade().map(|router| router.bootstrap_peers()).unwrap_or_default();
    let endpoint = HttpEndpoint::new(listener, endpoint.certificates.clone(), Arc::new(peers))?;
    tokio::spawn(endpoint.serve(stop.clone()));
    Ok(())
}

/// The router listens on each family by itself.
fn router_addresses(addr: ListenAddr) -> Vec<SocketAddr> {
    match addr {
        ListenAddr::One(addr) => vec![addr],
        ListenAddr::Any(port) => vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()],
    }
}

/// Lets responses under way finish, while new requests are sent elsewhere by an answer rather than by a refused connection, which
/// fails a pull of containerd's parallel fetch. Returns how many connections had to be cut.
async fn stop_serving(registry: &Registry, server: Server, bound: Duration) -> usize {
    let end = Instant::now() + bound;
    registry.drain();
    while registry.in_flight() > 0 && Instant::now() < end {
        tokio::time::sleep(POLL).await;
    }
    // The other chunks of a client that was just cut off come at once.
    tokio::time::sleep_until((Instant::now() + LAST_CALLERS).min(end)).await;
    server.shutdown(end.saturating_duration_since(Instant::now())).await
}

/// Tells the network what the store has, as that changes.
async fn announce(store: Arc<dyn Store>, router: Arc<P2pRouter>) {
    let mut changes = store.subscribe();
    drop(store);
    while let Some(change) = changes.next().await {
        router.announce(change);
    }
}

/// Tells the registry what became of what was received.
async fn tell_outcomes(mut outcomes: broadcast::Receiver<Outcome>, registry: Arc<Registry>) {
    loop {
        match outcomes.recv().await {
            Ok(outcome) => registry.hear(&outcome),
            // What was missed is as if it had not been seen.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

/// Tells the network how busy this node is, as that changes.
async fn tell_load(router: Arc<P2pRouter>, registry: Arc<Registry>) {
    let mut told = 0;
    loop {
        tokio::time::sleep(LOAD_PERIOD).await;
        let load = registry.load();
        if load != told {
            router.set_load(load);
            told = load;
        }
    }
}

/// Takes what the administrator allows of open files, since each connection may need two descriptors and a pipe, or less where that
/// is asked for. Returns the bound in effect.
fn limit_open_files(asked: Option<u64>) -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    let allowed = before.maximum.unwrap_or(u64::MAX);
    if let Some(asked) = asked.filter(|asked| *asked > allowed) {
        warn!(asked, allowed, "--max-open-files is more than the administrator allows");
    }
    let limit = rustix::process::Rlimit { current: Some(asked.unwrap_or(allowed).min(allowed)), ..before };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "cannot change the bound of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// How many connections there can be with so many open files: each takes one at least, and what is beyond them is refused in an orderly way only
/// while there are some left.
fn affordable(asked: usize, open_files: u64) -> usize {
    /// Files of the process itself, and what is kept to refuse with.
    const OTHERS: u64 = 48;
    let left = open_files.saturating_sub(OTHERS + (open_files / 8).min(64)).max(1);
    let connections = usize::try_from(left).map_or(asked, |left| left.min(asked));
    if connections < asked {
        warn!(asked, connections, open_files, "--max-connections is more than the open files allow");
    }
    connections
}

/// The signals that ask a daemon to end.
struct StopSignal {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignal {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
