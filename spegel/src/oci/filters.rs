//! Which images the mirror leaves alone.

use std::str::FromStr;

use regex::RegexSet;

use super::reference::{is_registry, split_port};
use super::{Repository, TagName};

/// The hosts under which Docker Hub is asked. The first is its name in image references.
const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// How a registry is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// `http://`.
    Http,
    /// `https://`.
    Https,
}

impl Scheme {
    /// Its text before `://`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// One entry of the list of mirrored registries.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MirroredRegistry {
    /// `*` or `_default`: every registry.
    All,
    /// `scheme://host[:port]`, or the host alone.
    Host {
        /// How it is reached; HTTPS unless told otherwise.
        scheme: Scheme,
        /// Its host, with its port if one is named, as it stands in image references.
        host: Box<str>,
    },
}

/// Why the settings of what to mirror do not hold.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FilterError {
    /// An entry that is no registry, without what may be a password in it.
    #[error(
        "mirrored registry {0:?} is not of the form scheme://host[:port] with http or https, a host, * or _default"
    )]
    Registry(String),
    /// An expression that does not compile.
    #[error("registry filter {pattern:?}: {source}")]
    Pattern {
        /// The expression.
        pattern: String,
        /// What is wrong with it.
        source: regex::Error,
    },
}

/// Decides what is mirrored and advertised: the registries that are named, without what an expression matches.
///
/// ```
/// use spegel::oci::Filters;
///
/// let filters = Filters::new(&["https://registry.test".into()], &[":latest$".into()]).unwrap();
/// assert!(!filters.excludes_tag(&"registry.test/app:v1".parse().unwrap()));
/// assert!(filters.excludes_tag(&"registry.test/app:latest".parse().unwrap()));
/// assert!(filters.excludes_tag(&"other.test/app:v1".parse().unwrap()));
/// ```
#[derive(Clone, Debug)]
pub struct Filters {
    /// Hosts that are mirrored; empty means all.
    hosts: Vec<Box<str>>,
    patterns: RegexSet,
}

/// Docker Hub's name in references for each of its hosts, and any other host as it is.
fn canonical(registry: &str) -> &str {
    let is_hub = DOCKER_HUB.iter().any(|host| host.eq_ignore_ascii_case(registry));
    if is_hub { DOCKER_HUB[0] } else { registry }
}

/// Whether an image of `registry` belongs to the mirrored `host`. containerd's label of where content is from has no
/// port, so a registry without one is any port's.
fn is_of(registry: &str, host: &str) -> bool {
    if canonical(registry).eq_ignore_ascii_case(canonical(host)) {
        return true;
    }
    match (split_port(registry), split_port(host)) {
        (Some((a, None)), Some((b, Some(_)))) => a.eq_ignore_ascii_case(b),
        _ => false,
    }
}

/// A text that should have been an URL, as it may be shown: what stands before an `@` may be a name and a password.
pub(crate) fn without_userinfo(text: &str) -> String {
    let after_scheme = text.find("://").map_or(0, |at| at + 3);
    match text[after_scheme..].rfind('@') {
        Some(at) => format!("{}***{}", &text[..after_scheme], &text[after_scheme + at..]),
        None => text.to_owned(),
    }
}

// === impl MirroredRegistry ===

impl MirroredRegistry {
    /// Where containerd asks when no mirror has it: Docker Hub's references name a host that serves no content.
    /// Nothing for all registries.
    pub fn server(&self) -> Option<String> {
        match self {
            Self::All => None,
            Self::Host { host, .. } if canonical(host) == DOCKER_HUB[0] => {
                Some("https://registry-1.docker.io".to_owned())
            }
            Self::Host { scheme, host } => Some(format!("{}://{host}", scheme.as_str())),
        }
    }

    /// The name of its directory in containerd's registry configuration.
    pub fn directory(&self) -> &str {
        match self {
            Self::All => "_default",
            Self::Host { host, .. } => canonical(host),
        }
    }
}

impl FromStr for MirroredRegistry {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if matches!(text, "*" | "_default") {
            return Ok(Self::All);
        }
        let (scheme, host) = match text.split_once("://") {
            Some(("http", host)) => (Scheme::Http, host),
            Some(("https", host)) => (Scheme::Https, host),
            Some(_) => return Err(FilterError::Registry(without_userinfo(text))),
            None => (Scheme::Https, text),
        };
        let host = host.strip_suffix('/').unwrap_or(host);
        if !is_registry(host) {
            return Err(FilterError::Registry(without_userinfo(text)));
        }
        Ok(Self::Host { scheme, host: host.into() })
    }
}

// === impl Filters ===

impl Filters {
    /// Filters from the list of mirrored registries (empty, `*` or `_default` means all) and the expressions that are
    /// matched anywhere in `registry/repository[:tag]`.
    ///
    /// # Errors
    /// An entry or an expression that is malformed, named in the error.
    pub fn new(mirrored_registries: &[String], registry_filters: &[String]) -> Result<Self, FilterError> {
        let mut hosts = Vec::with_capacity(mirrored_registries.len());
        let mut all = mirrored_registries.is_empty();
        for entry in mirrored_registries {
            match entry.parse()? {
                MirroredRegistry::All => all = true,
                MirroredRegistry::Host { host, .. } => hosts.push(host),
            }
        }
        if all {
            hosts.clear();
        }
        // The set's own error does not say which expression it is about.
        for pattern in registry_filters {
            regex::Regex::new(pattern).map_err(|source| FilterError::Pattern { pattern: pattern.clone(), source })?;
        }
        let patterns = RegexSet::new(registry_filters)
            .map_err(|source| FilterError::Pattern { pattern: registry_filters.join(" "), source })?;
        Ok(Self { hosts, patterns })
    }

    /// Whether everything is mirrored.
    pub fn exclude_nothing(&self) -> bool {
        self.hosts.is_empty() && self.patterns.is_empty()
    }

    /// Whether no registry is named, so that all are mirrored.
    pub fn mirror_all(&self) -> bool {
        self.hosts.is_empty()
    }

    /// The registry among those that are named that this one is, as image references name it.
    pub fn mirrored(&self, registry: &str) -> Option<&str> {
        self.hosts.iter().find(|host| is_of(registry, host)).map(|host| canonical(host))
    }

    /// Whether nothing of this repository is mirrored or advertised.
    pub fn excludes_repository(&self, repository: &Repository) -> bool {
        let registry = repository.registry();
        let is_mirrored = self.mirror_all() || self.mirrored(registry).is_some();
        !is_mirrored || self.matches(repository, "")
    }

    /// Whether this tag is neither mirrored nor advertised.
    pub fn excludes_tag(&self, tag: &TagName) -> bool {
        self.excludes_repository(tag.repository()) || self.matches(tag.repository(), &format!(":{}", tag.tag()))
    }

    fn matches(&self, repository: &Repository, suffix: &str) -> bool {
        if self.patterns.is_empty() {
            return false;
        }
        let (given, name) = (repository.registry(), repository.name());
        let canonical = canonical(given);
        self.patterns.is_match(&format!("{canonical}/{name}{suffix}"))
            || (canonical != given && self.patterns.is_match(&format!("{given}/{name}{suffix}")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn filters(registries: &[&str], patterns: &[&str]) -> Filters {
        let owned = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        Filters::new(&owned(registries), &owned(patterns)).unwrap()
    }

    fn excludes(filters: &Filters, registry: &str) -> bool {
        filters.excludes_repository(&Repository::new(registry, "app").unwrap())
    }

    #[test]
    fn everything_unless_named() {
        for all in [&[][..], &["*"], &["_default"], &["https://a.test", "*"]] {
            assert!(!excludes(&filters(all, &[]), "registry.test:5000"), "{all:?}");
        }
        assert!(excludes(&filters(&["https://a.test"], &[]), "b.test"));
    }

    #[test]
    fn port_counts_unless_the_label_has_none() {
        let filters = filters(&["http://registry.test:5000", "https://plain.test", "http://[::1]:5000"], &[]);
        assert!(!excludes(&filters, "registry.test:5000"));
        assert!(!excludes(&filters, "registry.test"), "as containerd's label has it");
        assert!(!excludes(&filters, "[::1]"));
        assert!(excludes(&filters, "registry.test:6000"));
        assert!(excludes(&filters, "plain.test:5000"), "its hosts.toml would not be read for that port");
    }

    #[test]
    fn docker_hub_has_three_names() {
        for name in DOCKER_HUB {
            let filters = filters(&[&format!("https://{name}")], &[]);
            for other in DOCKER_HUB {
                assert!(!excludes(&filters, other), "{name} {other}");
            }
        }
        let hub = filters(&[], &["^docker\\.io/"]);
        assert!(excludes(&hub, "registry-1.docker.io"));
        let by_host = filters(&[], &["^registry-1\\.docker\\.io/"]);
        assert!(excludes(&by_host, "registry-1.docker.io") && !excludes(&by_host, "docker.io"));
    }

    #[test]
    fn tag_goes_with_its_repository() {
        let filters = filters(&[], &["^registry\\.test/secret$", ":latest$"]);
        let excludes = |tag: &str| filters.excludes_tag(&tag.parse().unwrap());
        assert!(excludes("registry.test/secret:v1"));
        assert!(excludes("registry.test/app:latest"));
        assert!(!excludes("registry.test/app:v1"));
    }

    #[test]
    fn errors_name_the_entry() {
        for bad in ["", "ftp://a.test", "https://", "https://a.test/path", "a b", "https://a.test?x"] {
            let error = Filters::new(&[bad.to_owned()], &[]).unwrap_err();
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
        }
        for secret in
            ["https://me:s3cret@a.test", "me:s3cret@a.test:5000", "ftp://me:s3@c/ret@a.test", "https://s3cret@"]
        {
            let error = Filters::new(&[secret.to_owned()], &[]).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(shown.contains("***@") && !shown.contains("s3") && !shown.contains("ret"), "{shown}");
        }
        let error = Filters::new(&[], &["ok".to_owned(), "(".to_owned()]).unwrap_err();
        assert!(matches!(error, FilterError::Pattern { pattern, .. } if pattern == "("));
    }

    #[test]
    fn servers() {
        let server = |text: &str| text.parse::<MirroredRegistry>().unwrap().server();
        assert_eq!(server("https://docker.io").as_deref(), Some("https://registry-1.docker.io"));
        assert_eq!(server("http://registry.test:5000").as_deref(), Some("http://registry.test:5000"));
        assert_eq!(server("registry.test").as_deref(), Some("https://registry.test"));
        assert_eq!(server("*"), None);
    }
}
