//! Basic authentication of clients and peers ([RFC 7617](https://www.rfc-editor.org/rfc/rfc7617)).

use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;

/// The user name and password that clients and peers must tell. Its `Debug` form keeps them secret.
#[derive(Clone)]
pub struct BasicAuth {
    header: String,
}

impl BasicAuth {
    /// Credentials from a user name, which has no colon, and a password.
    pub fn new(username: &str, password: &str) -> Self {
        Self { header: format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}"))) }
    }

    /// The `Authorization` header's value that carries them.
    pub fn header(&self) -> &str {
        &self.header
    }

    /// Whether an `Authorization` header carries them. Takes the same time whatever differs.
    pub(super) fn admits(&self, header: Option<&[u8]>) -> bool {
        let Some((scheme, told)) = header.and_then(split_scheme) else { return false };
        let expected = &self.header.as_bytes()["Basic ".len()..];
        let same_length = told.len() == expected.len();
        let difference = told.iter().zip(expected).fold(0, |sum, (a, b)| sum | (a ^ b));
        scheme.eq_ignore_ascii_case(b"Basic") && same_length && difference == 0
    }
}

fn split_scheme(header: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = header.iter().position(|b| *b == b' ')?;
    Some((&header[..space], header[space..].trim_ascii()))
}

impl fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BasicAuth(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_credentials_are_admitted() {
        let auth = BasicAuth::new("user", "secret");
        assert_eq!(auth.header(), "Basic dXNlcjpzZWNyZXQ=");
        assert!(auth.admits(Some(b"Basic dXNlcjpzZWNyZXQ=")));
        assert!(auth.admits(Some(b"basic dXNlcjpzZWNyZXQ=")));
        for wrong in
            [&b""[..], b"Basic", b"Basic ", b"Basic dXNlcjpzZWNyZXQ", b"Bearer dXNlcjpzZWNyZXQ=", b"dXNlcjpzZWNyZXQ="]
        {
            assert!(!auth.admits(Some(wrong)), "{}", String::from_utf8_lossy(wrong));
        }
        assert!(!auth.admits(None));
    }

    #[test]
    fn the_debug_form_tells_nothing() {
        assert_eq!(format!("{:?}", BasicAuth::new("user", "secret")), "BasicAuth(secret)");
    }
}
