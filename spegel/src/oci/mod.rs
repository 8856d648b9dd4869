//! The vocabulary of OCI distribution: digests, references, media types, request paths, ranges,
//! filters and error codes. Pure: no input, no output, no clock.

mod digest;
mod key;
mod reference;

pub use digest::{Algorithm, Digest, ParseDigestError};
pub use key::Key;
pub use reference::{ParseReferenceError, Reference, Repository, TagName};
