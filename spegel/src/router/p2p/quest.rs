//! One search for the providers of a key: whom to ask, how long to wait, and how it ended. Answers and a clock go in, questions come
//! out; the daemon and the simulation differ in how they carry them.

use std::time::{Duration, Instant};

use super::keys::Position;
use super::lookup::Walk;
use super::metrics::Outcome;
use super::table::Contact;

/// How long one search may take. Whoever asked has mostly stopped listening by then.
pub(super) const SEARCH_TIMEOUT: Duration = Duration::from_secs(2);

/// What a peer that was asked said.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// Those that offer the key.
    pub(super) providers: Vec<Contact>,
    /// Those that it knows to be nearer to the key.
    pub(super) closer: Vec<Contact>,
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask this one, and go on without waiting.
    Ask(Contact),
    /// Wait for an answer, but no longer than until then.
    Wait(Instant),
    /// Nothing; so it ended.
    Over(Outcome),
}

/// The search.
#[derive(Debug)]
pub(super) struct Quest {
    walk: Walk,
    ends: Instant,
    found: bool,
    hops: Option<u8>,
}

// === impl Quest ===

impl Quest {
    /// A search of the node at `local` that begins with the peers that it knows.
    pub(super) fn new(now: Instant, local: Position, target: Position, known: Vec<Contact>) -> Self {
        Self { walk: Walk::new(local, target, known), ends: now + SEARCH_TIMEOUT, found: false, hops: None }
    }

    pub(super) fn step(&mut self, now: Instant) -> Step {
        if let Some(contact) = self.walk.next(now) {
            return Step::Ask(contact);
        }
        let over = match (now >= self.ends, self.walk.is_over()) {
            (true, _) => Outcome::TimedOut,
            (_, true) => Outcome::None,
            _ => return Step::Wait(self.walk.patience(now).map_or(self.ends, |left| (now + left).min(self.ends))),
        };
        Step::Over(if self.found { Outcome::Found } else { over })
    }

    /// A peer answered. Its providers are the caller's.
    pub(super) fn answered(&mut self, peer: &Contact, answer: Answer) -> Vec<Contact> {
        if !answer.providers.is_empty() {
            self.found = true;
            self.hops.get_or_insert(self.walk.hops(peer));
        }
        self.walk.answered(peer, answer.closer);
        answer.providers
    }

    /// A peer could not be asked, or did not answer.
    pub(super) fn failed(&mut self, peer: &Contact) {
        self.walk.failed(peer);
    }

    /// How many peers in a row had to be asked until one named a provider; nothing while none has.
    pub(super) fn hops(&self) -> Option<u8> {
        self.hops
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use libp2p::PeerId;

    use super::*;

    fn contact() -> Contact {
        Contact::new(PeerId::random(), &["10.0.0.1:5001".parse().unwrap()])
    }

    fn quest(now: Instant, known: &[Contact]) -> Quest {
        let at = || Position::of_peer(&PeerId::random());
        Quest::new(now, at(), at(), known.to_vec())
    }

    #[test]
    fn it_is_over_when_all_have_answered() {
        let now = Instant::now();
        let (one, two) = (contact(), contact());
        let mut quest = quest(now, std::slice::from_ref(&one));
        assert_eq!(quest.step(now), Step::Ask(one.clone()));
        assert!(
            matches!(quest.step(now), Step::Wait(until) if until < now + SEARCH_TIMEOUT),
            "a slow one is not waited for"
        );
        assert_eq!(quest.answered(&one, Answer { providers: vec![], closer: vec![two.clone()] }), []);
        assert_eq!((quest.step(now), quest.hops()), (Step::Ask(two.clone()), None));
        let found = quest.answered(&two, Answer { providers: vec![one.clone()], closer: vec![] });
        assert_eq!((found, quest.hops()), (vec![one], Some(2)));
        assert_eq!(quest.step(now), Step::Over(Outcome::Found));
    }

    #[test]
    fn it_ends_in_time_though_nobody_answers() {
        let now = Instant::now();
        let mut quest = quest(now, &[contact()]);
        assert!(matches!(quest.step(now), Step::Ask(_)));
        let mut at = now;
        while let Step::Wait(until) = quest.step(at) {
            assert!(until > at && until <= now + SEARCH_TIMEOUT);
            at = until;
        }
        assert_eq!((at, quest.step(at)), (now + SEARCH_TIMEOUT, Step::Over(Outcome::TimedOut)));
    }

    #[test]
    fn nobody_known_is_nobody_found() {
        let now = Instant::now();
        assert_eq!(quest(now, &[]).step(now), Step::Over(Outcome::None));
        let one = contact();
        let mut quest = quest(now, std::slice::from_ref(&one));
        quest.step(now);
        quest.failed(&one);
        assert_eq!(quest.step(now), Step::Over(Outcome::None));
    }
}
