//! Flags and environment into validated settings. The only reader of the environment.

mod args;
mod cleanup;
mod doctor;
mod ebpf;
mod environment;
mod level;
mod peers;
mod serve;
mod settings;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

pub use args::{LogFormat, LogLevel, VersionFormat};
pub use cleanup::{CleanupSettings, CleanupWaitSettings, ClusterSettings};
pub use doctor::DoctorSettings;
pub use level::LevelSettings;
pub use peers::{PeersOrder, PeersSettings, PeersShow};
pub use serve::ServeSettings;
pub use settings::{Bootstrap, BootstrapEndpoint, Content, Peers, RegistrySettings, Zone};

/// What the command line and the environment ask for.
#[derive(Debug)]
pub struct Invocation {
    /// How to log.
    pub log: Log,
    /// What to do.
    pub command: Command,
}

/// How to log.
#[derive(Clone, Copy, Debug)]
pub struct Log {
    /// The least level that is logged.
    pub level: LogLevel,
    /// JSON or text; if not told, text on a terminal.
    pub format: Option<LogFormat>,
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Say which version this is.
    Version(VersionFormat),
    /// Write containerd's mirror configuration.
    Configuration(crate::hosts::Configuration),
    /// Serve.
    Registry(Box<RegistrySettings>),
    /// Take back what was written on this node.
    Cleanup(CleanupSettings),
    /// Wait until all nodes are clean.
    CleanupWait(Box<CleanupWaitSettings>),
    /// Examine this node.
    Doctor(Box<DoctorSettings>),
    /// Show a running process's connections.
    Peers(PeersSettings),
    /// Show or change the level of a running process's log.
    Level(LevelSettings),
    /// Print this script.
    Completions(Vec<u8>),
}

/// Reads the process's arguments and environment.
///
/// # Errors
/// The exit code, after help, or what is wrong, was printed.
pub fn parse() -> Result<Invocation, ExitCode> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let parsed = parse_from(arguments.clone());
    let file = match &parsed {
        Ok(Invocation { command: Command::Doctor(settings), .. }) => settings.env_file.clone(),
        // What a flag lacks may stand in the file.
        Err(error) if error.use_stderr() => env_file(&arguments),
        _ => None,
    };
    let parsed = file.map_or(parsed, |file| Err(environment::again(&file, &arguments)));
    parsed.map_err(|error| {
        // Nothing can be done about a terminal that is gone.
        let _ = error.print();
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

/// The file of variables that arguments of `doctor` name, whatever else is wrong with them.
fn env_file(arguments: &[std::ffi::OsString]) -> Option<std::path::PathBuf> {
    let command = args::without_empty_environment(args::Cli::command()).ignore_errors(true);
    let matches = command.try_get_matches_from(arguments).ok()?;
    let doctor = matches.subcommand_matches("doctor")?;
    doctor.try_get_one::<std::path::PathBuf>("env_file").ok().flatten().cloned()
}

fn parse_from(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Invocation, clap::Error> {
    let matches = args::without_empty_environment(args::Cli::command()).try_get_matches_from(arguments)?;
    let cli = args::Cli::from_arg_matches(&matches)?;
    let command = match (cli.command, matches.subcommand()) {
        (args::Command::Version { format }, _) => Command::Version(format),
        (args::Command::Configuration(mut args), Some((_, matches))) => {
            args.split_lists(matches);
            Command::Configuration(settings::configuration(args)?)
        }
        (args::Command::Registry(mut args), Some((_, matches))) => {
            args.split_lists(matches);
            Command::Registry(Box::new(settings::registry(*args)?))
        }
        (args::Command::Cleanup(args), _) => Command::Cleanup(cleanup::cleanup(args)?),
        (args::Command::CleanupWait(args), _) => Command::CleanupWait(Box::new(cleanup::cleanup_wait(args)?)),
        (args::Command::Doctor(mut args), Some((_, matches))) => {
            args.split_lists(matches);
            Command::Doctor(Box::new(doctor::doctor(*args)?))
        }
        (args::Command::Peers(args), _) => Command::Peers(peers::peers(&args)?),
        (args::Command::Level(args), _) => Command::Level(level::level(&args)?),
        (args::Command::Completions { shell }, _) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut args::Cli::command(), "spegel", &mut script);
            Command::Completions(script)
        }
        (_, None) => return Err(args::Cli::command().error(clap::error::ErrorKind::MissingSubcommand, "no command")),
    };
    Ok(Invocation { log: Log { level: cli.log_level, format: cli.log_format }, command })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use super::*;

    /// What a command line comes to, as text.
    fn settings(arguments: &[&str]) -> String {
        let arguments = std::iter::once("spegel").chain(arguments.iter().copied()).map(Into::into);
        match parse_from(arguments) {
            Ok(invocation) => format!("{invocation:?}"),
            Err(error) => panic!("{error}"),
        }
    }

    fn refusal(arguments: &[&str]) -> String {
        let arguments = std::iter::once("spegel").chain(arguments.iter().copied()).map(Into::into);
        parse_from(arguments).unwrap_err().to_string()
    }

    /// Each flag, given, must change what the command does; no flag may be left out here. `required` are pairs of a flag and its
    /// value, each left away where it is tried.
    fn check_flags(command: &str, required: &[&str], flags: &[&[&str]]) {
        let base = |tried: &[&str]| -> Vec<&str> {
            let pairs = required.chunks(2).filter(|pair| !tried.contains(&pair[0]));
            std::iter::once(command).chain(pairs.flatten().copied()).collect()
        };
        let plain = settings(&base(&[]));
        let mut told: BTreeSet<&str> = BTreeSet::new();
        for flag in flags {
            let changed = settings(&[&base(flag)[..], flag].concat());
            assert_ne!(plain, changed, "{flag:?} changes nothing");
            told.insert(flag[0].split('=').next().unwrap());
        }
        let cli = args::Cli::command();
        let command = cli.find_subcommand(command).unwrap();
        let all: Vec<String> = command.get_arguments().map(|arg| format!("--{}", arg.get_long().unwrap())).collect();
        let missing: Vec<_> = all.iter().filter(|flag| !told.contains(flag.as_str()) && *flag != "--help").collect();
        assert!(missing.is_empty(), "not tried: {missing:?}");
    }

    #[test]
    fn each_flag_of_configuration_changes_something() {
        let secrets = tempfile::tempdir().unwrap();
        std::fs::write(secrets.path().join("username"), "user\n").unwrap();
        std::fs::write(secrets.path().join("password"), "secret\n").unwrap();
        let secrets = secrets.path().to_str().unwrap();
        check_flags(
            "configuration",
            &["--mirror-targets", "http://127.0.0.1:5000"],
            &[
                &["--containerd-registry-config-path", "/elsewhere"],
                &["--mirrored-registries", "https://a.test", "https://b.test:5000"],
                &["--mirror-targets", "http://[fd00::1]:5000"],
                &["--resolve-tags=false"],
                &["--prepend-existing"],
                &["--node-name", "elsewhere"],
                &["--basic-auth-dir", secrets],
            ],
        );
    }

    #[test]
    fn each_flag_of_registry_changes_something() {
        let secrets = tempfile::tempdir().unwrap();
        std::fs::write(secrets.path().join("username"), "user").unwrap();
        std::fs::write(secrets.path().join("password"), "secret").unwrap();
        let key = secrets.path().join("network.key");
        std::fs::write(&key, format!("/key/swarm/psk/1.0.0/\n/base16/\n{}\n", "ab".repeat(32))).unwrap();
        let key = key.to_str().unwrap();
        let secrets = secrets.path().to_str().unwrap();
        check_flags(
            "registry",
            &["--bootstrap-kind", "static", "--startup-taint", "a", "--kubernetes-service-host", "10.0.0.1"],
            &[
                &["--bootstrap-kind", "dns", "--dns-bootstrap-domain", "spegel.test."],
                &["--bootstrap-kind=dns", "--dns-bootstrap-domain", "other.test."],
                &["--dns-bootstrap-domain", "spegel.test.", "--bootstrap-kind", "dns"],
                &["--static-bootstrap-peers", "10.0.0.1", "/ip4/10.0.0.2/tcp/5001"],
                &["--bootstrap-kind", "mdns"],
                &["--bootstrap-kind", "http", "--http-bootstrap-url", "http://a.test/id"],
                &["--http-bootstrap-url", "http://b.test/id", "--bootstrap-kind", "http"],
                &["--http-bootstrap-addr", ":1"],
                &["--http-bootstrap-cert-dir", "/elsewhere", "--http-bootstrap-addr", ":1"],
                &["--advertise-addr", "10.0.0.1", "[fd00::1]:7"],
                &["--peer-cidrs", "10.0.0.0/8", "fd00::1"],
                &["--network-key-file", key],
                &["--router-max-records", "7"],
                &["--metrics-addr", ":1"],
                &["--debug-web-enabled=false"],
                &["--containerd-sock", "/elsewhere"],
                &["--containerd-namespace", "default"],
                &["--containerd-content-path", ""],
                &["--containerd-registry-config-path", "/elsewhere"],
                &["--oci-layout", "/a", "/b"],
                &["--data-dir", "/elsewhere"],
                &["--router-addr", "[::1]:1"],
                &["--registry-addr", "127.0.0.1:1"],
                &["--mirrored-registries", "https://a.test"],
                &["--registry-filters", "^a.test/b{1,2}$"],
                &["--mirror-resolve-timeout", "1s"],
                &["--mirror-resolve-retries", "7"],
                &["--mirror-stall-timeout", "1m30s"],
                &["--storm", "on"],
                &["--storm-max-wait", "1s", "--storm", "on"],
                &["--max-uploads", "7"],
                &["--upload-rate", "1000000"],
                &["--drain-timeout", "1s"],
                &["--zone", "zone-1"],
                &["--zone-from-node"],
                &["--startup-taint", "b"],
                &["--kubernetes-service-host", "10.0.0.2"],
                &["--kubernetes-service-port", "6443"],
                &["--service-account-dir", "/elsewhere"],
                &["--serve-engine", "tokio"],
                &["--serve-transfer", "copy"],
                &["--watchdog", "0"],
                &["--watchdog", "1s"],
                &["--max-connections", "1"],
                &["--max-header-bytes", "8192"],
                &["--header-timeout", "1s"],
                &["--idle-timeout", "1s"],
                &["--write-stall-timeout", "1s"],
                &["--max-open-files", "1000"],
                &["--max-pipes", "0"],
                &["--node-name", "elsewhere"],
                &["--basic-auth-dir", secrets],
                &["--ebpf", "off"],
                &["--containerd-cgroup", "/system.slice/containerd.service"],
                &["--node-ip", "10.0.0.1,fd00::1"],
                &["--upstream-ports", "5443"],
            ],
        );
    }

    #[test]
    fn a_file_of_variables_is_found_whatever_the_flags_lack() {
        let of = |arguments: &[&str]| {
            let arguments: Vec<_> = std::iter::once(&"spegel").chain(arguments).map(Into::into).collect();
            env_file(&arguments)
        };
        let expected = Some(std::path::PathBuf::from("/a"));
        assert_eq!(of(&["doctor", "--bootstrap-kind", "dns", "--env-file", "/a"]), expected);
        assert_eq!(of(&["doctor", "--env-file=/a", "--nonsense"]), expected);
        assert_eq!(of(&["doctor", "--nonsense", "1"]), None);
        assert_eq!(of(&["registry", "--env-file", "/a"]), None);
        assert_eq!(of(&["nonsense", "--env-file", "/a"]), None);
    }

    #[test]
    fn each_flag_of_doctor_changes_something() {
        check_flags(
            "doctor",
            &[],
            &[
                &["--json"],
                &["--env-file", "/elsewhere"],
                &["--pull", "registry.test/app:1"],
                &["--containerd-config", "/elsewhere"],
                &["--containerd-sock", "/elsewhere"],
                &["--containerd-namespace", "default"],
                &["--containerd-content-path", ""],
                &["--containerd-registry-config-path", "/elsewhere"],
                &["--oci-layout", "/a"],
                &["--metrics-addr", ":1"],
                &["--router-addr", ":1"],
                &["--registry-addr", ":1"],
                &["--node-name", "elsewhere"],
                &["--bootstrap-kind", "mdns"],
                &["--bootstrap-kind=dns", "--dns-bootstrap-domain", "a.test."],
                &["--dns-bootstrap-domain", "b.test.", "--bootstrap-kind", "dns"],
                &["--static-bootstrap-peers", "10.0.0.1", "--bootstrap-kind", "static"],
                &["--http-bootstrap-url", "http://a.test/id", "--bootstrap-kind", "http"],
                &["--http-bootstrap-addr", ":1"],
                &["--http-bootstrap-cert-dir", "/elsewhere", "--http-bootstrap-addr", ":1"],
            ],
        );
    }

    #[test]
    fn each_flag_of_peers_changes_something() {
        check_flags(
            "peers",
            &[],
            &[&["--metrics-addr", ":1"], &["--json"], &["--once"], &["--sort", "rtt"], &["--interval", "5s"]],
        );
    }

    #[test]
    fn what_log_level_is_told_changes_something() {
        let told = [&["log-level"][..], &["log-level", "debug"], &["log-level", "--metrics-addr", ":1"]].map(settings);
        assert!(told[0] != told[1] && told[0] != told[2] && told[1].contains("level: Some(Debug)"), "{told:?}");
    }

    #[test]
    fn each_flag_of_cleanup_changes_something() {
        check_flags(
            "cleanup",
            &["--addr", ":1"],
            &[
                &["--addr", ":2"],
                &["--once"],
                &["--containerd-registry-config-path", "/elsewhere"],
                &["--data-dir", "/elsewhere"],
            ],
        );
    }

    #[test]
    fn each_flag_of_cleanup_wait_changes_something() {
        let cluster = ["--daemonset", "a", "--kubernetes-service-host", "10.0.0.1"];
        let required = [&["--probe-endpoint", "a:1"][..], &cluster].concat();
        check_flags(
            "cleanup-wait",
            &required,
            &[
                &["--probe-endpoint", "a:2"],
                &["--threshold", "1"],
                &["--period", "1s"],
                &["--deadline", "1m"],
                &["--daemonset", "b"],
                &["--namespace", "b"],
                &["--mirror-selector", "a=b"],
                &["--kubernetes-service-host", "10.0.0.2"],
                &["--kubernetes-service-port", "6443"],
                &["--service-account-dir", "/elsewhere"],
                &["--repeat-command", "kubectl"],
            ],
        );
    }

    /// The chart's objects, as its tests expect them, name flags that there are, with values that are understood.
    #[test]
    fn the_charts_arguments_are_understood() {
        let objects = include_str!("../../xtask/src/chart/objects.snapshot");
        let mut told = Vec::new();
        for block in objects.split(" args:\n").skip(1) {
            let lines = block.lines().map_while(|line| line.trim_start().strip_prefix("- "));
            let arguments: Vec<String> =
                lines.map(|line| line.trim_matches('"').replace("$(NODE_IP)", "10.0.0.1")).collect();
            let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            told.push(arguments[0].to_owned());
            if arguments[0] == "cleanup-wait" {
                arguments.extend(["--kubernetes-service-host", "10.0.0.1"]);
            }
            settings(&arguments);
        }
        assert_eq!(told, ["configuration", "registry", "cleanup", "cleanup-wait"]);
    }

    #[test]
    fn several_kinds_of_bootstrap_may_be_given_at_once() {
        let told =
            settings(&["registry", "--bootstrap-kind", "static,dns,mdns", "--dns-bootstrap-domain", "spegel.test."]);
        let all = ["Dns(\"spegel.test.\")", "Static(", "Mdns"].iter().all(|kind| told.contains(kind));
        assert!(all, "{told}");
    }

    #[test]
    fn what_is_wrong_is_said_by_flag() {
        for (arguments, says) in [
            (&["registry", "--bootstrap-kind", "carrier-pigeon"][..], "the kinds are dns, http, mdns and static"),
            (&["registry", "--bootstrap-kind", "dns"], "needs --dns-bootstrap-domain"),
            (&["registry", "--bootstrap-kind", "static", "--registry-addr", "here"], "--registry-addr here"),
            (&["registry", "--bootstrap-kind", "static", "--registry-filters", "("], "--registry-filters"),
            (&["registry", "--bootstrap-kind", "static", "--mirror-resolve-timeout", "20"], "20ms, 2s or 1m30s"),
            (&["registry", "--bootstrap-kind", "static", "--serve-engine", "epoll"], "auto, io-uring and tokio"),
            (&["registry", "--bootstrap-kind", "static", "--max-connections", "0"], "at least 1"),
            (&["configuration", "--mirror-targets", "ftp://a"], "--mirror-targets"),
            (&["registry", "--bootstrap-kind", "static", "--zone", "here, there"], "--zone here, there"),
            (&["registry", "--bootstrap-kind", "static", "--zone-from-node"], "--kubernetes-service-host"),
            (&["registry", "--bootstrap-kind", "static", "--startup-taint", "a"], "--kubernetes-service-host"),
            (&["registry", "--bootstrap-kind", "static", "--startup-taint", "a:NoSchedule"], "key alone"),
            (&["registry"], "--bootstrap-kind needs a kind"),
            (&["configuration"], "--mirror-targets"),
            (&["registry", "--bootstrap-kind", "mdns", "--upstream-ports", "https"], "--upstream-ports https"),
            (&["registry", "--bootstrap-kind", "mdns", "--upstream-ports", ""], "--upstream-ports names no port"),
            (&["peers", "--json", "--once"], "--json or --once"),
            (&["log-level", "loud"], "possible values: DEBUG, INFO, WARN, ERROR"),
            (&["cleanup"], "--addr"),
            (&["cleanup-wait"], "--probe-endpoint"),
            (&["cleanup-wait", "--probe-endpoint", "nowhere"], "host and a port"),
            (&["cleanup-wait", "--probe-endpoint", "a:1", "--threshold", "0"], "--threshold"),
            (&["cleanup-wait", "--probe-endpoint", "a:1", "--daemonset", "a"], "--kubernetes-service-host"),
            (&["registry", "--bootstrap-kind", "http"], "--http-bootstrap-url or --http-bootstrap-addr"),
            (&["registry", "--bootstrap-kind", "http", "--http-bootstrap-url", "a:1"], "--http-bootstrap-url"),
            (&["registry", "--bootstrap-kind", "mdns", "--advertise-addr", "here"], "--advertise-addr here"),
            (&["registry", "--bootstrap-kind", "mdns", "--peer-cidrs", "10.0.0.0/99"], "--peer-cidrs 10.0.0.0/99"),
            (&["registry", "--bootstrap-kind", "mdns", "--network-key-file", "/dev/null"], "/key/swarm/psk/1.0.0/"),
        ] {
            let said = refusal(arguments);
            assert!(said.contains(says), "{arguments:?}: {said}");
        }
    }

    #[test]
    fn no_refusal_tells_a_password() {
        let url = "https://me:hunter2@registry.test/x y";
        for arguments in [
            &["registry", "--bootstrap-kind", "mdns", "--mirrored-registries", url][..],
            &["configuration", "--mirror-targets", "http://127.0.0.1:5000", "--mirrored-registries", url],
            &["configuration", "--mirror-targets", url],
            &["registry", "--bootstrap-kind", "http", "--http-bootstrap-url", url],
        ] {
            let said = refusal(arguments);
            assert!(said.contains("registry.test") && !said.contains("hunter2"), "{said}");
        }
    }
}
