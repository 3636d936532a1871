//! Promise G8: once all faults have ended, everything is decided and free again within [`BOUND`]. The world itself looks.

/// The name of the invariant.
pub const NAME: &str = "bounded recovery";

/// The bound, in microseconds of virtual time. The longest of what can stand one behind the other: elections, an epoch that has to be
/// opened a second time, a batch's own time (at most 4 s), calls of clients that wait for their time to be up (4 s), for those that
/// had more to do.
pub const BOUND: u64 = 40_000_000;
