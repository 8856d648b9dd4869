//! What a node does when something happens.

use super::{
    ANSWER, Action, Asker, Budget, COORDINATORS, Child, Duration, Event, Failure, From, HoldEnd, NOTICED, Node,
    PULLS_AT_ONCE, RETRY, Rank, Request, Response, Source, Standing, USUAL, WORK, Wish, World, Zone, feed_number,
};
use rand::Rng as _;

/// How long upstream takes to say no.
const REFUSAL: Duration = Duration::from_millis(150);
/// How many sources a plain lookup finds.
const FOUND: usize = 20;
/// How many clients a node serves at a time where the protocol is off.
const SERVED: usize = 64;

impl World {
    pub(super) fn on(&mut self, event: Event) {
        match event {
            Event::Start(node) => {
                let member = &mut self.members[node];
                member.started = Some(self.now);
                member.budget = Budget::new(self.scenario.storm.unwrap_or_default(), self.now);
                self.next_blobs(node);
            }
            Event::Request { to, from, blob, request } => self.on_request(to, from, blob, &request),
            Event::Response { to, blob, number, response } => self.on_response(to, blob, number, response),
            Event::Wake { node, blob } => {
                let at = &mut self.members[node].blobs[blob];
                at.wake = at.wake.filter(|wake| *wake > self.now);
                self.drive(node, blob);
            }
            Event::Ask { parent, child, blob, rank, pull } => self.on_ask(parent, child, blob, rank, pull),
            Event::Refused { child, blob, failure, pull } => {
                if self.members[child].blobs[blob].pull == pull {
                    self.parent_failed(child, blob, failure);
                }
            }
            Event::Probed { parent, child, blob, pull } => self.on_probed(parent, child, blob, pull),
            Event::Upstream { node, blob, pull } => self.on_upstream(node, blob, pull),
            Event::Die { node, silent } => self.on_death(node, silent),
        }
    }

    /// containerd asks for the manifest, then for the config and the layers, three at a time.
    pub(super) fn next_blobs(&mut self, node: usize) {
        if self.members[node].died.is_some() {
            return;
        }
        loop {
            let blobs = &self.members[node].blobs;
            let pulling = blobs.iter().filter(|blob| blob.asked && !blob.done).count();
            let most = if blobs[0].done { PULLS_AT_ONCE } else { 1 };
            let Some(next) = blobs.iter().position(|blob| !blob.asked).filter(|_| pulling < most) else { return };
            self.members[node].blobs[next].asked = true;
            self.pull(node, next);
        }
    }

    fn pull(&mut self, node: usize, blob: usize) {
        let now = self.now;
        if self.scenario.storm.is_none() || !self.members[node].speaks {
            return self.look_up(node, blob);
        }
        let coordinators = self.coordinators(blob);
        let member = &mut self.members[node];
        member.numbers = member.numbers.max(1 + now.duration_since(self.start).as_micros() as u64);
        let number = member.numbers;
        let Some((hold, deadline)) = member.budget.begin(now) else {
            self.totals.given_up += 1;
            return self.go_upstream(node, blob);
        };
        let pulls = member.blobs.iter().any(|blob| blob.from == Some(From::Upstream));
        let busy = pulls && member.shared && !member.left_in_vain;
        // What a daemon sees of it: whole MiB, and what is smaller when it is there.
        let fed = member.blobs.iter().any(|blob| blob.from.is_some() && !blob.done && blob.position >= 1048576.0);
        let at = &mut member.blobs[blob];
        let (key, total) = (self.keys[blob], self.lengths[blob]);
        let wish = Wish { key, position: at.position as u64, total: Some(total), usual: None, busy, fed };
        let slots = member.parent.slots(Some(total), false);
        let at = &mut member.blobs[blob];
        at.child = Some(Child::new(wish, slots, coordinators, number, deadline, now));
        at.hold = Some((hold, now));
        self.holds(node);
        self.drive(node, blob);
    }

    fn coordinators(&self, blob: usize) -> Vec<Node> {
        let seems_alive = |node: &&usize| {
            let member = &self.members[**node];
            member.died.is_none_or(|died| self.now < died + NOTICED && member.silent)
        };
        self.nearest[blob].iter().filter(seems_alive).take(COORDINATORS).map(|node| Node(*node as u64)).collect()
    }

    fn holds(&mut self, node: usize) {
        let now = self.now;
        let (count, since) = &mut self.members[node].holding;
        if *count == 0 {
            *since = now;
        }
        *count += 1;
    }

    pub(super) fn unhold(&mut self, node: usize, blob: usize, end: HoldEnd) {
        let now = self.now;
        let member = &mut self.members[node];
        if let Some((hold, _)) = member.blobs[blob].hold.take() {
            member.budget.end(hold, end, now);
            member.holding.0 -= 1;
            if member.holding.0 == 0 {
                member.held += now - member.holding.1;
            }
        }
    }

    /// Does what the child wants done.
    pub(super) fn drive(&mut self, node: usize, blob: usize) {
        let now = self.now;
        if self.members[node].died.is_some() {
            return;
        }
        while let Some(action) = self.members[node].blobs[blob].child.as_mut().and_then(|child| child.poll(now)) {
            match action {
                Action::Send { to, request } => {
                    let to = to.0 as usize;
                    self.members[node].messages += u64::from(to != node);
                    if to == node {
                        self.at(now, Event::Request { to, from: node, blob, request });
                    } else {
                        self.soon(Event::Request { to, from: node, blob, request });
                    }
                }
                Action::Fetch { parent, rank } => {
                    self.detach(node, blob);
                    self.totals.reparented += u64::from(self.members[node].blobs[blob].position > 0.0);
                    let pull = self.members[node].blobs[blob].pull;
                    self.soon(Event::Ask { parent: parent.0 as usize, child: node, blob, rank, pull });
                }
                Action::Probe { parent } => {
                    let parent = parent.0 as usize;
                    let pull = self.members[node].blobs[blob].pull;
                    let event = Event::Probed { parent, child: node, blob, pull };
                    self.at(now + 2 * self.scenario.latency, event);
                }
                Action::Pull | Action::GiveUp => {
                    let at = &self.members[node].blobs[blob];
                    let waited = at.hold.map_or(Duration::ZERO, |(_, since)| now - since);
                    let left = at.child.as_ref().is_some_and(|child| child.was_left_in_vain(waited));
                    self.members[node].left_in_vain |= left && action == Action::Pull;
                    self.totals.given_up += u64::from(action == Action::GiveUp);
                    self.unhold(node, blob, HoldEnd::InVain);
                    self.go_upstream(node, blob);
                }
                Action::SendAway => self.send_away(node, blob),
            }
        }
        let Some(wake) = self.members[node].blobs[blob].child.as_ref().and_then(Child::wake) else { return };
        let at = &mut self.members[node].blobs[blob];
        if at.wake.is_none_or(|known| wake < known) {
            at.wake = Some(wake);
            self.at(wake.max(now + Duration::from_micros(1)), Event::Wake { node, blob });
        }
    }

    fn send_away(&mut self, node: usize, blob: usize) {
        for child in self.children.get(&(node, blob)).cloned().unwrap_or_default() {
            if self.members[child].blobs[blob].position == 0.0 {
                let pull = self.members[child].blobs[blob].pull;
                self.soon(Event::Refused { child, blob, failure: Failure::Refused, pull });
            }
        }
    }

    /// containerd goes on by itself, from the byte at which it is.
    fn go_upstream(&mut self, node: usize, blob: usize) {
        self.detach(node, blob);
        self.totals.upstream_requests += 1;
        let pull = self.members[node].blobs[blob].pull;
        let refused = self.to_refuse > 0 || self.members[node].refused;
        if refused && !self.members[node].refused && blob >= 1 {
            self.to_refuse -= 1;
            self.members[node].refused = true;
        }
        let after = if self.members[node].refused {
            REFUSAL
        } else {
            self.scenario.first_byte.mul_f64(self.rng.random_range(0.8..1.2))
        };
        self.at(self.now + after, Event::Upstream { node, blob, pull });
    }

    fn on_upstream(&mut self, node: usize, blob: usize, pull: u32) {
        let now = self.now;
        let member = &mut self.members[node];
        if member.died.is_some() || member.blobs[blob].pull != pull {
            return;
        }
        if member.refused && blob >= 1 {
            // The pull fails, and is tried again after a while.
            if let Some(child) = &mut member.blobs[blob].child {
                child.gone(now);
            }
            self.drive(node, blob);
            self.send_away(node, blob);
            self.members[node].blobs[blob].asked = false;
            self.members[node].blobs[blob].pull += 1;
            self.at(now + RETRY, Event::Start(node));
            return;
        }
        member.blobs[blob].depth = 0;
        self.attach(node, blob, From::Upstream);
    }

    fn on_request(&mut self, to: usize, from: usize, blob: usize, request: &Request) {
        let now = self.now;
        let number = request.number();
        if self.members[to].died.is_some() {
            if !self.members[to].silent {
                self.soon(Event::Response { to: from, blob, number, response: None });
            }
            return;
        }
        self.members[to].messages += u64::from(to != from);
        if self.members[to].coordinator.is_new(&self.keys[blob]) {
            // The nearest keep the records of who has it.
            let done = |node: &&usize| self.members[**node].blobs[blob].done;
            let holders: Vec<Node> =
                self.found[blob].iter().filter(done).take(FOUND).map(|node| Node(*node as u64)).collect();
            let key = self.keys[blob];
            self.members[to].coordinator.holders(&key, &holders, now);
        }
        let zone = Zone((from as u32) % self.scenario.zones + 1);
        let Some(response) = self.members[to].coordinator.receive(Node(from as u64), zone, request, now) else {
            return;
        };
        self.members[to].busy = self.members[to].busy.max(now) + WORK;
        let ready = self.members[to].busy;
        let way = if to == from { Duration::ZERO } else { self.scenario.latency };
        self.members[to].messages += u64::from(to != from);
        self.at(ready + way, Event::Response { to: from, blob, number, response: Some(response) });
    }

    fn on_response(&mut self, to: usize, blob: usize, number: u64, response: Option<Response>) {
        let now = self.now;
        self.members[to].messages += 1;
        let coordinators = if response.is_none() { self.coordinators(blob) } else { Vec::new() };
        let can_move = self.members[to].budget.has_left(now);
        if let Some(child) = &mut self.members[to].blobs[blob].child {
            child.can_move(can_move);
            match response {
                Some(response) => child.answered(number, response, now),
                None => {
                    child.not_reached(number, now);
                    child.coordinators_are(coordinators);
                }
            }
            self.drive(to, blob);
        }
    }

    /// A node asks another one for a blob, by HTTP.
    fn on_ask(&mut self, parent: usize, child: usize, blob: usize, rank: Rank, pull: u32) {
        let now = self.now;
        if self.members[child].blobs[blob].pull != pull || self.members[child].died.is_some() {
            return;
        }
        if self.members[parent].died.is_some() {
            if !self.members[parent].silent {
                self.soon(Event::Refused { child, blob, failure: Failure::Broke, pull });
            }
            return;
        }
        let own = self.standing(parent, blob);
        let asker = Asker { position: self.members[child].blobs[blob].position as u64, rank: Some(rank) };
        let wants_it = self.members[parent].blobs[blob].asked;
        let member = &mut self.members[parent];
        if !wants_it || member.parent.admit(&self.keys[blob], &own, &asker).is_err() {
            return self.soon(Event::Refused { child, blob, failure: Failure::Refused, pull });
        }
        member.parent.begin(feed_number(child, blob), self.keys[blob], &asker, &own, now);
        member.shared = true;
        self.members[child].shared = true;
        self.children.entry((parent, blob)).or_default().push(child);
        self.attach(child, blob, From::Node(parent));
        if own.position > asker.position {
            let at = &mut self.members[child].blobs[blob];
            if let Some(machine) = &mut at.child {
                machine.fed(now);
            }
            self.unhold(child, blob, HoldEnd::Fed { usual: USUAL });
            self.drive(child, blob);
        }
    }

    /// A parent says how much it has, or nothing.
    fn on_probed(&mut self, parent: usize, child: usize, blob: usize, pull: u32) {
        let now = self.now;
        if self.members[child].blobs[blob].pull != pull {
            return;
        }
        if self.members[parent].died.is_some() {
            return self.at(now + ANSWER, Event::Refused { child, blob, failure: Failure::Broke, pull });
        }
        let has = self.visible(parent, blob);
        if let Some(machine) = &mut self.members[child].blobs[blob].child {
            machine.parent_has(has, now);
        }
        self.drive(child, blob);
    }

    fn standing(&self, node: usize, blob: usize) -> Standing {
        let at = &self.members[node].blobs[blob];
        Standing {
            position: self.visible(node, blob),
            complete: at.done,
            is_root: at.child.as_ref().is_some_and(|child| child.source() == Source::Upstream),
            rank: at.child.as_ref().and_then(Child::rank),
        }
    }

    fn parent_failed(&mut self, node: usize, blob: usize, failure: Failure) {
        self.detach(node, blob);
        let now = self.now;
        if self.scenario.storm.is_none() || !self.members[node].speaks {
            return self.look_up(node, blob);
        }
        let member = &mut self.members[node];
        let at = &mut member.blobs[blob];
        // Held already, it is so until the same time.
        let deadline = match at.hold {
            Some(_) => member.budget.deadline(),
            None => {
                let begun = member.budget.begin(now);
                at.hold = begun.map(|(hold, _)| (hold, now));
                begun.map(|(_, deadline)| deadline)
            }
        };
        let is_new = self.members[node].blobs[blob].hold.is_some_and(|(_, since)| since == now);
        if is_new && deadline.is_some() {
            self.holds(node);
        }
        if let Some(child) = &mut self.members[node].blobs[blob].child {
            child.failed(failure, deadline, now);
        }
        self.drive(node, blob);
    }

    fn on_death(&mut self, node: usize, silent: bool) {
        if self.members[node].died.is_some() {
            return;
        }
        (self.members[node].died, self.members[node].silent) = (Some(self.now), silent);
        for blob in 0..self.keys.len() {
            self.detach(node, blob);
            for child in self.children.remove(&(node, blob)).unwrap_or_default() {
                let pull = self.members[child].blobs[blob].pull;
                if !silent {
                    self.soon(Event::Refused { child, blob, failure: Failure::Broke, pull });
                } else if self.scenario.storm.is_none() {
                    // The relay's own stall bound.
                    let at = self.now + Duration::from_secs(5);
                    self.at(at, Event::Refused { child, blob, failure: Failure::Broke, pull });
                }
            }
        }
    }

    /// As without the protocol: whoever has it, or receives it, is asked, or else upstream.
    fn look_up(&mut self, node: usize, blob: usize) {
        let (now, speaks) = (self.now, self.members[node].speaks);
        let position = self.members[node].blobs[blob].position;
        let is_of_use = |other: &&usize| {
            let (member, at) = (&self.members[**other], &self.members[**other].blobs[blob]);
            let ahead = at.done || (speaks && at.position > position);
            **other != node && member.died.is_none() && ahead && member.parent.children() < SERVED
        };
        let found: Vec<usize> = self.found[blob].iter().rev().filter(is_of_use).take(FOUND).copied().collect();
        if found.is_empty() {
            return self.go_upstream(node, blob);
        }
        let parent = found[self.rng.random_range(0..found.len())];
        let own = self.standing(parent, blob);
        let key = self.keys[blob];
        let asker = Asker { position: position as u64, rank: None };
        self.members[parent].parent.begin(feed_number(node, blob), key, &asker, &own, now);
        self.members[node].shared = true;
        self.children.entry((parent, blob)).or_default().push(node);
        self.attach(node, blob, From::Node(parent));
    }

    /// Every node looks at its children, and every child at its parent.
    pub(super) fn look(&mut self) {
        if self.scenario.storm.is_none() {
            return;
        }
        let now = self.now;
        for (node, blob) in self.active.clone() {
            let Some(From::Node(parent)) = self.members[node].blobs[blob].from else { continue };
            let own = self.standing(parent, blob);
            let sent = self.members[node].blobs[blob].position as u64;
            self.members[parent].parent.sent(feed_number(node, blob), sent, &own);
        }
        for node in 0..self.members.len() {
            if self.members[node].parent.children() > 0 {
                let received: f64 = self.members[node].blobs.iter().map(|blob| blob.position).sum();
                self.members[node].parent.received(received as u64);
            }
            if self.members[node].died.is_some() || self.members[node].parent.children() == 0 {
                continue;
            }
            let looked = self.members[node].parent.look(now);
            if let Some(number) = looked.shed {
                let (child, blob) = ((number >> 16) as usize, (number & 0xffff) as usize);
                let pull = self.members[child].blobs[blob].pull;
                // It cannot tell this from a crash.
                self.soon(Event::Refused { child, blob, failure: Failure::Broke, pull });
            }
            if looked.changed {
                self.tell_slots(node);
            }
        }
    }

    fn tell_slots(&mut self, node: usize) {
        for blob in 0..self.keys.len() {
            let total = Some(self.lengths[blob]);
            let member = &mut self.members[node];
            let slots = member.parent.slots(total, member.blobs[blob].done);
            if let Some(child) = &mut member.blobs[blob].child {
                child.takes(slots);
                self.drive(node, blob);
            }
        }
    }
}
