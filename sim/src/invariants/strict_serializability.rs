//! Promise G5: batches and reads are strictly serializable, in the order of their stamps.
//!
//! At rest, a model that knows no shards runs all committed batches one by one in the order of their stamps. Each must meet its
//! conditions; every read must equal the model at its position; every rejection must be true somewhere between its batch's coming and
//! its decision; the model must end as the shards do. And the order must agree with real time: what ended before something else
//! began has the lower stamp.

use std::collections::BTreeMap;

use verdict_protocol::{
    batch::{Batch, RowKey},
    ids::Stamp,
    leader::Reply,
    messages::{AbortReason, RowAt},
    plain,
};

use super::{Finding, Invariant, Rest};
use crate::{
    messages::{Answer, Question},
    raft::Time,
    witness::{Facts, Recorded, Seen},
};

/// One order for everything.
#[derive(Debug, Default)]
pub struct StrictSerializability;

type Model = BTreeMap<RowKey, RowAt>;

/// Runs a batch on the model; if it fails, the model is as before.
fn run(model: &mut Model, batch: &Batch, stamp: Stamp) -> Result<(), String> {
    let mut changed: Model = BTreeMap::new();
    for operation in &batch.operations {
        let before = || model.get(&operation.row).cloned().unwrap_or_default();
        let row = changed.entry(operation.row.clone()).or_insert_with(before);
        plain::run(row, stamp, &operation.kind).map_err(|why| format!("{:?}: {why}", operation.row))?;
    }
    model.extend(changed);
    Ok(())
}

/// A rejection, and between which stamps it must have been true.
struct Rejection<'a> {
    batch: &'a Batch,
    from: Stamp,
    before: usize,
    is_true: bool,
}

fn rejections(facts: &Facts) -> Vec<Rejection<'_>> {
    let mut rejections = Vec::new();
    for recorded in facts.decisions.values() {
        let Err(abort) = &recorded.decision.result else { continue };
        let (AbortReason::ShortOfFunds
        | AbortReason::AboveCeiling
        | AbortReason::ConditionNotMet
        | AbortReason::RowExists) = abort.reason
        else {
            continue;
        };
        let Some(batch) = facts.contents(&recorded.decision) else { continue };
        let hash = recorded.decision.hash;
        let came = facts
            .records
            .iter()
            .filter(|record| {
                record.submitted().is_some_and(|(one, its)| one.id == batch.id && Some(its) == hash)
            })
            .map(|record| record.invoked)
            .min()
            .unwrap_or(0);
        let from = answered_before(facts, came);
        rejections.push(Rejection { batch, from, before: recorded.place, is_true: false });
    }
    rejections
}

/// The highest stamp that was answered before a time.
fn answered_before(facts: &Facts, time: Time) -> Stamp {
    let ended = facts.records.iter().filter(|record| record.answered.is_some_and(|at| at < time));
    ended.filter_map(|record| stamp_of(record.end.as_ref()?)).max().unwrap_or_default()
}

/// The stamp that an answer has shown: of a commit, or the position of a read.
fn stamp_of(answer: &Answer) -> Option<Stamp> {
    match answer {
        Answer::Told(Reply::Decided(decision)) => decision.result.as_ref().ok().copied(),
        Answer::Told(Reply::Rows { position, .. } | Reply::History { position, .. }) => Some(*position),
        _ => None,
    }
}

fn check_order(rest: &Rest<'_>, facts: &Facts) -> Finding {
    let committed = facts.committed();
    let mut rejections = rejections(facts);
    let mut reads = reads(facts);
    reads.sort_by_key(|read| read.0);
    let mut reads = reads.into_iter().peekable();
    let mut model = Model::new();
    let mut last = Stamp(0);
    let mut after = None;
    for recorded in &committed {
        let Ok(stamp) = recorded.decision.result else { continue };
        if stamp <= last {
            return Err(format!("stamp {stamp} was given twice"));
        }
        look(&model, after, stamp, &mut rejections);
        while let Some(read) = reads.next_if(|read| read.0 < stamp) {
            check_read(&model, &read)?;
        }
        let Some(batch) = facts.contents(&recorded.decision) else {
            return Err(format!("{} is committed with contents that nobody submitted", recorded.decision.id));
        };
        run(&mut model, batch, stamp)
            .map_err(|why| format!("{} is committed at {stamp}, but there fails {why}", batch.id))?;
        (last, after) = (stamp, Some(*recorded));
    }
    look(&model, after, Stamp(u64::MAX), &mut rejections);
    for read in reads {
        check_read(&model, &read)?;
    }
    if let Some(one) = rejections.iter().find(|one| !one.is_true) {
        let result = &facts.decisions[&one.batch.id].decision.result;
        return Err(format!("{} was rejected by {result:?}, which was never so since it came", one.batch.id));
    }
    for (row, expected) in &model {
        let found = rest.row(facts, row);
        if found != *expected {
            return Err(format!("at the end row {row:?} is {found:?}, it must be {expected:?}"));
        }
    }
    Ok(())
}

/// Looks at rejections in the state after a decision, which stands until the stamp `next`: it counts for those that were decided later, and
/// came before `next` was answered.
///
/// A read may have told a position at which a shard only commits later, by itself: it knew that nothing of it concerned that read. Such a
/// batch comes before all that began behind the read, even what is rejected before the shard has committed it.
fn look(model: &Model, after: Option<&Recorded>, next: Stamp, rejections: &mut [Rejection<'_>]) {
    let counts = |one: &Rejection<'_>| {
        after.is_none_or(|after| {
            let decision = &after.decision;
            let told = decision.result.as_ref().is_ok_and(|stamp| *stamp <= one.from);
            after.place < one.before || (decision.shards.len() == 1 && told)
        })
    };
    for one in rejections.iter_mut() {
        if !one.is_true && next > one.from && counts(one) {
            one.is_true = run(&mut model.clone(), one.batch, Stamp(u64::MAX)).is_err();
        }
    }
}

type Looked<'a> = (Stamp, &'a Question, &'a Reply);

fn reads(facts: &Facts) -> Vec<Looked<'_>> {
    let mut reads = Vec::new();
    for record in &facts.records {
        for answer in &record.answers {
            if let Answer::Told(reply @ (Reply::Rows { position, .. } | Reply::History { position, .. })) =
                answer
            {
                reads.push((*position, &record.question, reply));
            }
        }
    }
    reads
}

fn check_read(model: &Model, read: &Looked<'_>) -> Finding {
    let (position, question, reply) = read;
    match (question, reply) {
        (Question::Read { rows }, Reply::Rows { rows: found, .. }) => {
            for (row, found) in rows.iter().zip(found) {
                let expected = model.get(row).cloned().unwrap_or_default();
                if *found != expected {
                    return Err(format!(
                        "a read at {position} found {found:?} in {row:?}, there was {expected:?}"
                    ));
                }
            }
            Ok(())
        }
        (Question::History { row, .. }, Reply::History { changes, oldest, .. }) => {
            // A row that hasn't changed for so long has no history left, and one that never has had none.
            let kept = Stamp(1).max(*oldest);
            let expected = model.get(row).filter(|expected| expected.version >= kept).cloned();
            let found =
                changes.last().map(|change| RowAt { version: change.stamp, value: change.result.clone() });
            if found == expected {
                return Ok(());
            }
            Err(format!(
                "the history of {row:?} up to {position} ends with {found:?}, there was {expected:?}"
            ))
        }
        _ => Err("a read was answered with something else".to_owned()),
    }
}

/// What ended before something began has a lower stamp, or for reads the same at most.
fn check_real_time(facts: &Facts) -> Finding {
    // Everything that shows a stamp: when it began, when it ended, and whether it is a batch that this very call brought in.
    let mut began: Vec<(Time, Stamp, bool, usize)> = Vec::new();
    let mut ended: Vec<(Time, Stamp)> = Vec::new();
    let mut first: BTreeMap<_, Time> = BTreeMap::new();
    for record in &facts.records {
        if let Some((batch, _)) = record.submitted() {
            let at = first.entry(batch.id).or_insert(record.invoked);
            *at = record.invoked.min(*at);
        }
    }
    for (place, record) in facts.records.iter().enumerate() {
        let (Some(at), Some(stamp)) = (record.answered, record.end.as_ref().and_then(stamp_of)) else {
            continue;
        };
        ended.push((at, stamp));
        match record.submitted() {
            Some((batch, _)) => began.push((first[&batch.id], stamp, true, place)),
            // Asking for an outcome takes no place in the order.
            None if record.id().is_some() => {}
            None => began.push((record.invoked, stamp, false, place)),
        }
    }
    ended.sort_unstable();
    began.sort_unstable();
    let mut highest = Stamp(0);
    let mut ended = ended.into_iter().peekable();
    for (at, stamp, is_batch, place) in began {
        while let Some((_, stamp)) = ended.next_if(|(end, _)| *end < at) {
            highest = highest.max(stamp);
        }
        if stamp < highest || (is_batch && stamp == highest && highest > Stamp(0)) {
            return Err(format!(
                "{:?} has stamp {stamp}, but {highest} was answered before it began",
                facts.records[place].question
            ));
        }
    }
    Ok(())
}

impl Invariant for StrictSerializability {
    fn name(&self) -> &'static str {
        "strict serializability"
    }

    fn see(&mut self, _: &Seen<'_>, _: &Facts) -> Finding {
        Ok(())
    }

    fn rest(&mut self, rest: &Rest<'_>, facts: &Facts) -> Finding {
        check_real_time(facts)?;
        check_order(rest, facts)
    }
}
