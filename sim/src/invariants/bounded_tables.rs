//! Promise G9: tables are bounded. While it runs: no shard holds more parts than it may. At rest: what is remembered of finished numbers
//! and decisions is no more than the marks and the horizon leave.

use super::{Finding, Invariant, Rest};
use crate::witness::{Facts, Seen};

/// The shards' table of parts, as docs/storage.md has it.
const PART_TABLE: u8 = 0x12;
/// Finished numbers that may be left at rest: those since the last mark.
const FINISHED_MAX: usize = 4;

/// Tables are bounded.
#[derive(Debug, Default)]
pub struct BoundedTables {
    parts_max: usize,
}

impl Invariant for BoundedTables {
    fn name(&self) -> &'static str {
        "bounded tables"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Facts) -> Finding {
        let Seen::Shard { shard, entry, machine, .. } = seen else { return Ok(()) };
        // A limit that is lowered takes nothing away.
        let held = machine.held().count();
        self.parts_max = self.parts_max.max(entry.parts_max as usize);
        if held > self.parts_max {
            return Err(format!("shard {shard} holds {held} parts, at most {} may be", self.parts_max));
        }
        Ok(())
    }

    fn rest(&mut self, rest: &Rest<'_>, facts: &Facts) -> Finding {
        let swept = facts.records.iter().rev().find_map(|record| record.submitted());
        let swept = swept.and_then(|(batch, _)| facts.decisions.get(&batch.id));
        if swept.is_none_or(|recorded| recorded.decision.result.is_err()) {
            // The last batch didn't reach all shards, so not all have heard of the marks.
            return Ok(());
        }
        for node in rest.nodes.values() {
            for (shard, (host, _)) in &node.shards {
                let finished = host.machine.finished_numbers();
                // What is stored was brought there just before: no part may be left behind that the machine has let go.
                let parts = host.store.iter().filter(|(key, _)| key[0] == PART_TABLE).count();
                if finished > FINISHED_MAX || parts > 0 {
                    let text = format!("shard {shard} at n{} remembers {finished} finished numbers", node.id);
                    return Err(format!("{text} and {parts} parts"));
                }
            }
            if let Some((host, _)) = &node.coordinator {
                let counts = host.machine.counts();
                if counts.unfinished > 0 {
                    return Err(format!("n{} has {} unfinished decisions", node.id, counts.unfinished));
                }
                let old = facts.decisions.keys().filter(|id| id.time() <= counts.horizon).count() as u64;
                let all = facts.decisions.len() as u64;
                // Forgotten ones go a few at a time with later entries.
                if counts.decisions > all - old + 64 {
                    return Err(format!("{} decisions are kept of {all}, {old} are old", counts.decisions));
                }
            }
        }
        Ok(())
    }
}
