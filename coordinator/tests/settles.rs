//! A real coordinator group of one voter, on a real disk, with participants that follow a script.
//!
//! Node 1 has the coordinator's only replica and leads shard 1; node 2 is a gateway without a replica and leads shard 2. So the
//! router has to find shard 2 by node 1's hint, and every call to node 2 has to be forwarded.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::StatusExt as _;
use verdict_coordinator::{CoordinatorConfig, CoordinatorNode, NoShards};
use verdict_proto::{
    connect::{Connect, InProcess},
    convert::{
        encoded, from_shard_to_wire, not_leader_to_wire, read_answer_to_wire, split_to_wire,
        to_shard_from_wire,
    },
    v1::{
        self,
        admin_client::AdminClient,
        forward_client::ForwardClient,
        outcome,
        participant_server::{Participant, ParticipantServer},
        settlement_client::SettlementClient,
    },
};
use verdict_protocol::{
    batch::{Batch, Placement},
    ids::{BatchId, Millis, NodeId, Number, ShardId, Stamp},
    messages::{
        Abort, AbortReason, Done, FromShard, Greeting, HeldPart, RowAt, ShardQuery, ShardReadAnswer, Vote,
        VoteKind,
    },
    wire::EncodedPart,
};
use verdict_raft::{Host, HostConfig, Limits, Timing};

const PLACEMENT: Placement = Placement { shards: 2 };

/// A participant that holds what it promised, votes NO on partitions named `poor…`, and loses its first answers if told so.
#[derive(Clone)]
struct Script {
    leads: ShardId,
    elsewhere: NodeId,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    held: BTreeMap<Number, HeldPart>,
    committed: Vec<BatchId>,
    prepares: usize,
    greetings: usize,
    /// Streams break instead of carrying so many answers to prepares.
    breaks: usize,
    /// It takes prepares and doesn't answer them.
    silent: bool,
    /// The batches of such prepares.
    unanswered: BTreeSet<BatchId>,
}

type Said = Pin<Box<dyn Stream<Item = Result<v1::ParticipantMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Participant for Script {
    type ExchangeStream = Said;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::CoordinatorMessage>>,
    ) -> Result<Response<Said>, Status> {
        let mut incoming = request.into_inner();
        let script = self.clone();
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                for answer in script.answer(message) {
                    let broken = answer.is_err();
                    if sender.send(answer).await.is_err() || broken {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Script {
    fn new(leads: u32, elsewhere: u64) -> Script {
        Script { leads: ShardId(leads), elsewhere: NodeId(elsewhere), state: Arc::default() }
    }

    fn answer(&self, message: v1::CoordinatorMessage) -> Vec<Result<v1::ParticipantMessage, Status>> {
        let told = to_shard_from_wire(message).unwrap();
        if told.shard != self.leads {
            return vec![Ok(not_leader_to_wire(told.shard, Some(self.elsewhere)))];
        }
        let mut state = self.state.lock().unwrap();
        let mut answer = FromShard::default();
        if state.silent {
            state.unanswered.extend(told.message.prepares.iter().map(|prepare| prepare.id));
            return vec![];
        }
        if told.message.greet {
            state.greetings += 1;
            let parts = state.held.values().cloned().collect();
            answer.greeting = Some(Greeting { epoch: told.message.epoch, parts });
        }
        for outcome in told.message.outcomes {
            let held = state.held.remove(&outcome.number);
            if outcome.commit.is_some() && held.is_some() {
                state.committed.push(outcome.id);
            }
            answer.done.push(Done { id: outcome.id, number: outcome.number, lost: false });
        }
        for prepare in told.message.prepares {
            state.prepares += 1;
            let part = prepare.part.decode().unwrap();
            let poor = part.iter().any(|(_, one)| one.row.partition().starts_with("poor"));
            let kind = match poor {
                true => {
                    VoteKind::No(Abort { operation: Some(1), ..Abort::because(AbortReason::ShortOfFunds) })
                }
                false => VoteKind::Yes,
            };
            let held = HeldPart {
                number: prepare.number,
                id: prepare.id,
                hash: prepare.hash,
                shards: prepare.shards,
                vote: kind.clone(),
            };
            state.held.insert(prepare.number, held);
            answer.votes.push(Vote { id: prepare.id, number: prepare.number, kind });
        }
        if !answer.votes.is_empty() && state.breaks > 0 {
            state.breaks -= 1;
            return vec![Err(Status::unavailable("the script breaks the stream"))];
        }
        let mut messages = from_shard_to_wire(told.shard, &answer);
        if !told.reads.is_empty() {
            let reads = told.reads.iter().map(|(request, read)| {
                let answer = match &read.query {
                    ShardQuery::Rows(rows) => ShardReadAnswer::Rows(vec![RowAt::default(); rows.len()]),
                    ShardQuery::History { .. } => {
                        ShardReadAnswer::History { changes: vec![], next: None, oldest: Stamp(0) }
                    }
                };
                read_answer_to_wire(*request, &answer)
            });
            let reads = reads.collect();
            messages.push(v1::ParticipantMessage { shard: told.shard.0, reads, ..Default::default() });
        }
        messages.into_iter().map(Ok).collect()
    }
}

struct Running {
    node: CoordinatorNode,
    host: Host,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        // Connections take no more calls from here on; those with endless streams don't end by themselves.
        let _ = self.stop.send(());
        self.node.shutdown().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.server.abort();
        let _ = self.server.await;
        self.host.shutdown().await;
    }
}

fn address(node: u64) -> String {
    format!("node{node}:1")
}

async fn start(
    network: &InProcess,
    directory: &Path,
    node: u64,
    script: &Script,
    change: impl FnOnce(&mut CoordinatorConfig),
) -> Running {
    start_among(&[1], network, directory, node, script, change).await
}

async fn start_among(
    voters: &[u64],
    network: &InProcess,
    directory: &Path,
    node: u64,
    script: &Script,
    change: impl FnOnce(&mut CoordinatorConfig),
) -> Running {
    if std::env::var_os("RUST_LOG").is_some() {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
    }
    let connect: Arc<dyn Connect> = Arc::new(network.clone());
    let host_config = HostConfig {
        cluster: "test".into(),
        node: NodeId(node),
        address: address(node),
        directory: directory.join(format!("node{node}")),
        timing: Timing {
            heartbeat_ms: 50,
            election_timeout_min_ms: 150,
            election_timeout_max_ms: 300,
            ..Timing::default()
        },
        limits: Limits::default(),
    };
    let host = Host::open(host_config, connect.clone()).await.unwrap();
    let nodes = [(NodeId(1), address(1)), (NodeId(2), address(2))].into();
    let mut config = CoordinatorConfig::new(NodeId(node), nodes, PLACEMENT);
    change(&mut config);
    let voters = voters.iter().map(|voter| (NodeId(*voter), address(*voter))).collect();
    let coordinator =
        CoordinatorNode::start(config, &host, &voters, connect, Arc::new(NoShards)).await.unwrap();
    let (stop, stopped) = oneshot::channel();
    let server = Server::builder()
        .add_service(host.service())
        .add_service(coordinator.settlement_service())
        .add_service(coordinator.forward_service())
        .add_service(coordinator.admin_service())
        .add_service(ParticipantServer::new(script.clone()))
        .serve_with_incoming_shutdown(ReceiverStream::new(network.listen(&address(node))), async {
            let _ = stopped.await;
        });
    let server = tokio::spawn(async move { server.await.unwrap() });
    Running { node: coordinator, host, stop, server }
}

struct Cluster {
    network: InProcess,
    directory: tempfile::TempDir,
    scripts: [Script; 2],
    nodes: Vec<Running>,
}

impl Cluster {
    async fn start() -> Cluster {
        Cluster::start_among(&[1], |_| {}).await
    }

    async fn start_among(voters: &[u64], change: impl Fn(&mut CoordinatorConfig)) -> Cluster {
        let network = InProcess::default();
        let directory = tempfile::tempdir().unwrap();
        let scripts = [Script::new(1, 2), Script::new(2, 1)];
        let mut nodes = Vec::new();
        for (node, script) in [1, 2].into_iter().zip(&scripts) {
            nodes.push(start_among(voters, &network, directory.path(), node, script, &change).await);
        }
        Cluster { network, directory, scripts, nodes }
    }

    /// The place of the node that leads, once one of them does and all shards have answered it.
    async fn led(&self) -> usize {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let asked = self.nodes[0].node.get_batch(question(id(1))).await.unwrap();
            let leader = self.nodes.iter().position(|node| node.node.leads());
            if let (v1::UndecidedState::NotSeen, Some(leader)) = (undecided(asked), leader) {
                return leader;
            }
            assert!(tokio::time::Instant::now() < deadline, "never recovered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// From now on the shards take prepares, and say nothing.
    fn hush(&self) {
        for script in &self.scripts {
            script.state.lock().unwrap().silent = true;
        }
    }

    /// Waits until each shard has had prepares of so many batches that it says nothing of.
    async fn prepared(&self, batches: usize) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while self.scripts.iter().any(|script| script.state.lock().unwrap().unanswered.len() < batches) {
            assert!(tokio::time::Instant::now() < deadline, "not all prepares have come");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
    }

    fn forward(&self, node: u64) -> ForwardClient<tonic::transport::Channel> {
        ForwardClient::new(self.network.channel(&address(node)).unwrap())
    }

    fn settlement(&self, node: u64) -> SettlementClient<tonic::transport::Channel> {
        SettlementClient::new(self.network.channel(&address(node)).unwrap())
    }

    fn admin(&self, node: u64) -> AdminClient<tonic::transport::Channel> {
        AdminClient::new(self.network.channel(&address(node)).unwrap())
    }
}

/// The answers of a stream, one by one.
fn each(answers: Streaming<v1::SubmitStreamResponse>) -> impl Stream<Item = v1::SubmitAnswer> {
    answers.flat_map(|message| futures::stream::iter(message.unwrap().answers))
}

/// Far longer than anything takes here, on a machine that stands still for seconds too.
const PATIENCE: Duration = Duration::from_secs(60);

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

fn id(n: u64) -> BatchId {
    id_at(now_ms(), n)
}

fn id_at(ms: u64, n: u64) -> BatchId {
    let mut tail = [0; 10];
    tail[2..].copy_from_slice(&n.to_be_bytes());
    BatchId::from_parts(Millis(ms), tail)
}

/// Two partitions on the two shards, with a prefix.
fn partitions(prefix: &str) -> [String; 2] {
    [1, 2].map(|shard| {
        let mut names = (0..).map(|n| format!("{prefix}{n}"));
        names.find(|name| PLACEMENT.shard_of(name) == ShardId(shard)).unwrap()
    })
}

fn add(partition: &str, delta: &str) -> v1::Operation {
    v1::Operation {
        row: Some(v1::Row { partition: partition.into(), name: "USD".into() }),
        kind: Some(v1::operation::Kind::Add(v1::Add { delta: delta.into(), floor: None, ceiling: None })),
    }
}

fn transfer(id: BatchId, prefix: &str, amount: i64) -> v1::Batch {
    let [from, to] = partitions(prefix);
    let operations = vec![add(&from, &format!("-{amount}")), add(&to, &amount.to_string())];
    v1::Batch { id: id.to_string(), timeout_ms: 30_000, operations, zero_sum: true }
}

fn stamp(outcome: v1::Outcome) -> u64 {
    match outcome.result {
        Some(outcome::Result::Committed(committed)) => committed.stamp,
        other => panic!("not committed: {other:?}"),
    }
}

fn aborted(outcome: v1::Outcome) -> v1::Aborted {
    match outcome.result {
        Some(outcome::Result::Aborted(aborted)) => aborted,
        other => panic!("not aborted: {other:?}"),
    }
}

fn undecided(outcome: v1::Outcome) -> v1::UndecidedState {
    match outcome.result {
        Some(outcome::Result::Undecided(undecided)) => undecided.state(),
        other => panic!("decided: {other:?}"),
    }
}

fn question(id: BatchId) -> v1::GetBatchRequest {
    v1::GetBatchRequest { batch_id: id.to_string(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_has_one_outcome_wherever_and_however_often_it_is_submitted() {
    let cluster = Cluster::start().await;
    let trade = transfer(id(1), "user:", 5);
    let first = stamp(cluster.nodes[0].node.submit(trade.clone()).await.unwrap());
    for node in 0..2 {
        let again = cluster.nodes[node].node.submit(trade.clone()).await.unwrap();
        assert_eq!(stamp(again), first);
        let told = cluster.nodes[node].node.get_batch(question(id_of(&trade))).await.unwrap();
        assert_eq!(stamp(told), first);
        let mut other = trade.clone();
        other.operations[0] = add("user:0", "-6");
        other.zero_sum = false;
        let refused = cluster.nodes[node].node.submit(other).await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    }
    let poor = transfer(id(2), "poor:", 5);
    let answer = aborted(cluster.nodes[1].node.submit(poor).await.unwrap());
    assert_eq!((answer.reason(), answer.operation), (v1::AbortReason::ShortOfFunds, Some(1)));
    for script in &cluster.scripts {
        assert_eq!(script.state.lock().unwrap().committed, [id_of(&trade)]);
    }
    cluster.stop().await;
}

fn id_of(batch: &v1::Batch) -> BatchId {
    verdict_proto::convert::batch_id("id", &batch.id).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_batch_of_a_stream_is_answered_on_its_own_through_either_node() {
    let cluster = Cluster::start().await;
    for node in [1, 2] {
        let mut batches: Vec<v1::Batch> = (0..2000).map(|n| transfer(id(n), "user:", 1)).collect();
        // The same id twice on one stream, and one batch that is wrong.
        batches.push(batches[0].clone());
        let mut wrong = transfer(id(9999), "user:", 1);
        wrong.operations[1] = add("user:0", "x");
        batches.push(wrong.clone());
        let mut client = cluster.settlement(node);
        while !batches.is_empty() {
            let total = batches.len();
            let requests: Vec<_> = batches.iter().map(|batch| v1::SubmitStreamRequest::of([batch])).collect();
            let answers = client.submit_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
            let answers: Vec<_> = each(answers).collect().await;
            assert_eq!(answers.len(), total);
            let mut refused = Vec::new();
            for answer in answers {
                match answer.result.unwrap() {
                    v1::submit_answer::Result::Outcome(outcome) => {
                        stamp(outcome);
                    }
                    // A machine that is busy with something else takes fewer at once.
                    v1::submit_answer::Result::Error(error)
                        if error.code == Code::ResourceExhausted as i32 =>
                    {
                        refused.push(answer.batch_id);
                    }
                    v1::submit_answer::Result::Error(error) => {
                        assert_eq!(answer.batch_id, wrong.id);
                        assert_eq!(error.code, Code::InvalidArgument as i32);
                        assert_eq!(error.field, "batch.operations[1].add.delta");
                    }
                }
            }
            assert!(refused.len() < total, "nothing gets in");
            batches.retain(|batch| refused.contains(&batch.id));
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_decided_nothing_is_an_error_that_names_the_thing() {
    let cluster = Cluster::start().await;
    for node in 0..2 {
        let node = &cluster.nodes[node].node;
        // The first call waits for the leader.
        stamp(node.submit(transfer(id(1), "user:", 1)).await.unwrap());
        let future = transfer(id_at(now_ms() + 3_600_000, 1), "user:", 1);
        let status = node.submit(future).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let violation = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(violation.field, "batch.id");
        assert!(violation.description.contains("ms ahead"), "{}", violation.description);
        let status =
            node.submit(v1::Batch { id: id(3).to_string(), ..Default::default() }).await.unwrap_err();
        assert_eq!(
            status.get_error_details().bad_request().unwrap().field_violations[0].field,
            "batch.operations"
        );
        let ahead = BatchId::from_parts(Millis(id(1).time().0 + 3_600_000), [1; 10]);
        let refused = node.get_batch(question(ahead)).await.unwrap_err();
        let fields = refused.get_details_bad_request().unwrap().field_violations;
        assert_eq!(fields[0].field, "batch_id", "{refused}");
        let rows = vec![v1::Row { partition: "a".into(), name: String::new() }];
        let status = node.read(v1::ReadRequest { rows }).await.unwrap_err();
        assert_eq!(
            status.get_error_details().bad_request().unwrap().field_violations[0].field,
            "rows[0].name"
        );
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_about_an_id_is_answered_by_the_leader_and_can_make_an_end() {
    let cluster = Cluster::start().await;
    for node in 0..2 {
        let node = &cluster.nodes[node].node;
        let unseen = id(1);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        // Until every shard has answered the greeting a part of it might be somewhere.
        while undecided(node.get_batch(question(unseen)).await.unwrap()) == v1::UndecidedState::InProgress {
            assert!(tokio::time::Instant::now() < deadline, "never recovered");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(undecided(node.get_batch(question(unseen)).await.unwrap()), v1::UndecidedState::NotSeen);
        let end = v1::GetBatchRequest { abort_if_not_seen: true, ..question(unseen) };
        assert_eq!(aborted(node.get_batch(end).await.unwrap()).reason(), v1::AbortReason::Cancelled);
        let late = aborted(node.submit(transfer(unseen, "user:", 1)).await.unwrap());
        assert_eq!(late.reason(), v1::AbortReason::Cancelled);
        let rows = vec![v1::Row { partition: "a".into(), name: "x".into() }; 2];
        let read = node.read(v1::ReadRequest { rows: rows.clone() }).await.unwrap();
        assert_eq!(read.values.len(), 2);
        let history = v1::HistoryRequest { row: Some(rows[0].clone()), from: 0, limit: 0 };
        assert!(node.history(history).await.unwrap().entries.is_empty());
    }
    cluster.stop().await;
}

/// Another one may lead by now, and have recorded what this one doesn't know of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hears_nobody_says_nothing_of_an_id() {
    let mut cluster = Cluster::start_among(&[1, 2], |_| {}).await;
    let leader = cluster.led().await;
    cluster.nodes.remove(1 - leader).stop().await;
    let kept = cluster.nodes[0].node.clone();
    let asked = tokio::time::timeout(Duration::from_secs(1), kept.get_batch(question(id(2)))).await;
    if let Ok(Ok(outcome)) = asked {
        panic!("nobody has confirmed that it leads, and it says {outcome:?}");
    }
    let row = v1::Row { partition: "a".into(), name: "x".into() };
    let rows = v1::ReadRequest { rows: vec![row.clone()] };
    let history = v1::HistoryRequest { row: Some(row), from: 0, limit: 0 };
    let mut admin = cluster.admin(leader as u64 + 1);
    let second = Duration::from_secs(1);
    let (read, history, list) = tokio::join!(
        tokio::time::timeout(second, kept.read(rows)),
        tokio::time::timeout(second, kept.history(history)),
        tokio::time::timeout(second, admin.list_decisions(v1::ListDecisionsRequest::default())),
    );
    assert!(!matches!(read, Ok(Ok(_))), "rows: {read:?}");
    assert!(!matches!(history, Ok(Ok(_))), "the history of a row: {history:?}");
    assert!(!matches!(list, Ok(Ok(_))), "decisions: {list:?}");
    // The wish may have reached a leader, or reach one yet.
    let mut seal = Request::new(v1::GetBatchRequest { abort_if_not_seen: true, ..question(id(3)) });
    seal.set_timeout(Duration::from_millis(800));
    let sealed = cluster.settlement(leader as u64 + 1).get_batch(seal).await.unwrap().into_inner();
    assert_eq!(undecided(sealed.outcome.unwrap()), v1::UndecidedState::Unknown);
    cluster.stop().await;
}

/// "Nothing was proposed" would be believed, and the trade made again under another id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_under_way_at_a_leader_that_is_gone_is_unknown() {
    for voters in [&[1][..], &[1, 2]] {
        let mut cluster = Cluster::start_among(voters, |config| config.grace_ms = 100).await;
        let leader = cluster.led().await;
        cluster.hush();
        // With one voter the call comes through the gateway, and the leader goes. With two it comes to the leader, which loses its quorum.
        let asked = if voters.len() == 1 { 1 - leader } else { leader };
        let node = cluster.nodes[asked].node.clone();
        let mut client = cluster.settlement(asked as u64 + 1);
        let batch = |n| v1::Batch { timeout_ms: 4000, ..transfer(id(n), "user:", 1) };
        let single = tokio::spawn(async move { node.submit(batch(2)).await });
        let requests = (10..15).map(move |n| v1::SubmitStreamRequest::of([&batch(n)]));
        // The stream stays open, as that of a client which has more to send.
        let requests = tokio_stream::iter(requests).chain(futures::stream::pending());
        let answers = client.submit_stream(requests).await.unwrap().into_inner();
        // As another node hands one over.
        let forwarded = Batch::from_wire(&encoded(&batch(3)), 10).unwrap().split(PLACEMENT);
        let forwarded =
            v1::ForwardRequest { shards: PLACEMENT.shards, batches: vec![split_to_wire(&forwarded)] };
        let forwarded = tokio_stream::iter([forwarded]).chain(futures::stream::pending());
        let forwarded = cluster.forward(leader as u64 + 1).exchange(forwarded).await.unwrap().into_inner();
        cluster.prepared(7).await;
        let gone = cluster.nodes.remove(1 - asked);
        gone.stop().await;
        assert_eq!(undecided(single.await.unwrap().unwrap()), v1::UndecidedState::Unknown, "{voters:?}");
        match forwarded.into_future().await.0.unwrap() {
            Ok(said) => match said.answers[0].result.clone().unwrap() {
                v1::submit_answer::Result::Outcome(outcome) => {
                    assert_eq!(undecided(outcome), v1::UndecidedState::Unknown, "{voters:?}");
                }
                v1::submit_answer::Result::Error(error) => panic!("{voters:?}: {error:?}"),
            },
            // The connection may have gone first, which says nothing.
            Err(status) => {
                assert!(status.get_error_details().error_info().is_none(), "{voters:?}: {status:?}")
            }
        }
        for answer in each(answers).take(5).collect::<Vec<_>>().await {
            match answer.result.unwrap() {
                v1::submit_answer::Result::Outcome(outcome) => {
                    assert_eq!(undecided(outcome), v1::UndecidedState::Unknown, "{voters:?}");
                }
                v1::submit_answer::Result::Error(error) => panic!("{voters:?}: {error:?}"),
            }
        }
        cluster.stop().await;
    }
}

/// Promise G9, at the door of a node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_taken_than_a_node_has_room_for() {
    let cluster = Cluster::start_among(&[1], |config| {
        (config.submissions_max, config.stream_window, config.grace_ms) = (4, 3, 100);
    });
    let cluster = cluster.await;
    cluster.led().await;
    cluster.hush();
    let batches: Vec<_> =
        (0..20).map(|n| v1::Batch { timeout_ms: 1500, ..transfer(id(n), "user:", 1) }).collect();
    let requests = batches.clone().into_iter().map(|batch| v1::SubmitStreamRequest::of([&batch]));
    let requests = tokio_stream::iter(requests).chain(futures::stream::pending());
    let stream = cluster.settlement(1).submit_stream(requests).await.unwrap();
    cluster.prepared(1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let taken = cluster.scripts[0].state.lock().unwrap().unanswered.len();
    assert!(taken <= 3, "{taken} of a stream with a window of 3");
    drop(stream);
    let node = &cluster.nodes[0].node;
    let last = tokio::spawn({
        let (node, batch) = (node.clone(), batches[3].clone());
        async move { node.submit(batch).await }
    });
    cluster.prepared(4).await;
    // Again, and in a hurry: the door is full, and knows nothing of those that are under way.
    for batch in &batches[..4] {
        let hurried = node.submit(v1::Batch { timeout_ms: 100, ..batch.clone() }).await;
        let code = hurried.map_err(|status| status.code());
        assert_ne!(code, Err(Code::Unavailable), "an earlier try may be proposed");
    }
    last.await.unwrap().unwrap();
    let calls = futures::future::join_all(batches.into_iter().map(|batch| node.submit(batch))).await;
    let refused =
        |code| calls.iter().filter(|call| call.as_ref().is_err_and(|status| status.code() == code)).count();
    let turned_away = refused(Code::ResourceExhausted);
    assert!(
        turned_away >= 12,
        "of 20 calls {turned_away} found no room where there is some for 4: {calls:?}"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn votes_that_are_lost_with_their_stream_are_asked_for_again() {
    let cluster = Cluster::start().await;
    let node = &cluster.nodes[0].node;
    stamp(node.submit(transfer(id(1), "user:", 1)).await.unwrap());
    cluster.scripts[1].state.lock().unwrap().breaks = 2;
    // Without them it would be aborted in the end.
    stamp(node.submit(transfer(id(2), "user:", 1)).await.unwrap());
    assert!(cluster.scripts[1].state.lock().unwrap().prepares > 2);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_leader_remembers_and_goes_on_and_waiting_callers_are_served() {
    let mut cluster = Cluster::start().await;
    let settled = transfer(id(1), "user:", 1);
    let first = stamp(cluster.nodes[1].node.submit(settled.clone()).await.unwrap());
    cluster.nodes.remove(0).stop().await;
    // Node 2 has nobody to forward to, and keeps trying.
    let gateway = cluster.nodes[0].node.clone();
    let waiting = transfer(id(2), "user:", 1);
    let waits = tokio::spawn({
        let (gateway, waiting) = (gateway.clone(), waiting.clone());
        async move { gateway.submit(waiting).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let again = start(&cluster.network, cluster.directory.path(), 1, &cluster.scripts[0], |_| {}).await;
    let second = stamp(waits.await.unwrap().unwrap());
    assert!(second > first, "stamps grow across epochs");
    assert_eq!(stamp(gateway.submit(settled).await.unwrap()), first);
    let listed =
        cluster.admin(2).list_decisions(v1::ListDecisionsRequest::default()).await.unwrap().into_inner();
    let ids: Vec<_> =
        listed.decisions.iter().map(|decision| decision.outcome.clone().unwrap().batch_id).collect();
    assert_eq!(ids, [transfer_id(&cluster, 0), waiting.id]);
    assert_eq!(listed.next, 0);
    let (mut paged, mut from) = (Vec::new(), 0);
    for _ in 0..ids.len() {
        let request = v1::ListDecisionsRequest { from, limit: 1 };
        let page = cluster.admin(2).list_decisions(request).await.unwrap().into_inner();
        paged.extend(page.decisions.into_iter().map(|decision| decision.outcome.unwrap().batch_id));
        from = page.next;
    }
    assert_eq!((paged, from), (ids, 0), "one at a time");
    cluster.nodes.push(again);
    cluster.stop().await;
}

fn transfer_id(cluster: &Cluster, place: usize) -> String {
    cluster.scripts[0].state.lock().unwrap().committed[place].to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_nothing_was_proposed_and_the_error_says_so() {
    let mut cluster = Cluster::start().await;
    cluster.nodes.remove(0).stop().await;
    let batch = v1::Batch { timeout_ms: 1, ..transfer(id(1), "user:", 1) };
    let status = cluster.nodes[0].node.submit(batch.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().domain, "verdict");
    assert!(details.retry_info().is_some());
    // The caller's own time limit counts too: the answer comes a little earlier. If the machine stands still just then, it comes too late.
    let patient = v1::Batch { timeout_ms: 60_000, ..batch };
    let mut status = Status::ok("");
    for limit_ms in [400, 2000, 10_000] {
        let mut request = Request::new(v1::SubmitRequest::of(&patient));
        request.set_timeout(Duration::from_millis(limit_ms));
        status = cluster.settlement(2).submit(request).await.unwrap_err();
        if !matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) {
            break;
        }
    }
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.get_error_details().retry_info().is_some());
    cluster.stop().await;
}

/// Promise G9: what is refused without a place in the window is told before more is looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_of_many_batches_is_answered_a_piece_at_a_time() {
    let cluster = Cluster::start_among(&[1], |_| {}).await;
    cluster.led().await;
    let mut client = cluster.settlement(1);
    let nothing = |count| v1::SubmitStreamRequest { batches: vec![Bytes::new(); count] };
    let good = transfer(id(1), "user:", 1);
    let requests = [nothing(50_000), v1::SubmitStreamRequest::of([&good])];
    let mut messages = client.submit_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let (mut refused, mut decided) = (0, 0);
    while let Some(message) = messages.message().await.unwrap() {
        assert!(
            message.answers.len() <= 2048,
            "{} answers were made before any was sent",
            message.answers.len()
        );
        for answer in message.answers {
            match answer.result.unwrap() {
                v1::submit_answer::Result::Error(error) => {
                    assert_eq!((error.code, error.field.as_str()), (Code::InvalidArgument as i32, "batch"));
                    refused += 1;
                }
                v1::submit_answer::Result::Outcome(outcome) => {
                    stamp(outcome);
                    decided += 1;
                }
            }
        }
    }
    assert_eq!((refused, decided), (50_000, 1));
    let mut ended = client.submit_stream(tokio_stream::iter([nothing(70_000)])).await.unwrap().into_inner();
    assert_eq!(ended.message().await.unwrap_err().code(), Code::InvalidArgument);
    cluster.stop().await;
}

/// It would end the stream to the shard, with all that others have on it, whenever it was sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarded_part_that_no_shard_would_take_is_refused_and_others_settle() {
    let cluster = Cluster::start_among(&[1], |_| {}).await;
    cluster.led().await;
    let split = |n| Batch::from_wire(&encoded(&transfer(id(n), "user:", 1)), 10).unwrap().split(PLACEMENT);
    let (mut garbled, mut elsewhere) = (split(1), split(2));
    garbled.parts[0].1 = EncodedPart::from_wire(Bytes::from_static(b"garbage"));
    let other = elsewhere.parts[1].1.clone();
    elsewhere.parts[0].1 = other;
    let good = split(3);
    let batches = [&garbled, &elsewhere, &good].map(split_to_wire).to_vec();
    let request = v1::ForwardRequest { shards: PLACEMENT.shards, batches };
    let mut client = cluster.forward(1);
    let mut messages = client.exchange(tokio_stream::iter([request])).await.unwrap().into_inner();
    let mut answers = BTreeMap::new();
    while let Some(message) = messages.message().await.unwrap() {
        answers.extend(message.answers.into_iter().map(|answer| (answer.batch_id, answer.result.unwrap())));
    }
    for refused in [garbled.id, elsewhere.id] {
        let v1::submit_answer::Result::Error(error) = &answers[&refused.to_string()] else {
            panic!("{answers:?}")
        };
        assert_eq!(error.code, Code::InvalidArgument as i32, "{error:?}");
    }
    let v1::submit_answer::Result::Outcome(outcome) = answers[&good.id.to_string()].clone() else {
        panic!("{answers:?}")
    };
    stamp(outcome);
    // Whoever hears a word of this node knows that nothing of the message was given to anybody.
    let many = v1::ForwardRequest { shards: PLACEMENT.shards, batches: vec![split_to_wire(&split(4)); 1025] };
    let mut ended = client.exchange(tokio_stream::iter([many])).await.unwrap().into_inner();
    let status = ended.message().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.get_error_details().error_info().unwrap().domain, "verdict");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_with_another_placement_refuses_to_lead() {
    let mut cluster = Cluster::start().await;
    stamp(cluster.nodes[1].node.submit(transfer(id(1), "user:", 1)).await.unwrap());
    cluster.nodes.remove(0).stop().await;
    let other = start(&cluster.network, cluster.directory.path(), 1, &cluster.scripts[0], |config| {
        config.placement = Placement { shards: 3 };
        config.leader.placement = config.placement;
    });
    cluster.nodes.push(other.await);
    let batch = v1::Batch { timeout_ms: 1, ..transfer(id(2), "user:", 1) };
    for node in &cluster.nodes {
        let status = node.node.submit(batch.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_shows_every_node_and_whom_nobody_can_reach() {
    let mut cluster = Cluster::start().await;
    stamp(cluster.nodes[0].node.submit(transfer(id(1), "user:", 1)).await.unwrap());
    let mut admin = cluster.admin(2);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let status = loop {
        let status = admin.status(v1::StatusRequest::default()).await.unwrap().into_inner();
        // Each node is given a second.
        if status.nodes.iter().all(|node| node.reachable) {
            break status;
        }
        assert!(tokio::time::Instant::now() < deadline, "{status:?}");
    };
    assert_eq!(status.nodes.len(), 2);
    let group = &status.nodes[0].groups[0];
    assert_eq!((group.role(), group.leader, group.decisions), (v1::ReplicaRole::Leader, 1, 1));
    assert_eq!(group.state_hash.len(), 64);
    assert!(group.epoch > 0 && group.state_hash_index > group.epoch);
    assert!(status.nodes[1].groups.is_empty() && status.nodes[1].reachable);
    let snapshot =
        cluster.admin(1).trigger_snapshot(v1::TriggerSnapshotRequest { group_id: 0 }).await.unwrap();
    assert!(snapshot.into_inner().index >= group.state_hash_index);
    let nobody = admin.trigger_snapshot(v1::TriggerSnapshotRequest { group_id: 0 }).await.unwrap_err();
    assert_eq!(nobody.code(), Code::NotFound);
    let alone =
        admin.transfer_leader(v1::TransferLeaderRequest { group_id: 0, to_node: 0 }).await.unwrap_err();
    assert_eq!(alone.code(), Code::FailedPrecondition, "{alone}");
    let in_doubt = admin.list_in_doubt(v1::ListInDoubtRequest::default()).await.unwrap().into_inner();
    assert_eq!(in_doubt.unreachable_shards, [1, 2], "nobody has shards here");
    cluster.nodes.remove(0).stop().await;
    let status = admin.status(v1::StatusRequest::default()).await.unwrap().into_inner();
    assert!(!status.nodes[0].reachable && !status.nodes[0].error.is_empty());
    cluster.stop().await;
}
