//! The client against a fake network of nodes that lose answers and refuse calls. The nodes share one memory of what took
//! effect, so the tests see what a retry did.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{Stream, StreamExt as _, future::join_all};
use prost::Message as _;
use tokio::{io::AsyncReadExt as _, net::TcpListener};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt as _};
use verdict_proto::{
    connect::InProcess,
    v1::{
        self, Batch, CallError, GetBatchRequest, GetBatchResponse, HistoryRequest, HistoryResponse,
        ReadRequest, ReadResponse, SubmitAnswer, SubmitRequest, SubmitResponse, SubmitStreamRequest,
        SubmitStreamResponse,
        outcome::Result as Said,
        settlement_server::{Settlement, SettlementServer},
        submit_answer::Result as Answered,
    },
};

use crate::{AbortReason, BatchBuilder, Client, ClientError, Options, Outcome, UndecidedState};

/// What a node does with the next batch that reaches it.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// Settles it and loses the answer: the connection ends.
    LoseAnswer,
    /// Settles it and never answers.
    NeverAnswer,
    /// Says that nothing was proposed, and who leads.
    Refuse { leader: Option<&'static str> },
    /// Says that there is too much in flight.
    Overloaded,
    /// Says that the field is malformed.
    Malformed,
    /// A status without details, as a proxy makes it.
    BareUnavailable,
    /// Lost sight of it.
    Undecided,
    /// Settles it, and the connection ends with such a status, as gRPC's libraries make them.
    End(Code),
    /// Settles it, as without a script.
    Settle,
    /// Settles it, and answers when [`Fake::release`] says so; in a stream only.
    Hold,
    /// Answers for batches that nobody has sent, then settles it; in a stream only.
    Babble,
}

type Answers = tokio::sync::mpsc::UnboundedSender<Result<SubmitAnswer, Status>>;

#[derive(Debug, Default)]
struct World {
    /// Every batch that took effect: its contents and its stamp.
    settled: BTreeMap<String, (Batch, u64)>,
    /// Every try that arrived: node and id.
    tries: Vec<(&'static str, String)>,
    /// What each node does next; then it settles.
    script: BTreeMap<&'static str, VecDeque<Act>>,
    /// The outcome of batches whose first partition is this.
    aborts: Option<&'static str>,
    /// Answers that are held back, and their streams.
    held: Vec<(Answers, SubmitAnswer)>,
}

impl World {
    fn settle(&mut self, batch: &Batch) -> Said {
        let partition = batch.operations[0].row.as_ref().map(|row| row.partition.clone());
        if self.aborts == partition.as_deref() {
            let reason = AbortReason::ShortOfFunds.into();
            let aborted =
                v1::Aborted { reason, operation: Some(0), met: None, message: "0 is not enough".into() };
            return Said::Aborted(aborted);
        }
        let stamp = self.settled.len() as u64 + 1;
        let (_, stamp) = self.settled.entry(batch.id.clone()).or_insert((batch.clone(), stamp));
        Said::Committed(v1::Committed { stamp: *stamp })
    }
}

#[derive(Clone, Debug)]
struct Node {
    name: &'static str,
    world: Arc<Mutex<World>>,
}

enum Reply {
    Say(Said),
    Refuse(Box<Status>),
    Break(Box<Status>),
    End,
    Silence,
    Hold(Said),
    Babble(Said),
}

impl Node {
    fn take(&self, batch: &Batch) -> Reply {
        let mut world = self.world.lock().unwrap();
        world.tries.push((self.name, batch.id.clone()));
        let act = world.script.get_mut(self.name).and_then(VecDeque::pop_front);
        let refuse = |code, message: &str, details| {
            Reply::Refuse(Box::new(Status::with_error_details(code, message, details)))
        };
        match act {
            None | Some(Act::Settle) => match world.settled.get(&batch.id) {
                Some((known, _)) if known != batch => {
                    refuse(Code::AlreadyExists, "known with other contents", ErrorDetails::new())
                }
                _ => Reply::Say(world.settle(batch)),
            },
            Some(Act::Hold) => Reply::Hold(world.settle(batch)),
            Some(Act::Babble) => Reply::Babble(world.settle(batch)),
            Some(Act::LoseAnswer) => {
                world.settle(batch);
                Reply::End
            }
            Some(Act::NeverAnswer) => {
                world.settle(batch);
                Reply::Silence
            }
            Some(Act::Refuse { leader }) => {
                let mut details = ErrorDetails::with_retry_info(Some(Duration::from_millis(5)));
                let leader = leader.map(|leader| ("leader".to_owned(), leader.to_owned()));
                details.set_error_info("NOT_LEADER", "verdict", HashMap::from_iter(leader));
                refuse(Code::Unavailable, "no leader here", details)
            }
            Some(Act::Overloaded) => {
                let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(5)));
                refuse(Code::ResourceExhausted, "too much in flight", details)
            }
            Some(Act::Malformed) => {
                let details = ErrorDetails::with_bad_request_violation("batch.id", "is not a UUID");
                refuse(Code::InvalidArgument, "malformed", details)
            }
            Some(Act::BareUnavailable) => Reply::Refuse(Box::new(Status::unavailable("upstream reset"))),
            Some(Act::End(code)) => {
                world.settle(batch);
                Reply::Break(Box::new(Status::new(code, "made by a library")))
            }
            Some(Act::Undecided) => {
                let state = UndecidedState::Unknown.into();
                Reply::Say(Said::Undecided(v1::Undecided { state, message: "lost sight of it".into() }))
            }
        }
    }
}

fn outcome(batch: &Batch, said: Said) -> v1::Outcome {
    v1::Outcome { batch_id: batch.id.clone(), result: Some(said) }
}

#[tonic::async_trait]
impl Settlement for Node {
    async fn submit(&self, request: Request<SubmitRequest>) -> Result<Response<SubmitResponse>, Status> {
        let batch = Batch::decode(request.into_inner().batch).unwrap();
        match self.take(&batch) {
            Reply::Say(said) | Reply::Hold(said) | Reply::Babble(said) => {
                Ok(Response::new(SubmitResponse { outcome: Some(outcome(&batch, said)) }))
            }
            Reply::Refuse(status) | Reply::Break(status) => Err(*status),
            Reply::End => Err(Status::internal("the connection is about to break")),
            Reply::Silence => std::future::pending().await,
        }
    }

    type SubmitStreamStream = Pin<Box<dyn Stream<Item = Result<SubmitStreamResponse, Status>> + Send>>;

    async fn submit_stream(
        &self,
        request: Request<Streaming<SubmitStreamRequest>>,
    ) -> Result<Response<Self::SubmitStreamStream>, Status> {
        let node = self.clone();
        let mut requests = request.into_inner();
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut batches = VecDeque::new();
            loop {
                let Some(batch) = batches.pop_front() else {
                    let Some(Ok(request)) = requests.next().await else { return };
                    batches.extend(request.batches);
                    continue;
                };
                let batch = Batch::decode(batch).unwrap();
                let answer = |result| SubmitAnswer { batch_id: batch.id.clone(), result: Some(result) };
                let answer = match node.take(&batch) {
                    Reply::Say(said) => Ok(answer(Answered::Outcome(outcome(&batch, said)))),
                    Reply::Refuse(status) => Ok(answer(Answered::Error(CallError {
                        code: status.code().into(),
                        message: status.message().into(),
                        field: String::new(),
                        retry_after_ms: 5,
                    }))),
                    Reply::End => Err(Status::unknown("broken")),
                    Reply::Break(status) => Err(*status),
                    Reply::Silence => continue,
                    Reply::Hold(said) => {
                        let held = (sender.clone(), answer(Answered::Outcome(outcome(&batch, said))));
                        node.world.lock().unwrap().held.push(held);
                        continue;
                    }
                    Reply::Babble(said) => {
                        for batch_id in ["", "01a1f936-de90-7f17-a270-2a2f603137d3"].map(str::to_owned) {
                            let committed = Said::Committed(v1::Committed { stamp: 77 });
                            let stray = v1::Outcome { batch_id: batch_id.clone(), result: Some(committed) };
                            let result = Some(Answered::Outcome(stray));
                            let _ = sender.send(Ok(SubmitAnswer { batch_id, result }));
                        }
                        Ok(answer(Answered::Outcome(outcome(&batch, said))))
                    }
                };
                let ends = answer.is_err();
                if sender.send(answer).is_err() || ends {
                    return;
                }
            }
        });
        // All that are there share a message.
        let answers = futures::stream::poll_fn(move |context| receiver.poll_recv(context)).ready_chunks(8);
        let messages = answers.flat_map(|answers| {
            let ends = answers.iter().position(Result::is_err);
            let mut answers = answers;
            let rest = answers.split_off(ends.unwrap_or(answers.len()));
            let answers = answers.into_iter().flatten().collect();
            let message = Ok(SubmitStreamResponse { answers });
            futures::stream::iter(
                [message].into_iter().chain(rest.into_iter().take(1).filter_map(Result::err).map(Err)),
            )
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn get_batch(
        &self,
        request: Request<GetBatchRequest>,
    ) -> Result<Response<GetBatchResponse>, Status> {
        let batch_id = request.into_inner().batch_id;
        let settled = self.world.lock().unwrap().settled.get(&batch_id).map(|(_, stamp)| *stamp);
        let state = UndecidedState::NotSeen.into();
        let said = match settled {
            Some(stamp) => Said::Committed(v1::Committed { stamp }),
            None => Said::Undecided(v1::Undecided { state, message: "no trace".into() }),
        };
        Ok(Response::new(GetBatchResponse { outcome: Some(v1::Outcome { batch_id, result: Some(said) }) }))
    }

    async fn read(&self, _: Request<ReadRequest>) -> Result<Response<ReadResponse>, Status> {
        Err(Status::unimplemented("the fake holds no rows"))
    }

    async fn history(&self, _: Request<HistoryRequest>) -> Result<Response<HistoryResponse>, Status> {
        Err(Status::unimplemented("the fake holds no rows"))
    }
}

struct Fake {
    world: Arc<Mutex<World>>,
    network: InProcess,
}

impl Fake {
    /// Nodes `a:1` and `b:2`, with what `a:1` does first.
    fn new(first: impl IntoIterator<Item = Act>) -> Fake {
        let fake = Fake { world: Arc::default(), network: InProcess::default() };
        fake.script("a:1", first);
        fake.serve("a:1");
        fake.serve("b:2");
        fake
    }

    fn script(&self, node: &'static str, acts: impl IntoIterator<Item = Act>) {
        self.world.lock().unwrap().script.insert(node, acts.into_iter().collect());
    }

    fn serve(&self, name: &'static str) {
        let incoming = ReceiverStream::new(self.network.listen(name));
        let service = SettlementServer::new(Node { name, world: self.world.clone() });
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    }

    fn client(&self, addresses: &[&str], timeout_ms: u64) -> Client {
        let options = Options {
            connect: Arc::new(self.network.clone()),
            timeout: Duration::from_millis(timeout_ms),
            try_timeout: Duration::from_millis(300),
        };
        Client::connect(addresses.iter().copied(), options).unwrap()
    }

    fn tries(&self) -> Vec<(&'static str, String)> {
        self.world.lock().unwrap().tries.clone()
    }

    /// Sends the answers that were held back, in their order.
    fn release(&self) {
        for (stream, answer) in std::mem::take(&mut self.world.lock().unwrap().held) {
            // The client may have given the stream up.
            let _ = stream.send(Ok(answer));
        }
    }

    fn settled(&self) -> usize {
        self.world.lock().unwrap().settled.len()
    }
}

fn batch() -> Batch {
    BatchBuilder::new().add("user:1", "USDT", 5).build()
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_asked_for_again_under_the_same_id() {
    let fake = Fake::new([Act::LoseAnswer]);
    let batch = batch();
    let outcome = fake.client(&["a:1", "b:2"], 5000).submit(&batch).await;
    assert_eq!(outcome, Ok(Outcome::Committed { stamp: 1 }));
    assert_eq!(fake.tries(), [("a:1", batch.id.clone()), ("b:2", batch.id)]);
    assert_eq!(fake.settled(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_silent_node_is_left_after_the_time_of_a_try() {
    let fake = Fake::new([Act::NeverAnswer]);
    let outcome = fake.client(&["a:1", "b:2"], 5000).submit(&batch()).await;
    assert_eq!(outcome, Ok(Outcome::Committed { stamp: 1 }));
    assert_eq!(fake.tries().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_leader_that_a_node_names_is_asked_next_and_first_from_then_on() {
    let fake = Fake::new([Act::Refuse { leader: Some("b:2") }]);
    let client = fake.client(&["a:1"], 5000);
    for _ in 0..2 {
        assert!(matches!(client.submit(&batch()).await, Ok(Outcome::Committed { .. })));
    }
    let nodes: Vec<_> = fake.tries().into_iter().map(|(node, _)| node).collect();
    assert_eq!(nodes, ["a:1", "b:2", "b:2"]);
}

#[tokio::test(start_paused = true)]
async fn refusals_until_the_deadline_are_an_error_not_unknown() {
    let fake = Fake::new(vec![Act::Refuse { leader: None }; 1000]);
    let result = fake.client(&["a:1"], 200).submit(&batch()).await;
    assert!(matches!(result, Err(ClientError::Unavailable { .. })), "{result:?}");

    let fake = Fake::new(vec![Act::Overloaded; 1000]);
    let result = fake.client(&["a:1"], 200).submit(&batch()).await;
    assert!(matches!(result, Err(ClientError::Overloaded { .. })), "{result:?}");

    let nobody = fake.client(&["nobody:1"], 200).submit(&batch()).await;
    assert!(matches!(nobody, Err(ClientError::Unavailable { .. })), "{nobody:?}");
}

#[tokio::test(start_paused = true)]
async fn where_nobody_listens_the_error_names_every_address() {
    let fake = Fake::new([]);
    let client = fake.client(&["nobody:1", "away:2"], 500);
    assert_eq!(client.trouble(), None);
    let told = "no connection to away:2 (nobody listens there), nobody:1 (nobody listens there)";
    let error = Err(ClientError::Unavailable { message: told.into() });
    assert_eq!(client.submit(&batch()).await, error);
    assert_eq!(client.get_batch("x", false, Duration::ZERO).await, error);
    assert_eq!(client.submitter(8).submit(batch()).await.result, error);
    assert_eq!((client.trouble().as_deref(), client.is_reached()), (Some(told), false));

    // What a node says tells more, and an answer ends the trouble.
    let fake = Fake::new(vec![Act::Refuse { leader: None }; 1000]);
    let client = fake.client(&["nobody:1", "a:1"], 500);
    let refused = client.submit(&batch()).await;
    assert_eq!(refused, Err(ClientError::Unavailable { message: "no leader here".into() }));
    assert_eq!(client.trouble().as_deref(), Some("no node is available: no leader here"));
    assert!(client.is_reached());
    fake.script("a:1", []);
    client.submit(&batch()).await.unwrap();
    assert_eq!(client.trouble().as_deref(), Some("no connection to nobody:1 (nobody listens there)"));
}

#[tokio::test(start_paused = true)]
async fn time_that_runs_out_after_a_try_is_unknown_never_aborted() {
    let lost = [Act::NeverAnswer, Act::BareUnavailable, Act::Undecided, Act::LoseAnswer];
    let ends = [Code::Cancelled, Code::Unknown, Code::DeadlineExceeded, Code::Internal, Code::DataLoss];
    for act in lost.into_iter().chain(ends.map(Act::End)) {
        let acts = || [act].into_iter().chain([Act::Refuse { leader: None }; 1000]);
        let fake = Fake::new(acts());
        let result = fake.client(&["a:1"], 600).submit(&batch()).await;
        assert!(matches!(result, Ok(Outcome::Unknown { .. })), "{act:?}: {result:?}");
        if let Act::BareUnavailable = act {
            // In a stream a refusal is the node's own word about one batch.
            continue;
        }
        let fake = Fake::new(acts());
        let result = fake.client(&["a:1"], 600).submitter(4).submit(batch()).await.result;
        assert!(matches!(result, Ok(Outcome::Unknown { .. })), "{act:?} in a stream: {result:?}");
    }
}

/// In real time: only a real connection breaks like one.
#[tokio::test]
async fn a_connection_that_breaks_with_a_batch_on_its_way_leaves_it_unknown() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        // Hears the greeting of HTTP/2 and what comes with it, and hangs up.
        while let Ok((mut connection, _)) = listener.accept().await {
            let _ = connection.read(&mut [0; 1024]).await;
        }
    });
    let options = Options { timeout: Duration::from_millis(500), ..Options::default() };
    let client = Client::connect([address.as_str()], options).unwrap();
    let single = client.submit(&batch()).await;
    assert!(matches!(single, Ok(Outcome::Unknown { .. })), "{single:?}");
    let streamed = client.submitter(4).submit(batch()).await.result;
    assert!(matches!(streamed, Ok(Outcome::Unknown { .. })), "{streamed:?}");
}

#[tokio::test(start_paused = true)]
async fn an_abort_is_told_with_its_reason_and_a_malformed_batch_with_its_field() {
    let fake = Fake::new([Act::Malformed]);
    fake.world.lock().unwrap().aborts = Some("poor");
    let client = fake.client(&["a:1"], 5000);
    let malformed = client.submit(&batch()).await;
    let error = ClientError::InvalidArgument { field: "batch.id".into(), message: "is not a UUID".into() };
    assert_eq!(malformed, Err(error));
    let short = client.submit(&BatchBuilder::new().add("poor", "USDT", -5).build()).await;
    let Ok(Outcome::Aborted { reason, operation, .. }) = short else { panic!("{short:?}") };
    assert_eq!((reason, operation), (AbortReason::ShortOfFunds, Some(0)));
}

#[tokio::test(start_paused = true)]
async fn get_batch_tells_what_became_of_an_id() {
    let fake = Fake::new([]);
    let client = fake.client(&["a:1", "b:2"], 5000);
    let batch = batch();
    let before = client.get_batch(&batch.id, false, Duration::ZERO).await;
    assert!(matches!(before, Ok(Outcome::Unknown { state: UndecidedState::NotSeen, .. })), "{before:?}");
    let outcome = client.submit(&batch).await;
    assert_eq!(client.get_batch(&batch.id, false, Duration::ZERO).await, outcome);
}

#[tokio::test(start_paused = true)]
async fn a_submitter_survives_broken_streams_refusals_and_silence_and_settles_each_batch_once() {
    let troubles = [
        Act::Refuse { leader: None },
        Act::Overloaded,
        Act::LoseAnswer,
        Act::NeverAnswer,
        Act::Undecided,
        Act::LoseAnswer,
    ];
    let fake = Fake::new(troubles);
    fake.script("b:2", troubles);
    let submitter = fake.client(&["a:1", "b:2"], 20_000).submitter(64);
    let batches: Vec<Batch> = (0..2000).map(|_| batch()).collect();
    let answers = join_all(batches.iter().map(|batch| submitter.submit(batch.clone()))).await;
    let mut stamps = std::collections::BTreeSet::new();
    for answer in &answers {
        let Ok(Outcome::Committed { stamp }) = answer.result else { panic!("{answer:?}") };
        assert!(stamps.insert(stamp), "stamp {stamp} was given to two batches");
    }
    assert_eq!(fake.settled(), batches.len());
    assert!(submitter.stats().streams > 1, "no stream was lost");
    assert!(submitter.stats().resubmitted > 0, "nothing was sent again");
    assert!(answers.iter().any(|answer| answer.lost > 0), "no answer was lost");
}

#[tokio::test(start_paused = true)]
async fn a_submitter_answers_the_same_id_with_the_same_contents_alike_and_refuses_others() {
    let fake = Fake::new([]);
    let submitter = fake.client(&["a:1"], 5000).submitter(8);
    let one = batch();
    let other = Batch { zero_sum: true, ..one.clone() };
    // Handed over before the task runs: all three meet in it.
    let slots = [submitter.reserve().await, submitter.reserve().await, submitter.reserve().await];
    let [first, second, third] = slots;
    let pending = (first.submit(one.clone()), second.submit(one), third.submit(other));
    let (first, second, third) = tokio::join!(pending.0, pending.1, pending.2);
    assert_eq!(first.result, Ok(Outcome::Committed { stamp: 1 }));
    assert_eq!(second.result, first.result);
    assert!(matches!(third.result, Err(ClientError::DifferentContents { .. })), "{third:?}");
}

#[tokio::test(start_paused = true)]
async fn a_submitter_tells_unknown_and_unavailable_apart_at_the_deadline() {
    let fake = Fake::new(vec![Act::NeverAnswer; 1000]);
    // A try may take 300 ms: the time runs out in the first one, and in the second.
    for timeout in [200, 500] {
        let silent = fake.client(&["a:1"], timeout).submitter(8).submit(batch()).await;
        assert!(matches!(silent.result, Ok(Outcome::Unknown { .. })), "{silent:?}");
    }
    let nobody = fake.client(&["nobody:1"], 500).submitter(8).submit(batch()).await;
    assert!(matches!(nobody.result, Err(ClientError::Unavailable { .. })), "{nobody:?}");
}

#[tokio::test(start_paused = true)]
async fn a_submitter_keeps_no_more_in_flight_than_its_window() {
    let fake = Fake::new(vec![Act::NeverAnswer; 1000]);
    let submitter = fake.client(&["a:1"], 60_000).submitter(2);
    let _first = submitter.reserve().await.submit(batch());
    let _second = submitter.reserve().await.submit(batch());
    let third = tokio::time::timeout(Duration::from_millis(50), submitter.reserve()).await;
    assert!(third.is_err(), "a third place in a window of two");
}

#[tokio::test(start_paused = true)]
async fn calls_can_be_spawned() {
    fn spawnable<T: Send>(_: T) {}
    let fake = Fake::new([]);
    let client = fake.client(&["a:1"], 5000);
    let batch = batch();
    spawnable(client.submit(&batch));
    spawnable(client.get_batch(&batch.id, false, Duration::ZERO));
    spawnable(client.read(Vec::new()));
    spawnable(client.status());
    spawnable(client.trigger_snapshot("a:1", 0));
    spawnable(client.submitter(1).submit(batch.clone()));
}

/// The same id with other contents must not be told what became of the first.
#[tokio::test(start_paused = true)]
async fn a_late_answer_to_an_earlier_copy_is_not_taken_for_the_next_batch_with_its_id() {
    let fake = Fake::new([Act::Hold, Act::Settle, Act::Settle, Act::Hold]);
    let submitter = fake.client(&["a:1", "b:2"], 5000).submitter(8);
    let one = batch();
    let first = submitter.reserve().await.submit(one.clone());
    // Others are answered meanwhile, so the stream is kept, and the first is sent once more on it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(submitter.submit(batch()).await.result.is_ok());
    let first = first.await;
    assert_eq!((&first.result, first.lost), (&Ok(Outcome::Committed { stamp: 1 }), 1));
    assert_eq!(submitter.stats(), crate::SubmitterStats { streams: 1, resubmitted: 1 });
    let other = Batch { zero_sum: true, ..one };
    let second = submitter.reserve().await.submit(other);
    tokio::time::sleep(Duration::from_millis(20)).await;
    fake.release();
    let second = second.await;
    assert!(matches!(second.result, Err(ClientError::DifferentContents { .. })), "{second:?}");
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_to_a_batch_that_pauses_before_its_next_try_ends_it() {
    let fake = Fake::new([Act::Hold, Act::Settle, Act::Undecided, Act::Undecided]);
    let submitter = fake.client(&["a:1"], 5000).submitter(8);
    let first = submitter.reserve().await.submit(batch());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(submitter.submit(batch()).await.result.is_ok());
    while fake.tries().len() < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    fake.release();
    let first = first.await;
    assert_eq!(first.result, Ok(Outcome::Committed { stamp: 1 }));
    // What was still to be done for it is done for nobody, and the others go on.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert!(submitter.submit(batch()).await.result.is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_answer_for_a_batch_that_is_not_in_flight_is_nobodys() {
    let fake = Fake::new([Act::Babble, Act::Babble]);
    let submitter = fake.client(&["a:1"], 5000).submitter(8);
    for stamp in 1..=2 {
        let answer = submitter.submit(batch()).await;
        assert_eq!((answer.result, answer.lost), (Ok(Outcome::Committed { stamp }), 0));
    }
    assert_eq!(submitter.stats().streams, 1, "and no reason to leave the stream");
}
