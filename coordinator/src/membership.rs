//! What the `Admin` service does at the leaders when members change: the checks, and the step.
//!
//! - An id that was ever used is refused: the coordinators' list remembers it ([`verdict_protocol::roster`]).
//! - A node is let in only if it answers as itself, belongs to this cluster, and has founded nothing.
//! - A node is noted as removed only when no group counts on it any more.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use verdict_proto::v1::{self, admin_client::AdminClient};
use verdict_protocol::{
    coordinator::{CoordinatorEntry, CoordinatorReply},
    ids::{GroupId, NodeId},
    machine::encode,
    roster::{NodeChange, NodeRefusal, NodeWish},
};
use verdict_raft::{AdminError, Progress, ProposeError};

use crate::{
    admin::{AdminService, admin_status, leader_of, within},
    directory::View,
    failure::CallFailure,
    gateway::Tried,
};

/// A node that was just started may take so long until it listens, and is asked again after a pause.
const STARTS_WITHIN: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

impl AdminService {
    /// Changes the list of nodes, if this node leads the coordinators.
    pub(crate) async fn change_node_here(
        &self,
        request: &v1::ChangeNodeRequest,
    ) -> Result<v1::ChangeNodeResponse, Tried> {
        let Some(local) = self.gateway.leading() else { return Err(Tried::Elsewhere(None)) };
        let node = NodeId(request.node_id);
        if request.remove != request.address.is_empty() || node == NodeId(0) {
            let problem = "give a node and its address, or a node that is to be removed";
            return Err(CallFailure::invalid("address", problem).into());
        }
        self.spread.ask_all().await;
        let (wish, groups) = match request.remove {
            true => {
                self.check_gone(node).await?;
                (NodeWish::Remove, Vec::new())
            }
            false => {
                self.check_unused(node)?;
                let said = self.check_joins(node, &request.address).await?;
                (NodeWish::Add(request.address.clone()), said.groups)
            }
        };
        let change = NodeChange { founders: self.founders.clone(), node, wish };
        let applied = local.group.propose(encode(&CoordinatorEntry::Node(change))).await;
        match applied.map(|applied| applied.reply) {
            Ok(CoordinatorReply::Node(Ok(()))) => {
                self.spread.ask_all().await;
                Ok(v1::ChangeNodeResponse { groups })
            }
            Ok(CoordinatorReply::Node(Err(why))) => Err(refused(refusal_text(node, &why)).into()),
            Ok(
                CoordinatorReply::Opened(_)
                | CoordinatorReply::Acted(_)
                | CoordinatorReply::OldEpoch { .. }
                | CoordinatorReply::OtherPlacement { .. },
            ) => Err(Tried::Final(Status::internal("the coordinators gave an answer of another kind"))),
            Err(ProposeError::NotLeader { leader }) => Err(Tried::Elsewhere(leader)),
            Err(ProposeError::Refused(why)) => Err(CallFailure::overloaded(why).into()),
            Err(ProposeError::Unknown(why)) => Err(Tried::Final(admin_status(&AdminError::Unknown(why)))),
            Err(ProposeError::Stopped(why)) => Err(Tried::Final(admin_status(&AdminError::Stopped(why)))),
        }
    }

    /// Makes the next step in a group that this node leads.
    pub(crate) async fn change_replica_here(
        &self,
        group: GroupId,
        request: v1::ChangeReplicaRequest,
    ) -> Result<v1::ChangeReplicaResponse, Status> {
        let remove = (request.remove_node != 0).then_some(NodeId(request.remove_node));
        let add = match request.add_node {
            0 => None,
            node => Some(self.candidate(group, NodeId(node)).await.map_err(CallFailure::status)?),
        };
        if add.is_none() && remove.is_none() {
            return Err(CallFailure::invalid("add_node", "name a node to add or one to remove").status());
        }
        let changed = match &self.gateway.local {
            Some(local) if group == GroupId::COORDINATOR => local.group.change_members(add, remove).await,
            None if group == GroupId::COORDINATOR => Err(AdminError::NotLeader { leader: None }),
            _ => self.local.change_members(group, add, remove).await,
        };
        match changed.map_err(|error| admin_status(&error))? {
            Progress::Done => {
                self.spread.ask_all().await;
                Ok(v1::ChangeReplicaResponse { done: true, step: String::new() })
            }
            Progress::Underway(step) => Ok(v1::ChangeReplicaResponse { done: false, step }),
        }
    }

    /// Checks that a node is one of the cluster and has a replica of the group, ready to be filled.
    async fn candidate(&self, group: GroupId, node: NodeId) -> Result<(NodeId, String), CallFailure> {
        self.check_unused(node)?;
        let Some(address) = self.spread.directory.address(node) else {
            return Err(refused(format!("there is no node {node} in the list of nodes: add it first")));
        };
        let said = self.ask(node, &address).await?;
        if !said.groups.contains(&group.0) {
            return Err(refused(format!(
                "node {node} has no replica of group {group}: name it in `coordinators` or [shard_replicas] of its configuration"
            )));
        }
        Ok((node, address))
    }

    fn check_unused(&self, node: NodeId) -> Result<(), CallFailure> {
        match self.spread.directory.view().removed.contains_key(&node) {
            true => Err(refused(refusal_text(node, &NodeRefusal::UsedBefore))),
            false => Ok(()),
        }
    }

    /// Checks that a new node has founded nothing.
    async fn check_joins(&self, node: NodeId, address: &str) -> Result<v1::MembersResponse, CallFailure> {
        let said = self.ask(node, address).await?;
        let known = self.spread.directory.view().nodes.contains_key(&node);
        if !said.joins && !known {
            return Err(refused(format!(
                "node {node} was not set up to join: it needs an empty folder, and `join = true` in its configuration"
            )));
        }
        Ok(said)
    }

    /// Asks the node at an address who it is, and tells it what is known.
    async fn ask(&self, node: NodeId, address: &str) -> Result<v1::MembersResponse, CallFailure> {
        let directory = &self.spread.directory;
        let channel = directory.channel_to(address).map_err(|error| {
            CallFailure::invalid("address", format!("{address:?} is no host:port: {error}"))
        })?;
        let question = v1::MembersRequest {
            cluster: self.spread.cluster.clone(),
            view: Some(directory.view().to_wire()),
        };
        let deadline = Instant::now() + STARTS_WITHIN;
        let said = loop {
            match within(AdminClient::new(channel.clone()).members(question.clone())).await {
                Ok(said) => break said,
                Err(_) if Instant::now() < deadline => sleep(PAUSE).await,
                Err(why) => return Err(refused(format!("node {node} doesn't answer at {address}: {why}"))),
            }
        };
        if said.cluster != self.spread.cluster || said.node_id != node.0 {
            return Err(refused(format!(
                "node {} of cluster {:?} answers at {address}, not node {node} of cluster {:?}",
                said.node_id, said.cluster, self.spread.cluster
            )));
        }
        Ok(said)
    }

    /// Checks that no group counts on a node any more, as the leaders of all groups say.
    async fn check_gone(&self, node: NodeId) -> Result<(), CallFailure> {
        let nodes = self.nodes_status().await;
        let groups = self.gateway.config.placement.all().map(|shard| shard.group());
        let view: View = self.spread.directory.view();
        for group in groups.chain([GroupId::COORDINATOR]) {
            let leader = leader_of(&nodes, group).and_then(|leader| {
                let status = nodes.iter().find(|status| status.node_id == leader.0)?;
                status.groups.iter().find(|status| status.group_id == group.0)
            });
            let Some(leader) = leader else {
                let message = format!(
                    "no leader of group {group} can be reached to ask whether node {node} is a member"
                );
                return Err(CallFailure::unavailable(message, None));
            };
            let learners = view.groups.get(&group).map(|replicas| replicas.learners.clone());
            let learners: BTreeSet<NodeId> = learners.unwrap_or_default();
            if leader.voters.contains(&node.0) || learners.contains(&node) {
                return Err(refused(format!("node {node} is still a member of group {group}")));
            }
        }
        Ok(())
    }
}

fn refused(message: impl Into<String>) -> CallFailure {
    CallFailure::other(Code::FailedPrecondition, "REFUSED", message)
}

fn refusal_text(node: NodeId, why: &NodeRefusal) -> String {
    match why {
        NodeRefusal::UsedBefore => {
            format!("node {node} was removed, and its id is never used again: choose another id")
        }
        NodeRefusal::OtherAddress(address) => {
            format!("node {node} is in the list with the address {address}")
        }
        NodeRefusal::AddressTaken(other) => format!("node {other} is reached at this address already"),
        NodeRefusal::Unknown => format!("there is no node {node}"),
    }
}
