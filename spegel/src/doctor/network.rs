//! The mirror's process, its ports, and its peers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::finding::Finding;
use super::http::{self, Answer};
use super::{Ebpf, Outside, Port};
use crate::bootstrap::BootstrapError;

/// The largest text of metrics that is read, in bytes.
const MAX_METRICS: usize = 8 << 20;
/// How long a peer's port may take to be reached.
const REACH: Duration = Duration::from_secs(2);
/// What both sides of a connection between routers begin with: multistream-select, with its length before it.
const GREETING: &[u8] = b"\x13/multistream/1.0.0\n";
/// How long a source of peers may take.
const SOURCE: Duration = Duration::from_secs(10);
/// How many peers are tried.
const MAX_PEERS: usize = 64;
/// How far clocks may be apart.
const SKEW: Duration = Duration::from_secs(60);
/// The first second of 2025, in seconds since 1970: no clock is right that says less.
const EARLIEST: u64 = 1_735_689_600;

/// What was seen of the process.
#[derive(Debug)]
pub(super) struct Running {
    /// Its metrics, if it runs.
    metrics: Result<String, String>,
    ready: Result<(), String>,
    ports: Vec<Taken>,
}

/// What became of a try to listen.
#[derive(Debug)]
struct Taken {
    name: &'static str,
    listen: SocketAddr,
    /// Why one cannot listen there.
    why: Option<String>,
}

// === impl Port ===

impl Port {
    /// Where this node reaches it.
    pub(super) fn dial(self) -> SocketAddr {
        let ip = match self.listen.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            // A dual-stack socket; where there is no IPv6 it is IPv4's alone.
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.listen.port())
    }
}

pub(super) async fn look(outside: &Outside) -> Running {
    let metrics = metrics(outside).await;
    let ready = match http::get(&format!("http://{}/readyz", outside.registry.dial()), &[], 4096).await {
        Ok(Answer { status: 200, .. }) => Ok(()),
        Ok(answer) => Err(String::from_utf8_lossy(&answer.body).trim().to_owned()),
        Err(why) => Err(why),
    };
    let mut ports = Vec::new();
    if metrics.is_err() {
        let named = [
            ("registry", Some(outside.registry)),
            ("router", Some(outside.router)),
            ("metrics", Some(outside.metrics)),
            ("bootstrap", outside.bootstrap),
        ];
        for (name, port) in named {
            if let Some(Port { listen }) = port {
                ports.push(Taken { name, listen, why: why_not(listen) });
            }
        }
    }
    Running { metrics, ready, ports }
}

/// The mirror's metrics.
///
/// # Errors
/// Why there are none.
pub(super) async fn metrics(outside: &Outside) -> Result<String, String> {
    let at = outside.metrics.dial();
    let answer = http::get(&format!("http://{at}/metrics"), &[], MAX_METRICS).await?;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    if text.contains("spegel_node_info{") { Ok(text) } else { Err(format!("what answers at {at} is no spegel")) }
}

/// The sum of a metric's samples whose labels contain `label`; none if it is not there.
pub(super) fn figure(text: &str, name: &str, label: &str) -> Option<f64> {
    let samples = text.lines().filter_map(|line| line.strip_prefix(name));
    let samples = samples.filter(|rest| rest.starts_with(['{', ' ']) && rest.contains(label));
    let values: Vec<f64> = samples.filter_map(|rest| rest.rsplit(' ').next()?.parse().ok()).collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

/// Why nobody can listen there, and who does.
fn why_not(listen: SocketAddr) -> Option<String> {
    let first = TcpListener::bind(listen);
    let result = match (first, listen.ip()) {
        (Err(error), IpAddr::V6(Ipv6Addr::UNSPECIFIED)) if error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, listen.port()))
        }
        (result, _) => result,
    };
    match result {
        Ok(_) => None,
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Some(format!(
            "it is taken by {}",
            owner(listen.port()).unwrap_or_else(|| "a process that cannot be seen".to_owned())
        )),
        Err(error) => Some(error.to_string()),
    }
}

/// Who listens on a port, by name and number.
fn owner(port: u16) -> Option<String> {
    let tables = [procfs::net::tcp(), procfs::net::tcp6()];
    let entries = tables.into_iter().flatten().flatten();
    let listening =
        entries.filter(|entry| entry.local_address.port() == port && entry.state == procfs::net::TcpState::Listen);
    let inodes: Vec<u64> = listening.map(|entry| entry.inode).collect();
    for process in procfs::process::all_processes().ok()?.flatten() {
        let Ok(files) = process.fd() else { continue };
        let has = files
            .flatten()
            .any(|file| matches!(file.target, procfs::process::FDTarget::Socket(inode) if inodes.contains(&inode)));
        if has {
            let name = process.stat().map_or_else(|_| "a process".to_owned(), |stat| stat.comm);
            return Some(format!("{name} (process {})", process.pid));
        }
    }
    None
}

// === impl Running ===

impl Running {
    /// The engine that drives connections, and why it is that one.
    pub(super) fn engine(&self) -> Option<(String, String)> {
        Some((self.label("spegel_serve_engine_info{", "engine")?, self.label("spegel_serve_engine_info{", "reason")?))
    }

    /// Where the figures of connections come from.
    pub(super) fn ebpf(&self) -> Option<Ebpf> {
        let source = self.label("spegel_ebpf_state{", "source")?;
        let why = || self.label("spegel_ebpf_state{", "reason").unwrap_or_default();
        Some(if source == "ebpf" { Ebpf::Kernel } else { Ebpf::Sockets(why()) })
    }

    /// A label of the first sample whose line begins like this.
    fn label(&self, start: &str, name: &str) -> Option<String> {
        let line = self.metrics.as_ref().ok()?.lines().find(|line| line.starts_with(start))?;
        Some(line.split_once(&format!("{name}=\""))?.1.split_once('"')?.0.to_owned())
    }

    pub(super) fn judge(&self) -> Vec<Finding> {
        let text = match &self.metrics {
            Ok(text) => text,
            Err(why) => return self.judge_ports(why),
        };
        let mut findings = vec![Finding::good("process", "spegel runs, and has its ports")];
        let count = |name| figure(text, name, "").unwrap_or(0.0) as u64;
        let (members, table) = (count("spegel_router_members"), count("spegel_router_table_peers"));
        findings.push(match (&self.ready, members.max(table)) {
            (Err(why), _) => Finding::failure("members", format!("the mirror is not ready: {why}"), "peers must reach this node's router port, and it theirs: look at --bootstrap-kind and what it names, and at firewalls between the nodes"),
            (Ok(()), 0) => Finding::note("members", "this node knows no other: it serves what it has itself, and there is nobody to pull from"),
            (Ok(()), _) => Finding::good("members", format!("{members} members and {table} peers in the routing table, {} records of others' content", count("spegel_router_records"))),
        });
        findings
    }

    fn judge_ports(&self, why: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        for Taken { name, listen, why } in &self.ports {
            if let Some(why) = why {
                let change = format!(
                    "end what is there, or give --{name}-addr another port (the registry's must be the same on all nodes)"
                );
                findings.push(Finding::failure(
                    "ports",
                    format!("spegel cannot listen on {listen} ({name}): {why}"),
                    change,
                ));
            }
        }
        if findings.is_empty() {
            let said = format!("spegel does not run, its ports are free ({why})");
            findings.push(Finding::failure(
                "process",
                said,
                "start `spegel registry`; where it runs on other ports, give doctor the same flags",
            ));
        }
        findings
    }
}

/// Whether the peers that the sources name are reached, and whether clocks agree.
pub(super) async fn peers(outside: &Outside) -> Vec<Finding> {
    let mut findings = Vec::new();
    if outside.sources.is_empty() {
        findings.push(Finding::unknown(
            "addresses",
            "it was not told how this node finds peers",
            "give doctor the --bootstrap-kind of `registry`, and what belongs to it",
        ));
        findings.push(judge_clock(now(), &[]));
        return findings;
    }
    let own: Vec<IpAddr> = if_addrs::get_if_addrs().unwrap_or_default().iter().map(if_addrs::Interface::ip).collect();
    let mut addresses = Vec::new();
    for source in &outside.sources {
        let asked = tokio::time::timeout(SOURCE, source.peers()).await;
        let (found, why) = match asked {
            Ok(Ok(found)) => (found, None),
            Ok(Err(BootstrapError::Partial { found, reason })) => (found, Some(reason)),
            Ok(Err(error)) => (Vec::new(), Some(error.to_string())),
            Err(_) => (Vec::new(), Some(format!("no answer within {} s", SOURCE.as_secs()))),
        };
        if let Some(why) = why {
            findings.push(Finding::warning(
                "addresses",
                format!("a source of peers fails: {why}"),
                "correct what --bootstrap-kind names; remembered peers are used meanwhile",
            ));
        }
        let router = outside.router.listen.port();
        addresses
            .extend(found.into_iter().flat_map(|peer| peer.addresses).map(|at| (at.ip, at.port.unwrap_or(router))));
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses.retain(|(ip, port)| !own.contains(ip) || *port != outside.router.listen.port());
    addresses.truncate(MAX_PEERS);
    let registry = outside.registry.listen.port();
    let reached = join_all(addresses.iter().map(|&(ip, router)| reach(ip, router, registry))).await;
    let dates: Vec<(IpAddr, Option<SystemTime>)> = addresses
        .iter()
        .zip(&reached)
        .map(|((ip, _), reached)| (*ip, reached.as_ref().ok().copied().flatten()))
        .collect();
    let failed: Vec<&str> = reached.iter().filter_map(|reached| reached.as_ref().err().map(String::as_str)).collect();
    let change = format!(
        "let nodes reach each other on the TCP ports {} and {registry}, and leave those to spegel on each",
        outside.router.listen.port()
    );
    findings.push(match (addresses.len(), failed.len()) {
        (0, _) => Finding::note("addresses", "the sources name nobody but this node"),
        (all, 0) => Finding::good("addresses", format!("{all} peers reached, router and registry")),
        (all, bad) if all == bad => {
            Finding::failure("addresses", format!("none of {all} peers is reached: {}", failed.join("; ")), change)
        }
        (all, bad) => {
            Finding::warning("addresses", format!("{bad} of {all} peers not reached: {}", failed.join("; ")), change)
        }
    });
    findings.push(judge_clock(now(), &dates));
    findings
}

/// Reaches a peer's router and registry; returns its time, if it tells.
async fn reach(ip: IpAddr, router: u16, registry: u16) -> Result<Option<SystemTime>, String> {
    let at = SocketAddr::new(ip, router);
    match tokio::time::timeout(REACH, TcpStream::connect(at)).await {
        Ok(Ok(stream)) => match tokio::time::timeout(REACH, is_router(stream)).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Err(format!("{at} (router): another program answers there")),
            // One that has too many connections closes them, or is slow.
            Ok(Err(error)) => return Err(format!("{at} (router): closes the connection before a word: {error}")),
            Err(_) => return Err(format!("{at} (router): says nothing within {} s", REACH.as_secs())),
        },
        Ok(Err(error)) => return Err(format!("{at} (router): {error}")),
        Err(_) => return Err(format!("{at} (router): no connection within {} s", REACH.as_secs())),
    }
    let at = SocketAddr::new(ip, registry);
    let get = async |path: &str| {
        let answer = http::get(&format!("http://{at}{path}"), &[], 4096).await;
        answer.map_err(|why| format!("{at} (registry): {why}"))
    };
    let answer = get("/livez").await?;
    if answer.status != 200 {
        return Err(format!("{at} (registry): another program answers there, with {} to /livez", answer.status));
    }
    // There is no such page; some programs give one whatever is asked for.
    if get("/spegel-doctor").await?.status < 400 {
        return Err(format!("{at} (registry): another program answers there, which has whatever it is asked for"));
    }
    let date = answer.headers.get(::http::header::DATE).and_then(|date| date.to_str().ok());
    Ok(date.and_then(parse_date))
}

/// Whether libp2p answers, which greets; where the network has a key it begins with random bytes instead.
async fn is_router(mut stream: TcpStream) -> std::io::Result<bool> {
    stream.write_all(GREETING).await?;
    let mut answer = [0; GREETING.len()];
    stream.read_exact(&mut answer).await?;
    Ok(!answer.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace()))
}

fn parse_date(text: &str) -> Option<SystemTime> {
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(date.timestamp().into())
}

fn now() -> SystemTime {
    SystemTime::now()
}

fn judge_clock(now: SystemTime, peers: &[(IpAddr, Option<SystemTime>)]) -> Finding {
    const CHECK: &str = "clock";
    let change = "have the clock set: systemd-timesyncd or chrony";
    if now.duration_since(UNIX_EPOCH).is_ok_and(|now| now.as_secs() < EARLIEST) || now < UNIX_EPOCH {
        return Finding::failure(
            CHECK,
            "this node's clock is before 2025: no registry's certificate is valid to it",
            change,
        );
    }
    let apart = |at: SystemTime| now.duration_since(at).unwrap_or_else(|error| error.duration());
    let told: Vec<(IpAddr, Duration)> = peers.iter().filter_map(|(ip, at)| Some((*ip, apart((*at)?)))).collect();
    match told.iter().max_by_key(|(_, apart)| *apart) {
        Some((ip, apart)) if *apart > SKEW => Finding::warning(
            CHECK,
            format!("this node's clock and that of {ip} are {} s apart", apart.as_secs()),
            change,
        ),
        Some(_) => Finding::good(CHECK, format!("clocks agree with those of {} peers", told.len())),
        None => Finding::good(CHECK, "the clock is plausible; no peer's was compared"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::finding::State;
    use super::*;

    #[test]
    fn a_clock_that_is_wrong_is_named() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let peer = |seconds| [(IpAddr::from([10, 0, 0, 1]), Some(at(seconds)))];
        assert_eq!(judge_clock(at(0), &[]).state, State::Failure);
        assert_eq!(judge_clock(at(EARLIEST), &peer(EARLIEST + 61)).state, State::Warning);
        assert_eq!(judge_clock(at(EARLIEST + 61), &peer(EARLIEST)).state, State::Warning);
        assert_eq!(judge_clock(at(EARLIEST), &peer(EARLIEST + 59)).state, State::Good);
        assert_eq!(parse_date("Wed, 01 Jan 2025 00:00:00 GMT"), Some(at(EARLIEST)));
    }

    #[test]
    fn a_port_that_is_taken_is_named_with_who_has_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let why = why_not(at).unwrap();
        assert!(why.contains(&format!("process {}", std::process::id())), "{why}");
        drop(listener);
        assert_eq!(why_not(at), None);
    }

    #[test]
    fn figures_are_summed() {
        let text = "a_total{b=\"1\"} 2\na_total{b=\"2\"} 3\na_totals 9\n";
        assert_eq!(
            (figure(text, "a_total", ""), figure(text, "a_total", "b=\"2\""), figure(text, "b", "")),
            (Some(5.0), Some(3.0), None)
        );
    }
}
