//! The one task of a node that brings submissions to the leader, wherever it is, until each has an answer or its time is up.
//!
//! It is detached from the callers: one who hangs up changes nothing. To another node it keeps one long-lived stream with many
//! batches in flight. A submission is tried again under the same id, which is always safe, whenever its leader is lost.
//!
//! Invariants:
//! - "Nothing was proposed" (UNAVAILABLE, RESOURCE_EXHAUSTED) is said only if no try of the submission was ever given to a core, or
//!   each that was has been refused by it. Otherwise the answer is UNKNOWN. A submission that waits behind another one with its id
//!   takes part in what became of that one's tries: a caller who gave up and tries again must not hear less than is known here.
//! - Of the submissions with one id one is under way at a time, and all that wait have the same contents: others are refused at
//!   the door.
//! - Submissions that wait are bounded in number and bytes; more are refused at once.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};
use verdict_proto::{
    convert::{batch_id, outcome_to_wire, split_to_wire},
    v1::{self, SubmitAnswer, forward_client::ForwardClient, submit_answer::Result as Said},
};
use verdict_protocol::{
    batch::{Placement, SplitBatch},
    ids::{BatchId, ContentHash, NodeId},
    leader::{Refusal, Reply},
};

use crate::{
    admission::Entrance,
    caller::Caller,
    driver::{Answer, NotServed, Question, Request},
    failure::{CallFailure, is_answer, says_not_leader},
    leaders::Leaders,
};

/// Says of one batch of a forwarded stream that the node doesn't lead and gave the batch to nobody. Only between our nodes.
pub(crate) const NOT_LEADER_CODE: Code = Code::FailedPrecondition;

/// Messages on their way into a stream to the leader.
const FORWARD_QUEUE: usize = 16;
/// A message to the leader is closed when it has so many batches, or bytes.
pub(crate) const FORWARD_BATCHES_MAX: usize = 1024;
const FORWARD_BYTES: usize = 1 << 20;
/// How long opening a stream to the leader may take.
const OPEN_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often deadlines and pauses are looked at.
const TICK: Duration = Duration::from_millis(20);
/// The pause after a try that failed; it grows with each...
const PAUSE: Duration = Duration::from_millis(20);
/// ...up to this.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// What one round takes of each kind.
const EVENTS_PER_ROUND: usize = 4096;

/// The answer to a submission.
pub(crate) type Submitted = Result<v1::Outcome, CallFailure>;

/// A batch that has passed its checks.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) batch: SplitBatch,
    /// About how much memory it takes.
    pub(crate) bytes: usize,
    /// When the caller wants to know at the latest.
    pub(crate) deadline: Instant,
    pub(crate) caller: Caller<Submitted>,
    pub(crate) entrance: Entrance,
}

/// What the submitter needs to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SubmitterConfig {
    pub(crate) node: NodeId,
    pub(crate) placement: Placement,
    /// Bounds of what waits.
    pub(crate) submissions_max: usize,
    pub(crate) bytes_max: usize,
    /// The largest message, in bytes.
    pub(crate) message_bytes_max: usize,
}

/// The task.
pub(crate) struct Submitter {
    config: SubmitterConfig,
    leaders: Arc<Leaders>,
    driver: Option<mpsc::Sender<Request>>,
    submissions: mpsc::Receiver<Submission>,
    /// Answers of the local driver, by tag.
    local_sender: mpsc::Sender<(u64, Answer)>,
    local: mpsc::Receiver<(u64, Answer)>,
    forward_sender: mpsc::Sender<ForwardEvent>,
    forwarded: mpsc::Receiver<ForwardEvent>,
    forward: Option<Forward>,
    last_stream: u64,
    table: Table,
    /// No try before this.
    not_before: Instant,
    failures: u32,
}

/// A stream to the leader on another node.
struct Forward {
    node: NodeId,
    stream: u64,
    /// None while it is being opened.
    queue: Option<mpsc::Sender<v1::ForwardRequest>>,
    task: JoinHandle<()>,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What happened on a stream to a leader.
struct ForwardEvent {
    stream: u64,
    kind: ForwardKind,
}

enum ForwardKind {
    Opened(mpsc::Sender<v1::ForwardRequest>),
    Answered(Vec<SubmitAnswer>),
    /// It was never open, or has ended.
    Ended(Status),
}

/// All submissions that wait.
#[derive(Default)]
struct Table {
    last_tag: u64,
    pending: HashMap<u64, Pending>,
    /// All tags of an id, in order of arrival. The first is the one that may be under way.
    by_id: HashMap<BatchId, VecDeque<u64>>,
    /// To be tried. Some may be gone.
    ready: VecDeque<u64>,
    deadlines: BTreeSet<(Instant, u64)>,
    bytes: usize,
}

struct Pending {
    batch: SplitBatch,
    bytes: usize,
    deadline: Instant,
    /// None: it was answered because its time was up, but a try is still under way.
    caller: Option<Caller<Submitted>>,
    under_way: Option<Via>,
    maybe_proposed: bool,
    entrance: Entrance,
}

/// Where a try went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Via {
    Local,
    Stream(u64),
}

impl Table {
    fn add(&mut self, submission: Submission) {
        let Submission { batch, bytes, deadline, caller, entrance } = submission;
        self.last_tag += 1;
        let tag = self.last_tag;
        let queue = self.by_id.entry(batch.id).or_default();
        queue.push_back(tag);
        if queue.len() == 1 {
            self.ready.push_back(tag);
        }
        self.deadlines.insert((deadline, tag));
        self.bytes += bytes;
        let pending = Pending {
            batch,
            bytes,
            deadline,
            caller: Some(caller),
            under_way: None,
            maybe_proposed: false,
            entrance,
        };
        self.pending.insert(tag, pending);
    }

    /// Whether a submission with this id waits here, with other contents.
    fn is_known_otherwise(&self, id: BatchId, hash: ContentHash) -> bool {
        self.first(id).is_some_and(|first| first.batch.hash != hash)
    }

    /// The submission with this id that is under way, or will be next.
    fn first(&self, id: BatchId) -> Option<&Pending> {
        self.pending.get(self.by_id.get(&id)?.front()?)
    }

    /// Removes a submission; the next one with its id may be tried.
    fn remove(&mut self, tag: u64) -> Option<Pending> {
        let pending = self.pending.remove(&tag)?;
        self.bytes -= pending.bytes;
        self.deadlines.remove(&(pending.deadline, tag));
        if let Some(queue) = self.by_id.get_mut(&pending.batch.id) {
            let first = queue.front() == Some(&tag);
            queue.retain(|other| *other != tag);
            match queue.front() {
                None => {
                    self.by_id.remove(&pending.batch.id);
                }
                Some(next) if first => {
                    self.ready.push_back(*next);
                    if let Some(next) = self.pending.get_mut(next) {
                        next.maybe_proposed |= pending.maybe_proposed;
                    }
                }
                Some(_) => {}
            }
        }
        Some(pending)
    }

    fn answer(&mut self, tag: u64, answer: Submitted) {
        let Some(Pending { caller, entrance, .. }) = self.remove(tag) else { return };
        let is_decided = answer
            .as_ref()
            .is_ok_and(|outcome| !matches!(outcome.result, None | Some(v1::outcome::Result::Undecided(_))));
        if is_decided {
            entrance.decided();
        }
        if let Some(caller) = caller {
            caller.answer(answer);
        }
    }

    /// A try has come to nothing.
    fn again(&mut self, tag: u64, maybe_proposed: bool) {
        let Some(pending) = self.pending.get_mut(&tag) else { return };
        pending.under_way = None;
        pending.maybe_proposed |= maybe_proposed;
        if pending.caller.is_none() {
            self.remove(tag);
        } else {
            self.ready.push_back(tag);
        }
    }

    /// The next ones that are ready, as they are forwarded: as many as fit into one message.
    fn hand_over(&mut self, via: Via) -> Vec<v1::SplitBatch> {
        let (mut batches, mut bytes) = (Vec::new(), 0);
        while batches.len() < FORWARD_BATCHES_MAX
            && bytes < FORWARD_BYTES
            && let Some(tag) = self.ready.pop_front()
        {
            let Some(pending) = self.pending.get_mut(&tag) else { continue };
            debug_assert!(pending.under_way.is_none(), "a submission has one try under way");
            pending.under_way = Some(via);
            bytes += pending.bytes;
            batches.push(split_to_wire(&pending.batch));
        }
        batches
    }

    /// The submission whose try under this id went through the stream.
    fn by_stream(&self, id: BatchId, stream: u64) -> Option<u64> {
        let tag = *self.by_id.get(&id)?.front()?;
        (self.pending.get(&tag)?.under_way == Some(Via::Stream(stream))).then_some(tag)
    }

    /// The leader refused: final, unless an earlier try may have been proposed.
    fn refused(&mut self, tag: u64, failure: CallFailure) -> bool {
        let Some(pending) = self.pending.get(&tag) else { return false };
        // Not what a clock says: an earlier leader's may have shown another time.
        let final_anyway = failure.code == Code::AlreadyExists;
        if !pending.maybe_proposed || final_anyway {
            self.answer(tag, Err(failure));
            return false;
        }
        if failure.code == Code::ResourceExhausted {
            self.again(tag, false);
            return true;
        }
        let id = pending.batch.id;
        self.answer(
            tag,
            Ok(unknown(id, &format!("an earlier try may have been proposed; {}", failure.message))),
        );
        false
    }

    /// Answers whose time is up.
    fn expire(&mut self, now: Instant, leaders: &Leaders) {
        while let Some((deadline, tag)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.pop_first();
            let Some(id) = self.pending.get(&tag).map(|pending| pending.batch.id) else { continue };
            let handed_over = |pending: &Pending| pending.maybe_proposed || pending.under_way.is_some();
            let first_was_handed_over = self.first(id).is_some_and(handed_over);
            let Some(pending) = self.pending.get_mut(&tag) else { continue };
            let caller = pending.caller.take();
            let answer = if first_was_handed_over || handed_over(pending) {
                Ok(unknown(
                    pending.batch.id,
                    "not decided in time, as far as this node knows: ask again by id",
                ))
            } else {
                Err(CallFailure::unavailable("no leader took the batch in time", leaders.hint(None)))
            };
            if pending.under_way.is_none() {
                self.remove(tag);
            }
            if let Some(caller) = caller {
                caller.answer(answer);
            }
        }
    }
}

/// The answer that it isn't known.
pub(crate) fn unknown(id: BatchId, message: &str) -> v1::Outcome {
    undecided(id, v1::UndecidedState::Unknown, message)
}

/// Why a leader can't say what became of a batch.
pub(crate) const SHARD_SILENT: &str = "the shard that may have committed the batch is not answering";

/// An answer without a decision.
pub(crate) fn undecided(id: BatchId, state: v1::UndecidedState, message: &str) -> v1::Outcome {
    let undecided = v1::Undecided { state: state.into(), message: message.to_owned() };
    v1::Outcome { batch_id: id.to_string(), result: Some(v1::outcome::Result::Undecided(undecided)) }
}

impl Submitter {
    /// The task's state, and where submissions are handed in.
    pub(crate) fn new(
        config: SubmitterConfig,
        leaders: Arc<Leaders>,
        driver: Option<mpsc::Sender<Request>>,
    ) -> (Submitter, mpsc::Sender<Submission>) {
        let (handle, submissions) = mpsc::channel(EVENTS_PER_ROUND);
        // Each submission has one try under way, so the answers of all of them find room.
        let (local_sender, local) = mpsc::channel(config.submissions_max + 1);
        let (forward_sender, forwarded) = mpsc::channel(EVENTS_PER_ROUND);
        let submitter = Submitter {
            config,
            leaders,
            driver,
            submissions,
            local_sender,
            local,
            forward_sender,
            forwarded,
            forward: None,
            last_stream: 0,
            table: Table::default(),
            not_before: Instant::now(),
            failures: 0,
        };
        (submitter, handle)
    }

    /// Works until the shutdown, at which all that is left is answered.
    pub(crate) async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut submissions = Vec::new();
        let mut local = Vec::new();
        let mut forwarded = Vec::new();
        loop {
            tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => break,
                _ = tick.tick(), if !self.table.pending.is_empty() => {}
                _ = self.local.recv_many(&mut local, EVENTS_PER_ROUND) => {}
                _ = self.forwarded.recv_many(&mut forwarded, EVENTS_PER_ROUND) => {}
                count = self.submissions.recv_many(&mut submissions, EVENTS_PER_ROUND) => {
                    if count == 0 {
                        break;
                    }
                }
            }
            local.drain(..).for_each(|(tag, answer)| self.answered(tag, answer));
            forwarded.drain(..).for_each(|event| self.forward_event(event));
            submissions.drain(..).for_each(|submission| self.submit(submission));
            let now = Instant::now();
            self.table.expire(now, &self.leaders);
            self.dispatch(now);
        }
        self.table.expire(Instant::now() + Duration::from_secs(1 << 30), &self.leaders);
    }

    /// The door.
    fn submit(&mut self, submission: Submission) {
        let table = &self.table;
        let id = submission.batch.id;
        if table.is_known_otherwise(id, submission.batch.hash) {
            let refusal = CallFailure::of_refusal(&Refusal::DifferentContents, Some(id));
            return submission.caller.answer(Err(refusal));
        }
        if table.pending.len() >= self.config.submissions_max
            || table.bytes + submission.bytes > self.config.bytes_max
        {
            let message = format!(
                "{} batches of {} bytes in all wait at this node: no more are taken now",
                table.pending.len(),
                table.bytes
            );
            return submission.caller.answer(Err(CallFailure::overloaded(message)));
        }
        self.table.add(submission);
    }

    /// Hands all that is ready to the leader, as far as there is room.
    fn dispatch(&mut self, now: Instant) {
        if self.table.ready.is_empty() || now < self.not_before {
            return;
        }
        let target = self.leaders.target();
        match &self.driver {
            Some(driver) if target == self.config.node => {
                let driver = driver.clone();
                self.dispatch_local(&driver);
            }
            _ => self.dispatch_forward(target),
        }
    }

    fn dispatch_local(&mut self, driver: &mpsc::Sender<Request>) {
        if driver.is_closed() {
            self.leaders.failed(self.config.node, None);
            return self.pause();
        }
        while let Ok(room) = driver.try_reserve() {
            let Some(tag) = self.table.ready.pop_front() else { return };
            let Some(pending) = self.table.pending.get_mut(&tag) else { continue };
            debug_assert!(pending.under_way.is_none(), "a submission has one try under way");
            pending.under_way = Some(Via::Local);
            let question = Question::Submit { batch: pending.batch.clone() };
            let caller = Caller::Many { tag, sender: self.local_sender.clone() };
            room.send(Request { question, caller });
        }
    }

    fn dispatch_forward(&mut self, target: NodeId) {
        if target == self.config.node {
            // Nobody leads here, though somebody said so.
            self.leaders.failed(target, None);
            return self.pause();
        }
        if self.forward.as_ref().is_none_or(|forward| forward.node != target) {
            self.end_forward();
            return self.open_forward(target);
        }
        let Some(Forward { stream, queue: Some(queue), .. }) = &self.forward else { return };
        let via = Via::Stream(*stream);
        while !self.table.ready.is_empty()
            && let Ok(room) = queue.try_reserve()
        {
            let batches = self.table.hand_over(via);
            if !batches.is_empty() {
                room.send(v1::ForwardRequest { shards: self.config.placement.shards, batches });
            }
        }
    }

    fn open_forward(&mut self, node: NodeId) {
        let Some(channel) = self.leaders.channel(node) else {
            tracing::warn!(%node, "the coordinators' leader is a node that the configuration doesn't name");
            self.leaders.failed(node, None);
            return self.pause();
        };
        self.last_stream += 1;
        let stream = self.last_stream;
        let client = ForwardClient::new(channel)
            .max_decoding_message_size(self.config.message_bytes_max)
            .max_encoding_message_size(self.config.message_bytes_max);
        let task = tokio::spawn(forward(client, stream, self.forward_sender.clone()));
        self.forward = Some(Forward { node, stream, queue: None, task });
    }

    /// Ends the stream; what was under way in it is tried again.
    fn end_forward(&mut self) {
        if let Some(forward) = self.forward.take() {
            self.lost(Via::Stream(forward.stream), true);
        }
    }

    fn lost(&mut self, via: Via, maybe_proposed: bool) {
        let under_way = self.table.pending.iter().filter(|(_, pending)| pending.under_way == Some(via));
        let mut tags: Vec<u64> = under_way.map(|(tag, _)| *tag).collect();
        tags.sort_unstable();
        for tag in tags {
            self.table.again(tag, maybe_proposed);
        }
    }

    fn pause(&mut self) {
        self.failures += 1;
        self.not_before = Instant::now() + (PAUSE * self.failures).min(PAUSE_MAX);
    }

    /// The local driver has answered.
    fn answered(&mut self, tag: u64, answer: Answer) {
        let Some(pending) = self.table.pending.get(&tag) else { return };
        let id = pending.batch.id;
        match answer {
            Ok(Reply::Decided(decision)) => {
                self.failures = 0;
                self.table.answer(tag, Ok(outcome_to_wire(&decision)));
            }
            Ok(Reply::Refused(refusal)) => {
                if self.table.refused(tag, refusal_of(&refusal, "batch.id", id)) {
                    self.pause();
                }
            }
            // Its time is up at the leader, which can't know whether it is committed.
            Ok(Reply::InProgress) => self.table.answer(tag, Ok(unknown(id, SHARD_SILENT))),
            Ok(Reply::NotSeen | Reply::Rows { .. } | Reply::History { .. }) => {
                unreachable!("a submission is answered by what became of it")
            }
            Err(NotServed::NotLeader) => {
                self.table.again(tag, false);
                self.leaders.failed(self.config.node, None);
                self.pause_once();
            }
            Err(NotServed::Overloaded) => {
                if self.table.refused(tag, CallFailure::overloaded("too many callers wait at the leader")) {
                    self.pause();
                }
            }
            Err(NotServed::Lost) => {
                self.table.again(tag, true);
                self.pause_once();
            }
        }
    }

    /// Many tries fail for one cause: that is one pause.
    fn pause_once(&mut self) {
        if self.not_before <= Instant::now() {
            self.pause();
        }
    }

    fn forward_event(&mut self, event: ForwardEvent) {
        let ForwardEvent { stream, kind } = event;
        if self.forward.as_ref().is_none_or(|forward| forward.stream != stream) {
            return;
        }
        match kind {
            ForwardKind::Opened(queue) => {
                if let Some(forward) = &mut self.forward {
                    forward.queue = Some(queue);
                }
            }
            ForwardKind::Answered(answers) => {
                answers.into_iter().for_each(|answer| self.forward_answered(stream, answer));
            }
            ForwardKind::Ended(status) => self.forward_ended(stream, &status),
        }
    }

    fn forward_answered(&mut self, stream: u64, answer: SubmitAnswer) {
        let tag = batch_id("batch_id", &answer.batch_id).ok().and_then(|id| self.table.by_stream(id, stream));
        let Some(tag) = tag else { return };
        match answer.result {
            Some(Said::Outcome(outcome)) => match outcome.result {
                None | Some(v1::outcome::Result::Undecided(_)) => self.table.again(tag, true),
                Some(v1::outcome::Result::Committed(_) | v1::outcome::Result::Aborted(_)) => {
                    self.failures = 0;
                    self.table.answer(tag, Ok(outcome));
                }
            },
            Some(Said::Error(error)) if error.code == NOT_LEADER_CODE as i32 => {
                self.table.again(tag, false);
                self.pause_once();
            }
            Some(Said::Error(error)) => {
                if self.table.refused(tag, CallFailure::of_call_error(error)) {
                    self.pause();
                }
            }
            None => self.table.again(tag, true),
        }
    }

    fn forward_ended(&mut self, stream: u64, status: &Status) {
        let Some(forward) = self.forward.take() else { return };
        let said = says_not_leader(status);
        if status.code() == Code::FailedPrecondition && self.failures == 0 {
            tracing::warn!(node = %forward.node, %status, "the coordinators' leader takes no batches of this node");
        } else {
            tracing::debug!(node = %forward.node, %status, "the stream to the coordinators' leader ended");
        }
        // A node that ends it by itself has first answered all that it had given to its core.
        let maybe_proposed = !is_answer(status) && forward.queue.is_some();
        self.lost(Via::Stream(stream), maybe_proposed);
        self.leaders.failed(forward.node, said.flatten());
        self.pause();
    }
}

/// What the core refused about a submission.
pub(crate) fn refusal_of(refusal: &Refusal, field: &str, id: BatchId) -> CallFailure {
    match refusal {
        Refusal::FromTheFuture { now } => CallFailure::from_the_future(field, id, now.0),
        Refusal::DifferentContents
        | Refusal::TooOld { .. }
        | Refusal::Overloaded
        | Refusal::TooLarge
        | Refusal::Pruned { .. }
        | Refusal::Unavailable { .. } => CallFailure::of_refusal(refusal, Some(id)),
    }
}

/// The task of one stream to a leader. Batches are sent only once the other side has taken the call.
async fn forward(mut client: ForwardClient<Channel>, stream: u64, events: mpsc::Sender<ForwardEvent>) {
    let (queue, requests) = mpsc::channel(FORWARD_QUEUE);
    let read = async {
        let opened = tokio::time::timeout(OPEN_TIMEOUT, client.exchange(ReceiverStream::new(requests))).await;
        let opened = opened.map_err(|_| Status::deadline_exceeded("open a stream to the leader"))?;
        let mut answers = opened?.into_inner();
        let tell = |kind| events.send(ForwardEvent { stream, kind });
        if tell(ForwardKind::Opened(queue)).await.is_err() {
            return Ok(());
        }
        while let Some(message) = answers.message().await? {
            if tell(ForwardKind::Answered(message.answers)).await.is_err() {
                return Ok(());
            }
        }
        Ok::<_, Status>(())
    };
    let status = match read.await {
        Ok(()) => Status::aborted("the other side ended the stream"),
        Err(status) => status,
    };
    let _ = events.send(ForwardEvent { stream, kind: ForwardKind::Ended(status) }).await;
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use verdict_protocol::{
        batch::{Batch, Operation, OperationKind, RowKey},
        ids::Millis,
    };

    use super::*;
    use crate::{
        admission::Admission,
        directory::{Directory, View},
    };

    const PLACEMENT: Placement = Placement { shards: 1 };

    fn submission(id: u64, deadline: Instant) -> (Submission, tokio::sync::oneshot::Receiver<Submitted>) {
        let row = RowKey::new("p", "r").unwrap();
        let operation = Operation { row, kind: OperationKind::Put(Bytes::from_static(b"x")) };
        let id = BatchId::from_parts(Millis(id), [0; 10]);
        let batch = Batch { id, timeout_ms: 0, operations: vec![operation], zero_sum: false };
        let (caller, answer) = Caller::once();
        let batch = batch.split(PLACEMENT);
        (Submission { batch, bytes: 10, deadline, caller, entrance: Admission::new(1).enter() }, answer)
    }

    fn leaders() -> Leaders {
        let connect: Arc<dyn verdict_proto::connect::Connect> =
            Arc::new(verdict_proto::connect::InProcess::default());
        let view = View { nodes: [(NodeId(1), "a:1".to_owned())].into(), ..View::default() };
        let directory = Directory::new(NodeId(1), view, connect).unwrap();
        Leaders::new(NodeId(1), Arc::new(directory), None)
    }

    #[test]
    fn of_one_id_one_is_under_way_at_a_time() {
        let deadline = Instant::now();
        let mut table = Table::default();
        let (first, _first) = submission(1, deadline);
        let (second, mut answer) = submission(1, deadline);
        table.add(first);
        table.add(second);
        assert_eq!(table.ready, [1]);
        table.pending.get_mut(&1).unwrap().under_way = Some(Via::Stream(7));
        let id = table.pending[&1].batch.id;
        assert_eq!(table.by_stream(id, 7), Some(1));
        assert_eq!(table.by_stream(id, 6), None, "an answer of an earlier stream");
        table.answer(1, Ok(unknown(id, "x")));
        assert_eq!(table.ready, [1, 2]);
        assert!(answer.try_recv().is_err());
        table.answer(2, Ok(unknown(id, "x")));
        assert!(answer.try_recv().is_ok());
        assert!(table.pending.is_empty() && table.by_id.is_empty() && table.deadlines.is_empty());
        assert_eq!(table.bytes, 0);
    }

    #[tokio::test]
    async fn time_that_runs_out_is_unavailable_only_if_nothing_was_handed_over() {
        let now = Instant::now();
        let mut table = Table::default();
        let (untouched, mut nobody_took_it) = submission(1, now);
        let (lost, mut lost_sight) = submission(2, now);
        let (waits, mut under_way) = submission(3, now);
        table.add(untouched);
        table.add(lost);
        table.add(waits);
        table.again(2, true);
        table.pending.get_mut(&3).unwrap().under_way = Some(Via::Local);
        table.expire(now, &leaders());
        assert_eq!(nobody_took_it.try_recv().unwrap().unwrap_err().code, Code::Unavailable);
        for answer in [lost_sight.try_recv().unwrap(), under_way.try_recv().unwrap()] {
            let Some(v1::outcome::Result::Undecided(undecided)) = answer.unwrap().result else { panic!() };
            assert_eq!(undecided.state(), v1::UndecidedState::Unknown);
        }
        assert_eq!(table.pending.len(), 1, "the one under way keeps its id until its try has ended");
        table.again(3, true);
        assert!(table.pending.is_empty());
    }

    #[tokio::test]
    async fn who_waits_behind_a_try_that_was_handed_over_is_not_told_that_nothing_was() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let is_unknown = |mut answer: tokio::sync::oneshot::Receiver<Submitted>| {
            matches!(answer.try_recv().unwrap().unwrap().result, Some(v1::outcome::Result::Undecided(_)))
        };
        let mut table = Table::default();
        let (first, _first) = submission(1, later);
        let (second, behind) = submission(1, now);
        let (third, after_the_end) = submission(1, later);
        table.add(first);
        table.add(second);
        table.add(third);
        table.pending.get_mut(&1).unwrap().under_way = Some(Via::Local);
        table.expire(now, &leaders());
        assert!(is_unknown(behind));
        table.again(1, true);
        table.remove(1);
        table.expire(later, &leaders());
        assert!(is_unknown(after_the_end));
        assert!(table.pending.is_empty() && table.by_id.is_empty());
    }

    const STREAM: u64 = 7;

    /// How the try of a submission ends.
    #[derive(Clone, Copy, Debug)]
    enum End {
        Driver(NotServed),
        /// An answer in the stream: an outcome without a decision, an error with this code, or nothing.
        Undecided,
        Error(Code),
        Empty,
        /// The stream ends, by a broken connection, by the word that the node doesn't lead, or that it takes nothing of this one.
        Broken,
        NotLeading,
        Unwanted,
        /// Another node leads now: the stream is given up.
        GivenUp,
    }

    /// A submitter with one submission under way, as by that end.
    fn under_way(end: End, deadline: Instant) -> (Submitter, tokio::sync::oneshot::Receiver<Submitted>) {
        let config = SubmitterConfig {
            node: NodeId(1),
            placement: PLACEMENT,
            submissions_max: 10,
            bytes_max: 1000,
            message_bytes_max: 1000,
        };
        let (mut submitter, _) = Submitter::new(config, Arc::new(leaders()), None);
        let (submission, answer) = submission(1, deadline);
        submitter.table.add(submission);
        take_up(&mut submitter, end);
        (submitter, answer)
    }

    fn take_up(submitter: &mut Submitter, end: End) {
        let via = match end {
            End::Driver(_) => Via::Local,
            _ => {
                let (queue, _) = mpsc::channel(1);
                let task = tokio::spawn(async {});
                submitter.forward =
                    Some(Forward { node: NodeId(2), stream: STREAM, queue: Some(queue), task });
                Via::Stream(STREAM)
            }
        };
        submitter.table.ready.clear();
        submitter.table.pending.get_mut(&1).unwrap().under_way = Some(via);
    }

    fn end_try(submitter: &mut Submitter, end: End) {
        let id = BatchId::from_parts(Millis(1), [0; 10]);
        let kind = match end {
            End::Driver(why) => return submitter.answered(1, Err(why)),
            End::GivenUp => return submitter.end_forward(),
            End::Broken => ForwardKind::Ended(Status::unavailable("tcp connect error")),
            End::NotLeading => ForwardKind::Ended(CallFailure::not_leader(None).status()),
            End::Unwanted => {
                let failure = CallFailure::other(Code::FailedPrecondition, "OTHER_PLACEMENT", "other");
                ForwardKind::Ended(failure.status())
            }
            End::Undecided | End::Error(_) | End::Empty => {
                let result = match end {
                    End::Undecided => Some(Said::Outcome(unknown(id, "lost"))),
                    End::Error(code) => {
                        Some(Said::Error(v1::CallError { code: code as i32, ..Default::default() }))
                    }
                    _ => None,
                };
                ForwardKind::Answered(vec![SubmitAnswer { batch_id: id.to_string(), result }])
            }
        };
        submitter.forward_event(ForwardEvent { stream: STREAM, kind });
    }

    /// UNAVAILABLE tells a caller that nothing was proposed, and may make it settle the same under another id.
    #[tokio::test]
    async fn only_a_try_that_was_given_to_nobody_leaves_room_for_unavailable() {
        let now = Instant::now();
        let given_to_nobody =
            [End::Driver(NotServed::NotLeader), End::Error(NOT_LEADER_CODE), End::NotLeading, End::Unwanted];
        let handed_over =
            [End::Driver(NotServed::Lost), End::Undecided, End::Empty, End::Broken, End::GivenUp];
        for end in given_to_nobody {
            let (mut submitter, mut answer) = under_way(end, now);
            end_try(&mut submitter, end);
            submitter.table.expire(now, &submitter.leaders);
            assert_eq!(answer.try_recv().unwrap().unwrap_err().code, Code::Unavailable, "{end:?}");
        }
        for first in handed_over {
            // What comes after it takes nothing back.
            for second in [None].into_iter().chain(given_to_nobody.map(Some)).chain(handed_over.map(Some)) {
                let (mut submitter, mut answer) = under_way(first, now);
                end_try(&mut submitter, first);
                if let Some(second) = second {
                    take_up(&mut submitter, second);
                    end_try(&mut submitter, second);
                }
                submitter.table.expire(now, &submitter.leaders);
                let outcome = answer.try_recv().unwrap().unwrap_or_else(|error| {
                    panic!("after {first:?} and {second:?} the caller is told that nothing was proposed: {error:?}")
                });
                assert!(
                    matches!(outcome.result, Some(v1::outcome::Result::Undecided(_))),
                    "{first:?}, {second:?}: {outcome:?}"
                );
            }
        }
    }

    /// A refusal is the last word only if no earlier try may still be settled.
    #[tokio::test]
    async fn a_refusal_by_a_leader_is_told_only_if_no_earlier_try_was_handed_over() {
        let now = Instant::now();
        let refusals = [End::Driver(NotServed::Overloaded), End::Error(Code::ResourceExhausted)];
        for refusal in refusals {
            let (mut submitter, mut answer) = under_way(refusal, now);
            end_try(&mut submitter, refusal);
            assert_eq!(answer.try_recv().unwrap().unwrap_err().code, Code::ResourceExhausted, "{refusal:?}");
        }
        for (first, then) in [
            (End::Driver(NotServed::Lost), refusals[0]),
            (End::Broken, refusals[1]),
            (End::Undecided, End::Error(Code::Unavailable)),
            (End::Broken, End::Error(Code::OutOfRange)),
            (End::Driver(NotServed::Lost), End::Error(Code::InvalidArgument)),
        ] {
            let (mut submitter, mut answer) = under_way(first, now);
            end_try(&mut submitter, first);
            take_up(&mut submitter, then);
            end_try(&mut submitter, then);
            submitter.table.expire(now, &submitter.leaders);
            let outcome = answer.try_recv().unwrap();
            assert!(
                matches!(&outcome, Ok(v1::Outcome { result: Some(v1::outcome::Result::Undecided(_)), .. })),
                "{first:?}, {then:?}: {outcome:?}"
            );
        }
    }

    #[tokio::test]
    async fn what_an_earlier_stream_says_is_not_heard() {
        let now = Instant::now();
        let (mut submitter, mut answer) = under_way(End::Broken, now);
        let kind = ForwardKind::Ended(CallFailure::not_leader(None).status());
        submitter.forward_event(ForwardEvent { stream: STREAM - 1, kind });
        assert!(submitter.forward.is_some(), "the present stream goes on");
        submitter.table.expire(now, &submitter.leaders);
        assert!(answer.try_recv().unwrap().is_ok(), "its try is still under way");
    }

    #[test]
    fn other_contents_do_not_wait_behind_the_first() {
        let (first, _first) = submission(1, Instant::now());
        let (id, hash) = (first.batch.id, first.batch.hash);
        let mut table = Table::default();
        assert!(!table.is_known_otherwise(id, hash));
        table.add(first);
        assert!(!table.is_known_otherwise(id, hash));
        assert!(table.is_known_otherwise(id, ContentHash([7; 32])));
    }

    #[test]
    fn a_refusal_after_a_lost_try_is_unknown_and_never_an_error() {
        let deadline = Instant::now();
        let mut table = Table::default();
        let (lost, mut answer) = submission(1, deadline);
        table.add(lost);
        table.again(1, true);
        assert!(table.refused(1, CallFailure::overloaded("full")), "overload is waited out");
        assert!(
            !table.refused(
                1,
                refusal_of(&Refusal::Unavailable { shards: vec![] }, "batch.id", BatchId([0; 16]))
            )
        );
        assert!(answer.try_recv().unwrap().is_ok());
        let (fresh, mut answer) = submission(2, deadline);
        table.add(fresh);
        assert!(!table.refused(2, CallFailure::overloaded("full")));
        assert_eq!(answer.try_recv().unwrap().unwrap_err().code, Code::ResourceExhausted);
    }
}
