//! Peers behind one name, as a Kubernetes headless service has it: each address is a peer.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use async_trait::async_trait;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;

use super::{Bootstrap, BootstrapAddress, BootstrapError, BootstrapPeer};

/// How long one question may take, with all its search domains and repetitions.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How long one name server may take before the next is asked.
const SERVER_TIMEOUT: Duration = Duration::from_secs(1);

/// The A and AAAA records of a name. The router's own port is used.
#[derive(Debug)]
pub struct DnsBootstrap {
    domain: String,
    resolver: TokioResolver,
}

// === impl DnsBootstrap ===

impl DnsBootstrap {
    /// A source that asks the system's name servers (`/etc/resolv.conf`, its search domains included) for `domain`.
    ///
    /// # Errors
    ///
    /// The system's configuration cannot be read.
    pub fn new(domain: &str) -> io::Result<Self> {
        let (config, options) = hickory_resolver::system_conf::read_system_conf().map_err(io::Error::other)?;
        Self::with_config(domain, config, options)
    }

    /// A source that asks the name servers of `config`.
    fn with_config(domain: &str, config: ResolverConfig, mut options: ResolverOpts) -> io::Result<Self> {
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.timeout = SERVER_TIMEOUT;
        // Who is there changes by the second while a cluster starts: an old answer would hide it.
        options.cache_size = 0;
        let resolver = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .map_err(io::Error::other)?;
        Ok(Self { domain: domain.to_owned(), resolver })
    }
}

#[async_trait]
impl Bootstrap for DnsBootstrap {
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        let name = || self.domain.clone();
        let answer = tokio::time::timeout(TIMEOUT, self.resolver.lookup_ip(self.domain.as_str()))
            .await
            .map_err(|_| BootstrapError::Timeout { name: name(), seconds: TIMEOUT.as_secs() })?;
        let addresses: BTreeSet<IpAddr> = match answer {
            Ok(found) => found.iter().collect(),
            Err(error) if names_nobody(&error) => BTreeSet::new(),
            Err(error) => return Err(BootstrapError::Resolve { name: name(), reason: error.to_string() }),
        };
        let peer = |ip| BootstrapPeer { id: None, addresses: vec![BootstrapAddress { ip, port: None }] };
        Ok(addresses.into_iter().map(peer).collect())
    }
}

/// Whether a server said that the name does not exist or has no addresses. A server that failed says no such thing.
fn names_nobody(error: &NetError) -> bool {
    use hickory_resolver::net::DnsError;
    use hickory_resolver::proto::op::ResponseCode;
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => {
            matches!(none.response_code, ResponseCode::NXDomain | ResponseCode::NoError)
        }
        _ => false,
    }
}
