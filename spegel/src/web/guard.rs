//! Who may look: somebody on this node, by a name that is this node's.
//!
//! Addresses of peers and names of images are nobody's business but of who is on this node already. A connection with both ends at one
//! address, or from loopback, never left it; `kubectl port-forward` and `ssh -L` end in such a one. A page of somebody else's in a browser on
//! the node could come from there too: it reads nothing, by the name in `Host`, which no domain that was pointed at this address can fake,
//! and makes this node do nothing, by what browsers say of where a request is from.

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
    // With `no-referrer` a browser calls our own form's origin `null`, as it does that of others.
    (header::REFERRER_POLICY, "same-origin"),
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

/// Why what asks may not make this node do something, if it may not.
///
/// Browsers say where a request is from by `Sec-Fetch-Site`, but only to https and to loopback; to plain http at another address by `Origin` if it
/// is a POST, and by `Referer` unless the page that asks keeps that back. So a browser that says nothing may be sent by anybody's page. What is
/// no browser says nothing either, and nobody's page sends it.
pub(super) fn refuses_to_act(headers: &HeaderMap) -> Option<&'static str> {
    const ELSEWHERE: &str = "a page of another site may not make this node do anything\n";
    const UNTOLD: &str = "this browser does not say which page sends it: use http://localhost, or curl\n";
    let text = |name: &HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let site = text(&HeaderName::from_static("sec-fetch-site"));
    if site.is_some_and(|site| site != "same-origin" && site != "none") {
        return Some(ELSEWHERE);
    }
    let host = text(&header::HOST).unwrap_or_default();
    let pages = [text(&header::ORIGIN), text(&header::REFERER)];
    if pages.into_iter().flatten().any(|page| !authority_of(page).eq_ignore_ascii_case(host)) {
        return Some(ELSEWHERE);
    }
    let is_browser = text(&header::USER_AGENT).is_some_and(|agent| agent.contains("Mozilla/"));
    let is_told = site.is_some() || pages.into_iter().any(|page| page.is_some());
    (is_browser && !is_told).then_some(UNTOLD)
}

/// Host and port of an URL; nothing of what is none, such as `null`.
fn authority_of(url: &str) -> &str {
    url.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default()
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

    #[test]
    fn what_acts_is_no_browser_or_a_page_of_ours() {
        let refused = |said: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::from_iter([(header::HOST, HeaderValue::from_static("10.0.0.7:9090"))]);
            headers.extend(
                said.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))),
            );
            refuses_to_act(&headers).is_some()
        };
        let browser = ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36");
        for good in [
            &[][..],
            &[("user-agent", "curl/8.14.1")],
            &[("user-agent", "Go-http-client/1.1")],
            &[browser, ("sec-fetch-site", "same-origin")],
            &[browser, ("sec-fetch-site", "none")],
            &[browser, ("origin", "http://10.0.0.7:9090")],
            &[browser, ("referer", "http://10.0.0.7:9090/debug/web/try")],
        ] {
            assert!(!refused(good), "{good:?}");
        }
        for bad in [
            &[browser][..],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[browser, ("origin", "null")],
            &[browser, ("origin", "http://10.0.0.7:8080")],
            &[browser, ("origin", "http://10.0.0.7")],
            &[browser, ("origin", "http://evil.test")],
            &[("referer", "http://evil.test/?http://10.0.0.7:9090/")],
            &[browser, ("origin", "http://10.0.0.7:9090"), ("referer", "http://10.0.0.7:9090@evil.test/")],
        ] {
            assert!(refused(bad), "{bad:?}");
        }
    }
}
