//! What the built program logs, and how it is asked where its time goes.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use rustix::process::Signal;
use serde_json::Value;
use spegel_benches::daemon::{find_program, wait_until};
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image, ImageBuilder, host_platform};
use spegel_benches::spegel::{Ports, Settings, Source, Spegel};

use super::cluster::PROGRAM;

const SOON: Duration = Duration::from_secs(20);
/// A debug build takes its time to find its own symbols.
const PATIENT: Duration = Duration::from_secs(60);
const USER: &str = "somebody-special";
const PASSWORD: &str = "correct horse battery staple";

fn image(folder: &Path, layer: u64) -> Image {
    ImageBuilder::new("registry.test/app:1").layers(1, layer, Compression::None, 7).build(folder).unwrap()
}

/// Nodes on loopback, of which those have the image whose number is in `holders`.
fn nodes(folder: &Path, image: &Image, count: u8, holders: &[u8], arguments: &[&str]) -> Vec<Spegel> {
    let ports = Ports::free().unwrap();
    let address = |number: u8| IpAddr::from([127, 0, 0, number + 1]);
    let settings = (0..count).map(|number| {
        let layout = folder.join(format!("layout-{number}"));
        if holders.contains(&number) {
            image.write_layout(&layout).unwrap();
        } else {
            std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
            std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
            std::fs::write(layout.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
        }
        Settings {
            program: PROGRAM.into(),
            node: None,
            address: address(number),
            ports,
            source: Source::Layout(layout),
            peers: (0..count).filter(|other| *other != number).map(address).collect(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            log: folder.join(format!("log-{number}")),
        }
    });
    let started: Vec<Spegel> = settings.map(|settings| settings.spawn().unwrap()).collect();
    started
        .into_iter()
        .map(|mut node| {
            node.wait_ready(SOON).unwrap();
            node
        })
        .collect()
}

/// The lines of a node's log with this message.
fn lines(node: &Spegel, message: &str) -> Vec<Value> {
    let log = node.daemon.log();
    let values = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    values.filter(|value| value["message"] == message).collect()
}

fn line_of(node: &Spegel, message: &str, trace_id: &str) -> Option<Value> {
    lines(node, message).into_iter().find(|line| line["trace_id"] == trace_id)
}

fn command(node: &Spegel, arguments: &[&str]) -> Output {
    let at = SocketAddr::new(node.settings().address, node.settings().ports.metrics).to_string();
    Command::new(PROGRAM).args(arguments).args(["--metrics-addr", &at]).output().unwrap()
}

fn layer(image: &Image) -> String {
    let layer = image.layers_for(host_platform()).next().unwrap();
    format!("/v2/app/blobs/{}?ns=registry.test", layer.digest)
}

const ID: &str = "0af7651916cd43dd8448eb211c80319c";
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// One id is in the logs of the node that was asked, of the peer that gave it until it was killed, and of the one that went on. Nowhere is there
/// what authenticates them to each other.
#[test]
fn one_pull_is_followed_through_nodes_and_no_secret_is_in_their_logs() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 96 << 20);
    let secrets = folder.path().join("secrets");
    std::fs::create_dir(&secrets).unwrap();
    std::fs::write(secrets.join("username"), USER).unwrap();
    std::fs::write(secrets.join("password"), PASSWORD).unwrap();
    let arguments = ["--log-level", "DEBUG", "--basic-auth-dir", secrets.to_str().unwrap()];
    let nodes = nodes(folder.path(), &image, 3, &[1, 2], &arguments);
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let authorization = format!("Basic {encoded}");
    let (client, url) = (Client::new(SOON), nodes[0].url());
    let headers = [("authorization", authorization.as_str())];
    let tag = format!("{url}/v2/app/manifests/1?ns=registry.test");
    // Both must be there to go on with, and have told that.
    let waiting = |node: &Spegel| node.metric("spegel_router_advertise_queue", &[]).unwrap_or(1.0);
    wait_until(SOON, "all to be known", || {
        nodes[0].metric("spegel_router_members", &[]).is_ok_and(|members| members >= 2.0)
            && nodes[1..].iter().all(|node| waiting(node) <= 0.0)
    })
    .unwrap();
    wait_until(SOON, "the image to be found", || client.get(&tag, &headers).is_ok_and(|got| got.head.status == 200))
        .unwrap();
    let wrong = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD} not"));
    let wrong = format!("Basic {wrong}");
    for refused in [&[][..], &[("authorization", wrong.as_str())]] {
        assert_eq!(client.get(&tag, refused).unwrap().head.status, 401);
    }

    let address = SocketAddr::new(nodes[0].settings().address, nodes[0].settings().ports.registry);
    let mut stream = TcpStream::connect(address).unwrap();
    let head = format!(
        "GET {} HTTP/1.1\r\nHost: h\r\nAuthorization: {authorization}\r\nTraceparent: {TRACEPARENT}\r\nConnection: close\r\n\r\n",
        layer(&image)
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.read_exact(&mut [0; 1 << 20]).unwrap();
    let gives = |node: &Spegel| node.metric("http_requests_inflight", &["handler=\"blob\""]).is_ok_and(|now| now > 0.0);
    let giver = (1..3).find(|number| gives(&nodes[*number])).expect("one of them gives it");
    nodes[giver].daemon.signal(Signal::KILL).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();

    let other = 3 - giver;
    wait_until(SOON, "the story", || line_of(&nodes[0], "pull", ID).is_some()).unwrap();
    wait_until(SOON, "the other's line", || line_of(&nodes[other], "answered", ID).is_some()).unwrap();
    let story = line_of(&nodes[0], "pull", ID).unwrap();
    let size = image.layers_for(host_platform()).next().unwrap().size;
    let at = |number: usize| SocketAddr::new(nodes[number].settings().address, nodes[number].settings().ports.registry);
    assert_eq!((&story["peer"], &story["resumed"]), (&at(giver).to_string().into(), &1.into()), "{story}");
    assert_eq!((&story["bytes"], &story["whole"]), (&size.into(), &true.into()), "{story}");
    let why = story["why"].as_str().unwrap();
    assert!(why.contains(&format!("from {} to {}", at(giver), at(other))), "{why}");
    let went_on = line_of(&nodes[other], "answered", ID).unwrap();
    assert!(went_on["range"].as_str().is_some_and(|range| range.ends_with(&format!("-{}", size - 1))), "{went_on}");

    // Who tells no id gets one at the first node.
    let config =
        image.contents().iter().find(|one| one.size < 4096 && Some(one.digest.as_str()) != Some(&image.root().digest));
    let config = format!("{url}/v2/app/blobs/{}?ns=registry.test", config.unwrap().digest);
    assert_eq!(client.get(&config, &headers).unwrap().head.status, 200);
    let made = || {
        let pulls = lines(&nodes[0], "pull");
        let id = pulls.last()?["trace_id"].as_str()?.to_owned();
        (id.len() == 32 && id != ID && line_of(&nodes[other], "answered", &id).is_some()).then_some(())
    };
    wait_until(SOON, "an id of our own in both logs", || made().is_some()).unwrap();

    let metrics = client.get(&format!("{}/metrics", nodes[0].metrics_url()), &[]).unwrap().text();
    let peers = String::from_utf8(command(&nodes[0], &["peers", "--json"]).stdout).unwrap();
    let logs = nodes.iter().map(|node| node.daemon.log()).chain([metrics, peers]);
    for (number, text) in logs.enumerate() {
        assert!(text.len() > 500, "{number}: {text}");
        for secret in [PASSWORD, encoded.as_str(), "horse", "Basic ", "uthorization"] {
            assert!(!text.contains(secret), "{secret} is in text {number}");
        }
    }
}

#[test]
fn the_level_can_be_changed_while_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 1 << 20);
    let nodes = nodes(folder.path(), &image, 2, &[1], &[]);
    let client = Client::new(SOON);
    let level = |node: &Spegel, arguments: &[&str]| {
        let output = command(node, &[&["log-level"], arguments].concat());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim().to_owned();
        (output.status.success(), text(output.stdout) + &text(output.stderr))
    };
    let url = format!("{}{}", nodes[1].url(), layer(&image));
    let ask = |id: u32, mirrored: &str| {
        let traceparent = format!("00-{id:032x}-b7ad6b7169203331-01");
        let headers = [("traceparent", traceparent.as_str()), ("x-spegel-mirrored", mirrored)];
        assert_eq!(client.get(&url, &headers).unwrap().head.status, 200);
        format!("{id:032x}")
    };
    let told =
        |message: &str, id: &str| wait_until(SOON, message, || line_of(&nodes[1], message, id).is_some()).unwrap();
    assert_eq!(level(&nodes[1], &[]), (true, "INFO".into()));
    let unheard = ask(1, "true");
    told("pull", &ask(2, "false"));
    assert_eq!(level(&nodes[1], &["debug"]), (true, "DEBUG".into()));
    told("answered", &ask(3, "true"));
    assert_eq!(line_of(&nodes[1], "answered", &unheard), None);
    assert_eq!(level(&nodes[1], &["ERROR"]), (true, "ERROR".into()));
    let silent = ask(4, "false");
    assert_eq!((level(&nodes[1], &["INFO"]), level(&nodes[0], &[])), ((true, "INFO".into()), (true, "INFO".into())));
    told("pull", &ask(5, "false"));
    assert_eq!(line_of(&nodes[1], "pull", &silent), None);
    assert_eq!(lines(&nodes[1], "the log's level was changed").len(), 2, "but what only errors would tell");

    let (refused, why) = level(&nodes[1], &["loud"]);
    assert!(!refused && why.contains("DEBUG, INFO, WARN, ERROR"), "{why}");
    let raw_as = |host: &str, method: &str, body: &str| {
        let at = SocketAddr::new(nodes[1].settings().address, nodes[1].settings().ports.metrics);
        let mut stream = TcpStream::connect(at).unwrap();
        let head = format!(
            "{method} /debug/log-level HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer.split(' ').nth(1).unwrap_or_default().to_owned()
    };
    assert_eq!(raw_as("evil.test", "PUT", "DEBUG"), "403", "a domain that was pointed at this node");
    let raw = |method: &str, body: &str| raw_as("localhost", method, body);
    assert_eq!(
        [raw("GET", ""), raw("PUT", "loud"), raw("PUT", ""), raw("POST", "DEBUG")],
        ["200", "400", "400", "405"]
    );
    assert_eq!(raw("PUT", &"DEBUG".repeat(1000)), "413");
    assert_eq!(level(&nodes[1], &[]), (true, "INFO".into()));
}

#[test]
fn lines_are_objects_or_for_people_as_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 1 << 20);
    for (format, is_json) in [("json", true), ("text", false)] {
        let folder = folder.path().join(format);
        std::fs::create_dir(&folder).unwrap();
        let nodes = nodes(&folder, &image, 2, &[1], &["--log-format", format]);
        let url = format!("{}{}", nodes[1].url(), layer(&image));
        assert_eq!(Client::new(SOON).get(&url, &[("traceparent", TRACEPARENT)]).unwrap().head.status, 200);
        wait_until(SOON, "its story", || nodes[1].daemon.log().contains(ID)).unwrap();
        let log = nodes[1].daemon.log();
        let is_object = |line: &&str| serde_json::from_str::<Value>(line).is_ok_and(|value| value.is_object());
        let objects = log.lines().filter(is_object).count();
        assert_eq!(objects, if is_json { log.lines().count() } else { 0 }, "{log}");
        let story = log.lines().find(|line| line.contains(ID)).unwrap();
        assert_eq!(story.contains("INFO pull trace_id=\"0af7"), !is_json, "{story}");
        assert!(!story.contains("raced") && !story.contains("held_ms"), "what does not apply is left out: {story}");
    }
}

/// Reads a response to its end, and says how long its body is.
fn drain(url: &str) -> u64 {
    let (authority, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(authority).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").unwrap();
    let (mut buffer, mut head, mut length) = (vec![0; 1 << 20], None, 0);
    loop {
        let read = stream.read(&mut buffer).unwrap();
        let end = || buffer[..read].windows(4).position(|window| window == b"\r\n\r\n").expect("a head at once") + 4;
        let head = *head.get_or_insert_with(end) as u64;
        length += read as u64;
        if read == 0 {
            return length - head;
        }
    }
}

/// Profiles under load are read by the real tool, and disturb no transfer.
fn profile_under_load(engine: &str) {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 32 << 20);
    let nodes = nodes(folder.path(), &image, 2, &[1], &["--serve-engine", engine]);
    // From the one that has it, and relayed by the other.
    let urls = [1, 0].map(|number: usize| format!("{}{}", nodes[number].url(), layer(&image)));
    wait_until(SOON, "the layer to be found", || {
        urls.iter().all(|url| Client::new(SOON).head(url, &[]).is_ok_and(|head| head.status == 200))
    })
    .unwrap();
    let layer = image.layers_for(host_platform()).next().unwrap();
    let profile = |node: &Spegel, query: &str| {
        let url = format!("{}/debug/pprof/profile{query}", node.metrics_url());
        Client::new(PATIENT).get(&url, &[]).unwrap()
    };
    let is_over = AtomicBool::new(false);
    let (profiles, transfers) = std::thread::scope(|scope| {
        let load = urls.each_ref().map(|url| {
            let is_over = &is_over;
            scope.spawn(move || {
                let mut count = 0;
                while !is_over.load(Ordering::Relaxed) {
                    assert_eq!(drain(url), layer.size);
                    count += 1;
                }
                count
            })
        });
        // Two at once of one process.
        let taken = [1, 0, 1].map(|number: usize| {
            let (profile, node) = (&profile, &nodes[number]);
            scope.spawn(move || profile(node, "?seconds=2"))
        });
        let hashed = scope.spawn(|| Client::new(SOON).download(&urls[1], |_| Ok(())));
        let (taken, hashed) = (taken.map(std::thread::ScopedJoinHandle::join), hashed.join());
        // Before anything panics, which waits for the load.
        is_over.store(true, Ordering::Relaxed);
        let (head, digest, _) = hashed.unwrap().unwrap();
        assert_eq!((head.status, &digest), (200, &layer.digest));
        (taken.map(Result::unwrap), load.map(|one| one.join().unwrap()))
    });
    println!("{engine}: {transfers:?} layers of 32 MiB meanwhile");
    assert!(transfers.iter().all(|count| *count > 3), "{transfers:?}");
    for (number, query) in ["?seconds=0", "?seconds=61", "?seconds=x"].iter().enumerate() {
        assert_eq!(profile(&nodes[number % 2], query).head.status, 400, "{query}");
    }
    assert_eq!(
        Client::new(SOON).get(&format!("{}/debug/pprof/heap", nodes[0].metrics_url()), &[]).unwrap().head.status,
        404
    );
    let go = find_program("go")
        .or_else(|| Some("/usr/local/go/bin/go".into()).filter(|go: &std::path::PathBuf| go.exists()));
    let Some(go) = go else {
        println!("skipped: the pprof tool reads the profile: there is no Go");
        return;
    };
    let [one, relay, other] = profiles;
    let (taken, refused) = if one.head.status == 200 { (one, other) } else { (other, one) };
    assert_eq!(refused.head.status, 409, "one at a time");
    for (answer, what) in [(taken, "sendfile"), (relay, "splice")] {
        assert_eq!(answer.head.status, 200, "{}", answer.text());
        let path = folder.path().join("profile.pb.gz");
        std::fs::write(&path, &answer.body).unwrap();
        // Names are in it: the tool would look for them in a debug build of a hundred megabytes.
        // Go builds the tool the first time, into the user's cache.
        let mut tool = Command::new(&go);
        let output = tool
            .args(["tool", "pprof", "-symbolize=none", "-top", "-cum", "-nodecount=500"])
            .arg(&path)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("Type: cpu") && text.contains("Duration: "), "{text}");
        assert!(text.contains("spegel::") && text.contains(what), "{what}: {text}");
        assert!(!text.contains("perf_signal_handler"), "{text}");
        // The kernel's page of calls (vDSO) has no names: a sample or two may be there.
        let unknown = text.lines().find(|line| line.ends_with("<unknown>"));
        let share = unknown.map_or(0.0, |line| {
            let cumulative = line.split_whitespace().nth(4).unwrap();
            cumulative.trim_end_matches('%').parse::<f64>().unwrap()
        });
        assert!(share < 10.0, "{text}");
        println!("{}", text.lines().take(14).collect::<Vec<_>>().join("\n"));
    }
}

#[test]
fn a_profile_is_read_by_the_pprof_tool() {
    profile_under_load("tokio");
}

#[test]
fn a_profile_disturbs_no_ring() {
    profile_under_load("auto");
}
