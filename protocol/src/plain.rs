//! What an operation means, written down a second time and as plainly as possible: no shards, locks or batches in doubt.
//!
//! Nothing of the product uses it. Tests, the model check and simulations hold the machines to it: all committed batches, run
//! by it one after the other in the order of their stamps, must meet their conditions and end in the state that the shards hold.

use crate::{
    batch::{Condition, OperationKind},
    ids::Stamp,
    messages::{RowAt, RowValue},
};

/// Runs one operation on one row of a world in which nothing else goes on: `row` is what it holds, and becomes what it holds
/// afterwards, written at `stamp`. An error: the operation's condition or bound fails.
pub fn run(row: &mut RowAt, stamp: Stamp, kind: &OperationKind) -> Result<(), String> {
    let balance = || match &row.value {
        RowValue::Absent => Ok(0),
        RowValue::Balance(balance) => Ok(*balance),
        RowValue::Record(_) => Err("is a record".to_owned()),
    };
    let value = match kind {
        OperationKind::Add { delta, floor, ceiling } => {
            let after = balance()?.checked_add(*delta).ok_or("overflows")?;
            let floor = floor.unwrap_or(if *delta < 0 { 0 } else { i128::MIN });
            if after < floor || after > ceiling.unwrap_or(i128::MAX) {
                return Err(format!("{after} is out of bounds"));
            }
            RowValue::Balance(after)
        }
        OperationKind::Put(value) => RowValue::Record(value.clone()),
        OperationKind::Insert(value) if row.value == RowValue::Absent => RowValue::Record(value.clone()),
        OperationKind::Insert(_) => return Err("exists".to_owned()),
        OperationKind::Delete => RowValue::Absent,
        OperationKind::Require(condition) => {
            let holds = match condition {
                Condition::Exists(wanted) => (row.value != RowValue::Absent) == *wanted,
                Condition::VersionIs(version) => row.version == *version,
                Condition::RecordIs(value) => row.value == RowValue::Record(value.clone()),
                Condition::AtLeast(amount) => balance()? >= *amount,
                Condition::AtMost(amount) => balance()? <= *amount,
                Condition::BalanceIs(amount) => balance()? == *amount,
            };
            return if holds { Ok(()) } else { Err(format!("{condition:?} does not hold: {row:?}")) };
        }
    };
    *row = RowAt { version: stamp, value };
    Ok(())
}
