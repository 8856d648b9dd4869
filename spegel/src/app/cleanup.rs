//! `cleanup` and `cleanup-wait`: one node's part, and the wait for all.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::FutureExt as _;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, Response};
use hyper::body::Incoming;
use tracing::{info, warn};

use super::StopSignal;
use crate::cleanup::{self, ApiNodes, Cleaned, Cleaner, DnsNodes, HttpProbe, Nodes};
use crate::cli::{CleanupSettings, CleanupWaitSettings, ClusterSettings};
use crate::kube::Api;
use crate::serve::{Options, Server};
use crate::zerocopy::Body;

/// How long an answer under way may take after SIGTERM.
const DRAIN: Duration = Duration::from_secs(2);

/// Cleans this node. With an address, answers probes until it is told to stop; without, ends.
pub(super) async fn clean(settings: CleanupSettings) -> anyhow::Result<()> {
    let path = settings.config_path;
    let cleaner = Cleaner::new(path.clone(), settings.data_dir);
    let Some(addr) = settings.addr else {
        let cleaned = cleaner.clean()?;
        tell(&cleaned);
        if cleaned.hosts.is_empty() {
            let is_there = path.is_dir();
            info!(path = %path.display(), is_there, "nothing of spegel's was there: if this surprises you, look at the path");
        }
        return Ok(());
    };
    let mut stop_signal = StopSignal::listen()?;
    // What fails now is tried again for each probe.
    let _ = cleaner.clean_now(tell).await;
    let handler = move |request: Request<Incoming>| {
        let cleaner = cleaner.clone();
        async move {
            let (status, text) = cleaner.answer(request.method(), request.uri().path(), tell).await;
            let mut response = Response::new(Body::bytes(text));
            *response.status_mut() = status;
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            response
        }
        .boxed()
    };
    let server = Server::bind(&[addr], Options { runtimes: 1, ..Options::default() }, Arc::new(handler))?;
    info!(addr = ?server.addrs(), "answering probes");
    let signal = stop_signal.next().await;
    info!(signal, "stopping");
    server.shutdown(DRAIN).await;
    Ok(())
}

fn tell(cleaned: &Cleaned) {
    super::tell(&cleaned.hosts);
    if let Some(path) = &cleaned.identity {
        info!(path = %path.display(), "removed this node's identity");
    }
}

/// What a wait has in any case, however late it began: three rounds take some five seconds, and the Job ends 45 s after the deadline.
const ONE_LOOK: Duration = Duration::from_secs(10);

/// How long the API may take to say when the cleanup began.
const AGE_TIMEOUT: Duration = Duration::from_secs(3);

/// Waits until all nodes are clean. What a person must know goes to standard output, as plain text: Helm shows it.
pub(super) async fn wait(settings: CleanupWaitSettings) -> anyhow::Result<()> {
    let mut stop_signal = StopSignal::listen()?;
    let mut wait = settings.wait;
    let nodes: Box<dyn Nodes> = match settings.cluster {
        Some(cluster) => {
            let nodes = of_cluster(cluster, settings.port)?;
            // One that takes the place of a wait that was lost with its node has no more time than that one had.
            let age = tokio::time::timeout(AGE_TIMEOUT, nodes.age()).await.ok().flatten().unwrap_or_default();
            wait.deadline = wait.deadline.saturating_sub(age).max(ONE_LOOK);
            Box::new(nodes)
        }
        None => {
            warn!(
                "without --daemonset only the nodes that DNS names are waited for: one whose pod does not run is missed"
            );
            let nodes = DnsNodes::new(&settings.host, settings.port);
            Box::new(nodes)
        }
    };
    let probe = HttpProbe::new();
    let outcome = tokio::select! {
        outcome = cleanup::wait(&*nodes, &probe, wait) => outcome,
        signal = stop_signal.next() => anyhow::bail!("stopped by {signal} before all nodes were clean"),
    };
    match outcome {
        Ok(total) => {
            println!("All {total} nodes are clean: containerd asks the mirror no more.");
            Ok(())
        }
        Err(unfinished) => {
            println!("{unfinished}");
            println!("Until it is clean, containerd on such a node may ask a mirror that is gone.");
            if let Some(command) = settings.repeat_command {
                println!("When these nodes are back, repeat the cleanup with:\n  {command}");
            }
            anyhow::bail!("not all nodes were clean within {:?}", settings.wait.deadline)
        }
    }
}

fn of_cluster(cluster: ClusterSettings, port: u16) -> anyhow::Result<ApiNodes> {
    let namespace = match cluster.namespace {
        Some(namespace) => namespace,
        None => {
            let path = cluster.api.service_account.join("namespace");
            let text = fs::read_to_string(&path);
            text.with_context(|| format!("cannot read {}; give --namespace", path.display()))?.trim().to_owned()
        }
    };
    Ok(ApiNodes {
        api: Api::new(&cluster.api)?,
        namespace,
        daemon_set: cluster.daemon_set,
        mirror_selector: cluster.mirror_selector,
        port,
    })
}
