//! The few things that are asked of the Kubernetes API, or changed through it, with the rights of the pod's service account.
//!
//! All of them are off unless the chart is told otherwise, but for the wait of an uninstall: a mirror needs no API.

mod api;
mod objects;
mod taint;

pub(crate) use api::with_causes;
pub use api::{Api, ApiError, ApiSettings};
pub(crate) use objects::{DaemonSet, Pod};
pub use taint::{StartupTaint, remove_startup_taint};
