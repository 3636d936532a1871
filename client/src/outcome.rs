//! The answer about a batch, as the caller sees it.

use verdict_proto::v1::{self, AbortReason, UndecidedState, Value, outcome::Result as Said};

/// The three answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It took effect, for ever.
    Committed {
        /// Its position in the order of all batches.
        stamp: u64,
    },
    /// It did not take effect and never will.
    Aborted {
        /// Why.
        reason: AbortReason,
        /// The place of the operation that failed, from 0; none where no single one did.
        operation: Option<u32>,
        /// What was met there.
        met: Option<Value>,
        /// A sentence for people.
        message: String,
    },
    /// Not known. It may be committed or aborted, or it may never have arrived: ask again by id, or submit again under the
    /// same id.
    Unknown {
        /// What is known instead.
        state: UndecidedState,
        /// A sentence for people.
        message: String,
    },
}

impl Outcome {
    /// Whether the batch is committed or aborted.
    pub fn is_definite(&self) -> bool {
        match self {
            Outcome::Committed { .. } | Outcome::Aborted { .. } => true,
            Outcome::Unknown { .. } => false,
        }
    }

    /// Not known, for a reason that lies between the client and the server.
    pub(crate) fn unknown(message: impl Into<String>) -> Outcome {
        Outcome::Unknown { state: UndecidedState::Unknown, message: message.into() }
    }

    /// What a server said about the batch `id`. An answer that says nothing, or speaks of another batch, is no answer.
    pub(crate) fn from_wire(id: &str, outcome: Option<v1::Outcome>) -> Result<Outcome, String> {
        let outcome = outcome.ok_or("the answer has no outcome")?;
        if !outcome.batch_id.eq_ignore_ascii_case(id) {
            return Err(format!("the answer speaks of batch {:?} instead of {id:?}", outcome.batch_id));
        }
        match outcome.result.ok_or("the outcome says nothing")? {
            Said::Committed(committed) => Ok(Outcome::Committed { stamp: committed.stamp }),
            Said::Aborted(aborted) => Ok(Outcome::Aborted {
                reason: aborted.reason(),
                operation: aborted.operation,
                met: aborted.met,
                message: aborted.message,
            }),
            Said::Undecided(undecided) => {
                Ok(Outcome::Unknown { state: undecided.state(), message: undecided.message })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_about_another_batch_is_no_answer() {
        let said = Said::Committed(v1::Committed { stamp: 7 });
        let outcome = v1::Outcome { batch_id: "b".into(), result: Some(said) };
        assert_eq!(Outcome::from_wire("b", Some(outcome.clone())), Ok(Outcome::Committed { stamp: 7 }));
        assert!(Outcome::from_wire("a", Some(outcome)).is_err());
        assert!(Outcome::from_wire("a", None).is_err());
    }
}
