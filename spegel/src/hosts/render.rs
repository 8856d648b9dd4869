//! The text of a `hosts.toml`, and whose a text is.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use toml_edit::{DocumentMut, Item, TableLike};

use super::{Configuration, NODE_HEADER};
use crate::oci::MirroredRegistry;

/// How our files begin. The sum of what follows the line tells whether somebody changed it.
const MARKER: &str = "# Written by spegel, which replaces and removes it; sha256:";
/// How the first line ends where the directory was made for the file.
const MADE_DIRECTORY: &str = " with its directory";
/// How long containerd waits for the mirror's connection.
const DIAL_TIMEOUT: &str = "200ms";

/// The text with its first line.
pub(super) fn with_marker(body: &str, made_directory: bool) -> String {
    let suffix = if made_directory { MADE_DIRECTORY } else { "" };
    format!("{MARKER}{}{suffix}\n{body}", sum(body))
}

fn sum(body: &str) -> String {
    hex::encode(Sha256::digest(body))
}

/// Whether a text is ours: then, whether it is as we wrote it, and whether its directory was made for it. A line that somebody put before
/// our first one does not make it theirs.
pub(super) fn read_marker(content: &[u8]) -> Option<(bool, bool)> {
    let text = String::from_utf8_lossy(content);
    let start = if text.starts_with(MARKER) { 0 } else { text.find(&format!("\n{MARKER}"))? + 1 };
    let (line, body) = text[start..].split_once('\n').unwrap_or((&text[start..], ""));
    let made_directory = line.ends_with(MADE_DIRECTORY);
    let pristine = line[MARKER.len()..].strip_suffix(MADE_DIRECTORY).unwrap_or(&line[MARKER.len()..]) == sum(body);
    Some((pristine && start == 0, made_directory))
}

/// Whether the Go program wrote a text, which leaves no mark: the host that is asked first has its timeout, its capabilities and nothing
/// else but credentials. Then, whether all of it is the Go program's: such hosts, a server, and what it kept of `before`.
pub(super) fn is_of_go(content: &[u8], before: Option<&[u8]>) -> Option<bool> {
    let document = parse(content).ok()?;
    let before = before.and_then(|before| parse(before).ok());
    let hosts = document.get("host")?.as_table_like()?;
    let (_, first) = hosts.iter().next()?;
    if !is_host_of_go(first) {
        return None;
    }
    let before_hosts = before.as_ref().and_then(|before| before.get("host")).and_then(Item::as_table_like);
    let is_kept = |now: &Item, then: Option<&Item>| then.is_some_and(|then| is_equal(now, then));
    let of_go = |(name, host): (&str, &Item)| {
        is_host_of_go(host) || is_kept(host, before_hosts.and_then(|hosts| hosts.get(name)))
    };
    let is_top = |(key, item): (&str, &Item)| {
        matches!(key, "host" | "server") || is_kept(item, before.as_ref().and_then(|before| before.get(key)))
    };
    Some(hosts.iter().all(of_go) && document.iter().all(is_top))
}

fn is_host_of_go(host: &Item) -> bool {
    let Some(host) = host.as_table_like() else { return false };
    let capabilities: Vec<_> = host
        .get("capabilities")
        .and_then(Item::as_array)
        .map(|array| array.iter().filter_map(toml_edit::Value::as_str).collect())
        .unwrap_or_default();
    let has_only_credentials = |header: &dyn TableLike| header.iter().all(|(key, _)| key == "Authorization");
    matches!(capabilities[..], ["pull"] | ["pull", "resolve"])
        && host.get("dial_timeout").and_then(Item::as_str) == Some(DIAL_TIMEOUT)
        && host.iter().all(|(key, _)| matches!(key, "capabilities" | "dial_timeout" | "header"))
        && host.get("header").is_none_or(|header| header.as_table_like().is_some_and(has_only_credentials))
}

/// Whether two items mean the same, however they are written.
fn is_equal(one: &Item, other: &Item) -> bool {
    if let (Some(one), Some(other)) = (one.as_table_like(), other.as_table_like()) {
        return one.len() == other.len()
            && one.iter().all(|(key, item)| other.get(key).is_some_and(|other| is_equal(item, other)));
    }
    if let (Some(one), Some(other)) = (one.as_array(), other.as_array()) {
        let pairs = one.iter().zip(other.iter());
        return one.len() == other.len()
            && pairs.into_iter().all(|(one, other)| is_equal(&Item::from(one.clone()), &Item::from(other.clone())));
    }
    match (one.as_str(), other.as_str()) {
        (Some(one), Some(other)) => one == other,
        _ => one.to_string().trim() == other.to_string().trim(),
    }
}

/// Whether a text that is not ours sends containerd to a spegel, by the header that only its mirrors want.
pub(super) fn names_a_mirror(content: &[u8]) -> bool {
    content.windows(NODE_HEADER.len()).any(|window| window == NODE_HEADER.as_bytes())
}

/// Whether a text has credentials, for whatever host.
pub(super) fn has_credentials(content: &[u8]) -> bool {
    const HEADER: &[u8] = b"authorization";
    content.windows(HEADER.len()).any(|window| window.eq_ignore_ascii_case(HEADER))
}

pub(super) fn parse(content: &[u8]) -> Result<DocumentMut, String> {
    let text = std::str::from_utf8(content).map_err(|error| error.to_string())?;
    text.parse().map_err(|error: toml_edit::TomlError| error.to_string().replace('\n', " "))
}

/// The text of a registry's file, but for its first line. `existing` is what was configured before.
///
/// The error says why that cannot be kept where it must.
pub(super) fn body(
    configuration: &Configuration,
    registry: &MirroredRegistry,
    existing: Option<&[u8]>,
) -> Result<String, String> {
    let server = registry.server().map(|server| format!("server = '{server}'\n")).unwrap_or_default();
    let Some(existing) = existing.filter(|_| configuration.prepend_existing) else {
        return Ok(format!("{server}\n{}", mirrors(configuration)));
    };
    let mut root = parse(existing)?;
    let mut hosts = root.clone();
    let keys: Vec<String> = root.iter().map(|(key, _)| key.to_owned()).filter(|key| key != "host").collect();
    for key in keys {
        hosts.remove(&key);
    }
    if root.remove("host").is_some_and(|item| item.as_table().is_none_or(toml_edit::Table::is_dotted)) {
        return Err("its hosts are not written as [host.\"...\"] tables, which alone containerd reads".to_owned());
    }
    let targets = configuration.mirror_targets.iter();
    if let Some(table) = hosts.get_mut("host").and_then(Item::as_table_mut) {
        for target in targets {
            table.remove(target.as_str());
        }
    }
    let server = if root.contains_key("server") { String::new() } else { server };
    let text = format!("{server}{root}\n{}\n{hosts}", mirrors(configuration));
    parse(text.as_bytes()).map(|_| text)
}

fn mirrors(configuration: &Configuration) -> String {
    let capabilities = if configuration.resolve_tags { "['pull', 'resolve']" } else { "['pull']" };
    let mut text = String::new();
    for (index, target) in configuration.mirror_targets.iter().enumerate() {
        // TOML knows each table once.
        if configuration.mirror_targets[..index].contains(target) {
            continue;
        }
        // Writing to a text cannot fail.
        let _ = write!(
            text,
            "[host.'{target}']\ncapabilities = {capabilities}\ndial_timeout = '{DIAL_TIMEOUT}'\n\n\
             [host.'{target}'.header]\n{NODE_HEADER} = '{}'\n",
            configuration.node_name
        );
        if let Some((user, password)) = &configuration.basic_auth {
            let _ = writeln!(text, "Authorization = 'Basic {}'", STANDARD.encode(format!("{user}:{password}")));
        }
        text.push('\n');
    }
    text.pop();
    text
}

/// The lines that name certificates for the upstream, out of the files of Docker's layout: authorities are `*.crt`, and
/// a client's certificate `*.cert` may have its key beside it in `*.key`.
pub(super) fn certificates(names: &BTreeSet<OsString>) -> String {
    let quote = |name: &str| toml_edit::Value::from(name).to_string();
    let names: Vec<&str> = names.iter().filter_map(|name| name.to_str()).collect();
    let authorities: Vec<_> = names.iter().filter(|name| name.ends_with(".crt")).map(|name| quote(name)).collect();
    let mut clients = Vec::new();
    for &name in &names {
        let Some(stem) = name.strip_suffix(".cert") else { continue };
        let key = format!("{stem}.key");
        let has_key = names.contains(&key.as_str());
        clients.push(if has_key { format!("[{}, {}]", quote(name), quote(&key)) } else { quote(name) });
    }
    let mut text = String::new();
    if !authorities.is_empty() {
        let _ = writeln!(text, "ca = [{}]", authorities.join(", "));
    }
    if !clients.is_empty() {
        let _ = writeln!(text, "client = [{}]", clients.join(", "));
    }
    text
}

/// What must hold for any file that is there before us; panics where it does not.
pub(super) fn check_existing(existing: &[u8]) {
    let marked = read_marker(existing);
    let _ = is_of_go(existing, Some(existing));
    let _ = names_a_mirror(existing);
    let target = "http://127.0.0.1:5000";
    let configuration = Configuration {
        config_path: "/certs.d".into(),
        mirrored_registries: Vec::new(),
        mirror_targets: target.parse().into_iter().collect(),
        resolve_tags: true,
        prepend_existing: true,
        basic_auth: None,
        node_name: "node".into(),
    };
    // What cannot be kept is refused; what is written is TOML in which our mirror is the first host.
    let Ok(body) = body(&configuration, &MirroredRegistry::All, Some(existing)) else { return };
    let written = with_marker(&body, true);
    assert_eq!(read_marker(written.as_bytes()), Some((true, true)));
    let document = parse(written.as_bytes()).unwrap_or_else(|error| panic!("{error}: {written}"));
    let hosts = document.get("host").and_then(Item::as_table_like);
    let first = hosts.and_then(|hosts| hosts.iter().next().map(|(name, _)| name.to_owned()));
    assert!(first.as_deref() == Some(target) || marked.is_some(), "{written}");
}
