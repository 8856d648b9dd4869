//! The suite for the network inside one process.

use std::net::SocketAddr;

use spegel::router::MemoryNetwork;

use super::conformance::{Network, Node, suite};

struct InMemory {
    network: MemoryNetwork,
    joined: u16,
}

impl InMemory {
    fn new() -> Self {
        Self { network: MemoryNetwork::new(), joined: 0 }
    }

    fn start(&mut self, registry: SocketAddr) -> Node {
        self.joined += 1;
        let id = format!("node-{}", self.joined);
        let router = self.network.join(&id, registry);
        Node { router: router.clone(), id: id.into(), registry, _membership: Box::new(router) }
    }
}

impl Network for InMemory {
    async fn join(&mut self) -> Node {
        let registry = SocketAddr::from(([127, 0, 0, 1], 6000 + self.joined));
        self.start(registry)
    }

    async fn replace(&mut self, node: Node) -> Node {
        let registry = node.registry;
        drop(node);
        self.start(registry)
    }
}

suite!(InMemory::new());
