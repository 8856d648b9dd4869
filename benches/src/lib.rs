//! What spegel's tests, benches and xtask share: images made from a seed, network namespaces, and real daemons.
//!
//! Blocking throughout: it starts processes and waits for them. It depends on nothing of spegel and on nothing that needs
//! the protobuf compiler, because xtask is what hands that over.

pub mod bare;
pub mod containerd;
pub mod daemon;
pub mod faults;
pub mod gopeer;
pub mod http;
pub mod image;
pub mod load;
pub mod memory_group;
pub mod netns;
pub mod registry;
pub mod spegel;
pub mod storm;
