//! What `hosts` leaves in containerd's configuration directory, and what it finds there.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use spegel::hosts::{Configuration, HostsError, MirrorTarget, remove, write};

fn setting(root: &Path, registries: &[&str]) -> Configuration {
    Configuration {
        config_path: root.to_owned(),
        mirrored_registries: registries.iter().map(|text| text.parse().unwrap()).collect(),
        mirror_targets: vec!["http://127.0.0.1:30020".parse().unwrap(), "http://[fd00::1]:30021".parse().unwrap()],
        resolve_tags: true,
        prepend_existing: false,
        basic_auth: None,
        node_name: "node-1".to_owned(),
    }
}

fn put(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn get(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap()
}

/// Every file below a directory with its content, and every directory.
fn snapshot(root: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            found.insert(path, Some(target.into_os_string().into_encoded_bytes()));
        } else if path.is_dir() {
            found.extend(snapshot(&path));
            found.insert(path, None);
        } else {
            found.insert(path.clone(), Some(fs::read(&path).unwrap()));
        }
    }
    found
}

/// The text behind the line by which a file is known.
fn body(root: &Path, path: &str) -> String {
    let text = get(root, path);
    let (first, body) = text.split_once('\n').unwrap();
    assert!(first.starts_with("# Written by spegel"), "{first}");
    body.to_owned()
}

const MIRRORS: &str = "
[host.'http://127.0.0.1:30020']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'

[host.'http://127.0.0.1:30020'.header]
X-Spegel-Node = 'node-1'

[host.'http://[fd00::1]:30021']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'

[host.'http://[fd00::1]:30021'.header]
X-Spegel-Node = 'node-1'
";

#[test]
fn files_are_as_containerd_wants_them() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    write(&setting(root, &["https://docker.io", "http://registry.test:5000"])).unwrap();
    assert_eq!(body(root, "docker.io/hosts.toml"), format!("server = 'https://registry-1.docker.io'\n{MIRRORS}"));
    assert_eq!(body(root, "registry.test:5000/hosts.toml"), format!("server = 'http://registry.test:5000'\n{MIRRORS}"));
    let report = write(&setting(root, &[])).unwrap();
    assert_eq!(body(root, "_default/hosts.toml"), MIRRORS);
    assert_eq!(report.removed.len(), 2, "registries that are no longer named");
    assert_eq!(snapshot(root).len(), 2);
    remove(root).unwrap();
    assert!(snapshot(root).is_empty());
}

#[test]
fn settings_show() {
    let root = tempfile::tempdir().unwrap();
    let mut configuration = setting(root.path(), &[]);
    configuration.resolve_tags = false;
    configuration.basic_auth = Some(("user".into(), "pass".into()));
    write(&configuration).unwrap();
    let text = body(root.path(), "_default/hosts.toml");
    assert_eq!(text.matches("capabilities = ['pull']\n").count(), 2);
    assert_eq!(text.matches("Authorization = 'Basic dXNlcjpwYXNz'\n").count(), 2);
    let mode = fs::metadata(root.path().join("_default/hosts.toml")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "the password is in it");
}

#[test]
fn second_run_touches_nothing() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "a.test/hosts.toml", "server = 'https://a.test'\n");
    let mut configuration = setting(root.path(), &["a.test", "b.test"]);
    configuration.prepend_existing = true;
    write(&configuration).unwrap();
    let path = root.path().join("a.test/hosts.toml");
    let (before, meta) = (snapshot(root.path()), fs::metadata(&path).unwrap());
    let report = write(&configuration).unwrap();
    assert_eq!(report.unchanged.len(), 2);
    assert!(report.written.is_empty() && report.set_aside.is_empty());
    assert_eq!(snapshot(root.path()), before);
    assert_eq!(fs::metadata(&path).unwrap().ino(), meta.ino(), "not even written again");
}

#[test]
fn others_files_stay() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    put(root, "a.test/hosts.toml", "server = 'https://a.test'\n");
    put(root, "a.test/ca.crt", "ca");
    put(root, "plain.test/hosts.toml", "server = 'http://plain.test'\n");
    fs::create_dir(root.join("empty.test")).unwrap();
    let mut before = snapshot(root);
    let configuration = setting(root, &["a.test"]);
    write(&configuration).unwrap();
    assert_eq!(get(root, "plain.test/hosts.toml"), "server = 'http://plain.test'\n");
    assert_eq!(get(root, "a.test/ca.crt"), "ca");
    assert_eq!(get(root, "_backup.spegel/a.test/hosts.toml"), "server = 'https://a.test'\n");

    put(root, "late.test/hosts.toml", "server = 'http://late.test'\n");
    put(root, "a.test/late.crt", "late");
    write(&configuration).unwrap();
    remove(root).unwrap();
    for late in ["late.test/hosts.toml", "a.test/late.crt"] {
        let path = root.join(late);
        before.insert(path.clone(), Some(fs::read(path).unwrap()));
    }
    before.insert(root.join("late.test"), None);
    assert_eq!(snapshot(root), before);
}

#[test]
fn own_configuration_hides_a_registry_from_the_default() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "plain.test/hosts.toml", "server = 'http://plain.test'\n");
    let report = write(&setting(root.path(), &[])).unwrap();
    assert_eq!(report.not_mirrored, [root.path().join("plain.test")]);
}

#[test]
fn changes_to_ours_are_kept_aside() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let configuration = setting(root, &["a.test"]);
    write(&configuration).unwrap();
    let edited = get(root, "a.test/hosts.toml") + "# mine\n";
    put(root, "a.test/hosts.toml", &edited);
    let report = write(&configuration).unwrap();
    assert_eq!(report.set_aside, [root.join("_backup.spegel/a.test/hosts.toml.1")]);
    assert_eq!(get(root, "_backup.spegel/a.test/hosts.toml.1"), edited);
    assert!(!get(root, "a.test/hosts.toml").contains("# mine"));
    remove(root).unwrap();
    assert_eq!(get(root, "_backup.spegel/a.test/hosts.toml.1"), edited);
    assert!(!root.join("a.test").exists());
}

#[test]
fn file_put_in_the_place_of_ours_is_restored() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    put(root, "a.test/hosts.toml", "# first\n");
    let configuration = setting(root, &["a.test"]);
    write(&configuration).unwrap();
    put(root, "a.test/hosts.toml", "# second\n");
    let report = write(&configuration).unwrap();
    assert_eq!(get(root, "_backup.spegel/a.test/hosts.toml.1"), "# first\n");
    assert_eq!(report.set_aside.len(), 1);
    remove(root).unwrap();
    assert_eq!(get(root, "a.test/hosts.toml"), "# second\n");
}

#[test]
fn prepending_keeps_hosts_and_certificates() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let existing = "server = 'https://own.test'\nca = 'ca.crt'\n\n[host.'https://second.test']\nclient = [['c.cert', 'c.key']]\nskip_verify = true\n\
                    \n[host.'http://127.0.0.1:30020']\ncapabilities = ['push']\n";
    put(root, "a.test/hosts.toml", existing);
    let mut configuration = setting(root, &["a.test"]);
    configuration.prepend_existing = true;
    write(&configuration).unwrap();
    let text = body(root, "a.test/hosts.toml");
    let document: toml_edit::DocumentMut = text.parse().unwrap();
    let hosts: Vec<_> = document["host"].as_table().unwrap().iter().map(|(name, _)| name).collect();
    assert_eq!(hosts, ["http://127.0.0.1:30020", "http://[fd00::1]:30021", "https://second.test"]);
    assert_eq!(document["server"].as_str(), Some("https://own.test"));
    assert_eq!(document["ca"].as_str(), Some("ca.crt"));
    assert!(text.contains("client = [['c.cert', 'c.key']]\nskip_verify = true\n"));
    remove(root).unwrap();
    assert_eq!(get(root, "a.test/hosts.toml"), existing);
}

#[test]
fn certificates_in_dockers_layout_still_count() {
    let root = tempfile::tempdir().unwrap();
    for file in ["ca.crt", "me.cert", "me.key", "notes.txt"] {
        put(root.path(), &format!("a.test/{file}"), "");
    }
    write(&setting(root.path(), &["a.test"])).unwrap();
    let document: toml_edit::DocumentMut = body(root.path(), "a.test/hosts.toml").parse().unwrap();
    assert_eq!(document["ca"].to_string().trim(), "[\"ca.crt\"]");
    assert_eq!(document["client"].to_string().trim(), "[[\"me.cert\", \"me.key\"]]");
}

#[test]
fn not_toml() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    put(root, "b.test/hosts.toml", "= not toml");
    let before = snapshot(root);
    let mut configuration = setting(root, &["a.test", "b.test"]);
    configuration.prepend_existing = true;
    let error = write(&configuration).unwrap_err();
    assert!(matches!(&error, HostsError::NotToml { path, .. } if path.ends_with("b.test/hosts.toml")), "{error}");
    assert_eq!(snapshot(root), before, "nothing is begun");
    configuration.prepend_existing = false;
    write(&configuration).unwrap();
    remove(root).unwrap();
    assert_eq!(snapshot(root), before);
}

#[test]
fn escaped_port_goes_first() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "registry.test_5000_/hosts.toml", "# mine\n");
    write(&setting(root.path(), &["http://registry.test:5000"])).unwrap();
    body(root.path(), "registry.test_5000_/hosts.toml");
    assert!(!root.path().join("registry.test:5000").exists(), "containerd would not read it");
}

const BY_GO: &str = "server = 'https://a.test'\n\n[host.'http://10.0.0.1:30020']\ncapabilities = ['pull', 'resolve']\ndial_timeout = '200ms'\n";

/// What the Go program leaves: its own file, and everything else in the backup.
fn install_by_go(root: &Path) {
    put(root, "a.test/hosts.toml", BY_GO);
    put(root, "_backup/a.test/hosts.toml", "# mine\n");
    put(root, "_backup/a.test/ca.crt", "ca");
    put(root, "_backup/plain.test/hosts.toml", "server = 'http://plain.test'\n");
}

fn assert_as_before_go(root: &Path) {
    assert_eq!(get(root, "a.test/hosts.toml"), "# mine\n");
    assert_eq!(get(root, "a.test/ca.crt"), "ca");
    assert_eq!(get(root, "plain.test/hosts.toml"), "server = 'http://plain.test'\n");
    assert!(!root.join("_backup").exists());
}

#[test]
fn layout_of_the_go_program_is_taken_over() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    install_by_go(root);
    let report = write(&setting(root, &["a.test"])).unwrap();
    assert!(report.set_aside.is_empty() && report.left_in_backup.is_empty(), "{report:?}");
    body(root, "a.test/hosts.toml");
    assert_eq!(get(root, "plain.test/hosts.toml"), "server = 'http://plain.test'\n", "works again at once");
    assert_eq!(get(root, "a.test/ca.crt"), "ca");
    remove(root).unwrap();
    assert_as_before_go(root);
}

#[test]
fn layout_of_the_go_program_is_taken_back() {
    let root = tempfile::tempdir().unwrap();
    install_by_go(root.path());
    remove(root.path()).unwrap();
    assert_as_before_go(root.path());
}

#[test]
fn own_mirror_of_an_administrator_is_not_the_go_programs() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let own = "[host.'http://mine.test']\ncapabilities = ['pull', 'resolve']\n";
    put(root, "own.test/hosts.toml", own);
    put(root, "same.test/hosts.toml", BY_GO);
    remove(root).unwrap();
    assert_eq!(get(root, "same.test/hosts.toml"), BY_GO, "there is no backup");
    fs::create_dir(root.join("_backup")).unwrap();
    remove(root).unwrap();
    assert_eq!(get(root, "own.test/hosts.toml"), own);
}

#[test]
fn malformed_settings() {
    for bad in
        ["", "127.0.0.1:5000", "ftp://a:1", "http://", "http://a/b", "http://fd00::1:", "http://a:x", "http://a'b"]
    {
        assert!(matches!(bad.parse::<MirrorTarget>(), Err(HostsError::Target(_))), "{bad}");
    }
    let without_brackets: MirrorTarget = "http://fd00::1:30020".parse().unwrap();
    assert_eq!(without_brackets.as_str(), "http://[fd00::1]:30020");
    let root = tempfile::tempdir().unwrap();
    let mut configuration = setting(root.path(), &[]);
    configuration.node_name = "a'b".into();
    assert!(matches!(write(&configuration), Err(HostsError::NodeName(_))));
    configuration = setting(root.path(), &[]);
    configuration.mirror_targets.clear();
    assert!(matches!(write(&configuration), Err(HostsError::NoTarget)));
    assert!(snapshot(root.path()).is_empty());
    assert!(remove(&root.path().join("absent")).unwrap().is_empty());
    put(root.path(), "file", "");
    let error = remove(&root.path().join("file")).unwrap_err();
    assert!(error.to_string().contains("not a directory"), "{error}");
}

/// TOML refuses a table that is told twice, and containerd would then ignore the file.
#[test]
fn a_target_told_twice_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut configuration = setting(dir.path(), &[]);
    configuration.mirror_targets.push("http://127.0.0.1:30020/".parse::<MirrorTarget>().unwrap());
    write(&configuration).unwrap();
    let text = get(dir.path(), "_default/hosts.toml");
    assert_eq!(text.matches("[host.'http://127.0.0.1:30020']").count(), 1, "{text}");
    text.parse::<toml_edit::DocumentMut>().unwrap();
}

/// A relative link means another file in the backup's place.
#[test]
fn a_linked_file_is_kept_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "common.toml", "[host.'http://old:5000']\n");
    fs::create_dir_all(dir.path().join("reg.test")).unwrap();
    std::os::unix::fs::symlink("../common.toml", dir.path().join("reg.test/hosts.toml")).unwrap();
    let configuration = Configuration { prepend_existing: true, ..setting(dir.path(), &["https://reg.test"]) };
    write(&configuration).unwrap();
    let first = snapshot(dir.path());
    assert!(get(dir.path(), "reg.test/hosts.toml").contains("http://old:5000"));
    write(&configuration).unwrap();
    assert_eq!(snapshot(dir.path()), first);
    remove(dir.path()).unwrap();
    assert_eq!(get(dir.path(), "reg.test/hosts.toml"), "[host.'http://old:5000']\n");
    assert_eq!(get(dir.path(), "common.toml"), "[host.'http://old:5000']\n");
}

/// What an administrator may have put in the place of a file, none of which can be read, and none of which is ours.
fn put_unreadable(root: &Path) {
    for name in ["10.0.0.5:5000", "Upper", "fifo.test", "folder.test", "large.test"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    std::os::unix::fs::symlink("/nonexistent/shared.toml", root.join("10.0.0.5:5000/hosts.toml")).unwrap();
    std::os::unix::fs::symlink("hosts.toml", root.join("Upper/hosts.toml")).unwrap();
    fs::create_dir(root.join("folder.test/hosts.toml")).unwrap();
    fs::write(root.join("large.test/hosts.toml"), vec![b'#'; 2 << 20]).unwrap();
}

#[test]
fn what_cannot_be_read_keeps_nobody_from_anything() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put_unreadable(root);
    let before = snapshot(root);
    write(&setting(root, &[])).unwrap();
    body(root, "_default/hosts.toml");
    remove(root).unwrap();
    assert_eq!(snapshot(root), before);

    // One that is to be replaced is kept, whatever it is.
    write(&setting(root, &["http://10.0.0.5:5000", "folder.test", "large.test"])).unwrap();
    body(root, "folder.test/hosts.toml");
    remove(root).unwrap();
    assert_eq!(snapshot(root), before);
    assert_eq!(fs::read_link(root.join("10.0.0.5:5000/hosts.toml")).unwrap(), Path::new("/nonexistent/shared.toml"));
    assert!(fs::read_dir(root).unwrap().all(|entry| !entry.unwrap().file_name().to_str().unwrap().contains("spegel")));
}

#[test]
fn hosts_that_are_to_be_kept_and_cannot_be_read_are_an_error_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("_default/hosts.toml");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let prepending = Configuration { prepend_existing: true, ..setting(dir.path(), &[]) };
    std::os::unix::fs::symlink("not-mounted-yet.toml", &path).unwrap();
    let error = write(&prepending).unwrap_err();
    assert!(error.to_string().contains("a link whose target is not there"), "{error}");
    assert!(path.symlink_metadata().unwrap().is_symlink());
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let error = write(&prepending).unwrap_err();
    assert!(error.to_string().contains("not a file"), "{error}");
}

/// One directory that cannot be changed does not keep a mirror that is gone in the others.
#[test]
fn the_others_are_taken_back_where_one_cannot_be() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "a.test/hosts.toml", "# first\n");
    let configuration = setting(root, &["a.test", "b.test"]);
    write(&configuration).unwrap();
    // A file in the way of the copy that is to be set aside.
    put(root, "a.test/hosts.toml", &(get(root, "a.test/hosts.toml") + "# mine\n"));
    fs::remove_dir_all(root.join("_backup.spegel/a.test")).unwrap();
    put(root, "_backup.spegel/a.test", "");
    let error = remove(root).unwrap_err();
    assert!(error.to_string().contains("a.test"), "{error}");
    assert!(!root.join("b.test").exists());
}

/// Our own backup is no sign of the Go program.
#[test]
fn a_file_of_the_go_programs_shape_beside_our_backup_stays() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "_default/hosts.toml", "server = 'https://corp.test'\n");
    let configuration = setting(root, &[]);
    write(&configuration).unwrap();
    put(root, "corp.test/hosts.toml", BY_GO);
    write(&configuration).unwrap();
    assert_eq!(get(root, "corp.test/hosts.toml"), BY_GO);
    remove(root).unwrap();
    assert_eq!(get(root, "corp.test/hosts.toml"), BY_GO);
    assert_eq!(get(root, "_default/hosts.toml"), "server = 'https://corp.test'\n");
}

#[test]
fn a_backup_of_somebody_else_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "_backup/old.test/hosts.toml", "# from last year\n");
    put(root, "a.test/hosts.toml", "# mine\n");
    let before = snapshot(root);
    write(&setting(root, &["a.test", "old.test"])).unwrap();
    assert_eq!(get(root, "_backup/old.test/hosts.toml"), "# from last year\n");
    assert_eq!(get(root, "_backup.spegel/a.test/hosts.toml"), "# mine\n");
    remove(root).unwrap();
    assert_eq!(snapshot(root), before);
}

#[test]
fn a_file_of_the_go_program_that_was_edited_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    install_by_go(root);
    let edited = BY_GO.to_owned() + "\n[host.'https://second.test']\nskip_verify = true\n";
    put(root, "a.test/hosts.toml", &edited);
    let report = remove(root).unwrap();
    assert_eq!(get(root, "a.test/hosts.toml"), "# mine\n");
    assert_eq!(report.set_aside.len(), 1);
    assert_eq!(fs::read_to_string(&report.set_aside[0]).unwrap(), edited);
    // With what it kept of an administrator's it is the Go program's own.
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    install_by_go(root);
    put(root, "_backup/a.test/hosts.toml", "[host.\"https://second.test\"]\n  skip_verify = true\n");
    put(root, "a.test/hosts.toml", &edited);
    assert_eq!(remove(root).unwrap().set_aside, Vec::<PathBuf>::new());
    assert!(get(root, "a.test/hosts.toml").starts_with("[host.\""));
}

#[test]
fn a_line_before_ours_does_not_keep_the_mirror() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(&setting(root, &["a.test"])).unwrap();
    put(root, "a.test/hosts.toml", &("# managed by a tool\n".to_owned() + &get(root, "a.test/hosts.toml")));
    let report = remove(root).unwrap();
    assert_eq!((report.removed.len(), report.set_aside.len()), (1, 1));
    assert!(!root.join("a.test").exists());

    // Who took our line away made it his.
    write(&setting(root, &["b.test"])).unwrap();
    put(root, "b.test/hosts.toml", &body(root, "b.test/hosts.toml"));
    assert_eq!(remove(root).unwrap().foreign_mirrors, [root.join("b.test/hosts.toml")]);
}

#[test]
fn a_directory_under_two_names_is_written_once() {
    for (name, link) in [("shared", "b.test"), ("shared", "z.test")] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, &format!("{name}/hosts.toml"), "# mine\n");
        std::os::unix::fs::symlink(name, root.join(link)).unwrap();
        write(&setting(root, &[link])).unwrap();
        body(root, &format!("{link}/hosts.toml"));
        remove(root).unwrap();
        assert_eq!(get(root, &format!("{name}/hosts.toml")), "# mine\n");
        assert!(root.join(link).is_symlink() && !root.join("_backup.spegel").exists());
    }
}

/// A link is another's, also where it leads to a file that we replaced.
#[test]
fn a_link_to_a_file_of_ours_stays() {
    for (file, registries) in [("docker.io", &["https://docker.io"][..]), ("_default", &[])] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, &format!("{file}/hosts.toml"), "server = 'https://registry-1.docker.io'\n");
        fs::create_dir(root.join("quay.test")).unwrap();
        std::os::unix::fs::symlink(format!("../{file}/hosts.toml"), root.join("quay.test/hosts.toml")).unwrap();
        let before = snapshot(root);
        write(&setting(root, registries)).unwrap();
        assert!(root.join("quay.test/hosts.toml").is_symlink());
        write(&setting(root, &["https://quay.test", "https://docker.io"])).unwrap();
        write(&setting(root, &["https://docker.io", "https://quay.test"])).unwrap();
        remove(root).unwrap();
        assert_eq!(snapshot(root), before);
    }
}

#[test]
fn hosts_that_are_kept_are_found_under_each_name_of_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "shared.test/hosts.toml", "server = 'https://s.test'\n[host.'https://own.test']\n");
    std::os::unix::fs::symlink("shared.test", root.join("z.test")).unwrap();
    for registries in [&["shared.test", "z.test"][..], &["shared.test", "z.test"], &["z.test"], &["shared.test"]] {
        write(&Configuration { prepend_existing: true, ..setting(root, registries) }).unwrap();
        let text = get(root, "shared.test/hosts.toml");
        assert!(text.contains("https://own.test") && text.contains("https://s.test"), "{registries:?}: {text}");
    }
    remove(root).unwrap();
    assert!(get(root, "shared.test/hosts.toml").starts_with("server = 'https://s.test'"));
}

/// What the Go program does at its start: it moves all away once, and deletes the rest.
fn start_go(root: &Path) {
    let names: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let backup = root.join("_backup");
    if !backup.exists() && !names.is_empty() {
        fs::create_dir(&backup).unwrap();
        names.iter().for_each(|name| fs::rename(root.join(name), backup.join(name)).unwrap());
    }
    put(root, "_default/hosts.toml", BY_GO);
}

#[test]
fn a_rollback_to_the_go_program_and_back_loses_nothing() {
    for file in [None, Some("_default/hosts.toml"), Some("docker.io/ca.crt")] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        if let Some(file) = file {
            put(root, file, "# mine\n");
        }
        let before = snapshot(root);
        write(&setting(root, &[])).unwrap();
        start_go(root);
        write(&setting(root, &[])).unwrap();
        body(root, "_default/hosts.toml");
        start_go(root);
        remove(root).unwrap();
        assert_eq!(snapshot(root), before, "{file:?}");
    }
}

#[test]
fn hidden_directories_of_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, ".foo.spegel/hosts.toml", "# mine\n");
    fs::create_dir(root.join(".bar.spegel")).unwrap();
    let before = snapshot(root);
    write(&setting(root, &[])).unwrap();
    put(root, "._default.made-by-spegel/x", "");
    remove(root).unwrap();
    assert!(!root.join("_default").join("hosts.toml").exists());
    fs::remove_dir_all(root.join("_default")).ok();
    fs::remove_dir_all(root.join("._default.made-by-spegel")).ok();
    assert_eq!(snapshot(root), before);
}

/// Once its own are gone, what looks like the Go program's is an administrator's.
#[test]
fn a_file_of_the_go_programs_shape_that_was_there_before_it_stays() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "_default/hosts.toml", BY_GO);
    put(root, "_backup/docker.test/hosts.toml", BY_GO);
    put(root, "_backup/README", "old");
    put(root, "README", "new");
    for _ in 0..3 {
        write(&setting(root, &[])).unwrap();
        assert_eq!(get(root, "docker.test/hosts.toml"), BY_GO);
    }
    remove(root).unwrap();
    assert_eq!(get(root, "docker.test/hosts.toml"), BY_GO);
    assert_eq!((get(root, "README"), get(root, "_backup/README")), ("new".to_owned(), "old".to_owned()));
}
