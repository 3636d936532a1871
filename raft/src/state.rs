//! The durable state of one group: [`Store`] over the node's database.
//!
//! A machine's changes gather in memory and reach the database in one atomic write, together with the applied log id
//! ([`GroupStore::commit`], R5). What was read or written recently stays in memory.
//!
//! Invariants:
//! - Reads see all earlier writes, committed or not.
//! - The cache holds what the database holds, or nothing.
//! - Every key stands under its group and generation; a snapshot is installed as a new generation.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    io,
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use verdict_protocol::{
    ids::GroupId,
    store::{Store, StoreError},
};

use crate::{
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

/// The state of one group, in one generation.
pub(crate) struct GroupStore {
    disk: Option<Arc<Disk>>,
    prefix: [u8; PREFIX_BYTES],
    /// Changes that aren't in the database yet. None: removed.
    changes: BTreeMap<Vec<u8>, Option<Bytes>>,
    cache: RefCell<Cache>,
}

impl GroupStore {
    pub(crate) fn new(disk: Arc<Disk>, group: GroupId, generation: u32, cache_bytes: usize) -> GroupStore {
        GroupStore {
            disk: Some(disk),
            prefix: prefix(group, generation),
            changes: BTreeMap::new(),
            cache: RefCell::new(Cache::new(cache_bytes)),
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

    /// Writes all changes and the applied log id in one atomic step, without sync.
    pub(crate) fn commit(&mut self, state: &AppliedState) -> io::Result<()> {
        let disk = self.disk().map_err(|error| io::Error::other(error.to_string()))?.clone();
        let mut batch = disk.tables().batch();
        for (key, value) in &self.changes {
            let key = self.machine_key(key);
            match value {
                Some(value) => batch.put(Table::State, &key, value),
                None => batch.delete(Table::State, &key),
            }
        }
        batch.put(Table::State, &self.key(APPLIED), &seal(APPLIED, state));
        batch.write()?;
        let cache = self.cache.get_mut();
        for (key, value) in std::mem::take(&mut self.changes) {
            cache.set(key, value);
        }
        Ok(())
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
        if let Some(value) = self.changes.get(key) {
            return Ok(value.clone());
        }
        let mut cache = self.cache.borrow_mut();
        if let Some(value) = cache.get(key) {
            return Ok(value);
        }
        let disk = self.disk()?;
        let value = disk.tables().get(Table::State, &self.machine_key(key)).map_err(store_error)?;
        cache.set(key.to_vec(), value.clone());
        Ok(value)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.changes.insert(key.to_vec(), Some(Bytes::copy_from_slice(value)));
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.changes.insert(key.to_vec(), None);
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
        let mut changed =
            self.changes.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))).peekable();
        loop {
            let below = stored.item().map(|(key, value)| (&key[PREFIX_BYTES + 1..], value));
            let above = changed.peek().map(|(key, value)| (key.as_slice(), value.as_ref()));
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
        let mut changed =
            self.changes.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))).rev().peekable();
        loop {
            let below = stored.item().map(|(key, value)| (&key[PREFIX_BYTES + 1..], value));
            let above = changed.peek().map(|(key, value)| (key.as_slice(), value.as_ref()));
            match (below, above) {
                (None, None) => {
                    stored.status().map_err(store_error)?;
                    return Ok(None);
                }
                (Some((key, value)), above) if above.is_none_or(|(changed, _)| key > changed) => {
                    return Ok(Some((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value))));
                }
                (_, Some((key, Some(value)))) => {
                    return Ok(Some((Bytes::copy_from_slice(key), value.clone())));
                }
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
    newer: HashMap<Vec<u8>, Option<Bytes>>,
    older: HashMap<Vec<u8>, Option<Bytes>>,
    newer_bytes: usize,
}

impl Cache {
    /// What a map needs for an entry beyond key and value, roughly.
    const OVERHEAD_BYTES: usize = 96;

    fn new(bytes_max: usize) -> Cache {
        Cache { half_bytes_max: bytes_max / 2, newer: HashMap::new(), older: HashMap::new(), newer_bytes: 0 }
    }

    fn get(&mut self, key: &[u8]) -> Option<Option<Bytes>> {
        if let Some(value) = self.newer.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.older.remove_entry(key)?;
        self.set(key, value.clone());
        Some(value)
    }

    fn set(&mut self, key: Vec<u8>, value: Option<Bytes>) {
        self.older.remove(&key);
        self.newer_bytes += Self::OVERHEAD_BYTES + key.len() + value.as_ref().map_or(0, Bytes::len);
        self.newer.insert(key, value);
        if self.newer_bytes > self.half_bytes_max {
            self.older = std::mem::take(&mut self.newer);
            self.newer_bytes = 0;
        }
    }
}
