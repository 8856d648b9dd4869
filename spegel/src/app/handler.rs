//! The registry as the handler of served connections.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use futures::future::BoxFuture;
use http::request::Parts;
use http::{Request, Response};
use hyper::body::Incoming;

use crate::registry::{Prompt, Registry};
use crate::serve::{Handler, Head, Quick, RemoteAddr};
use crate::zerocopy::Body;

struct Served(Arc<Registry>);

impl Handler for Served {
    fn handle(&self, request: Request<Incoming>) -> BoxFuture<'static, Response<Body>> {
        let registry = Arc::clone(&self.0);
        Box::pin(async move {
            let (parts, _body) = request.into_parts();
            registry.handle(&parts, remote_of(&parts)).await
        })
    }

    fn quick(&self, request: &Head<'_>, remote: SocketAddr) -> Option<Quick> {
        let headers = request.headers.iter().map(|header| (header.name, header.value));
        let Prompt { head, body, end } = self.0.prompt(request.is_head, request.target, headers, remote.ip())?;
        Some(Quick { head, body, end })
    }

    fn refuse(&self, request: Request<Incoming>) -> BoxFuture<'static, Response<Body>> {
        let registry = Arc::clone(&self.0);
        Box::pin(async move {
            let (parts, _body) = request.into_parts();
            registry.turn_away(&parts, remote_of(&parts)).await
        })
    }
}

fn remote_of(parts: &Parts) -> IpAddr {
    parts.extensions.get::<RemoteAddr>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |addr| addr.0.ip())
}

pub(super) fn over(registry: Arc<Registry>) -> Arc<dyn Handler> {
    Arc::new(Served(registry))
}
