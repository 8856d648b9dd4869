//! A small fake of what spegel asks the Kubernetes API, over TLS as the real one.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use std::{fs, thread};

use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};

const TOKEN: &str = "a-token-of-the-service-account";

/// What the cluster is like.
#[derive(Default)]
pub(crate) struct State {
    /// Whether the DaemonSet's controller has seen it.
    pub(crate) observed: bool,
    /// When the DaemonSet was made (RFC 3339).
    pub(crate) made: Option<&'static str>,
    /// Nodes that need a pod.
    pub(crate) desired: usize,
    /// The cleanup's pods.
    pub(crate) pods: Vec<Value>,
    /// The mirror's pods.
    pub(crate) mirror: Vec<Value>,
    /// A node, under its name.
    pub(crate) node: Value,
    /// How many requests are still refused.
    pub(crate) refuse: usize,
    /// What somebody else adds to the node's taints as soon as it was read.
    pub(crate) add_taint: Option<Value>,
    /// What was asked.
    pub(crate) asked: Vec<String>,
}

/// The fake, served until the test ends.
pub(crate) struct FakeApi {
    address: SocketAddr,
    service_account: PathBuf,
    state: Arc<Mutex<State>>,
}

impl FakeApi {
    /// Starts it on an address, with a service account's files in `dir`.
    pub(crate) fn start(dir: &Path, address: Ipv4Addr) -> Self {
        let authority = rcgen::generate_simple_self_signed(vec![address.to_string()]).unwrap();
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
        let listener = TcpListener::bind((address, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, state) = (Arc::clone(&config), Arc::clone(&served));
                // A client that goes away is its own matter.
                thread::spawn(move || answer(stream, config, &state).ok());
            }
        });
        Self { address, service_account, state }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The flags that lead to it.
    pub(crate) fn flags(&self) -> Vec<String> {
        vec![
            format!("--kubernetes-service-host={}", self.address.ip()),
            format!("--kubernetes-service-port={}", self.address.port()),
            format!("--service-account-dir={}", self.service_account.display()),
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
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, body) = if head.contains(&format!("authorization: Bearer {TOKEN}\r\n")) {
        let mut state = state.lock().unwrap();
        state.asked.push(format!("{method} {path}"));
        let is_patch = head.contains("content-type: application/json-patch+json\r\n");
        match method {
            _ if state.refuse > 0 => {
                state.refuse -= 1;
                ("503 Service Unavailable", json!({ "kind": "Status", "message": "etcd has no leader" }))
            }
            "PATCH" if is_patch && path == node_path(&state) => patch(&mut state.node, &serde_json::from_slice(&body)?),
            "GET" if path == node_path(&state) => {
                let node = state.node.clone();
                let added = state.add_taint.take();
                if let (Some(taints), Some(added)) = (state.node["spec"]["taints"].as_array_mut(), added) {
                    taints.push(added);
                }
                ("200 OK", node)
            }
            "GET" => look_up(&state, path),
            _ => forbidden(),
        }
    } else {
        ("401 Unauthorized", json!({ "kind": "Status", "message": "Unauthorized" }))
    };
    let body = body.to_string();
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ndate: Tue, 01 Jan 2030 02:00:00 GMT\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )?;
    stream.conn.send_close_notify();
    stream.flush()
}

fn look_up(state: &State, path: &str) -> (&'static str, Value) {
    match path {
        "/apis/apps/v1/namespaces/spegel-system/daemonsets/spegel-cleanup" => {
            let set = json!({
                "metadata": { "name": "spegel-cleanup", "generation": 1, "creationTimestamp": state.made },
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
        _ => forbidden(),
    }
}

fn forbidden() -> (&'static str, Value) {
    ("403 Forbidden", json!({ "kind": "Status", "message": "this service account may not do that" }))
}

fn node_path(state: &State) -> String {
    format!("/api/v1/nodes/{}", state.node["metadata"]["name"].as_str().unwrap_or("-"))
}

/// Tests and replaces, as RFC 6902 says; the status of a failed test is the API server's.
fn patch(node: &mut Value, changes: &Value) -> (&'static str, Value) {
    let mut patched = node.clone();
    for change in changes.as_array().into_iter().flatten() {
        let place = patched.pointer_mut(change["path"].as_str().unwrap_or("-"));
        match (change["op"].as_str(), place) {
            (Some("test"), Some(place)) if *place == change["value"] => {}
            (Some("replace"), Some(place)) => *place = change["value"].clone(),
            _ => return ("422 Unprocessable Entity", json!({ "kind": "Status", "message": "the test failed" })),
        }
    }
    *node = patched;
    ("200 OK", node.clone())
}
