//! Promise G7: a balance with a floor never goes below it, and one with a ceiling never above, in any order of events.

use verdict_protocol::{batch::Placement, messages::RowValue};

use super::{Finding, Invariant, row_in};
use crate::{
    plan::{balances, bounds, row_key},
    witness::{Facts, Seen},
};

/// Balances keep their bounds.
#[derive(Debug, Default)]
pub struct NoOverdraft;

impl Invariant for NoOverdraft {
    fn name(&self) -> &'static str {
        "no overdraft"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        let Seen::Shard { shard, entry, machine, store, .. } = seen else { return Ok(()) };
        if entry.messages.iter().all(|message| message.outcomes.is_empty()) {
            return Ok(());
        }
        let placement = Placement { shards: facts.plan.shards() };
        for name in balances() {
            let row = row_key(&name);
            if placement.shard_of(row.partition()) != *shard {
                continue;
            }
            if let RowValue::Balance(balance) = row_in(machine, store, &row).value {
                let (floor, ceiling) = bounds(&name);
                if balance < floor || balance > ceiling {
                    return Err(format!("{name} is {balance}, it must stay in {floor} to {ceiling}"));
                }
            }
        }
        Ok(())
    }
}
