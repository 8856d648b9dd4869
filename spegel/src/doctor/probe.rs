//! What only a try shows: whether mirrors answer, whether a blob comes, and whether containerd asks.

use std::path::Path;
use std::time::{Duration, Instant};

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::{ImageSpec, PullImageRequest};
use sha2::{Digest as _, Sha256};
use tonic::transport::Channel;

use super::certs::Certs;
use super::config::Version;
use super::containerd::{Seen, cost_of_dead_mirrors};
use super::finding::Finding;
use super::{Outside, Settings, http, network};
use crate::hosts::{Host, NODE_HEADER};
use crate::oci::Reference;

/// The largest blob that is fetched, in bytes.
const MAX_BLOB: usize = 16 << 20;
/// How long containerd may take for the pull.
const PULL: Duration = Duration::from_secs(300);
/// How long the mirror may take to count a request whose answer has ended.
const COUNTED: Duration = Duration::from_secs(1);
/// How many mirrors are tried.
const MAX_MIRRORS: usize = 16;

fn headers(host: &Host) -> Vec<(&str, &str)> {
    let node = host.node.as_deref().map(|node| (NODE_HEADER, node));
    let authorization = host.authorization.as_deref().map(|value| ("Authorization", value));
    node.into_iter().chain(authorization).collect()
}

/// Whether each mirror that containerd asks answers, with the credentials that containerd has.
pub(super) async fn mirrors(certs: &Certs, version: Option<Version>) -> Vec<Finding> {
    const CHECK: &str = "mirrors";
    let mut findings = Vec::new();
    for host in certs.mirrors().into_iter().take(MAX_MIRRORS) {
        let url = &host.url;
        if !url.starts_with("http://") {
            findings.push(Finding::unknown(
                CHECK,
                format!("{url} is not asked: only plain HTTP is"),
                "ask it with curl",
            ));
            continue;
        }
        findings.push(match http::get(&format!("{url}/v2/"), &headers(host), 1 << 16).await {
            Ok(answer) if answer.status == 200 => Finding::good(CHECK, format!("the mirror {url} answers")),
            Ok(answer) if answer.status == 401 => Finding::failure(
                CHECK,
                format!("the mirror {url} refuses the credentials that hosts.toml has for it"),
                "give `registry` and `configuration` the same --basic-auth-dir, and run `spegel configuration` again",
            ),
            Ok(answer) => Finding::failure(
                CHECK,
                format!("the mirror {url} answers {} to /v2/", answer.status),
                "look at what listens there",
            ),
            Err(why) => {
                let said = format!(
                    "the mirror {url} does not answer ({why}), and containerd asks it first: {}",
                    cost_of_dead_mirrors(version)
                );
                Finding::failure(
                    CHECK,
                    said,
                    "start spegel, or take its configuration back with `spegel cleanup --once`",
                )
            }
        });
    }
    findings
}

/// Fetches a blob that this node has as its containerd would, and verifies it.
pub(super) async fn blob(certs: &Certs, outside: &Outside, seen: &Seen) -> Finding {
    const CHECK: &str = "probe";
    let own = Host { url: format!("http://{}", outside.registry.dial()), ..Host::default() };
    let host = certs.mirrors().into_iter().find(|host| host.url.starts_with("http://")).unwrap_or(&own);
    let blobs = seen.said().map(|said| said.blobs.as_slice()).unwrap_or_default();
    let Some((digest, _)) =
        blobs.iter().find(|(digest, size)| *size <= MAX_BLOB as u64 && digest.algorithm().as_str() == "sha256")
    else {
        return Finding::unknown(
            CHECK,
            "there is no blob to fetch: containerd has none yet",
            "pull an image, and run doctor again",
        );
    };
    let url = format!("{}/v2/spegel-doctor/probe/blobs/{digest}?ns=spegel-doctor.invalid", host.url);
    let change = "look at the mirror's log: it has a line for this request";
    match http::get(&url, &headers(host), MAX_BLOB).await {
        Ok(answer) if answer.status == 200 && hex::encode(Sha256::digest(&answer.body)) == digest.hex() => {
            Finding::good(CHECK, format!("{} gave a blob of {} bytes, and it is right", host.url, answer.body.len()))
        }
        Ok(answer) if answer.status == 200 => Finding::failure(
            CHECK,
            format!("{} gave {digest} with wrong bytes: the disk, or what is in between, changes content", host.url),
            change,
        ),
        Ok(answer) => Finding::failure(
            CHECK,
            format!("{} answers {} for {digest}, which this node has", host.url, answer.status),
            format!(
                "{change}; --containerd-namespace, --containerd-content-path and --registry-filters decide what is served"
            ),
        ),
        Err(why) => Finding::failure(CHECK, format!("{} gave no blob: {why}", host.url), change),
    }
}

/// How often clients asked the mirror for content of a registry between two scrapes. Peers are no clients, and what doctor asks for itself is of a
/// registry that does not exist. One that is not told apart is among the others, and so may that be.
fn asked(before: &str, after: &str, registry: &str) -> f64 {
    let of = |metrics, name| network::figure(metrics, "spegel_mirror_requests_total", &format!("registry=\"{name}\""));
    let name = if of(after, registry).is_some() { registry } else { "other" };
    of(after, name).unwrap_or(0.0) - of(before, name).unwrap_or(0.0)
}

/// The registry of an image as Kubernetes names it: without a host it is Docker Hub's.
fn registry_of(image: &str) -> String {
    let reference = image.parse::<Reference>().or_else(|_| format!("{image}:latest").parse());
    reference.map_or_else(|_| "docker.io".to_owned(), |reference| reference.repository.registry().to_owned())
}

/// Has containerd pull an image, and looks whether it asked the mirror.
pub(super) async fn containerd(settings: &Settings, outside: &Outside, image: &str) -> Finding {
    const CHECK: &str = "pull";
    let Some(containerd) = &settings.containerd else {
        return Finding::unknown(CHECK, "no containerd is looked at", "leave --oci-layout away");
    };
    let before = network::metrics(outside).await;
    let pulled = match tokio::time::timeout(PULL, pull(&containerd.socket, image)).await {
        Ok(pulled) => pulled,
        Err(_) => Err(format!("it takes longer than {} s", PULL.as_secs())),
    };
    let registry = registry_of(image);
    let deadline = Instant::now() + COUNTED;
    let count = loop {
        let after = network::metrics(outside).await;
        let (Ok(before), Ok(after)) = (&before, after) else {
            return Finding::unknown(
                CHECK,
                "whether containerd asked the mirror is not known, since that tells no metrics",
                "give --metrics-addr as `registry` has it",
            );
        };
        let count = asked(before, &after, &registry);
        // A request is counted a moment after containerd has its answer.
        if count >= 1.0 || Instant::now() >= deadline {
            break count;
        }
        tokio::time::sleep(COUNTED / 10).await;
    };
    match pulled {
        Err(why) => Finding::failure(
            CHECK,
            format!(
                "containerd does not pull {image}: {why}; the mirror was asked for content of {registry} {count} times"
            ),
            "look at containerd's log",
        ),
        Ok(()) if count < 1.0 => Finding::failure(
            CHECK,
            format!("containerd pulled {image}, and did not ask the mirror"),
            "see config_path, proxy and certs.d above; containerd reads config_path at its start only",
        ),
        Ok(()) => {
            let said = format!(
                "containerd pulled {image}; the mirror was asked for content of {registry} {count} times meanwhile"
            );
            Finding::good(CHECK, said)
        }
    }
}

async fn pull(socket: &Path, image: &str) -> Result<(), String> {
    let image = ImageSpec { image: image.to_owned(), ..ImageSpec::default() };
    let request = PullImageRequest { image: Some(image), ..PullImageRequest::default() };
    let answer = connect(socket).await?.pull_image(request).await;
    answer.map(|_| ()).map_err(|status| status.message().to_owned())
}

async fn connect(socket: &Path) -> Result<ImageServiceClient<Channel>, String> {
    let channel = containerd_client::connect(socket).await;
    channel.map(ImageServiceClient::new).map_err(|error| format!("containerd's socket: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_clients_ask_of_that_registry_is_counted() {
        let metrics = "\
http_request_duration_seconds_count{handler=\"blob\",method=\"GET\",code=\"200\"} 9
spegel_mirror_requests_total{registry=\"ghcr.io\",cache=\"hit\"} 2
spegel_mirror_requests_total{registry=\"ghcr.io\",cache=\"miss\"} 1
spegel_mirror_requests_total{registry=\"spegel-doctor.invalid\",cache=\"hit\"} 4
spegel_mirror_requests_total{registry=\"other\",cache=\"miss\"} 5
";
        let of = |image: &str| asked("", metrics, &registry_of(image));
        assert!((of("ghcr.io/a/b:1") - 3.0).abs() < f64::EPSILON);
        // One beyond those that are told apart.
        assert!((of("quay.io/a:1") - 5.0).abs() < f64::EPSILON);
        // One that is told apart since: what the others were asked for before is not its.
        let before = "spegel_mirror_requests_total{registry=\"other\",cache=\"miss\"} 4\n";
        assert!((asked(before, metrics, "ghcr.io") - 3.0).abs() < f64::EPSILON);
        assert!((asked(before, metrics, "quay.io") - 1.0).abs() < f64::EPSILON);
        assert_eq!(registry_of("quay.io/team/app"), "quay.io");
        assert_eq!(registry_of("nginx:1"), "docker.io");
        assert_eq!(registry_of("registry.test:5000/a:1"), "registry.test:5000");
    }
}
