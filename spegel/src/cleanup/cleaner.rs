//! One node's part: taking back what was written, again and again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use http::{Method, StatusCode};
use tokio::sync::Mutex;

use crate::hosts::{self, HostsError, Report};
use crate::router::{Identity, IdentityError};

/// The paths that say whether this node is clean. `/healthz` is what older charts of the Go program probe.
const PATHS: [&str; 3] = ["/readyz", "/healthz", "/livez"];

/// Takes back what spegel left on a node. Clones share one state.
#[derive(Clone, Debug)]
pub struct Cleaner(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config_path: PathBuf,
    data_dir: Option<PathBuf>,
    last: Mutex<Option<Last>>,
}

/// The last run.
#[derive(Debug)]
struct Last {
    started: Instant,
    outcome: Result<(), String>,
}

/// What one run did.
#[derive(Debug)]
pub struct Cleaned {
    /// What was done below containerd's configuration directory.
    pub hosts: Report,
    /// The identity's file, if there was one.
    pub identity: Option<PathBuf>,
}

/// Why a node is not clean. What had been done until then stays done, and another run goes on.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// containerd's configuration could not be taken back.
    #[error(transparent)]
    Hosts(#[from] HostsError),
    /// The identity could not be removed.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

// === impl Cleaner ===

impl Cleaner {
    /// A cleaner of containerd's `config_path`, and of the directory that held the node's identity.
    pub fn new(config_path: PathBuf, data_dir: Option<PathBuf>) -> Self {
        Self(Arc::new(Inner { config_path, data_dir, last: Mutex::new(None) }))
    }

    /// Does the work once. Blocks on the disk.
    ///
    /// # Errors
    /// [`CleanupError`]; files and directories that are not there are none.
    pub fn clean(&self) -> Result<Cleaned, CleanupError> {
        let hosts = hosts::remove(&self.0.config_path)?;
        let identity = self.0.data_dir.as_deref().map(Identity::forget).transpose()?.flatten();
        Ok(Cleaned { hosts, identity })
    }

    /// Answers a probe: 200 once a run that began after the question has found or made the node clean, 503 with the reason
    /// else. `told` is called with what each run did.
    pub async fn answer(&self, method: &Method, path: &str, told: fn(&Cleaned)) -> (StatusCode, String) {
        if !PATHS.contains(&path) {
            return (StatusCode::NOT_FOUND, format!("not found; ask {}\n", PATHS[0]));
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            return (StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n".to_owned());
        }
        match self.clean_now(told).await {
            Ok(()) => (StatusCode::OK, "clean\n".to_owned()),
            Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        }
    }

    /// The outcome of a run that begins now or later. Any number of callers at once cost two runs at most.
    ///
    /// # Errors
    /// Why the node is not clean, which has been logged.
    pub async fn clean_now(&self, told: fn(&Cleaned)) -> Result<(), String> {
        let asked = Instant::now();
        let mut last = self.0.last.lock().await;
        if let Some(last) = last.as_ref().filter(|last| last.started >= asked) {
            return last.outcome.clone();
        }
        let (cleaner, started) = (self.clone(), Instant::now());
        let run = tokio::task::spawn_blocking(move || cleaner.clean()).await;
        let outcome = match run {
            Ok(Ok(cleaned)) => {
                told(&cleaned);
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the cleanup itself failed: this is a defect of spegel".to_owned()),
        };
        if let Err(reason) = &outcome
            && last.as_ref().is_none_or(|last| last.outcome.as_ref() != Err(reason))
        {
            tracing::error!(reason, "this node is not clean; the next probe tries again");
        }
        *last = Some(Last { started, outcome: outcome.clone() });
        outcome
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    async fn ask(cleaner: &Cleaner, path: &str) -> StatusCode {
        cleaner.answer(&Method::GET, path, |_| {}).await.0
    }

    fn mirror(root: &std::path::Path) {
        let configuration = hosts::Configuration {
            config_path: root.to_owned(),
            mirrored_registries: Vec::new(),
            mirror_targets: vec!["http://127.0.0.1:30020".parse().unwrap()],
            resolve_tags: true,
            prepend_existing: false,
            basic_auth: None,
            node_name: "node-1".to_owned(),
        };
        hosts::write(&configuration).unwrap();
    }

    #[tokio::test]
    async fn each_answer_means_clean_now_whoever_wrote_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let (certs, data) = (dir.path().join("certs.d"), dir.path().join("data"));
        let cleaner = Cleaner::new(certs.clone(), Some(data.clone()));
        for _ in 0..2 {
            mirror(&certs);
            Identity::load_or_create(&data).unwrap();
            assert!(certs.join("_default/hosts.toml").exists());
            assert_eq!(ask(&cleaner, "/readyz").await, StatusCode::OK);
            assert!(!certs.exists() && !data.exists());
        }
    }

    #[tokio::test]
    async fn what_cannot_be_done_is_no_good_answer_and_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        // A directory in the key's place cannot be removed as a file.
        std::fs::create_dir_all(data.join("private.key")).unwrap();
        let cleaner = Cleaner::new(dir.path().join("certs.d"), Some(data.clone()));
        let (status, reason) = cleaner.answer(&Method::GET, "/readyz", |_| {}).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(reason.contains("private.key"), "{reason}");
        std::fs::remove_dir(data.join("private.key")).unwrap();
        assert_eq!(ask(&cleaner, "/readyz").await, StatusCode::OK);
    }

    #[tokio::test]
    async fn other_paths_and_methods_do_nothing() {
        let dir = tempfile::tempdir().unwrap();
        mirror(dir.path());
        let cleaner = Cleaner::new(dir.path().to_owned(), None);
        assert_eq!(ask(&cleaner, "/").await, StatusCode::NOT_FOUND);
        assert_eq!(cleaner.answer(&Method::POST, "/readyz", |_| {}).await.0, StatusCode::METHOD_NOT_ALLOWED);
        assert!(dir.path().join("_default/hosts.toml").exists());
    }
}
