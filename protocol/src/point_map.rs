//! A hash table that nobody can iterate over, so that its order can't decide anything (rule R10).
#![expect(clippy::disallowed_types, reason = "nobody sees the order")]

use std::{
    borrow::Borrow,
    collections::hash_map::HashMap,
    fmt,
    hash::{BuildHasher as _, Hash, Hasher},
    ops::Index,
};

use foldhash::quality::RandomState;

/// A map for what is looked up by its key alone: some times quicker than an ordered one.
///
/// The hash has a seed of the process's own, so that callers can't choose keys that collide without having seen it.
#[derive(Clone)]
pub(crate) struct PointMap<K, V>(HashMap<K, V, RandomState>);

impl<K, V> Default for PointMap<K, V> {
    fn default() -> PointMap<K, V> {
        PointMap(HashMap::default())
    }
}

impl<K: Eq + Hash, V> PointMap<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.0.get(key)
    }

    pub(crate) fn get_mut<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        self.0.get_mut(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.0.insert(key, value)
    }

    pub(crate) fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.0.remove(key)
    }
}

impl<K: Eq + Hash + Borrow<Q>, V, Q: Eq + Hash + ?Sized> Index<&Q> for PointMap<K, V> {
    type Output = V;

    fn index(&self, key: &Q) -> &V {
        &self.0[key]
    }
}

impl<K: Eq + Hash, V: PartialEq> PartialEq for PointMap<K, V> {
    fn eq(&self, other: &PointMap<K, V>) -> bool {
        self.0 == other.0
    }
}

impl<K: Eq + Hash, V: Eq> Eq for PointMap<K, V> {}

/// The same for equal maps, whatever their order: the sum of all entries' hashes.
impl<K: Hash, V: Hash> Hash for PointMap<K, V> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let hasher = foldhash::quality::FixedState::default();
        let sum = self.0.iter().fold(0u64, |sum, entry| sum.wrapping_add(hasher.hash_one(entry)));
        (self.0.len(), sum).hash(state);
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for PointMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
