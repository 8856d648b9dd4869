//! What this process may do, as far as eBPF needs it: `CAP_BPF` to load, `CAP_NET_ADMIN` for programs of this kind, and
//! `CAP_PERFMON`, without which the verifier guards against speculation and refuses loops over the stack that are fine otherwise. Nothing of that
//! is needed once they are attached.

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// What loading and attaching need.
pub(super) const NEEDED: CapabilitySet =
    CapabilitySet::BPF.union(CapabilitySet::NET_ADMIN).union(CapabilitySet::PERFMON);

/// What is given up: what was needed, and what includes it.
const DROPPED: CapabilitySet = NEEDED.union(CapabilitySet::SYS_ADMIN);

/// Whether this thread may load and attach.
pub(super) fn suffices() -> bool {
    capabilities(None).is_ok_and(|sets| {
        let is_admin = sets.effective.contains(CapabilitySet::SYS_ADMIN);
        let may_load = sets.effective.contains(CapabilitySet::BPF | CapabilitySet::PERFMON);
        (is_admin || may_load) && sets.effective.contains(CapabilitySet::NET_ADMIN)
    })
}

/// Gives up for good, in this thread and those that it starts from now on, what eBPF needs.
pub(super) fn drop_all() {
    drop_to(CapabilitySet::empty());
}

/// As [`drop_all`], but if the kernel then does not let this thread read what it has loaded, as before 5.19 where `kernel.unprivileged_bpf_disabled`
/// is set, it keeps `CAP_BPF` alone. Says what was kept.
pub(super) fn drop_but_for_reading(can_read: impl Fn() -> bool) -> &'static str {
    let Ok(mut sets) = capabilities(None) else { return "" };
    let before = sets.effective;
    sets.effective = before.difference(DROPPED);
    let tried = set_capabilities(None, sets).is_ok() && can_read();
    if tried || !sets.permitted.contains(CapabilitySet::BPF) {
        drop_all();
        return "";
    }
    drop_to(CapabilitySet::BPF);
    "CAP_BPF, in the one thread that reads"
}

fn drop_to(kept: CapabilitySet) {
    let dropped = DROPPED.difference(kept);
    if let Ok(mut sets) = capabilities(None) {
        for set in [&mut sets.permitted, &mut sets.inheritable] {
            *set = set.difference(dropped);
        }
        sets.effective = sets.effective.union(kept).intersection(sets.permitted);
        // To give up is always allowed.
        let _ = set_capabilities(None, sets);
    }
}
