//! What the kernel gives us: io_uring, eBPF. Both are accelerators; nothing here is a failure.

use std::fs;

use super::finding::Finding;
use super::network::Running;

/// Whether io_uring is allowed: 0 all, 1 some, 2 nobody.
const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

/// Where the figures of connections come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ebpf {
    /// It was not told: as the running process says in its metrics.
    #[default]
    Untold,
    /// From programs in the kernel.
    Kernel,
    /// From our own sockets only, and why.
    Sockets(String),
}

pub(super) fn judge(running: Option<&Running>, ebpf: &Ebpf) -> Vec<Finding> {
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
    let told = match ebpf {
        Ebpf::Untold => running.and_then(Running::ebpf),
        told => Some(told.clone()),
    };
    let ebpf = match told {
        Some(Ebpf::Kernel) => {
            Finding::good("ebpf", "programs in the kernel count what containerd gets from registries and from peers")
        }
        Some(Ebpf::Sockets(why)) => Finding::note(
            "ebpf",
            format!(
                "no program in the kernel counts what containerd gets from registries ({why}): it takes CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; everything else works without"
            ),
        ),
        Some(Ebpf::Untold) | None => Finding::note(
            "ebpf",
            "whether programs in the kernel count is not known while spegel does not run; everything else works without",
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
        assert_eq!(judge_switch(None).state, State::Note);
    }

    #[test]
    fn where_figures_come_from_is_told_and_is_no_fault() {
        let told = |ebpf: &Ebpf| judge(None, ebpf).remove(1);
        assert_eq!(told(&Ebpf::Kernel).state, State::Good);
        let sockets = told(&Ebpf::Sockets("the kernel is too old".into()));
        assert!(sockets.state == State::Note && sockets.said.contains("(the kernel is too old)"), "{sockets:?}");
        assert_eq!(told(&Ebpf::Untold).state, State::Note);
    }
}
