//! The durable state of one group: [`Store`] over the node's database, written behind the log.
//!
//! A machine's changes gather in memory, in the machine itself and here, over many entries, and reach the database in one atomic
//! write, together with the applied log id ([`GroupStore::flush`], R5). So what is changed again and again is written once, and what
//! comes and goes in between is never written. A crash loses what has gathered; the log still has the entries, and they are applied
//! again.
//!
//! Invariants:
//! - Reads see all earlier writes, flushed or not.
//! - What the database holds is the state after whole entries, up to the applied log id that stands beside it.
//! - An entry is purged only when the state that includes it is in a table on disk: the log is purged only up to a snapshot, and a
//!   snapshot counts only once the state that it covers is durable ([`Snapshots::advance`](crate::snapshot::Snapshots::advance)).
//! - Every key stands under its group and generation; a snapshot is installed as a new generation.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashMap},
    io,
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use verdict_protocol::{
    ids::GroupId,
    machine::Machine,
    store::{Store, StoreError},
};

use crate::{
    api::Limits,
    disk::{Disk, seal, unseal},
    storage::{Batch, Start, Table},
    types::{LogId, SnapshotMeta, StoredMembership},
};

/// Group, generation.
pub(crate) const PREFIX_BYTES: usize = 8;
/// The host's own keys.
const HOST: u8 = 0;
/// The machine's keys.
const MACHINE: u8 = 1;
/// The host's key for [`AppliedState`].
const APPLIED: &[u8] = &[HOST, 0x01];

/// What a map needs for an entry beyond a short key and value, roughly.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// What a machine needs for a change that it keeps, beyond what it tells of it, roughly.
const NOTE_OVERHEAD_BYTES: usize = 32;

/// What a key that came and went still takes.
const ORDER_BYTES: usize = 64;

/// How far a replica has applied, and who was a member then.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct AppliedState {
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
}

impl AppliedState {
    /// What a snapshot of it covers.
    pub(crate) fn covered(&self) -> SnapshotMeta {
        SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() }
    }
}

/// Where the keys of one generation of a group begin.
pub(crate) fn prefix(group: GroupId, generation: u32) -> [u8; PREFIX_BYTES] {
    let mut prefix = [0; PREFIX_BYTES];
    prefix[..4].copy_from_slice(&group.0.to_be_bytes());
    prefix[4..].copy_from_slice(&generation.to_be_bytes());
    prefix
}

/// The first key after all that begin with `prefix`; None: there is none.
pub(crate) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

/// Removes all keys of a group but those of `generation`.
pub(crate) fn remove_other_generations(disk: &Disk, group: GroupId, generation: u32) -> io::Result<()> {
    let kept = prefix(group, generation);
    let mut batch = disk.tables().batch();
    let mut any = false;
    let start = prefix(group, 0);
    if kept > start && any_key(disk, &start, &kept)? {
        batch.delete_range(Table::State, &start, &kept);
        any = true;
    }
    if let (Some(after), Some(end)) = (prefix_end(&kept), prefix_end(&group.0.to_be_bytes()))
        && any_key(disk, &after, &end)?
    {
        batch.delete_range(Table::State, &after, &end);
        any = true;
    }
    if any { batch.write() } else { Ok(()) }
}

fn any_key(disk: &Disk, from: &[u8], to: &[u8]) -> io::Result<bool> {
    let cursor = disk.tables().cursor(Table::State, from, Some(to), Start::First);
    cursor.status()?;
    Ok(cursor.item().is_some())
}

/// How much is kept in memory of a group's state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreLimits {
    /// What a machine may keep of what was used recently.
    pub(crate) cache_bytes: usize,
    /// Changes that aren't in the database yet: at this size they are written.
    pub(crate) behind_bytes: usize,
    /// The same, in applied entries.
    pub(crate) behind_entries: usize,
}

impl StoreLimits {
    /// As a node's settings tell.
    pub(crate) fn of(limits: &Limits) -> StoreLimits {
        StoreLimits {
            cache_bytes: limits.state_cache_bytes,
            behind_bytes: limits.state_behind_bytes,
            behind_entries: limits.state_behind_entries,
        }
    }
}

/// Most keys and values are short: they are kept in place, so that looking one up follows no pointer.
type Key = SmallVec<[u8; 40]>;
/// None: removed.
type Value = Option<SmallVec<[u8; 56]>>;

/// A change that isn't in the database yet.
struct Change {
    value: Value,
    /// Whether the database is known not to hold the key.
    fresh: bool,
}

/// The keys of the changes in order, as far as anybody wanted them in order.
#[derive(Default)]
struct Order {
    sorted: BTreeSet<Key>,
    unsorted: Vec<Key>,
}

impl Order {
    fn sorted(&mut self) -> &BTreeSet<Key> {
        self.sorted.extend(self.unsorted.drain(..));
        &self.sorted
    }
}

fn bytes(value: &Value) -> usize {
    value.as_ref().map_or(0, |value| value.len())
}

/// The state of one group, in one generation.
pub(crate) struct GroupStore {
    disk: Option<Arc<Disk>>,
    prefix: [u8; PREFIX_BYTES],
    limits: StoreLimits,
    changes: HashMap<Key, Change, RandomState>,
    order: RefCell<Order>,
    /// What `changes` holds, and the machine, roughly.
    behind_bytes: usize,
    behind_entries: usize,
}

impl GroupStore {
    pub(crate) fn new(disk: Arc<Disk>, group: GroupId, generation: u32, limits: StoreLimits) -> GroupStore {
        GroupStore {
            disk: Some(disk),
            prefix: prefix(group, generation),
            limits,
            changes: HashMap::default(),
            order: RefCell::default(),
            behind_bytes: 0,
            behind_entries: 0,
        }
    }

    /// How far the state in the database goes.
    pub(crate) fn applied_state(&self) -> io::Result<AppliedState> {
        let disk = self.disk().map_err(|error| io::Error::other(error.0))?;
        match disk.tables().get(Table::State, &self.key(APPLIED))? {
            None => Ok(AppliedState::default()),
            Some(value) => unseal(APPLIED, &value),
        }
    }

    /// What a machine may keep of what is stored.
    pub(crate) fn cache_bytes(&self) -> usize {
        self.limits.cache_bytes
    }

    /// So many more entries were applied, of so many bytes: what a machine keeps of them takes as much at most. True: it is time to
    /// flush.
    pub(crate) fn applied(&mut self, entries: usize, bytes: usize) -> bool {
        self.behind_entries += entries;
        self.behind_bytes += bytes;
        self.behind_entries >= self.limits.behind_entries || self.behind_bytes >= self.limits.behind_bytes
    }

    /// Writes all changes, those that the machine has kept, and the applied log id in one atomic step. It isn't durable with it.
    ///
    /// An error is final: the machine takes for stored what may not be, so nothing may be read or written here any more.
    pub(crate) fn flush<M: Machine>(&mut self, machine: &mut M, state: &AppliedState) -> io::Result<()> {
        let written = self.try_flush(machine, state);
        if written.is_err() {
            self.close();
        }
        written
    }

    fn try_flush<M: Machine>(&mut self, machine: &mut M, state: &AppliedState) -> io::Result<()> {
        if self.behind_entries == 0 {
            return Ok(());
        }
        let disk = self.disk().map_err(|error| io::Error::other(error.0))?.clone();
        // In order: that is how the database keeps them.
        let mut changes: Vec<(&Key, &Change)> = self.changes.iter().collect();
        changes.sort_unstable_by_key(|(key, _)| *key);
        let mut flushing =
            Flushing { store: self, batch: disk.tables().batch(), full_key: self.machine_key(&[]) };
        for (key, change) in changes {
            flushing.write(key, change.value.as_deref());
        }
        // Behind the others: what the machine kept is newer.
        machine.flush(&mut flushing).map_err(|StoreError(why)| io::Error::other(why))?;
        let mut batch = flushing.batch;
        batch.put(Table::State, &self.key(APPLIED), &seal(APPLIED, state));
        batch.write()?;
        self.changes.clear();
        let order = self.order.get_mut();
        order.sorted.clear();
        order.unsorted.clear();
        (self.behind_bytes, self.behind_entries) = (0, 0);
        Ok(())
    }

    fn change(&mut self, key: &[u8], value: Value) {
        self.behind_bytes += bytes(&value);
        if let Some(change) = self.changes.get_mut(key) {
            self.behind_bytes -= bytes(&change.value);
            change.value = value;
            return;
        }
        self.add(key, value, false);
    }

    fn add(&mut self, key: &[u8], value: Value, fresh: bool) {
        self.behind_bytes += ENTRY_OVERHEAD_BYTES + key.len();
        let key = Key::from_slice(key);
        self.order.get_mut().unsorted.push(key.clone());
        self.changes.insert(key, Change { value, fresh });
    }

    /// The value of a key that was changed; one that came and went is as good as removed.
    fn changed(&self, key: &[u8]) -> Option<&[u8]> {
        self.changes.get(key).and_then(|change| change.value.as_deref())
    }

    /// Lets go of the database; everything fails from then on.
    pub(crate) fn close(&mut self) {
        self.disk = None;
    }

    fn disk(&self) -> Result<&Arc<Disk>, StoreError> {
        self.disk.as_ref().ok_or_else(|| StoreError("the host was shut down".to_owned()))
    }

    fn key(&self, suffix: &[u8]) -> Vec<u8> {
        [&self.prefix, suffix].concat()
    }

    fn machine_key(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix[..], &[MACHINE], key].concat()
    }
}

fn store_error(error: io::Error) -> StoreError {
    StoreError(error.to_string())
}

impl Store for GroupStore {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let mut found = None;
        self.look(key, &mut |value| found = Some(Bytes::copy_from_slice(value)))?;
        Ok(found)
    }

    fn look(&self, key: &[u8], visit: &mut dyn FnMut(&[u8])) -> Result<(), StoreError> {
        if let Some(change) = self.changes.get(key) {
            if let Some(value) = &change.value {
                visit(value);
            }
            return Ok(());
        }
        let value = self.disk()?.tables().get(Table::State, &self.machine_key(key)).map_err(store_error)?;
        if let Some(value) = &value {
            visit(value);
        }
        Ok(())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.change(key, Some(SmallVec::from_slice(value)));
        Ok(())
    }

    fn put_new(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let value = Some(SmallVec::from_slice(value));
        if self.changes.contains_key(key) {
            // Removed since the last flush: what the database holds is still to be removed.
            self.change(key, value);
        } else {
            self.behind_bytes += bytes(&value);
            self.add(key, value, true);
        }
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
        match self.changes.get(key) {
            Some(change) if change.fresh => {
                // Its key stays in the order until the next flush.
                self.behind_bytes -= bytes(&change.value) + ENTRY_OVERHEAD_BYTES - ORDER_BYTES;
                self.changes.remove(key);
            }
            _ => self.change(key, None),
        }
        Ok(())
    }

    fn note(&mut self, change: &[&[u8]]) {
        self.behind_bytes += NOTE_OVERHEAD_BYTES + change.iter().map(|piece| piece.len()).sum::<usize>();
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        if from >= to {
            return Ok(());
        }
        let disk = self.disk()?;
        let (start, end) = (self.machine_key(from), self.machine_key(to));
        let mut stored = disk.tables().cursor(Table::State, &start, Some(&end), Start::First);
        let mut order = self.order.borrow_mut();
        let range = (Bound::Included(from), Bound::Excluded(to));
        let mut changed = order.sorted().range::<[u8], _>(range).peekable();
        loop {
            let below = stored.item().map(|(key, value)| (&key[PREFIX_BYTES + 1..], value));
            let above = changed.peek().map(|key| (key.as_slice(), self.changed(key)));
            let go_on = match (below, above) {
                (None, None) => break,
                (Some((key, value)), above) if above.is_none_or(|(changed, _)| key < changed) => {
                    let go_on = visit(key, value);
                    stored.next();
                    go_on
                }
                (below, Some((key, value))) => {
                    let go_on = value.is_none_or(|value| visit(key, value));
                    if below.is_some_and(|(below, _)| below == key) {
                        stored.next();
                    }
                    changed.next();
                    go_on
                }
                (Some(_), None) => unreachable!("the second arm takes it"),
            };
            if !go_on {
                break;
            }
        }
        stored.status().map_err(store_error)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError> {
        if from >= to {
            return Ok(None);
        }
        let disk = self.disk()?;
        let (start, end) = (self.machine_key(from), self.machine_key(to));
        let mut stored = disk.tables().cursor(Table::State, &start, Some(&end), Start::Last);
        let mut order = self.order.borrow_mut();
        let range = (Bound::Included(from), Bound::Excluded(to));
        let mut changed = order.sorted().range::<[u8], _>(range).rev().peekable();
        let found =
            |key: &[u8], value: &[u8]| Ok(Some((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))));
        loop {
            let below = stored.item().map(|(key, value)| (&key[PREFIX_BYTES + 1..], value));
            let above = changed.peek().map(|key| (key.as_slice(), self.changed(key)));
            match (below, above) {
                (None, None) => {
                    stored.status().map_err(store_error)?;
                    return Ok(None);
                }
                (Some((key, value)), above) if above.is_none_or(|(changed, _)| key > changed) => {
                    return found(key, value);
                }
                (_, Some((key, Some(value)))) => return found(key, value),
                (below, Some((key, None))) => {
                    if below.is_some_and(|(below, _)| below == key) {
                        stored.prev();
                    }
                    changed.next();
                }
                (Some(_), None) => unreachable!("the second arm takes it"),
            }
        }
    }
}

/// The batch of a flush, as the machine sees it.
struct Flushing<'a> {
    store: &'a GroupStore,
    batch: Box<dyn Batch>,
    /// Begins with what all keys of the machine begin with.
    full_key: Vec<u8>,
}

impl Flushing<'_> {
    fn write(&mut self, key: &[u8], value: Option<&[u8]>) {
        self.full_key.truncate(PREFIX_BYTES + 1);
        self.full_key.extend_from_slice(key);
        match value {
            Some(value) => self.batch.put(Table::State, &self.full_key, value),
            None => self.batch.delete(Table::State, &self.full_key),
        }
    }
}

/// Reads see what there was before the flush.
impl Store for Flushing<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.store.get(key)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.write(key, Some(value));
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.write(key, None);
        Ok(())
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.store.scan(from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError> {
        self.store.last(from, to)
    }
}

#[cfg(test)]
mod tests {
    use verdict_protocol::store::MemoryStore;

    use std::{
        path::{Path, PathBuf},
        sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use super::*;
    use crate::{
        api::HostError,
        on_disk::OnDisk,
        storage::{Batch, Cursor, File, Open, Reads, Storage, Tables},
    };

    /// A machine that keeps some changes in memory.
    #[derive(Default)]
    struct Kept(Vec<u8>);

    impl Machine for Kept {
        type Reply = ();
        type Config = ();

        fn open((): &(), _: &dyn Store) -> Result<Kept, StoreError> {
            Ok(Kept::default())
        }

        fn apply(&mut self, store: &mut dyn Store, _: u64, command: &[u8]) -> Result<(), StoreError> {
            store.note(&[command]);
            self.0.extend_from_slice(command);
            Ok(())
        }

        fn flush(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
            self.0.drain(..).try_for_each(|byte| store.bring(&[byte], Some(b"kept")))
        }

        fn trim(&mut self, _: usize) {}
    }

    fn next(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *seed >> 33
    }

    fn all(store: &dyn Store, from: &[u8], to: &[u8], most: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut found = Vec::new();
        store
            .scan(from, to, &mut |key, value| {
                found.push((key.to_vec(), value.to_vec()));
                found.len() < most
            })
            .unwrap();
        found
    }

    /// What is known of the batches of a disk.
    #[derive(Debug, Default)]
    struct Counts {
        written: AtomicUsize,
        fails: AtomicBool,
    }

    /// The disk of this machine, which counts the batches that are written, and fails on demand.
    #[derive(Debug)]
    struct Counting(Arc<Counts>);

    struct CountingTables(Box<dyn Tables>, Arc<Counts>);

    struct CountingBatch(Box<dyn Batch>, Arc<Counts>);

    impl Storage for Counting {
        fn open_tables(&self, folder: &Path, cache_bytes: usize) -> Result<Box<dyn Tables>, HostError> {
            Ok(Box::new(CountingTables(OnDisk.open_tables(folder, cache_bytes)?, self.0.clone())))
        }

        fn create_folder(&self, folder: &Path) -> io::Result<()> {
            OnDisk.create_folder(folder)
        }

        fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
            OnDisk.list(folder)
        }

        fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
            OnDisk.open(path, how)
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            OnDisk.remove(path)
        }
    }

    impl Reads for CountingTables {
        fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
            self.0.get(table, key)
        }

        fn cursor<'a>(
            &'a self,
            table: Table,
            from: &[u8],
            to: Option<&[u8]>,
            start: Start,
        ) -> Box<dyn Cursor + 'a> {
            self.0.cursor(table, from, to, start)
        }
    }

    impl Tables for CountingTables {
        fn batch(&self) -> Box<dyn Batch> {
            Box::new(CountingBatch(self.0.batch(), self.1.clone()))
        }

        fn sync(&self) -> io::Result<()> {
            self.0.sync()
        }

        fn make_state_durable(&self) -> io::Result<()> {
            self.0.make_state_durable()
        }

        fn view(&self) -> Box<dyn Reads + '_> {
            self.0.view()
        }
    }

    impl Batch for CountingBatch {
        fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
            self.0.put(table, key, value);
        }

        fn delete(&mut self, table: Table, key: &[u8]) {
            self.0.delete(table, key);
        }

        fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
            self.0.delete_range(table, from, to);
        }

        fn bytes(&self) -> usize {
            self.0.bytes()
        }

        fn write(self: Box<Self>) -> io::Result<()> {
            if self.1.fails.load(Ordering::Relaxed) {
                return Err(io::Error::other("the disk is full"));
            }
            self.1.written.fetch_add(1, Ordering::Relaxed);
            self.0.write()
        }
    }

    /// Rule R5: between two writes the power may be lost.
    #[test]
    fn the_changes_and_the_applied_index_are_written_together() {
        let directory = tempfile::tempdir().unwrap();
        let counts: Arc<Counts> = Arc::default();
        let disk = Disk::open(Arc::new(Counting(counts.clone())), directory.path(), 1 << 20).unwrap();
        let limits = StoreLimits { cache_bytes: 2_000, behind_bytes: 20_000, behind_entries: 300 };
        let mut store = GroupStore::new(disk, GroupId(3), 0, limits);
        for n in 0..100_u32 {
            store.put(&n.to_be_bytes(), b"x").unwrap();
            store.applied(1, 0);
        }
        let mut machine = Kept::default();
        // The machine's is the newer one.
        store.put(b"m", b"older").unwrap();
        machine.apply(&mut store, 1, b"m").unwrap();
        let before = counts.written.load(Ordering::Relaxed);
        store.flush(&mut machine, &AppliedState::default()).unwrap();
        assert_eq!(counts.written.load(Ordering::Relaxed), before + 1);
        assert_eq!(
            store.get(b"m").unwrap().as_deref(),
            Some(&b"kept"[..]),
            "what the machine kept is among it"
        );
        let applied = store.disk().unwrap().tables().get(Table::State, &store.key(APPLIED)).unwrap();
        assert!(applied.is_some(), "the applied index is among what was written");
    }

    /// The machine takes for stored what it has handed over: going on would read older rows, and a second flush would leave them out.
    #[test]
    fn after_a_flush_that_failed_nothing_is_read_or_written() {
        let directory = tempfile::tempdir().unwrap();
        let counts: Arc<Counts> = Arc::default();
        let disk = Disk::open(Arc::new(Counting(counts.clone())), directory.path(), 1 << 20).unwrap();
        let limits = StoreLimits { cache_bytes: 2_000, behind_bytes: 20_000, behind_entries: 300 };
        let mut store = GroupStore::new(disk.clone(), GroupId(3), 0, limits);
        let (mut machine, state) = (Kept::default(), AppliedState::default());
        machine.apply(&mut store, 1, b"m").unwrap();
        store.put(b"k", b"value").unwrap();
        store.applied(1, 1);
        counts.fails.store(true, Ordering::Relaxed);
        store.flush(&mut machine, &state).unwrap_err();
        counts.fails.store(false, Ordering::Relaxed);
        assert!(store.flush(&mut machine, &state).is_err(), "half of it would be written");
        assert!(store.get(b"m").is_err());
        assert_eq!(GroupStore::new(disk, GroupId(3), 0, limits).get(b"k").unwrap(), None);
    }

    #[test]
    fn what_a_machine_keeps_takes_up_room_and_is_newer_than_what_was_put() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::open(Arc::new(OnDisk), directory.path(), 1 << 20).unwrap();
        let limits = StoreLimits { cache_bytes: 2_000, behind_bytes: 20_000, behind_entries: 300 };
        let mut store = GroupStore::new(disk, GroupId(3), 0, limits);
        let mut machine = Kept::default();
        store.put(b"m", b"put").unwrap();
        let mut notes = 0;
        while !store.applied(1, 0) {
            machine.apply(&mut store, 1, &[b'm'; 200]).unwrap();
            notes += 1;
        }
        assert!((50..100).contains(&notes), "{notes} notes of 200 bytes");
        store.flush(&mut machine, &AppliedState::default()).unwrap();
        assert_eq!(store.get(b"m").unwrap().as_deref(), Some(&b"kept"[..]));
        assert!(!store.applied(1, 0), "all that was behind is written");
    }

    /// Against a plain map: whatever is asked, and whenever it is written, dropped from memory or opened again.
    #[test]
    fn what_is_behind_shows_like_what_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let disk = Disk::open(Arc::new(OnDisk), directory.path(), 1 << 20).unwrap();
        // A tiny cache, so that much is read from the database.
        let limits = StoreLimits { cache_bytes: 2_000, behind_bytes: 20_000, behind_entries: 300 };
        let open = || GroupStore::new(disk.clone(), GroupId(3), 0, limits);
        let (mut store, mut model) = (open(), MemoryStore::default());
        // What is in the database, to go back to after a crash.
        let mut written = model.clone();
        let (mut seed, mut flushes, mut crashes) = (7, 0, 0);
        let (state, mut kept) = (AppliedState::default(), Kept::default());
        for round in 0..60_000 {
            // Some keys and values are longer than what is kept in place.
            let number = next(&mut seed) % 400;
            let key =
                format!("{}{number}", if number.is_multiple_of(9) { "k".repeat(50) } else { "k".to_owned() });
            let value = vec![round as u8; (next(&mut seed) % 80) as usize];
            let (key, other) = (key.as_bytes(), format!("k{}", next(&mut seed) % 400));
            match next(&mut seed) % 20 {
                0..=5 => {
                    store.put(key, &value).unwrap();
                    model.put(key, &value).unwrap();
                }
                6..=8 if model.get(key).unwrap().is_none() => {
                    store.put_new(key, &value).unwrap();
                    model.put_new(key, &value).unwrap();
                }
                6..=11 => {
                    store.delete(key).unwrap();
                    model.delete(key).unwrap();
                }
                12..=16 => assert_eq!(store.get(key).unwrap(), model.get(key).unwrap(), "round {round}"),
                17 => {
                    let most = (next(&mut seed) % 30) as usize + 1;
                    let (found, wanted) =
                        (all(&store, key, other.as_bytes(), most), all(&model, key, other.as_bytes(), most));
                    assert_eq!(found, wanted, "round {round}");
                }
                18 => {
                    let (found, wanted) =
                        (store.last(key, other.as_bytes()), model.last(key, other.as_bytes()));
                    assert_eq!(found.unwrap(), wanted.unwrap(), "round {round}");
                }
                _ => {}
            }
            if store.applied(1, 0) {
                store.flush(&mut kept, &state).unwrap();
                written = model.clone();
                flushes += 1;
            }
            if next(&mut seed).is_multiple_of(5_000) {
                (store, model) = (open(), written.clone());
                crashes += 1;
            }
        }
        assert!(flushes > 100 && crashes > 3, "{flushes} flushes, {crashes} crashes");
        assert_eq!(all(&store, b"", b"z", usize::MAX), all(&model, b"", b"z", usize::MAX));
    }
}
