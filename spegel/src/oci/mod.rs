//! The vocabulary of OCI distribution: digests, references, media types, request paths, ranges,
//! filters and error codes. Pure: no input, no output, no clock.

mod digest;
mod error;
mod filters;
mod key;
mod manifest;
mod range;
mod reference;
mod request;

pub(crate) use reference::is_registry;

pub use digest::{Algorithm, Digest, ParseDigestError};
pub use error::{ALLOWED_METHODS, ERROR_CONTENT_TYPE, ErrorCode, OciError};
pub(crate) use filters::without_userinfo;
pub use filters::{FilterError, Filters, MirroredRegistry, Scheme};
pub use key::Key;
pub use manifest::{Descriptor, MAX_MANIFEST_BYTES, Manifest, ManifestError, MediaType};
pub use range::{ContentRange, ParseContentRangeError, RangeOutcome, RangeSpec, parse_range};
pub use reference::{ParseReferenceError, Reference, Repository, TagName};
pub use request::{Request, TagOrDigest};
