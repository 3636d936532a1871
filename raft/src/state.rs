//! The durable state of one group: [`Store`] over the node's database, written behind the log.
//!
//! A machine's changes gather in memory, over many entries, and reach the database in one atomic write, together with the applied
//! log id ([`GroupStore::flush`], R5). So what is changed again and again is written once, and what comes and goes in between is
//! never written. A crash loses what has gathered; the log still has the entries, and they are applied again.
//! What was read or written recently stays in memory.
//!
//! Invariants:
//! - Reads see all earlier writes, flushed or not.
//! - What the database holds is the state after whole entries, up to the applied log id that stands beside it.
//! - The log is purged only up to a snapshot, and a snapshot is made of what was flushed: no entry that is needed again is gone.
//! - The cache holds what the database holds, or nothing.
//! - Every key stands under its group and generation; a snapshot is installed as a new generation.

use std::{
    cell::{Cell, RefCell},
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
    store::{Store, StoreError},
};

use crate::{
    api::Limits,
    disk::{Disk, seal, unseal},
    storage::{Start, Table},
    types::{LogId, StoredMembership},
};

/// Group, generation.
const PREFIX_BYTES: usize = 8;
/// The host's own keys.
const HOST: u8 = 0;
/// The machine's keys.
const MACHINE: u8 = 1;
/// The host's key for [`AppliedState`].
const APPLIED: &[u8] = &[HOST, 0x01];

/// What a map needs for an entry beyond a short key and value, roughly.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// How far a replica has applied, and who was a member then.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct AppliedState {
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
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
    /// What was used recently.
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
/// None: removed, or absent.
type Value = Option<SmallVec<[u8; 56]>>;

/// A change that isn't in the database yet.
struct Change {
    value: Value,
    /// Whether it was read, and so is worth keeping in memory when it is written.
    used: Cell<bool>,
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

/// The state of one group, in one generation.
pub(crate) struct GroupStore {
    disk: Option<Arc<Disk>>,
    prefix: [u8; PREFIX_BYTES],
    limits: StoreLimits,
    changes: HashMap<Key, Change, RandomState>,
    order: RefCell<Order>,
    /// What `changes` holds, roughly.
    behind_bytes: usize,
    behind_entries: usize,
    cache: RefCell<Cache>,
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
            cache: RefCell::new(Cache::new(limits.cache_bytes)),
        }
    }

    /// How far the state in the database goes.
    pub(crate) fn applied_state(&self) -> io::Result<AppliedState> {
        let disk = self.disk().map_err(|error| io::Error::other(error.to_string()))?;
        match disk.tables().get(Table::State, &self.key(APPLIED))? {
            None => Ok(AppliedState::default()),
            Some(value) => unseal(APPLIED, &value),
        }
    }

    /// So many more entries were applied. True: it is time to flush.
    pub(crate) fn applied(&mut self, entries: usize) -> bool {
        self.behind_entries += entries;
        self.behind_entries >= self.limits.behind_entries || self.behind_bytes >= self.limits.behind_bytes
    }

    /// Writes all changes and the applied log id in one atomic step, without sync.
    pub(crate) fn flush(&mut self, state: &AppliedState) -> io::Result<()> {
        if self.behind_entries == 0 {
            return Ok(());
        }
        let disk = self.disk().map_err(|error| io::Error::other(error.to_string()))?.clone();
        // In order: that is how the database keeps them.
        let mut changes: Vec<(&Key, &Change)> = self.changes.iter().collect();
        changes.sort_unstable_by_key(|(key, _)| *key);
        let mut batch = disk.tables().batch();
        let mut full_key = self.machine_key(&[]);
        let prefix = full_key.len();
        for (key, change) in &changes {
            full_key.truncate(prefix);
            full_key.extend_from_slice(key);
            match &change.value {
                Some(value) => batch.put(Table::State, &full_key, value),
                None => batch.delete(Table::State, &full_key),
            }
        }
        batch.put(Table::State, &self.key(APPLIED), &seal(APPLIED, state));
        batch.write()?;
        let cache = self.cache.get_mut();
        for (key, change) in self.changes.drain() {
            if change.used.get() {
                cache.set(key, change.value);
            } else {
                cache.remove(&key);
            }
        }
        let order = self.order.get_mut();
        order.sorted.clear();
        order.unsorted.clear();
        (self.behind_bytes, self.behind_entries) = (0, 0);
        Ok(())
    }

    fn change(&mut self, key: &[u8], value: Value) {
        let bytes = |value: &Value| value.as_ref().map_or(0, |value| value.len());
        self.behind_bytes += bytes(&value);
        if let Some(change) = self.changes.get_mut(key) {
            self.behind_bytes -= bytes(&change.value);
            change.value = value;
            return;
        }
        self.behind_bytes += ENTRY_OVERHEAD_BYTES + key.len();
        let key = Key::from_slice(key);
        self.order.get_mut().unsorted.push(key.clone());
        self.changes.insert(key, Change { value, used: Cell::new(false) });
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
            change.used.set(true);
            if let Some(value) = &change.value {
                visit(value);
            }
            return Ok(());
        }
        let mut cache = self.cache.borrow_mut();
        if let Some(value) = cache.get(key) {
            if let Some(value) = value {
                visit(value);
            }
            return Ok(());
        }
        let disk = self.disk()?;
        let value = disk.tables().get(Table::State, &self.machine_key(key)).map_err(store_error)?;
        if let Some(value) = &value {
            visit(value);
        }
        cache.set(Key::from_slice(key), value.map(|value| SmallVec::from_slice(&value)));
        Ok(())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.change(key, Some(SmallVec::from_slice(value)));
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.change(key, None);
        Ok(())
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
            let above = changed.peek().map(|key| (key.as_slice(), self.changes[*key].value.as_deref()));
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
            let above = changed.peek().map(|key| (key.as_slice(), self.changes[*key].value.as_deref()));
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

/// What was used recently: two halves, the older of which is dropped when the newer is full. Knows absent keys too.
struct Cache {
    half_bytes_max: usize,
    newer: HashMap<Key, Value, RandomState>,
    older: HashMap<Key, Value, RandomState>,
    newer_bytes: usize,
}

impl Cache {
    fn new(bytes_max: usize) -> Cache {
        let (newer, older) = (HashMap::default(), HashMap::default());
        Cache { half_bytes_max: bytes_max / 2, newer, older, newer_bytes: 0 }
    }

    fn get(&mut self, key: &[u8]) -> Option<&Value> {
        if !self.newer.contains_key(key) {
            let (key, value) = self.older.remove_entry(key)?;
            self.set(key, value);
        }
        // It may have filled the newer half, which is the older one then.
        self.newer.get(key).or_else(|| self.older.get(key))
    }

    fn set(&mut self, key: Key, value: Value) {
        self.older.remove(&key);
        self.newer_bytes += ENTRY_OVERHEAD_BYTES + key.len() + value.as_ref().map_or(0, |value| value.len());
        self.newer.insert(key, value);
        if self.newer_bytes > self.half_bytes_max {
            std::mem::swap(&mut self.older, &mut self.newer);
            self.newer.clear();
            self.newer_bytes = 0;
        }
    }

    fn remove(&mut self, key: &[u8]) {
        self.older.remove(key);
        self.newer.remove(key);
    }
}
