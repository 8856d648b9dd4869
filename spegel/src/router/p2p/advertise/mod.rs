//! Telling the peers nearest to each of our keys that we offer it: at once, again within its time to live, and to peers
//! that come later. What is told to whom is decided without input or output, in `offers` and `outbox`; this part carries it.

mod offers;
mod outbox;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::keys::ContentId;
use super::metrics::RouterMetrics;
use super::records::SharedRecords;
use super::table::SharedTable;
use crate::store::Change;

pub(super) use offers::{Batch, Offers, Plan, Told};
pub(super) use outbox::Outbox;

/// How often a share of the keys is told again. A larger share has more keys for each of those who are told, who mostly have to be
/// dialled for it: with ten seconds advertising took twice the bytes.
const TICK: Duration = Duration::from_secs(30);

/// Advertises. Cheap to clone, and usable from any thread.
#[derive(Clone)]
pub(super) struct Advertiser {
    offers: Arc<Mutex<Offers>>,
    wake: Arc<Notify>,
    records: SharedRecords,
    table: SharedTable,
    client: Client,
    metrics: RouterMetrics,
}

// === impl Advertiser ===

impl Advertiser {
    pub(super) fn new(records: SharedRecords, table: SharedTable, client: Client, metrics: RouterMetrics) -> Self {
        Self { offers: Arc::default(), wake: Arc::default(), records, table, client, metrics }
    }

    /// Brings the figures of the queue up to date.
    pub(super) fn measure(&self, now: Instant) {
        let (count, since) = self.offers().waiting();
        let figures = &self.metrics.0;
        figures.advertise_queue.set(i64::try_from(count).unwrap_or(i64::MAX));
        let age = since.map_or(0, |since| now.saturating_duration_since(since).as_secs());
        figures.advertise_age.set(i64::try_from(age).unwrap_or(i64::MAX));
    }

    /// Takes over a change. Our own answers follow it at once, the peers soon.
    pub(super) fn change(&self, change: &Change) {
        let mut offers = self.offers();
        let mut records = self.records.lock();
        let now = Instant::now();
        match change {
            Change::Added(keys) => {
                for id in keys.iter().map(ContentId::of) {
                    offers.add(now, id);
                    records.offer(id);
                }
            }
            Change::Removed(keys) => {
                for id in keys.iter().map(ContentId::of) {
                    offers.remove(&id);
                    records.withdraw(&id);
                }
            }
        }
        drop((offers, records));
        self.wake.notify_one();
    }

    /// Tells a peer that came, or that may have missed something, what it is to keep.
    pub(super) fn newcomer(&self, peer: PeerId) {
        self.offers().newcomer(peer);
        self.wake.notify_one();
    }

    /// Tells everything again: our addresses changed.
    pub(super) fn tell_all(&self) {
        self.offers().tell_all();
        self.wake.notify_one();
    }

    /// So many members are known now.
    pub(super) fn grown(&self, members: usize) {
        if self.offers().grown(members) {
            tracing::debug!(members, "the member list has grown: what we offer is told to those nearest now");
            self.wake.notify_one();
        }
    }

    /// Advertises until cancelled. Every key is told again within four fifths of `ttl`.
    pub(super) async fn run(self, ttl: Duration, cancelled: CancellationToken) {
        let (pause, rounds) = pace(ttl);
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + pause, pause);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut outbox = Outbox::default();
        let mut tasks = JoinSet::new();
        let mut due = None;
        loop {
            // What is due keeps its time; the rest waits until what was planned before is on its way.
            if due.is_some() || outbox.is_clear() {
                let batch = self.offers().take(due.take(), &self.table.read());
                outbox.add(self.plan(batch).await);
            }
            self.send(&mut outbox, &mut tasks);
            let more = outbox.is_clear() && !self.offers().is_idle();
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return,
                Some(done) = tasks.join_next() => {
                    if let Ok((peer, result)) = done {
                        self.sent(peer, result, &mut outbox);
                    }
                }
                _ = tick.tick() => {
                    outbox.take_failed().into_iter().for_each(|peer| self.offers().newcomer(peer));
                    due = Some(rounds);
                }
                () = self.wake.notified() => {}
                () = tokio::task::yield_now(), if more => {}
            }
        }
    }

    /// Who is to be told what now.
    async fn plan(&self, mut batch: Batch) -> Plan {
        let mut plan = Plan::new();
        while !batch.is_empty() {
            batch.place(&self.table.read(), &mut plan);
            tokio::task::yield_now().await;
        }
        plan
    }

    fn send(&self, outbox: &mut Outbox, tasks: &mut JoinSet<(PeerId, io::Result<()>)>) {
        let own: Arc<[_]> = self.records.lock().own_addresses().into();
        while let Some(told) = outbox.next() {
            let peer = told.contact.peer();
            if own.is_empty() {
                // Everything is told once we can be reached.
                outbox.done(peer, false);
                continue;
            }
            let (client, own) = (self.client.clone(), own.clone());
            let is_member = self.table.read().is_member(&peer);
            tasks.spawn(async move { (peer, tell(&told, &client, &own, is_member).await) });
        }
    }

    fn sent(&self, peer: PeerId, result: io::Result<()>, outbox: &mut Outbox) {
        if let Err(error) = &result {
            tracing::debug!(%peer, %error, "could not be told what we offer");
        }
        outbox.done(peer, result.is_err() && self.table.read().contains(&peer));
    }

    fn offers(&self) -> MutexGuard<'_, Offers> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn tell(told: &Told, client: &Client, own: &[SocketAddr], is_member: bool) -> io::Result<()> {
    if is_member {
        client.tell_member(&told.contact, &told.messages(own)).await
    } else {
        client.advertise(&told.contact, own, &told.offered).await
    }
}

/// How often a share of the keys is told again, and how many shares there are.
pub(super) fn pace(ttl: Duration) -> (Duration, usize) {
    let within = ttl * 4 / 5;
    let pause = TICK.min(within / 2).max(Duration::from_secs(1));
    (pause, usize::try_from(within.as_secs() / pause.as_secs()).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::sync::mpsc;

    use super::super::records::{RecordLimits, Records};
    use super::*;
    use crate::oci::Key;

    #[test]
    fn what_waits_to_be_told_is_measured() {
        let (local, metrics) = (PeerId::random(), RouterMetrics::default());
        let limits = RecordLimits { foreign: 10, validity: Duration::from_secs(100) };
        let records = SharedRecords::new(Records::new(local, limits, Instant::now()));
        let client = Client::new(local, mpsc::channel(1).0, metrics.clone());
        let advertiser = Advertiser::new(records, SharedTable::default(), client, metrics.clone());
        let measured = |now| {
            advertiser.measure(now);
            (metrics.0.advertise_queue.get(), metrics.0.advertise_age.get())
        };
        assert_eq!(measured(Instant::now()), (0, 0));
        let digest = format!("sha256:{}", "7".repeat(64)).parse().unwrap();
        let before = Instant::now();
        advertiser.change(&Change::Added(vec![Key::Digest(digest)]));
        let (count, age) = measured(Instant::now() + Duration::from_secs(60));
        let most = before.elapsed().as_secs() + 60;
        assert!(count == 1 && (60..=i64::try_from(most).unwrap()).contains(&age), "{count}, {age} s");
        advertiser.offers().take(None, &SharedTable::default().read());
        assert_eq!(measured(Instant::now()), (0, 0));
    }
}
