//! Who may look: somebody on this node, by a name that is this node's.
//!
//! Addresses of peers and names of images are nobody's business but of who is on this node already. A connection with both ends at one
//! address, or from loopback, never left it; `kubectl port-forward` and `ssh -L` end in such a one. A page of somebody else's in a browser on
//! the node could come from there too: it is kept out by the name in `Host`, which no domain that was pointed at this address can fake, and
//! by what browsers say of where a request is from.

use std::net::IpAddr;

use axum::extract::{ConnectInfo, Request};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Ends;

/// Scripts and styles are files of ours; nothing else is loaded, from anywhere, and nobody frames it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 6] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::CACHE_CONTROL, "no-store"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// Answers who may look, and tells everybody else why not.
pub(super) async fn same_node(ConnectInfo(ends): ConnectInfo<Ends>, request: Request, next: Next) -> Response {
    let mut response = match refusal(ends, request.uri(), request.headers()) {
        Some(why) => (StatusCode::FORBIDDEN, why).into_response(),
        None => next.run(request).await,
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn refusal(Ends { local, remote }: Ends, uri: &Uri, headers: &HeaderMap) -> Option<&'static str> {
    if !remote.is_loopback() && remote != local {
        return Some("ask from this node itself: `spegel peers`, or a browser through `kubectl port-forward`\n");
    }
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("?"));
    let named = host.into_iter().chain(uri.authority().map(Authority::as_str));
    if !named.into_iter().all(is_this_node) {
        return Some("ask by an address, or as localhost: no other name is taken for this node's\n");
    }
    None
}

/// `localhost` or an address, with or without a port.
fn is_this_node(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(inside) => inside.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()),
    }
}

/// Whether a page of somebody else's made a browser ask. Browsers say so; what is none says nothing.
pub(super) fn is_from_elsewhere(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    site.is_some_and(|site| site != b"same-origin" && site != b"none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_name_this_node() {
        for name in ["localhost", "LOCALHOST:9090", "127.0.0.1:9090", "10.0.0.7", "[::1]:9090", "[fd00::1]"] {
            assert!(is_this_node(name), "{name}");
        }
        for name in [
            "evil.test",
            "evil.test:9090",
            "localhost.evil.test",
            "",
            ":9090",
            "127.0.0.1.evil.test",
            "?",
            "[x]",
            "a@localhost",
        ] {
            assert!(!is_this_node(name), "{name}");
        }
    }
}
