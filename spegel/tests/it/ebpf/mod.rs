//! What the kernel's programs count, beside what both ends of real connections count themselves.
//!
//! The programs are attached to the control group of the test itself, so each test has a port of its own. One that may not attach says so.

#![allow(clippy::unwrap_used)]

mod bytes;
pub(crate) mod daemon;
mod peers;
mod quality;
pub(crate) mod upstream;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use spegel::ebpf::{Mode, PeerRow, Pulled, Refusal, Report, Settings, Watch};
use spegel::metrics::{Figures, Format};
use spegel_benches::daemon::wait_until;

/// How soon what has happened is in the table.
const SOON: Duration = Duration::from_secs(10);

/// What is watched for a registry on `port`, whose peers differ by loopback addresses.
pub(crate) fn settings(port: u16) -> Settings {
    Settings {
        mode: Mode::On,
        registry_port: port,
        router_port: 1,
        containerd_cgroup: None,
        containerd_socket: None,
        node_addresses: vec![],
        upstream_ports: vec![],
        peers_on_loopback: true,
    }
}

/// A view by the kernel; none where that cannot be had, which is said.
pub(crate) fn watch(settings: &Settings) -> Option<Watch> {
    match watch_or_refusal(settings) {
        Ok(watch) => Some(watch),
        Err(
            refusal @ (Refusal::NoPrivilege(_) | Refusal::NoCgroup2(_) | Refusal::OldKernel(_) | Refusal::Forbidden(_)),
        ) => {
            println!("skipped: {refusal}");
            None
        }
        Err(refusal) => panic!("{refusal}"),
    }
}

fn watch_or_refusal(settings: &Settings) -> Result<Watch, Refusal> {
    let settings = settings.clone();
    // What is given up is the thread's, and the test needs it still.
    std::thread::spawn(move || Watch::start(&settings)).join().unwrap()
}

fn row(report: &Report, address: IpAddr, role: &str) -> Option<PeerRow> {
    report.peers.iter().find(|row| row.address == address && row.role == role).cloned()
}

/// The sum of a metric's samples with this in their labels, as they are scraped.
fn figure(watch: &Watch, name: &str, label: &str) -> f64 {
    let (mut figures, pulled) = (Figures::default(), Arc::<Pulled>::default());
    pulled.add_peer(5_000_003);
    watch.register(&mut figures, pulled);
    let text = spegel::metrics::encode(&figures, Format::OpenMetrics).unwrap();
    let samples = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
    samples.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
}

/// The report in which `is_there` holds.
#[track_caller]
fn report_when(watch: &Watch, what: &str, is_there: impl Fn(&Report) -> bool) -> Report {
    if let Err(error) = wait_until(SOON, what, || is_there(&watch.report())) {
        panic!("{error:#}: {:#?}", watch.report());
    }
    watch.report()
}
