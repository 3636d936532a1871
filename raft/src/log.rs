//! The Raft log of one group: its newest part in memory, all of it in the node's database.
//!
//! Invariants:
//! - What was appended can be read at once, before it is on disk: entries leave the memory only after they were written.
//! - A read gives exactly what the log holds in the range, or an error. Damage is an error.
//! - The log has no holes: it runs from the entry after the last purged one to the last one.
//! - What openraft is told is durable went through the [`Writer`].

use std::{
    collections::VecDeque,
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::Stream;
use openraft::{
    LogState, OptionalSend, RaftLogReader,
    storage::{IOFlushed, RaftLogStorage},
};
use tokio::sync::Notify;
use verdict_protocol::ids::GroupId;

use crate::{
    acknowledged::Mark,
    disk::{Disk, GroupKey, damaged, group_key, log_key, unseal},
    state::prefix_end,
    storage::{Start, Table},
    types::{Command, Entry, LogId, Types, Vote},
    writer::{Operation, Writer},
};

/// One message to a follower carries no more than this, unless a single entry is larger.
const READ_BYTES_MAX: usize = 1 << 20;
/// Entries that are read at once to be applied.
const APPLY_ENTRIES: u64 = 256;

/// What the log of a group is, shared by all who read and write it.
pub(crate) struct GroupLog {
    group: GroupId,
    tail_bytes_max: usize,
    inner: Mutex<Inner>,
    /// The last index that the writer has taken up; what is committed beyond it isn't written yet.
    queued_last: AtomicU64,
    /// The term of the last vote that the writer has taken up.
    queued_vote: AtomicU64,
    /// Told after every append, for whoever decides about snapshots.
    grown: Notify,
}

struct Inner {
    disk: Option<Arc<Disk>>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    committed_written: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
    /// The index of the first entry in `sizes`.
    first: u64,
    /// Bytes of every entry from `first` to the last.
    sizes: VecDeque<u32>,
    /// The newest entries, without holes, up to the last.
    tail: VecDeque<Cached>,
    tail_bytes: usize,
    sequence: u64,
    written: u64,
}

struct Cached {
    entry: Entry,
    bytes: u32,
    /// The append that brought it: once that one is written, the entry may leave the memory.
    sequence: u64,
}

impl GroupLog {
    /// Reads the log of `group`, and checks every entry of it.
    pub(crate) fn open(
        disk: Arc<Disk>,
        group: GroupId,
        tail_bytes_max: usize,
        acknowledged: Mark,
    ) -> io::Result<Arc<GroupLog>> {
        let purged: Option<LogId> = disk.read_meta(&group_key(group, GroupKey::Purged))?;
        let committed: Option<LogId> = disk.read_meta(&group_key(group, GroupKey::Committed))?;
        let mut inner = Inner {
            vote: disk.read_meta(&group_key(group, GroupKey::Vote))?,
            committed,
            committed_written: committed,
            purged,
            last: purged,
            first: purged.map_or(0, |id| id.index + 1),
            sizes: VecDeque::new(),
            tail: VecDeque::new(),
            tail_bytes: 0,
            sequence: 0,
            written: 0,
            disk: None,
        };
        inner.check_all(&disk, group)?;
        inner.disk = Some(disk);
        if inner.committed > inner.last {
            return Err(damaged(&format!(
                "the log of group {group} ends at {:?}, but {:?} was committed",
                inner.last, inner.committed
            )));
        }
        let queued_last = AtomicU64::new(inner.last.map_or(0, |id| id.index));
        let queued_vote = AtomicU64::new(inner.vote.map_or(0, |vote| vote.leader_id.term));
        let found = Mark {
            last_index: queued_last.load(Ordering::Acquire),
            vote_term: queued_vote.load(Ordering::Acquire),
        };
        if found.last_index < acknowledged.last_index || found.vote_term < acknowledged.vote_term {
            return Err(damaged(&format!(
                "group {group} was acknowledged as {acknowledged:?}, but only {found:?} is there; this disk can't be used \
                 under this node id any more"
            )));
        }
        Ok(Arc::new(GroupLog {
            group,
            tail_bytes_max,
            inner: Mutex::new(inner),
            queued_last,
            queued_vote,
            grown: Notify::new(),
        }))
    }

    pub(crate) fn group(&self) -> GroupId {
        self.group
    }

    /// Whether there is neither an entry nor a vote.
    pub(crate) fn is_pristine(&self) -> bool {
        let inner = self.lock();
        inner.vote.is_none() && inner.last.is_none()
    }

    /// The last log id, purged or not.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.lock().last
    }

    /// The last purged log id.
    pub(crate) fn purged(&self) -> Option<LogId> {
        self.lock().purged
    }

    /// Waits until the log has grown.
    pub(crate) async fn grown(&self) {
        self.grown.notified().await;
    }

    /// Entries after `index`, and their bytes.
    pub(crate) fn size_after(&self, index: Option<u64>) -> (u64, u64) {
        let inner = self.lock();
        let skip = index.map_or(0, |index| (index + 1).saturating_sub(inner.first)) as usize;
        let kept = inner.sizes.iter().skip(skip);
        (kept.len() as u64, kept.map(|bytes| u64::from(*bytes)).sum())
    }

    /// Up to where entries may be purged, so that at most `entries` and `bytes` of those up to `snapshot` stay. None:
    /// nothing is to be purged.
    pub(crate) fn purge_point(&self, snapshot: u64, entries: u64, bytes: u64) -> Option<u64> {
        let inner = self.lock();
        let covered = (snapshot + 1).saturating_sub(inner.first).min(inner.sizes.len() as u64);
        let mut kept = (0, 0);
        for back in 0..covered {
            let place = covered - 1 - back;
            kept = (kept.0 + 1, kept.1 + u64::from(inner.sizes[place as usize]));
            if kept.0 > entries || kept.1 > bytes {
                return Some(inner.first + place);
            }
        }
        None
    }

    /// Lets go of the database.
    pub(crate) fn close(&self) {
        self.lock().disk = None;
    }

    pub(crate) fn set_queued_last(&self, index: u64) {
        self.queued_last.store(index, Ordering::Release);
    }

    pub(crate) fn set_queued_vote(&self, term: u64) {
        self.queued_vote.store(term, Ordering::Release);
    }

    /// What is acknowledged once the writer is done with all that it has taken up.
    pub(crate) fn queued(&self) -> Mark {
        Mark {
            last_index: self.queued_last.load(Ordering::Acquire),
            vote_term: self.queued_vote.load(Ordering::Acquire),
        }
    }

    pub(crate) fn raise_queued_last(&self, index: u64) {
        self.queued_last.fetch_max(index, Ordering::AcqRel);
    }

    /// What is committed, if it has moved since it was last asked for and the writer has taken up all entries up to it.
    pub(crate) fn committed_to_write(&self) -> Option<LogId> {
        let mut inner = self.lock();
        let committed = inner.committed.filter(|id| id.index <= self.queued_last.load(Ordering::Acquire))?;
        let moved = inner.committed_written < Some(committed);
        inner.committed_written = Some(committed);
        moved.then_some(committed)
    }

    /// The append of that sequence is on disk.
    pub(crate) fn written(&self, sequence: u64) {
        let mut inner = self.lock();
        inner.written = inner.written.max(sequence);
        inner.evict(self.tail_bytes_max);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the log's lock")
    }
}

impl Inner {
    fn check_all(&mut self, disk: &Disk, group: GroupId) -> io::Result<()> {
        let (from, to) = (log_key(group, 0), prefix_end(&group.0.to_be_bytes()));
        let mut cursor = disk.tables().cursor(Table::Log, &from, to.as_deref(), Start::First);
        let mut expected = self.first;
        while let Some((key, value)) = cursor.item() {
            if key != log_key(group, expected) {
                return Err(damaged(&format!("entry {expected} of group {group} is missing from the log")));
            }
            let entry: Entry = unseal(key, value)
                .map_err(|error| damaged(&format!("entry {expected} of group {group}: {error}")))?;
            if entry.log_id.index != expected || Some(entry.log_id) <= self.last {
                return Err(damaged(&format!("entry {expected} of group {group} is out of order")));
            }
            self.sizes.push_back(entry_bytes(&entry));
            self.last = Some(entry.log_id);
            expected += 1;
            cursor.next();
        }
        cursor.status()
    }

    fn append(&mut self, entry: Entry, sequence: u64) {
        let bytes = entry_bytes(&entry);
        if self.sizes.is_empty() {
            self.first = entry.log_id.index;
        }
        assert_eq!(entry.log_id.index, self.first + self.sizes.len() as u64, "an append leaves no hole");
        self.last = Some(entry.log_id);
        self.sizes.push_back(bytes);
        self.tail_bytes += bytes as usize;
        self.tail.push_back(Cached { entry, bytes, sequence });
    }

    /// Forgets entries that are on disk, oldest first, until the memory suffices.
    fn evict(&mut self, bytes_max: usize) {
        while self.tail_bytes > bytes_max {
            match self.tail.front() {
                Some(cached) if cached.sequence <= self.written => {
                    self.tail_bytes -= cached.bytes as usize;
                    self.tail.pop_front();
                }
                _ => break,
            }
        }
    }

    /// Removes everything after `keep`, and gives the removed range.
    fn truncate(&mut self, keep: Option<LogId>) -> Option<(u64, u64)> {
        let from = keep.map_or(0, |id| id.index + 1).max(self.first);
        let end = self.first + self.sizes.len() as u64;
        if from >= end {
            return None;
        }
        self.sizes.truncate((from - self.first) as usize);
        while self.tail.back().is_some_and(|cached| cached.entry.log_id.index >= from) {
            let cached = self.tail.pop_back().expect("there is a last one");
            self.tail_bytes -= cached.bytes as usize;
        }
        self.last = if self.sizes.is_empty() { self.purged } else { keep };
        Some((from, end - 1))
    }

    fn purge(&mut self, upto: LogId) -> u64 {
        let from = self.first;
        while self.first <= upto.index && self.sizes.pop_front().is_some() {
            self.first += 1;
        }
        while self.tail.front().is_some_and(|cached| cached.entry.log_id.index <= upto.index) {
            let cached = self.tail.pop_front().expect("there is a first one");
            self.tail_bytes -= cached.bytes as usize;
        }
        if self.sizes.is_empty() {
            self.first = upto.index + 1;
        }
        self.purged = self.purged.max(Some(upto));
        self.last = self.last.max(Some(upto));
        from
    }

    /// The entries of `from..to` that the log holds. With a limit in bytes it may stop early, after at least one.
    fn read(&self, group: GroupId, from: u64, to: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let end = to.min(self.first + self.sizes.len() as u64);
        let mut index = from.max(self.first);
        let tail_first = self.first + (self.sizes.len() - self.tail.len()) as u64;
        let mut entries = Vec::with_capacity(end.saturating_sub(index).min(APPLY_ENTRIES) as usize);
        let mut bytes = 0;
        if index < end.min(tail_first) {
            let disk = self.disk.as_ref().ok_or_else(|| io::Error::other("the log is closed"))?;
            let (from, to) = (log_key(group, index), log_key(group, end.min(tail_first)));
            let mut cursor = disk.tables().cursor(Table::Log, &from, Some(&to), Start::First);
            while index < end.min(tail_first) && (bytes < bytes_max || entries.is_empty()) {
                let key = log_key(group, index);
                let value = match cursor.item() {
                    Some((found, value)) if found == key => value,
                    _ => {
                        cursor.status()?;
                        return Err(damaged(&format!(
                            "entry {index} of group {group} is missing from the log"
                        )));
                    }
                };
                let entry: Entry = unseal(&key, value)?;
                bytes += entry_bytes(&entry) as usize;
                entries.push(entry);
                index += 1;
                cursor.next();
            }
        }
        while index < end && index >= tail_first && (bytes < bytes_max || entries.is_empty()) {
            let cached = &self.tail[(index - tail_first) as usize];
            bytes += cached.bytes as usize;
            entries.push(cached.entry.clone());
            index += 1;
        }
        Ok(entries)
    }
}

fn entry_bytes(entry: &Entry) -> u32 {
    const OVERHEAD: usize = 64;
    let payload = match &entry.payload {
        openraft::EntryPayload::Normal(Command(bytes)) => bytes.len(),
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => OVERHEAD,
    };
    u32::try_from(payload + OVERHEAD).unwrap_or(u32::MAX)
}

/// The log as openraft uses it.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: Arc<GroupLog>,
    writer: Writer,
}

impl LogStore {
    pub(crate) fn new(log: Arc<GroupLog>, writer: Writer) -> LogStore {
        LogStore { log, writer }
    }

    fn read(&self, from: u64, to: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        self.log.lock().read(self.log.group, from, to, bytes_max)
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(index) => *index,
        Bound::Excluded(index) => index + 1,
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(index) => index + 1,
        Bound::Excluded(index) => *index,
        Bound::Unbounded => u64::MAX,
    };
    (from, to)
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (from, to) = bounds(&range);
        self.read(from, to, usize::MAX)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.log.lock().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.read(start, end, READ_BYTES_MAX)
    }

    /// Reads in pieces, so that a long way to catch up doesn't fill the memory.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = io::Result<Entry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, to) = bounds(&range);
        let from = from.max(self.log.lock().first);
        let log = self.clone();
        let pieces = futures::stream::unfold(Some(from), move |next| {
            let log = log.clone();
            async move {
                let from = next.filter(|from| *from < to)?;
                let piece = log.read(from, to.min(from.saturating_add(APPLY_ENTRIES)), READ_BYTES_MAX);
                let (piece, next) = match piece {
                    Ok(entries) => {
                        let next = entries.last().map(|entry| entry.log_id.index + 1);
                        (entries.into_iter().map(Ok).collect(), next)
                    }
                    Err(error) => (vec![Err(error)], None),
                };
                Some((futures::stream::iter(piece), next))
            }
        });
        Box::pin(futures::StreamExt::flatten(pieces))
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let inner = self.log.lock();
        Ok(LogState { last_purged_log_id: inner.purged, last_log_id: inner.last })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (log, vote) = (self.log.clone(), *vote);
        self.writer.perform(|done| Operation::Vote { log, vote, done }).await?;
        self.log.lock().vote = Some(vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        // Written along with the next batch: it may lag, and is never worth a sync of its own.
        self.log.lock().committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.log.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let sequence = {
            let mut inner = self.log.lock();
            inner.sequence += 1;
            let sequence = inner.sequence;
            for entry in &entries {
                inner.append(entry.clone(), sequence);
            }
            sequence
        };
        self.log.grown.notify_one();
        let log = self.log.clone();
        self.writer.submit(Operation::Append { log, sequence, entries, done: callback }).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let removed = self.log.lock().truncate(last_log_id);
        let log = self.log.clone();
        match removed {
            None => Ok(()),
            Some((from, to)) => self.writer.perform(|done| Operation::Truncate { log, from, to, done }).await,
        }
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let from = self.log.lock().purge(upto);
        let log = self.log.clone();
        self.writer.perform(|done| Operation::Purge { log, from, upto, done }).await
    }
}
