//! The log writer: one for the node, on a thread of its own, through which everything goes that must be durable before it is told.
//!
//! Group commit: take all that waits, write it as one batch, sync once, then tell everybody, in order. While a sync runs, the
//! next batch gathers; so load makes batches larger, and nobody waits for a timer.
//!
//! Invariants:
//! - First in, first out: a vote is never reordered with appends (R9).
//! - Nobody is told of success before the sync of the batch has returned.
//! - The first failed write or sync is final: from then on everybody is told of failure, and the node stops (B23).

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use openraft::storage::IOFlushed;
use tokio::sync::{mpsc, oneshot};
use verdict_failpoints::failpoint;

use crate::{
    acknowledged::{Acknowledged, Mark},
    counters::SYNCED_WRITES,
    disk::{Disk, GroupKey, group_key, log_key, seal},
    fatal::Fatal,
    log::GroupLog,
    standing::{PROMISES, Standings},
    storage::{Batch as Changes, Table},
    types::{Entry, LogId, Types, Vote},
};

/// A batch is closed at this size.
const BATCH_BYTES_MAX: usize = 16 << 20;
const BATCH_OPERATIONS_MAX: usize = 4096;

pub(crate) type Done = oneshot::Sender<io::Result<()>>;

/// Something to be made durable.
pub(crate) enum Operation {
    Append {
        log: Arc<GroupLog>,
        sequence: u64,
        entries: Vec<Entry>,
        done: IOFlushed<Types>,
    },
    Truncate {
        log: Arc<GroupLog>,
        from: u64,
        to: u64,
        done: Done,
    },
    Purge {
        log: Arc<GroupLog>,
        from: u64,
        upto: LogId,
        done: Done,
    },
    Vote {
        log: Arc<GroupLog>,
        vote: Vote,
        done: Done,
    },
    Meta {
        key: Vec<u8>,
        value: Vec<u8>,
        done: Done,
    },
    /// What is known of other nodes: whatever batch comes next takes it along, and this makes one come.
    Standings,
    Stop,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Append,
    Truncate,
    Purge,
    Vote,
}

/// The groups to which that is done.
fn of(done: &[(Kind, u32)], kind: Kind) -> impl Iterator<Item = u32> + '_ {
    done.iter().filter(move |(done, _)| *done == kind).map(|(_, group)| *group)
}

/// Who waits for a batch, in order.
enum Waiting {
    Flushed(Arc<GroupLog>, u64, IOFlushed<Types>),
    Done(Done),
}

/// Where operations are handed in.
#[derive(Clone)]
pub(crate) struct Writer {
    queue: mpsc::Sender<Operation>,
    fatal: Fatal,
    fail: Arc<AtomicBool>,
    promises: Arc<AtomicU64>,
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(
        disk: Arc<Disk>,
        acknowledged: Acknowledged,
        standings: Arc<Standings>,
        fatal: Fatal,
        queue: usize,
    ) -> io::Result<(Writer, Running)> {
        let (sender, receiver) = mpsc::channel(queue);
        let promises = Arc::new(AtomicU64::new(disk.read_meta(PROMISES)?.unwrap_or(0)));
        let writer = Writer { queue: sender, fatal: fatal.clone(), fail: Arc::default(), promises };
        let (fail, promises) = (writer.fail.clone(), writer.promises.clone());
        let worker = Worker { disk, acknowledged, standings, fatal, queue: receiver, fail, promises };
        let running = if worker.disk.storage().waits() {
            let run = move || futures::executor::block_on(worker.run());
            Running::Thread(thread::Builder::new().name("log-writer".to_owned()).spawn(run)?)
        } else {
            Running::Task(tokio::spawn(worker.run()))
        };
        Ok((writer, running))
    }

    /// Hands an operation in; waits while the queue is full.
    pub(crate) async fn submit(&self, operation: Operation) -> io::Result<()> {
        self.fatal.check()?;
        self.queue.send(operation).await.map_err(|_| io::Error::other("the log writer has stopped"))
    }

    /// Hands an operation in, and waits until it is durable.
    pub(crate) async fn perform(&self, make: impl FnOnce(Done) -> Operation) -> io::Result<()> {
        let (done, outcome) = oneshot::channel();
        self.submit(make(done)).await?;
        outcome.await.unwrap_or_else(|_| Err(io::Error::other("the log writer has stopped")))
    }

    /// How many batches that others rely on are on disk, over all starts of this node.
    pub(crate) fn promises(&self) -> u64 {
        self.promises.load(Ordering::Acquire)
    }

    /// Ends the thread after everything that was handed in before.
    pub(crate) async fn stop(&self) {
        // If it has ended already, all is well.
        let _ = self.queue.send(Operation::Stop).await;
    }

    /// Makes the next sync fail, for tests.
    pub(crate) fn fail_next_sync(&self) {
        self.fail.store(true, Ordering::Release);
    }
}

/// The writer at work.
pub(crate) enum Running {
    /// On its own thread.
    Thread(thread::JoinHandle<()>),
    /// Among the other tasks, where the disk makes no thread wait.
    Task(tokio::task::JoinHandle<()>),
}

impl Running {
    /// Waits until it has ended. A panic of the writer was its own message.
    pub(crate) async fn ended(self) {
        match self {
            Running::Thread(thread) => drop(tokio::task::spawn_blocking(|| thread.join()).await),
            Running::Task(task) => drop(task.await),
        }
    }
}

struct Worker {
    disk: Arc<Disk>,
    acknowledged: Acknowledged,
    standings: Arc<Standings>,
    fatal: Fatal,
    queue: mpsc::Receiver<Operation>,
    fail: Arc<AtomicBool>,
    promises: Arc<AtomicU64>,
}

impl Worker {
    async fn run(mut self) {
        let mut stop = false;
        while !stop {
            let Some(first) = self.queue.recv().await else { return };
            let mut batch = Batch::new(&self.disk);
            stop = batch.add(first);
            while !stop && batch.has_room() {
                match self.queue.try_recv() {
                    Ok(next) => stop = batch.add(next),
                    Err(_) => break,
                }
            }
            let waiting = std::mem::take(&mut batch.waiting);
            let outcome = self.write(batch).await;
            tell(waiting, outcome);
        }
    }

    async fn write(&mut self, batch: Batch) -> Result<(), String> {
        if let Err(error) = self.fatal.check() {
            return Err(error.to_string());
        }
        let written = self.write_and_sync(batch).await.map_err(|error| error.to_string());
        if let Err(error) = &written {
            self.fatal.raise(&format!("write and sync the log: {error}"));
        }
        written
    }

    async fn write_and_sync(&mut self, mut batch: Batch) -> io::Result<()> {
        batch.add_committed();
        let marks: Vec<(u32, Mark)> = batch.logs.iter().map(|log| (log.group().0, log.queued())).collect();
        if batch.truncates {
            self.acknowledged.update(&marks, true)?;
            failpoint!(TRUNCATE_MARKED, any of(&batch.done, Kind::Truncate));
        }
        let promises = self.promises.load(Ordering::Acquire) + u64::from(batch.promises);
        if batch.promises {
            batch.changes.put(Table::Meta, PROMISES, &seal(PROMISES, &promises));
        }
        for (key, value) in self.standings.take_unsaved() {
            batch.changes.put(Table::Meta, &key, &value);
        }
        failpoint!(LOG_BEFORE_WRITE, any of(&batch.done, Kind::Append), fails)?;
        batch.changes.write()?;
        failpoint!(LOG_BEFORE_SYNC, any of(&batch.done, Kind::Append), fails)?;
        // Apart from the write, so that writers of state needn't wait for the disk.
        self.disk.tables().sync_in_time().await?;
        SYNCED_WRITES.count();
        if self.fail.swap(false, Ordering::AcqRel) {
            return Err(io::Error::other("injected failure"));
        }
        failpoint!(LOG_SYNCED, any of(&batch.done, Kind::Append));
        self.promises.store(promises, Ordering::Release);
        self.acknowledged.update(&marks, false)?;
        failpoint!(LOG_ACKNOWLEDGED, any of(&batch.done, Kind::Append));
        failpoint!(VOTE_SAVED, any of(&batch.done, Kind::Vote));
        failpoint!(TRUNCATE_SYNCED, any of(&batch.done, Kind::Truncate));
        failpoint!(PURGE_SYNCED, any of(&batch.done, Kind::Purge));
        Ok(())
    }
}

struct Batch {
    changes: Box<dyn Changes>,
    waiting: Vec<Waiting>,
    logs: Vec<Arc<GroupLog>>,
    truncates: bool,
    /// Whether it holds something that others rely on once they are told.
    promises: bool,
    /// What is done to which group, for failpoints.
    done: Vec<(Kind, u32)>,
}

impl Batch {
    fn new(disk: &Disk) -> Batch {
        Batch {
            changes: disk.tables().batch(),
            waiting: Vec::new(),
            logs: Vec::new(),
            truncates: false,
            promises: false,
            done: Vec::new(),
        }
    }

    fn has_room(&self) -> bool {
        self.waiting.len() < BATCH_OPERATIONS_MAX && self.changes.bytes() < BATCH_BYTES_MAX
    }

    /// Adds an operation. True: stop after this batch.
    fn add(&mut self, operation: Operation) -> bool {
        match operation {
            Operation::Append { log, sequence, entries, done } => {
                for entry in &entries {
                    let key = log_key(log.group(), entry.log_id.index);
                    self.changes.put(Table::Log, &key, &seal(&key, entry));
                }
                if let Some(last) = entries.last() {
                    log.set_queued_last(last.log_id.index);
                }
                self.promises = true;
                self.note(&log, Kind::Append);
                self.waiting.push(Waiting::Flushed(log, sequence, done));
            }
            Operation::Truncate { log, from, to, done } => {
                for index in from..=to {
                    self.changes.delete(Table::Log, &log_key(log.group(), index));
                }
                log.set_queued_last(from.saturating_sub(1));
                (self.truncates, self.promises) = (true, true);
                self.note(&log, Kind::Truncate);
                self.waiting.push(Waiting::Done(done));
            }
            Operation::Purge { log, from, upto, done } => {
                let (group, end) = (log.group(), upto.index + 1);
                if from < end {
                    let (from, end) = (log_key(group, from), log_key(group, end));
                    self.changes.delete_range(Table::Log, &from, &end);
                }
                let key = group_key(group, GroupKey::Purged);
                self.changes.put(Table::Meta, &key, &seal(&key, &upto));
                log.raise_queued_last(upto.index);
                self.note(&log, Kind::Purge);
                self.waiting.push(Waiting::Done(done));
            }
            Operation::Vote { log, vote, done } => {
                let key = group_key(log.group(), GroupKey::Vote);
                self.changes.put(Table::Meta, &key, &seal(&key, &vote));
                log.set_queued_vote(vote.leader_id.term);
                self.promises = true;
                self.note(&log, Kind::Vote);
                self.waiting.push(Waiting::Done(done));
            }
            Operation::Meta { key, value, done } => {
                self.changes.put(Table::Meta, &key, &value);
                self.waiting.push(Waiting::Done(done));
            }
            Operation::Standings => {}
            Operation::Stop => return true,
        }
        false
    }

    fn note(&mut self, log: &Arc<GroupLog>, kind: Kind) {
        self.done.push((kind, log.group().0));
        if !self.logs.iter().any(|noted| noted.group() == log.group()) {
            self.logs.push(log.clone());
        }
    }

    /// Writes along what is known to be committed, no further than what this batch makes durable.
    fn add_committed(&mut self) {
        for log in &self.logs {
            if let Some(committed) = log.committed_to_write() {
                let key = group_key(log.group(), GroupKey::Committed);
                self.changes.put(Table::Meta, &key, &seal(&key, &committed));
            }
        }
    }
}

/// Tells everybody who waits, in order.
fn tell(all: Vec<Waiting>, outcome: Result<(), String>) {
    for waiting in all {
        let outcome = outcome.clone().map_err(io::Error::other);
        match waiting {
            Waiting::Flushed(log, sequence, done) => {
                if outcome.is_ok() {
                    log.written(sequence);
                }
                done.io_completed(outcome);
            }
            // Whoever has stopped waiting is told nothing.
            Waiting::Done(done) => drop(done.send(outcome)),
        }
    }
}
