//! A story while it happens.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Break, Carriage, Met, Origin, Trace};

/// The longest text of a peer's failure that is kept, in bytes.
const LONGEST: usize = 200;

/// What a request meets, as it meets it: each part that works for it has a clone.
#[derive(Clone, Debug)]
pub struct Tale {
    trace: Trace,
    /// Nothing where nobody will hear it.
    met: Option<Arc<Mutex<Met>>>,
}

/// A request is held until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Holding {
    tale: Tale,
    since: Instant,
}

// === impl Tale ===

impl Tale {
    /// Nothing has been met yet.
    pub fn new(trace: Trace) -> Self {
        Self { trace, met: Some(Arc::default()) }
    }

    /// One that nobody will hear, of which only the id is used.
    pub fn unheard(trace: Trace) -> Self {
        Self { trace, met: None }
    }

    /// For requests to peers that are on the side: they have the same id and leave no trace in the story.
    pub fn aside(&self) -> Self {
        Self::unheard(self.trace)
    }

    /// The request's id.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// A peer is said to have it.
    pub fn knows(&self) {
        self.note(|met| met.known += 1);
    }

    /// A peer is asked, while another one's answer is waited for or not.
    pub fn asks(&self, is_race: bool) {
        self.note(|met| {
            met.asked += 1;
            met.raced |= is_race;
        });
    }

    /// Peers are asked beside one that was asked before.
    pub fn races(&self) {
        self.note(|met| met.raced = true);
    }

    /// A peer gave nothing.
    pub fn failed(&self, peer: Option<SocketAddr>, why: &dyn Display) {
        self.note(|met| {
            met.failure = Some(peer.map_or_else(|| bounded(why), |peer| bounded(&format!("{peer}: {why}"))));
        });
    }

    /// A peer gives it. Who goes on after another is told by [`Tale::goes_on`].
    pub fn given(&self, peer: Option<SocketAddr>, found: Origin) {
        self.note(|met| {
            if met.found.is_none() {
                (met.peer, met.found) = (peer, Some(found));
            }
        });
    }

    /// How the bytes come.
    pub fn carried(&self, carriage: Carriage) {
        self.note(|met| met.carried = Some(carriage));
    }

    /// A peer broke off, or is left, before byte `offset` of the body.
    pub fn broke(&self, offset: u64, from: SocketAddr, why: &dyn Display) {
        self.note(|met| {
            // The last place is for the last one, which may be the one that ended it.
            met.breaks.truncate(Met::MOST_BREAKS - 1);
            met.breaks.push(Break { offset, from, to: None, why: bounded(why) });
        });
    }

    /// Another peer goes on where one broke off.
    pub fn goes_on(&self, to: SocketAddr) {
        self.note(|met| {
            met.resumed += 1;
            if let Some(last) = met.breaks.last_mut() {
                last.to = Some(to);
            }
        });
    }

    /// Somebody else is about to get it, and is waited for.
    pub fn hold(&self) -> Holding {
        Holding { tale: self.clone(), since: Instant::now() }
    }

    /// What has been met until now.
    pub fn met(&self) -> Met {
        self.met.as_deref().map(|met| lock(met).clone()).unwrap_or_default()
    }

    fn note(&self, what: impl FnOnce(&mut Met)) {
        if let Some(met) = self.met.as_deref() {
            what(&mut lock(met));
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let held = self.since.elapsed();
        self.tale.note(|met| met.held += held);
    }
}

fn lock(met: &Mutex<Met>) -> MutexGuard<'_, Met> {
    met.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bounded(text: &dyn Display) -> String {
    let mut text = text.to_string();
    let end = (0..=LONGEST.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn peer(n: u8) -> SocketAddr {
        ([10, 0, 0, n], 5000).into()
    }

    #[test]
    fn clones_tell_one_story() {
        let tale = Tale::new(Trace::of(None));
        let other = tale.clone();
        other.knows();
        other.asks(false);
        tale.failed(Some(peer(1)), &"answered 404");
        other.asks(true);
        other.given(Some(peer(2)), Origin::Lookup);
        drop(other.hold());
        let met = tale.met();
        assert_eq!((met.known, met.asked, met.raced), (1, 2, true));
        assert_eq!((met.peer, met.found), (Some(peer(2)), Some(Origin::Lookup)));
        assert_eq!(met.failure.unwrap(), "10.0.0.1:5000: answered 404");
        assert!(met.held > std::time::Duration::ZERO);
    }

    #[test]
    fn who_goes_on_does_not_take_the_first_ones_place() {
        let tale = Tale::new(Trace::of(None));
        tale.given(Some(peer(1)), Origin::Remembered);
        tale.broke(7, peer(1), &"connection reset");
        tale.given(Some(peer(2)), Origin::Lookup);
        tale.goes_on(peer(2));
        tale.broke(9, peer(2), &"stalled");
        let met = tale.met();
        assert_eq!((met.peer, met.found, met.resumed), (Some(peer(1)), Some(Origin::Remembered), 1));
        let told: Vec<_> = met.breaks.iter().map(ToString::to_string).collect();
        let first = "at byte 7 from 10.0.0.1:5000 to 10.0.0.2:5000: connection reset";
        assert_eq!(told, [first, "at byte 9 from 10.0.0.2:5000 to nobody: stalled"]);
    }

    #[test]
    fn what_a_hostile_peer_makes_long_is_bounded() {
        let tale = Tale::new(Trace::of(None));
        for n in 0..100 {
            tale.broke(n, peer(1), &"é".repeat(500));
            tale.goes_on(peer(2));
        }
        let met = tale.met();
        assert_eq!((met.breaks.len(), met.resumed, met.breaks[7].offset), (Met::MOST_BREAKS, 100, 99));
        assert!(met.breaks.iter().all(|one| one.why.len() == LONGEST));
    }

    #[test]
    fn what_is_on_the_side_has_the_id_only() {
        let tale = Tale::new(Trace::of(None));
        tale.aside().asks(true);
        assert_eq!((tale.met(), tale.aside().trace()), (Met::default(), tale.trace()));
    }
}
