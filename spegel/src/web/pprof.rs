//! Where the process spends its CPU time, for the pprof tool.
//!
//! A timer of the kernel's (`ITIMER_PROF`) sends SIGPROF a hundred times in each second of CPU time, to a thread that runs, and the handler notes
//! that thread's stack. What the signal interrupts goes on by itself (`SA_RESTART`), or is asked again by who called it, as epoll_wait(2) is.

mod encode;

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use pprof::{ProfilerGuard, ProfilerGuardBuilder};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::guard;

/// Where a process on the same node gets a profile of this one. The path is that of Go's net/http/pprof.
pub const PROFILE_PATH: &str = "/debug/pprof/profile";

/// Samples in a second of CPU time. Not a hundred, so that what happens a hundred times a second is not always met, or never.
const FREQUENCY: i32 = 99;
/// How long a profile takes that does not say, in seconds, as with Go.
const USUAL: u64 = 30;
/// How long it may take, in seconds.
const BOUNDS: std::ops::RangeInclusive<u64> = 1..=60;
/// Where samples are kept that are too many for memory, if there is no directory for temporary files; a container has it.
const SHARED_MEMORY: &str = "/dev/shm";

/// What a profile may take of memory, in bytes: the profiler's table alone has a hundred MiB, twice for a moment. It is kept for the next one.
const NEEDED: u64 = 256 << 20;

/// There is one timer, so there is one profile at a time.
static TURN: Semaphore = Semaphore::const_new(1);

/// `memory_left` says how many bytes the process may still take, where that is limited.
pub(super) fn routes(memory_left: fn() -> Option<u64>) -> Router {
    Router::new().route(PROFILE_PATH, get(profile)).with_state(memory_left)
}

async fn profile(State(memory_left): State<fn() -> Option<u64>>, headers: HeaderMap, uri: Uri) -> Response {
    // A GET, since that is what the pprof tool sends.
    if let Some(why) = guard::refuses_to_act(&headers) {
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let Some(seconds) = seconds(uri.query().unwrap_or_default()) else {
        let (first, last) = BOUNDS.into_inner();
        return (StatusCode::BAD_REQUEST, format!("seconds is a number from {first} to {last}\n")).into_response();
    };
    let Ok(_turn) = TURN.try_acquire() else {
        return (StatusCode::CONFLICT, "a profile is being taken\n").into_response();
    };
    // One that was taken has left its table, but what the next one needs for a moment is as much again.
    if let Some(left) = memory_left().filter(|left| *left < NEEDED) {
        let (left, needed) = (left >> 20, NEEDED >> 20);
        let why = format!("no profile: it may take {needed} MiB, and the memory limit of this process leaves {left}\n");
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    }
    match take(Duration::from_secs(seconds)).await {
        Ok(profile) => {
            let headers = [
                (header::CONTENT_TYPE, "application/octet-stream"),
                (header::CONTENT_DISPOSITION, "attachment; filename=\"profile.pb.gz\""),
            ];
            (headers, profile).into_response()
        }
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("no profile: {why}\n")).into_response(),
    }
}

/// Dropped before its end it stops the timer.
async fn take(time: Duration) -> Result<Vec<u8>, String> {
    let guard = spawn_blocking(begin).await.map_err(|error| error.to_string())??;
    tokio::time::sleep(time).await;
    let end = move || {
        let report = guard.report().build_unresolved().map_err(|error| error.to_string())?;
        drop(guard);
        encode::encode(report).map_err(|error| error.to_string())
    };
    spawn_blocking(end).await.map_err(|error| error.to_string())?
}

fn begin() -> Result<ProfilerGuard<'static>, String> {
    if tempfile::NamedTempFile::new().is_err() {
        // It may have been set before.
        let _ = tempfile::env::override_temp_dir(std::path::Path::new(SHARED_MEMORY));
        tempfile::NamedTempFile::new().map_err(|error| format!("no place for samples: {error}"))?;
    }
    ProfilerGuardBuilder::default().frequency(FREQUENCY).build().map_err(|error| error.to_string())
}

/// What a query asks for; none if that is not allowed.
fn seconds(query: &str) -> Option<u64> {
    let asked = query.split('&').find_map(|pair| pair.strip_prefix("seconds="));
    asked.map_or(Some(USUAL), |text| text.parse().ok()).filter(|seconds| BOUNDS.contains(seconds))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use axum::body::Body;
    use axum::extract::Request;
    use tower::ServiceExt as _;

    use super::*;

    /// Killed for want of memory a node would serve nobody.
    #[tokio::test]
    async fn a_profile_that_does_not_fit_is_refused() {
        let request = Request::get("/debug/pprof/profile?seconds=1").body(Body::empty()).unwrap();
        let response = routes(|| Some(100 << 20)).oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        let said = axum::body::to_bytes(response.into_body(), 1000).await.unwrap();
        assert_eq!(said, "no profile: it may take 256 MiB, and the memory limit of this process leaves 100\n");
    }

    #[test]
    fn a_profile_takes_as_long_as_is_asked_for_within_bounds() {
        let asked = ["", "a=b", "seconds=5", "x=1&seconds=60&y", "seconds=1"].map(seconds);
        assert_eq!(asked, [Some(30), Some(30), Some(5), Some(60), Some(1)]);
        for wrong in
            ["seconds=", "seconds=0", "seconds=61", "seconds=-1", "seconds=1.5", "seconds=99999999999999999999"]
        {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }
}
