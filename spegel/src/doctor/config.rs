//! What containerd's configuration files say of registries.

use std::fs;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item};

use super::finding::Finding;
use super::process::Process;

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// How many further files one may name.
const MAX_IMPORTS: usize = 64;
/// What containerd 2.2 takes where it is told nothing.
const DEFAULT_2_2: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";
/// What containerd 2.2 imports where it is told nothing.
const IMPORTS_2_2: &str = "/etc/containerd/conf.d/*.toml";
/// Where the CRI's image settings are, newest first: configuration versions 3, 2 and 1.
const PLUGINS: [&str; 3] = ["io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri", "cri"];

/// containerd's major and minor version.
pub(super) type Version = (u32, u32);

/// What the files say; nothing where none says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) config_path: Option<String>,
    pub(super) discard: bool,
    /// The CRI pulls by itself instead of by the transfer service.
    pub(super) local_pull: bool,
    /// Registries stand in the old form, which takes no `hosts.toml`.
    pub(super) has_mirrors: bool,
    /// A section that names a `config_path` and is of another version of the file than its first line says: containerd does not read it.
    unread: Option<&'static str>,
}

/// Reads `v2.2.7`, `1.6.20~ds1` and the like.
pub(super) fn version(text: &str) -> Option<Version> {
    let mut parts = text.trim_start_matches('v').split('.');
    let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

/// Reads the main file and those that it imports, which count more.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn read(process: &Process, main: &Path, version: Option<Version>) -> Result<Config, String> {
    let mut config = Config::default();
    let imports_nothing = || if version >= Some((2, 2)) { vec![IMPORTS_2_2.to_owned()] } else { Vec::new() };
    let mut form = None;
    let imports = match parse(&process.path(main))? {
        Some(document) => {
            form = told_form(&document);
            config.take(&document, form, version);
            match document.get("imports").and_then(Item::as_array) {
                Some(list) => list.iter().filter_map(toml_edit::Value::as_str).map(str::to_owned).collect(),
                None => imports_nothing(),
            }
        }
        None => imports_nothing(),
    };
    let folder = main.parent().unwrap_or(Path::new("/"));
    for pattern in imports.iter().take(MAX_IMPORTS) {
        // A pattern may name the main file as well, which is read once.
        for path in
            matching(&process.path(&folder.join(pattern))).into_iter().filter(|path| *path != process.path(main))
        {
            if let Some(document) = parse(&path)? {
                // To 1.x all files have one version, to 2.x each has its own.
                let inherited = form.filter(|_| version < Some((2, 0)));
                config.take(&document, told_form(&document).or(inherited), version);
            }
        }
    }
    Ok(config)
}

fn parse(path: &Path) -> Result<Option<DocumentMut>, String> {
    let say = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(say(&error)),
        Ok(found) if !found.is_file() || found.len() > MAX_FILE => return Err(say(&"not a file of at most 4 MiB")),
        Ok(_) => {}
    }
    let text = fs::read_to_string(path).map_err(|error| say(&error))?;
    text.parse().map(Some).map_err(|error: toml_edit::TomlError| say(&error.message()))
}

/// The version of the file's form; none where it tells none.
fn told_form(document: &DocumentMut) -> Option<i64> {
    document.get("version").and_then(Item::as_integer).filter(|form| *form > 0)
}

/// Whether this containerd reads a plugin's section in a file of this form, as measured on 1.6.20 and 2.2.7.
fn is_read(plugin: &str, form: Option<i64>, version: Option<Version>) -> bool {
    let form = form.unwrap_or(1);
    match version {
        None => true,
        Some((0 | 1, _)) if form < 2 => plugin == "cri",
        Some((0 | 1, _)) => plugin == "io.containerd.grpc.v1.cri",
        Some(_) if form == 2 => plugin != "cri",
        Some(_) => plugin == "io.containerd.cri.v1.images",
    }
}

/// The files that a pattern with stars in its last part names, sorted.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !name.contains('*') {
        return vec![pattern.to_owned()];
    }
    let Some(Ok(entries)) = pattern.parent().map(fs::read_dir) else { return Vec::new() };
    let names = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_named = |path: &PathBuf| path.file_name().is_some_and(|found| fits(&name, &found.to_string_lossy()));
    let mut found: Vec<PathBuf> = names.filter(is_named).take(MAX_IMPORTS).collect();
    found.sort();
    found
}

fn fits(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    (0..=rest.len()).filter(|&at| rest.is_char_boundary(at)).any(|at| fits(after, &rest[at..]))
}

// === impl Config ===

impl Config {
    fn take(&mut self, document: &DocumentMut, form: Option<i64>, version: Option<Version>) {
        let Some(plugins) = document.get("plugins").and_then(Item::as_table_like) else { return };
        for (name, plugin) in PLUGINS.iter().rev().filter_map(|name| Some((*name, plugins.get(name)?))) {
            let at = |path: &[&str]| path.iter().try_fold(plugin, |item, key| item.as_table_like()?.get(key)).cloned();
            if !is_read(name, form, version) {
                self.unread = self.unread.or(at(&["registry", "config_path"]).map(|_| name));
                continue;
            }
            let flag = |path: &[&str]| at(path).and_then(|item| item.as_bool());
            if let Some(path) = at(&["registry", "config_path"]).and_then(|item| item.as_str().map(str::to_owned)) {
                self.config_path = Some(path);
            }
            let discard =
                flag(&["discard_unpacked_layers"]).or_else(|| flag(&["containerd", "discard_unpacked_layers"]));
            self.discard = discard.unwrap_or(self.discard);
            self.local_pull = flag(&["use_local_image_pull"]).unwrap_or(self.local_pull);
            let mirrors = at(&["registry", "mirrors"]);
            self.has_mirrors |= mirrors.is_some_and(|item| item.as_table_like().is_some_and(|table| !table.is_empty()));
        }
    }

    /// Whether containerd looks for hosts where the mirror's are.
    pub(super) fn judge_path(&self, wanted: &Path, version: Option<Version>) -> Finding {
        const CHECK: &str = "config_path";
        let section = match version {
            Some((major, _)) if major < 2 => "[plugins.\"io.containerd.grpc.v1.cri\".registry]",
            _ => "[plugins.'io.containerd.cri.v1.images'.registry]",
        };
        let change = format!(
            "in containerd's config.toml write `config_path = \"{}\"` below {section}, and restart containerd",
            wanted.display()
        );
        let told = self.config_path.as_deref().filter(|path| !path.is_empty());
        if told.is_none() && self.has_mirrors {
            let said = "containerd's registries stand in `registry.mirrors`, the old form, beside which it reads no hosts.toml";
            return Finding::failure(
                CHECK,
                said,
                format!("{change}; move those mirrors into hosts.toml files first, containerd takes one form only"),
            );
        }
        if let (None, Some(name)) = (told, self.unread) {
            let first = if version < Some((2, 0)) { "version = 2" } else { "version = 3" };
            let said = format!(
                "containerd's config_path stands below [plugins.'{name}'.registry], which it does not read in a file without that section's `version`: it asks no mirror"
            );
            return Finding::failure(CHECK, said, format!("{change}; its first line must be `{first}`"));
        }
        let default = if version >= Some((2, 2)) { DEFAULT_2_2 } else { "" };
        let path = told.unwrap_or(default);
        let is_default = if told.is_none() { ", its default," } else { "" };
        let is_wanted = |path: &str| Path::new(path).components().eq(wanted.components());
        if path.is_empty() {
            return Finding::failure(CHECK, "containerd has no config_path, so it asks no mirror", change);
        }
        if path.contains(':') {
            let splits = self.local_pull || version.is_some_and(|version| version < (2, 1));
            if splits && path.split(':').any(is_wanted) {
                return Finding::good(CHECK, format!("containerd looks for registry hosts in {path}"));
            }
            let said = format!(
                "containerd's config_path {path}{is_default} is a list, which pulls by Kubernetes do not split: they silently ask no mirror"
            );
            return Finding::failure(CHECK, said, change);
        }
        if is_wanted(path) {
            return Finding::good(CHECK, format!("containerd looks for registry hosts in {path}"));
        }
        let said = format!(
            "containerd looks for registry hosts in {path}, and the mirror's are expected in {}",
            wanted.display()
        );
        Finding::failure(CHECK, said, format!("{change}; or give spegel --containerd-registry-config-path {path}"))
    }

    /// Whether layers are kept.
    pub(super) fn judge_discard(&self) -> Finding {
        const CHECK: &str = "discard_unpacked_layers";
        if self.discard {
            let said =
                "containerd throws layers away once they are unpacked, so this node has nothing to give to others";
            return Finding::failure(
                CHECK,
                said,
                "set `discard_unpacked_layers = false` in containerd's config.toml and restart containerd; layers come back as images are pulled again",
            );
        }
        Finding::good(CHECK, "containerd keeps the layers that it has unpacked")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::finding::State;
    use super::*;

    fn config(text: &str) -> Config {
        config_of(text, None)
    }

    fn config_of(text: &str, version: Option<Version>) -> Config {
        let mut config = Config::default();
        let document = text.parse().unwrap();
        config.take(&document, told_form(&document), version);
        config
    }

    const WANTED: &str = "/etc/containerd/certs.d";

    #[track_caller]
    fn judged(text: &str, version: Version, state: State, says: &str) {
        let finding = config(text).judge_path(Path::new(WANTED), Some(version));
        assert!(finding.state == state && finding.said.contains(says), "{finding:?}");
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(version("v2.2.7"), Some((2, 2)));
        assert_eq!(version("1.6.20~ds1"), Some((1, 6)));
        assert_eq!(version("v2.3.0-rc.1"), Some((2, 3)));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn the_list_of_2_2_is_a_trap_and_is_named() {
        let list =
            format!("[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{WANTED}:/etc/docker/certs.d'\n");
        judged(&list, (2, 2), State::Failure, "is a list");
        judged("", (2, 2), State::Failure, ", its default, is a list");
        judged("", (2, 1), State::Failure, "has no config_path");
        let local = format!("{list}[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n");
        judged(&local, (2, 2), State::Good, WANTED);
        let old =
            format!("[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{WANTED}:/etc/docker/certs.d'\n");
        judged(&old, (1, 7), State::Good, WANTED);
    }

    /// The same names mean nothing in a file of another version: 1.6 takes a file without one for version 1.
    #[test]
    fn a_section_that_is_not_read_is_named() {
        let section =
            |first: &str, name: &str| format!("{first}\n[plugins.'{name}'.registry]\nconfig_path = '{WANTED}'\n");
        let [newest, middle, oldest] = PLUGINS;
        for (first, name, version, is_read) in [
            ("", middle, (1, 6), false),
            ("version = 2", middle, (1, 6), true),
            ("", oldest, (1, 6), true),
            ("version = 2", newest, (1, 7), false),
            ("", oldest, (2, 2), false),
            ("", middle, (2, 2), false),
            ("", newest, (2, 2), true),
            ("version = 2", newest, (2, 2), true),
            ("version = 2", middle, (2, 2), true),
            ("version = 3", middle, (2, 2), false),
            ("version = 3", newest, (2, 2), true),
        ] {
            let found = config_of(&section(first, name), Some(version)).judge_path(Path::new(WANTED), Some(version));
            let state = if is_read { State::Good } else { State::Failure };
            assert_eq!(found.state, state, "{first} {name} {version:?}: {found:?}");
            assert!(is_read || found.said.contains("does not read"), "{found:?}");
        }
    }

    #[test]
    fn every_other_path_is_named() {
        judged(
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/etc/containerd/certs.d/'\n",
            (1, 6),
            State::Good,
            WANTED,
        );
        judged(
            "[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/elsewhere'\n",
            (2, 2),
            State::Failure,
            "in /elsewhere, and",
        );
        let mirrors = "[plugins.'io.containerd.grpc.v1.cri'.registry.mirrors.'docker.io']\nendpoint = ['http://a']\n";
        judged(mirrors, (1, 7), State::Failure, "old form");
        // A section of another plugin says nothing of the CRI's.
        judged(
            "[plugins.'io.containerd.transfer.v1.local']\nconfig_path = '/etc/containerd/certs.d'\n",
            (2, 1),
            State::Failure,
            "no config_path",
        );
    }

    #[test]
    fn discarded_layers_are_named_in_both_forms() {
        let old = "[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndiscard_unpacked_layers = true\n";
        let new = "[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\n";
        for text in [old, new] {
            assert_eq!(config(text).judge_discard().state, State::Failure);
        }
        assert_eq!(config("").judge_discard().state, State::Good);
    }

    #[test]
    fn imported_files_count_more() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let path = |path: &str| format!("[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{path}'\n");
        write("config.toml", &format!("imports = ['c*.toml']\n{}", path("/a")));
        write("c1.toml", &path("/b"));
        write("c2.toml", "[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\n");
        write("d.toml", &path("/c"));
        let process = Process::unseen();
        let found = read(&process, &dir.path().join("config.toml"), Some((2, 2))).unwrap();
        assert_eq!((found.config_path.as_deref(), found.discard), (Some("/b"), true));
        write("c3.toml", "not = [toml");
        assert!(read(&process, &dir.path().join("config.toml"), Some((2, 2))).unwrap_err().contains("c3.toml"));
    }
}
