//! The contract between a replicated state machine and whoever hosts it.
//!
//! A host (the `raft` crate, the simulator, the model checker) feeds every replica the same commands at the same log indexes,
//! by [`apply`] alone. [`apply`] also keeps the *running hash*: a chain over every command and every change that it made, so
//! that two replicas at the same index can prove that they hold the same state (promise G10).
//!
//! A machine may keep in memory what it has changed, and bring it to the store later ([`Machine::flush`]): what is changed again and
//! again is then stored once. The host decides when, and until then has the log from which to apply again.
//!
//! Invariants:
//! - Applying is a function of the state and the entry (rule R10): no clock, no randomness, no unordered iteration. When a machine is
//!   flushed makes no difference to anything that it answers, nor to the hash.
//! - After a flush, whatever a machine keeps in memory can be rebuilt from its store by [`Machine::open`].
//! - The applied index and the hash change in the same atomic step as the state (rule R5).

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::store::{Store, StoreError};

/// A replicated state machine.
pub trait Machine: Sized + Send + 'static {
    /// What applying one entry answers to whoever proposed it. Never replicated, never stored.
    type Reply: Send + 'static;

    /// What the machine must know from the start and all replicas must have equal; checked by the machine itself.
    type Config: Clone + Send + Sync + 'static;

    /// Rebuilds what is kept in memory from `store`, which is empty at first.
    fn open(config: &Self::Config, store: &dyn Store) -> Result<Self, StoreError>;

    /// Applies one command. An error is a failure of the store and stops the replica. Every change goes to the store, or is noted
    /// there ([`Store::note`]) and kept in memory until the next flush.
    fn apply(&mut self, store: &mut dyn Store, index: u64, command: &[u8])
    -> Result<Self::Reply, StoreError>;

    /// Brings to the store all that was kept in memory ([`Store::bring`]). After an error the machine must not be used any more.
    fn flush(&mut self, store: &mut dyn Store) -> Result<(), StoreError>;

    /// Lets go of what is in memory, and in the store too, beyond `keep_bytes` in all. Does a bounded piece of work, so it is asked for
    /// after every few entries.
    fn trim(&mut self, keep_bytes: usize);
}

/// Where a replica stands: the index of the last entry that it applied, and the running hash over all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The index of the last applied entry; 0: none.
    pub index: u64,
    /// The running hash.
    pub hash: [u8; 32],
}

const POSITION_KEY: &[u8] = &[0x01];

/// Reads where the replica stands.
pub fn position(store: &dyn Store) -> Result<Position, StoreError> {
    match store.get(POSITION_KEY)? {
        None => Ok(Position::default()),
        Some(bytes) => decode("position", &bytes),
    }
}

/// Applies the command of the entry at `index`, and moves the position.
///
/// Indexes only grow; entries without a command (Raft's own) are not passed and may leave gaps.
pub fn apply<M: Machine>(
    machine: &mut M,
    store: &mut dyn Store,
    index: u64,
    command: &[u8],
) -> Result<M::Reply, StoreError> {
    let before = position(store)?;
    assert!(index > before.index, "entry {index} is applied after entry {}", before.index);
    let mut hashed = HashedStore {
        inner: store,
        hasher: blake3::Hasher::new(),
        waiting: Vec::with_capacity(CHAINED_BYTES),
    };
    hashed.chain(&[&before.hash, &index.to_be_bytes(), &length(command), command]);
    let reply = machine.apply(&mut hashed, index, command)?;
    let hash = hashed.hash();
    store.put(POSITION_KEY, &encode(&Position { index, hash }))?;
    Ok(reply)
}

/// The first byte of all that is stored and replicated by machines: the version of its format.
const FORMAT: u8 = 3;

/// Encodes a value in the format of all that is stored and replicated: a version byte, then postcard.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Most of what is encoded is small, and finds room at once.
    encode_into(Vec::with_capacity(256), value)
}

/// The same, behind what `bytes` holds.
pub fn encode_into<T: Serialize>(mut bytes: Vec<u8>, value: &T) -> Vec<u8> {
    bytes.push(FORMAT);
    postcard::to_extend(value, bytes).expect("encoding into memory can't fail")
}

/// Decodes what [`encode`] made. `what` names the thing in the error.
pub fn decode<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, StoreError> {
    let failed = |why: String| StoreError(format!("decode {what} ({} bytes): {why}", bytes.len()));
    match bytes.split_first() {
        Some((&FORMAT, body)) => postcard::from_bytes(body).map_err(|error| failed(error.to_string())),
        Some((version, _)) => Err(failed(format!("it has format {version}, this program knows {FORMAT}"))),
        None => Err(failed("it is empty".to_owned())),
    }
}

/// What is hashed at once: that is much quicker than a little at a time.
const CHAINED_BYTES: usize = 16 << 10;

fn length(bytes: &[u8]) -> [u8; 8] {
    (bytes.len() as u64).to_be_bytes()
}

/// Passes everything on, and takes every change into the hash.
struct HashedStore<'a> {
    inner: &'a mut dyn Store,
    hasher: blake3::Hasher,
    waiting: Vec<u8>,
}

impl HashedStore<'_> {
    fn chain(&mut self, pieces: &[&[u8]]) {
        for piece in pieces {
            if self.waiting.len() + piece.len() > CHAINED_BYTES {
                self.hasher.update(&self.waiting);
                self.waiting.clear();
            }
            if piece.len() > CHAINED_BYTES {
                self.hasher.update(piece);
            } else {
                self.waiting.extend_from_slice(piece);
            }
        }
    }

    fn hash(mut self) -> [u8; 32] {
        self.hasher.update(&self.waiting);
        *self.hasher.finalize().as_bytes()
    }
}

impl Store for HashedStore<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        self.inner.get(key)
    }

    fn look(&self, key: &[u8], visit: &mut dyn FnMut(&[u8])) -> Result<(), StoreError> {
        self.inner.look(key, visit)
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.chain(&[&length(key), key, &length(value), value]);
        self.inner.put(key, value)
    }

    fn put_new(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.chain(&[&length(key), key, &length(value), value]);
        self.inner.put_new(key, value)
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.chain(&[&length(key), key, &u64::MAX.to_be_bytes()]);
        self.inner.delete(key)
    }

    fn note(&mut self, change: &[&[u8]]) {
        change.iter().for_each(|piece| self.chain(&[&length(piece), piece]));
        self.inner.note(change);
    }

    fn bring(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        // It was noted when it was changed.
        self.inner.bring(key, value)
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.inner.scan(from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<(Bytes, Bytes)>, StoreError> {
        self.inner.last(from, to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    type Change = fn(&mut dyn Store) -> Result<(), StoreError>;

    /// Makes one change with each command.
    struct Makes(Change);

    impl Machine for Makes {
        type Reply = ();
        type Config = Change;

        fn open(change: &Change, _: &dyn Store) -> Result<Makes, StoreError> {
            Ok(Makes(*change))
        }

        fn apply(&mut self, store: &mut dyn Store, _: u64, _: &[u8]) -> Result<(), StoreError> {
            (self.0)(store)
        }

        fn flush(&mut self, _: &mut dyn Store) -> Result<(), StoreError> {
            Ok(())
        }

        fn trim(&mut self, _: usize) {}
    }

    /// The running hash after one change.
    fn hash(change: Change) -> [u8; 32] {
        let mut store = MemoryStore::default();
        apply(&mut Makes(change), &mut store, 1, b"command").unwrap();
        position(&store).unwrap().hash
    }

    /// Promise G10: replicas with the same hash have made the same changes, whenever each of them was flushed.
    #[test]
    fn the_hash_tells_changes_apart_and_not_flushes() {
        let nothing = hash(|_| Ok(()));
        let noted = |change: &[&[u8]]| {
            let mut store = MemoryStore::default();
            let mut hashed =
                HashedStore { inner: &mut store, hasher: blake3::Hasher::new(), waiting: Vec::new() };
            hashed.chain(&[&[0; 32], &1_u64.to_be_bytes(), &length(b"command"), b"command"]);
            hashed.note(change);
            hashed.hash()
        };
        let notes = [noted(&[b"ab"]), noted(&[b"ac"]), noted(&[b"a", b"b"]), noted(&[b"", b"ab"])];
        let made: [Change; 4] = [
            |store| store.put(b"a", b"d"),
            |store| store.put(b"a", b"c"),
            |store| store.put_new(b"b", b"d"),
            |store| store.delete(b"a"),
        ];
        let mut hashes: Vec<_> = made.into_iter().map(hash).chain(notes).chain([nothing]).collect();
        hashes.sort_unstable();
        assert!(hashes.windows(2).all(|pair| pair[0] != pair[1]), "two changes have the same hash");
        assert_eq!(hash(|store| store.bring(b"a", Some(b"b"))), nothing, "it was noted before");
        assert_eq!(hash(|store| store.bring(b"a", None)), nothing, "it was noted before");
    }
}
