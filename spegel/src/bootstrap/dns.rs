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
    /// Other name servers than the system's.
    servers: Option<(ResolverConfig, ResolverOpts)>,
}

// === impl DnsBootstrap ===

impl DnsBootstrap {
    /// A source that asks the system's name servers (`/etc/resolv.conf`, its search domains included) for `domain`.
    pub fn new(domain: &str) -> Self {
        Self { domain: domain.to_owned(), servers: None }
    }

    /// Made anew for each question: what the system's configuration says changes when a host gets its address, and a question is rare.
    fn resolver(&self) -> io::Result<TokioResolver> {
        let (config, mut options) = match &self.servers {
            Some(servers) => servers.clone(),
            None => hickory_resolver::system_conf::read_system_conf().map_err(io::Error::other)?,
        };
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.timeout = SERVER_TIMEOUT;
        // Who is there changes by the second while a cluster starts: an old answer would hide it.
        options.cache_size = 0;
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        builder.with_options(options).build().map_err(io::Error::other)
    }
}

#[async_trait]
impl Bootstrap for DnsBootstrap {
    async fn peers(&self) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        let name = || self.domain.clone();
        let resolver =
            self.resolver().map_err(|error| BootstrapError::Resolve { name: name(), reason: error.to_string() })?;
        let answer = tokio::time::timeout(TIMEOUT, resolver.lookup_ip(self.domain.as_str()))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hickory_resolver::config::{ConnectionConfig, NameServerConfig};
    use hickory_resolver::proto::op::{Message, ResponseCode};
    use hickory_resolver::proto::rr::rdata::{A, AAAA};
    use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
    use tokio::net::UdpSocket;

    use super::*;

    /// A name server that knows `peers.test.`, two addresses of each family behind it, and `empty.test.` without any.
    async fn serve(socket: UdpSocket) {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let request = Message::from_vec(&buffer[..length]).unwrap();
            let query = request.queries[0].clone();
            let mut response = Message::response(request.metadata.id, request.metadata.op_code);
            let name = query.name().to_ascii();
            let data = match (name.as_str(), query.query_type()) {
                ("peers.test.", RecordType::A) => vec![RData::A(A::new(10, 0, 0, 1)), RData::A(A::new(10, 0, 0, 2))],
                ("peers.test.", RecordType::AAAA) => vec![RData::AAAA(AAAA::new(0xfd00, 0, 0, 0, 0, 0, 0, 1))],
                _ => vec![],
            };
            response.metadata.response_code = match name.as_str() {
                "peers.test." | "empty.test." => ResponseCode::NoError,
                "broken.test." => ResponseCode::ServFail,
                _ => ResponseCode::NXDomain,
            };
            response.add_answers(data.into_iter().map(|data| Record::from_rdata(query.name().clone(), 5, data)));
            response.add_query(query);
            socket.send_to(&response.to_vec().unwrap(), from).await.unwrap();
        }
    }

    async fn ask(domain: &str) -> Result<Vec<BootstrapPeer>, BootstrapError> {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let mut connection = ConnectionConfig::udp();
        connection.port = address.port();
        let server = NameServerConfig::new(address.ip(), true, vec![connection]);
        let search = vec![Name::from_ascii("test.").unwrap()];
        let config = ResolverConfig::from_parts(None, search, vec![server]);
        let mut options = ResolverOpts::default();
        options.attempts = 1;
        let source = DnsBootstrap { domain: domain.to_owned(), servers: Some((config, options)) };
        let server = tokio::spawn(serve(socket));
        let answer = source.peers().await;
        server.abort();
        answer
    }

    #[tokio::test]
    async fn every_address_is_a_peer_with_our_port() {
        let ips = ["10.0.0.1", "10.0.0.2", "fd00::1"];
        let expected = ips.map(|ip| BootstrapPeer {
            id: None,
            addresses: vec![BootstrapAddress { ip: ip.parse().unwrap(), port: None }],
        });
        for domain in ["peers.test.", "peers.test", "peers"] {
            assert_eq!(ask(domain).await.unwrap(), expected, "{domain}");
        }
    }

    #[tokio::test]
    async fn name_that_is_not_there_or_empty_names_nobody() {
        assert_eq!(ask("nobody.test.").await.unwrap(), []);
        assert_eq!(ask("empty.test.").await.unwrap(), []);
    }

    #[tokio::test]
    async fn failing_server_is_no_answer() {
        let error = ask("broken.test.").await.unwrap_err();
        assert!(matches!(error, BootstrapError::Resolve { .. }));
        assert!(error.to_string().contains("broken.test."), "{error}");
    }
}
