//! What went wrong with a call, and what that says about the batch.

use std::{error::Error, io, time::Duration};

use tonic::{Code, ConnectError, Status};
use tonic_types::StatusExt as _;
use verdict_proto::v1::CallError;

/// Why a call decided nothing. A caller that gets one knows that no try of this call was proposed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The request is malformed: it will never be taken.
    #[error("{}{message}", field_text(field))]
    InvalidArgument {
        /// The field, for example `batch.operations[3].add.delta`; empty where the server named none.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// The id is known with other contents.
    #[error("the id is known with other contents: {message}")]
    DifferentContents {
        /// What the server said.
        message: String,
    },
    /// The id, or the position, is older than what is remembered.
    #[error("too old: {message}")]
    TooOld {
        /// What the server said.
        message: String,
    },
    /// There was too much in flight until the caller's time ran out.
    #[error("overloaded: {message}")]
    Overloaded {
        /// What the server said.
        message: String,
    },
    /// No node could take the call until the caller's time ran out.
    #[error("no node is available: {message}")]
    Unavailable {
        /// What was met last.
        message: String,
    },
    /// The server refused the call for a reason that no retry mends.
    #[error("refused with {code:?}: {message}")]
    Refused {
        /// The gRPC status code.
        code: Code,
        /// What the server said.
        message: String,
    },
}

fn field_text(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}: ") }
}

/// What one failed try says.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nothing was proposed, and trying again is useless.
    Final(ClientError),
    /// Nothing was proposed; another try may do better.
    Refused {
        error: ClientError,
        /// The server's advice on when to try again.
        retry_after: Option<Duration>,
        /// The address of the leader.
        leader: Option<String>,
    },
    /// Nothing was sent: there is no connection to the node, for this reason.
    Unreached(String),
    /// Anything may have happened.
    Lost(String),
}

impl Failure {
    /// What the end of a call says. Only a server's own word counts as "nothing was proposed": a status with the details
    /// that the contract demands, since proxies and broken connections make statuses too.
    pub(crate) fn of_status(status: &Status) -> Failure {
        let message = status.message().to_owned();
        if let Some(why) = no_connection(status) {
            return Failure::Unreached(why);
        }
        if status.source().is_some() {
            return Failure::Lost(format!("the connection broke: {message}"));
        }
        let details = status.get_error_details();
        let retry_after = details.retry_info().and_then(|info| info.retry_delay);
        let leader = details.error_info().and_then(|info| info.metadata.get("leader").cloned());
        match status.code() {
            code @ (Code::Unavailable | Code::ResourceExhausted)
                if details.error_info().is_none() && details.retry_info().is_none() =>
            {
                Failure::Lost(format!("{code:?}, without saying that nothing was proposed: {message}"))
            }
            code => {
                let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
                let field = violation.map(|violation| violation.field.clone()).unwrap_or_default();
                let message = match violation {
                    Some(violation) if !violation.description.is_empty() => violation.description.clone(),
                    Some(_) | None => message,
                };
                let leader = leader.filter(|address| !address.is_empty());
                Failure::of_code(code, message, field, retry_after, leader)
            }
        }
    }

    /// What the error of one batch in a stream says.
    pub(crate) fn of_call_error(error: CallError) -> Failure {
        let retry_after =
            (error.retry_after_ms > 0).then(|| Duration::from_millis(u64::from(error.retry_after_ms)));
        Failure::of_code(Code::from_i32(error.code), error.message, error.field, retry_after, None)
    }

    fn of_code(
        code: Code,
        message: String,
        field: String,
        retry_after: Option<Duration>,
        leader: Option<String>,
    ) -> Failure {
        match code {
            Code::InvalidArgument => Failure::Final(ClientError::InvalidArgument { field, message }),
            Code::AlreadyExists => Failure::Final(ClientError::DifferentContents { message }),
            // tonic says the same code for messages beyond its limit on bytes.
            Code::OutOfRange if message.contains("message length too large") => {
                Failure::Final(ClientError::Refused { code, message })
            }
            Code::OutOfRange => Failure::Final(ClientError::TooOld { message }),
            Code::Unavailable => {
                Failure::Refused { error: ClientError::Unavailable { message }, retry_after, leader }
            }
            Code::ResourceExhausted => {
                Failure::Refused { error: ClientError::Overloaded { message }, retry_after, leader }
            }
            Code::Unimplemented
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::NotFound
            | Code::FailedPrecondition => Failure::Final(ClientError::Refused { code, message }),
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal
            | Code::DataLoss => Failure::Lost(format!("{code:?}: {message}")),
        }
    }
}

/// Why there is no connection, if that is why a call failed: then the request can't have left this process.
pub fn no_connection(status: &Status) -> Option<String> {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return Some(why_no_connection(error));
        }
        source = error.source();
    }
    None
}

/// The last of the causes. The usual ones in words that don't depend on the system.
fn why_no_connection(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    let kind = last.downcast_ref::<io::Error>().map(io::Error::kind);
    match kind {
        Some(io::ErrorKind::ConnectionRefused) => "nobody listens there".into(),
        Some(io::ErrorKind::TimedOut) => "it doesn't answer".into(),
        Some(_) | None => last.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn only_a_status_with_details_says_that_nothing_was_proposed() {
        for bare in [Status::unavailable("upstream reset"), Status::resource_exhausted("quota")] {
            assert!(matches!(Failure::of_status(&bare), Failure::Lost(_)), "{bare:?}");
        }

        let mut details = ErrorDetails::new();
        details.set_error_info("NOT_LEADER", "verdict", [("leader".to_owned(), "n:2".to_owned())]);
        details.set_retry_info(Some(Duration::from_millis(7)));
        let said = Status::with_error_details(Code::Unavailable, "no leader here", details);
        let Failure::Refused { retry_after, leader, .. } = Failure::of_status(&said) else {
            panic!("the server said that nothing was proposed")
        };
        assert_eq!((retry_after, leader.as_deref()), (Some(Duration::from_millis(7)), Some("n:2")));
    }

    #[test]
    fn a_malformed_request_names_its_field() {
        let details = ErrorDetails::with_bad_request_violation("batch.id", "is not a UUID");
        let said = Status::with_error_details(Code::InvalidArgument, "bad", details);
        let Failure::Final(error) = Failure::of_status(&said) else { panic!("no retry mends that") };
        assert_eq!(error.to_string(), "batch.id: is not a UUID");
        let Failure::Final(error) = Failure::of_status(&Status::invalid_argument("20 bytes, at most 10"))
        else {
            panic!("no retry mends that")
        };
        assert_eq!(error.to_string(), "20 bytes, at most 10");
    }

    #[test]
    fn a_timeout_claims_nothing() {
        use Code::{Aborted, Cancelled, DataLoss, DeadlineExceeded, Internal, Ok, Unknown};
        for code in [DeadlineExceeded, Cancelled, Unknown, Aborted, Internal, DataLoss, Ok] {
            assert!(matches!(Failure::of_status(&Status::new(code, "late")), Failure::Lost(_)), "{code:?}");
            let error = CallError { code: code as i32, ..CallError::default() };
            assert!(matches!(Failure::of_call_error(error), Failure::Lost(_)), "{code:?}");
        }
    }
}
