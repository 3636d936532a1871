//! The load of a drill: trades and a few overdrafts, at a given rate or as fast as the answers come, by several clients with a
//! stream each; and one that reads all balances over and over. Every answer is written down with its time.
//!
//! A batch has one id and is followed to its definite end:
//! - COMMITTED, ABORTED: the end. It is not tried again under another id.
//! - UNKNOWN (no answer in `ANSWER_TIMEOUT`): asked for by its id until it is definite; never seen: submitted again under the
//!   same id.
//! - Refused (nothing was proposed): submitted again under the same id.
//!
//! With a rate, a batch's latency counts from when it was due: what waits because the cluster doesn't answer is not forgotten.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use tokio::{
    sync::{Semaphore, mpsc},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use uuid::Uuid;
use verdict_client::{Batch, Client, Options, Row, Submitter};
use verdict_proto::v1::operation;
use verdict_protocol::batch::Placement;

use super::{
    record::{Answer, Asked, Attempt, Kind, Read, Repeat, Said},
    screen::Screen,
};
use crate::{
    book::{Book, TREASURY},
    script::{Item, Script},
    totals::Totals,
};

/// An answer that takes longer is UNKNOWN.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Another node is asked after this.
const TRY_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the server is asked to wait when it is asked for an outcome.
const RESOLVE_WAIT: Duration = Duration::from_millis(500);
/// The pause between two questions about one batch.
const PAUSE: Duration = Duration::from_millis(50);
/// Questions in flight about what became of batches, at most: more would be a load of their own, just when the cluster is slow.
const RESOLVING_MAX: usize = 32;
/// How long a batch may take to its definite end.
const PATIENCE: Duration = Duration::from_secs(90);
/// One of so many batches is submitted again under its id while the load runs.
const ONE_REPEATED_OF: usize = 20;
/// Repeats that wait; more are left out.
const REPEATS_WAITING_MAX: usize = 256;
/// So long after the answer, at least.
const REPEAT_AFTER: Duration = Duration::from_millis(300);
/// How often all balances are read.
const READ_INTERVAL: Duration = Duration::from_millis(100);
/// How long a read may take.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The load.
pub struct Load<'a> {
    script: Script<'a>,
    accounts: Vec<Row>,
    /// Where each of them stands.
    places: BTreeMap<(String, String), usize>,
    clients: Vec<Client>,
    /// Trades per second; 0: as fast as the answers come.
    rate: u32,
    window: usize,
    resolving: Semaphore,
    began: Instant,
    ended: AtomicBool,
    /// The greatest stamp that was answered.
    answered: AtomicU64,
}

/// What the load has seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// The batches.
    pub batches: Vec<Attempt>,
    /// Those that were submitted again.
    pub repeats: Vec<Repeat>,
    /// The reads.
    pub reads: Vec<Read>,
    /// Reads without an answer.
    pub reads_unanswered: u64,
    /// How long it ran.
    pub seconds: f64,
    /// Whether there were no more trades before it was ended.
    pub ran_out: bool,
}

impl<'a> Load<'a> {
    /// A load of a book, by so many clients.
    pub fn new(
        book: &'a Book,
        addresses: &[String],
        clients: usize,
        rate: u32,
        window: usize,
    ) -> anyhow::Result<Load<'a>> {
        let client = |number: usize| {
            // Each begins at another node.
            let (before, from) = addresses.split_at(number % addresses.len());
            let addresses: Vec<String> = from.iter().chain(before).cloned().collect();
            let options = Options { timeout: ANSWER_TIMEOUT, try_timeout: TRY_TIMEOUT, ..Options::default() };
            Client::connect(addresses, options)
        };
        let clients = (0..clients).map(client).collect::<Result<Vec<Client>, _>>()?;
        let accounts = book.accounts();
        let name = |(place, row): (usize, &Row)| ((row.partition.clone(), row.name.clone()), place);
        Ok(Load {
            script: Script::new(book),
            places: accounts.iter().enumerate().map(name).collect(),
            accounts,
            clients,
            rate,
            window,
            resolving: Semaphore::new(RESOLVING_MAX),
            began: Instant::now(),
            ended: AtomicBool::new(false),
            answered: AtomicU64::new(0),
        })
    }

    /// The balances that it touches.
    pub fn accounts(&self) -> &[Row] {
        &self.accounts
    }

    /// The balances that may be below 0.
    pub fn is_unbounded(row: &Row) -> bool {
        row.partition == TREASURY
    }

    /// The batch with a number, under an id.
    pub fn batch(&self, number: usize, id: Uuid) -> Batch {
        self.script.batch(number, &id.to_string())
    }

    /// The time since the load began.
    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// When it began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Starts counting time from now.
    pub fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// No new batch is started after this.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Runs until it is ended, and every batch has come to its end.
    pub async fn run(&self, shards: u32, screen: &Screen) -> Seen {
        let (repeat, repeats) = mpsc::channel(REPEATS_WAITING_MAX);
        let settled = self.settle(shards, repeat, screen);
        let ((batches, seconds, ran_out), repeats, (reads, reads_unanswered)) =
            tokio::join!(settled, self.repeat(repeats), self.read());
        Seen { batches, repeats, reads, reads_unanswered, seconds, ran_out }
    }

    async fn settle(
        &self,
        shards: u32,
        repeat: mpsc::Sender<(usize, Uuid)>,
        screen: &Screen,
    ) -> (Vec<Attempt>, f64, bool) {
        let window = self.window.div_ceil(self.clients.len());
        let submitters: Vec<Submitter> = self.clients.iter().map(|client| client.submitter(window)).collect();
        let ended_at = Mutex::new(None);
        let due = stream::iter(0..self.script.count())
            .then(|number| self.due(number))
            .take_while(|due| {
                let goes_on = due.is_some();
                if !goes_on {
                    *ended_at.lock().expect("nothing panics while it holds this lock") = Some(self.now());
                }
                std::future::ready(goes_on)
            })
            .filter_map(std::future::ready);
        let work = due.map(|(number, due)| {
            let place = number % submitters.len();
            let (submitter, client, repeat) = (&submitters[place], &self.clients[place], repeat.clone());
            async move {
                let attempt = self.settle_one(shards, client, submitter, number, due).await;
                if number % ONE_REPEATED_OF == 0 && attempt.end().is_some() {
                    // If too many wait already it is left out.
                    let _ = repeat.try_send((number, attempt.id));
                }
                screen.count(&attempt);
                (number, attempt)
            }
        });
        let mut done: Vec<(usize, Attempt)> = work.buffer_unordered(self.window).collect().await;
        done.sort_by_key(|(number, _)| *number);
        let ended_at = *ended_at.lock().expect("nothing panics while it holds this lock");
        // A tape that was settled to its end has no time of its own.
        let (seconds, ran_out) = (ended_at.unwrap_or_else(|| self.now()), ended_at.is_none());
        // `repeat` ends here, and with it those who wait for more.
        (done.into_iter().map(|(_, attempt)| attempt).collect(), seconds, ran_out)
    }

    /// Waits until a batch is due; none is after the end.
    async fn due(&self, number: usize) -> Option<(usize, f64)> {
        let due = match self.rate {
            0 => self.now(),
            rate => number as f64 / f64::from(rate),
        };
        loop {
            if self.ended.load(Ordering::Relaxed) {
                return None;
            }
            let early = due - self.now();
            if early <= 0.0 {
                return Some((number, due));
            }
            sleep(Duration::from_secs_f64(early.min(0.05))).await;
        }
    }

    async fn settle_one(
        &self,
        shards: u32,
        client: &Client,
        submitter: &Submitter,
        number: usize,
        due: f64,
    ) -> Attempt {
        let id = Uuid::now_v7();
        let batch = self.batch(number, id);
        let kind = match self.script.item(number) {
            Item::Trade(_) => Kind::Trade,
            Item::Overdraft(_) => Kind::Overdraft,
        };
        let (deltas, shards) = (self.deltas(&batch), shards_of(&batch, shards));
        let mut attempt = Attempt { id, kind, deltas, shards, due, sent: self.now(), answers: Vec::new() };
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            let answer = submitter.submit(batch.clone()).await;
            let said = Said::of(&answer.result);
            self.note(&mut attempt, Asked::Submit, said.clone(), answer.lost);
            match said {
                Said::Committed(_) | Said::Aborted(_) | Said::Denied(_) | Said::Failed(_) => return attempt,
                Said::Unknown => self.resolve(client, &mut attempt, started).await,
                Said::NotSeen | Said::Refused => {}
            }
            if attempt.end().is_some() {
                return attempt;
            }
            sleep(PAUSE).await;
        }
        attempt
    }

    /// Asks for the id until the answer is definite, or there is no trace of it.
    async fn resolve(&self, client: &Client, attempt: &mut Attempt, started: Instant) {
        let id = attempt.id.to_string();
        let _place = self.resolving.acquire().await.expect("it is never closed");
        while started.elapsed() < PATIENCE {
            let said = Said::of(&client.get_batch(&id, false, RESOLVE_WAIT).await);
            match said {
                Said::Unknown | Said::Refused => sleep(PAUSE).await,
                Said::Committed(_) | Said::Aborted(_) | Said::NotSeen | Said::Denied(_) | Said::Failed(_) => {
                    self.note(attempt, Asked::GetBatch, said, 0);
                    return;
                }
            }
        }
    }

    fn note(&self, attempt: &mut Attempt, asked: Asked, said: Said, lost: u32) {
        if let Said::Committed(stamp) = said {
            self.answered.fetch_max(stamp, Ordering::SeqCst);
        }
        attempt.answers.push(Answer { at: self.now(), asked, said, lost });
    }

    /// Submits some of the answered batches once more, by another client.
    async fn repeat(&self, repeats: mpsc::Receiver<(usize, Uuid)>) -> Vec<Repeat> {
        let work = ReceiverStream::new(repeats).map(|(number, id)| async move {
            sleep(REPEAT_AFTER).await;
            let client = &self.clients[(number + 1 + number / ONE_REPEATED_OF) % self.clients.len()];
            let said = Said::of(&client.submit(&self.batch(number, id)).await);
            Repeat { number, at: self.now(), said }
        });
        work.buffer_unordered(8).collect().await
    }

    /// Reads all balances at one position, over and over.
    async fn read(&self) -> (Vec<Read>, u64) {
        let (mut reads, mut unanswered) = (Vec::new(), 0);
        for turn in 0.. {
            if self.ended.load(Ordering::Relaxed) {
                break;
            }
            let client = self.clients[turn % self.clients.len()].with_timeout(READ_TIMEOUT);
            let (from, answered) = (self.now(), self.answered.load(Ordering::SeqCst));
            match Totals::read(&client, &self.accounts).await {
                Ok(totals) if totals.positions.len() == 1 => {
                    let balances = totals.balances.iter().map(|(_, balance)| *balance).collect();
                    let position = totals.positions[0];
                    reads.push(Read { from, to: self.now(), answered, position, balances });
                }
                Ok(_) | Err(_) => unanswered += 1,
            }
            sleep(READ_INTERVAL).await;
        }
        (reads, unanswered)
    }

    fn deltas(&self, batch: &Batch) -> Vec<(usize, i128)> {
        let changes = batch.operations.iter().filter_map(|operation| {
            let Some(operation::Kind::Add(add)) = &operation.kind else { return None };
            let row = operation.row.as_ref()?;
            let place = *self.places.get(&(row.partition.clone(), row.name.clone()))?;
            Some((place, add.delta.parse().ok()?))
        });
        changes.collect()
    }
}

/// The shards that a batch touches.
fn shards_of(batch: &Batch, shards: u32) -> BTreeSet<u32> {
    let placement = Placement { shards };
    let rows = batch.operations.iter().filter_map(|operation| operation.row.as_ref());
    rows.map(|row| placement.shard_of(&row.partition).0).collect()
}
