//! Arithmetic of counts.

use spegel_common::Counts;

/// Each of the counts of `a` with that of `b`.
pub(super) fn each(a: &Counts, b: &Counts, of: impl Fn(u64, u64) -> u64) -> Counts {
    Counts {
        opened: of(a.opened, b.opened),
        closed: of(a.closed, b.closed),
        failed: of(a.failed, b.failed),
        reset: of(a.reset, b.reset),
        sent: of(a.sent, b.sent),
        received: of(a.received, b.received),
        segments: of(a.segments, b.segments),
        retransmits: of(a.retransmits, b.retransmits),
    }
}

pub(super) fn sum(to: &mut Counts, more: &Counts) {
    *to = each(to, more, u64::saturating_add);
}

/// How much the kernel's counts have grown. A row that has less than before was pushed out and made anew: all that it has is new.
pub(super) fn difference(now: &Counts, before: &Counts) -> Counts {
    let fell = each(now, before, |now, before| u64::from(now < before));
    if fell == Counts::default() { each(now, before, |now, before| now - before) } else { *now }
}

/// What is left of a whole without one of its parts.
pub(super) fn difference_of_part(whole: &Counts, part: &Counts) -> Counts {
    each(whole, part, u64::saturating_sub)
}
