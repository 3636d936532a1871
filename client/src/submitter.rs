//! Many batches in flight on one stream.
//!
//! One task drives the stream. It owns every batch until that is answered, so the loss of a node loses nothing: the task opens
//! a stream to another node and sends whatever is unanswered again, under the same ids.
//!
//! ```text
//! submit ──(window)──> queue ──> due ──> sent ──> answered
//!                                 ^        │
//!                                 └────────┘ refused, undecided, silent for too long, or the stream was lost
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque, btree_map::Entry as MapEntry},
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use verdict_proto::{
    convert::encoded,
    v1::{
        Batch, SubmitAnswer, SubmitStreamRequest, SubmitStreamResponse, UndecidedState,
        submit_answer::Result as Said,
    },
};

use crate::{
    Client, ClientError, Outcome,
    batch::same_contents,
    client::settlement,
    failure::Failure,
    retry,
    tries::{Next, Place, Tries},
};

/// Messages between the task and the stream. Few: what waits here can't be taken back.
const STREAM_QUEUE: usize = 4;
/// A message is closed when it has so many batches, or bytes.
const BATCHES_PER_MESSAGE: usize = 256;
const BYTES_PER_MESSAGE: usize = 256 << 10;
/// Messages with answers that are taken in before anything else gets its turn.
const MESSAGES_AT_ONCE: usize = 16;
/// A pause so long that it never ends: nothing is due.
const IDLE: Duration = Duration::from_secs(3600);

/// The answer to one batch, and what it took to get it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The outcome, or why nothing was decided.
    pub result: Result<Outcome, ClientError>,
    /// How many answers were lost or undecided before this one: each was asked for again under the same id.
    pub lost: u32,
}

/// Settles many batches at once.
///
/// Each batch is answered on its own, within the client's timeout from when it was handed over. Dropping it lets batches in
/// flight run to their answers.
#[derive(Clone, Debug)]
pub struct Submitter {
    places: Arc<Semaphore>,
    jobs: mpsc::Sender<Job>,
    counters: Arc<Counters>,
    timeout: Duration,
}

/// What a [`Submitter`] has been through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubmitterStats {
    /// Streams that were opened.
    pub streams: u64,
    /// Batches that were sent again under the same id.
    pub resubmitted: u64,
}

#[derive(Debug, Default)]
struct Counters {
    streams: AtomicU64,
    resubmitted: AtomicU64,
}

impl Submitter {
    /// Starts the task. A window of 0 counts as 1.
    pub(crate) fn start(client: Client, window: usize) -> Submitter {
        let window = window.clamp(1, Semaphore::MAX_PERMITS);
        // Each job holds its place in the window: the queue is never full.
        let (jobs, queue) = mpsc::channel(window);
        let counters = Arc::new(Counters::default());
        let timeout = client.options().timeout;
        tokio::spawn(Driver::new(client, counters.clone()).run(queue));
        Submitter { places: Arc::new(Semaphore::new(window)), jobs, counters, timeout }
    }

    /// Waits for a place in the window.
    pub async fn reserve(&self) -> Slot {
        let place = self.places.clone().acquire_owned().await.expect("the window is never closed");
        Slot { submitter: self.clone(), place }
    }

    /// Hands a batch over as soon as there is a place in the window, and waits for its answer.
    pub async fn submit(&self, batch: Batch) -> Answer {
        self.reserve().await.submit(batch).await
    }

    /// What it has been through so far.
    pub fn stats(&self) -> SubmitterStats {
        SubmitterStats {
            streams: self.counters.streams.load(Ordering::Relaxed),
            resubmitted: self.counters.resubmitted.load(Ordering::Relaxed),
        }
    }
}

/// A place in the window.
#[derive(Debug)]
pub struct Slot {
    submitter: Submitter,
    place: OwnedSemaphorePermit,
}

impl Slot {
    /// Hands a batch over. The time that the client allows starts now.
    pub fn submit(self, batch: Batch) -> Pending {
        let (reply, answer) = oneshot::channel();
        let deadline = Instant::now() + self.submitter.timeout;
        let job = Job { batch, deadline, waiter: Waiter { reply, _place: self.place } };
        // The queue has room for the whole window. If the task is gone with its runtime, `answer` tells.
        let _ = self.submitter.jobs.try_send(job);
        Pending { answer }
    }
}

/// A batch in flight. Resolves to its answer; dropping it changes nothing about the batch.
#[derive(Debug)]
pub struct Pending {
    answer: oneshot::Receiver<Answer>,
}

impl Future for Pending {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Answer> {
        let gone = |_| Answer { result: Ok(Outcome::unknown("the client was shut down")), lost: 1 };
        Pin::new(&mut self.answer).poll(context).map(|answer| answer.unwrap_or_else(gone))
    }
}

type Id = Arc<str>;

#[derive(Debug)]
struct Job {
    batch: Batch,
    deadline: Instant,
    waiter: Waiter,
}

#[derive(Debug)]
struct Waiter {
    reply: oneshot::Sender<Answer>,
    _place: OwnedSemaphorePermit,
}

/// A batch that is not answered yet.
#[derive(Debug)]
struct Entry {
    batch: Batch,
    deadline: Instant,
    waiters: Vec<Waiter>,
    tries: Tries,
    state: State,
    /// When to look at it again: never after its deadline.
    wake: Instant,
    sent_before: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the queue `due`.
    Due,
    /// On the present stream, without an answer.
    Sent,
    /// To be sent again when it wakes.
    Pausing,
}

/// The task of a submitter.
struct Driver {
    client: Client,
    counters: Arc<Counters>,
    entries: BTreeMap<Id, Entry>,
    /// Every entry's `wake`.
    wakes: BTreeSet<(Instant, Id)>,
    due: VecDeque<Id>,
    link: Option<Link>,
    /// The node of the present stream, or of the next.
    address: String,
    /// Streams in a row that brought nothing.
    failures: u32,
    /// When the next stream may be opened.
    open_at: Instant,
}

/// A stream to one node.
struct Link {
    requests: mpsc::Sender<SubmitStreamRequest>,
    answers: Answers,
    /// When it was opened or last brought a batch to its end.
    useful: Instant,
    /// Ids that were sent more than once on it, with the number of answers that are still to come.
    copies: BTreeMap<Id, u32>,
}

/// The answers of a stream. Requests may be sent while it opens.
enum Answers {
    Opening(BoxFuture<'static, Result<Streaming<SubmitStreamResponse>, Status>>),
    Open(Box<Streaming<SubmitStreamResponse>>),
}

impl Answers {
    /// The next answers, or how the stream ended. Nothing is lost if the future is dropped.
    async fn next(&mut self) -> Result<SubmitStreamResponse, Failure> {
        if let Answers::Opening(opening) = self {
            let stream = opening.await.map_err(|status| Failure::of_status(&status))?;
            *self = Answers::Open(Box::new(stream));
        }
        let Answers::Open(stream) = self else { unreachable!("it was opened above") };
        match stream.message().await {
            Ok(Some(answers)) => Ok(answers),
            Ok(None) => Err(Failure::Lost("the node ended the stream".into())),
            // Whatever the reason: it says nothing about the single batches.
            Err(status) => Err(Failure::Lost(format!("the stream broke: {}", status.message()))),
        }
    }
}

impl Driver {
    fn new(client: Client, counters: Arc<Counters>) -> Driver {
        let address = client.nodes().preferred();
        Driver {
            client,
            counters,
            entries: BTreeMap::new(),
            wakes: BTreeSet::new(),
            due: VecDeque::new(),
            link: None,
            address,
            failures: 0,
            open_at: Instant::now(),
        }
    }

    /// Ends when all handles are dropped and all batches answered.
    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut handles_left = true;
        while handles_left || !self.entries.is_empty() {
            self.send_due();
            let wake = self.wakes.first().map_or_else(|| Instant::now() + IDLE, |(wake, _)| *wake);
            let (opening, open_at) = (self.link.is_none() && !self.entries.is_empty(), self.open_at);
            let blocked = !self.due.is_empty();
            let (requests, answers) = match &mut self.link {
                Some(link) => (Some(&link.requests), Some(&mut link.answers)),
                None => (None, None),
            };
            tokio::select! {
                answer = next_answer(answers) => self.take_answers(answer),
                job = jobs.recv(), if handles_left => match job {
                    Some(job) => self.take_job(job),
                    None => handles_left = false,
                },
                () = room(requests), if blocked => {}
                () = sleep_until(open_at), if opening => self.open(),
                () = sleep_until(wake) => self.wake(Instant::now()),
            }
            while let Ok(job) = jobs.try_recv() {
                self.take_job(job);
            }
        }
    }

    fn take_job(&mut self, job: Job) {
        let Job { batch, deadline, waiter } = job;
        let id: Id = batch.id.as_str().into();
        match self.entries.entry(id.clone()) {
            MapEntry::Occupied(mut entry) if same_contents(&entry.get().batch, &batch) => {
                entry.get_mut().waiters.push(waiter);
            }
            MapEntry::Occupied(_) => {
                let message = "a batch with this id is in flight here".into();
                let result = Err(ClientError::DifferentContents { message });
                let _ = waiter.reply.send(Answer { result, lost: 0 });
            }
            MapEntry::Vacant(place) => {
                let (tries, state, waiters) = (Tries::default(), State::Due, vec![waiter]);
                let wake = deadline;
                place.insert(Entry { batch, deadline, waiters, tries, state, wake, sent_before: false });
                self.wakes.insert((wake, id.clone()));
                self.due.push_back(id.clone());
                // A late answer to an earlier copy must not be taken for the answer to this one, which may differ.
                if self.link.as_ref().is_some_and(|link| link.copies.contains_key(&id)) {
                    self.lose_link(Failure::Lost("the stream was given up".into()));
                }
            }
        }
    }

    /// Sends what is due, as far as the stream has room.
    fn send_due(&mut self) {
        let Some(requests) = self.link.as_ref().map(|link| link.requests.clone()) else { return };
        while !self.due.is_empty()
            && let Ok(room) = requests.try_reserve()
        {
            let batches = self.next_message();
            if !batches.is_empty() {
                room.send(SubmitStreamRequest { batches });
            }
        }
    }

    /// Takes of what is due as much as fits into one message.
    fn next_message(&mut self) -> Vec<Bytes> {
        let (mut batches, mut bytes) = (Vec::new(), 0);
        let Some(link) = &mut self.link else { return batches };
        let now = Instant::now();
        while batches.len() < BATCHES_PER_MESSAGE
            && bytes < BYTES_PER_MESSAGE
            && let Some(id) = self.due.front()
        {
            let is_wanted =
                |entry: &&mut Entry| entry.state == State::Due && entry.deadline > now + retry::TRY_MIN;
            let Some(entry) = self.entries.get_mut(id).filter(is_wanted) else {
                self.due.pop_front();
                continue;
            };
            let batch = encoded(&entry.batch);
            bytes += batch.len();
            batches.push(batch);
            if entry.sent_before {
                self.counters.resubmitted.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(copies) = link.copies.get_mut(id) {
                *copies += 1;
            }
            entry.sent_before = true;
            entry.state = State::Sent;
            let silent_at = now + self.client.options().try_timeout;
            set_wake(&mut self.wakes, id, entry, silent_at);
            self.due.pop_front();
        }
        batches
    }

    /// Takes answers and all others that are there already.
    fn take_answers(&mut self, first: Result<SubmitStreamResponse, Failure>) {
        let mut next = Some(first);
        for _ in 0..MESSAGES_AT_ONCE {
            match next {
                Some(Ok(message)) => message.answers.into_iter().for_each(|answer| self.take_answer(answer)),
                Some(Err(failure)) => return self.lose_link(failure),
                None => return,
            }
            next = self.link.as_mut().and_then(|link| link.answers.next().now_or_never());
        }
        if let Some(last) = next {
            match last {
                Ok(message) => message.answers.into_iter().for_each(|answer| self.take_answer(answer)),
                Err(failure) => self.lose_link(failure),
            }
        }
    }

    fn take_answer(&mut self, answer: SubmitAnswer) {
        let id: Id = answer.batch_id.as_str().into();
        let Some(link) = &mut self.link else { return };
        if let Some(copies) = link.copies.get_mut(&id) {
            *copies -= 1;
            if *copies == 0 {
                link.copies.remove(&id);
            }
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let end = match answer.result {
            Some(Said::Outcome(outcome)) => Ok(Some(outcome)),
            Some(Said::Error(error)) => Err(Failure::of_call_error(error)),
            None => Ok(None),
        };
        match entry.tries.after(&id, end) {
            Next::Answer(result) => {
                link.useful = Instant::now();
                if self.failures > 0 {
                    self.failures = 0;
                    self.client.nodes().note(&self.address, None);
                }
                self.finish(&id, result);
            }
            Next::Again { pause, place } => {
                entry.state = State::Pausing;
                set_wake(&mut self.wakes, &id, entry, Instant::now() + pause);
                let useless = link.useful.elapsed() > self.client.options().try_timeout;
                if useless && place != Place::Same {
                    self.lose_link(Failure::Lost("the node brings no batch to its end".into()));
                }
            }
        }
    }

    /// Looks at the entries whose time has come.
    fn wake(&mut self, now: Instant) {
        let mut silent = false;
        while let Some((at, id)) = self.wakes.first().cloned() {
            if at > now {
                break;
            }
            let entry = self.entries.get_mut(&id).expect("every wake belongs to an entry");
            if entry.state == State::Sent {
                entry
                    .tries
                    .note_loss(UndecidedState::Unknown, format!("no answer from {} in time", self.address));
            }
            if entry.deadline <= now {
                let result = entry.tries.give_up(|| self.client.nodes().nobody());
                self.finish(&id, result);
                continue;
            }
            if let (State::Sent, Some(link)) = (entry.state, &mut self.link) {
                link.copies.entry(id.clone()).or_insert(1);
                silent |= now.duration_since(link.useful) >= self.client.options().try_timeout;
            }
            entry.state = State::Due;
            let deadline = entry.deadline;
            set_wake(&mut self.wakes, &id, entry, deadline);
            self.due.push_back(id);
        }
        if silent {
            self.lose_link(Failure::Lost("the node is silent".into()));
        }
    }

    fn finish(&mut self, id: &Id, result: Result<Outcome, ClientError>) {
        let entry = self.entries.remove(id).expect("only an entry is finished");
        self.wakes.remove(&(entry.wake, id.clone()));
        let answer = Answer { result, lost: entry.tries.lost() };
        for waiter in entry.waiters {
            let _ = waiter.reply.send(answer.clone());
        }
    }

    fn open(&mut self) {
        let (requests, queue) = mpsc::channel(STREAM_QUEUE);
        self.counters.streams.fetch_add(1, Ordering::Relaxed);
        let opening = match self.client.nodes().channel(&self.address) {
            Ok(channel) => async move {
                let response = settlement(channel).submit_stream(ReceiverStream::new(queue)).await?;
                Ok(response.into_inner())
            }
            .boxed(),
            Err(error) => return self.lose_link(Failure::Final(error)),
        };
        let (answers, useful) = (Answers::Opening(opening), Instant::now());
        self.link = Some(Link { requests, answers, useful, copies: BTreeMap::new() });
    }

    /// Drops the stream. What was sent on it may have been proposed, unless the failure says otherwise.
    fn lose_link(&mut self, failure: Failure) {
        self.link = None;
        self.client.nodes().note(&self.address, Some(&failure));
        let (place, advice) = match &failure {
            Failure::Lost(_) | Failure::Unreached(_) | Failure::Final(_) => (Place::Other, None),
            Failure::Refused { leader, retry_after, .. } => {
                (leader.clone().map_or(Place::Other, Place::Leader), *retry_after)
            }
        };
        for (id, entry) in self.entries.iter_mut().filter(|(_, entry)| entry.state == State::Sent) {
            match &failure {
                Failure::Lost(message) => entry.tries.note_loss(UndecidedState::Unknown, message.clone()),
                Failure::Final(error) | Failure::Refused { error, .. } => {
                    entry.tries.note_refusal(error.clone())
                }
                Failure::Unreached(_) => {}
            }
            entry.state = State::Due;
            let deadline = entry.deadline;
            set_wake(&mut self.wakes, id, entry, deadline);
            self.due.push_back(id.clone());
        }
        tracing::debug!(address = %self.address, ?failure, ?place, "lost the stream");
        self.address = self.client.nodes().next(&self.address, place);
        let pause = if self.failures == 0 { Duration::ZERO } else { retry::pause(self.failures, advice) };
        self.failures = self.failures.saturating_add(1);
        self.open_at = Instant::now() + pause;
    }
}

fn set_wake(wakes: &mut BTreeSet<(Instant, Id)>, id: &Id, entry: &mut Entry, wake: Instant) {
    wakes.remove(&(entry.wake, id.clone()));
    entry.wake = wake.min(entry.deadline);
    wakes.insert((entry.wake, id.clone()));
}

async fn next_answer(answers: Option<&mut Answers>) -> Result<SubmitStreamResponse, Failure> {
    match answers {
        Some(answers) => answers.next().await,
        None => std::future::pending().await,
    }
}

/// Waits until the stream has room for a request. A stream that has ended never has: its answers tell.
async fn room(requests: Option<&mpsc::Sender<SubmitStreamRequest>>) {
    let open = match requests {
        Some(requests) => requests.reserve().await.is_ok(),
        None => false,
    };
    if !open {
        std::future::pending().await
    }
}
