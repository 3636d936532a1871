//! Rows and their versions in the store.
//!
//! A row's *settled* value holds exactly the committed batches that were applied here. Every change is kept as a version under
//! its stamp. After a failover stamps may arrive out of order; only deltas can (writes of records are exclusive), and then the
//! later versions are shifted, so the list is always what it would be had they come in order.
//!
//! Of the versions at or below the history mark only the newest one of each row is needed.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    batch::RowKey,
    ids::{BatchId, Stamp},
    machine::{decode, encode},
    messages::{READ_BYTES_MAX, RowAt, RowChange, RowValue},
    store::{Store, StoreError},
};

const ROW_TABLE: u8 = 0x10;
const VERSION_TABLE: u8 = 0x11;

/// The lower bound of the keys of all versions.
pub const FIRST_VERSION: &[u8] = &[VERSION_TABLE];

/// A version as it is stored: `(row, stamp)` is its key.
#[derive(Serialize, Deserialize)]
struct Version {
    id: BatchId,
    delta: Option<i128>,
    result: RowValue,
}

fn row_key(row: &RowKey) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + row.as_bytes().len());
    key.push(ROW_TABLE);
    key.extend_from_slice(row.as_bytes());
    key
}

/// The row, a NUL (which no name contains) and the stamp, so that versions sort by row, then by stamp.
fn version_key(row: &RowKey, stamp: Stamp) -> Vec<u8> {
    let mut key = Vec::with_capacity(10 + row.as_bytes().len());
    key.push(VERSION_TABLE);
    key.extend_from_slice(row.as_bytes());
    key.push(0);
    key.extend_from_slice(&stamp.0.to_be_bytes());
    key
}

/// The end of the versions of a row: greater than the key of any of them.
fn versions_end(row: &RowKey) -> Vec<u8> {
    let mut key = version_key(row, Stamp(0));
    key.truncate(key.len() - 9);
    key.push(1);
    key
}

fn stamp_of(key: &[u8]) -> Stamp {
    let tail = key[key.len() - 8..].try_into().expect("a version's key ends with its stamp");
    Stamp(u64::from_be_bytes(tail))
}

/// The settled value of a row.
pub fn settled(store: &dyn Store, row: &RowKey) -> Result<RowAt, StoreError> {
    let mut found = Ok(RowAt::default());
    store.look(&row_key(row), &mut |bytes| found = decode("row", bytes))?;
    found
}

/// What a row held at a position, of what has been applied.
pub fn at(store: &dyn Store, row: &RowKey, position: Stamp) -> Result<RowAt, StoreError> {
    let now = settled(store, row)?;
    if now.version <= position {
        return Ok(now);
    }
    let before = store.last(&version_key(row, Stamp(0)), &version_key(row, Stamp(position.0 + 1)))?;
    match before {
        None => Ok(RowAt::default()),
        Some((key, bytes)) => {
            let version: Version = decode("version", &bytes)?;
            Ok(RowAt { version: stamp_of(&key), value: version.result })
        }
    }
}

/// The changes of a row with stamps in `from..=position`, at most `limit` and about [`READ_BYTES_MAX`], and where the list goes on.
pub fn history(
    store: &dyn Store,
    row: &RowKey,
    from: Stamp,
    position: Stamp,
    limit: usize,
) -> Result<(Vec<RowChange>, Option<Stamp>), StoreError> {
    let mut changes = Vec::new();
    let mut next = None;
    let mut failed = None;
    let mut bytes = 0;
    let end = version_key(row, Stamp(position.0.saturating_add(1)));
    store.scan(&version_key(row, from), &end, &mut |key, value| {
        if changes.len() == limit {
            next = Some(stamp_of(key));
            return false;
        }
        match decode::<Version>("version", value) {
            Err(error) => failed = Some(error),
            Ok(Version { id, delta, result }) => {
                bytes += result.bytes();
                if bytes > READ_BYTES_MAX && !changes.is_empty() {
                    next = Some(stamp_of(key));
                    return false;
                }
                changes.push(RowChange { id, stamp: stamp_of(key), delta, result });
            }
        }
        failed.is_none()
    })?;
    failed.map_or(Ok((changes, next)), Err)
}

/// Looks at `most` versions from a key on, and drops those that are followed by another one at or below the history mark. Gives the
/// key where to go on, or none at the end.
pub fn drop_versions(
    store: &mut dyn Store,
    history: Stamp,
    from: &[u8],
    most: usize,
) -> Result<Option<Vec<u8>>, StoreError> {
    let mut dropped = Vec::new();
    let mut before: Vec<u8> = Vec::new();
    let mut looked = 0;
    let mut more = false;
    store.scan(from, &[VERSION_TABLE + 1], &mut |key, _| {
        let row = key.len() - 8;
        if before.len() == key.len() && before[..row] == key[..row] && stamp_of(key) <= history {
            dropped.push(std::mem::take(&mut before));
        }
        before.clear();
        before.extend_from_slice(key);
        looked += 1;
        more = looked > most;
        !more
    })?;
    dropped.iter().try_for_each(|key| store.delete(key))?;
    // Whether the last one goes depends on the one behind it.
    Ok(more.then_some(before))
}

/// Adds the sum of a batch's deltas to a balance, at the batch's stamp.
pub fn add(
    store: &mut dyn Store,
    row: &RowKey,
    id: BatchId,
    stamp: Stamp,
    delta: i128,
    history: Stamp,
) -> Result<(), StoreError> {
    let now = settled(store, row)?;
    if stamp > now.version {
        let result = plus(&now.value, delta);
        return write(store, row, id, stamp, Some(delta), result);
    }
    // Out of order: this batch comes before some that are already here.
    let result = plus(&at(store, row, stamp)?.value, delta);
    let mut later: Vec<(Vec<u8>, Bytes)> = Vec::new();
    store.scan(&version_key(row, stamp), &versions_end(row), &mut |key, bytes| {
        later.push((key.to_vec(), Bytes::copy_from_slice(bytes)));
        true
    })?;
    let needed = later.first().is_none_or(|(key, _)| stamp_of(key) > history);
    for (key, bytes) in later {
        let mut version: Version = decode("version", &bytes)?;
        assert!(stamp_of(&key) != stamp, "two batches have stamp {stamp} on row {row:?}");
        version.result = plus(&version.result, delta);
        store.put(&key, &encode(&version))?;
    }
    // What it would be shown from may be gone already if no read needs it.
    if needed {
        store.put(&version_key(row, stamp), &encode(&Version { id, delta: Some(delta), result }))?;
    }
    let shifted = RowAt { version: now.version, value: plus(&now.value, delta) };
    store.put(&row_key(row), &encode(&shifted))
}

/// Writes a record, or its absence, at the batch's stamp.
pub fn replace(
    store: &mut dyn Store,
    row: &RowKey,
    id: BatchId,
    stamp: Stamp,
    value: RowValue,
) -> Result<(), StoreError> {
    let now = settled(store, row)?;
    assert!(
        stamp > now.version,
        "a write of row {row:?} at stamp {stamp} comes after one at {}: its lock did not hold",
        now.version
    );
    write(store, row, id, stamp, None, value)
}

fn write(
    store: &mut dyn Store,
    row: &RowKey,
    id: BatchId,
    stamp: Stamp,
    delta: Option<i128>,
    result: RowValue,
) -> Result<(), StoreError> {
    let version = Version { id, delta, result };
    store.put(&version_key(row, stamp), &encode(&version))?;
    store.put(&row_key(row), &encode(&RowAt { version: stamp, value: version.result }))
}

fn plus(value: &RowValue, delta: i128) -> RowValue {
    let base = match value {
        RowValue::Absent => 0,
        RowValue::Balance(base) => *base,
        RowValue::Record(_) => panic!("a delta was granted on a record"),
    };
    RowValue::Balance(base.checked_add(delta).expect("escrow keeps every sum within 128 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ids::Millis, store::MemoryStore};

    #[test]
    fn deltas_out_of_order_end_as_if_in_order() {
        let row = RowKey::new("user:1", "USD").unwrap();
        let deltas = [(Stamp(2), 10), (Stamp(5), -3), (Stamp(9), 4), (Stamp(11), -11)];
        let build = |order: [usize; 4]| {
            let mut store = MemoryStore::default();
            for place in order {
                let (stamp, delta) = deltas[place];
                add(&mut store, &row, BatchId::from_parts(Millis(stamp.0), [0; 10]), stamp, delta, Stamp(0))
                    .unwrap();
            }
            store
        };
        let in_order = build([0, 1, 2, 3]);
        for order in [[1, 0, 2, 3], [3, 2, 1, 0], [0, 3, 1, 2], [2, 0, 3, 1]] {
            assert!(build(order) == in_order, "{order:?}");
        }
        let balance_at = |stamp| at(&in_order, &row, Stamp(stamp)).unwrap().value;
        assert_eq!(balance_at(1), RowValue::Absent);
        assert_eq!(balance_at(5), RowValue::Balance(7));
        assert_eq!(balance_at(8), RowValue::Balance(7));
        assert_eq!(balance_at(99), RowValue::Balance(0));
        let (changes, next) = history(&in_order, &row, Stamp(3), Stamp(10), 1).unwrap();
        assert_eq!((changes[0].stamp, changes[0].delta, next), (Stamp(5), Some(-3), Some(Stamp(9))));
    }

    #[test]
    fn a_history_is_whole_however_it_is_cut() {
        let mut store = MemoryStore::default();
        let (row, other) = (RowKey::new("a", "note").unwrap(), RowKey::new("a", "note2").unwrap());
        // Some are so large that few fit into one answer.
        for stamp in 1..=24 {
            let bytes = if stamp % 3 == 0 { READ_BYTES_MAX / 2 - 1 } else { 10 };
            let value = RowValue::Record(vec![stamp as u8; bytes].into());
            let id = BatchId::from_parts(Millis(stamp), [0; 10]);
            replace(&mut store, &row, id, Stamp(stamp), value.clone()).unwrap();
            replace(&mut store, &other, id, Stamp(stamp), value).unwrap();
        }
        for (from, position, limit) in
            [(1, 24, 1), (1, 24, 7), (1, 24, 100), (5, 17, 3), (6, 20, 100), (24, 24, 1)]
        {
            let (mut found, mut next) = (Vec::new(), Some(Stamp(from)));
            while let Some(from) = next {
                let (page, after) = history(&store, &row, from, Stamp(position), limit).unwrap();
                assert!((1..=limit).contains(&page.len()), "{} changes, {limit} at most", page.len());
                found.extend(page.into_iter().map(|change| change.stamp.0));
                next = after;
            }
            assert_eq!(found, (from..=position).collect::<Vec<_>>(), "{limit} at a time");
        }
    }

    #[test]
    fn what_a_read_at_the_mark_needs_is_kept_and_nothing_before() {
        let mut store = MemoryStore::default();
        let rows = ["a", "b", "c"].map(|name| RowKey::new(name, "USD").unwrap());
        let id = |stamp: u64| BatchId::from_parts(Millis(stamp), [0; 10]);
        let mut stamp = 0;
        for _ in 0..10 {
            for row in &rows {
                stamp += 1;
                add(&mut store, row, id(stamp), Stamp(stamp), 1, Stamp(0)).unwrap();
            }
        }
        let before = store;
        let history = Stamp(15);
        for most in [1, 2, 3, 7, 100] {
            let mut store = before.clone();
            let mut from = Some(FIRST_VERSION.to_vec());
            let mut rounds = 0;
            while let Some(next) = from {
                from = drop_versions(&mut store, history, &next, most).unwrap();
                rounds += 1;
                assert!(rounds <= 30, "the sweep never ends");
            }
            // Of the 30 versions 15 lie above the mark, and one of each row below is needed.
            assert_eq!(store.len(), rows.len() + 15 + rows.len(), "{most} at a time");
            for row in &rows {
                for position in (15..=30).map(Stamp) {
                    assert_eq!(at(&store, row, position).unwrap(), at(&before, row, position).unwrap());
                }
            }
        }
    }

    #[test]
    fn a_delta_that_comes_late_below_the_mark_shifts_what_is_kept() {
        let row = RowKey::new("a", "USD").unwrap();
        let id = |stamp: u64| BatchId::from_parts(Millis(stamp), [0; 10]);
        for history in [0, 4, 7, 8, 20] {
            let (mut store, mut in_order) = (MemoryStore::default(), MemoryStore::default());
            for stamp in [2, 4, 6, 9, 12] {
                add(&mut store, &row, id(stamp), Stamp(stamp), 10, Stamp(0)).unwrap();
            }
            drop_versions(&mut store, Stamp(history), FIRST_VERSION, 100).unwrap();
            add(&mut store, &row, id(7), Stamp(7), 1, Stamp(history)).unwrap();
            for stamp in [2, 4, 6, 7, 9, 12] {
                let delta = if stamp == 7 { 1 } else { 10 };
                add(&mut in_order, &row, id(stamp), Stamp(stamp), delta, Stamp(0)).unwrap();
            }
            for position in history..=20 {
                let position = Stamp(position);
                assert_eq!(
                    at(&store, &row, position).unwrap(),
                    at(&in_order, &row, position).unwrap(),
                    "at {position}, with the mark at {history}"
                );
            }
        }
    }
}
