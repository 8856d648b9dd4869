//! Interruptions at every step of a run.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;

use super::*;

const ORIGINAL: &str = "server = 'http://registry.test:5000'\n";

/// Every file below a directory with its content.
fn snapshot(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
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
        assert!(written.len() == 4 && !written.keys().any(|path| path.ends_with(".hosts.toml.spegel")), "{written:?}");
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
        assert!(!path.exists() || snapshot(path).is_empty(), "step {step}");
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
