//! The hash over all that happened, and, on demand, the same for a reader.

use std::fmt;

/// A rolling hash, and lines if somebody reads.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    hash: u64,
    steps: u64,
    reads: bool,
}

impl Trace {
    /// Only the hash.
    pub fn silent() -> Trace {
        Trace::default()
    }

    /// Prints every event.
    pub fn printed() -> Trace {
        Trace { reads: true, ..Trace::default() }
    }

    /// Takes a number into the hash.
    pub fn mix(&mut self, word: u64) {
        let mixed = (self.hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.hash = mixed ^ (mixed >> 29);
    }

    /// One more event, at its time.
    pub fn step(&mut self, now: u64, kind: u64) {
        self.steps += 1;
        self.mix(now);
        self.mix(kind);
    }

    /// How many events there were.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The hash.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// A line for the reader.
    pub fn line(&self, now: u64, text: impl FnOnce() -> String) {
        if self.reads {
            println!("{:>9.3} ms  {}", now as f64 / 1000.0, text());
        }
    }
}

/// Shows a list, separated by commas.
pub fn list<T: fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}
