//! Who this node is in the network: an Ed25519 key, kept in a file where there is a data directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, KeypairBytes};
use libp2p::identity::Keypair;

use crate::bootstrap::RememberedPeers;

/// The name of the key's file within the data directory.
const FILE: &str = "private.key";

/// Far more than a PEM key of this kind has: a larger file is something else.
const MAX_FILE: u64 = 16 * 1024;

/// A node's identity.
#[derive(Clone)]
pub struct Identity(pub(super) Keypair);

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file or its directory cannot be read or written.
    #[error("cannot {action} {path}: {source}; the data directory must be writable for spegel")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is there and is not an Ed25519 key in PKCS#8 PEM. It is never overwritten.
    #[error("{path} is not an Ed25519 private key in PKCS#8 PEM ({reason}); remove it to have a new identity made")]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

// === impl Identity ===

impl Identity {
    /// An identity that nobody has had before and that is forgotten with the process.
    pub fn fresh() -> Self {
        Self(Keypair::generate_ed25519())
    }

    /// The identity kept in `private.key` of this directory, made and written there (mode 0600) if there is none.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, IdentityError> {
        let path = data_dir.join(FILE);
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io { action, path, source }
        };
        match read(&path) {
            Ok(text) => return Self::parse(&path, &text),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("read", &path)(error)),
        }
        fs::create_dir_all(data_dir).map_err(failed("create", data_dir))?;
        let key = SigningKey::from_bytes(&rand::random());
        write(&path, &encode(&path, &key)?).map_err(failed("write", &path))?;
        // What is on disk counts, so that two processes that start at once agree on one identity.
        let text = read(&path).map_err(failed("read", &path))?;
        Self::parse(&path, &text)
    }

    /// Removes what [`load_or_create`](Self::load_or_create) keeps in this directory, the peers that are remembered beside it, and the
    /// directory if nothing else is in it. Returns the removed file, nothing if there was none.
    pub fn forget(data_dir: &Path) -> Result<Option<PathBuf>, IdentityError> {
        let path = data_dir.join(FILE);
        let removed = match fs::remove_file(&path) {
            Ok(()) => Some(path),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => None,
            Err(source) => return Err(IdentityError::Io { action: "remove", path, source }),
        };
        RememberedPeers::forget(data_dir).map_err(|source| IdentityError::Io {
            action: "remove the peers remembered in",
            path: data_dir.to_owned(),
            source,
        })?;
        for entry in fs::read_dir(data_dir).into_iter().flatten().flatten() {
            // Of a write that was interrupted.
            let name = entry.file_name();
            let part = name.to_str().and_then(|name| name.strip_prefix(FILE)?.strip_prefix('.'));
            if part.is_some_and(|process| process.bytes().all(|b| b.is_ascii_digit())) {
                let _ = fs::remove_file(entry.path());
            }
        }
        // It may hold other things, or be a mount point.
        let _ = fs::remove_dir(data_dir);
        Ok(removed)
    }

    /// An identity in the form that its file has.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, IdentityError> {
        let wrong = |reason: String| IdentityError::NotAKey { path: path.to_owned(), reason };
        let key = SigningKey::from_pkcs8_pem(text).map_err(|error| wrong(error.to_string()))?;
        Keypair::ed25519_from_bytes(key.to_bytes()).map(Identity).map_err(|error| wrong(error.to_string()))
    }

    /// The form that its file has.
    pub(super) fn to_pem(&self) -> Result<String, IdentityError> {
        let path = Path::new(FILE);
        let wrong = |reason: String| IdentityError::NotAKey { path: path.to_owned(), reason };
        let secret = self.0.clone().try_into_ed25519().map_err(|error| wrong(error.to_string()))?;
        let secret: [u8; 32] = secret.secret().as_ref().try_into().map_err(|_| wrong("its length".to_owned()))?;
        encode(path, &SigningKey::from_bytes(&secret))
    }

    /// The identity's text form, as peers know it.
    pub fn peer_id(&self) -> String {
        self.0.public().to_peer_id().to_base58()
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.peer_id()).finish()
    }
}

fn read(path: &Path) -> io::Result<String> {
    use io::Read;
    let mut text = String::new();
    let read = File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    if read as u64 == MAX_FILE {
        return Err(io::Error::new(ErrorKind::InvalidData, "the file is too large to be a key"));
    }
    Ok(text)
}

/// Without the public half, which is the form that every reader of PKCS#8 accepts.
fn encode(path: &Path, key: &SigningKey) -> Result<String, IdentityError> {
    let bytes = KeypairBytes { secret_key: key.to_bytes(), public_key: None };
    let pem = bytes
        .to_pkcs8_pem(LineEnding::LF)
        .map_err(|error| IdentityError::NotAKey { path: path.to_owned(), reason: error.to_string() })?;
    Ok(pem.to_string())
}

/// Complete or not there at all, and an existing key is never replaced.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension(format!("key.{}", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    let linked = match fs::hard_link(&beside, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    let removed = fs::remove_file(&beside);
    linked.and(removed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn identity_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let first = Identity::load_or_create(&data).unwrap();
        let second = Identity::load_or_create(&data).unwrap();
        assert_eq!(first.peer_id(), second.peer_id());
        let file = data.join(FILE);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(fs::read_to_string(&file).unwrap().starts_with("-----BEGIN PRIVATE KEY-----\n"));
        assert_eq!(fs::read_dir(&data).unwrap().count(), 1, "nothing else is left there");
        assert_ne!(Identity::fresh().peer_id(), first.peer_id());
    }

    /// The secret key of RFC 8032's first test vector in the form that Go's x509 package and OpenSSL write.
    #[test]
    fn key_of_another_program_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n-----END PRIVATE KEY-----\n";
        fs::write(dir.path().join(FILE), pem).unwrap();
        let public = hex::decode("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a").unwrap();
        let public = libp2p::identity::ed25519::PublicKey::try_from_bytes(&public).unwrap();
        let expected = libp2p::identity::PublicKey::from(public).to_peer_id().to_base58();
        assert_eq!(Identity::load_or_create(dir.path()).unwrap().peer_id(), expected);
    }

    #[test]
    fn wrong_file_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        fs::write(&file, "not a key").unwrap();
        let error = Identity::load_or_create(dir.path()).unwrap_err();
        assert!(matches!(error, IdentityError::NotAKey { .. }));
        assert!(error.to_string().contains("private.key"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "not a key");
    }

    #[test]
    fn forgetting_takes_the_key_and_leaves_what_others_put_there() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        assert_eq!(Identity::forget(&data).unwrap(), None);
        Identity::load_or_create(&data).unwrap();
        fs::write(data.join("private.key.17"), "half a key").unwrap();
        RememberedPeers::new(&data).remember(&[]).unwrap();
        fs::write(data.join("peers.json.part"), "[").unwrap();
        assert_eq!(Identity::forget(&data).unwrap(), Some(data.join(FILE)));
        assert!(!data.exists());
        Identity::load_or_create(&data).unwrap();
        fs::write(data.join("notes"), "an administrator's").unwrap();
        Identity::forget(&data).unwrap();
        assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
    }

    #[test]
    fn directory_in_the_files_place_is_an_error_of_reading() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(FILE)).unwrap();
        assert!(matches!(Identity::load_or_create(dir.path()), Err(IdentityError::Io { action: "read", .. })));
    }
}
