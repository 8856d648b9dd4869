//! spegel's integration tests: conformance suites that several implementations share, and the real daemons end to end.

mod cleanup;
mod e2e;
mod ebpf;
mod fuzz;
mod hosts;
mod kube;
mod metrics;
mod oci;
mod registry;
mod router;
mod serve;
mod store;
