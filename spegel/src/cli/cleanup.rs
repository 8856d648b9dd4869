//! The flags and settings of `cleanup` and `cleanup-wait`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};

use super::args::{ApiArgs, duration};
use super::settings::{api, listen, usage};
use crate::cleanup::WaitSettings;
use crate::kube::ApiSettings;
use crate::serve::ListenAddr;

/// What `cleanup` needs.
#[derive(Debug)]
pub struct CleanupSettings {
    /// containerd's `config_path`.
    pub config_path: PathBuf,
    /// Where the identity was kept.
    pub data_dir: Option<PathBuf>,
    /// Where probes are answered; nowhere: do the work once and end.
    pub addr: Option<ListenAddr>,
}

/// What `cleanup-wait` needs.
#[derive(Debug)]
pub struct CleanupWaitSettings {
    /// The name whose addresses are probed, where the API is not asked.
    pub host: String,
    /// The port that is probed.
    pub port: u16,
    /// How patient to be.
    pub wait: WaitSettings,
    /// Where the nodes are looked up.
    pub cluster: Option<ClusterSettings>,
    /// What repeats the cleanup, printed after a failure.
    pub repeat_command: Option<String>,
}

/// Where nodes are looked up in the Kubernetes API.
#[derive(Debug)]
pub struct ClusterSettings {
    /// How the API is reached.
    pub api: ApiSettings,
    /// The namespace; the service account's own if not told.
    pub namespace: Option<String>,
    /// The DaemonSet that cleans.
    pub daemon_set: String,
    /// The mirror's own pods.
    pub mirror_selector: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct CleanupArgs {
    /// Where probes are answered, once this node is clean
    #[arg(long, env, value_name = "ADDRESS")]
    addr: Option<String>,
    /// Do the work once and end, on a host without Kubernetes
    #[arg(long, env, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    once: bool,
    /// The directory that containerd's registry configuration names as config_path
    #[arg(long, env, default_value = "/etc/containerd/certs.d", value_name = "DIR")]
    containerd_registry_config_path: PathBuf,
    /// Where this node's identity was kept; it is removed
    #[arg(long, env, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct CleanupWaitArgs {
    /// Where the cleanup of all nodes is probed, host:port; with --daemonset only the port counts
    #[arg(long, env, value_name = "HOST:PORT", required = true)]
    probe_endpoint: String,
    /// How many times in a row all nodes must say that they are clean
    #[arg(long, env, default_value_t = 3, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    threshold: u32,
    /// The time between two rounds of probes
    #[arg(long, env, default_value = "2s", value_parser = duration, value_name = "DURATION")]
    period: Duration,
    /// The time after which the wait fails and says which nodes are missing; with --daemonset counted from when that was made
    #[arg(long, env, default_value = "4m", value_parser = duration, value_name = "DURATION")]
    deadline: Duration,
    /// The DaemonSet that cleans: its pods, as the Kubernetes API has them, say which nodes must answer [default: the addresses
    /// of the probe endpoint, among which a node whose pod does not run is missing]
    #[arg(long, env, value_name = "NAME")]
    daemonset: Option<String>,
    /// The DaemonSet's namespace [default: the service account's]
    #[arg(long, env, value_name = "NAME")]
    namespace: Option<String>,
    /// A label selector of the mirror's pods: while one of them has not finished its start, it may write its configuration again
    #[arg(long, env, value_name = "SELECTOR")]
    mirror_selector: Option<String>,
    #[command(flatten)]
    api: ApiArgs,
    /// The command that repeats the cleanup; it is printed if nodes are missing at the end
    #[arg(long, env, value_name = "COMMAND")]
    repeat_command: Option<String>,
}

pub(super) fn cleanup(args: CleanupArgs) -> Result<CleanupSettings, clap::Error> {
    let addr = match args.addr.filter(|addr| !addr.is_empty()) {
        _ if args.once => None,
        Some(addr) => Some(listen("--addr", &addr)?),
        None => return Err(usage("cleanup needs --addr, where it answers probes, or --once")),
    };
    let data_dir = args.data_dir.filter(|path| !path.as_os_str().is_empty());
    Ok(CleanupSettings { config_path: args.containerd_registry_config_path, data_dir, addr })
}

pub(super) fn cleanup_wait(args: CleanupWaitArgs) -> Result<CleanupWaitSettings, clap::Error> {
    let endpoint = &args.probe_endpoint;
    let parts = endpoint.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port) = match parts {
        Some((host, port)) if port != 0 && !host.is_empty() => (host.to_owned(), port),
        _ => {
            return Err(usage(format!(
                "--probe-endpoint {endpoint}: give a host and a port, like cleanup.spegel:8080"
            )));
        }
    };
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let cluster = match given(args.daemonset) {
        None => None,
        Some(daemon_set) => Some(ClusterSettings {
            api: api(&args.api, "--daemonset")?,
            namespace: given(args.namespace),
            daemon_set,
            mirror_selector: given(args.mirror_selector),
        }),
    };
    Ok(CleanupWaitSettings {
        host,
        port,
        wait: WaitSettings { threshold: args.threshold, period: args.period, deadline: args.deadline },
        cluster,
        repeat_command: given(args.repeat_command),
    })
}
