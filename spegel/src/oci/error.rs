//! The errors that a registry tells its clients, in the one form that the
//! [distribution specification](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#error-codes) has for them.

use http::StatusCode;
use serde::Serialize;

/// The media type of an error's body.
pub const ERROR_CONTENT_TYPE: &str = "application/json";

/// The methods that this registry knows, as the `Allow` header of a 405 lists them.
pub const ALLOWED_METHODS: &str = "GET, HEAD";

/// What kind of error it is. All but [`RangeInvalid`](Self::RangeInvalid) and [`Unknown`](Self::Unknown), which
/// Docker's registry adds, are the specification's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The blob is not known to the registry.
    BlobUnknown,
    /// An upload is not valid.
    BlobUploadInvalid,
    /// An upload is not known to the registry.
    BlobUploadUnknown,
    /// A digest is malformed, or is not that of the content.
    DigestInvalid,
    /// A manifest names a blob that the registry does not have.
    ManifestBlobUnknown,
    /// A manifest is not valid.
    ManifestInvalid,
    /// The manifest is not known to the registry.
    ManifestUnknown,
    /// The repository's name is malformed.
    NameInvalid,
    /// The repository is not known to the registry.
    NameUnknown,
    /// A length is not that of the content.
    SizeInvalid,
    /// The client must tell who it is.
    Unauthorized,
    /// The client may not have it.
    Denied,
    /// The registry does not do that.
    Unsupported,
    /// The client asks too much.
    TooManyRequests,
    /// A range is beyond the content.
    RangeInvalid,
    /// None of the others.
    Unknown,
}

impl ErrorCode {
    /// The code's text in the body.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BlobUnknown => "BLOB_UNKNOWN",
            Self::BlobUploadInvalid => "BLOB_UPLOAD_INVALID",
            Self::BlobUploadUnknown => "BLOB_UPLOAD_UNKNOWN",
            Self::DigestInvalid => "DIGEST_INVALID",
            Self::ManifestBlobUnknown => "MANIFEST_BLOB_UNKNOWN",
            Self::ManifestInvalid => "MANIFEST_INVALID",
            Self::ManifestUnknown => "MANIFEST_UNKNOWN",
            Self::NameInvalid => "NAME_INVALID",
            Self::NameUnknown => "NAME_UNKNOWN",
            Self::SizeInvalid => "SIZE_INVALID",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Denied => "DENIED",
            Self::Unsupported => "UNSUPPORTED",
            Self::TooManyRequests => "TOOMANYREQUESTS",
            Self::RangeInvalid => "RANGE_INVALID",
            Self::Unknown => "UNKNOWN",
        }
    }
}

/// An answer that says no, and why.
///
/// ```
/// use http::StatusCode;
/// use spegel::oci::{ErrorCode, OciError};
///
/// let error = OciError::new(StatusCode::NOT_FOUND, ErrorCode::BlobUnknown, "no node has it");
/// assert_eq!(error.body(), br#"{"errors":[{"code":"BLOB_UNKNOWN","message":"no node has it"}]}"#);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {message}")]
pub struct OciError {
    /// The status of the answer.
    pub status: StatusCode,
    /// The specification's code.
    pub code: ErrorCode,
    /// One sentence for a person.
    pub message: String,
    /// More about it, in any form.
    pub detail: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct Body<'a> {
    errors: [Entry<'a>; 1],
}

#[derive(Serialize)]
struct Entry<'a> {
    code: &'static str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<&'a serde_json::Value>,
}

impl OciError {
    /// An error without detail.
    pub fn new(status: StatusCode, code: ErrorCode, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), detail: None }
    }

    /// The same error with something more to say.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<serde_json::Value>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// The body of the answer, of type [`ERROR_CONTENT_TYPE`].
    pub fn body(&self) -> Vec<u8> {
        let entry = Entry { code: self.code.as_str(), message: &self.message, detail: self.detail.as_ref() };
        // Texts and JSON values always have a JSON form, so the default is never taken.
        serde_json::to_vec(&Body { errors: [entry] }).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detail_is_in_the_body() {
        let error = OciError::new(StatusCode::BAD_REQUEST, ErrorCode::NameInvalid, "a \"name\"\n").with_detail("more");
        assert_eq!(error.body(), br#"{"errors":[{"code":"NAME_INVALID","message":"a \"name\"\n","detail":"more"}]}"#);
    }
}
