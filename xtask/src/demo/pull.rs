//! A pull as containerd does it: HEAD of the tag, then everything beneath its digest, three layers at a time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use indicatif::ProgressBar;
use serde_json::Value;
use spegel_benches::http::Client;
use spegel_benches::image::{Image, digest_of};

use super::LIMIT;
use super::table::Pulled;

/// containerd's default for `max_concurrent_downloads`.
const CONCURRENT: usize = 3;

/// The response header that says where a mirror had content from.
const SOURCE: &str = "x-spegel-source";

/// One node's client: its mirror, and the layout that it stores into.
pub(super) struct Puller<'a> {
    pub(super) node: String,
    /// `http://host:port` of the node's own mirror.
    pub(super) mirror: String,
    pub(super) layout: &'a Path,
    pub(super) image: &'a Image,
    pub(super) bar: ProgressBar,
}

struct State {
    bytes: u64,
    sources: BTreeMap<String, u64>,
    queue: Vec<(String, u64)>,
}

impl Puller<'_> {
    /// Pulls the image for every platform and verifies each digest.
    ///
    /// # Errors
    /// An answer that is not 200, or content that is not what its digest says.
    pub(super) fn pull(&self) -> Result<Pulled> {
        fs::create_dir_all(self.layout.join("blobs/sha256"))?;
        let start = Instant::now();
        let client = Client::new(LIMIT);
        let tag = self.url("manifests", self.image.tag());
        let head = client.head(&tag, &[])?;
        ensure!(head.status == 200, "HEAD {tag}: {}", head.status);
        let root = head.header("docker-content-digest").context("the mirror resolved the tag to nothing")?.to_owned();
        ensure!(root == self.image.root().digest, "the tag stands for {root}, not for {}", self.image.root().digest);
        let state = Mutex::new(State { bytes: 0, sources: BTreeMap::new(), queue: Vec::new() });
        self.walk(&client, &root, &state)?;
        thread::scope(|scope| {
            let workers: Vec<_> = (0..CONCURRENT).map(|_| scope.spawn(|| self.blobs(&client, &state))).collect();
            workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a download panicked")))
        })?;
        let time = start.elapsed();
        let state = state.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        ensure!(state.bytes == self.image.size(), "{} bytes were pulled of {}", state.bytes, self.image.size());
        self.bar.finish();
        Ok(Pulled { node: self.node.clone(), bytes: state.bytes, time, sources: state.sources })
    }

    /// Fetches a manifest or index and what it names; blobs are queued.
    fn walk(&self, client: &Client, digest: &str, state: &Mutex<State>) -> Result<()> {
        let url = self.url("manifests", digest);
        let answer = client.get(&url, &[])?;
        ensure!(answer.head.status == 200, "GET {url}: {} {}", answer.head.status, answer.text());
        ensure!(digest_of(&answer.body) == digest, "GET {url}: the content is not what the digest says");
        fs::write(self.blob(digest), &answer.body)?;
        self.account(state, answer.head.header(SOURCE), answer.body.len() as u64);
        let document: Value = serde_json::from_slice(&answer.body)?;
        for child in document["manifests"].as_array().into_iter().flatten() {
            self.walk(client, child["digest"].as_str().context("an index names a manifest without a digest")?, state)?;
        }
        let blobs = document["layers"].as_array().into_iter().flatten().chain(document.get("config"));
        let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for blob in blobs {
            let digest = blob["digest"].as_str().context("a manifest names a blob without a digest")?;
            state.queue.push((digest.to_owned(), blob["size"].as_u64().unwrap_or(0)));
        }
        Ok(())
    }

    fn blobs(&self, client: &Client, state: &Mutex<State>) -> Result<()> {
        loop {
            let next = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).queue.pop();
            let Some((digest, size)) = next else { return Ok(()) };
            let url = self.url("blobs", &digest);
            let part = self.blob(&digest).with_extension("part");
            let mut file = File::create(&part)?;
            let (head, found, length) = client.download(&url, |piece| {
                self.bar.inc(piece.len() as u64);
                file.write_all(piece)
            })?;
            ensure!(head.status == 200, "GET {url}: {}", head.status);
            ensure!(found == digest && length == size, "GET {url}: {length} bytes of {size} that are {found}");
            fs::rename(&part, self.blob(&digest))?;
            self.account(state, head.header(SOURCE), length);
        }
    }

    fn account(&self, state: &Mutex<State>, source: Option<&str>, bytes: u64) {
        let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.bytes += bytes;
        let source = match source {
            Some("local") => "itself",
            // What it fetched from a peer for the request before, and verified.
            Some("ready") => "its memory",
            Some(source) => source,
            None => "unknown",
        };
        *state.sources.entry(source.to_owned()).or_default() += bytes;
    }

    fn url(&self, kind: &str, name: &str) -> String {
        format!("{}/v2/{}/{kind}/{name}?ns={}", self.mirror, self.image.repository(), self.image.registry())
    }

    fn blob(&self, digest: &str) -> std::path::PathBuf {
        self.layout.join("blobs").join(digest.replacen(':', "/", 1))
    }
}
