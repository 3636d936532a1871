//! Promise G3: an id takes effect at most once, with the contents that were decided, however often and wherever it is submitted.

use std::collections::BTreeSet;

use verdict_protocol::{
    ids::{BatchId, ShardId},
    leader::{Refusal, Reply},
};

use super::{Finding, Invariant};
use crate::{
    messages::Answer,
    witness::{Facts, Seen},
};

/// At most one effect of each id at each shard.
#[derive(Debug, Default)]
pub struct ExactlyOnce {
    held: BTreeSet<(ShardId, BatchId)>,
    effects: BTreeSet<(ShardId, BatchId)>,
}

impl Invariant for ExactlyOnce {
    fn name(&self) -> &'static str {
        "exactly once"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        match seen {
            // Held before the entry, told to commit by it, and not held any more: that was an effect.
            Seen::Shard { shard, entry, machine, .. } => {
                let now: BTreeSet<_> = machine.held().map(|held| (*shard, held.part.id)).collect();
                // One entry may tell the same outcome more than once.
                let outcomes = entry.messages.iter().flat_map(|message| &message.outcomes);
                let committed: BTreeSet<BatchId> =
                    outcomes.filter(|outcome| outcome.commit.is_some()).map(|outcome| outcome.id).collect();
                for id in committed {
                    let key = (*shard, id);
                    let effect = self.held.contains(&key) && !now.contains(&key);
                    if effect && !self.effects.insert(key) {
                        return Err(format!("{id} takes effect a second time at shard {shard}"));
                    }
                }
                self.held.retain(|(other, _)| other != shard);
                self.held.extend(now);
                Ok(())
            }
            Seen::Answered { record, .. } => {
                let Some((batch, hash)) = record.submitted() else { return Ok(()) };
                match record.answers.last() {
                    Some(Answer::Told(Reply::Decided(decision)))
                        if decision.hash.is_some_and(|known| known != hash) =>
                    {
                        Err(format!("{} with other contents was answered as a repeat", batch.id))
                    }
                    Some(Answer::Told(Reply::Refused(Refusal::DifferentContents))) => {
                        let other =
                            facts.batches.range((batch.id, verdict_protocol::ids::ContentHash([0; 32]))..);
                        let others = other.take_while(|((id, _), _)| *id == batch.id).count();
                        if others < 2 {
                            return Err(format!(
                                "{} was refused, but its contents are always the same",
                                batch.id
                            ));
                        }
                        Ok(())
                    }
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}
