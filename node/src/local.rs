//! What the admin service of a node may ask of the shards of the same node. The crates of the two sides don't know each other; this is
//! where they meet.

use std::collections::BTreeMap;

use verdict_coordinator::LocalStatus;
use verdict_participant::Participant;
use verdict_proto::v1;
use verdict_protocol::{
    ids::{GroupId, NodeId, ShardId},
    shard::Shard,
};
use verdict_raft::{AdminError, Group, Members, Progress};

/// The shards of this node.
pub struct Local {
    /// They.
    pub participant: Participant,
}

impl Local {
    fn group(&self, group: GroupId) -> Result<Group<Shard>, AdminError> {
        let found = self.participant.group(ShardId(group.0));
        found.ok_or_else(|| AdminError::Refused(format!("this node has no replica of group {group}")))
    }
}

#[tonic::async_trait]
impl LocalStatus for Local {
    fn groups(&self) -> Vec<v1::GroupStatus> {
        self.participant.status()
    }

    fn in_doubt(&self, limit: usize) -> (Vec<v1::InDoubtPart>, Vec<ShardId>) {
        let by_shard: BTreeMap<ShardId, Vec<v1::InDoubtPart>> = self.participant.in_doubt(limit);
        let led = by_shard.keys().copied().collect();
        (by_shard.into_values().flatten().collect(), led)
    }

    async fn transfer_leader(&self, group: GroupId, to: Option<NodeId>) -> Result<NodeId, AdminError> {
        self.group(group)?.transfer_leader(to).await
    }

    fn hosted(&self) -> Vec<GroupId> {
        self.participant.groups().map(|group| group.id()).collect()
    }

    fn members(&self) -> Vec<Members> {
        self.participant.groups().filter_map(|group| group.members()).collect()
    }

    async fn change_members(
        &self,
        group: GroupId,
        add: Option<(NodeId, String)>,
        remove: Option<NodeId>,
    ) -> Result<Progress, AdminError> {
        self.group(group)?.change_members(add, remove).await
    }

    async fn trigger_snapshot(&self, group: GroupId) -> Result<u64, AdminError> {
        self.group(group)?.trigger_snapshot().await
    }
}
