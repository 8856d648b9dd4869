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
    /// Whether others than its owner may write it or the directory that it is in.
    pub is_open: bool,
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
    /// What it is asked for.
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
    let mut found = Inspection { has_backup: disk::is_there(&config_path.join(BACKUP)), ..Inspection::default() };
    let go_backup = config_path.join(go::BACKUP);
    let has_go_backup = disk::is_real_directory(&go_backup);
    for name in disk::directories(config_path)? {
        if is_backup(&name) {
            continue;
        }
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

fn inspect_file(root: &Path, name: &Path, has_go_backup: bool) -> Result<Option<Inspected>, HostsError> {
    let path = root.join(name).join(HOSTS);
    let mut file = Inspected {
        registry: name.display().to_string(),
        whose: Whose::Foreign,
        hosts: Vec::new(),
        error: None,
        owner: 0,
        is_open: false,
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
        let places = [Some(path.as_path()), path.parent(), Some(root)];
        let is_open = |place: &Path| fs::metadata(place).is_ok_and(|found| found.mode() & 0o022 != 0);
        file.is_open = places.into_iter().flatten().any(is_open);
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
        |array: &toml_edit::Array| array.iter().filter_map(toml_edit::Value::as_str).map(str::to_owned).collect();
    Host {
        url: url.to_owned(),
        capabilities: get("capabilities").and_then(Item::as_array).map(texts).unwrap_or_default(),
        dial_timeout: get("dial_timeout").and_then(Item::as_str).map(str::to_owned),
        node: header(NODE_HEADER),
        authorization: header("Authorization"),
    }
}
