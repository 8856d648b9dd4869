//! `cargo xtask hosts-test`: twelve plain hosts, installed from the Debian package, upgraded and removed.
//!
//! A host is a network namespace and a mount namespace whose root is a writable layer above this machine's own, so that what a package does to
//! a host is all in that layer. There the real `apt-get` and `dpkg` install, upgrade and remove, with the package's own scripts.
//! On three of them systemd runs as the first process, with a real containerd beside spegel, and the unit is what it is everywhere: its readiness,
//! its watchdog, its sandbox. On the others, which serve OCI layouts, this test reads the installed unit, starts its commands with its environment
//! file as systemd would, and listens to what they say over `NOTIFY_SOCKET`.

mod booted;
mod host;
mod systemd;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use spegel_benches::daemon::{find_program, output, wait_until};
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image, ImageBuilder, digest_of};
use spegel_benches::netns::Lab;

pub(crate) use host::Host;

const HOSTS: usize = 12;
/// How many of them have systemd and containerd.
const BOOTED: usize = 3;
/// How long they may take to know each other; far above what it takes.
const TOGETHER: Duration = Duration::from_secs(60);
const SETTINGS: &str = "etc/default/spegel";
/// What an administrator had before, and has again afterwards.
const ADMINS: &str = "server = 'https://quay.io'\n\n[host.'https://quay.io']\ncapabilities = ['pull', 'resolve']\n";

#[derive(Debug, Args)]
pub(crate) struct HostsTest {
    /// The program to package [default: built with the profile `fast`]
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

// === impl HostsTest ===

impl HostsTest {
    pub(crate) fn run(&self) -> Result<bool> {
        if let Err(reason) = available() {
            println!("twelve hosts ... skipped: {reason}");
            return Ok(true);
        }
        let binary = self.binary.clone().map_or_else(|| crate::build::spegel("fast"), Ok)?;
        let folder = tempfile::Builder::new().prefix("spegel-hosts-").tempdir()?;
        let packages = ["0.1.0~test1", "0.1.0~test2"].map(|version| {
            crate::dist::package_of(crate::root(), &binary, version, folder.path()).context("make the package")
        });
        let [first, second] = packages;
        let (first, second) = (first?, second?);
        let image = ImageBuilder::new("registry.test/hosts:1")
            .layers(2, 300_000, Compression::Gzip, 1)
            .build(&folder.path().join("image"))?;
        let mut lab = Lab::new()?;
        let start = Instant::now();
        let mut hosts = start_all(&mut lab, folder.path())?;
        check_unit(&hosts[0], &first)?;
        step(start, "twelve hosts");
        install(&mut hosts, &first, &image)?;
        step(start, "installed, configured and started: each knows all others");
        pulls(&hosts, &image)?;
        step(start, "every host gets the image of the first through its own mirror");
        supervised(&mut hosts[3])?;
        step(start, "the watchdog is told while the process answers, and not while it is stopped");
        for host in hosts.iter().filter(|host| host.systemd().is_some()) {
            booted::check(host, &image)?;
        }
        step(
            start,
            "where systemd runs: a stopped process is replaced, and the sandbox keeps nothing from being served",
        );
        upgrade(&mut hosts, &second)?;
        pulls(&hosts, &image)?;
        step(start, "upgraded one after the other: settings kept, and each knows all others again");
        if let Some(host) = hosts.iter().find(|host| host.systemd().is_some()) {
            booted::keeps_choices(host, &second)?;
            together(&hosts)?;
            step(start, "what was disabled or masked stays so through upgrades, what was enabled through a removal");
        }
        remembered(&mut hosts)?;
        step(start, "all started anew with a list of nobody: those that were met before suffice");
        remove(hosts)?;
        step(start, "removed and purged: nothing is left, and what the administrator had is there again");
        Ok(true)
    }
}

fn step(start: Instant, what: &str) {
    println!("{:6.1} s  {what}", start.elapsed().as_secs_f64());
}

/// Whether this machine can have such hosts.
pub(crate) fn available() -> Result<(), String> {
    Lab::available()?;
    for program in ["dpkg", "unshare", "nsenter", "chroot"] {
        find_program(program).ok_or(format!("there is no {program} here"))?;
    }
    host::overlay_works()
}

fn check_unit(host: &Host, package: &Path) -> Result<()> {
    let Some(analyze) = find_program("systemd-analyze") else {
        println!("the unit is not checked: there is no systemd-analyze here");
        return Ok(());
    };
    host.dpkg(&["--unpack"], Some(package))?;
    let unit = host.path("usr/lib/systemd/system/spegel.service");
    let said = output(host.command(&analyze.display().to_string()).args(["verify", "spegel.service"]))?;
    println!("systemd-analyze verify: {}", if said.trim().is_empty() { "nothing to say" } else { said.trim() });
    let said = output(Command::new(&analyze).args(["security", "--offline=true", "--threshold=30"]).arg(&unit))?;
    println!("systemd-analyze security: {}", said.trim().lines().last().unwrap_or_default());
    Ok(())
}

fn start_all(lab: &mut Lab, folder: &Path) -> Result<Vec<Host>> {
    let booted = match systemd::available() {
        Ok(()) => BOOTED,
        Err(reason) => {
            println!("hosts with systemd and containerd ... skipped: {reason}");
            0
        }
    };
    let plain = (booted..HOSTS).map(|_| Host::start(lab.add_node()?, folder)).collect::<Result<Vec<Host>>>()?;
    let booted = (0..booted).map(|_| Host::boot(lab.add_node()?, folder)).collect::<Result<Vec<Host>>>()?;
    Ok(plain.into_iter().chain(booted).collect())
}

fn install(hosts: &mut [Host], package: &Path, image: &Image) -> Result<()> {
    let (first, second) = (hosts[0].node.address(), hosts[1].node.address());
    for (number, host) in hosts.iter_mut().enumerate() {
        host.write("etc/containerd/certs.d/quay.io/hosts.toml", ADMINS)?;
        host.write("etc/containerd/certs.d/_default/hosts.toml", ADMINS)?;
        let served = if host.systemd().is_some() {
            booted::install(host, package, number)?;
            ""
        } else {
            host.write("srv/layout/oci-layout", "{\"imageLayoutVersion\":\"1.0.0\"}")?;
            host.write("srv/layout/index.json", "{\"schemaVersion\":2,\"manifests\":[]}")?;
            std::fs::create_dir_all(host.path("srv/layout/blobs/sha256"))?;
            host.dpkg(&["--install"], Some(package))?;
            "OCI_LAYOUT=/srv/layout\n"
        };
        // A list, a URL and multicast together; each host serves its addresses.
        let shipped = host.read(SETTINGS)?;
        let settings = format!(
            "{}\nBOOTSTRAP_KIND=static,http,mdns\nSTATIC_BOOTSTRAP_PEERS={first}\nHTTP_BOOTSTRAP_URL=http://{second}:5002/id\n\
             HTTP_BOOTSTRAP_ADDR=:5002\nMIRROR_RESOLVE_TIMEOUT=1s\nNODE_NAME=host-{number}\n{served}",
            shipped.replace("BOOTSTRAP_KIND=static,mdns\n", "")
        );
        host.write(SETTINGS, &settings)?;
        host.start_service()?;
        let written = host.read("etc/containerd/certs.d/_default/hosts.toml")?;
        ensure!(written.contains("http://127.0.0.1:5000"), "no mirror is configured: {written}");
    }
    image.write_layout(&hosts[0].path("srv/layout"))?;
    together(hosts)
}

fn together(hosts: &[Host]) -> Result<()> {
    wait_until(TOGETHER, "all hosts know each other", || {
        hosts.iter().all(|host| host.members() == Some(HOSTS as u32 - 1))
    })
}

/// Every host's mirror gives the whole image.
fn pulls(hosts: &[Host], image: &Image) -> Result<()> {
    let client = Client::new(Duration::from_secs(20));
    for host in hosts {
        let base = format!("http://{}:5000/v2/{}", host.node.address(), image.repository());
        let ns = format!("?ns={}", image.registry());
        wait_until(TOGETHER, "the tag is found", || {
            client.head(&format!("{base}/manifests/{}{ns}", image.tag()), &[]).is_ok_and(|head| head.status == 200)
        })?;
        for layer in image.layers_for(spegel_benches::image::host_platform()) {
            let answer = client.get(&format!("{base}/blobs/{}{ns}", layer.digest), &[])?;
            ensure!(
                answer.head.status == 200 && digest_of(&answer.body) == layer.digest,
                "{base}: {}",
                answer.head.status
            );
        }
    }
    Ok(())
}

fn supervised(host: &mut Host) -> Result<()> {
    host.forget();
    ensure!(host.said("WATCHDOG=1", Duration::from_secs(5)), "the watchdog is told nothing: {}", host.log());
    host.signal(rustix::process::Signal::STOP)?;
    host.forget();
    let is_told = host.said("WATCHDOG=1", Duration::from_secs(4));
    host.signal(rustix::process::Signal::CONT)?;
    ensure!(!is_told, "a stopped process tells its watchdog");
    ensure!(host.said("WATCHDOG=1", Duration::from_secs(10)), "the watchdog is not told again");
    Ok(())
}

fn upgrade(hosts: &mut [Host], package: &Path) -> Result<()> {
    for host in hosts.iter_mut() {
        let before = host.read(SETTINGS)?;
        let identity = host.read("var/lib/spegel/private.key")?;
        host.dpkg(&["--install"], Some(package))?;
        ensure!(host.read(SETTINGS)? == before, "the upgrade has changed the settings");
        if host.systemd().is_none() {
            // systemd was told so by the package.
            host.stop_service()?;
            host.start_service()?;
        }
        ensure!(host.read("var/lib/spegel/private.key")? == identity, "the host has another identity than before");
    }
    together(hosts)
}

/// Nobody who is named answers, and nobody is called by multicast: what is left is who was met before.
fn remembered(hosts: &mut [Host]) -> Result<()> {
    for host in hosts.iter_mut() {
        host.stop_service()?;
        let named = ["BOOTSTRAP_KIND=", "STATIC_BOOTSTRAP_PEERS=", "HTTP_BOOTSTRAP_URL="];
        let before = host.read(SETTINGS)?;
        let kept: Vec<&str> = before.lines().filter(|line| !named.iter().any(|name| line.starts_with(name))).collect();
        // An address that nobody has.
        let [a, b, c, _] = host.node.address().octets();
        let nobody = format!("BOOTSTRAP_KIND=static\nSTATIC_BOOTSTRAP_PEERS={a}.{b}.{c}.254\n");
        host.write(SETTINGS, &format!("{}\n{nobody}", kept.join("\n")))?;
    }
    for host in hosts.iter_mut() {
        host.start_service()?;
    }
    together(hosts)
}

fn remove(hosts: Vec<Host>) -> Result<()> {
    for mut host in hosts {
        if host.systemd().is_some() {
            booted::remove(&host)?;
        } else {
            host.stop_service()?;
            host.dpkg(&["--remove", "spegel"], None)?;
        }
        for registry in ["quay.io", "_default"] {
            let now = host.read(&format!("etc/containerd/certs.d/{registry}/hosts.toml"))?;
            ensure!(now == ADMINS, "{registry} is not as it was: {now}");
        }
        if host.systemd().is_some() {
            booted::purge(&host)?;
        } else {
            host.dpkg(&["--purge", "spegel"], None)?;
        }
        let left = host.left()?;
        ensure!(left.is_empty(), "left behind: {left:?}");
    }
    Ok(())
}
