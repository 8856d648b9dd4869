//! Bytes as a fluid: what flows between nodes in a short time, by what their links can carry.

/// Where a flow comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Upstream,
    Node(usize),
}

/// One connection that has something to carry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    pub(super) from: From,
    pub(super) to: usize,
    /// How many bytes it would carry now.
    pub(super) wants: f64,
    /// How many it does.
    pub(super) gets: f64,
}

/// What the links carry in one step, in bytes.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) upstream: f64,
    pub(super) up: Vec<f64>,
    pub(super) down: Vec<f64>,
}

/// A link during a step: what is left of it, and how many flows want of it.
#[derive(Clone, Copy, Debug, Default)]
struct Left {
    bytes: f64,
    flows: u32,
}

/// How many times what some flows leave is shared among the others.
const ROUNDS: usize = 4;

/// Shares the links, memory that is used again from step to step.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    up: Vec<Left>,
    down: Vec<Left>,
    upstream: Left,
}

impl Sharing {
    /// Says what each flow gets: nearly the fairest shares of all links (max-min), never more than a link carries.
    pub(super) fn share(&mut self, links: &Links, flows: &mut [Flow]) {
        let fresh = |bytes: &f64| Left { bytes: *bytes, flows: 0 };
        self.up.clear();
        self.up.extend(links.up.iter().map(fresh));
        self.down.clear();
        self.down.extend(links.down.iter().map(fresh));
        self.upstream = Left { bytes: links.upstream, flows: 0 };
        for flow in flows.iter_mut() {
            flow.gets = 0.0;
            let wants = u32::from(flow.wants > 0.0);
            self.from(flow.from).flows += wants;
            self.down[flow.to].flows += wants;
        }
        for round in 0..ROUNDS {
            if !self.round(flows, false) || round + 1 == ROUNDS {
                // Nobody leaves anything to the others any more.
                self.round(flows, true);
                return;
            }
        }
    }

    /// Those get what they want who want no more than their share; in the last round the others get their share.
    fn round(&mut self, flows: &mut [Flow], is_last: bool) -> bool {
        let mut changed = false;
        for flow in flows.iter_mut().filter(|flow| flow.gets == 0.0 && flow.wants > 0.0) {
            let share = self.from(flow.from).share().min(self.down[flow.to].share());
            if flow.wants <= share || is_last {
                flow.gets = flow.wants.min(share).max(f64::MIN_POSITIVE);
                self.from(flow.from).take(flow.gets);
                self.down[flow.to].take(flow.gets);
                changed = true;
            }
        }
        changed
    }

    fn from(&mut self, from: From) -> &mut Left {
        match from {
            From::Upstream => &mut self.upstream,
            From::Node(node) => &mut self.up[node],
        }
    }
}

impl Left {
    fn share(&self) -> f64 {
        self.bytes / f64::from(self.flows.max(1))
    }

    fn take(&mut self, bytes: f64) {
        self.bytes = (self.bytes - bytes).max(0.0);
        self.flows = self.flows.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(from: From, to: usize, wants: f64) -> Flow {
        Flow { from, to, wants, gets: 0.0 }
    }

    #[test]
    fn what_one_leaves_the_others_get_and_no_link_carries_more_than_it_can() {
        let links = Links { upstream: 90.0, up: vec![100.0; 4], down: vec![100.0, 100.0, 100.0, 10.0] };
        let mut flows = [
            flow(From::Upstream, 0, 1000.0),
            flow(From::Upstream, 1, 20.0),
            flow(From::Node(0), 2, 1000.0),
            flow(From::Node(0), 3, 1000.0),
        ];
        Sharing::default().share(&links, &mut flows);
        let gets: Vec<f64> = flows.iter().map(|flow| flow.gets.round()).collect();
        assert_eq!(gets, [70.0, 20.0, 50.0, 10.0]);
    }
}
