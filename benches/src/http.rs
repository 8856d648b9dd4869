//! A blocking HTTP client for tests: every answer is a value, whatever its status, and every wait has an end.

use std::io::{self, Read};
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// An answer without its body.
#[derive(Clone, Debug)]
pub struct Head {
    /// The status code.
    pub status: u16,
    headers: Vec<(String, String)>,
}

/// An answer with its body.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status and headers.
    pub head: Head,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Head {
    /// The value of a header by its lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A client that keeps connections; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client(ureq::Agent);

impl Client {
    /// A client whose requests, bodies included, take at most `limit`.
    pub fn new(limit: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(limit))
            .proxy(None)
            .build();
        Self(config.into())
    }

    /// GET with the body in memory.
    ///
    /// # Errors
    /// No answer, or not in time.
    pub fn get(&self, url: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        let mut request = self.0.get(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.call().with_context(|| format!("GET {url}"))?;
        let head = head(&response);
        let body = response.into_body().into_with_config().limit(u64::MAX).read_to_vec();
        Ok(Answer { head, body: body.with_context(|| format!("read the body of GET {url}"))? })
    }

    /// HEAD.
    ///
    /// # Errors
    /// No answer, or not in time.
    pub fn head(&self, url: &str, headers: &[(&str, &str)]) -> Result<Head> {
        let mut request = self.0.head(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Ok(head(&request.call().with_context(|| format!("HEAD {url}"))?))
    }

    /// GET whose body is handed to `sink` in pieces and hashed meanwhile: the head, the body's `sha256:` digest and its length.
    ///
    /// # Errors
    /// No answer, a body that ends early, the sink's, or not in time.
    pub fn download(&self, url: &str, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> Result<(Head, String, u64)> {
        let response = self.0.get(url).call().with_context(|| format!("GET {url}"))?;
        let head = head(&response);
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut hasher = Sha256::new();
        let mut length = 0;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let n = body.read(&mut buffer).with_context(|| format!("read the body of GET {url}"))?;
            if n == 0 {
                return Ok((head, format!("sha256:{}", hex::encode(hasher.finalize())), length));
            }
            hasher.update(&buffer[..n]);
            length += n as u64;
            sink(&buffer[..n])?;
        }
    }
}

fn head<T>(response: &ureq::http::Response<T>) -> Head {
    let text = |value: &ureq::http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    Head {
        status: response.status().as_u16(),
        headers: response.headers().iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect(),
    }
}
