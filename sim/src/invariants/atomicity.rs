//! Promise G1: every operation of a batch takes effect, or none does.
//!
//! While it runs: a shard carries out a commit only if that is the decision, at its stamp. At rest: each row has exactly the changes of
//! the committed batches that write it.

use std::collections::{BTreeMap, BTreeSet};

use verdict_protocol::{
    batch::{OperationKind, RowKey},
    ids::{BatchId, Stamp},
};

use super::{Finding, Invariant, Rest};
use crate::witness::{Facts, Seen};

/// All of a batch, or nothing.
#[derive(Debug, Default)]
pub struct Atomicity;

impl Invariant for Atomicity {
    fn name(&self) -> &'static str {
        "atomicity"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        let Seen::Shard { shard, entry, .. } = seen else { return Ok(()) };
        for outcome in entry.messages.iter().flat_map(|message| &message.outcomes) {
            let Some(stamp) = outcome.commit else { continue };
            let decided = facts.decisions.get(&outcome.id).map(|recorded| &recorded.decision.result);
            if decided != Some(&Ok(stamp)) {
                return Err(format!(
                    "shard {shard} is told that {} commits at {stamp}; decided is {decided:?}",
                    outcome.id
                ));
            }
        }
        Ok(())
    }

    fn rest(&mut self, rest: &Rest<'_>, facts: &Facts) -> Finding {
        let mut expected: BTreeMap<&RowKey, BTreeSet<(Stamp, BatchId)>> = BTreeMap::new();
        for batch in facts.batches.values() {
            for operation in &batch.operations {
                expected.entry(&operation.row).or_default();
            }
        }
        for recorded in facts.committed() {
            let Ok(stamp) = recorded.decision.result else { continue };
            let Some(batch) = facts.contents(&recorded.decision) else { continue };
            for operation in &batch.operations {
                if !matches!(operation.kind, OperationKind::Require(_)) {
                    expected.entry(&operation.row).or_default().insert((stamp, batch.id));
                }
            }
        }
        for (row, expected) in expected {
            let (found, oldest) = rest.history(facts, row);
            let found: Vec<_> = found.iter().map(|change| (change.stamp, change.id)).collect();
            // Below that stamp only some may be left; all above have to be there.
            let (old, found): (Vec<_>, Vec<_>) = found.into_iter().partition(|(stamp, _)| *stamp < oldest);
            if let Some((stamp, id)) = old.iter().find(|change| !expected.contains(change)) {
                return Err(format!("row {row:?} was changed by {id} at {stamp}, which is no commit of it"));
            }
            let expected: Vec<_> = expected.into_iter().filter(|(stamp, _)| *stamp >= oldest).collect();
            if found != expected {
                return Err(format!("row {row:?} was changed by {found:?}, committed are {expected:?}"));
            }
        }
        Ok(())
    }
}
