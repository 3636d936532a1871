//! Which nodes there are, where they are reached, and who has replicas of what, as this node knows.
//!
//! It starts with what the configuration says. Newer knowledge comes from this node's own replicas and from other nodes
//! ([`crate::spread`]). A wrong belief costs a try, nothing else: who votes in a group is decided inside that group alone.
//!
//! Invariants:
//! - The list of nodes and the members of each group only ever become newer.
//! - A node that was removed stays removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::watch;
use tonic::transport::Channel;
use verdict_proto::{connect::Connect, v1};
use verdict_protocol::{
    ids::{GroupId, NodeId},
    roster::NodeRecord,
};
use verdict_raft::Members;

/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    /// The index of the coordinators' entry that changed the list of nodes last; 0: it is that of the configuration.
    pub(crate) version: u64,
    /// All nodes, and where they are reached.
    pub(crate) nodes: BTreeMap<NodeId, String>,
    /// Those that were removed, and where they were.
    pub(crate) removed: BTreeMap<NodeId, String>,
    /// Who belongs to which group.
    pub(crate) groups: BTreeMap<GroupId, Replicas>,
}

/// Who belongs to a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replicas {
    /// The index of the group's entry that says so.
    pub(crate) index: u64,
    pub(crate) voters: BTreeSet<NodeId>,
    pub(crate) learners: BTreeSet<NodeId>,
}

impl View {
    /// The view of the coordinators' own list.
    pub(crate) fn of_roster(records: &[(NodeId, NodeRecord)]) -> View {
        let version = records.iter().map(|(_, record)| record.changed).max().unwrap_or_default();
        let (removed, nodes): (Vec<_>, Vec<_>) = records.iter().partition(|(_, record)| record.removed);
        let pick = |list: Vec<&(NodeId, NodeRecord)>| {
            list.into_iter().map(|(node, record)| (*node, record.address.clone())).collect()
        };
        View { version, nodes: pick(nodes), removed: pick(removed), groups: BTreeMap::new() }
    }

    /// The view of groups with replicas here.
    pub(crate) fn of_groups(members: impl IntoIterator<Item = Members>) -> View {
        let groups = members.into_iter().map(|members| {
            let learners = members.nodes.into_keys().filter(|node| !members.voters.contains(node)).collect();
            (members.group, Replicas { index: members.index, voters: members.voters, learners })
        });
        View { groups: groups.collect(), ..View::default() }
    }

    /// Takes over what is newer. Says whether anything was.
    fn merge(&mut self, other: View) -> bool {
        let newer_nodes = other.version > self.version;
        if newer_nodes {
            (self.version, self.nodes, self.removed) = (other.version, other.nodes, other.removed);
        }
        let mut newer_groups = false;
        for (group, replicas) in other.groups {
            if self.groups.get(&group).is_none_or(|known| known.index < replicas.index) {
                self.groups.insert(group, replicas);
                newer_groups = true;
            }
        }
        newer_nodes || newer_groups
    }

    /// The voters of a group, if they are known.
    pub(crate) fn voters(&self, group: GroupId) -> Option<&BTreeSet<NodeId>> {
        self.groups.get(&group).map(|replicas| &replicas.voters)
    }

    pub(crate) fn from_wire(view: v1::ClusterView) -> View {
        let ids = |nodes: Vec<u64>| nodes.into_iter().map(NodeId).collect();
        let mut known = View { version: view.version, ..View::default() };
        for record in view.nodes {
            let list = if record.removed { &mut known.removed } else { &mut known.nodes };
            list.insert(NodeId(record.node_id), record.address);
        }
        for group in view.groups {
            let replicas =
                Replicas { index: group.index, voters: ids(group.voters), learners: ids(group.learners) };
            known.groups.insert(GroupId(group.group_id), replicas);
        }
        known
    }

    pub(crate) fn to_wire(&self) -> v1::ClusterView {
        let list = |nodes: &BTreeMap<NodeId, String>, removed| {
            let record = |(node, address): (&NodeId, &String)| v1::NodeRecord {
                node_id: node.0,
                address: address.clone(),
                removed,
            };
            nodes.iter().map(record).collect::<Vec<_>>()
        };
        let ids = |nodes: &BTreeSet<NodeId>| nodes.iter().map(|node| node.0).collect();
        let groups = self.groups.iter().map(|(group, replicas)| v1::GroupMembers {
            group_id: group.0,
            index: replicas.index,
            voters: ids(&replicas.voters),
            learners: ids(&replicas.learners),
        });
        let mut nodes = [list(&self.nodes, false), list(&self.removed, true)].concat();
        nodes.sort_by_key(|record| record.node_id);
        v1::ClusterView { version: self.version, nodes, groups: groups.collect() }
    }
}

/// What is known, shared by all who need it, and channels to all nodes.
#[derive(Debug)]
pub(crate) struct Directory {
    own: (NodeId, String),
    connect: Arc<dyn Connect>,
    view: watch::Sender<View>,
    channels: Mutex<BTreeMap<NodeId, (String, Channel)>>,
}

impl Directory {
    /// Starts with what the configuration says. An error names the address that is malformed.
    pub(crate) fn new(node: NodeId, view: View, connect: Arc<dyn Connect>) -> Result<Directory, String> {
        for (id, address) in &view.nodes {
            connect
                .channel(address)
                .map_err(|error| format!("the address {address:?} of node {id} is malformed: {error}"))?;
        }
        let own = (node, view.nodes.get(&node).cloned().unwrap_or_default());
        Ok(Directory { own, connect, view: watch::Sender::new(view), channels: Mutex::default() })
    }

    /// What is known now.
    pub(crate) fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Tells when there is news.
    pub(crate) fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Takes over what is newer.
    pub(crate) fn merge(&self, other: View) {
        self.view.send_if_modified(|view| view.merge(other));
    }

    /// All nodes and where they are reached, this one included.
    pub(crate) fn nodes(&self) -> BTreeMap<NodeId, String> {
        let mut nodes = self.view.borrow().nodes.clone();
        // One that is about to join isn't in the list yet.
        nodes.entry(self.own.0).or_insert_with(|| self.own.1.clone());
        nodes
    }

    /// Where a node is reached.
    pub(crate) fn address(&self, node: NodeId) -> Option<String> {
        match self.view.borrow().nodes.get(&node) {
            Some(address) => Some(address.clone()),
            None => (node == self.own.0).then(|| self.own.1.clone()),
        }
    }

    /// A channel to a node of the cluster.
    pub(crate) fn channel(&self, node: NodeId) -> Option<Channel> {
        let address = self.address(node)?;
        let mut channels = self.lock();
        if let Some((at, channel)) = channels.get(&node)
            && *at == address
        {
            return Some(channel.clone());
        }
        match self.connect.channel(&address) {
            Ok(channel) => {
                channels.insert(node, (address, channel.clone()));
                Some(channel)
            }
            Err(error) => {
                tracing::error!(%node, address, %error, "the address of a node is malformed");
                None
            }
        }
    }

    /// Channels to addresses that the list doesn't have yet.
    pub(crate) fn channel_to(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        self.connect.channel(address)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, (String, Channel)>> {
        self.channels.lock().expect("nothing panics while it holds this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(version: u64, nodes: &[u64], removed: &[u64], index: u64, voters: &[u64]) -> View {
        let at = |ids: &[u64]| ids.iter().map(|id| (NodeId(*id), format!("n{id}:1"))).collect();
        let voters = voters.iter().map(|id| NodeId(*id)).collect();
        let replicas = Replicas { index, voters, learners: BTreeSet::new() };
        View { version, nodes: at(nodes), removed: at(removed), groups: [(GroupId(1), replicas)].into() }
    }

    #[test]
    fn knowledge_only_becomes_newer_whatever_comes_in_which_order() {
        let old = view(0, &[1, 2, 3], &[], 0, &[1, 2, 3]);
        let mid = view(7, &[1, 2, 3, 4], &[], 9, &[1, 2, 3, 4]);
        let new = view(8, &[2, 3, 4], &[1], 12, &[2, 3, 4]);
        for order in [[&old, &mid, &new], [&new, &mid, &old], [&mid, &new, &old]] {
            let mut known = View::default();
            for other in order {
                known.merge(other.clone());
            }
            assert_eq!(known, new);
            assert!(!known.merge(mid.clone()), "nothing in it is newer");
        }
        assert_eq!(View::from_wire(new.to_wire()), new);
    }

    #[test]
    fn the_list_and_the_groups_become_newer_by_themselves() {
        let mut known = view(7, &[1, 2], &[], 12, &[1, 2]);
        known.merge(view(9, &[1, 2, 3], &[], 11, &[1]));
        assert_eq!(known, view(9, &[1, 2, 3], &[], 12, &[1, 2]));
    }
}
