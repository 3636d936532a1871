//! The shard groups of one node: drives [`verdict_protocol::shard`] on Raft, and speaks `Participant.Exchange` with coordinators.
//!
//! The idea: a shard decides everything in its replicated state machine. So there is nothing to keep in memory here but what is on
//! its way: messages into the shard's log, and answers back to the coordinators. Each shard has one task that takes everything
//! that has arrived on all streams, makes it **one** entry, and proposes it without waiting for the one before (`driver.rs`); and
//! one that answers reads (`reads.rs`), so that no read ever holds up a vote. Load makes entries larger, not queues longer; no
//! timer delays a lone message.
//!
//! Invariants:
//! - What a shard says (votes, confirmations, greetings) is sent after the entry that it answers was applied, so it is
//!   replicated (rule R9). A proposal whose outcome is unknown is answered by silence: the coordinator sends again.
//! - Answers go to the stream of the highest epoch that this replica has seen of the coordinator group for the shard, and of the
//!   youngest stream of that epoch. A vote of a prepare that waited comes with the answer to another entry, so it belongs to
//!   whatever stream is current, not to the one on which its prepare came.
//! - All queues are bounded, in number and in bytes, and nobody waits for room in one. What comes in and finds no room is
//!   dropped: the coordinator sends it again. A stream that doesn't take its answers is ended: the coordinator reconnects and
//!   sends again. So one shard without a quorum, or one stuck coordinator, holds up nobody else (promise G9).
//! - A message that would make the replicated state machine fail never reaches its log: it ends the stream on arrival.
//!
//! Leadership. The coordinator sends what it has for a shard to the node that it believes to lead; every other node answers
//! `NotLeader` with what it knows. When a replica loses the leadership it says so on all open streams at once, before anybody
//! asks; and every replica that doesn't lead says so again when it learns who does. That is as fast as the news can travel: the
//! deposed leader hears of its successor with the successor's first append. A replica that gains the leadership says nothing: it
//! has no word for it that couldn't be mistaken, and those who follow it have told the coordinator by then. What reaches it
//! before it is confirmed waits in Raft's queue.
//!
//! For example: two messages with the prepares 1.7 and 1.8 arrive while entry 100 is being replicated. They become entry 101
//! at once. If 1.7 is granted and 1.8 has to wait for it, the answer to 101 is `votes: 1.7 YES, 1.8 WAITING`; the answer to the
//! entry that brings 1.7's outcome is `done: 1.7; votes: 1.8 YES`.

mod check;
mod driver;
mod limiter;
mod reads;
mod service;
mod streams;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use verdict_proto::{convert::EXCHANGE_MESSAGE_BYTES_MAX, v1, v1::participant_server::ParticipantServer};
use verdict_protocol::{
    batch::Placement,
    ids::{Millis, NodeId, ShardId},
    messages::VoteKind,
    shard::{HeldSince, SWEEP_INTERVAL, Shard, ShardConfig, ShardCounts},
};
use verdict_raft::{Group, Host, HostError, Role};

use self::{
    driver::{Arrived, Driver},
    reads::{ArrivedRead, Reads},
    streams::Streams,
};

pub use self::service::Service;

/// What a node must know to run its shard groups.
#[derive(Clone, Debug)]
pub struct ParticipantConfig {
    /// This node.
    pub node: NodeId,
    /// Where partitions live.
    pub placement: Placement,
    /// The shards that have a replica here.
    pub shards: Vec<ShardId>,
    /// Bounds.
    pub limits: ParticipantLimits,
}

/// Bounds on what a node keeps and queues for its shards.
#[derive(Clone, Copy, Debug)]
pub struct ParticipantLimits {
    /// Parts that one shard may hold; more are refused. The setting of the node that leads counts.
    pub parts_max: u32,
    /// Streams of coordinators that may be open; more are refused.
    pub streams_max: usize,
    /// Messages to one shard that may wait to be proposed; more are dropped.
    pub messages_waiting_max: usize,
    /// Bytes of messages to one shard that may wait to be proposed or for their outcome; more are dropped.
    pub message_bytes_max: usize,
    /// Messages that become one entry.
    pub entry_messages_max: usize,
    /// An entry is closed when it has this many bytes.
    pub entry_bytes_max: usize,
    /// Entries of one shard that may wait for their outcome. More messages wait, to become larger entries.
    pub entries_in_flight_max: usize,
    /// Messages to one coordinator that may wait to be sent. The stream is ended if there are more.
    pub outgoing_max: usize,
    /// Reads of one shard that may wait to be confirmed, and as many for parts in doubt; more are dropped.
    pub reads_waiting_max: usize,
    /// How long a read may wait for parts in doubt before it is dropped, in milliseconds. The coordinator asks again meanwhile.
    pub read_wait_ms: u64,
    /// After this time in doubt a shard asks for the decision by itself, in milliseconds.
    pub ask_after_ms: u64,
    /// Parts that a shard asks about at a time.
    pub asks_max: usize,
}

impl Default for ParticipantLimits {
    fn default() -> ParticipantLimits {
        ParticipantLimits {
            parts_max: 200_000,
            streams_max: 64,
            messages_waiting_max: 1024,
            message_bytes_max: EXCHANGE_MESSAGE_BYTES_MAX,
            entry_messages_max: 1024,
            entry_bytes_max: 4 << 20,
            entries_in_flight_max: 16,
            outgoing_max: 4096,
            reads_waiting_max: 1024,
            read_wait_ms: 10_000,
            ask_after_ms: 2_000,
            asks_max: 100,
        }
    }
}

/// The shards of a node couldn't start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The settings make no sense.
    #[error("{0}")]
    Config(String),
    /// A group couldn't start.
    #[error("start the group of shard {shard}: {error}")]
    Group {
        /// The shard.
        shard: ShardId,
        /// Why.
        error: HostError,
    },
}

/// The shard groups on one node. A cheap handle.
#[derive(Clone)]
pub struct Participant {
    shared: Arc<Shared>,
}

/// What the service, the drivers and the handle have in common.
struct Shared {
    config: ParticipantConfig,
    shards: BTreeMap<ShardId, Hosted>,
    streams: Arc<Streams>,
    stop: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Warnings about what comes in.
    warnings: limiter::Limiter,
    fatal: Arc<watch::Sender<Option<String>>>,
}

/// A shard with a replica here.
struct Hosted {
    group: Group<Shard>,
    messages: mpsc::Sender<Arrived>,
    /// Bytes that may still come in.
    bytes: Arc<Semaphore>,
    reads: mpsc::Sender<ArrivedRead>,
}

impl Participant {
    /// Starts the replicas of all shards of the configuration, and their tasks. A group that is new is founded by its `voters`.
    pub async fn start(
        config: ParticipantConfig,
        host: &Host,
        voters: &BTreeMap<ShardId, BTreeMap<NodeId, String>>,
    ) -> Result<Participant, StartError> {
        check_config(&config)?;
        let streams = Arc::new(Streams::new(config.limits.streams_max, config.limits.outgoing_max));
        let stop = CancellationToken::new();
        let (mut shards, mut tasks) = (BTreeMap::new(), Vec::new());
        let fatal = Arc::new(watch::Sender::new(None));
        for shard in config.shards.iter().copied() {
            let machine = ShardConfig { shard, placement: config.placement, sweep_interval: SWEEP_INTERVAL };
            let founders = voters.get(&shard).ok_or_else(|| {
                stop.cancel();
                StartError::Config(format!("shard {shard} has no voters"))
            })?;
            let group = host.start_group::<Shard>(shard.group(), machine, founders).await;
            let group = group.map_err(|error| {
                stop.cancel();
                StartError::Group { shard, error }
            })?;
            shards.insert(shard, start_tasks(&config, shard, group, &streams, &stop, &mut tasks, &fatal));
        }
        let (tasks, warnings) = (Mutex::new(tasks), limiter::Limiter::default());
        Ok(Participant { shared: Arc::new(Shared { config, shards, streams, stop, tasks, warnings, fatal }) })
    }

    /// The gRPC service for coordinators, to be added to the node's server.
    pub fn service(&self) -> ParticipantServer<Service> {
        ParticipantServer::new(Service::new(self.shared.clone()))
            .max_decoding_message_size(EXCHANGE_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(EXCHANGE_MESSAGE_BYTES_MAX)
    }

    /// How every shard looks from this node, in order.
    pub fn status(&self) -> Vec<v1::GroupStatus> {
        let now = now();
        let status = |hosted: &Hosted| {
            let counts = hosted.group.read(|shard, _| shard.counts());
            group_status(hosted.group.status(), counts, now)
        };
        self.shared.shards.values().map(status).collect()
    }

    /// What the shards that this node leads hold without knowing its decision, at most `limit` parts each, by number. Shards that
    /// other nodes lead are not in the answer. A leader that has been deposed without knowing it may answer too.
    pub fn in_doubt(&self, limit: usize) -> BTreeMap<ShardId, Vec<v1::InDoubtPart>> {
        let now = now();
        let led =
            self.shared.shards.iter().filter(|(_, hosted)| hosted.group.leadership().borrow().is_leader);
        let parts = led.map(|(shard, hosted)| {
            let undecided = |held: &HeldSince| match held.part.vote {
                VoteKind::Yes | VoteKind::Waiting => true,
                VoteKind::No(_)
                | VoteKind::Conflict
                | VoteKind::OldEpoch
                | VoteKind::Finished
                | VoteKind::Held
                | VoteKind::Overloaded
                | VoteKind::Committed(_) => false,
            };
            let parts = hosted.group.read(|machine, _| {
                let held = machine.held().filter(undecided).take(limit);
                held.map(|held| in_doubt_part(*shard, held, now)).collect()
            });
            (*shard, parts)
        });
        parts.collect()
    }

    /// The replica of a shard's group on this node, for what operators ask of it.
    pub fn group(&self, shard: ShardId) -> Option<Group<Shard>> {
        self.shared.shards.get(&shard).map(|hosted| hosted.group.clone())
    }

    /// The replicas of all shards on this node.
    pub fn groups(&self) -> impl Iterator<Item = Group<Shard>> {
        self.shared.shards.values().map(|hosted| hosted.group.clone())
    }

    /// Tells when a task of a shard has failed: then the replica may lead with nobody driving it, and the node must stop.
    pub fn fatal(&self) -> watch::Receiver<Option<String>> {
        self.shared.fatal.subscribe()
    }

    /// Ends all streams and tasks. The groups are the host's, and stopped with it.
    pub async fn shutdown(&self) {
        self.shared.stop.cancel();
        self.shared.streams.end_all(&Status::unavailable("the node is stopping"));
        let tasks =
            std::mem::take(&mut *self.shared.tasks.lock().expect("nothing panics while it holds this lock"));
        for task in tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task of a shard failed");
            }
        }
    }
}

fn check_config(config: &ParticipantConfig) -> Result<(), StartError> {
    let shards = config.placement.shards;
    let mut seen = BTreeSet::new();
    for shard in &config.shards {
        if shard.0 == 0 || shard.0 > shards {
            return Err(StartError::Config(format!(
                "there is no shard {shard}: shards are numbered 1 to {shards}"
            )));
        }
        if !seen.insert(shard) {
            return Err(StartError::Config(format!("shard {shard} is named twice")));
        }
    }
    Ok(())
}

/// Starts the two tasks of a shard.
fn start_tasks(
    config: &ParticipantConfig,
    shard: ShardId,
    group: Group<Shard>,
    streams: &Arc<Streams>,
    stop: &CancellationToken,
    tasks: &mut Vec<JoinHandle<()>>,
    fatal: &Arc<watch::Sender<Option<String>>>,
) -> Hosted {
    let limits = config.limits;
    let (messages, arrivals) = mpsc::channel(limits.messages_waiting_max);
    let (reads, read_arrivals) = mpsc::channel(limits.reads_waiting_max);
    let (applied_sender, applied) = watch::channel(0);
    let driver = Driver::new(config.node, shard, limits, group.clone(), streams.clone(), applied_sender);
    let reader = Reads::new(config.node, shard, limits, group.clone(), applied);
    let (end_driver, end_reader) = (stop.clone(), stop.clone());
    let (driver, reader) = (driver.run(arrivals, end_driver), reader.run(read_arrivals, end_reader));
    tasks.push(tokio::spawn(watch_over(shard, tokio::spawn(driver), fatal.clone())));
    tasks.push(tokio::spawn(watch_over(shard, tokio::spawn(reader), fatal.clone())));
    Hosted { group, messages, bytes: Arc::new(Semaphore::new(limits.message_bytes_max)), reads }
}

/// Says so if a task panics.
async fn watch_over(shard: ShardId, task: JoinHandle<()>, fatal: Arc<watch::Sender<Option<String>>>) {
    if let Err(error) = task.await {
        let message = format!("a task of shard {shard} has failed: {error}");
        tracing::error!(message, "this node must stop");
        fatal.send_replace(Some(message));
    }
}

/// This node's clock. Nothing depends on it but ages that are shown, and when a shard asks for a decision.
fn now() -> Millis {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis(since_1970.as_millis() as u64)
}

fn group_status(status: verdict_raft::GroupStatus, counts: ShardCounts, now: Millis) -> v1::GroupStatus {
    let role = match status.role {
        Role::Leader => v1::ReplicaRole::Leader,
        Role::Follower => v1::ReplicaRole::Follower,
        Role::Candidate => v1::ReplicaRole::Candidate,
        Role::Learner => v1::ReplicaRole::Learner,
        Role::Stopped => v1::ReplicaRole::Stopped,
    };
    let ids = |nodes: &[NodeId]| nodes.iter().map(|node| node.0).collect();
    v1::GroupStatus {
        group_id: status.group.0,
        kind: v1::GroupKind::Shard.into(),
        term: status.term,
        role: role.into(),
        leader: status.leader.unwrap_or_default().0,
        last_index: status.last_index,
        committed_index: status.committed_index,
        applied_index: status.applied_index,
        state_hash: status.position.hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        state_hash_index: status.position.index,
        snapshot_index: status.snapshot_index,
        voters: ids(&status.voters),
        in_doubt: counts.in_doubt,
        in_doubt_age_max_ms: counts.oldest.map_or(0, |oldest| now.0.saturating_sub(oldest.0)),
        held_locks: counts.held_rows,
        waiting: counts.waiting,
        silent_voters: ids(&status.silent_voters),
        // The coordinator's.
        unfinished: 0,
        decisions: 0,
        epoch: 0,
        horizon_ms: 0,
    }
}

fn in_doubt_part(shard: ShardId, held: HeldSince, now: Millis) -> v1::InDoubtPart {
    v1::InDoubtPart {
        shard: shard.0,
        batch_id: held.part.id.to_string(),
        epoch: held.part.number.epoch.0,
        sequence: held.part.number.sequence,
        waiting: held.part.vote == VoteKind::Waiting,
        age_ms: now.0.saturating_sub(held.since.0),
        shards: held.part.shards.iter().map(|shard| shard.0).collect(),
    }
}
