//! The certificates of the HTTP bootstrap endpoint: `ca.crt`, `tls.crt` and `tls.key` of a directory, each optional.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Where the system's own authorities lie: Debian's and Alpine's place, which the image has too, and Red Hat's.
const SYSTEM_ROOTS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct CertificateError {
    path: PathBuf,
    reason: String,
}

/// A directory of certificates. It is read anew for each connection, so that they may be replaced.
#[derive(Clone, Debug)]
pub struct Certificates {
    dir: PathBuf,
}

// === impl Certificates ===

impl Certificates {
    /// The certificates of a directory.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// For the serving side; nothing if there is neither certificate nor key. With `ca.crt` clients must have a certificate of
    /// that authority.
    pub(super) fn server(&self) -> Result<Option<ServerConfig>, CertificateError> {
        let Some((chain, key)) = self.pair()? else {
            // A directory that holds an authority only would seem to ask for certificates and would not.
            return match self.read("ca.crt")? {
                Some(_) => Err(self.wrong("tls.crt", "it is missing, and ca.crt alone cannot protect the endpoint")),
                None => Ok(None),
            };
        };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| self.wrong("tls.crt", error))?;
        let config = match self.read("ca.crt")? {
            Some(pem) => {
                let roots = Arc::new(self.roots("ca.crt", &pem)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
                config.with_client_cert_verifier(verifier.map_err(|error| self.wrong("ca.crt", error))?)
            }
            None => config.with_no_client_auth(),
        };
        config.with_single_cert(chain, key).map(Some).map_err(|error| self.wrong("tls.crt", error))
    }

    /// For the asking side: trusts `ca.crt`, else the system's authorities, and shows `tls.crt` if there is one.
    pub(super) fn client(dir: Option<&Self>) -> Result<ClientConfig, CertificateError> {
        let here = || dir.cloned().unwrap_or_else(|| Self::new(Path::new("/")));
        let roots = match dir.map(|dir| dir.read("ca.crt")).transpose()?.flatten() {
            Some(pem) => here().roots("ca.crt", &pem)?,
            None => system_roots(),
        };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| here().wrong("tls.crt", error))?
            .with_root_certificates(roots);
        match dir.map(Self::pair).transpose()?.flatten() {
            Some((chain, key)) => {
                config.with_client_auth_cert(chain, key).map_err(|error| here().wrong("tls.crt", error))
            }
            None => Ok(config.with_no_client_auth()),
        }
    }

    fn pair(&self) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, CertificateError> {
        match (self.read("tls.crt")?, self.read("tls.key")?) {
            (Some(chain), Some(key)) => {
                let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&chain).collect();
                let chain = chain.map_err(|error| self.wrong("tls.crt", error))?;
                let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| self.wrong("tls.key", error))?;
                Ok(Some((chain, key)))
            }
            (None, None) => Ok(None),
            (Some(_), None) => Err(self.wrong("tls.key", "it is missing, and tls.crt is there")),
            (None, Some(_)) => Err(self.wrong("tls.crt", "it is missing, and tls.key is there")),
        }
    }

    fn roots(&self, name: &str, pem: &[u8]) -> Result<RootCertStore, CertificateError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| self.wrong(name, error))?;
            roots.add(certificate).map_err(|error| self.wrong(name, error))?;
        }
        if roots.is_empty() { Err(self.wrong(name, "there is no certificate in it")) } else { Ok(roots) }
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, CertificateError> {
        match std::fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.wrong(name, error)),
        }
    }

    fn wrong(&self, name: &str, reason: impl ToString) -> CertificateError {
        CertificateError { path: self.dir.join(name), reason: reason.to_string() }
    }
}

/// What cannot be read is left out: whoever it would have vouched for is then not trusted.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    if let Some(pem) = SYSTEM_ROOTS.iter().find_map(|path| std::fs::read(path).ok()) {
        roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok));
    }
    roots
}
