//! Where rows stand in memory, and how they are found.
//!
//! A shard may keep millions of rows, and each look for one waits for memory that is in no cache: so the index holds no keys, only a
//! piece of their hashes and the slots, and a row is read only if that piece is equal. Rows stay where they are while more come: they
//! stand in blocks, and what grows all at once is the index alone.
#![expect(clippy::disallowed_types, reason = "nobody sees the order of the index")]

use std::hash::BuildHasher as _;

use foldhash::quality::RandomState;
use hashbrown::HashTable;

use super::rows::Row;
use crate::batch::RowKey;

/// How many rows stand in one block.
const BLOCK_ROWS: usize = 4096;

/// The place of a row in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u32);

impl Slot {
    fn place(self) -> (usize, usize) {
        (self.0 as usize / BLOCK_ROWS, self.0 as usize % BLOCK_ROWS)
    }
}

/// A piece of the hash of a row's key, and where the row stands.
#[derive(Clone, Copy, Debug)]
struct Entry {
    piece: u32,
    slot: Slot,
}

/// What the index takes for a hash: made of the piece alone, so that it can grow without looking at any row.
fn spread(piece: u32) -> u64 {
    u64::from(piece) << 32 | u64::from(piece)
}

/// Rows in memory, each found by its key or in its slot.
///
/// Hashes have a seed of the process's own, so that callers can't choose keys that collide without having seen it.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    hasher: RandomState,
    index: HashTable<Entry>,
    /// All but the last one have [`BLOCK_ROWS`].
    blocks: Vec<Vec<Option<Row>>>,
    free: Vec<Slot>,
}

impl Slots {
    fn piece(&self, key: &RowKey) -> u32 {
        self.hasher.hash_one(key) as u32
    }

    /// The slot of a row.
    pub fn find(&self, key: &RowKey) -> Option<Slot> {
        let piece = self.piece(key);
        let is_it =
            |entry: &Entry| entry.piece == piece && self.get(entry.slot).is_some_and(|row| row.key() == key);
        self.index.find(spread(piece), is_it).map(|entry| entry.slot)
    }

    /// The row in a slot.
    pub fn get(&self, slot: Slot) -> Option<&Row> {
        let (block, place) = slot.place();
        self.blocks.get(block)?.get(place)?.as_ref()
    }

    /// The same, to change all but its key.
    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut Row> {
        let (block, place) = slot.place();
        self.blocks.get_mut(block)?.get_mut(place)?.as_mut()
    }

    /// Adds a row that isn't there.
    pub fn insert(&mut self, row: Row) -> Slot {
        debug_assert!(self.find(row.key()).is_none(), "{:?} stands in a slot already", row.key());
        let piece = self.piece(row.key());
        let slot = self.free.pop().unwrap_or_else(|| self.add_slot());
        let (block, place) = slot.place();
        self.blocks[block][place] = Some(row);
        self.index.insert_unique(spread(piece), Entry { piece, slot }, |entry| spread(entry.piece));
        slot
    }

    /// Takes the row out of a slot.
    pub fn remove(&mut self, slot: Slot) {
        let (block, place) = slot.place();
        let Some(row) = self.blocks[block][place].take() else { return };
        let piece = self.piece(row.key());
        let entry = self.index.find_entry(spread(piece), |entry| entry.slot == slot);
        entry.expect("every row is in the index").remove();
        self.free.push(slot);
    }

    /// The slot behind another one, in a circle; it may be empty.
    pub fn after(&self, slot: Slot) -> Slot {
        let next = Slot(slot.0 + 1);
        let (block, place) = next.place();
        if self.blocks.get(block).is_some_and(|block| place < block.len()) { next } else { Slot(0) }
    }

    /// All rows, in an order that differs from replica to replica: nothing that is told may follow from it.
    pub fn iter(&self) -> impl Iterator<Item = &Row> {
        self.blocks.iter().flatten().flatten()
    }

    fn add_slot(&mut self) -> Slot {
        if self.blocks.last().is_none_or(|block| block.len() == BLOCK_ROWS) {
            self.blocks.push(Vec::with_capacity(BLOCK_ROWS));
        }
        let before = (self.blocks.len() - 1) * BLOCK_ROWS;
        let block = self.blocks.last_mut().expect("there is one");
        block.push(None);
        Slot(u32::try_from(before + block.len() - 1).expect("rows in memory are bounded"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::messages::RowAt;

    fn key(number: usize) -> RowKey {
        RowKey::new(&format!("user:{number}"), "USD").unwrap()
    }

    /// Against an ordered map, over several blocks, with rows that go and come.
    #[test]
    fn rows_are_found_where_they_stand() {
        let (mut slots, mut model) = (Slots::default(), BTreeMap::new());
        let mut seed = 7_u64;
        for _ in 0..60_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let key = key((seed >> 33) as usize % 15_000);
            match slots.find(&key) {
                Some(slot) => {
                    assert_eq!(model.get(&key), Some(&slot));
                    if seed.is_multiple_of(5) {
                        slots.remove(slot);
                        model.remove(&key);
                        assert!(slots.get(slot).is_none());
                    }
                }
                None => {
                    assert!(!model.contains_key(&key));
                    let slot = slots.insert(Row::new(key.clone(), RowAt::default()));
                    model.insert(key, slot);
                }
            }
        }
        assert!(model.len() > 2 * BLOCK_ROWS, "{} rows", model.len());
        assert_eq!(slots.iter().count(), model.len());
        for (key, slot) in &model {
            assert_eq!(slots.find(key), Some(*slot));
            assert_eq!(slots.get(*slot).map(Row::key), Some(key));
        }
        let all = slots.blocks.iter().map(Vec::len).sum::<usize>();
        let mut hand = Slot(0);
        for _ in 1..all {
            let next = slots.after(hand);
            assert!(next > hand);
            hand = next;
        }
        assert_eq!(slots.after(hand), Slot(0), "the circle is closed");
        assert!(all < 15_000 + 1, "{all} slots: those of rows that went are used again");
    }

    /// What is looked for is told apart from a row whose hash begins alike.
    #[test]
    fn rows_with_equal_hashes_are_told_apart() {
        let mut slots = Slots::default();
        let (here, other) = (slots.insert(Row::new(key(1), RowAt::default())), key(2));
        let piece = slots.piece(&other);
        slots.index.insert_unique(spread(piece), Entry { piece, slot: here }, |entry| spread(entry.piece));
        assert_eq!(slots.find(&other), None);
        assert_eq!(slots.find(&key(1)), Some(here));
    }
}
