//! The rooms of spegel, a stateless, cluster-local OCI image mirror, and who may enter which.
//!
//! | level | rooms | may import |
//! |---|---|---|
//! | 0 | [`oci`], [`metrics`], [`storm`], [`story`] | nothing of ours |
//! | 1 | [`zerocopy`], [`hosts`], [`bootstrap`], [`kube`] | level 0 |
//! | 2 | [`store`], [`router`], [`ebpf`] | below; `router` takes `store`'s [`store::Change`] only |
//! | 3 | [`mirror`] | below |
//! | 4 | [`registry`] | below |
//! | 5 | [`serve`], [`web`], [`cleanup`], [`doctor`] | below |
//! | 6 | [`app`], [`cli`], [`fuzz`] | all |
//!
//! `cargo xtask tidy` fails on an import that climbs.

pub mod app;
pub mod bootstrap;
pub mod cleanup;
pub mod cli;
pub mod doctor;
pub mod ebpf;
#[doc(hidden)]
pub mod fuzz;
pub mod hosts;
pub mod kube;
pub mod metrics;
pub mod mirror;
pub mod oci;
pub mod registry;
pub mod router;
pub mod serve;
pub mod store;
pub mod storm;
// Beside the room, since the simulator of xtask includes the room itself.
#[cfg(test)]
#[path = "storm/tests/mod.rs"]
mod storm_tests;
pub mod story;
pub mod web;
pub mod zerocopy;
