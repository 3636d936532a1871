//! The `Admin` service: what operators call.
//!
//! Questions about the whole cluster are asked of every node at once, each with a short time limit; a node that doesn't answer is
//! listed as such and holds up nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status, transport::Channel};
use verdict_proto::v1::{
    self,
    admin_client::AdminClient,
    admin_server::{Admin, AdminServer},
};
use verdict_protocol::{
    coordinator::{Coordinator, CoordinatorCounts},
    ids::{GroupId, NodeId, ShardId},
};
use verdict_raft::{
    AdminError, Group, GroupStatus, Members, Progress, Role,
    counters::{MESSAGES_SENT, SYNCED_WRITES},
};

use crate::{
    failure::{CallFailure, is_answer},
    gateway::{Gateway, LIST_DEFAULT, Origin, forwarded, limit_of},
    spread::Spread,
};

/// How long one node may take to answer a question about the cluster.
const NODE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a list of decisions may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long handing over a leadership may take.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a step of a change of members may take.
pub(crate) const MEMBERS_TIMEOUT: Duration = Duration::from_secs(15);
/// Parts in doubt of one shard that are listed by default.
const IN_DOUBT_DEFAULT: u32 = 1000;

/// What a node's shards look like; implemented by whoever brings coordinator and participant together.
#[tonic::async_trait]
pub trait LocalStatus: Send + Sync + 'static {
    /// The state of each shard replica on this node, in order.
    fn groups(&self) -> Vec<v1::GroupStatus>;

    /// The parts in doubt of the shards that this node leads, by shard and number, at most `limit` for each shard; and those shards.
    fn in_doubt(&self, limit: usize) -> (Vec<v1::InDoubtPart>, Vec<ShardId>);

    /// Hands the leadership of a shard over, to `to` or to any other voter. Gives the node that was asked to take over.
    async fn transfer_leader(&self, group: GroupId, to: Option<NodeId>) -> Result<NodeId, AdminError>;

    /// The shards with a replica on this node.
    fn hosted(&self) -> Vec<GroupId>;

    /// Who belongs to these shards, as far as it is known here.
    fn members(&self) -> Vec<Members>;

    /// Makes the next step so that `add` votes in a shard and `remove` is no member of it.
    async fn change_members(
        &self,
        group: GroupId,
        add: Option<(NodeId, String)>,
        remove: Option<NodeId>,
    ) -> Result<Progress, AdminError>;

    /// Makes a snapshot of a shard's replica on this node. Gives the index that it covers.
    async fn trigger_snapshot(&self, group: GroupId) -> Result<u64, AdminError>;
}

/// A node without shards.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoShards;

#[tonic::async_trait]
impl LocalStatus for NoShards {
    fn groups(&self) -> Vec<v1::GroupStatus> {
        Vec::new()
    }

    fn in_doubt(&self, _: usize) -> (Vec<v1::InDoubtPart>, Vec<ShardId>) {
        (Vec::new(), Vec::new())
    }

    async fn transfer_leader(&self, group: GroupId, _: Option<NodeId>) -> Result<NodeId, AdminError> {
        Err(AdminError::Refused(format!("there is no replica of group {group} here")))
    }

    fn hosted(&self) -> Vec<GroupId> {
        Vec::new()
    }

    fn members(&self) -> Vec<Members> {
        Vec::new()
    }

    async fn change_members(
        &self,
        group: GroupId,
        _: Option<(NodeId, String)>,
        _: Option<NodeId>,
    ) -> Result<Progress, AdminError> {
        Err(AdminError::Refused(format!("there is no replica of group {group} here")))
    }

    async fn trigger_snapshot(&self, group: GroupId) -> Result<u64, AdminError> {
        Err(AdminError::Refused(format!("there is no replica of group {group} here")))
    }
}

/// Serves `Admin` on one node.
#[derive(Clone)]
pub struct AdminService {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) local: Arc<dyn LocalStatus>,
    pub(crate) version: String,
    pub(crate) spread: Arc<Spread>,
    /// The nodes of the configuration.
    pub(crate) founders: Vec<(NodeId, String)>,
    /// Whether this node joins a cluster that others have founded.
    pub(crate) joins: bool,
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        if request.into_inner().local_only {
            return Ok(Response::new(v1::StatusResponse { nodes: vec![self.local_status()] }));
        }
        let nodes = self.nodes_status().await;
        Ok(Response::new(v1::StatusResponse { nodes }))
    }

    async fn list_decisions(
        &self,
        request: Request<v1::ListDecisionsRequest>,
    ) -> Result<Response<v1::ListDecisionsResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let request = request.into_inner();
        let limit = limit_of(request.limit, LIST_DEFAULT).map_err(CallFailure::status)?;
        let local = || self.gateway.list_here(request.from, limit);
        let remote = |channel| {
            let mut client = self.client(channel);
            async move { client.list_decisions(forwarded(request, LIST_TIMEOUT)).await }
        };
        let deadline = Instant::now() + LIST_TIMEOUT;
        let response = self.gateway.at_leader_by(deadline, origin, local, remote).await?;
        Ok(Response::new(response))
    }

    async fn list_in_doubt(
        &self,
        request: Request<v1::ListInDoubtRequest>,
    ) -> Result<Response<v1::ListInDoubtResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let request = request.into_inner();
        let limit = limit_of(request.limit, IN_DOUBT_DEFAULT).map_err(CallFailure::status)?;
        let here = self.in_doubt_here(limit);
        if origin.forwarded {
            return Ok(Response::new(here));
        }
        let others = self.others().map(|(_, channel)| {
            let mut client = self.client(channel);
            async move { within(client.list_in_doubt(forwarded(request, NODE_TIMEOUT))).await.ok() }
        });
        let mut answers = vec![here];
        answers.extend(join_all(others).await.into_iter().flatten());
        Ok(Response::new(merge_in_doubt(answers, self.gateway.config.placement.all(), limit)))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let request = request.into_inner();
        let group = self.group_of(request.group_id)?;
        if request.to_node != 0 && !self.gateway.leaders.nodes().contains_key(&NodeId(request.to_node)) {
            let problem = format!("there is no node {} in the configuration", request.to_node);
            return Err(CallFailure::invalid("to_node", problem).status());
        }
        if self.leads_here(group) || origin.forwarded {
            let to = (request.to_node != 0).then_some(NodeId(request.to_node));
            let to_node = self.transfer_here(group, to).await.map_err(|error| admin_status(&error))?;
            return Ok(Response::new(v1::TransferLeaderResponse { to_node: to_node.0 }));
        }
        let channel = self.leader_channel(group).await?;
        self.client(channel).transfer_leader(forwarded(request, TRANSFER_TIMEOUT)).await
    }

    async fn trigger_snapshot(
        &self,
        request: Request<v1::TriggerSnapshotRequest>,
    ) -> Result<Response<v1::TriggerSnapshotResponse>, Status> {
        let group = self.group_of(request.into_inner().group_id)?;
        if self.local_status().groups.iter().all(|status| status.group_id != group.0) {
            let message =
                format!("there is no replica of group {group} on node {}", self.gateway.config.node);
            return Err(CallFailure::other(Code::NotFound, "NO_REPLICA", message).status());
        }
        let made = match &self.gateway.local {
            Some(local) if group == GroupId::COORDINATOR => local.group.trigger_snapshot().await,
            _ => self.local.trigger_snapshot(group).await,
        };
        let index = made.map_err(|error| admin_status(&error))?;
        Ok(Response::new(v1::TriggerSnapshotResponse { index }))
    }

    async fn members(
        &self,
        request: Request<v1::MembersRequest>,
    ) -> Result<Response<v1::MembersResponse>, Status> {
        let request = request.into_inner();
        if request.cluster.is_empty() {
            // A person or a tool asks, and wants to know what is so now.
            self.spread.ask_all().await;
        } else if request.cluster != self.spread.cluster {
            let message = format!("this node belongs to cluster {:?}", self.spread.cluster);
            return Err(CallFailure::other(Code::PermissionDenied, "OTHER_CLUSTER", message).status());
        } else {
            self.spread.take(request.view.unwrap_or_default());
            self.spread.refresh();
        }
        Ok(Response::new(self.spread.answer(self.joins)))
    }

    async fn change_node(
        &self,
        request: Request<v1::ChangeNodeRequest>,
    ) -> Result<Response<v1::ChangeNodeResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let request = request.into_inner();
        let local = || self.change_node_here(&request);
        let remote = |channel| {
            let (mut client, request) = (self.client(channel), request.clone());
            async move { client.change_node(forwarded(request, MEMBERS_TIMEOUT)).await }
        };
        let deadline = Instant::now() + MEMBERS_TIMEOUT;
        let response = self.gateway.at_leader_by(deadline, origin, local, remote).await?;
        if !origin.forwarded {
            self.spread.ask_all().await;
        }
        Ok(Response::new(response))
    }

    async fn change_replica(
        &self,
        request: Request<v1::ChangeReplicaRequest>,
    ) -> Result<Response<v1::ChangeReplicaResponse>, Status> {
        let origin = Origin::of(request.metadata());
        let request = request.into_inner();
        let group = self.group_of(request.group_id)?;
        if self.leads_here(group) || origin.forwarded {
            return self.change_replica_here(group, request).await.map(Response::new);
        }
        let channel = self.leader_channel(group).await?;
        self.client(channel).change_replica(forwarded(request, MEMBERS_TIMEOUT)).await
    }
}

impl AdminService {
    /// The server with its limits.
    pub(crate) fn server(self) -> AdminServer<AdminService> {
        let most = self.gateway.config.message_bytes_max;
        AdminServer::new(self).max_encoding_message_size(most)
    }

    pub(crate) fn client(&self, channel: Channel) -> AdminClient<Channel> {
        AdminClient::new(channel).max_decoding_message_size(self.gateway.config.message_bytes_max)
    }

    /// All nodes but this one.
    fn others(&self) -> impl Iterator<Item = (NodeId, Channel)> {
        let leaders = &self.gateway.leaders;
        let others = leaders.nodes().into_keys().filter(|node| *node != self.gateway.config.node);
        others.filter_map(|node| Some((node, leaders.channel(node)?)))
    }

    fn address(&self, node: NodeId) -> String {
        self.spread.directory.address(node).unwrap_or_default()
    }

    /// Whether the replica on this node leads a group, as far as it knows.
    fn leads_here(&self, group: GroupId) -> bool {
        let leads = |status: &v1::GroupStatus| status.role() == v1::ReplicaRole::Leader;
        self.local_status().groups.iter().any(|status| status.group_id == group.0 && leads(status))
    }

    /// The way to the node that leads a group.
    async fn leader_channel(&self, group: GroupId) -> Result<Channel, Status> {
        let nodes = self.nodes_status().await;
        let leader = leader_of(&nodes, group).and_then(|node| self.gateway.leaders.channel(node));
        leader.ok_or_else(|| {
            let message = format!("no leader of group {group} can be reached");
            CallFailure::unavailable(message, None).status()
        })
    }

    fn group_of(&self, group: u32) -> Result<GroupId, Status> {
        let shards = self.gateway.config.placement.shards;
        if group > shards {
            let problem = format!("is {group}: 0 is the coordinator group, 1 to {shards} are the shards");
            return Err(CallFailure::invalid("group_id", problem).status());
        }
        Ok(GroupId(group))
    }

    /// This node.
    fn local_status(&self) -> v1::NodeStatus {
        let node = self.gateway.config.node;
        let coordinator = self.gateway.local.as_ref().map(|local| coordinator_status(&local.group));
        v1::NodeStatus {
            node_id: node.0,
            address: self.address(node),
            reachable: true,
            error: String::new(),
            version: self.version.clone(),
            groups: coordinator.into_iter().chain(self.local.groups()).collect(),
            counters: Some(v1::ProcessCounters {
                synced_writes: SYNCED_WRITES.get(),
                messages_sent: MESSAGES_SENT.get(),
            }),
        }
    }

    /// All nodes, in order of their ids.
    pub(crate) async fn nodes_status(&self) -> Vec<v1::NodeStatus> {
        let others = self.others().map(|(node, channel)| {
            let mut client = self.client(channel);
            let question = v1::StatusRequest { local_only: true };
            async move {
                let answer = within(client.status(forwarded(question, NODE_TIMEOUT))).await;
                let status = answer.and_then(|response| {
                    response.nodes.into_iter().next().ok_or_else(|| "it answered nothing".to_owned())
                });
                (node, status)
            }
        });
        let mut nodes = BTreeMap::new();
        for (node, status) in join_all(others).await {
            let status = status.unwrap_or_else(|error| v1::NodeStatus {
                node_id: node.0,
                address: self.address(node),
                error,
                ..v1::NodeStatus::default()
            });
            nodes.insert(node, status);
        }
        nodes.insert(self.gateway.config.node, self.local_status());
        nodes.into_values().collect()
    }

    /// What this node knows: the shards that it doesn't lead are listed as out of its reach.
    fn in_doubt_here(&self, limit: usize) -> v1::ListInDoubtResponse {
        let (parts, led) = self.local.in_doubt(limit);
        let led: BTreeSet<ShardId> = led.into_iter().collect();
        let others = self.gateway.config.placement.all().filter(|shard| !led.contains(shard));
        v1::ListInDoubtResponse { parts, unreachable_shards: others.map(|shard| shard.0).collect() }
    }

    async fn transfer_here(&self, group: GroupId, to: Option<NodeId>) -> Result<NodeId, AdminError> {
        match &self.gateway.local {
            Some(local) if group == GroupId::COORDINATOR => local.group.transfer_leader(to).await,
            None if group == GroupId::COORDINATOR => Err(AdminError::NotLeader { leader: None }),
            _ => self.local.transfer_leader(group, to).await,
        }
    }
}

/// An answer of one node within its time.
pub(crate) async fn within<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, String> {
    match tokio::time::timeout(NODE_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err(format!("no answer within {} ms", NODE_TIMEOUT.as_millis())),
    }
}

/// The node that leads a group: of those that say so, the one in the highest term.
pub(crate) fn leader_of(nodes: &[v1::NodeStatus], group: GroupId) -> Option<NodeId> {
    let replicas = nodes.iter().flat_map(|node| node.groups.iter().map(move |status| (node.node_id, status)));
    replicas
        .filter(|(_, status)| status.group_id == group.0 && status.role() == v1::ReplicaRole::Leader)
        .max_by_key(|(_, status)| status.term)
        .map(|(node, _)| NodeId(node))
}

/// Puts the answers of all nodes together. A shard is out of reach if it is for all of them.
fn merge_in_doubt(
    answers: Vec<v1::ListInDoubtResponse>,
    shards: impl Iterator<Item = ShardId>,
    limit: usize,
) -> v1::ListInDoubtResponse {
    let mut unreachable: BTreeSet<u32> = shards.map(|shard| shard.0).collect();
    let mut parts: BTreeMap<u32, BTreeMap<(u64, u64), v1::InDoubtPart>> = BTreeMap::new();
    for answer in answers {
        unreachable.retain(|shard| answer.unreachable_shards.contains(shard));
        for part in answer.parts {
            parts.entry(part.shard).or_default().insert((part.epoch, part.sequence), part);
        }
    }
    v1::ListInDoubtResponse {
        parts: parts.into_values().flat_map(|shard| shard.into_values().take(limit)).collect(),
        unreachable_shards: unreachable.into_iter().collect(),
    }
}

/// The state of the coordinator's replica.
fn coordinator_status(group: &Group<Coordinator>) -> v1::GroupStatus {
    let counts = group.read(|machine, _| machine.counts());
    merge_status(&group.status(), counts)
}

fn merge_status(status: &GroupStatus, counts: CoordinatorCounts) -> v1::GroupStatus {
    v1::GroupStatus {
        unfinished: u32::try_from(counts.unfinished).unwrap_or(u32::MAX),
        decisions: counts.decisions,
        epoch: counts.epoch.0,
        horizon_ms: counts.horizon.0,
        ..group_status_to_wire(status, v1::GroupKind::Coordinator)
    }
}

/// What Raft tells of a replica, as it is shown; what the machine adds is left empty.
pub fn group_status_to_wire(status: &GroupStatus, kind: v1::GroupKind) -> v1::GroupStatus {
    let role = match status.role {
        Role::Leader => v1::ReplicaRole::Leader,
        Role::Follower => v1::ReplicaRole::Follower,
        Role::Candidate => v1::ReplicaRole::Candidate,
        Role::Learner => v1::ReplicaRole::Learner,
        Role::Stopped => v1::ReplicaRole::Stopped,
    };
    v1::GroupStatus {
        group_id: status.group.0,
        kind: kind.into(),
        term: status.term,
        role: role.into(),
        leader: status.leader.unwrap_or_default().0,
        last_index: status.last_index,
        committed_index: status.committed_index,
        applied_index: status.applied_index,
        state_hash: hex(&status.position.hash),
        state_hash_index: status.position.index,
        snapshot_index: status.snapshot_index,
        voters: status.voters.iter().map(|node| node.0).collect(),
        silent_voters: status.silent_voters.iter().map(|node| node.0).collect(),
        ..v1::GroupStatus::default()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing into a string can't fail");
        text
    })
}

/// An operator's request that failed.
pub(crate) fn admin_status(error: &AdminError) -> Status {
    let message = error.to_string();
    let (code, reason) = match error {
        AdminError::NotLeader { .. } => (Code::Unavailable, "NOT_GROUP_LEADER"),
        AdminError::Refused(_) => (Code::FailedPrecondition, "REFUSED"),
        AdminError::Unknown(_) => (Code::Unknown, "OUTCOME_UNKNOWN"),
        AdminError::Stopped(_) => (Code::Unavailable, "STOPPED"),
    };
    let status = CallFailure::other(code, reason, message).status();
    debug_assert!(is_answer(&status), "our own statuses carry our domain");
    status
}

#[cfg(test)]
mod tests {
    use verdict_protocol::{
        batch::Placement,
        ids::{Epoch, Millis},
        machine::Position,
    };

    use super::*;

    fn part(shard: u32, sequence: u64) -> v1::InDoubtPart {
        v1::InDoubtPart { shard, sequence, ..Default::default() }
    }

    #[test]
    fn a_shard_is_out_of_reach_if_no_node_leads_it() {
        let first =
            v1::ListInDoubtResponse { parts: vec![part(2, 9), part(2, 4)], unreachable_shards: vec![1, 3] };
        let second = v1::ListInDoubtResponse { parts: vec![part(1, 7)], unreachable_shards: vec![2, 3] };
        let merged = merge_in_doubt(vec![first, second], Placement { shards: 3 }.all(), 10);
        let order: Vec<_> = merged.parts.iter().map(|part| (part.shard, part.sequence)).collect();
        assert_eq!(order, [(1, 7), (2, 4), (2, 9)]);
        assert_eq!(merged.unreachable_shards, [3]);
    }

    #[test]
    fn of_two_that_say_they_lead_the_later_term_counts() {
        let leads = |node_id, group_id, term| v1::NodeStatus {
            node_id,
            groups: vec![v1::GroupStatus {
                group_id,
                term,
                role: v1::ReplicaRole::Leader.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let nodes = [leads(1, 2, 5), leads(2, 2, 7), leads(3, 1, 9)];
        assert_eq!(leader_of(&nodes, GroupId(2)), Some(NodeId(2)));
        assert_eq!(leader_of(&nodes, GroupId(3)), None);
    }

    #[test]
    fn the_coordinator_shows_its_hash_with_the_index_it_belongs_to() {
        let status = GroupStatus {
            group: GroupId(0),
            term: 3,
            role: Role::Leader,
            leader: Some(NodeId(1)),
            last_index: 12,
            committed_index: 11,
            applied_index: 10,
            position: Position { index: 9, hash: [0xab; 32] },
            snapshot_index: 0,
            purged_index: 0,
            voters: vec![NodeId(1)],
            silent_voters: vec![],
        };
        let counts = CoordinatorCounts { epoch: Epoch(4), decisions: 8, unfinished: 2, horizon: Millis(6) };
        let shown = merge_status(&status, counts);
        assert_eq!((shown.state_hash.as_str(), shown.state_hash_index), ("ab".repeat(32).as_str(), 9));
        assert_eq!((shown.epoch, shown.decisions, shown.unfinished, shown.horizon_ms), (4, 8, 2, 6));
        assert_eq!(shown.kind(), v1::GroupKind::Coordinator);
    }
}
