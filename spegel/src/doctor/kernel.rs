//! What the kernel gives us: io_uring, eBPF. Both are accelerators; nothing here is a failure.

use std::fs;

use super::finding::Finding;
use super::network::Running;

/// Whether io_uring is allowed: 0 all, 1 some, 2 nobody.
const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

/// What the kernel programs do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ebpf {
    /// They are not loaded.
    #[default]
    Off,
}

pub(super) fn judge(running: Option<&Running>, ebpf: Ebpf) -> Vec<Finding> {
    let engine = running.and_then(Running::engine);
    let ring = match engine {
        Some((engine, reason)) if engine == "io-uring" => {
            Finding::good("io_uring", format!("the mirror reads cold files by io_uring ({reason})"))
        }
        Some((_, reason)) => Finding::note(
            "io_uring",
            format!(
                "the mirror reads cold files by threads instead of io_uring ({reason}): containerd 2's and Docker's seccomp profiles forbid it, and kernel.io_uring_disabled may; nothing else changes"
            ),
        ),
        None => judge_switch(fs::read_to_string(SWITCH).ok().as_deref()),
    };
    let ebpf = match ebpf {
        Ebpf::Off => Finding::note(
            "ebpf",
            "no kernel program counts what containerd gets from registries; everything else works without",
        ),
    };
    vec![ring, ebpf]
}

fn judge_switch(value: Option<&str>) -> Finding {
    match value.map(str::trim) {
        Some("0") => Finding::good("io_uring", "the kernel allows io_uring"),
        Some(value) => Finding::note(
            "io_uring",
            format!("kernel.io_uring_disabled is {value}: cold files are read by threads; nothing else changes"),
        ),
        None => Finding::note(
            "io_uring",
            "the kernel does not say whether io_uring is allowed; without it cold files are read by threads",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    #[test]
    fn a_kernel_that_forbids_io_uring_is_named() {
        assert_eq!(judge_switch(Some("0\n")).state, State::Good);
        let forbidden = judge_switch(Some("2\n"));
        assert!(forbidden.state == State::Note && forbidden.said.contains("io_uring_disabled is 2"));
    }
}
