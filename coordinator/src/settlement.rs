//! The `Settlement` service: what trading services call.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, Stream};
use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use verdict_proto::v1::{self, SubmitAnswer, settlement_server::Settlement, submit_answer};
use verdict_protocol::{ids::BatchId, wire::Head};

use crate::{
    caller::Caller,
    failure::CallFailure,
    gateway::{Checked, Gateway, Origin, busy},
    submitter::Submitted,
};

/// Messages with answers of one stream that wait for the transport.
pub(crate) const OUTGOING: usize = 64;
/// Answers taken at once.
pub(crate) const ANSWERS_PER_ROUND: usize = 1024;
/// A message is closed when its answers take so many bytes: clients refuse messages of some MiB.
const ANSWER_BYTES: usize = 256 << 10;
/// So often it is looked who has waited at the door for too long.
const LOOK_AT_DOOR: Duration = Duration::from_millis(25);
/// What is read at once: no more messages once there is one of these.
const MESSAGES_PER_ROUND: usize = 64;
const BATCHES_PER_ROUND: usize = 1024;
const BYTES_PER_ROUND: usize = 1 << 20;
/// A message with more batches ends the stream: each takes memory before anything is known of it.
const BATCHES_PER_MESSAGE_MAX: usize = 65_536;

/// Serves `Settlement` on one node.
#[derive(Clone)]
pub struct SettlementService {
    pub(crate) gateway: Arc<Gateway>,
    /// Batches in flight on one stream; while there are so many, no more are taken from it.
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
        let (sender, answers) = mpsc::channel(self.window);
        let stream = SubmitStream {
            gateway: self.gateway.clone(),
            window: self.window,
            // The time limit of the whole stream is none of a single batch.
            origin: Origin { timeout: None, ..origin },
            incoming: request.into_inner(),
            sender,
            unread: VecDeque::new(),
            came: Instant::now(),
            at_door: VecDeque::new(),
            in_flight: HashMap::new(),
            last_tag: 0,
            said: Vec::new(),
            responses,
        };
        tokio::spawn(stream.run(answers));
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

/// One stream of batches. Each is answered on its own, as soon as it is decided; what is in flight is bounded by reading no more.
struct SubmitStream {
    gateway: Arc<Gateway>,
    window: usize,
    origin: Origin,
    incoming: Streaming<v1::SubmitStreamRequest>,
    /// Where answers come from.
    sender: mpsc::Sender<(u64, Submitted)>,
    /// Batches that have come and were not looked at yet.
    unread: VecDeque<Bytes>,
    /// When the last of them came.
    came: Instant,
    /// Not let in yet, in order.
    at_door: VecDeque<Waiting>,
    /// Ids in flight, as they were sent.
    in_flight: HashMap<u64, BatchId>,
    last_tag: u64,
    /// Answers that are to be sent.
    said: Vec<SubmitAnswer>,
    responses: Responses,
}

/// A batch that waits at the door.
struct Waiting {
    came: Instant,
    batch: Bytes,
    /// None: too many wait already.
    place: Option<OwnedSemaphorePermit>,
}

impl SubmitStream {
    /// Until the client has sent all and has all answers, or is gone. What was handed over goes on without it.
    async fn run(mut self, mut answers: mpsc::Receiver<(u64, Submitted)>) {
        let mut round = Vec::new();
        let mut reading = true;
        let mut broken = None;
        loop {
            self.let_in().await;
            self.look_at_unread().await;
            if !tell(&mut self.said, &self.responses, |answers| v1::SubmitStreamResponse { answers }).await {
                return;
            }
            if !self.unread.is_empty() && self.has_room() {
                continue;
            }
            let is_done = self.in_flight.is_empty() && self.at_door.is_empty() && self.unread.is_empty();
            if is_done && !reading {
                break;
            }
            let wants_more = reading && self.unread.is_empty() && self.has_room();
            tokio::select! {
                () = self.responses.closed() => return,
                _ = answers.recv_many(&mut round, ANSWERS_PER_ROUND), if !self.in_flight.is_empty() => {
                    round.drain(..).for_each(|(tag, answer)| self.answered(tag, answer));
                }
                () = self.gateway.admission.room(), if !self.at_door.is_empty() => {}
                () = sleep(LOOK_AT_DOOR), if !self.at_door.is_empty() => {}
                message = self.incoming.message(), if wants_more => {
                    self.came = Instant::now();
                    // And what else is there already, without looking at all the rest for each of them.
                    let (mut next, mut taken, mut bytes) = (Some(message), 0, 0);
                    while let Some(message) = next.take() {
                        match message {
                            Ok(Some(message)) if message.batches.len() > BATCHES_PER_MESSAGE_MAX => {
                                let many = message.batches.len();
                                broken = Some(Status::invalid_argument(format!("it has {many} batches")));
                                reading = false;
                            }
                            Ok(Some(message)) => {
                                taken += 1;
                                bytes += message.batches.iter().map(Bytes::len).sum::<usize>();
                                self.unread.extend(message.batches);
                                if taken < MESSAGES_PER_ROUND
                                    && self.unread.len() < BATCHES_PER_ROUND
                                    && bytes < BYTES_PER_ROUND
                                {
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
        }
    }

    /// Whether one more may be taken.
    fn has_room(&self) -> bool {
        self.in_flight.len() + self.at_door.len() < self.window
            && self.at_door.back().is_none_or(|last| last.place.is_some())
    }

    /// Takes what has come, as far as there is room, or lets it wait at the door. When there is much to be told, that comes first.
    async fn look_at_unread(&mut self) {
        while self.has_room()
            && self.said.len() < ANSWERS_PER_ROUND
            && let Some(batch) = self.unread.pop_front()
        {
            if self.at_door.is_empty() && self.gateway.admission.has_room() {
                self.take(&batch, self.came).await;
                continue;
            }
            let place = self.gateway.place_at_door(batch.len());
            // Without the rest of the message that it came with.
            let batch = Bytes::copy_from_slice(&batch);
            self.at_door.push_back(Waiting { came: self.came, batch, place });
        }
    }

    /// Lets in those that wait at the door, as far as there is room, and refuses those that have waited for long.
    async fn let_in(&mut self) {
        while let Some(first) = self.at_door.front() {
            let admission = &self.gateway.admission;
            let refused = match &first.place {
                None => Some(busy()),
                Some(_) if admission.has_room() => None,
                Some(_) if first.came.elapsed() > admission.patience() && admission.settles() => Some(busy()),
                Some(_) if self.deadline(first) <= Instant::now() => Some(self.gateway.nobody_settles()),
                Some(_) => break,
            };
            let Some(Waiting { batch, came, .. }) = self.at_door.pop_front() else { break };
            match refused {
                None => self.take(&batch, came).await,
                Some(failure) => self.refuse(&batch, failure),
            }
        }
    }

    fn deadline(&self, waiting: &Waiting) -> Instant {
        self.gateway.deadline(Head::of_wire(&waiting.batch).timeout_ms, self.origin, waiting.came)
    }

    /// Takes one batch, and hands it to the submitter.
    async fn take(&mut self, batch: &Bytes, came: Instant) {
        let checked = match self.gateway.check(batch) {
            Ok(checked) => checked,
            Err(failure) => return self.refuse(batch, failure),
        };
        let Checked { batch, .. } = &checked;
        self.last_tag += 1;
        self.in_flight.insert(self.last_tag, batch.id);
        let deadline = self.gateway.deadline(batch.timeout_ms, self.origin, came);
        let caller = Caller::Many { tag: self.last_tag, sender: self.sender.clone() };
        let submission = self.gateway.submission(checked, deadline, caller);
        if let Err(mpsc::error::SendError(submission)) = self.gateway.submissions.send(submission).await {
            submission.caller.answer(Err(self.gateway.stopping()));
        }
    }

    fn answered(&mut self, tag: u64, answer: Submitted) {
        let Some(id) = self.in_flight.remove(&tag) else { return };
        self.said.push(submit_answer(id.to_string(), answer));
    }

    fn refuse(&mut self, batch: &Bytes, failure: CallFailure) {
        self.said.push(submit_answer(Head::of_wire(batch).id.to_owned(), Err(failure)));
    }
}

/// An answer to one batch of a stream.
fn submit_answer(batch_id: String, answer: Submitted) -> SubmitAnswer {
    let result = match answer {
        Ok(outcome) => submit_answer::Result::Outcome(outcome),
        Err(failure) => submit_answer::Result::Error(failure.call_error()),
    };
    SubmitAnswer { batch_id, result: Some(result) }
}

/// Sends answers, in as few messages as they fit into. False: the stream is over.
pub(crate) async fn tell<M>(
    said: &mut Vec<SubmitAnswer>,
    responses: &mpsc::Sender<Result<M, Status>>,
    message: impl Fn(Vec<SubmitAnswer>) -> M,
) -> bool {
    let mut left = std::mem::take(said).into_iter().peekable();
    while left.peek().is_some() {
        let (mut answers, mut bytes) = (Vec::new(), 0);
        while bytes < ANSWER_BYTES
            && let Some(answer) = left.next()
        {
            bytes += answer.encoded_len();
            answers.push(answer);
        }
        if responses.send(Ok(message(answers))).await.is_err() {
            return false;
        }
    }
    true
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
    use super::*;

    fn answer(bytes: usize) -> SubmitAnswer {
        let message = "x".repeat(bytes);
        let error = v1::CallError { message, ..Default::default() };
        SubmitAnswer { batch_id: "id".to_owned(), result: Some(submit_answer::Result::Error(error)) }
    }

    #[tokio::test]
    async fn answers_share_messages_that_stay_small() {
        let (sender, mut messages) = mpsc::channel(100);
        let mut said: Vec<_> = (0..100).map(|place| answer(place * 1000)).collect();
        let all = said.clone();
        assert!(tell(&mut said, &sender, |answers| v1::SubmitStreamResponse { answers }).await);
        drop(sender);
        let (mut told, mut count) = (Vec::new(), 0);
        while let Some(message) = messages.recv().await {
            let message = message.unwrap();
            assert!(message.encoded_len() < ANSWER_BYTES + 100_000);
            told.extend(message.answers);
            count += 1;
        }
        assert!(said.is_empty() && told == all, "each is told once, in order");
        assert!((10..30).contains(&count), "{count} messages for {} bytes", 100 * 99 * 500);
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_is_over() {
        let (sender, messages) = mpsc::channel(1);
        drop(messages);
        let mut said = vec![answer(1)];
        assert!(!tell(&mut said, &sender, |answers| v1::SubmitStreamResponse { answers }).await);
    }
}
