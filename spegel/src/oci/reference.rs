//! Image names, qualified by the registry that they come from.

use std::fmt;
use std::str::FromStr;

use super::Digest;

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
    /// The first part is not a host name: it has neither dot nor port and is not `localhost`.
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

impl Repository {
    /// A repository from its registry's host (with port, if any) and its name there.
    pub fn new(_registry: &str, _name: &str) -> Result<Self, ParseReferenceError> {
        Err(ParseReferenceError::BadRepository)
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

impl TagName {
    /// A tag of a repository.
    pub fn new(_repository: Repository, _tag: &str) -> Result<Self, ParseReferenceError> {
        Err(ParseReferenceError::BadTag)
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

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.name)
    }
}

impl fmt::Display for TagName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.repository, self.tag)
    }
}

impl FromStr for TagName {
    type Err = ParseReferenceError;

    fn from_str(_text: &str) -> Result<Self, Self::Err> {
        Err(ParseReferenceError::BadTag)
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(_text: &str) -> Result<Self, Self::Err> {
        Err(ParseReferenceError::BadTag)
    }
}
