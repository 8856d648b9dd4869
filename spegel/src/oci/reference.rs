//! Image names, qualified by the registry that they come from.
//!
//! The grammar is that of the [distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests),
//! and for the registry's host that of containerd's and Docker's references.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use super::Digest;

/// The longest repository name, in bytes, without its registry. Docker's references and most registries stop here.
const MAX_NAME_LEN: usize = 255;

/// The longest host name of the domain name system, in bytes.
const MAX_HOST_LEN: usize = 253;

/// The longest tag, in bytes.
const MAX_TAG_LEN: usize = 128;

/// A repository with the registry that it is in, `registry.test:5000/team/app`.
///
/// Short names of Docker Hub are never guessed: the registry is always told.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    registry: Box<str>,
    name: Box<str>,
}

/// A tag with its repository, `registry.test:5000/team/app:v1`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TagName {
    repository: Repository,
    tag: Box<str>,
}

/// A full image reference: repository, and a tag, a digest or both.
///
/// ```
/// use spegel::oci::Reference;
///
/// let image: Reference = "registry.test:5000/team/app:v1".parse().unwrap();
/// assert_eq!(image.repository.registry(), "registry.test:5000");
/// assert_eq!(image.repository.name(), "team/app");
/// assert_eq!(image.tag.as_deref(), Some("v1"));
///
/// assert!("ubuntu:24.04".parse::<Reference>().is_err(), "a short name could be anyone's");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// Where the image is from.
    pub repository: Repository,
    /// The tag, if named by one.
    pub tag: Option<Box<str>>,
    /// The digest, if named by one.
    pub digest: Option<Digest>,
}

/// Why a text is not a qualified image name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseReferenceError {
    /// The first part is not a host name: it has neither dot nor port and is not `localhost`, or it is malformed.
    #[error("the name does not begin with a registry host")]
    NoRegistry,
    /// Not a repository name of the distribution specification.
    #[error("the repository name is not valid")]
    BadRepository,
    /// Not a tag of the distribution specification, or none where one is needed.
    #[error("the tag is missing or not valid")]
    BadTag,
    /// A digest that does not parse.
    #[error(transparent)]
    BadDigest(#[from] super::ParseDigestError),
}

/// Whether a text is a registry's host with an optional port: a DNS name, an IPv4 address, or an IPv6 address in
/// brackets. It is kept as written, so that it hashes to the key that peers use.
pub(crate) fn is_registry(text: &str) -> bool {
    let Some((host, port)) = split_port(text) else { return false };
    port.is_none_or(|port| port != 0) && is_host(host)
}

/// The host and the port of `host`, `host:port`, `[v6]` or `[v6]:port`; nothing if what follows the host is no port.
pub(crate) fn split_port(text: &str) -> Option<(&str, Option<u16>)> {
    let end_of_host = match text.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => text.find(':').unwrap_or(text.len()),
    };
    let (host, rest) = text.split_at(end_of_host);
    match rest.strip_prefix(':') {
        None if rest.is_empty() => Some((host, None)),
        // `parse` alone would take a sign as well.
        Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => Some((host, Some(port.parse().ok()?))),
        _ => None,
    }
}

fn is_host(host: &str) -> bool {
    if let Some(address) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let is_label = |label: &str| {
        let ends_well = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
        label.len() <= 63
            && ends_well(label.bytes().next())
            && ends_well(label.bytes().next_back())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.len() <= MAX_HOST_LEN && host.split('.').all(is_label)
}

/// Whether a text is a repository name: path components of `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`, joined by slashes.
pub(crate) fn is_repository_name(name: &str) -> bool {
    name.len() <= MAX_NAME_LEN && name.split('/').all(is_path_component)
}

fn is_path_component(component: &str) -> bool {
    let is_word = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9');
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(|&b| is_word(b)) || !bytes.last().is_some_and(|&b| is_word(b)) {
        return false;
    }
    // What stands between two words must be one whole separator.
    component
        .split(|c: char| u8::try_from(c).is_ok_and(is_word))
        .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

/// Whether a text is a tag: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
pub(crate) fn is_tag(tag: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG_LEN
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|b| is_word(b) || matches!(b, b'.' | b'-'))
}

// === impl Repository ===

impl Repository {
    /// A repository from its registry's host (with port, if any) and its name there.
    ///
    /// The registry is told here, so a host of a single label is taken too, which [`FromStr`] cannot tell from the
    /// first part of a short name.
    ///
    /// # Errors
    /// [`ParseReferenceError::NoRegistry`] for a malformed host, [`ParseReferenceError::BadRepository`] for a malformed name.
    pub fn new(registry: &str, name: &str) -> Result<Self, ParseReferenceError> {
        if !is_registry(registry) {
            return Err(ParseReferenceError::NoRegistry);
        }
        if !is_repository_name(name) {
            return Err(ParseReferenceError::BadRepository);
        }
        Ok(Self { registry: registry.into(), name: name.into() })
    }

    /// The registry's host, with its port if one is named.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository's name within its registry.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

impl FromStr for Repository {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (registry, name) = text.split_once('/').ok_or(ParseReferenceError::NoRegistry)?;
        if !registry.contains(['.', ':']) && registry != "localhost" {
            return Err(ParseReferenceError::NoRegistry);
        }
        Self::new(registry, name)
    }
}

// === impl TagName ===

impl TagName {
    /// A tag of a repository.
    ///
    /// # Errors
    /// [`ParseReferenceError::BadTag`].
    pub fn new(repository: Repository, tag: &str) -> Result<Self, ParseReferenceError> {
        if !is_tag(tag) {
            return Err(ParseReferenceError::BadTag);
        }
        Ok(Self { repository, tag: tag.into() })
    }

    /// The repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The tag alone.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl fmt::Display for TagName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repository, self.tag)
    }
}

impl FromStr for TagName {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (repository, tag) = split_tag(text);
        Self::new(repository.parse()?, tag.ok_or(ParseReferenceError::BadTag)?)
    }
}

/// Cuts the tag off, if there is one: the last colon belongs to the registry's port unless it stands behind the last slash.
fn split_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((before, tag)) if !tag.contains('/') => (before, Some(tag)),
        _ => (text, None),
    }
}

// === impl Reference ===

impl Reference {
    /// The tag with its repository, if the image is named by one.
    pub fn tag_name(&self) -> Option<TagName> {
        let tag = self.tag.clone()?;
        Some(TagName { repository: self.repository.clone(), tag })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repository.fmt(f)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (text, None),
        };
        let (repository, tag) = split_tag(name);
        let repository = repository.parse()?;
        let digest = digest.map(str::parse).transpose()?;
        match tag {
            Some(tag) if !is_tag(tag) => Err(ParseReferenceError::BadTag),
            None if digest.is_none() => Err(ParseReferenceError::BadTag),
            tag => Ok(Self { repository, tag: tag.map(Into::into), digest }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn registries() {
        for good in [
            "registry.test",
            "registry.test:5000",
            "localhost",
            "10.0.0.1:80",
            "[::1]:5000",
            "[fd00::1]",
            "UP.test",
            "a-b.c",
        ] {
            assert!(is_registry(good), "{good}");
        }
        for bad in [
            "",
            ":5000",
            "a:",
            "a:0",
            "a:65536",
            "a:+1",
            "a:b",
            "[::1",
            "::1",
            "[::1]5000",
            "[]",
            "[1.2.3.4]",
            "a..b",
            "-a",
            "a-",
            "a_b",
            "a/b",
            "a b",
            "a\0",
            "user@a",
            "a:1:2",
        ] {
            assert!(!is_registry(bad), "{bad:?}");
        }
        assert!(!is_registry(&"a".repeat(64)));
        assert!(!is_registry(&["abc"; 64].join(".")));
    }

    #[test]
    fn repository_names() {
        for good in ["app", "team/app", "a.b/c_d/e__f/g---h", "0/1"] {
            assert!(is_repository_name(good), "{good}");
        }
        for bad in [
            "", "/", "a/", "/a", "a//b", "A", "a.", ".a", "a..b", "a___b", "a._b", "a-_b", "a/../b", "ä", "a%2fb",
            "a\0b",
        ] {
            assert!(!is_repository_name(bad), "{bad:?}");
        }
        assert!(is_repository_name(&"a".repeat(255)));
        assert!(!is_repository_name(&"a".repeat(256)));
    }

    #[test]
    fn tags() {
        for good in ["v1", "_", "A.b-c_d"] {
            assert!(is_tag(good), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a:b", "a@b", "a b"] {
            assert!(!is_tag(bad), "{bad:?}");
        }
        assert!(is_tag(&"a".repeat(128)));
        assert!(!is_tag(&"a".repeat(129)));
    }

    #[test]
    fn short_names_are_not_guessed() {
        assert_eq!("team/app:v1".parse::<TagName>(), Err(ParseReferenceError::NoRegistry));
        assert_eq!("app".parse::<Reference>(), Err(ParseReferenceError::NoRegistry));
        assert_eq!("sha256:abc".parse::<Reference>(), Err(ParseReferenceError::NoRegistry));
        assert!(Repository::new("registry", "app").is_ok(), "the registry is told, not guessed");
    }

    #[test]
    fn port_is_not_a_tag() {
        assert_eq!("registry.test:5000/app".parse::<TagName>(), Err(ParseReferenceError::BadTag));
        let tag: TagName = "[::1]:5000/app:v1".parse().unwrap();
        assert_eq!((tag.repository().registry(), tag.repository().name(), tag.tag()), ("[::1]:5000", "app", "v1"));
    }

    #[test]
    fn tag_and_digest() {
        let text = format!("registry.test/app:v1@sha256:{}", "0".repeat(64));
        let image: Reference = text.parse().unwrap();
        assert_eq!(image.to_string(), text);
        assert_eq!(image.tag_name().unwrap().to_string(), "registry.test/app:v1");
        assert!(matches!("registry.test/app@sha256:0".parse::<Reference>(), Err(ParseReferenceError::BadDigest(_))));
    }
}
