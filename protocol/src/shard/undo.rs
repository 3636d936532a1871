//! The undo log: what each committed part has changed, so that a row can be taken back to what it held at an earlier stamp.
//!
//! A row's settled value is the newest. For each part that was carried out there is one *entry*, under its stamp: of each row that it wrote
//! the stamp of the change before, and how to undo this one (a delta is subtracted, what was replaced is put back). So the changes of
//! a row are a chain from its settled value backwards, and entries come nearly in the order of their keys.
//!
//! Every so often, where the stamp says so, a change also leaves a *checkpoint*: what the row held after it. With these, whatever lies
//! far back in a long chain is found in a bounded number of steps, and a history is told from its oldest change on.
//!
//! After a failover stamps may arrive out of order; only deltas can (writes of records are exclusive). Such a one is linked into the chain
//! where its stamp belongs, and what the checkpoints behind it hold is shifted: all is as it would be had they come in order.
//!
//! Invariants:
//! - Whatever is above the history mark is kept, and what is at or below it goes: no read goes back as far, and nothing new comes there.
//! - An entry or a checkpoint that isn't stored yet stands before the stored one of the same key. Where each of them is makes no difference
//!   to anything that is told, nor to what is dropped.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{Hash, Hasher},
    ops::Range,
};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::{
    batch::RowKey,
    ids::{BatchId, Stamp},
    machine::{decode, encode, encode_into},
    messages::{READ_BYTES_MAX, RowAt, RowChange, RowValue},
    store::{Store, StoreError},
};

const UNDO_TABLE: u8 = 0x11;
const CHECKPOINT_TABLE: u8 = 0x14;

/// One in so many changes leaves a checkpoint, in the mean. Part of the format.
const CHECKPOINT_EVERY: u64 = 64;
/// How many changes are undone before a checkpoint is looked for: mostly what is read was changed a few times since.
const STEPS_WITHOUT_CHECKPOINT: usize = 16;
/// What it costs to look an entry up, in bytes that are read.
const LOOK_BYTES: usize = 512;

/// What is undone of a part: `stamp` is its key.
#[derive(Debug, Serialize, Deserialize)]
struct Entry<Changes> {
    id: BatchId,
    changes: Changes,
}

/// An entry that was read, and its size.
type Read = (Entry<Vec<Change>>, usize);

/// What one part did to one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<Row = RowKey, Value = RowValue> {
    /// The row.
    pub row: Row,
    /// The stamp of the row's change before this one; 0: there was none.
    pub before: Stamp,
    /// What it did.
    pub what: What<Value>,
    /// Whether what the row held after it is kept as a checkpoint.
    pub checkpoint: bool,
}

/// A change, as it is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What<Value = RowValue> {
    /// Added to a balance.
    Added(i128),
    /// Made a balance of this amount where there was nothing, or a record that was deleted.
    Began(i128),
    /// Replaced this.
    Replaced(Value),
}

impl<Value> What<Value> {
    /// The change of a balance.
    fn delta(&self) -> Option<i128> {
        match self {
            What::Added(delta) | What::Began(delta) => Some(*delta),
            What::Replaced(_) => None,
        }
    }
}

impl Change {
    /// What the row was before it, given what it held after it.
    fn undo(self, after: &RowValue) -> RowAt {
        let value = match self.what {
            What::Added(delta) => minus(after, delta),
            What::Began(_) => RowValue::Absent,
            What::Replaced(value) => value,
        };
        RowAt { version: self.before, value }
    }
}

/// Where an entry that isn't stored is encoded.
#[derive(Clone, Debug)]
struct Unstored {
    stamp: Stamp,
    bytes: Range<usize>,
}

/// A key of a row or of a checkpoint; most lie in place.
pub type Key = SmallVec<[u8; 64]>;

/// The undo log of a shard: what isn't stored of it, and how the rest is found.
#[derive(Clone, Debug, Default)]
pub struct UndoLog {
    /// In the order of stamps.
    unstored: Vec<Unstored>,
    /// Entries as they will be stored, each where `unstored` says.
    encoded: Vec<u8>,
    /// Checkpoints that aren't stored, by their keys.
    checkpoints: BTreeMap<Key, RowValue>,
}

impl UndoLog {
    /// Adds the entry of a part, and notes it with `results`, which tell what it has made of its rows. At or below the history mark nothing
    /// is kept of it.
    pub fn add(
        &mut self,
        store: &mut dyn Store,
        id: BatchId,
        stamp: Stamp,
        changes: &[Change<&RowKey, &RowValue>],
        results: &[u8],
        history: Stamp,
    ) -> Result<(), StoreError> {
        if stamp > history && self.unstored.last().is_none_or(|last| last.stamp >= stamp) {
            assert!(self.look(store, stamp)?.is_none(), "two batches have stamp {stamp}");
        }
        let bytes = self.encode(&Entry { id, changes });
        store.note(&[&undo_key(stamp), &self.encoded[bytes.clone()], results]);
        if stamp > history {
            self.keep(stamp, bytes);
        } else {
            self.encoded.truncate(bytes.start);
        }
        Ok(())
    }

    /// Keeps what a row held after a change.
    pub fn add_checkpoint(&mut self, row: &RowKey, stamp: Stamp, value: &RowValue) {
        self.checkpoints.insert(checkpoint_key(row, stamp), value.clone());
    }

    /// What a row held at a position, not below the history mark, and the stamp of the first change behind that; `now` is what it holds now.
    pub fn back_to(
        &self,
        store: &dyn Store,
        row: &RowKey,
        now: RowAt,
        position: Stamp,
    ) -> Result<(RowAt, Option<Stamp>), StoreError> {
        let (mut at, mut behind, mut steps) = (now, None, 0);
        while at.version > position {
            if steps == STEPS_WITHOUT_CHECKPOINT
                && let Some(checkpoint) = self.checkpoint(store, row, Stamp(position.0 + 1))?
                && checkpoint.version < at.version
            {
                at = checkpoint;
            }
            steps += 1;
            behind = Some(at.version);
            let (_, change) = self.change(store, row, at.version)?;
            at = change.undo(&at.value);
        }
        Ok((at, behind))
    }

    /// The changes of a row with stamps in `from..=position`, all above the history mark, at most `limit` and about [`READ_BYTES_MAX`], and
    /// where the list goes on; `now` is what the row holds now.
    pub fn history(
        &self,
        store: &dyn Store,
        row: &RowKey,
        now: &RowAt,
        mut from: Stamp,
        position: Stamp,
        limit: usize,
    ) -> Result<(Vec<RowChange>, Option<Stamp>), StoreError> {
        let mut page = Page { changes: Vec::new(), bytes: 0, looked: 0, limit, next: None };
        // From one checkpoint to the next, each time from its end backwards.
        loop {
            let checkpoint = self.checkpoint(store, row, from)?;
            let is_last = checkpoint.as_ref().is_none_or(|checkpoint| checkpoint.version >= position);
            let end = checkpoint.unwrap_or_else(|| now.clone());
            let reached = end.version;
            self.stretch(store, row, end, from, position, &mut page)?;
            if is_last || page.next.is_some() {
                return Ok((page.changes, page.next));
            }
            from = Stamp(reached.0 + 1);
            if page.looked > READ_BYTES_MAX {
                return Ok((page.changes, Some(from)));
            }
        }
    }

    /// Puts on a page the changes with stamps in `from..=position` that lie before `end`.
    fn stretch(
        &self,
        store: &dyn Store,
        row: &RowKey,
        end: RowAt,
        from: Stamp,
        position: Stamp,
        page: &mut Page,
    ) -> Result<(), StoreError> {
        let (mut at, mut found, mut bytes) = (end, VecDeque::new(), 0);
        while at.version >= from && at.version > Stamp(0) {
            let (id, change, size) = self.sized_change(store, row, at.version)?;
            page.looked += LOOK_BYTES + size;
            let delta = change.what.delta();
            let before = change.undo(&at.value);
            let RowAt { version: stamp, value: result } = std::mem::replace(&mut at, before);
            if stamp > position {
                continue;
            }
            bytes += result.bytes();
            found.push_front(RowChange { id, stamp, delta, result });
            // Of what can't be on the page one change is enough, to go on with.
            while let Some(last) = found.back().map(|change: &RowChange| change.result.bytes())
                && (found.len() > page.room().saturating_add(1) || bytes - last > READ_BYTES_MAX)
            {
                bytes -= last;
                found.pop_back();
            }
        }
        for change in found {
            if !page.put(change) {
                break;
            }
        }
        Ok(())
    }

    /// Links a delta that comes late into the chain of a row: the change behind it now comes after it, and the checkpoints behind it are
    /// shifted. `now` is what the row holds now, without the delta. Gives the stamp of the change before it, and whether there was no
    /// balance before.
    pub fn link(
        &mut self,
        store: &mut dyn Store,
        row: &RowKey,
        now: &RowAt,
        stamp: Stamp,
        delta: i128,
        history: Stamp,
    ) -> Result<(Stamp, bool), StoreError> {
        let (at, behind) = self.back_to(store, row, now.clone(), stamp.max(history))?;
        assert!(at.version != stamp, "two batches have stamp {stamp} on row {row:?}");
        self.shift(store, row, stamp, delta)?;
        // Where the change behind it is at or below the mark, nobody undoes that one any more.
        let Some(behind) = behind.filter(|_| at.version < stamp) else { return Ok((Stamp(0), false)) };
        let (mut entry, _) = self.entry(store, behind)?;
        let change = of_row(&mut entry, row, behind)?;
        let before = std::mem::replace(&mut change.before, stamp);
        let begins = matches!(change.what, What::Began(_));
        let delta = change.what.delta();
        change.what = What::Added(delta.unwrap_or_else(|| {
            panic!("a delta at stamp {stamp} comes before a write of row {row:?} at {behind}: its lock did not hold")
        }));
        // All of it: so much memory it takes until the flush.
        let bytes = self.encode(&entry);
        store.note(&[&undo_key(behind), &self.encoded[bytes.clone()]]);
        self.keep(behind, bytes);
        Ok((before, begins))
    }

    /// Shifts the checkpoints of a row behind a stamp.
    fn shift(
        &mut self,
        store: &mut dyn Store,
        row: &RowKey,
        stamp: Stamp,
        delta: i128,
    ) -> Result<(), StoreError> {
        let (from, end) = (checkpoint_key(row, Stamp(stamp.0 + 1)), checkpoints_end(row));
        let mut found = Ok(BTreeMap::new());
        store.scan(&from, &end, &mut |key, bytes| match (&mut found, decode("checkpoint", bytes)) {
            (Ok(found), Ok(value)) => {
                found.insert(Key::from_slice(key), value);
                true
            }
            (_, Err(error)) => {
                found = Err(error);
                false
            }
            (Err(_), Ok(_)) => false,
        })?;
        let mut found: BTreeMap<Key, RowValue> = found?;
        found.extend(self.checkpoints.range(from..end).map(|(key, value)| (key.clone(), value.clone())));
        for (key, value) in found {
            let value = plus(&value, delta);
            store.note(&[&key, &encode(&value)]);
            self.checkpoints.insert(key, value);
        }
        Ok(())
    }

    /// Looks at `most` entries from a stamp on, and drops those at or below the history mark, with their checkpoints. Gives the stamp where
    /// to go on.
    pub fn drop_entries(
        &mut self,
        store: &mut dyn Store,
        from: Stamp,
        history: Stamp,
        most: usize,
    ) -> Result<Stamp, StoreError> {
        let end = Stamp(history.0 + 1);
        let mut found: BTreeMap<Stamp, Vec<RowKey>> = BTreeMap::new();
        let mut failed = None;
        store.scan(&undo_key(from), &undo_key(end), &mut |key, bytes| {
            let stamp = stamp_of(key);
            match checkpoints_of(stamp, bytes) {
                Ok(rows) => drop(found.insert(stamp, rows)),
                Err(error) => failed = Some(error),
            }
            found.len() <= most && failed.is_none()
        })?;
        failed.map_or(Ok(()), Err)?;
        let unstored = self.place(from)..self.place(end);
        for Unstored { stamp, bytes } in self.unstored[unstored].iter().take(most + 1) {
            found.insert(*stamp, checkpoints_of(*stamp, &self.encoded[bytes.clone()])?);
        }
        let next = *found.keys().nth(most).unwrap_or(&end);
        for (stamp, rows) in found.range(..next) {
            store.delete(&undo_key(*stamp))?;
            for row in rows {
                let key = checkpoint_key(row, *stamp);
                self.checkpoints.remove(&key);
                store.delete(&key)?;
            }
        }
        let dropped = self.place(from)..self.place(next);
        self.unstored.drain(dropped);
        Ok(next)
    }

    /// Brings all that isn't stored to the store.
    pub fn store(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        for (key, value) in std::mem::take(&mut self.checkpoints) {
            store.bring(&key, Some(&encode(&value)))?;
        }
        for Unstored { stamp, bytes } in self.unstored.drain(..) {
            store.bring(&undo_key(stamp), Some(&self.encoded[bytes]))?;
        }
        self.encoded.clear();
        Ok(())
    }

    /// The first checkpoint of a row at a stamp or behind it.
    fn checkpoint(&self, store: &dyn Store, row: &RowKey, from: Stamp) -> Result<Option<RowAt>, StoreError> {
        let (from, end) = (checkpoint_key(row, from), checkpoints_end(row));
        let mut stored = None;
        store.scan(&from, &end, &mut |key, bytes| {
            let value = decode::<RowValue>("checkpoint", bytes);
            stored = Some(value.map(|value| RowAt { version: stamp_of(key), value }));
            false
        })?;
        let stored = stored.transpose()?;
        let unstored = self.checkpoints.range(from..end).next();
        let unstored = unstored.map(|(key, value)| RowAt { version: stamp_of(key), value: value.clone() });
        Ok(match (unstored, stored) {
            (Some(unstored), Some(stored)) if stored.version < unstored.version => Some(stored),
            (Some(unstored), _) => Some(unstored),
            (None, stored) => stored,
        })
    }

    /// The change of a row at a stamp, and the batch that made it.
    fn change(&self, store: &dyn Store, row: &RowKey, stamp: Stamp) -> Result<(BatchId, Change), StoreError> {
        let (id, change, _) = self.sized_change(store, row, stamp)?;
        Ok((id, change))
    }

    /// The same, with the size of its entry.
    fn sized_change(
        &self,
        store: &dyn Store,
        row: &RowKey,
        stamp: Stamp,
    ) -> Result<(BatchId, Change, usize), StoreError> {
        let (mut entry, bytes) = self.entry(store, stamp)?;
        let place = entry.changes.iter().position(|change| change.row == *row);
        let place = place.ok_or_else(|| of_no_row(row, stamp))?;
        Ok((entry.id, entry.changes.swap_remove(place), bytes))
    }

    fn entry(&self, store: &dyn Store, stamp: Stamp) -> Result<Read, StoreError> {
        let missing = || StoreError(format!("the undo entry of stamp {stamp} is missing"));
        self.look(store, stamp)?.ok_or_else(missing)
    }

    /// The entry of a stamp, if there is one, and its size.
    fn look(&self, store: &dyn Store, stamp: Stamp) -> Result<Option<Read>, StoreError> {
        if let Some(unstored) = self.unstored.get(self.place(stamp))
            && unstored.stamp == stamp
        {
            return read_entry(&self.encoded[unstored.bytes.clone()]).map(Some);
        }
        let mut found = None;
        store.look(&undo_key(stamp), &mut |bytes| found = Some(read_entry(bytes)))?;
        found.transpose()
    }

    fn encode<Changes: Serialize>(&mut self, entry: &Entry<Changes>) -> Range<usize> {
        let start = self.encoded.len();
        self.encoded = encode_into(std::mem::take(&mut self.encoded), entry);
        start..self.encoded.len()
    }

    fn keep(&mut self, stamp: Stamp, bytes: Range<usize>) {
        let place = self.place(stamp);
        match self.unstored.get_mut(place) {
            Some(unstored) if unstored.stamp == stamp => unstored.bytes = bytes,
            Some(_) | None => self.unstored.insert(place, Unstored { stamp, bytes }),
        }
    }

    /// Where an entry of a stamp stands, or would.
    fn place(&self, stamp: Stamp) -> usize {
        // Mostly it is the newest.
        if self.unstored.last().is_none_or(|last| last.stamp < stamp) {
            return self.unstored.len();
        }
        self.unstored.partition_point(|unstored| unstored.stamp < stamp)
    }

    /// What isn't stored, in order.
    fn entries(&self) -> impl Iterator<Item = (Stamp, &[u8])> {
        self.unstored.iter().map(|Unstored { stamp, bytes }| (*stamp, &self.encoded[bytes.clone()]))
    }
}

/// Equal if the same things aren't stored.
impl PartialEq for UndoLog {
    fn eq(&self, other: &UndoLog) -> bool {
        self.entries().eq(other.entries()) && self.checkpoints == other.checkpoints
    }
}

impl Eq for UndoLog {}

impl Hash for UndoLog {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.entries().for_each(|entry| entry.hash(state));
        self.checkpoints.hash(state);
    }
}

/// A piece of a history, as it is answered.
struct Page {
    changes: Vec<RowChange>,
    bytes: usize,
    /// What was read for it: entries hold other rows too, and as long as they are read nothing is applied.
    looked: usize,
    limit: usize,
    /// Where the history goes on.
    next: Option<Stamp>,
}

impl Page {
    /// How many changes it can have yet.
    fn room(&self) -> usize {
        self.limit - self.changes.len()
    }

    /// Puts the next change on the page, if there is room.
    fn put(&mut self, change: RowChange) -> bool {
        self.bytes += change.result.bytes();
        if self.room() == 0 || (self.bytes > READ_BYTES_MAX && !self.changes.is_empty()) {
            self.next = Some(change.stamp);
            return false;
        }
        self.changes.push(change);
        true
    }
}

/// Whether a change that doesn't come late leaves a checkpoint: by the stamp alone, well mixed, so that no row that is changed in some
/// regular way has none (the finalizer of MurmurHash3).
pub fn leaves_checkpoint(stamp: Stamp) -> bool {
    let mut mixed = stamp.0;
    for factor in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53] {
        mixed = (mixed ^ mixed >> 33).wrapping_mul(factor);
    }
    (mixed ^ mixed >> 33).is_multiple_of(CHECKPOINT_EVERY)
}

/// A balance and a delta.
pub fn plus(value: &RowValue, delta: i128) -> RowValue {
    RowValue::Balance(balance(value).checked_add(delta).expect("escrow keeps every sum within 128 bits"))
}

fn minus(value: &RowValue, delta: i128) -> RowValue {
    RowValue::Balance(balance(value).checked_sub(delta).expect("escrow keeps every sum within 128 bits"))
}

fn balance(value: &RowValue) -> i128 {
    match value {
        RowValue::Absent => 0,
        RowValue::Balance(balance) => *balance,
        RowValue::Record(_) => panic!("a delta was granted on a record"),
    }
}

/// The rows of an entry that have a checkpoint there.
fn checkpoints_of(stamp: Stamp, bytes: &[u8]) -> Result<Vec<RowKey>, StoreError> {
    if !leaves_checkpoint(stamp) {
        return Ok(Vec::new());
    }
    let entry: Entry<Vec<Change>> = decode("undo entry", bytes)?;
    let with_checkpoint = entry.changes.into_iter().filter(|change| change.checkpoint);
    Ok(with_checkpoint.map(|change| change.row).collect())
}

fn of_row<'a>(
    entry: &'a mut Entry<Vec<Change>>,
    row: &RowKey,
    stamp: Stamp,
) -> Result<&'a mut Change, StoreError> {
    entry.changes.iter_mut().find(|change| change.row == *row).ok_or_else(|| of_no_row(row, stamp))
}

fn of_no_row(row: &RowKey, stamp: Stamp) -> StoreError {
    StoreError(format!("the undo entry of stamp {stamp} says nothing of row {row:?}"))
}

/// An entry, and its size.
fn read_entry(bytes: &[u8]) -> Result<Read, StoreError> {
    Ok((decode("undo entry", bytes)?, bytes.len()))
}

/// So that entries sort by stamp.
fn undo_key(stamp: Stamp) -> [u8; 9] {
    let mut key = [UNDO_TABLE; 9];
    key[1..].copy_from_slice(&stamp.0.to_be_bytes());
    key
}

/// The row, a NUL (which no name contains) and the stamp, so that checkpoints sort by row, then by stamp.
fn checkpoint_key(row: &RowKey, stamp: Stamp) -> Key {
    let mut key = Key::new();
    key.push(CHECKPOINT_TABLE);
    key.extend_from_slice(row.as_bytes());
    key.push(0);
    key.extend_from_slice(&stamp.0.to_be_bytes());
    key
}

/// The end of the checkpoints of a row: greater than the key of any of them.
fn checkpoints_end(row: &RowKey) -> Key {
    let mut key = checkpoint_key(row, Stamp(0));
    key.truncate(key.len() - 9);
    key.push(1);
    key
}

fn stamp_of(key: &[u8]) -> Stamp {
    let tail = key[key.len() - 8..].try_into().expect("the key ends with a stamp");
    Stamp(u64::from_be_bytes(tail))
}
