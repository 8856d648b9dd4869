//! Whom to call first when joining the network of peers.

mod certificates;
mod dns;
mod fixed;
mod http;
mod list;
mod remembered;

use std::fmt;
use std::net::IpAddr;

use async_trait::async_trait;

pub use certificates::{CertificateError, Certificates};
pub use dns::DnsBootstrap;
pub use fixed::{ParsePeerError, StaticBootstrap};
pub use http::{HttpBootstrap, HttpEndpoint, HttpEndpointError, ParseUrlError};
pub use remembered::RememberedPeers;

/// What must hold for any list of peers that a URL or a file gives; panics where it does not.
pub(crate) fn check_list(bytes: &[u8]) {
    list::check(bytes);
}

/// A place where a peer's router may be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BootstrapAddress {
    /// The peer's address.
    pub ip: IpAddr,
    /// Its router's TCP port; our own router's port if it is not told.
    pub port: Option<u16>,
}

/// A peer that a source names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapPeer {
    /// Its identity in text form, if the source tells it; else it is learned by dialling.
    pub id: Option<String>,
    /// Where to dial it. Never empty.
    pub addresses: Vec<BootstrapAddress>,
}

/// Why a source did not answer. Asking again later can help with each of these.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// A name could not be resolved: the name servers failed or did not answer. A name that does not exist is an answer.
    #[error("cannot resolve {name}: {reason}")]
    Resolve {
        /// The name that was asked for.
        name: String,
        /// What the resolver said.
        reason: String,
    },
    /// No answer within the time that the source gives itself.
    #[error("no answer about {name} within {seconds} s")]
    Timeout {
        /// What was asked for.
        name: String,
        /// How long was waited.
        seconds: u64,
    },
    /// What was asked refuses, or says what is not understood.
    #[error("no list of peers from {name}: {reason}")]
    Answer {
        /// What was asked.
        name: String,
        /// What happened instead.
        reason: String,
    },
    /// Some of what the source knows could not be found out; the rest is here.
    #[error("{reason}")]
    Partial {
        /// The peers that are known all the same.
        found: Vec<BootstrapPeer>,
        /// What is missing, as the first error said it.
        reason: String,
    },
}

/// A source of first peers. It bounds its own time.
#[async_trait]
pub trait Bootstrap: Send + Sync + fmt::Debug + 'static {
    /// The peers that are known now, this node perhaps among them. An empty list is an answer: nobody is there.
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError>;
}
