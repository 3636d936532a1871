//! Real hosts with databases on disk, and the test as the coordinator at the other end of the stream.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use verdict_participant::{Participant, ParticipantConfig, ParticipantLimits, StartError};
use verdict_proto::{
    connect::{Connect, InProcess},
    convert::{Assembler, ShardTold, to_shard_to_wire},
    v1::{self, participant_client::ParticipantClient},
};
use verdict_protocol::{
    batch::{Operation, OperationKind, Placement, RowKey},
    ids::{BatchId, ContentHash, Epoch, Millis, NodeId, Number, ShardId, Stamp},
    messages::{
        Done, FromShard, Greeting, HeldPart, PartOutcome, Prepare, RowAt, RowValue, ShardQuery, ShardRead,
        ShardReadAnswer, ToShard, Vote, VoteKind,
    },
    wire::EncodedPart,
};
use verdict_raft::{Host, HostConfig, Limits, Timing};

/// Far longer than anything takes here, on a machine that stands still for seconds too.
const PATIENCE: Duration = Duration::from_secs(60);
const SHARD: ShardId = ShardId(1);

fn address(node: u64) -> String {
    format!("node{node}:1")
}

/// A node with replicas of shards and a server.
struct Node {
    host: Host,
    participant: Participant,
    server: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Node {
    async fn start(network: &InProcess, directory: &Path, node: u64, voters: u64, shards: u32) -> Node {
        let config = HostConfig {
            cluster: "test".to_owned(),
            node: NodeId(node),
            address: address(node),
            directory: directory.join(node.to_string()),
            // A leader stays one though the machine stands still for some seconds: these tests are not about elections.
            timing: Timing {
                election_timeout_min_ms: 4000,
                election_timeout_max_ms: 5000,
                ..Timing::default()
            },
            limits: Limits::default(),
        };
        let host = Host::open(config, Arc::new(network.clone())).await.unwrap();
        let voters: BTreeMap<NodeId, String> =
            (1..=voters).map(|node| (NodeId(node), address(node))).collect();
        let placement = Placement { shards };
        let voters = placement.all().map(|shard| (shard, voters.clone())).collect();
        let limits = ParticipantLimits { ask_after_ms: 200, ..Default::default() };
        let config =
            ParticipantConfig { node: NodeId(node), placement, shards: placement.all().collect(), limits };
        let participant = Participant::start(config, &host, &voters).await.unwrap();
        let incoming = ReceiverStream::new(network.listen(&address(node)));
        let (server, stop) = oneshot::channel::<()>();
        let router = tonic::transport::Server::builder()
            .add_service(host.service())
            .add_service(participant.service());
        let task = tokio::spawn(async move {
            let stop = async { drop(stop.await) };
            router.serve_with_incoming_shutdown(incoming, stop).await.unwrap();
        });
        Node { host, participant, server, task }
    }

    fn leads(&self) -> bool {
        self.participant.group(SHARD).unwrap().leadership().borrow().is_leader
    }

    async fn stop(self) {
        self.participant.shutdown().await;
        self.host.shutdown().await;
        drop(self.server);
        self.task.abort();
        let _ = self.task.await;
    }
}

/// One node that leads its shards.
async fn single(shards: u32) -> (InProcess, TempDir, Node) {
    let (network, directory) = (InProcess::default(), tempfile::tempdir().unwrap());
    let node = Node::start(&network, directory.path(), 1, 1, shards).await;
    until(|| node.leads()).await;
    (network, directory, node)
}

/// Three nodes with a replica each of one shard, and which of them leads.
async fn three() -> (InProcess, TempDir, BTreeMap<u64, Node>, u64) {
    let (network, directory) = (InProcess::default(), tempfile::tempdir().unwrap());
    let mut nodes = BTreeMap::new();
    for node in 1..=3 {
        nodes.insert(node, Node::start(&network, directory.path(), node, 3, 1).await);
    }
    until(|| nodes.values().any(Node::leads)).await;
    let leader = *nodes.iter().find(|(_, node)| node.leads()).unwrap().0;
    (network, directory, nodes, leader)
}

async fn until(happened: impl Fn() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "it doesn't happen");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The coordinator's end of a stream.
struct Stream {
    outgoing: mpsc::Sender<v1::CoordinatorMessage>,
    incoming: Streaming<v1::ParticipantMessage>,
    assembler: Assembler,
    /// As the node is configured.
    placement: Placement,
    /// What the shard has asked about by itself, whenever it did.
    asks: Vec<HeldPart>,
}

impl Stream {
    async fn open(network: &InProcess, node: u64) -> Stream {
        let (outgoing, queued) = mpsc::channel(64);
        let mut client = ParticipantClient::new(network.channel(&address(node)).unwrap());
        let incoming = client.exchange(ReceiverStream::new(queued)).await.unwrap().into_inner();
        let placement = Placement { shards: 1 };
        Stream { outgoing, incoming, assembler: Assembler::default(), placement, asks: vec![] }
    }

    async fn say(&self, message: ToShard) {
        self.say_to(SHARD, message, &[]).await;
    }

    async fn say_to(&self, shard: ShardId, message: ToShard, reads: &[(u64, ShardRead)]) {
        let message = ToShard { placement: self.placement, ..message };
        for piece in to_shard_to_wire(shard, &message, reads) {
            self.outgoing.send(piece).await.unwrap();
        }
    }

    /// The next message that says something else than that a part has been in doubt for long.
    async fn next(&mut self) -> Result<ShardTold, Status> {
        loop {
            let mut told = self.next_of_all().await?;
            self.asks.append(&mut told.message.asks);
            if !told.message.is_empty() || !told.reads.is_empty() || told.not_leader.is_some() {
                return Ok(told);
            }
        }
    }

    async fn next_of_all(&mut self) -> Result<ShardTold, Status> {
        let message = timeout(PATIENCE, self.incoming.message()).await.expect("nothing is said")?;
        Ok(self.assembler.take(message.expect("the stream goes on")).unwrap())
    }

    async fn hear(&mut self) -> FromShard {
        let told = self.next().await.unwrap();
        assert_eq!((told.shard, told.not_leader, told.reads.len()), (SHARD, None, 0), "{told:?}");
        told.message
    }

    async fn greet(&mut self, epoch: u64) -> Greeting {
        self.say(ToShard { greet: true, epoch: Epoch(epoch), ..Default::default() }).await;
        self.hear().await.greeting.unwrap()
    }

    async fn prepare(&mut self, prepare: Prepare) -> VoteKind {
        let (id, number) = (prepare.id, prepare.number);
        self.say(ToShard { epoch: number.epoch, prepares: vec![prepare], ..Default::default() }).await;
        let mut votes = self.hear().await.votes;
        assert_eq!((votes.len(), votes[0].id, votes[0].number), (1, id, number));
        votes.remove(0).kind
    }

    async fn read(&mut self, request: u64, read: ShardRead) -> ShardReadAnswer {
        self.say_to(SHARD, ToShard::default(), &[(request, read)]).await;
        self.hear_read(request).await
    }

    async fn hear_read(&mut self, request: u64) -> ShardReadAnswer {
        let mut told = self.next().await.unwrap();
        assert!(told.message.is_empty() && told.reads.len() == 1 && told.reads[0].0 == request, "{told:?}");
        told.reads.remove(0).1
    }
}

fn number(sequence: u64) -> Number {
    Number { epoch: Epoch(5), sequence }
}

fn id(sequence: u64) -> BatchId {
    BatchId::from_parts(Millis(sequence), [0; 10])
}

fn row() -> RowKey {
    RowKey::new("user:1", "USD").unwrap()
}

fn add(sequence: u64, delta: i128) -> Prepare {
    let kind = OperationKind::Add { delta, floor: None, ceiling: None };
    Prepare {
        number: number(sequence),
        id: id(sequence),
        hash: ContentHash([7; 32]),
        shards: vec![SHARD],
        gives_up: vec![],
        sole: None,
        part: EncodedPart::new([(0, &Operation { row: row(), kind })]),
    }
}

fn outcome(sequence: u64, stamp: u64) -> ToShard {
    let commit = (stamp > 0).then_some(Stamp(stamp));
    let outcome = PartOutcome { id: id(sequence), number: number(sequence), commit, gives_up: vec![] };
    ToShard { epoch: Epoch(5), outcomes: vec![outcome], ..Default::default() }
}

fn done(sequence: u64) -> Done {
    Done { id: id(sequence), number: number(sequence), lost: false }
}

fn read(position: u64, known: bool, wait_for: &[u64]) -> ShardRead {
    let wait_for = wait_for.iter().map(|sequence| id(*sequence)).collect();
    ShardRead { position: Stamp(position), known, wait_for, query: ShardQuery::Rows(vec![row()]) }
}

fn balance(version: u64, balance: i128) -> ShardReadAnswer {
    ShardReadAnswer::Rows(vec![RowAt { version: Stamp(version), value: RowValue::Balance(balance) }])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_goes_from_prepare_to_done() {
    let (network, _directory, node) = single(1).await;
    let mut stream = Stream::open(&network, 1).await;
    assert_eq!(stream.greet(5).await, Greeting { epoch: Epoch(5), parts: vec![] });
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Yes);
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Yes, "a repeated prepare has the same answer");
    assert_eq!(stream.read(1, read(3, false, &[])).await, ShardReadAnswer::InDoubt(vec![id(1)]));
    let before = ShardReadAnswer::Rows(vec![RowAt::default()]);
    assert_eq!(stream.read(2, read(3, true, &[])).await, before, "it isn't decided at 3: not waited for");

    stream.say(outcome(1, 7)).await;
    assert_eq!(stream.hear().await.done, [done(1)]);
    stream.say(outcome(1, 7)).await;
    assert_eq!(stream.hear().await.done, [done(1)], "a repeated outcome is confirmed again");
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Finished, "a late prepare changes nothing");
    assert_eq!(stream.read(3, read(7, false, &[])).await, balance(7, 100));

    let no = stream.prepare(add(2, -101)).await;
    assert!(matches!(no, VoteKind::No(_)), "{no:?}");
    let history = ShardQuery::History { row: row(), from: Stamp(0), limit: 10 };
    let history = ShardRead { query: history, ..read(9, false, &[]) };
    let ShardReadAnswer::History { changes, next: None, .. } = stream.read(4, history).await else {
        panic!()
    };
    assert_eq!((changes.len(), changes[0].id, changes[0].delta), (1, id(1), Some(100)));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_waits_for_what_is_decided_and_holds_up_nobody() {
    let (network, _directory, node) = single(1).await;
    let mut stream = Stream::open(&network, 1).await;
    stream.greet(5).await;
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Yes);
    stream.say_to(SHARD, ToShard::default(), &[(9, read(7, true, &[1]))]).await;
    assert_eq!(stream.prepare(add(2, 1)).await, VoteKind::Yes, "votes pass the read that waits");
    stream.say(outcome(1, 7)).await;
    assert_eq!(stream.hear().await.done, [done(1)]);
    assert_eq!(stream.hear_read(9).await, balance(7, 100));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vote_that_was_waited_for_goes_to_the_stream_of_the_day() {
    let (network, _directory, node) = single(1).await;
    let mut old = Stream::open(&network, 1).await;
    old.greet(5).await;
    assert_eq!(old.prepare(add(1, 15)).await, VoteKind::Yes);
    old.say(outcome(1, 1)).await;
    assert_eq!(old.hear().await.done, [done(1)]);
    assert_eq!(old.prepare(add(2, -10)).await, VoteKind::Yes);
    assert_eq!(old.prepare(add(3, -10)).await, VoteKind::Waiting);

    let mut new = Stream::open(&network, 1).await;
    new.say(outcome(2, 0)).await;
    let heard = new.hear().await;
    assert_eq!(heard.done, [done(2)]);
    assert_eq!(heard.votes, [Vote { id: id(3), number: number(3), kind: VoteKind::Yes }]);

    // What the older stream still sends is taken, and answered on the younger one of the same epoch.
    old.say(outcome(3, 0)).await;
    assert_eq!(new.hear().await.done, [done(3)]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_in_doubt_survives_a_restart_and_is_asked_about() {
    let (network, directory, node) = single(1).await;
    let mut stream = Stream::open(&network, 1).await;
    stream.greet(5).await;
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Yes);
    node.stop().await;
    assert!(stream.next().await.is_err(), "the stream ends with the node");

    let node = Node::start(&network, directory.path(), 1, 1, 1).await;
    until(|| node.leads()).await;
    let mut stream = Stream::open(&network, 1).await;
    let greeting = stream.greet(6).await;
    assert_eq!((greeting.epoch, greeting.parts.len()), (Epoch(6), 1));
    assert_eq!((greeting.parts[0].number, &greeting.parts[0].vote), (number(1), &VoteKind::Yes));
    let asks = stream.next_of_all().await.unwrap().message.asks;
    assert_eq!(asks, greeting.parts);

    let status = &node.participant.status()[0];
    assert_eq!((status.group_id, status.in_doubt, status.held_locks, status.waiting), (1, 1, 1, 0));
    assert_eq!(status.role(), v1::ReplicaRole::Leader);
    assert!(status.in_doubt_age_max_ms >= 200, "{status:?}");
    let parts = &node.participant.in_doubt(10)[&SHARD];
    assert_eq!((parts.len(), parts[0].batch_id.as_str()), (1, id(1).to_string().as_str()));
    assert_eq!((parts[0].epoch, parts[0].sequence, parts[0].waiting), (5, 1, false));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_lead_says_so() {
    let (network, directory) = (InProcess::default(), tempfile::tempdir().unwrap());
    // One of two voters: there is no quorum, so there is no leader.
    let node = Node::start(&network, directory.path(), 1, 2, 1).await;
    let mut stream = Stream::open(&network, 1).await;
    let greet = ToShard { greet: true, epoch: Epoch(5), ..Default::default() };
    for shard in [SHARD, ShardId(99)] {
        stream.say_to(shard, greet.clone(), &[]).await;
        let told = stream.next().await.unwrap();
        assert_eq!((told.shard, told.not_leader), (shard, Some(None)));
    }
    stream.say_to(SHARD, ToShard::default(), &[(1, read(0, false, &[]))]).await;
    assert_eq!(stream.next().await.unwrap().not_leader, Some(None));
    assert!(node.participant.in_doubt(10).is_empty());
    node.stop().await;
}

/// Another one may lead by now, whatever this one believes: its followers were there a moment ago.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_hears_nobody_answers_no_read() {
    let (network, _directory, mut nodes, leader) = three().await;
    let mut stream = Stream::open(&network, leader).await;
    stream.greet(5).await;
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Yes);
    stream.say(outcome(1, 7)).await;
    assert_eq!(stream.hear().await.done, [done(1)]);
    assert_eq!(stream.read(1, read(7, false, &[])).await, balance(7, 100));
    let kept = nodes.remove(&leader).unwrap();
    futures::future::join_all(nodes.into_values().map(Node::stop)).await;
    stream.say_to(SHARD, ToShard::default(), &[(2, read(7, false, &[]))]).await;
    let begun = Instant::now();
    while let Some(left) = Duration::from_secs(2).checked_sub(begun.elapsed()) {
        // Whatever else it says, or nothing.
        match timeout(left, stream.next()).await {
            Ok(Ok(told)) => assert!(told.reads.is_empty(), "nobody has confirmed that it leads"),
            Ok(Err(_)) | Err(_) => break,
        }
    }
    kept.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_hands_over_tells_before_it_is_asked() {
    let (network, _directory, nodes, leader) = three().await;
    let mut stream = Stream::open(&network, leader).await;
    stream.greet(5).await;
    assert_eq!(stream.prepare(add(1, 100)).await, VoteKind::Yes);

    let heir = leader % 3 + 1;
    let group = nodes[&leader].participant.group(SHARD).unwrap();
    group.transfer_leader(Some(NodeId(heir))).await.unwrap();
    let mut hint = None;
    while hint.is_none() {
        hint = stream.next().await.unwrap().not_leader.expect("nothing was asked");
    }
    assert_eq!(hint, Some(NodeId(heir)));
    until(|| nodes[&heir].leads()).await;
    let mut stream = Stream::open(&network, heir).await;
    assert_eq!(stream.greet(5).await.parts.len(), 1, "the part is in replicated state");
    stream.say(outcome(1, 7)).await;
    assert_eq!(stream.hear().await.done, [done(1)]);
    assert_eq!(stream.read(1, read(7, false, &[])).await, balance(7, 100));
    for node in nodes.into_values() {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_ends_the_stream() {
    let (network, _directory, node) = single(4).await;
    let owner = Placement { shards: 4 }.shard_of("user:1");
    let other = ShardId(owner.0 % 4 + 1);
    let mut stream = Stream::open(&network, 1).await;
    stream.say(ToShard { greet: true, epoch: Epoch(5), ..Default::default() }).await;
    let status = stream.next().await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("configured for 4 shards and the coordinator for 1"), "{status}");

    let mut stream = Stream::open(&network, 1).await;
    stream.placement = Placement { shards: 4 };
    let message = ToShard { epoch: Epoch(5), prepares: vec![add(1, 1)], ..Default::default() };
    stream.say_to(other, message, &[]).await;
    let status = stream.next().await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("user:1#USD"), "{status}");

    let mut stream = Stream::open(&network, 1).await;
    let prepares = vec![v1::Prepare::default()];
    stream.outgoing.send(v1::CoordinatorMessage { shard: 1, prepares, ..Default::default() }).await.unwrap();
    let status = stream.next().await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("prepares[0].number: is missing"), "{status}");

    let limits = ParticipantLimits::default();
    let (placement, shards) = (Placement { shards: 4 }, vec![ShardId(5)]);
    let config = ParticipantConfig { node: NodeId(1), placement, shards, limits };
    let refused = Participant::start(config, &node.host, &BTreeMap::new()).await.err();
    assert!(matches!(refused, Some(StartError::Config(_))));
    node.stop().await;
}
