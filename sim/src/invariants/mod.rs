//! The promises, one file for each. Every invariant sees everything that happens, and looks once more when all has come to rest.

use std::collections::BTreeMap;

use verdict_protocol::{
    batch::RowKey,
    ids::{GroupId, NodeId, ShardId, Stamp},
    messages::{RowAt, RowChange, ShardQuery, ShardRead, ShardReadAnswer},
    shard::Shard,
    store::MemoryStore,
};

use crate::{
    node::Node,
    witness::{Facts, Seen},
};

pub mod alarms;
pub mod atomicity;
pub mod bounded_recovery;
pub mod bounded_tables;
pub mod conservation;
pub mod decision_never_changes;
pub mod exactly_once;
pub mod honest_answers;
pub mod no_lock_leaked;
pub mod no_lock_lost;
pub mod no_overdraft;
pub mod raft_elections;
pub mod raft_log;
pub mod replica_equality;
pub mod strict_serializability;
pub mod vote_durability;

/// What an invariant finds: nothing, or what is wrong.
pub type Finding = Result<(), String>;

/// A promise that is checked.
pub trait Invariant {
    /// Its name.
    fn name(&self) -> &'static str;

    /// Something was seen. The facts are those before it.
    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding;

    /// Nothing happens any more.
    fn rest(&mut self, _rest: &Rest<'_>, _facts: &Facts) -> Finding {
        Ok(())
    }
}

/// All of them.
pub fn all() -> Vec<Box<dyn Invariant>> {
    vec![
        Box::<raft_elections::RaftElections>::default(),
        Box::<raft_log::RaftLog>::default(),
        Box::<replica_equality::ReplicaEquality>::default(),
        Box::<decision_never_changes::DecisionNeverChanges>::default(),
        Box::<vote_durability::VoteDurability>::default(),
        Box::<atomicity::Atomicity>::default(),
        Box::<exactly_once::ExactlyOnce>::default(),
        Box::<no_overdraft::NoOverdraft>::default(),
        Box::<no_lock_lost::NoLockLost>::default(),
        Box::<honest_answers::HonestAnswers>::default(),
        Box::<conservation::Conservation>::default(),
        Box::<bounded_tables::BoundedTables>::default(),
        Box::<alarms::Alarms>::default(),
        Box::<no_lock_leaked::NoLockLeaked>::default(),
        Box::<strict_serializability::StrictSerializability>::default(),
    ]
}

/// A cluster at rest.
pub struct Rest<'a> {
    /// All nodes.
    pub nodes: &'a BTreeMap<NodeId, Node>,
}

impl Rest<'_> {
    /// The replicas of a shard, with where they are.
    pub fn replicas(&self, shard: ShardId) -> impl Iterator<Item = (NodeId, &Shard, &MemoryStore)> {
        self.nodes.values().filter_map(move |node| {
            let (host, _) = node.shards.get(&shard)?;
            Some((node.id, &host.machine, &host.store))
        })
    }

    /// What a row holds at the end.
    pub fn row(&self, facts: &Facts, row: &RowKey) -> RowAt {
        let shards = verdict_protocol::batch::Placement { shards: facts.plan.shards() };
        let (_, machine, store) =
            self.replicas(shards.shard_of(row.partition())).next().expect("every shard has replicas");
        row_in(machine, store, row)
    }

    /// All changes of a row that are kept, and from which stamp on these are all.
    pub fn history(&self, facts: &Facts, row: &RowKey) -> (Vec<RowChange>, Stamp) {
        let shards = verdict_protocol::batch::Placement { shards: facts.plan.shards() };
        let (_, machine, store) =
            self.replicas(shards.shard_of(row.partition())).next().expect("every shard has replicas");
        let query = ShardQuery::History { row: row.clone(), from: Stamp(0), limit: usize::MAX };
        match look(machine, store, query) {
            ShardReadAnswer::History { changes, oldest, .. } => (changes, oldest),
            other => panic!("a history was answered with {other:?}"),
        }
    }
}

/// What a row holds in a shard's state.
pub fn row_in(machine: &Shard, store: &MemoryStore, row: &RowKey) -> RowAt {
    match look(machine, store, ShardQuery::Rows(vec![row.clone()])) {
        ShardReadAnswer::Rows(mut rows) => rows.remove(0),
        other => panic!("a row was answered with {other:?}"),
    }
}

fn look(machine: &Shard, store: &MemoryStore, query: ShardQuery) -> ShardReadAnswer {
    let read = ShardRead { position: Stamp(u64::MAX - 1), known: true, wait_for: Vec::new(), query };
    let answer = machine.read(store, GroupId::COORDINATOR, &read).expect("memory doesn't fail");
    answer.expect("nothing is waited for")
}
