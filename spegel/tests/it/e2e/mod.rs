//! Real daemons in network namespaces of their own: a docker-registry as upstream, containerds, and the program itself.
//!
//! Each test makes its nodes and removes them. One that cannot run on this machine prints `skipped: ` and the reason; nothing here is
//! mocked. `cargo xtask test` installs what is needed.

#![allow(clippy::unwrap_used)]

mod accounting;
mod bad_input;
mod changes;
mod cluster;
mod cri;
mod doctor;
mod doctor_containerd;
mod doctor_peers;
mod faults;
mod kernel;
mod layers;
mod logs;
mod many;
mod mdns;
mod monitoring;
mod pulls;
mod receiving;
mod signals;
mod storms;
mod upstream;
mod web;

/// Declares each scenario as a test for containerd 1.6 and one for 2.2.
macro_rules! for_each_containerd {
    ($($scenario:ident),+ $(,)?) => {
        mod containerd_1_6 {
            $(#[test]
            fn $scenario() {
                super::$scenario(spegel_benches::containerd::Version::V1_6);
            })+
        }
        mod containerd_2_2 {
            $(#[test]
            fn $scenario() {
                super::$scenario(spegel_benches::containerd::Version::V2_2);
            })+
        }
    };
}
use for_each_containerd;
