//! What a containerd says of itself, for the checks of a node.

use std::path::{Path, PathBuf};

use super::rpc::Rpc;
use crate::oci::Digest;
use crate::store::StoreError;

/// How many of a namespace's smallest blobs are named.
const SAMPLE: usize = 8;

/// What a containerd says of itself.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// Its version, such as `v2.2.7`.
    pub version: String,
    /// Its content directory as it sees it, where it tells that.
    pub content_path: Option<PathBuf>,
    /// Its CRI, by which Kubernetes pulls; none where it tells nothing about its plugins.
    pub cri: Option<Cri>,
    /// Its namespaces.
    pub namespaces: Vec<String>,
    /// How many images our namespace has.
    pub images: usize,
    /// Its smallest blobs with their sizes in bytes.
    pub blobs: Vec<(Digest, u64)>,
}

/// Whether containerd serves the CRI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cri {
    /// It does.
    Loaded,
    /// It could not be loaded, and why.
    Failed(String),
    /// It is not there: the configuration disables it, or it was not built in.
    Absent,
}

/// Asks the containerd at `socket`.
///
/// # Errors
/// It does not answer, or not as containerd does.
pub async fn inspect(socket: &Path, namespace: &str) -> Result<Inspection, StoreError> {
    let rpc = Rpc::connect(socket, namespace).await?;
    let mut blobs = rpc.sizes().await?;
    blobs.sort_by_key(|(_, size)| *size);
    blobs.truncate(SAMPLE);
    Ok(Inspection {
        version: rpc.version().await?,
        content_path: rpc.content_path().await.ok(),
        cri: rpc.cri().await.ok(),
        namespaces: rpc.namespaces().await?,
        images: rpc.images().await?.len(),
        blobs,
    })
}
