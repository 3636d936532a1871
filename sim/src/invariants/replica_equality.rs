//! Promise G10: replicas that have applied the same index hold the same state. The running hash tells, and at rest the states are
//! compared byte by byte. A machine that is opened from its state holds what it held before.

use std::collections::BTreeMap;

use verdict_protocol::{
    ids::{GroupId, ShardId},
    machine::position,
    messages::HeldPart,
    shard::ShardCounts,
    store::MemoryStore,
};

use super::{Finding, Invariant, Rest};
use crate::witness::{Facts, Seen};

/// Equal index, equal state.
#[derive(Debug, Default)]
pub struct ReplicaEquality {
    hashes: BTreeMap<(GroupId, u64), [u8; 32]>,
    /// What each shard held after its last entries.
    held: BTreeMap<(ShardId, u64), (ShardCounts, Vec<HeldPart>)>,
}

impl Invariant for ReplicaEquality {
    fn name(&self) -> &'static str {
        "replica equality"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Facts) -> Finding {
        match seen {
            Seen::Applied { group, node, position } => {
                let first = self.hashes.entry((*group, position.index)).or_insert(position.hash);
                if *first == position.hash {
                    return Ok(());
                }
                Err(format!("group {group}: n{node} has another hash at {} than others", position.index))
            }
            Seen::Shard { shard, machine, store, .. } => {
                let index = position(*store).expect("memory doesn't fail").index;
                let parts = machine.held().map(|held| held.part).collect();
                self.held.insert((*shard, index), (machine.counts(), parts));
                Ok(())
            }
            Seen::ShardOpened { shard, node, machine, store } => {
                let found = position(*store).expect("memory doesn't fail");
                let known = self.hashes.get(&(shard.group(), found.index));
                if known.is_some_and(|hash| *hash != found.hash) {
                    return Err(format!("shard {shard} at n{node} starts with another hash than others had"));
                }
                let Some((counts, parts)) = self.held.get(&(*shard, found.index)) else { return Ok(()) };
                let now: Vec<HeldPart> = machine.held().map(|held| held.part).collect();
                if *counts == machine.counts() && *parts == now {
                    return Ok(());
                }
                Err(format!("shard {shard} at n{node} starts with {now:?}, at this index it held {parts:?}"))
            }
            _ => Ok(()),
        }
    }

    fn rest(&mut self, rest: &Rest<'_>, facts: &Facts) -> Finding {
        for shard in (1..=facts.plan.shards()).map(ShardId) {
            let mut replicas = rest.replicas(shard);
            let (_, _, first) = replicas.next().expect("every shard has replicas");
            if let Some((node, _, _)) = replicas.find(|(_, _, store)| *store != first) {
                return Err(format!("shard {shard}: n{node} holds another state than another replica"));
            }
        }
        // The coordinators' replicas may stand a few entries apart.
        let mut at: BTreeMap<u64, &MemoryStore> = BTreeMap::new();
        for (host, _) in rest.nodes.values().filter_map(|node| node.coordinator.as_ref()) {
            let index = position(&host.store).expect("memory doesn't fail").index;
            if *at.entry(index).or_insert(&host.store) != &host.store {
                return Err("two replicas of the coordinators hold different states".to_owned());
            }
        }
        Ok(())
    }
}
