//! The clock of a leader: it starts with the machine's, and then never jumps.
//!
//! No promise depends on it (only waiting does), but a clock that stands still would hold batches up, and one that leaps would end
//! them early or move the horizon. So it follows the monotonic clock, and is drawn towards the wall clock by at most a tenth of
//! the time that passes.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use verdict_protocol::ids::Millis;

/// By which part of the time that passes the clock may be faster or slower than the monotonic clock.
const SLEW: u64 = 10;
/// A wall clock that is further off than this is worth a warning.
const OFF_MAX: Duration = Duration::from_secs(60);

/// The machine's clock: microseconds since 1970.
fn wall() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The clock of one leader.
#[derive(Debug)]
pub(crate) struct Clock {
    micros: u64,
    last: Instant,
    warned: bool,
}

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock { micros: wall(), last: Instant::now(), warned: false }
    }

    /// The time now.
    pub(crate) fn now(&mut self) -> Millis {
        let now = Instant::now();
        let elapsed = now.duration_since(self.last);
        self.last = now;
        let wall = wall();
        self.micros = advance(self.micros, u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX), wall);
        let off = self.micros.abs_diff(wall);
        if off > OFF_MAX.as_micros() as u64 && !self.warned {
            self.warned = true;
            tracing::warn!(
                off_ms = off / 1000,
                "the machine's clock has jumped; the leader's clock follows it slowly"
            );
        }
        Millis(self.micros / 1000)
    }
}

/// One step of the clock, all in microseconds.
fn advance(clock: u64, elapsed: u64, wall: u64) -> u64 {
    let plain = clock + elapsed;
    let most = elapsed / SLEW;
    if wall > plain { plain + most.min(wall - plain) } else { plain - most.min(plain - wall) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_neither_stands_nor_jumps_when_the_wall_clock_does() {
        assert_eq!(advance(1_000_000, 20_000, 1_020_000), 1_020_000);
        assert_eq!(advance(1_000_000, 20_000, 90_000_000), 1_022_000, "forward");
        assert_eq!(advance(1_000_000, 20_000, 0), 1_018_000, "backward");
    }
}
