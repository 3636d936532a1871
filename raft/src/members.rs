//! Who belongs to a group: as a replica knows it, and as its leader changes it, one step at a time.
//!
//! A wish names a node that shall vote and one that shall be gone. [`Group::change_members`] does the next step towards it and tells
//! what is still missing, so whoever wishes repeats it until it is done, whatever happens in between: a step that was made already
//! isn't made again.
//!
//! Invariants:
//! - A node gets a vote only after it has caught up.
//! - No step is begun that the members who answer couldn't bring to its end, and none leaves a group whose members who answer are no
//!   majority.
//! - The new one comes and the old one goes in one change of the voters, by joint consensus.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use openraft::{
    BasicNode, ChangeMembers, RaftMetrics, ServerState, async_runtime::watch::WatchReceiver as _,
};
use tokio::time::timeout;
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Machine,
};

use crate::{
    api::AdminError,
    group::{Group, admin_error},
    types::Types,
};

/// A node may be so many entries behind when it gets its vote: it has them a moment later.
const BEHIND_MAX: u64 = 256;
/// How long a step may take until nobody knows whether it will be done.
const STEP_PATIENCE: Duration = Duration::from_secs(5);

/// Who belongs to a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// The group.
    pub group: GroupId,
    /// The index of the entry that says so. A later one counts more.
    pub index: u64,
    /// Who votes.
    pub voters: BTreeSet<NodeId>,
    /// Who is sent all entries, the voters included, and where they are reached.
    pub nodes: BTreeMap<NodeId, String>,
}

/// How far a wish has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It is fulfilled.
    Done,
    /// This was done or is awaited; wish again after a moment.
    Underway(String),
}

impl<M: Machine> Group<M> {
    /// Who belongs to the group, as far as this replica knows it to be committed.
    pub fn members(&self) -> Option<Members> {
        let metrics = self.raft().metrics().borrow_watched().clone();
        let index = metrics.membership_config.log_id().as_ref().map(|id| id.index)?;
        if metrics.local_committed.is_none_or(|committed| committed.index < index) {
            return None;
        }
        let nodes = metrics.membership_config.nodes();
        Some(Members {
            group: self.id(),
            index,
            voters: metrics.membership_config.voter_ids().map(NodeId).collect(),
            nodes: nodes.map(|(node, at)| (NodeId(*node), at.addr.clone())).collect(),
        })
    }

    /// Makes the next step so that `add` votes and `remove` is no member.
    pub async fn change_members(
        &self,
        add: Option<(NodeId, String)>,
        remove: Option<NodeId>,
    ) -> Result<Progress, AdminError> {
        let metrics = self.raft().metrics().borrow_watched().clone();
        if metrics.state != ServerState::Leader {
            return Err(AdminError::NotLeader { leader: metrics.current_leader.map(NodeId) });
        }
        let index = |id: &Option<_>| id.as_ref().map(|id: &crate::types::LogId| id.index);
        if index(&metrics.cluster_committed) < index(metrics.membership_config.log_id()) {
            return Ok(Progress::Underway("an earlier change is not committed yet".to_owned()));
        }
        if let Some((node, address)) = &add
            && let Some(progress) = self.prepare(&metrics, *node, address).await?
        {
            return Ok(progress);
        }
        self.change_voters(&metrics, add.map(|(node, _)| node), remove).await
    }

    /// Makes a node ready for its vote: adds it without one, and looks how far it has come. Nothing: it is ready.
    async fn prepare(
        &self,
        metrics: &RaftMetrics<Types>,
        node: NodeId,
        address: &str,
    ) -> Result<Option<Progress>, AdminError> {
        let membership = metrics.membership_config.membership();
        let Some(known) = membership.get_node(&node.0) else {
            let added = self.raft().add_learner(node.0, BasicNode::new(address), false);
            step(added).await?;
            let text = format!("node {node} was added without a vote");
            return Ok(Some(Progress::Underway(text)));
        };
        if known.addr != address {
            let text = format!("node {node} is a member at {}, not at {address}", known.addr);
            return Err(AdminError::Refused(text));
        }
        if membership.get_joint_config().iter().all(|voters| voters.contains(&node.0)) {
            return Ok(None);
        }
        let matched = metrics.replication.as_ref().and_then(|all| all.get(&node.0).cloned().flatten());
        let last = metrics.last_log_index.unwrap_or_default();
        let Some(matched) = matched else {
            return Ok(Some(Progress::Underway(format!("node {node} hasn't taken anything yet"))));
        };
        let behind = last.saturating_sub(matched.index);
        if behind > BEHIND_MAX || !self.heard(metrics).contains(&node.0) {
            return Ok(Some(Progress::Underway(format!("node {node} is {behind} entries behind"))));
        }
        Ok(None)
    }

    async fn change_voters(
        &self,
        metrics: &RaftMetrics<Types>,
        add: Option<NodeId>,
        remove: Option<NodeId>,
    ) -> Result<Progress, AdminError> {
        let membership = metrics.membership_config.membership();
        let configs = membership.get_joint_config();
        // In a joint state the last one is where it was going.
        let goal = configs.last().cloned().unwrap_or_default();
        let mut voters = goal.clone();
        voters.extend(add.map(|node| node.0));
        if let Some(node) = remove {
            voters.remove(&node.0);
        }
        if voters.is_empty() {
            return Err(AdminError::Refused("nobody would be left to vote".to_owned()));
        }
        let stays = remove.is_some_and(|node| membership.get_node(&node.0).is_some());
        if configs.len() == 1 && voters == goal {
            if !stays {
                return Ok(Progress::Done);
            }
            // It never had a vote.
            let gone = ChangeMembers::RemoveNodes(remove.iter().map(|node| node.0).collect());
            step(self.raft().change_membership(gone, true)).await?;
            return Ok(Progress::Done);
        }
        if let ([only], Some(add), Some(remove)) = (configs.as_slice(), add, remove)
            && only.contains(&add.0)
            && only.contains(&remove.0)
        {
            // In a change that takes the one in and the other out this never is so.
            let text = format!("node {add} has a vote already: it can't take the place of node {remove}");
            return Err(AdminError::Refused(text));
        }
        let heard = self.heard(metrics);
        for config in configs.iter().chain([&voters]) {
            let answer = config.intersection(&heard).count();
            if answer < config.len() / 2 + 1 {
                let text = format!(
                    "only {answer} of the {} voters {config:?} answer: that is no majority, so nothing was changed",
                    config.len()
                );
                return Err(AdminError::Refused(text));
            }
        }
        if remove == Some(NodeId(metrics.id)) {
            // Whoever takes over has a vote, keeps it, and answers.
            let stays = |node: &&u64| **node != metrics.id && voters.contains(*node) && heard.contains(*node);
            let Some(to) = goal.iter().find(stays) else {
                return Err(AdminError::Refused("nobody else can lead".to_owned()));
            };
            let to = self.transfer_leader(Some(NodeId(*to))).await?;
            return Ok(Progress::Underway(format!("the leadership was handed to node {to} first")));
        }
        step(self.raft().change_membership(voters, false)).await?;
        Ok(Progress::Done)
    }

    /// This leader, and whoever it has heard of lately.
    fn heard(&self, metrics: &RaftMetrics<Types>) -> BTreeSet<u64> {
        let lately = Duration::from_millis(self.timing().silent_after_ms);
        let heard = metrics
            .heartbeat
            .iter()
            .flatten()
            .filter(|(_, at)| at.as_ref().is_some_and(|at| openraft::Instant::elapsed(&**at) <= lately));
        heard.map(|(node, _)| *node).chain([metrics.id]).collect()
    }
}

/// Waits for a step, but not for ever.
async fn step<T>(
    change: impl Future<
        Output = Result<T, openraft::errors::RaftError<Types, openraft::errors::ClientWriteError<Types>>>,
    >,
) -> Result<(), AdminError> {
    match timeout(STEP_PATIENCE, change).await {
        Ok(done) => done.map(drop).map_err(admin_error),
        Err(_) => Err(AdminError::Unknown("the change isn't committed yet".to_owned())),
    }
}
