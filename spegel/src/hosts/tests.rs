//! Interruptions at every step of a run.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use super::*;

const ORIGINAL: &str = "server = 'http://registry.test:5000'\n";

/// Every file below a directory with its content, and every directory and link.
fn snapshot(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let found = path.symlink_metadata().unwrap();
        if found.is_dir() {
            files.extend(snapshot(&path));
            files.insert(path, format!("{:o} {}", found.mode(), found.uid()));
        } else if found.is_symlink() {
            files.insert(path.clone(), format!("-> {}", fs::read_link(&path).unwrap().display()));
        } else {
            files.insert(path.clone(), fs::read_to_string(&path).unwrap());
        }
    }
    files
}

fn setting(root: &Path) -> Configuration {
    let directory = root.join("registry.test:5000");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join(HOSTS), ORIGINAL).unwrap();
    fs::write(directory.join("ca.crt"), "ca").unwrap();
    Configuration {
        config_path: root.to_owned(),
        mirrored_registries: vec!["http://registry.test:5000".parse().unwrap(), "other.test".parse().unwrap()],
        mirror_targets: vec!["http://127.0.0.1:5000".parse().unwrap()],
        resolve_tags: true,
        prepend_existing: false,
        basic_auth: None,
        node_name: "node-1".to_owned(),
    }
}

/// A hook that fails before step `last`, and how many steps it saw.
fn failing<'a>(last: usize, seen: &'a mut usize) -> impl FnMut(&'static str) -> io::Result<()> + 'a {
    move |_| {
        *seen += 1;
        if *seen > last { Err(io::Error::other("interrupted")) } else { Ok(()) }
    }
}

/// containerd finds either what was there or all of ours, and the original is not lost.
fn assert_valid(root: &Path, step: usize) {
    let path = root.join("registry.test:5000").join(HOSTS);
    let text = fs::read_to_string(&path).unwrap();
    let is_whole = render::read_marker(text.as_bytes()).is_some_and(|(pristine, _)| pristine);
    assert!(text == ORIGINAL || is_whole, "step {step}: {text}");
    assert!(snapshot(root).values().any(|text| text == ORIGINAL), "step {step}");
}

#[test]
fn interrupted_write_is_completed_by_the_next() {
    for step in 0.. {
        let root = tempfile::tempdir().unwrap();
        let configuration = setting(root.path());
        let before = snapshot(root.path());
        let mut seen = 0;
        let result = write_with(&configuration, &mut failing(step, &mut seen));
        assert_valid(root.path(), step);
        write(&configuration).unwrap();
        let written = snapshot(root.path());
        let names: Vec<_> =
            written.keys().map(|path| path.strip_prefix(root.path()).unwrap().to_str().unwrap()).collect();
        let backup =
            ["_backup.spegel", "_backup.spegel/registry.test:5000", "_backup.spegel/registry.test:5000/hosts.toml"];
        let live = ["other.test", "other.test/hosts.toml"];
        let ours = ["registry.test:5000", "registry.test:5000/ca.crt", "registry.test:5000/hosts.toml"];
        assert_eq!(names, [&backup[..], &live, &ours].concat(), "step {step}");
        remove(root.path()).unwrap();
        assert_eq!(snapshot(root.path()), before, "step {step}");
        if result.is_ok() {
            assert!(step > 4, "the run has steps");
            return;
        }
    }
}

#[test]
fn interrupted_write_is_taken_back() {
    for step in 0.. {
        let root = tempfile::tempdir().unwrap();
        let configuration = setting(root.path());
        let before = snapshot(root.path());
        let mut seen = 0;
        let result = write_with(&configuration, &mut failing(step, &mut seen));
        remove(root.path()).unwrap();
        assert_eq!(snapshot(root.path()), before, "step {step}");
        assert!(!root.path().join(BACKUP).exists(), "step {step}");
        if result.is_ok() {
            return;
        }
    }
}

#[test]
fn interrupted_remove_is_completed_by_the_next() {
    for step in 0.. {
        let root = tempfile::tempdir().unwrap();
        let configuration = setting(root.path());
        let before = snapshot(root.path());
        write(&configuration).unwrap();
        let mut seen = 0;
        let result = remove_with(root.path(), &mut failing(step, &mut seen));
        assert_valid(root.path(), step);
        remove(root.path()).unwrap();
        assert_eq!(snapshot(root.path()), before, "step {step}");
        if result.is_ok() {
            assert!(step > 2, "the run has steps");
            return;
        }
    }
}

/// What the Go program leaves beside an administrator's certificates, links and files of his own.
fn left_by_go(root: &Path) -> BTreeMap<PathBuf, String> {
    let backup = root.join(go::BACKUP);
    for directory in ["docker.io", "private.test", "empty.test", "registry.test:5000"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::set_permissions(root.join("private.test"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for (file, text) in [
        ("docker.io/hosts.toml.bak", "older"),
        ("private.test/hosts.toml", "server = 'https://private.test'\n"),
        ("registry.test:5000/hosts.toml", ORIGINAL),
        ("registry.test:5000/ca.crt", "ca"),
        ("README", "do not touch"),
    ] {
        fs::write(root.join(file), text).unwrap();
    }
    std::os::unix::fs::symlink("docker.io", root.join("index.docker.io")).unwrap();
    std::os::unix::fs::symlink("../private.test/hosts.toml", root.join("docker.io/hosts.toml")).unwrap();
    let before = snapshot(root);
    fs::create_dir(&backup).unwrap();
    for entry in disk::entries(root).unwrap().iter().filter(|entry| *entry != go::BACKUP) {
        fs::rename(root.join(entry), backup.join(entry)).unwrap();
    }
    let host = "[host.'http://10.0.0.1:30020']\ncapabilities = ['pull', 'resolve']\ndial_timeout = '200ms'\n";
    for directory in ["docker.io", "registry.test:5000", "quay.test"] {
        fs::create_dir(root.join(directory)).unwrap();
        fs::write(root.join(directory).join(HOSTS), format!("server = 'https://{directory}'\n\n{host}")).unwrap();
    }
    before
}

#[test]
fn everything_that_the_go_program_moved_comes_back_as_it_was() {
    for (step, written) in (0..).flat_map(|step| [(step, false), (step, true)]) {
        let root = tempfile::tempdir().unwrap();
        let before = left_by_go(root.path());
        let mut configuration = below_nothing(tempfile::tempdir().unwrap().path());
        configuration.config_path = root.path().to_owned();
        let mut seen = 0;
        let hook = &mut failing(step, &mut seen);
        let result = if written { write_with(&configuration, hook) } else { remove_with(root.path(), hook) };
        remove(root.path()).unwrap();
        assert_eq!(snapshot(root.path()), before, "step {step}, {written}");
        if written && result.is_ok() {
            assert!(step > 10, "the run has steps");
            return;
        }
    }
}

/// A configuration of all registries, below a directory that is not there.
fn below_nothing(root: &Path) -> Configuration {
    let mut configuration = setting(root);
    configuration.config_path = root.join("etc/certs.d");
    configuration.mirrored_registries.clear();
    configuration
}

#[test]
fn a_directory_that_had_to_be_made_goes_unless_others_use_it() {
    let root = tempfile::tempdir().unwrap();
    let configuration = below_nothing(root.path());
    let path = &configuration.config_path;
    for _ in 0..2 {
        write(&configuration).unwrap();
        write(&configuration).unwrap();
        remove(path).unwrap();
        assert!(!path.exists());
    }
    write(&configuration).unwrap();
    fs::create_dir(path.join("another.test")).unwrap();
    remove(path).unwrap();
    assert_eq!(disk::entries(path).unwrap().into_iter().collect::<Vec<_>>(), ["another.test"]);
    // It was there this time.
    fs::remove_dir(path.join("another.test")).unwrap();
    write(&configuration).unwrap();
    remove(path).unwrap();
    assert!(disk::entries(path).unwrap().is_empty() && path.is_dir());
}

#[test]
fn no_file_is_left_by_interruptions_and_a_whole_run_leaves_nothing() {
    for step in 0.. {
        let root = tempfile::tempdir().unwrap();
        let configuration = below_nothing(root.path());
        let path = &configuration.config_path;
        let (mut written, mut removed) = (0, 0);
        let result = write_with(&configuration, &mut failing(step, &mut written));
        let _ = remove_with(path, &mut failing(step, &mut removed));
        remove(path).unwrap();
        assert!(!path.exists() || snapshot(path).is_empty(), "step {step}: {:?}", snapshot(path));
        if result.is_ok() {
            assert!(step > 2 && !path.exists(), "step {step}");
            return;
        }
    }
}

#[test]
fn runs_at_the_same_time_lose_nothing() {
    let root = tempfile::tempdir().unwrap();
    let configuration = setting(root.path());
    let before = snapshot(root.path());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..50).for_each(|_| drop(write(&configuration).unwrap())));
            scope.spawn(|| (0..50).for_each(|_| drop(remove(root.path()).unwrap())));
        }
    });
    remove(root.path()).unwrap();
    assert_eq!(snapshot(root.path()), before);
}

#[test]
fn a_directory_that_comes_and_goes_is_made_again() {
    let root = tempfile::tempdir().unwrap();
    let configuration = below_nothing(root.path());
    let path = &configuration.config_path;
    std::thread::scope(|scope| {
        scope.spawn(|| (0..50).for_each(|_| drop(write(&configuration).unwrap())));
        scope.spawn(|| (0..50).for_each(|_| drop(remove(path).unwrap())));
    });
    remove(path).unwrap();
    assert!(!path.exists());
}

#[test]
fn a_run_that_does_not_end_is_not_waited_for_for_ever() {
    let root = tempfile::tempdir().unwrap();
    let held = disk::lock(root.path()).unwrap().unwrap();
    let waited = disk::lock_within(root.path(), std::time::Duration::ZERO);
    assert!(matches!(waited, Err(HostsError::Busy(_))), "{waited:?}");
    drop(held);
    assert!(disk::lock(root.path()).unwrap().is_some());
    assert!(disk::lock(&root.path().join("nothing")).unwrap().is_none());
}

/// Credentials are for root only: also those of a host that is kept behind the mirror, and where somebody has changed the mode.
#[test]
fn what_has_credentials_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let root = tempfile::tempdir().unwrap();
    let mut configuration = setting(root.path());
    let path = root.path().join("registry.test:5000").join(HOSTS);
    let mode = || fs::metadata(&path).unwrap().mode() & 0o777;
    configuration.prepend_existing = true;
    fs::write(&path, "[host.'http://a.test'.header]\nAuthorization = 'Basic x'\n").unwrap();
    write(&configuration).unwrap();
    assert_eq!(mode(), 0o600, "{}", fs::read_to_string(&path).unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let report = write(&configuration).unwrap();
    assert_eq!((mode(), report.written), (0o600, vec![path.clone()]));
    assert!(!write(&configuration).unwrap().written.contains(&path));
}
