//! What stands below a `config_path`, without changing it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use toml_edit::{Item, TableLike};

use super::disk::{self, Content};
use super::{BACKUP, HOSTS, HostsError, NODE_HEADER, go, is_backup, render};

/// All registries that have a configuration of their own, and what is kept aside.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// Each registry's file, by directory.
    pub files: Vec<Inspected>,
    /// Registries whose configuration stands in the Go program's `_backup` and nowhere else.
    pub only_in_backup: Vec<PathBuf>,
    /// Whether there is a backup of this program's.
    pub has_backup: bool,
    /// The directories by which others than root decide what stands here: this one, those below, and those above.
    pub loose: Vec<Loose>,
}

/// A directory that others than root may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loose {
    /// Where it is.
    pub path: PathBuf,
    /// The user that owns it.
    pub owner: u32,
}

/// One registry's `hosts.toml`.
#[derive(Clone, Debug)]
pub struct Inspected {
    /// The directory's name: the registry, or `_default`.
    pub registry: String,
    /// The file.
    pub path: PathBuf,
    /// Who wrote it.
    pub whose: Whose,
    /// Its hosts in their order, as far as it can be read.
    pub hosts: Vec<Host>,
    /// Why it cannot be read as containerd reads it.
    pub error: Option<String>,
    /// The user that owns it.
    pub owner: u32,
    /// Whether others than its owner may write it.
    pub is_open: bool,
    /// Whether it is a link.
    pub is_link: bool,
    /// Whether others than its owner may read credentials in it.
    pub tells_credentials: bool,
}

/// Who wrote a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// This program; somebody may have changed it since.
    Ours {
        /// Nobody has.
        pristine: bool,
    },
    /// The Go program.
    Go,
    /// Somebody else.
    Foreign,
}

/// A host that containerd asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Its URL.
    pub url: String,
    /// What it is asked for, in small letters; nothing where it is not told, which is all that this containerd knows.
    pub capabilities: Vec<String>,
    /// How long containerd waits for its connection.
    pub dial_timeout: Option<String>,
    /// The node that its requests are said to come from.
    pub node: Option<String>,
    /// The credentials that are sent to it.
    pub authorization: Option<String>,
}

/// Reads every registry's file below `config_path`; none if that is not there.
///
/// # Errors
/// A directory that cannot be read.
pub fn inspect(config_path: &Path) -> Result<Inspection, HostsError> {
    let mut found = Inspection {
        has_backup: disk::is_there(&config_path.join(BACKUP)),
        loose: loose(config_path),
        ..Inspection::default()
    };
    let go_backup = config_path.join(go::BACKUP);
    let has_go_backup = disk::is_real_directory(&go_backup);
    for name in disk::directories(config_path)? {
        if is_backup(&name) {
            continue;
        }
        found.loose.extend(loose_one(&config_path.join(&name), false));
        if let Some(file) = inspect_file(config_path, &name, has_go_backup)? {
            found.files.push(file);
        }
    }
    if has_go_backup {
        let kept = disk::directories(&go_backup)?.into_iter();
        let is_missing = |name: &PathBuf| !disk::is_there(&config_path.join(name).join(HOSTS));
        found.only_in_backup = kept.filter(is_missing).collect();
    }
    Ok(found)
}

/// The directory itself and those above it, by its name and, where that is a link, by its place.
fn loose(directory: &Path) -> Vec<Loose> {
    let mut found: Vec<Loose> = Vec::new();
    let real = directory.canonicalize().ok();
    // Through another process's root, a link may lead elsewhere than it does there.
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let real = real.filter(|real| identity(real) == identity(directory));
    for place in [Some(directory.to_owned()), real].into_iter().flatten() {
        for (above, path) in place.ancestors().enumerate() {
            if let Some(one) = loose_one(path, above > 0)
                && found.iter().all(|known| identity(&known.path) != identity(path))
            {
                found.push(one);
            }
        }
    }
    found
}

/// In a directory with the sticky bit others do not replace what root has there; they may put something beside it.
fn loose_one(directory: &Path, may_be_sticky: bool) -> Option<Loose> {
    let found = fs::metadata(directory).ok().filter(fs::Metadata::is_dir)?;
    let is_open = found.mode() & 0o022 != 0 && !(may_be_sticky && found.mode() & 0o1000 != 0);
    (found.uid() != 0 || is_open).then(|| Loose { path: directory.to_owned(), owner: found.uid() })
}

fn inspect_file(root: &Path, name: &Path, has_go_backup: bool) -> Result<Option<Inspected>, HostsError> {
    let path = root.join(name).join(HOSTS);
    let mut file = Inspected {
        registry: name.display().to_string(),
        whose: Whose::Foreign,
        hosts: Vec::new(),
        error: None,
        owner: 0,
        is_open: false,
        is_link: path.is_symlink(),
        tells_credentials: false,
        path: path.clone(),
    };
    let content = match disk::read(&path)? {
        Content::Nothing => return Ok(None),
        Content::Opaque(error) => {
            file.error = Some(error.to_string());
            return Ok(Some(file));
        }
        Content::Bytes(content) => content,
    };
    if let Ok(found) = fs::metadata(&path) {
        file.owner = found.uid();
        file.is_open = found.mode() & 0o022 != 0;
        file.tells_credentials = found.mode() & 0o044 != 0 && render::has_credentials(&content);
    }
    file.whose = match render::read_marker(&content) {
        Some((pristine, _)) => Whose::Ours { pristine },
        None if has_go_backup && render::is_of_go(&content, None).is_some() => Whose::Go,
        None => Whose::Foreign,
    };
    match render::parse(&content) {
        Ok(document) => {
            let hosts = document.get("host").and_then(Item::as_table_like);
            file.hosts =
                hosts.map(|hosts| hosts.iter().map(|(url, host)| read_host(url, host)).collect()).unwrap_or_default();
        }
        Err(error) => file.error = Some(error),
    }
    Ok(Some(file))
}

fn read_host(url: &str, host: &Item) -> Host {
    let get = |key: &str| host.as_table_like().and_then(|host| host.get(key));
    let header = |name: &str| {
        let headers = get("header").and_then(Item::as_table_like)?;
        let of_name = |headers: &dyn TableLike| {
            let value =
                headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())?;
            // containerd takes a text, or a list of them.
            value.as_str().map(str::to_owned).or_else(|| Some(value.as_array()?.get(0)?.as_str()?.to_owned()))
        };
        of_name(headers)
    };
    let texts =
        |array: &toml_edit::Array| array.iter().filter_map(toml_edit::Value::as_str).map(str::to_lowercase).collect();
    Host {
        url: url.to_owned(),
        capabilities: get("capabilities").and_then(Item::as_array).map(texts).unwrap_or_default(),
        dial_timeout: get("dial_timeout").and_then(Item::as_str).map(str::to_owned),
        node: header(NODE_HEADER),
        authorization: header("Authorization"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A `config_path` two directories below a temporary one, with one registry.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd/certs.d");
        fs::create_dir_all(path.join("a.test")).unwrap();
        for place in [path.join("a.test"), path.clone(), dir.path().join("containerd")] {
            set_mode(&place, 0o755);
        }
        fs::write(path.join("a.test").join(HOSTS), "[host.'http://a']\ncapabilities = ['Pull']\n").unwrap();
        set_mode(&path.join("a.test").join(HOSTS), 0o644);
        (dir, path)
    }

    fn loose_below(dir: &Path, path: &Path) -> Vec<(PathBuf, u32)> {
        let found = inspect(path).unwrap().loose.into_iter().filter(|loose| loose.path.starts_with(dir));
        found.map(|loose| (loose.path, loose.owner)).collect()
    }

    #[test]
    fn directories_that_others_may_change_are_found_above_and_below() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root's directories are root's");
            return;
        }
        let (dir, path) = tree();
        assert_eq!(loose_below(dir.path(), &path), []);
        for place in [path.join("a.test"), path.clone(), dir.path().join("containerd")] {
            set_mode(&place, 0o775);
            assert_eq!(loose_below(dir.path(), &path), [(place.clone(), 0)]);
            set_mode(&place, 0o755);
            chown(&place, Some(65534), None).unwrap();
            assert_eq!(loose_below(dir.path(), &path), [(place.clone(), 65534)]);
            chown(&place, Some(0), None).unwrap();
        }
        // In one like /tmp nobody replaces what is root's, but may put something beside it.
        set_mode(&dir.path().join("containerd"), 0o1777);
        assert_eq!(loose_below(dir.path(), &path), []);
        set_mode(&path, 0o1777);
        assert_eq!(loose_below(dir.path(), &path), [(path.clone(), 0)]);
        set_mode(&path, 0o755);
        // By a link, those above the place that it leads to count as well.
        let (other, link) = (tempfile::tempdir().unwrap(), dir.path().join("link"));
        symlink(&path, other.path().join("link")).unwrap();
        assert_eq!(loose_below(dir.path(), &other.path().join("link")), []);
        set_mode(&dir.path().join("containerd"), 0o777);
        assert_eq!(loose_below(dir.path(), &other.path().join("link")), [(dir.path().join("containerd"), 0)]);
        assert_eq!(loose_below(dir.path(), &link), []);
    }

    #[test]
    fn credentials_that_others_may_read_are_found() {
        let (_dir, path) = tree();
        let file = path.join("a.test").join(HOSTS);
        let tells = || inspect(&path).unwrap().files.remove(0).tells_credentials;
        assert!(!tells(), "there are none");
        for text in [
            "[host.'http://a'.header]\nauthorization = 'Basic x'\n",
            "server = 'https://a'\n[header]\nAuthorization = ['Bearer x']\n",
        ] {
            fs::write(&file, text).unwrap();
            for (mode, expected) in [(0o644, true), (0o640, true), (0o600, false)] {
                set_mode(&file, mode);
                assert_eq!(tells(), expected, "{mode:o}");
            }
        }
    }

    #[test]
    fn capabilities_are_compared_as_containerd_does() {
        let (_dir, path) = tree();
        assert_eq!(inspect(&path).unwrap().files[0].hosts[0].capabilities, ["pull"]);
    }
}
