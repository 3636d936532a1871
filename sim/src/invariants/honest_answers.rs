//! Promise G6: whatever was answered is true. An outcome that is told is the one that is recorded; "no trace of it" and "nothing was
//! proposed" are said only if so.

use verdict_protocol::{
    leader::{Refusal, Reply},
    messages::Decision,
};

use super::{Finding, Invariant, Rest};
use crate::{
    client::Record,
    messages::Answer,
    witness::{Facts, Seen},
};

/// Answers are true.
#[derive(Debug, Default)]
pub struct HonestAnswers;

fn is_recorded(facts: &Facts, told: &Decision) -> Finding {
    match facts.decisions.get(&told.id) {
        None => Err(format!("{} was told to be {:?}, nothing is recorded", told.id, told.result)),
        Some(recorded) if recorded.decision != *told => Err(format!(
            "{} was told to be {:?}, recorded is {:?}",
            told.id, told.result, recorded.decision.result
        )),
        Some(_) => Ok(()),
    }
}

/// Whether an answer says that this call has proposed nothing.
fn says_nothing_was_proposed(answer: &Answer) -> bool {
    matches!(
        answer,
        Answer::NotProposed
            | Answer::Told(Reply::Refused(
                Refusal::Overloaded | Refusal::FromTheFuture { .. } | Refusal::DifferentContents
            ))
    )
}

/// What was refused as too old doesn't commit later either.
fn too_old_is_final(facts: &Facts) -> Finding {
    for record in &facts.records {
        if let Some(Answer::Told(Reply::Refused(Refusal::TooOld { .. }))) = record.end
            && let Some(recorded) = record.id().and_then(|id| facts.decisions.get(&id))
            && recorded.decision.result.is_ok()
            && record.answered.is_some_and(|answered| recorded.at > answered)
        {
            return Err(format!("{} was refused as too old, and committed later", recorded.decision.id));
        }
    }
    Ok(())
}

impl Invariant for HonestAnswers {
    fn name(&self) -> &'static str {
        "honest answers"
    }

    fn see(&mut self, seen: &Seen<'_>, facts: &Facts) -> Finding {
        let Seen::Answered { record, .. } = seen else { return Ok(()) };
        match record.answers.last() {
            Some(Answer::Told(Reply::Decided(told))) => is_recorded(facts, told),
            Some(Answer::Told(Reply::NotSeen)) => {
                let Some(recorded) = record.id().and_then(|id| facts.decisions.get(&id)) else {
                    return Ok(());
                };
                if recorded.at >= record.invoked {
                    return Ok(());
                }
                Err(format!("{} is decided, and was told not to be seen", recorded.decision.id))
            }
            Some(Answer::Told(Reply::Refused(Refusal::TooOld { horizon }))) => match record.id() {
                Some(id) if id.time() > *horizon => Err(format!("{id} is refused as too old, and isn't")),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// A batch of which every call was answered, and each with "nothing was proposed", is not committed.
    fn rest(&mut self, _: &Rest<'_>, facts: &Facts) -> Finding {
        too_old_is_final(facts)?;
        for recorded in facts.committed() {
            let decision = &recorded.decision;
            let mine = |record: &&Record| {
                record.submitted().is_some_and(|(batch, hash)| {
                    batch.id == decision.id && decision.hash.is_none_or(|known| known == hash)
                })
            };
            let mut records = facts.records.iter().filter(mine).peekable();
            let asked = records.peek().is_some();
            let refused = records.all(|record| {
                record.calls == record.answers.len() && record.answers.iter().all(says_nothing_was_proposed)
            });
            if asked && refused {
                return Err(format!(
                    "{} is committed, but every call was told that nothing was proposed",
                    decision.id
                ));
            }
        }
        Ok(())
    }
}
