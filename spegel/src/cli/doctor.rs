//! The flags and settings of `doctor`.

use std::path::PathBuf;

use clap::{ArgAction, ArgMatches, Args};

use super::args::{BootstrapArgs, ContainerdArgs, split_paths};
use super::settings::{
    Bootstrap, BootstrapEndpoint, Content, bootstrap, bootstrap_endpoint, content, listen, node_name,
};
use crate::serve::ListenAddr;

/// What `doctor` needs.
#[derive(Debug)]
pub struct DoctorSettings {
    /// Where further variables are, with which the program is to be started anew.
    pub env_file: Option<PathBuf>,
    /// Print an object instead of text.
    pub json: bool,
    /// An image that containerd is made to pull.
    pub pull: Option<String>,
    /// Whose content is served.
    pub content: Content,
    /// containerd's configuration file.
    pub containerd_config: Option<PathBuf>,
    /// Where containerd looks for registry hosts.
    pub config_path: PathBuf,
    /// How first peers are found.
    pub bootstrap: Vec<Bootstrap>,
    /// Where this node's addresses are served.
    pub bootstrap_endpoint: Option<BootstrapEndpoint>,
    /// Where metrics are served.
    pub metrics_addr: ListenAddr,
    /// Where peers find this node.
    pub router_addr: ListenAddr,
    /// Where content is fetched.
    pub registry_addr: ListenAddr,
    /// This node's name.
    pub node_name: String,
}

/// The flags that `registry` has as well mean the same: the same environment file serves both.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Take the flags' variables from this file, as the unit does from /etc/default/spegel; what is set already counts more
    #[arg(long, env, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// Print an object, for scripts
    #[arg(long, env, default_value_t = false, action = ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    json: bool,
    /// Have containerd pull this image, and see whether it asks the mirror
    #[arg(long, env, value_name = "IMAGE")]
    pull: Option<String>,
    /// containerd's configuration file [default: the one that its process was started with]
    #[arg(long, env, value_name = "FILE")]
    containerd_config: Option<PathBuf>,
    #[command(flatten)]
    containerd: ContainerdArgs,
    /// OCI image layouts are served instead of containerd's content, so that containerd is not looked at
    #[arg(long, env, num_args = 1.., value_name = "DIR")]
    oci_layout: Vec<PathBuf>,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Where metrics are served
    #[arg(long, env, default_value = ":9090", value_name = "ADDRESS")]
    metrics_addr: String,
    /// Where peers find this node
    #[arg(long, env, default_value = ":5001", value_name = "ADDRESS")]
    router_addr: String,
    /// Where containerd and peers fetch content
    #[arg(long, env, default_value = ":5000", value_name = "ADDRESS")]
    registry_addr: String,
    /// This node's name, as the mirror has it [default: the host name]
    #[arg(long, env)]
    node_name: Option<String>,
}

impl DoctorArgs {
    pub(super) fn split_lists(&mut self, matches: &ArgMatches) {
        self.bootstrap.split_lists(matches);
        split_paths(matches, "oci_layout", &mut self.oci_layout);
    }
}

pub(super) fn doctor(args: DoctorArgs) -> Result<DoctorSettings, clap::Error> {
    Ok(DoctorSettings {
        env_file: args.env_file,
        json: args.json,
        pull: args.pull,
        containerd_config: args.containerd_config,
        config_path: args.containerd.containerd_registry_config_path.clone(),
        content: content(args.containerd, args.oci_layout),
        bootstrap: if args.bootstrap.bootstrap_kind.is_empty() { Vec::new() } else { bootstrap(&args.bootstrap)? },
        bootstrap_endpoint: bootstrap_endpoint(&args.bootstrap)?,
        metrics_addr: listen("--metrics-addr", &args.metrics_addr)?,
        router_addr: listen("--router-addr", &args.router_addr)?,
        registry_addr: listen("--registry-addr", &args.registry_addr)?,
        node_name: node_name(args.node_name.as_deref()),
    })
}
