//! Which ids were recorded lately, so that a new one is known to be new without looking it up.
//!
//! Ids of batches begin with the time of their making, so almost every new one is greater than all but the latest. What is here
//! follows from the store and is no part of the state: two machines that differ in it alone are equal.

use std::{
    collections::BTreeSet,
    hash::{Hash, Hasher},
};

use crate::ids::BatchId;

/// The recorded ids above a floor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent {
    /// Of the ids above this, exactly those in `ids` are recorded.
    floor: BatchId,
    ids: BTreeSet<BatchId>,
}

impl Recent {
    /// So many ids are known.
    const MAX: usize = 1 << 17;

    /// Knows nothing of ids up to `greatest`, which is the greatest that is recorded.
    pub(crate) fn above(greatest: BatchId) -> Recent {
        Recent { floor: greatest, ids: BTreeSet::new() }
    }

    /// Whether an id is certainly not recorded.
    pub(crate) fn is_new(&self, id: BatchId) -> bool {
        id > self.floor && !self.ids.contains(&id)
    }

    /// An id was recorded.
    pub(crate) fn note(&mut self, id: BatchId) {
        if id > self.floor && self.ids.insert(id) && self.ids.len() > Self::MAX {
            self.floor = self.ids.pop_first().expect("there are many");
        }
    }
}

impl PartialEq for Recent {
    fn eq(&self, _: &Recent) -> bool {
        true
    }
}

impl Eq for Recent {}

impl Hash for Recent {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Millis;

    #[test]
    fn what_was_recorded_is_never_taken_for_new() {
        let id = |n: u64| BatchId::from_parts(Millis(n), [7; 10]);
        let mut recent = Recent::above(id(10));
        assert!(!recent.is_new(id(3)) && !recent.is_new(id(10)) && recent.is_new(id(11)));
        let count = Recent::MAX as u64 + 5;
        for n in (11..11 + count).rev() {
            assert!(recent.is_new(id(n)) || n <= 15, "{n} was not recorded");
            recent.note(id(n));
        }
        assert!((0..11 + count).all(|n| !recent.is_new(id(n))));
        assert!(recent.is_new(id(11 + count)));
        assert_eq!(recent.ids.len(), Recent::MAX);
    }
}
