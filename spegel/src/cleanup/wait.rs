//! Waiting until every node is clean.

use std::fmt;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{Nodes, Probe};

/// Nodes that are probed at once: with 3,000 nodes a round takes a second or two, and an address that drops packets holds up
/// a hundredth of it.
const PARALLEL: usize = 100;

/// How patient to be.
#[derive(Clone, Copy, Debug)]
pub struct WaitSettings {
    /// Good rounds in a row that are believed.
    pub threshold: u32,
    /// Time from one round's end to the next.
    pub period: Duration,
    /// Time after which what is missing is told.
    pub deadline: Duration,
}

/// What kept the wait from ending well. Shown as the lines that a person needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// Nobody could say which nodes there are.
    Unknown(String),
    /// The cluster has not settled: what it still has to do.
    Unsettled(String),
    /// Nodes that have not said that they are clean, each with the reason, and how many there are in all.
    Nodes {
        /// Name and reason, sorted by name.
        missing: Vec<(String, String)>,
        /// All nodes.
        total: usize,
    },
    /// All was well in the last round, and the time was over before it was so often enough.
    TooFewRounds,
}

/// Waits until all nodes have said `threshold` times in a row that they are clean, and returns how many they are.
///
/// # Errors
/// What was missing in the last round before the deadline.
pub async fn wait(nodes: &dyn Nodes, probe: &dyn Probe, settings: WaitSettings) -> Result<usize, Unfinished> {
    let deadline = Instant::now() + settings.deadline;
    let mut good_rounds = 0;
    let mut last = Unfinished::Unknown("there was no answer in time".to_owned());
    loop {
        match timeout_at(deadline, round(nodes, probe)).await {
            Ok(Ok(total)) => {
                good_rounds += 1;
                if good_rounds >= settings.threshold {
                    return Ok(total);
                }
                last = Unfinished::TooFewRounds;
            }
            Ok(Err(unfinished)) => {
                good_rounds = 0;
                if unfinished != last {
                    tracing::info!("waiting: {}", unfinished.summary());
                }
                last = unfinished;
            }
            Err(_) => return Err(last),
        }
        let next = Instant::now() + settings.period;
        sleep_until(next.min(deadline)).await;
        if next >= deadline {
            return Err(last);
        }
    }
}

/// Looks which nodes there are, and asks each.
async fn round(nodes: &dyn Nodes, probe: &dyn Probe) -> Result<usize, Unfinished> {
    let view = nodes.look().await.map_err(Unfinished::Unknown)?;
    let total = view.nodes.len();
    let asked = stream::iter(view.nodes).map(|node| async move {
        let answer = match node.addr {
            Ok(addr) => probe.probe(addr).await,
            Err(reason) => Err(reason),
        };
        answer.err().map(|reason| (node.name, reason))
    });
    let mut missing: Vec<_> = asked.buffer_unordered(PARALLEL).filter_map(std::future::ready).collect().await;
    missing.sort_unstable();
    match view.unsettled {
        _ if !missing.is_empty() => Err(Unfinished::Nodes { missing, total }),
        Some(reason) => Err(Unfinished::Unsettled(reason)),
        None => Ok(total),
    }
}

// === impl Unfinished ===

impl Unfinished {
    /// In one line.
    fn summary(&self) -> String {
        match self {
            Self::Unknown(reason) => format!("it is not known which nodes there are: {reason}"),
            Self::Unsettled(reason) => reason.clone(),
            Self::Nodes { missing, total } => {
                let first = missing.first().map_or("", |(name, _)| name);
                format!("{} of {total} nodes are not clean yet, {first} among them", missing.len())
            }
            Self::TooFewRounds => "all nodes are clean, but they have not said so often enough in a row".to_owned(),
        }
    }
}

impl fmt::Display for Unfinished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Nodes { missing, total } = self else { return f.write_str(&self.summary()) };
        write!(f, "{} of {total} nodes have not said that they are clean:", missing.len())?;
        for (name, reason) in missing {
            write!(f, "\n  {name}: {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::net::{Ipv4Addr, SocketAddr};
    use std::sync::Mutex;

    use async_trait::async_trait;

    use super::super::{Node, View};
    use super::*;

    const SETTINGS: WaitSettings =
        WaitSettings { threshold: 3, period: Duration::from_secs(2), deadline: Duration::from_secs(240) };

    /// A cluster that plays a part a round, the last one for ever; a node is clean if its port is odd.
    struct Play {
        views: Mutex<Vec<Result<View, String>>>,
        rounds: Mutex<usize>,
        at_once: Mutex<(usize, usize)>,
    }

    fn play(views: Vec<Result<View, String>>) -> Play {
        Play { views: Mutex::new(views), rounds: Mutex::new(0), at_once: Mutex::new((0, 0)) }
    }

    fn node(port: u16) -> Node {
        Node { name: format!("node-{port}"), addr: Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))) }
    }

    fn settled(ports: &[u16]) -> Result<View, String> {
        Ok(View { nodes: ports.iter().copied().map(node).collect(), unsettled: None })
    }

    impl Play {
        async fn wait(&self) -> Result<usize, Unfinished> {
            wait(self, self, SETTINGS).await
        }

        fn rounds(&self) -> usize {
            *self.rounds.lock().unwrap()
        }
    }

    #[async_trait]
    impl Nodes for Play {
        async fn look(&self) -> Result<View, String> {
            *self.rounds.lock().unwrap() += 1;
            let mut views = self.views.lock().unwrap();
            if views.len() > 1 { views.remove(0) } else { views[0].clone() }
        }
    }

    #[async_trait]
    impl Probe for Play {
        async fn probe(&self, addr: SocketAddr) -> Result<(), String> {
            {
                let mut at_once = self.at_once.lock().unwrap();
                at_once.0 += 1;
                at_once.1 = at_once.1.max(at_once.0);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            self.at_once.lock().unwrap().0 -= 1;
            if addr.port() % 2 == 1 { Ok(()) } else { Err("connection refused".to_owned()) }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn good_rounds_count_only_in_a_row() {
        let play = play(vec![settled(&[1, 3]), settled(&[1, 3]), settled(&[1, 2]), settled(&[1, 3, 5])]);
        assert_eq!(play.wait().await, Ok(3));
        assert_eq!(play.rounds(), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_down_is_named_at_the_deadline() {
        let began = Instant::now();
        let down = Node { name: "node-x".to_owned(), addr: Err("its pod has not started".to_owned()) };
        let view = View { nodes: vec![node(3), node(2), down], unsettled: None };
        let unfinished = play(vec![Ok(view)]).wait().await.unwrap_err();
        assert_eq!(began.elapsed(), SETTINGS.deadline);
        assert_eq!(
            unfinished.to_string(),
            "2 of 3 nodes have not said that they are clean:\n  node-2: connection refused\n  node-x: its pod has not started"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_that_has_not_settled_or_does_not_answer_is_no_success() {
        let unsettled = View { unsettled: Some("2 pods are not made yet".to_owned()), ..settled(&[1]).unwrap() };
        let play = play(vec![Ok(unsettled.clone()), Err("refused".to_owned()), Ok(unsettled)]);
        assert_eq!(play.wait().await, Err(Unfinished::Unsettled("2 pods are not made yet".to_owned())));
    }

    #[tokio::test(start_paused = true)]
    async fn three_thousand_nodes_take_seconds_with_a_hundred_probes_at_once() {
        let ports: Vec<u16> = (0..3000).map(|n| 2 * n + 1).collect();
        let (began, play) = (Instant::now(), play(vec![settled(&ports)]));
        assert_eq!(play.wait().await, Ok(3000));
        assert_eq!(play.at_once.lock().unwrap().1, PARALLEL);
        assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    }
}
