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
use crate::store::{Cri, Inspection, inspect};

/// Where Kubernetes has its images.
const KUBERNETES: &str = "k8s.io";
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
    /// Whether the configuration is of the file that the process was told.
    is_own_config: bool,
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
        let told = process.as_ref().ok().map(Process::config);
        let is_own_config = told.is_some() && containerd.config.as_ref().is_none_or(|path| Some(path) == told.as_ref());
        let content = said.as_ref().ok().map(|said| content(&containerd, said));
        let (process, config) = (Some(process), Some(config));
        Seen { containerd: Some(containerd), said: Some(said), process, config, is_own_config, wanted, content }
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
        let cri = self.said().and_then(|said| said.cri.as_ref());
        let config = self.config.as_ref().and_then(|config| config.as_ref().ok());
        findings.extend(judge_cri(cri, config.and_then(|config| config.disabled.as_deref()), &containerd.namespace));
        match &self.config {
            // Then nobody reads what it says of registries.
            Some(Ok(config)) if cri == Some(&Cri::Absent) => findings.extend(self.judge_age(config)),
            Some(Ok(config)) => {
                findings.extend(self.judge_age(config));
                findings.push(config.judge_path(self.root(), &self.wanted, self.version()));
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

    fn judge_age(&self, config: &Config) -> Option<Finding> {
        let started = self.root()?.started.filter(|_| self.is_own_config)?;
        Some(config.judge_age(started))
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

/// Whether Kubernetes can pull by this containerd. `disabled` is the entry of its configuration that keeps the CRI from being loaded.
fn judge_cri(cri: Option<&Cri>, disabled: Option<&str>, namespace: &str) -> Option<Finding> {
    const CHECK: &str = "cri";
    let by = disabled.map(|name| format!(", by `{name}` in disabled_plugins")).unwrap_or_default();
    let take_out = "take the CRI out of disabled_plugins in containerd's config.toml, and restart containerd";
    match (cri?, disabled) {
        (Cri::Failed(why), _) if namespace != KUBERNETES => Some(Finding::note(
            CHECK,
            format!("containerd could not load its CRI plugin, which what pulls into {namespace} does not need: {why}"),
        )),
        (Cri::Failed(why), _) => Some(Finding::failure(
            CHECK,
            format!("containerd could not load its CRI plugin, so Kubernetes cannot pull: {why}"),
            "correct containerd's config.toml, and restart containerd",
        )),
        (Cri::Absent, _) if namespace == KUBERNETES => Some(Finding::failure(
            CHECK,
            format!("containerd's CRI plugin is disabled{by}, so Kubernetes cannot pull"),
            format!("{take_out}; without Kubernetes, name the namespace of what pulls with --containerd-namespace"),
        )),
        (Cri::Absent, _) => Some(Finding::note(
            CHECK,
            format!(
                "containerd's CRI plugin is disabled{by}: what pulls into {namespace} must be told of the mirror by itself, as nerdctl is by /etc/containerd/certs.d and ctr by --hosts-dir"
            ),
        )),
        (Cri::Loaded, Some(name)) => Some(Finding::warning(
            CHECK,
            format!(
                "containerd's config.toml disables its CRI plugin by `{name}`, which counts from its next start on"
            ),
            take_out,
        )),
        (Cri::Loaded, None) => Some(Finding::good(CHECK, "containerd serves the CRI")),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::finding::State;
    use super::*;

    #[test]
    fn a_cri_that_is_not_there_is_named() {
        let judged = |cri: Cri, disabled, namespace| {
            let found = judge_cri(Some(&cri), disabled, namespace).unwrap();
            (found.state, found.said)
        };
        let (state, said) = judged(Cri::Absent, Some("cri"), KUBERNETES);
        assert!(state == State::Failure && said.contains("by `cri` in disabled_plugins"), "{said}");
        // Hosts without Kubernetes do without it.
        assert_eq!(judged(Cri::Absent, Some("cri"), "default").0, State::Note);
        assert_eq!(judged(Cri::Failed("broken".into()), None, "default").0, State::Note);
        let (state, said) = judged(Cri::Failed("broken".into()), None, KUBERNETES);
        assert!(state == State::Failure && said.contains("broken"), "{said}");
        assert_eq!(judged(Cri::Loaded, Some("cri"), KUBERNETES).0, State::Warning);
        assert_eq!(judged(Cri::Loaded, None, KUBERNETES).0, State::Good);
        assert_eq!(judge_cri(None, None, KUBERNETES), None);
    }
}
