//! Peers that this node was connected to before, kept in a file of its data directory.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::{Bootstrap, BootstrapError, BootstrapPeer, list};

/// The name of the file within the data directory.
const FILE: &str = "peers.json";

/// What its name ends with while it is written.
const PART: &str = "json.part";

/// How many peers are kept: enough that one of them lives.
const MAX_KEPT: usize = 64;

/// Far more than so many peers take: a larger file is something else.
const MAX_FILE: u64 = 256 * 1024;

/// The file. That it is not there, or is damaged, only means that nobody is remembered.
#[derive(Clone, Debug)]
pub struct RememberedPeers {
    path: PathBuf,
}

// === impl RememberedPeers ===

impl RememberedPeers {
    /// The file of a data directory.
    pub fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join(FILE) }
    }

    /// Replaces what is remembered, whole or not at all.
    ///
    /// # Errors
    /// The data directory cannot be written.
    pub fn remember(&self, peers: &[BootstrapPeer]) -> io::Result<()> {
        let part = self.path.with_extension(PART);
        let mut file = File::create(&part)?;
        file.write_all(&list::encode(&peers[..peers.len().min(MAX_KEPT)]))?;
        file.sync_data()?;
        fs::rename(&part, &self.path)
    }

    /// Removes the file of a data directory, and what an interrupted write left; nothing is returned if there was none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(data_dir: &Path) -> io::Result<Option<PathBuf>> {
        let Self { path } = Self::new(data_dir);
        let mut removed = None;
        for file in [path.with_extension(PART), path] {
            match fs::remove_file(&file) {
                Ok(()) => removed = Some(file),
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Who is remembered now; nobody if that cannot be read.
    pub fn known(&self) -> Vec<BootstrapPeer> {
        self.read().unwrap_or_default()
    }

    fn read(&self) -> io::Result<Vec<BootstrapPeer>> {
        let mut bytes = Vec::new();
        File::open(&self.path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
        list::decode(&bytes).map_err(io::Error::from)
    }
}

#[async_trait]
impl Bootstrap for RememberedPeers {
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        match self.read() {
            Ok(peers) => Ok(peers),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => {
                let name = self.path.display().to_string();
                Err(BootstrapError::Answer { name, reason: error.to_string() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::BootstrapAddress;
    use super::*;

    fn peer(n: u8) -> BootstrapPeer {
        let at = BootstrapAddress { ip: [10, 0, 0, n].into(), port: Some(5001) };
        BootstrapPeer { id: Some(format!("peer-{n}")), addresses: vec![at] }
    }

    #[tokio::test]
    async fn what_is_remembered_is_read_back_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = RememberedPeers::new(dir.path());
        assert_eq!(remembered.peers().await.unwrap(), []);
        remembered.remember(&[peer(1), peer(2)]).unwrap();
        assert_eq!(remembered.peers().await.unwrap(), [peer(1), peer(2)]);
        assert_eq!(remembered.known(), [peer(1), peer(2)]);
        remembered.remember(&(0..200).map(peer).collect::<Vec<_>>()).unwrap();
        assert_eq!(remembered.peers().await.unwrap().len(), MAX_KEPT);
        assert_eq!(RememberedPeers::forget(dir.path()).unwrap(), Some(dir.path().join(FILE)));
        assert_eq!(RememberedPeers::forget(dir.path()).unwrap(), None);
    }

    #[tokio::test]
    async fn a_damaged_file_is_said_and_written_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "[{").unwrap();
        let remembered = RememberedPeers::new(dir.path());
        assert!(remembered.peers().await.unwrap_err().to_string().contains(FILE));
        remembered.remember(&[peer(3)]).unwrap();
        assert_eq!(remembered.peers().await.unwrap(), [peer(3)]);
    }
}
