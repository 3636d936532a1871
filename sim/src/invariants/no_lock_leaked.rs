//! Promise G8: no lock is leaked. At rest no shard holds a part or a row, on any replica.

use super::{Finding, Invariant, Rest};
use crate::witness::{Facts, Seen};

/// Nothing is held at rest.
#[derive(Debug, Default)]
pub struct NoLockLeaked;

impl Invariant for NoLockLeaked {
    fn name(&self) -> &'static str {
        "no lock leaked"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Facts) -> Finding {
        // A row is held or waited for only by parts: with no parts there are no rows.
        if let Seen::Shard { shard, machine, .. } = seen {
            let counts = machine.counts();
            if counts.held_rows > 0 && counts.in_doubt == 0 {
                return Err(format!("shard {shard} holds {} rows for nobody", counts.held_rows));
            }
        }
        Ok(())
    }

    fn rest(&mut self, rest: &Rest<'_>, _: &Facts) -> Finding {
        for node in rest.nodes.values() {
            for (shard, (host, _)) in &node.shards {
                let counts = host.machine.counts();
                if counts.in_doubt + counts.waiting + counts.settled + counts.held_rows > 0 {
                    return Err(format!("shard {shard} at n{} still holds {counts:?}", node.id));
                }
            }
        }
        Ok(())
    }
}
