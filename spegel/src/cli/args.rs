//! The flags as they are typed. Each has an environment variable: upper case, `-` as `_`.

use std::path::PathBuf;
use std::time::Duration;

use super::cleanup::{CleanupArgs, CleanupWaitArgs};
use super::doctor::DoctorArgs;
use super::ebpf::EbpfArgs;
use super::level::LevelArgs;
use super::peers::PeersArgs;
use super::serve::ServeArgs;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, Parser, Subcommand, ValueEnum};

/// A stateless, cluster-local OCI image mirror: containerd pulls from peers before it asks the registry.
#[derive(Debug, Parser)]
#[command(name = "spegel", version, disable_help_subcommand = true, max_term_width = 110)]
pub(super) struct Cli {
    /// The least level that is logged
    #[arg(long, env, global = true, default_value = "INFO", ignore_case = true)]
    pub(super) log_level: LogLevel,
    /// The form of log lines [default: text on a terminal, else json]
    #[arg(long, env, global = true)]
    pub(super) log_format: Option<LogFormat>,
    #[command(subcommand)]
    pub(super) command: Command,
}

/// The least level that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub enum LogLevel {
    /// Each decision.
    Debug,
    /// The story of each pull in one line, starts and stops.
    Info,
    /// What an operator should look at.
    Warn,
    /// What does not work.
    Error,
}

impl LogLevel {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        }
    }

    /// The one of this name, whatever its case.
    pub fn of(name: &str) -> Option<Self> {
        Self::value_variants().iter().copied().find(|level| level.name().eq_ignore_ascii_case(name))
    }

    /// All of them.
    pub fn names() -> String {
        Self::value_variants().iter().map(|level| level.name()).collect::<Vec<_>>().join(", ")
    }
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// An object a line.
    Json,
    /// For people.
    Text,
}

/// Whether something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    On,
    Off,
}

/// How `version` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VersionFormat {
    /// For people.
    Text,
    /// An object.
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Print the version
    Version {
        /// The form of what is printed
        #[arg(long, env, default_value = "text")]
        format: VersionFormat,
    },
    /// Write the mirror configuration (hosts.toml) that makes containerd ask this mirror first
    Configuration(ConfigurationArgs),
    /// Serve this node's images to its containerd and to peers
    Registry(Box<RegistryArgs>),
    /// Take back what `configuration` wrote on this node, and answer probes once that is done
    Cleanup(CleanupArgs),
    /// Wait until the cleanup of all nodes is done
    CleanupWait(CleanupWaitArgs),
    /// Say whether this node's pulls go through the mirror, and what to change if not; the exit code is 1 then
    Doctor(Box<DoctorArgs>),
    /// Show a running process's connections, by peer
    ///
    /// `resent to` is the share of the segments that this node sent to a peer and had to send again; what a peer sends again to this node is not seen here,
    /// but in that peer's own table. `path/s` is what the path to a peer delivers, `idle` the time since something was last counted. A dash is what is
    /// not known. At most 1,024 rows are told, those with the most bytes
    Peers(PeersArgs),
    /// Show the level of a running process's log, or change it until that process ends
    #[command(name = "log-level")]
    Level(LevelArgs),
    /// Write a shell's completion script to standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(super) struct ConfigurationArgs {
    /// The directory that containerd's registry configuration names as config_path
    #[arg(long, env, default_value = "/etc/containerd/certs.d")]
    pub(super) containerd_registry_config_path: PathBuf,
    /// Registries to mirror, scheme://host[:port]; none, `*` or `_default`: all
    #[arg(long, env, num_args = 1.., value_name = "URL")]
    pub(super) mirrored_registries: Vec<String>,
    /// Where containerd reaches the mirror, scheme://host:port; asked in this order
    #[arg(long, env, num_args = 1.., value_name = "URL", required = true)]
    pub(super) mirror_targets: Vec<String>,
    /// Let the mirror resolve tags too, not digests only
    #[arg(long, env, default_value_t = true, action = ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(super) resolve_tags: bool,
    /// Keep the hosts that are configured already, after the mirror
    #[arg(long, env, default_value_t = false, action = ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(super) prepend_existing: bool,
    #[command(flatten)]
    pub(super) node: NodeArgs,
}

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// This node's name, by which its own containerd is told from others' [default: the host name]
    #[arg(long, env)]
    pub(super) node_name: Option<String>,
    /// The directory with the files `username` and `password`; without them there is no basic authentication
    #[arg(long, env, default_value = "/etc/secrets/basic-auth", value_name = "DIR")]
    pub(super) basic_auth_dir: PathBuf,
}

/// How the Kubernetes API is reached.
#[derive(Debug, Args)]
pub(super) struct ApiArgs {
    /// The API server's host
    #[arg(long, env, value_name = "HOST")]
    pub(super) kubernetes_service_host: Option<String>,
    /// The API server's port
    #[arg(long, env, default_value_t = 443, value_name = "PORT")]
    pub(super) kubernetes_service_port: u16,
    /// The directory with a service account's files: `ca.crt` and `token`, and `namespace` where none is given
    #[arg(long, env, default_value = "/var/run/secrets/kubernetes.io/serviceaccount", value_name = "DIR")]
    pub(super) service_account_dir: PathBuf,
}

/// How first peers are found.
#[derive(Debug, Args)]
pub(super) struct BootstrapArgs {
    /// How to find the first peers; several may be given
    #[arg(long, env, num_args = 1.., value_name = "KIND")]
    pub(super) bootstrap_kind: Vec<String>,
    /// A name that resolves to the addresses of all nodes, for the kind dns
    #[arg(long, env, value_name = "NAME")]
    pub(super) dns_bootstrap_domain: Option<String>,
    /// Peers, for the kind static: multiaddresses, or host[:port]
    #[arg(long, env, num_args = 1.., value_name = "PEER")]
    pub(super) static_bootstrap_peers: Vec<String>,
    /// Where this node serves its own and its peers' addresses under /id, for others' kind http
    #[arg(long, env, value_name = "ADDRESS")]
    pub(super) http_bootstrap_addr: Option<String>,
    /// Where such a list is fetched, for the kind http
    #[arg(long, env, value_name = "URL")]
    pub(super) http_bootstrap_url: Option<String>,
    /// A directory with ca.crt, tls.crt and tls.key for both of them
    #[arg(long, env, value_name = "DIR")]
    pub(super) http_bootstrap_cert_dir: Option<PathBuf>,
}

/// A containerd, and what of it is served.
#[derive(Debug, Args)]
pub(super) struct ContainerdArgs {
    /// containerd's socket
    #[arg(long, env, default_value = "/run/containerd/containerd.sock", value_name = "PATH")]
    pub(super) containerd_sock: PathBuf,
    /// The containerd namespace whose images are served
    #[arg(long, env, default_value = "k8s.io", value_name = "NAME")]
    pub(super) containerd_namespace: String,
    /// containerd's content directory; empty: ask containerd
    #[arg(
        long,
        env,
        default_value = "/var/lib/containerd/io.containerd.content.v1.content",
        value_name = "PATH",
        value_parser = clap::builder::OsStringValueParser::new()
    )]
    pub(super) containerd_content_path: std::ffi::OsString,
    /// The directory that containerd's registry configuration names as config_path, for the checks
    #[arg(long, env, default_value = "/etc/containerd/certs.d", value_name = "DIR")]
    pub(super) containerd_registry_config_path: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct RegistryArgs {
    #[command(flatten)]
    pub(super) bootstrap: BootstrapArgs,
    /// Where peers reach this node, ADDRESS[:PORT], if not at its interfaces' addresses
    #[arg(long, env, num_args = 1.., value_name = "ADDRESS")]
    pub(super) advertise_addr: Vec<String>,
    /// Networks of the peers, such as 10.0.0.0/8; what lies outside is not believed [default: everywhere]
    #[arg(long, env, num_args = 1.., value_name = "CIDR")]
    pub(super) peer_cidrs: Vec<String>,
    /// The key of a private libp2p network: only nodes that have it take part
    #[arg(long, env, value_name = "FILE")]
    pub(super) network_key_file: Option<PathBuf>,
    /// How many records of other nodes' content are kept at most, of up to 64 bytes each
    #[arg(long, env, default_value_t = 300_000, value_name = "NUMBER")]
    pub(super) router_max_records: usize,
    /// Where metrics are served
    #[arg(long, env, default_value = ":9090", value_name = "ADDRESS")]
    pub(super) metrics_addr: String,
    /// Serve pages for people at /debug/web/ there, to this node alone
    #[arg(long, env, default_value_t = true, action = ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(super) debug_web_enabled: bool,
    #[command(flatten)]
    pub(super) containerd: ContainerdArgs,
    /// Serve this OCI image layout instead of containerd's content; may be given several times
    #[arg(long, env, num_args = 1.., value_name = "DIR")]
    pub(super) oci_layout: Vec<PathBuf>,
    /// Where this node's identity is kept; without it each start makes a new one
    #[arg(long, env, value_name = "DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// Where peers find this node
    #[arg(long, env, default_value = ":5001", value_name = "ADDRESS")]
    pub(super) router_addr: String,
    /// Where containerd and peers fetch content; the port must be the same on all nodes
    #[arg(long, env, default_value = ":5000", value_name = "ADDRESS")]
    pub(super) registry_addr: String,
    /// Registries to mirror, scheme://host[:port]; none, `*` or `_default`: all
    #[arg(long, env, num_args = 1.., value_name = "URL")]
    pub(super) mirrored_registries: Vec<String>,
    /// Regular expressions on registry/repository[:tag]; a match is neither mirrored nor advertised
    #[arg(long, env, num_args = 1.., value_name = "REGEX")]
    pub(super) registry_filters: Vec<String>,
    /// How long one request looks for peers
    #[arg(long, env, default_value = "20ms", value_parser = duration, value_name = "DURATION")]
    pub(super) mirror_resolve_timeout: Duration,
    /// How many peers one request tries
    #[arg(long, env, default_value_t = 3, value_name = "NUMBER")]
    pub(super) mirror_resolve_retries: usize,
    /// How long a peer may send nothing before it is given up
    #[arg(long, env, default_value = "5s", value_parser = duration, value_name = "DURATION")]
    pub(super) mirror_stall_timeout: Duration,
    /// Whether what no node has is pulled from upstream by one, and by the others from each other while it arrives
    #[arg(long, env, default_value = "on")]
    pub(super) storm: Switch,
    /// For how long the requests of one image pull may be held in all while another node begins to get what none has. Time in which
    /// other parts of the image arrive is not counted, up to four times as much
    #[arg(long, env, default_value = "2s", value_parser = duration, value_name = "DURATION")]
    pub(super) storm_max_wait: Duration,
    /// How many blobs peers may fetch from this node at once; 0: no bound
    #[arg(long, env, default_value_t = 0, value_name = "NUMBER")]
    pub(super) max_uploads: usize,
    /// How many bytes a second this node gives its peers on average; 0: no bound
    #[arg(long, env, default_value_t = 0, value_name = "BYTES")]
    pub(super) upload_rate: u64,
    /// How long responses under way may go on after SIGTERM
    #[arg(long, env, default_value = "20s", value_parser = duration, value_name = "DURATION")]
    pub(super) drain_timeout: Duration,
    /// The zone that this node is in
    #[arg(long, env, value_name = "NAME")]
    pub(super) zone: Option<String>,
    /// Without --zone, take the zone from this node's label in the Kubernetes API, which must allow to read nodes
    #[arg(long, env, default_value_t = false, action = ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub(super) zone_from_node: bool,
    /// The key of a taint that is removed from this node once it is ready, through the Kubernetes API, which must allow to patch
    /// nodes
    #[arg(long, env, value_name = "KEY")]
    pub(super) startup_taint: Option<String>,
    #[command(flatten)]
    pub(super) ebpf: EbpfArgs,
    #[command(flatten)]
    pub(super) serve: ServeArgs,
    #[command(flatten)]
    pub(super) node: NodeArgs,
    #[command(flatten)]
    pub(super) api: ApiArgs,
}

impl ConfigurationArgs {
    pub(super) fn split_lists(&mut self, matches: &ArgMatches) {
        split(matches, "mirrored_registries", &mut self.mirrored_registries);
        split(matches, "mirror_targets", &mut self.mirror_targets);
    }
}

impl BootstrapArgs {
    pub(super) fn split_lists(&mut self, matches: &ArgMatches) {
        split(matches, "bootstrap_kind", &mut self.bootstrap_kind);
        split(matches, "static_bootstrap_peers", &mut self.static_bootstrap_peers);
    }
}

impl RegistryArgs {
    pub(super) fn split_lists(&mut self, matches: &ArgMatches) {
        self.bootstrap.split_lists(matches);
        split(matches, "advertise_addr", &mut self.advertise_addr);
        split(matches, "peer_cidrs", &mut self.peer_cidrs);
        split(matches, "mirrored_registries", &mut self.mirrored_registries);
        split(matches, "registry_filters", &mut self.registry_filters);
        split_paths(matches, "oci_layout", &mut self.oci_layout);
        split(matches, "upstream_ports", &mut self.ebpf.upstream_ports);
    }
}

/// [`split`] of paths.
pub(super) fn split_paths(matches: &ArgMatches, id: &str, paths: &mut Vec<PathBuf>) {
    let mut texts = paths.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    split(matches, id, &mut texts);
    *paths = texts.into_iter().map(PathBuf::from).collect();
}

/// A list from the environment is one text, with commas or spaces between its values; on the command line each value is
/// its own argument, so that a regular expression may hold a comma. Empty values are left out in both. The kinds of
/// bootstrap hold neither, and are split in both.
pub(super) fn split(matches: &ArgMatches, id: &str, values: &mut Vec<String>) {
    if matches.value_source(id) == Some(ValueSource::EnvVariable) || id == "bootstrap_kind" {
        let separator = |c: char| c == ',' || c.is_whitespace();
        *values = values.iter().flat_map(|text| text.split(separator)).map(str::to_owned).collect();
    }
    values.retain(|value| !value.is_empty());
}

/// An environment variable that is set to nothing says nothing, as in a pod whose value was left empty. Only the content path
/// means something by it.
pub(super) fn without_empty_environment(command: clap::Command) -> clap::Command {
    let is_empty = |arg: &clap::Arg| {
        arg.get_id() != "containerd_content_path"
            && arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty())
    };
    let forget = move |arg: clap::Arg| if is_empty(&arg) { arg.env("SPEGEL_NOTHING").hide_env(true) } else { arg };
    command.mut_args(forget).mut_subcommands(move |command| command.mut_args(forget))
}

/// A duration as Go writes it: `20ms`, `2s`, `1m30s`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|_| "write it like 20ms, 2s or 1m30s".to_owned())?;
    match Duration::try_from(parsed) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("it must be longer than nothing".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_flags_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_written_as_in_go() {
        let ms = |text: &str| duration(text).unwrap().as_millis();
        assert_eq!(
            (ms("20ms"), ms("2s"), ms("1m30s"), ms("1.5h"), ms("1h0m0s")),
            (20, 2000, 90_000, 5_400_000, 3_600_000)
        );
        for wrong in ["", "20", "-1s", "0s", "soon", "1 fortnight"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_flag_has_the_environment_variable_of_its_name() {
        let cli = Cli::command();
        for command in std::iter::once(&cli).chain(cli.get_subcommands()) {
            for arg in command
                .get_arguments()
                .filter(|arg| !arg.is_positional())
                .filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version"))
            {
                let long = arg.get_long().unwrap();
                let expected = long.to_uppercase().replace('-', "_");
                assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(expected.as_str()), "--{long}");
            }
        }
    }
}
