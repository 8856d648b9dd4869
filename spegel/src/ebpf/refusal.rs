//! Why the kernel cannot be asked, in words that say what to change.

use std::fs;
use std::io;

use super::privilege;

/// The names of all refusals, and that of none.
pub(super) const REASONS: [&str; 10] = [
    "",
    "off",
    "old_kernel",
    "no_cgroup2",
    "no_privilege",
    "forbidden",
    "rejected",
    "not_attached",
    "too_slow",
    "other",
];

/// Why there are no programs in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nobody wanted them.
    #[error("it is turned off")]
    Off,
    /// The kernel lacks what they use.
    #[error("Linux {0} is too old: 5.15 is needed")]
    OldKernel(String),
    /// There is no second version of control groups to attach to.
    #[error("no control group of version 2 of this process is mounted here ({0})")]
    NoCgroup2(String),
    /// This process may not.
    #[error("CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed{0}")]
    NoPrivilege(String),
    /// It has the capabilities, and may not all the same.
    #[error("bpf(2) is refused in spite of the capabilities: {0}")]
    Forbidden(String),
    /// The verifier, or the loader, does not like a program.
    #[error("the kernel does not take the program: {0}")]
    Rejected(String),
    /// They are loaded, and could not be attached.
    #[error("cannot attach to {0}")]
    NotAttached(String),
    /// Loading did not end.
    #[error("loading did not end in time")]
    TooSlow,
    /// Something else.
    #[error("{0}")]
    Other(String),
}

// === impl Refusal ===

impl Refusal {
    /// A short name, for metrics: one of `REASONS`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::OldKernel(_) => "old_kernel",
            Self::NoCgroup2(_) => "no_cgroup2",
            Self::NoPrivilege(_) => "no_privilege",
            Self::Forbidden(_) => "forbidden",
            Self::Rejected(_) => "rejected",
            Self::NotAttached(_) => "not_attached",
            Self::TooSlow => "too_slow",
            Self::Other(_) => "other",
        }
    }

    /// What a kernel's answer to loading means here. `text` is all that is known of it, the verifier's log included.
    pub(super) fn of(error: Option<&io::Error>, text: String) -> Self {
        match error.and_then(io::Error::raw_os_error).map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) if !privilege::suffices() => Self::no_privilege(),
            Some(rustix::io::Errno::PERM | rustix::io::Errno::NOSYS) => Self::Forbidden(who_forbids()),
            _ => Self::Rejected(text),
        }
    }

    pub(super) fn no_privilege() -> Self {
        Self::NoPrivilege(match setting("/proc/sys/kernel/unprivileged_bpf_disabled").as_deref() {
            Some("0") => String::new(),
            Some(value) => format!(" (kernel.unprivileged_bpf_disabled is {value})"),
            None => String::new(),
        })
    }
}

/// What may stand in the way of one who has the capabilities.
fn who_forbids() -> String {
    let lockdown = setting("/sys/kernel/security/lockdown").unwrap_or_default();
    if let Some(mode) = lockdown.split('[').nth(1).and_then(|rest| rest.split(']').next())
        && mode != "none"
    {
        return format!("the kernel is locked down ({mode})");
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2")) {
        return "by the seccomp profile".into();
    }
    "by a security module, or from within a user namespace".into()
}

fn setting(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}
