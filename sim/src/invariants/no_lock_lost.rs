//! Promise G8: no lock is lost. Whoever has voted YES keeps its rows: no two such parts use a row in ways that don't go together, and
//! all debits together could be carried out. Written down here a second time, without a line of the shard's own.

use std::collections::BTreeMap;

use verdict_protocol::{
    batch::{Batch, Operation, OperationKind, Placement, RowKey},
    ids::ShardId,
    messages::{RowValue, VoteKind},
    shard::Shard,
    store::MemoryStore,
};

use super::{Finding, Invariant, row_in};
use crate::witness::{Facts, Seen};

/// Those who voted YES go together.
#[derive(Debug, Default)]
pub struct NoLockLost;

#[derive(Default)]
struct Row {
    adds: u32,
    shared: u32,
    alone: u32,
    outgoing: i128,
    incoming: i128,
    floor: Option<i128>,
    ceiling: Option<i128>,
}

fn use_row<'a>(row: &mut Row, operations: impl Iterator<Item = &'a Operation>) {
    let (mut adds, mut requires, mut others, mut delta) = (0, 0, 0, 0_i128);
    for operation in operations {
        match &operation.kind {
            OperationKind::Add { delta: one, floor, ceiling } => {
                adds += 1;
                delta += one;
                let floor = floor.or((*one < 0).then_some(0));
                row.floor = row.floor.max(floor);
                row.ceiling = match (row.ceiling, *ceiling) {
                    (Some(one), Some(other)) => Some(one.min(other)),
                    (one, other) => one.or(other),
                };
            }
            OperationKind::Require(_) => requires += 1,
            OperationKind::Put(_) | OperationKind::Insert(_) | OperationKind::Delete => others += 1,
        }
    }
    match (adds, requires, others) {
        (0, _, 0) => row.shared += 1,
        (_, 0, 0) => {
            row.adds += 1;
            row.outgoing += delta.min(0);
            row.incoming += delta.max(0);
        }
        _ => row.alone += 1,
    }
}

fn check(shard: ShardId, machine: &Shard, store: &MemoryStore, facts: &Facts) -> Finding {
    let placement = Placement { shards: facts.plan.shards() };
    let mut rows: BTreeMap<&RowKey, Row> = BTreeMap::new();
    for held in machine.held().filter(|held| held.part.vote == VoteKind::Yes) {
        let Some(batch) = facts.batches.get(&(held.part.id, held.part.hash)) else { continue };
        let batch: &Batch = batch;
        let mut here: Vec<&Operation> = batch
            .operations
            .iter()
            .filter(|operation| placement.shard_of(operation.row.partition()) == shard)
            .collect();
        here.sort_by(|one, other| one.row.cmp(&other.row));
        for together in here.chunk_by(|one, other| one.row == other.row) {
            use_row(rows.entry(&together[0].row).or_default(), together.iter().copied());
        }
    }
    for (key, row) in rows {
        let kinds = u32::from(row.adds > 0) + u32::from(row.shared > 0) + row.alone;
        if kinds > 1 {
            return Err(format!(
                "row {key:?} of shard {shard} is held by {} adds, {} conditions and {} alone at once",
                row.adds, row.shared, row.alone
            ));
        }
        if row.adds > 0 {
            let settled = match row_in(machine, store, key).value {
                RowValue::Balance(balance) => balance,
                RowValue::Absent | RowValue::Record(_) => 0,
            };
            if row.outgoing < 0 && row.floor.is_some_and(|floor| settled + row.outgoing < floor) {
                return Err(format!("row {key:?} holds {settled}, promised away are {}", -row.outgoing));
            }
            if row.incoming > 0 && row.ceiling.is_some_and(|ceiling| settled + row.incoming > ceiling) {
                return Err(format!("row {key:?} holds {settled}, promised to come are {}", row.incoming));
            }
        }
    }
    Ok(())
}

impl Invariant for NoLockLost {
    fn name(&self) -> &'static str {
        "no lock lost"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        match seen {
            Seen::Shard { shard, machine, store, .. } => check(*shard, machine, store, facts),
            Seen::ShardOpened { shard, machine, store, .. } => check(*shard, machine, store, facts),
            _ => Ok(()),
        }
    }
}
