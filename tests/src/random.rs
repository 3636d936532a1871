//! Random choices that can be repeated: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).

use std::{
    env,
    time::{SystemTime, UNIX_EPOCH},
};

/// A source of random numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From `VERDICT_SEED`, or the clock; printed, so that a failure can be repeated as far as processes allow.
    pub fn announced() -> Random {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let given = env::var("VERDICT_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or(since.as_nanos() as u64);
        println!("VERDICT_SEED={seed}");
        Random(seed)
    }

    /// From a seed of the caller's.
    pub fn of(seed: u64) -> Random {
        Random(seed)
    }

    /// Another source, independent of this one.
    pub fn split(&mut self) -> Random {
        Random(self.number())
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "there is no number below 0");
        self.number() % bound
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}
