//! What `spegel doctor` says of a containerd that is configured otherwise than it should be, or was since it was started; and what a mirror
//! says of its node at its own end.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use spegel_benches::containerd::{Containerd, Options, Version};
use spegel_benches::daemon::wait_until;
use spegel_benches::image::{Compression, host_platform};
use spegel_benches::netns::Lab;

use super::cluster::{Cluster, NOTICED};
use super::doctor::{doctor, image};
use super::for_each_containerd;

for_each_containerd!(a_change_that_containerd_has_not_read_is_named, a_cri_that_is_not_loaded_is_named);

/// A containerd without a mirror; none where this machine cannot have one.
fn containerd(version: Version) -> Option<(Lab, Containerd)> {
    let binaries = match Lab::available().and(version.find()) {
        Ok(binaries) => binaries,
        Err(reason) => {
            println!("skipped: {reason}");
            return None;
        }
    };
    let mut lab = Lab::new().unwrap();
    let containerd = Containerd::start(&binaries, &lab.add_node().unwrap(), &Options::default()).unwrap();
    Some((lab, containerd))
}

fn edit(containerd: &Containerd, edit: impl FnOnce(String) -> String) {
    let text = fs::read_to_string(containerd.config_path()).unwrap();
    let edited = edit(text.clone());
    assert_ne!(text, edited);
    fs::write(containerd.config_path(), edited).unwrap();
}

fn a_change_that_containerd_has_not_read_is_named(version: Version) {
    let Some((_lab, mut containerd)) = containerd(version) else { return };
    doctor(&containerd, &[]).has("restart", "good", "");
    edit(&containerd, |text| format!("{text}\n# changed\n"));
    let file = fs::File::options().write(true).open(containerd.config_path()).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(60)).unwrap();
    let said = doctor(&containerd, &[]);
    said.has("restart", "warning", &format!("{} was changed ", containerd.config_path().display()));
    // Another file than that of the process says nothing of it.
    let said = doctor(&containerd, &["--containerd-config", "/nowhere.toml"]);
    assert!(!said.checks.iter().any(|(check, ..)| check == "restart"), "{}", said.text);
    file.set_modified(SystemTime::now()).unwrap();
    containerd.restart().unwrap();
    doctor(&containerd, &[]).has("restart", "good", "");
}

fn a_cri_that_is_not_loaded_is_named(version: Version) {
    let Some((_lab, mut containerd)) = containerd(version) else { return };
    doctor(&containerd, &[]).has("cri", "good", "");
    edit(&containerd, |text| text.replace("disabled_plugins = [", "disabled_plugins = ['io.containerd.grpc.v1.cri', "));
    doctor(&containerd, &[]).has("cri", "warning", "which counts from its next start on");
    containerd.restart().unwrap();
    let said = doctor(&containerd, &[]);
    said.has("cri", "failure", "is disabled, by `io.containerd.grpc.v1.cri` in disabled_plugins");
    assert!(!said.checks.iter().any(|(check, ..)| check == "config_path"), "{}", said.text);
    doctor(&containerd, &["--containerd-namespace", "default"]).has("cri", "note", "what pulls into default");
    // It is there, and does not take its configuration.
    let section = if version == Version::V1_6 { "io.containerd.grpc.v1.cri" } else { "io.containerd.cri.v1.images" };
    edit(&containerd, |text| {
        let text = text.replace("'io.containerd.grpc.v1.cri', ", "");
        format!("{text}\n[plugins.'{section}'.registry.mirrors.'a.test']\nendpoint = ['http://a.test']\n")
    });
    containerd.restart().unwrap();
    let said = doctor(&containerd, &[]);
    said.has("cri", "failure", "`mirrors` cannot be set when `config_path` is provided");
    said.has("config_path", "failure", "does not load its CRI plugin");
}

/// One setting that the transfer service does not know, and the list is good: a real pull says so, too.
#[test]
fn a_list_that_containerd_splits_is_good() {
    let Some(mut cluster) = Cluster::start(Version::V2_2, 1, &Options::default()) else { return };
    let image = image(&cluster);
    let containerd = &mut cluster.nodes[0].containerd;
    let certs = containerd.certs_dir().display().to_string();
    let images = "[plugins.'io.containerd.cri.v1.images']\n";
    edit(containerd, |text| {
        let list = format!("{images}max_concurrent_downloads = 5\n");
        let text = text.replacen(images, &list, 1);
        let of_cri = format!(".registry]\nconfig_path = '{certs}'");
        text.replacen(&of_cri, &format!(".registry]\nconfig_path = '{certs}:/etc/docker/certs.d'"), 1)
    });
    containerd.restart().unwrap();
    let said = doctor(containerd, &["--pull", image.reference()]);
    said.has("config_path", "good", "a list, which it splits because of max_concurrent_downloads");
    said.has("pull", "good", "");
    // By a link to its directory it is the same one.
    let link = cluster.folder.path().join("certs.d");
    std::os::unix::fs::symlink(&certs, &link).unwrap();
    let said = doctor(containerd, &["--containerd-registry-config-path", link.to_str().unwrap()]);
    said.has("config_path", "good", "");
    assert!(!said.checks.iter().any(|(check, state, _)| check == "certs.d" && state == "failure"), "{}", said.text);
}

/// While responses under way finish, the node is looked at once more: in one line, and in the metric for a last scrape.
#[test]
fn the_node_is_examined_at_the_end_as_well() {
    let Some(mut cluster) = Cluster::start(Version::V2_2, 1, &Options::default()) else { return };
    // Larger than what sockets hold, so that a client that takes nothing keeps its response under way.
    let image = cluster.push("end:1", |image| image.layers(1, 64 << 20, Compression::None, 1));
    cluster.nodes[0].pull_by_cri(&image, image.reference());
    let layer = image.layers_for(host_platform()).next().unwrap();
    let mut spegel = cluster.nodes[0].spegel.take().unwrap();
    let address = SocketAddr::new(spegel.settings().address, spegel.settings().ports.registry);
    let mut client = TcpStream::connect(address).unwrap();
    let ask = format!("GET /v2/{}/blobs/{}?ns={} HTTP/1.1", image.repository(), layer.digest, image.registry());
    write!(client, "{ask}\r\nhost: h\r\n\r\n").unwrap();
    client.read_exact(&mut [0; 1000]).unwrap();

    // What somebody changed since the start.
    let certs = cluster.nodes[0].containerd.certs_dir();
    fs::set_permissions(&certs, fs::Permissions::from_mode(0o777)).unwrap();
    let loose = |spegel: &spegel_benches::spegel::Spegel| {
        spegel.metric("spegel_doctor_findings", &["check=\"certs.d\"", "state=\"warning\""]).unwrap_or(0.0)
    };
    assert!(loose(&spegel) <= 0.0);
    spegel.daemon.signal(Signal::TERM).unwrap();
    wait_until(NOTICED, "the metric", || loose(&spegel) >= 1.0).unwrap();
    drop(client);
    let status = spegel.daemon.wait_exit(Duration::from_secs(10)).unwrap();
    let log = spegel.daemon.log();
    assert!(status.success(), "{status}: {log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("this node was examined")).collect();
    let [start, end] = lines[..] else { panic!("not a line each: {log}") };
    assert!(start.contains("\"at\":\"start\"") && end.contains("\"at\":\"end\""), "{lines:#?}");
    assert!(!start.contains("can be changed by others") && end.contains("can be changed by others"), "{lines:#?}");
}

/// A containerd that hangs keeps no mirror from ending.
#[test]
fn the_examination_at_the_end_is_bounded() {
    let Some(mut cluster) = Cluster::start(Version::V2_2, 1, &Options::default()) else { return };
    let mut spegel = cluster.nodes[0].spegel.take().unwrap();
    cluster.nodes[0].containerd.signal(Signal::STOP).unwrap();
    let start = Instant::now();
    spegel.daemon.signal(Signal::TERM).unwrap();
    let status = spegel.daemon.wait_exit(Duration::from_secs(15));
    let took = start.elapsed();
    cluster.nodes[0].containerd.signal(Signal::CONT).unwrap();
    let log = spegel.daemon.log();
    println!("gone after {took:.1?}: {status:?}");
    assert!(status.unwrap().success() && log.contains("this node could not be examined in time"), "{log}");
    assert!(took < Duration::from_secs(8), "{took:?}: {log}");
}
