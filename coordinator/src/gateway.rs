//! What every node does with a call: check it, bring it to the leader, tell the answer.
//!
//! Submissions go through the [`crate::submitter`]; questions (outcomes, reads, lists) are short calls that are asked here, of the
//! local driver or of the leader's node, again and again until their time is up: asking twice is harmless.
//!
//! A call that another node forwarded is answered here or not at all, so no call goes in circles.

use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tonic::{
    Code, Request as TonicRequest, Response, Status,
    metadata::{MetadataMap, MetadataValue},
};
use verdict_proto::{
    convert::{batch_id, history_to_wire, outcome_to_wire, row_from_wire, row_value_to_wire},
    v1::{self, settlement_client::SettlementClient},
};
use verdict_protocol::{
    batch::{Batch, BatchError, BatchLimits, Placement, RowKey, SplitBatch},
    coordinator::Coordinator,
    ids::{BatchId, NodeId, Stamp},
    leader::Reply,
    wire::Head,
};
use verdict_raft::{Group, ReadError};

use crate::{
    admission::Admission,
    caller::Caller,
    driver::{Answer, NotServed, Question, Request},
    failure::{CallFailure, is_answer, says_not_leader},
    leaders::Leaders,
    submitter::{Submission, refusal_of, undecided, unknown},
};

/// Marks calls that must not be forwarded again.
const FORWARDED: &str = "verdict-forwarded";
/// Rows of one read.
const ROWS_MAX: usize = 1000;
/// Entries of one list, at most and by default.
pub(crate) const LIST_MAX: u32 = 10_000;
pub(crate) const LIST_DEFAULT: u32 = 100;
/// How long a question may take if the caller doesn't say.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that `wait_ms` of a question waits.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// The pause between two tries to ask.
const PAUSE: Duration = Duration::from_millis(30);
/// How much earlier than the caller's own time limit an answer is given: a tenth of the time, but at most this.
const MARGIN: Duration = Duration::from_millis(50);
/// Time for the way to a leader and back, beyond what the question itself may wait.
const WAY: Duration = Duration::from_secs(2);

/// What the gateway needs to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatewayConfig {
    pub(crate) node: NodeId,
    pub(crate) placement: Placement,
    pub(crate) limits: BatchLimits,
    pub(crate) timeout_default: Duration,
    pub(crate) timeout_max: Duration,
    pub(crate) grace: Duration,
    pub(crate) message_bytes_max: usize,
}

/// The gateway of a node.
pub(crate) struct Gateway {
    pub(crate) config: GatewayConfig,
    pub(crate) leaders: Arc<Leaders>,
    pub(crate) submissions: mpsc::Sender<Submission>,
    pub(crate) admission: Arc<Admission>,
    /// Calls that wait at the door.
    pub(crate) at_door: Arc<Semaphore>,
    /// The local replica and its driver.
    pub(crate) local: Option<Local>,
    /// When a batch near a limit was last warned of.
    pub(crate) warned: Mutex<Option<Instant>>,
}

/// How often batches near a limit are warned of.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The coordinator's replica on this node.
#[derive(Clone)]
pub(crate) struct Local {
    pub(crate) group: Group<Coordinator>,
    pub(crate) driver: mpsc::Sender<Request>,
}

/// How a call came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// Another node forwarded it.
    pub(crate) forwarded: bool,
    /// The caller's own time limit, from now.
    pub(crate) timeout: Option<Duration>,
}

impl Origin {
    /// A call inside this process.
    pub(crate) const EMBEDDED: Origin = Origin { forwarded: false, timeout: None };

    /// As the metadata tell.
    pub(crate) fn of(metadata: &MetadataMap) -> Origin {
        let timeout = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
        Origin { forwarded: metadata.contains_key(FORWARDED), timeout: timeout.and_then(grpc_timeout) }
    }

    /// When to answer at the latest, if the question itself may take so long.
    fn deadline(&self, came: Instant, most: Duration) -> Instant {
        let own = self.timeout.map(|timeout| timeout - MARGIN.min(timeout / 10));
        came + own.map_or(most, |own| own.min(most))
    }
}

/// Parses the `grpc-timeout` header: up to eight digits and a unit.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// A batch that has passed all checks.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) batch: SplitBatch,
    /// Of the message that brought it.
    pub(crate) bytes: usize,
}

/// How one try to ask the leader ended, if not with an answer.
pub(crate) enum Tried {
    /// Somebody else may lead.
    Elsewhere(Option<NodeId>),
    /// This is the answer.
    Final(Status),
}

impl From<CallFailure> for Tried {
    fn from(failure: CallFailure) -> Tried {
        Tried::Final(failure.status())
    }
}

impl Gateway {
    /// Checks a batch as it was sent, and makes it ready for its shards.
    pub(crate) fn check(&self, sent: &Bytes) -> Result<Checked, CallFailure> {
        if sent.is_empty() {
            return Err(CallFailure::invalid("batch", "is missing"));
        }
        let (limits, placement, bytes) = (&self.config.limits, self.config.placement, sent.len());
        let batch = Batch::from_wire(sent, limits.operations_max)?;
        batch.check(limits, placement)?;
        if 2 * batch.operations.len() > limits.operations_max || 2 * bytes > limits.bytes_max {
            self.warn_of_size(&batch, bytes);
        }
        Ok(Checked { batch: batch.split(placement), bytes })
    }

    /// Says that batches come near a limit, before one is refused.
    fn warn_of_size(&self, batch: &Batch, bytes: usize) {
        let mut warned = self.warned.lock().expect("nothing panics while it holds this lock");
        if warned.is_some_and(|at| at.elapsed() < WARN_INTERVAL) {
            return;
        }
        *warned = Some(Instant::now());
        let limits = self.config.limits;
        tracing::warn!(
            batch = %batch.id,
            operations = batch.operations.len(),
            bytes,
            operations_max = limits.operations_max,
            bytes_max = limits.bytes_max,
            "a batch has used up more than half of a limit; larger ones will be refused"
        );
    }

    /// The submission of a checked batch.
    pub(crate) fn submission(
        &self,
        checked: Checked,
        deadline: Instant,
        caller: Caller<Result<v1::Outcome, CallFailure>>,
    ) -> Submission {
        let Checked { batch, bytes } = checked;
        Submission { batch, bytes, deadline, caller, entrance: self.admission.enter() }
    }

    /// Settles one batch.
    pub(crate) async fn submit(&self, sent: Bytes, origin: Origin) -> Result<v1::Outcome, Status> {
        let timeout_ms = Head::of_wire(&sent).timeout_ms;
        let deadline = self.deadline(timeout_ms, origin, Instant::now());
        self.wait_for_room(sent.len(), deadline).await.map_err(CallFailure::status)?;
        let checked = self.check(&sent).map_err(CallFailure::status)?;
        let (caller, answer) = Caller::once();
        let submission = self.submission(checked, deadline, caller);
        self.submissions.send(submission).await.map_err(|_| self.stopping().status())?;
        let answer = answer.await.unwrap_or_else(|_| Err(self.stopping()));
        answer.map_err(CallFailure::status)
    }

    /// Waits at the door: for a while if others are settled meanwhile, else until the deadline.
    async fn wait_for_room(&self, bytes: usize, deadline: Instant) -> Result<(), CallFailure> {
        if self.admission.has_room_for_call() {
            return Ok(());
        }
        let _place = self.place_at_door(bytes).ok_or_else(busy)?;
        while tokio::time::timeout(self.admission.patience(), self.admission.room_for_call()).await.is_err() {
            if self.admission.settles() {
                return Err(busy());
            }
            if Instant::now() >= deadline {
                return Err(self.nobody_settles());
            }
        }
        Ok(())
    }

    /// A place to wait at the door, for a batch of so many bytes; none if too much waits already.
    pub(crate) fn place_at_door(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let kib = 1 + bytes / 1024;
        self.at_door.clone().try_acquire_many_owned(u32::try_from(kib).ok()?).ok()
    }

    /// A batch waited at the door until its time was up. Not UNAVAILABLE: an earlier try of the same id may be under way here, and the door
    /// doesn't know of it.
    pub(crate) fn nobody_settles(&self) -> CallFailure {
        CallFailure::overloaded("no batch was decided, and none was let in, until the time was up")
    }

    /// When a batch that came at this time must be answered.
    pub(crate) fn deadline(&self, timeout_ms: u32, origin: Origin, came: Instant) -> Instant {
        let own = match timeout_ms {
            0 => self.config.timeout_default,
            wanted => Duration::from_millis(u64::from(wanted)).min(self.config.timeout_max),
        };
        origin.deadline(came, own + self.config.grace)
    }

    /// Tells an outcome.
    pub(crate) async fn get_batch(
        &self,
        request: v1::GetBatchRequest,
        origin: Origin,
    ) -> Result<v1::Outcome, Status> {
        let id =
            batch_id("batch_id", &request.batch_id).map_err(|error| CallFailure::from(error).status())?;
        if let Some(local) = &self.local
            && let Ok(Some(decision)) = local.group.read(|machine, store| machine.decision(store, id))
        {
            // It never changes, so any replica may tell it (rule R7).
            return Ok(outcome_to_wire(&decision));
        }
        let wait = Duration::from_millis(u64::from(request.wait_ms)).min(WAIT_MAX);
        let deadline = origin.deadline(Instant::now(), QUESTION_TIMEOUT + wait);
        let asked = Instant::now();
        let left = || {
            let until = (asked + wait).min(deadline);
            until.saturating_duration_since(Instant::now())
        };
        let abort_if_not_seen = request.abort_if_not_seen;
        let local = || self.query(id, left(), abort_if_not_seen);
        let remote = |mut client: SettlementClient<_>| {
            let wait_ms = left().as_millis() as u32;
            let request = v1::GetBatchRequest { batch_id: id.to_string(), abort_if_not_seen, wait_ms };
            async move { client.get_batch(forwarded(request, left() + WAY)).await }
        };
        let response = self.at_leader(deadline, origin, local, remote).await;
        match response {
            Ok(response) => response
                .outcome
                .ok_or_else(|| Status::internal("the leader gave an answer without an outcome")),
            // The wish to abort may have been taken up: nobody can say that nothing was proposed.
            Err(status) if abort_if_not_seen && status.code() == Code::Unavailable && !origin.forwarded => {
                Ok(unknown(id, status.message()))
            }
            Err(status) => Err(status),
        }
    }

    /// Asks the local driver for an outcome. If the batch is in progress, waits so long for its decision.
    async fn query(&self, id: BatchId, wait: Duration, abort: bool) -> Result<v1::GetBatchResponse, Tried> {
        let ask = |wait| self.ask(Question::Query { id, wait, abort_if_not_seen: abort });
        let mut reply = self.served(ask(false).await)?;
        if reply == Reply::InProgress && !wait.is_zero() {
            // The time limit is on the decision alone, not on the confirmation of the leadership: that one is behind us.
            if let Ok(answer) = tokio::time::timeout(wait, ask(true)).await {
                reply = self.served(answer)?;
            }
        }
        let outcome = match reply {
            Reply::Decided(decision) => outcome_to_wire(&decision),
            Reply::InProgress => {
                undecided(id, v1::UndecidedState::InProgress, "the batch is being prepared or decided")
            }
            Reply::NotSeen => undecided(
                id,
                v1::UndecidedState::NotSeen,
                "there is no trace of the id: submitting it is safe",
            ),
            Reply::Refused(refusal) => return Err(refusal_of(&refusal, "batch_id", id).into()),
            Reply::Rows { .. } | Reply::History { .. } => return Err(Tried::Final(unexpected())),
        };
        Ok(v1::GetBatchResponse { outcome: Some(outcome) })
    }

    /// Reads rows.
    pub(crate) async fn read(
        &self,
        request: v1::ReadRequest,
        origin: Origin,
    ) -> Result<v1::ReadResponse, Status> {
        let rows = rows_of(&request).map_err(CallFailure::status)?;
        let deadline = origin.deadline(Instant::now(), QUESTION_TIMEOUT);
        let local = || self.read_here(&rows);
        let remote = |mut client: SettlementClient<_>| {
            let request = forwarded(request.clone(), deadline.saturating_duration_since(Instant::now()));
            async move { client.read(request).await }
        };
        self.at_leader(deadline, origin, local, remote).await
    }

    async fn read_here(&self, rows: &[RowKey]) -> Result<v1::ReadResponse, Tried> {
        let answer = self.ask(Question::Read { rows: rows.to_vec() }).await;
        match self.served(answer)? {
            Reply::Rows { position, rows: values } => {
                let values = rows.iter().zip(&values).map(|(row, at)| row_value_to_wire(row, at)).collect();
                Ok(v1::ReadResponse { position: position.0, values })
            }
            Reply::Refused(refusal) => Err(CallFailure::of_refusal(&refusal, None).into()),
            Reply::Decided(_) | Reply::InProgress | Reply::NotSeen | Reply::History { .. } => {
                Err(Tried::Final(unexpected()))
            }
        }
    }

    /// Reads the history of a row.
    pub(crate) async fn history(
        &self,
        request: v1::HistoryRequest,
        origin: Origin,
    ) -> Result<v1::HistoryResponse, Status> {
        let (row, limit) = history_of(&request).map_err(CallFailure::status)?;
        let deadline = origin.deadline(Instant::now(), QUESTION_TIMEOUT);
        let local = || self.history_here(&row, Stamp(request.from), limit);
        let remote = |mut client: SettlementClient<_>| {
            let request = forwarded(request.clone(), deadline.saturating_duration_since(Instant::now()));
            async move { client.history(request).await }
        };
        self.at_leader(deadline, origin, local, remote).await
    }

    async fn history_here(
        &self,
        row: &RowKey,
        from: Stamp,
        limit: usize,
    ) -> Result<v1::HistoryResponse, Tried> {
        let answer = self.ask(Question::History { row: row.clone(), from, limit }).await;
        match self.served(answer)? {
            Reply::History { position, changes, next, oldest } => Ok(v1::HistoryResponse {
                position: position.0,
                entries: changes.iter().map(history_to_wire).collect(),
                next: next.unwrap_or_default().0,
                oldest: oldest.0,
            }),
            Reply::Refused(refusal) => Err(CallFailure::of_refusal(&refusal, None).into()),
            Reply::Decided(_) | Reply::InProgress | Reply::NotSeen | Reply::Rows { .. } => {
                Err(Tried::Final(unexpected()))
            }
        }
    }

    /// Lists decisions in the order of recording, none that was answered before the call missing.
    pub(crate) async fn list_here(
        &self,
        from: u64,
        limit: usize,
    ) -> Result<v1::ListDecisionsResponse, Tried> {
        let Some(local) = &self.local else { return Err(Tried::Elsewhere(None)) };
        match local.group.read_barrier().await {
            Ok(_) => {}
            Err(ReadError::NotLeader { leader }) => return Err(Tried::Elsewhere(leader)),
            Err(ReadError::Unavailable(_) | ReadError::Stopped(_)) => return Err(Tried::Elsewhere(None)),
        }
        let listed = local.group.read(|machine, store| machine.list(store, from, limit));
        let (listed, next) = listed.map_err(|error| Tried::Final(Status::internal(error.to_string())))?;
        let decisions = listed.iter().map(|listed| v1::Decision {
            position: listed.position,
            outcome: Some(outcome_to_wire(&listed.decision)),
            shards: listed.decision.shards.iter().map(|shard| shard.0).collect(),
            finished: listed.finished,
        });
        Ok(v1::ListDecisionsResponse { decisions: decisions.collect(), next: next.unwrap_or_default() })
    }

    /// Asks the local driver.
    async fn ask(&self, question: Question) -> Answer {
        let Some(local) = self.leading() else { return Err(NotServed::NotLeader) };
        let (caller, answer) = Caller::once();
        match local.driver.try_send(Request { question, caller }) {
            Ok(()) => answer.await.unwrap_or(Err(NotServed::Lost)),
            Err(mpsc::error::TrySendError::Full(_)) => Err(NotServed::Overloaded),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(NotServed::NotLeader),
        }
    }

    fn served(&self, answer: Answer) -> Result<Reply, Tried> {
        answer.map_err(|why| match why {
            NotServed::NotLeader | NotServed::Lost => {
                Tried::Elsewhere(self.leaders.hint(Some(self.config.node)).map(|hint| hint.node))
            }
            NotServed::Overloaded => CallFailure::overloaded("too many callers wait at the leader").into(),
        })
    }

    /// Asks the leader a question that may be asked twice, wherever the leader is, until there is an answer or no more time.
    pub(crate) async fn at_leader<T, L, R>(
        &self,
        deadline: Instant,
        origin: Origin,
        local: impl Fn() -> L,
        remote: impl Fn(SettlementClient<tonic::transport::Channel>) -> R,
    ) -> Result<T, Status>
    where
        L: Future<Output = Result<T, Tried>>,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let remote = |channel| {
            let client = SettlementClient::new(channel)
                .max_decoding_message_size(self.config.message_bytes_max)
                .max_encoding_message_size(self.config.message_bytes_max);
            remote(client)
        };
        self.at_leader_by(deadline, origin, local, remote).await
    }

    /// As [`Gateway::at_leader`], for any service.
    pub(crate) async fn at_leader_by<T, L, R>(
        &self,
        deadline: Instant,
        origin: Origin,
        local: impl Fn() -> L,
        remote: impl Fn(tonic::transport::Channel) -> R,
    ) -> Result<T, Status>
    where
        L: Future<Output = Result<T, Tried>>,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        loop {
            let target = if origin.forwarded { self.config.node } else { self.leaders.target() };
            let tried = async {
                if target == self.config.node {
                    return local().await;
                }
                let channel = self.leaders.channel(target).ok_or(Tried::Elsewhere(None))?;
                remote(channel).await.map(Response::into_inner).map_err(|status| tried(&status))
            };
            let hint = match tokio::time::timeout_at(deadline, tried).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Tried::Final(status))) => return Err(status),
                Ok(Err(Tried::Elsewhere(hint))) => hint,
                Err(_) => {
                    let message = "the leader didn't answer in time";
                    return Err(CallFailure::unavailable(message, self.leaders.hint(None)).status());
                }
            };
            if origin.forwarded {
                return Err(self.not_leader());
            }
            self.leaders.failed(target, hint);
            if Instant::now() + PAUSE >= deadline {
                let message = "no leader of the coordinators was found in time";
                return Err(CallFailure::unavailable(message, self.leaders.hint(None)).status());
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// "I don't lead", for another node.
    pub(crate) fn not_leader(&self) -> Status {
        CallFailure::not_leader(self.leaders.hint(Some(self.config.node))).status()
    }

    /// The node shuts down. Only for what was never handed over: the submitter answers all that it has taken.
    pub(crate) fn stopping(&self) -> CallFailure {
        let leader = self.leaders.hint(Some(self.config.node));
        CallFailure::unavailable("this node is shutting down", leader)
    }

    /// The local replica and its driver, if they lead as far as is known.
    pub(crate) fn leading(&self) -> Option<&Local> {
        self.local.as_ref().filter(|local| self.leaders.is_local() && !local.driver.is_closed())
    }
}

/// What a status from another node means for the next try.
fn tried(status: &Status) -> Tried {
    if let Some(hint) = says_not_leader(status) {
        return Tried::Elsewhere(hint);
    }
    match status.code() {
        _ if is_answer(status) => Tried::Final(Status::with_details(
            status.code(),
            status.message(),
            status.details().to_vec().into(),
        )),
        Code::InvalidArgument | Code::Internal | Code::Unimplemented => {
            Tried::Final(Status::new(status.code(), status.message()))
        }
        // A broken connection, a node that ends.
        _ => Tried::Elsewhere(None),
    }
}

/// Why a batch is not let in.
pub(crate) fn busy() -> CallFailure {
    CallFailure::overloaded("this node is busy with as many batches as it can settle in good time")
}

fn unexpected() -> Status {
    Status::internal("the leader's core gave an answer of another kind than the question")
}

/// A request to another node's gateway, which must not forward it again.
pub(crate) fn forwarded<T>(message: T, timeout: Duration) -> TonicRequest<T> {
    let mut request = TonicRequest::new(message);
    request.metadata_mut().insert(FORWARDED, MetadataValue::from_static("1"));
    request.set_timeout(timeout.max(Duration::from_millis(10)));
    request
}

/// The rows of a read, checked.
fn rows_of(request: &v1::ReadRequest) -> Result<Vec<RowKey>, CallFailure> {
    let count = request.rows.len();
    if count == 0 || count > ROWS_MAX {
        let problem = format!("has {count} rows: 1 to {ROWS_MAX} are allowed");
        return Err(CallFailure::invalid("rows", problem));
    }
    let row = |(place, row): (usize, &v1::Row)| row_in(&format!("rows[{place}]"), row.clone());
    request.rows.iter().enumerate().map(row).collect()
}

fn row_in(field: &str, row: v1::Row) -> Result<RowKey, CallFailure> {
    row_from_wire(row).map_err(|BatchError { field: inner, problem }| {
        CallFailure::invalid(format!("{field}.{inner}"), problem)
    })
}

fn history_of(request: &v1::HistoryRequest) -> Result<(RowKey, usize), CallFailure> {
    let row = request.row.clone().ok_or_else(|| CallFailure::invalid("row", "is missing"))?;
    Ok((row_in("row", row)?, limit_of(request.limit, LIST_DEFAULT)?))
}

/// A limit on a list: 0 is the default.
pub(crate) fn limit_of(limit: u32, default: u32) -> Result<usize, CallFailure> {
    match limit {
        0 => Ok(default as usize),
        1..=LIST_MAX => Ok(limit as usize),
        _ => Err(CallFailure::invalid("limit", format!("is {limit}: 1 to {LIST_MAX} are allowed"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_understood() {
        assert_eq!(grpc_timeout("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(grpc_timeout("2S"), Some(Duration::from_secs(2)));
        assert_eq!(grpc_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "S", "5", "123456789S", "-1S", "5x"] {
            assert_eq!(grpc_timeout(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn wrong_rows_and_limits_are_named() {
        let row = |partition: &str| v1::Row { partition: partition.into(), name: "x".into() };
        let request = v1::ReadRequest { rows: vec![row("a"), row("")] };
        assert_eq!(rows_of(&request).unwrap_err().field.as_deref(), Some("rows[1].partition"));
        assert_eq!(rows_of(&v1::ReadRequest::default()).unwrap_err().field.as_deref(), Some("rows"));
        let twice = v1::ReadRequest { rows: vec![row("a"), row("a")] };
        assert_eq!(rows_of(&twice).unwrap().len(), 2, "a row may be read twice");
        assert_eq!(limit_of(0, 100).unwrap(), 100);
        assert!(limit_of(10_001, 100).is_err());
    }

    #[test]
    fn only_our_own_word_is_final() {
        assert!(matches!(tried(&Status::unavailable("tcp connect error")), Tried::Elsewhere(None)));
        let ours = CallFailure::overloaded("full").status();
        assert!(matches!(tried(&ours), Tried::Final(status) if status.code() == Code::ResourceExhausted));
        assert!(matches!(tried(&CallFailure::not_leader(None).status()), Tried::Elsewhere(None)));
    }
}
