//! Transactions as their clients saw them.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Mutex, MutexGuard},
};

/// What is read and written: a list, or an account.
pub type Key = u64;

/// The contents of a key that is only ever appended to.
pub type List = Vec<u64>;

/// What a key holds, and how a write changes it. A key that was never written holds the default.
pub trait Cell: Clone + Debug + Default + PartialEq {
    /// One write.
    type Write: Clone + Debug;

    /// Carries out a write.
    fn write(&mut self, write: &Self::Write);
}

/// A list; a write appends one element, which must be unique in the whole history.
impl Cell for List {
    type Write = u64;

    fn write(&mut self, element: &u64) {
        self.push(*element);
    }
}

/// A balance; a write adds to it.
impl Cell for i128 {
    type Write = i128;

    fn write(&mut self, delta: &i128) {
        *self += delta;
    }
}

/// What has become of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It took effect.
    Committed,
    /// It never takes effect.
    Aborted,
    /// Nobody has told yet.
    Unknown,
}

/// A transaction: all its reads, then all its writes.
#[derive(Clone, Debug)]
pub struct Transaction<C: Cell> {
    /// Who ran it. A process runs one transaction at a time.
    pub process: u64,
    /// When it was sent: a place in the order of all events of the history.
    pub invoked: u64,
    /// When its end was heard of. None: not yet.
    pub completed: Option<u64>,
    /// What has become of it.
    pub fate: Fate,
    /// Where the database claims that it stands: the stamp of one that wrote, the position of one that only read.
    pub position: Option<u64>,
    /// What was read; counts if the transaction was committed.
    pub reads: Vec<(Key, C)>,
    /// What was written.
    pub writes: Vec<(Key, C::Write)>,
}

/// Takes down a history while it happens. The order of its events agrees with real time if [`Recorder::invoke`] is called
/// before a transaction is sent and [`Recorder::complete`] after its end was heard of.
#[derive(Debug)]
pub struct Recorder<C: Cell> {
    inner: Mutex<Inner<C>>,
}

#[derive(Debug)]
struct Inner<C: Cell> {
    clock: u64,
    transactions: Vec<Transaction<C>>,
}

impl<C: Cell> Default for Recorder<C> {
    fn default() -> Self {
        Recorder { inner: Mutex::new(Inner { clock: 0, transactions: Vec::new() }) }
    }
}

impl<C: Cell> Recorder<C> {
    /// A transaction is about to be sent. Gives the number under which its end is told.
    pub fn invoke(&self, process: u64, writes: Vec<(Key, C::Write)>) -> usize {
        let mut inner = self.lock();
        inner.clock += 1;
        let invoked = inner.clock;
        let transaction = Transaction {
            process,
            invoked,
            completed: None,
            fate: Fate::Unknown,
            position: None,
            reads: Vec::new(),
            writes,
        };
        inner.transactions.push(transaction);
        inner.transactions.len() - 1
    }

    /// A transaction has read these values. Its writes may be chosen only now.
    pub fn read(&self, number: usize, reads: Vec<(Key, C)>, writes: Vec<(Key, C::Write)>) {
        let transaction = &mut self.lock().transactions[number];
        transaction.reads = reads;
        transaction.writes = writes;
    }

    /// The end of a transaction was heard of.
    pub fn complete(&self, number: usize, fate: Fate, position: Option<u64>) {
        let mut inner = self.lock();
        inner.clock += 1;
        let now = inner.clock;
        let transaction = &mut inner.transactions[number];
        assert!(transaction.completed.is_none(), "transaction {number} ends twice");
        (transaction.completed, transaction.fate, transaction.position) = (Some(now), fate, position);
    }

    /// All that was recorded so far, in the order in which it was sent.
    pub fn history(&self) -> Vec<Transaction<C>> {
        self.lock().transactions.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner<C>> {
        self.inner.lock().expect("nothing panics while it holds this lock")
    }
}

/// What a sequential run of the transactions leaves behind.
pub(crate) fn apply<C: Cell>(state: &mut BTreeMap<Key, C>, transaction: &Transaction<C>) {
    for (key, write) in &transaction.writes {
        state.entry(*key).or_default().write(write);
    }
}
