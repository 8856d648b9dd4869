//! `doctor`, and the cheap ones of its checks at the start and at the end of `registry`.

use std::net::{Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::cli::{Content, DoctorSettings, RegistrySettings};
use crate::doctor::{self, Containerd, DoctorMetrics, Ebpf, Outside, Port, State};
use crate::ebpf::Watch;
use crate::serve::ListenAddr;
use crate::web::{Examination, Examined, Verdict};

/// How long the examination at the end may take; it runs while responses under way finish.
const AT_END: Duration = Duration::from_secs(2);
/// How old an examination may be that somebody looks at.
const FRESH: Duration = Duration::from_secs(20);

fn port(addr: ListenAddr) -> Port {
    let listen = match addr {
        ListenAddr::One(addr) => addr,
        ListenAddr::Any(port) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
    };
    Port { listen }
}

/// Examines the node and prints what was found.
pub(super) async fn examine(settings: DoctorSettings) -> anyhow::Result<ExitCode> {
    let outside = Outside {
        registry: port(settings.registry_addr),
        router: port(settings.router_addr),
        metrics: port(settings.metrics_addr),
        bootstrap: settings.bootstrap_endpoint.map(|endpoint| port(endpoint.addr)),
        sources: super::sources(&settings.bootstrap),
        pull: settings.pull,
    };
    let report = doctor::examine(&doctor::Settings {
        containerd: containerd(&settings.content, settings.containerd_config),
        config_path: settings.config_path,
        node_name: settings.node_name,
        ebpf: Ebpf::Untold,
        outside: Some(outside),
    })
    .await;
    if settings.json {
        println!("{}", serde_json::to_string_pretty(&report).context("write the report")?);
    } else {
        print!("{report}");
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn containerd(content: &Content, config: Option<std::path::PathBuf>) -> Option<Containerd> {
    match content {
        Content::OciLayouts(_) => None,
        Content::Containerd { socket, namespace, content_path } => {
            let (socket, namespace, content_path) = (socket.clone(), namespace.clone(), content_path.clone());
            Some(Containerd { socket, namespace, content_path, config })
        }
    }
}

/// What the process looks at itself.
pub(super) fn settings_of(settings: &RegistrySettings, watch: &Watch) -> doctor::Settings {
    let counted = watch.report();
    let ebpf = if counted.source == "ebpf" { Ebpf::Kernel } else { Ebpf::Sockets(counted.reason.unwrap_or_default()) };
    doctor::Settings {
        containerd: containerd(&settings.content, None),
        config_path: settings.config_path.clone(),
        node_name: settings.node_name.clone(),
        ebpf,
        outside: None,
    }
}

/// What of a report the debug page shows.
fn examination(report: &doctor::Report) -> Examination {
    let verdict = |state| match state {
        State::Good | State::Note => None,
        State::Unknown => Some(Verdict::Idle),
        State::Warning => Some(Verdict::Warning),
        State::Failure => Some(Verdict::Failure),
    };
    let found = report.findings().iter().filter_map(|finding| {
        let (said, change) = (finding.said.clone(), finding.change.clone());
        Some(Examined { check: finding.check, verdict: verdict(finding.state)?, said, change })
    });
    Examination { good: report.count(State::Good), found: found.collect() }
}

/// One line for what was found.
fn tell(report: &doctor::Report, at: &str) {
    let (good, unknown) = (report.count(State::Good), report.count(State::Unknown));
    let (failures, warnings) = (report.line(State::Failure), report.line(State::Warning));
    if failures.is_some() || warnings.is_some() {
        warn!(at, good, unknown, failures, warnings, "this node was examined: see `spegel doctor`");
    } else {
        info!(at, good, unknown, "this node was examined, and nothing found that keeps pulls from the mirror");
    }
}

/// Examines once more while the process stops, within `bound`, and tells it in one line and in the metric, for a last scrape: what has
/// changed since the start is known then, and whether containerd is left with a mirror that it should not have.
pub(super) async fn at_end(settings: &doctor::Settings, metrics: &DoctorMetrics, bound: Duration) {
    if settings.containerd.is_none() || bound.is_zero() {
        return;
    }
    let bound = bound.min(AT_END);
    match tokio::time::timeout(bound, doctor::examine(settings)).await {
        Ok(report) => {
            metrics.set(&report);
            tell(&report, "end");
        }
        Err(_) => warn!(at = "end", ?bound, "this node could not be examined in time"),
    }
}

/// Examines once, and tells it in one line and a metric; then anew when it is asked for, for the debug page.
pub(super) async fn at_start(
    settings: doctor::Settings,
    metrics: DoctorMetrics,
    told: watch::Sender<Option<Examination>>,
    asked: Arc<Notify>,
) {
    if settings.containerd.is_none() {
        return;
    }
    let report = doctor::examine(&settings).await;
    metrics.set(&report);
    told.send_replace(Some(examination(&report)));
    tell(&report, "start");
    let mut last = Instant::now();
    loop {
        asked.notified().await;
        if last.elapsed() >= FRESH {
            told.send_replace(Some(examination(&doctor::examine(&settings).await)));
            last = Instant::now();
        }
    }
}
