//! A small fake of the questions that `cleanup-wait` asks the Kubernetes API, over TLS as the real one.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use std::{fs, thread};

use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};

const TOKEN: &str = "a-token-of-the-service-account";

/// What the cluster is like.
#[derive(Default)]
pub(super) struct State {
    /// Whether the DaemonSet's controller has seen it.
    pub(super) observed: bool,
    /// Nodes that need a pod.
    pub(super) desired: usize,
    /// The cleanup's pods.
    pub(super) pods: Vec<Value>,
    /// The mirror's pods.
    pub(super) mirror: Vec<Value>,
    /// What was asked.
    pub(super) asked: Vec<String>,
}

/// The fake, served until the test ends.
pub(super) struct FakeApi {
    port: u16,
    service_account: PathBuf,
    state: Arc<Mutex<State>>,
}

impl FakeApi {
    /// Starts it, with a service account's files in `dir`.
    pub(super) fn start(dir: &Path) -> Self {
        let authority = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let service_account = dir.join("service-account");
        fs::create_dir_all(&service_account).unwrap();
        fs::write(service_account.join("ca.crt"), authority.cert.pem()).unwrap();
        fs::write(service_account.join("token"), format!("{TOKEN}\n")).unwrap();
        fs::write(service_account.join("namespace"), "spegel-system").unwrap();
        let key = PrivateKeyDer::try_from(authority.key_pair.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![authority.cert.der().clone()], key)
            .unwrap();
        let (config, state) = (Arc::new(config), Arc::new(Mutex::new(State::default())));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, state) = (Arc::clone(&config), Arc::clone(&served));
                // A client that goes away is its own matter.
                thread::spawn(move || answer(stream, config, &state).ok());
            }
        });
        Self { port, service_account, state }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The flags that lead to it.
    pub(super) fn flags(&self) -> Vec<String> {
        vec![
            "--kubernetes-service-host=127.0.0.1".to_owned(),
            format!("--kubernetes-service-port={}", self.port),
            format!("--service-account-dir={}", self.service_account.display()),
            "--daemonset=spegel-cleanup".to_owned(),
            "--mirror-selector=app=spegel,part=mirror".to_owned(),
        ]
    }
}

fn answer(stream: TcpStream, config: Arc<rustls::ServerConfig>, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let connection = rustls::ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut stream = rustls::StreamOwned::new(connection, stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default();
    let (status, body) = if head.contains(&format!("authorization: Bearer {TOKEN}\r\n")) {
        let mut state = state.lock().unwrap();
        state.asked.push(path.to_owned());
        look_up(&state, path)
    } else {
        ("401 Unauthorized", json!({ "kind": "Status", "message": "Unauthorized" }))
    };
    let body = body.to_string();
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )?;
    stream.conn.send_close_notify();
    stream.flush()
}

fn look_up(state: &State, path: &str) -> (&'static str, Value) {
    match path {
        "/apis/apps/v1/namespaces/spegel-system/daemonsets/spegel-cleanup" => {
            let set = json!({
                "metadata": { "name": "spegel-cleanup", "generation": 1 },
                "spec": { "selector": { "matchLabels": { "app": "spegel", "part": "cleanup" } } },
                "status": { "observedGeneration": u8::from(state.observed), "desiredNumberScheduled": state.desired },
            });
            ("200 OK", set)
        }
        "/api/v1/namespaces/spegel-system/pods?resourceVersion=0&labelSelector=app%3Dspegel%2Cpart%3Dcleanup" => {
            ("200 OK", json!({ "items": state.pods }))
        }
        "/api/v1/namespaces/spegel-system/pods?resourceVersion=0&labelSelector=app%3Dspegel%2Cpart%3Dmirror" => {
            ("200 OK", json!({ "items": state.mirror }))
        }
        _ => ("403 Forbidden", json!({ "kind": "Status", "message": "this service account may not do that" })),
    }
}
