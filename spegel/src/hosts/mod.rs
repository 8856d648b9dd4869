//! containerd's registry host configuration: writing it, and taking back what was written.
//!
//! Below containerd's `config_path` each registry has a directory with a `hosts.toml`
//! ([containerd's description](https://github.com/containerd/containerd/blob/main/docs/hosts.md)). Only files named
//! `hosts.toml` are written, each with a first line by which it is known. One that was there before is kept in `_backup.spegel` beside the
//! directories. Everything else, certificates too, stays where it is, so that relative paths hold. A `config_path` that had to be made
//! is known by a hidden file in it, and goes with what was written if nothing else is in it. A link is never ours, whatever it leads to.
//! Of what an administrator has put there nothing need be readable: what cannot be read is not ours.

mod disk;
mod go;
mod inspect;
mod render;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::oci::{MirroredRegistry, is_registry, without_userinfo};
pub use inspect::{Host, Inspected, Inspection, Loose, Whose, inspect};

use disk::{Content, Disk, Hook};

/// The header by which a node's containerd tells the mirror whose it is. containerd sends it with each request to the mirror.
pub const NODE_HEADER: &str = "X-Spegel-Node";

/// The directory of what was there before, beside the registries' directories. Not the Go program's `_backup`: where that is, it takes
/// everything for backed up, and deletes the rest.
const BACKUP: &str = "_backup.spegel";
/// The file that containerd reads in a registry's directory.
const HOSTS: &str = "hosts.toml";
/// Stands in a `config_path` that was made by [`write()`]. containerd does not look at it.
const MADE: &str = ".made-by-spegel";

/// What to write.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// containerd's `config_path`, often `/etc/containerd/certs.d`.
    pub config_path: PathBuf,
    /// The registries to mirror; empty means all.
    pub mirrored_registries: Vec<MirroredRegistry>,
    /// Where the mirror listens, the first one asked first.
    pub mirror_targets: Vec<MirrorTarget>,
    /// Whether tags are looked up at the mirror, too.
    pub resolve_tags: bool,
    /// Whether hosts that were configured before are asked after the mirror.
    pub prepend_existing: bool,
    /// User and password that the mirror asks for.
    pub basic_auth: Option<(String, String)>,
    /// This node's name, sent in the `X-Spegel-Node` header of each request to the mirror.
    pub node_name: String,
}

/// The address of a mirror, `scheme://host[:port]`. An IPv6 address may leave out its brackets if a port follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorTarget(String);

/// What was done, and what a person should know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Files written anew.
    pub written: Vec<PathBuf>,
    /// Files that were right already.
    pub unchanged: Vec<PathBuf>,
    /// Files of ours taken away.
    pub removed: Vec<PathBuf>,
    /// Files put back where they were before, and whole directories that the Go program had moved away.
    pub restored: Vec<PathBuf>,
    /// Copies of files that somebody changed after us, and of backups that a later file made obsolete.
    pub set_aside: Vec<PathBuf>,
    /// Files that could not be put back, since something else is in their place.
    pub left_in_backup: Vec<PathBuf>,
    /// Files that are not ours, and name a mirror all the same.
    pub foreign_mirrors: Vec<PathBuf>,
    /// Directories of registries that have a configuration of their own, so that `_default` does not reach them.
    pub not_mirrored: Vec<PathBuf>,
}

/// Why the configuration could not be written or taken back. What had been done until then is a valid state, and another run goes on.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// The file system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file whose hosts are to be kept is not TOML.
    #[error(
        "{path} is not TOML, so its hosts cannot be kept after the mirror's: {reason}; nothing was changed: correct the file, or do not ask to prepend"
    )]
    NotToml {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another run has not ended.
    #[error("another configuration or cleanup is at work in {0} and has not ended within 10 s; try again")]
    Busy(PathBuf),
    /// A mirror target that is no address.
    #[error(
        "mirror target {0:?} is not of the form http://host:port or https://host:port (an IPv6 address goes in brackets)"
    )]
    Target(String),
    /// No mirror target at all.
    #[error("at least one mirror target is needed")]
    NoTarget,
    /// A node name that cannot stand in a header.
    #[error("node name {0:?} is empty, or has other characters than letters, digits, '.', '-' and '_'")]
    NodeName(String),
}

/// What a file is to us.
#[derive(Clone, Copy)]
enum Found {
    /// Nothing is there.
    Nothing,
    /// Ours.
    Ours {
        /// As written, or else changed since.
        pristine: bool,
        /// Whether its directory was made for it.
        made_directory: bool,
    },
    /// Somebody else's.
    Foreign,
}

/// Writes the configuration. What was mirrored before and is no longer gets back what it had, and what the Go program left is taken
/// back first.
///
/// A second run with the same settings changes nothing. Runs of several processes, of [`remove()`] too, wait for each other. Each file is
/// replaced at once, so an interruption leaves a configuration that containerd can use, and another run completes it.
///
/// # Errors
/// [`HostsError`]. Those files whose hosts are to be kept are read before the first is written.
pub fn write(configuration: &Configuration) -> Result<Report, HostsError> {
    write_with(configuration, &mut |_| Ok(()))
}

/// Takes back what [`write()`] or the Go program wrote below `config_path`, and restores what was there before. Files of others stay.
///
/// # Errors
/// The first [`HostsError`]; the other registries are taken back all the same. A path that does not exist is none, one that is no
/// directory is.
pub fn remove(config_path: &Path) -> Result<Report, HostsError> {
    remove_with(config_path, &mut |_| Ok(()))
}

fn write_with(configuration: &Configuration, hook: Hook<'_>) -> Result<Report, HostsError> {
    check(configuration)?;
    let root = &configuration.config_path;
    let mut run = Run { disk: Disk::new(hook), root, backup: root.join(BACKUP), report: Report::default() };
    let _alone = loop {
        run.make_root()?;
        // A cleanup may have taken it away again.
        if let Some(lock) = disk::lock(root)? {
            break lock;
        }
    };
    run.begin()?;
    let plan = run.plan(configuration)?;
    let wanted: BTreeSet<PathBuf> = plan.iter().map(|planned| planned.directory.clone()).collect();
    for planned in &plan {
        run.install(planned)?;
    }
    run.withdraw(&wanted)?;
    if wanted.contains(Path::new("_default")) {
        let directories = disk::directories(root)?;
        let has_own = |name: &PathBuf| !wanted.contains(name) && !is_backup(name);
        run.report.not_mirrored = directories.into_iter().filter(has_own).map(|name| root.join(name)).collect();
    }
    Ok(run.report)
}

fn remove_with(config_path: &Path, hook: Hook<'_>) -> Result<Report, HostsError> {
    let Some(_alone) = disk::lock(config_path)? else { return Ok(Report::default()) };
    disk::check_directory(config_path)?;
    let backup = config_path.join(BACKUP);
    let mut run = Run { disk: Disk::new(hook), root: config_path, backup, report: Report::default() };
    run.begin()?;
    run.withdraw(&BTreeSet::new())?;
    run.withdraw_root()?;
    Ok(run.report)
}

/// What must hold for any file that is there before us; panics where it does not.
pub(crate) fn check_existing(existing: &[u8]) {
    render::check_existing(existing);
}

fn check(configuration: &Configuration) -> Result<(), HostsError> {
    let node = &configuration.node_name;
    if node.is_empty() || !node.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)) {
        return Err(HostsError::NodeName(node.clone()));
    }
    if configuration.mirror_targets.is_empty() {
        return Err(HostsError::NoTarget);
    }
    Ok(())
}

fn is_backup(name: &Path) -> bool {
    [BACKUP, go::BACKUP].iter().any(|backup| name == Path::new(backup))
}

/// The directory that containerd would read for a registry: `host_port_` goes before `host:port`.
fn directory_of(root: &Path, registry: &MirroredRegistry) -> PathBuf {
    let name = registry.directory();
    if let Some((host, port)) = name.rsplit_once(':') {
        let escaped = format!("{host}_{port}_");
        if root.join(&escaped).exists() {
            return escaped.into();
        }
    }
    name.into()
}

/// A file to be written.
struct Planned {
    /// Its directory's name.
    directory: PathBuf,
    /// The text behind the first line.
    body: String,
}

/// One run over one configuration directory.
struct Run<'a> {
    disk: Disk<'a>,
    root: &'a Path,
    /// Where what was there before is kept.
    backup: PathBuf,
    report: Report,
}

// === impl MirrorTarget ===

impl FromStr for MirrorTarget {
    type Err = HostsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let url = text.strip_suffix('/').unwrap_or(text);
        let split = |scheme| url.strip_prefix(scheme).map(|host| (scheme, host));
        match split("http://").or_else(|| split("https://")) {
            Some((_, host)) if is_registry(host) => Ok(Self(url.to_owned())),
            // Kubernetes gives a node's address without brackets, to which a template can only append the port.
            Some((scheme, host)) => match host.rsplit_once(':') {
                Some((ip, port)) if ip.parse::<Ipv6Addr>().is_ok() && port.parse::<u16>().is_ok() => {
                    Ok(Self(format!("{scheme}[{ip}]:{port}")))
                }
                _ => Err(HostsError::Target(without_userinfo(text))),
            },
            None => Err(HostsError::Target(without_userinfo(text))),
        }
    }
}

impl MirrorTarget {
    /// Its address.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MirrorTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Report ===

impl Report {
    /// Whether nothing was there to be done, nor to be told.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

// === impl Run ===

impl Run<'_> {
    fn plan(&self, configuration: &Configuration) -> Result<Vec<Planned>, HostsError> {
        let listed = &configuration.mirrored_registries;
        let all = [MirroredRegistry::All];
        let is_all = listed.is_empty() || listed.contains(&MirroredRegistry::All);
        let registries: &[MirroredRegistry] = if is_all { &all } else { listed };
        let mut plan: Vec<Planned> = Vec::new();
        for registry in registries {
            let directory = directory_of(self.root, registry);
            let is_planned =
                |planned: &Planned| planned.directory == directory || self.is_one(&planned.directory, &directory);
            if plan.iter().any(is_planned) {
                continue;
            }
            let path = self.root.join(&directory).join(HOSTS);
            let existing = match self.existing(&directory)? {
                Content::Opaque(error) if configuration.prepend_existing => return Err(error),
                existing => existing,
            };
            let text = if let Content::Bytes(text) = &existing { Some(text.as_slice()) } else { None };
            let body =
                render::body(configuration, registry, text).map_err(|reason| HostsError::NotToml { path, reason })?;
            let has_hosts = !matches!(existing, Content::Nothing);
            let certificates = if has_hosts { String::new() } else { self.certificates(&directory)? };
            plan.push(Planned { directory, body: certificates + &body });
        }
        Ok(plan)
    }

    /// What was configured before us: the file that is there if it is another's, else the one in the backup.
    fn existing(&self, directory: &Path) -> Result<Content, HostsError> {
        let path = self.root.join(directory).join(HOSTS);
        let content = disk::read(&path)?;
        if matches!(classify(&path, &content), Found::Foreign) {
            return Ok(content);
        }
        // It may have been kept under another name of the same directory.
        for name in disk::directories(&self.backup)? {
            let kept = self.backup.join(&name).join(HOSTS);
            if disk::is_there(&kept) && (name == directory || self.is_one(&name, directory)) {
                return disk::read_kept(&kept, &path);
            }
        }
        Ok(Content::Nothing)
    }

    /// Whether two names are of one directory.
    fn is_one(&self, name: &Path, other: &Path) -> bool {
        let real = |name: &Path| self.root.join(name).canonicalize().ok();
        real(name).is_some_and(|directory| real(other) == Some(directory))
    }

    /// Certificates in Docker's layout, which containerd uses for the upstream only while there is no `hosts.toml`.
    fn certificates(&self, directory: &Path) -> Result<String, HostsError> {
        Ok(render::certificates(&disk::files(&self.root.join(directory))?))
    }

    /// Ends what an interrupted run had begun, and takes back what the Go program left.
    fn begin(&mut self) -> Result<(), HostsError> {
        self.disk.finish_all(self.root, &[HOSTS, go::RESTORING])?;
        match go::backup(self.root)? {
            Some(backup) => go::take_back(self, &backup),
            None => Ok(()),
        }
    }

    fn install(&mut self, planned: &Planned) -> Result<(), HostsError> {
        // Ours for the mirror, or those of hosts that are kept behind it.
        let secret = render::has_credentials(planned.body.as_bytes());
        let directory = self.root.join(&planned.directory);
        let path = directory.join(HOSTS);
        let content = disk::read(&path)?;
        let found = classify(&path, &content);
        let made_directory = match found {
            Found::Ours { pristine, made_directory } => {
                if !pristine {
                    self.set_aside(&planned.directory)?;
                }
                made_directory
            }
            Found::Foreign => {
                self.back_up(&planned.directory)?;
                false
            }
            Found::Nothing => !disk::is_there(&directory),
        };
        let text = render::with_marker(&planned.body, made_directory);
        let is_same = matches!(&content, Content::Bytes(content) if content == text.as_bytes());
        if is_same && matches!(found, Found::Ours { .. }) && !(secret && disk::is_readable(&path)) {
            self.report.unchanged.push(path);
            return Ok(());
        }
        if disk::is_there(&directory) {
            self.disk.replace(&path, text.as_bytes(), secret)?;
        } else {
            self.disk.create_directory_with(&directory, HOSTS, text.as_bytes(), secret)?;
        }
        self.report.written.push(path);
        Ok(())
    }

    /// Keeps what another has there for the day that ours goes.
    fn back_up(&mut self, directory: &Path) -> Result<(), HostsError> {
        let path = self.root.join(directory).join(HOSTS);
        let kept = self.place_in_backup(directory)?.join(HOSTS);
        if disk::is_same(&path, &kept)? {
            return Ok(());
        }
        if disk::is_there(&kept) {
            let aside = self.free_name(directory);
            self.disk.rename(&kept, &aside)?;
            self.report.set_aside.push(aside);
        }
        self.disk.keep(&path, &kept)
    }

    /// Keeps a copy of our own file, or the Go program's, with what somebody changed in it.
    fn set_aside(&mut self, directory: &Path) -> Result<(), HostsError> {
        self.place_in_backup(directory)?;
        let aside = self.free_name(directory);
        self.disk.keep(&self.root.join(directory).join(HOSTS), &aside)?;
        self.report.set_aside.push(aside);
        Ok(())
    }

    /// The directory in the backup for what was in a registry's directory.
    fn place_in_backup(&mut self, directory: &Path) -> Result<PathBuf, HostsError> {
        let place = self.backup.join(directory);
        self.disk.create_directory(&place)?;
        Ok(place)
    }

    fn free_name(&self, directory: &Path) -> PathBuf {
        let mut number = 1_u32;
        loop {
            let path = self.backup.join(directory).join(format!("{HOSTS}.{number}"));
            if !disk::is_there(&path) {
                return path;
            }
            number += 1;
        }
    }

    fn make_root(&mut self) -> Result<(), HostsError> {
        if self.root.is_dir() {
            return Ok(());
        }
        self.disk.create_directory(self.root)?;
        self.disk.create_file(&self.root.join(MADE))
    }

    /// The file goes in any case: what others have in the directory makes it theirs.
    fn withdraw_root(&mut self) -> Result<(), HostsError> {
        let mark = self.root.join(MADE);
        if !disk::is_there(&mark) {
            return Ok(());
        }
        self.disk.remove(&mark)?;
        self.disk.remove_empty_directory(self.root)
    }

    /// Takes our files away but for those in `wanted`, and puts back what was there. What cannot be done in one directory keeps none of the
    /// others from it.
    fn withdraw(&mut self, wanted: &BTreeSet<PathBuf>) -> Result<(), HostsError> {
        // A directory may be there under several names.
        let real = |name: &PathBuf| self.root.join(name).canonicalize().ok();
        let wanted_real: BTreeSet<PathBuf> = wanted.iter().filter_map(real).collect();
        let mut names = disk::directories(self.root)?;
        names.extend(disk::directories(&self.backup)?);
        names.retain(|name| {
            !is_backup(name) && !wanted.contains(name) && real(name).is_none_or(|real| !wanted_real.contains(&real))
        });
        let mut result = Ok(());
        for name in &names {
            result = result.and(self.withdraw_one(name));
        }
        result.and(self.disk.remove_empty_directory(&self.backup))
    }

    fn withdraw_one(&mut self, name: &Path) -> Result<(), HostsError> {
        let (directory, backup) = (self.root.join(name), self.backup.join(name));
        let (path, kept) = (directory.join(HOSTS), backup.join(HOSTS));
        self.disk.remove_leftover(&directory)?;
        let content = disk::read(&path)?;
        match classify(&path, &content) {
            Found::Ours { pristine, made_directory } => {
                if !pristine {
                    self.set_aside(name)?;
                }
                if disk::is_there(&kept) {
                    // One cannot be moved over a file. An interruption leaves what another run restores.
                    if disk::is_real_directory(&kept) {
                        self.disk.remove(&path)?;
                    }
                    self.disk.rename(&kept, &path)?;
                    self.report.restored.push(path);
                } else {
                    match made_directory {
                        true => {
                            self.disk.remove_with_directory(&directory, HOSTS)?;
                            self.disk.remove_empty_directory(&directory)?;
                        }
                        false => self.disk.remove(&path)?,
                    }
                    self.report.removed.push(path);
                }
            }
            // An interrupted run had kept it, and not yet replaced it.
            Found::Foreign if disk::is_same(&kept, &path)? => self.disk.remove(&kept)?,
            Found::Foreign => {
                if disk::is_there(&kept) {
                    self.report.left_in_backup.push(kept);
                }
                let names_a_mirror = matches!(&content, Content::Bytes(text) if render::names_a_mirror(text));
                if names_a_mirror && !path.is_symlink() {
                    self.report.foreign_mirrors.push(path);
                }
            }
            Found::Nothing if disk::is_there(&kept) => {
                self.disk.create_directory(&directory)?;
                self.disk.rename(&kept, &path)?;
                self.report.restored.push(path);
            }
            Found::Nothing => {}
        }
        self.disk.remove_empty_directory(&backup)
    }
}

/// Whose it is. A link is not ours: it is another's, also where it leads to a file of ours.
fn classify(path: &Path, content: &Content) -> Found {
    match content {
        _ if path.is_symlink() => Found::Foreign,
        Content::Nothing => Found::Nothing,
        Content::Bytes(content) => match render::read_marker(content) {
            Some((pristine, made_directory)) => Found::Ours { pristine, made_directory },
            None => Found::Foreign,
        },
        Content::Opaque(_) => Found::Foreign,
    }
}

#[cfg(test)]
mod tests;
