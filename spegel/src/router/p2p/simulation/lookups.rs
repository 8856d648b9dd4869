//! Lookups in a network that stands still meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use libp2p::PeerId;
use rand::Rng as _;
use rand::seq::IteratorRandom as _;

use super::super::client::REQUEST_TIMEOUT;
use super::super::keys::ContentId;
use super::super::quest::{Answer, Quest, Step};
use super::super::table::Contact;
use super::{COLD, Network, SERVICE, position};

/// To which of those who are asked there are connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connections {
    All,
    None,
    /// To those in the table and those used within a minute.
    AsTheyAre,
}

/// How one lookup went.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// When the first provider that lives was named.
    pub(super) first: Option<Duration>,
    pub(super) provider: Option<PeerId>,
    /// Some provider was named that does not offer it.
    pub(super) wrong: bool,
}

/// How many lookups went.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    times: Vec<f64>,
    count: usize,
    wrong: usize,
}

// === impl Outcomes ===

impl Outcomes {
    pub(super) fn add(&mut self, first: Option<Duration>, wrong: bool) {
        self.count += 1;
        self.wrong += usize::from(wrong);
        self.times.extend(first.map(|first| first.as_secs_f64() * 1e3));
    }

    pub(super) fn add_all(&mut self, others: Self) {
        self.count += others.count;
        self.wrong += others.wrong;
        self.times.extend(others.times);
    }

    /// The share that found somebody.
    pub(super) fn found(&self) -> f64 {
        self.times.len() as f64 / self.count.max(1) as f64
    }

    /// How many named somebody who does not offer the key.
    pub(super) fn wrong(&self) -> f64 {
        self.wrong as f64
    }

    /// Milliseconds until the first provider, of those that found one.
    pub(super) fn at(&mut self, share: f64) -> f64 {
        self.times.sort_by(f64::total_cmp);
        let last = self.times.len().saturating_sub(1);
        let at = (self.times.len() as f64 * share) as usize;
        self.times.get(at.min(last)).copied().unwrap_or(f64::NAN)
    }
}

impl Network {
    /// The daemon's search over a queue of answers.
    pub(super) fn look_up(&mut self, from: &PeerId, id: ContentId, connections: Connections) -> Outcome {
        let start = self.now;
        let known = self.nodes[from].table.closest(&id.position());
        let mut quest = Quest::new(start, position(from), id.position(), known);
        let mut queue: BTreeMap<(Duration, u32), (Contact, bool)> = BTreeMap::new();
        let (mut passed, mut sequence) = (Duration::ZERO, 0);
        let mut outcome = Outcome::default();
        loop {
            let until = match quest.step(start + passed) {
                Step::Ask(contact) => {
                    sequence += 1;
                    let (after, answers) = self.ask(from, &contact, connections);
                    queue.insert((passed + after, sequence), (contact, answers));
                    continue;
                }
                Step::Wait(until) => until - start,
                Step::Over(_) => return outcome,
            };
            let Some(entry) = queue.first_entry().filter(|entry| entry.key().0 <= until) else {
                passed = until;
                continue;
            };
            let ((at, _), (contact, answers)) = entry.remove_entry();
            passed = at;
            if !answers {
                quest.failed(&contact);
                continue;
            }
            let answer = self.answer(&contact.peer(), &id);
            for found in quest.answered(&contact, answer) {
                let provider = found.peer();
                match self.nodes.get(&provider) {
                    Some(node) if !node.records.offers(&id) => outcome.wrong = true,
                    Some(_) if outcome.first.is_none() && provider != *from => {
                        (outcome.first, outcome.provider) = (Some(passed), Some(provider));
                    }
                    _ => {}
                }
            }
        }
    }

    /// When an answer comes, or it is given up.
    fn ask(&mut self, from: &PeerId, to: &Contact, connections: Connections) -> (Duration, bool) {
        if !self.nodes.contains_key(&to.peer()) {
            return (REQUEST_TIMEOUT, false);
        }
        let node = &self.nodes[from];
        let open = match connections {
            Connections::All => true,
            Connections::None => false,
            Connections::AsTheyAre => {
                node.connected.contains(&to.peer())
                    || node.is_recent(self.now, &to.peer())
                    || self.nodes[&to.peer()].is_recent(self.now, from)
            }
        };
        let setup = if open { Duration::ZERO } else { COLD };
        let (there, back) = (self.link(), self.link());
        (setup + there + SERVICE + back, true)
    }

    /// As the daemon's record store and kad answer.
    fn answer(&mut self, peer: &PeerId, id: &ContentId) -> Answer {
        let node = &self.nodes[peer];
        let told = node.records.others(self.now, id, &mut self.rng);
        let mut providers: Vec<Contact> = told.iter().map(|(peer, addresses)| Contact::new(*peer, addresses)).collect();
        if node.records.offers(id) {
            let place = self.rng.random_range(0..=providers.len());
            providers.insert(place, node.contact.clone());
        }
        Answer { providers, closer: node.kad.closest(&id.position()) }
    }

    /// Many lookups from any nodes, of keys that somebody who lives offers.
    pub(super) fn look_up_many(&mut self, count: usize, ids: &[ContentId], connections: Connections) -> Outcomes {
        let mut outcomes = Outcomes::default();
        for _ in 0..count {
            let id = *ids.iter().choose(&mut self.rng).unwrap();
            let from = self.any();
            // What it has itself it does not look for.
            if self.providers(&id).iter().all(|provider| *provider == from) {
                continue;
            }
            let outcome = self.look_up(&from, id, connections);
            outcomes.add(outcome.first, outcome.wrong);
        }
        outcomes
    }
}
