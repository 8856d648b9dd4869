//! The log's level, asked and changed while the process runs.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Where a process on the same node asks for the log's level by GET, and changes it by PUT, with the level's name as the body.
pub const LEVEL_PATH: &str = "/debug/log-level";

/// The longest body that is read, in bytes: a level's name is shorter.
const LONGEST: usize = 64;

/// What can be logged less or more.
pub trait LogControl: fmt::Debug + Send + Sync {
    /// The present level's name.
    fn level(&self) -> String;

    /// Logs at another level from now on, whatever the case of its name.
    ///
    /// # Errors
    /// The levels that there are.
    fn set(&self, level: &str) -> Result<(), String>;
}

pub(super) fn routes(control: Arc<dyn LogControl>) -> Router {
    let route = get(tell).put(change).layer(DefaultBodyLimit::max(LONGEST));
    // PUT, so that no page in a browser can do it: it is asked first, and nobody here allows it.
    Router::new().route(LEVEL_PATH, route).with_state(control)
}

async fn tell(State(control): State<Arc<dyn LogControl>>) -> String {
    format!("{}\n", control.level())
}

async fn change(State(control): State<Arc<dyn LogControl>>, body: Bytes) -> Response {
    let before = control.level();
    match control.set(String::from_utf8_lossy(&body).trim()) {
        Ok(()) => {
            let now = control.level();
            // A warning, so that it is in the log unless only errors are.
            tracing::warn!(before, now, "the log's level was changed");
            format!("{now}\n").into_response()
        }
        Err(levels) => (StatusCode::BAD_REQUEST, format!("the levels are {levels}\n")).into_response(),
    }
}
