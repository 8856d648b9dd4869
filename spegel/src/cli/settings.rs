//! Typed flags into settings that build the rooms.

use std::fmt::Display;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::CommandFactory as _;
use clap::error::ErrorKind as Usage;

use super::args::{Cli, ConfigurationArgs, NodeArgs, RegistryArgs};
use crate::bootstrap::StaticBootstrap;
use crate::oci::Filters;
use crate::registry::{BasicAuth, UploadLimits};
use crate::serve::ListenAddr;
use crate::{hosts, mirror};

/// What `registry` needs.
#[derive(Debug)]
pub struct RegistrySettings {
    /// How to find the first peers; at least one.
    pub bootstrap: Vec<Bootstrap>,
    /// Whose content is served.
    pub content: Content,
    /// Where the identity is kept.
    pub data_dir: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics_addr: ListenAddr,
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
    /// How long responses may go on after SIGTERM.
    pub drain: Duration,
}

/// A source of first peers.
#[derive(Debug)]
pub enum Bootstrap {
    /// The addresses of a name.
    Dns(String),
    /// A list.
    Static(StaticBootstrap),
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
        node_name: node_name(&args.node),
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
        authorization: basic_auth.as_ref().map(|auth| auth.header().to_owned()),
        ..mirror::Settings::default()
    };
    Ok(RegistrySettings {
        bootstrap: bootstrap(&args)?,
        metrics_addr: listen("--metrics-addr", &args.metrics_addr)?,
        router_addr: listen("--router-addr", &args.router_addr)?,
        registry_addr: listen("--registry-addr", &args.registry_addr)?,
        filters,
        mirror,
        uploads: UploadLimits { count: args.max_uploads, rate: args.upload_rate },
        basic_auth,
        node_name: node_name(&args.node),
        drain: args.drain_timeout,
        data_dir: args.data_dir.filter(|path| !path.as_os_str().is_empty()),
        content: if args.oci_layout.is_empty() {
            let content_path = Some(PathBuf::from(args.containerd_content_path));
            Content::Containerd {
                socket: args.containerd_sock,
                namespace: args.containerd_namespace,
                content_path: content_path.filter(|path| !path.as_os_str().is_empty()),
            }
        } else {
            Content::OciLayouts(args.oci_layout)
        },
    })
}

fn bootstrap(args: &RegistryArgs) -> Result<Vec<Bootstrap>, clap::Error> {
    let kinds = args.bootstrap_kind.iter().map(|kind| match kind.as_str() {
        "dns" => match args.dns_bootstrap_domain.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => Ok(Bootstrap::Dns(name.to_owned())),
            None => Err(usage("--bootstrap-kind dns needs --dns-bootstrap-domain")),
        },
        "static" => StaticBootstrap::new(&args.static_bootstrap_peers)
            .map(Bootstrap::Static)
            .map_err(|error| usage(format!("--static-bootstrap-peers: {error}"))),
        other => Err(usage(format!("--bootstrap-kind {other}: the kinds are dns and static"))),
    });
    let kinds = kinds.collect::<Result<Vec<_>, _>>()?;
    if kinds.is_empty() { Err(usage("--bootstrap-kind needs a kind: dns or static")) } else { Ok(kinds) }
}

pub(super) fn listen(flag: &str, text: &str) -> Result<ListenAddr, clap::Error> {
    text.parse().map_err(|error| usage(format!("{flag} {text}: {error}")))
}

fn node_name(args: &NodeArgs) -> String {
    match args.node_name.as_deref().filter(|name| !name.is_empty()) {
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
