//! Promise G2: the decision of an id never changes, on no replica, in no answer, and not after it was forgotten.

use std::collections::BTreeMap;

use verdict_protocol::{
    coordinator::{Acted, Coordinator, CoordinatorReply},
    ids::NodeId,
    messages::Decision,
    store::MemoryStore,
};

use super::{Finding, Invariant, Rest};
use crate::witness::{Facts, Seen, committed};

/// One decision for each id.
#[derive(Debug, Default)]
pub struct DecisionNeverChanges;

fn same(facts: &Facts, decision: &Decision, what: &str) -> Finding {
    match facts.decisions.get(&decision.id) {
        Some(recorded) if recorded.decision != *decision => {
            let (id, first, now) = (decision.id, &recorded.decision.result, &decision.result);
            Err(format!("{what}: {id} is decided {now:?}, first it was {first:?}"))
        }
        _ => Ok(()),
    }
}

/// What a replica remembers is what was recorded; what it doesn't is behind the horizon, or not applied here yet.
fn remembers(facts: &Facts, node: NodeId, machine: &Coordinator, store: &MemoryStore) -> Finding {
    let (listed, _) = machine.list(store, 0, usize::MAX).expect("memory doesn't fail");
    let mut found = BTreeMap::new();
    for one in listed {
        same(facts, &one.decision, &format!("at n{node}"))?;
        found.insert(one.decision.id, one.decision);
    }
    Ok(())
}

impl Invariant for DecisionNeverChanges {
    fn name(&self) -> &'static str {
        "decision never changes"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        match seen {
            Seen::Coordinator { reply: CoordinatorReply::Acted(Acted { decisions, .. }), .. } => {
                decisions.iter().try_for_each(|decision| same(facts, decision, "recorded"))
            }
            Seen::Shard { shard, entry, reply, .. } => {
                let committed = committed(*shard, entry, reply);
                committed.iter().try_for_each(|decision| same(facts, decision, "committed by its shard"))
            }
            Seen::CoordinatorOpened { node, machine, store } => remembers(facts, *node, machine, store),
            _ => Ok(()),
        }
    }

    fn rest(&mut self, rest: &Rest<'_>, facts: &Facts) -> Finding {
        for node in rest.nodes.values() {
            let Some((host, _)) = &node.coordinator else { continue };
            remembers(facts, node.id, &host.machine, &host.store)?;
            let horizon = host.machine.counts().horizon;
            for id in facts.decisions.keys() {
                let known = host.machine.decision(&host.store, *id).expect("memory doesn't fail");
                if known.is_none() && id.time() > horizon {
                    return Err(format!("n{} has forgotten {id}, which lies behind no horizon", node.id));
                }
            }
        }
        Ok(())
    }
}
