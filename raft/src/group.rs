//! A replica of one group: proposals, reads, leadership, and what an operator may ask for.
//!
//! A proposal goes through two tasks. The *sequencer* takes everything that waits, hands it to openraft as one message, and goes
//! on only when openraft has taken it in or refused it as a whole: so entries are appended in the order of the calls, also
//! across a leader's first moments, when openraft refuses and the sequencer tries again. The *completer* passes the outcomes
//! on, in the same order.
//!
//! Invariants:
//! - A proposal that is answered `NotLeader` or `Refused` was not appended by this replica.
//! - One that was appended is answered with its outcome or with `Unknown`, never with a guess.
//! - What waits is bounded in number and in bytes.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use openraft::{
    BasicNode, Raft, RaftMetrics, ReadPolicy, ServerState, Snapshot,
    async_runtime::watch::WatchReceiver as _,
    errors::{
        ChangeMembershipError, ClientWriteError, Fatal, ForwardReason, LinearizableReadError, RaftError,
    },
    metrics::RaftServerMetrics,
    raft::{TransferLeaderRequest, WriteResult},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::{Instant, sleep, timeout},
};
use verdict_failpoints::failpoint;
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Machine,
    store::Store,
};

use crate::{
    api::{AdminError, Applied, Confirmed, GroupStatus, Leadership, ProposeError, ReadError, Role, Timing},
    gate::Gate,
    heard::Heard,
    log::GroupLog,
    network::encode,
    node::{Endpoint, Node, stopping},
    peer::kind,
    replica::{Replica, StateMachine},
    snapshot::{self, Contents, Sending, SnapshotFile},
    types::{Command, LogId, Types, Vote},
};

/// Proposals that are handed to openraft together.
const TOGETHER_MAX: usize = 256;
const TOGETHER_BYTES_MAX: usize = 4 << 20;
/// Messages that wait for their outcomes.
const COMPLETING_MAX: usize = 4096;
/// How long a refused proposal waits before it is tried again.
const RETRY: Duration = Duration::from_millis(2);
/// How often the leadership is looked at even if nothing has changed.
const LEADERSHIP_TICK: Duration = Duration::from_millis(100);
/// So many times what calls for a snapshot may stand in the log while somebody is sent one: then it is purged all the same.
const KEPT_WHILE_SENDING: u64 = 4;
/// How long a snapshot that was asked for may take.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(60);
/// Proposals in flight are counted in this many bytes.
const BYTES_UNIT: usize = 1024;

pub(crate) type ThisRaft<M> = Raft<Types, StateMachine<M>>;
type Outcome<M> = Result<Applied<<M as Machine>::Reply>, ProposeError>;

struct Proposal<M: Machine> {
    command: Bytes,
    outcome: oneshot::Sender<Outcome<M>>,
    /// Held until the outcome is known.
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// The replica of a group on this node. A cheap handle.
pub struct Group<M: Machine> {
    shared: Arc<Shared<M>>,
}

impl<M: Machine> Clone for Group<M> {
    fn clone(&self) -> Self {
        Group { shared: self.shared.clone() }
    }
}

struct Shared<M: Machine> {
    id: GroupId,
    node: Arc<Node>,
    raft: ThisRaft<M>,
    replica: Arc<Replica<M>>,
    log: Arc<GroupLog>,
    leadership: watch::Receiver<Leadership>,
    queue: mpsc::Sender<Proposal<M>>,
    slots: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    gate: Gate,
    heard: Arc<Heard>,
}

impl<M: Machine> Group<M> {
    /// Starts the tasks of a replica whose openraft runs already. The founders vote as long as the replica knows of no voters.
    pub(crate) fn start(
        id: GroupId,
        node: Arc<Node>,
        raft: ThisRaft<M>,
        replica: Arc<Replica<M>>,
        log: Arc<GroupLog>,
        founders: BTreeMap<u64, String>,
    ) -> Group<M> {
        let limits = &node.config.limits;
        let slots = Arc::new(Semaphore::new(limits.proposals_in_flight));
        let bytes = Arc::new(Semaphore::new(limits.proposal_bytes_in_flight.div_ceil(BYTES_UNIT)));
        let (queue, proposals) = mpsc::channel(limits.proposals_in_flight);
        let (announce, leadership) = watch::channel(Leadership::default());
        let (completing, completed) = mpsc::channel(COMPLETING_MAX);
        let retry = Duration::from_millis(node.config.timing.propose_retry_ms);
        let sequencer = Sequencer { raft: raft.clone(), proposals, completing, retry };
        let gate = node.gate(id);
        let members = raft.clone();
        let voters = move || voters(&members, &founders);
        let tasks: [BoxFuture<'static, ()>; 5] = [
            gate.clone().open_when_greeted(node.clone(), id, voters).boxed(),
            sequencer.run().boxed(),
            complete(completed).boxed(),
            watch_leadership(node.clone(), id, raft.clone(), replica.applied(), announce).boxed(),
            tend_snapshots(node.clone(), raft.clone(), log.clone(), replica.clone()).boxed(),
        ];
        for task in tasks {
            let stop = stopping(node.stop.subscribe());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop => {}
                    () = task => {}
                }
            });
        }
        let heard = node.heard(id);
        let shared = Shared { id, node, raft, replica, log, leadership, queue, slots, bytes, gate, heard };
        Group { shared: Arc::new(shared) }
    }

    pub(crate) fn endpoint(&self) -> Arc<dyn Endpoint> {
        Arc::new(Replies(self.shared.clone()))
    }

    /// The group.
    pub fn id(&self) -> GroupId {
        self.shared.id
    }

    /// Replicates and applies one command.
    pub async fn propose(&self, command: Vec<u8>) -> Result<Applied<M::Reply>, ProposeError> {
        self.start_propose(command).await
    }

    /// Queues a command at once; entries are appended in the order of the calls. The future gives the outcome; dropping it
    /// changes nothing.
    pub fn start_propose(
        &self,
        command: Vec<u8>,
    ) -> impl Future<Output = Result<Applied<M::Reply>, ProposeError>> + Send + 'static {
        let queued = self.queue(command);
        async move {
            let lost =
                || ProposeError::Unknown("the replica stopped before the outcome was known".to_owned());
            queued?.await.unwrap_or_else(|_| Err(lost()))
        }
    }

    fn queue(&self, command: Vec<u8>) -> Result<oneshot::Receiver<Outcome<M>>, ProposeError> {
        let shared = &*self.shared;
        if let Some(message) = shared.node.fatal.get() {
            return Err(ProposeError::Stopped(message));
        }
        let bytes_max = shared.node.config.limits.command_bytes_max;
        if command.len() > bytes_max {
            let error = format!("a command of {} bytes; at most {bytes_max} are allowed", command.len());
            return Err(ProposeError::Refused(error));
        }
        let busy = |_| ProposeError::Refused("too many proposals are in flight".to_owned());
        let units = u32::try_from(command.len().div_ceil(BYTES_UNIT)).unwrap_or(u32::MAX);
        let slot = shared.slots.clone().try_acquire_owned().map_err(busy)?;
        let bytes = shared.bytes.clone().try_acquire_many_owned(units).map_err(busy)?;
        let (outcome, receiver) = oneshot::channel();
        let proposal = Proposal { command: command.into(), outcome, _permits: (slot, bytes) };
        // There is room: as many fit as there are slots.
        let queued = shared.queue.try_send(proposal);
        queued.map_err(|_| ProposeError::Stopped("the host was shut down".to_owned()))?;
        Ok(receiver)
    }

    /// Confirms with a quorum, after the call began, that this replica leads, and waits until it has applied everything that
    /// was committed then.
    pub async fn read_barrier(&self) -> Result<Confirmed, ReadError> {
        let patience = Duration::from_millis(self.shared.node.config.timing.read_timeout_ms);
        let late = |_| ReadError::Unavailable("no quorum confirmed the leadership in time".to_owned());
        timeout(patience, self.confirm()).await.unwrap_or_else(|error| Err(late(error)))
    }

    async fn confirm(&self) -> Result<Confirmed, ReadError> {
        let shared = &*self.shared;
        let asked = Instant::now();
        let linearizer = shared.raft.get_read_linearizer(ReadPolicy::ReadIndex).await.map_err(read_error)?;
        // A leader's first entry is of its own term, and it reads at that entry or a later one.
        let (index, term) =
            (linearizer.read_log_id().index(), **linearizer.read_log_id().committed_leader_id());
        let (here, voters) = {
            let metrics = shared.raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.id, metrics.membership_config.membership().get_joint_config().clone())
        };
        // By the answers to what was asked since: Raft's library may have taken older ones for it.
        shared.heard.confirm(here, term, asked, &voters).await;
        let mut applied = shared.replica.applied();
        let stopped = |_| ReadError::Stopped("the host was shut down".to_owned());
        applied.wait_for(|applied| applied.is_some_and(|id| id.index >= index)).await.map_err(stopped)?;
        Ok(Confirmed { index, term })
    }

    /// Looks at the machine and its store between two applies. `look` must be quick: applying waits for it. After the host
    /// was shut down the store fails.
    ///
    /// # Panics
    /// If the machine has panicked before.
    pub fn read<T>(&self, look: impl FnOnce(&M, &dyn Store) -> T) -> T {
        self.shared.replica.read(look)
    }

    /// Who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.shared.leadership.clone()
    }

    /// How the group looks from here.
    pub fn status(&self) -> GroupStatus {
        let shared = &*self.shared;
        let metrics = shared.raft.metrics().borrow_watched().clone();
        let silent_after = Duration::from_millis(shared.node.config.timing.silent_after_ms);
        let index = |id: Option<LogId>| id.map_or(0, |id| id.index);
        // By itself: while it is looked at, nobody can tell that more is applied.
        let applied = *shared.replica.applied().borrow();
        GroupStatus {
            group: shared.id,
            term: metrics.current_term,
            role: role(&metrics),
            leader: metrics.current_leader.map(NodeId),
            last_index: index(shared.log.last()),
            committed_index: index(metrics.local_committed),
            applied_index: index(applied),
            position: shared.replica.position(),
            snapshot_index: index(shared.replica.snapshots.point().and_then(|meta| meta.last_log_id)),
            purged_index: index(shared.log.purged()),
            voters: metrics
                .membership_config
                .voter_ids()
                .map(NodeId)
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            silent_voters: silent_voters(&metrics, silent_after),
        }
    }

    /// Hands the leadership over to `to`, or to the voter that is furthest on of those that were heard of lately. Gives the new leader.
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<NodeId, AdminError> {
        let shared = &*self.shared;
        let metrics = shared.raft.metrics().borrow_watched().clone();
        let here = NodeId(metrics.id);
        if metrics.state != ServerState::Leader {
            return Err(AdminError::NotLeader { leader: metrics.current_leader.map(NodeId) });
        }
        let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
        let Some(to) = to.or_else(|| heir(&metrics, &shared.node.config.timing)) else {
            let why = "no other voter was heard of lately: there is nobody to hand over to";
            return Err(AdminError::Refused(why.to_owned()));
        };
        if to == here {
            return Ok(here);
        }
        if !voters.contains(&to.0) {
            return Err(AdminError::Refused(format!("node {to} is no voter")));
        }
        shared.raft.trigger().transfer_leader(to.0).await.map_err(stopped)?;
        let patience = Duration::from_millis(2 * shared.node.config.timing.election_timeout_max_ms);
        let mut leadership = self.leadership();
        let arrived = leadership.wait_for(|now| now.leader == Some(to));
        match timeout(patience, arrived).await {
            Ok(Ok(_)) => Ok(to),
            Ok(Err(_)) => Err(AdminError::Stopped("the host was shut down".to_owned())),
            Err(_) => Err(AdminError::Unknown(format!("node {to} hasn't taken over yet"))),
        }
    }

    /// Makes a snapshot now. Gives the index of the last entry in it.
    pub async fn trigger_snapshot(&self) -> Result<u64, AdminError> {
        let shared = &*self.shared;
        let wanted = *shared.replica.applied().borrow();
        let Some(wanted) = wanted else {
            return Err(AdminError::Refused("nothing was applied yet".to_owned()));
        };
        let mut metrics = shared.raft.metrics();
        let deadline = Instant::now() + SNAPSHOT_PATIENCE;
        while Instant::now() < deadline {
            if let Some(made) = metrics.borrow_watched().snapshot
                && made >= wanted
            {
                return Ok(made.index);
            }
            // One that is being made already may be too old; then another is made after it.
            shared.raft.trigger().snapshot().await.map_err(stopped)?;
            let ready = async {
                while metrics.borrow_and_update().snapshot < Some(wanted) {
                    metrics.changed().await?;
                }
                Ok::<(), openraft::async_runtime::watch::RecvError>(())
            };
            if let Ok(Err(_)) = timeout(LEADERSHIP_TICK, ready).await {
                return Err(AdminError::Stopped("the host was shut down".to_owned()));
            }
        }
        Err(AdminError::Unknown("the snapshot isn't ready yet".to_owned()))
    }

    pub(crate) fn raft(&self) -> &ThisRaft<M> {
        &self.shared.raft
    }

    pub(crate) fn timing(&self) -> &Timing {
        &self.shared.node.config.timing
    }

    /// Founds the group, if nobody did before.
    pub(crate) async fn found(&self, voters: &BTreeMap<NodeId, String>) -> Result<(), String> {
        let members: BTreeMap<u64, BasicNode> =
            voters.iter().map(|(id, address)| (id.0, BasicNode::new(address.clone()))).collect();
        match self.shared.raft.initialize(members).await {
            // Another founder was quicker.
            Ok(()) | Err(RaftError::APIError(openraft::errors::InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// Who votes, and where they are.
fn voters<M: Machine>(raft: &ThisRaft<M>, founders: &BTreeMap<u64, String>) -> BTreeMap<u64, String> {
    let metrics = raft.metrics().borrow_watched().clone();
    let membership = metrics.membership_config.membership();
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    if voters.is_empty() {
        return founders.clone();
    }
    let nodes = membership.nodes().filter(|(id, _)| voters.contains(id));
    nodes.map(|(id, node)| (*id, node.addr.clone())).collect()
}

fn role(metrics: &RaftMetrics<Types>) -> Role {
    if metrics.running_state.is_err() {
        return Role::Stopped;
    }
    match metrics.state {
        ServerState::Leader => Role::Leader,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Learner => Role::Learner,
        ServerState::Shutdown => Role::Stopped,
    }
}

/// The other voters, and for how long each was silent; none: it was never heard of. Empty on replicas that don't lead.
fn silences(metrics: &RaftMetrics<Types>) -> BTreeMap<u64, Option<Duration>> {
    let Some(heard) = metrics.heartbeat.as_ref().filter(|_| metrics.state == ServerState::Leader) else {
        return BTreeMap::new();
    };
    let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
    let silence = |id: u64| {
        let last = heard.get(&id).and_then(|last| last.as_ref());
        (id, last.map(|last| openraft::Instant::elapsed(&**last)))
    };
    voters.into_iter().filter(|id| *id != metrics.id).map(silence).collect()
}

fn silent_voters(metrics: &RaftMetrics<Types>, silent_after: Duration) -> Vec<NodeId> {
    let silent = silences(metrics).into_iter();
    let silent = silent.filter(|(_, silence)| silence.is_none_or(|silence| silence > silent_after));
    silent.map(|(id, _)| NodeId(id)).collect()
}

/// Who is asked to lead if nobody was named.
fn heir(metrics: &RaftMetrics<Types>, timing: &Timing) -> Option<NodeId> {
    let matched = |id: &u64| metrics.replication.as_ref().and_then(|all| all.get(id).copied().flatten());
    let voters = silences(metrics).into_iter();
    let voters = voters.filter_map(|(id, silence)| Some((NodeId(id), silence?, matched(&id))));
    choose_heir(voters, timing)
}

/// Of the voters that aren't silent, with the time since each was heard of and how far it has come, the one that is furthest on.
/// One that hasn't missed its heartbeats comes before one that has: it may be down.
fn choose_heir<P: Ord + Copy>(
    voters: impl Iterator<Item = (NodeId, Duration, P)>,
    timing: &Timing,
) -> Option<NodeId> {
    let (lately, silent) = (timing.election_timeout_min_ms, timing.silent_after_ms);
    let voters = voters.filter(|(_, silence, _)| *silence <= Duration::from_millis(silent));
    let best =
        voters.max_by_key(|(_, silence, matched)| (*silence <= Duration::from_millis(lately), *matched));
    best.map(|(id, _, _)| id)
}

fn stopped(fatal: Fatal<Types>) -> AdminError {
    AdminError::Stopped(fatal.to_string())
}

fn read_error(error: RaftError<Types, LinearizableReadError<Types>>) -> ReadError {
    match error {
        RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)) => {
            ReadError::NotLeader { leader: forward.leader_id.map(NodeId) }
        }
        RaftError::APIError(LinearizableReadError::QuorumNotEnough(error)) => {
            ReadError::Unavailable(error.to_string())
        }
        RaftError::Fatal(fatal) => ReadError::Stopped(fatal.to_string()),
    }
}

pub(crate) fn admin_error(error: RaftError<Types, ClientWriteError<Types>>) -> AdminError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            AdminError::NotLeader { leader: forward.leader_id.map(NodeId) }
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => {
            AdminError::Unknown("the leader changed".to_owned())
        }
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
            let error: ChangeMembershipError<_, _> = error;
            AdminError::Refused(error.to_string())
        }
        RaftError::APIError(ClientWriteError::PreconditionFailed(error)) => {
            AdminError::Refused(error.to_string())
        }
        RaftError::Fatal(fatal) => AdminError::Stopped(fatal.to_string()),
    }
}

type Results = BoxStream<'static, Result<WriteResult<Types>, Fatal<Types>>>;

/// Proposals that openraft has taken in, and where their outcomes come from.
struct Taken<M: Machine> {
    proposals: Vec<Proposal<M>>,
    results: Results,
}

struct Sequencer<M: Machine> {
    raft: ThisRaft<M>,
    proposals: mpsc::Receiver<Proposal<M>>,
    completing: mpsc::Sender<Taken<M>>,
    retry: Duration,
}

impl<M: Machine> Sequencer<M> {
    async fn run(mut self) {
        while let Some(first) = self.proposals.recv().await {
            let mut bytes = first.command.len();
            let mut together = vec![first];
            while together.len() < TOGETHER_MAX && bytes < TOGETHER_BYTES_MAX {
                let Ok(next) = self.proposals.try_recv() else { break };
                bytes += next.command.len();
                together.push(next);
            }
            match self.hand_in(&together).await {
                Ok(results) => {
                    let taken = Taken { proposals: together, results };
                    if self.completing.send(taken).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    for proposal in together {
                        // Whoever proposed may have given up.
                        let _ = proposal.outcome.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    /// Returns once openraft has taken in all of them, or none.
    async fn hand_in(&self, together: &[Proposal<M>]) -> Result<Results, ProposeError> {
        let deadline = Instant::now() + self.retry;
        loop {
            let commands: Vec<_> =
                together.iter().map(|proposal| Command(proposal.command.clone())).collect();
            let handed_in = self.raft.client_write_many(commands).await;
            let mut results = handed_in.map_err(|fatal| ProposeError::Stopped(fatal.to_string()))?;
            // Requests are worked on in order. When this one is answered, the refusal of the one before it is there, if it
            // was refused. (If openraft stops here, the results say so.)
            let _ = self.raft.with_raft_state(|_| ()).await;
            let refused = match results.next().now_or_never() {
                Some(Some(Ok(Err(ClientWriteError::ForwardToLeader(forward))))) => forward,
                Some(first) => return Ok(futures::stream::iter(first).chain(results).boxed()),
                None => return Ok(results),
            };
            if refused.reason != ForwardReason::LeaseExpired || Instant::now() >= deadline {
                return Err(ProposeError::NotLeader { leader: refused.leader_id.map(NodeId) });
            }
            sleep(RETRY).await;
        }
    }
}

/// Passes outcomes on, in the order of the log.
async fn complete<M: Machine>(mut completed: mpsc::Receiver<Taken<M>>) {
    while let Some(Taken { proposals, mut results }) = completed.recv().await {
        for proposal in proposals {
            let outcome = match results.next().await {
                Some(Ok(Ok(written))) => match written.response.take::<M::Reply>() {
                    Some(reply) => Ok(Applied { index: written.log_id.index, reply }),
                    None => Err(ProposeError::Unknown("applied, but the reply was lost".to_owned())),
                },
                Some(Ok(Err(ClientWriteError::ForwardToLeader(forward)))) => {
                    Err(ProposeError::NotLeader { leader: forward.leader_id.map(NodeId) })
                }
                Some(Ok(Err(error))) => Err(ProposeError::Unknown(error.to_string())),
                Some(Err(fatal)) => Err(ProposeError::Unknown(fatal.to_string())),
                None => Err(ProposeError::Unknown("the replica stopped".to_owned())),
            };
            // Whoever proposed may have given up.
            let _ = proposal.outcome.send(outcome);
        }
    }
}

/// Tells who leads, and stops the node if openraft has met an error of its own.
async fn watch_leadership<M: Machine>(
    node: Arc<Node>,
    group: GroupId,
    raft: ThisRaft<M>,
    mut applied: watch::Receiver<Option<LogId>>,
    announce: watch::Sender<Leadership>,
) {
    let lease = Duration::from_millis(2 * node.config.timing.election_timeout_max_ms);
    // The metrics change with every step of Raft, those of the server seldom.
    let (mut metrics, mut server) = (raft.metrics(), raft.server_metrics());
    let mut ended = false;
    loop {
        let (running, heard_at) = {
            let metrics = metrics.borrow_and_update();
            (metrics.running_state.clone(), metrics.last_quorum_acked)
        };
        let fatal = match running {
            Err(fatal) => Some(format!("Raft group {group}: {fatal}")),
            // It ends with the host, or by a panic.
            Ok(()) => ended.then(|| format!("Raft group {group} has ended")),
        };
        if let Some(why) = fatal {
            if !*node.stop.borrow() {
                node.fatal.raise(&why);
            }
            announce.send_replace(Leadership::default());
            return;
        }
        let heard = heard_at.is_some_and(|at| openraft::Instant::elapsed(&*at) < lease);
        let (now, leads) = {
            let server = server.borrow_and_update();
            let applied = *applied.borrow_and_update();
            (leadership(&server, applied, heard), server.state == ServerState::Leader)
        };
        announce.send_if_modified(|before| {
            let changed = *before != now;
            *before = now;
            changed
        });
        let waits_to_serve = leads && !now.is_leader;
        ended = tokio::select! {
            changed = server.changed() => changed.is_err(),
            changed = metrics.changed(), if waits_to_serve => changed.is_err(),
            changed = applied.changed(), if waits_to_serve => if changed.is_err() { return } else { false },
            () = sleep(LEADERSHIP_TICK) => false,
        };
    }
}

/// A leader can serve once an entry of its own leadership is applied, and as long as a quorum was heard of lately.
fn leadership(server: &RaftServerMetrics<Types>, applied: Option<LogId>, heard: bool) -> Leadership {
    let leads = server.state == ServerState::Leader;
    let term = server.vote.leader_id.term;
    let caught_up = applied.is_some_and(|id| id.leader_id.term == term);
    let alone = server.membership_config.voter_ids().count() == 1;
    Leadership {
        leader: server.current_leader.map(NodeId),
        term,
        is_leader: leads && caught_up && (alone || heard),
    }
}

/// Makes snapshots when the log has grown, and purges what is behind them, unless somebody who is sent a snapshot needs it next.
async fn tend_snapshots<M: Machine>(
    node: Arc<Node>,
    raft: ThisRaft<M>,
    log: Arc<GroupLog>,
    replica: Arc<Replica<M>>,
) {
    let limits = &node.config.limits;
    let mut metrics = raft.metrics();
    let mut tended: Option<LogId> = None;
    loop {
        let (snapshot, applied) = {
            let metrics = metrics.borrow_and_update();
            (metrics.snapshot, metrics.last_applied)
        };
        let (_, in_all) = log.size_after(None);
        let is_kept = replica.snapshots.is_sending()
            && in_all < limits.snapshot_after_bytes.saturating_mul(KEPT_WHILE_SENDING);
        if snapshot != tended && !is_kept {
            tended = snapshot;
            let point =
                snapshot.and_then(|id| log.purge_point(id.index, limits.keep_entries, limits.keep_bytes));
            if let Some(upto) = point
                && raft.trigger().purge_log(upto).await.is_err()
            {
                return;
            }
        }
        let (entries, bytes) = log.size_after(snapshot.map(|id| id.index));
        let due = entries >= limits.snapshot_after_entries || bytes >= limits.snapshot_after_bytes;
        if due && applied > snapshot && raft.trigger().snapshot().await.is_err() {
            return;
        }
        tokio::select! {
            () = log.grown(), if !due => {}
            changed = metrics.changed() => if changed.is_err() { return },
        }
        // Looking is cheap, but not so cheap that it should be done for each entry.
        sleep(LEADERSHIP_TICK).await;
    }
}

/// The replica as the transport sees it.
struct Replies<M: Machine>(Arc<Shared<M>>);

impl<M: Machine> Endpoint for Replies<M> {
    fn handle(&self, asked: u32, body: Bytes) -> BoxFuture<'static, Result<Vec<u8>, String>> {
        let (raft, group) = (self.0.raft.clone(), self.0.id);
        let gate = self.0.gate.clone();
        let patience = Duration::from_millis(self.0.node.config.timing.request_timeout_ms);
        Box::pin(async move {
            if asked == kind::APPEND {
                gate.pass_in_order(patience).await?;
                failpoint!(APPEND_RECEIVED, group.0);
            } else {
                gate.pass(patience).await?;
            }
            match asked {
                kind::APPEND => raft.append_entries(decode(&body)?).await.map(|r| encode(&r)).map_err(text),
                kind::VOTE => raft.vote(decode(&body)?).await.map(|r| encode(&r)).map_err(text),
                kind::PRE_VOTE => raft.pre_vote(decode(&body)?).await.map(|r| encode(&r)).map_err(text),
                kind::TRANSFER => {
                    raft.handle_transfer_leader(decode(&body)?).await.map(|r| encode(&r)).map_err(text)
                }
                unknown => Err(format!("unknown kind of message {unknown}")),
            }
        })
    }

    fn send_snapshot(&self) -> Sending {
        self.0.replica.snapshots.send()
    }

    fn temporary(&self) -> std::path::PathBuf {
        self.0.replica.snapshots.temporary()
    }

    fn install(&self, vote: Bytes, file: SnapshotFile) -> BoxFuture<'static, Result<Vec<u8>, String>> {
        let (raft, group) = (self.0.raft.clone(), self.0.id);
        let gate = self.0.gate.clone();
        let patience = Duration::from_millis(self.0.node.config.timing.request_timeout_ms);
        Box::pin(async move {
            gate.pass(patience).await?;
            let vote: Vote = decode(&vote)?;
            let meta = snapshot::meta(&file, group).map_err(text)?;
            let snapshot = Snapshot { meta, snapshot: Contents::File(file) };
            let installed = raft.install_full_snapshot(vote, snapshot).await;
            installed.map(|reply| encode(&reply)).map_err(text)
        })
    }

    fn lost(&self, node: NodeId) -> BoxFuture<'static, ()> {
        let shared = self.0.clone();
        Box::pin(async move {
            tokio::spawn(replace_lost_leader(shared, node));
        })
    }

    fn stop(&self) -> BoxFuture<'static, ()> {
        let shared = self.0.clone();
        Box::pin(async move {
            // It fails only if openraft has stopped already.
            let _ = shared.raft.shutdown().await;
            shared.replica.close();
            shared.log.close();
        })
    }
}

/// The connection from the leader broke, as it does at once when its process ends. Everybody who notices forgets the
/// leader's lease, and the next voter in order asks for a pre-vote: if a majority has lost the leader too, it is replaced
/// without waiting for the lease to end. If the leader lives, its next heartbeat renews the lease, and nothing happens.
async fn replace_lost_leader<M: Machine>(shared: Arc<Shared<M>>, node: NodeId) {
    let heartbeat = Duration::from_millis(shared.node.config.timing.heartbeat_ms);
    let led = |shared: &Shared<M>| {
        let metrics = shared.raft.metrics().borrow_watched().clone();
        (metrics.current_leader == Some(node.0)).then_some(metrics)
    };
    sleep(heartbeat / 2).await;
    let Some(metrics) = led(&shared) else { return };
    let forget = TransferLeaderRequest::new(metrics.vote, node.0, None);
    if shared.raft.handle_transfer_leader(forget).await.is_err() {
        return;
    }
    let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
    let next = voters.range(node.0 + 1..).next().or(voters.first());
    if next != Some(&metrics.id) {
        return;
    }
    sleep(heartbeat / 2).await;
    if led(&shared).is_some() {
        // An error means that openraft has stopped.
        let _ = shared.raft.trigger().elect(true).await;
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    postcard::from_bytes(bytes).map_err(|error| format!("decode: {error}"))
}

fn text(error: impl ToString) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_voter_that_is_down_is_not_asked_to_lead() {
        let heir = |voters: &[(u64, u64, u64)]| {
            let voters = voters.iter();
            let voters =
                voters.map(|(id, silent_ms, at)| (NodeId(*id), Duration::from_millis(*silent_ms), *at));
            choose_heir(voters, &Timing::default())
        };
        assert_eq!(heir(&[(2, 50, 7), (3, 80, 9)]), Some(NodeId(3)), "the one that is furthest on");
        assert_eq!(heir(&[(2, 50, 7), (3, 900, 9)]), Some(NodeId(2)), "not one that misses its heartbeats");
        assert_eq!(heir(&[(2, 900, 7), (3, 900, 9)]), Some(NodeId(3)), "unless all do, as on a busy machine");
        assert_eq!(heir(&[(2, 5000, 7), (3, 5000, 9)]), None);
        assert_eq!(heir(&[]), None);
    }
}
