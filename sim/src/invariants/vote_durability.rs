//! A vote is a promise: a part that has said YES is held until the outcome of its batch, or a later try of it, and a commit is decided
//! only if every participant has said YES under that very number, in an entry that is replicated.
//!
//! What a shard has committed on its own word it remembers until the coordinators' log has it.

use std::collections::{BTreeMap, BTreeSet};

use verdict_protocol::{
    coordinator::{Acted, CoordinatorReply},
    ids::{BatchId, Number, ShardId},
    messages::VoteKind,
};

use super::{Finding, Invariant};
use crate::witness::{Facts, Seen, committed};

/// YES is kept.
#[derive(Debug, Default)]
pub struct VoteDurability {
    /// Who has said YES, and is to be held.
    promised: BTreeMap<(ShardId, BatchId), Number>,
    /// All YES that were ever said.
    said: BTreeMap<(ShardId, BatchId), Vec<Number>>,
    /// What shards have committed on their own word and the coordinators have not recorded.
    settled: BTreeSet<(ShardId, BatchId)>,
}

impl Invariant for VoteDurability {
    fn name(&self) -> &'static str {
        "vote durability"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        match seen {
            Seen::Shard { shard, entry, reply, machine, .. } => {
                for message in &entry.messages {
                    for outcome in &message.outcomes {
                        let key = (*shard, outcome.id);
                        if self.promised.get(&key).is_some_and(|number| {
                            *number == outcome.number
                                || (outcome.commit.is_none() && outcome.gives_up.contains(number))
                        }) {
                            self.promised.remove(&key);
                        }
                    }
                    for prepare in &message.prepares {
                        let key = (*shard, prepare.id);
                        if self.promised.get(&key).is_some_and(|number| {
                            number.epoch == prepare.number.epoch && *number < prepare.number
                        }) {
                            self.promised.remove(&key);
                        }
                    }
                }
                let votes = reply.messages.iter().flat_map(|(_, message)| &message.votes);
                for vote in votes.filter(|vote| vote.kind == VoteKind::Yes) {
                    self.said.entry((*shard, vote.id)).or_default().push(vote.number);
                }
                let held: BTreeMap<BatchId, Number> = machine
                    .held()
                    .filter(|held| held.part.vote == VoteKind::Yes)
                    .map(|held| (held.part.id, held.part.number))
                    .collect();
                let promised = self.promised.range((*shard, BatchId([0; 16]))..);
                for ((_, id), number) in promised.take_while(|((other, _), _)| other == shard) {
                    if held.get(id) != Some(number) {
                        return Err(format!("shard {shard} said YES to {id} under {number} and lost it"));
                    }
                }
                for decision in committed(*shard, entry, reply) {
                    if !facts.decisions.contains_key(&decision.id) {
                        self.settled.insert((*shard, decision.id));
                    }
                }
                let remembered = |id: &BatchId| {
                    let mut held = machine.held();
                    held.any(|held| held.part.id == *id && matches!(held.part.vote, VoteKind::Committed(_)))
                };
                for (_, id) in self.settled.iter().filter(|(other, _)| other == shard) {
                    if !remembered(id) {
                        return Err(format!(
                            "shard {shard} has committed {id} and forgot it before it was recorded"
                        ));
                    }
                }
                self.promised.extend(held.into_iter().map(|(id, number)| ((*shard, id), number)));
                Ok(())
            }
            Seen::Coordinator { reply: CoordinatorReply::Acted(Acted { decisions, .. }), .. } => {
                for decision in decisions {
                    self.settled.retain(|(_, id)| *id != decision.id);
                    if decision.result.is_err() || facts.decisions.contains_key(&decision.id) {
                        continue;
                    }
                    for shard in &decision.shards {
                        let said = self.said.get(&(*shard, decision.id));
                        if said.is_none_or(|said| !said.contains(&decision.number)) {
                            return Err(format!(
                                "{} commits under {}, but shard {shard} said YES under {said:?}",
                                decision.id, decision.number
                            ));
                        }
                        if self.promised.get(&(*shard, decision.id)) != Some(&decision.number) {
                            return Err(format!(
                                "{} commits under {}, but shard {shard} holds it no more",
                                decision.id, decision.number
                            ));
                        }
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
