//! What this node's containerd is and says.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::config::{self, Config, Version};
use super::finding::Finding;
use super::process::Process;
use super::{Containerd, Settings};
use crate::store::{Inspection, inspect};

/// How long containerd may take to tell about itself, all in all.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was seen of it.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// What it is; none where OCI layouts are served.
    containerd: Option<Containerd>,
    said: Option<Result<Inspection, String>>,
    process: Option<Result<Process, String>>,
    config: Option<Result<Config, String>>,
    wanted: PathBuf,
    content: Option<Finding>,
}

pub(super) async fn look(settings: &Settings) -> Seen {
    let Some(containerd) = settings.containerd.clone() else { return Seen::default() };
    let ask = inspect(&containerd.socket, &containerd.namespace);
    let said = match tokio::time::timeout(PATIENCE, ask).await {
        Ok(said) => said.map_err(|error| error.to_string()),
        Err(_) => Err(format!("containerd tells nothing about itself within {} s", PATIENCE.as_secs())),
    };
    let wanted = settings.config_path.clone();
    let process = Process::behind(&containerd.socket).await;
    let look = move || {
        let version = said.as_ref().ok().and_then(|said| config::version(&said.version));
        let own = Process::unseen();
        let config = match (&containerd.config, &process) {
            (Some(path), Err(_)) => config::read(&own, path, version),
            (Some(path), Ok(process)) => config::read(process, path, version),
            (None, Ok(process)) => config::read(process, &process.config(), version),
            (None, Err(why)) => Err(why.clone()),
        };
        let content = said.as_ref().ok().map(|said| content(&containerd, said));
        let (process, config) = (Some(process), Some(config));
        Seen { containerd: Some(containerd), said: Some(said), process, config, wanted, content }
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

/// Whether the content directory is this containerd's, and can be read.
fn content(containerd: &Containerd, said: &Inspection) -> Finding {
    const CHECK: &str = "content";
    let Some(path) = containerd.content_path.as_ref().or(said.content_path.as_ref()) else {
        return Finding::failure(
            CHECK,
            "containerd does not say where its content is",
            "give --containerd-content-path",
        );
    };
    let told = match &said.content_path {
        Some(told) if told != path => format!("; this containerd says that its own is {}", told.display()),
        _ => String::new(),
    };
    let change = "give --containerd-content-path the directory `io.containerd.content.v1.content` below the root of this containerd, and run spegel as root";
    let place = |digest: &crate::oci::Digest| path.join("blobs").join(digest.algorithm().as_str()).join(digest.hex());
    match said.blobs.first() {
        Some((digest, _)) => match File::open(place(digest)) {
            Ok(_) => Finding::good(CHECK, format!("{} has containerd's content", path.display())),
            Err(error) => Finding::failure(
                CHECK,
                format!("{} lacks what containerd has, {digest}: {error}{told}", path.display()),
                change,
            ),
        },
        None => match fs::read_dir(path) {
            Ok(_) if told.is_empty() => Finding::good(CHECK, format!("{} can be read", path.display())),
            Ok(_) => {
                Finding::warning(CHECK, format!("{} can be read, and has nothing yet{told}", path.display()), change)
            }
            Err(error) if error.kind() == ErrorKind::NotFound && said.content_path.as_ref() == Some(path) => {
                Finding::note(
                    CHECK,
                    format!("{} is not there: containerd makes it with its first pull", path.display()),
                )
            }
            Err(error) => Finding::failure(CHECK, format!("{}: {error}{told}", path.display()), change),
        },
    }
}

/// What a mirror that is not there costs each request.
pub(super) fn cost_of_dead_mirrors(version: Option<Version>) -> &'static str {
    match version {
        Some(version) if version >= (2, 2) => {
            "where its address answers nothing, each request waits 0.2 to 0.3 s and then goes on"
        }
        _ => {
            "where its address answers nothing, each request waits up to 30 s, and a one-layer image 2 minutes, since this containerd does not heed dial_timeout"
        }
    }
}

// === impl Seen ===

impl Seen {
    /// Where containerd's file system begins, as seen from here.
    pub(super) fn root(&self) -> Option<&Process> {
        self.process.as_ref()?.as_ref().ok()
    }

    pub(super) fn version(&self) -> Option<Version> {
        config::version(&self.said()?.version)
    }

    pub(super) fn said(&self) -> Option<&Inspection> {
        self.said.as_ref()?.as_ref().ok()
    }

    pub(super) fn environment(&self) -> Result<&BTreeMap<String, String>, &str> {
        match &self.process {
            Some(Ok(process)) => process.environment.as_ref().map_err(String::as_str),
            Some(Err(why)) => Err(why),
            None => Err("no containerd is looked at"),
        }
    }

    pub(super) fn findings(&self) -> Vec<Finding> {
        let (Some(containerd), Some(said)) = (&self.containerd, &self.said) else {
            return vec![Finding::note("containerd", "OCI layouts are served; containerd is not looked at")];
        };
        let mut findings = Vec::new();
        match said {
            Err(why) => {
                let change = format!(
                    "start containerd, or name its socket with --containerd-sock (looked at: {}); root may open it",
                    containerd.socket.display()
                );
                findings.push(Finding::failure("containerd", format!("containerd does not answer: {why}"), change));
            }
            Ok(said) => {
                findings.push(self.judge_version(&said.version));
                findings.push(judge_namespace(&containerd.namespace, said));
                findings.extend(self.content.clone());
            }
        }
        match &self.config {
            Some(Ok(config)) => {
                findings.push(config.judge_path(&self.wanted, self.version()));
                findings.push(config.judge_discard());
            }
            Some(Err(why)) => {
                let said = format!("containerd's configuration cannot be seen ({why})");
                findings.push(Finding::unknown("config_path", said, "run doctor on the host as root, or give --containerd-config; `--pull IMAGE` shows whether containerd asks the mirror"));
            }
            None => {}
        }
        findings
    }

    fn judge_version(&self, text: &str) -> Finding {
        const CHECK: &str = "containerd";
        let cost = cost_of_dead_mirrors(self.version());
        match self.version() {
            None => Finding::note(
                CHECK,
                format!("containerd {text} answers, a version that is not known; of a mirror that is gone: {cost}"),
            ),
            Some(version) if version < (1, 6) => Finding::warning(
                CHECK,
                format!("containerd {text} is older than 1.6, the oldest that is tested"),
                "update containerd",
            ),
            Some(version) if version < (2, 2) => {
                Finding::note(CHECK, format!("containerd {text} answers; of a mirror that is gone: {cost}"))
            }
            Some(_) => Finding::good(CHECK, format!("containerd {text} answers; of a mirror that is gone: {cost}")),
        }
    }
}

fn judge_namespace(namespace: &str, said: &Inspection) -> Finding {
    const CHECK: &str = "namespace";
    let others: Vec<&str> = said.namespaces.iter().map(String::as_str).filter(|other| *other != namespace).collect();
    if said.images > 0 {
        return Finding::good(CHECK, format!("{} images in containerd's namespace {namespace}", said.images));
    }
    if others.is_empty() {
        return Finding::note(CHECK, format!("containerd's namespace {namespace} has no image yet"));
    }
    let said = format!("containerd's namespace {namespace} has no image, and there are others: {}", others.join(", "));
    Finding::warning(
        CHECK,
        said,
        "name the namespace that images are pulled into with --containerd-namespace: k8s.io for Kubernetes, default for `ctr` and `nerdctl`, nomad for Nomad, moby for Docker",
    )
}

/// Whether a directory is there, as containerd's process sees it, or as this one does.
pub(super) fn seen_from(process: Option<&Process>, path: &Path) -> PathBuf {
    process.map(|process| process.path(path)).filter(|path| path.exists()).unwrap_or_else(|| path.to_owned())
}
