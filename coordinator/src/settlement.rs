//! The `Settlement` service: what trading services call.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, Stream};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use verdict_proto::{
    convert::outcome_to_wire,
    v1::{self, settlement_server::Settlement, submit_stream_response},
};
use verdict_protocol::{ids::BatchId, leader::Reply};

use crate::{
    caller::Caller,
    driver::{Answer, NotServed, Question, Request as DriverRequest},
    failure::CallFailure,
    gateway::{Gateway, Local, Origin, busy},
    submitter::{NOT_LEADER_CODE, SHARD_SILENT, Submitted, refusal_of, unknown},
};

/// Answers of one stream that wait for the transport.
const OUTGOING: usize = 256;
/// Answers taken at once.
const ANSWERS_PER_ROUND: usize = 1024;
/// So often it is looked who has waited at the door for too long.
const LOOK_AT_DOOR: Duration = Duration::from_millis(25);
/// Messages read at once.
const MESSAGES_PER_ROUND: usize = 64;

/// Serves `Settlement` on one node.
#[derive(Clone)]
pub struct SettlementService {
    pub(crate) gateway: Arc<Gateway>,
    /// Batches in flight on one stream; while there are so many, the stream is read no further.
    pub(crate) window: usize,
}

type Responses = mpsc::Sender<Result<v1::SubmitStreamResponse, Status>>;

#[tonic::async_trait]
impl Settlement for SettlementService {
    async fn submit(
        &self,
        request: Request<v1::SubmitRequest>,
    ) -> Result<Response<v1::SubmitResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let outcome = self.gateway.submit(request.into_inner().batch, origin).await?;
        Ok(Response::new(v1::SubmitResponse { outcome: Some(outcome) }))
    }

    type SubmitStreamStream = Pin<Box<dyn Stream<Item = Result<v1::SubmitStreamResponse, Status>> + Send>>;

    async fn submit_stream(
        &self,
        request: Request<Streaming<v1::SubmitStreamRequest>>,
    ) -> Result<Response<Self::SubmitStreamStream>, Status> {
        let origin = Origin::of(request.metadata());
        let (responses, outgoing) = mpsc::channel(OUTGOING);
        let stream = SubmitStream::new(self.gateway.clone(), self.window, request.into_inner(), responses);
        if origin.forwarded {
            let local = self.gateway.leading().cloned();
            let local = local.ok_or_else(|| self.gateway.not_leader())?;
            tokio::spawn(stream.run(Forwarded { local }));
        } else {
            tokio::spawn(stream.run(Direct { origin }));
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn get_batch(
        &self,
        request: Request<v1::GetBatchRequest>,
    ) -> Result<Response<v1::GetBatchResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let outcome = self.gateway.get_batch(request.into_inner(), origin).await?;
        Ok(Response::new(v1::GetBatchResponse { outcome: Some(outcome) }))
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Result<Response<v1::ReadResponse>, Status> {
        let origin = Origin::of(request.metadata());
        Ok(Response::new(self.gateway.read(request.into_inner(), origin).await?))
    }

    async fn history(
        &self,
        request: Request<v1::HistoryRequest>,
    ) -> Result<Response<v1::HistoryResponse>, Status> {
        let origin = Origin::of(request.metadata());
        Ok(Response::new(self.gateway.history(request.into_inner(), origin).await?))
    }
}

/// Where the batches of a stream go.
trait Target: Send + 'static {
    /// How they are answered there.
    type Answer: Send + 'static;

    /// Whether they have to be let in here: where they come from another node, they were let in there.
    const AT_DOOR: bool;

    /// Hands one over. Where nobody takes it any more, it is answered at once.
    fn submit(
        &self,
        gateway: &Gateway,
        checked: crate::gateway::Checked,
        came: Instant,
        caller: Caller<Self::Answer>,
    ) -> impl Future<Output = ()> + Send;

    /// The answer as it is sent. The second value is true if the stream should end.
    fn result(&self, id: BatchId, answer: Self::Answer) -> (submit_stream_response::Result, bool);
}

/// A client's stream: through the submitter, which finds the leader.
struct Direct {
    origin: Origin,
}

impl Target for Direct {
    type Answer = Submitted;

    const AT_DOOR: bool = true;

    async fn submit(
        &self,
        gateway: &Gateway,
        checked: crate::gateway::Checked,
        came: Instant,
        caller: Caller<Submitted>,
    ) {
        // The time limit of the whole stream is none of a single batch.
        let origin = Origin { timeout: None, ..self.origin };
        let deadline = gateway.deadline(checked.batch.timeout_ms, origin, came);
        let submission = gateway.submission(checked, deadline, caller);
        if let Err(mpsc::error::SendError(submission)) = gateway.submissions.send(submission).await {
            submission.caller.answer(Err(gateway.stopping()));
        }
    }

    fn result(&self, _: BatchId, answer: Submitted) -> (submit_stream_response::Result, bool) {
        let result = match answer {
            Ok(outcome) => submit_stream_response::Result::Outcome(outcome),
            Err(failure) => submit_stream_response::Result::Error(failure.call_error()),
        };
        (result, false)
    }
}

/// Another node's stream: straight to the local driver, or back.
struct Forwarded {
    local: Local,
}

impl Target for Forwarded {
    type Answer = Answer;

    const AT_DOOR: bool = false;

    async fn submit(
        &self,
        _: &Gateway,
        checked: crate::gateway::Checked,
        _: Instant,
        caller: Caller<Answer>,
    ) {
        let question = Question::Submit { batch: checked.batch, hash: checked.hash };
        let request = DriverRequest { question, caller };
        if let Err(mpsc::error::SendError(request)) = self.local.driver.send(request).await {
            request.caller.answer(Err(NotServed::NotLeader));
        }
    }

    fn result(&self, id: BatchId, answer: Answer) -> (submit_stream_response::Result, bool) {
        forwarded_result(id, answer)
    }
}

/// The answer of the local driver, as it is sent to another node.
fn forwarded_result(id: BatchId, answer: Answer) -> (submit_stream_response::Result, bool) {
    let error = |failure: CallFailure| submit_stream_response::Result::Error(failure.call_error());
    match answer {
        Ok(Reply::Decided(decision)) => {
            (submit_stream_response::Result::Outcome(outcome_to_wire(&decision)), false)
        }
        Ok(Reply::Refused(refusal)) => (error(refusal_of(&refusal, "batch.id", id)), false),
        Ok(Reply::InProgress) => (submit_stream_response::Result::Outcome(unknown(id, SHARD_SILENT)), false),
        Ok(Reply::NotSeen | Reply::Rows { .. } | Reply::History { .. }) => {
            unreachable!("a submission is answered by what became of it")
        }
        Err(NotServed::Overloaded) => (error(CallFailure::overloaded("too many callers wait")), false),
        Err(NotServed::NotLeader) => {
            let failure = CallFailure::other(NOT_LEADER_CODE, "NOT_LEADER", "this node doesn't lead");
            (error(failure), true)
        }
        Err(NotServed::Lost) => {
            let message = "the leadership ended while the batch was under way";
            (submit_stream_response::Result::Outcome(unknown(id, message)), true)
        }
    }
}

/// One stream of batches. Each is answered on its own, as soon as it is decided; what is in flight is bounded by reading no more.
struct SubmitStream {
    gateway: Arc<Gateway>,
    window: usize,
    incoming: Streaming<v1::SubmitStreamRequest>,
    responses: Responses,
    /// Ids in flight, as they were sent.
    in_flight: HashMap<u64, BatchId>,
    /// Not let in yet, in order.
    at_door: VecDeque<Waiting>,
    last_tag: u64,
}

impl Waiting {
    fn deadline(&self, gateway: &Gateway) -> Instant {
        let timeout_ms = self.message.batch.as_ref().map_or(0, |batch| batch.timeout_ms);
        gateway.deadline(timeout_ms, Origin::EMBEDDED, self.came)
    }
}

/// A batch that waits at the door.
struct Waiting {
    came: Instant,
    message: v1::SubmitStreamRequest,
    /// None: too many wait already.
    place: Option<OwnedSemaphorePermit>,
}

impl SubmitStream {
    fn new(
        gateway: Arc<Gateway>,
        window: usize,
        incoming: Streaming<v1::SubmitStreamRequest>,
        responses: Responses,
    ) -> SubmitStream {
        let (in_flight, at_door) = (HashMap::new(), VecDeque::new());
        SubmitStream { gateway, window, incoming, responses, in_flight, at_door, last_tag: 0 }
    }

    /// Until the client has sent all and has all answers, or is gone. What was handed over goes on without it.
    async fn run<T: Target>(mut self, target: T) {
        let (sender, mut answers) = mpsc::channel::<(u64, T::Answer)>(self.window);
        let mut round = Vec::new();
        let mut reading = true;
        let mut ending = false;
        let mut broken = None;
        loop {
            if !self.let_in(&target, &sender).await {
                return;
            }
            if self.in_flight.is_empty() && self.at_door.is_empty() && (!reading || ending) {
                break;
            }
            let wants_more = reading && !ending && self.has_room();
            tokio::select! {
                () = self.responses.closed() => return,
                _ = answers.recv_many(&mut round, ANSWERS_PER_ROUND), if !self.in_flight.is_empty() => {
                    for (tag, answer) in round.drain(..) {
                        let Some(id) = self.in_flight.remove(&tag) else { continue };
                        let (result, end) = target.result(id, answer);
                        ending |= end;
                        if !self.respond(id.to_string(), result).await {
                            return;
                        }
                    }
                }
                () = self.gateway.admission.room(), if !self.at_door.is_empty() => {}
                () = sleep(LOOK_AT_DOOR), if !self.at_door.is_empty() => {}
                message = self.incoming.message(), if wants_more => {
                    // And what else is there already, without looking at all the rest for each of them.
                    let (came, mut next, mut taken) = (Instant::now(), Some(message), 0);
                    while let Some(message) = next.take() {
                        match message {
                            Ok(Some(message)) => {
                                if !self.came_in(message, came, &target, &sender).await {
                                    return;
                                }
                                taken += 1;
                                if taken < MESSAGES_PER_ROUND && self.has_room() {
                                    next = self.incoming.message().now_or_never();
                                }
                            }
                            Ok(None) => reading = false,
                            Err(status) => {
                                // Too large a message, or garbage: no other can be found behind it. What is in flight is
                                // answered first.
                                tracing::debug!(%status, "a stream of batches broke");
                                broken = Some(status);
                                reading = false;
                            }
                        }
                    }
                }
            }
        }
        if let Some(status) = broken {
            let _ = self.responses.send(Err(unreadable(&status))).await;
        } else if ending {
            let _ = self.responses.send(Err(self.gateway.not_leader())).await;
        }
    }

    /// Whether one more may be read.
    fn has_room(&self) -> bool {
        self.in_flight.len() + self.at_door.len() < self.window
            && self.at_door.back().is_none_or(|last| last.place.is_some())
    }

    /// A batch was read: it is taken, or waits at the door. False: the stream is over.
    async fn came_in<T: Target>(
        &mut self,
        message: v1::SubmitStreamRequest,
        came: Instant,
        target: &T,
        sender: &mpsc::Sender<(u64, T::Answer)>,
    ) -> bool {
        if T::AT_DOOR && !(self.at_door.is_empty() && self.gateway.admission.has_room()) {
            let place = self.gateway.place_at_door(message.batch.as_ref());
            self.at_door.push_back(Waiting { came, message, place });
            return true;
        }
        self.take(message, came, target, sender).await
    }

    /// Lets in those that wait at the door, as far as there is room, and refuses those that have waited for long. False: the stream
    /// is over.
    async fn let_in<T: Target>(&mut self, target: &T, sender: &mpsc::Sender<(u64, T::Answer)>) -> bool {
        while let Some(first) = self.at_door.front() {
            let admission = &self.gateway.admission;
            let refused = match &first.place {
                None => Some(busy().call_error()),
                Some(_) if admission.has_room() => None,
                Some(_) if first.came.elapsed() > admission.patience() && admission.settles() => {
                    Some(busy().call_error())
                }
                Some(_) if first.deadline(&self.gateway) <= Instant::now() => {
                    Some(self.gateway.nobody_settles().call_error())
                }
                Some(_) => break,
            };
            let Some(Waiting { message, came, .. }) = self.at_door.pop_front() else { break };
            let goes_on = match refused {
                None => self.take(message, came, target, sender).await,
                Some(error) => {
                    let id = message.batch.map(|batch| batch.id).unwrap_or_default();
                    self.respond(id, submit_stream_response::Result::Error(error)).await
                }
            };
            if !goes_on {
                return false;
            }
        }
        true
    }

    /// Takes one batch. False: the stream is over.
    async fn take<T: Target>(
        &mut self,
        message: v1::SubmitStreamRequest,
        came: Instant,
        target: &T,
        sender: &mpsc::Sender<(u64, T::Answer)>,
    ) -> bool {
        let sent_id = message.batch.as_ref().map(|batch| batch.id.clone()).unwrap_or_default();
        match self.gateway.check(message.batch) {
            Err(failure) => {
                let error = submit_stream_response::Result::Error(failure.call_error());
                self.respond(sent_id, error).await
            }
            Ok(checked) => {
                self.last_tag += 1;
                let tag = self.last_tag;
                self.in_flight.insert(tag, checked.batch.id);
                let caller = Caller::Many { tag, sender: sender.clone() };
                target.submit(&self.gateway, checked, came, caller).await;
                true
            }
        }
    }

    async fn respond(&self, batch_id: String, result: submit_stream_response::Result) -> bool {
        let response = v1::SubmitStreamResponse { batch_id, result: Some(result) };
        self.responses.send(Ok(response)).await.is_ok()
    }
}
/// The end of a stream on which something came that is no request, or too large a one.
fn unreadable(status: &Status) -> Status {
    let message =
        format!("what came next on this stream can't be read, so it ends here: {}", status.message());
    match status.code() {
        Code::OutOfRange | Code::ResourceExhausted | Code::Internal | Code::InvalidArgument => {
            CallFailure::invalid("batch", message).status()
        }
        code => Status::new(code, message),
    }
}

#[cfg(test)]
mod tests {
    use verdict_protocol::ids::Millis;

    use super::*;

    /// Whoever hears NOT_LEADER takes it that the batch was given to nobody, and may say so to its caller.
    #[test]
    fn a_batch_that_was_under_way_is_unknown_to_the_node_that_forwarded_it() {
        let id = BatchId::from_parts(Millis(1), [0; 10]);
        let (lost, ends) = forwarded_result(id, Err(NotServed::Lost));
        let submit_stream_response::Result::Outcome(v1::Outcome {
            result: Some(v1::outcome::Result::Undecided(undecided)),
            ..
        }) = lost
        else {
            panic!("{lost:?}")
        };
        assert_eq!((undecided.state(), ends), (v1::UndecidedState::Unknown, true));
        let (not_leader, ends) = forwarded_result(id, Err(NotServed::NotLeader));
        let code = |said| match said {
            submit_stream_response::Result::Error(error) => error.code,
            submit_stream_response::Result::Outcome(outcome) => panic!("{outcome:?}"),
        };
        assert_eq!((code(not_leader), ends), (NOT_LEADER_CODE as i32, true));
        let (overloaded, ends) = forwarded_result(id, Err(NotServed::Overloaded));
        assert_eq!((code(overloaded), ends), (Code::ResourceExhausted as i32, false));
    }
}
