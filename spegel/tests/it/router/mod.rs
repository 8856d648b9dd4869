//! Tests of `router`: one suite that every implementation passes.
#![allow(clippy::unwrap_used)]

mod conformance;
mod golang;
mod joining;
mod memory;
mod p2p;
mod stock;
