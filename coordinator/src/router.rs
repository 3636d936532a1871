//! From the coordinator's leader to the participants: one stream to each node that hosts shards, for all its shards together.
//!
//! Streams are opened on demand and end with the epoch. Nothing here waits: what doesn't fit into a node's queue is dropped, and the
//! core sends it again. Messages to one shard keep their order, for they go through one queue into one stream; after a change of the
//! route the core is told ([`PeerMessage::Rerouted`]) and sends everything again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use verdict_failpoints::failpoint;
use verdict_proto::{
    convert::{Assembler, EXCHANGE_MESSAGE_BYTES_MAX, ShardTold, to_shard_to_wire},
    v1::{self, participant_client::ParticipantClient},
};
use verdict_protocol::{
    batch::Placement,
    ids::{GroupId, NodeId, ShardId},
    messages::{FromShard, ShardRead, ShardReadAnswer, ToShard},
};
use verdict_raft::counters::MESSAGES_SENT;

use crate::{
    directory::{Directory, View},
    routes::Routes,
};

/// Messages to one node that may wait.
const QUEUE: usize = 4096;
/// Messages of all nodes that may wait for the driver; then the streams are read no further.
const EVENTS: usize = 4096;

/// The streams of one epoch, and the routes.
pub(crate) struct Router {
    directory: Arc<Directory>,
    members: watch::Receiver<View>,
    routes: Routes,
    peers: BTreeMap<NodeId, Peer>,
    last_peer: u64,
    sender: mpsc::Sender<PeerEvent>,
    receiver: mpsc::Receiver<PeerEvent>,
}

/// A stream to one node.
struct Peer {
    /// Tells it from earlier ones to the same node.
    id: u64,
    queue: mpsc::Sender<v1::CoordinatorMessage>,
    task: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What happened on a stream.
#[derive(Debug)]
pub(crate) struct PeerEvent {
    node: NodeId,
    peer: u64,
    told: Result<ShardTold, String>,
}

/// What it means to the driver.
#[derive(Debug)]
pub(crate) enum PeerMessage {
    /// A shard says something.
    Said { shard: ShardId, message: FromShard, reads: Vec<(u64, ShardReadAnswer)> },
    /// A shard has a new route: what was sent may be lost.
    Rerouted(ShardId),
}

impl Router {
    pub(crate) fn new(node: NodeId, directory: Arc<Directory>, placement: Placement) -> Router {
        let mut members = directory.watch();
        let (nodes, voters) = nodes_and_voters(&members.borrow_and_update());
        let routes = Routes::new(nodes, voters, node, placement.all());
        let (sender, receiver) = mpsc::channel(EVENTS);
        Router { directory, members, routes, peers: BTreeMap::new(), last_peer: 0, sender, receiver }
    }

    /// Begins an epoch.
    pub(crate) fn open(&mut self) {
        debug_assert!(self.peers.is_empty(), "streams end with their epoch");
        self.routes.restart();
    }

    /// Ends the epoch: no stream of it lives on, and nothing that it brought is used.
    pub(crate) fn close(&mut self) {
        self.peers.clear();
        (self.sender, self.receiver) = mpsc::channel(EVENTS);
    }

    /// Sends what one round has to say. Whatever can't go now is dropped.
    pub(crate) fn send(
        &mut self,
        mut to_shards: BTreeMap<ShardId, ToShard>,
        reads: Vec<(ShardId, u64, ShardRead)>,
        now: Instant,
    ) {
        let mut by_shard: BTreeMap<ShardId, Vec<(u64, ShardRead)>> = BTreeMap::new();
        for (shard, request, read) in reads {
            by_shard.entry(shard).or_default().push((request, read));
            to_shards.entry(shard).or_default();
        }
        for (shard, message) in to_shards {
            let reads = by_shard.remove(&shard).unwrap_or_default();
            self.send_one(shard, &message, &reads, now);
        }
    }

    fn send_one(&mut self, shard: ShardId, message: &ToShard, reads: &[(u64, ShardRead)], now: Instant) {
        if message.is_empty() && reads.is_empty() {
            return;
        }
        let Some(node) = self.routes.of(shard, now) else { return };
        let Some(queue) = self.queue(node) else { return };
        let (prepares, tells) = (!message.prepares.is_empty(), !message.outcomes.is_empty());
        if prepares {
            failpoint!(PREPARE_BEFORE_SEND, GroupId::COORDINATOR.0);
        }
        for message in to_shard_to_wire(shard, message, reads) {
            if let Err(error) = queue.try_send(message) {
                tracing::debug!(%node, %shard, %error, "a message to a shard is dropped; it will be sent again");
                return;
            }
            MESSAGES_SENT.count();
        }
        if prepares {
            failpoint!(PREPARE_SENT, GroupId::COORDINATOR.0);
        }
        if tells {
            failpoint!(OUTCOME_SENT, GroupId::COORDINATOR.0);
        }
    }

    /// The queue of the stream to a node, which is opened if there is none.
    fn queue(&mut self, node: NodeId) -> Option<mpsc::Sender<v1::CoordinatorMessage>> {
        if let Some(peer) = self.peers.get(&node) {
            return Some(peer.queue.clone());
        }
        let channel = self.directory.channel(node)?;
        self.last_peer += 1;
        let id = self.last_peer;
        let (queue, messages) = mpsc::channel(QUEUE);
        let client = ParticipantClient::new(channel)
            .max_decoding_message_size(EXCHANGE_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(EXCHANGE_MESSAGE_BYTES_MAX);
        let task = tokio::spawn(exchange(node, id, client, messages, self.sender.clone()));
        self.peers.insert(node, Peer { id, queue: queue.clone(), task });
        Some(queue)
    }

    /// Waits for what streams bring.
    pub(crate) async fn recv_many(&mut self, events: &mut Vec<PeerEvent>, most: usize) -> usize {
        self.receiver.recv_many(events, most).await
    }

    /// What a stream has brought already.
    pub(crate) fn try_recv(&mut self) -> Option<PeerEvent> {
        self.receiver.try_recv().ok()
    }

    /// What an event means to the driver.
    pub(crate) fn take(&mut self, event: PeerEvent, now: Instant) -> Option<PeerMessage> {
        let PeerEvent { node, peer, told } = event;
        match told {
            Err(error) => {
                if self.peers.get(&node).is_some_and(|present| present.id == peer) {
                    tracing::debug!(%node, error, "the stream to the shards of a node ended");
                    self.peers.remove(&node);
                    self.routes.broken(node, now);
                }
                None
            }
            Ok(ShardTold { shard, not_leader: Some(hint), .. }) => {
                self.routes.not_leader(node, shard, hint, now).then_some(PeerMessage::Rerouted(shard))
            }
            Ok(ShardTold { shard, message, reads, not_leader: None }) => {
                self.routes.heard(node, shard);
                Some(PeerMessage::Said { shard, message, reads })
            }
        }
    }

    /// Time has passed: the shards that have a new route.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<ShardId> {
        // An error means that the node stops.
        if self.members.has_changed().unwrap_or(false) {
            let (nodes, voters) = nodes_and_voters(&self.members.borrow_and_update());
            self.routes.update(nodes, voters, now);
        }
        self.routes.due(now)
    }
}

/// All nodes, and the voters of each shard of which they are known.
fn nodes_and_voters(view: &View) -> (BTreeSet<NodeId>, BTreeMap<ShardId, Vec<NodeId>>) {
    let shards = view.groups.iter().filter(|(group, _)| **group != GroupId::COORDINATOR);
    let voters =
        shards.map(|(group, replicas)| (ShardId(group.0), replicas.voters.iter().copied().collect()));
    (view.nodes.keys().copied().collect(), voters.collect())
}

/// The task of one stream.
async fn exchange(
    node: NodeId,
    peer: u64,
    mut client: ParticipantClient<tonic::transport::Channel>,
    messages: mpsc::Receiver<v1::CoordinatorMessage>,
    events: mpsc::Sender<PeerEvent>,
) {
    let read = async {
        let mut stream = client.exchange(ReceiverStream::new(messages)).await?.into_inner();
        let mut assembler = Assembler::default();
        while let Some(message) = stream.message().await? {
            let told = assembler.take(message).map_err(|error| {
                tracing::error!(%node, %error, "a participant sent a message that can't be understood");
                Status::invalid_argument(error.to_string())
            })?;
            if events.send(PeerEvent { node, peer, told: Ok(told) }).await.is_err() {
                break;
            }
        }
        Ok::<_, Status>(())
    };
    let error = match read.await {
        Ok(()) => "the node ended it".to_owned(),
        Err(status) => status.to_string(),
    };
    // The driver that opened it may be gone.
    let _ = events.send(PeerEvent { node, peer, told: Err(error) }).await;
}
