//! What containerd's configuration says of registries.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use toml_edit::Item;

use super::files::{self, Files, at};
use super::finding::Finding;
use super::process::Process;

/// What containerd 2.2 takes where it is told nothing.
const DEFAULT_2_2: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";
/// How many layers the CRI fetches at once where it is told nothing.
const DOWNLOADS: i64 = 3;
/// How exactly it is known when a process was started.
const EXACTLY: Duration = Duration::from_secs(2);

/// containerd's major and minor version.
pub(super) type Version = (u32, u32);

/// What the files say; nothing where none says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Config {
    config_path: Option<String>,
    discard: bool,
    /// What makes the CRI of 2.1 and later pull by itself instead of by the transfer service.
    pulls_itself: Option<&'static str>,
    /// Registries stand in the old form, which takes no `hosts.toml`.
    has_mirrors: bool,
    /// A section that names a `config_path` and is of another version of the file than its first line says: containerd does not read it.
    unread: Option<&'static str>,
    /// The entry by which the CRI is not loaded.
    pub(super) disabled: Option<String>,
    /// The file that was changed last, and when.
    newest: Option<(PathBuf, SystemTime)>,
}

/// Reads `v2.2.7`, `1.6.20~ds1` and the like.
pub(super) fn version(text: &str) -> Option<Version> {
    let mut parts = text.trim_start_matches('v').split('.');
    let number = |part: &str| part.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

/// Reads the main file and those that it imports.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn read(process: &Process, main: &Path, version: Option<Version>) -> Result<Config, String> {
    files::read(process, main, version).map(|files| Config::of(files, version))
}

/// Whether two paths lead to the same directory, as that process sees them.
fn is_same(process: Option<&Process>, one: &Path, other: &Path) -> bool {
    let real = |path: &Path| {
        let place = process.map_or_else(|| path.to_owned(), |process| process.path(path));
        place.canonicalize().ok()
    };
    one.components().eq(other.components()) || real(one).is_some_and(|one| real(other) == Some(one))
}

// === impl Config ===

impl Config {
    fn of(files: Files, version: Option<Version>) -> Self {
        let (images, unread) = files.images(version);
        let flag = |key: &str| at(&images, &[key]).and_then(Item::as_bool);
        let has = |key: &str| {
            let table = at(&images, &["registry", key]).and_then(Item::as_table_like);
            table.is_some_and(|table| !table.is_empty())
        };
        let discard = flag("discard_unpacked_layers").unwrap_or(false);
        // As `CheckLocalImagePullConfigs` of 2.1 to 2.3 has it.
        let reasons = [
            ("use_local_image_pull", flag("use_local_image_pull") == Some(true)),
            ("disable_snapshot_annotations = false", flag("disable_snapshot_annotations") == Some(false)),
            ("discard_unpacked_layers", discard),
            ("registry.mirrors", has("mirrors")),
            ("registry.configs", has("configs")),
            ("registry.auths", has("auths")),
            (
                "max_concurrent_downloads",
                at(&images, &["max_concurrent_downloads"]).and_then(Item::as_integer).is_some_and(|n| n != DOWNLOADS),
            ),
            ("image_pull_with_sync_fs", flag("image_pull_with_sync_fs") == Some(true)),
        ];
        let told = at(&images, &["registry", "config_path"]).and_then(Item::as_str);
        let cri = [files::GRPC, files::IMAGES, files::OLDEST];
        Self {
            config_path: told.filter(|path| !path.is_empty()).map(str::to_owned),
            discard,
            pulls_itself: reasons.iter().find(|(_, holds)| *holds).map(|(name, _)| *name),
            has_mirrors: has("mirrors"),
            unread,
            disabled: cri.into_iter().find(|name| files.disabled.contains(*name)).map(str::to_owned),
            newest: files.newest,
        }
    }

    /// Whether containerd has read its files as they are now.
    pub(super) fn judge_age(&self, started: SystemTime) -> Finding {
        const CHECK: &str = "restart";
        let late = self.newest.as_ref().filter(|(_, changed)| *changed > started + EXACTLY);
        let Some((path, changed)) = late else {
            return Finding::good(CHECK, "containerd was started after its configuration was last changed");
        };
        let after = changed.duration_since(started).unwrap_or_default().as_secs();
        Finding::warning(
            CHECK,
            format!(
                "{} was changed {after} s after containerd was started, which reads it at its start only: what is said of it here may not hold yet",
                path.display()
            ),
            "systemctl restart containerd",
        )
    }

    /// Whether containerd looks for hosts where the mirror's are.
    pub(super) fn judge_path(&self, process: Option<&Process>, wanted: &Path, version: Option<Version>) -> Finding {
        const CHECK: &str = "config_path";
        let section = match version {
            Some((major, _)) if major < 2 => "[plugins.\"io.containerd.grpc.v1.cri\".registry]",
            _ => "[plugins.'io.containerd.cri.v1.images'.registry]",
        };
        let change = format!(
            "in containerd's config.toml write `config_path = \"{}\"` below {section}, and restart containerd",
            wanted.display()
        );
        let told = self.config_path.as_deref();
        match (told, self.has_mirrors, self.unread) {
            (None, true, _) => {
                let said = "containerd's registries stand in `registry.mirrors`, the old form, beside which it reads no hosts.toml";
                return Finding::failure(
                    CHECK,
                    said,
                    format!("{change}; move those mirrors into hosts.toml files first, containerd takes one form only"),
                );
            }
            (Some(path), true, _) => {
                let said = format!(
                    "containerd has both config_path {path} and `registry.mirrors`, and with both it does not load its CRI plugin"
                );
                let change =
                    "move the mirrors into hosts.toml files, take `registry.mirrors` away, and restart containerd";
                return Finding::failure(CHECK, said, change);
            }
            (None, false, Some(name)) => {
                let first = if version < Some((2, 0)) { "version = 2" } else { "version = 3" };
                let said = format!(
                    "containerd's config_path stands below [plugins.'{name}'.registry], which it does not read in a file without that section's `version`, of which the last file's counts for all: it asks no mirror"
                );
                return Finding::failure(CHECK, said, format!("{change}; its first line must be `{first}`"));
            }
            _ => {}
        }
        let default = if version >= Some((2, 2)) { DEFAULT_2_2 } else { "" };
        let path = told.unwrap_or(default);
        let is_default = if told.is_none() { ", its default," } else { "" };
        let is_wanted = |path: &str| is_same(process, Path::new(path), wanted);
        if path.is_empty() {
            return Finding::failure(CHECK, "containerd has no config_path, so it asks no mirror", change);
        }
        if path.contains(':') && version.is_none_or(|version| version >= (2, 1)) && self.pulls_itself.is_none() {
            let said = format!(
                "containerd's config_path {path}{is_default} is a list, which pulls by Kubernetes do not split: they silently ask no mirror"
            );
            return Finding::failure(CHECK, said, change);
        }
        if path.split(':').any(is_wanted) {
            let why = self.pulls_itself.filter(|_| path.contains(':') && version >= Some((2, 1)));
            let why = why.map(|why| format!(", a list, which it splits because of {why}")).unwrap_or_default();
            return Finding::good(CHECK, format!("containerd looks for registry hosts in {path}{why}"));
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

    fn config(text: &str, version: Version) -> Config {
        Config::of(Files::of(text, Some(version)), Some(version))
    }

    const WANTED: &str = "/etc/containerd/certs.d";

    #[track_caller]
    fn judged(text: &str, version: Version, state: State, says: &str) {
        let finding = config(text, version).judge_path(None, Path::new(WANTED), Some(version));
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
        let old = format!(
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{WANTED}:/etc/docker/certs.d'\n"
        );
        judged(&old, (1, 7), State::Good, WANTED);
        judged(&list, (2, 0), State::Good, WANTED);
    }

    /// What the transfer service does not know makes the CRI pull by itself, and then it splits lists.
    #[test]
    fn a_list_is_good_where_the_cri_pulls_by_itself() {
        let section = "version = 3\n[plugins.'io.containerd.cri.v1.images']\n";
        for setting in [
            "use_local_image_pull = true",
            "disable_snapshot_annotations = false",
            "discard_unpacked_layers = true",
            "max_concurrent_downloads = 5",
            "image_pull_with_sync_fs = true",
            "registry.configs.'a.test'.auth.username = 'u'",
            "registry.auths.'https://a.test'.username = 'u'",
        ] {
            for version in [(2, 2), (2, 3)] {
                judged(&format!("{section}{setting}\n"), version, State::Good, "which it splits because of");
            }
        }
        for setting in
            ["use_local_image_pull = false", "disable_snapshot_annotations = true", "max_concurrent_downloads = 3"]
        {
            judged(&format!("{section}{setting}\n"), (2, 2), State::Failure, "is a list");
        }
        // What an older file has is carried over, but for that switch.
        let old = "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\n";
        judged(&format!("{old}max_concurrent_downloads = 5\n"), (2, 2), State::Good, "which it splits");
        judged(&format!("{old}use_local_image_pull = true\n"), (2, 2), State::Failure, "is a list");
    }

    /// The same names mean nothing in a file of another version: 1.6 takes a file without one for version 1.
    #[test]
    fn a_section_that_is_not_read_is_named() {
        let section =
            |first: &str, name: &str| format!("{first}\n[plugins.'{name}'.registry]\nconfig_path = '{WANTED}'\n");
        let [newest, middle, oldest] = [files::IMAGES, files::GRPC, files::OLDEST];
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
            ("", oldest, (2, 3), true),
            ("version = 3", middle, (2, 3), true),
        ] {
            let found = config(&section(first, name), version).judge_path(None, Path::new(WANTED), Some(version));
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
        let mirrors = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry.mirrors.'docker.io']\nendpoint = ['http://a']\n";
        judged(mirrors, (1, 7), State::Failure, "old form");
        judged(
            &format!("{mirrors}[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{WANTED}'\n"),
            (1, 7),
            State::Failure,
            "does not load its CRI plugin",
        );
        // A section of another plugin says nothing of the CRI's.
        judged(
            "[plugins.'io.containerd.transfer.v1.local']\nconfig_path = '/etc/containerd/certs.d'\n",
            (2, 1),
            State::Failure,
            "no config_path",
        );
    }

    #[test]
    fn a_link_to_the_directory_is_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let text = |path: &Path| {
            format!("[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{}'\n", path.display())
        };
        for (told, wanted) in [(&real, &link), (&link, &real)] {
            let found = config(&text(told), (2, 2)).judge_path(Some(&Process::unseen()), wanted, Some((2, 2)));
            assert_eq!(found.state, State::Good, "{found:?}");
        }
        let other = dir.path().join("other");
        let found = config(&text(&link), (2, 2)).judge_path(None, &other, Some((2, 2)));
        assert_eq!(found.state, State::Failure, "{found:?}");
    }

    #[test]
    fn discarded_layers_are_named_in_both_forms() {
        let old = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndiscard_unpacked_layers = true\n";
        let new = "[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\n";
        for (text, version) in [(old, (1, 6)), (new, (2, 2))] {
            assert_eq!(config(text, version).judge_discard().state, State::Failure);
            assert_eq!(config("", version).judge_discard().state, State::Good);
        }
        // 2.x carries the old one over only beside a runtime.
        assert_eq!(config(old, (2, 2)).judge_discard().state, State::Good);
        let with = format!("{old}runtimes.runc.runtime_type = 'io.containerd.runc.v2'\n");
        assert_eq!(config(&with, (2, 2)).judge_discard().state, State::Failure);
    }

    #[test]
    fn a_change_after_the_start_is_named() {
        let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let config = Config { newest: Some(("/etc/containerd/config.toml".into(), changed)), ..Config::default() };
        let late = config.judge_age(changed - Duration::from_secs(60));
        assert!(late.state == State::Warning && late.said.contains("config.toml was changed 60 s after"), "{late:?}");
        // A containerd that is started right after its file was written.
        for started in [changed - Duration::from_secs(1), changed, changed + Duration::from_secs(1)] {
            assert_eq!(config.judge_age(started).state, State::Good);
        }
    }
}
