//! When to try again.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

/// The first pause between two tries, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(1000);
/// With less time left no try is begun: it would have no answer in time, and make of a batch that nobody has seen one that is unknown.
pub(crate) const TRY_MIN: Duration = Duration::from_millis(10);

/// The pause before try number `tries + 1`: doubling from 20 ms to 1 s, half of it by chance so that callers that failed
/// together don't return together. A server's advice is a lower bound.
pub(crate) fn pause(tries: u32, advice: Option<Duration>) -> Duration {
    let full = PAUSE_MIN.saturating_mul(1 << tries.min(10)).min(PAUSE_MAX);
    let jittered = full.mul_f64(0.5 + 0.5 * chance());
    match advice {
        Some(advice) => jittered.max(advice + advice.mul_f64(0.2 * chance())),
        None => jittered,
    }
}

/// A number from 0 to 1. `RandomState` has new keys each time: good enough to spread retries, and no dependency.
pub(crate) fn chance() -> f64 {
    RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_respect_the_servers_advice() {
        for tries in 0..64 {
            let pause = pause(tries, None);
            assert!(pause >= PAUSE_MIN / 2 && pause <= PAUSE_MAX, "pause {pause:?} after {tries} tries");
        }
        assert!(pause(0, Some(Duration::from_secs(3))) >= Duration::from_secs(3));
    }
}
