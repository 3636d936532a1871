//! No money comes from nowhere: every read of all balances, and the end, add up to what committed batches have created by then.

use verdict_protocol::{
    batch::OperationKind,
    ids::Stamp,
    leader::Reply,
    messages::{RowAt, RowValue},
};

use super::{Finding, Invariant, Rest};
use crate::{
    messages::{Answer, Question},
    plan::{balances, row_key},
    witness::{Facts, Seen},
};

/// Sums of all balances fit.
#[derive(Debug, Default)]
pub struct Conservation;

fn sum<'a>(rows: impl Iterator<Item = &'a RowAt>) -> i128 {
    rows.map(|row| match row.value {
        RowValue::Balance(balance) => balance,
        RowValue::Absent | RowValue::Record(_) => 0,
    })
    .sum()
}

fn created(facts: &Facts, position: Stamp) -> i128 {
    let mut created = 0;
    for recorded in facts.decisions.values() {
        if recorded.decision.result.as_ref().is_ok_and(|stamp| *stamp <= position)
            && let Some(batch) = facts.contents(&recorded.decision)
        {
            for operation in &batch.operations {
                if let OperationKind::Add { delta, .. } = operation.kind
                    && operation.row.asset() == "USD"
                {
                    created += delta;
                }
            }
        }
    }
    created
}

impl Invariant for Conservation {
    fn name(&self) -> &'static str {
        "conservation"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        let Seen::Answered { record, .. } = seen else { return Ok(()) };
        let (Question::Read { rows: asked }, Some(Answer::Told(Reply::Rows { position, rows }))) =
            (&record.question, record.answers.last())
        else {
            return Ok(());
        };
        if asked.len() < balances().len() {
            return Ok(());
        }
        let (found, expected) = (sum(rows.iter()), created(facts, *position));
        if found == expected {
            return Ok(());
        }
        Err(format!("a read of all balances at {position} adds up to {found}, created were {expected}"))
    }

    fn rest(&mut self, rest: &Rest<'_>, facts: &Facts) -> Finding {
        let rows: Vec<RowAt> = balances().iter().map(|row| rest.row(facts, &row_key(row))).collect();
        let (found, expected) = (sum(rows.iter()), created(facts, Stamp(u64::MAX)));
        if found == expected {
            return Ok(());
        }
        Err(format!("at the end all balances add up to {found}, created were {expected}"))
    }
}
