//! The real program: what it gives up, what it leaves behind, what it says where it may not.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use aya::programs::loaded_programs;
use rustix::process::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use spegel::ebpf::Report;
use spegel_benches::daemon::{Daemon, find_program, output, wait_until};
use spegel_benches::http::Client;
use spegel_benches::spegel::{Ports, Settings, Source};

use super::{SOON, settings, watch};

const PROGRAM: &str = env!("CARGO_BIN_EXE_spegel");
/// What of `CapEff` in `/proc/<pid>/status` eBPF needs: CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF.
const CAPABILITIES: u64 = 1 << 12 | 1 << 21 | 1 << 38 | 1 << 39;

/// A process with an empty layout on loopback, with ports from `port` on, started by `before`.
pub(crate) fn start(folder: &Path, port: u16, before: &[&str], arguments: &[&str]) -> Daemon {
    let layout = folder.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    fs::write(layout.join("index.json"), "{\"schemaVersion\":2,\"manifests\":[]}").unwrap();
    let settings = Settings {
        program: PROGRAM.into(),
        node: None,
        address: IpAddr::from([127, 0, 0, 1]),
        ports: Ports { registry: port, router: port + 1, metrics: port + 2 },
        source: Source::Layout(layout),
        peers: vec![],
        arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
        log: folder.join("log"),
    };
    let command = settings.command();
    let command: Vec<&str> = before.iter().copied().chain(command.iter().map(String::as_str)).collect();
    Daemon::start("spegel", None, &command, &folder.join("log")).unwrap()
}

/// The first of three ports in a row: the registry's, the router's and that of metrics.
pub(crate) fn ports() -> u16 {
    Ports::free().unwrap().registry
}

pub(crate) fn metrics(port: u16) -> String {
    let url = format!("http://127.0.0.1:{}/metrics", port + 2);
    Client::new(Duration::from_secs(5)).get(&url, &[]).map(|answer| answer.text()).unwrap_or_default()
}

fn peers(port: u16, arguments: &[&str]) -> String {
    let address = format!("127.0.0.1:{}", port + 2);
    output(Command::new(PROGRAM).args(["peers", "--metrics-addr", &address]).args(arguments)).unwrap()
}

fn ask(port: u16) {
    let url = format!("http://127.0.0.1:{port}/v2/");
    assert_eq!(Client::new(Duration::from_secs(5)).get(&url, &[]).unwrap().head.status, 200);
}

fn loaded() -> usize {
    loaded_programs().flatten().filter(|program| program.name_as_str() == Some("own_sockets")).count()
}

#[test]
fn a_killed_process_leaves_nothing_in_the_kernel_and_a_running_one_has_no_privileges() {
    if watch(&settings(3)).is_none() {
        return;
    }
    let (folder, port) = (tempfile::tempdir().unwrap(), ports());
    // With what the chart and the unit give it, and nothing more.
    let just_enough = ["setpriv", "--bounding-set", "-all,+bpf,+net_admin,+perfmon", "--inh-caps=-all"];
    let mut daemon = start(folder.path(), port, &just_enough, &["--ebpf", "on"]);
    daemon
        .wait_until(SOON, "its metrics", || metrics(port).contains("spegel_ebpf_state{source=\"ebpf\",reason=\"\"} 1"))
        .unwrap();
    let before = loaded();
    assert!(before >= 1, "{}", daemon.log());
    assert_eq!(keeps_privileges(&daemon), None);
    ask(port);
    wait_until(SOON, "the connection in the table", || peers(port, &["--once"]).contains("served")).unwrap();
    let report: Report = serde_json::from_str(&peers(port, &["--json"])).unwrap();
    assert_eq!((report.source.as_str(), &report.reason), ("ebpf", &None));
    let row = report.peers.iter().find(|row| row.role == "served").unwrap();
    assert!(row.sent > 0 && row.received > 0, "{row:?}");

    daemon.signal(Signal::KILL).unwrap();
    daemon.wait_exit(SOON).unwrap();
    // Other tests come and go meanwhile, so it is asked for less than before, some time.
    wait_until(SOON, "nothing of it in the kernel", || loaded() < before).unwrap();
}

#[test]
fn without_privileges_it_says_so_and_looks_at_its_own_sockets() {
    if !rustix::process::geteuid().is_root() || find_program("setpriv").is_none() {
        return println!("skipped: giving up capabilities with setpriv needs root");
    }
    let dropped = ["setpriv", "--bounding-set", "-bpf,-net_admin,-sys_admin,-perfmon"];
    let (folder, port) = (tempfile::tempdir().unwrap(), ports());
    let mut daemon = start(folder.path(), port, &dropped, &[]);
    let state = "spegel_ebpf_state{source=\"tcp_info\",reason=\"no_privilege\"} 1";
    daemon.wait_until(SOON, "its metrics", || metrics(port).contains(state)).unwrap();
    let said: Vec<_> = daemon.log().lines().filter(|line| line.contains("CAP_BPF")).map(str::to_owned).collect();
    assert!(said.len() == 1 && said[0].contains("only our own sockets are seen"), "{said:?}");
    let hardened = fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled").unwrap_or_default();
    println!("kernel.unprivileged_bpf_disabled is {}", hardened.trim());
    if !matches!(hardened.trim(), "" | "0") {
        let setting = format!("kernel.unprivileged_bpf_disabled is {}", hardened.trim());
        assert!(said[0].contains(&setting), "{said:?}");
    }
    check_fallback(port);
    let metrics = metrics(port);
    assert!(metrics.contains("spegel_peer_sent_bytes_total{peer=\"127.0.0.1\",role=\"served\"}"), "{metrics}");
    assert!(!metrics.contains("source=\"upstream\""), "what is not known is not zero");
    daemon.stop().unwrap();

    let mut daemon = start(folder.path(), port, &dropped, &["--ebpf", "on"]);
    let status = daemon.wait_exit(SOON).unwrap();
    assert!(!status.success());
    assert!(daemon.log().contains("--ebpf on: CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed"), "{}", daemon.log());
}

/// A node where only the first version of control groups is mounted.
#[test]
fn without_control_groups_of_version_2_it_says_so() {
    if !rustix::process::geteuid().is_root() || find_program("unshare").is_none() {
        return println!("skipped: unmounting in a mount namespace needs root");
    }
    let unmount = "umount -l $(awk '/ - cgroup2 /{print $5}' /proc/self/mountinfo) && exec \"$@\"";
    let before = ["unshare", "--mount", "--propagation", "private", "sh", "-c", unmount, "sh"];
    let (folder, port) = (tempfile::tempdir().unwrap(), ports());
    let mut daemon = start(folder.path(), port, &before, &[]);
    let state = "spegel_ebpf_state{source=\"tcp_info\",reason=\"no_cgroup2\"} 1";
    daemon.wait_until(SOON, "its metrics", || metrics(port).contains(state)).unwrap();
    let said = daemon.log().lines().filter(|line| line.contains("only the first version is mounted")).count();
    assert_eq!(said, 1, "{}", daemon.log());
    check_fallback(port);
}

/// What containerd's default profile answers to who has the capabilities: containerd before 1.7 lets nobody without CAP_SYS_ADMIN call bpf(2), and of what else
/// it keeps back some may be tried. A filter belongs to a thread and to what it starts.
#[test]
fn under_a_seccomp_profile_it_says_so() {
    let filter = |calls: &[i64], errno: i32| -> BpfProgram {
        let rules = calls.iter().map(|call| (*call, vec![])).collect();
        let refused = SeccompAction::Errno(errno as u32);
        let arch = std::env::consts::ARCH.try_into().unwrap();
        SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap().try_into().unwrap()
    };
    let refused = [
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_mount,
        libc::SYS_setns,
        libc::SYS_unshare,
        libc::SYS_keyctl,
        libc::SYS_userfaultfd,
    ];
    let filters = [filter(&refused, libc::EPERM), filter(&[libc::SYS_clone3], libc::ENOSYS)];
    let (folder, port) = (tempfile::tempdir().unwrap(), ports());
    let within = |arguments: &'static [&'static str]| {
        let (filters, folder) = (filters.clone(), folder.path().to_path_buf());
        let ((give, take), (held, until)) = (mpsc::channel(), mpsc::channel::<()>());
        // A daemon dies with the thread that made it, which stays until the other end is dropped.
        std::thread::spawn(move || {
            filters.iter().for_each(|filter| seccompiler::apply_filter(filter).unwrap());
            give.send(start(&folder, port, &[], arguments)).unwrap();
            let _ = until.recv();
        });
        (take.recv().unwrap(), held)
    };
    let (mut daemon, _held) = within(&[]);
    // Without the capabilities it does not come so far.
    let (reason, why) = if watch(&settings(3)).is_some() {
        ("forbidden", "bpf(2) is refused in spite of the capabilities: by the seccomp profile")
    } else {
        ("no_privilege", "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed")
    };
    let state = format!("spegel_ebpf_state{{source=\"tcp_info\",reason=\"{reason}\"}} 1");
    daemon.wait_until(SOON, "its metrics", || metrics(port).contains(&state)).unwrap();
    assert_eq!(daemon.log().lines().filter(|line| line.contains(why)).count(), 1, "{}", daemon.log());
    check_fallback(port);
    daemon.stop().unwrap();

    let (mut daemon, _held) = within(&["--ebpf", "on"]);
    assert!(!daemon.wait_exit(SOON).unwrap().success());
    assert!(daemon.log().contains(&format!("--ebpf on: {why}")), "{}", daemon.log());
}

/// Our own sockets tell what they know: the bytes of the content, to the byte.
fn check_fallback(port: u16) {
    let (request, answer) = ask_and_close(port);
    wait_until(SOON, "the connection in the table", || peers(port, &["--once"]).contains("served")).unwrap();
    let served = || {
        let report: Report = serde_json::from_str(&peers(port, &["--json"])).unwrap();
        let row = report.peers.iter().find(|row| row.role == "served").cloned();
        (report, row)
    };
    wait_until(SOON, "its end", || served().1.is_some_and(|row| row.open == 0)).unwrap();
    let (report, row) = served();
    let row = row.unwrap();
    assert_eq!((row.opened, row.sent, row.received), (1, answer, request), "{row:?}");
    assert!(row.round_trip_us.is_some(), "{row:?}");
    assert_eq!((report.source.as_str(), row.failed, row.reset), ("tcp_info", None, None));
}

/// One request on a connection that the client ends; returns the bytes either way.
fn ask_and_close(port: u16) -> (u64, u64) {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let request = b"GET /v2/ HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    stream.write_all(request).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    (request.len() as u64, answer.len() as u64)
}

/// Whether a thread of a process still has what eBPF needs.
fn keeps_privileges(daemon: &Daemon) -> Option<String> {
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for set in ["CapEff:", "CapPrm:", "CapInh:"] {
            let mask = status.lines().find_map(|line| line.strip_prefix(set)).unwrap().trim();
            if u64::from_str_radix(mask, 16).unwrap() & CAPABILITIES != 0 {
                return Some(format!("{set} of {}", status.lines().next().unwrap()));
            }
        }
    }
    None
}

#[test]
fn it_can_be_turned_off() {
    let (folder, port) = (tempfile::tempdir().unwrap(), ports());
    let mut daemon = start(folder.path(), port, &[], &["--ebpf", "off"]);
    let state = "spegel_ebpf_state{source=\"tcp_info\",reason=\"off\"} 1";
    daemon.wait_until(SOON, "its metrics", || metrics(port).contains(state)).unwrap();
    assert_eq!(keeps_privileges(&daemon), None);
    let url = format!("http://127.0.0.1:{}/debug/peers", port + 2);
    assert_eq!(Client::new(Duration::from_secs(5)).get(&url, &[]).unwrap().head.status, 200);
}
