//! The durable state of a replica, as its state machine sees it: ordered bytes.
//!
//! The host decides where the bytes live (RocksDB in the product, a map in the simulator). It makes all changes of one
//! applied entry, together with the applied index, visible in one atomic step (rule R5), and it never makes changes of its own.

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;

/// The storage below failed. A replica that meets this must stop: it can't apply the entry, and must not skip it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("storage failed: {0}")]
pub struct StoreError(pub String);

/// Ordered keys and values. Reads see all earlier writes.
///
/// A key's first byte names its table; each machine documents its own in `docs/storage.md`. Tables below 0x10 belong to
/// [`crate::machine`].
pub trait Store {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError>;

    /// Shows the value of `key`, if there is one, where it lies.
    fn look(&self, key: &[u8], visit: &mut dyn FnMut(&[u8])) -> Result<(), StoreError> {
        if let Some(value) = self.get(key)? {
            visit(&value);
        }
        Ok(())
    }

    /// Sets the value of `key`.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;

    /// Sets the value of a key that isn't there: the same as [`Store::put`], but if it is removed soon, nothing need be left of it.
    fn put_new(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.put(key, value)
    }

    /// Removes `key`; no error if there is none.
    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError>;

    /// Tells of a change that the machine keeps in memory for now: it belongs to what was applied, and takes up room.
    fn note(&mut self, _change: &[&[u8]]) {}

    /// Sets or removes what was kept in memory, and noted, before.
    fn bring(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        match value {
            Some(value) => self.put(key, value),
            None => self.delete(key),
        }
    }

    /// Visits the keys in `from..to` in ascending order, until `visit` returns false.
    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError>;

    /// The greatest key in `from..to`, with its value.
    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError>;
}

/// A store in memory, for the simulator, the model checker and tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct MemoryStore {
    map: BTreeMap<Vec<u8>, Bytes>,
}

impl MemoryStore {
    /// All keys and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.map.iter().map(|(key, value)| (key.as_slice(), value.as_ref()))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    fn range(&self, from: &[u8], to: &[u8]) -> impl DoubleEndedIterator<Item = (&Vec<u8>, &Bytes)> {
        let empty = from >= to;
        let bounds = (Bound::Included(from), Bound::Excluded(if empty { from } else { to }));
        let range = (!empty).then(|| self.map.range::<[u8], _>(bounds));
        range.into_iter().flatten()
    }
}

impl Store for MemoryStore {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(self.map.get(key).cloned())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.map.insert(key.to_vec(), Bytes::copy_from_slice(value));
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.map.remove(key);
        Ok(())
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        for (key, value) in self.range(from, to) {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError> {
        let found = self.range(from, to).next_back();
        Ok(found.map(|(key, value)| (Bytes::copy_from_slice(key), value.clone())))
    }
}
