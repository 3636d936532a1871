//! What this process has done since it started, for people who measure: `verdict bench` asks for it through `Admin.Status`.
//!
//! The numbers are those of the process: nodes that share one share them too.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// Batches of the log that were written and synced.
pub static SYNCED_WRITES: Counter = Counter(AtomicU64::new(0));
/// Messages that went into streams to other nodes, or to the shards of this one: each counts once, whatever it carries.
pub static MESSAGES_SENT: Counter = Counter(AtomicU64::new(0));

impl Counter {
    /// One more.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
