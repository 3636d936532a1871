//! Why a call decided nothing, as it is told: by a gRPC status with details, or inside a stream.
//!
//! An UNAVAILABLE or RESOURCE_EXHAUSTED that is made here says that nothing was proposed. What may have been proposed is told as
//! a value (UNKNOWN), never as a failure.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use verdict_proto::v1;
use verdict_protocol::{
    batch::BatchError,
    ids::{BatchId, NodeId},
    leader::Refusal,
    messages::READ_BYTES_MAX,
};

/// The domain of all error details.
pub(crate) const DOMAIN: &str = "verdict";
/// The reason of a status by which a node says that it doesn't lead.
const NOT_LEADER: &str = "NOT_LEADER";
/// When to try again if a leader is missing, in milliseconds.
const RETRY_LEADER_MS: u32 = 100;
/// When to try again after a refusal for overload, in milliseconds.
const RETRY_OVERLOAD_MS: u32 = 200;

/// A node and where it listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    pub(crate) node: NodeId,
    pub(crate) address: String,
}

/// Why a call decided nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallFailure {
    pub(crate) code: Code,
    pub(crate) message: String,
    /// The field that is wrong.
    pub(crate) field: Option<String>,
    /// The reason in `google.rpc.ErrorInfo`.
    pub(crate) reason: &'static str,
    /// Who leads.
    pub(crate) leader: Option<Hint>,
    /// When to try again; 0: no advice.
    pub(crate) retry_after_ms: u32,
}

impl CallFailure {
    fn new(code: Code, reason: &'static str, message: impl Into<String>) -> CallFailure {
        CallFailure { code, message: message.into(), field: None, reason, leader: None, retry_after_ms: 0 }
    }

    /// A field is wrong.
    pub(crate) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> CallFailure {
        let failure = CallFailure::new(Code::InvalidArgument, "INVALID_ARGUMENT", problem);
        CallFailure { field: Some(field.into()), ..failure }
    }

    /// This node doesn't lead, and has handed the call to nobody. Nodes say this to each other.
    pub(crate) fn not_leader(leader: Option<Hint>) -> CallFailure {
        let failure =
            CallFailure::new(Code::Unavailable, NOT_LEADER, "this node doesn't lead the coordinators");
        CallFailure { leader, retry_after_ms: RETRY_LEADER_MS, ..failure }
    }

    /// No leader took the call in time: nothing was proposed.
    pub(crate) fn unavailable(message: impl Into<String>, leader: Option<Hint>) -> CallFailure {
        let failure = CallFailure::new(Code::Unavailable, "UNAVAILABLE", message);
        CallFailure { leader, retry_after_ms: RETRY_LEADER_MS, ..failure }
    }

    /// Too much is in flight.
    pub(crate) fn overloaded(message: impl Into<String>) -> CallFailure {
        let failure = CallFailure::new(Code::ResourceExhausted, "OVERLOADED", message);
        CallFailure { retry_after_ms: RETRY_OVERLOAD_MS, ..failure }
    }

    /// Something else was asked for than what there is.
    pub(crate) fn other(code: Code, reason: &'static str, message: impl Into<String>) -> CallFailure {
        CallFailure::new(code, reason, message)
    }

    /// What the core refused. `id` is the batch that it was about.
    pub(crate) fn of_refusal(refusal: &Refusal, id: Option<BatchId>) -> CallFailure {
        let id = id.map(|id| format!(" {id}")).unwrap_or_default();
        match refusal {
            Refusal::DifferentContents => CallFailure::new(
                Code::AlreadyExists,
                "DIFFERENT_CONTENTS",
                format!("batch{id} is known with other contents: use a new id for another batch"),
            ),
            Refusal::TooOld { horizon } => CallFailure::new(
                Code::OutOfRange,
                "TOO_OLD",
                format!(
                    "batch{id} is older than what is remembered: ids with a time at or before {} ms since 1970 are refused",
                    horizon.0
                ),
            ),
            Refusal::FromTheFuture { now } => {
                let problem =
                    format!("{id} carries a time beyond the leader's clock, which shows {now} ms since 1970");
                CallFailure::invalid("batch.id", problem.trim_start())
            }
            Refusal::Overloaded => CallFailure::overloaded("too much is in flight at the leader"),
            Refusal::Pruned { history } => CallFailure::new(
                Code::OutOfRange,
                "PRUNED",
                format!(
                    "what the rows held at the position of this read is not kept any more, but from stamp {history} on"
                ),
            ),
            Refusal::TooLarge => CallFailure::invalid(
                "rows",
                format!("hold more than {} MiB together: read fewer rows at a time", READ_BYTES_MAX >> 20),
            ),
            Refusal::Unavailable { shards } => {
                let shards: Vec<String> = shards.iter().map(ToString::to_string).collect();
                let message = format!("these shards could not be reached in time: {}", shards.join(", "));
                let failure = CallFailure::new(Code::Unavailable, "SHARDS_UNAVAILABLE", message);
                CallFailure { retry_after_ms: RETRY_LEADER_MS, ..failure }
            }
        }
    }

    /// An id from the future, told by how much, and the field of the call where it stands.
    pub(crate) fn from_the_future(field: &str, id: BatchId, now_ms: u64) -> CallFailure {
        let ahead = id.time().0.saturating_sub(now_ms);
        CallFailure::invalid(
            field,
            format!(
                "{id} carries a time that lies {ahead} ms ahead of the leader's clock: check this machine's clock"
            ),
        )
    }

    /// What a leader answered to one batch of a stream.
    pub(crate) fn of_call_error(error: v1::CallError) -> CallFailure {
        let failure = CallFailure::new(Code::from_i32(error.code), "FORWARDED", error.message);
        CallFailure {
            field: (!error.field.is_empty()).then_some(error.field),
            retry_after_ms: error.retry_after_ms,
            ..failure
        }
    }

    /// As an answer to one batch of a stream.
    pub(crate) fn call_error(self) -> v1::CallError {
        v1::CallError {
            code: self.code as i32,
            message: self.message,
            field: self.field.unwrap_or_default(),
            retry_after_ms: self.retry_after_ms,
        }
    }

    /// As the end of a call.
    pub(crate) fn status(self) -> Status {
        let mut details = ErrorDetails::new();
        if let Some(field) = &self.field {
            details.add_bad_request_violation(field.as_str(), self.message.as_str());
        }
        let mut metadata = HashMap::new();
        if let Some(hint) = self.leader {
            metadata.insert("leader".to_owned(), hint.address);
            metadata.insert("leader_node".to_owned(), hint.node.to_string());
        }
        details.set_error_info(self.reason, DOMAIN, metadata);
        if self.retry_after_ms > 0 {
            details.set_retry_info(Some(Duration::from_millis(u64::from(self.retry_after_ms))));
        }
        let message = match self.field {
            Some(field) => format!("{field}: {}", self.message),
            None => self.message,
        };
        Status::with_error_details(self.code, message, details)
    }
}

/// The gRPC library refuses a message beyond the limit with OUT_OF_RANGE, by which the contract means an id that is too old. What it
/// says there, in the words of the contract; none if the status is anything else.
pub fn message_too_large(status: &Status) -> Option<Status> {
    if status.code() != Code::OutOfRange {
        return None;
    }
    let sizes = status.message().strip_prefix("Error, decoded message length too large: found ")?;
    let (found, limit) = sizes.strip_suffix(" bytes")?.split_once(" bytes, the limit is: ")?;
    let message = format!("the message has {found} bytes, at most {limit} are taken");
    Some(CallFailure::other(Code::InvalidArgument, "MESSAGE_TOO_LARGE", message).status())
}

impl From<BatchError> for CallFailure {
    fn from(error: BatchError) -> CallFailure {
        CallFailure::invalid(error.field, error.problem)
    }
}

/// Whether another node said that it doesn't lead, and which node it takes for the leader.
pub(crate) fn says_not_leader(status: &Status) -> Option<Option<NodeId>> {
    let details = status.get_error_details();
    let info = details.error_info().filter(|info| info.domain == DOMAIN && info.reason == NOT_LEADER)?;
    Some(info.metadata.get("leader_node").and_then(|node| node.parse().ok()).map(NodeId))
}

/// Whether a status was made by one of our nodes, not by a broken connection.
pub(crate) fn is_answer(status: &Status) -> bool {
    status.get_error_details().error_info().is_some_and(|info| info.domain == DOMAIN)
}

#[cfg(test)]
mod tests {
    use verdict_protocol::ids::{Millis, ShardId, Stamp};

    use super::*;

    #[test]
    fn a_wrong_field_is_named_in_the_details() {
        let status = CallFailure::invalid("batch.operations[3].add.delta", "is no integer").status();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "batch.operations[3].add.delta: is no integer");
        let details = status.get_error_details();
        let violation = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(violation.field, "batch.operations[3].add.delta");
        assert_eq!(violation.description, "is no integer");
        assert!(details.retry_info().is_none());
    }

    #[test]
    fn not_leader_carries_the_leader_and_is_recognised() {
        let hint = Hint { node: NodeId(2), address: "b:1".to_owned() };
        let status = CallFailure::not_leader(Some(hint)).status();
        assert_eq!(status.code(), Code::Unavailable);
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().metadata["leader"], "b:1");
        assert_eq!(details.error_info().unwrap().domain, "verdict");
        assert!(details.retry_info().unwrap().retry_delay.is_some());
        assert_eq!(says_not_leader(&status), Some(Some(NodeId(2))));
        assert_eq!(says_not_leader(&CallFailure::not_leader(None).status()), Some(None));
        assert_eq!(says_not_leader(&CallFailure::unavailable("x", None).status()), None);
        assert_eq!(says_not_leader(&Status::unavailable("tcp connect error")), None);
        assert!(is_answer(&status) && !is_answer(&Status::unavailable("tcp connect error")));
    }

    #[test]
    fn refusals_have_the_codes_of_the_contract() {
        let id = BatchId::from_parts(Millis(5000), [0; 10]);
        let code = |refusal: Refusal| CallFailure::of_refusal(&refusal, Some(id)).code;
        assert_eq!(code(Refusal::DifferentContents), Code::AlreadyExists);
        assert_eq!(code(Refusal::TooOld { horizon: Millis(6000) }), Code::OutOfRange);
        assert_eq!(code(Refusal::Overloaded), Code::ResourceExhausted);
        assert_eq!(code(Refusal::Pruned { history: Stamp(9) }), Code::OutOfRange);
        assert_eq!(code(Refusal::Unavailable { shards: vec![ShardId(1)] }), Code::Unavailable);
        let ahead = CallFailure::from_the_future("batch.id", id, 2000);
        assert_eq!((ahead.code, ahead.field.as_deref()), (Code::InvalidArgument, Some("batch.id")));
        assert!(ahead.message.contains("3000 ms ahead"), "{}", ahead.message);
    }

    #[test]
    fn a_message_beyond_the_limit_is_malformed_and_told_with_the_limit() {
        let said =
            "Error, decoded message length too large: found 20000005 bytes, the limit is: 18874368 bytes";
        let told = message_too_large(&Status::out_of_range(said)).unwrap();
        assert_eq!(told.code(), Code::InvalidArgument);
        assert_eq!(told.message(), "the message has 20000005 bytes, at most 18874368 are taken");
        assert!(is_answer(&told));
        let id = BatchId::from_parts(Millis(5000), [0; 10]);
        let old = CallFailure::of_refusal(&Refusal::TooOld { horizon: Millis(6000) }, Some(id)).status();
        assert!(message_too_large(&old).is_none() && message_too_large(&told).is_none());
    }

    #[test]
    fn a_failure_survives_the_way_through_a_stream() {
        let failure = CallFailure::invalid("batch.id", "is no UUID");
        let back = CallFailure::of_call_error(failure.clone().call_error());
        assert_eq!((back.code, back.field, back.message), (failure.code, failure.field, failure.message));
    }
}
