//! Typed flags into settings that build the rooms.

use std::fmt::Display;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::CommandFactory as _;
use clap::error::ErrorKind as Usage;
use ipnet::IpNet;

use super::args::{ApiArgs, BootstrapArgs, Cli, ConfigurationArgs, ContainerdArgs, RegistryArgs, Switch};
use super::serve::ServeSettings;
use crate::bootstrap::{Certificates, HttpBootstrap, StaticBootstrap};
use crate::kube::{ApiSettings, StartupTaint};
use crate::oci::Filters;
use crate::registry::{BasicAuth, UploadLimits};
use crate::router::{NetworkKey, P2pSettings};
use crate::serve::ListenAddr;
use crate::{ebpf, hosts, mirror};

/// What `registry` needs.
#[derive(Debug)]
pub struct RegistrySettings {
    /// How to find the first peers; at least one.
    pub bootstrap: Vec<Bootstrap>,
    /// Where other nodes fetch this node's addresses.
    pub bootstrap_endpoint: Option<BootstrapEndpoint>,
    /// Whom to believe as a peer.
    pub peers: Peers,
    /// Whose content is served.
    pub content: Content,
    /// Where containerd looks for registry hosts.
    pub config_path: PathBuf,
    /// Where the identity is kept.
    pub data_dir: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics_addr: ListenAddr,
    /// Whether there are pages for people.
    pub debug_web: bool,
    /// Where peers find this node.
    pub router_addr: ListenAddr,
    /// Where content is fetched.
    pub registry_addr: ListenAddr,
    /// What is not mirrored.
    pub filters: Filters,
    /// How patient the mirror is.
    pub mirror: mirror::Settings,
    /// How much peers may fetch.
    pub uploads: UploadLimits,
    /// Who may fetch.
    pub basic_auth: Option<BasicAuth>,
    /// This node's name.
    pub node_name: String,
    /// Where this node is.
    pub zone: Zone,
    /// What keeps workloads away until this node is ready.
    pub startup_taint: Option<StartupTaint>,
    /// How long responses may go on after SIGTERM.
    pub drain: Duration,
    /// How bytes are served, and what a client may cost.
    pub serve: ServeSettings,
    /// What is asked of the kernel.
    pub ebpf: ebpf::Settings,
}

/// Where this node is.
#[derive(Debug)]
pub enum Zone {
    /// That was not told.
    Unknown,
    /// In this zone.
    Named(String),
    /// In the zone that its label names, in the Kubernetes API that is reached like this.
    OfNode(ApiSettings),
}

/// A source of first peers.
#[derive(Debug)]
pub enum Bootstrap {
    /// The addresses of a name.
    Dns(String),
    /// A list.
    Static(StaticBootstrap),
    /// What a URL says.
    Http(HttpBootstrap),
    /// Nobody in particular: this node only serves its addresses.
    HttpEndpoint,
    /// Whoever answers on the same link.
    Mdns,
}

/// The endpoint that serves this node's addresses.
#[derive(Debug)]
pub struct BootstrapEndpoint {
    /// Where it listens.
    pub addr: ListenAddr,
    /// What it proves itself with.
    pub certificates: Option<Certificates>,
}

/// The network of peers.
#[derive(Debug)]
pub struct Peers {
    /// Where they reach us, if not at our interfaces' addresses.
    pub advertise: Vec<SocketAddr>,
    /// Where they are.
    pub networks: Vec<IpNet>,
    /// What they have in common.
    pub network_key: Option<NetworkKey>,
    /// How many of their records are kept.
    pub max_records: usize,
}

/// Whose content is served.
#[derive(Debug)]
pub enum Content {
    /// Of these OCI image layouts.
    OciLayouts(Vec<PathBuf>),
    /// Of containerd.
    Containerd {
        /// Its socket.
        socket: PathBuf,
        /// The namespace.
        namespace: String,
        /// Its content directory; to be asked of it if not told.
        content_path: Option<PathBuf>,
    },
}

pub(super) fn configuration(args: ConfigurationArgs) -> Result<hosts::Configuration, clap::Error> {
    Ok(hosts::Configuration {
        config_path: args.containerd_registry_config_path,
        mirrored_registries: parse_all("--mirrored-registries", &args.mirrored_registries)?,
        mirror_targets: parse_all("--mirror-targets", &args.mirror_targets)?,
        resolve_tags: args.resolve_tags,
        prepend_existing: args.prepend_existing,
        basic_auth: credentials(&args.node.basic_auth_dir)?,
        node_name: node_name(args.node.node_name.as_deref()),
    })
}

fn parse_all<T: FromStr<Err: Display>>(flag: &str, texts: &[String]) -> Result<Vec<T>, clap::Error> {
    texts.iter().map(|text| text.parse().map_err(|error: T::Err| usage(format!("{flag}: {error}")))).collect()
}

pub(super) fn registry(args: RegistryArgs) -> Result<RegistrySettings, clap::Error> {
    let basic_auth = credentials(&args.node.basic_auth_dir)?.map(|(name, password)| BasicAuth::new(&name, &password));
    let filters = Filters::new(&args.mirrored_registries, &args.registry_filters)
        .map_err(|error| usage(format!("--mirrored-registries or --registry-filters: {error}")))?;
    let mirror = mirror::Settings {
        resolve_timeout: args.mirror_resolve_timeout,
        resolve_retries: args.mirror_resolve_retries,
        stall: args.mirror_stall_timeout,
        storm: (args.storm == Switch::On).then_some(mirror::StormSettings { max_wait: args.storm_max_wait }),
        authorization: basic_auth.as_ref().map(|auth| auth.header().to_owned()),
        ..mirror::Settings::default()
    };
    let router_addr = listen("--router-addr", &args.router_addr)?;
    let registry_addr = listen("--registry-addr", &args.registry_addr)?;
    let socket = args.oci_layout.is_empty().then_some(args.containerd.containerd_sock.as_path());
    let ebpf = args.ebpf.settings(&args.mirrored_registries, socket, registry_addr, router_addr.port())?;
    Ok(RegistrySettings {
        bootstrap: bootstrap(&args.bootstrap)?,
        bootstrap_endpoint: bootstrap_endpoint(&args.bootstrap)?,
        peers: peers(&args)?,
        metrics_addr: listen("--metrics-addr", &args.metrics_addr)?,
        debug_web: args.debug_web_enabled,
        router_addr,
        registry_addr,
        ebpf,
        filters,
        mirror,
        uploads: UploadLimits { count: args.max_uploads, rate: args.upload_rate },
        basic_auth,
        node_name: node_name(args.node.node_name.as_deref()),
        zone: zone(&args)?,
        startup_taint: startup_taint(&args)?,
        drain: args.drain_timeout,
        serve: args.serve.settings(),
        data_dir: args.data_dir.filter(|path| !path.as_os_str().is_empty()),
        config_path: args.containerd.containerd_registry_config_path.clone(),
        content: content(args.containerd, args.oci_layout),
    })
}

pub(super) fn content(args: ContainerdArgs, layouts: Vec<PathBuf>) -> Content {
    if !layouts.is_empty() {
        return Content::OciLayouts(layouts);
    }
    let content_path = Some(PathBuf::from(args.containerd_content_path));
    Content::Containerd {
        socket: args.containerd_sock,
        namespace: args.containerd_namespace,
        content_path: content_path.filter(|path| !path.as_os_str().is_empty()),
    }
}

fn zone(args: &RegistryArgs) -> Result<Zone, clap::Error> {
    match args.zone.as_deref().filter(|zone| !zone.is_empty()) {
        Some(zone) if zone.len() > 63 || !zone.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) => {
            Err(usage(format!(
                "--zone {zone}: a zone has up to 63 letters, digits, '-', '_' and '.', as a node's label"
            )))
        }
        Some(zone) => Ok(Zone::Named(zone.to_owned())),
        None if args.zone_from_node => api(&args.api, "--zone-from-node").map(Zone::OfNode),
        None => Ok(Zone::Unknown),
    }
}

fn startup_taint(args: &RegistryArgs) -> Result<Option<StartupTaint>, clap::Error> {
    let Some(key) = args.startup_taint.as_deref().filter(|key| !key.is_empty()) else { return Ok(None) };
    if !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)) {
        return Err(usage(format!("--startup-taint {key}: give the taint's key alone, without value and effect")));
    }
    let api = api(&args.api, "--startup-taint")?;
    Ok(Some(StartupTaint { key: key.to_owned(), api }))
}

/// How the API is reached that `flag` asks.
pub(super) fn api(args: &ApiArgs, flag: &str) -> Result<ApiSettings, clap::Error> {
    let Some(host) = args.kubernetes_service_host.clone().filter(|host| !host.is_empty()) else {
        return Err(usage(format!("{flag} asks the Kubernetes API: run in a pod, or give --kubernetes-service-host")));
    };
    let service_account = args.service_account_dir.clone();
    Ok(ApiSettings { host, port: args.kubernetes_service_port, service_account })
}

const KINDS: &str = "dns, http, mdns and static";

pub(super) fn bootstrap(args: &BootstrapArgs) -> Result<Vec<Bootstrap>, clap::Error> {
    let kinds = args.bootstrap_kind.iter().map(|kind| match kind.as_str() {
        "dns" => match args.dns_bootstrap_domain.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => Ok(Bootstrap::Dns(name.to_owned())),
            None => Err(usage("--bootstrap-kind dns needs --dns-bootstrap-domain")),
        },
        "http" => match (&args.http_bootstrap_url, &args.http_bootstrap_addr) {
            (Some(url), _) => HttpBootstrap::new(url, certificates(args))
                .map(Bootstrap::Http)
                .map_err(|error| usage(format!("--http-bootstrap-url: {error}"))),
            (None, Some(_)) => Ok(Bootstrap::HttpEndpoint),
            (None, None) => Err(usage("--bootstrap-kind http needs --http-bootstrap-url or --http-bootstrap-addr")),
        },
        "mdns" => Ok(Bootstrap::Mdns),
        "static" => StaticBootstrap::new(&args.static_bootstrap_peers)
            .map(Bootstrap::Static)
            .map_err(|error| usage(format!("--static-bootstrap-peers: {error}"))),
        other => Err(usage(format!("--bootstrap-kind {other}: the kinds are {KINDS}"))),
    });
    let kinds = kinds.collect::<Result<Vec<_>, _>>()?;
    if kinds.is_empty() { Err(usage(format!("--bootstrap-kind needs a kind: {KINDS}"))) } else { Ok(kinds) }
}

pub(super) fn bootstrap_endpoint(args: &BootstrapArgs) -> Result<Option<BootstrapEndpoint>, clap::Error> {
    let Some(addr) = &args.http_bootstrap_addr else { return Ok(None) };
    let addr = listen("--http-bootstrap-addr", addr)?;
    Ok(Some(BootstrapEndpoint { addr, certificates: certificates(args) }))
}

fn certificates(args: &BootstrapArgs) -> Option<Certificates> {
    args.http_bootstrap_cert_dir.as_deref().map(Certificates::new)
}

fn peers(args: &RegistryArgs) -> Result<Peers, clap::Error> {
    let port = listen("--router-addr", &args.router_addr)?.port();
    let advertise = args.advertise_addr.iter().map(|text| {
        let plain = text.parse().map(|ip: IpAddr| SocketAddr::new(ip, port));
        plain
            .or_else(|_| text.parse())
            .map_err(|_| usage(format!("--advertise-addr {text}: write ADDRESS or ADDRESS:PORT")))
    });
    // A single address stands for a network of one.
    let networks = args.peer_cidrs.iter().map(|text| {
        let single = text.parse().map(|ip: IpAddr| IpNet::from(ip));
        single.or_else(|_| text.parse()).map_err(|_| usage(format!("--peer-cidrs {text}: write it like 10.0.0.0/8")))
    });
    let network_key = args.network_key_file.as_deref().map(NetworkKey::load).transpose();
    let advertise: Vec<SocketAddr> = advertise.collect::<Result<_, _>>()?;
    let most = P2pSettings::MAX_ADVERTISED;
    if advertise.len() > most {
        return Err(usage(format!("--advertise-addr: {} addresses, of which peers take {most}", advertise.len())));
    }
    Ok(Peers {
        advertise,
        networks: networks.collect::<Result<_, _>>()?,
        network_key: network_key.map_err(|error| usage(format!("--network-key-file: {error}")))?,
        max_records: args.router_max_records,
    })
}

pub(super) fn listen(flag: &str, text: &str) -> Result<ListenAddr, clap::Error> {
    text.parse().map_err(|error| usage(format!("{flag} {text}: {error}")))
}

pub(super) fn node_name(given: Option<&str>) -> String {
    match given.filter(|name| !name.is_empty()) {
        Some(name) => name.to_owned(),
        None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
    }
}

/// The user name and password in `dir`. Both files or neither.
fn credentials(dir: &Path) -> Result<Option<(String, String)>, clap::Error> {
    let read = |name: &str| {
        let path = dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned())),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(usage(format!("cannot read {}: {error}", path.display()))),
        }
    };
    match (read("username")?, read("password")?) {
        (Some(name), Some(_)) if name.contains(':') => Err(usage("basic authentication: a user name has no colon")),
        (Some(name), Some(password)) => Ok(Some((name, password))),
        (None, None) => Ok(None),
        _ => Err(usage(format!("{} needs both files, username and password", dir.display()))),
    }
}

pub(super) fn usage(message: impl Display) -> clap::Error {
    Cli::command().error(Usage::ValueValidation, message)
}
