//! What a client asks a registry for: the end points of the
//! [distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#endpoints) that read,
//! with the `ns` query parameter by which containerd tells a mirror the upstream registry.

use std::borrow::Cow;

use http::{Method, StatusCode};
use percent_encoding::percent_decode_str;

use super::reference::{is_registry, is_repository_name};
use super::{Digest, ErrorCode, OciError, Repository, TagName};

/// A request for content, checked: every name in it is one of the specification's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `/v2/`: whether this is a registry.
    Base,
    /// `/v2/<name>/manifests/<reference>`.
    Manifest {
        /// The repository's name within its registry.
        name: String,
        /// Which manifest.
        reference: TagOrDigest,
        /// The upstream registry's host, if told.
        ns: Option<String>,
    },
    /// `/v2/<name>/blobs/<digest>`.
    Blob {
        /// The repository's name within its registry.
        name: String,
        /// Which blob.
        digest: Digest,
        /// The upstream registry's host, if told.
        ns: Option<String>,
    },
    /// `/v2/<name>/referrers/<digest>`.
    Referrers {
        /// The repository's name within its registry.
        name: String,
        /// The manifest that is referred to.
        digest: Digest,
        /// Only referrers of this type.
        artifact_type: Option<String>,
        /// The upstream registry's host, if told.
        ns: Option<String>,
    },
}

/// What a manifest is asked for by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TagOrDigest {
    /// A tag, with the registry that it is a tag of.
    Tag(TagName),
    /// A digest.
    Digest(Digest),
}

/// The query parameters that we know.
#[derive(Default)]
struct Query {
    ns: Option<String>,
    artifact_type: Option<String>,
}

fn not_found() -> OciError {
    OciError::new(StatusCode::NOT_FOUND, ErrorCode::Unsupported, "this registry has no such end point")
}

fn bad(code: ErrorCode, message: impl Into<String>) -> OciError {
    OciError::new(StatusCode::BAD_REQUEST, code, message)
}

// === impl Request ===

impl Request {
    /// Reads a request from its method, its path and its query, the latter two as they stand in the request line.
    ///
    /// # Errors
    /// 404 for a path that is no end point, 405 for a method other than GET and HEAD (to be answered with
    /// [`ALLOWED_METHODS`](super::ALLOWED_METHODS)), 400 for a malformed name, digest or parameter and for a tag without `ns`.
    ///
    /// ```
    /// use http::Method;
    /// use spegel::oci::{Request, TagOrDigest};
    ///
    /// let request = Request::parse(&Method::GET, "/v2/team/app/manifests/v1", Some("ns=registry.test:5000")).unwrap();
    /// let Request::Manifest { reference: TagOrDigest::Tag(tag), .. } = request else { unreachable!() };
    /// assert_eq!(tag.to_string(), "registry.test:5000/team/app:v1");
    /// ```
    pub fn parse(method: &Method, path: &str, query: Option<&str>) -> Result<Self, OciError> {
        let rest =
            path.strip_prefix("/v2").filter(|rest| rest.is_empty() || rest.starts_with('/')).ok_or_else(not_found)?;
        if method != Method::GET && method != Method::HEAD {
            let message = "this registry is a read-only mirror: push to and delete from the upstream registry";
            return Err(OciError::new(StatusCode::METHOD_NOT_ALLOWED, ErrorCode::Unsupported, message));
        }
        if matches!(rest, "" | "/") {
            return Ok(Self::Base);
        }
        let mut parts = rest[1..].rsplitn(3, '/');
        let (Some(last), Some(kind), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(not_found());
        };
        if !matches!(kind, "manifests" | "blobs" | "referrers") || last.is_empty() {
            return Err(not_found());
        }
        let name = decode_name(name)?;
        let Query { ns, artifact_type } = Query::parse(query.unwrap_or_default())?;
        let last = decode(last).ok_or_else(|| bad(ErrorCode::ManifestInvalid, "the reference is not UTF-8"))?;
        match kind {
            "blobs" => Ok(Self::Blob { name, digest: parse_digest(&last)?, ns }),
            "referrers" => Ok(Self::Referrers { name, digest: parse_digest(&last)?, artifact_type, ns }),
            _ => Ok(Self::Manifest { reference: parse_reference(&last, &name, ns.as_deref())?, name, ns }),
        }
    }

    /// The upstream registry's host, if told.
    pub fn ns(&self) -> Option<&str> {
        match self {
            Self::Base => None,
            Self::Manifest { ns, .. } | Self::Blob { ns, .. } | Self::Referrers { ns, .. } => ns.as_deref(),
        }
    }

    /// The repository in whose name the request came, if the upstream registry is told.
    pub fn repository(&self) -> Option<Repository> {
        match self {
            Self::Base => None,
            Self::Manifest { name, ns, .. } | Self::Blob { name, ns, .. } | Self::Referrers { name, ns, .. } => {
                Repository::new(ns.as_deref()?, name).ok()
            }
        }
    }
}

/// Undoes percent-encoding; nothing if the result is not UTF-8.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    percent_decode_str(text).decode_utf8().ok()
}

fn decode_name(text: &str) -> Result<String, OciError> {
    let refuse = || bad(ErrorCode::NameInvalid, "the repository name is not valid");
    // Decoded part by part, so that an encoded separator makes no new part.
    let parts = text.split('/').map(|part| decode(part).filter(|part| !part.contains('/')));
    let name = parts.collect::<Option<Vec<_>>>().ok_or_else(refuse)?.join("/");
    if is_repository_name(&name) { Ok(name) } else { Err(refuse()) }
}

fn parse_digest(text: &str) -> Result<Digest, OciError> {
    text.parse().map_err(|error: super::ParseDigestError| bad(ErrorCode::DigestInvalid, error.to_string()))
}

fn parse_reference(text: &str, name: &str, ns: Option<&str>) -> Result<TagOrDigest, OciError> {
    if text.contains(':') {
        return parse_digest(text).map(TagOrDigest::Digest);
    }
    if !super::reference::is_tag(text) {
        return Err(bad(ErrorCode::ManifestInvalid, "the tag is not valid"));
    }
    let ns = ns.ok_or_else(|| {
        bad(ErrorCode::NameInvalid, "a tag needs the ns query parameter, which names its upstream registry")
    })?;
    let repository = Repository::new(ns, name).and_then(|repository| TagName::new(repository, text));
    repository.map(TagOrDigest::Tag).map_err(|error| bad(ErrorCode::NameInvalid, error.to_string()))
}

// === impl Query ===

impl Query {
    fn parse(text: &str) -> Result<Self, OciError> {
        let mut query = Self::default();
        for pair in text.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let slot = match decode(key).as_deref() {
                Some("ns") => &mut query.ns,
                Some("artifactType") => &mut query.artifact_type,
                _ => continue,
            };
            let value = decode(value).ok_or_else(|| bad(ErrorCode::Unsupported, "a query parameter is not UTF-8"))?;
            if slot.replace(value.into_owned()).is_some() {
                return Err(bad(ErrorCode::Unsupported, "a query parameter is given twice"));
            }
        }
        if query.ns.as_deref().is_some_and(|ns| !is_registry(ns)) {
            return Err(bad(ErrorCode::NameInvalid, "the ns query parameter is not a registry host"));
        }
        query.artifact_type = query.artifact_type.filter(|text| !text.is_empty());
        Ok(query)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn get(path: &str, query: &str) -> Result<Request, OciError> {
        Request::parse(&Method::GET, path, (!query.is_empty()).then_some(query))
    }

    fn refusal(path: &str, query: &str) -> (u16, ErrorCode) {
        let error = get(path, query).unwrap_err();
        (error.status.as_u16(), error.code)
    }

    #[test]
    fn end_points() {
        assert_eq!(get("/v2/", ""), Ok(Request::Base));
        assert_eq!(get("/v2", ""), Ok(Request::Base));
        let (digest, name): (Digest, _) = (DIGEST.parse().unwrap(), "team/app".to_owned());
        let blob = Request::Blob { name: name.clone(), digest: digest.clone(), ns: None };
        assert_eq!(get(&format!("/v2/team/app/blobs/{DIGEST}"), ""), Ok(blob.clone()));
        assert_eq!(get(&format!("/v2/team%2Dx/../app/blobs/{DIGEST}"), "").unwrap_err().code, ErrorCode::NameInvalid);
        assert_eq!(get(&format!("/v2/team/app/blobs/{}", DIGEST.replace(':', "%3A")), "x=y&&"), Ok(blob));
        let reference = TagOrDigest::Digest(digest.clone());
        let manifest = Request::Manifest { name: name.clone(), reference, ns: None };
        assert_eq!(get(&format!("/v2/team/app/manifests/{DIGEST}"), ""), Ok(manifest));
        let artifact_type = Some("a/b+c".to_owned());
        let referrers = Request::Referrers { name, digest, artifact_type, ns: Some("[::1]:5000".into()) };
        let query = "artifactType=a%2Fb%2Bc&ns=%5B::1%5D%3A5000";
        assert_eq!(get(&format!("/v2/team/app/referrers/{DIGEST}"), query), Ok(referrers));
    }

    #[test]
    fn names_may_look_like_end_points() {
        let request = get("/v2/manifests/blobs/manifests/v1", "ns=registry.test").unwrap();
        assert_eq!(request.repository().unwrap().to_string(), "registry.test/manifests/blobs");
    }

    #[test]
    fn malformed() {
        use ErrorCode::{DigestInvalid, ManifestInvalid, NameInvalid, Unsupported};
        for path in [
            "/",
            "/v1/",
            "/v22/",
            "/v2/_catalog",
            "/v2/app/tags/list",
            "/v2/manifests/v1",
            "/v2/app/manifests/",
            "//v2/",
        ] {
            assert_eq!(refusal(path, ""), (404, Unsupported), "{path}");
        }
        for name in ["A", "a..b", "..", "a%2f..%2fb", "a%2Fb", "a%00", "a%ff", "", "a//b", "a%", "%2e%2e"] {
            assert_eq!(refusal(&format!("/v2/{name}/blobs/{DIGEST}"), ""), (400, NameInvalid), "{name}");
        }
        for digest in ["sha256:0", "md5:00", "0", "%2e%2e", "sha256%3a..%2f"] {
            assert_eq!(refusal(&format!("/v2/app/blobs/{digest}"), ""), (400, DigestInvalid), "{digest}");
        }
        assert_eq!(refusal("/v2/app/manifests/sha256:0", ""), (400, DigestInvalid));
        assert_eq!(refusal("/v2/app/manifests/.x", "ns=a.test"), (400, ManifestInvalid));
        assert_eq!(refusal("/v2/app/manifests/v1", ""), (400, NameInvalid));
        for ns in ["ns=", "ns", "ns=a%20b", "ns=a/b", "ns=http://a", "ns=a:x", "ns=%"] {
            assert_eq!(refusal(&format!("/v2/app/blobs/{DIGEST}"), ns), (400, NameInvalid), "{ns}");
        }
        assert_eq!(refusal(&format!("/v2/app/blobs/{DIGEST}"), "ns=a&n%73=a"), (400, Unsupported));
    }

    #[test]
    fn read_only() {
        for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS] {
            let error = Request::parse(&method, "/v2/app/blobs/uploads/", None).unwrap_err();
            assert_eq!((error.status, error.code), (StatusCode::METHOD_NOT_ALLOWED, ErrorCode::Unsupported));
        }
        assert_eq!(Request::parse(&Method::HEAD, "/v2/", None), Ok(Request::Base));
    }
}
