//! Whether a proxy stands between containerd and its mirror: Go's rules, by which containerd reads its environment.

use std::collections::BTreeMap;
use std::net::IpAddr;

use http::Uri;
use ipnet::IpNet;

use super::finding::Finding;

const CHECK: &str = "proxy";

/// What containerd's environment does to requests for these URLs.
pub(super) fn judge(environment: Result<&BTreeMap<String, String>, &str>, targets: &[String]) -> Finding {
    let environment = match environment {
        Ok(environment) => environment,
        Err(why) => {
            return Finding::unknown(
                CHECK,
                format!("containerd's environment cannot be seen ({why})"),
                "run doctor on the host, as root",
            );
        }
    };
    let captured = targets.iter().find_map(|target| Some((target, captured_by(environment, target)?)));
    let Some((target, (name, host))) = captured else {
        return Finding::good(CHECK, "no proxy stands between containerd and the mirror");
    };
    let said =
        format!("containerd sends what it asks {target} to the proxy of its {name}: NO_PROXY does not name {host}");
    let change = format!(
        "add {host} to NO_PROXY in containerd's environment (for systemd: `systemctl edit containerd`), and restart containerd"
    );
    Finding::failure(CHECK, said, change)
}

/// The variable by which a URL goes to a proxy, and the URL's host.
fn captured_by(environment: &BTreeMap<String, String>, url: &str) -> Option<(&'static str, String)> {
    let url: Uri = url.parse().ok()?;
    let names =
        if url.scheme_str() == Some("https") { ["HTTPS_PROXY", "https_proxy"] } else { ["HTTP_PROXY", "http_proxy"] };
    let set = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let name = names.into_iter().find(|name| set(name).is_some())?;
    let host = url.host()?.trim_start_matches('[').trim_end_matches(']').to_lowercase();
    let port = url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 });
    let ip: Option<IpAddr> = host.parse().ok();
    // Go never sends these to a proxy.
    if host == "localhost" || ip.is_some_and(|ip| ip.is_loopback()) {
        return None;
    }
    let exceptions = set("NO_PROXY").or_else(|| set("no_proxy")).map_or("", String::as_str);
    let is_excepted = exceptions.split(',').map(str::trim).any(|entry| excepts(&entry.to_lowercase(), &host, ip, port));
    (!is_excepted).then_some((name, host))
}

fn excepts(entry: &str, host: &str, ip: Option<IpAddr>, port: u16) -> bool {
    if entry.is_empty() {
        return false;
    }
    if entry == "*" {
        return true;
    }
    if let Ok(network) = entry.parse::<IpNet>() {
        return ip.is_some_and(|ip| network.contains(&ip));
    }
    let bare = |text: &str| text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    let (name, only) = match entry.rsplit_once(':') {
        // An IPv6 address without brackets has no port.
        Some((name, digits)) if bare(entry).is_none() => (name, digits.parse::<u16>().ok()),
        _ => (entry, None),
    };
    if only.is_some_and(|only| only != port) {
        return false;
    }
    if let Some(named) = bare(name) {
        return ip == Some(named);
    }
    // `.a` and `*.a` name what is below a only, `a` itself as well.
    match name.strip_prefix("*.").or_else(|| name.strip_prefix('.')) {
        Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
        None => host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.')),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    fn state(environment: &[(&str, &str)], target: &str) -> State {
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        judge(Ok(&environment), &[target.to_owned()]).state
    }

    const PROXY: (&str, &str) = ("HTTP_PROXY", "http://proxy.test:3128");

    #[test]
    fn a_proxy_without_an_exception_is_named() {
        assert_eq!(state(&[PROXY], "http://10.0.0.1:30020"), State::Failure);
        assert_eq!(state(&[("http_proxy", "a")], "http://[fd00::1]:5000"), State::Failure);
        assert_eq!(state(&[("HTTPS_PROXY", "a")], "https://10.0.0.1:5000"), State::Failure);
        assert_eq!(state(&[PROXY, ("NO_PROXY", "10.0.0.2,a.test")], "http://10.0.0.1:5000"), State::Failure);
        assert_eq!(state(&[PROXY, ("NO_PROXY", ".node.test")], "http://node.test:5000"), State::Failure);
        assert_eq!(state(&[PROXY, ("NO_PROXY", "10.0.0.1:80")], "http://10.0.0.1:5000"), State::Failure);
    }

    #[test]
    fn what_reaches_the_mirror_is_good() {
        for target in ["http://127.0.0.1:5000", "http://[::1]:5000", "http://localhost:5000"] {
            assert_eq!(state(&[PROXY], target), State::Good, "{target}");
        }
        assert_eq!(state(&[], "http://10.0.0.1:5000"), State::Good);
        assert_eq!(state(&[("HTTPS_PROXY", "a")], "http://10.0.0.1:5000"), State::Good);
        for exceptions in ["*", "10.0.0.0/8", "a, 10.0.0.1", "10.0.0.1:5000"] {
            assert_eq!(state(&[PROXY, ("no_proxy", exceptions)], "http://10.0.0.1:5000"), State::Good, "{exceptions}");
        }
        assert_eq!(state(&[PROXY, ("NO_PROXY", "fd00::/8")], "http://[fd00::1]:5000"), State::Good);
        assert_eq!(state(&[PROXY, ("NO_PROXY", "fd00::1")], "http://[fd00::1]:5000"), State::Good);
        assert_eq!(state(&[PROXY, ("NO_PROXY", "test")], "http://node.test:5000"), State::Good);
        assert_eq!(state(&[PROXY, ("NO_PROXY", ".test")], "http://node.test:5000"), State::Good);
    }

    #[test]
    fn what_cannot_be_seen_is_said() {
        assert_eq!(judge(Err("no"), &[]).state, State::Unknown);
    }
}
