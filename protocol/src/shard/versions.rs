//! Rows and their versions as they are stored.
//!
//! A row's *settled* value holds exactly the committed batches that were applied here. Every change is kept as a version under
//! its stamp. After a failover stamps may arrive out of order; only deltas can (writes of records are exclusive), and then the
//! later versions are shifted, so the list is always what it would be had they come in order.
//!
//! Of the versions at or below the history mark only the newest one of each row is needed. What was changed lately is in memory first
//! ([`super::rows`]).

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::{
    batch::RowKey,
    ids::{BatchId, Stamp},
    machine::{decode, encode},
    messages::{RowAt, RowChange, RowValue},
    store::{Store, StoreError},
};

const ROW_TABLE: u8 = 0x10;
const VERSION_TABLE: u8 = 0x11;

/// The lower bound of the keys of all versions.
pub const FIRST_VERSION: &[u8] = &[VERSION_TABLE];

/// A version as it is stored: `(row, stamp)` is its key.
#[derive(Serialize, Deserialize)]
pub struct Version {
    /// The batch that made it.
    pub id: BatchId,
    /// By how much it changed a balance.
    pub delta: Option<i128>,
    /// What the row held after it.
    pub result: RowValue,
}

impl Version {
    /// What [`encode`] made of one.
    pub fn decode(bytes: &[u8]) -> Result<Version, StoreError> {
        decode("version", bytes)
    }

    /// As it is told.
    pub fn at(self, stamp: Stamp) -> RowChange {
        RowChange { id: self.id, stamp, delta: self.delta, result: self.result }
    }
}

/// A key of one of the two tables; most lie in place.
pub type Key = SmallVec<[u8; 64]>;

/// The key of a row's settled value.
pub fn row_key(row: &RowKey) -> Key {
    let mut key = Key::new();
    key.push(ROW_TABLE);
    key.extend_from_slice(row.as_bytes());
    key
}

/// The row, a NUL (which no name contains) and the stamp, so that versions sort by row, then by stamp.
pub fn version_key(row: &RowKey, stamp: Stamp) -> Key {
    let mut key = Key::new();
    key.push(VERSION_TABLE);
    key.extend_from_slice(row.as_bytes());
    key.push(0);
    key.extend_from_slice(&stamp.0.to_be_bytes());
    key
}

/// The end of the versions of a row: greater than the key of any of them.
fn versions_end(row: &RowKey) -> Key {
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

/// What a row held at a position, of the versions that are stored.
pub fn at(store: &dyn Store, row: &RowKey, position: Stamp) -> Result<RowAt, StoreError> {
    let before = store.last(&version_key(row, Stamp(0)), &version_key(row, Stamp(position.0 + 1)))?;
    match before {
        None => Ok(RowAt::default()),
        Some((key, bytes)) => Ok(RowAt { version: stamp_of(&key), value: Version::decode(&bytes)?.result }),
    }
}

/// Visits the stored versions of a row with stamps in `from..=to`, in order, until `visit` returns false.
pub fn visit(
    store: &dyn Store,
    row: &RowKey,
    from: Stamp,
    to: Stamp,
    visit: &mut dyn FnMut(Stamp, &[u8]) -> bool,
) -> Result<(), StoreError> {
    let end = version_key(row, Stamp(to.0.saturating_add(1)));
    store.scan(&version_key(row, from), &end, &mut |key, value| visit(stamp_of(key), value))
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

/// Adds the sum of a batch's deltas to a balance, at a stamp below the newest: the versions behind it are shifted. All that is kept of
/// the row is stored, and the change is noted.
pub fn insert(
    store: &mut dyn Store,
    row: &RowKey,
    id: BatchId,
    stamp: Stamp,
    delta: i128,
    history: Stamp,
) -> Result<(), StoreError> {
    let result = plus(&at(store, row, stamp)?.value, delta);
    let mut later: Vec<(Vec<u8>, Bytes)> = Vec::new();
    store.scan(&version_key(row, stamp), &versions_end(row), &mut |key, bytes| {
        later.push((key.to_vec(), Bytes::copy_from_slice(bytes)));
        true
    })?;
    let needed = later.first().is_none_or(|(key, _)| stamp_of(key) > history);
    for (key, bytes) in later {
        let mut version = Version::decode(&bytes)?;
        assert!(stamp_of(&key) != stamp, "two batches have stamp {stamp} on row {row:?}");
        version.result = plus(&version.result, delta);
        store.bring(&key, Some(&encode(&version)))?;
    }
    // What it would be shown from may be gone already if no read needs it.
    if needed {
        let version = encode(&Version { id, delta: Some(delta), result });
        store.bring(&version_key(row, stamp), Some(&version))?;
    }
    let now = settled(store, row)?;
    let shifted = RowAt { version: now.version, value: plus(&now.value, delta) };
    store.bring(&row_key(row), Some(&encode(&shifted)))
}

/// A balance and a delta.
pub fn plus(value: &RowValue, delta: i128) -> RowValue {
    let base = match value {
        RowValue::Absent => 0,
        RowValue::Balance(base) => *base,
        RowValue::Record(_) => panic!("a delta was granted on a record"),
    };
    RowValue::Balance(base.checked_add(delta).expect("escrow keeps every sum within 128 bits"))
}
