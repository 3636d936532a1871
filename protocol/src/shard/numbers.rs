//! A set of numbers, kept as runs: batches end nearly in the order in which they began. Where every batch touches a shard its numbers
//! make few runs; of many shards each sees a part of the numbers, and then a run is seldom longer than one.

use std::collections::BTreeMap;

use crate::ids::Number;

/// Numbers of prepares.
///
/// Invariant: runs of one epoch neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Numbers {
    /// The first number of each run, with the sequence of its last one.
    runs: BTreeMap<Number, u64>,
}

impl Numbers {
    /// Whether a number is among them.
    pub fn contains(&self, number: Number) -> bool {
        self.run_before(number).is_some_and(|(_, last)| number.sequence <= last)
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|(first, last)| (last - first.sequence + 1) as usize).sum()
    }

    /// Adds one. Gives whether it is new.
    pub fn insert(&mut self, number: Number) -> bool {
        let before = self.run_before(number);
        if before.is_some_and(|(_, last)| number.sequence <= last) {
            return false;
        }
        let first = match before {
            Some((first, last)) if last.checked_add(1) == Some(number.sequence) => first,
            _ => number,
        };
        let next = number.sequence.checked_add(1).map(|sequence| Number { sequence, ..number });
        let last = next.and_then(|next| self.runs.remove(&next)).unwrap_or(number.sequence);
        self.runs.insert(first, last);
        true
    }

    /// Removes all up to a number.
    pub fn remove_up_to(&mut self, mark: Number) {
        while let Some((first, last)) = self.runs.first_key_value().map(|(first, last)| (*first, *last))
            && first <= mark
        {
            self.runs.pop_first();
            if first.epoch == mark.epoch && last > mark.sequence {
                self.runs.insert(Number { sequence: mark.sequence + 1, ..mark }, last);
            }
        }
    }

    /// The runs: the first number of each, with the sequence of its last one.
    pub fn runs(&self) -> Vec<(Number, u64)> {
        self.runs.iter().map(|(first, last)| (*first, *last)).collect()
    }

    /// The set of such runs.
    pub fn of_runs(runs: Vec<(Number, u64)>) -> Numbers {
        Numbers { runs: runs.into_iter().collect() }
    }

    /// The run of the same epoch that begins at or before a number.
    fn run_before(&self, number: Number) -> Option<(Number, u64)> {
        let (first, last) = self.runs.range(..=number).next_back()?;
        (first.epoch == number.epoch).then_some((*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::ids::Epoch;

    #[test]
    fn the_greatest_number_is_one_like_others() {
        let [last, before] = [u64::MAX, u64::MAX - 1].map(|sequence| Number { epoch: Epoch(1), sequence });
        let mut numbers = Numbers::default();
        assert!(numbers.insert(last) && numbers.insert(before) && !numbers.insert(last));
        assert_eq!(numbers.runs(), [(before, u64::MAX)]);
        numbers.remove_up_to(last);
        assert_eq!(numbers.len(), 0);
    }

    #[test]
    fn runs_are_a_set_of_numbers() {
        let mut seed = 1_u64;
        let mut dice = |sides: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % sides
        };
        let (mut numbers, mut model) = (Numbers::default(), BTreeSet::new());
        for round in 0..20_000 {
            let number = Number { epoch: Epoch(1 + dice(3)), sequence: dice(40) };
            if dice(30) == 0 {
                numbers.remove_up_to(number);
                model.retain(|kept| *kept > number);
            } else {
                assert_eq!(numbers.insert(number), model.insert(number), "round {round}");
            }
            let asked = Number { epoch: Epoch(1 + dice(3)), sequence: dice(40) };
            assert_eq!(numbers.contains(asked), model.contains(&asked), "round {round}: {asked}");
            assert_eq!(numbers.len(), model.len(), "round {round}");
            assert_eq!(Numbers::of_runs(numbers.runs()), numbers, "round {round}");
            let touching = numbers
                .runs
                .iter()
                .any(|(first, last)| numbers.runs.contains_key(&Number { sequence: last + 1, ..*first }));
            assert!(!touching, "round {round}: runs that touch are one");
        }
    }
}
