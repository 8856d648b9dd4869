//! What an operator sees: a real Prometheus scrapes real nodes while they pull, evaluates every query of the dashboard and every alert, and each
//! metric that is documented is there and moves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use spegel::app::catalogue;
use spegel::metrics::{Bound, Label};
use spegel_benches::containerd::{Options, Version};
use spegel_benches::daemon::{Daemon, find_program, wait_until};
use spegel_benches::http::Client;
use spegel_benches::image::{Compression, Image, host_platform};

use super::cluster::{Cluster, Member, NOTICED, PROGRAM};
use super::cri;

const NODES: usize = 3;
/// How long figures may take into Prometheus, which looks each second.
const SCRAPED: Duration = Duration::from_secs(30);

/// What stands still on a node that is well: the state of things and what is allowed. It has to be there.
const STANDS: [&str; 16] = [
    "process_max_fds",
    "process_start_time_seconds",
    "process_threads",
    "process_virtual_memory_bytes",
    "process_open_fds",
    "spegel_cgroup_own_memory_bytes",
    "spegel_cgroup_page_cache_bytes",
    "spegel_doctor_findings",
    "spegel_ebpf_state",
    "spegel_node_info",
    "spegel_ready",
    "spegel_router_members",
    "spegel_router_table_peers",
    "spegel_serve_bound",
    "spegel_serve_connections_limit",
    "spegel_serve_engine_info",
];

/// What moves only when something goes wrong, or for a moment, and the test that makes it.
const ELSEWHERE: [(&str, &str); 22] = [
    ("spegel_broken_bodies_total", "who_breaks_off_is_not_asked_for_the_rest"),
    ("spegel_cut_responses_total", "a_chunk_after_the_first_is_refused_by_an_orderly_close_and_then_by_a_status"),
    ("spegel_ebpf_containerd_attached", "containerds_group_may_come_late_and_come_back"),
    ("spegel_ebpf_lost_events_total", "events_that_were_lost_are_told"),
    ("spegel_ingests", "many_at_once_and_writers_that_give_up"),
    ("spegel_log_dropped_lines_total", "lines_that_nobody_reads_are_counted"),
    ("spegel_peer_failed_connections_total", "a_peer_that_refuses_is_a_failure"),
    ("spegel_peer_resets_total", "an_aborted_transfer_is_a_reset_with_what_had_arrived"),
    ("spegel_peers_set_aside_total", "what_is_asked_for_again_speaks_against_its_sender"),
    ("spegel_pull_offload_ratio", "bytes_from_upstream_are_told_from_what_else_containerd_has"),
    ("spegel_refused_requests_total", "a_node_that_is_about_to_run_out_refuses_new_work_until_that_has_passed"),
    ("spegel_rejected_uploads_total", "a_busy_peer_names_another_and_clients_are_never_refused"),
    ("spegel_relay_resumes_total", "a_body_that_breaks_off_goes_on_from_another_peer_at_the_same_byte"),
    ("spegel_router_advertise_age_seconds", "what_waits_to_be_told_is_measured"),
    ("spegel_router_advertise_queue", "what_waits_to_be_told_is_measured"),
    ("spegel_router_refused_total", "what_cannot_be_used_is_dropped_and_counted"),
    ("spegel_serve_connections_refused_total", "one_connection_too_many_is_refused"),
    ("spegel_serve_pipes", "a_relay_holds_a_pipe"),
    ("spegel_store_ready", "a_prometheus_sees_what_is_documented_and_the_dashboard_shows_it"),
    ("spegel_storm_moves_total", "who_loses_its_parent_is_given_another_one"),
    ("spegel_storm_shed_total", "who_is_shed_is_counted"),
    ("spegel_wrong_bytes_total", "what_is_asked_for_again_speaks_against_its_sender"),
];

#[test]
fn a_prometheus_sees_what_is_documented_and_the_dashboard_shows_it() {
    let Some(prometheus) = find_program("prometheus") else {
        return println!("skipped: the program 'prometheus' is not installed");
    };
    let own = tempfile::tempdir().unwrap();
    let program = with_memory_group(own.path());
    let arguments = ["--storm", "on", "--ebpf", "off"];
    let Some(mut cluster) = Cluster::start_by(&program, Version::V1_6, NODES, &Options::default(), &arguments) else {
        return;
    };
    for node in &cluster.nodes {
        let members = || node.spegel().metric("spegel_router_members", &[]).unwrap_or(0.0);
        wait_until(Duration::from_secs(60), "all to know each other", || members() >= (NODES - 1) as f64).unwrap();
    }
    let prometheus = Prometheus::start(&prometheus, &cluster);
    let targets = NODES as f64;
    prometheus.wait("count(spegel_ready == 1)", |value| value == targets);
    let before: Vec<Scrape> = cluster.nodes.iter().map(scrape).collect();

    let first = cluster.push("first:1", |image| image.layers(2, 24 << 20, Compression::None, 71));
    cluster.nodes[0].pull_by_cri(&first, first.reference());
    what_is_advertised_is_said(&cluster, &first);
    a_relay_holds_a_pipe(&cluster.nodes[1], &first);
    cluster.nodes[1].pull_by_cri(&first, first.reference());
    let pulled = cluster.nodes[1].spegel().metric("spegel_pull_bytes_total", &["source=\"peer\""]).unwrap();
    let layers: u64 = first.layers_for(host_platform()).map(|layer| layer.size).sum();
    assert!(pulled >= layers as f64, "{pulled} of {layers}");
    pull_at_once(&cluster);

    let after: Vec<Scrape> = cluster.nodes.iter().map(scrape).collect();
    all_that_is_documented_moves(&before, &after);
    text_is_what_promtool_wants(&cluster.nodes[1]);

    // An increase is one between two looks: what was counted before the first one that saw the series is none.
    prometheus.wait("sum(spegel_mirror_requests_total{cache=\"hit\"})", |value| value > 0.0);
    a_relay_holds_a_pipe(&cluster.nodes[2], &first);
    prometheus.wait("sum(increase(spegel_mirror_requests_total{cache=\"hit\"}[2m]))", |value| value > 0.0);
    prometheus.wait("min(count_over_time(spegel_storm_depth[1m]))", |value| value >= 3.0);
    let dashboard = Dashboard::read();
    prometheus.wait("count(count by (instance) (spegel_doctor_findings))", |value| value == targets);
    let findings = scrape(&cluster.nodes[0]);
    let findings: Vec<_> = findings.iter().filter(|((name, _), _)| name == "spegel_doctor_findings").collect();
    let values = dashboard.evaluate(&prometheus);
    let value = |panel: &str| values[panel][0];
    assert_eq!((value("Is it working?"), value("Nodes"), value("Sick nodes")), (1.0, targets, 0.0), "{findings:?}");
    assert!(value("Hit ratio") > 0.0 && value("Hit ratio") <= 1.0 && value("Saved") >= layers as f64, "{values:?}");
    assert!(value("Copies from upstream") > 0.0, "{values:?}");
    prometheus.rules_are_well();

    // One node is lost, another one's containerd is, and the first row says so.
    let lost = cluster.nodes[2].spegel.take().unwrap();
    lost.daemon.stop().unwrap();
    prometheus.wait(&dashboard.query("Sick nodes"), |value| value == 1.0);
    cluster.nodes[1].containerd.stop().unwrap();
    prometheus.wait("min(spegel_store_ready)", |value| value == 0.0);
    prometheus.wait(&dashboard.query("Sick nodes"), |value| value == 2.0);
    prometheus.wait(&dashboard.query("Is it working?"), |value| value > 0.3 && value < 0.4);
    // Prometheus has nothing of the lost one by now but that it is down: with all nodes it is among the instances, with another one it is not.
    prometheus.wait("count(spegel_node_info)", |value| value == targets - 1.0);
    let instances = dashboard.values("instance");
    prometheus.wait(&substituted(&instances), |value| value == targets);
    assert_eq!(dashboard.variable("node")["allValue"], ".*");
    let name = prometheus.label("spegel_node_info", "node");
    prometheus.wait(&substituted(&instances.replace("$node", &name)), |value| value == 1.0);
}

/// The program with the control groups that a node has, of which a namespace that `ip` made shows none.
fn with_memory_group(folder: &Path) -> PathBuf {
    let groups = "/sys/fs/cgroup";
    let script = format!(
        "#!/bin/sh\nset -e\nmount -t tmpfs tmpfs {groups}\nmkdir {groups}/memory\n\
         mount -t cgroup -o memory cgroup {groups}/memory 2> /dev/null || mount -t cgroup2 cgroup2 {groups}\n\
         exec {PROGRAM} \"$@\"\n"
    );
    let program = folder.join("spegel");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// A relay that its client does not read.
fn a_relay_holds_a_pipe(node: &Member, image: &Image) {
    let layer = image.layers_for(host_platform()).max_by_key(|layer| layer.size).unwrap();
    let url = node.url(image, "blobs", &layer.digest);
    let (address, path) = url.trim_start_matches("http://").split_once('/').unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
    stream.read_exact(&mut [0; 1000]).unwrap();
    let pipes = || node.spegel().metric("spegel_serve_pipes", &[]).unwrap();
    wait_until(NOTICED, "a pipe in use", || pipes() >= 1.0).unwrap();
    drop(stream);
    wait_until(NOTICED, "no pipe in use", || pipes() == 0.0).unwrap();
}

/// All nodes pull what none has.
fn pull_at_once(cluster: &Cluster) {
    let image = cluster.push("storm:1", |image| image.layers(2, 8 << 20, Compression::None, 72));
    thread::scope(|scope| {
        let pulls: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| {
                let (socket, reference) = (node.containerd.socket(), image.reference().to_owned());
                scope.spawn(move || cri::pull(&socket, &reference))
            })
            .collect();
        pulls.into_iter().for_each(|pull| pull.join().unwrap().unwrap_or_else(|error| panic!("{error}")));
    });
}

/// Node 0 has pulled an image, and nobody else has it: its gauges say what another node is given of it.
fn what_is_advertised_is_said(cluster: &Cluster, image: &Image) {
    let (node, other) = (&cluster.nodes[0], &cluster.nodes[1]);
    let contents: BTreeSet<String> =
        image.contents_for(host_platform()).map(|content| content.digest.clone()).collect();
    let gauge = |name: &str| node.spegel().metric(name, &[]).unwrap();
    wait_until(NOTICED, "all of the image to be offered", || {
        gauge("spegel_advertised_content_digests") == contents.len() as f64
    })
    .unwrap_or_else(|error| panic!("{error}: {} of {}", gauge("spegel_advertised_content_digests"), contents.len()));
    assert_eq!(gauge("spegel_advertised_image_tags"), 1.0);
    assert_eq!(gauge("spegel_advertised_image_digests"), 1.0);
    cluster.wait_resolved(1, image);
    let layers: BTreeSet<&str> = image.layers_for(host_platform()).map(|layer| layer.digest.as_str()).collect();
    for digest in &contents {
        let kinds: &[&str] = if layers.contains(digest.as_str()) { &["blobs"] } else { &["manifests", "blobs"] };
        let is_given = kinds.iter().any(|kind| {
            Client::new(Duration::from_secs(10))
                .head(&other.url(image, kind, digest), &[])
                .is_ok_and(|head| head.status == 200)
        });
        assert!(is_given, "{digest} is counted as offered, and not given");
    }
    assert_eq!(other.spegel().metric("spegel_advertised_content_digests", &[]).unwrap(), 0.0, "it has nothing itself");
}

// === What is scraped ===

/// Samples by their metric and labels.
type Scrape = BTreeMap<(String, String), f64>;

fn scrape(node: &Member) -> Scrape {
    let accept = ("Accept", "application/openmetrics-text; version=1.0.0");
    let url = format!("{}/metrics", node.spegel().metrics_url());
    let text = Client::new(Duration::from_secs(5)).get(&url, &[accept]).unwrap().text();
    let samples = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) =
            name.split_once('{').map_or((name, ""), |(name, labels)| (name, labels.trim_end_matches('}')));
        ((name.to_owned(), labels.to_owned()), value.parse().unwrap())
    });
    samples.collect()
}

fn all_that_is_documented_moves(before: &[Scrape], after: &[Scrape]) {
    let (mut still, mut known) = (Vec::new(), BTreeSet::new());
    for metric in catalogue() {
        let sample = metric.sample();
        let names = match metric.kind() {
            "histogram" => ["_bucket", "_sum", "_count"].map(|end| format!("{sample}{end}")).to_vec(),
            _ => vec![sample.clone()],
        };
        let of_it = |scrape: &Scrape| -> Scrape {
            scrape
                .iter()
                .filter(|((name, _), _)| names.contains(name))
                .map(|(key, value)| (key.clone(), *value))
                .collect()
        };
        let found: Vec<(Scrape, Scrape)> =
            before.iter().zip(after).map(|(old, new)| (of_it(old), of_it(new))).collect();
        found.iter().for_each(|(_, new)| check_labels(&sample, new, metric.label_list()));
        let is_there = found.iter().any(|(_, new)| !new.is_empty());
        let moved = found.iter().any(|(old, new)| old != new);
        let is_elsewhere = ELSEWHERE.iter().any(|(name, _)| *name == sample);
        if !(moved || is_elsewhere || (is_there && STANDS.contains(&sample.as_str()))) {
            still.push(format!("{sample} ({})", if is_there { "there" } else { "absent" }));
        }
        known.extend(names);
    }
    assert!(still.is_empty(), "documented, and it did not move: {still:#?}");
    let unknown: BTreeSet<&String> =
        after.iter().flatten().map(|((name, _), _)| name).filter(|name| !known.contains(*name)).collect();
    assert!(unknown.is_empty(), "not in docs/metrics.md: {unknown:?}");
    let sources = sources();
    for (name, test) in ELSEWHERE {
        assert!(known.contains(name), "{name} is no metric");
        assert!(sources.contains(&format!("fn {test}(")), "there is no test {test} for {name}");
    }
}

/// All tests' text.
fn sources() -> String {
    fn add(folder: &Path, all: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                add(&path, all);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                all.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut all = String::new();
    ["src", "tests"].iter().for_each(|part| add(&Path::new(env!("CARGO_MANIFEST_DIR")).join(part), &mut all));
    all
}

/// The samples of one node have the labels that are documented, and no other or more values of them than that.
fn check_labels(sample: &str, scrape: &Scrape, documented: &[Label]) {
    let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); documented.len()];
    for (_, labels) in scrape.keys() {
        let pairs = labels.split("\",").filter(|pair| !pair.is_empty()).map(|pair| pair.split_once("=\"").unwrap());
        let pairs: Vec<(&str, &str)> = pairs.filter(|(name, _)| *name != "le").collect();
        assert!(
            pairs.iter().map(|(name, _)| *name).eq(documented.iter().map(|label| label.name)),
            "{sample}{{{labels}}}"
        );
        for ((_, value), seen) in pairs.iter().zip(&mut seen) {
            seen.insert(value.trim_end_matches('"').to_owned());
        }
    }
    for (label, seen) in documented.iter().zip(seen) {
        match label.bound {
            Bound::Words(words) => {
                assert!(seen.iter().all(|value| words.contains(&value.as_str())), "{sample}: {}: {seen:?}", label.name);
            }
            Bound::AtMost(number, _) => assert!(seen.len() <= number, "{sample}: {}: {seen:?}", label.name),
        }
    }
}

/// The older text, by Prometheus's own parser and rules for names.
fn text_is_what_promtool_wants(node: &Member) {
    let url = format!("{}/metrics", node.spegel().metrics_url());
    let text = Client::new(Duration::from_secs(5)).get(&url, &[]).unwrap().text();
    let promtool = find_program("promtool").unwrap();
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{text}");
}

// === Prometheus ===

struct Prometheus {
    _daemon: Daemon,
    url: String,
}

impl Prometheus {
    /// One that scrapes all nodes each second, and evaluates the chart's alerts.
    fn start(program: &Path, cluster: &Cluster) -> Self {
        let targets: Vec<String> = cluster
            .nodes
            .iter()
            .map(|node| format!("'{}'", node.spegel().metrics_url().trim_start_matches("http://")))
            .collect();
        let folder = cluster.folder.path();
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n  - job_name: spegel\n    static_configs: [{{targets: [{}]}}]\n",
            monitoring("alerts.yaml").display(),
            targets.join(", ")
        );
        fs::write(folder.join("prometheus.yml"), config).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let command = [
            program.display().to_string(),
            format!("--config.file={}", folder.join("prometheus.yml").display()),
            format!("--storage.tsdb.path={}", folder.join("prometheus").display()),
            format!("--web.listen-address={address}"),
        ];
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let mut daemon = Daemon::start("prometheus", None, &command, &folder.join("prometheus.log")).unwrap();
        let url = format!("http://{address}");
        let ready = format!("{url}/-/ready");
        let client = Client::new(Duration::from_secs(1));
        daemon
            .wait_until(SCRAPED, "a Prometheus that is ready", || {
                client.get(&ready, &[]).is_ok_and(|answer| answer.head.status == 200)
            })
            .unwrap();
        Self { _daemon: daemon, url }
    }

    fn get(&self, path: &str) -> Value {
        let answer = Client::new(Duration::from_secs(10)).get(&format!("{}{path}", self.url), &[]).unwrap();
        serde_json::from_str(&answer.text()).unwrap()
    }

    /// The values of an expression, or Prometheus's error.
    fn query(&self, expression: &str) -> Result<Vec<f64>, String> {
        let encoded = percent_encoding::utf8_percent_encode(expression, percent_encoding::NON_ALPHANUMERIC);
        let answer = self.get(&format!("/api/v1/query?query={encoded}"));
        if answer["status"] != "success" {
            return Err(answer["error"].to_string());
        }
        let samples = answer["data"]["result"].as_array().unwrap();
        Ok(samples.iter().map(|sample| sample["value"][1].as_str().unwrap().parse().unwrap()).collect())
    }

    /// The value of a label of the first series that an expression has.
    fn label(&self, expression: &str, label: &str) -> String {
        let encoded = percent_encoding::utf8_percent_encode(expression, percent_encoding::NON_ALPHANUMERIC);
        let answer = self.get(&format!("/api/v1/query?query={encoded}"));
        answer["data"]["result"][0]["metric"][label].as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn wait(&self, expression: &str, is_it: impl Fn(f64) -> bool) {
        let end = Instant::now() + SCRAPED;
        loop {
            let values = self.query(expression).unwrap();
            if values.first().is_some_and(|value| is_it(*value)) {
                return;
            }
            assert!(Instant::now() < end, "{expression} is {values:?}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Every alert can be evaluated, and none of those that may be seen at once is pending for the wrong reason.
    fn rules_are_well(&self) {
        let rules = self.get("/api/v1/rules");
        let rules = rules["data"]["groups"][0]["rules"].as_array().unwrap();
        assert!(!rules.is_empty());
        for rule in rules {
            assert_eq!((&rule["health"], &rule["lastError"]), (&Value::from("ok"), &Value::Null), "{rule}");
        }
        let quiet = [
            "SpegelNotServing",
            "SpegelContainerdLost",
            "SpegelSeesNoPeers",
            "SpegelPeersFail",
            "SpegelWrongBytes",
            "SpegelAdvertisingLate",
            "SpegelMemoryNearLimit",
        ];
        for rule in rules.iter().filter(|rule| quiet.contains(&rule["name"].as_str().unwrap())) {
            assert_eq!(rule["state"], "inactive", "{rule}");
        }
    }
}

// === The dashboard ===

fn monitoring(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/spegel/monitoring").join(name)
}

struct Dashboard(Value);

impl Dashboard {
    fn read() -> Self {
        Self(serde_json::from_str(&fs::read_to_string(monitoring("dashboard.json")).unwrap()).unwrap())
    }

    fn variable(&self, name: &str) -> &Value {
        self.0["templating"]["list"].as_array().unwrap().iter().find(|variable| variable["name"] == name).unwrap()
    }

    /// How many values a variable has to choose from.
    fn values(&self, name: &str) -> String {
        let query = self.variable(name)["query"]["query"].as_str().unwrap();
        let inner = query.strip_prefix("label_values(").and_then(|query| query.strip_suffix(')')).unwrap();
        let (series, label) = inner.rsplit_once(", ").unwrap();
        format!("count(count by ({label}) ({series}))")
    }

    /// The first query of a panel, as Grafana would send it.
    fn query(&self, title: &str) -> String {
        let panel = self.0["panels"].as_array().unwrap().iter().find(|panel| panel["title"] == title).unwrap();
        substituted(panel["targets"][0]["expr"].as_str().unwrap())
    }

    /// The values of each panel: of all its queries, each of which has some.
    fn evaluate(&self, prometheus: &Prometheus) -> BTreeMap<String, Vec<f64>> {
        for name in ["namespace", "job", "node", "instance"] {
            let count = prometheus.query(&substituted(&self.values(name))).unwrap();
            assert!(!count.is_empty(), "${name} has no values");
        }
        let (mut values, mut empty) = (BTreeMap::new(), Vec::new());
        for panel in self.0["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row") {
            let title = panel["title"].as_str().unwrap();
            let all: &mut Vec<f64> = values.entry(title.to_owned()).or_default();
            for target in panel["targets"].as_array().unwrap() {
                let query = substituted(target["expr"].as_str().unwrap());
                let found = prometheus.query(&query).unwrap_or_else(|error| panic!("{title}: {error}: {query}"));
                if found.iter().all(|value| value.is_nan()) {
                    empty.push(format!("{title}: {query}"));
                }
                all.extend(found);
            }
        }
        assert!(empty.is_empty(), "nothing to show: {empty:#?}");
        println!("{} panels have something to show: {values:?}", values.len());
        values
    }
}

/// With every variable at `All`, and the intervals of a view of some minutes.
fn substituted(expression: &str) -> String {
    let all = [
        ("$__rate_interval", "30s"),
        ("$__range", "2m"),
        ("$namespace", ".*"),
        ("$job", "spegel"),
        ("$node", ".*"),
        ("$instance", ".+"),
    ];
    let query = all.iter().fold(expression.to_owned(), |text, (name, value)| text.replace(name, value));
    assert!(!query.contains('$'), "a variable is not known: {query}");
    query
}
