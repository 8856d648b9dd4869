//! Requests for the same small content at the same time are one request to the network: who comes while the first is under way takes
//! what that is given. What turns out to be large each of them relays for itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};

use super::Verified;
use crate::oci::Key;
use crate::router::Peer;

/// How many are remembered until those that are over are forgotten.
const CAPACITY: usize = 1024;

/// The requests that are under way.
#[derive(Debug, Default)]
pub(super) struct Flights {
    by_key: Mutex<HashMap<Key, Weak<Flight>>>,
}

/// Those for one key.
#[derive(Debug, Default)]
pub(super) struct Flight {
    state: AsyncMutex<Landed>,
}

/// What the first request came to.
#[derive(Debug, Default)]
pub(super) enum Landed {
    /// Nothing yet: whoever sees this makes it.
    #[default]
    Not,
    /// Content that all can have.
    Content(Box<(Peer, Verified)>),
    /// Nothing, or a body that cannot be shared: each request is its own.
    Apart,
}

// === impl Flights ===

impl Flights {
    /// The requests for a key that are under way, of which the caller's is now one, as long as it keeps this.
    pub(super) fn join(&self, key: &Key) -> Arc<Flight> {
        let mut by_key = self.by_key.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = by_key.get(key).and_then(Weak::upgrade) {
            return flight;
        }
        if by_key.len() >= CAPACITY {
            by_key.retain(|_, flight| flight.strong_count() > 0);
        }
        let flight = Arc::new(Flight::default());
        by_key.insert(key.clone(), Arc::downgrade(&flight));
        flight
    }
}

// === impl Flight ===

impl Flight {
    /// Waits until the request before has come to something; if it was given up, the next one makes it anew.
    pub(super) async fn turn(&self) -> AsyncMutexGuard<'_, Landed> {
        self.state.lock().await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(n: u32) -> Key {
        Key::Digest(format!("sha256:{n:064x}").parse().unwrap())
    }

    #[test]
    fn who_comes_while_it_is_under_way_joins_it() {
        let flights = Flights::default();
        let first = flights.join(&key(1));
        assert!(Arc::ptr_eq(&first, &flights.join(&key(1))) && !Arc::ptr_eq(&first, &flights.join(&key(2))));
        *first.state.try_lock().unwrap() = Landed::Apart;
        drop(first);
        assert!(matches!(*flights.join(&key(1)).state.try_lock().unwrap(), Landed::Not), "over is over");
    }

    #[test]
    fn memory_is_bounded() {
        let flights = Flights::default();
        let held = flights.join(&key(0));
        for n in 1..3 * CAPACITY as u32 {
            flights.join(&key(n));
        }
        assert!(flights.by_key.lock().unwrap().len() <= CAPACITY);
        assert!(Arc::ptr_eq(&held, &flights.join(&key(0))));
    }
}
