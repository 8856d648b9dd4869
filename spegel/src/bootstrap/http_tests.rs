#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::Path;

use rcgen::{CertificateParams, IsCa, KeyPair};

use super::super::BootstrapAddress;
use super::*;

fn us() -> Vec<BootstrapPeer> {
    let at = BootstrapAddress { ip: [10, 0, 0, 1].into(), port: Some(5001) };
    vec![BootstrapPeer { id: Some("12D3Koo".into()), addresses: vec![at] }]
}

fn serve(certificates: Option<Certificates>) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let endpoint = HttpEndpoint::new(listener, certificates, Arc::new(us)).unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(endpoint.serve(stop.clone()));
    (address, stop)
}

struct Authority {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self { certificate: params.self_signed(&key).unwrap(), key }
    }

    /// A directory with all three files.
    fn directory(&self) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.certificate, &self.key).unwrap();
        std::fs::write(dir.path().join("ca.crt"), self.certificate.pem()).unwrap();
        std::fs::write(dir.path().join("tls.crt"), certificate.pem()).unwrap();
        std::fs::write(dir.path().join("tls.key"), key.serialize_pem()).unwrap();
        dir
    }
}

async fn ask(url: String, dir: Option<&Path>) -> Result<Vec<BootstrapPeer>, BootstrapError> {
    HttpBootstrap::new(&url, dir.map(Certificates::new)).unwrap().peers().await
}

#[tokio::test]
async fn the_endpoint_names_its_node() {
    let (address, _stop) = serve(None);
    assert_eq!(ask(format!("http://{address}/id"), None).await.unwrap(), us());
    let error = ask(format!("http://{address}/other"), None).await.unwrap_err();
    assert!(error.to_string().contains("404"), "{error}");
}

#[tokio::test]
async fn with_certificates_only_their_bearers_are_served() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    let server = ours.directory();
    let (address, _stop) = serve(Some(Certificates::new(server.path())));
    let url = || format!("https://{address}/id");
    let client = ours.directory();
    assert_eq!(ask(url(), Some(client.path())).await.unwrap(), us());

    std::fs::remove_file(client.path().join("tls.crt")).unwrap();
    std::fs::remove_file(client.path().join("tls.key")).unwrap();
    ask(url(), Some(client.path())).await.unwrap_err();
    ask(url(), Some(foreign.directory().path())).await.unwrap_err();
    ask(format!("http://{address}/id"), Some(server.path())).await.unwrap_err();
}

#[tokio::test]
async fn replaced_certificates_are_used_without_a_restart() {
    let (old, new) = (Authority::new(), Authority::new());
    let server = old.directory();
    let (address, _stop) = serve(Some(Certificates::new(server.path())));
    let client = new.directory();
    ask(format!("https://{address}/id"), Some(client.path())).await.unwrap_err();
    for name in ["ca.crt", "tls.crt", "tls.key"] {
        std::fs::copy(client.path().join(name), server.path().join(name)).unwrap();
    }
    assert_eq!(ask(format!("https://{address}/id"), Some(client.path())).await.unwrap(), us());
}

#[tokio::test]
async fn a_half_set_of_certificates_is_refused_by_name() {
    let dir = Authority::new().directory();
    std::fs::remove_file(dir.path().join("tls.key")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = HttpEndpoint::new(listener, Some(Certificates::new(dir.path())), Arc::new(us)).unwrap_err();
    assert!(error.to_string().contains("tls.key"), "{error}");
    std::fs::remove_file(dir.path().join("tls.crt")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = HttpEndpoint::new(listener, Some(Certificates::new(dir.path())), Arc::new(us)).unwrap_err();
    assert!(error.to_string().contains("ca.crt alone"), "{error}");
}

#[tokio::test]
async fn a_list_that_is_none_is_no_answer() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 1024]).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await.unwrap();
    });
    let error = ask(format!("http://{address}/id"), None).await.unwrap_err();
    assert!(matches!(error, BootstrapError::Answer { .. }), "{error}");
}

#[test]
fn urls_of_other_schemes_are_refused() {
    for wrong in ["ftp://a/id", "a:5002", "/id", "http://"] {
        assert!(HttpBootstrap::new(wrong, None).is_err(), "{wrong}");
    }
}
