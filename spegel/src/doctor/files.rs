//! containerd's configuration files, put together as that version of containerd does it.
//!
//! How that is done was read in containerd 1.6.20, 1.7.28, 2.0.5, 2.1.4, 2.2.7 and 2.3.0, and a test compares it with what `containerd config dump`
//! says. Imports are followed in all of them, those of imported files too. 1.x lets a file that comes later replace a plugin's section whole; 2.x merges
//! sections key by key. To 1.x and to 2.0 to 2.2 all files together have one `version`, the last that
//! was told; from 2.3 on each file is carried over by its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use toml_edit::{DocumentMut, Item, Table};

use super::config::Version;
use super::process::Process;

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// How many files are read.
const MAX_FILES: usize = 128;

/// Where the CRI's image settings are, newest first: configuration versions 3, 2 and 1.
pub(super) const IMAGES: &str = "io.containerd.cri.v1.images";
pub(super) const GRPC: &str = "io.containerd.grpc.v1.cri";
pub(super) const OLDEST: &str = "cri";

/// What the files say together.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Plugins' sections.
    plugins: BTreeMap<String, Item>,
    /// The `version` that counts.
    form: i64,
    /// Plugins that are not to be loaded.
    pub(super) disabled: BTreeSet<String>,
    /// The file that was changed last, and when.
    pub(super) newest: Option<(PathBuf, SystemTime)>,
}

/// Reads the main file and all that it imports.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn read(process: &Process, main: &Path, version: Option<Version>) -> Result<Files, String> {
    let mut files = Files { form: default_form(version), ..Files::default() };
    let mut pending = VecDeque::from([main.to_owned()]);
    let mut read = BTreeSet::new();
    while let Some(path) = pending.pop_front() {
        if read.contains(&path) || read.len() >= MAX_FILES {
            continue;
        }
        read.insert(path.clone());
        let place = process.path(&path);
        let Some(document) = parse(&place)? else { continue };
        files.note_change(&path, &place);
        files.take(&document, version);
        let imports = document.get("imports").and_then(Item::as_array);
        let patterns = imports.into_iter().flatten().filter_map(toml_edit::Value::as_str);
        for pattern in patterns.take(MAX_FILES) {
            pending.extend(matching(process, &path, pattern, version));
        }
    }
    Ok(files)
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

/// What a file without a `version` is taken for, where no other has told one.
fn default_form(version: Option<Version>) -> i64 {
    match version {
        Some(version) if version < (2, 0) => 1,
        _ => 3,
    }
}

/// The files that an import of `parent` names, as the process sees them, sorted.
fn matching(process: &Process, parent: &Path, pattern: &str, version: Option<Version>) -> Vec<PathBuf> {
    let folder = parent.parent().unwrap_or(Path::new("/"));
    if !pattern.contains('*') {
        return vec![folder.join(pattern)];
    }
    // 1.6 looks for a pattern where its process was started.
    let folder = if version.is_some_and(|version| version < (1, 7)) { process.folder() } else { folder };
    let pattern = folder.join(pattern);
    let name = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let folder = pattern.parent().unwrap_or(Path::new("/"));
    let Ok(entries) = fs::read_dir(process.path(folder)) else { return Vec::new() };
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    let named = names.filter(|found| fits(&name, &found.to_string_lossy())).take(MAX_FILES);
    let mut found: Vec<PathBuf> = named.map(|name| folder.join(name)).collect();
    found.sort();
    found
}

fn fits(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    (0..=rest.len()).filter(|&at| rest.is_char_boundary(at)).any(|at| fits(after, &rest[at..]))
}

/// Lays one item over another, key by key.
fn merge(to: &mut Item, from: &Item) {
    let Some(table) = from.as_table_like() else {
        *to = from.clone();
        return;
    };
    let Some(to) = to.as_table_like_mut() else {
        *to = from.clone();
        return;
    };
    for (key, item) in table.iter() {
        match to.get_mut(key) {
            Some(known) => merge(known, item),
            None => {
                to.insert(key, item.clone());
            }
        }
    }
}

/// What stands at a path of keys.
pub(super) fn at<'a>(item: &'a Item, path: &[&str]) -> Option<&'a Item> {
    path.iter().try_fold(item, |item, key| item.as_table_like()?.get(key))
}

/// Lays the image settings of a CRI's section of version 2 over those of version 3.
fn carry_over(images: &mut Item, cri: &Item, version: Option<Version>) {
    let Some(images) = images.as_table_like_mut() else { return };
    let mut take = |from: &[&str]| {
        if let (Some(item), Some(key)) = (at(cri, from), from.last()) {
            images.insert(key, item.clone());
        }
    };
    take(&["registry"]);
    take(&["max_concurrent_downloads"]);
    take(&["image_pull_with_sync_fs"]);
    // 2.x carries these over only where a runtime is configured beside them.
    if version < Some((2, 0)) || at(cri, &["containerd", "runtimes"]).is_some() {
        take(&["containerd", "disable_snapshot_annotations"]);
        take(&["containerd", "discard_unpacked_layers"]);
    }
}

// === impl Files ===

impl Files {
    /// One file alone, for tests.
    #[cfg(test)]
    pub(super) fn of(text: &str, version: Option<Version>) -> Self {
        let mut files = Self { form: default_form(version), ..Self::default() };
        if let Ok(document) = text.parse() {
            files.take(&document, version);
        }
        files
    }

    fn note_change(&mut self, path: &Path, place: &Path) {
        let changed = fs::metadata(place).and_then(|found| found.modified());
        if let Ok(changed) = changed
            && self.newest.as_ref().is_none_or(|(_, newest)| changed > *newest)
        {
            self.newest = Some((path.to_owned(), changed));
        }
    }

    /// Lays a file over those before it.
    fn take(&mut self, document: &DocumentMut, version: Option<Version>) {
        let told = document.get("version").and_then(Item::as_integer).filter(|form| *form > 0);
        // 2.x gives the plugins of version 1 their names of version 2.
        let renames = version >= Some((2, 0)) && told.unwrap_or(1) < 2;
        let renamed = |name: &str| if renames && name == OLDEST { GRPC.to_owned() } else { name.to_owned() };
        if !renames {
            self.form = told.unwrap_or(self.form);
        }
        let disabled = document.get("disabled_plugins").and_then(Item::as_array);
        self.disabled.extend(disabled.into_iter().flatten().filter_map(toml_edit::Value::as_str).map(renamed));
        let plugins = document.get("plugins").and_then(Item::as_table_like);
        let named = plugins.into_iter().flat_map(|plugins| plugins.iter());
        let mut sections: BTreeMap<String, Item> =
            named.map(|(name, section)| (renamed(name), section.clone())).collect();
        if version >= Some((2, 3))
            && told.unwrap_or(1) < 4
            && let Some(cri) = sections.get(GRPC).cloned()
        {
            let images = sections.entry(IMAGES.to_owned()).or_insert_with(|| Item::Table(Table::new()));
            carry_over(images, &cri, version);
        }
        for (name, section) in sections {
            match self.plugins.get_mut(&name) {
                Some(known) if version.is_none_or(|version| version >= (2, 0)) => merge(known, &section),
                _ => {
                    self.plugins.insert(name, section);
                }
            }
        }
    }

    /// The CRI's image settings in the form of version 3, and the section that names a `config_path` and is of another version, so that it is
    /// not read.
    pub(super) fn images(&self, version: Option<Version>) -> (Item, Option<&'static str>) {
        let section = |name: &str| self.plugins.get(name).cloned().unwrap_or(Item::Table(Table::new()));
        let mut read = Item::Table(Table::new());
        let names = match version {
            None => {
                carry_over(&mut read, &section(OLDEST), version);
                carry_over(&mut read, &section(GRPC), version);
                merge(&mut read, &section(IMAGES));
                vec![IMAGES, GRPC, OLDEST]
            }
            Some(version) if version < (2, 0) => {
                let name = if self.form < 2 { OLDEST } else { GRPC };
                carry_over(&mut read, &section(name), Some(version));
                vec![name]
            }
            Some(version) if version < (2, 3) && self.form == 2 => {
                read = section(IMAGES);
                carry_over(&mut read, &section(GRPC), Some(version));
                vec![IMAGES, GRPC]
            }
            Some(_) => {
                read = section(IMAGES);
                vec![IMAGES]
            }
        };
        let has_path = |name: &&str| at(&section(name), &["registry", "config_path"]).is_some();
        let carried = version >= Some((2, 3));
        let unread = [IMAGES, GRPC, OLDEST].into_iter().filter(|name| !carried && !names.contains(name)).find(has_path);
        (read, unread)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use spegel_benches::containerd::{Binaries, Version as Installed};
    use spegel_benches::daemon::output;

    use super::*;

    const V1_6: Version = (1, 6);
    const V2_2: Version = (2, 2);

    fn write(dir: &Path, name: &str, text: &str) {
        fs::write(dir.join(name), text).unwrap();
    }

    fn text_at(item: &Item, path: &[&str]) -> Option<String> {
        at(item, path).and_then(|item| item.as_str()).map(str::to_owned)
    }

    #[track_caller]
    fn path_of(dir: &Path, version: Version) -> Option<String> {
        let files = read(&Process::unseen(), &dir.join("config.toml"), Some(version)).unwrap();
        text_at(&files.images(Some(version)).0, &["registry", "config_path"])
    }

    #[test]
    fn imports_count_more_and_are_followed_in_turn() {
        let dir = tempfile::tempdir().unwrap();
        let path = |path: &str| format!("[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{path}'\n");
        write(dir.path(), "config.toml", &format!("imports = ['c*.toml']\n{}", path("/a")));
        write(dir.path(), "c1.toml", &format!("imports = ['d.toml', 'config.toml', '/nowhere.toml']\n{}", path("/b")));
        write(dir.path(), "c2.toml", "[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\n");
        write(dir.path(), "e.toml", &path("/e"));
        assert_eq!(path_of(dir.path(), V2_2).as_deref(), Some("/b"));
        write(dir.path(), "d.toml", &path("/d"));
        assert_eq!(path_of(dir.path(), V2_2).as_deref(), Some("/d"));
        write(dir.path(), "c3.toml", "not = [toml");
        let failed = read(&Process::unseen(), &dir.path().join("config.toml"), Some(V2_2)).unwrap_err();
        assert!(failed.contains("c3.toml"), "{failed}");
    }

    /// The drop-in says nothing of registries, and takes the CRI's section all the same.
    #[test]
    fn a_drop_in_replaces_a_section_in_1_x_and_is_merged_in_2_x() {
        let dir = tempfile::tempdir().unwrap();
        let main = "version = 2\nimports = ['drop.toml']\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/a'\n";
        write(dir.path(), "config.toml", main);
        write(dir.path(), "drop.toml", "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'b'\n");
        assert_eq!(path_of(dir.path(), V1_6), None);
        assert_eq!(path_of(dir.path(), (1, 7)), None);
        assert_eq!(path_of(dir.path(), V2_2).as_deref(), Some("/a"));
        assert_eq!(path_of(dir.path(), (2, 3)).as_deref(), Some("/a"));
    }

    /// To 2.2 a drop-in of version 3 makes the main file's sections of version 2 unread.
    #[test]
    fn the_last_version_counts_for_all_files_until_2_2() {
        let dir = tempfile::tempdir().unwrap();
        let main = "version = 2\nimports = ['drop.toml']\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/a'\n";
        write(dir.path(), "config.toml", main);
        write(dir.path(), "drop.toml", "version = 3\n");
        let files = read(&Process::unseen(), &dir.path().join("config.toml"), Some(V2_2)).unwrap();
        let (images, unread) = files.images(Some(V2_2));
        assert_eq!((text_at(&images, &["registry", "config_path"]), unread), (None, Some(GRPC)));
        assert_eq!(path_of(dir.path(), (2, 3)).as_deref(), Some("/a"));
        write(dir.path(), "drop.toml", "[plugins.'cri'.registry]\nconfig_path = '/b'\n");
        assert_eq!(path_of(dir.path(), V2_2).as_deref(), Some("/b"));
    }

    #[test]
    fn disabled_plugins_add_up_and_are_renamed() {
        let files = Files::of("disabled_plugins = ['cri']\n", Some(V2_2));
        assert!(files.disabled.contains(GRPC), "{:?}", files.disabled);
        let files = Files::of("disabled_plugins = ['cri']\n", Some(V1_6));
        assert!(files.disabled.contains(OLDEST), "{:?}", files.disabled);
    }

    /// What containerd itself makes of files: the CRI's `config_path`, and whether it discards layers; nothing where it refuses them.
    fn dumped(binaries: &Binaries, main: &Path) -> Option<(String, bool)> {
        let mut command = std::process::Command::new(&binaries.containerd);
        let text = output(command.current_dir("/").arg("--config").arg(main).args(["config", "dump"])).ok()?;
        let dump = Item::Table(text.parse::<DocumentMut>().unwrap().as_table().clone());
        let (section, discard): (_, &[&str]) = match binaries.version {
            Installed::V1_6 => (GRPC, &["containerd", "discard_unpacked_layers"]),
            Installed::V2_2 => (IMAGES, &["discard_unpacked_layers"]),
        };
        let section = at(&dump, &["plugins", section]).unwrap();
        let path = text_at(section, &["registry", "config_path"]).unwrap();
        Some((path, at(section, discard).unwrap().as_bool().unwrap()))
    }

    /// Files that lie over each other, read here and by each containerd that is there.
    #[test]
    fn files_mean_what_they_mean_to_containerd() {
        let path = |plugin: &str, path: &str| format!("[plugins.'{plugin}'.registry]\nconfig_path = '{path}'\n");
        let (v2, v3) = (path(GRPC, "/2"), path(IMAGES, "/3"));
        let discard = "[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers =";
        let old = "[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndiscard_unpacked_layers = true\n";
        let runtime =
            "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n";
        let import = "imports = ['drop.toml']\n";
        let cases: Vec<[String; 3]> = [
            [format!("version = 2\n{v2}"), String::new(), String::new()],
            [format!("{v2}{v3}"), String::new(), String::new()],
            [path(OLDEST, "/1"), String::new(), String::new()],
            [format!("version = 2\n{v2}{v3}"), String::new(), String::new()],
            [format!("version = 3\n{v2}"), String::new(), String::new()],
            [format!("version = 2\n{old}"), String::new(), String::new()],
            [format!("version = 2\n{old}{runtime}"), String::new(), String::new()],
            [
                format!("version = 2\n{import}{v2}"),
                "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'b'\n".into(),
                String::new(),
            ],
            [format!("version = 2\n{import}{v2}"), "version = 3\n".into(), String::new()],
            [format!("version = 2\n{import}{v2}"), format!("version = 3\n{v3}"), String::new()],
            [format!("version = 3\n{import}{v3}"), format!("version = 2\n{v2}"), String::new()],
            [format!("version = 2\n{import}{v2}"), path(OLDEST, "/1"), String::new()],
            [format!("version = 3\n{import}{v3}"), path(OLDEST, "/1"), String::new()],
            [format!("version = 2\n{import}{v2}"), format!("version = 2\n{}", path(GRPC, "")), String::new()],
            [
                format!("version = 3\n{import}{discard} true\n"),
                format!("version = 3\n{discard} false\n"),
                String::new(),
            ],
            [format!("version = 3\n{import}{v3}"), format!("version = 3\n{discard} true\n"), String::new()],
            [
                format!("version = 3\n{import}{v3}"),
                format!("version = 3\nimports = ['config.toml', 'nested/*.toml']\n{}", path(IMAGES, "/4")),
                format!("version = 3\n{}", path(IMAGES, "/5")),
            ],
            [
                format!("version = 2\n{import}{v2}"),
                "version = 2\nimports = ['nested/n.toml']\n".into(),
                format!("version = 2\n{}", path(GRPC, "/5")),
            ],
        ]
        .into();
        for installed in Installed::ALL {
            let binaries = match installed.find() {
                Ok(binaries) => binaries,
                Err(reason) => {
                    println!("containerd {installed} ... skipped: {reason}");
                    continue;
                }
            };
            let version = if installed == Installed::V1_6 { V1_6 } else { V2_2 };
            let mut compared = 0;
            for [main, drop, nested] in &cases {
                let dir = tempfile::tempdir().unwrap();
                fs::create_dir(dir.path().join("nested")).unwrap();
                write(dir.path(), "config.toml", main);
                write(dir.path(), "drop.toml", drop);
                write(dir.path(), "nested/n.toml", nested);
                let main_file = dir.path().join("config.toml");
                let (images, _) = read(&Process::unseen(), &main_file, Some(version)).unwrap().images(Some(version));
                let path = text_at(&images, &["registry", "config_path"]).unwrap_or_default();
                let discard = at(&images, &["discard_unpacked_layers"]).and_then(Item::as_bool).unwrap_or(false);
                let files = format!("{installed}\n{main}--- drop.toml\n{drop}--- nested/n.toml\n{nested}");
                if let Some(dumped) = dumped(&binaries, &main_file) {
                    assert_eq!((path, discard), dumped, "{files}");
                    compared += 1;
                }
            }
            // 1.6 refuses the names of version 1 in those of version 2.
            assert!(compared + 2 >= cases.len(), "containerd {installed} takes {compared} only");
        }
    }

    #[test]
    fn the_newest_file_is_known() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "config.toml", "imports = ['drop.toml']\n");
        write(dir.path(), "drop.toml", "");
        let later = SystemTime::now() + std::time::Duration::from_secs(60);
        fs::File::options().write(true).open(dir.path().join("drop.toml")).unwrap().set_modified(later).unwrap();
        let files = read(&Process::unseen(), &dir.path().join("config.toml"), Some(V2_2)).unwrap();
        assert_eq!(files.newest.map(|(path, _)| path), Some(dir.path().join("drop.toml")));
    }
}
