//! The `Forward` service: batches that another node took, for the driver here.
//!
//! They were let in there, checked as wholes, and made ready for their shards. Here is looked only whether the shards will take their parts.
//!
//! Invariant: a stream that is ended with a word of this node has been answered all that was given to the driver. What has no answer was
//! given to nobody.

use std::{collections::HashMap, fmt::Display, pin::Pin, sync::Arc};

use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use verdict_proto::{
    convert::{outcome_to_wire, split_from_wire},
    v1::{self, SubmitAnswer, forward_server, submit_answer::Result as Said},
};
use verdict_protocol::{ids::BatchId, leader::Reply};

use crate::{
    caller::Caller,
    driver::{Answer, NotServed, Question, Request as DriverRequest},
    failure::CallFailure,
    gateway::{Gateway, Local},
    settlement::{ANSWERS_PER_ROUND, OUTGOING, tell},
    submitter::{FORWARD_BATCHES_MAX, NOT_LEADER_CODE, SHARD_SILENT, refusal_of, unknown},
};

/// Serves `Forward` on one node.
#[derive(Clone)]
pub struct ForwardService {
    pub(crate) gateway: Arc<Gateway>,
    /// Batches in flight on one stream; while there are so many, the stream is read no further.
    pub(crate) window: usize,
}

#[tonic::async_trait]
impl forward_server::Forward for ForwardService {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<v1::ForwardResponse, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::ForwardRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let local = self.gateway.leading().cloned().ok_or_else(|| self.gateway.not_leader())?;
        let (responses, outgoing) = mpsc::channel(OUTGOING);
        let (sender, answers) = mpsc::channel(self.window + FORWARD_BATCHES_MAX);
        let stream = ForwardStream {
            gateway: self.gateway.clone(),
            local,
            window: self.window,
            incoming: request.into_inner(),
            sender,
            in_flight: HashMap::new(),
            last_tag: 0,
            said: Vec::new(),
            responses,
        };
        tokio::spawn(stream.run(answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// The stream of another node.
struct ForwardStream {
    gateway: Arc<Gateway>,
    local: Local,
    window: usize,
    incoming: Streaming<v1::ForwardRequest>,
    /// Where answers come from.
    sender: mpsc::Sender<(u64, Answer)>,
    in_flight: HashMap<u64, BatchId>,
    last_tag: u64,
    /// Answers that are to be sent.
    said: Vec<SubmitAnswer>,
    responses: mpsc::Sender<Result<v1::ForwardResponse, Status>>,
}

impl ForwardStream {
    /// Until the other node has sent all and has all answers, is gone, or has to look for another leader.
    async fn run(mut self, mut answers: mpsc::Receiver<(u64, Answer)>) {
        let mut round = Vec::new();
        let mut reading = true;
        let mut end = None;
        loop {
            if !tell(&mut self.said, &self.responses, |answers| v1::ForwardResponse { answers }).await {
                return;
            }
            if self.in_flight.is_empty() && !reading {
                break;
            }
            let wants_more = reading && self.in_flight.len() < self.window;
            tokio::select! {
                () = self.responses.closed() => return,
                _ = answers.recv_many(&mut round, ANSWERS_PER_ROUND), if !self.in_flight.is_empty() => {
                    for (tag, answer) in round.drain(..) {
                        let Some(id) = self.in_flight.remove(&tag) else { continue };
                        let (answer, is_over) = forwarded_answer(id, answer);
                        self.said.push(answer);
                        if is_over {
                            reading = false;
                            end.get_or_insert_with(|| self.gateway.not_leader());
                        }
                    }
                }
                message = self.incoming.message(), if wants_more => match message {
                    Ok(Some(message)) => {
                        if let Err(status) = self.take(message).await {
                            reading = false;
                            end = Some(status);
                        }
                    }
                    Ok(None) | Err(_) => reading = false,
                }
            }
        }
        if let Some(status) = end {
            let _ = self.responses.send(Err(status)).await;
        }
    }

    /// Hands the batches of a message to the driver. An error: nothing of the message was.
    async fn take(&mut self, message: v1::ForwardRequest) -> Result<(), Status> {
        let placement = self.gateway.config.placement;
        if message.shards != placement.shards {
            let message = format!(
                "the leader is configured for {} shards and this node for {}: correct the configuration of one of them",
                placement.shards, message.shards
            );
            return Err(CallFailure::other(Code::FailedPrecondition, "OTHER_PLACEMENT", message).status());
        }
        if message.batches.len() > FORWARD_BATCHES_MAX {
            return Err(malformed(format!("it has {} batches", message.batches.len())));
        }
        let batches = message.batches.into_iter().map(|batch| split_from_wire(batch, placement));
        let batches = batches.collect::<Result<Vec<_>, _>>();
        for batch in batches.map_err(malformed)? {
            // It would end the stream to its shard, and again whenever it was sent.
            if let Err(error) = batch.check(placement) {
                let failure = CallFailure::invalid("batch", error.to_string());
                let result = Some(Said::Error(failure.call_error()));
                self.said.push(SubmitAnswer { batch_id: batch.id.to_string(), result });
                continue;
            }
            self.last_tag += 1;
            self.in_flight.insert(self.last_tag, batch.id);
            let caller = Caller::Many { tag: self.last_tag, sender: self.sender.clone() };
            let request = DriverRequest { question: Question::Submit { batch }, caller };
            if let Err(mpsc::error::SendError(request)) = self.local.driver.send(request).await {
                request.caller.answer(Err(NotServed::NotLeader));
            }
        }
        Ok(())
    }
}

fn malformed(why: impl Display) -> Status {
    let message = format!("a message with forwarded batches is malformed: {why}");
    CallFailure::other(Code::InvalidArgument, "MALFORMED", message).status()
}

/// The answer of the local driver, as it is sent to another node. The second value is true if the stream should end.
fn forwarded_answer(id: BatchId, answer: Answer) -> (SubmitAnswer, bool) {
    let error = |failure: CallFailure| Said::Error(failure.call_error());
    let (said, is_over) = match answer {
        Ok(Reply::Decided(decision)) => (Said::Outcome(outcome_to_wire(&decision)), false),
        Ok(Reply::Refused(refusal)) => (error(refusal_of(&refusal, "batch.id", id)), false),
        Ok(Reply::InProgress) => (Said::Outcome(unknown(id, SHARD_SILENT)), false),
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
            (Said::Outcome(unknown(id, message)), true)
        }
    };
    (SubmitAnswer { batch_id: id.to_string(), result: Some(said) }, is_over)
}

#[cfg(test)]
mod tests {
    use verdict_protocol::ids::Millis;

    use super::*;

    /// Whoever hears NOT_LEADER takes it that the batch was given to nobody, and may say so to its caller.
    #[test]
    fn a_batch_that_was_under_way_is_unknown_to_the_node_that_forwarded_it() {
        let id = BatchId::from_parts(Millis(1), [0; 10]);
        let (lost, ends) = forwarded_answer(id, Err(NotServed::Lost));
        let Some(Said::Outcome(v1::Outcome {
            result: Some(v1::outcome::Result::Undecided(undecided)), ..
        })) = lost.result
        else {
            panic!("{lost:?}")
        };
        assert_eq!((undecided.state(), ends), (v1::UndecidedState::Unknown, true));
        let (not_leader, ends) = forwarded_answer(id, Err(NotServed::NotLeader));
        let code = |answer: SubmitAnswer| match answer.result {
            Some(Said::Error(error)) => error.code,
            other => panic!("{other:?}"),
        };
        assert_eq!((code(not_leader), ends), (NOT_LEADER_CODE as i32, true));
        let (overloaded, ends) = forwarded_answer(id, Err(NotServed::Overloaded));
        assert_eq!((code(overloaded), ends), (Code::ResourceExhausted as i32, false));
    }
}
