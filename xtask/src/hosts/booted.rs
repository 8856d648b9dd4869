//! What is done on hosts with systemd and containerd: what their administrators would do, by apt-get, systemctl, and `spegel doctor`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use spegel_benches::containerd::Version;
use spegel_benches::daemon::{output, wait_until};
use spegel_benches::http::Client;
use spegel_benches::image::{Image, digest_of, host_platform};

use super::host::Host;

/// The page that tells an administrator what containerd's configuration needs: for 2.x, then for 1.6.
const PAGE: &str = "docs/systemd.md";
/// There is no journal; and the watchdog's own time would make the test wait.
const DROP_IN: &str =
    "[Service]\nStandardOutput=append:/run/spegel.log\nStandardError=append:/run/spegel.log\nWatchdogSec=3\n";
/// How exposed the unit may be by the count of `systemd-analyze security`, in tenths.
const MOST_EXPOSED: &str = "25";

/// Sets containerd up, and installs the package, which starts nothing by itself.
pub(super) fn install(host: &Host, package: &Path, number: usize) -> Result<()> {
    // The newer containerd on one of them, where it was built.
    let newer = Version::V2_2.find().ok().filter(|_| number.is_multiple_of(3));
    let page = fs::read_to_string(crate::root().join(PAGE))?;
    let blocks: Vec<&str> =
        page.split("```toml\n").skip(1).filter_map(|rest| Some(rest.split_once("```")?.0)).collect();
    let [for_2, for_1_6] = blocks[..] else { bail!("{PAGE} has not one configuration for 2.x and one for 1.6") };
    host.write("etc/containerd/config.toml", if newer.is_some() { for_2 } else { for_1_6 })?;
    if let Some(binaries) = newer {
        let start = format!("[Service]\nExecStart=\nExecStart={}\n", binaries.containerd.display());
        host.write("run/systemd/system/containerd.service.d/test.conf", &start)?;
    }
    host.write("run/systemd/system/spegel.service.d/test.conf", DROP_IN)?;
    host.systemctl(&["daemon-reload"])?;
    host.systemctl(&["start", "containerd.service"])?;
    apt(host, "install", &host.share(package)?)?;
    let states = (state(host, "is-enabled")?, state(host, "is-active")?);
    ensure!(states == ("enabled".to_owned(), "inactive".to_owned()), "after the installation the unit is {states:?}");
    Ok(())
}

/// What systemd says of the unit.
fn state(host: &Host, verb: &str) -> Result<String> {
    // Its exit code tells the same.
    let said = host.command("systemctl").args([verb, "spegel.service"]).output()?;
    Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

/// What an administrator has disabled or masked stays so through upgrades, and a removal does not forget that it was enabled.
pub(super) fn keeps_choices(host: &Host, package: &Path) -> Result<()> {
    let is = |expected: &str, after: &str| {
        let now = state(host, "is-enabled")?;
        ensure!(now == expected, "after {after} the unit is {now}");
        Ok(())
    };
    for (verb, expected) in [("disable", "disabled"), ("mask", "masked")] {
        host.systemctl(&[verb, "spegel.service"])?;
        host.dpkg(&["--install"], Some(package)).with_context(|| format!("upgrade what is {expected}"))?;
        is(expected, &format!("`{verb}` and an upgrade"))?;
        if expected == "masked" {
            // It is not restarted. What becomes of the one that runs is systemd's matter.
            println!("a unit that ran when it was masked is {} after an upgrade", state(host, "is-active")?);
            continue;
        }
        let runs = || state(host, "is-active").is_ok_and(|state| state == "active");
        wait_until(Duration::from_secs(30), "a unit that runs after an upgrade", runs)
            .with_context(|| format!("after `{verb}`: {}", host.log()))?;
    }
    for verb in ["unmask", "enable"] {
        host.systemctl(&[verb, "spegel.service"])?;
    }
    host.dpkg(&["--remove", "spegel"], None)?;
    ensure!(state(host, "is-active")? != "active", "a removal leaves it running");
    host.dpkg(&["--install"], Some(package))?;
    is("enabled", "a removal and another installation")?;
    host.systemctl(&["start", "spegel.service"]).map(|_| ())
}

fn apt(host: &Host, verb: &str, what: &str) -> Result<()> {
    let mut command = host.command("timeout");
    command.args(["60", "apt-get", "-qq", "--yes", "--no-install-recommends"]);
    command.args(["-o", "APT::Sandbox::User=root", "-o", "DPkg::Options::=--force-unsafe-io", verb, what]);
    output(command.env("DEBIAN_FRONTEND", "noninteractive")).map(|_| ())
}

/// A pull by containerd's CRI, through the mirror, which serves it then; a process that hangs; the sandbox.
pub(super) fn check(host: &Host, image: &Image) -> Result<()> {
    let ask = ["doctor", "--env-file", "/etc/default/spegel", "--json", "--pull", image.reference()];
    let said = host.command("spegel").args(ask).output()?;
    let report: Value = serde_json::from_slice(&said.stdout)
        .with_context(|| format!("doctor: {}", String::from_utf8_lossy(&said.stderr)))?;
    let state = |check: &&str| {
        let mut found = report["checks"].as_array().into_iter().flatten().filter(|found| found["check"] == *check);
        found.next().map(|found| found["state"].clone()).unwrap_or_default()
    };
    let good = ["pull", "proxy", "cri", "restart", "addresses"].iter().all(|check| state(check) == "good");
    ensure!(report["good"] == true && good, "doctor says: {report:#}");
    let written = fs::metadata(host.path("etc/containerd/certs.d/_default/hosts.toml"))?.permissions().mode() & 0o777;
    ensure!(written == 0o600, "by the unit's umask the mirror's file has the mode {written:o}");
    serves_its_own(host, image)?;
    replaces(host)?;
    let security = ["security", "--no-pager", "--threshold", MOST_EXPOSED, "spegel.service"];
    let said = output(host.command("systemd-analyze").args(security))?;
    println!("systemd-analyze security, of the running unit: {}", said.trim().lines().last().unwrap_or_default());
    Ok(())
}

/// What its containerd has just pulled, without any peer's help.
fn serves_its_own(host: &Host, image: &Image) -> Result<()> {
    let client = Client::new(Duration::from_secs(20));
    let base = format!("http://{}:5000/v2/{}", host.node.address(), image.repository());
    for layer in image.layers_for(host_platform()) {
        let url = format!("{base}/blobs/{}?ns={}", layer.digest, image.registry());
        wait_until(Duration::from_secs(20), "content of its own containerd", || {
            let answer = client.get(&url, &[("X-Spegel-Mirrored", "true")]);
            answer.is_ok_and(|answer| answer.head.status == 200 && digest_of(&answer.body) == layer.digest)
        })?;
    }
    Ok(())
}

/// A stopped process is ended and started anew by systemd.
fn replaces(host: &Host) -> Result<()> {
    let show = |property: &str| {
        let said = host.systemctl(&["show", "--value", "--property", property, "spegel.service"])?;
        Ok::<String, anyhow::Error>(said.trim().to_owned())
    };
    let (process, times) = (show("MainPID")?, show("NRestarts")?);
    output(host.command("kill").args(["-STOP", &process]))?;
    wait_until(Duration::from_secs(30), "another process by the watchdog", || {
        let state = (show("ActiveState").unwrap_or_default(), show("SubState").unwrap_or_default());
        show("NRestarts").is_ok_and(|now| now != times)
            && show("MainPID").is_ok_and(|now| now != process && now != "0")
            && state == ("active".to_owned(), "running".to_owned())
    })
}

/// While the service runs: the package ends it.
pub(super) fn remove(host: &Host) -> Result<()> {
    apt(host, "remove", "spegel")?;
    let state = state(host, "is-active")?;
    ensure!(state == "inactive", "after the removal the unit is {state}");
    Ok(())
}

/// Nothing of it is known to systemd.
pub(super) fn purge(host: &Host) -> Result<()> {
    apt(host, "purge", "spegel")?;
    let known = host.command("systemctl").args(["list-unit-files", "--no-legend", "spegel.service"]).output()?;
    let known = String::from_utf8_lossy(&known.stdout).trim().to_owned();
    let mut wanted = Command::new("find");
    let wanted = output(wanted.arg(host.path("etc/systemd/system")).args(["-name", "spegel*"]))?;
    ensure!(known.is_empty() && wanted.is_empty(), "systemd still knows: {known} {wanted}");
    host.systemctl(&["stop", "containerd.service"]).map(|_| ())
}
