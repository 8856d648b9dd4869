//! What a containerd gets from upstream, which no proxy sees: here a process in a control group of its own stands for it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use spegel_benches::daemon::{output, wait_until};
use spegel_benches::netns::Lab;

use spegel::ebpf::{Mode, Refusal, Report};

use super::{figure, report_when, row, settings, watch, watch_or_refusal};

/// A control group that is removed when dropped.
pub(crate) struct Group(pub(crate) PathBuf);

impl Group {
    pub(crate) fn new(name: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?.split(' ').nth(4)?;
        let folder = PathBuf::from(mount).join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        Some(Self(folder))
    }

    /// A script of bash's that runs in it, in a node of a lab.
    fn run(&self, lab_node: &spegel_benches::netns::Node, script: &str) -> String {
        // First the group: within a namespace `ip` shows another /sys.
        let enter = format!("echo $$ > {}/cgroup.procs && exec ip netns exec \"$0\" bash -c \"$1\"", self.0.display());
        output(Command::new("bash").args(["-c", &enter, lab_node.namespace(), script])).unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that has just ended may still be in it.
        let is_gone = || fs::remove_dir(&self.0).is_ok() || !self.0.exists();
        let _ = wait_until(Duration::from_secs(5), "an empty group", is_gone);
    }
}

#[test]
fn bytes_from_upstream_are_told_from_what_else_containerd_has() {
    if let Err(reason) = Lab::available() {
        return println!("skipped: {reason}");
    }
    let Some(group) = Group::new("spegel-test-containerd") else {
        return println!("skipped: no control groups of version 2 can be made here");
    };
    let mut lab = Lab::new().unwrap();
    let node = lab.add_node().unwrap();
    let host = lab.host_address();
    let (registry, api) = (TcpListener::bind((host, 0)).unwrap(), TcpListener::bind((host, 0)).unwrap());
    let (registry_port, api_port) = (registry.local_addr().unwrap().port(), api.local_addr().unwrap().port());
    let mut settings = settings(2);
    settings.upstream_ports = vec![registry_port];
    settings.containerd_cgroup = Some(group.0.clone());
    let Some(watch) = watch(&settings) else { return };
    let layer = 5_000_003;
    for (listener, length) in [(registry, layer), (api, 7_000)] {
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                stream.read_exact(&mut [0; 4]).unwrap();
                stream.write_all(&vec![7; length]).unwrap();
            }
        });
    }
    let pull = |port: u16| format!("exec 3<>/dev/tcp/{host}/{port}; printf pull >&3; cat <&3 | wc -c; exec 3>&-");
    assert_eq!(group.run(&node, &pull(registry_port)).trim(), layer.to_string());
    group.run(&node, &pull(api_port));
    // A port-forward stays on the node.
    group.run(&node, "(exec 3<>/dev/tcp/127.0.0.1/9) 2> /dev/null || true");
    // The same from outside of the group is somebody else's.
    output(node.command("bash").args(["-c", &pull(registry_port)])).unwrap();

    let host = IpAddr::from(host);
    let report = report_when(&watch, "both connections", |report| {
        ["upstream", "other"].iter().all(|role| row(report, host, role).is_some_and(|row| row.open == 0))
    });
    let (upstream, other) = (row(&report, host, "upstream").unwrap(), row(&report, host, "other").unwrap());
    assert_eq!((upstream.opened, upstream.received, upstream.sent), (1, layer as u64, 4));
    assert_eq!((other.opened, other.received), (1, 7_000));
    assert_eq!(report.peers.len(), 2, "{report:#?}");
    // As much came from peers.
    assert_eq!(figure(&watch, "spegel_pull_bytes_total{", "source=\"upstream\""), layer as f64);
    assert_eq!(figure(&watch, "spegel_pull_offload_ratio ", ""), 0.5);
    assert_eq!(report.containerd.as_deref(), group.0.to_str());
}

/// The unit of containerd's is started after spegel's, and started anew: its group comes, goes and comes back. The thread that attaches to it has given up
/// its privileges by then.
#[test]
fn containerds_group_may_come_late_and_come_back() {
    if let Err(reason) = Lab::available() {
        return println!("skipped: {reason}");
    }
    let Some(group) = Group::new("spegel-test-restarted") else {
        return println!("skipped: no control groups of version 2 can be made here");
    };
    let mut lab = Lab::new().unwrap();
    let node = lab.add_node().unwrap();
    let host = lab.host_address();
    let registry = TcpListener::bind((host, 0)).unwrap();
    let port = registry.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in registry.incoming() {
            let mut stream = stream.unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
            stream.write_all(&[7; 10_000]).unwrap();
        }
    });
    let mut settings = settings(4);
    settings.upstream_ports = vec![port];
    settings.containerd_cgroup = Some(group.0.clone());
    fs::remove_dir(&group.0).unwrap();
    // Who insists is told at once.
    match watch_or_refusal(&settings) {
        Err(Refusal::NotAttached(why)) => assert!(why.contains("--containerd-cgroup"), "{why}"),
        Err(refusal) => return println!("skipped: {refusal}"),
        Ok(watch) => panic!("{watch:?}"),
    }
    settings.mode = Mode::Auto;
    let Some(watch) = watch(&settings) else { return };
    assert!(watch.report().containerd_unseen.unwrap().contains("no control group"), "{:?}", watch.report());
    assert!(watch.report().roles.iter().all(|role| role.role != "upstream"), "what was never seen is not zero");

    let pull = format!("exec 3<>/dev/tcp/{host}/{port}; printf pull >&3; cat <&3 | wc -c; exec 3>&-");
    for round in 1..=2 {
        fs::create_dir(&group.0).unwrap();
        report_when(&watch, "the group", |report| report.containerd.is_some());
        assert_eq!(figure(&watch, "spegel_ebpf_containerd_attached ", ""), 1.0);
        assert_eq!(group.run(&node, &pull).trim(), "10000");
        let upstream = |report: &Report| row(report, host.into(), "upstream");
        let report = report_when(&watch, "the pull", |report| upstream(report).is_some_and(|row| row.opened == round));
        assert_eq!(upstream(&report).unwrap().received, 10_000 * round);
        wait_until(Duration::from_secs(5), "an empty group", || fs::remove_dir(&group.0).is_ok()).unwrap();
        let report = report_when(&watch, "that it is gone", |report| report.containerd.is_none());
        assert!(report.containerd_unseen.unwrap().contains("is gone"));
        assert_eq!(figure(&watch, "spegel_ebpf_containerd_attached ", ""), 0.0);
        assert!(report.roles.iter().any(|role| role.role == "upstream"), "what was told stays");
    }
}
