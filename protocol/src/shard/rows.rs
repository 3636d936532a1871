//! Rows in memory: those that somebody holds or waits for, those whose changes are not stored yet, and those that were used lately.
//!
//! A row is looked up by its key once for each part that uses it; from then on the part knows its *slot*. What a commit changes is
//! kept here, and brought to the store with the next flush: the settled value once, however often it has changed, and how to undo each
//! change ([`super::undo`]).
//!
//! Finding a row is waiting for memory, so a row that nobody uses is small: its key, its value, and no more. Its line is beside it.
//!
//! Invariants:
//! - A row that is held, waited for or listed to be stored keeps its slot. Others may go at any flush, and are read again.
//! - A settled value holds exactly the committed batches that were applied here.
//! - Nothing here depends on when a flush happens, and nothing that is told does.

use std::hash::{Hash, Hasher};

use foldhash::quality::FixedState;
use smallvec::SmallVec;

use super::{
    locks::{Claim, RowLock, Ticket},
    slots::{Slot, Slots},
    undo::{Change, Key, UndoLog, What, leaves_checkpoint, plus},
};
use crate::{
    batch::RowKey,
    ids::{BatchId, Stamp},
    machine::{decode, encode_into},
    messages::{RowAt, RowChange, RowValue},
    store::{Store, StoreError},
};

const ROW_TABLE: u8 = 0x10;

/// What a row takes in memory beside its value, roughly, while nobody uses it: itself, and its place in the index.
const ROW_BYTES: usize = 160;
/// How many slots are looked at in one go for rows that may go, at least, and for each row that has come since the last time: one that was
/// used gets a second chance.
const TRIM_STEPS: usize = 8192;
const TRIM_STEPS_EACH: usize = 4;

/// The line of a row that nobody holds or waits for.
static FREE: RowLock = RowLock::FREE;

/// A row in memory.
#[derive(Clone, Debug)]
pub struct Row {
    key: RowKey,
    settled: RowAt,
    /// Its line. None: as [`FREE`].
    line: Option<Box<RowLock>>,
    /// Whether it has changed since it was stored: then it is among those that the next flush brings.
    changed: bool,
    /// Whether it was used since the hand came by.
    used: bool,
}

impl Row {
    /// One that is used just now, and that nobody holds.
    pub fn new(key: RowKey, settled: RowAt) -> Row {
        Row { key, settled, line: None, changed: false, used: true }
    }

    /// Its key.
    pub fn key(&self) -> &RowKey {
        &self.key
    }

    /// Its settled value.
    pub fn settled(&self) -> &RowAt {
        &self.settled
    }

    /// Its line.
    pub fn lock(&self) -> &RowLock {
        self.line.as_deref().unwrap_or(&FREE)
    }

    fn lock_mut(&mut self) -> &mut RowLock {
        self.line.get_or_insert_default()
    }

    /// Whether nobody needs it, and the store has it as it is.
    fn is_idle(&self) -> bool {
        self.lock().is_free() && !self.changed
    }

    /// What makes it differ from another one.
    fn parts(&self) -> (&RowKey, &RowAt, &RowLock, bool) {
        (&self.key, &self.settled, self.lock(), self.changed)
    }

    fn bytes(&self) -> usize {
        ROW_BYTES + self.key.heap_bytes() + self.settled.value.bytes()
    }
}

/// What a committed part does to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Adds the sum of its deltas to a balance.
    Add(i128),
    /// Writes a record, or its absence.
    Replace(RowValue),
}

/// All that a committed part does: each row once.
pub type Writes = SmallVec<[(Slot, Write); 3]>;

/// The rows of a shard that are in memory.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    slots: Slots,
    /// Rows that have changed since they were stored, each once.
    changed: Vec<Slot>,
    undo: UndoLog,
    /// Where looking for rows that may go goes on.
    hand: Slot,
    /// How many rows have come since it last moved.
    come: usize,
    bytes: usize,
    held: usize,
    /// Where values are encoded.
    scratch: Vec<u8>,
}

impl Rows {
    /// The slot of a row, which is read if it isn't in memory.
    pub fn seat(&mut self, store: &dyn Store, key: &RowKey) -> Result<Slot, StoreError> {
        if let Some(slot) = self.slots.find(key) {
            self.row_mut(slot).used = true;
            return Ok(slot);
        }
        let row = Row::new(key.clone(), stored(store, key)?);
        self.bytes += row.bytes();
        self.come += 1;
        Ok(self.slots.insert(row))
    }

    /// The row in a slot.
    pub fn row(&self, slot: Slot) -> &Row {
        self.slots.get(slot).expect("a row that is used keeps its slot")
    }

    /// Lets a part hold a row.
    pub fn hold(&mut self, slot: Slot, ticket: Ticket, claim: Claim) {
        let lock = self.row_mut(slot).lock_mut();
        let first = !lock.is_held();
        lock.hold(ticket, claim);
        self.held += usize::from(first);
    }

    /// Puts a part in the line of a row.
    pub fn wait(&mut self, slot: Slot, ticket: Ticket, claim: Claim) {
        self.row_mut(slot).lock_mut().wait(ticket, claim);
    }

    /// Takes a part out of the line of a row, which is given as it is then.
    pub fn leave(&mut self, slot: Slot, ticket: Ticket) -> &RowLock {
        let row = self.row_mut(slot);
        let lock = row.lock_mut();
        let was_held = lock.is_held();
        lock.remove(ticket);
        let last = was_held && !lock.is_held();
        if lock.is_free() {
            row.line = None;
        }
        self.held -= usize::from(last);
        self.row(slot).lock()
    }

    /// A row, if it is in memory.
    pub fn find(&self, key: &RowKey) -> Option<&Row> {
        self.slots.find(key).map(|slot| self.row(slot))
    }

    /// How many are held.
    pub fn held(&self) -> usize {
        self.held
    }

    /// What a row holds, of what has been applied.
    fn now(&self, store: &dyn Store, key: &RowKey) -> Result<RowAt, StoreError> {
        self.find(key).map_or_else(|| stored(store, key), |row| Ok(row.settled.clone()))
    }

    /// What a row held at a position, of what has been applied. Not below the history mark.
    pub fn at(&self, store: &dyn Store, key: &RowKey, position: Stamp) -> Result<RowAt, StoreError> {
        let now = self.now(store, key)?;
        self.undo.back_to(store, key, now, position).map(|(at, _)| at)
    }

    /// The changes of a row with stamps in `from..=position`, all above the history mark, at most `limit` and about
    /// [`READ_BYTES_MAX`](crate::messages::READ_BYTES_MAX), and where the list goes on.
    pub fn history(
        &self,
        store: &dyn Store,
        key: &RowKey,
        from: Stamp,
        position: Stamp,
        limit: usize,
    ) -> Result<(Vec<RowChange>, Option<Stamp>), StoreError> {
        self.undo.history(store, key, &self.now(store, key)?, from, position, limit)
    }

    /// Carries out what a part has committed, at its stamp. What is at or below the history mark need not be undone any more.
    pub fn commit(
        &mut self,
        store: &mut dyn Store,
        id: BatchId,
        stamp: Stamp,
        writes: &Writes,
        history: Stamp,
    ) -> Result<(), StoreError> {
        let Rows { slots, undo, scratch, .. } = self;
        let mut changes: SmallVec<[_; 3]> = SmallVec::with_capacity(writes.len());
        let mut results: SmallVec<[_; 3]> = SmallVec::with_capacity(writes.len());
        scratch.clear();
        for (slot, write) in writes {
            let Row { key, settled, .. } = slots.get(*slot).expect("a row that is used keeps its slot");
            let is_late = stamp <= settled.version;
            let (before, what, result) = match write {
                Write::Add(delta) => {
                    let (before, begins) = if is_late {
                        undo.link(store, key, settled, stamp, *delta, history)?
                    } else {
                        (settled.version, settled.value == RowValue::Absent)
                    };
                    let what = if begins { What::Began(*delta) } else { What::Added(*delta) };
                    (before, what, plus(&settled.value, *delta))
                }
                Write::Replace(value) => {
                    assert!(
                        !is_late,
                        "a write of row {key:?} at stamp {stamp} comes after one at {}: its lock did not hold",
                        settled.version
                    );
                    (settled.version, What::Replaced(&settled.value), value.clone())
                }
            };
            let checkpoint = !is_late && stamp > history && leaves_checkpoint(stamp);
            changes.push(Change { row: key, before, what, checkpoint });
            *scratch = encode_into(std::mem::take(scratch), &result);
            if checkpoint {
                undo.add_checkpoint(key, stamp, &result);
            }
            results.push(RowAt { version: settled.version.max(stamp), value: result });
        }
        undo.add(store, id, stamp, &changes, scratch, history)?;
        drop(changes);
        for ((slot, _), result) in writes.iter().zip(results) {
            self.settle(*slot, result);
        }
        Ok(())
    }

    fn settle(&mut self, slot: Slot, result: RowAt) {
        let row = self.slots.get_mut(slot).expect("a row that is used keeps its slot");
        self.bytes -= row.bytes();
        row.settled = result;
        self.bytes += row.bytes();
        if !std::mem::replace(&mut row.changed, true) {
            self.changed.push(slot);
        }
    }

    /// Looks at `most` parts from a stamp on, in the order of stamps, and drops how to undo those at or below the history mark. Gives the
    /// stamp where to go on.
    pub fn drop_undo(
        &mut self,
        store: &mut dyn Store,
        from: Stamp,
        history: Stamp,
        most: usize,
    ) -> Result<Stamp, StoreError> {
        self.undo.drop_entries(store, from, history, most)
    }

    /// Brings all that is not stored to the store.
    pub fn store_all(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        let mut changed = std::mem::take(&mut self.changed);
        // In order: that is how databases keep them.
        changed.sort_unstable_by_key(|slot| &self.row(*slot).key);
        for slot in changed {
            let row = self.slots.get_mut(slot).expect("a row that has changed keeps its slot");
            row.changed = false;
            self.scratch.clear();
            self.scratch = encode_into(std::mem::take(&mut self.scratch), &row.settled);
            store.bring(&row_key(&row.key), Some(&self.scratch))?;
        }
        self.undo.store(store)
    }

    /// Lets go of rows that were not used lately, until the rest takes about `keep_bytes`, or many were looked at.
    pub fn trim(&mut self, keep_bytes: usize) {
        let steps = TRIM_STEPS.max(TRIM_STEPS_EACH * std::mem::take(&mut self.come));
        for _ in 0..steps {
            if self.bytes <= keep_bytes {
                return;
            }
            self.hand = self.slots.after(self.hand);
            let Some(row) = self.slots.get_mut(self.hand) else { continue };
            if std::mem::take(&mut row.used) || !row.is_idle() {
                continue;
            }
            self.bytes -= row.bytes();
            self.slots.remove(self.hand);
        }
    }

    fn row_mut(&mut self, slot: Slot) -> &mut Row {
        self.slots.get_mut(slot).expect("a row that is used keeps its slot")
    }

    /// The rows that must be in memory.
    fn busy(&self) -> impl Iterator<Item = &Row> {
        self.slots.iter().filter(|row| !row.is_idle())
    }
}

/// The settled value of a row, as it is stored.
fn stored(store: &dyn Store, row: &RowKey) -> Result<RowAt, StoreError> {
    let mut found = Ok(RowAt::default());
    store.look(&row_key(row), &mut |bytes| found = decode("row", bytes))?;
    found
}

fn row_key(row: &RowKey) -> Key {
    let mut key = Key::new();
    key.push(ROW_TABLE);
    key.extend_from_slice(row.as_bytes());
    key
}

/// Equal if the same rows are held, waited for and changed in the same way; which others are in memory makes no difference.
impl PartialEq for Rows {
    fn eq(&self, other: &Rows) -> bool {
        let same = |row: &Row| other.find(&row.key).is_some_and(|other| other.parts() == row.parts());
        self.undo == other.undo && self.busy().count() == other.busy().count() && self.busy().all(same)
    }
}

impl Eq for Rows {}

impl Hash for Rows {
    fn hash<H: Hasher>(&self, state: &mut H) {
        use std::hash::BuildHasher as _;
        let hasher = FixedState::default();
        let each = self.busy().map(|row| hasher.hash_one(row.parts()));
        each.fold(0_u64, u64::wrapping_add).hash(state);
        self.undo.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::BTreeMap};

    use bytes::Bytes;

    use super::*;
    use crate::{
        ids::{Epoch, GroupId, Millis, Number},
        messages::READ_BYTES_MAX,
        store::MemoryStore,
    };

    fn row(partition: &str) -> RowKey {
        RowKey::new(partition, "USD").unwrap()
    }

    fn id(stamp: u64) -> BatchId {
        BatchId::from_parts(Millis(stamp), [0; 10])
    }

    /// A shard may keep millions of them.
    #[test]
    fn a_row_that_nobody_uses_is_small() {
        let mut table = Table::default();
        let key = row("user");
        let slot = table.rows.seat(&table.store, &key).unwrap();
        assert!(size_of::<Option<Row>>() <= 128, "{} bytes", size_of::<Option<Row>>());
        table.add(&key, 1, 5, 0);
        table.rows.hold(slot, TICKET, CLAIM);
        table.flush(usize::MAX);
        assert!(table.rows.row(slot).line.is_some(), "it is held");
        table.add(&key, 2, 5, 0);
        assert!(table.rows.leave(slot, TICKET).is_free());
        assert!(table.rows.row(slot).line.is_none());
    }

    const TICKET: Ticket =
        Ticket { number: Number { epoch: Epoch(0), sequence: 0 }, coordinator: GroupId(0) };
    const CLAIM: Claim = Claim {
        mode: crate::shard::Mode::Shared,
        delta: 0,
        lowest: i128::MIN,
        highest: i128::MAX,
        has_floor: false,
        has_ceiling: false,
        writes: false,
    };

    /// Rows, with what is stored of them.
    #[derive(Default)]
    struct Table {
        rows: Rows,
        store: Noting,
    }

    /// A store that remembers what goes into the running hash.
    #[derive(Clone, Default)]
    struct Noting {
        kept: MemoryStore,
        noted: Vec<Vec<u8>>,
        /// How many keys were read.
        read: Cell<usize>,
    }

    impl Store for Noting {
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
            self.read.set(self.read.get() + 1);
            self.kept.get(key)
        }

        fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
            self.noted.push([key, value].concat());
            self.kept.put(key, value)
        }

        fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
            self.noted.push(key.to_vec());
            self.kept.delete(key)
        }

        fn note(&mut self, change: &[&[u8]]) {
            self.noted.push(change.concat());
        }

        fn bring(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
            self.kept.bring(key, value)
        }

        fn scan(
            &self,
            from: &[u8],
            to: &[u8],
            visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
        ) -> Result<(), StoreError> {
            self.kept.scan(from, to, &mut |key, value| {
                self.read.set(self.read.get() + 1);
                visit(key, value)
            })
        }

        fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError> {
            self.kept.last(from, to)
        }
    }

    impl Table {
        fn add(&mut self, key: &RowKey, stamp: u64, delta: i128, history: u64) {
            self.commit(stamp, &[(key, Write::Add(delta))], history);
        }

        fn put(&mut self, key: &RowKey, stamp: u64, value: RowValue) {
            self.commit(stamp, &[(key, Write::Replace(value))], 0);
        }

        fn commit(&mut self, stamp: u64, writes: &[(&RowKey, Write)], history: u64) {
            let Table { rows, store } = self;
            let seated = writes.iter().map(|(key, write)| (rows.seat(store, key).unwrap(), write.clone()));
            let writes = seated.collect();
            rows.commit(store, id(stamp), Stamp(stamp), &writes, Stamp(history)).unwrap();
        }

        fn flush(&mut self, keep_bytes: usize) {
            self.rows.store_all(&mut self.store).unwrap();
            assert_eq!(self.rows.undo, UndoLog::default(), "a flush stores all");
            self.rows.trim(keep_bytes);
        }

        /// How many keys of a table are stored.
        fn keys(&self, table: u8) -> usize {
            self.store.kept.iter().filter(|(key, _)| key[0] == table).count()
        }

        /// The same, but for what is in memory: nothing is left out of what is told of the changes.
        fn noted(&self) -> &[Vec<u8>] {
            &self.store.noted
        }

        fn at(&self, key: &RowKey, position: u64) -> RowAt {
            self.rows.at(&self.store, key, Stamp(position)).unwrap()
        }

        fn history(
            &self,
            key: &RowKey,
            from: u64,
            position: u64,
            limit: usize,
        ) -> (Vec<RowChange>, Option<Stamp>) {
            self.rows.history(&self.store, key, Stamp(from), Stamp(position), limit).unwrap()
        }

        fn drop_undo(&mut self, from: u64, history: u64, most: usize) -> u64 {
            self.rows.drop_undo(&mut self.store, Stamp(from), Stamp(history), most).unwrap().0
        }
    }

    /// Numbers that follow from a seed.
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, sides: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % sides
        }
    }

    /// All changes of a row by stamp: what the undo log is another way to tell.
    #[derive(Default)]
    struct Model(BTreeMap<u64, Write>);

    impl Model {
        fn changes(&self) -> Vec<RowChange> {
            let mut result = RowValue::Absent;
            let each = self.0.iter().map(|(stamp, write)| {
                let delta = match write {
                    Write::Add(delta) => {
                        result = plus(&result, *delta);
                        Some(*delta)
                    }
                    Write::Replace(value) => {
                        result = value.clone();
                        None
                    }
                };
                RowChange { id: id(*stamp), stamp: Stamp(*stamp), delta, result: result.clone() }
            });
            each.collect()
        }

        fn at(&self, position: u64) -> RowAt {
            let last = self.changes().into_iter().rfind(|change| change.stamp.0 <= position);
            last.map_or_else(RowAt::default, |change| RowAt { version: change.stamp, value: change.result })
        }

        fn history(&self, from: u64, position: u64, limit: usize) -> (Vec<RowChange>, Option<Stamp>) {
            let within = |change: &RowChange| (from..=position).contains(&change.stamp.0);
            let mut changes: Vec<RowChange> = self.changes().into_iter().filter(within).collect();
            let next = changes.get(limit).map(|change| change.stamp);
            changes.truncate(limit);
            (changes, next)
        }

        /// Some change that may be made at a stamp, if any may.
        fn write(&self, stamp: u64, dice: &mut Dice) -> Option<Write> {
            let add = Write::Add(dice.roll(100) as i128 - 50);
            let is_late = self.0.last_key_value().is_some_and(|(last, _)| *last > stamp);
            if is_late {
                // Its lock held against all that is exclusive, and it was granted on no record.
                let behind = self.0.range(stamp..).all(|(_, write)| matches!(write, Write::Add(_)));
                return (behind && !matches!(self.at(stamp).value, RowValue::Record(_))).then_some(add);
            }
            let put = Write::Replace(RowValue::Record(vec![stamp as u8; dice.roll(9)].into()));
            Some(match (self.at(stamp).value, dice.roll(4)) {
                (RowValue::Balance(_), _) | (RowValue::Absent, 0) => add,
                (RowValue::Absent, 1) | (RowValue::Record(_), 0..=1) => Write::Replace(RowValue::Absent),
                (RowValue::Absent | RowValue::Record(_), _) => put,
            })
        }
    }

    /// Tables to which the same happens, but for when they are flushed.
    struct Pair {
        /// Never flushed.
        plain: Table,
        flushed: Table,
        models: Vec<(RowKey, Model)>,
        /// Stamps that were passed over.
        skipped: Vec<u64>,
        newest: u64,
        history: u64,
        dropped_to: u64,
    }

    impl Pair {
        fn new() -> Pair {
            let models = ["a", "b", "c", "d", "e"].map(|name| (row(name), Model::default())).into();
            let (plain, flushed) = (Table::default(), Table::default());
            Pair { plain, flushed, models, skipped: vec![], newest: 0, history: 0, dropped_to: 0 }
        }

        /// A stamp that is due, or one that comes late. Half of them leave checkpoints.
        fn stamp(&mut self, dice: &mut Dice) -> u64 {
            if dice.roll(4) == 0 && !self.skipped.is_empty() {
                return self.skipped.swap_remove(dice.roll(self.skipped.len()));
            }
            loop {
                self.newest += 1;
                match (leaves_checkpoint(Stamp(self.newest)), dice.roll(32)) {
                    (true, 8..) | (false, 0) => return self.newest,
                    (true, _) | (false, 1) => self.skipped.push(self.newest),
                    (false, _) => {}
                }
            }
        }

        fn step(&mut self, dice: &mut Dice) {
            let stamp = self.stamp(dice);
            let mut writes = Vec::new();
            for (row, model) in &mut self.models {
                if dice.roll(3) == 0
                    && let Some(write) = model.write(stamp, dice)
                {
                    model.0.insert(stamp, write.clone());
                    writes.push((&*row, write));
                }
            }
            for table in [&mut self.plain, &mut self.flushed] {
                table.commit(stamp, &writes, self.history);
            }
            if dice.roll(4) == 0 {
                self.history += dice.roll((self.newest - self.history) as usize + 1) as u64 / 3;
            }
            if dice.roll(4) == 0 {
                self.sweep(1 + dice.roll(5));
            }
            match dice.roll(8) {
                0 => self.flushed.flush(0),
                1 => self.flushed.flush(usize::MAX),
                2..4 => self.flushed.rows.trim(0),
                _ => {}
            }
        }

        fn sweep(&mut self, most: usize) {
            let tables = [&mut self.plain, &mut self.flushed];
            let next = tables.map(|table| table.drop_undo(self.dropped_to, self.history, most));
            assert_eq!(next[0], next[1]);
            self.dropped_to = next[0];
        }

        fn check_reads(&self, position: u64) {
            for (key, model) in &self.models {
                for table in [&self.plain, &self.flushed] {
                    assert_eq!(table.at(key, position), model.at(position), "{key:?} at {position}");
                }
            }
        }

        fn check_history(&self, from: u64, position: u64, limit: usize) {
            for (key, model) in &self.models {
                for table in [&self.plain, &self.flushed] {
                    assert_eq!(
                        table.history(key, from, position, limit),
                        model.history(from, position, limit),
                        "{limit} changes of {key:?} from {from} to {position}"
                    );
                }
            }
        }
    }

    #[test]
    fn reads_and_histories_are_those_of_a_list_of_all_changes() {
        let mut checkpoints = 0;
        for seed in 1..=30 {
            let (mut pair, mut dice) = (Pair::new(), Dice(seed));
            for step in 0..150 {
                pair.step(&mut dice);
                let spread = (pair.newest - pair.history) as usize + 2;
                let mut above = || pair.history + dice.roll(spread) as u64;
                let (position, from) = (above(), above() + 1);
                pair.check_reads(position);
                pair.check_history(from, position, 1 + dice.roll(9));
                if step % 50 == 49 {
                    let stamps = pair.models.iter().flat_map(|(_, model)| model.0.keys().copied());
                    let stamps: std::collections::BTreeSet<u64> = stamps.collect();
                    for stamp in stamps.range(pair.history + 1..).copied() {
                        pair.check_reads(stamp - 1);
                        pair.check_reads(stamp);
                        for limit in [1, 3, usize::MAX] {
                            pair.check_history(stamp, pair.newest, limit);
                        }
                    }
                    pair.check_reads(pair.history);
                    pair.check_history(pair.history + 1, pair.newest, usize::MAX);
                }
            }
            checkpoints += pair.flushed.keys(0x14);
            assert_eq!(pair.plain.noted(), pair.flushed.noted(), "what goes into the running hash");
            pair.history = pair.newest;
            while pair.dropped_to <= pair.history {
                pair.sweep(7);
            }
            pair.check_reads(pair.newest);
            pair.plain.flush(0);
            pair.flushed.flush(0);
            assert!(pair.plain.store.kept == pair.flushed.store.kept);
            assert_eq!(pair.flushed.keys(0x10), pair.flushed.store.kept.len(), "only rows are left");
        }
        assert!(checkpoints > 300, "{checkpoints} checkpoints are too few to show anything");
    }

    /// However often a row changes, what is far back is found in a few steps.
    #[test]
    fn an_old_state_of_a_hot_row_is_found_in_a_few_steps() {
        let (mut table, row, all) = (Table::default(), row("hot"), 20_000);
        let mut unstored = Table::default();
        for stamp in 1..=all {
            table.add(&row, stamp, 1, 0);
            unstored.add(&row, stamp, 1, 0);
            if stamp.is_multiple_of(3_000) {
                table.flush(usize::MAX);
            }
        }
        table.flush(0);
        assert!(
            (all / 100..all / 40).contains(&(table.keys(0x14) as u64)),
            "{} checkpoints",
            table.keys(0x14)
        );
        let mut read_in_all = 0;
        for position in (1..=all).step_by(37) {
            table.store.read.set(0);
            assert_eq!(table.at(&row, position).value, RowValue::Balance(position.into()));
            assert_eq!(unstored.at(&row, position).value, RowValue::Balance(position.into()));
            read_in_all += table.store.read.get();
            assert!(table.store.read.get() < 600, "{} keys are read at {position}", table.store.read.get());
            table.store.read.set(0);
            let (changes, next) = table.history(&row, position, all, 10);
            let stamps = changes.iter().map(|change| change.stamp.0);
            assert!(stamps.eq(position..=all.min(position + 9)));
            assert_eq!(next, Some(Stamp(position + 10)).filter(|next| next.0 <= all));
            assert!(table.store.read.get() < 600, "{} keys are read from {position}", table.store.read.get());
        }
        unstored.flush(0);
        assert!(unstored.store.kept == table.store.kept);
        let times = (all / 37 + 1) as usize;
        assert!(read_in_all < times * 100, "{} keys in the mean", read_in_all / times);
        table.add(&row, all + 10, 1, 0);
        table.store.read.set(0);
        table.add(&row, all + 5, 1, 0);
        assert!(table.store.read.get() < 3, "a late delta has few changes behind it");
    }

    /// A row that changes seldom needs no checkpoint.
    #[test]
    fn a_few_changes_are_undone_without_looking_for_a_checkpoint() {
        let (mut table, row) = (Table::default(), row("a"));
        for stamp in 1..=9 {
            table.add(&row, stamp, 1, 0);
        }
        table.flush(0);
        table.store.read.set(0);
        assert_eq!(table.at(&row, 4).value, RowValue::Balance(4));
        assert_eq!(table.store.read.get(), 1 + 5, "the row, and each change behind");
    }

    /// What the first delta on nothing is undone to.
    #[test]
    fn a_row_without_a_balance_is_absent_again() {
        let (mut table, fresh, deleted) = (Table::default(), row("fresh"), row("deleted"));
        table.put(&deleted, 1, RowValue::Record(Bytes::from_static(b"x")));
        table.put(&deleted, 2, RowValue::Absent);
        for (stamp, delta) in [(9, 10), (5, 1)] {
            table.commit(stamp, &[&fresh, &deleted].map(|row| (row, Write::Add(delta))), 0);
        }
        let none = |version| RowAt { version: Stamp(version), value: RowValue::Absent };
        assert_eq!((table.at(&fresh, 4), table.at(&deleted, 4)), (none(0), none(2)));
        for row in [&fresh, &deleted] {
            assert_eq!(table.at(row, 8), RowAt { version: Stamp(5), value: RowValue::Balance(1) });
        }
        assert_eq!(table.at(&deleted, 1).value, RowValue::Record(Bytes::from_static(b"x")));
        // A late delta below the mark is no change that is told, but what it brought was there.
        let mut late = Table::default();
        late.add(&fresh, 9, 10, 7);
        late.add(&fresh, 5, 1, 7);
        assert_eq!(late.at(&fresh, 7), RowAt { version: Stamp(5), value: RowValue::Balance(1) });
    }

    #[test]
    fn rows_that_are_held_or_not_stored_stay_in_memory() {
        let mut table = Table::default();
        let (idle, held, changed, waited) = (row("idle"), row("held"), row("changed"), row("waited"));
        table.rows.seat(&table.store, &idle).unwrap();
        let slot = table.rows.seat(&table.store, &held).unwrap();
        table.rows.hold(slot, TICKET, CLAIM);
        assert_eq!(table.rows.held(), 1);
        let line = table.rows.seat(&table.store, &waited).unwrap();
        table.rows.wait(line, TICKET, CLAIM);
        table.add(&changed, 1, 5, 0);
        table.rows.trim(0);
        assert!(table.rows.find(&idle).is_none(), "nobody needs it");
        assert!(table.rows.find(&held).is_some() && table.rows.find(&changed).is_some());
        table.flush(0);
        assert!(table.rows.find(&held).is_some() && table.rows.find(&changed).is_none());
        assert!(table.rows.find(&waited).is_some(), "a part that waits stands in line there");
        assert_eq!(table.rows.row(slot).key(), &held, "who is held keeps its slot");
        assert!(table.rows.leave(slot, TICKET).is_free());
        assert!(table.rows.leave(line, TICKET).is_free());
        assert_eq!(table.rows.held(), 0);
        table.rows.trim(0);
        assert_eq!(table.rows.bytes, 0);
        assert_eq!(table.at(&changed, 1).value, RowValue::Balance(5));
    }

    #[test]
    fn a_late_delta_is_stored_with_the_next_flush() {
        let mut table = Table::default();
        let row = row("late");
        table.add(&row, 5, 1, 0);
        table.add(&row, 9, 10, 0);
        table.flush(0);
        table.add(&row, 7, 100, 0);
        // The first look only takes note that it was used.
        table.rows.trim(0);
        table.rows.trim(0);
        table.add(&row, 11, 1000, 0);
        assert_eq!(table.rows.changed.len(), 1, "the flush comes by once");
        table.flush(0);
        assert_eq!(table.at(&row, 8).value, RowValue::Balance(101));
        assert_eq!(table.at(&row, 11).value, RowValue::Balance(1111));
    }

    /// However many come at once, as when a replica catches up, and however long their keys are.
    #[test]
    fn memory_is_bounded_while_many_rows_come() {
        let mut table = Table::default();
        let long = "k".repeat(200);
        let keep = 1_000 * (ROW_BYTES + 200 + 16);
        let mut number = 0;
        for _ in 0..5 {
            for _ in 0..4 * TRIM_STEPS {
                number += 1;
                table.rows.seat(&table.store, &row(&format!("{long}{number}"))).unwrap();
            }
            table.rows.trim(keep);
            assert!(table.rows.bytes <= keep, "{} bytes", table.rows.bytes);
        }
        let rows = table.rows.slots.iter().count();
        assert!((500..=1_000).contains(&rows), "{rows} rows: their keys count");
    }

    #[test]
    fn a_shard_lets_go_of_what_it_may_not_keep() {
        use crate::{batch::Placement, ids::ShardId, machine::Machine as _, shard};
        let config = shard::ShardConfig {
            shard: ShardId(1),
            placement: Placement { shards: 1 },
            sweep_interval: shard::SWEEP_INTERVAL,
        };
        let mut store = MemoryStore::default();
        let mut shard = shard::Shard::open(&config, &store).unwrap();
        shard.rows.seat(&store, &row("a")).unwrap();
        shard.flush(&mut store).unwrap();
        shard.trim(usize::MAX);
        assert!(shard.rows.find(&row("a")).is_some(), "it is read once");
        shard.trim(0);
        assert!(shard.rows.find(&row("a")).is_none(), "memory is bounded");
    }

    #[test]
    fn deltas_out_of_order_end_as_if_in_order() {
        let row = row("user:1");
        let deltas = [(2, 10), (5, -3), (9, 4), (11, -11)];
        let build = |order: [usize; 4]| {
            let mut table = Table::default();
            for place in order {
                let (stamp, delta) = deltas[place];
                table.add(&row, stamp, delta, 0);
            }
            table.flush(usize::MAX);
            table
        };
        let in_order = build([0, 1, 2, 3]);
        for order in [[1, 0, 2, 3], [3, 2, 1, 0], [0, 3, 1, 2], [2, 0, 3, 1]] {
            assert!(build(order).store.kept == in_order.store.kept, "{order:?}");
        }
        let balance_at = |stamp| in_order.at(&row, stamp).value;
        assert_eq!(balance_at(1), RowValue::Absent);
        assert_eq!(balance_at(5), RowValue::Balance(7));
        assert_eq!(balance_at(8), RowValue::Balance(7));
        assert_eq!(balance_at(99), RowValue::Balance(0));
        let (changes, next) = in_order.history(&row, 3, 10, 1);
        assert_eq!((changes[0].stamp, changes[0].delta, next), (Stamp(5), Some(-3), Some(Stamp(9))));
    }

    /// Nothing is applied meanwhile, and entries hold what other rows were.
    #[test]
    fn a_page_of_a_history_reads_no_more_than_an_answer_may_hold() {
        const CHANGES: u64 = 1000;
        let mut table = Table::default();
        let (row, large) = (RowKey::new("a", "USD").unwrap(), RowKey::new("a", "note").unwrap());
        for stamp in 1..=CHANGES {
            let value = RowValue::Record(vec![stamp as u8; 64 << 10].into());
            table.commit(stamp, &[(&row, Write::Add(1)), (&large, Write::Replace(value))], 0);
        }
        table.flush(0);
        let (mut found, mut next, mut pages) = (Vec::new(), Some(1), 0);
        while let Some(from) = next {
            let before = table.store.read.get();
            let (page, after) = table.history(&row, from, CHANGES, 10_000);
            let read = table.store.read.get() - before;
            assert!(read < CHANGES as usize / 2, "{read} keys for one page");
            found.extend(page.into_iter().map(|change| change.stamp.0));
            next = after.map(|stamp| stamp.0);
            pages += 1;
        }
        assert!(found.iter().copied().eq(1..=CHANGES), "it is whole");
        assert!(pages > 2, "{pages} pages");
    }

    #[test]
    fn a_history_is_whole_however_it_is_cut() {
        let mut table = Table::default();
        let (row, other) = (RowKey::new("a", "note").unwrap(), RowKey::new("a", "note2").unwrap());
        // Some are so large that few fit into one answer.
        for stamp in 1..=24 {
            let bytes = if stamp % 3 == 0 { READ_BYTES_MAX / 2 - 1 } else { 10 };
            let write = Write::Replace(RowValue::Record(vec![stamp as u8; bytes].into()));
            table.commit(stamp, &[(&row, write.clone()), (&other, write)], 0);
            if stamp == 13 {
                table.flush(0);
            }
        }
        for (from, position, limit) in
            [(1, 24, 1), (1, 24, 7), (1, 24, 100), (5, 17, 3), (6, 20, 100), (24, 24, 1)]
        {
            let (mut found, mut next) = (Vec::new(), Some(from));
            while let Some(from) = next {
                let (page, after) = table.history(&row, from, position, limit);
                assert!((1..=limit).contains(&page.len()), "{} changes, {limit} at most", page.len());
                found.extend(page.into_iter().map(|change| change.stamp.0));
                assert!(found.len() <= 24, "it goes in a circle: {found:?}");
                next = after.map(|stamp| stamp.0);
            }
            assert_eq!(found, (from..=position).collect::<Vec<_>>(), "{limit} at a time");
        }
    }

    #[test]
    fn what_a_read_at_the_mark_needs_is_kept_and_nothing_before() {
        const LAST: u64 = 300;
        let mut before = Table::default();
        let rows = ["a", "b", "c"].map(row);
        let checkpoints = (1..=LAST).filter(|stamp| leaves_checkpoint(Stamp(*stamp)));
        let checkpoints: Vec<u64> = checkpoints.collect();
        let history = checkpoints[0];
        assert!(checkpoints.len() > 1, "{checkpoints:?}");
        for stamp in 1..=LAST {
            before.commit(stamp, &rows.each_ref().map(|row| (row, Write::Add(1))), 0);
        }
        for is_flushed in [false, true] {
            if is_flushed {
                before.flush(0);
            }
            for most in [1, 2, 3, 7, 1000] {
                let (rows_now, store) = (before.rows.clone(), before.store.clone());
                let (mut table, mut from, mut rounds) = (Table { rows: rows_now, store }, 0, 0);
                while from <= history {
                    from = table.drop_undo(from, history, most);
                    rounds += 1;
                    assert!(rounds <= LAST, "the sweep never ends");
                }
                assert_eq!(from, history + 1);
                table.flush(0);
                assert_eq!(table.keys(0x11) as u64, LAST - history, "{most} at a time");
                assert_eq!(table.keys(0x14), rows.len() * (checkpoints.len() - 1), "{most} at a time");
                for row in &rows {
                    for position in history..=LAST {
                        assert_eq!(table.at(row, position), before.at(row, position));
                    }
                }
            }
        }
    }

    /// Where a sweep goes on, there is nothing below that a look would have to pass.
    #[test]
    fn a_sweep_looks_at_no_more_than_it_should() {
        let (mut table, row) = (Table::default(), row("a"));
        for stamp in 1..=100 {
            table.add(&row, stamp, 1, 0);
        }
        table.flush(0);
        let mut from = 0;
        for piece in 1..=5 {
            table.store.read.set(0);
            from = table.drop_undo(from, 50, 10);
            assert!(table.store.read.get() <= 11, "{} keys are read", table.store.read.get());
            assert_eq!(from, 10 * piece + 1);
        }
        assert_eq!(table.drop_undo(from, 50, 10), 51, "nothing above the mark is looked at");
    }

    /// The change behind a late delta may be above the mark while the delta is not: nothing is told of it, and its sum is there.
    #[test]
    fn a_delta_that_comes_late_below_the_mark_shifts_what_is_kept() {
        let row = row("a");
        for history in [0, 4, 7, 8, 20] {
            let (mut table, mut in_order) = (Table::default(), Table::default());
            for stamp in [2, 4, 6, 9, 12] {
                table.add(&row, stamp, 10, 0);
            }
            table.flush(0);
            table.drop_undo(0, history, 100);
            table.add(&row, 7, 1, history);
            for stamp in [2, 4, 6, 7, 9, 12] {
                in_order.add(&row, stamp, if stamp == 7 { 1 } else { 10 }, 0);
            }
            for position in history..=20 {
                let found = (table.at(&row, position), in_order.at(&row, position));
                assert_eq!(found.0, found.1, "at {position}, with the mark at {history}");
            }
        }
    }
}
