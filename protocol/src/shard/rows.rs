//! Rows in memory: those that somebody holds or waits for, those whose changes are not stored yet, and those that were used lately.
//!
//! A row is looked up by its key once for each part that uses it; from then on the part knows its *slot*. What a commit changes is
//! kept here, and brought to the store with the next flush: the settled value once, however often it has changed, and every version.
//!
//! Finding a row is waiting for memory, so a row that nobody uses is small: its key, its value, and no more. What it needs while it is
//! used is beside it.
//!
//! Invariants:
//! - A row that is held, waited for or listed to be stored keeps its slot. Others may go at any flush, and are read again.
//! - Versions that are not stored are later than all that are: one that comes before all of them is inserted among the stored ones,
//!   once the others are there too ([`Rows::store`]).
//! - Nothing here depends on when a flush happens, and nothing that is told does.

use std::hash::{Hash, Hasher};

use foldhash::quality::FixedState;
use smallvec::SmallVec;

use super::{
    locks::{Claim, RowLock, Ticket},
    slots::{Slot, Slots},
    versions::{self, Version, plus, row_key, version_key},
};
use crate::{
    batch::RowKey,
    ids::{BatchId, Stamp},
    machine::encode_into,
    messages::{READ_BYTES_MAX, RowAt, RowChange, RowValue},
    store::{Store, StoreError},
};

/// What a row takes in memory beside its value, roughly, while nobody uses it: itself, and its place in the index.
const ROW_BYTES: usize = 160;
/// How many slots are looked at in one go for rows that may go, at least, and for each row that has come since the last time: one that was
/// used gets a second chance.
const TRIM_STEPS: usize = 8192;
const TRIM_STEPS_EACH: usize = 4;

/// A version that is not stored yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Unstored {
    stamp: Stamp,
    /// As it will be stored.
    bytes: SmallVec<[u8; 48]>,
}

/// What a row has while it is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Busy {
    lock: RowLock,
    /// In the order of stamps.
    unstored: SmallVec<[Unstored; 1]>,
}

/// What a row has that nobody uses.
static IDLE: Busy = Busy { lock: RowLock::FREE, unstored: SmallVec::new_const() };

/// A row in memory.
#[derive(Clone, Debug)]
pub struct Row {
    key: RowKey,
    settled: RowAt,
    /// None: as [`IDLE`].
    busy: Option<Box<Busy>>,
    /// Whether it is among those that the next flush looks at. Its versions may have been stored since, for a late delta.
    listed: bool,
    /// Whether it was used since the hand came by.
    used: bool,
}

impl Row {
    /// One that is used just now, and that nobody holds.
    pub fn new(key: RowKey, settled: RowAt) -> Row {
        Row { key, settled, busy: None, listed: false, used: true }
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
        &self.busy().lock
    }

    fn busy(&self) -> &Busy {
        self.busy.as_deref().unwrap_or(&IDLE)
    }

    fn busy_mut(&mut self) -> &mut Busy {
        self.busy.get_or_insert_default()
    }

    /// In the order of stamps.
    fn unstored(&self) -> &[Unstored] {
        &self.busy().unstored
    }

    /// Something has ended that it was used for.
    fn rest(&mut self) {
        if *self.busy() == IDLE {
            self.busy = None;
        }
    }

    /// Inserts a delta among the versions that are not stored. False: it comes before all of them.
    ///
    /// Like [`versions::insert`] it makes no version that no read needs: where the next piece of a sweep ends depends on their number.
    fn insert(&mut self, id: BatchId, stamp: Stamp, delta: i128, history: Stamp) -> Result<bool, StoreError> {
        let place = self.unstored().partition_point(|version| version.stamp < stamp);
        let Some(before) = place.checked_sub(1) else { return Ok(false) };
        let unstored = &mut self.busy.get_or_insert_default().unstored;
        let needed = unstored.get(place).is_none_or(|later| later.stamp > history);
        let result = plus(&Version::decode(&unstored[before].bytes)?.result, delta);
        for later in &mut unstored[place..] {
            assert!(later.stamp != stamp, "two batches have stamp {stamp} on row {:?}", self.key);
            let mut version = Version::decode(&later.bytes)?;
            version.result = plus(&version.result, delta);
            later.bytes = SmallVec::from_vec(encode_into(Vec::new(), &version));
        }
        if needed {
            let version = Version { id, delta: Some(delta), result };
            let bytes = SmallVec::from_vec(encode_into(Vec::new(), &version));
            unstored.insert(place, Unstored { stamp, bytes });
        }
        Ok(true)
    }

    /// Brings the settled value to the store, if it has changed.
    fn store_settled(&self, store: &mut dyn Store, scratch: &mut Vec<u8>) -> Result<(), StoreError> {
        if self.unstored().is_empty() {
            return Ok(());
        }
        scratch.clear();
        *scratch = encode_into(std::mem::take(scratch), &self.settled);
        store.bring(&row_key(&self.key), Some(scratch))
    }

    /// Brings the versions to the store.
    fn store_versions(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        let Some(busy) = &mut self.busy else { return Ok(()) };
        std::mem::take(&mut busy.unstored).into_iter().try_for_each(|Unstored { stamp, bytes }| {
            store.bring(&version_key(&self.key, stamp), Some(&bytes))
        })?;
        self.rest();
        Ok(())
    }

    /// Whether nobody needs it, and the store has it as it is.
    fn is_idle(&self) -> bool {
        self.lock().is_free() && self.unstored().is_empty()
    }

    fn bytes(&self) -> usize {
        ROW_BYTES + self.key.heap_bytes() + self.settled.value.bytes()
    }
}

/// The rows of a shard that are in memory.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    slots: Slots,
    /// Rows with versions that are not stored, each once.
    changed: Vec<Slot>,
    /// Where looking for rows that may go goes on.
    hand: Slot,
    /// How many rows have come since it last moved.
    come: usize,
    bytes: usize,
    held: usize,
    /// Where versions are encoded.
    scratch: Vec<u8>,
}

impl Rows {
    /// The slot of a row, which is read if it isn't in memory.
    pub fn seat(&mut self, store: &dyn Store, key: &RowKey) -> Result<Slot, StoreError> {
        if let Some(slot) = self.slots.find(key) {
            self.row_mut(slot).used = true;
            return Ok(slot);
        }
        let settled = versions::settled(store, key)?;
        let row = Row::new(key.clone(), settled);
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
        let lock = &mut self.row_mut(slot).busy_mut().lock;
        let first = !lock.is_held();
        lock.hold(ticket, claim);
        self.held += usize::from(first);
    }

    /// Puts a part in the line of a row.
    pub fn wait(&mut self, slot: Slot, ticket: Ticket, claim: Claim) {
        self.row_mut(slot).busy_mut().lock.wait(ticket, claim);
    }

    /// Takes a part out of the line of a row, which is given as it is then.
    pub fn leave(&mut self, slot: Slot, ticket: Ticket) -> &RowLock {
        let row = self.row_mut(slot);
        let lock = &mut row.busy_mut().lock;
        let was_held = lock.is_held();
        lock.remove(ticket);
        let last = was_held && !lock.is_held();
        row.rest();
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

    /// What a row held at a position, of what has been applied.
    pub fn at(&self, store: &dyn Store, key: &RowKey, position: Stamp) -> Result<RowAt, StoreError> {
        let Some(row) = self.find(key) else {
            let now = versions::settled(store, key)?;
            return if now.version <= position { Ok(now) } else { versions::at(store, key, position) };
        };
        if row.settled.version <= position {
            return Ok(row.settled.clone());
        }
        match row.unstored().iter().rev().find(|version| version.stamp <= position) {
            Some(Unstored { stamp, bytes }) => {
                Ok(RowAt { version: *stamp, value: Version::decode(bytes)?.result })
            }
            None => versions::at(store, key, position),
        }
    }

    /// The changes of a row with stamps in `from..=position`, at most `limit` and about [`READ_BYTES_MAX`], and where the list goes on.
    pub fn history(
        &self,
        store: &dyn Store,
        key: &RowKey,
        from: Stamp,
        position: Stamp,
        limit: usize,
    ) -> Result<(Vec<RowChange>, Option<Stamp>), StoreError> {
        let mut changes = Vec::new();
        let (mut bytes, mut next, mut failed) = (0, None, None);
        let mut take = |stamp: Stamp, encoded: &[u8]| {
            if changes.len() == limit {
                next = Some(stamp);
                return false;
            }
            match Version::decode(encoded) {
                Err(error) => failed = Some(error),
                Ok(version) => {
                    bytes += version.result.bytes();
                    if bytes > READ_BYTES_MAX && !changes.is_empty() {
                        next = Some(stamp);
                        return false;
                    }
                    changes.push(version.at(stamp));
                }
            }
            failed.is_none()
        };
        let mut goes_on = true;
        versions::visit(store, key, from, position, &mut |stamp, encoded| {
            goes_on = take(stamp, encoded);
            goes_on
        })?;
        let unstored = self.find(key).map_or(&[][..], Row::unstored);
        for Unstored { stamp, bytes } in unstored.iter().filter(|version| version.stamp >= from) {
            if !goes_on || *stamp > position {
                break;
            }
            goes_on = take(*stamp, bytes);
        }
        failed.map_or(Ok((changes, next)), Err)
    }

    /// Adds the sum of a batch's deltas to a balance, at the batch's stamp.
    pub fn add(
        &mut self,
        store: &mut dyn Store,
        slot: Slot,
        id: BatchId,
        stamp: Stamp,
        delta: i128,
        history: Stamp,
    ) -> Result<(), StoreError> {
        let row = self.row(slot);
        let sum = plus(&row.settled.value, delta);
        if stamp > row.settled.version {
            self.write(store, slot, stamp, Version { id, delta: Some(delta), result: sum });
            return Ok(());
        }
        // Out of order: this batch comes before some that are already here.
        store.note(&[row.key.as_bytes(), &stamp.0.to_be_bytes(), &id.0, &delta.to_be_bytes()]);
        if !self.row_mut(slot).insert(id, stamp, delta, history)? {
            self.store(store, slot)?;
            let key = &self.row(slot).key;
            versions::insert(store, key, id, stamp, delta, history)?;
        }
        self.row_mut(slot).settled.value = sum;
        Ok(())
    }

    /// Writes a record, or its absence, at the batch's stamp.
    pub fn replace(&mut self, store: &mut dyn Store, slot: Slot, id: BatchId, stamp: Stamp, value: RowValue) {
        let Row { key, settled, .. } = self.row(slot);
        assert!(
            stamp > settled.version,
            "a write of row {key:?} at stamp {stamp} comes after one at {}: its lock did not hold",
            settled.version
        );
        self.write(store, slot, stamp, Version { id, delta: None, result: value });
    }

    fn write(&mut self, store: &mut dyn Store, slot: Slot, stamp: Stamp, version: Version) {
        self.scratch.clear();
        self.scratch = encode_into(std::mem::take(&mut self.scratch), &version);
        let row = self.slots.get_mut(slot).expect("a row that is used keeps its slot");
        store.note(&[row.key.as_bytes(), &stamp.0.to_be_bytes(), &self.scratch]);
        if !std::mem::replace(&mut row.listed, true) {
            self.changed.push(slot);
        }
        row.busy_mut().unstored.push(Unstored { stamp, bytes: SmallVec::from_slice(&self.scratch) });
        self.bytes -= row.bytes();
        row.settled = RowAt { version: stamp, value: version.result };
        self.bytes += row.bytes();
    }

    /// Brings all that is not stored to the store.
    pub fn store_all(&mut self, store: &mut dyn Store) -> Result<(), StoreError> {
        let mut changed = std::mem::take(&mut self.changed);
        // In order: that is how databases keep them.
        changed.sort_unstable_by_key(|slot| &self.row(*slot).key);
        let mut scratch = std::mem::take(&mut self.scratch);
        let stored = changed.into_iter().try_for_each(|slot| {
            let row = self.row_mut(slot);
            row.listed = false;
            row.store_settled(store, &mut scratch)?;
            row.store_versions(store)
        });
        self.scratch = scratch;
        stored
    }

    /// Brings what is not stored of a row to the store.
    fn store(&mut self, store: &mut dyn Store, slot: Slot) -> Result<(), StoreError> {
        self.row(slot).store_settled(store, &mut Vec::new())?;
        self.row_mut(slot).store_versions(store)
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
            if std::mem::take(&mut row.used) || row.listed || !row.is_idle() {
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

/// Equal if the same rows are held, waited for and changed in the same way; which others are in memory makes no difference.
impl PartialEq for Rows {
    fn eq(&self, other: &Rows) -> bool {
        let same = |row: &Row| {
            other
                .find(&row.key)
                .is_some_and(|other| (other.busy(), &other.settled) == (row.busy(), &row.settled))
        };
        self.busy().count() == other.busy().count() && self.busy().all(same)
    }
}

impl Eq for Rows {}

impl Hash for Rows {
    fn hash<H: Hasher>(&self, state: &mut H) {
        use std::hash::BuildHasher as _;
        let hasher = FixedState::default();
        let each = self.busy().map(|row| hasher.hash_one((&row.key, row.busy(), &row.settled)));
        each.fold(0_u64, u64::wrapping_add).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        ids::{Epoch, GroupId, Millis, Number},
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
        assert!(table.rows.row(slot).busy.is_some(), "it is held");
        table.add(&key, 2, 5, 0);
        table.rows.leave(slot, TICKET);
        assert!(table.rows.row(slot).busy.is_some(), "a version of it is not stored");
        table.flush(usize::MAX);
        assert!(table.rows.row(slot).busy.is_none());
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
    }

    impl Store for Noting {
        fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
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
            self.kept.scan(from, to, visit)
        }

        fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError> {
            self.kept.last(from, to)
        }
    }

    impl Table {
        fn add(&mut self, key: &RowKey, stamp: u64, delta: i128, history: u64) {
            let slot = self.rows.seat(&self.store, key).unwrap();
            let (stamp, history) = (Stamp(stamp), Stamp(history));
            self.rows.add(&mut self.store, slot, id(stamp.0), stamp, delta, history).unwrap();
        }

        fn put(&mut self, key: &RowKey, stamp: u64, value: RowValue) {
            let slot = self.rows.seat(&self.store, key).unwrap();
            self.rows.replace(&mut self.store, slot, id(stamp), Stamp(stamp), value);
        }

        fn flush(&mut self, keep_bytes: usize) {
            self.rows.store_all(&mut self.store).unwrap();
            assert!(self.rows.slots.iter().all(|row| row.unstored().is_empty()), "a flush stores all");
            self.rows.trim(keep_bytes);
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

        fn drop_versions(&mut self, history: u64) {
            self.flush(0);
            versions::drop_versions(&mut self.store, Stamp(history), versions::FIRST_VERSION, 100).unwrap();
        }
    }

    /// What the rows say, whether they are in memory, stored, or a part of each.
    #[test]
    fn flushes_make_no_difference() {
        let keys = [row("a"), row("b"), row("c")];
        let (mut plain, mut seed) = (Table::default(), 3_u64);
        let mut dice = |sides: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % sides
        };
        let mut flushed = Table::default();
        // Some stamps come a little late, and some very.
        let mut stamps: Vec<u64> = (1..=300).collect();
        for place in 1..stamps.len() {
            if dice(4) == 0 {
                let before = place.saturating_sub(1 + dice(9) as usize);
                stamps.swap(before, place);
            }
        }
        let mut history = 0;
        for (count, stamp) in stamps.iter().enumerate() {
            let (key, delta) = (&keys[dice(3) as usize], dice(100) as i128 - 50);
            // Nothing is dropped here, but below the mark nothing new is kept that no read needs.
            history = history.max(dice(count as u64 + 8).saturating_sub(4));
            plain.add(key, *stamp, delta, history);
            flushed.add(key, *stamp, delta, history);
            match dice(12) {
                0 => flushed.flush(0),
                1 => flushed.flush(usize::MAX),
                2..5 => flushed.rows.trim(0),
                _ => {}
            }
            let (position, from) = (dice(count as u64 + 3), dice(count as u64 + 3));
            for key in &keys {
                assert_eq!(plain.at(key, position), flushed.at(key, position), "at {position} after {count}");
                let limit = 1 + dice(20) as usize;
                assert_eq!(
                    plain.history(key, from, position, limit),
                    flushed.history(key, from, position, limit),
                    "{limit} changes of {from} to {position} after {count}"
                );
            }
        }
        assert_eq!(plain.noted(), flushed.noted(), "what goes into the running hash");
        plain.flush(0);
        flushed.flush(0);
        assert!(plain.store.kept == flushed.store.kept);
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
    fn a_row_that_was_stored_for_a_late_delta_stays_until_the_next_flush() {
        let mut table = Table::default();
        let row = row("late");
        table.add(&row, 5, 1, 0);
        table.flush(usize::MAX);
        table.add(&row, 9, 10, 0);
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

    #[test]
    fn a_history_is_whole_however_it_is_cut() {
        let mut table = Table::default();
        let (row, other) = (RowKey::new("a", "note").unwrap(), RowKey::new("a", "note2").unwrap());
        // Some are so large that few fit into one answer.
        for stamp in 1..=24 {
            let bytes = if stamp % 3 == 0 { READ_BYTES_MAX / 2 - 1 } else { 10 };
            let value = RowValue::Record(vec![stamp as u8; bytes].into());
            table.put(&row, stamp, value.clone());
            table.put(&other, stamp, value);
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
        let mut before = Table::default();
        let rows = ["a", "b", "c"].map(row);
        let mut stamp = 0;
        for _ in 0..10 {
            for row in &rows {
                stamp += 1;
                before.add(row, stamp, 1, 0);
            }
        }
        before.flush(0);
        let history = Stamp(15);
        for most in [1, 2, 3, 7, 100] {
            let mut table = Table { store: before.store.clone(), ..Table::default() };
            let mut from = Some(versions::FIRST_VERSION.to_vec());
            let mut rounds = 0;
            while let Some(next) = from {
                from = versions::drop_versions(&mut table.store, history, &next, most).unwrap();
                rounds += 1;
                assert!(rounds <= 30, "the sweep never ends");
            }
            // Of the 30 versions 15 lie above the mark, and one of each row below is needed.
            assert_eq!(table.store.kept.len(), rows.len() + 15 + rows.len(), "{most} at a time");
            for row in &rows {
                for position in 15..=30 {
                    assert_eq!(table.at(row, position), before.at(row, position));
                }
            }
        }
    }

    #[test]
    fn a_delta_that_comes_late_below_the_mark_shifts_what_is_kept() {
        let row = row("a");
        for history in [0, 4, 7, 8, 20] {
            let (mut table, mut in_order) = (Table::default(), Table::default());
            for stamp in [2, 4, 6, 9, 12] {
                table.add(&row, stamp, 10, 0);
            }
            table.drop_versions(history);
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
