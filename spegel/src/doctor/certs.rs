//! What stands in containerd's `config_path`.

use std::path::{Path, PathBuf};

use super::Settings;
use super::config::Version;
use super::containerd::{Seen, seen_from};
use super::finding::Finding;
use super::process::Process;
use crate::hosts::{Host, Inspected, Inspection, Loose, Whose, inspect};

const CHECK: &str = "certs.d";
/// How many directories are named that others may change.
const MAX_LOOSE: usize = 8;

/// What was seen of it.
#[derive(Debug)]
pub(super) struct Certs {
    path: PathBuf,
    is_there: bool,
    found: Result<Inspection, String>,
    /// This node's addresses.
    addresses: Vec<std::net::IpAddr>,
}

pub(super) async fn look(settings: &Settings, process: Option<&Process>) -> Certs {
    let (wanted, process) = (settings.config_path.clone(), process.cloned());
    let look = move || {
        let place = seen_from(process.as_ref(), &wanted);
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
        let mut found = inspect(&place).map_err(|error| error.to_string());
        // Named as containerd sees them, not as they are reached from here.
        if let Ok(found) = &mut found {
            let root = process.as_ref().map_or(Path::new("/"), |process| &process.root);
            let named = |path: &Path| named(path, &place, &wanted, process.as_ref());
            found.files.iter_mut().for_each(|file| file.path = named(&file.path));
            // What leads to another process's root is not of that root.
            let above =
                |path: &Path| path.starts_with("/proc") && place.starts_with("/proc") && !path.starts_with(root);
            found.loose.retain(|loose| !above(&loose.path));
            found.loose.iter_mut().for_each(|loose| loose.path = named(&loose.path));
        }
        Certs {
            is_there: place.is_dir(),
            found,
            path: wanted,
            addresses: interfaces.iter().map(if_addrs::Interface::ip).collect(),
        }
    };
    let failed = |error: tokio::task::JoinError| Certs {
        path: settings.config_path.clone(),
        is_there: false,
        found: Err(error.to_string()),
        addresses: Vec::new(),
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_else(failed)
}

/// How containerd knows a path below or above of `wanted`, which is seen from here as `place`.
fn named(path: &Path, place: &Path, wanted: &Path, process: Option<&Process>) -> PathBuf {
    match path.strip_prefix(place) {
        // Joined to nothing it would end with a slash.
        Ok(below) if below.as_os_str().is_empty() => return wanted.to_owned(),
        Ok(below) => return wanted.join(below),
        Err(_) => {}
    }
    let above = process.and_then(|process| path.strip_prefix(&process.root).ok());
    above.map_or_else(|| path.to_owned(), |above| Path::new("/").join(above))
}

/// Whether a host is a mirror of ours, by what only those have.
fn is_mirror(file: &Inspected, host: &Host) -> bool {
    host.node.is_some() || (file.whose == Whose::Go && host.dial_timeout.is_some())
}

// === impl Certs ===

impl Certs {
    fn files(&self) -> &[Inspected] {
        self.found.as_ref().map_or(&[], |found| &found.files)
    }

    /// Every mirror that containerd asks, once.
    pub(super) fn mirrors(&self) -> Vec<&Host> {
        let mut mirrors: Vec<&Host> = Vec::new();
        for file in self.files() {
            for host in file.hosts.iter().filter(|host| is_mirror(file, host)) {
                if !mirrors.iter().any(|known| known.url == host.url) {
                    mirrors.push(host);
                }
            }
        }
        mirrors
    }

    /// Their URLs.
    pub(super) fn targets(&self) -> Vec<String> {
        self.mirrors().into_iter().map(|host| host.url.clone()).collect()
    }

    pub(super) fn judge(&self, settings: &Settings, seen: &Seen) -> Vec<Finding> {
        let path = self.path.display();
        let found = match &self.found {
            Ok(found) => found,
            Err(why) => return vec![Finding::failure(CHECK, why.as_str(), "run doctor as root")],
        };
        if !self.is_there && seen.root().is_none() {
            let said = format!("{path} is not there, as seen from here");
            return vec![Finding::unknown(CHECK, said, "run doctor on the host, as root")];
        }
        let mut findings = judge_loose(&found.loose);
        for file in &found.files {
            judge_file(file, seen.root().is_some(), &mut findings);
            if let Some(unknown) = unknown(file, known(seen.version())) {
                let said = format!(
                    "{}: this containerd knows no capability `{unknown}` and reads nothing of the file, so it asks none of its hosts",
                    file.path.display()
                );
                findings.push(Finding::failure(CHECK, said, format!("take `{unknown}` out of the capabilities")));
                continue;
            }
            for (place, host) in file.hosts.iter().enumerate().filter(|(_, host)| is_mirror(file, host)) {
                self.judge_host(settings, seen, file, place, host, &mut findings);
            }
        }
        if !found.only_in_backup.is_empty() {
            let names: Vec<String> = found.only_in_backup.iter().map(|name| name.display().to_string()).collect();
            let said = format!(
                "the configuration of {} is only in {path}/_backup, where the Go program put it",
                names.join(", ")
            );
            findings.push(Finding::warning(
                CHECK,
                said,
                "run `spegel configuration`, or `spegel cleanup --once`: both put it back",
            ));
        }
        let with: Vec<&str> = found
            .files
            .iter()
            .filter(|file| file.hosts.iter().any(|host| is_mirror(file, host)))
            .map(|file| file.registry.as_str())
            .collect();
        if with.is_empty() {
            let said = format!("no hosts.toml below {path} names the mirror");
            findings.push(Finding::failure(
                CHECK,
                said,
                "run `spegel configuration --mirror-targets http://127.0.0.1:5000`",
            ));
            return findings;
        }
        if with.contains(&"_default") {
            let own = found.files.iter().filter(|file| !with.contains(&file.registry.as_str()));
            let own: Vec<&str> = own.map(|file| file.registry.as_str()).collect();
            if !own.is_empty() {
                findings.push(Finding::note(
                    CHECK,
                    format!("not mirrored, since they have a configuration of their own: {}", own.join(", ")),
                ));
            }
        }
        if findings.is_empty() {
            findings.push(Finding::good(CHECK, format!("mirrored by {path}: {}", with.join(", "))));
        }
        findings
    }

    fn judge_host(
        &self,
        settings: &Settings,
        seen: &Seen,
        file: &Inspected,
        place: usize,
        host: &Host,
        findings: &mut Vec<Finding>,
    ) {
        let (path, url) = (file.path.display(), &host.url);
        let again = "run `spegel configuration` again";
        if host.dial_timeout.is_none() {
            let said =
                format!("{path}: the mirror {url} has no dial_timeout, so each request waits 30 s when it is gone");
            findings.push(Finding::warning(CHECK, said, again));
        }
        let capabilities = known(seen.version());
        // Without any it is asked for all that there are.
        let has = |name: &str| match host.capabilities.is_empty() {
            true => capabilities.contains(&name),
            false => host.capabilities.iter().any(|told| told == name),
        };
        if has("referrers") {
            let said = format!(
                "{path}: the mirror {url} is asked for referrers, and its list is not upstream's: signatures may be missed"
            );
            let change = "write `capabilities = ['pull', 'resolve']` below that host";
            findings.push(Finding::warning(CHECK, said, change));
        }
        if !has("pull") {
            findings.push(Finding::failure(
                CHECK,
                format!("{path}: the mirror {url} has no capability `pull`, so it is asked for no content"),
                again,
            ));
        } else if !has("resolve") {
            findings.push(Finding::note(
                CHECK,
                format!("{path}: tags are resolved upstream, the mirror is asked for digests only"),
            ));
        }
        if place > 0 && !file.hosts[..place].iter().all(|host| is_mirror(file, host)) {
            let said = format!("{path}: {} is asked before the mirror {url}", file.hosts[0].url);
            findings.push(Finding::warning(CHECK, said, "put the mirror first"));
        }
        if let Some(node) = host.node.as_ref().filter(|node| **node != settings.node_name) {
            let said = format!(
                "{path}: containerd says that it is of node {node}, and this node is {}: its mirror takes it for another's",
                settings.node_name
            );
            findings.push(Finding::warning(CHECK, said, format!("{again}, with the --node-name that `registry` has")));
        }
        if let Some(ip) = ip_of(url).filter(|ip| !ip.is_loopback() && !self.addresses.contains(ip)) {
            let said = format!("{path}: the mirror {url} is not on this node, which has not the address {ip}");
            findings.push(Finding::warning(CHECK, said, "name this node's own mirror with --mirror-targets: another's is one hop more, and its end is this node's trouble"));
        }
    }
}

/// The capabilities that a containerd knows.
fn known(version: Option<Version>) -> &'static [&'static str] {
    match version {
        Some(version) if version < (2, 2) => &["pull", "resolve", "push"],
        _ => &["pull", "resolve", "push", "referrers"],
    }
}

/// A capability that a file asks for and containerd does not know, where that matters to the mirror.
fn unknown<'a>(file: &'a Inspected, known: &[&str]) -> Option<&'a str> {
    let hosts = file.hosts.iter().any(|host| is_mirror(file, host)).then_some(&file.hosts);
    let mut told = hosts.into_iter().flatten().flat_map(|host| &host.capabilities).map(String::as_str);
    told.find(|told| !known.contains(told))
}

fn judge_loose(loose: &[Loose]) -> Vec<Finding> {
    let judge = |Loose { path, owner }: &Loose| {
        let path = path.display();
        let (said, change) = match owner {
            0 => (format!("{path} can be changed by others than root"), format!("chmod go-w {path}")),
            owner => (format!("{path} belongs to user {owner}"), format!("chown root {path}")),
        };
        Finding::warning(CHECK, format!("{said}, who then decide where this node's images come from"), change)
    };
    loose.iter().take(MAX_LOOSE).map(judge).collect()
}

/// `has_root` says whether links lead from here where they lead for containerd.
fn judge_file(file: &Inspected, has_root: bool, findings: &mut Vec<Finding>) {
    let path = file.path.display();
    if let Some(error) = &file.error {
        if !has_root && file.is_link {
            let said = format!("{path} is a link out of what is seen from here: {error}");
            findings.push(Finding::unknown(CHECK, said, "run doctor on the host, as root"));
            return;
        }
        findings.push(Finding::failure(
            CHECK,
            format!("{path} cannot be read as containerd reads it: {error}"),
            "correct or remove the file: containerd asks none of its hosts, or fails pulls on it",
        ));
        return;
    }
    let names_mirror = file.hosts.iter().any(|host| is_mirror(file, host));
    match file.whose {
        Whose::Ours { pristine: false } => {
            let said = format!("{path} was changed after spegel had written it");
            findings.push(Finding::warning(CHECK, said, "the next `spegel configuration` sets the change aside: put what you need into another registry's file, or use --prepend-existing"));
        }
        Whose::Go => findings.push(Finding::warning(
            CHECK,
            format!("{path} was written by the Go program"),
            "run `spegel configuration`, which takes it over, or `spegel cleanup --once`",
        )),
        Whose::Foreign if names_mirror => findings.push(Finding::warning(
            CHECK,
            format!("{path} names a spegel mirror, and was not written by spegel: no cleanup will take it back"),
            "remove it, and run `spegel configuration`",
        )),
        Whose::Ours { pristine: true } | Whose::Foreign => {}
    }
    if file.owner != 0 {
        findings.push(Finding::warning(
            CHECK,
            format!("{path} belongs to user {}, who decides where this node's images come from", file.owner),
            format!("chown root {path}"),
        ));
    } else if file.is_open {
        let said =
            format!("{path} can be changed by others than root, who then decide where this node's images come from");
        findings.push(Finding::warning(CHECK, said, format!("chmod go-w {path}")));
    }
    if file.tells_credentials {
        let said = format!("{path} has credentials, and its mode lets others than root read them");
        findings.push(Finding::warning(CHECK, said, format!("chmod 600 {path}")));
    }
}

fn ip_of(url: &str) -> Option<std::net::IpAddr> {
    let url: http::Uri = url.parse().ok()?;
    url.host()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
}
